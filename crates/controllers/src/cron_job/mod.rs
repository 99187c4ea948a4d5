//! CronJob: makes Jobs when their time comes.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::batch::v1::{CronJob, CronJobStatus, Job};
use kube::api::{DeleteParams, PropagationPolicy};

use crate::{
    context::Context,
    replica_set::plain,
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        follow_owned, namespace_is_terminating,
        objects::{controller_of, is_deleting, name, namespace, uid},
    },
};

mod plan;
mod schedule;

pub use plan::{Note, Plan, plan};
pub use schedule::Calendar;

pub(crate) struct CronJobs {
    context: Arc<Context>,
    recorder: Recorder,
}

impl CronJobs {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        let q = queue.clone();
        caches.cron_jobs.on_change(move |old, new| {
            if let Some(cron) = new.or(old) {
                q.add(Key::of(&**cron));
            }
        });
        // Jobs are made by it and never adopted.
        follow_owned(&caches.jobs, &caches.cron_jobs, "CronJob", |_, _| false, &queue);
        let recorder = context.recorder.as_source("cronjob-controller");
        (Arc::new(CronJobs { context, recorder }), queue)
    }

    /// Which of the Jobs that the status names and the cache does not have are gone. The cache may be behind; the API server
    /// is not.
    async fn gone(&self, cron: &CronJob, jobs: &[Arc<Job>]) -> anyhow::Result<BTreeSet<String>> {
        let mut gone = BTreeSet::new();
        let api = self.context.api::<Job>(namespace(cron));
        for reference in plan::missing(cron, jobs) {
            let live = api.get_opt(reference.name.as_deref().unwrap_or_default()).await?;
            if let Some(id) = reference.uid.filter(|id| live.as_ref().map(uid) != Some(id)) {
                gone.insert(id);
            }
        }
        Ok(gone)
    }

    async fn delete(&self, cron: &CronJob, job: &Job) -> anyhow::Result<()> {
        let policy = Some(PropagationPolicy::Background);
        let params = DeleteParams { propagation_policy: policy, ..DeleteParams::default() };
        match self.context.delete(&self.context.caches.jobs, job, params).await {
            Ok(()) => {
                let message = format!("Deleted job {}", name(job));
                self.recorder.record(cron, Severity::Normal, "SuccessfulDelete", message);
                Ok(())
            }
            Err(error) => {
                let message = format!("Deleted job: {}", plain(&error));
                self.recorder.record(cron, Severity::Warning, "FailedDelete", message);
                Err(error.into())
            }
        }
    }

    /// Makes the Job whose time has come. It may be there already, if what was to be noted then has been lost. None if there is
    /// nothing to note.
    async fn create(&self, cron: &CronJob, job: &Job) -> anyhow::Result<Option<Job>> {
        let cache = &self.context.caches.jobs;
        match self.context.create(cache, namespace(cron), job).await {
            Ok(created) => {
                let message = format!("Created job {}", name(&created));
                self.recorder.record(cron, Severity::Normal, "SuccessfulCreate", message);
                Ok(Some(created))
            }
            Err(kube::Error::Api(answer)) if answer.is_already_exists() => {
                let there = self.context.api::<Job>(namespace(cron)).get(name(job)).await?;
                let ours = controller_of(&there).is_some_and(|owner| owner.uid == uid(cron));
                cache.note(there.clone());
                Ok(ours.then_some(there))
            }
            Err(error) if namespace_is_terminating(&error) => Ok(None),
            Err(error) => {
                let message = format!("Error creating job: {}", plain(&error));
                self.recorder.record(cron, Severity::Warning, "FailedCreate", message);
                Err(error.into())
            }
        }
    }

    async fn write(&self, cron: &CronJob, status: CronJobStatus) -> anyhow::Result<()> {
        if cron.status.as_ref() != Some(&status) {
            let updated = CronJob { status: Some(status), ..cron.clone() };
            self.context.replace_status(&self.context.caches.cron_jobs, &updated).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Controller for CronJobs {
    fn name(&self) -> &'static str {
        "cronjob"
    }

    async fn ready(&self) {
        self.context.caches.cron_jobs.synced().await;
        self.context.caches.jobs.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let Some(cron) = caches.cron_jobs.get(key) else { return Ok(None) };
        let jobs = caches.jobs.controlled_by(uid(&*cron));
        let gone = self.gone(&cron, &jobs).await?;
        let plan = plan(&cron, &jobs, &gone, self.context.now());
        for (severity, reason, message) in plan.notes {
            self.recorder.record(&*cron, severity, reason, message);
        }
        for job in &plan.delete {
            self.delete(&cron, job).await?;
        }
        let mut status = plan.status;
        if let (Some(job), Some(at)) = (plan.create, plan.scheduled) {
            match self.create(&cron, &job).await {
                // One that is over already need not be waited for.
                Ok(Some(job)) if plan::ended(&job).is_none() && !is_deleting(&job) => {
                    plan::started(&mut status, &job, at)
                }
                Ok(Some(_)) => {
                    status.last_schedule_time = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at))
                }
                Ok(None) => {}
                Err(error) => {
                    self.write(&cron, status).await?;
                    return Err(error);
                }
            }
        }
        self.write(&cron, status).await?;
        Ok(plan.again)
    }
}

#[cfg(test)]
mod simulated;
#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
