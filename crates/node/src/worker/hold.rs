//! A worker whose pod must not run twice: it starts nothing of it without a permit, and asks for one
//! ([`crate::fence`]).

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use seawall_quorum::fence::Epoch;
use tokio::sync::watch;

use super::{Done, Worker, revision};
use crate::{
    fence::{self, Guard},
    operations, pod,
};

/// What a worker knows about whether its pod must not run twice.
pub(super) struct Fencing {
    /// Something about permits has changed.
    pub(super) changes: watch::Receiver<u64>,
    /// Permits concern this pod. The others are not to be woken by every renewal of the node's Lease.
    pub(super) concerns: bool,
    /// Not to be asked again before this time.
    pub(super) after: Option<Timestamp>,
    /// Whether all its claims are for several nodes at once, once that is known.
    shared: Option<bool>,
    /// The API is being asked about claims, or for a permit.
    asking: bool,
}

impl Fencing {
    pub(super) fn new(guard: &Guard) -> Fencing {
        Fencing { changes: guard.changes(), concerns: true, after: None, shared: None, asking: false }
    }
}

impl Worker {
    /// Sees to it that a pod that must not run twice does not, and asks for its permit.
    pub(super) fn hold(&mut self, now: Timestamp) {
        let fence = &self.agent.fence;
        let stateful = fence::is_stateful(&self.pod);
        let claims = if stateful { Vec::new() } else { fence::claims(&self.pod) };
        self.facts.held = false;
        self.fence.concerns =
            !fence.is_off() && !self.facts.gone && (stateful || !claims.is_empty() && self.fence.shared != Some(true));
        if !self.fence.concerns {
            return;
        }
        fence.guard(&self.uid, self.observed.alive().next().is_some());
        self.facts.held = !fence.may_run(&self.uid);
        if self.fence.after.is_some_and(|at| at <= now) {
            self.fence.after = None;
        }
        let Some(epoch) = fence.needs_permit(&self.uid) else { return };
        if self.fence.asking || self.fence.after.is_some() {
            return;
        }
        self.fence.asking = true;
        let (client, pod) = (self.agent.client.clone(), Arc::clone(&self.pod));
        if claims.is_empty() || self.fence.shared.is_some() {
            let uid = self.uid.clone();
            self.spawn(None, async move {
                Done::Permit(epoch, Box::new(operations::permit(client, &pod, &uid, epoch).await))
            });
        } else {
            self.spawn(None, async move { Done::Claims(operations::are_shared(client, &pod, &claims).await) });
        }
    }

    /// What became of the question about its claims.
    pub(super) fn took_claims(&mut self, result: kube::Result<bool>, now: Timestamp) {
        self.fence.asking = false;
        match result {
            Ok(shared) => {
                self.fence.shared = Some(shared);
                if shared {
                    self.agent.fence.forget(&self.uid);
                }
            }
            Err(error) => {
                tracing::debug!(pod = pod::name(&self.pod), "cannot read its claims: {error}");
                self.fence.after = Some(now + Duration::from_secs(1));
            }
        }
    }

    /// What became of the question for a permit.
    pub(super) fn took_permit(&mut self, epoch: Epoch, result: kube::Result<Pod>, now: Timestamp) {
        self.fence.asking = false;
        match result {
            Ok(written) => {
                self.agent.fence.permitted(&self.uid, epoch);
                let newer = revision(&written).zip(revision(&self.pod)).is_none_or(|(new, old)| new >= old);
                if newer && pod::uid(&written) == self.uid {
                    self.take_pod(Arc::new(pod::lean(written)));
                }
            }
            // It is gone or another one by now; the watch will say so.
            Err(error) => {
                tracing::debug!(pod = pod::name(&self.pod), "no permit to run it: {error}");
                self.fence.after = Some(now + Duration::from_millis(500));
            }
        }
    }
}
