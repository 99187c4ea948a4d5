//! A worker whose pod is new: the node takes it or does not ([`crate::admission`]).

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use tokio::sync::watch;

use super::{Done, Worker};
use crate::{
    Agent,
    admission::{
        self, Kept,
        fit::{self, Taken},
    },
    events::Kind,
    pod::{
        self, machine,
        resize::{self, Given},
    },
    topology::Refusal,
};

/// What a new pod waits for.
pub(super) struct Admission {
    listed: watch::Receiver<bool>,
    node: watch::Receiver<Option<Arc<Node>>>,
    labels: Labels,
    /// It is being given what it is to have for itself.
    pub(super) is_given: bool,
}

/// How well it is known how the node is labelled: who is bound because of a label may be here before the label.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Labels {
    Watched,
    AskedFor,
    Fresh,
}

impl Admission {
    pub(super) fn new(agent: &Agent) -> Admission {
        let (listed, node) = (agent.listed.subscribe(), agent.node.subscribe());
        Admission { listed, node, labels: Labels::Watched, is_given: false }
    }

    /// Returns when it may be decided anew.
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.listed.changed() => {}
            Ok(()) = self.node.changed() => {}
            else => std::future::pending().await,
        }
    }
}

impl Worker {
    /// Asks once whether the node takes the pod. One that it had is kept.
    pub(super) fn be_admitted(&mut self, now: Timestamp) {
        let over = machine::is_ending(&self.pod, &self.facts)
            || machine::outcome(&self.pod, &self.observed, &self.facts).is_some();
        if !self.facts.waits || over || self.admission.is_given {
            return;
        }
        let Some(spec) = &self.pod.spec else { return };
        let new = || {
            let given = Given { allocated: resize::desired(spec), ..Default::default() };
            Kept { given, taken: Taken::by(spec) }
        };
        // What runs here without a word about it was let in by an agent that wrote nothing down.
        let known = !self.observed.sandboxes.is_empty();
        if let Some(kept) = self.resizing.kept.clone().or_else(|| known.then(new)) {
            self.agent.ledger.keep(&self.uid, kept.taken.clone());
            // It has CPUs for itself, unless nobody wrote down which: then it gets some, if there are any.
            if let Err(why) = self.agent.cpus.give(&self.pod) {
                tracing::warn!(pod = pod::name(&self.pod), "it shares CPUs with others: {why}");
            }
            return self.let_in(kept);
        }
        // Before everything is known that is here, or was, nobody knows what is left. What stands in a file does not wait for
        // the API, which may be what it serves.
        let listed = *self.admission.listed.borrow_and_update();
        let is_known = self.admission.node.borrow_and_update().is_some();
        if !(self.is_static || listed && is_known) || self.admission.labels == Labels::AskedFor {
            return;
        }
        let kept = new();
        let admitted = self.agent.ledger.admit(&self.pod, &kept.taken, &admission::node(&self.agent));
        match admitted {
            Ok(()) if self.agent.topology.concerns(&self.agent.cpus, &self.agent.devices, &self.pod) => {
                self.admission.is_given = true;
                let (agent, pod) = (Arc::clone(&self.agent), Arc::clone(&self.pod));
                self.spawn(None, async move {
                    Done::Given(Box::new(kept), agent.topology.give(&agent.cpus, &agent.devices, &pod).await)
                });
            }
            Ok(()) => match self.agent.cpus.give(&self.pod) {
                Ok(()) => self.let_in(kept),
                Err(why) => self.not_given(&Refusal::NotGiven(why), now),
            },
            Err(refusals) if refusals == [fit::AFFINITY] && is_known && self.admission.labels == Labels::Watched => {
                self.admission.labels = Labels::AskedFor;
                let (api, name) = (Api::all(self.agent.client.clone()), self.agent.config.node_name.clone());
                self.spawn(None, async move { Done::Node(Box::new(api.get_opt(&name).await)) });
            }
            Err(refusals) => self.refuse(refusals[0].reason(), refusals[0].message(), now),
        }
    }

    fn let_in(&mut self, kept: Kept) {
        self.facts.waits = false;
        self.resizing.kept = Some(kept);
        self.fit_to_given();
    }

    /// It has got what it is to have for itself, or does not get it.
    pub(super) fn was_given(&mut self, kept: Kept, result: Result<(), Refusal>, now: Timestamp) {
        self.admission.is_given = false;
        let over = machine::is_ending(&self.pod, &self.facts)
            || machine::outcome(&self.pod, &self.observed, &self.facts).is_some();
        match result {
            // What it has been given is taken back when it is gone.
            _ if over => {}
            Ok(()) => self.let_in(kept),
            Err(why) => self.not_given(&why, now),
        }
    }

    /// It fits, and does not get what it is to have for itself.
    fn not_given(&mut self, why: &Refusal, now: Timestamp) {
        self.agent.ledger.release(&self.uid);
        self.agent.release_for_good(&self.uid);
        self.refuse(why.reason().to_owned(), why.to_string(), now);
    }

    fn refuse(&mut self, reason: String, message: String, now: Timestamp) {
        self.agent.events.pod(&self.pod, Kind::Warning, reason.clone(), message.clone());
        self.facts.rejected = Some((reason, format!("Pod was rejected: {message}")));
        self.facts.stop_began.get_or_insert(now);
        self.stopping.cancel();
    }

    /// What the API says of the node. Where it says nothing, what is known has to do.
    pub(super) fn took_node(&mut self, node: kube::Result<Option<Node>>) {
        self.admission.labels = Labels::Fresh;
        match node {
            Ok(node) => drop(self.agent.node.send_replace(node.map(Arc::new))),
            Err(error) => tracing::debug!("get our node: {error}"),
        }
    }
}
