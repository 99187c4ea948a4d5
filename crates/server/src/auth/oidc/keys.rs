//! The keys of an issuer: found by OpenID discovery, kept, and asked for anew when a token names one that is not known.
//!
//! Whoever brings a token of a known key never waits for the issuer.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use jsonwebtoken::{
    DecodingKey, Header,
    jwk::{Jwk, PublicKeyUse},
};
use serde_json::Value;
use tokio::{sync::Mutex, time::Instant};

use crate::outside::{Client, check_url};

/// How long the issuer has for one answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long keys are used without looking whether they are still the issuer's.
const FRESH: Duration = Duration::from_secs(600);
/// So often in [`WINDOW`] an issuer is asked at most, since anyone can make up names of keys.
const ASKED: usize = 6;
/// See [`ASKED`].
const WINDOW: Duration = Duration::from_secs(60);

/// The keys of one issuer.
pub(super) struct Keys {
    issuer: String,
    discovery: String,
    client: Client,
    known: ArcSwapOption<Known>,
    /// When the issuer was asked. Held while it is asked, so that one asks for all.
    asked: Mutex<Vec<Instant>>,
}

struct Known {
    keys: Vec<Key>,
    since: Instant,
}

/// A key of an issuer.
struct Key {
    id: Option<String>,
    /// The algorithm that it is for, if it says so.
    algorithm: Option<String>,
    key: DecodingKey,
}

impl Known {
    /// Those keys that may have signed what has this header.
    fn matching<'a>(&'a self, header: &'a Header) -> impl Iterator<Item = &'a DecodingKey> {
        let algorithm = format!("{:?}", header.alg);
        let fits = move |key: &&Key| {
            (header.kid.is_none() || key.id.is_none() || key.id == header.kid)
                && key.algorithm.as_ref().is_none_or(|own| *own == algorithm)
        };
        self.keys.iter().filter(fits).map(|key| &key.key)
    }
}

impl Keys {
    pub fn new(issuer: &str, discovery: &str, client: Client) -> Keys {
        let discovery = match discovery {
            "" => format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/')),
            url => url.to_owned(),
        };
        Keys { issuer: issuer.to_owned(), discovery, client, known: ArcSwapOption::empty(), asked: Mutex::default() }
    }

    /// Looks for a key by which `check` is satisfied: among those that are known, and else among those that the issuer has
    /// now.
    ///
    /// # Errors
    /// What `check` said last, or why there are no keys.
    pub async fn find<T>(
        self: &Arc<Self>,
        header: &Header,
        check: impl Fn(&DecodingKey) -> Result<T, String>,
    ) -> Result<T, String> {
        let first = self.known.load_full();
        let mut why = "no key of the issuer fits the token".to_owned();
        if let Some(known) = &first {
            match attempt(known, header, &check) {
                Some(Ok(found)) => {
                    if known.since.elapsed() > FRESH {
                        let keys = self.clone();
                        tokio::spawn(async move { keys.ask(Some(known_since(&keys))).await });
                    }
                    return Ok(found);
                }
                // The key is known, and the token is not signed by it: the issuer would say nothing else.
                Some(Err(failed)) if header.kid.is_some() => return Err(failed),
                Some(Err(failed)) => why = failed,
                None => {}
            }
        }
        self.ask(first.map(|known| known.since)).await?;
        match self.known.load().as_ref().and_then(|known| attempt(known, header, &check)) {
            Some(outcome) => outcome,
            None => Err(why),
        }
    }

    /// Asks the issuer, unless somebody else did so while this waited.
    async fn ask(&self, before: Option<Instant>) -> Result<(), String> {
        let mut asked = self.asked.lock().await;
        if self.known.load().as_ref().map(|known| known.since) != before {
            return Ok(());
        }
        asked.retain(|at| at.elapsed() < WINDOW);
        if asked.len() >= ASKED {
            return Err(format!("the issuer was asked {ASKED} times within {} s already", WINDOW.as_secs()));
        }
        asked.push(Instant::now());
        match self.fetch().await {
            Ok(keys) => {
                self.known.store(Some(Arc::new(Known { keys, since: Instant::now() })));
                Ok(())
            }
            Err(why) => {
                tracing::warn!(issuer = self.issuer, why, "the keys of an issuer of tokens cannot be had");
                Err(why)
            }
        }
    }

    async fn fetch(&self) -> Result<Vec<Key>, String> {
        let document = self.client.get(&self.discovery, TIMEOUT).await?;
        let said = document["issuer"].as_str().unwrap_or_default();
        if said != self.issuer {
            return Err(format!("the issuer at {:?} says that it is {said:?}, not {:?}", self.discovery, self.issuer));
        }
        let url = document["jwks_uri"].as_str().unwrap_or_default();
        check_url(url).map_err(|why| format!("jwks_uri {url:?}: {why}"))?;
        let set = self.client.get(url, TIMEOUT).await?;
        let list = set["keys"].as_array().ok_or_else(|| format!("{url:?} has no keys"))?;
        // Kinds of keys that are not known here are left out; others may still be of use.
        Ok(list.iter().filter_map(key).collect())
    }
}

fn known_since(keys: &Keys) -> Instant {
    keys.known.load().as_ref().map_or_else(Instant::now, |known| known.since)
}

fn attempt<T>(
    known: &Known,
    header: &Header,
    check: impl Fn(&DecodingKey) -> Result<T, String>,
) -> Option<Result<T, String>> {
    let mut last = None;
    for key in known.matching(header) {
        match check(key) {
            Ok(found) => return Some(Ok(found)),
            Err(why) => last = Some(Err(why)),
        }
    }
    last
}

fn key(value: &Value) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(value.clone()).ok()?;
    if matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption)) {
        return None;
    }
    let algorithm = value["alg"].as_str().map(str::to_owned);
    // A key that is not public is nobody's proof of anything.
    if value["kty"] == "oct" {
        return None;
    }
    Some(Key { id: jwk.common.key_id.clone(), algorithm, key: DecodingKey::from_jwk(&jwk).ok()? })
}
