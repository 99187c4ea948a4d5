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
        batch::v1::{Job, JobCondition, JobStatus},
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use crate::{
    context::{delay, sooner},
    runtime::objects::{annotation, created, is_active, is_deleting, is_finished, is_ready, phase, uid},
};

/// Holds a pod until it is counted.
pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
/// Which of an Indexed Job's completions a pod is for.
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// After a failure: the first wait for a new pod, and the longest
/// (<https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-backoff-failure-policy>).
const FIRST_BACKOFF: i64 = 10;
const LONGEST_BACKOFF: i64 = 360;
/// No more pods than this are created in one pass.
const BURST: usize = 500;

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
    /// The Job has outlived its time after the end.
    pub expired: bool,
    /// When to look again.
    pub again: Option<Duration>,
}

/// The condition of this type, if it is true.
pub fn condition<'a>(status: &'a JobStatus, type_: &str) -> Option<&'a JobCondition> {
    status.conditions.iter().flatten().find(|c| c.type_ == type_ && c.status == "True")
}

/// Whether the pod is still to be counted.
pub fn is_tracked(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

/// The index of an Indexed Job's pod.
fn index_of(pod: &Pod) -> Option<i32> {
    annotation(pod, INDEX)?.parse().ok()
}

/// Reads indexes such as `1,3-5`, those below `below` only.
pub fn parse_indexes(text: &str, below: i32) -> BTreeSet<i32> {
    let mut set = BTreeSet::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(from), Ok(to)) = (from.parse::<i32>(), to.parse::<i32>()) {
            set.extend(from.max(0)..=to.min(below - 1));
        }
    }
    set
}

/// Writes indexes as `1,3-5`.
pub fn format_indexes(set: &BTreeSet<i32>) -> String {
    let mut runs: Vec<(i32, i32)> = Vec::new();
    for index in set {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *index => *last = *index,
            _ => runs.push((*index, *index)),
        }
    }
    let text = |(from, to): &(i32, i32)| match to - from {
        0 => from.to_string(),
        1 => format!("{from},{to}"),
        _ => format!("{from}-{to}"),
    };
    runs.iter().map(text).collect::<Vec<_>>().join(",")
}

/// When a pod ended, as well as it is known.
fn ended(pod: &Pod) -> Timestamp {
    let statuses = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    let times = statuses.filter_map(|s| s.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref().map(|t| t.0));
    let deleted = pod.metadata.deletion_timestamp.as_ref().map(|t| t.0);
    times.max().or(deleted).unwrap_or_else(|| created(pod))
}

/// How long to wait before another pod is made: longer with every failure since the last success.
fn backoff(failed: &[&Arc<Pod>], succeeded: &[&Arc<Pod>], now: Timestamp) -> Option<SignedDuration> {
    let success = succeeded.iter().map(|pod| ended(pod)).max();
    let since: Vec<Timestamp> =
        failed.iter().map(|pod| ended(pod)).filter(|at| success.is_none_or(|s| *at > s)).collect();
    let last = since.iter().max()?;
    let seconds = (FIRST_BACKOFF << (since.len() - 1).min(10)).min(LONGEST_BACKOFF);
    let left = SignedDuration::from_secs(seconds) - now.duration_since(*last);
    left.is_positive().then_some(left)
}

fn set_condition(status: &mut JobStatus, type_: &str, value: bool, reason: &str, message: &str, now: Timestamp) {
    let conditions = status.conditions.get_or_insert_default();
    let value = if value { "True" } else { "False" };
    if conditions.iter().any(|c| c.type_ == type_ && c.status == value) {
        return;
    }
    conditions.retain(|c| c.type_ != type_);
    conditions.push(JobCondition {
        type_: type_.into(),
        status: value.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
}

/// Decides. `pods` are those that the Job controls.
pub fn plan(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let mut status = job.status.clone().unwrap_or_default();
    let Some(spec) = &job.spec else { return Plan { status, ..Default::default() } };
    if let Some(end) = condition(&status, "Complete").or_else(|| condition(&status, "Failed")) {
        let at = end.last_transition_time.as_ref().map_or(now, |t| t.0);
        let left =
            spec.ttl_seconds_after_finished.map(|ttl| SignedDuration::from_secs(ttl.into()) - now.duration_since(at));
        return Plan {
            release: tracked(pods),
            delete: pods.iter().filter(|pod| is_active(pod)).map(|pod| uid(&**pod).to_owned()).collect(),
            expired: left.is_some_and(|left| !left.is_positive()) && !is_deleting(job),
            again: left.filter(SignedDuration::is_positive).map(delay),
            status,
            ..Default::default()
        };
    }
    if is_deleting(job) {
        return Plan { status, release: tracked(pods), ..Default::default() };
    }

    let indexed = spec.completion_mode.as_deref() == Some("Indexed");
    let completions = spec.completions.unwrap_or(0);
    let only_failed = spec.pod_replacement_policy.as_deref() == Some("Failed");
    // A pod that is being deleted may never get to report a phase; unless told to wait for that, it has failed.
    let has_failed =
        |pod: &Pod| phase(pod) == "Failed" || (!only_failed && is_deleting(pod) && phase(pod) != "Succeeded");
    let valid = |pod: &Pod| !indexed || index_of(pod).is_some_and(|i| (0..completions).contains(&i));

    // What the last status promised to count, and whose finalizer is gone, is counted now.
    let by_uid: BTreeMap<&str, &Arc<Pod>> = pods.iter().map(|pod| (uid(&**pod), pod)).collect();
    let mut uncounted = status.uncounted_terminated_pods.take().unwrap_or_default();
    let still = |id: &String| by_uid.get(id.as_str()).is_some_and(|pod| is_tracked(pod));
    let count = |list: &mut Option<Vec<String>>| {
        let list = list.get_or_insert_default();
        let before = list.len();
        list.retain(still);
        (before - list.len()) as i32
    };
    let mut succeeded = status.succeeded.unwrap_or(0) + count(&mut uncounted.succeeded);
    let failed = status.failed.unwrap_or(0) + count(&mut uncounted.failed);
    let mut completed = parse_indexes(status.completed_indexes.as_deref().unwrap_or_default(), completions);
    let mut release = Vec::new();
    for pod in pods.iter().filter(|pod| is_tracked(pod)) {
        let id = uid(&**pod).to_owned();
        let list = match () {
            () if phase(pod) == "Succeeded" && indexed => {
                completed.extend(index_of(pod).filter(|i| (0..completions).contains(i)));
                release.push(id);
                continue;
            }
            () if phase(pod) == "Succeeded" => &mut uncounted.succeeded,
            () if has_failed(pod) => &mut uncounted.failed,
            () => continue,
        };
        let list = list.get_or_insert_default();
        if !list.contains(&id) {
            list.push(id.clone());
        }
        release.push(id);
    }
    if indexed {
        succeeded = completed.len() as i32;
        status.completed_indexes = Some(format_indexes(&completed)).filter(|text| !text.is_empty());
    }
    let in_all = |counted: i32, list: &Option<Vec<String>>| counted + list.as_ref().map_or(0, Vec::len) as i32;
    let succeeded_in_all = if indexed { succeeded } else { in_all(succeeded, &uncounted.succeeded) };
    let failed_in_all = in_all(failed, &uncounted.failed);

    let mut active: Vec<&Arc<Pod>> = pods.iter().filter(|pod| is_active(pod)).collect();
    let terminating = pods.iter().filter(|pod| is_deleting(&***pod) && !is_finished(pod)).count();
    status.active = Some(active.len() as i32).filter(|n| *n > 0);
    status.ready = Some(active.iter().filter(|pod| is_ready(pod)).count() as i32);
    status.terminating = Some(terminating as i32);
    status.succeeded = Some(succeeded).filter(|n| *n > 0);
    status.failed = Some(failed).filter(|n| *n > 0);

    let suspended = spec.suspend == Some(true);
    let was_suspended = condition(&status, "Suspended").is_some();
    if status.start_time.is_none() && !suspended {
        status.start_time = Some(Time(now));
    }
    let mut plan = Plan { release, ..Default::default() };
    decide_end(job, &mut status, &active, succeeded_in_all, failed_in_all, now, &mut plan);
    let open = uncounted.succeeded.iter().chain(&uncounted.failed).any(|list| !list.is_empty());
    uncounted.succeeded = uncounted.succeeded.filter(|list| !list.is_empty());
    uncounted.failed = uncounted.failed.filter(|list| !list.is_empty());
    status.uncounted_terminated_pods = Some(uncounted);

    let ending = ["SuccessCriteriaMet", "FailureTarget"].into_iter().find_map(|t| condition(&status, t).cloned());
    if let Some(cause) = ending {
        plan.delete = active.iter().map(|pod| uid(&***pod).to_owned()).collect();
        // The end is told when all is counted and nothing runs any more (KEP-3939).
        if active.is_empty() && terminating == 0 && !open {
            let success = cause.type_ == "SuccessCriteriaMet";
            let (reason, message) = (cause.reason.unwrap_or_default(), cause.message.unwrap_or_default());
            set_condition(&mut status, if success { "Complete" } else { "Failed" }, true, &reason, &message, now);
            if success {
                status.completion_time = Some(Time(now));
            }
            plan.again = spec.ttl_seconds_after_finished.map(|ttl| Duration::from_secs(ttl.max(0) as u64));
        }
    } else if suspended {
        set_condition(&mut status, "Suspended", true, "JobSuspended", "Job suspended", now);
        status.start_time = None;
        plan.discard = active.iter().map(|pod| uid(&***pod).to_owned()).collect();
    } else {
        if was_suspended {
            set_condition(&mut status, "Suspended", false, "JobResumed", "Job resumed", now);
            status.start_time = Some(Time(now));
        }
        // Of two pods for one index, and of more than are wanted, those that have got least far go.
        active.sort_by_key(|pod| (Reverse(is_ready(pod)), Reverse(phase(pod) == "Running"), created(&***pod)));
        let mut taken = BTreeSet::new();
        if indexed {
            active.retain(|pod| {
                let index = index_of(pod).filter(|i| valid(pod) && !completed.contains(i));
                let keep = index.is_some_and(|i| taken.insert(i));
                if !keep {
                    plan.discard.push(uid(&***pod).to_owned());
                }
                keep
            });
        }
        let parallelism = spec.parallelism.unwrap_or(1).max(0);
        let wanted = match spec.completions {
            None if succeeded_in_all > 0 => parallelism.min(active.len() as i32),
            None => parallelism,
            Some(completions) => parallelism.min(completions - succeeded_in_all).max(0),
        } as usize;
        plan.discard.extend(active.iter().skip(wanted).map(|pod| uid(&***pod).to_owned()));
        let occupied = active.len() + if only_failed { terminating } else { 0 };
        if only_failed {
            taken.extend(pods.iter().filter(|p| is_deleting(&***p) && !is_finished(p)).filter_map(|p| index_of(p)));
        }
        let missing = wanted.saturating_sub(occupied).min(BURST);
        let failures: Vec<_> = pods.iter().filter(|pod| has_failed(pod)).collect();
        let successes: Vec<_> = pods.iter().filter(|pod| phase(pod) == "Succeeded").collect();
        match backoff(&failures, &successes, now).filter(|_| missing > 0) {
            Some(left) => plan.again = sooner(plan.again, Some(delay(left))),
            None if indexed => {
                let free = (0..completions).filter(|i| !completed.contains(i) && !taken.contains(i));
                plan.create = free.take(missing).map(Some).collect();
            }
            None => plan.create = vec![None; missing],
        }
    }
    plan.status = status;
    plan
}

fn tracked(pods: &[Arc<Pod>]) -> Vec<String> {
    pods.iter().filter(|pod| is_tracked(pod)).map(|pod| uid(&**pod).to_owned()).collect()
}

/// Says in the status that the Job is to end, if it is.
fn decide_end(
    job: &Job,
    status: &mut JobStatus,
    active: &[&Arc<Pod>],
    succeeded: i32,
    failed: i32,
    now: Timestamp,
    plan: &mut Plan,
) {
    if condition(status, "SuccessCriteriaMet").or_else(|| condition(status, "FailureTarget")).is_some() {
        return;
    }
    let Some(spec) = &job.spec else { return };
    let limit = spec.backoff_limit.unwrap_or(6);
    let restarts: i32 = match spec.template.spec.as_ref().and_then(|s| s.restart_policy.as_deref()) {
        Some("OnFailure") => active
            .iter()
            .filter_map(|pod| pod.status.as_ref())
            .flat_map(|s| s.init_container_statuses.iter().flatten().chain(s.container_statuses.iter().flatten()))
            .map(|s| s.restart_count)
            .sum(),
        _ => 0,
    };
    if failed > limit || (restarts > 0 && restarts >= limit) {
        let message = "Job has reached the specified backoff limit";
        return set_condition(status, "FailureTarget", true, "BackoffLimitExceeded", message, now);
    }
    if let (Some(deadline), Some(start), false) =
        (spec.active_deadline_seconds, &status.start_time, spec.suspend == Some(true))
    {
        let left = SignedDuration::from_secs(deadline) - now.duration_since(start.0);
        if !left.is_positive() {
            let message = "Job was active longer than specified deadline";
            return set_condition(status, "FailureTarget", true, "DeadlineExceeded", message, now);
        }
        plan.again = sooner(plan.again, Some(delay(left)));
    }
    let complete = match spec.completions {
        None => succeeded > 0 && active.is_empty(),
        Some(completions) => succeeded >= completions && (completions > 0 || active.is_empty()),
    };
    if complete {
        let message = "Reached expected number of succeeded pods";
        set_condition(status, "SuccessCriteriaMet", true, "CompletionsReached", message, now);
    }
}
