//! How resources are to be near to each other, by the kubelet's names.

use std::{fmt, str::FromStr};

use super::{Error, nodes::Nodes};

/// How much it matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Not at all.
    #[default]
    None,
    /// It is tried.
    BestEffort,
    /// A pod is refused whose resources come from more nodes than they would have to.
    Restricted,
    /// A pod is refused whose resources do not come from one node.
    SingleNumaNode,
}

/// All of them, and their names.
const POLICIES: [(Policy, &str); 4] = [
    (Policy::None, "none"),
    (Policy::BestEffort, "best-effort"),
    (Policy::Restricted, "restricted"),
    (Policy::SingleNumaNode, "single-numa-node"),
];

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(POLICIES.iter().find(|(policy, _)| policy == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Policy, String> {
        let found = POLICIES.iter().find(|(_, name)| *name == text);
        found.map(|(policy, _)| *policy).ok_or_else(|| "it is none, best-effort, restricted or single-numa-node".into())
    }
}

/// Whose resources are to be near to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// Those of each container.
    #[default]
    Container,
    /// Those of all containers of a pod.
    Pod,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scope::Container => "container",
            Scope::Pod => "pod",
        })
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Scope, String> {
        match text {
            "container" => Ok(Scope::Container),
            "pod" => Ok(Scope::Pod),
            _ => Err("it is container or pod".to_owned()),
        }
    }
}

/// How many nodes a machine may have, if nothing else is said: what is looked at doubles with each.
const USUAL: u32 = 8;
/// How many it may have at most. Upstream has no limit, and no machine on which more come to an end.
const MOST: u32 = 16;

/// What else can be said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Nodes that are close to each other are preferred, where several are needed.
    pub prefer_closest: bool,
    /// How many nodes the machine may have.
    pub max_nodes: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options { prefer_closest: false, max_nodes: USUAL }
    }
}

impl FromStr for Options {
    type Err = String;

    fn from_str(text: &str) -> Result<Options, String> {
        let mut options = Options::default();
        for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
            let (name, value) =
                one.split_once('=').ok_or_else(|| format!("{one:?} has no value: write OPTION=VALUE"))?;
            match name {
                "prefer-closest-numa-nodes" => {
                    options.prefer_closest = match value {
                        "true" | "True" | "TRUE" | "t" | "T" | "1" => true,
                        "false" | "False" | "FALSE" | "f" | "F" | "0" => false,
                        _ => return Err(format!("bad value for option {name:?}: {value:?} is neither true nor false")),
                    };
                }
                "max-allowable-numa-nodes" => {
                    let wrong =
                        || format!("bad value for option {name:?}: {value:?} is no number from {USUAL} to {MOST}");
                    let number = value.parse().ok().filter(|number| (USUAL..=MOST).contains(number));
                    options.max_nodes = number.ok_or_else(wrong)?;
                }
                _ => {
                    return Err(format!(
                        "unknown Topology Manager Policy option: {name:?}: there are prefer-closest-numa-nodes and \
                         max-allowable-numa-nodes"
                    ));
                }
            }
        }
        Ok(options)
    }
}

/// All that is said of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// How much it matters.
    pub policy: Policy,
    /// Whose resources.
    pub scope: Scope,
    /// The rest.
    pub options: Options,
}

impl Settings {
    /// Whether a machine with these nodes can be looked at.
    ///
    /// # Errors
    /// If it has too many.
    pub fn check(&self, nodes: &Nodes) -> Result<(), Error> {
        let (count, most) = (nodes.all.count(), self.options.max_nodes);
        match self.policy == Policy::None || count <= most {
            true => Ok(()),
            false => Err(Error::TooMany { policy: self.policy, count, most, limit: MOST }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::mask::Mask;

    #[test]
    fn names() {
        for name in ["none", "best-effort", "restricted", "single-numa-node"] {
            assert_eq!(name.parse::<Policy>().unwrap().to_string(), name);
        }
        assert!("static".parse::<Policy>().unwrap_err().contains("single-numa-node"));
        for name in ["container", "pod"] {
            assert_eq!(name.parse::<Scope>().unwrap().to_string(), name);
        }
        assert!("node".parse::<Scope>().unwrap_err().contains("container or pod"));
    }

    #[test]
    fn options() {
        let options = |text: &str| text.parse::<Options>().map(|options| (options.prefer_closest, options.max_nodes));
        assert_eq!(options(""), Ok((false, 8)));
        assert_eq!(options("prefer-closest-numa-nodes=true"), Ok((true, 8)));
        assert_eq!(options("prefer-closest-numa-nodes=0, max-allowable-numa-nodes=16"), Ok((false, 16)));
        for (wrong, said) in [
            ("prefer-closest-numa-nodes", "has no value"),
            ("prefer-closest-numa-nodes=yes", "\"yes\" is neither true nor false"),
            ("max-allowable-numa-nodes=7", "\"7\" is no number from 8 to 16"),
            ("max-allowable-numa-nodes=17", "\"17\" is no number from 8 to 16"),
            ("max-allowable-numa-nodes=x", "is no number"),
            ("align=1", "unknown Topology Manager Policy option: \"align\""),
        ] {
            let error = options(wrong).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn too_many_nodes() {
        let nodes = |count: u32| Nodes { all: (0..count).collect::<Mask>(), ..Default::default() };
        let mut settings = Settings::default();
        settings.check(&nodes(20)).unwrap();
        settings.policy = Policy::BestEffort;
        settings.check(&nodes(8)).unwrap();
        let said = settings.check(&nodes(9)).unwrap_err().to_string();
        assert!(said.contains("unsupported on machines with more than 8 NUMA Nodes") && said.contains("max-allowable"));
        settings.options.max_nodes = 16;
        settings.check(&nodes(16)).unwrap();
        let said = settings.check(&nodes(17)).unwrap_err().to_string();
        assert!(said.contains("more than 16 NUMA Nodes, and this one has 17"), "{said}");
    }
}
