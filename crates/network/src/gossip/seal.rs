//! Packets that only the cluster can read, and only their sender can have written.

/// The bytes that sealing adds.
pub const OVERHEAD: usize = 131;
