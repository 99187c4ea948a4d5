//! Who lives: the machines find out by themselves, with or without a control plane.

pub mod core;
pub mod guard;
pub mod id;
pub mod judge;
pub mod metrics;
pub mod seal;
pub mod wire;
pub mod word;
