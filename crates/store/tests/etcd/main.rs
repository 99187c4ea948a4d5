//! The store on real etcd: processes on loopback that are killed, frozen and left without a majority.

#![allow(clippy::unwrap_used)]

mod admin;
mod cluster;
mod contract;
mod faults;
mod migration;
mod proxy;
mod snapshot;
