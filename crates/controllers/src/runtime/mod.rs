//! What all controllers share: one informer per kind, a work queue, workers that survive a panic, events.

use std::{fmt, future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::FutureExt;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub mod events;
pub mod informer;
pub mod objects;
pub mod queue;

pub use events::Recorder;
pub use informer::{Informer, Object};
pub use queue::Queue;

/// A namespace (empty for what has none) and a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The namespace, or nothing.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl Key {
    /// The key of `name` in `namespace`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Key {
        Key { namespace: namespace.into(), name: name.into() }
    }

    /// The key of an object.
    pub fn of<K: kube::Resource>(object: &K) -> Key {
        let meta = object.meta();
        Key::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => f.write_str(&self.name),
            namespace => write!(f, "{namespace}/{}", self.name),
        }
    }
}

/// Puts an owner into the queue whenever something of its has changed; and, when something without an owner has, all those
/// that want it.
pub fn follow_owned<C: Object, O: Object>(
    children: &Informer<C>,
    owners: &Arc<Informer<O>>,
    kind: &'static str,
    wants: fn(&O, &C) -> bool,
    queue: &Arc<Queue>,
) {
    let (queue, owners) = (queue.clone(), owners.clone());
    children.on_change(move |old, new| {
        for child in old.into_iter().chain(new) {
            let namespace = objects::namespace(&**child);
            match objects::controller_of(&**child) {
                Some(owner) if owner.kind == kind => queue.add(Key::new(namespace, &owner.name)),
                Some(_) => {}
                None => {
                    for owner in owners.in_namespace(namespace) {
                        if wants(&owner, child) {
                            queue.add(Key::of(&*owner));
                        }
                    }
                }
            }
        }
    });
}

/// One pass over one key never takes longer than this; a request that hangs must not hold a worker for ever.
const PASS: Duration = Duration::from_secs(120);

/// Brings one kind of object to the state that is wanted, one key at a time.
#[async_trait]
pub trait Controller: Send + Sync + 'static {
    /// What it is called in the log.
    fn name(&self) -> &'static str;

    /// Returns when the caches that it reads are complete. Nothing is decided before.
    async fn ready(&self);

    /// Looks at `key` and acts. Returns after which time to look again even if nothing changes.
    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>>;
}

/// Runs `workers` workers on a controller's queue until `shutdown`. An error or a panic concerns the one key that
/// caused it: it is tried again, less and less often, while everything else goes on.
pub fn spawn_workers(
    tasks: &mut JoinSet<()>,
    controller: Arc<dyn Controller>,
    queue: Arc<Queue>,
    workers: usize,
    shutdown: &CancellationToken,
) {
    for _ in 0..workers {
        let (controller, queue, shutdown) = (controller.clone(), queue.clone(), shutdown.clone());
        tasks.spawn(async move {
            if shutdown.run_until_cancelled(controller.ready()).await.is_none() {
                return;
            }
            while let Some(key) = shutdown.run_until_cancelled(queue.next()).await {
                let pass = guarded(controller.reconcile(&key));
                // An abandoned pass leaves nothing half done that the next one would not see.
                let Some(result) = shutdown.run_until_cancelled(pass).await else { return };
                match result {
                    Ok(again) => {
                        queue.forget(&key);
                        if let Some(delay) = again {
                            queue.add_after(key.clone(), delay);
                        }
                    }
                    Err(error) => {
                        let failures = queue.retry(key.clone());
                        if is_conflict(&error) || failures < 3 {
                            tracing::debug!(controller = controller.name(), %key, failures, error = format!("{error:#}"), "will try again");
                        } else {
                            tracing::warn!(controller = controller.name(), %key, failures, error = format!("{error:#}"), "will try again");
                        }
                    }
                }
                queue.done(&key);
            }
        });
    }
}

async fn guarded(pass: impl Future<Output = anyhow::Result<Option<Duration>>>) -> anyhow::Result<Option<Duration>> {
    match tokio::time::timeout(PASS, AssertUnwindSafe(pass).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("(no message)");
            tracing::error!(panic = text, "a controller panicked");
            Err(anyhow::anyhow!("panicked: {text}"))
        }
        Err(_) => Err(anyhow::anyhow!("took longer than {PASS:?}")),
    }
}

/// The answer of the API server, if that is what the error is.
pub fn status_of(error: &anyhow::Error) -> Option<&kube::core::Status> {
    match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => Some(status),
        _ => None,
    }
}

/// Whether a write lost against another one, so that looking again is all that is needed.
pub fn is_conflict(error: &anyhow::Error) -> bool {
    status_of(error).is_some_and(|status| status.is_conflict())
}

/// Whether the API server said that the object is not there.
pub fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_not_found())
}

/// Whether a creation was refused because the namespace is going away; then there is no point in trying again.
pub fn namespace_is_terminating(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_forbidden() && status.details.as_ref().is_some_and(
        |details| details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating")))
}
