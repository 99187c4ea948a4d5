//! The NUMA nodes of the machine.

use std::{collections::BTreeMap, fs, io, path::Path};

use super::mask::{Mask, PLACES};
use crate::cpus::set::CpuSet;

/// Which nodes there are, and how far they are from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nodes {
    /// All of them.
    pub all: Mask,
    /// From one to another, as the kernel says; empty if nobody wants to know.
    pub(super) distances: BTreeMap<(u32, u32), u64>,
}

/// Why the nodes are not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel does not say it.
    #[error("read {file}")]
    Read {
        /// Where.
        file: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It says something that is not understood.
    #[error("{file} says {text:?}: {want}")]
    Malformed {
        /// Where.
        file: String,
        /// What.
        text: String,
        /// What it should say.
        want: &'static str,
    },
}

/// Reads a file of the kernel's; `None` if there is none.
fn read(file: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { file: file.display().to_string(), source }),
    }
}

impl Nodes {
    /// Reads them below `/sys/devices/system`, or a directory like it. A kernel that knows of none has one, 0. How far they are
    /// from each other is only read if that matters.
    ///
    /// # Errors
    /// If the kernel says nothing that is understood.
    pub fn detect(system: &Path, with_distances: bool) -> Result<Nodes, Error> {
        let directory = system.join("node");
        let online = directory.join("online");
        let Some(text) = read(&online)? else { return Ok(Nodes { all: Mask(1), distances: [((0, 0), 10)].into() }) };
        let malformed = |file: &Path, text: &str, want| {
            let (file, text) = (file.display().to_string(), text.to_owned());
            Err(Error::Malformed { file, text, want })
        };
        let numbers = text.parse::<CpuSet>().unwrap_or_default().0;
        if numbers.is_empty() || numbers.iter().any(|node| *node >= PLACES) {
            return malformed(&online, &text, "nodes from 0 to 63 were expected");
        }
        let mut nodes = Nodes { all: numbers.iter().copied().collect(), distances: BTreeMap::new() };
        for node in numbers.iter().filter(|_| with_distances) {
            let file = directory.join(format!("node{node}/distance"));
            let text = read(&file)?.unwrap_or_default();
            let row: Option<Vec<u64>> = text.split_whitespace().map(|number| number.parse().ok()).collect();
            match row {
                Some(row) if row.len() == numbers.len() => {
                    nodes.distances.extend(numbers.iter().zip(row).map(|(other, far)| ((*node, *other), far)));
                }
                _ => return malformed(&file, &text, "its distance to each node was expected"),
            }
        }
        Ok(nodes)
    }

    /// How far some nodes are from each other, altogether: a figure for sets of as many.
    pub fn spread(&self, mask: Mask) -> u64 {
        let pairs = mask.nodes().flat_map(|one| mask.nodes().map(move |other| (one, other)));
        pairs.filter_map(|pair| self.distances.get(&pair)).sum()
    }

    #[cfg(test)]
    pub(crate) fn of(rows: &[(u32, &[u64])]) -> Nodes {
        let numbers: Vec<u32> = rows.iter().map(|(node, _)| *node).collect();
        let pairs =
            rows.iter().flat_map(|(node, row)| numbers.iter().zip(*row).map(|(other, far)| ((*node, *other), *far)));
        Nodes { all: numbers.iter().copied().collect(), distances: pairs.collect() }
    }
}

/// Which node each CPU is near to; one that is not told is near to node 0.
pub fn of_cpus(system: &Path) -> BTreeMap<u32, u32> {
    let online = fs::read_to_string(system.join("node/online")).unwrap_or_default();
    let nodes: CpuSet = online.parse().unwrap_or_default();
    let of = |node: u32| {
        let text = fs::read_to_string(system.join(format!("node/node{node}/cpulist"))).unwrap_or_default();
        let cpus: CpuSet = text.parse().unwrap_or_default();
        cpus.0.into_iter().map(move |cpu| (cpu, node))
    };
    nodes.0.into_iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = directory.path().join("node").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let detect = |far: bool| Nodes::detect(directory.path(), far).map_err(|error| error.to_string());
        assert_eq!(detect(true), Ok(Nodes::of(&[(0, &[10])])));
        assert!(of_cpus(directory.path()).is_empty());
        write("online", "0,2\n");
        assert_eq!(detect(false).map(|nodes| nodes.all), Ok(Mask(0b101)));
        let refused = detect(true).unwrap_err();
        assert!(
            refused.ends_with("node/node0/distance says \"\": its distance to each node was expected"),
            "{refused}"
        );
        write("node0/distance", "10 21\n");
        write("node2/distance", "21 10\n");
        let nodes = detect(true).unwrap();
        assert_eq!(nodes, Nodes::of(&[(0, &[10, 21]), (2, &[21, 10])]));
        assert_eq!((nodes.spread(Mask(0b1)), nodes.spread(Mask(0b101))), (10, 62));
        write("node2/distance", "21\n");
        assert!(detect(true).unwrap_err().contains("node2/distance says \"21\""));
        for wrong in ["0-64\n", "", "x"] {
            write("online", wrong);
            assert!(detect(false).unwrap_err().ends_with("nodes from 0 to 63 were expected"), "{wrong}");
        }
        write("online", "0-1\n");
        write("node0/cpulist", "0,2\n");
        write("node1/cpulist", "1\n");
        assert_eq!(of_cpus(directory.path()), [(0, 0), (1, 1), (2, 0)].into());
    }
}
