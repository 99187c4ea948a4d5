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
    /// Held while the issuer is asked, so that one asks for all.
    asked: Mutex<Asked>,
}

#[derive(Default)]
struct Asked {
    /// When it was asked lately.
    times: Vec<Instant>,
    /// When it was asked last, and what came of it.
    last: Option<(Instant, Result<(), String>)>,
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
                        self.refresh();
                    }
                    return Ok(found);
                }
                // The key is known, and the token is not signed by it: the issuer would say nothing else.
                Some(Err(failed)) if header.kid.is_some() => return Err(failed),
                Some(Err(failed)) => why = failed,
                None => {}
            }
        }
        let came = Instant::now();
        let mut asked = self.asked.lock().await;
        match &asked.last {
            // Somebody else asked while this waited: the issuer would say the same again.
            Some((ended, outcome)) if *ended >= came => outcome.clone()?,
            _ => self.ask(&mut asked).await?,
        }
        drop(asked);
        match self.known.load().as_ref().and_then(|known| attempt(known, header, &check)) {
            Some(outcome) => outcome,
            None => Err(why),
        }
    }

    /// Looks whether the keys are still the issuer's, while they are used, unless somebody does already.
    fn refresh(self: &Arc<Self>) {
        if self.asked.try_lock().is_err() {
            return;
        }
        let keys = self.clone();
        tokio::spawn(async move {
            if let Ok(mut asked) = keys.asked.try_lock() {
                // What went wrong has been logged.
                let _ = keys.ask(&mut asked).await;
            }
        });
    }

    async fn ask(&self, asked: &mut Asked) -> Result<(), String> {
        asked.times.retain(|at| at.elapsed() < WINDOW);
        if asked.times.len() >= ASKED {
            return Err(format!("the issuer was asked {ASKED} times within {} s already", WINDOW.as_secs()));
        }
        asked.times.push(Instant::now());
        let outcome = self.fetch().await.map(|keys| {
            self.known.store(Some(Arc::new(Known { keys, since: Instant::now() })));
        });
        if let Err(why) = &outcome {
            tracing::warn!(issuer = self.issuer, why, "the keys of an issuer of tokens cannot be had");
        }
        asked.last = Some((Instant::now(), outcome.clone()));
        outcome
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
