//! What the machines of a cluster think of each other: who lives, who is suspected, who is dead.
//!
//! The gossip ([`crate::gossip`]) finds out; whoever acts on it (the service proxy, the relay, the controllers) follows
//! [`Verdicts`] and never asks how they came about.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;

/// What is thought of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// It answers.
    Alive,
    /// It did not answer, neither directly nor by way of others; it may still say that it lives. New connections had
    /// better go elsewhere, if there is an elsewhere.
    Suspect,
    /// It did not say so in time: nothing is on its way from there.
    Dead,
}

/// By the name of the node. One that is not in it is unknown to the gossip: nothing follows from that.
pub type Verdicts = Arc<BTreeMap<String, Verdict>>;

/// Follows the verdicts.
pub type Receiver = watch::Receiver<Verdicts>;

/// A receiver that never learns anything, for where there is no gossip.
pub fn none() -> Receiver {
    watch::channel(Verdicts::default()).1
}
