//! Machines of a lab on one host, drills on them, and benchmarks.

pub mod bench;
pub mod check;
mod connection;
pub mod history;
pub mod lab;
pub mod lint;
pub mod plot;
mod process;
pub mod report;
pub mod scenario;
pub mod serve;
mod traffic;
