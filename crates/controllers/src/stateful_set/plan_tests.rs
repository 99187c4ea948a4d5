use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::{apps::v1::ControllerRevision, core::v1::PersistentVolumeClaim};
use serde_json::{Value, json};

use super::*;
use crate::{
    history::{Newest, newest},
    runtime::objects::is_deleting,
};

/// A StatefulSet, its pods, claims and revisions, and a controller that does what is planned. Pods start and end when told.
struct Bench {
    set: StatefulSet,
    pods: BTreeMap<String, Pod>,
    claims: BTreeMap<String, Arc<PersistentVolumeClaim>>,
    revisions: Vec<Arc<ControllerRevision>>,
    now: Timestamp,
    uids: u32,
    again: Option<Duration>,
}

fn set(spec: Value) -> StatefulSet {
    let mut full = json!({
        "replicas": 3, "serviceName": "web",
        "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "v1"}]}},
    });
    for (key, value) in spec.as_object().unwrap() {
        full[key] = value.clone();
    }
    serde_json::from_value(json!({"metadata": {"namespace": "ns", "name": "web", "uid": "set"}, "spec": full})).unwrap()
}

impl Bench {
    fn new(spec: Value) -> Bench {
        Bench {
            set: set(spec),
            pods: BTreeMap::new(),
            claims: BTreeMap::new(),
            revisions: Vec::new(),
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            uids: 0,
            again: None,
        }
    }

    /// One pass. What was done, in short.
    fn pass(&mut self) -> Vec<String> {
        history::sort(&mut self.revisions);
        let update = match newest(&self.set, &self.revisions) {
            Newest::Known(revision) => revision,
            Newest::Again(revision, number) => {
                self.revisions.retain(|r| name(&**r) != name(&*revision));
                let again = Arc::new(ControllerRevision { revision: Some(number), ..(*revision).clone() });
                self.revisions.push(again.clone());
                again
            }
            Newest::Make(revision) => {
                let made = Arc::new(*revision);
                self.revisions.push(made.clone());
                made
            }
        };
        let current = self.set.status.as_ref().and_then(|s| s.current_revision.clone()).unwrap_or_default();
        let current = self.revisions.iter().find(|r| name(&***r) == current).cloned().unwrap_or(update.clone());
        let pods: Vec<Arc<Pod>> = self.pods.values().cloned().map(Arc::new).collect();
        let claims = self.claims.clone();
        let claim = |name: &str| claims.get(name).cloned();
        let plan = plan(&Input {
            set: &self.set,
            pods: &pods,
            current: &current,
            update: &update,
            claim: &claim,
            now: self.now,
        });
        self.set.status = Some(plan.status);
        self.again = plan.again;
        let mut log = Vec::new();
        for action in plan.actions {
            self.uids += 1;
            match action {
                Action::Create(pod) => {
                    let mut pod = *pod;
                    let image = pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap();
                    log.push(format!("+{} {image}", name(&pod)));
                    pod.metadata.uid = Some(format!("pod{}", self.uids));
                    pod.status = Some(serde_json::from_value(json!({"phase": "Pending"})).unwrap());
                    assert!(self.pods.insert(name(&pod).to_owned(), pod).is_none(), "a number is given once");
                }
                Action::Delete(pod, why) => {
                    log.push(format!("-{} {why:?}", name(&*pod)));
                    let time = json!("2026-01-01T00:00:00Z");
                    self.pods.get_mut(name(&*pod)).unwrap().metadata.deletion_timestamp =
                        serde_json::from_value(time).unwrap();
                }
                Action::CreateClaim(claim) => {
                    log.push(format!("+{}", name(&*claim)));
                    self.claims.insert(name(&*claim).to_owned(), Arc::new(*claim));
                }
                Action::OwnClaim(claim, owners) => {
                    let kinds: Vec<&str> = owners.iter().map(|o| o.kind.as_str()).collect();
                    log.push(format!("{}:{}", name(&*claim), kinds.join("+")));
                    let mut claim = (*claim).clone();
                    claim.metadata.owner_references = Some(owners);
                    self.claims.insert(name(&claim).to_owned(), Arc::new(claim));
                }
                Action::Label(pod, labels) => {
                    log.push(format!("{}~{}", name(&*pod), labels.len()));
                    self.pods.get_mut(name(&*pod)).unwrap().metadata.labels.get_or_insert_default().extend(labels);
                }
            }
        }
        log
    }

    #[track_caller]
    fn expect(&mut self, expect: &[&str]) {
        assert_eq!(self.pass(), expect);
    }

    fn status(&mut self, pod: &str, phase: &str, ready: bool) {
        let ready = if ready { "True" } else { "False" };
        let status = json!({"phase": phase, "conditions": [
            {"type": "Ready", "status": ready, "lastTransitionTime": self.now.to_string()}]});
        self.pods.get_mut(pod).unwrap().status = Some(serde_json::from_value(status).unwrap());
    }

    fn ready(&mut self, pod: &str) {
        self.status(pod, "Running", true);
    }

    /// Everything that is being deleted is gone, and everything else is ready; until nothing is left to do.
    fn settle(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        for _ in 0..50 {
            let done = self.pass();
            let idle = done.is_empty() && self.pods.values().all(|p| !is_deleting(p) && pod::is_running_and_ready(p));
            all.extend(done);
            self.pods.retain(|_, pod| !is_deleting(pod));
            for pod in self.pods.keys().cloned().collect::<Vec<_>>() {
                if !pod::is_running_and_ready(&self.pods[&pod]) {
                    self.ready(&pod);
                }
            }
            if idle {
                return all;
            }
        }
        panic!("it does not settle: {all:?}");
    }

    fn change(&mut self, change: impl FnOnce(&mut Value)) {
        let mut spec = serde_json::to_value(&self.set.spec).unwrap();
        change(&mut spec);
        self.set.spec = serde_json::from_value(spec).unwrap();
    }

    fn image(&mut self, image: &str) {
        self.change(|spec| spec["template"]["spec"]["containers"][0]["image"] = image.into());
    }
}

#[test]
fn one_after_the_other() {
    let mut bench = Bench::new(json!({}));
    bench.expect(&["+web-0 v1"]);
    bench.expect(&[]);
    bench.status("web-0", "Running", false);
    bench.expect(&[]);
    bench.ready("web-0");
    bench.expect(&["+web-1 v1"]);
    bench.ready("web-1");
    bench.expect(&["+web-2 v1"]);
    bench.ready("web-2");
    bench.expect(&[]);
    let status = bench.set.status.clone().unwrap();
    assert_eq!(
        (status.replicas, status.ready_replicas, status.current_replicas, status.updated_replicas),
        (3, Some(3), Some(3), Some(3))
    );
    assert_eq!(status.current_revision, status.update_revision);
    let pod = &bench.pods["web-1"];
    let labels = pod.metadata.labels.as_ref().unwrap();
    assert_eq!(labels["statefulset.kubernetes.io/pod-name"], "web-1");
    assert_eq!(labels["apps.kubernetes.io/pod-index"], "1");
    assert_eq!(Some(&labels["controller-revision-hash"]), status.current_revision.as_ref());
    let spec = pod.spec.as_ref().unwrap();
    assert_eq!((spec.hostname.as_deref(), spec.subdomain.as_deref()), (Some("web-1"), Some("web")));
    // From the top down, each one only when the one before it is gone.
    bench.change(|spec| spec["replicas"] = 1.into());
    bench.expect(&["-web-2 Surplus"]);
    bench.expect(&[]);
    bench.pods.remove("web-2");
    bench.expect(&["-web-1 Surplus"]);
    bench.pods.remove("web-1");
    bench.expect(&[]);
}

#[test]
fn all_at_once() {
    let mut bench = Bench::new(json!({"podManagementPolicy": "Parallel"}));
    bench.expect(&["+web-0 v1", "+web-1 v1", "+web-2 v1"]);
    bench.change(|spec| spec["replicas"] = 1.into());
    bench.expect(&["-web-2 Surplus", "-web-1 Surplus"]);
    bench.settle();
    bench.change(|spec| spec["replicas"] = 3.into());
    bench.settle();
    // An update is one by one all the same.
    bench.image("v2");
    bench.expect(&["-web-2 Outdated"]);
    bench.expect(&[]);
}

#[test]
fn a_number_is_free_when_its_pod_is_gone() {
    let mut bench = Bench::new(json!({"podManagementPolicy": "Parallel"}));
    bench.settle();
    let time = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
    bench.pods.get_mut("web-1").unwrap().metadata.deletion_timestamp = time;
    bench.expect(&[]);
    bench.status("web-1", "Failed", false);
    bench.expect(&[]);
    bench.pods.remove("web-1");
    bench.expect(&["+web-1 v1"]);
    // One that has ended is deleted first.
    bench.status("web-0", "Failed", false);
    bench.expect(&["-web-0 Failed"]);
    bench.status("web-2", "Succeeded", false);
    bench.expect(&["-web-2 Ended"]);
}

#[test]
fn updates_roll_from_the_top_and_wait_for_each() {
    let mut bench = Bench::new(json!({}));
    bench.settle();
    bench.image("v2");
    bench.expect(&["-web-2 Outdated"]);
    bench.expect(&[]);
    bench.pods.remove("web-2");
    bench.expect(&["+web-2 v2"]);
    bench.expect(&[]);
    let status = bench.set.status.clone().unwrap();
    assert_ne!(status.current_revision, status.update_revision);
    assert_eq!((status.current_replicas, status.updated_replicas), (Some(2), Some(1)));
    bench.ready("web-2");
    bench.expect(&["-web-1 Outdated"]);
    let rest = bench.settle();
    assert_eq!(rest, ["+web-1 v2", "-web-0 Outdated", "+web-0 v2"]);
    let status = bench.set.status.clone().unwrap();
    assert_eq!((status.current_revision == status.update_revision, status.current_replicas), (true, Some(3)));
    // Back: the revision that is there becomes the newest.
    assert_eq!(bench.revisions.len(), 2);
    bench.image("v1");
    bench.settle();
    let numbers: Vec<_> = bench.revisions.iter().map(|r| r.revision.unwrap()).collect();
    assert_eq!(numbers, [2, 3]);
}

#[test]
fn a_partition_keeps_what_is_below_it() {
    let mut bench = Bench::new(json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 2}}}));
    bench.settle();
    bench.image("v2");
    assert_eq!(bench.settle(), ["-web-2 Outdated", "+web-2 v2"]);
    // One below it that is lost comes back as it was.
    bench.pods.remove("web-0");
    bench.expect(&["+web-0 v1"]);
    bench.settle();
    bench.change(|spec| spec["updateStrategy"]["rollingUpdate"]["partition"] = 0.into());
    assert_eq!(bench.settle(), ["-web-1 Outdated", "+web-1 v2", "-web-0 Outdated", "+web-0 v2"]);
}

#[test]
fn on_delete_waits_for_somebody_to_delete() {
    let mut bench = Bench::new(json!({"updateStrategy": {"type": "OnDelete"}}));
    bench.settle();
    bench.image("v2");
    assert_eq!(bench.settle(), [""; 0]);
    bench.pods.remove("web-1");
    bench.expect(&["+web-1 v2"]);
}

#[test]
fn several_at_a_time_if_so_many_may_be_unavailable() {
    let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 2}});
    let mut bench = Bench::new(json!({"replicas": 5, "updateStrategy": strategy, "podManagementPolicy": "Parallel"}));
    bench.settle();
    bench.image("v2");
    bench.expect(&["-web-4 Outdated", "-web-3 Outdated"]);
    bench.expect(&[]);
    bench.pods.remove("web-4");
    bench.expect(&["+web-4 v2"]);
    bench.expect(&[]);
    bench.ready("web-4");
    bench.expect(&["-web-2 Outdated"]);
}

#[test]
fn ready_for_long_enough() {
    let mut bench = Bench::new(json!({"minReadySeconds": 10, "replicas": 2}));
    bench.expect(&["+web-0 v1"]);
    bench.ready("web-0");
    bench.expect(&[]);
    assert_eq!(bench.again, Some(Duration::from_secs(10)));
    assert_eq!(bench.set.status.as_ref().unwrap().available_replicas, Some(0));
    bench.now += Duration::from_secs(10);
    bench.expect(&["+web-1 v1"]);
}

#[test]
fn numbers_may_begin_elsewhere() {
    let mut bench = Bench::new(json!({"replicas": 2, "ordinals": {"start": 5}}));
    assert_eq!(bench.settle(), ["+web-5 v1", "+web-6 v1"]);
    bench.change(|spec| spec["ordinals"]["start"] = 6.into());
    assert_eq!(bench.settle(), ["+web-7 v1", "-web-5 Surplus"]);
}

fn claimed(policy: Value) -> Bench {
    Bench::new(json!({
        "replicas": 1, "persistentVolumeClaimRetentionPolicy": policy,
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}],
    }))
}

#[test]
fn claims_are_made_before_pods_and_stay() {
    let mut bench = claimed(json!({}));
    bench.expect(&["+data-web-0", "+web-0 v1"]);
    let spec = bench.pods["web-0"].spec.clone().unwrap();
    let volume = &spec.volumes.unwrap()[0];
    assert_eq!(volume.persistent_volume_claim.as_ref().unwrap().claim_name, "data-web-0");
    assert_eq!(bench.claims["data-web-0"].metadata.labels.as_ref().unwrap()["app"], "web");
    assert_eq!(bench.claims["data-web-0"].metadata.owner_references, None);
    // One that is lost while the pod waits for it is made again.
    bench.claims.clear();
    bench.expect(&["+data-web-0"]);
    bench.settle();
    bench.change(|spec| spec["replicas"] = 0.into());
    assert_eq!(bench.settle(), ["-web-0 Surplus"]);
    bench.change(|spec| spec["replicas"] = 1.into());
    assert_eq!(bench.settle(), ["+web-0 v1"], "with the claim that it had");
}

#[test]
fn claims_go_as_their_policy_says() {
    let mut bench = claimed(json!({"whenDeleted": "Delete", "whenScaled": "Delete"}));
    bench.settle();
    let owners = |bench: &Bench| -> Vec<String> {
        bench.claims["data-web-0"].metadata.owner_references.iter().flatten().map(|o| o.kind.clone()).collect()
    };
    assert_eq!(owners(&bench), ["StatefulSet"]);
    bench.change(|spec| spec["replicas"] = 0.into());
    bench.expect(&["data-web-0:Pod", "-web-0 Surplus"]);
    bench.pods.clear();
    // It is going with its pod: nobody may use it any more.
    bench.change(|spec| spec["replicas"] = 1.into());
    bench.expect(&[]);
    bench.claims.clear();
    bench.expect(&["+data-web-0", "+web-0 v1"]);
    bench.settle();
    bench.change(|spec| spec["persistentVolumeClaimRetentionPolicy"] = json!({}));
    bench.expect(&["data-web-0:"]);
    bench.expect(&[]);
}

#[test]
fn whose_name_is_of_the_set() {
    let set = set(json!({}));
    let check = |pod: &str, expect: Option<i64>| {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": pod}})).unwrap();
        assert_eq!(pod::ordinal(&set, &pod), expect, "{pod:?}");
    };
    check("web-0", Some(0));
    check("web-12", Some(12));
    check("web-01", None);
    check("web-+1", None);
    check("web--1", None);
    check("web", None);
    check("web-a", None);
    check("other-web-1", None);
    check("web-web-1", None);
}

#[test]
fn history_is_kept_within_its_limit() {
    let mut bench = Bench::new(json!({"replicas": 1, "revisionHistoryLimit": 2}));
    for version in 1..=6 {
        bench.image(&format!("v{version}"));
        bench.settle();
    }
    let pods: Vec<Arc<Pod>> = bench.pods.values().cloned().map(Arc::new).collect();
    let used = plan::used(&pods, bench.set.status.as_ref().unwrap());
    let surplus = history::surplus(&bench.set, &bench.revisions, &used);
    let numbers: Vec<_> = surplus.iter().map(|r| r.revision.unwrap()).collect();
    assert_eq!(numbers, [1, 2, 3]);
}
