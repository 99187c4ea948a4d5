//! Machines of a lab on one host, and benchmarks.

pub mod bench;
mod connection;
pub mod lab;
mod process;
