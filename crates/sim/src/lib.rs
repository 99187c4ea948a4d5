//! Virtual clock, network and disk, for running scenarios by seed. Empty until the first failover logic exists.
