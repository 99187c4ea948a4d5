//! What to do next for a CronJob (<https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/>), without any I/O.
//!
//! A Job's name follows from the time that it is for, so that none is ever made twice for one time, whatever is forgotten in
//! between.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use k8s_openapi::{
    api::{
        batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job},
        core::v1::ObjectReference,
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::Resource;
use seawall_api::cron;

use super::schedule::Calendar;
use crate::{
    context::delay,
    runtime::{
        events::Severity,
        objects::{controller_reference, created, is_deleting, name, namespace, uid},
    },
};

/// The time that a Job is for (<https://kubernetes.io/docs/reference/labels-annotations-taints/>).
const SCHEDULED: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// More missed times than this are said to be too many.
const MANY: i64 = 100;
/// So much after its time a Job is made, so that a clock that is a little behind does not find that it is not time yet.
const AFTER: SignedDuration = SignedDuration::from_millis(100);

/// Something to tell: how bad it is, the reason, the message.
pub type Note = (Severity, &'static str, String);

/// What to do.
#[derive(Debug, Default)]
pub struct Plan {
    /// Jobs to delete: those that make way, and those that history need not keep.
    pub delete: Vec<Arc<Job>>,
    /// The Job whose time has come.
    pub create: Option<Box<Job>>,
    /// The time that it is for.
    pub scheduled: Option<Timestamp>,
    /// The status, but for the Job that is created.
    pub status: CronJobStatus,
    /// What to tell.
    pub notes: Vec<Note>,
    /// When the next Job is due.
    pub again: Option<Duration>,
}

/// How a Job has ended: the type of the condition that says so.
pub(super) fn ended(job: &Job) -> Option<&str> {
    let mut conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let is_end = |type_: &str| type_ == "Complete" || type_ == "Failed";
    conditions.find(|c| is_end(&c.type_) && c.status == "True").map(|c| c.type_.as_str())
}

/// The Jobs that the status names and that are not among `jobs`. Whether they are gone has to be asked.
pub(super) fn missing(cron: &CronJob, jobs: &[Arc<Job>]) -> Vec<ObjectReference> {
    let active = cron.status.iter().flat_map(|status| status.active.iter().flatten());
    active.filter(|r| !jobs.iter().any(|job| r.uid.as_deref() == Some(uid(&**job)))).cloned().collect()
}

/// The reference by which the status names a Job.
pub(super) fn reference(job: &Job) -> ObjectReference {
    ObjectReference {
        api_version: Some(Job::api_version(&()).into_owned()),
        kind: Some(Job::kind(&()).into_owned()),
        namespace: job.metadata.namespace.clone(),
        name: job.metadata.name.clone(),
        uid: job.metadata.uid.clone(),
        resource_version: job.metadata.resource_version.clone(),
        field_path: None,
    }
}

/// Decides. `jobs` are those that the CronJob controls; `gone` are uids of Jobs of which the API server says that they are no
/// more.
pub fn plan(cron: &CronJob, jobs: &[Arc<Job>], gone: &BTreeSet<String>, now: Timestamp) -> Plan {
    let spec = &cron.spec;
    let mut plan = Plan { status: cron.status.clone().unwrap_or_default(), ..Plan::default() };
    take_stock(&mut plan, jobs, gone);
    history(&mut plan, spec, jobs);
    if !is_deleting(cron) && spec.suspend != Some(true) {
        match calendar(spec) {
            Ok(calendar) => schedule(&mut plan, cron, spec, jobs, &calendar, now),
            Err(note) => plan.notes.push(note),
        }
    }
    plan.status.active = plan.status.active.take().filter(|list| !list.is_empty());
    plan
}

fn calendar(spec: &CronJobSpec) -> Result<Calendar, Note> {
    let name = spec.time_zone.as_deref().unwrap_or_default();
    let zone = cron::zone(name)
        .map_err(|why| (Severity::Warning, "UnknownTimeZone", format!("invalid timeZone: {name:?}: {why}")))?;
    Calendar::read(&spec.schedule, zone).map_err(|why| {
        (Severity::Warning, "UnparseableSchedule", format!("unparseable schedule: {:?} : {why}", spec.schedule))
    })
}

/// Says in the status which Jobs run, and when one succeeded last.
fn take_stock(plan: &mut Plan, jobs: &[Arc<Job>], gone: &BTreeSet<String>) {
    let active = plan.status.active.get_or_insert_default();
    let known = |active: &[ObjectReference], job: &Job| active.iter().any(|r| r.uid.as_deref() == Some(uid(job)));
    for job in jobs {
        match (known(active, job), ended(job)) {
            (false, None) => {
                let message = format!("Saw a job that the controller did not create or forgot: {}", name(&**job));
                plan.notes.push((Severity::Warning, "UnexpectedJob", message));
            }
            (true, Some(end)) => {
                active.retain(|r| r.uid.as_deref() != Some(uid(&**job)));
                let message = format!("Saw completed job: {}, condition: {end}", name(&**job));
                plan.notes.push((Severity::Normal, "SawCompletedJob", message));
            }
            _ => {}
        }
        let done = job.status.as_ref().and_then(|status| status.completion_time.clone());
        if let Some(done) = done.filter(|_| ended(job) == Some("Complete"))
            && plan.status.last_successful_time.as_ref().is_none_or(|last| done.0 > last.0)
        {
            plan.status.last_successful_time = Some(done);
        }
    }
    active.retain(|reference| {
        let lost = reference.uid.as_ref().is_some_and(|uid| gone.contains(uid));
        if lost {
            let message = format!("Active job went missing: {}", reference.name.as_deref().unwrap_or_default());
            plan.notes.push((Severity::Normal, "MissingJob", message));
        }
        !lost
    });
}

/// Of those that have ended so and so, only the last are kept.
fn history(plan: &mut Plan, spec: &CronJobSpec, jobs: &[Arc<Job>]) {
    for (end, limit) in [("Complete", spec.successful_jobs_history_limit), ("Failed", spec.failed_jobs_history_limit)] {
        let Some(limit) = limit.and_then(|limit| usize::try_from(limit).ok()) else { continue };
        let mut list: Vec<&Arc<Job>> = jobs.iter().filter(|job| ended(job) == Some(end)).collect();
        let started = |job: &Job| job.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|t| t.0);
        list.sort_by_key(|job| (started(job).unwrap_or_else(|| created(&***job)), name(&***job).to_owned()));
        let surplus = list.len().saturating_sub(limit);
        let surplus = list.into_iter().take(surplus).filter(|job| !is_deleting(&***job));
        plan.delete.extend(surplus.cloned());
    }
}

/// The last time at or before now that is not dealt with, and whether there are too many such times.
#[derive(Debug, PartialEq, Eq)]
struct Due {
    at: Option<Timestamp>,
    many: bool,
    /// From when on times counted.
    since: Timestamp,
}

fn last(cron: &CronJob) -> Option<Timestamp> {
    cron.status.as_ref().and_then(|status| status.last_schedule_time.as_ref()).map(|t| t.0)
}

fn due(cron: &CronJob, calendar: &Calendar, now: Timestamp, deadline: Option<i64>) -> Result<Due, String> {
    let mut since = last(cron).unwrap_or_else(|| created(cron));
    if let Some(limit) = deadline.and_then(|seconds| now.checked_sub(SignedDuration::from_secs(seconds)).ok()) {
        since = since.max(limit);
    }
    let none = Due { at: None, many: false, since };
    let Some(first) = calendar.next(since).filter(|first| *first <= now) else { return Ok(none) };
    let Some(second) = calendar.next(first).filter(|second| *second <= now) else {
        return Ok(Due { at: Some(first), ..none });
    };
    let between = second.duration_since(first).as_secs();
    if between < 1 {
        return Err("time difference between two schedules is less than 1 second".into());
    }
    let missed = now.duration_since(first).as_secs() / between + 1;
    // Times are not looked at one by one when there may be very many. They need not be equally far apart: where the guess is
    // beyond the last of them, the search begins earlier.
    let mut ahead = (missed - 2) * between;
    let last = loop {
        let guess = first.checked_add(SignedDuration::from_secs(ahead)).unwrap_or(first);
        if let Some(found) = last_before(calendar, guess, now) {
            break found;
        }
        if ahead == 0 {
            break second;
        }
        ahead /= 2;
    };
    Ok(Due { at: Some(last), many: missed > MANY, since })
}

/// The last time after `from` and not after `now`.
fn last_before(calendar: &Calendar, from: Timestamp, now: Timestamp) -> Option<Timestamp> {
    let until_now = |at: Timestamp| calendar.next(at).filter(|next| *next <= now);
    std::iter::successors(until_now(from), |at| until_now(*at)).last()
}

/// When the next Job is due, as a delay.
fn wait(cron: &CronJob, calendar: &Calendar, now: Timestamp) -> Option<Duration> {
    let due = due(cron, calendar, now, None).ok()?;
    let next = calendar.next(due.at.unwrap_or(due.since))?;
    Some(delay(next.duration_since(now) + AFTER))
}

fn schedule(
    plan: &mut Plan,
    cron: &CronJob,
    spec: &CronJobSpec,
    jobs: &[Arc<Job>],
    calendar: &Calendar,
    now: Timestamp,
) {
    let due = match due(cron, calendar, now, spec.starting_deadline_seconds) {
        Ok(due) => due,
        Err(why) => {
            let message = format!("invalid schedule: {:?} : {why}", spec.schedule);
            return plan.notes.push((Severity::Warning, "InvalidSchedule", message));
        }
    };
    plan.again = wait(cron, calendar, now);
    if due.many {
        let message = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
        plan.notes.push((Severity::Warning, "TooManyMissedTimes", message.into()));
    }
    let Some(at) = due.at else { return };
    let deadline = spec.starting_deadline_seconds.map(SignedDuration::from_secs);
    if deadline.is_some_and(|deadline| now.duration_since(at) > deadline) {
        let when = at.to_zoned(calendar.zone.clone()).strftime("%a, %d %b %Y %H:%M:%S %z");
        let message = format!("Missed scheduled time to start a job: {when}");
        return plan.notes.push((Severity::Warning, "MissSchedule", message));
    }
    let job = make(cron, spec, at, &calendar.zone);
    let active = plan.status.active.get_or_insert_default();
    if active.iter().any(|r| r.name.as_deref() == Some(name(&job))) || last(cron) == Some(at) {
        return;
    }
    match spec.concurrency_policy.as_deref() {
        Some("Forbid") if !active.is_empty() => {
            let why = "Not starting job because prior execution is running and concurrency policy is Forbid";
            return plan.notes.push((Severity::Normal, "JobAlreadyActive", why.into()));
        }
        Some("Replace") => {
            let named = |job: &&Arc<Job>| active.iter().any(|r| r.uid.as_deref() == Some(uid(&***job)));
            plan.delete.extend(jobs.iter().filter(named).cloned());
            active.clear();
        }
        _ => {}
    }
    plan.scheduled = Some(at);
    plan.create = Some(Box::new(job));
}

/// The Job for a time.
fn make(cron: &CronJob, spec: &CronJobSpec, at: Timestamp, zone: &TimeZone) -> Job {
    let template = spec.job_template.clone();
    let meta = template.metadata.unwrap_or_default();
    let local = at.to_zoned(zone.clone());
    let when = match local.offset().is_zero() {
        true => local.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        false => local.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string(),
    };
    let mut annotations = meta.annotations.unwrap_or_default();
    annotations.insert(SCHEDULED.into(), when);
    Job {
        metadata: ObjectMeta {
            name: Some(format!("{}-{}", name(cron), at.as_second() / 60)),
            namespace: Some(namespace(cron).to_owned()),
            labels: meta.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![controller_reference(cron)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// Notes in a status that a Job has been started for a time.
pub(super) fn started(status: &mut CronJobStatus, job: &Job, at: Timestamp) {
    status.active.get_or_insert_default().push(reference(job));
    status.last_schedule_time = Some(Time(at));
}
