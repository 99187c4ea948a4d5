//! The service proxy on nftables; later gossip, relay, DNS, balancer and virtual addresses.

pub mod balancer;
pub mod gossip;
pub mod proxy;
pub mod routes;
pub mod verdict;
