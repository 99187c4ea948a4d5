//! What the cluster does not know, others are asked: with a cache, one question at a time for all who want the same, and
//! a limit of questions that are under way.

mod exchange;

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RecordType},
};
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use crate::{
    cache::{Age, Cache, Key},
    message::Response,
    metrics::{From, Metrics},
    name::Text,
    settings::Settings,
};

/// So many different questions are under way at a time.
const MOST_QUESTIONS: usize = 1024;
/// What the cache takes, roughly, in bytes.
const CACHE: usize = 16 << 20;

/// Asks others. Clones are the same.
#[derive(Clone)]
pub struct Forwarder {
    inner: Arc<Inner>,
}

struct Inner {
    settings: ArcSwap<Settings>,
    cache: Mutex<Cache>,
    /// Questions that are under way.
    flights: Mutex<HashMap<Key, watch::Receiver<Option<Arc<Response>>>>>,
    permits: Arc<Semaphore>,
    health: Health,
    metrics: Metrics,
}

/// Which servers did not answer lately: those are asked last.
#[derive(Default)]
pub(crate) struct Health {
    failed: Mutex<HashMap<SocketAddr, Instant>>,
}

/// For how long a server that failed is asked last.
const LAST: Duration = Duration::from_secs(5);

impl Health {
    fn failed(&self, server: SocketAddr) {
        self.failed.lock().insert(server, Instant::now());
    }

    fn works(&self, server: SocketAddr) {
        self.failed.lock().remove(&server);
    }

    /// In the order in which they are to be asked.
    fn order(&self, servers: &[SocketAddr]) -> Vec<SocketAddr> {
        let mut failed = self.failed.lock();
        // Servers come and go with the settings.
        failed.retain(|_, at| at.elapsed() < LAST);
        let (last, first): (Vec<SocketAddr>, Vec<SocketAddr>) = servers.iter().partition(|s| failed.contains_key(s));
        first.into_iter().chain(last).collect()
    }
}

/// An answer, or what there is of it at once.
pub enum Found {
    /// It was there.
    Now(Response),
    /// Others have to be asked.
    Later,
}

impl Forwarder {
    /// Asks as these settings say.
    pub fn new(settings: Settings, metrics: Metrics) -> Forwarder {
        Forwarder {
            inner: Arc::new(Inner {
                settings: ArcSwap::from_pointee(settings),
                cache: Mutex::new(Cache::new(CACHE)),
                flights: Mutex::default(),
                permits: Arc::new(Semaphore::new(MOST_QUESTIONS)),
                health: Health::default(),
                metrics,
            }),
        }
    }

    /// Asks others from now on, as these settings say. What the last ones have answered is forgotten.
    pub fn set(&self, settings: Settings) {
        if **self.inner.settings.load() != settings {
            tracing::info!(upstream = ?settings.upstream, stubs = ?settings.stubs, "who is asked for other names");
            self.inner.settings.store(Arc::new(settings));
            self.inner.cache.lock().clear();
        }
    }

    /// The key of a question.
    pub fn key(name: &Name, asked: RecordType, dnssec: bool, unchecked: bool) -> Key {
        Key { name: name.to_lowercase(), asked, dnssec, unchecked }
    }

    /// What the cache has.
    pub fn cached(&self, key: &Key) -> Found {
        match self.inner.cache.lock().get(key, Instant::now()) {
            Some((response, Age::Fresh)) => {
                self.inner.metrics.from(From::Cache);
                Found::Now(response)
            }
            _ => Found::Later,
        }
    }

    /// Asks, unless somebody is asking the same already. Answers always, if only that nobody did.
    pub async fn ask(&self, key: Key) -> Response {
        let mut flight = match self.join(&key) {
            Some(flight) => flight,
            None => {
                self.inner.metrics.refused();
                return self.without(&key);
            }
        };
        // Who asks ends by itself, and tells everybody.
        let told = flight.wait_for(Option::is_some).await.ok().and_then(|told| told.clone());
        match told {
            Some(response) => Response::clone(&response),
            None => self.without(&key),
        }
    }

    /// The question that is under way, which is made so if need be; `None` if there are too many.
    fn join(&self, key: &Key) -> Option<watch::Receiver<Option<Arc<Response>>>> {
        let mut flights = self.inner.flights.lock();
        if let Some(flight) = flights.get(key) {
            return Some(flight.clone());
        }
        let permit = self.inner.permits.clone().try_acquire_owned().ok()?;
        let (tell, flight) = watch::channel(None);
        flights.insert(key.clone(), flight.clone());
        let (this, key) = (self.clone(), key.clone());
        tokio::spawn(async move {
            // Taken off however the question ends.
            let _landed = Landed { of: &this, key: &key };
            let response = this.exchange(&key).await;
            tell.send_replace(Some(Arc::new(response)));
            drop(permit);
        });
        Some(flight)
    }

    async fn exchange(&self, key: &Key) -> Response {
        let settings = self.inner.settings.load_full();
        let servers = settings.servers(Text::of(&key.name).as_str()).to_vec();
        match exchange::ask(key, &servers, &self.inner.health).await {
            Ok((response, bytes)) => {
                let response = Arc::new(response);
                // An answer of servers that are not asked any more is not kept for others.
                if Arc::ptr_eq(&settings, &self.inner.settings.load()) {
                    self.inner.cache.lock().put(key.clone(), &response, bytes, Instant::now());
                }
                self.inner.metrics.from(From::Others);
                Response::clone(&response)
            }
            Err(error) => {
                tracing::debug!(name = %key.name, asked = %key.asked, "nobody answers: {error}");
                self.without(key)
            }
        }
    }

    /// When nobody answers, an old answer is better than none (RFC 8767).
    fn without(&self, key: &Key) -> Response {
        match self.inner.cache.lock().get(key, Instant::now()) {
            Some((response, _)) => {
                self.inner.metrics.from(From::Stale);
                response
            }
            None => {
                self.inner.metrics.from(From::Nobody);
                Response::code(ResponseCode::ServFail)
            }
        }
    }
}

struct Landed<'a> {
    of: &'a Forwarder,
    key: &'a Key,
}

impl Drop for Landed<'_> {
    fn drop(&mut self) {
        self.of.inner.flights.lock().remove(self.key);
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{RData, Record, rdata::A};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_old_answer_is_better_than_none() {
        let began = Instant::now();
        let forwarder = Forwarder::new(Settings::default(), Metrics::default());
        let key = Forwarder::key(&Name::from_ascii("A.Example.").unwrap(), RecordType::A, false, false);
        assert_eq!(forwarder.ask(key.clone()).await.code, ResponseCode::ServFail);
        let record = Record::from_rdata(key.name.clone(), 60, RData::A(A::new(192, 0, 2, 1)));
        let response = Arc::new(Response { answers: vec![record], ..Response::code(ResponseCode::NoError) });
        let put = |age: u64| {
            let since = Instant::now().checked_sub(Duration::from_secs(age)).expect("the machine runs for a while");
            forwarder.inner.cache.lock().put(key.clone(), &response, 100, since);
        };
        put(61);
        assert!(matches!(forwarder.cached(&key), Found::Later), "others are asked first");
        assert_eq!(forwarder.ask(key.clone()).await.answers.len(), 1);
        put(10);
        assert!(matches!(forwarder.cached(&key), Found::Now(_)));
        assert_eq!(began.elapsed(), Duration::ZERO, "where there is nobody to ask, nobody is waited for");
    }

    #[test]
    fn servers_that_failed_are_asked_last() {
        let servers: Vec<SocketAddr> = ["192.0.2.1:53", "192.0.2.2:53"].iter().map(|s| s.parse().unwrap()).collect();
        let health = Health::default();
        assert_eq!(health.order(&servers), servers);
        health.failed(servers[0]);
        assert_eq!(health.order(&servers), [servers[1], servers[0]]);
        health.works(servers[0]);
        assert_eq!(health.order(&servers), servers);
    }
}
