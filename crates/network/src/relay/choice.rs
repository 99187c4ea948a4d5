//! In which order the endpoints are tried for a connection, and in whose name. Pure.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tokio::time::Instant;

use super::table::{Backend, Door, Route, Table};
use crate::proxy::endpoints::Scope;

/// From where a connection may be served: `externalTrafficPolicy: Local` is for clients outside; pods and the nodes
/// themselves reach all endpoints, as with the rules.
pub fn scope(door: Door, client: IpAddr, table: &Table) -> Scope {
    match door {
        Door::Internal(scope) => scope,
        Door::External(_) if table.pods.iter().any(|net| net.contains(&client)) || table.own.contains(&client) => {
            Scope::Cluster
        }
        Door::External(scope) => scope,
    }
}

/// The endpoints in the order in which they are tried: the client's own one first, then tier by tier by chance. `random`
/// gives a number below its argument.
pub fn order(
    route: &Route,
    scope: Scope,
    sticky: Option<SocketAddr>,
    mut random: impl FnMut(usize) -> usize,
) -> Vec<Backend> {
    let mut all = Vec::new();
    for (number, tier) in route.tiers(scope).iter().enumerate() {
        let mut tier = tier.clone();
        // The client's own endpoint counts only while it takes new connections: otherwise the client moves on.
        let own = sticky.filter(|_| number == 0).and_then(|own| tier.iter().position(|b| b.address == own));
        let first = own.map(|own| tier.remove(own));
        all.extend(first);
        for left in (1..=tier.len()).rev() {
            tier.swap(left - 1, random(left));
        }
        all.append(&mut tier);
    }
    all
}

/// Whether an endpoint sees the client's own address. As with the rules, it does not where answers would not come back
/// this way: for clients elsewhere, and for a pod that reaches itself. A process of this machine would answer the client
/// without anything that passes by here, so it sees this machine (with the rules it sees the client).
pub fn in_clients_name(door: Door, client: IpAddr, backend: &Backend, table: &Table) -> bool {
    let pod_here = table.own_pods.iter().any(|net| net.contains(&client));
    let comes_back = match door {
        Door::Internal(_) => pod_here,
        Door::External(Scope::Cluster) => false,
        Door::External(Scope::Local) => pod_here || (backend.local && !table.own.contains(&client)),
    };
    let to = backend.address.ip();
    let own_process = table.own.contains(&to) || (backend.local && !table.own_pods.iter().any(|net| net.contains(&to)));
    comes_back && !own_process && client.is_ipv4() == to.is_ipv4() && client != to
}

/// Which client belongs to which endpoint (`sessionAffinity: ClientIP`).
pub struct Affinities {
    known: HashMap<(String, IpAddr), (SocketAddr, Instant)>,
    /// In the order of their first use: the oldest go when there are too many.
    order: VecDeque<(String, IpAddr)>,
    most: usize,
}

impl Affinities {
    /// Remembers at most so many.
    pub fn new(most: usize) -> Affinities {
        Affinities { known: HashMap::new(), order: VecDeque::new(), most }
    }

    /// The client's endpoint, if it was used not longer ago than `lasts`.
    pub fn get(&self, now: Instant, service: &str, client: IpAddr, lasts: Duration) -> Option<SocketAddr> {
        let (backend, used) = self.known.get(&(service.to_owned(), client))?;
        (now.saturating_duration_since(*used) < lasts).then_some(*backend)
    }

    /// The client used this one.
    pub fn put(&mut self, now: Instant, service: &str, client: IpAddr, backend: SocketAddr) {
        let key = (service.to_owned(), client);
        if self.known.insert(key.clone(), (backend, now)).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > self.most {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(address: &str, local: bool) -> Backend {
        Backend { address: address.parse().unwrap(), node: None, local }
    }

    fn names(order: &[Backend]) -> String {
        let last = |b: &Backend| b.address.to_string().split(['.', ':']).nth(3).unwrap().to_owned();
        order.iter().map(last).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_order() {
        let all =
            |numbers: &[u8]| numbers.iter().map(|n| backend(&format!("10.0.0.{n}:80"), false)).collect::<Vec<_>>();
        let route = Route { cluster: vec![all(&[1, 2, 3]), all(&[4])], local: vec![all(&[3])], ..Default::default() };
        let check = |scope: Scope, sticky: Option<&str>, expect: &str| {
            let sticky = sticky.map(|s| s.parse().unwrap());
            assert_eq!(names(&order(&route, scope, sticky, |n| n - 1)), expect);
        };
        check(Scope::Cluster, None, "1 2 3 4");
        check(Scope::Cluster, Some("10.0.0.2:80"), "2 1 3 4");
        check(Scope::Cluster, Some("10.0.0.9:80"), "1 2 3 4");
        // Its own takes no new connections.
        check(Scope::Cluster, Some("10.0.0.4:80"), "1 2 3 4");
        check(Scope::Local, None, "3");
        assert_eq!(names(&order(&route, Scope::Cluster, None, |_| 0)), "2 3 1 4");
    }

    #[test]
    fn every_endpoint_of_a_tier_comes_first_equally_often() {
        let tier: Vec<_> = (1..=4).map(|n| backend(&format!("10.0.0.{n}:80"), false)).collect();
        let route = Route { cluster: vec![tier], ..Default::default() };
        let mut seen = [0; 5];
        // All ways in which the numbers can fall.
        for case in 0..24 {
            let order = order(&route, Scope::Cluster, None, |n| match n {
                4 => case % 4,
                3 => case / 4 % 3,
                2 => case / 12,
                _ => 0,
            });
            seen[names(&order[..1]).parse::<usize>().unwrap()] += 1;
        }
        assert_eq!(seen, [0, 6, 6, 6, 6]);
    }

    #[test]
    fn in_whose_name() {
        let table = Table {
            pods: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
            own_pods: vec!["10.244.1.0/24".parse().unwrap(), "fd00:244:0:1::/64".parse().unwrap()],
            own: vec!["10.9.0.1".parse().unwrap(), "fd00:9::1".parse().unwrap()],
            ..Default::default()
        };
        let (internal, external, local) =
            (Door::Internal(Scope::Cluster), Door::External(Scope::Cluster), Door::External(Scope::Local));
        let here = backend("10.244.1.2:80", true);
        let there = backend("10.244.2.2:80", false);
        let check = |door: Door, client: &str, backend: &Backend, expect_scope: Scope, expect: bool| {
            let client = client.parse().unwrap();
            assert_eq!(scope(door, client, &table), expect_scope, "{door:?} {client}");
            assert_eq!(in_clients_name(door, client, backend, &table), expect, "{door:?} {client}");
        };
        let (all, only) = (Scope::Cluster, Scope::Local);
        // A pod here, also to itself; this node; a client outside.
        check(internal, "10.244.1.7", &there, all, true);
        check(internal, "10.244.1.7", &here, all, true);
        check(internal, "10.244.1.2", &here, all, false);
        check(internal, "10.244.1.7", &backend("10.9.0.1:80", true), all, false);
        check(local, "192.0.2.1", &backend("172.20.0.9:80", true), only, false);
        check(internal, "10.9.0.1", &there, all, false);
        check(internal, "192.0.2.1", &there, all, false);
        check(external, "192.0.2.1", &here, all, false);
        check(local, "192.0.2.1", &here, only, true);
        check(local, "10.244.1.7", &there, all, true);
        check(local, "10.9.0.1", &here, all, false);
        check(Door::Internal(only), "10.244.1.7", &here, only, true);
        let (here, there) = (backend("[fd00:244:0:1::2]:80", true), backend("[fd00:244:0:2::2]:80", false));
        check(internal, "fd00:244:0:1::7", &there, all, true);
        check(internal, "fd00:244:0:1::2", &here, all, false);
        check(internal, "fd00:244:0:1::7", &backend("[fd00:9::1]:80", true), all, false);
        check(internal, "fd00:9::1", &there, all, false);
        check(external, "2001:db8::1", &here, all, false);
        check(local, "2001:db8::1", &here, only, true);
    }

    #[test]
    fn affinities_end_and_are_bounded() {
        let (mut all, now) = (Affinities::new(2), Instant::now());
        let ip = |n: u8| IpAddr::from([10, 0, 0, n]);
        let to: SocketAddr = "10.0.1.1:80".parse().unwrap();
        let minute = Duration::from_secs(60);
        all.put(now, "s", ip(1), to);
        assert_eq!(all.get(now + minute / 2, "s", ip(1), minute), Some(to));
        assert_eq!(all.get(now + minute, "s", ip(1), minute), None);
        assert_eq!(all.get(now, "other", ip(1), minute), None);
        all.put(now + minute, "s", ip(1), to);
        assert_eq!(all.get(now + minute, "s", ip(1), minute), Some(to), "used again");
        all.put(now, "s", ip(2), to);
        all.put(now, "s", ip(3), to);
        assert_eq!(all.get(now, "s", ip(1), minute), None, "the oldest went");
        assert_eq!((all.known.len(), all.order.len()), (2, 2));
    }
}
