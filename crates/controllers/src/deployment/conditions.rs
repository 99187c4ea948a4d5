//! A deployment's status and conditions, with the reasons and messages that `kubectl rollout status` and people know.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet},
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::plan::{max_unavailable, wanted};
use crate::{context::delay, runtime::objects::name};

pub(super) const AVAILABLE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";

/// The deadline of progress. The largest number means none, as in upstream's `HasProgressDeadline`.
fn deadline(deployment: &Deployment) -> Option<i32> {
    deployment.spec.progress_deadline_seconds.filter(|seconds| *seconds != i32::MAX)
}

pub(super) fn has_deadline(deployment: &Deployment) -> bool {
    deadline(deployment).is_some()
}

fn get<'a>(status: &'a DeploymentStatus, type_: &str) -> Option<&'a DeploymentCondition> {
    status.conditions.as_ref()?.iter().find(|condition| condition.type_.as_deref() == Some(type_))
}

fn reason(condition: Option<&DeploymentCondition>) -> &str {
    condition.and_then(|c| c.reason.as_deref()).unwrap_or_default()
}

fn remove(status: &mut DeploymentStatus, type_: &str) {
    if let Some(conditions) = &mut status.conditions {
        conditions.retain(|condition| condition.type_.as_deref() != Some(type_));
        if conditions.is_empty() {
            status.conditions = None;
        }
    }
}

/// Sets a condition unless it says the same already.
pub(super) fn set(status: &mut DeploymentStatus, type_: &str, value: &str, why: &str, message: &str, now: Timestamp) {
    let current = get(status, type_);
    if current.is_some_and(|c| c.status.as_deref() == Some(value) && c.reason.as_deref() == Some(why)) {
        return;
    }
    let since = current.filter(|c| c.status.as_deref() == Some(value)).and_then(|c| c.last_transition_time.clone());
    remove(status, type_);
    status.conditions.get_or_insert_default().push(DeploymentCondition {
        type_: Some(type_.into()),
        status: Some(value.into()),
        reason: Some(why.into()),
        message: Some(message.into()),
        last_transition_time: Some(since.unwrap_or(Time(now))),
        last_update_time: Some(Time(now)),
    });
}

/// Counts, and says whether enough replicas are available.
pub(super) fn count(
    deployment: &Deployment,
    all: &[Arc<ReplicaSet>],
    newest: Option<&ReplicaSet>,
    now: Timestamp,
) -> DeploymentStatus {
    let sum = |field: fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> i32| -> i32 {
        all.iter().filter_map(|set| set.status.as_ref().map(field)).sum()
    };
    let asked: i32 = all.iter().map(|set| wanted_of(set)).sum();
    let available = sum(|s| s.available_replicas.unwrap_or(0));
    let old = deployment.status.clone().unwrap_or_default();
    let some = |number: i32| Some(number).filter(|n| *n > 0);
    let mut status = DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: some(sum(|s| s.replicas)),
        updated_replicas: some(newest.and_then(|set| set.status.as_ref()).map_or(0, |s| s.replicas)),
        ready_replicas: some(sum(|s| s.ready_replicas.unwrap_or(0))),
        available_replicas: some(available),
        unavailable_replicas: some(asked - available),
        terminating_replicas: Some(sum(|s| s.terminating_replicas.unwrap_or(0))),
        collision_count: old.collision_count,
        conditions: old.conditions,
    };
    if available >= wanted(deployment) - max_unavailable(deployment) {
        let message = "Deployment has minimum availability.";
        set(&mut status, "Available", "True", "MinimumReplicasAvailable", message, now);
    } else {
        let message = "Deployment does not have minimum availability.";
        set(&mut status, "Available", "False", "MinimumReplicasUnavailable", message, now);
    }
    status
}

fn wanted_of(set: &ReplicaSet) -> i32 {
    set.spec.replicas.unwrap_or(1)
}

/// Whether all replicas are of the newest template and available.
pub(super) fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = Some(wanted(deployment)).filter(|n| *n > 0);
    status.updated_replicas == wanted
        && status.replicas == wanted
        && status.available_replicas == wanted
        && status.observed_generation >= deployment.metadata.generation
}

/// Whether something has become better since the last status.
fn is_progressing(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let outdated = |s: &DeploymentStatus| s.replicas.unwrap_or(0) - s.updated_replicas.unwrap_or(0);
    new.updated_replicas > old.updated_replicas
        || outdated(new) < outdated(old)
        || new.ready_replicas > old.ready_replicas
        || new.available_replicas > old.available_replicas
}

/// When the deadline of progress passes, counted from the last progress; nothing if none is running.
fn due(deployment: &Deployment, condition: Option<&DeploymentCondition>) -> Option<Timestamp> {
    let condition = condition?;
    if matches!(reason(Some(condition)), AVAILABLE | TIMED_OUT) {
        return None;
    }
    let since = condition.last_update_time.as_ref()?.0;
    since.checked_add(SignedDuration::from_secs(deadline(deployment)?.into())).ok()
}

/// The status of a rollout, and when its deadline has to be looked at.
pub(super) fn rollout(
    deployment: &Deployment,
    all: &[Arc<ReplicaSet>],
    newest: Option<&ReplicaSet>,
    now: Timestamp,
) -> (DeploymentStatus, Option<Duration>) {
    let old = deployment.status.clone().unwrap_or_default();
    let mut status = count(deployment, all, newest, now);
    let subject = newest
        .map_or_else(|| format!("Deployment {:?}", name(deployment)), |set| format!("ReplicaSet {:?}", name(set)));
    let current = get(&old, "Progressing").cloned();
    let settled = status.replicas == status.updated_replicas && reason(current.as_ref()) == AVAILABLE;
    if !has_deadline(deployment) {
        remove(&mut status, "Progressing");
    } else if !settled {
        if is_complete(deployment, &status) {
            let message = format!("{subject} has successfully progressed.");
            set(&mut status, "Progressing", "True", AVAILABLE, &message, now);
        } else if is_progressing(&old, &status) {
            // Written anew even if it says the same: its time is from when the deadline counts.
            let since = current
                .as_ref()
                .filter(|c| c.status.as_deref() == Some("True"))
                .and_then(|c| c.last_transition_time.clone());
            remove(&mut status, "Progressing");
            set(&mut status, "Progressing", "True", "ReplicaSetUpdated", &format!("{subject} is progressing."), now);
            if let (Some(since), Some(conditions)) = (since, &mut status.conditions) {
                for condition in conditions.iter_mut().filter(|c| c.type_.as_deref() == Some("Progressing")) {
                    condition.last_transition_time = Some(since.clone());
                }
            }
        } else if due(deployment, current.as_ref()).is_some_and(|due| due < now) {
            let message = format!("{subject} has timed out progressing.");
            set(&mut status, "Progressing", "False", TIMED_OUT, &message, now);
        }
    }
    let newest_first = newest.into_iter().chain(all.iter().map(|set| &**set));
    let failure = newest_first
        .filter_map(|set| set.status.as_ref()?.conditions.as_ref())
        .flatten()
        .find(|condition| condition.type_.as_deref() == Some("ReplicaFailure"));
    match failure {
        Some(failure) => {
            let (why, message) = (failure.reason.clone(), failure.message.clone());
            set(
                &mut status,
                "ReplicaFailure",
                failure.status.as_deref().unwrap_or_default(),
                &why.unwrap_or_default(),
                &message.unwrap_or_default(),
                now,
            );
        }
        None => remove(&mut status, "ReplicaFailure"),
    }
    let again = due(deployment, get(&status, "Progressing"))
        .filter(|_| !is_complete(deployment, &status))
        // A second later, since the times in conditions are whole seconds.
        .map(|due| delay(due.duration_since(now)) + Duration::from_secs(1));
    (status, again)
}

/// While a deployment is paused no deadline runs.
pub(super) fn note_pause(deployment: &Deployment, status: &mut DeploymentStatus, now: Timestamp) {
    if !has_deadline(deployment) {
        return;
    }
    let current = get(status, "Progressing");
    if reason(current) == TIMED_OUT {
        return;
    }
    let noted = reason(current) == "DeploymentPaused";
    let paused = deployment.spec.paused.unwrap_or(false);
    if paused && !noted {
        set(status, "Progressing", "Unknown", "DeploymentPaused", "Deployment is paused", now);
    } else if !paused && noted {
        set(status, "Progressing", "Unknown", "DeploymentResumed", "Deployment is resumed", now);
    }
}

/// A replica set for the current template has been found or made.
pub(super) fn note_set(
    deployment: &Deployment,
    status: &mut DeploymentStatus,
    why: &str,
    message: &str,
    now: Timestamp,
) {
    if has_deadline(deployment) {
        set(status, "Progressing", "True", why, message, now);
    }
}

/// Whether the deployment has a condition about its progress.
pub(super) fn has_progressing(status: &DeploymentStatus) -> bool {
    get(status, "Progressing").is_some()
}
