//! HorizontalPodAutoscaler: sets the number of replicas by what pods use.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::future::join_all;
use k8s_openapi::api::{
    autoscaling::{
        v1::Scale,
        v2::{HorizontalPodAutoscaler, HorizontalPodAutoscalerStatus},
    },
    core::v1::Pod,
};
use kube::{
    Api,
    api::{DynamicObject, PostParams},
};
use parking_lot::Mutex;
use seawall_api::selector::LabelSelector;

use crate::{
    context::Context,
    replica_set::plain,
    runtime::{
        Controller, Key, Queue, Recorder,
        events::Severity,
        objects::{namespace, uid},
    },
};

pub mod behavior;
pub mod metric;
mod plan;
#[cfg(test)]
mod plan_tests;
mod read;
pub mod replicas;
#[cfg(test)]
mod simulated;

use behavior::Memory;
use metric::Reading;
pub use plan::{Input, Plan, plan};

/// How often each autoscaler is looked at (upstream's `--horizontal-pod-autoscaler-sync-period`).
const PERIOD: Duration = Duration::from_secs(15);

pub(crate) struct Autoscalers {
    context: Arc<Context>,
    recorder: Recorder,
    /// By uid.
    memories: Mutex<HashMap<String, Memory>>,
    /// Which pods each is about.
    selectors: Mutex<BTreeMap<Key, LabelSelector>>,
}

fn is_selected(selector: &LabelSelector, pod: &Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    selector.matches(|key| labels.and_then(|labels| labels.get(key)).map(String::as_str))
}

/// Others that are about some of the same pods: two that pull in different directions come to no rest.
fn rivals<'a>(selectors: &'a BTreeMap<Key, LabelSelector>, key: &Key, pods: &[Arc<Pod>]) -> Vec<&'a Key> {
    let others = selectors.iter().filter(|(other, _)| *other != key && other.namespace == key.namespace);
    others.filter(|(_, selector)| pods.iter().any(|pod| is_selected(selector, pod))).map(|(other, _)| other).collect()
}

impl Autoscalers {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.autoscalers.on_change(move |old, new| {
            // Its own status is no reason to look again before the time has come.
            let spec = |autoscaler: Option<&Arc<HorizontalPodAutoscaler>>| autoscaler.map(|a| a.spec.clone());
            if spec(old) != spec(new)
                && let Some(autoscaler) = new.or(old)
            {
                q.add(Key::of(&**autoscaler));
            }
        });
        let recorder = context.recorder.as_source("horizontal-pod-autoscaler");
        (Arc::new(Autoscalers { context, recorder, memories: Mutex::default(), selectors: Mutex::default() }), queue)
    }

    async fn scale(&self, autoscaler: &HorizontalPodAutoscaler) -> Result<(Api<DynamicObject>, Scale), String> {
        let target = &autoscaler.spec.scale_target_ref;
        let resource = read::resource(&self.context.client, target).await?;
        let api = read::scaled(&self.context.client, namespace(autoscaler), &resource);
        let scale = api.get_scale(&target.name).await.map_err(|error| plain(&error))?;
        Ok((api, scale))
    }

    async fn write(
        &self,
        autoscaler: &HorizontalPodAutoscaler,
        status: HorizontalPodAutoscalerStatus,
    ) -> anyhow::Result<()> {
        if autoscaler.status.as_ref() != Some(&status) {
            let updated = HorizontalPodAutoscaler { status: Some(status), ..autoscaler.clone() };
            self.context.replace_status(&self.context.caches.autoscalers, &updated).await?;
        }
        Ok(())
    }

    fn warn(&self, autoscaler: &HorizontalPodAutoscaler, reason: &str, message: impl Into<String>) {
        self.recorder.record(autoscaler, Severity::Warning, reason, message);
    }

    /// Says why nothing can be done, in an event and in a condition.
    async fn unable(
        &self,
        autoscaler: &HorizontalPodAutoscaler,
        (type_, reason): (&str, &str),
        event: &str,
        message: &str,
    ) -> anyhow::Result<()> {
        self.warn(autoscaler, reason, event);
        let mut status = plan::status_of(autoscaler);
        plan::set(&mut status, type_, false, reason, message, self.context.now());
        self.write(autoscaler, status).await
    }

    async fn readings(&self, autoscaler: &HorizontalPodAutoscaler, selector: &str) -> Vec<Result<Reading, String>> {
        let metrics = autoscaler.spec.metrics.iter().flatten();
        join_all(metrics.map(|spec| read::read(&self.context.client, namespace(autoscaler), selector, spec))).await
    }

    /// Carries a plan out.
    async fn apply(
        &self,
        autoscaler: &HorizontalPodAutoscaler,
        api: &Api<DynamicObject>,
        mut scale: Scale,
        mut plan: Plan,
    ) -> anyhow::Result<()> {
        if let Some(failure) = &plan.failure {
            self.warn(autoscaler, "FailedComputeMetricsReplicas", failure.clone());
        }
        if let Some((replicas, why)) = &plan.rescale {
            let current = scale.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
            scale.spec.get_or_insert_default().replicas = Some(*replicas);
            let name = &autoscaler.spec.scale_target_ref.name;
            // The version of what was read goes along: whoever changed the number meanwhile is not overruled by old news.
            match api.replace_scale(name, &PostParams::default(), &scale).await {
                Ok(_) => {
                    let mut memories = self.memories.lock();
                    let memory = memories.entry(uid(autoscaler).to_owned()).or_default();
                    memory.scaled(current, *replicas, self.context.now());
                    let message = format!("New size: {replicas}; reason: {why}");
                    self.recorder.record(autoscaler, Severity::Normal, "SuccessfulRescale", message);
                }
                Err(error) => {
                    let error = plain(&error);
                    self.warn(
                        autoscaler,
                        "FailedRescale",
                        format!("New size: {replicas}; reason: {why}; error: {error}"),
                    );
                    let message = format!("the HPA controller was unable to update the target scale: {error}");
                    plan.status.last_scale_time = autoscaler.status.as_ref().and_then(|s| s.last_scale_time.clone());
                    plan::set(
                        &mut plan.status,
                        "AbleToScale",
                        false,
                        "FailedUpdateScale",
                        &message,
                        self.context.now(),
                    );
                }
            }
        }
        self.write(autoscaler, plan.status).await
    }
}

#[async_trait]
impl Controller for Autoscalers {
    fn name(&self) -> &'static str {
        "horizontalpodautoscaler"
    }

    async fn ready(&self) {
        self.context.caches.autoscalers.synced().await;
        self.context.caches.pods.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let Some(autoscaler) = caches.autoscalers.get(key) else {
            self.selectors.lock().remove(key);
            let there = caches.autoscalers.all();
            self.memories.lock().retain(|id, _| there.iter().any(|a| uid(&**a) == id));
            return Ok(None);
        };
        let (api, scale) = match self.scale(&autoscaler).await {
            Ok(found) => found,
            Err(why) => {
                let message = format!("the HPA controller was unable to get the target's current scale: {why}");
                self.unable(&autoscaler, ("AbleToScale", "FailedGetScale"), &why, &message).await?;
                return Ok(Some(PERIOD));
            }
        };
        let text = scale.status.as_ref().and_then(|status| status.selector.clone()).unwrap_or_default();
        let selector = match LabelSelector::parse(&text) {
            Ok(selector) if !selector.is_empty() => selector,
            _ => {
                let message = "the HPA target's scale is missing a selector";
                self.unable(&autoscaler, ("ScalingActive", "InvalidSelector"), message, message).await?;
                return Ok(Some(PERIOD));
            }
        };
        let mut pods = caches.pods.in_namespace(&key.namespace);
        pods.retain(|pod| is_selected(&selector, pod));
        let rivals = {
            let mut selectors = self.selectors.lock();
            selectors.insert(key.clone(), selector);
            let rivals: Vec<String> = rivals(&selectors, key, &pods).into_iter().map(Key::to_string).collect();
            rivals.join(", ")
        };
        if !rivals.is_empty() {
            let message = format!("pods by selector {text} are controlled by multiple HPAs: {key}, {rivals}");
            self.unable(&autoscaler, ("ScalingActive", "AmbiguousSelector"), &message, &message).await?;
            return Ok(Some(PERIOD));
        }
        let readings = self.readings(&autoscaler, &text).await;
        let plan = {
            let mut memories = self.memories.lock();
            let memory = memories.entry(uid(&*autoscaler).to_owned()).or_default();
            let input = Input {
                autoscaler: &autoscaler,
                scale: &scale,
                pods: &pods,
                readings: &readings,
                now: self.context.now(),
            };
            plan(&input, memory)
        };
        self.apply(&autoscaler, &api, scale, plan).await?;
        Ok(Some(PERIOD))
    }
}
