//! Benchmarks now; drills, faults, traffic, checks and the lab as they arrive.
