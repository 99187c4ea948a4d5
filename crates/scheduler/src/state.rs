//! What the scheduler's loop keeps, and what changes in it. Nothing here waits for anything.

use std::{collections::HashMap, sync::Arc};

use k8s_openapi::api::{
    core::v1::{Namespace, Node, PersistentVolumeClaim, Pod},
    policy::v1::PodDisruptionBudget,
};
use kube::{ResourceExt, runtime::watcher::Event};
use rand::Rng;
use tokio::time::Instant;

use crate::{
    decide::{Diagnosis, Search, decide},
    pod::PodInfo,
    preempt::{self, Preemption},
    queue::Queue,
    snapshot::{Budget, Named, Snapshot},
    watch::{Change, KINDS, Listing, Selecting, Step},
};

/// What is to be done about a pod.
pub enum Outcome {
    /// It goes to this node.
    Bind(String),
    /// Room is made for it.
    Preempt(Diagnosis, Preemption),
    /// It waits. What was said before of where room is being made for it may not hold any more.
    Wait { diagnosis: Diagnosis, withdrawn: bool },
}

/// What the loop keeps.
pub struct Scheduler {
    pub snapshot: Snapshot,
    pub queue: Queue,
    name: String,
    search: Search,
    pods: Listing<String>,
    nodes: Listing<String>,
    namespaces: Listing<String>,
    claims: Listing<Named>,
    budgets: Listing<Named>,
    selecting: HashMap<&'static str, Listing<Named>>,
    /// Pods for which others are being deleted at this moment, and whether they were tried again meanwhile.
    preempting: HashMap<String, bool>,
}

impl Scheduler {
    pub fn new(name: String, queue: Queue, search: Search) -> Scheduler {
        Scheduler {
            snapshot: Snapshot::default(),
            queue,
            name,
            search,
            pods: Listing::default(),
            nodes: Listing::default(),
            namespaces: Listing::default(),
            claims: Listing::default(),
            budgets: Listing::default(),
            selecting: HashMap::new(),
            preempting: HashMap::new(),
        }
    }

    /// Whether everything has been listed once.
    pub fn is_synced(&self) -> bool {
        let own = [self.pods.complete, self.nodes.complete, self.namespaces.complete];
        let selecting = self.selecting.values().filter(|l| l.complete).count();
        own.iter().all(|c| *c) && self.claims.complete && self.budgets.complete && selecting + 5 == KINDS.len()
    }

    pub fn schedule(&mut self, pod: &Arc<PodInfo>) -> Outcome {
        let mut diagnosis = match decide(&self.snapshot, pod, &mut self.search) {
            Ok(node) => {
                // Counted as there until the watch says so, or the binding fails.
                self.snapshot.place(pod.clone(), &node);
                return Outcome::Bind(node);
            }
            Err(diagnosis) => diagnosis,
        };
        if let Some(again) = self.preempting.get_mut(&pod.uid) {
            *again = true;
            return Outcome::Wait { diagnosis, withdrawn: false };
        }
        if diagnosis.pod.is_some() || diagnosis.nodes == 0 {
            return Outcome::Wait { diagnosis, withdrawn: false };
        }
        let offset = self.search.random.random_range(0..diagnosis.nodes);
        match preempt::plan(&self.snapshot, pod, &diagnosis, offset) {
            Ok(preemption) => {
                preemption.demoted.iter().for_each(|lesser| {
                    self.snapshot.unnominate(&lesser.uid);
                });
                self.snapshot.nominate(pod.clone(), &preemption.node);
                self.preempting.insert(pod.uid.clone(), false);
                Outcome::Preempt(diagnosis, preemption)
            }
            Err(why) => {
                diagnosis.preemption = Some(why.to_string());
                let withdrawn =
                    why != preempt::Hopeless::Ending && (self.snapshot.unnominate(&pod.uid) || pod.nominated.is_some());
                Outcome::Wait { diagnosis, withdrawn }
            }
        }
    }

    /// Others have been told to go, or could not be.
    pub fn on_preempted(&mut self, pod: &Arc<PodInfo>, victims: &[Arc<PodInfo>], done: bool, now: Instant) {
        let again = self.preempting.remove(&pod.uid).unwrap_or(false);
        if !done {
            self.snapshot.unnominate(&pod.uid);
            self.queue.retry_waiting(&pod.uid, now);
            return;
        }
        for victim in victims {
            // The watch will say the same in a moment.
            let current = self.snapshot.pod(&victim.uid).map(|(p, n)| (p.clone(), n.slot));
            if let Some((current, slot)) = current.filter(|(p, _)| !p.deleting) {
                let mut ending = (*current).clone();
                (ending.deleting, ending.preempted) = (true, true);
                self.snapshot.replace(Arc::new(ending), slot);
            }
        }
        if again {
            // What it was told then may have been for want of what has been done now.
            self.queue.retry_waiting(&pod.uid, now);
        }
    }

    /// A binding failed.
    pub fn on_unbound(&mut self, pod: Arc<PodInfo>, settled: bool, now: Instant) {
        self.snapshot.remove(&pod.uid);
        if !settled {
            self.queue.retry(pod, now);
        }
    }

    pub fn on_change(&mut self, change: Change, now: Instant) {
        match change {
            Change::Pod(event) => self.on_pod(event, now),
            Change::Node(event) => self.on_node(event, now),
            Change::Namespace(event) => self.on_namespace(event),
            Change::Claim(event) => self.on_claim(event, now),
            Change::Budget(event) => self.on_budget(event),
            Change::Selecting(kind, event) => self.on_selecting(kind, event),
        }
    }

    fn on_pod(&mut self, event: Event<Pod>, now: Instant) {
        match self.pods.step(event, |p| p.uid().unwrap_or_default()) {
            Step::Set(pod) => self.apply(&pod, now),
            Step::Gone(pod) => self.forget(&pod.uid().unwrap_or_default(), now),
            Step::Only(listed) => {
                let known: Vec<String> = self.snapshot.uids().into_iter().chain(self.queue.uids()).collect();
                known.iter().filter(|uid| !listed.contains(*uid)).for_each(|uid| self.forget(uid, now));
            }
            Step::Nothing => {}
        }
    }

    fn apply(&mut self, pod: &Pod, now: Instant) {
        let info = Arc::new(PodInfo::new(pod));
        if info.ended {
            self.forget(&info.uid, now);
        } else if let Some(node) = info.node.clone() {
            self.queue.remove(&info.uid);
            if self.snapshot.place(info, &node) {
                // Somebody may have waited for company.
                self.queue.something_changed(now);
            }
        } else if info.scheduler == self.name && !info.deleting && !info.gated {
            if !self.snapshot.contains(&info.uid) {
                self.hear_nomination(&info);
                self.queue.push(info, now);
            }
        } else {
            self.snapshot.unnominate(&info.uid);
            self.queue.remove(&info.uid);
        }
    }

    /// Where room is being made for a pod. An event that is older than our own nomination does not take it back.
    fn hear_nomination(&mut self, info: &Arc<PodInfo>) {
        let before = self.queue.get(&info.uid).and_then(|p| p.nominated.as_ref());
        match (&info.nominated, before) {
            (Some(node), _) => self.snapshot.nominate(info.clone(), node),
            (None, Some(_)) => {
                self.snapshot.unnominate(&info.uid);
            }
            (None, None) => {}
        }
    }

    fn forget(&mut self, uid: &str, now: Instant) {
        self.queue.remove(uid);
        let claimed = self.snapshot.nomination(uid).is_some();
        if self.snapshot.remove(uid) || claimed {
            self.queue.something_changed(now);
        }
    }

    fn on_node(&mut self, event: Event<Node>, now: Instant) {
        let changed = match self.nodes.step(event, ResourceExt::name_any) {
            Step::Set(node) => self.snapshot.set_node(&node),
            Step::Gone(node) => self.snapshot.remove_node(&node.name_any()),
            Step::Only(listed) => {
                let known: Vec<String> = self.snapshot.known().map(|n| n.facts.name.clone()).collect();
                known.iter().filter(|name| !listed.contains(*name)).for_each(|name| {
                    self.snapshot.remove_node(name);
                });
                true
            }
            Step::Nothing => false,
        };
        if changed {
            self.queue.something_changed(now);
        }
    }

    fn on_namespace(&mut self, event: Event<Namespace>) {
        let all = &mut self.snapshot.namespaces;
        match self.namespaces.step(event, ResourceExt::name_any) {
            Step::Set(n) => {
                all.insert(n.name_any(), n.metadata.labels.unwrap_or_default());
            }
            Step::Gone(n) => {
                all.remove(&n.name_any());
            }
            Step::Only(listed) => all.retain(|name, _| listed.contains(name)),
            Step::Nothing => {}
        }
    }

    fn on_claim(&mut self, event: Event<PersistentVolumeClaim>, now: Instant) {
        let all = &mut self.snapshot.claims;
        match self.claims.step(event, named) {
            Step::Set(c) => {
                let bound = c.spec.as_ref().is_some_and(|s| s.volume_name.as_ref().is_some_and(|v| !v.is_empty()));
                if all.insert(named(&c), bound) != Some(bound) {
                    self.queue.something_changed(now);
                }
            }
            Step::Gone(c) => {
                all.remove(&named(&c));
            }
            Step::Only(listed) => all.retain(|key, _| listed.contains(key)),
            Step::Nothing => {}
        }
    }

    fn on_budget(&mut self, event: Event<PodDisruptionBudget>) {
        let all = &mut self.snapshot.budgets;
        match self.budgets.step(event, named) {
            Step::Set(b) => {
                all.insert(named(&b), Budget::new(&b));
            }
            Step::Gone(b) => {
                all.remove(&named(&b));
            }
            Step::Only(listed) => all.retain(|key, _| listed.contains(key)),
            Step::Nothing => {}
        }
    }

    fn on_selecting(&mut self, kind: &'static str, event: Event<Selecting>) {
        let all = &mut self.snapshot.selectors;
        let listing = self.selecting.entry(kind).or_default();
        match listing.step(event, |s| (s.namespace.clone(), s.name.clone())) {
            Step::Set(s) if s.selector.is_empty() => drop_selector(all, kind, &s),
            Step::Set(s) => {
                all.entry(s.namespace).or_default().insert((kind.to_owned(), s.name), s.selector);
            }
            Step::Gone(s) => drop_selector(all, kind, &s),
            Step::Only(listed) => all.retain(|namespace, selectors| {
                selectors.retain(|(k, name), _| k != kind || listed.contains(&(namespace.clone(), name.clone())));
                !selectors.is_empty()
            }),
            Step::Nothing => {}
        }
    }
}

type Selectors = HashMap<String, HashMap<Named, seawall_api::selector::LabelSelector>>;

fn drop_selector(all: &mut Selectors, kind: &str, gone: &Selecting) {
    if let Some(selectors) = all.get_mut(&gone.namespace) {
        selectors.remove(&(kind.to_owned(), gone.name.clone()));
    }
}

fn named<K: ResourceExt>(object: &K) -> Named {
    (object.namespace().unwrap_or_default(), object.name_any())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;

    fn scheduler() -> Scheduler {
        Scheduler::new("default-scheduler".into(), Queue::new(Duration::from_secs(300)), Search::seeded(1))
    }

    fn node(name: &str) -> Node {
        serde_json::from_value(
            json!({"metadata": {"name": name}, "status": {"allocatable": {"pods": "10", "cpu": "1"}}}),
        )
        .unwrap()
    }

    fn pod(name: &str, on: Option<&str>) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "n", "uid": name},
            "spec": {"schedulerName": "default-scheduler", "nodeName": on, "containers": [{"name": "c"}]},
        }))
        .unwrap()
    }

    fn important(name: &str, priority: i32, on: Option<&str>, status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "n", "uid": name},
            "spec": {"schedulerName": "default-scheduler", "nodeName": on, "priority": priority,
                "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]},
            "status": status,
        }))
        .unwrap()
    }

    fn names(scheduler: &Scheduler) -> Vec<String> {
        let mut names: Vec<String> = scheduler.snapshot.known().map(|n| n.facts.name.clone()).collect();
        names.sort();
        names
    }

    #[tokio::test(start_paused = true)]
    async fn watches_that_list_at_the_same_time_do_not_disturb_each_other() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        scheduler.on_pod(Event::Init, now);
        scheduler.on_pod(Event::InitApply(pod("waiting", None)), now);
        scheduler.on_pod(Event::InitApply(pod("running", Some("a"))), now);
        scheduler.on_node(Event::Init, now);
        scheduler.on_node(Event::InitApply(node("a")), now);
        scheduler.on_pod(Event::InitDone, now);
        scheduler.on_node(Event::InitDone, now);
        assert_eq!(scheduler.queue.uids(), ["waiting"]);
        assert!(scheduler.snapshot.contains("running"));
        assert_eq!(names(&scheduler), ["a"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_went_while_the_watch_was_broken_is_forgotten() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        for nodes in [["a", "b"], ["b", "c"]] {
            scheduler.on_node(Event::Init, now);
            for name in nodes {
                scheduler.on_node(Event::InitApply(node(name)), now);
            }
            scheduler.on_node(Event::InitDone, now);
        }
        assert_eq!(names(&scheduler), ["b", "c"]);
        for pods in [["x", "y"], ["y", "z"]] {
            scheduler.on_pod(Event::Init, now);
            for name in pods {
                scheduler.on_pod(Event::InitApply(pod(name, Some("b"))), now);
            }
            scheduler.on_pod(Event::InitDone, now);
        }
        let mut uids = scheduler.snapshot.uids();
        uids.sort();
        assert_eq!(uids, ["y", "z"]);
    }

    #[tokio::test(start_paused = true)]
    async fn room_is_made_once_and_used_as_soon_as_it_is_there() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        scheduler.on_node(Event::Apply(node("a")), now);
        scheduler.on_pod(Event::Apply(important("victim", 1, Some("a"), json!({}))), now);
        scheduler.on_pod(Event::Apply(important("vip", 9, None, json!({}))), now);
        let vip = scheduler.queue.pop(now).unwrap();
        let Outcome::Preempt(_, preemption) = scheduler.schedule(&vip) else { panic!("no room was made") };
        scheduler.queue.park(vip.clone(), now);
        // While the deletions are under way, and while the victim ends, nobody else has to go.
        let waits = |outcome| matches!(outcome, Outcome::Wait { withdrawn: false, .. });
        assert!(waits(scheduler.schedule(&vip)));
        scheduler.on_preempted(&vip, &preemption.victims, true, now);
        assert!(waits(scheduler.schedule(&vip)));
        // An event from before does not take the claim back.
        scheduler.on_pod(Event::Apply(important("vip", 9, None, json!({}))), now);
        assert_eq!(scheduler.snapshot.nomination("vip"), Some("a"));
        // Somebody less important comes just when the victim is gone.
        scheduler.on_pod(Event::Apply(important("lesser", 5, None, json!({}))), now);
        scheduler.on_pod(Event::Delete(important("victim", 1, Some("a"), json!({}))), now);
        let lesser = Arc::new(PodInfo::new(&important("lesser", 5, None, json!({}))));
        assert!(matches!(scheduler.schedule(&lesser), Outcome::Wait { .. }));
        let later = now + Duration::from_secs(1);
        let next = scheduler.queue.pop(later).unwrap();
        assert_eq!(next.name, "vip");
        assert!(matches!(scheduler.schedule(&next), Outcome::Bind(node) if node == "a"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_nomination_that_the_api_knows_survives_the_scheduler() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        scheduler.on_node(Event::Apply(node("a")), now);
        scheduler.on_pod(Event::Apply(important("vip", 9, None, json!({"nominatedNodeName": "a"}))), now);
        let lesser = Arc::new(PodInfo::new(&important("lesser", 5, None, json!({}))));
        assert!(matches!(scheduler.schedule(&lesser), Outcome::Wait { .. }));
        // It is taken back.
        scheduler.on_pod(Event::Apply(important("vip", 9, None, json!({}))), now);
        assert!(matches!(scheduler.schedule(&lesser), Outcome::Bind(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_preemption_that_failed_leaves_no_claim() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        scheduler.on_node(Event::Apply(node("a")), now);
        scheduler.on_pod(Event::Apply(important("victim", 1, Some("a"), json!({}))), now);
        scheduler.on_pod(Event::Apply(important("vip", 9, None, json!({}))), now);
        let vip = scheduler.queue.pop(now).unwrap();
        assert!(matches!(scheduler.schedule(&vip), Outcome::Preempt(..)));
        scheduler.queue.park(vip.clone(), now);
        scheduler.on_preempted(&vip, &[], false, now);
        assert_eq!(scheduler.snapshot.nomination("vip"), None);
        assert!(scheduler.queue.has_ready(now + Duration::from_secs(2)));
    }
}
