//! Failover logic under a virtual clock: the pure parts, driven by seed through thousands of bad days.
//!
//! A simulation is a queue of things that happen at instants of virtual time; whoever handles one may plan more. The
//! same seed gives the same run, so a failure is a number. `SEAWALL_SEED=<number>` runs that one alone, with its trace.

pub mod balancer;
pub mod clock;
pub mod election;
pub mod gossip;
pub mod membership;

/// Runs `one` for many seeds, or for the one that `SEAWALL_SEED` names.
///
/// # Panics
/// With the seed and the end of the trace, if a run breaks an invariant.
pub fn for_seeds(count: u64, one: impl Fn(u64) -> Result<(), Broken>) {
    let named = std::env::var("SEAWALL_SEED").ok().and_then(|text| text.parse().ok());
    let seeds = match named {
        Some(seed) => seed..seed + 1,
        None => 0..count,
    };
    for seed in seeds {
        if let Err(broken) = one(seed) {
            let from = if named.is_some() { 0 } else { broken.trace.len().saturating_sub(60) };
            panic!(
                "{}\nSEAWALL_SEED={seed} repeats it\n--- the trace\n{}",
                broken.what,
                broken.trace[from..].join("\n")
            );
        }
    }
}

/// An invariant that did not hold.
#[derive(Debug)]
pub struct Broken {
    /// Which one, and how.
    pub what: String,
    /// What happened until then.
    pub trace: Vec<String>,
}
