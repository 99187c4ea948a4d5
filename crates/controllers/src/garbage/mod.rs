//! The garbage collector: deletes what has lost its owners, and carries out foreground and orphaning deletion
//! (<https://kubernetes.io/docs/concepts/architecture/garbage-collection/>).
//!
//! Every deletable kind is watched, metadata only. [`graph`] decides; here is what watches, asks and writes.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt, pin_mut, stream, stream::FuturesUnordered};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, Client,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions, PropagationPolicy},
    core::PartialObjectMeta,
    discovery::{Discovery, Scope, verbs},
    runtime::watcher::{self, Event},
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    runtime::{Controller, Key, Queue, is_not_found, spawn_workers},
};

pub mod graph;

use graph::{FOREGROUND, Graph, Kind, Node, ORPHAN, Owner, Policy, Standing, Step, Uid};

/// Upstream's `--concurrent-gc-syncs`.
const WORKERS: usize = 20;
/// Dependents of one owner that are cut loose at the same time.
const AT_ONCE: usize = 16;
/// Upstream, too, begins after this long even if not every kind could be listed: absence is always confirmed.
const PATIENCE: Duration = Duration::from_secs(30);
/// After an error of a watch or of discovery: the first wait, and the longest.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// Kinds are discovered anew this often, even if no definition has changed; as upstream does.
const REDISCOVER: Duration = Duration::from_secs(30);

/// Kinds, by group and kind as references name them.
type Kinds = HashMap<(Box<str>, Box<str>), Arc<Kind>>;

struct Collector {
    client: Client,
    graph: Mutex<Graph>,
    queue: Arc<Queue>,
    kinds: watch::Sender<Arc<Kinds>>,
    /// Watches whose first listing is not complete yet; nothing before discovery.
    listing: watch::Sender<Option<usize>>,
    /// Kinds have come, changed or gone.
    stale: Notify,
}

/// A listing that the collector waits for; it is over when this is dropped, also if the kind has vanished meanwhile.
struct FirstListing<'a>(&'a watch::Sender<Option<usize>>);

impl Drop for FirstListing<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|left| *left = left.map(|left| left.saturating_sub(1)));
    }
}

/// Starts the garbage collector's watches and workers.
pub(crate) fn start(tasks: &mut JoinSet<()>, context: &Arc<Context>, shutdown: &CancellationToken) {
    let collector = Arc::new(Collector {
        client: context.client.clone(),
        graph: Mutex::default(),
        queue: Arc::new(Queue::new()),
        kinds: watch::Sender::default(),
        listing: watch::Sender::new(None),
        stale: Notify::new(),
    });
    let (watching, stop) = (collector.clone(), shutdown.clone());
    tasks.spawn(async move {
        // Cancelling drops all watches at once.
        stop.run_until_cancelled(watching.watch_all()).await;
    });
    spawn_workers(tasks, collector.clone(), collector.queue.clone(), WORKERS, shutdown);
}

/// All kinds, and those to watch.
async fn discover(client: Client) -> kube::Result<(Kinds, Vec<Arc<Kind>>)> {
    let discovery = Discovery::new(client).run_aggregated().await?;
    let (mut kinds, mut watched) = (Kinds::new(), Vec::new());
    for (resource, capabilities) in discovery.groups().flat_map(|group| group.recommended_resources()) {
        let can = [verbs::LIST, verbs::WATCH, verbs::DELETE].iter().all(|v| capabilities.supports_operation(v));
        let id = (resource.group.as_str().into(), resource.kind.as_str().into());
        let events = resource.plural == "events" && matches!(resource.group.as_str(), "" | "events.k8s.io");
        let kind = Arc::new(Kind { resource, namespaced: capabilities.scope == Scope::Namespaced });
        // Events own nothing and expire by themselves.
        if can && !events {
            watched.push(kind.clone());
        }
        kinds.insert(id, kind);
    }
    Ok((kinds, watched))
}

impl Collector {
    /// Watches every kind that there is, until it is cancelled. Kinds come and go with their definitions.
    async fn watch_all(&self) {
        let mut watches = FuturesUnordered::new();
        let mut watched: Vec<(Arc<Kind>, CancellationToken)> = Vec::new();
        loop {
            let (mut kinds, found) = self.discovered().await;
            let found: Vec<Arc<Kind>> = found
                .into_iter()
                .map(|kind| watched.iter().find(|(known, _)| **known == *kind).map_or(kind, |(known, _)| known.clone()))
                .collect();
            for kind in &found {
                let id = (kind.resource.group.as_str().into(), kind.resource.kind.as_str().into());
                kinds.insert(id, kind.clone());
            }
            self.kinds.send_replace(Arc::new(kinds));
            let first = self.listing.borrow().is_none();
            if first {
                self.listing.send_replace(Some(found.len()));
            }
            let first_listing = || first.then(|| FirstListing(&self.listing));
            watched.retain(|(kind, stop)| {
                let stays = found.iter().any(|other| Arc::ptr_eq(other, kind));
                if !stays {
                    stop.cancel();
                    let look = self.graph.lock().forget(kind);
                    look.iter().for_each(|uid| self.queue.add(Key::new("", &**uid)));
                }
                stays
            });
            for kind in found {
                if watched.iter().any(|(known, _)| Arc::ptr_eq(known, &kind)) {
                    continue;
                }
                let stop = CancellationToken::new();
                watched.push((kind.clone(), stop.clone()));
                // In a box: there are many.
                let first = first_listing();
                watches.push(Box::pin(async move { stop.run_until_cancelled(self.watch(&kind, first)).await }));
            }
            tracing::debug!(kinds = watched.len(), "the garbage collector watches");
            let again = async {
                let _ = tokio::time::timeout(REDISCOVER, self.stale.notified()).await;
                // A definition is written several times at its beginning.
                tokio::time::sleep(FIRST_WAIT).await;
            };
            tokio::pin!(again);
            loop {
                tokio::select! {
                    () = &mut again => break,
                    Some(_) = watches.next() => {}
                }
            }
        }
    }

    async fn discovered(&self) -> (Kinds, Vec<Arc<Kind>>) {
        let mut wait = FIRST_WAIT;
        loop {
            match discover(self.client.clone()).await {
                Ok(found) => return found,
                Err(error) => {
                    tracing::debug!(%error, "the kinds could not be discovered, will try again");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(LONGEST_WAIT);
                }
            }
        }
    }

    /// Follows a kind. The collector waits for its listing before it begins if this is one of the `first`.
    async fn watch(&self, kind: &Arc<Kind>, mut first: Option<FirstListing<'_>>) {
        let defines = kind.resource.group == "apiextensions.k8s.io";
        let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(self.client.clone(), &kind.resource);
        let events = watcher::watcher(api, watcher::Config::default().streaming_lists());
        pin_mut!(events);
        let (mut wait, mut listed) = (FIRST_WAIT, HashSet::new());
        while let Some(event) = events.next().await {
            let look = match event {
                Ok(Event::Init) => {
                    listed.clear();
                    continue;
                }
                Ok(Event::InitApply(object)) => self.apply(kind, &object.metadata, Some(&mut listed)),
                Ok(Event::Apply(object)) => {
                    wait = FIRST_WAIT;
                    if defines {
                        self.stale.notify_one();
                    }
                    self.apply(kind, &object.metadata, None)
                }
                Ok(Event::Delete(object)) => {
                    if defines {
                        self.stale.notify_one();
                    }
                    self.graph.lock().remove(object.metadata.uid.as_deref().unwrap_or_default())
                }
                Ok(Event::InitDone) => {
                    wait = FIRST_WAIT;
                    drop(first.take());
                    let mut graph = self.graph.lock();
                    let mut look = graph.retain(kind, &std::mem::take(&mut listed));
                    look.extend(graph.unseen(kind));
                    look
                }
                Err(error) => {
                    tracing::debug!(kind = kind.resource.plural, %error, "the watch was interrupted and goes on");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(LONGEST_WAIT);
                    continue;
                }
            };
            for uid in look {
                self.queue.add(Key::new("", &*uid));
            }
        }
    }

    fn apply(&self, kind: &Arc<Kind>, meta: &ObjectMeta, listed: Option<&mut HashSet<Uid>>) -> Vec<Uid> {
        let Some(node) = Node::new(kind, meta) else { return Vec::new() };
        if let Some(listed) = listed {
            listed.insert(node.uid.clone());
        }
        self.graph.lock().apply(node)
    }

    fn api(&self, kind: &Kind, namespace: &str) -> Api<DynamicObject> {
        match kind.namespaced {
            true => Api::namespaced_with(self.client.clone(), namespace, &kind.resource),
            false => Api::all_with(self.client.clone(), &kind.resource),
        }
    }

    /// Asks the API server how an owner stands that no watch has shown.
    async fn ask(&self, node: &Node, owner: &Owner) -> kube::Result<Standing> {
        let kinds = self.kinds.borrow().clone();
        let Some(kind) = kinds.get(&(owner.group.clone(), owner.kind.clone())) else {
            // Whoever knows this kind may still be there.
            tracing::debug!(kind = %owner.kind, dependent = %node.name, "an owner is of a kind that nobody serves");
            return Ok(Standing::Solid);
        };
        if kind.namespaced && node.namespace.is_empty() {
            // A cluster-scoped dependent cannot say in which namespace its owner is: it is never collected.
            return Ok(Standing::Solid);
        }
        let found = self.api(kind, &node.namespace).get_metadata_opt(&owner.name).await?;
        Ok(match found.filter(|found| found.metadata.uid.as_deref() == Some(&*owner.uid)) {
            Some(found) => {
                let held = found.metadata.finalizers.iter().flatten().any(|f| f == FOREGROUND);
                match found.metadata.deletion_timestamp.is_some() && held {
                    true => Standing::Waiting,
                    false => Standing::Solid,
                }
            }
            None => {
                self.graph.lock().note_gone(owner.uid.clone(), Some(node.namespace.clone()));
                Standing::Gone
            }
        })
    }

    /// Changes an object's metadata, if it is still the same object and nobody else changes it meanwhile.
    async fn change(&self, node: &Node, change: impl Fn(&mut ObjectMeta) -> bool) -> kube::Result<()> {
        let api = self.api(&node.kind, &node.namespace);
        let Some(found) = api.get_metadata_opt(&node.name).await? else { return Ok(()) };
        let mut meta = found.metadata;
        if meta.uid.as_deref() != Some(&*node.uid) || !change(&mut meta) {
            return Ok(());
        }
        let patch = json!({"metadata": {
            "uid": meta.uid, "resourceVersion": meta.resource_version,
            // An empty list is none.
            "ownerReferences": meta.owner_references.filter(|list| !list.is_empty()),
            "finalizers": meta.finalizers.filter(|list| !list.is_empty()),
        }});
        match api.patch_metadata(&node.name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Err(error) if !is_not_found(&error) => Err(error),
            _ => Ok(()),
        }
    }

    async fn unlink(&self, node: &Node, owners: &[Uid]) -> kube::Result<()> {
        let change = |meta: &mut ObjectMeta| {
            let Some(references) = meta.owner_references.as_mut() else { return false };
            let before = references.len();
            references.retain(|r| !owners.iter().any(|uid| **uid == *r.uid));
            references.len() != before
        };
        self.change(node, change).await
    }

    async fn release(&self, node: &Node, finalizer: &str) -> kube::Result<()> {
        let change = |meta: &mut ObjectMeta| {
            let Some(finalizers) = meta.finalizers.as_mut() else { return false };
            let before = finalizers.len();
            finalizers.retain(|f| f != finalizer);
            finalizers.len() != before
        };
        self.change(node, change).await
    }

    async fn delete(&self, node: &Node, policy: Policy) -> kube::Result<()> {
        let params = DeleteParams {
            propagation_policy: Some(match policy {
                Policy::Background => PropagationPolicy::Background,
                Policy::Foreground => PropagationPolicy::Foreground,
                Policy::Orphan => PropagationPolicy::Orphan,
            }),
            // With the version: an owner may have been added since.
            preconditions: Some(Preconditions {
                uid: Some(node.uid.to_string()),
                resource_version: Some(node.version.to_string()).filter(|v| !v.is_empty()),
            }),
            ..Default::default()
        };
        match self.api(&node.kind, &node.namespace).delete(&node.name, &params).await {
            Err(error) if !is_not_found(&error) => Err(error),
            _ => {
                tracing::debug!(kind = %node.kind.resource.kind, namespace = %node.namespace, name = %node.name, "collected");
                Ok(())
            }
        }
    }

    fn look(&self, uid: &str, answers: &HashMap<Uid, Standing>) -> Option<(Node, Step)> {
        let graph = self.graph.lock();
        Some((graph.get(uid)?.clone(), graph.plan(uid, answers)))
    }
}

#[async_trait]
impl Controller for Collector {
    fn name(&self) -> &'static str {
        "garbage"
    }

    async fn ready(&self) {
        let mut listing = self.listing.subscribe();
        // The sender lives as long as this collector: neither wait ends by itself.
        let _ = listing.wait_for(Option::is_some).await;
        if tokio::time::timeout(PATIENCE, listing.wait_for(|left| *left == Some(0))).await.is_err() {
            let left = listing.borrow().unwrap_or_default();
            tracing::warn!(left, "some kinds could not be listed; the garbage collector begins without them");
        }
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let mut answers = HashMap::new();
        let Some((mut node, mut step)) = self.look(&key.name, &answers) else { return Ok(None) };
        if let Step::Ask(owners) = &step {
            for owner in owners {
                answers.insert(owner.uid.clone(), self.ask(&node, owner).await?);
            }
            let Some(again) = self.look(&key.name, &answers) else { return Ok(None) };
            (node, step) = again;
        }
        match step {
            // An owner that no watch has shown may go unseen.
            Step::Nothing if !answers.is_empty() => return Ok(Some(REDISCOVER)),
            Step::Nothing => {}
            // Owners have been added while we asked.
            Step::Ask(_) => self.queue.add(key.clone()),
            Step::Delete { policy, unblock } => {
                if unblock {
                    let change = |meta: &mut ObjectMeta| {
                        let holding = meta.owner_references.iter_mut().flatten();
                        let holding = holding.filter(|r| r.block_owner_deletion == Some(true));
                        holding.map(|r| r.block_owner_deletion = Some(false)).count() > 0
                    };
                    self.change(&node, change).await?;
                    // The version is another one now.
                    node.version = Box::default();
                }
                self.delete(&node, policy).await?;
            }
            Step::Unlink(owners) => self.unlink(&node, &owners).await?,
            Step::Release => self.release(&node, FOREGROUND).await?,
            Step::Orphan(dependents) => {
                let nodes: Vec<Node> = {
                    let graph = self.graph.lock();
                    dependents.iter().filter_map(|uid| graph.get(uid).cloned()).collect()
                };
                let owner = [node.uid.clone()];
                let cuts: Vec<_> = nodes.iter().map(|dependent| self.unlink(dependent, &owner)).collect();
                stream::iter(cuts).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
                self.release(&node, ORPHAN).await?;
            }
        }
        Ok(None)
    }
}
