use std::collections::HashMap;

use k8s_openapi::api::apps::v1::ReplicaSetStatus;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn deployment(change: impl FnOnce(&mut Value)) -> Deployment {
    let mut value = json!({
        "metadata": {"name": "web", "namespace": "ns", "uid": "d", "generation": 1, "annotations": {"team": "a"}},
        "spec": {
            "replicas": 4, "revisionHistoryLimit": 2, "progressDeadlineSeconds": 600,
            "selector": {"matchLabels": {"app": "web"}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "one"}]}},
        },
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

/// A deployment, its replica sets, and what their controller would do to them.
struct World {
    deployment: Deployment,
    sets: Vec<Arc<ReplicaSet>>,
    now: Timestamp,
    events: Vec<String>,
    /// Pods of a set that are still ending.
    ending: HashMap<String, usize>,
}

impl World {
    fn new(deployment: Deployment) -> World {
        World { deployment, sets: Vec::new(), now: now(), events: Vec::new(), ending: HashMap::new() }
    }

    fn change(&mut self, change: impl FnOnce(&mut Value)) {
        let mut value = serde_json::to_value(&self.deployment).unwrap();
        change(&mut value);
        self.deployment = serde_json::from_value(value).unwrap();
        self.deployment.metadata.generation = Some(self.deployment.metadata.generation.unwrap() + 1);
    }

    fn image(&mut self, image: &str) {
        self.change(|d| d["spec"]["template"]["spec"]["containers"][0]["image"] = image.into());
    }

    /// One pass; returns whether anything was changed.
    fn pass(&mut self) -> bool {
        let ending = self.ending.clone();
        let pods = |set: &ReplicaSet| {
            (0..ending.get(name(set)).copied().unwrap_or(0)).map(|_| Arc::new(Pod::default())).collect::<Vec<_>>()
        };
        let input = Input { deployment: &self.deployment, sets: &self.sets, pods: &pods, now: self.now };
        let plan = plan(&input);
        let changed = !plan.actions.is_empty() || self.deployment.status.as_ref() != Some(&plan.status);
        for action in plan.actions {
            match action {
                Action::Annotate(new) => self.deployment.metadata.annotations.get_or_insert_default().extend(new),
                Action::Create(mut set) => {
                    self.events.push(format!("create {}", set.spec.replicas.unwrap()));
                    set.metadata.uid = set.metadata.name.clone();
                    self.now = self.now.checked_add(jiff::SignedDuration::from_secs(1)).unwrap();
                    set.metadata.creation_timestamp =
                        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(self.now));
                    set.metadata.generation = Some(1);
                    set.status = Some(ReplicaSetStatus::default());
                    self.sets.push(Arc::new(*set));
                }
                Action::Update { set, replicas: to, annotations, .. } => {
                    let found = self.sets.iter_mut().find(|s| uid(&***s) == uid(&*set)).unwrap();
                    if replicas(found) != to {
                        let image = &found.spec.template.as_ref().unwrap().spec.as_ref().unwrap();
                        let image = image.containers[0].image.clone().unwrap();
                        self.events.push(format!("{image} {}->{to}", replicas(found)));
                    }
                    let found = Arc::make_mut(found);
                    found.spec.replicas = Some(to);
                    found.metadata.annotations = Some(annotations);
                }
                Action::Delete(set) => self.sets.retain(|s| uid(&**s) != uid(&*set)),
            }
        }
        self.deployment.status = Some(plan.status);
        changed
    }

    /// The replica sets' controller does its work; of the new pods, `ready(set)` at most become available.
    fn replica_sets_act(&mut self, ready: impl Fn(&ReplicaSet) -> i32) {
        for set in &mut self.sets {
            let set = Arc::make_mut(set);
            let wants = replicas(set);
            let limit = ready(set);
            let observed = set.metadata.generation;
            let status = set.status.get_or_insert_default();
            let has = status.available_replicas.unwrap_or(0).min(wants);
            let now = has.max(wants.min(has + limit));
            *status = ReplicaSetStatus {
                replicas: wants,
                ready_replicas: Some(now),
                available_replicas: Some(now),
                observed_generation: observed,
                ..Default::default()
            };
        }
    }

    fn settle(&mut self) {
        for _ in 0..200 {
            let changed = self.pass();
            let before: Vec<_> = self.sets.iter().map(|s| s.status.clone()).collect();
            self.replica_sets_act(|_| i32::MAX / 2);
            let after: Vec<_> = self.sets.iter().map(|s| s.status.clone()).collect();
            if !changed && before == after {
                return;
            }
        }
        panic!("does not settle: {:?}", self.events);
    }

    fn condition(&self, type_: &str) -> (String, String) {
        let conditions = self.deployment.status.as_ref().unwrap().conditions.as_ref().unwrap();
        let found = conditions.iter().find(|c| c.type_.as_deref() == Some(type_)).unwrap();
        (found.status.clone().unwrap(), found.reason.clone().unwrap())
    }

    fn sizes(&self) -> HashMap<String, i32> {
        let image = |s: &ReplicaSet| {
            let template = s.spec.template.as_ref().unwrap();
            template.spec.as_ref().unwrap().containers[0].image.clone().unwrap()
        };
        self.sets.iter().map(|s| (image(s), replicas(s))).collect()
    }
}

#[test]
fn the_first_rollout() {
    let mut world = World::new(deployment(|_| {}));
    world.settle();
    assert_eq!(world.events, ["create 4"]);
    let set = &world.sets[0];
    assert_eq!(annotation(&**set, revision::REVISION), Some("1"));
    assert_eq!(annotation(&**set, "team"), Some("a"));
    assert_eq!(annotation(&world.deployment, revision::REVISION), Some("1"));
    let hash = &set.metadata.labels.as_ref().unwrap()["pod-template-hash"];
    assert_eq!(name(&**set), format!("web-{hash}"));
    assert_eq!(&set.spec.selector.match_labels.as_ref().unwrap()["pod-template-hash"], hash);
    let status = world.deployment.status.clone().unwrap();
    assert_eq!(
        (status.replicas, status.updated_replicas, status.available_replicas, status.unavailable_replicas),
        (Some(4), Some(4), Some(4), None)
    );
    assert_eq!(world.condition("Available"), ("True".into(), "MinimumReplicasAvailable".into()));
    assert_eq!(world.condition("Progressing"), ("True".into(), "NewReplicaSetAvailable".into()));
    assert!(!world.pass(), "nothing is left to do");
}

#[test]
fn a_rolling_update_surges_and_then_takes_away() {
    let mut world = World::new(deployment(|_| {}));
    world.settle();
    world.events.clear();
    world.image("two");
    world.settle();
    // 4 replicas, one more, one less allowed: never more than 5 nor fewer than 3 available.
    assert_eq!(world.events, ["create 1", "one 4->2", "two 1->3", "one 2->0", "two 3->4"]);
    assert_eq!(world.sizes(), HashMap::from([("one".into(), 0), ("two".into(), 4)]));
    assert_eq!(annotation(&world.deployment, revision::REVISION), Some("2"));
}

#[test]
fn an_undo_gives_the_old_set_a_new_revision() {
    let mut world = World::new(deployment(|_| {}));
    world.settle();
    world.image("two");
    world.settle();
    world.image("one");
    world.settle();
    assert_eq!(world.sets.len(), 2, "the old set is used again");
    let one = world.sets.iter().find(|s| replicas(s) == 4).unwrap();
    assert_eq!(annotation(&**one, revision::REVISION), Some("3"));
    assert_eq!(annotation(&**one, "deployment.kubernetes.io/revision-history"), Some("1"));
    assert_eq!(annotation(&world.deployment, revision::REVISION), Some("3"));
}

#[test]
fn history_is_limited() {
    let mut world = World::new(deployment(|_| {}));
    for image in ["one", "two", "three", "four", "five"] {
        world.image(image);
        world.settle();
    }
    let mut images: Vec<_> = world.sizes().into_keys().collect();
    images.sort();
    assert_eq!(images, ["five", "four", "three"]);
}

#[test]
fn recreate_waits_for_the_old_pods_to_be_gone() {
    let mut world = World::new(deployment(|d| d["spec"]["strategy"] = json!({"type": "Recreate"})));
    world.settle();
    let first = name(&*world.sets[0]).to_owned();
    world.events.clear();
    world.image("two");
    world.ending.insert(first.clone(), 1);
    for _ in 0..5 {
        world.pass();
        world.replica_sets_act(|_| 100);
    }
    assert_eq!(world.events, ["one 4->0"], "an old pod is still ending");
    world.ending.clear();
    world.settle();
    assert_eq!(world.events, ["one 4->0", "create 4"]);
}

#[test]
fn paused_means_scaling_only() {
    let mut world = World::new(deployment(|_| {}));
    world.settle();
    world.change(|d| d["spec"]["paused"] = true.into());
    world.image("two");
    world.settle();
    assert_eq!(world.sets.len(), 1);
    assert_eq!(world.condition("Progressing"), ("Unknown".into(), "DeploymentPaused".into()));
    world.change(|d| d["spec"]["replicas"] = 6.into());
    world.settle();
    assert_eq!(world.sizes(), HashMap::from([("one".into(), 6)]));
    world.change(|d| d["spec"]["paused"] = false.into());
    world.settle();
    assert_eq!(world.sizes(), HashMap::from([("one".into(), 0), ("two".into(), 6)]));
    assert_eq!(world.condition("Progressing"), ("True".into(), "NewReplicaSetAvailable".into()));
}

#[test]
fn scaling_in_the_middle_keeps_the_proportion() {
    let mut world = World::new(deployment(|d| {
        d["spec"]["replicas"] = 10.into();
        d["spec"]["strategy"]["rollingUpdate"] = json!({"maxSurge": 3, "maxUnavailable": 2});
    }));
    world.settle();
    world.image("two");
    // The new pods never become ready.
    for _ in 0..10 {
        world.pass();
        world.replica_sets_act(|_| 0);
    }
    assert_eq!(world.sizes(), HashMap::from([("one".into(), 8), ("two".into(), 5)]));
    // The example of the documentation: from 10 to 15.
    world.change(|d| d["spec"]["replicas"] = 15.into());
    world.pass();
    assert_eq!(world.sizes(), HashMap::from([("one".into(), 11), ("two".into(), 7)]));
}

#[test]
fn a_stuck_rollout_is_told_after_its_deadline() {
    let mut world = World::new(deployment(|_| {}));
    world.settle();
    world.image("broken");
    for _ in 0..10 {
        world.pass();
        world.replica_sets_act(|_| 0);
    }
    assert_eq!(world.condition("Progressing"), ("True".into(), "ReplicaSetUpdated".into()));
    world.now = world.now.checked_add(jiff::SignedDuration::from_secs(601)).unwrap();
    world.pass();
    assert_eq!(world.condition("Progressing"), ("False".into(), "ProgressDeadlineExceeded".into()));
    assert_eq!(world.condition("Available"), ("True".into(), "MinimumReplicasAvailable".into()));
    // And it can still be saved.
    world.image("two");
    world.settle();
    assert_eq!(world.condition("Progressing"), ("True".into(), "NewReplicaSetAvailable".into()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever becomes ready when: never more pods than allowed, never fewer available than promised, and an end.
    #[test]
    fn limits_hold_during_every_rollout(
        size in 1..12i32, surge in 0..4i32, unavailable in 0..4i32,
        steps in proptest::collection::vec((0..4i32, any::<bool>()), 1..60),
    ) {
        let mut world = World::new(deployment(|d| {
            d["spec"]["replicas"] = size.into();
            d["spec"]["strategy"]["rollingUpdate"] = json!({"maxSurge": surge, "maxUnavailable": unavailable});
        }));
        world.settle();
        let unavailable = if surge == 0 { unavailable.max(1) } else { unavailable };
        world.image("two");
        for (index, (ready, again)) in steps.into_iter().enumerate() {
            if again && index % 7 == 3 {
                world.image(&format!("image-{index}"));
            }
            world.pass();
            let total: i32 = world.sets.iter().map(|s| replicas(s)).sum();
            prop_assert!(total <= size + surge, "{total} pods, {:?}", world.events);
            // Replica sets may delete any of their pods, but those that are not available go first.
            world.replica_sets_act(|_| ready);
            let ready: i32 = world.sets.iter().map(|s| available(s)).sum();
            prop_assert!(ready >= size - unavailable.min(size), "{ready} available, {:?}", world.events);
        }
        world.settle();
        prop_assert_eq!(world.sets.iter().map(|s| replicas(s)).sum::<i32>(), size);
        prop_assert!(world.newest_is_complete());
    }
}

impl World {
    fn newest_is_complete(&self) -> bool {
        let newest = revision::newest(&self.deployment, &self.sets).unwrap();
        available(&newest) == wanted(&self.deployment)
    }
}
