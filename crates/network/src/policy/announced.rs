//! Pods of this node whose network is about to be used, told by the agent before the API knows their addresses.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::api::{core::v1::Pod, networking::v1::NetworkPolicy};
use kube::{Api, Client, api::ListParams};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, timeout},
};

use super::facts::{self, Key, PodFacts, Policy};

/// How long a pod waits for its rules before its agent says so and tries again.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the API may take to say which policies there are.
const LIST: Duration = Duration::from_secs(2);
/// For how long the agent's word about a pod counts more than the API's about another one of the same name.
const FRESH: Duration = Duration::from_secs(60);

/// A policy with its name and its revision, as a list had it.
pub(super) type Listed = (Key, u64, Policy);

/// One that waits for its rules.
pub(super) struct Waiting {
    /// The policies of its namespace, as new as the pod at least; none if the API does not answer.
    pub(super) policies: Vec<Listed>,
    pub(super) done: oneshot::Sender<()>,
}

struct Announced {
    facts: PodFacts,
    since: Instant,
}

#[derive(Default)]
struct Shared {
    pods: Mutex<BTreeMap<Key, Announced>>,
    waiting: Mutex<Vec<Waiting>>,
    wake: Notify,
}

/// Where the agent tells of its pods. It outlives a restart of the part that makes the rules.
#[derive(Clone)]
pub struct Handle {
    client: Client,
    shared: Arc<Shared>,
}

impl Handle {
    /// For a node; `client` is asked for policies.
    pub fn new(client: Client) -> Handle {
        Handle { client, shared: Arc::default() }
    }

    /// Returns when all rules that concern this pod are in force. Policies that are older than the pod are among them,
    /// even if nothing was heard of them yet: they are asked for.
    ///
    /// # Errors
    /// If that takes too long; to be tried again.
    pub async fn admit(&self, pod: &Pod, ips: &[IpAddr]) -> Result<(), String> {
        let (key, mut facts) = facts::pod(pod);
        facts.ips = ips.to_vec();
        facts.ips.sort();
        let api: Api<NetworkPolicy> = Api::namespaced(self.client.clone(), &key.0);
        let policies = match timeout(LIST, api.list(&ListParams::default())).await {
            Ok(Ok(list)) => list.items.into_iter().map(listed).collect(),
            // What is in force stays in force, and what was heard counts.
            Ok(Err(error)) => {
                tracing::debug!(%error, "policies cannot be listed");
                Vec::new()
            }
            Err(_) => Vec::new(),
        };
        self.shared.pods.lock().insert(key, Announced { facts, since: Instant::now() });
        let (done, is_done) = oneshot::channel();
        self.shared.waiting.lock().push(Waiting { policies, done });
        self.shared.wake.notify_one();
        match timeout(PATIENCE, is_done).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(format!("the rules of NetworkPolicies were not in force within {} s", PATIENCE.as_secs())),
        }
    }

    /// The pod with this uid is gone from this node.
    pub fn left(&self, uid: &str) {
        self.shared.pods.lock().retain(|_, pod| pod.facts.uid != uid);
    }

    /// Returns when somebody waits.
    pub(super) async fn woken(&self) {
        self.shared.wake.notified().await;
    }

    /// Those that wait.
    pub(super) fn waiting(&self) -> Vec<Waiting> {
        std::mem::take(&mut self.shared.waiting.lock())
    }

    /// What is to be believed of a pod that the API tells of.
    pub(super) fn believed(&self, key: Key, mut facts: PodFacts) -> (Key, PodFacts) {
        let pods = self.shared.pods.lock();
        match pods.get(&key) {
            // It has ended, and others may get its address.
            Some(known) if known.facts.uid == facts.uid && facts.over => {}
            Some(known) if known.facts.uid == facts.uid => facts.ips.clone_from(&known.facts.ips),
            Some(known) if known.since.elapsed() < FRESH => facts = known.facts.clone(),
            _ => {}
        }
        drop(pods);
        (key, facts)
    }

    /// Adds those that the API has not told of.
    pub(super) fn add_to(&self, pods: &mut BTreeMap<Key, PodFacts>) {
        for (key, announced) in self.shared.pods.lock().iter() {
            match pods.get_mut(key) {
                None => drop(pods.insert(key.clone(), announced.facts.clone())),
                Some(known) if known.uid == announced.facts.uid && known.over => {}
                Some(known) if known.uid == announced.facts.uid => known.ips.clone_from(&announced.facts.ips),
                Some(known) if announced.since.elapsed() < FRESH => *known = announced.facts.clone(),
                Some(_) => {}
            }
        }
    }
}

fn listed(policy: NetworkPolicy) -> Listed {
    let revision = revision(&policy);
    let (key, policy) = facts::policy(policy);
    (key, revision, policy)
}

/// A resource version as a number. It is opaque to clients in general; ours is a revision, which only grows.
pub(super) fn revision(policy: &NetworkPolicy) -> u64 {
    policy.metadata.resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or_default()
}
