//! The service proxy on nftables, the relay, the balancer, the routes, policies; the gossip.

pub mod announce;
pub mod balancer;
pub mod gossip;
pub mod nft;
pub mod policy;
pub mod proxy;
pub mod relay;
pub mod routes;
pub mod verdict;
