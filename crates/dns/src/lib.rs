//! Cluster DNS: the names of Services and pods, and everything else from the node's resolvers.
//!
//! From a packet to an answer: [`serve`] has the sockets, [`message`] reads and writes, [`resolver`] is the way between;
//! what is said of the cluster is [`answer`], of a [`zone`] that `watch` keeps; others are asked by [`forward`], with a
//! [`cache`]. `answer`, `zone`, `message`, `cache` and `settings` are pure.
//! What is served is <https://github.com/kubernetes/dns/blob/master/docs/specification.md>, version 1.1.0.

pub mod answer;
pub mod cache;
pub mod facts;
pub mod forward;
pub mod limits;
pub mod message;
pub mod metrics;
pub mod name;
pub mod resolver;
pub mod serve;
pub mod settings;
pub mod zone;

#[cfg(feature = "cluster")]
pub mod here;
pub mod http;
#[cfg(feature = "cluster")]
pub mod run;
#[cfg(feature = "cluster")]
pub mod watch;
