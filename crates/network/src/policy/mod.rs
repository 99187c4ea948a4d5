//! NetworkPolicy (<https://kubernetes.io/docs/concepts/services-networking/network-policies/>).
//!
//! What policies, namespaces and pods ask for becomes a table of nftables of its own ([`plan`], pure; [`rules`]); the kernel
//! takes each change as one transaction. The table stays when the process ends, and as it is while the API is away.
//!
//! What upstream leaves to the implementation, and how it is here:
//! - What is not allowed is dropped without a word, so that a client that comes before its rules are everywhere gets through
//!   with its next packet.
//! - Connections that are open stay open whatever a new policy says: their packets are not asked about, as with most
//!   implementations.
//! - Pods on the node's network are part of the node: no selector means them.
//! - Traffic between a pod and its own node is always allowed, both ways; so is what a pod asks the DNS of its node.
//! - Translated addresses (of Services) are seen as what they lead to; where a client of outside comes by another node, its
//!   address is that node's, but for `externalTrafficPolicy: Local`.
//!
//! Before a pod's first packet: its agent starts no container before [`Handle::admit`] has returned.

mod announced;
pub mod facts;
pub mod plan;
pub mod rules;

use std::{collections::BTreeMap, time::Duration};

use anyhow::bail;
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use k8s_openapi::api::{
    core::v1::{Namespace, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use seawall_client::watch::Backoff;
use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::nft;
pub use announced::Handle;
use announced::{Listed, revision};
use facts::{Key, Labels, Policy};
use plan::{State, plan};
use rules::{Ruleset, TABLE};

/// How it is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node.
    pub node_name: String,
    /// How long changes are collected before they are applied.
    pub debounce: Duration,
    /// How often the kernel's table is compared with ours; less often where that is much work.
    pub verify: Duration,
    /// The words that start `nft`.
    pub nft: Vec<String>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            node_name: String::new(),
            debounce: Duration::from_millis(10),
            verify: Duration::from_secs(5),
            nft: vec!["nft".into()],
        }
    }
}

/// How long the watch may take to bring a policy that a pod brought along.
const UNCONFIRMED: Duration = Duration::from_secs(30);

/// Keeps the rules until `stop`.
///
/// # Errors
/// If `nft` is missing, or the kernel refuses the rules again and again.
pub fn run(
    client: Client,
    config: Config,
    handle: Handle,
    stop: CancellationToken,
) -> futures::future::BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(client, config, handle, stop))
}

/// Takes the table away.
///
/// # Errors
/// With what `nft` said.
pub async fn remove() -> anyhow::Result<()> {
    nft::apply(&Config::default().nft, &format!("add table {TABLE}\ndelete table {TABLE}\n")).await
}

async fn work(client: Client, config: Config, handle: Handle, stop: CancellationToken) -> anyhow::Result<()> {
    let mut keeper = Keeper::new(client, config, handle);
    loop {
        let (due, look) = (keeper.due.filter(|_| keeper.is_known()), keeper.look());
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            event = following(&mut keeper.of_policies) => if let Some(event) = heard("policies", event)? {
                keeper.policy(event);
            },
            event = following(&mut keeper.of_pods) => if let Some(event) = heard("pods", event)? {
                keeper.pod(event);
            },
            event = following(&mut keeper.of_namespaces) => if let Some(event) = heard("namespaces", event)? {
                keeper.namespace(event);
            },
            () = keeper.handle.woken() => {}
            () = at(due) => keeper.apply().await?,
            () = at(look) => keeper.check().await,
        }
        keeper.take_waiting();
    }
}

type Watch<K> = BoxStream<'static, watcher::Result<watcher::Event<K>>>;

fn watch<K>(client: &Client) -> Watch<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    watcher(Api::<K>::all(client.clone()), watcher::Config::default()).backoff(Backoff::default()).boxed()
}

/// The next event of a watch that may not be set up.
async fn following<K>(watch: &mut Option<Watch<K>>) -> watcher::Result<Option<watcher::Event<K>>> {
    match watch {
        Some(watch) => watch.try_next().await,
        None => std::future::pending().await,
    }
}

/// What a watch brought. One that breaks is set up again.
fn heard<E>(what: &str, event: watcher::Result<Option<E>>) -> anyhow::Result<Option<E>> {
    match event {
        Ok(None) => bail!("the watch of {what} ended"),
        Ok(event) => Ok(event),
        Err(error) => {
            tracing::debug!(%error, "the watch of {what} broke and is set up again");
            Ok(None)
        }
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// What a list has brought so far.
#[derive(Default)]
struct Listing {
    policies: BTreeMap<Key, (u64, Policy)>,
    pods: BTreeMap<Key, facts::PodFacts>,
    namespaces: BTreeMap<String, Labels>,
}

/// What it all is kept by. Pods and namespaces are followed only while there is a policy: without one nobody's labels
/// matter.
struct Keeper {
    client: Client,
    config: Config,
    handle: Handle,
    state: State,
    revisions: BTreeMap<Key, u64>,
    /// The newest revision that the watch of policies brought.
    heard: u64,
    /// Policies that pods brought along and the watch has not brought yet, and since when.
    ahead: BTreeMap<Key, (u64, Policy, Instant)>,
    of_policies: Option<Watch<NetworkPolicy>>,
    of_pods: Option<Watch<Pod>>,
    of_namespaces: Option<Watch<Namespace>>,
    /// Lists that are being received.
    listing: Listing,
    /// Which lists were received once: of policies, pods, namespaces.
    listed: (bool, bool, bool),
    applied: Option<Ruleset>,
    due: Option<Instant>,
    /// Who waits for the next application.
    waiting: Vec<oneshot::Sender<()>>,
    failures: u32,
    next_look: Instant,
    /// The number of the kernel's rules when ours were last found as they should be.
    intact: Option<u32>,
}

impl Keeper {
    fn new(client: Client, config: Config, handle: Handle) -> Keeper {
        Keeper {
            next_look: Instant::now() + config.verify,
            intact: None,
            of_policies: Some(watch(&client)),
            client,
            config,
            handle,
            state: State::default(),
            revisions: BTreeMap::new(),
            heard: 0,
            ahead: BTreeMap::new(),
            of_pods: None,
            of_namespaces: None,
            listing: Listing::default(),
            listed: (false, false, false),
            applied: None,
            due: None,
            waiting: Vec::new(),
            failures: 0,
        }
    }

    /// Whether enough is known to act on. Half of the picture would open what is to be closed.
    fn is_known(&self) -> bool {
        let (policies, pods, namespaces) = self.listed;
        policies && (self.state.policies.is_empty() || pods && namespaces)
    }

    fn changed(&mut self) {
        self.due.get_or_insert(Instant::now() + self.config.debounce);
    }

    fn policy(&mut self, event: watcher::Event<NetworkPolicy>) {
        let read = |object: NetworkPolicy| {
            let revision = revision(&object);
            let (key, policy) = facts::policy(object);
            (key, revision, policy)
        };
        match event {
            watcher::Event::Init => self.listing.policies.clear(),
            watcher::Event::InitApply(object) => {
                let (key, revision, policy) = read(object);
                self.listing.policies.insert(key, (revision, policy));
            }
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut self.listing.policies);
                self.revisions = listed.iter().map(|(key, (revision, _))| (key.clone(), *revision)).collect();
                self.heard = self.revisions.values().copied().max().unwrap_or_default().max(self.heard);
                self.state.policies = listed.into_iter().map(|(key, (_, policy))| (key, policy)).collect();
                self.listed.0 = true;
                // The list may be older than what a pod brought along.
                let ahead =
                    self.ahead.iter().map(|(key, (revision, policy, _))| (key.clone(), *revision, policy.clone()));
                self.learn(ahead.collect());
                self.follow();
                self.changed();
            }
            watcher::Event::Apply(object) => {
                let (key, revision, policy) = read(object);
                self.heard = self.heard.max(revision);
                self.ahead.remove(&key);
                if self.revisions.get(&key).is_none_or(|known| *known < revision) {
                    self.revisions.insert(key.clone(), revision);
                    self.state.policies.insert(key, policy);
                    self.follow();
                    self.changed();
                }
            }
            watcher::Event::Delete(object) => {
                let (key, revision, _) = read(object);
                self.heard = self.heard.max(revision);
                if self.revisions.get(&key).is_some_and(|known| *known <= revision) {
                    self.ahead.remove(&key);
                    self.revisions.remove(&key);
                    self.state.policies.remove(&key);
                    self.follow();
                    self.changed();
                }
            }
        }
    }

    /// Takes in what a pod brought along. The watch brings everything in its order: what is not newer than that is known
    /// already, or deleted.
    fn learn(&mut self, policies: Vec<Listed>) {
        for (key, revision, policy) in policies {
            if revision <= self.heard && self.listed.0 {
                self.ahead.remove(&key);
                continue;
            }
            self.ahead.entry(key.clone()).or_insert_with(|| (revision, policy.clone(), Instant::now()));
            if self.listed.0 && self.revisions.get(&key).is_none_or(|known| *known < revision) {
                self.revisions.insert(key.clone(), revision);
                self.state.policies.insert(key, policy);
                self.changed();
            }
        }
        self.follow();
    }

    /// What the watch never brings was deleted before its list: it lists anew.
    fn doubt(&mut self) {
        if self.ahead.values().any(|(_, _, since)| since.elapsed() > UNCONFIRMED) {
            self.ahead.clear();
            self.of_policies = Some(watch(&self.client));
        }
    }

    /// Follows pods and namespaces while there is a policy.
    fn follow(&mut self) {
        let wanted = !self.state.policies.is_empty();
        if wanted && self.of_pods.is_none() {
            self.of_pods = Some(watch(&self.client));
            self.of_namespaces = Some(watch(&self.client));
        } else if !wanted && self.of_pods.is_some() {
            (self.of_pods, self.of_namespaces) = (None, None);
            (self.listed.1, self.listed.2) = (false, false);
            self.state.pods.clear();
            self.state.namespaces.clear();
        }
    }

    fn pod(&mut self, event: watcher::Event<Pod>) {
        let (handle, pods) = (&self.handle, &mut self.state.pods);
        let believed = |pod: &Pod| {
            let (key, facts) = facts::pod(pod);
            handle.believed(key, facts)
        };
        let changed = match event {
            watcher::Event::Init => {
                self.listing.pods.clear();
                false
            }
            watcher::Event::InitApply(pod) => {
                self.listing.pods.extend([believed(&pod)]);
                false
            }
            watcher::Event::InitDone => {
                *pods = std::mem::take(&mut self.listing.pods);
                handle.add_to(pods);
                self.listed.1 = true;
                true
            }
            watcher::Event::Apply(pod) => {
                // A pod's status is written often, and what counts here changes seldom.
                let (key, facts) = believed(&pod);
                let changed = pods.get(&key) != Some(&facts);
                pods.insert(key, facts);
                changed
            }
            watcher::Event::Delete(pod) => {
                let (key, facts) = facts::pod(&pod);
                let gone = pods.get(&key).is_some_and(|known| known.uid == facts.uid);
                if gone {
                    pods.remove(&key);
                }
                gone
            }
        };
        if changed {
            self.changed();
        }
    }

    fn namespace(&mut self, event: watcher::Event<Namespace>) {
        let namespaces = &mut self.state.namespaces;
        let changed = match event {
            watcher::Event::Init => {
                self.listing.namespaces.clear();
                false
            }
            watcher::Event::InitApply(object) => {
                self.listing.namespaces.extend([facts::namespace(&object)]);
                false
            }
            watcher::Event::InitDone => {
                *namespaces = std::mem::take(&mut self.listing.namespaces);
                self.listed.2 = true;
                true
            }
            watcher::Event::Apply(object) => {
                let (name, labels) = facts::namespace(&object);
                let changed = namespaces.get(&name) != Some(&labels);
                namespaces.insert(name, labels);
                changed
            }
            watcher::Event::Delete(object) => namespaces.remove(&facts::namespace(&object).0).is_some(),
        };
        if changed {
            self.changed();
        }
    }

    /// Takes in the pods that wait: they are served at once.
    fn take_waiting(&mut self) {
        let waiting = self.handle.waiting();
        if waiting.is_empty() {
            return;
        }
        for waiting in waiting {
            self.learn(waiting.policies);
            self.waiting.push(waiting.done);
        }
        if self.of_pods.is_some() {
            self.handle.add_to(&mut self.state.pods);
        }
        self.due = Some(Instant::now());
    }

    async fn apply(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        self.due = None;
        let wanted = plan(&self.state, &self.config.node_name);
        if self.applied.as_ref() != Some(&wanted) {
            let planned = began.elapsed();
            let script = wanted.script(self.applied.as_ref());
            if let Err(error) = nft::apply(&self.config.nft, &script).await {
                // Somebody may have changed our table: next time it is made anew as a whole.
                self.failures += 1;
                tracing::error!(failures = self.failures, "the rules of policies were not applied: {error:#}");
                if self.failures > 5 {
                    return Err(error);
                }
                self.applied = None;
                self.due = Some(Instant::now() + Duration::from_millis(200) * self.failures);
                return Ok(());
            }
            self.failures = 0;
            tracing::debug!(?planned, took = ?began.elapsed(), bytes = script.len(), "policies are in force");
            self.applied = Some(wanted);
        }
        for waiting in self.waiting.drain(..) {
            // Who gave up waiting asks again.
            let _ = waiting.send(());
        }
        Ok(())
    }

    fn look(&self) -> Option<Instant> {
        (self.applied.is_some() && self.due.is_none()).then_some(self.next_look)
    }

    /// Compares the kernel's table with ours.
    async fn check(&mut self) {
        self.doubt();
        let Some(rules) = &self.applied else { return };
        let began = Instant::now();
        let number = nft::generation(&self.config.nft);
        if number.is_none() || number != self.intact {
            if nft::is_intact(&self.config.nft, TABLE, &rules.outline()).await {
                self.intact = number;
            } else {
                tracing::warn!("somebody changed our table of policies: it is made anew");
                self.applied = None;
                self.due = Some(Instant::now());
            }
        }
        // A hundredth of the time at most.
        self.next_look = Instant::now() + self.config.verify.max(began.elapsed() * 100);
    }
}
