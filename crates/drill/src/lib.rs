//! Benchmarks now; drills, faults, traffic, checks and the lab as they arrive.

pub mod bench;
mod connection;
mod process;
