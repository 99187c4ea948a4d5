use jiff::{SignedDuration, Timestamp};
use seawall_quorum::timing::{Profile, Timing};
use serde_json::{Value, json};

use super::*;
use crate::node_lifecycle::evidence::Verdict;

/// Nodes, and a controller that looks at them every second, as quickly as told.
struct Bench {
    start: Instant,
    now: Instant,
    lifecycle: Lifecycle,
    nodes: BTreeMap<String, Node>,
    /// Those that renew their Leases.
    alive: BTreeSet<String>,
    evidence: BTreeMap<String, Evidence>,
    /// What happened, by second.
    log: Vec<String>,
    store: bool,
}

fn settings() -> Settings {
    Settings::of(&Timing::of(Profile::Fast))
}

fn node(name: &str, zone: &str, ready: Option<&str>) -> Node {
    let conditions: Vec<Value> = ready
        .iter()
        .map(|r| json!({"type": "Ready", "status": r, "lastHeartbeatTime": "2026-01-01T00:00:00Z"}))
        .collect();
    serde_json::from_value(json!({
        "metadata": {"name": name, "uid": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"conditions": conditions},
    }))
    .unwrap()
}

impl Bench {
    /// With these nodes, all of which live: name, zone.
    fn new(nodes: &[(&str, &str)]) -> Bench {
        let start = Instant::now();
        let mut bench = Bench {
            start,
            now: start,
            lifecycle: Lifecycle::new(settings(), start),
            nodes: nodes.iter().map(|(n, z)| ((*n).to_owned(), node(n, z, Some("True")))).collect(),
            alive: nodes.iter().map(|(n, _)| (*n).to_owned()).collect(),
            evidence: BTreeMap::new(),
            log: Vec::new(),
            store: true,
        };
        bench.run(3);
        bench.log.clear();
        bench
    }

    fn dies(&mut self, names: &[&str]) {
        for name in names {
            self.alive.remove(*name);
        }
    }

    /// It is back, renews, and says that it is ready.
    fn lives(&mut self, name: &str) {
        self.alive.insert(name.to_owned());
        let seconds = self.now.duration_since(self.start).as_secs();
        let node = self.nodes.get_mut(name).unwrap();
        for c in node.status.as_mut().unwrap().conditions.iter_mut().flatten() {
            c.status = if c.type_ == "Ready" { "True".into() } else { "False".into() };
            let beat = Timestamp::from_second(1_700_000_000 + i64::try_from(seconds).unwrap()).unwrap();
            c.last_heartbeat_time = Some(Time(beat));
        }
    }

    fn said(&mut self, name: &str, verdict: Verdict, accusers: usize) {
        self.evidence.insert(name.to_owned(), Evidence { verdict, accusers, members: self.nodes.len() });
    }

    /// Another controller leads from now on. It knows what is in the API.
    fn another_leads(&mut self) {
        self.lifecycle = Lifecycle::new(settings(), self.now);
    }

    /// Some seconds pass; every other one those that live renew their Leases.
    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            let second = self.now.duration_since(self.start).as_secs();
            if !self.store {
                continue;
            }
            self.lifecycle.answered(self.now);
            for name in &self.alive {
                let time = Timestamp::UNIX_EPOCH + SignedDuration::from_secs((second / 2 * 2).cast_signed());
                let lease = json!({"metadata": {"name": name}, "spec": {"renewTime": MicroTime(time)}});
                self.lifecycle.lease(&serde_json::from_value(lease).unwrap(), self.now);
            }
            self.look();
        }
    }

    fn look(&mut self) {
        let second = self.now.duration_since(self.start).as_secs().saturating_sub(3);
        self.lifecycle.evidence(&self.evidence, self.now);
        let nodes: Vec<Arc<Node>> = self.nodes.values().cloned().map(Arc::new).collect();
        for plan in self.lifecycle.plan(&nodes, self.now) {
            let node = self.nodes.get_mut(&plan.name).unwrap();
            if let Some(why) = plan.unknown {
                let status = node.status.as_mut().unwrap();
                let heartbeat = status.conditions.iter().flatten().find_map(|c| c.last_heartbeat_time.clone());
                let unknown = |type_: &&str| {
                    let condition = json!({"type": type_, "status": "Unknown", "lastHeartbeatTime": heartbeat});
                    serde_json::from_value(condition).unwrap()
                };
                status.conditions = Some(CONDITIONS.iter().map(unknown).collect());
                self.log.push(format!("{second} {} unknown {why:?}", plan.name));
            }
            if plan.pods {
                self.log.push(format!("{second} {} pods", plan.name));
                self.lifecycle.pods_marked(&plan.name);
            }
            if let Some(taints) = super::super::taints::wanted(node, plan.leave, Timestamp::UNIX_EPOCH) {
                let leave = taints.iter().find(|t| t.effect == NO_EXECUTE);
                let had = is_tainted(node, NOT_READY, NO_EXECUTE) || is_tainted(node, UNREACHABLE, NO_EXECUTE);
                match (leave, had) {
                    (Some(taint), false) => {
                        let key = taint.key.trim_start_matches("node.kubernetes.io/");
                        self.log.push(format!("{second} {} leave {key}", plan.name));
                    }
                    (None, true) => self.log.push(format!("{second} {} stay", plan.name)),
                    _ => {}
                }
                node.spec.get_or_insert_default().taints = Some(taints);
            }
        }
    }

    #[track_caller]
    fn expect(&mut self, expect: &[&str]) {
        assert_eq!(std::mem::take(&mut self.log), expect);
    }
}

#[tokio::test(start_paused = true)]
async fn silence_then_recovery() {
    let mut bench = Bench::new(&[("a", ""), ("b", ""), ("c", "")]);
    bench.run(60);
    bench.expect(&[]);
    bench.dies(&["a"]);
    bench.run(7);
    bench.expect(&[]);
    bench.run(3);
    bench.expect(&["69 a unknown Silence", "69 a pods", "69 a leave unreachable"]);
    bench.run(60);
    bench.expect(&[]);
    bench.lives("a");
    bench.run(1);
    bench.expect(&["131 a stay"]);
    assert!(bench.nodes["a"].spec.as_ref().unwrap().taints.as_ref().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_node_that_says_it_is_not_ready() {
    let mut bench = Bench::new(&[("a", ""), ("b", "")]);
    let ready = &mut bench.nodes.get_mut("a").unwrap().status.as_mut().unwrap().conditions.as_mut().unwrap()[0];
    ready.status = "False".into();
    bench.run(1);
    bench.expect(&["1 a pods", "1 a leave not-ready"]);
    bench.dies(&["a"]);
    bench.run(20);
    // From one taint to the other there is no waiting, and its pods are not marked again.
    bench.expect(&["9 a unknown Silence"]);
    assert!(is_tainted(&bench.nodes["a"], UNREACHABLE, NO_EXECUTE));
}

#[tokio::test(start_paused = true)]
async fn first_boot() {
    let mut bench = Bench::new(&[("a", "")]);
    bench.nodes.insert("new".into(), node("new", "", None));
    bench.run(15);
    bench.expect(&[]);
    bench.run(3);
    bench.expect(&["17 new unknown Silence", "17 new pods", "17 new leave unreachable"]);
    // One that comes in time is never unknown.
    bench.nodes.insert("next".into(), node("next", "", None));
    bench.run(14);
    bench.nodes.insert("next".into(), node("next", "", Some("True")));
    bench.alive.insert("next".into());
    bench.run(30);
    bench.expect(&[]);
}

#[tokio::test(start_paused = true)]
async fn what_others_say() {
    let mut bench = Bench::new(&[("a", ""), ("b", ""), ("c", ""), ("d", "")]);
    bench.dies(&["a"]);
    bench.said("a", Verdict::Suspect, 3);
    bench.run(1);
    bench.said("a", Verdict::Dead, 2);
    bench.run(1);
    bench.expect(&[]);
    bench.said("a", Verdict::Dead, 3);
    bench.run(1);
    bench.expect(&["3 a unknown Evidence", "3 a pods", "3 a leave unreachable"]);
    // A verdict that is wrong is refuted by the node itself, though it stands.
    bench.said("b", Verdict::Dead, 3);
    bench.look();
    bench.expect(&["3 b unknown Evidence", "3 b pods"]);
    bench.lives("b");
    bench.run(30);
    bench.expect(&[]);
    // That others hear it does not keep it ready.
    bench.said("c", Verdict::Alive, 0);
    bench.dies(&["c"]);
    bench.run(11);
    bench.expect(&["41 c unknown Silence", "41 c pods", "41 c leave unreachable"]);
}

#[tokio::test(start_paused = true)]
async fn one_at_a_time() {
    let names: Vec<String> = (0..10).map(|n| format!("n{n}")).collect();
    let nodes: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), "z")).collect();
    let mut bench = Bench::new(&nodes);
    for (n, name) in names.iter().enumerate().take(5) {
        bench.said(name, Verdict::Dead, 3);
        bench.alive.remove(name);
        assert!(n < 5);
    }
    bench.run(45);
    let turns: Vec<String> = bench.log.iter().filter(|l| l.contains("leave")).cloned().collect();
    let expect = ["1 n0 leave", "11 n1 leave", "21 n2 leave", "31 n3 leave", "41 n4 leave"];
    assert_eq!(turns, expect.map(|t| format!("{t} unreachable")));
}

#[tokio::test(start_paused = true)]
async fn a_zone_of_which_most_is_gone_is_left_alone() {
    let mut bench = Bench::new(&[("a", "x"), ("b", "x"), ("c", "x"), ("d", "x"), ("e", "y")]);
    bench.dies(&["a", "b", "c"]);
    bench.run(60);
    let leave = bench.log.iter().filter(|l| l.contains("leave")).count();
    assert_eq!((leave, bench.log.len()), (0, 6), "unknown they are: {:?}", bench.log);
    bench.log.clear();
    bench.dies(&["d"]);
    bench.run(12);
    // Now the zone is gone, and the other one is not: then it is the zone, not us.
    let leave: Vec<_> = bench.log.iter().filter(|l| l.contains("leave")).collect();
    assert_eq!(leave.len(), 1, "{:?}", bench.log);
}

#[tokio::test(start_paused = true)]
async fn when_everything_is_gone_nobody_has_to_leave() {
    let mut bench = Bench::new(&[("a", "x"), ("b", "y")]);
    bench.dies(&["a"]);
    bench.run(20);
    bench.expect(&["9 a unknown Silence", "9 a pods", "9 a leave unreachable"]);
    bench.dies(&["b"]);
    bench.run(60);
    bench.expect(&["29 a stay", "29 b unknown Silence", "29 b pods"]);
    bench.lives("b");
    bench.run(2);
    bench.expect(&["81 a leave unreachable"]);
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_counts_anew() {
    let mut bench = Bench::new(&[("a", ""), ("b", ""), ("c", "")]);
    bench.run(1);
    bench.dies(&["a"]);
    bench.run(7);
    bench.another_leads();
    bench.run(8);
    bench.expect(&[]);
    bench.run(3);
    bench.expect(&["18 a unknown Silence", "18 a pods", "18 a leave unreachable"]);
    bench.another_leads();
    bench.run(30);
    // What the one before may not have come to is done again, once; nobody has to leave anew.
    bench.expect(&["20 a pods"]);
}

#[tokio::test(start_paused = true)]
async fn silence_does_not_count_while_the_store_does_not_answer() {
    let mut bench = Bench::new(&[("a", ""), ("b", ""), ("c", "")]);
    bench.dies(&["a"]);
    bench.run(4);
    bench.store = false;
    bench.run(60);
    bench.store = true;
    // Those that live renew only a moment later.
    let alive = std::mem::take(&mut bench.alive);
    bench.run(2);
    bench.alive = alive;
    bench.run(1);
    bench.expect(&[]);
    bench.run(30);
    bench.expect(&["69 a unknown Silence", "69 a pods", "69 a leave unreachable"]);
}

#[tokio::test(start_paused = true)]
async fn a_node_of_the_same_name_is_another() {
    let mut bench = Bench::new(&[("a", ""), ("b", "")]);
    bench.dies(&["a"]);
    bench.run(8);
    let mut again = node("a", "", Some("True"));
    again.metadata.uid = Some("another".into());
    bench.nodes.insert("a".into(), again);
    bench.run(8);
    bench.expect(&[]);
}
