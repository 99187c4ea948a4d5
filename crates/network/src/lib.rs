//! The service proxy on nftables, the relay, the balancer, the routes; later gossip, DNS and virtual addresses.

pub mod balancer;
pub mod gossip;
pub mod proxy;
pub mod relay;
pub mod routes;
pub mod verdict;
