//! A worker whose machine goes down ([`crate::shutdown`]): its pod is unready until its turn, and then it ends.

use jiff::Timestamp;

use super::Worker;
use crate::{
    events::Kind,
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

    /// Says how far it is to whoever waits for that.
    pub(super) fn report(&self) {
        if !self.facts.leaving {
            return;
        }
        let stopped = self.facts.torn_down && self.observed.alive().next().is_none();
        let phase = self.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        let told = self.facts.gone || self.facts.finalized || matches!(phase, Some("Failed" | "Succeeded"));
        self.agent.config.shutdown.report(&self.uid, stopped, told);
    }
}
