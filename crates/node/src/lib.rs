//! The node agent: the pod state machine, and containerd, CNI, volumes, probes, exec and logs at its edge.
