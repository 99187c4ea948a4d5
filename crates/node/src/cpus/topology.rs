//! How CPUs hang together, and which of them are given out together. The choice is pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use super::set::CpuSet;
use crate::topology::{mask::Mask, nodes};

/// Where a CPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The NUMA node.
    pub node: u32,
    /// The socket.
    pub socket: u32,
    /// The core in it; CPUs of one core are its threads.
    pub core: u32,
}

/// A part of the machine: a socket, a NUMA node in it, or a core in that.
type Part = (u32, Option<u32>, Option<u32>);

impl Place {
    fn of_socket(self) -> Part {
        (self.socket, None, None)
    }

    fn of_node(self) -> Part {
        (self.socket, Some(self.node), None)
    }

    fn of_core(self) -> Part {
        (self.socket, Some(self.node), Some(self.core))
    }
}

/// The CPUs of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology(pub BTreeMap<u32, Place>);

impl Topology {
    /// Reads it below `/sys/devices/system`, or a directory like it. Only `allowed` CPUs are looked at, if any are named.
    ///
    /// # Errors
    /// If the kernel does not say which CPUs there are.
    pub fn detect(system: &Path, allowed: Option<&CpuSet>) -> io::Result<Topology> {
        let online: CpuSet = fs::read_to_string(system.join("cpu/online"))?.parse().map_err(io::Error::other)?;
        let nodes = nodes::of_cpus(system);
        let mut places = BTreeMap::new();
        for cpu in online.0 {
            if allowed.is_some_and(|allowed| !allowed.0.contains(&cpu)) {
                continue;
            }
            let number = |file: &str| {
                let text = fs::read_to_string(system.join(format!("cpu/cpu{cpu}/topology/{file}"))).ok()?;
                text.trim().parse::<u32>().ok()
            };
            // Where it is not told, as on some virtual machines, every CPU is a core of its own.
            let (socket, core) = (number("physical_package_id").unwrap_or(0), number("core_id").unwrap_or(cpu));
            let node = nodes.get(&cpu).copied().unwrap_or(0);
            places.insert(cpu, Place { node, socket, core });
        }
        Ok(Topology(places))
    }

    /// All CPUs.
    pub fn all(&self) -> CpuSet {
        self.0.keys().copied().collect()
    }

    /// The NUMA nodes that have CPUs.
    pub fn nodes(&self) -> Mask {
        self.0.values().map(|place| place.node).collect()
    }

    /// Which of these CPUs are of these NUMA nodes.
    pub fn on(&self, nodes: Mask, cpus: &CpuSet) -> CpuSet {
        let has = |cpu: &u32| self.0.get(cpu).is_some_and(|place| nodes.has(place.node));
        cpus.0.iter().copied().filter(has).collect()
    }

    /// Which NUMA node each of these CPUs is of.
    pub fn near(&self, cpus: &CpuSet) -> Vec<Mask> {
        cpus.0.iter().filter_map(|cpu| self.0.get(cpu)).map(|place| Mask::from_iter([place.node])).collect()
    }

    /// Chooses so many of the free ones, as upstream does: whole sockets, then NUMA nodes, then cores, then single threads, where
    /// possible beside those that were chosen already and where the least would be left over. `None` if there are not enough.
    pub fn take(&self, free: &CpuSet, count: usize) -> Option<CpuSet> {
        let mut free: BTreeSet<u32> = free.0.iter().filter(|cpu| self.0.contains_key(cpu)).copied().collect();
        let mut taken = CpuSet::default();
        if free.len() < count {
            return None;
        }
        // Beside what was taken, and where least is left: of the socket, then of the NUMA node.
        let order = |free: &BTreeSet<u32>, taken: &CpuSet, place: Place| {
            [Place::of_socket, Place::of_node].map(|part| {
                let same = |cpu: &&u32| part(self.0[*cpu]) == part(place);
                (!taken.0.iter().any(|cpu| same(&cpu)), free.iter().filter(same).count())
            })
        };
        for part in [Place::of_socket, Place::of_node, Place::of_core] {
            let of = |cpus: &BTreeSet<u32>| {
                let mut parts: BTreeMap<_, BTreeSet<u32>> = BTreeMap::new();
                for cpu in cpus {
                    parts.entry(part(self.0[cpu])).or_default().insert(*cpu);
                }
                parts
            };
            let whole = of(&self.0.keys().copied().collect());
            loop {
                let parts = of(&free);
                let fits = parts
                    .iter()
                    .filter(|(key, cpus)| whole[key].len() == cpus.len() && cpus.len() <= count - taken.len());
                let place = |cpus: &BTreeSet<u32>| cpus.first().map(|cpu| self.0[cpu]);
                let best = fits.min_by_key(|(key, cpus)| (place(cpus).map(|at| order(&free, &taken, at)), **key));
                let Some(cpus) = best.map(|(_, cpus)| cpus.clone()) else { break };
                free.retain(|cpu| !cpus.contains(cpu));
                taken.0.extend(cpus);
            }
        }
        while taken.len() < count {
            let best = free.iter().min_by_key(|cpu| {
                let place = self.0[cpu];
                let left_of_core = free.iter().filter(|cpu| self.0[cpu].of_core() == place.of_core()).count();
                (order(&free, &taken, place), left_of_core, place.of_core(), **cpu)
            });
            let best = *best?;
            free.remove(&best);
            taken.0.insert(best);
        }
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sockets of so many cores of so many threads; threads of a core are far apart, as the kernel numbers them.
    fn machine(sockets: u32, cores: u32, threads: u32) -> Topology {
        let all = (0..sockets).flat_map(|s| (0..cores).flat_map(move |c| (0..threads).map(move |t| (s, c, t))));
        let number = |(s, c, t): (u32, u32, u32)| t * sockets * cores + s * cores + c;
        Topology(all.map(|(s, c, t)| (number((s, c, t)), Place { node: s, socket: s, core: c })).collect())
    }

    #[test]
    fn which_are_taken() {
        let check = |machine: &Topology, free: &str, count: usize, expect: Option<&str>| {
            let taken = machine.take(&free.parse().unwrap(), count).map(|set| set.to_string());
            assert_eq!(taken.as_deref(), expect, "{count} of {free}");
        };
        // CPUs 0 and 4 are threads of one core.
        let small = machine(1, 4, 2);
        check(&small, "0-7", 0, Some(""));
        check(&small, "0-7", 1, Some("0"));
        check(&small, "1-7", 1, Some("4"));
        check(&small, "0-7", 2, Some("0,4"));
        check(&small, "1-7", 2, Some("1,5"));
        check(&small, "1-7", 3, Some("1,4-5"));
        check(&small, "0-3", 2, Some("0-1"));
        check(&small, "0-7", 8, Some("0-7"));
        check(&small, "1-7", 8, None);
        check(&small, "", 1, None);
        check(&small, "7-9", 2, None);
        // Sockets of 0-1,4-5 and 2-3,6-7.
        let large = machine(2, 2, 2);
        check(&large, "0-7", 4, Some("0-1,4-5"));
        check(&large, "1-7", 4, Some("2-3,6-7"));
        check(&large, "1-7", 2, Some("1,5"));
        check(&large, "0-7", 5, Some("0-2,4-5"));
        check(&large, "0-7", 6, Some("0-2,4-6"));
        check(&large, "0,2-3,6-7", 1, Some("0"));
        check(&machine(1, 2, 1), "1", 1, Some("1"));
        // One socket with two NUMA nodes, 0-1,4-5 and 2-3,6-7: what fits into a node comes from one.
        let of_node = |(cpu, place): (&u32, &Place)| (*cpu, Place { node: place.core / 2, ..*place });
        let split = Topology(small.0.iter().map(of_node).collect());
        check(&split, "1-7", 4, Some("2-3,6-7"));
        check(&split, "0-1,3-7", 2, Some("3,7"));
        check(&split, "1-7", 5, Some("2-4,6-7"));
    }

    #[test]
    fn what_the_kernel_says() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = directory.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("cpu/online", "0-2\n");
        for (cpu, socket, core) in [(0, 0, 5), (1, 1, 5)] {
            write(&format!("cpu/cpu{cpu}/topology/physical_package_id"), &format!("{socket}\n"));
            write(&format!("cpu/cpu{cpu}/topology/core_id"), &format!("{core}\n"));
        }
        let place = |node, socket, core| Place { node, socket, core };
        let found = Topology::detect(directory.path(), None).unwrap();
        assert_eq!(found, Topology([(0, place(0, 0, 5)), (1, place(0, 1, 5)), (2, place(0, 0, 2))].into()));
        write("node/online", "0-1\n");
        write("node/node0/cpulist", "0\n");
        write("node/node1/cpulist", "1-2\n");
        let found = Topology::detect(directory.path(), None).unwrap();
        assert_eq!(found, Topology([(0, place(0, 0, 5)), (1, place(1, 1, 5)), (2, place(1, 0, 2))].into()));
        assert_eq!(found.nodes(), Mask(0b11));
        assert_eq!(found.on(Mask(0b10), &"0-1".parse().unwrap()).to_string(), "1");
        assert_eq!(found.near(&"0,2,9".parse().unwrap()), [Mask(0b01), Mask(0b10)]);
        let found = Topology::detect(directory.path(), Some(&"1,7".parse().unwrap())).unwrap();
        assert_eq!(found.all().to_string(), "1");
    }
}
