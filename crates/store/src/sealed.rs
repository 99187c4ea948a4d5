//! A store whose values are encrypted, each by the rules for its key
//! (<https://kubernetes.io/docs/tasks/administer-cluster/encrypt-data/>). The form of a value is upstream's `aesgcm`: the
//! name of the key in clear, a nonce, and AES-GCM with the store's key as additional data, so that a value that was put
//! under another name is not believed.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use rand::Rng as _;
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use crate::{Entry, Error, Event, Expect, Fence, ListOptions, Listing, Progress, Result, Revision, Store, Watch};

/// What every encrypted value begins with.
const MARK: &str = "k8s:enc:";
const FORM: &str = "k8s:enc:aesgcm:v1:";
/// How many values are looked at in one go when they are sealed anew.
const PAGE: usize = 500;

/// One way to write values.
pub enum Provider {
    /// As they are.
    Identity,
    /// With a key.
    Aes {
        /// Its name, which stands before every value.
        name: String,
        /// The key.
        key: Box<LessSafeKey>,
    },
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Provider::Identity => f.write_str("identity"),
            Provider::Aes { name, .. } => write!(f, "aesgcm {name:?}"),
        }
    }
}

/// A key of the wrong length.
#[derive(Debug, thiserror::Error)]
#[error("a key of {0} bytes: AES-GCM takes 16 or 32")]
pub struct KeyLength(usize);

impl Provider {
    /// AES-GCM with this key.
    pub fn aes(name: &str, key: &[u8]) -> Result<Provider, KeyLength> {
        let algorithm = match key.len() {
            16 => &AES_128_GCM,
            32 => &AES_256_GCM,
            other => return Err(KeyLength(other)),
        };
        let key = UnboundKey::new(algorithm, key).map_err(|_| KeyLength(key.len()))?;
        Ok(Provider::Aes { name: name.to_owned(), key: Box::new(LessSafeKey::new(key)) })
    }

    /// Whether it has written a value.
    fn wrote(&self, value: &[u8]) -> bool {
        match self {
            Provider::Identity => !value.starts_with(MARK.as_bytes()),
            Provider::Aes { name, .. } => body(name, value).is_some(),
        }
    }

    fn seal(&self, key: &str, value: Bytes) -> Result<Bytes> {
        let Provider::Aes { name, key: cipher } = self else { return Ok(value) };
        let mut nonce = [0; NONCE_LEN];
        rand::rng().fill(&mut nonce);
        let mut sealed = value.to_vec();
        cipher
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(key.as_bytes()), &mut sealed)
            .map_err(|_| broken(format!("the value of {key} cannot be encrypted: it is too long")))?;
        Ok([FORM.as_bytes(), name.as_bytes(), b":", &nonce, &sealed].concat().into())
    }

    fn open(&self, key: &str, value: Bytes) -> Result<Bytes> {
        let Provider::Aes { name, key: cipher } = self else { return Ok(value) };
        let wrong = || {
            broken(format!(
                "the value of {key} cannot be decrypted with the key {name:?}: it was damaged, moved here from another name, or encrypted with another key of that name"
            ))
        };
        let (nonce, sealed) = body(name, &value).and_then(|body| body.split_at_checked(NONCE_LEN)).ok_or_else(wrong)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| wrong())?;
        let length = cipher.open_in_place(nonce, Aad::from(key.as_bytes()), &mut sealed).map_err(|_| wrong())?.len();
        sealed.truncate(length);
        Ok(sealed.into())
    }
}

/// What follows the name of a key.
fn body<'a>(name: &str, value: &'a [u8]) -> Option<&'a [u8]> {
    value.strip_prefix(FORM.as_bytes())?.strip_prefix(name.as_bytes())?.strip_prefix(b":")
}

fn broken(reason: String) -> Error {
    Error::Unavailable { reason, source: None }
}

/// How the values below a prefix are written.
#[derive(Debug)]
pub struct Rule {
    /// What the keys begin with.
    pub prefix: String,
    /// The first one writes, all of them read.
    pub providers: Arc<[Provider]>,
}

/// A store that encrypts what it hands to another.
#[derive(Clone)]
pub struct Sealed {
    inner: Arc<dyn Store>,
    rules: Arc<[Rule]>,
}

impl Sealed {
    /// The first rule for a key holds.
    pub fn new(inner: Arc<dyn Store>, rules: Vec<Rule>) -> Sealed {
        Sealed { inner, rules: rules.into() }
    }

    fn rule(&self, key: &str) -> Option<&Rule> {
        self.rules.iter().find(|rule| key.starts_with(&rule.prefix))
    }

    fn open(&self, mut entry: Entry) -> Result<Entry> {
        let providers = self.rule(&entry.key).map(|rule| &rule.providers[..]).unwrap_or_default();
        entry.value = match providers.iter().find(|provider| provider.wrote(&entry.value)) {
            Some(provider) => provider.open(&entry.key, entry.value)?,
            None if entry.value.starts_with(MARK.as_bytes()) => {
                let head = entry.value[MARK.len()..].splitn(4, |byte| *byte == b':').take(3);
                let head: Vec<_> = head.map(String::from_utf8_lossy).collect();
                return Err(broken(format!(
                    "the value of {} is encrypted ({}), and no provider of --encryption-provider-config reads that: add the one that wrote it",
                    entry.key,
                    head.join(":"),
                )));
            }
            None if providers.is_empty() => entry.value,
            None => {
                return Err(broken(format!(
                    "the value of {} is not encrypted, and its providers in --encryption-provider-config have no identity: add it as the last one",
                    entry.key
                )));
            }
        };
        Ok(entry)
    }

    /// Opens a value of the past, unless nobody can read it and it does not hold any more: a provider that was removed
    /// since is no reason to fail at what it wrote before everything was written anew.
    async fn open_past(&self, entry: Entry) -> Result<Option<Entry>> {
        let (key, revision) = (entry.key.clone(), entry.revision);
        match self.open(entry) {
            Ok(entry) => Ok(Some(entry)),
            Err(error) => match self.inner.get(&key).await? {
                (Some(current), _) if current.revision == revision => Err(error),
                _ => Ok(None),
            },
        }
    }

    /// Writes anew, under its own revision, whatever was not written by the first provider of its rule. Tells how many
    /// those were. What somebody else changes in between is written by them.
    ///
    /// # Errors
    /// If the store fails, or a value cannot be read.
    pub async fn reseal(&self) -> Result<usize> {
        let mut count = 0;
        for rule in self.rules.iter() {
            let Some(first) = rule.providers.first() else { continue };
            let mut options = ListOptions { limit: PAGE, ..ListOptions::default() };
            loop {
                let page = self.inner.list(&rule.prefix, options.clone()).await?;
                for entry in &page.entries {
                    // An earlier rule may hold for some of them.
                    let own = self.rule(&entry.key).is_some_and(|of| std::ptr::eq(of, rule));
                    if !own || first.wrote(&entry.value) {
                        continue;
                    }
                    let (key, at) = (entry.key.clone(), entry.revision);
                    let plain = self.open(entry.clone())?;
                    match self.inner.put(&key, first.seal(&key, plain.value)?, Expect::At(at), None).await {
                        Ok(_) => count += 1,
                        Err(Error::Conflict { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                options.after = page.entries.last().map(|entry| entry.key.clone());
                if !page.more || options.after.is_none() {
                    break;
                }
            }
        }
        Ok(count)
    }
}

#[async_trait]
impl Store for Sealed {
    async fn get(&self, key: &str) -> Result<(Option<Entry>, Revision)> {
        let (entry, revision) = self.inner.get(key).await?;
        Ok((entry.map(|entry| self.open(entry)).transpose()?, revision))
    }

    async fn list(&self, prefix: &str, options: ListOptions) -> Result<Listing> {
        let mut listing = self.inner.list(prefix, options).await?;
        let entries = std::mem::take(&mut listing.entries);
        listing.entries.reserve(entries.len());
        for entry in entries {
            listing.entries.extend(self.open_past(entry).await?);
        }
        Ok(listing)
    }

    async fn put(&self, key: &str, value: Bytes, expect: Expect, fence: Option<&Fence>) -> Result<Revision> {
        let first = self.rule(key).and_then(|rule| rule.providers.first());
        let value = first.map_or_else(|| Ok(value.clone()), |provider| provider.seal(key, value.clone()))?;
        self.inner.put(key, value, expect, fence).await
    }

    async fn delete(&self, key: &str, expect: Expect, fence: Option<&Fence>) -> Result<Revision> {
        self.inner.delete(key, expect, fence).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch> {
        let (watch, store) = (self.inner.watch(prefix, after).await?, self.clone());
        let open = move |progress: Result<Progress>| {
            let store = store.clone();
            async move {
                let Progress { events, revision } = progress?;
                let mut opened = Vec::with_capacity(events.len());
                for event in events {
                    match event {
                        Event::Put(entry) => opened.extend(store.open_past(entry).await?.map(Event::Put)),
                        gone => opened.push(gone),
                    }
                }
                Ok(Progress { events: opened, revision })
            }
        };
        Ok(watch.then(open).boxed())
    }

    async fn revision(&self) -> Result<Revision> {
        self.inner.revision().await
    }

    async fn compact(&self, at: Revision) -> Result<()> {
        self.inner.compact(at).await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{
        contract,
        embedded::{Embedded, Options},
    };

    const KEY: &str = "/registry/secrets/default/a";

    fn aes(name: &str, byte: u8) -> Provider {
        Provider::aes(name, &[byte; 32]).unwrap()
    }

    fn sealed(inner: &Arc<dyn Store>, providers: Vec<Provider>) -> Sealed {
        Sealed::new(inner.clone(), vec![Rule { prefix: "/registry/secrets/".into(), providers: providers.into() }])
    }

    fn embedded() -> (tempfile::TempDir, Arc<dyn Store>) {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Embedded::open(dir.path(), Options::default()).unwrap());
        (dir, store)
    }

    async fn raw(store: &Arc<dyn Store>) -> Bytes {
        store.get(KEY).await.unwrap().0.unwrap().value
    }

    async fn read(store: &Sealed) -> Result<Bytes, String> {
        store.get(KEY).await.map(|(entry, _)| entry.unwrap().value).map_err(|e| e.to_string())
    }

    #[tokio::test]
    async fn it_is_a_store_like_any_other() {
        contract::run_all(|| async {
            let dir = tempfile::tempdir().unwrap().keep();
            let inner: Arc<dyn Store> = Arc::new(Embedded::open(&dir, Options::default()).unwrap());
            Sealed::new(inner, vec![Rule { prefix: String::new(), providers: [aes("k", 1)].into() }])
        })
        .await;
    }

    #[tokio::test]
    async fn keys_are_exchanged_while_everything_is_readable() {
        let (_dir, inner) = embedded();
        inner.put(KEY, "plain".into(), Expect::Any, None).await.unwrap();
        // What was there before is read; what is written is not plain.
        let first = sealed(&inner, vec![aes("one", 1), Provider::Identity]);
        assert_eq!(read(&first).await.unwrap(), "plain");
        assert_eq!((first.reseal().await.unwrap(), first.reseal().await.unwrap()), (1, 0));
        let value = raw(&inner).await;
        assert!(value.starts_with(b"k8s:enc:aesgcm:v1:one:") && !value.windows(5).any(|w| w == b"plain"), "{value:?}");
        // Another key comes, is used, and the old one goes.
        let second = sealed(&inner, vec![aes("two", 2), aes("one", 1)]);
        assert_eq!(read(&second).await.unwrap(), "plain");
        assert_eq!(second.reseal().await.unwrap(), 1);
        let third = sealed(&inner, vec![aes("two", 2)]);
        assert_eq!(read(&third).await.unwrap(), "plain");
        // What the old one wrote and nobody can read any more is left out of what was; what holds is there.
        let mut watch = third.watch("/registry/", Revision(0)).await.unwrap();
        let progress = tokio::time::timeout(std::time::Duration::from_secs(30), async {
            loop {
                let progress = watch.next().await.unwrap().unwrap();
                if !progress.events.is_empty() {
                    return progress;
                }
            }
        });
        let Event::Put(entry) = &progress.await.unwrap().events[0] else { panic!("nothing was deleted") };
        assert_eq!(entry.value, "plain");
        // And back to none.
        let plain = sealed(&inner, vec![Provider::Identity, aes("two", 2)]);
        assert_eq!(plain.reseal().await.unwrap(), 1);
        assert_eq!(raw(&inner).await, "plain");
        // Other keys are left alone.
        third.put("/registry/pods/a", "pod".into(), Expect::Any, None).await.unwrap();
        assert_eq!(inner.get("/registry/pods/a").await.unwrap().0.unwrap().value, "pod");
    }

    #[tokio::test]
    async fn what_cannot_be_read_says_why() {
        let (_dir, inner) = embedded();
        let one = sealed(&inner, vec![aes("one", 1)]);
        one.put(KEY, "secret".into(), Expect::Any, None).await.unwrap();
        let check = async |providers: Vec<Provider>, expect: &str| {
            let error = read(&sealed(&inner, providers)).await.unwrap_err();
            assert!(error.contains(KEY) && error.contains(expect), "{error}");
        };
        check(vec![aes("two", 2), Provider::Identity], "is encrypted (aesgcm:v1:one), and no provider").await;
        check(vec![], "no provider of --encryption-provider-config").await;
        check(vec![aes("one", 9)], "cannot be decrypted with the key \"one\"").await;
        // Under another name it is another value.
        let elsewhere = "/registry/secrets/default/b";
        inner.put(elsewhere, raw(&inner).await, Expect::Any, None).await.unwrap();
        assert!(one.get(elsewhere).await.unwrap_err().to_string().contains("moved here from another name"));
        inner.put(KEY, "plain".into(), Expect::Any, None).await.unwrap();
        check(vec![aes("one", 1)], "is not encrypted").await;
        // The same over a list and a watch, which must not go on as if nothing were.
        assert!(one.list("/registry/", ListOptions::default()).await.is_err());
        let mut watch = one.watch("/registry/", Revision(0)).await.unwrap();
        let mut seen = Vec::new();
        while let Some(progress) = watch.next().await {
            match progress {
                Ok(progress) => seen.extend(progress.events),
                Err(error) => {
                    seen.clear();
                    assert!(error.to_string().contains("another name"), "{error}");
                    break;
                }
            }
        }
        assert!(Provider::aes("x", &[1; 24]).unwrap_err().to_string().contains("24 bytes"));
    }
}
