//! The network between real network namespaces, with the kernel's own nftables, routes and sockets. One program, since each would
//! be linked with everything.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test stops at what it did not expect")]

mod announce;
mod api;
mod balancer;
mod cluster;
mod common;
mod gossip;
mod net;
mod nftables;
mod policy;
mod relay;
mod routes;
mod verdicts;
