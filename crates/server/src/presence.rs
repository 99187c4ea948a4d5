//! Which servers there are, and which of them live.
//!
//! Every server keeps a Lease in `kube-system` with the name of KEP-1965 (`apiserver-…`) and says in it at which address
//! it is reached. The servers whose Leases move are the endpoints of the `kubernetes` Service; each server sees to that
//! by itself, so that no leader is needed to take a dead one off. A silent server counts as dead only while the store
//! answers us: when nobody could write, silence proves nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use seawall_store::{Expect, Revision};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    Server,
    error::{ApiError, Result},
    object::encode,
    write::timestamp,
};

/// The label of KEP-1965 on the Leases of API servers.
const IDENTITY: (&str, &str) = ("apiserver.kubernetes.io/identity", "kube-apiserver");
/// Where a server says at which address it is reached.
pub const ADDRESS: &str = "seawall.dev/address";
/// Where it says with which times it runs, as a map of names to `secs` and `nanos`. All servers should say the same.
pub const TIMES: &str = "seawall.dev/times";
const NAMESPACE: &str = "kube-system";
/// A Lease that has been silent for this long is deleted.
const FORGET: Duration = Duration::from_secs(3600);

/// The times of [`keep`].
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// How often a server renews its Lease.
    pub renew: Duration,
    /// How long a silent one stays an endpoint.
    pub expiry: Duration,
}

impl Default for Times {
    fn default() -> Times {
        Times { renew: Duration::from_millis(400), expiry: Duration::from_millis(1400) }
    }
}

/// The servers as their Leases show them.
#[derive(Debug, Default)]
pub struct Watch {
    seen: BTreeMap<String, (Revision, Instant)>,
}

impl Watch {
    /// Takes note of the Leases as they are now, and says which of their holders live. `trusted` is false when the store
    /// did not answer us since the last time: then everybody gets a new chance.
    pub fn alive(
        &mut self,
        now: Instant,
        leases: &[(String, Revision, SocketAddr)],
        expiry: Duration,
        trusted: bool,
    ) -> BTreeSet<SocketAddr> {
        self.seen.retain(|name, _| leases.iter().any(|(lease, ..)| lease == name));
        let mut alive = BTreeSet::new();
        for (name, revision, address) in leases {
            let seen = self.seen.entry(name.clone()).or_insert((*revision, now));
            if seen.0 != *revision || !trusted {
                *seen = (*revision, now);
            }
            if now.saturating_duration_since(seen.1) < expiry {
                alive.insert(*address);
            }
        }
        alive
    }

    /// Leases that have been silent for long.
    fn forgotten(&self, now: Instant) -> impl Iterator<Item = (&String, Revision)> {
        self.seen
            .iter()
            .filter(move |(_, (_, at))| now.saturating_duration_since(*at) > FORGET)
            .map(|(n, (r, _))| (n, *r))
    }
}

/// Renews this server's Lease and keeps the endpoints of `kubernetes`, until the server stops; then it lets go.
pub async fn keep(server: Arc<Server>) {
    let times = server.config.presence;
    let name = format!("apiserver-{}", server.config.name);
    let started = Timestamp::now().as_second().to_string();
    let mut watch = Watch::default();
    let mut due = Instant::now();
    let mut trusted = true;
    let mut held = None;
    loop {
        let now = Instant::now();
        if now >= due {
            due = now + times.renew;
            let renewed = tokio::time::timeout(times.expiry / 2, server.renew(&name, &started, &mut held)).await;
            let answered = matches!(renewed, Ok(Ok(())));
            if let Ok(Err(error)) = renewed {
                tracing::debug!(error = error.message, "this server could not say that it lives");
            }
            trusted &= answered;
        }
        let leases = server.server_leases();
        let alive = watch.alive(Instant::now(), &leases, times.expiry, trusted);
        // Without the store nothing can be said; with it, everybody starts anew from the moment it answered again.
        let can_write = trusted;
        trusted = true;
        if can_write
            && !alive.is_empty()
            && let Err(error) = server.reconcile_endpoints(&alive).await
        {
            tracing::debug!(error = error.message, "the endpoints of kubernetes were not changed");
        }
        for (name, revision) in watch.forgotten(Instant::now()) {
            let _ = server.store.delete(&server.lease_key(name), Expect::At(revision), None).await;
        }
        tokio::select! {
            () = tokio::time::sleep(times.renew / 4) => {}
            () = server.stop.cancelled() => break,
        }
    }
    // Others need not wait until we have been silent for long enough.
    let _ = tokio::time::timeout(times.expiry, server.store.delete(&server.lease_key(&name), Expect::Any, None)).await;
}

impl Server {
    /// Where the servers are, by their Leases.
    pub fn servers(&self) -> Vec<SocketAddr> {
        self.server_leases().into_iter().map(|(_, _, address)| address).collect()
    }

    fn lease_key(&self, name: &str) -> String {
        let row = self.registry.by_name("coordination.k8s.io", "leases").map(|(_, row)| row);
        row.map(|row| row.key(NAMESPACE, name)).unwrap_or_default()
    }

    /// Writes this server's Lease. `held` is what the last time left: its revision and metadata. It is read only when
    /// that is not known, or somebody else has written it.
    async fn renew(&self, name: &str, started: &str, held: &mut Option<(Expect, Value)>) -> Result<()> {
        let (address, port) = self.config.advertise;
        let key = self.lease_key(name);
        // Gone unless this succeeds: whoever gives up half way has to look again.
        let (expect, metadata) = match held.take() {
            Some(known) => known,
            None => self.read_lease(&key, name).await?,
        };
        let mut lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata,
            "spec": {"holderIdentity": format!("{name}_{started}"),
                "leaseDurationSeconds": self.config.presence.expiry.as_secs().max(1),
                "renewTime": micro_time(Timestamp::now())}});
        lease["metadata"]["labels"][IDENTITY.0] = IDENTITY.1.into();
        lease["metadata"]["annotations"][ADDRESS] = SocketAddr::new(address, port).to_string().into();
        for (key, value) in self.notes.lock().iter() {
            lease["metadata"]["annotations"][key] = value.as_str().into();
        }
        let revision = self.store.put(&key, encode(&lease), expect, None).await.map_err(ApiError::store)?;
        *held = Some((Expect::At(revision), lease["metadata"].take()));
        Ok(())
    }

    /// This server's Lease as it is: what a write has to expect, and the metadata to keep.
    async fn read_lease(&self, key: &str, name: &str) -> Result<(Expect, Value)> {
        let (there, _) = self.store.get(key).await.map_err(ApiError::store)?;
        let fresh = || {
            json!({"name": name, "namespace": NAMESPACE, "uid": uuid::Uuid::new_v4().to_string(),
                "creationTimestamp": timestamp(Timestamp::now())})
        };
        let Some(entry) = there else { return Ok((Expect::Absent, fresh())) };
        // Nobody but servers of this name write it; what cannot be read is written anew.
        let metadata = match serde_json::from_slice::<Value>(&entry.value) {
            Ok(mut old) => old["metadata"].take(),
            Err(error) => {
                tracing::warn!(%error, key, "this server's Lease cannot be read and is made anew");
                fresh()
            }
        };
        Ok((Expect::At(entry.revision), metadata))
    }

    /// The Leases of all servers as the cache has them.
    fn server_leases(&self) -> Vec<(String, Revision, SocketAddr)> {
        let Some((id, row)) = self.registry.by_name("coordination.k8s.io", "leases") else { return Vec::new() };
        let prefix = row.key(NAMESPACE, "apiserver-");
        let snapshot = self.cache.snapshot();
        let leases = snapshot.range(id, &prefix, None).filter_map(|object| {
            let value = object.value();
            let address = value["metadata"]["annotations"][ADDRESS].as_str()?.parse().ok()?;
            Some((value["metadata"]["name"].as_str()?.to_owned(), object.revision, address))
        });
        leases.collect()
    }

    async fn reconcile_endpoints(self: &Arc<Self>, alive: &BTreeSet<SocketAddr>) -> Result<()> {
        let snapshot = self.cache.snapshot();
        let slice = self.lookup(&snapshot, "discovery.k8s.io", "endpointslices", "default", "kubernetes");
        let said: BTreeSet<IpAddr> = slice
            .iter()
            .flat_map(|slice| slice.value()["endpoints"].as_array().cloned().unwrap_or_default())
            .filter_map(|endpoint| endpoint["addresses"][0].as_str()?.parse().ok())
            .collect();
        let wanted: BTreeSet<IpAddr> = alive.iter().map(SocketAddr::ip).collect();
        if said == wanted {
            return Ok(());
        }
        tracing::info!(servers = ?wanted, "the servers behind the kubernetes Service");
        let servers: Vec<(IpAddr, u16)> = alive.iter().map(|a| (a.ip(), a.port())).collect();
        self.set_kubernetes_endpoints(&servers, true).await
    }
}

fn micro_time(now: Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPIRY: Duration = Duration::from_millis(1400);

    fn lease(name: &str, revision: u64) -> (String, Revision, SocketAddr) {
        let host = name.trim_start_matches('s');
        (name.to_owned(), Revision(revision), format!("10.0.0.{host}:6443").parse().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_taken_off_and_comes_back() {
        let mut watch = Watch::default();
        let start = Instant::now();
        let mut check = |ms: u64, leases: &[(String, Revision, SocketAddr)], trusted: bool, expect: usize| {
            let alive = watch.alive(start + Duration::from_millis(ms), leases, EXPIRY, trusted);
            assert_eq!(alive.len(), expect, "at {ms} ms");
        };
        check(0, &[lease("s1", 1), lease("s2", 2)], true, 2);
        check(1300, &[lease("s1", 5), lease("s2", 2)], true, 2);
        check(1400, &[lease("s1", 6), lease("s2", 2)], true, 1);
        check(1500, &[lease("s1", 6), lease("s2", 9)], true, 2);
        // The store did not answer: silence proves nothing.
        check(9000, &[lease("s1", 6), lease("s2", 9)], false, 2);
        check(10_300, &[lease("s1", 6), lease("s2", 9)], true, 2);
        check(10_400, &[lease("s1", 6), lease("s2", 9)], true, 0);
        // One that stopped by itself has no Lease.
        check(10_500, &[lease("s1", 11)], true, 1);
    }
}
