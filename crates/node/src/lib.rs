//! The node agent: the pod state machine, and containerd, CNI, volumes, probes, exec and logs at its edge.

pub mod containerd;
pub mod cri;
pub mod image;
pub mod pause;
pub mod pod;
