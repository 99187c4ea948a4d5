//! What a question is answered with, of what is known. Pure.

use std::net::IpAddr;

use hickory_proto::rr::{
    Name, RData, Record, RecordType,
    rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT},
};

use crate::{
    name::{self, Text},
    zone::{Entry, Host, Leads, Zone},
};

/// How long clients may keep an answer, in seconds.
pub const TTL: u32 = 5;
/// The version of the specification that is followed.
pub const VERSION: &str = "1.1.0";
/// So many aliases in a row are followed.
const MOST_ALIASES: usize = 8;

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It is known. Without records: the name is there, but nothing of that type.
    Found {
        /// What was asked for.
        answers: Vec<Record>,
        /// What will be asked for next.
        additionals: Vec<Record>,
    },
    /// There is no such name.
    NoName,
    /// It stands for a name that others know.
    Alias {
        /// The way there.
        records: Vec<Record>,
        /// What is to be asked for.
        target: Name,
    },
    /// Others know.
    Elsewhere,
}

const NOTHING: Answer = Answer::Found { answers: Vec::new(), additionals: Vec::new() };

/// Whether the records of a type are part of what is asked for.
fn wants(asked: RecordType, of: RecordType) -> bool {
    asked == of || asked == RecordType::ANY
}

/// A record of ours.
fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL, data)
}

fn address(name: &Name, ip: IpAddr) -> Record {
    match ip {
        IpAddr::V4(ip) => record(name, RData::A(A(ip))),
        IpAddr::V6(ip) => record(name, RData::AAAA(AAAA(ip))),
    }
}

fn type_of(ip: IpAddr) -> RecordType {
    if ip.is_ipv4() { RecordType::A } else { RecordType::AAAA }
}

impl Zone {
    /// What goes with an answer that there is nothing: how long that may be kept.
    pub fn authority(&self) -> Record {
        let origin = &self.shape.origin;
        let (first, hostmaster) = (self.shape.name("ns.dns"), self.shape.name("hostmaster"));
        let (first, hostmaster) = (first.unwrap_or_default(), hostmaster.unwrap_or_default());
        record(origin, RData::SOA(SOA::new(first, hostmaster, 1, 7200, 1800, 86400, TTL)))
    }

    /// Answers a question. `turn` says with which of several answers to begin, so that clients that take the first one
    /// are spread.
    pub fn answer(&self, name: &Name, asked: RecordType, turn: usize) -> Answer {
        match self.look_up(name, asked, turn) {
            Answer::Alias { records, target } if asked != RecordType::CNAME => {
                self.follow(records, target, asked, turn)
            }
            Answer::Alias { records, .. } => Answer::Found { answers: records, additionals: Vec::new() },
            answer => answer,
        }
    }

    /// Follows aliases to where others know more than we do.
    fn follow(&self, mut records: Vec<Record>, mut target: Name, asked: RecordType, turn: usize) -> Answer {
        for _ in 0..MOST_ALIASES {
            match self.look_up(&target, asked, turn) {
                Answer::Alias { records: more, target: next } => {
                    records.extend(more);
                    target = next;
                }
                Answer::Found { answers, additionals } => {
                    records.extend(answers);
                    return Answer::Found { answers: records, additionals };
                }
                Answer::NoName => return Answer::Found { answers: records, additionals: Vec::new() },
                Answer::Elsewhere => return Answer::Alias { records, target },
            }
        }
        // A circle leads nowhere.
        Answer::Found { answers: records, additionals: Vec::new() }
    }

    fn look_up(&self, name: &Name, asked: RecordType, turn: usize) -> Answer {
        let text = Text::of(name);
        let text = text.as_str();
        if let Some(rest) = name::below(text, &self.shape.domain) {
            return self.below(name, rest, asked, turn);
        }
        match name::reversed(text) {
            Some(ip) => self.reverse(name, ip, asked),
            None => Answer::Elsewhere,
        }
    }

    fn reverse(&self, name: &Name, ip: IpAddr, asked: RecordType) -> Answer {
        let mut names = self.names_of(ip).peekable();
        if names.peek().is_none() {
            let ours = self.shape.ranges.iter().any(|range| range.contains(&ip));
            return if ours { Answer::NoName } else { Answer::Elsewhere };
        }
        match wants(asked, RecordType::PTR) {
            true => found(names.map(|to| record(name, RData::PTR(PTR(to.clone())))).collect()),
            false => NOTHING,
        }
    }

    /// `rest` is what stands before the domain.
    fn below(&self, name: &Name, rest: &str, asked: RecordType, turn: usize) -> Answer {
        if let Some(rest) = name::below(rest, "svc") {
            return self.service(name, rest, asked, turn);
        }
        if let Some(rest) = name::below(rest, "pod") {
            return pod(name, rest, asked);
        }
        match rest {
            "" => {
                let mut answers = Vec::new();
                if wants(asked, RecordType::SOA) {
                    answers.push(self.authority());
                }
                if wants(asked, RecordType::NS)
                    && let Some(first) = self.shape.name("ns.dns")
                {
                    answers.push(record(name, RData::NS(NS(first))));
                }
                found(answers)
            }
            "dns-version" => match wants(asked, RecordType::TXT) {
                true => found(vec![record(name, RData::TXT(TXT::new(vec![VERSION.to_owned()])))]),
                false => NOTHING,
            },
            "dns" => NOTHING,
            "ns.dns" => addresses(name, self.shape.dns.iter().copied(), asked, turn),
            _ => Answer::NoName,
        }
    }

    /// `rest` is what stands before `svc`.
    fn service(&self, name: &Name, rest: &str, asked: RecordType, turn: usize) -> Answer {
        // From the right: namespace, Service, and what is below it.
        let Some((front, _)) = rest.rsplit_once('.') else {
            return if rest.is_empty() || self.has_namespace(rest) { NOTHING } else { Answer::NoName };
        };
        let (below, key) = match front.rsplit_once('.') {
            Some((below, _)) => (below, &rest[below.len() + 1..]),
            None => ("", rest),
        };
        let Some(entry) = self.entry(key) else { return Answer::NoName };
        match below {
            "" => self.whole(entry, name, asked, turn),
            _ if below.starts_with('_') => self.port(entry, name, below, asked, turn),
            host => match &entry.leads {
                Leads::Hosts(hosts) => {
                    let mut of = hosts.iter().filter(|h| h.label == host).peekable();
                    match of.peek() {
                        Some(_) => addresses(name, of.map(|h| h.ip), asked, turn),
                        None => Answer::NoName,
                    }
                }
                _ => Answer::NoName,
            },
        }
    }

    /// The Service itself.
    fn whole(&self, entry: &Entry, name: &Name, asked: RecordType, turn: usize) -> Answer {
        match &entry.leads {
            Leads::Addresses(ips) => addresses(name, ips.iter().copied(), asked, turn),
            Leads::Name(target) => Answer::Alias {
                records: vec![record(name, RData::CNAME(CNAME(target.clone())))],
                target: target.clone(),
            },
            // Without endpoints the name is not there (as the specification has it for none that is ready).
            Leads::Hosts(hosts) if hosts.is_empty() => Answer::NoName,
            Leads::Hosts(hosts) => addresses(name, self.usable(hosts.iter()).into_iter().map(|h| h.ip), asked, turn),
        }
    }

    /// `_port._protocol`, or `_protocol` alone.
    fn port(&self, entry: &Entry, name: &Name, below: &str, asked: RecordType, turn: usize) -> Answer {
        let Some((port, protocol)) = below.split_once('.') else {
            let protocol = &below[1..];
            let there = entry.ports.iter().any(|p| p.protocol == protocol);
            return if there { NOTHING } else { Answer::NoName };
        };
        let (Some(port), Some(protocol)) = (port.strip_prefix('_'), protocol.strip_prefix('_')) else {
            return Answer::NoName;
        };
        let mut named = entry.ports.iter().filter(|p| p.name == port && p.protocol == protocol).peekable();
        if named.peek().is_none() {
            return Answer::NoName;
        }
        if !wants(asked, RecordType::SRV) {
            return NOTHING;
        }
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        let srv = |number: u16, target: &Name, weight: u16| {
            record(name, RData::SRV(SRV::new(0, weight, number, target.clone())))
        };
        for port in named {
            match &entry.leads {
                Leads::Addresses(ips) => {
                    answers.push(srv(port.number, &entry.name, 100));
                    additionals.extend(ips.iter().map(|ip| address(&entry.name, *ip)));
                }
                Leads::Hosts(hosts) => {
                    let of = self.usable(port.hosts.iter().filter_map(|i| hosts.get(*i)));
                    let weight = (100 / of.len().max(1)).max(1) as u16;
                    for host in of {
                        let answer = srv(port.number, &host.name, weight);
                        // A host of two families is one target.
                        if !answers.contains(&answer) {
                            answers.push(answer);
                        }
                        additionals.push(address(&host.name, host.ip));
                    }
                }
                Leads::Name(_) => {}
            }
        }
        rotate(&mut answers, turn);
        Answer::Found { answers, additionals }
    }

    /// Those on machines that are well, if there are any.
    fn usable<'a>(&self, hosts: impl Iterator<Item = &'a Host> + Clone) -> Vec<&'a Host> {
        if !self.avoided.is_empty() {
            let well = |h: &&Host| !h.node.as_deref().is_some_and(|node| self.avoided.contains(node));
            let some: Vec<&Host> = hosts.clone().filter(well).collect();
            if !some.is_empty() {
                return some;
            }
        }
        hosts.collect()
    }
}

fn found(answers: Vec<Record>) -> Answer {
    Answer::Found { answers, additionals: Vec::new() }
}

fn addresses(name: &Name, ips: impl Iterator<Item = IpAddr>, asked: RecordType, turn: usize) -> Answer {
    let mut answers: Vec<Record> = ips.filter(|ip| wants(asked, type_of(*ip))).map(|ip| address(name, ip)).collect();
    rotate(&mut answers, turn);
    found(answers)
}

fn rotate(answers: &mut [Record], turn: usize) {
    if answers.len() > 1 {
        answers.rotate_left(turn % answers.len());
    }
}

/// `10-244-0-2.shop`: the address is in the name, whether or not there is such a pod.
fn pod(name: &Name, rest: &str, asked: RecordType) -> Answer {
    match rest.split_once('.') {
        // There may be such a namespace.
        None => NOTHING,
        Some((_, namespace)) if namespace.contains('.') => Answer::NoName,
        Some((label, _)) => match name::dashed(label) {
            Some(ip) => addresses(name, std::iter::once(ip), asked, 0),
            None => Answer::NoName,
        },
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
