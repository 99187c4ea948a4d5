//! Events are forgotten some time after they were last seen (upstream's `--event-ttl`, by default an hour).

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use seawall_store::Expect;
use serde_json::Value;

use crate::Server;

/// How often old ones are looked for, at most.
const EVERY: Duration = Duration::from_secs(60);
/// At least.
const AT_LEAST_EVERY: Duration = Duration::from_secs(1);

/// Deletes old events, and lets go of snapshots that nobody needs any more, until the server stops.
pub async fn keep(server: Arc<Server>) {
    let ttl = server.config.event_ttl;
    let every = (ttl / 10).clamp(AT_LEAST_EVERY, EVERY);
    loop {
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = server.stop.cancelled() => return,
        }
        server.pages.prune();
        let Some((id, row)) = server.registry.by_name("", "events") else { return };
        let now = Timestamp::now().as_second();
        let prefix = row.prefix();
        let snapshot = server.cache.snapshot();
        let old = snapshot
            .range(id, &prefix, None)
            .filter(|o| last_seen(&o.value()).is_some_and(|at| now - at > ttl.as_secs() as i64));
        let old: Vec<_> = old.map(|o| (o.key.clone(), o.revision)).collect();
        drop(snapshot);
        for (key, revision) in old {
            // One that has just been seen again has another revision and stays.
            if let Err(error) = server.store.delete(&key, Expect::At(revision), None).await {
                tracing::debug!(%error, "an old event stays for now");
            }
        }
    }
}

/// When an event was last seen, in seconds since 1970.
fn last_seen(event: &Value) -> Option<i64> {
    let times = [
        &event["series"]["lastObservedTime"],
        &event["lastTimestamp"],
        &event["eventTime"],
        &event["metadata"]["creationTimestamp"],
    ];
    times.into_iter().filter_map(|t| t.as_str()?.parse::<Timestamp>().ok()).map(|t| t.as_second()).max()
}
