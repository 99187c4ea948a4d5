//! What must hold when nodes fail: nobody else is accused, and who is connected to the living is left alone.

use std::{collections::BTreeMap, time::Duration};

use crate::history::{At, Class, History, NodeSeen, Request};

/// Somebody on whom a fault was made, and from when to when (with the time that it may take to be well again).
#[derive(Clone, Debug)]
pub struct Victim {
    /// The node.
    pub node: String,
    /// From when.
    pub from: At,
    /// When nothing reached it any more; nothing if it was never out of reach.
    pub gone: Option<At>,
    /// Until when; nothing if it never ended.
    pub until: Option<At>,
}

impl Victim {
    fn covers(&self, node: &str, at: At) -> bool {
        self.node == node && at >= self.from && self.until.is_none_or(|until| at <= until)
    }
}

/// No node is called dead to which nothing was done.
pub fn no_false_verdict(history: &History, victims: &[Victim]) -> (Vec<String>, usize) {
    let mut well: BTreeMap<&str, bool> = BTreeMap::new();
    let mut found = Vec::new();
    for NodeSeen { at, node, accused, .. } in &history.nodes {
        let before = well.insert(node, !accused);
        if before == Some(true) && *accused && !victims.iter().any(|v| v.covers(node, *at)) {
            found.push(format!("{node} was called not ready at {:.3} s", at.as_secs_f64()));
        }
    }
    (found, history.nodes.len())
}

/// New connections that are relayed do not fail. One that was begun before the machine was gone may have been taken by a
/// pod that had no time left to say its first words: it was open when its machine went.
pub fn no_relayed_connection_failed(history: &History, victims: &[Victim]) -> (Vec<String>, usize) {
    let open = |r: &Request| victims.iter().any(|v| v.gone.is_some_and(|gone| r.start < gone && r.end >= v.from));
    let of_relay = history.requests.iter().filter(|r| r.class == Class::Connect && r.client.contains("relay"));
    let relayed = || of_relay.clone().filter(|r| !open(r));
    let failed =
        relayed().filter_map(|r| Some(format!("{}, {:.3} s: {}", r.client, r.start.as_secs_f64(), r.error.as_ref()?)));
    (failed.collect(), relayed().count())
}

/// A connection to a pod on a node to which nothing was done is not touched, unless the pod itself ends.
pub fn living_connections_are_left_alone(history: &History, victims: &[Victim]) -> (Vec<String>, usize) {
    let node_of: BTreeMap<&str, &str> = history.pods.iter().map(|p| (&*p.name, &*p.node)).collect();
    let ending = |pod: &str, at: At| {
        history.pods.iter().any(|p| &*p.name == pod && !p.ready && p.at <= at + Duration::from_secs(5))
            && history.pods.iter().any(|p| &*p.name == pod && p.gone)
    };
    let open = || history.requests.iter().filter(|r| r.class == Class::Open);
    let broken = open().filter_map(|r| {
        let error = r.error.as_ref()?;
        let pod = error.split(':').next().unwrap_or_default();
        let node = node_of.get(pod).copied().unwrap_or_default();
        let excused = victims.iter().any(|v| v.covers(node, r.end)) || ending(pod, r.end);
        (!excused).then(|| format!("{}, {:.3} s: {error} (on {node})", r.client, r.end.as_secs_f64()))
    });
    (broken.collect(), open().count())
}

/// How long who sends datagrams sends one again until it is answered. Connections are as patient, and their kernel sends
/// again by itself.
const PATIENCE: Duration = Duration::from_secs(3);

/// No request of a user of a Service fails: no new connection with its first words, no line on a connection that stays
/// open, no datagram that is sent again for a while. That a server takes leave of an open connection with an answer is no
/// failure, and its clients connect anew.
pub fn no_request_failed(history: &History) -> (Vec<String>, usize) {
    let of = |class: Class| history.requests.iter().filter(move |r| r.class == class);
    let connections = || of(Class::Connect).chain(of(Class::Open));
    let mut failed: Vec<String> = connections()
        .filter_map(|r| {
            let error = r.error.as_ref()?;
            Some(format!("{}, {}, {:.3} s: {error}", r.class.word(), r.client, r.start.as_secs_f64()))
        })
        .collect();
    // Since when a client waits for an answer to a datagram.
    let mut waits: BTreeMap<&str, At> = BTreeMap::new();
    for r in of(Class::Datagram) {
        let since = *waits.entry(&r.client).or_insert(r.start);
        if r.error.is_none() {
            waits.remove(&*r.client);
        }
        if r.end - since > PATIENCE {
            failed.push(format!("datagram, {}, {:.3} s: not answered", r.client, since.as_secs_f64()));
            waits.insert(&r.client, r.end);
        }
    }
    (failed, connections().count() + of(Class::Datagram).count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::{expect, ms},
        history::PodSeen,
    };

    fn victims() -> Vec<Victim> {
        vec![Victim { node: "a2".into(), from: ms(1000), gone: Some(ms(1040)), until: Some(ms(5000)) }]
    }

    #[test]
    fn who_was_accused() {
        let seen = |at, node: &str, ready: bool| NodeSeen { at: ms(at), node: node.into(), ready, accused: !ready };
        let nodes = vec![
            seen(0, "a1", true),
            seen(0, "a2", true),
            seen(0, "a3", false),
            seen(2000, "a2", false),
            seen(2500, "a1", false),
            seen(3000, "a2", true),
            seen(6000, "a2", false),
        ];
        let history = History { nodes, ..History::default() };
        expect(
            &no_false_verdict(&history, &victims()).0,
            &["a1 was called not ready at 2.5", "a2 was called not ready at 6.0"],
        );
    }

    #[test]
    fn connections() {
        let request = |class, client: &str, at, error: Option<&str>| Request {
            client: client.into(),
            class,
            start: ms(at),
            end: ms(at + 10),
            error: error.map(str::to_owned),
        };
        let pod = |name: &str, node: &str, ready, gone| PodSeen {
            at: ms(0),
            app: "echo".into(),
            name: name.into(),
            uid: name.into(),
            node: node.into(),
            ready,
            gone,
        };
        let history = History {
            requests: vec![
                request(Class::Connect, "a1, relay", 1500, None),
                request(Class::Connect, "a1, relay", 900, Some("before")),
                request(Class::Connect, "a1, relay", 1020, Some("while the cable was pulled")),
                request(Class::Connect, "a1, relay", 1600, Some("refused")),
                request(Class::Connect, "a1, nftables", 1600, Some("refused")),
                request(Class::Open, "a1, relay", 2000, Some("e-1: reset")),
                request(Class::Open, "a1, relay", 2000, Some("e-2: reset")),
                request(Class::Open, "a1, relay", 2000, Some("e-3: closed")),
            ],
            pods: vec![
                pod("e-1", "a1", true, false),
                pod("e-2", "a2", true, false),
                pod("e-3", "a1", false, false),
                pod("e-3", "a1", false, true),
            ],
            ..History::default()
        };
        let (failed, looked_at) = no_request_failed(&history);
        assert_eq!((failed.len(), looked_at), (7, 8));
        expect(&failed[..1], &["new connection, a1, relay, 0.900 s: before"]);
        expect(
            &no_relayed_connection_failed(&history, &victims()).0,
            &["a1, relay, 0.900 s: before", "a1, relay, 1.600 s: refused"],
        );
        expect(&living_connections_are_left_alone(&history, &victims()).0, &["e-1: reset (on a1)"]);
    }

    #[test]
    fn a_datagram_is_sent_again() {
        let check = |lost: std::ops::Range<u64>, expect: &[&str]| {
            let datagram = |n: u64| Request {
                client: "a1".into(),
                class: Class::Datagram,
                start: ms(n * 450),
                end: ms(n * 450 + 400),
                error: lost.contains(&n).then(|| "lost".to_owned()),
            };
            let requests = (0..20).map(datagram).collect();
            super::super::sample::expect(&no_request_failed(&History { requests, ..History::default() }).0, expect);
        };
        check(0..0, &[]);
        check(3..8, &[]);
        check(3..10, &["datagram, a1, 1.350 s: not answered"]);
    }
}
