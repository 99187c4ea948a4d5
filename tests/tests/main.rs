//! All end-to-end tests in one program: each would otherwise be linked with the whole of what it needs, which took minutes.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test stops at what it did not expect")]

mod access;
mod admission;
mod aggregation;
mod alone;
mod audit_and_issuers;
mod bad_input;
mod certificates;
mod check;
mod clients;
mod cluster;
mod controllers;
mod crash;
mod custom_resources;
mod dns;
mod drill;
mod dual_stack;
mod encryption;
mod fencing;
mod gossip;
mod host_port;
mod kube_rs;
mod kubectl;
mod lab;
mod load_balancer;
mod network_policy;
mod node;
mod preemption;
mod probes;
mod reboot;
mod rotation;
mod server_side_apply;
#[path = "../../crates/server/tests/common/site.rs"]
mod site;
mod snapshots;
mod snapshots_etcd;
mod streams;
mod tunnel;
mod workload;
