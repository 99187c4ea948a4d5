//! Which flows have to be forgotten when the rules change. Pure.
//!
//! The kernel looks at the rules when a flow begins. One of datagrams has no end, so it would go on to an endpoint that is
//! gone for as long as the client sends. A connection that nobody has answered would be tried there again and again; and
//! once the client has given up, whoever uses its port within the next two minutes would be led there as well.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use super::{
    conntrack::{Flow, TcpState},
    family::Family,
    rules::Ruleset,
};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What a flow is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Datagrams: it may stay at an endpoint for as long as that answers.
    Datagrams,
    /// A connection that has yet to be answered: it may wait for an endpoint that takes new ones.
    Opening,
}

/// Where a Service is reached, beside the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Front {
    /// An address of its own.
    Address(IpAddr),
    /// Any of the node's: the port is the node's port.
    Node(Family),
}

impl Front {
    /// The family of its addresses.
    fn family(self) -> Family {
        match self {
            Front::Address(address) => Family::of(address),
            Front::Node(family) => family,
        }
    }

    /// Whether this is there.
    fn is(self, port: u16, to: SocketAddr) -> bool {
        to.port() == port
            && match self {
                Front::Address(address) => to.ip() == address,
                Front::Node(family) => Family::of(to.ip()) == family,
            }
    }
}

/// An endpoint at which flows may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reach {
    /// Of what kind.
    pub kind: Kind,
    /// Where the service is reached.
    pub front: Front,
    /// The port.
    pub port: u16,
    /// The endpoint's address.
    pub endpoint: IpAddr,
}

/// Flows that have lost their endpoint, or that were refused before there was one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stale {
    /// The endpoint is gone.
    Endpoint(Reach),
    /// The service had no endpoint for datagrams before: where it is reached, and the port.
    Service(Front, u16),
}

impl Stale {
    /// The family of such flows.
    pub fn family(&self) -> Family {
        match self {
            Stale::Endpoint(Reach { front, .. }) | Stale::Service(front, _) => front.family(),
        }
    }

    /// Whether this is such a flow.
    pub fn is(&self, flow: &Flow) -> bool {
        let to = flow.original.to;
        match self {
            Stale::Endpoint(reach) => {
                let kind = match flow.protocol {
                    UDP => reach.kind == Kind::Datagrams,
                    TCP => reach.kind == Kind::Opening && flow.state == Some(TcpState::Unanswered),
                    _ => false,
                };
                kind && reach.front.is(reach.port, to) && flow.reply.from.ip() == reach.endpoint
            }
            // On its way to the address itself: nobody stood behind it. Of other machines' ports we know nothing, but
            // forgetting such a flow costs nothing either.
            Stale::Service(front, port) => {
                flow.protocol == UDP && front.is(*port, to) && flow.reply.from.ip() == to.ip()
            }
        }
    }
}

/// The flows that a change from `old` to `new` leaves behind.
pub fn stale(old: Option<&Ruleset>, new: &Ruleset) -> BTreeSet<Stale> {
    let Some(old) = old else { return BTreeSet::new() };
    let mut out: BTreeSet<Stale> = old.reach.difference(&new.reach).map(|gone| Stale::Endpoint(*gone)).collect();
    let served = |rules: &Ruleset| -> BTreeSet<(Front, u16)> {
        rules.reach.iter().filter(|r| r.kind == Kind::Datagrams).map(|r| (r.front, r.port)).collect()
    };
    out.extend(served(new).difference(&served(old)).map(|(front, port)| Stale::Service(*front, *port)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::conntrack::Way;

    const NODE: Front = Front::Node(Family::V4);

    fn at(address: &str) -> Front {
        Front::Address(address.parse().unwrap())
    }

    fn rules(front: Front, port: u16, endpoints: &[&str]) -> Ruleset {
        of_kind(Kind::Datagrams, front, port, endpoints)
    }

    fn of_kind(kind: Kind, front: Front, port: u16, endpoints: &[&str]) -> Ruleset {
        let of = |e: &&str| Reach { kind, front, port, endpoint: e.parse().unwrap() };
        Ruleset { reach: endpoints.iter().map(of).collect(), ..Default::default() }
    }

    fn flow(protocol: u8, to: &str, endpoint: &str) -> Flow {
        let client = "10.244.0.9:5000".parse().unwrap();
        Flow {
            protocol,
            original: Way { from: client, to: to.parse().unwrap() },
            reply: Way { from: endpoint.parse().unwrap(), to: client },
            state: None,
        }
    }

    #[test]
    fn flows_to_endpoints_that_left_are_forgotten() {
        let (one, two) = (rules(at("10.96.0.10"), 53, &["10.244.0.2"]), rules(at("10.96.0.10"), 53, &["10.244.0.3"]));
        let found = stale(Some(&one), &two);
        assert_eq!(found.len(), 1);
        let check = |protocol: u8, to: &str, endpoint: &str, expect: bool| {
            let flow = flow(protocol, to, endpoint);
            assert_eq!(found.iter().any(|s| s.is(&flow)), expect, "{flow:?}");
        };
        check(17, "10.96.0.10:53", "10.244.0.2:53", true);
        check(6, "10.96.0.10:53", "10.244.0.2:53", false);
        check(17, "10.96.0.10:53", "10.244.0.3:53", false);
        check(17, "10.96.0.10:54", "10.244.0.2:53", false);
        check(17, "10.96.0.11:53", "10.244.0.2:53", false);
        check(17, "10.244.0.2:53", "10.244.0.2:53", false);
    }

    #[test]
    fn connections_that_nobody_answered_are_forgotten_and_no_others() {
        let of = |endpoints: &[&str]| of_kind(Kind::Opening, at("10.96.0.9"), 80, endpoints);
        let found = stale(Some(&of(&["10.244.0.2", "10.244.0.3"])), &of(&["10.244.0.3"]));
        let check = |protocol: u8, endpoint: &str, state: Option<TcpState>, expect: bool| {
            let flow = Flow { state, ..flow(protocol, "10.96.0.9:80", endpoint) };
            assert_eq!(found.iter().any(|s| s.is(&flow)), expect, "{flow:?}");
        };
        check(6, "10.244.0.2:8080", Some(TcpState::Unanswered), true);
        check(6, "10.244.0.2:8080", Some(TcpState::Opening), false);
        check(6, "10.244.0.2:8080", Some(TcpState::Open), false);
        check(6, "10.244.0.2:8080", Some(TcpState::Over), false);
        check(6, "10.244.0.3:8080", Some(TcpState::Unanswered), false);
        check(17, "10.244.0.2:8080", None, false);
        assert!(stale(Some(&of(&[])), &of(&["10.244.0.2"])).is_empty(), "refused connections are made anew by clients");
    }

    #[test]
    fn of_a_nodes_port_as_well() {
        let found = stale(Some(&rules(NODE, 30053, &["10.244.0.2"])), &Ruleset::default());
        assert!(found.iter().any(|s| s.is(&flow(17, "192.168.77.1:30053", "10.244.0.2:53"))));
        assert!(!found.iter().any(|s| s.is(&flow(17, "192.168.77.1:30053", "10.244.0.3:53"))));
        assert!(!found.iter().any(|s| s.is(&flow(17, "[fd00::1]:30053", "[fd00:2::2]:53"))));
    }

    #[test]
    fn each_family_is_looked_at_by_itself() {
        let six = rules(Front::Node(Family::V6), 53, &["fd00:2::2"]);
        let mut both = rules(NODE, 53, &["10.244.0.2"]);
        let four = both.clone();
        both.reach.extend(six.reach.clone());
        let gone = stale(Some(&both), &four);
        assert!(gone.iter().any(|s| s.is(&flow(17, "[fd00::1]:53", "[fd00:2::2]:53"))));
        assert!(!gone.iter().any(|s| s.is(&flow(17, "192.168.77.1:53", "10.244.0.2:53"))));
        // The port was served in one family before: those that the other one had refused are forgotten all the same.
        let come = stale(Some(&four), &both);
        assert!(come.iter().any(|s| s.is(&flow(17, "[fd00::1]:53", "[fd00::1]:53"))));
        assert!(!come.iter().any(|s| s.is(&flow(17, "192.168.77.1:53", "192.168.77.1:53"))));
        let service = stale(Some(&rules(at("fd00:96::9"), 53, &["fd00:2::2"])), &Ruleset::default());
        assert!(service.iter().any(|s| s.is(&flow(17, "[fd00:96::9]:53", "[fd00:2::2]:53"))));
        assert!(!service.iter().any(|s| s.is(&flow(17, "[fd00:96::8]:53", "[fd00:2::2]:53"))));
    }

    #[test]
    fn flows_that_were_refused_are_forgotten_when_there_is_somebody() {
        let found = stale(Some(&Ruleset::default()), &rules(at("10.96.0.10"), 53, &["10.244.0.2"]));
        assert_eq!(found.iter().collect::<Vec<_>>(), [&Stale::Service(at("10.96.0.10"), 53)]);
        assert!(found.iter().all(|s| s.is(&flow(17, "10.96.0.10:53", "10.96.0.10:53"))));
        assert!(!found.iter().any(|s| s.is(&flow(17, "10.96.0.10:53", "10.244.0.2:53"))));
        assert!(stale(None, &rules(NODE, 1, &["10.244.0.2"])).is_empty(), "what was there is not known");
    }
}
