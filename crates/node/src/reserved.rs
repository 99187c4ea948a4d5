//! What of the machine pods may not have: what is kept for the system and for Kubernetes' own processes, and what must be
//! left so that nobody is evicted.
//!
//! <https://kubernetes.io/docs/tasks/administer-cluster/reserve-compute-resources/>

use std::{collections::BTreeMap, io, str::FromStr};

use crate::{
    NodeConfig,
    cgroup::Cgroups,
    node_status,
    pod::{qos::Limits, quantity::milli},
    pressure::{Least, Signal, Thresholds},
};

/// Resources in thousandths, by name.
type Milli = BTreeMap<String, i64>;

/// What is kept of `cpu`, `memory`, `ephemeral-storage` and `pid`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserved(Milli);

/// A text that is no list of resources.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no reservation: write RESOURCE=QUANTITY, with one of cpu, memory, ephemeral-storage, pid")]
pub struct Malformed(String);

impl FromStr for Reserved {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Reserved, Malformed> {
        let mut all = Milli::new();
        for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
            let malformed = || Malformed(one.to_owned());
            let (name, quantity) = one.split_once('=').ok_or_else(malformed)?;
            let value = milli(quantity).and_then(|value| i64::try_from(value).ok()).filter(|value| *value >= 0);
            if !["cpu", "memory", "ephemeral-storage", "pid"].contains(&name.trim()) {
                return Err(malformed());
            }
            all.insert(name.trim().to_owned(), value.ok_or_else(malformed)?);
        }
        Ok(Reserved(all))
    }
}

impl std::ops::Add for Reserved {
    type Output = Reserved;

    fn add(mut self, other: Reserved) -> Reserved {
        for (name, value) in other.0 {
            let sum = self.0.entry(name).or_default();
            *sum = sum.saturating_add(value);
        }
        self
    }
}

impl Reserved {
    /// How much CPU, in thousandths.
    pub fn cpu(&self) -> i64 {
        self.0.get("cpu").copied().unwrap_or(0)
    }
}

/// What pods may have of a machine's capacity.
pub fn allocatable(capacity: &Milli, reserved: &Reserved, hard: &Thresholds) -> Milli {
    let of = |(name, all): (&String, &i64)| {
        let threshold = match name.as_str() {
            "memory" => hard.0.get(&Signal::Memory),
            "ephemeral-storage" => hard.0.get(&Signal::Disk),
            _ => None,
        };
        let units = u64::try_from(*all / 1000).unwrap_or_default();
        let kept = threshold.map_or(0, |least: &Least| least.of(units).saturating_mul(1000));
        let kept = reserved.0.get(name).copied().unwrap_or(0).saturating_add(i64::try_from(kept).unwrap_or(i64::MAX));
        (name.clone(), all.saturating_sub(kept).max(0))
    };
    capacity.iter().map(of).collect()
}

/// Sees to it that all pods together do not take what is reserved. Where nothing is, they are limited by the machine alone.
pub fn enforce(config: &NodeConfig, cgroups: &Cgroups) -> io::Result<()> {
    let Some(limits) = limits(&config.reserved, node_status::cpus(), node_status::memory()) else { return Ok(()) };
    cgroups.create(cgroups.base(), limits)
}

fn limits(reserved: &Reserved, cpus: i64, memory: i64) -> Option<Limits> {
    let of = |name: &str| reserved.0.get(name).copied().unwrap_or(0);
    let (cpu, kept) = (of("cpu"), of("memory") / 1000);
    if cpu == 0 && kept == 0 {
        return None;
    }
    let cpu_shares = (cpus.saturating_mul(1000).saturating_sub(cpu).max(0) * 1024 / 1000).clamp(2, 262_144);
    let memory = if kept == 0 { 0 } else { memory.saturating_sub(kept).max(1 << 20) };
    Some(Limits { cpu_shares, cpu_quota: 0, memory })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_for_pods() {
        let reserved = |text: &str| text.parse::<Reserved>().unwrap();
        let capacity: Milli = [("cpu", 4000), ("memory", 8 << 30), ("ephemeral-storage", 100_000)]
            .map(|(name, value)| (name.to_owned(), if name == "memory" { value * 1000 } else { value }))
            .into();
        let both = reserved("cpu=500m,memory=1Gi") + reserved("cpu=1,ephemeral-storage=10");
        let hard: Thresholds = "memory.available<1Gi,nodefs.available<10%".parse().unwrap();
        let left = allocatable(&capacity, &both, &hard);
        let expect = [("cpu", 2500), ("memory", (6 << 30) * 1000), ("ephemeral-storage", 80_000)];
        assert_eq!(left, expect.map(|(name, value)| (name.to_owned(), value)).into());
        let none = allocatable(&capacity, &reserved("memory=100Gi"), &"".parse().unwrap());
        assert_eq!(none["memory"], 0);
        for wrong in ["cpu", "cpu=", "cpu=-1", "gpu=1"] {
            let said = wrong.parse::<Reserved>().unwrap_err().to_string();
            assert!(said.starts_with(&format!("{wrong:?} is no reservation: write RESOURCE=QUANTITY")), "{said}");
        }
    }

    #[test]
    fn limits_of_all_pods() {
        let check = |text: &str, expect: Option<(i64, i64)>| {
            let found = limits(&text.parse().unwrap(), 2, 8 << 30);
            assert_eq!(found.map(|limits| (limits.cpu_shares, limits.memory)), expect, "{text}");
        };
        check("", None);
        check("ephemeral-storage=1Gi", None);
        check("cpu=500m", Some((1536, 0)));
        check("memory=1Gi", Some((2048, 7 << 30)));
        check("cpu=9,memory=1Ti", Some((2, 1 << 20)));
    }
}
