//! The table of policies as a value, and the script that turns one into another.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use crate::{
    nft::{Kind, Outline},
    proxy::family::Family,
};

/// Our table.
pub const TABLE: &str = "inet seawall_policy";
/// From the addresses of this node's pods that are isolated for what comes in, to the chain that lets some of it pass.
pub const INGRESS: [&str; 2] = ["ingress4", "ingress6"];
/// The same for what goes out.
pub const EGRESS: [&str; 2] = ["egress4", "egress6"];
/// Pairs of an isolated pod's address with itself: no pod can be kept from itself.
pub const ITSELF: [&str; 2] = ["itself4", "itself6"];

/// What does not depend on any policy. A line with `$` is meant for each family (`$n` is its number).
///
/// What goes out and what comes in are asked in chains of their own, since `accept` ends a chain of the kernel's and no
/// more: between two pods of this node both have to agree. What this machine sends itself is not asked, nor what ends at
/// it: traffic between a pod and its node is always allowed. What the relay sends in a pod's name has the pod's address,
/// so it is asked (output).
const BASE: &str = "\
chain check_egress {
    ct state established,related accept
    $ip saddr . $ip daddr @itself$n accept
    $ip saddr vmap @egress$n
}
chain check_ingress {
    ct state established,related accept
    $ip saddr . $ip daddr @itself$n accept
    $ip daddr vmap @ingress$n
}
chain forward_egress {
    type filter hook forward priority 5; policy accept;
    jump check_egress
}
chain forward_ingress {
    type filter hook forward priority 6; policy accept;
    jump check_ingress
}
chain output_egress {
    type filter hook output priority 5; policy accept;
    fib saddr type local accept
    jump check_egress
}
chain output_ingress {
    type filter hook output priority 6; policy accept;
    fib saddr type local accept
    jump check_ingress
}
";

fn base() -> String {
    let mut out = String::new();
    for line in BASE.lines() {
        if line.contains('$') {
            for family in Family::ALL {
                let _ = writeln!(out, "{}", line.replace("$n", family.suffix()).replace("$ip", family.ip()));
            }
        } else {
            let _ = writeln!(out, "{line}");
        }
    }
    out
}

/// What the table holds besides the base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Chains by name, with their rules.
    pub chains: BTreeMap<String, Vec<String>>,
    /// Sets by name, with the type of their elements.
    pub sets: BTreeMap<String, &'static str>,
    /// Elements of sets: set and element.
    pub elements: BTreeSet<(String, String)>,
    /// Elements of maps: map and key, with the chain.
    pub verdicts: BTreeMap<(&'static str, String), String>,
}

/// Elements that are named in one line.
const TOGETHER: usize = 500;

fn lines<'a>(out: &mut String, verb: &str, elements: impl Iterator<Item = (&'a str, String)>) {
    let mut by_set: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (set, element) in elements {
        by_set.entry(set).or_default().push(element);
    }
    for (set, elements) in by_set {
        for some in elements.chunks(TOGETHER) {
            let _ = writeln!(out, "{verb} element {TABLE} {set} {{ {} }}", some.join(", "));
        }
    }
}

impl Ruleset {
    /// What the kernel holds if it holds this.
    pub fn outline(&self) -> Outline {
        let mut outline = Outline::new();
        let mut chain = String::new();
        for line in base().lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("chain ") {
                chain = name.trim_end_matches(" {").to_owned();
                outline.insert((Kind::Chain, chain.clone()), 0);
            } else if line != "}" && !line.starts_with("type ") {
                *outline.entry((Kind::Chain, chain.clone())).or_default() += 1;
            }
        }
        outline.extend(self.chains.iter().map(|(name, rules)| ((Kind::Chain, name.clone()), rules.len())));
        let fixed = INGRESS.into_iter().chain(EGRESS).chain(ITSELF).map(str::to_owned);
        outline.extend(fixed.chain(self.sets.keys().cloned()).map(|set| ((Kind::Set, set), 0)));
        let all = self.elements.iter().map(|(set, _)| set.clone());
        for set in all.chain(self.verdicts.keys().map(|(map, _)| (*map).to_owned())) {
            *outline.entry((Kind::Set, set)).or_default() += 1;
        }
        outline
    }

    /// The script that brings the kernel from `old` to this, as one transaction. Without `old` the table is made anew,
    /// whatever the kernel holds; the old one serves until the moment of the change.
    pub fn script(&self, old: Option<&Ruleset>) -> String {
        let mut out = String::new();
        let nothing = Ruleset::default();
        let old = match old {
            Some(old) => old,
            None => {
                let _ = writeln!(out, "add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{");
                for family in Family::ALL {
                    let ty = family.address_type();
                    for map in [INGRESS, EGRESS] {
                        let _ = writeln!(out, "map {} {{ type {ty} : verdict; }}", family.pick(map));
                    }
                    let _ = writeln!(out, "set {} {{ type {ty} . {ty}; }}", family.pick(ITSELF));
                }
                let _ = writeln!(out, "{}}}", base());
                &nothing
            }
        };
        // Each refers only to what stands before. What is not needed any more goes last, when nothing refers to it.
        for (set, ty) in self.sets.iter().filter(|(set, _)| !old.sets.contains_key(*set)) {
            let _ = writeln!(out, "add set {TABLE} {set} {{ type {ty}; }}");
        }
        for chain in self.chains.keys().filter(|c| !old.chains.contains_key(*c)) {
            let _ = writeln!(out, "add chain {TABLE} {chain}");
        }
        for (chain, rules) in self.chains.iter().filter(|(chain, rules)| old.chains.get(*chain) != Some(rules)) {
            if old.chains.contains_key(chain) {
                let _ = writeln!(out, "flush chain {TABLE} {chain}");
            }
            for rule in rules {
                let _ = writeln!(out, "add rule {TABLE} {chain} {rule}");
            }
        }
        // A set that goes takes its elements along.
        let gone = old.elements.difference(&self.elements).filter(|(set, _)| is_kept(self, set));
        lines(&mut out, "delete", gone.map(|(set, element)| (set.as_str(), element.clone())));
        let new = self.elements.difference(&old.elements);
        lines(&mut out, "add", new.map(|(set, element)| (set.as_str(), element.clone())));
        let differs = |a: &Ruleset, key: &(&'static str, String), chain: &String| a.verdicts.get(key) != Some(chain);
        let gone = old.verdicts.iter().filter(|(key, chain)| differs(self, key, chain));
        lines(&mut out, "delete", gone.map(|((map, key), _)| (*map, key.clone())));
        let new = self.verdicts.iter().filter(|(key, chain)| differs(old, key, chain));
        lines(&mut out, "add", new.map(|((map, key), chain)| (*map, format!("{key} : goto {chain}"))));
        let gone: Vec<&String> = old.chains.keys().filter(|c| !self.chains.contains_key(*c)).collect();
        for chain in &gone {
            let _ = writeln!(out, "flush chain {TABLE} {chain}");
        }
        for chain in &gone {
            let _ = writeln!(out, "delete chain {TABLE} {chain}");
        }
        for set in old.sets.keys().filter(|s| !self.sets.contains_key(*s)) {
            let _ = writeln!(out, "delete set {TABLE} {set}");
        }
        out
    }
}

fn is_kept(new: &Ruleset, set: &str) -> bool {
    new.sets.contains_key(set) || ITSELF.contains(&set)
}
