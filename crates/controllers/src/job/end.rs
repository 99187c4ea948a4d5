//! Whether a Job is to end, and why (<https://kubernetes.io/docs/concepts/workloads/controllers/job/#terminal-job-conditions>).

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::batch::v1::{Job, JobCondition, JobSpec, JobStatus},
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::{
    plan::Count,
    policy::{self, Verdict, judge},
};
use crate::{context::delay, runtime::objects::is_deleting};

/// That the Job is to end, and will have succeeded.
pub const SUCCESS: &str = "SuccessCriteriaMet";
/// That the Job is to end, and will have failed.
pub const FAILURE: &str = "FailureTarget";

/// The condition of this type, if it is true.
pub fn condition<'a>(status: &'a JobStatus, type_: &str) -> Option<&'a JobCondition> {
    status.conditions.iter().flatten().find(|c| c.type_ == type_ && c.status == "True")
}

pub(super) fn set_condition(
    status: &mut JobStatus,
    type_: &str,
    value: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
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

/// Whether a Job that has ended has outlived its time after that (KEP-592); and if not, what is left of it.
pub fn expired(job: &Job, now: Timestamp) -> Result<bool, Duration> {
    let (Some(spec), Some(status)) = (&job.spec, &job.status) else { return Ok(false) };
    let Some(end) = condition(status, "Complete").or_else(|| condition(status, "Failed")) else { return Ok(false) };
    let Some(ttl) = spec.ttl_seconds_after_finished else { return Ok(false) };
    let at = end.last_transition_time.as_ref().map_or(now, |t| t.0);
    let left = SignedDuration::from_secs(ttl.into()) - now.duration_since(at);
    if left.is_positive() { Err(delay(left)) } else { Ok(!is_deleting(job)) }
}

/// Why a Job is to end.
pub(super) struct Cause {
    pub type_: &'static str,
    pub reason: &'static str,
    pub message: String,
}

fn failure(reason: &'static str, message: impl Into<String>) -> Option<Cause> {
    Some(Cause { type_: FAILURE, reason, message: message.into() })
}

/// Whether the Job is to end. `deadline` is what is left of its time.
pub(super) fn cause(spec: &JobSpec, count: &Count<'_>, deadline: Option<SignedDuration>) -> Option<Cause> {
    by_policy(spec, count)
        .or_else(|| by_limit(spec, count))
        .or_else(|| {
            let over = deadline.is_some_and(|left| !left.is_positive());
            over.then(|| failure("DeadlineExceeded", "Job was active longer than specified deadline")).flatten()
        })
        .or_else(|| by_indexes(spec, count))
        .or_else(|| by_success(spec, count))
}

/// A pod has failed in a way that is said to fail the Job.
fn by_policy(spec: &JobSpec, count: &Count<'_>) -> Option<Cause> {
    let policy = spec.pod_failure_policy.as_ref()?;
    let messages = count.new_failures.iter().filter_map(|pod| match judge(Some(policy), pod) {
        Verdict::FailJob(message) => Some(message),
        _ => None,
    });
    messages.min().and_then(|message| failure("PodFailurePolicy", message))
}

/// Pods, or their containers, have failed too often.
fn by_limit(spec: &JobSpec, count: &Count<'_>) -> Option<Cause> {
    let limit = spec.backoff_limit.unwrap_or(6);
    let restarts: i32 = match spec.template.spec.as_ref().and_then(|s| s.restart_policy.as_deref()) {
        Some("OnFailure") => count
            .active
            .iter()
            .filter_map(|pod| pod.status.as_ref())
            .flat_map(|s| s.init_container_statuses.iter().flatten().chain(s.container_statuses.iter().flatten()))
            .map(|s| s.restart_count)
            .sum(),
        _ => 0,
    };
    let exceeded = count.failed > limit || (restarts > 0 && restarts >= limit);
    exceeded.then(|| failure("BackoffLimitExceeded", "Job has reached the specified backoff limit")).flatten()
}

/// Too many indexes have failed, or all others have succeeded (KEP-3850).
fn by_indexes(spec: &JobSpec, count: &Count<'_>) -> Option<Cause> {
    spec.backoff_limit_per_index?;
    let failed = count.failed_indexes.len();
    if spec.max_failed_indexes.is_some_and(|most| failed > usize::try_from(most).unwrap_or(0)) {
        let message = "Job has exceeded the specified maximal number of failed indexes";
        return failure("MaxFailedIndexesExceeded", message);
    }
    let all = usize::try_from(spec.completions.unwrap_or(0)).unwrap_or(0);
    let over = failed > 0 && failed + count.completed.len() >= all;
    over.then(|| failure("FailedIndexes", "Job has failed indexes")).flatten()
}

fn by_success(spec: &JobSpec, count: &Count<'_>) -> Option<Cause> {
    let completions = spec.completions.unwrap_or(0);
    if let Some(message) = policy::is_met(spec.success_policy.as_ref(), completions, &count.completed) {
        return Some(Cause { type_: SUCCESS, reason: "SuccessPolicy", message });
    }
    let complete = match spec.completions {
        None => count.succeeded > 0 && count.active.is_empty(),
        Some(completions) => count.succeeded >= completions && (completions > 0 || count.active.is_empty()),
    };
    let message = "Reached expected number of succeeded pods".to_owned();
    complete.then_some(Cause { type_: SUCCESS, reason: "CompletionsReached", message })
}
