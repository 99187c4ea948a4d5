//! Sets of CPUs as the kernel writes them: `0-3,8`.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// CPUs by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuSet(pub BTreeSet<u32>);

/// A text that is no list of CPUs.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no list of CPUs: write numbers and ranges, e.g. 0-3,8")]
pub struct Malformed(String);

/// The highest number that is believed: more than any kernel is built for.
const MOST: u32 = 1 << 16;

impl CpuSet {
    /// Those that are not in another set.
    pub fn without(&self, other: &CpuSet) -> CpuSet {
        CpuSet(self.0.difference(&other.0).copied().collect())
    }

    /// Those that are in both.
    pub fn and(&self, other: &CpuSet) -> CpuSet {
        CpuSet(self.0.intersection(&other.0).copied().collect())
    }

    /// Those of either.
    pub fn with(&self, other: &CpuSet) -> CpuSet {
        CpuSet(self.0.union(&other.0).copied().collect())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<T: IntoIterator<Item = u32>>(cpus: T) -> CpuSet {
        CpuSet(cpus.into_iter().collect())
    }
}

impl FromStr for CpuSet {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<CpuSet, Malformed> {
        let mut cpus = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.parse::<u32>().ok().filter(|cpu| *cpu < MOST);
            match number(first).zip(number(last)) {
                Some((first, last)) if first <= last => cpus.extend(first..=last),
                _ => return Err(Malformed(text.to_owned())),
            }
        }
        Ok(CpuSet(cpus))
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<(u32, u32)> = Vec::new();
        for cpu in &self.0 {
            match parts.last_mut() {
                Some((_, last)) if *last + 1 == *cpu => *last = *cpu,
                _ => parts.push((*cpu, *cpu)),
            }
        }
        let part = |(first, last): &(u32, u32)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        };
        f.write_str(&parts.iter().map(part).collect::<Vec<_>>().join(","))
    }
}

impl TryFrom<String> for CpuSet {
    type Error = Malformed;

    fn try_from(text: String) -> Result<CpuSet, Malformed> {
        text.parse()
    }
}

impl From<CpuSet> for String {
    fn from(cpus: CpuSet) -> String {
        cpus.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for (text, shown, count) in [("", "", 0), ("0", "0", 1), ("0-3,8\n", "0-3,8", 5), ("3,1,2,7,6", "1-3,6-7", 5)] {
            let set: CpuSet = text.parse().unwrap();
            assert_eq!((set.to_string().as_str(), set.len()), (shown, count), "{text:?}");
        }
        for wrong in ["a", "3-1", "1-", "-", "0-99999999"] {
            assert!(wrong.parse::<CpuSet>().unwrap_err().to_string().contains("is no list of CPUs"), "{wrong}");
        }
    }
}
