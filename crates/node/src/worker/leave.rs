//! A worker whose machine goes down ([`crate::shutdown`]): its pod is unready until its turn, and then it ends.

use std::time::Duration;

use jiff::Timestamp;

use super::Worker;
use crate::{
    events::Kind,
    eviction,
    pod::machine,
    shutdown::{MESSAGE, Order, REASON, REFUSED_MESSAGE, REFUSED_REASON},
};

impl Worker {
    /// Takes in what a pod is to do while the machine goes down.
    pub(super) fn obey(&mut self, now: Timestamp) {
        let Some(order) = self.agent.config.shutdown.order(&self.uid) else {
            // Those that have ended have ended; the others go on where the machine stays after all.
            self.facts.leaving = false;
            return;
        };
        let over = self.facts.gone || machine::outcome(&self.pod, &self.observed, &self.facts).is_some();
        // Those that were on their way out before go on.
        if self.pod.metadata.deletion_timestamp.is_some() && !self.facts.leaving {
            self.facts.stop_began.get_or_insert(now);
        }
        self.facts.leaving = true;
        match order {
            Order::Wait => {}
            Order::End(grace) if !over => {
                self.facts.leave_within = Some((now, grace));
                self.facts.rejected = Some((REASON.to_owned(), MESSAGE.to_owned()));
            }
            // Nobody has an order for it, so there is no turn to wait for.
            Order::Refuse if self.pod.metadata.deletion_timestamp.is_some() => {
                self.facts.stop_began.get_or_insert(now);
            }
            Order::Refuse if !over => {
                self.agent.events.pod(&self.pod, Kind::Warning, REFUSED_REASON, REFUSED_MESSAGE);
                self.facts.rejected = Some((REFUSED_REASON.to_owned(), REFUSED_MESSAGE.to_owned()));
            }
            Order::End(_) | Order::Refuse => {}
        }
    }

    /// Takes in that the pod has to go because the node is short of something, or that it came when it was.
    pub(super) fn go_if_evicted(&mut self, now: Timestamp) {
        self.evictions.mark_unchanged();
        if self.facts.rejected.is_some() || self.facts.gone {
            return;
        }
        let evictions = &self.agent.evictions;
        let refused = || {
            let new = self.observed.sandboxes.is_empty() && !self.facts.prepared && self.facts.busy.is_empty();
            let pressure = evictions.current();
            let waits = new && self.pod.metadata.deletion_timestamp.is_none();
            eviction::refusal(&self.pod, pressure).filter(|_| waits).map(|message| (message, Duration::ZERO))
        };
        let ordered = evictions.of(&self.uid).map(|order| (order.message, order.grace));
        let Some((message, grace)) = ordered.or_else(refused) else { return };
        if machine::outcome(&self.pod, &self.observed, &self.facts).is_some() {
            return;
        }
        self.facts.leave_within = Some((now, grace));
        self.facts.rejected = Some((eviction::REASON.to_owned(), message));
    }

    /// Says how far it is to whoever waits for that.
    pub(super) fn report(&self) {
        if !self.facts.leaving {
            return;
        }
        let stopped = self.facts.torn_down && self.observed.alive().next().is_none();
        let phase = self.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        // Of one that is being deleted the last word is that it may go, not how it ended.
        let ended = matches!(phase, Some("Failed" | "Succeeded")) && self.pod.metadata.deletion_timestamp.is_none();
        let told = self.facts.gone || self.facts.finalized || ended;
        self.agent.config.shutdown.report(&self.uid, stopped, told);
    }
}
