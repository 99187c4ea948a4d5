//! What to do about a Job. Pods carry a finalizer until they are counted, so that no completion is lost (KEP-2307): first
//! a finished pod's uid goes into the status, then its finalizer goes, then the uid becomes part of a number.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec, JobStatus, UncountedTerminatedPods},
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

pub use super::end::condition;
use super::{
    end::{self, FAILURE, SUCCESS, set_condition},
    indexes::{format_indexes, parse_indexes},
    policy::{Verdict, judge},
};
use crate::{
    context::{delay, sooner},
    runtime::objects::{annotation, created, is_active, is_deleting, is_finished, is_ready, phase, uid},
};

/// Holds a pod until it is counted.
pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
/// Which of an Indexed Job's completions a pod is for.
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// How often the pods for an index have failed before this one (KEP-3850).
pub const FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
/// How often they have failed in a way that does not count.
pub const IGNORED: &str = "batch.kubernetes.io/job-index-ignored-failure-count";
/// After a failure: the first wait for a new pod, and the longest
/// (<https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-backoff-failure-policy>).
const FIRST_BACKOFF: i64 = 10;
const LONGEST_BACKOFF: i64 = 360;
/// No more pods than this are created or deleted in one pass.
const BURST: usize = 500;
/// No more pods than this are noted in the status to be counted.
const UNCOUNTED: usize = 500;

/// What to do about a Job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What its status should say; it is written before anything else is done.
    pub status: JobStatus,
    /// Pods that are counted, by uid: their finalizer goes.
    pub release: Vec<String>,
    /// Pods that are no longer wanted, by uid. They are released first: their end does not count.
    pub discard: Vec<String>,
    /// Pods of a Job that has ended, by uid. Their end counts.
    pub delete: Vec<String>,
    /// Pods to create, with their index if the Job is Indexed.
    pub create: Vec<Option<i32>>,
    /// How often the pods for an index have failed, and failed without that counting, where each index has a limit.
    pub failures: BTreeMap<i32, (i32, i32)>,
    /// The Job has outlived its time after the end.
    pub expired: bool,
    /// When to look again.
    pub again: Option<Duration>,
}

/// Whether the pod is still to be counted.
pub fn is_tracked(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

fn number(pod: &Pod, key: &str) -> i32 {
    annotation(pod, key).and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// When a pod ended, as well as it is known.
fn ended(pod: &Pod) -> Timestamp {
    let statuses = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    let times = statuses.filter_map(|s| s.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref().map(|t| t.0));
    let deleted = pod.metadata.deletion_timestamp.as_ref().map(|t| t.0);
    times.max().or(deleted).unwrap_or_else(|| created(pod))
}

/// What is left of the wait after so many failures, of which the last was then.
fn left(failures: usize, last: Timestamp, now: Timestamp) -> Option<SignedDuration> {
    let seconds = (FIRST_BACKOFF << failures.saturating_sub(1).min(10)).min(LONGEST_BACKOFF);
    let left = SignedDuration::from_secs(seconds) - now.duration_since(last);
    left.is_positive().then_some(left)
}

/// How long to wait before another pod is made: longer with every failure since the last success.
fn backoff(failed: &[&Arc<Pod>], succeeded: &[&Arc<Pod>], now: Timestamp) -> Option<SignedDuration> {
    let success = succeeded.iter().map(|pod| ended(pod)).max();
    let since: Vec<Timestamp> =
        failed.iter().map(|pod| ended(pod)).filter(|at| success.is_none_or(|s| *at > s)).collect();
    left(since.len(), *since.iter().max()?, now)
}

/// What has been counted.
#[derive(Default)]
pub(super) struct Count<'a> {
    /// Pods that have succeeded; indexes, if the Job is Indexed.
    pub succeeded: i32,
    /// Pods that have failed and count.
    pub failed: i32,
    /// Indexes that have succeeded.
    pub completed: BTreeSet<i32>,
    /// Indexes that have failed for good.
    pub failed_indexes: BTreeSet<i32>,
    /// Pods that run or will.
    pub active: Vec<&'a Arc<Pod>>,
    /// Pods that are being deleted and have not ended.
    pub terminating: Vec<&'a Arc<Pod>>,
    /// Pods that have failed and were not counted before.
    pub new_failures: Vec<&'a Arc<Pod>>,
    /// The last failed pod of each index that has no other: it is held until another knows how often it has failed.
    pub held: BTreeMap<i32, &'a Arc<Pod>>,
}

/// Decides. `pods` are those that the Job controls.
pub fn plan(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let status = job.status.clone().unwrap_or_default();
    let Some(spec) = &job.spec else { return Plan { status, ..Plan::default() } };
    if condition(&status, "Complete").or_else(|| condition(&status, "Failed")).is_some() {
        return after_the_end(job, status, pods, now);
    }
    if is_deleting(job) {
        return Plan { status, release: tracked(pods), ..Plan::default() };
    }
    let mut work = Work {
        spec,
        pods,
        now,
        indexed: spec.completion_mode.as_deref() == Some("Indexed"),
        completions: spec.completions.unwrap_or(0),
        only_failed: spec.pod_replacement_policy.as_deref() == Some("Failed") || spec.pod_failure_policy.is_some(),
        status,
        count: Count::default(),
        plan: Plan::default(),
    };
    work.count();
    work.decide();
    work.plan.status = work.status;
    work.plan
}

fn after_the_end(job: &Job, status: JobStatus, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let expired = end::expired(job, now);
    Plan {
        release: tracked(pods),
        delete: pods.iter().filter(|pod| is_active(pod)).map(|pod| uid(&**pod).to_owned()).collect(),
        expired: expired.is_ok_and(|yes| yes),
        again: expired.err(),
        status,
        ..Plan::default()
    }
}

fn tracked(pods: &[Arc<Pod>]) -> Vec<String> {
    pods.iter().filter(|pod| is_tracked(pod)).map(|pod| uid(&**pod).to_owned()).collect()
}

fn uids(pods: &[&Arc<Pod>]) -> Vec<String> {
    pods.iter().map(|pod| uid(&***pod).to_owned()).collect()
}

/// A number that is not told if it is nothing.
fn some(number: i32) -> Option<i32> {
    Some(number).filter(|n| *n > 0)
}

fn len(list: Option<&Vec<String>>) -> i32 {
    list.map_or(0, Vec::len) as i32
}

struct Work<'a> {
    spec: &'a JobSpec,
    pods: &'a [Arc<Pod>],
    now: Timestamp,
    indexed: bool,
    completions: i32,
    /// A pod is replaced when it has ended, and not when its deletion begins (KEP-3939).
    only_failed: bool,
    status: JobStatus,
    count: Count<'a>,
    plan: Plan,
}

impl<'a> Work<'a> {
    /// The index of a pod, if it is one that the Job has.
    fn index(&self, pod: &Pod) -> Option<i32> {
        let index: i32 = annotation(pod, INDEX)?.parse().ok()?;
        (self.indexed && (0..self.completions).contains(&index)).then_some(index)
    }

    /// A pod that is being deleted may never get to report a phase; unless told to wait for that, it has failed.
    fn has_failed(&self, pod: &Pod) -> bool {
        phase(pod) == "Failed" || (!self.only_failed && is_deleting(pod) && phase(pod) != "Succeeded")
    }

    fn judge(&self, pod: &Pod) -> Verdict {
        judge(self.spec.pod_failure_policy.as_ref(), pod)
    }

    /// Brings the status up to date with the pods.
    fn count(&mut self) {
        let pods = self.pods;
        self.count.active = pods.iter().filter(|pod| is_active(pod)).collect();
        self.count.terminating = pods.iter().filter(|pod| is_deleting(&***pod) && !is_finished(pod)).collect();
        let mut uncounted = self.status.uncounted_terminated_pods.take().unwrap_or_default();
        self.settle(&mut uncounted);
        self.indexes();
        self.hold();
        self.terminated(&mut uncounted);
        if self.indexed {
            self.count.succeeded = self.count.completed.len() as i32;
            self.status.succeeded = Some(self.count.succeeded);
        } else {
            self.count.succeeded = self.status.succeeded.unwrap_or(0) + len(uncounted.succeeded.as_ref());
        }
        let listed = |pod: &Pod| uncounted.failed.iter().flatten().any(|id| id == uid(pod));
        let unlisted = self.count.new_failures.iter().filter(|pod| !listed(pod) && self.judge(pod) != Verdict::Ignore);
        let unlisted = unlisted.count() as i32;
        self.count.failed = self.status.failed.unwrap_or(0) + len(uncounted.failed.as_ref()) + unlisted;
        let text = |set: &BTreeSet<i32>| Some(format_indexes(set)).filter(|text| !text.is_empty());
        if self.indexed {
            self.status.completed_indexes = text(&self.count.completed);
        }
        // Without a limit for each there are none, which is not the same as that none has failed.
        self.status.failed_indexes =
            self.spec.backoff_limit_per_index.map(|_| format_indexes(&self.count.failed_indexes));
        self.status.active = some(self.count.active.len() as i32);
        self.status.ready = Some(self.count.active.iter().filter(|pod| is_ready(pod)).count() as i32);
        self.status.terminating = Some(self.count.terminating.len() as i32);
        self.status.succeeded = self.status.succeeded.and_then(some);
        self.status.failed = self.status.failed.and_then(some);
        uncounted.succeeded = uncounted.succeeded.filter(|list| !list.is_empty());
        uncounted.failed = uncounted.failed.filter(|list| !list.is_empty());
        self.status.uncounted_terminated_pods = Some(uncounted);
    }

    /// What the last status promised to count, and whose finalizer is gone, is counted now.
    fn settle(&mut self, uncounted: &mut UncountedTerminatedPods) {
        let tracked: BTreeSet<String> = tracked(self.pods).into_iter().collect();
        let settle = |list: &mut Option<Vec<String>>| {
            let before = len(list.as_ref());
            list.get_or_insert_default().retain(|id| tracked.contains(id));
            before - len(list.as_ref())
        };
        self.status.succeeded = Some(self.status.succeeded.unwrap_or(0) + settle(&mut uncounted.succeeded));
        self.status.failed = Some(self.status.failed.unwrap_or(0) + settle(&mut uncounted.failed));
    }

    /// Which indexes have succeeded, and which have failed for good.
    fn indexes(&mut self) {
        let read = |text: &Option<String>| parse_indexes(text.as_deref().unwrap_or_default(), self.completions);
        let (mut completed, mut failed) = (read(&self.status.completed_indexes), read(&self.status.failed_indexes));
        for pod in self.pods.iter().filter(|pod| is_tracked(pod)) {
            let Some(index) = self.index(pod) else { continue };
            if phase(pod) == "Succeeded" {
                completed.insert(index);
            } else if self.spec.backoff_limit_per_index.is_some_and(|limit| self.fails_index(pod, limit)) {
                failed.insert(index);
            }
        }
        // What has succeeded in the end has not failed.
        failed.retain(|index| !completed.contains(index));
        (self.count.completed, self.count.failed_indexes) = (completed, failed);
    }

    /// Whether with this pod its index has failed for good.
    fn fails_index(&self, pod: &Pod, limit: i32) -> bool {
        self.has_failed(pod)
            && match self.judge(pod) {
                Verdict::FailIndex => true,
                Verdict::Ignore => false,
                Verdict::Count | Verdict::FailJob(_) => number(pod, FAILURES) >= limit,
            }
    }

    /// Finds for each index that is to be tried again the pod that knows how often it has failed.
    fn hold(&mut self) {
        if self.spec.backoff_limit_per_index.is_none() {
            return;
        }
        let active: BTreeSet<i32> = self.count.active.iter().filter_map(|pod| self.index(pod)).collect();
        let settled = |index: &i32| {
            active.contains(index) || self.count.completed.contains(index) || self.count.failed_indexes.contains(index)
        };
        let key = |pod: &Arc<Pod>| (number(pod, FAILURES) + number(pod, IGNORED), ended(pod), uid(&**pod).to_owned());
        let mut held: BTreeMap<i32, &'a Arc<Pod>> = BTreeMap::new();
        for pod in self.pods.iter().filter(|pod| is_tracked(pod) && self.has_failed(pod)) {
            let Some(index) = self.index(pod).filter(|index| !settled(index)) else { continue };
            let last = held.entry(index).or_insert(pod);
            if key(pod) > key(last) {
                *last = pod;
            }
        }
        self.count.held = held;
    }

    /// Lists pods that have ended, and lets go of those that are listed. Those that cannot be listed now come in a later pass.
    fn terminated(&mut self, uncounted: &mut UncountedTerminatedPods) {
        let ending = self.is_ending();
        for pod in self.pods.iter().filter(|pod| is_tracked(pod)) {
            let (id, failed) = (uid(&**pod).to_owned(), self.has_failed(pod));
            if failed {
                self.count.new_failures.push(pod);
            }
            if !failed && phase(pod) != "Succeeded" {
                continue;
            }
            let index = self.index(pod);
            let held = index.and_then(|index| self.count.held.get(&index)).is_some_and(|last| Arc::ptr_eq(last, pod));
            if held && !ending {
                continue;
            }
            let list = match () {
                // Its index is noted, or it has none that counts.
                () if !failed && self.indexed => None,
                () if !failed => Some(&mut uncounted.succeeded),
                () if self.indexed && index.is_none() => None,
                () if self.judge(pod) == Verdict::Ignore => None,
                () => Some(&mut uncounted.failed),
            };
            if let Some(list) = list {
                let list = list.get_or_insert_default();
                if !list.contains(&id) {
                    if list.len() >= UNCOUNTED {
                        self.plan.again = Some(Duration::ZERO);
                        continue;
                    }
                    list.push(id.clone());
                }
            }
            // One that was being deleted, and was listed as failed for that, may have succeeded in the end.
            if !failed && let Some(list) = &mut uncounted.failed {
                list.retain(|known| *known != id);
            }
            self.plan.release.push(id);
        }
    }

    fn is_ending(&self) -> bool {
        [SUCCESS, FAILURE].iter().any(|type_| condition(&self.status, type_).is_some())
    }

    /// What is left of the Job's time.
    fn deadline(&self) -> Option<SignedDuration> {
        let start = self.status.start_time.as_ref()?;
        let deadline = self.spec.active_deadline_seconds.filter(|_| self.spec.suspend != Some(true))?;
        Some(SignedDuration::from_secs(deadline) - self.now.duration_since(start.0))
    }

    fn decide(&mut self) {
        let suspended = self.spec.suspend == Some(true);
        let resumed = !suspended && condition(&self.status, "Suspended").is_some();
        if !suspended && (self.status.start_time.is_none() || resumed) {
            self.status.start_time = Some(Time(self.now));
        }
        if !self.is_ending() {
            let deadline = self.deadline();
            match end::cause(self.spec, &self.count, deadline) {
                Some(cause) => {
                    set_condition(&mut self.status, cause.type_, true, cause.reason, &cause.message, self.now);
                    // What was held to be tried again is counted when this is written.
                    self.plan.again = Some(Duration::ZERO);
                }
                None => self.plan.again = sooner(self.plan.again, deadline.map(delay)),
            }
        }
        if self.is_ending() {
            return self.end();
        }
        if suspended {
            set_condition(&mut self.status, "Suspended", true, "JobSuspended", "Job suspended", self.now);
            self.status.start_time = None;
            self.plan.discard = uids(&self.count.active);
            return;
        }
        if resumed {
            set_condition(&mut self.status, "Suspended", false, "JobResumed", "Job resumed", self.now);
        }
        self.scale();
    }

    /// The end is told when all is counted and nothing runs any more (KEP-3939).
    fn end(&mut self) {
        self.plan.delete = uids(&self.count.active);
        let uncounted = self.status.uncounted_terminated_pods.clone().unwrap_or_default();
        let open = len(uncounted.succeeded.as_ref()) + len(uncounted.failed.as_ref()) > 0
            || self.pods.iter().any(|pod| is_tracked(pod) && !self.plan.release.iter().any(|id| id == uid(&**pod)));
        if !self.count.active.is_empty() || !self.count.terminating.is_empty() || open {
            return;
        }
        let cause = |type_| condition(&self.status, type_).cloned();
        let (end, cause) = match cause(SUCCESS) {
            Some(cause) => ("Complete", cause),
            None => ("Failed", cause(FAILURE).unwrap_or_default()),
        };
        let (reason, message) = (cause.reason.unwrap_or_default(), cause.message.unwrap_or_default());
        set_condition(&mut self.status, end, true, &reason, &message, self.now);
        if end == "Complete" {
            self.status.completion_time = Some(Time(self.now));
        }
        self.plan.again = self.spec.ttl_seconds_after_finished.map(|ttl| Duration::from_secs(ttl.max(0) as u64));
    }

    /// Makes as many pods run as should.
    fn scale(&mut self) {
        let mut active = self.count.active.clone();
        // Of two pods for one index, and of more than are wanted, those that have got least far go.
        active.sort_by_key(|pod| (Reverse(is_ready(pod)), Reverse(phase(pod) == "Running"), created(&***pod)));
        let mut taken = BTreeSet::new();
        let mut discard = Vec::new();
        if self.indexed {
            active.retain(|pod| {
                let open = |i: &i32| !self.count.completed.contains(i) && !self.count.failed_indexes.contains(i);
                let keep = self.index(pod).filter(open).is_some_and(|index| taken.insert(index));
                if !keep {
                    discard.push(uid(&***pod).to_owned());
                }
                keep
            });
        }
        let wanted = self.wanted(active.len());
        discard.extend(active.iter().skip(wanted).map(|pod| uid(&***pod).to_owned()));
        discard.truncate(BURST);
        // What has to go goes before anything comes: an index must not have two, and a limit is a limit.
        if !discard.is_empty() {
            self.plan.discard = discard;
            return;
        }
        let going = if self.only_failed { self.count.terminating.len() } else { 0 };
        if self.only_failed {
            taken.extend(self.count.terminating.iter().filter_map(|pod| self.index(pod)));
        }
        let missing = wanted.saturating_sub(active.len() + going).min(BURST);
        self.create(missing, &taken);
    }

    /// How many pods should run.
    fn wanted(&self, active: usize) -> usize {
        let parallelism = self.spec.parallelism.unwrap_or(1).max(0);
        let wanted = match self.spec.completions {
            // Who has seen one success finds out by himself that there is nothing left to do.
            None if self.count.succeeded > 0 => parallelism.min(active as i32),
            None => parallelism,
            Some(completions) => parallelism.min(completions - self.count.succeeded),
        };
        wanted.max(0) as usize
    }

    fn create(&mut self, missing: usize, taken: &BTreeSet<i32>) {
        if missing == 0 {
            return;
        }
        if self.spec.backoff_limit_per_index.is_none() {
            let failures: Vec<_> = self.pods.iter().filter(|pod| self.has_failed(pod)).collect();
            let successes: Vec<_> = self.pods.iter().filter(|pod| phase(pod) == "Succeeded").collect();
            if let Some(left) = backoff(&failures, &successes, self.now) {
                self.plan.again = sooner(self.plan.again, Some(delay(left)));
                return;
            }
        }
        if !self.indexed {
            self.plan.create = vec![None; missing];
            return;
        }
        let closed =
            |i: &i32| self.count.completed.contains(i) || self.count.failed_indexes.contains(i) || taken.contains(i);
        let indexes: Vec<i32> = (0..self.completions).filter(|i| !closed(i)).take(missing).collect();
        for index in indexes {
            let Some(last) = self.count.held.get(&index) else {
                self.plan.create.push(Some(index));
                if self.spec.backoff_limit_per_index.is_some() {
                    self.plan.failures.insert(index, (0, 0));
                }
                continue;
            };
            let (counted, ignored) = (number(last, FAILURES), number(last, IGNORED));
            if let Some(left) = left((counted + ignored + 1).max(0) as usize, ended(last), self.now) {
                self.plan.again = sooner(self.plan.again, Some(delay(left)));
                continue;
            }
            let counts = i32::from(self.judge(last) != Verdict::Ignore);
            self.plan.failures.insert(index, (counted + counts, ignored + 1 - counts));
            self.plan.create.push(Some(index));
        }
    }
}
