//! Tokens of service accounts in Secrets that Kubernetes once made by itself, and that nobody has used for long, are marked
//! and later deleted (KEP-2799,
//! <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#legacy-serviceaccount-token-cleaner>).
//!
//! Seawall makes none; a cluster that came from elsewhere has them. When one was last used the API server writes on it.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp, civil::Date, tz::TimeZone};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, ServiceAccount};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::json;

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue, is_not_found,
        objects::{is_deleting, name, namespace, uid},
    },
};

const TYPE: &str = "kubernetes.io/service-account-token";
const ACCOUNT: &str = "kubernetes.io/service-account.name";
const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
const LAST_USED: &str = "kubernetes.io/legacy-token-last-used";
const INVALID_SINCE: &str = "kubernetes.io/legacy-token-invalid-since";
const TRACKING: &str = "kube-apiserver-legacy-service-account-token-tracking";
/// As upstream, which counts days.
const EVERY: Duration = Duration::from_secs(86_400);
const DAY: SignedDuration = SignedDuration::from_hours(24);

/// What to do with a Secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing.
    Keep,
    /// Mark it: from now on its token is refused.
    Mark,
    /// It has been marked for long, and nobody has taken the mark away.
    Delete,
}

fn day(time: Timestamp) -> Date {
    time.to_zoned(TimeZone::UTC).date()
}

/// Decides. `account` is the service account of that name, if there is one; `since`, the day since which uses are
/// written down; `period`, how long a token may lie unused (`--legacy-service-account-token-clean-up-period`).
pub fn plan(
    secret: &Secret,
    account: Option<&ServiceAccount>,
    mounted: bool,
    since: Date,
    now: Timestamp,
    period: SignedDuration,
) -> Plan {
    let label = |name: &str| secret.metadata.labels.as_ref().and_then(|labels| labels.get(name));
    let annotation = |name: &str| secret.metadata.annotations.as_ref().and_then(|all| all.get(name));
    // Uses are written down from the day after on, whatever the hour was.
    let tracked = since.to_zoned(TimeZone::UTC).map(|start| start.timestamp() + DAY);
    if !tracked.is_ok_and(|tracked| now >= tracked + period) {
        return Plan::Keep;
    }
    let long_ago = now - period;
    let old = secret.metadata.creation_timestamp.as_ref().is_none_or(|made| made.0 < long_ago);
    let unused = match label(LAST_USED).map(|text| text.parse::<Date>()) {
        None => true,
        Some(Ok(used)) => used < day(long_ago),
        // Who knows.
        Some(Err(_)) => false,
    };
    let made_by_itself = account.is_some_and(|account| {
        let this = annotation(ACCOUNT_UID).is_none_or(|wanted| *wanted == uid(account));
        this && account.secrets.iter().flatten().any(|reference| reference.name.as_deref() == Some(name(secret)))
    });
    if secret.type_.as_deref() != Some(TYPE) || is_deleting(secret) || !old || !unused || mounted || !made_by_itself {
        return Plan::Keep;
    }
    match label(INVALID_SINCE).and_then(|text| text.parse::<Date>().ok()) {
        None => Plan::Mark,
        Some(marked) if marked < day(long_ago) => Plan::Delete,
        Some(_) => Plan::Keep,
    }
}

/// Whether a pod mounts a Secret of its namespace.
fn mounts(pod: &Pod, secret: &str) -> bool {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mut names = volumes.filter_map(|volume| volume.secret.as_ref()?.secret_name.as_deref());
    names.any(|name| name == secret)
}

pub(crate) struct LegacyTokens {
    context: Arc<Context>,
}

impl LegacyTokens {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.legacy_tokens.on_change(move |_, new| {
            if let Some(secret) = new {
                q.add(Key::of(&**secret));
            }
        });
        (Arc::new(LegacyTokens { context }), queue)
    }
}

#[async_trait]
impl Controller for LegacyTokens {
    fn name(&self) -> &'static str {
        "legacytoken"
    }

    async fn ready(&self) {
        self.context.caches.legacy_tokens.synced().await;
        self.context.caches.pods.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let context = &self.context;
        let Some(secret) = context.caches.legacy_tokens.get(key) else { return Ok(None) };
        let Some(account) = secret.metadata.annotations.as_ref().and_then(|all| all.get(ACCOUNT)) else {
            return Ok(None);
        };
        let tracking = context.api::<ConfigMap>("kube-system").get_opt(TRACKING).await?;
        let since = tracking.as_ref().and_then(|map| map.data.as_ref()?.get("since")?.parse::<Date>().ok());
        let Some(since) = since else { return Ok(Some(EVERY)) };
        let account = context.api::<ServiceAccount>(namespace(&*secret)).get_opt(account).await?;
        let pods = context.caches.pods.in_namespace(namespace(&*secret));
        let mounted = pods.iter().any(|pod| mounts(pod, name(&*secret)));
        let (now, period) = (context.now(), context.config.legacy_token_period);
        let api = context.api::<Secret>(namespace(&*secret));
        let done = match plan(&secret, account.as_ref(), mounted, since, now, period) {
            Plan::Keep => return Ok(Some(EVERY)),
            Plan::Mark => {
                tracing::info!(secret = %key, "a token that was not used for long is refused from now on");
                let version = &secret.metadata.resource_version;
                let patch = json!({"metadata": {"uid": secret.metadata.uid, "resourceVersion": version,
                    "labels": {INVALID_SINCE: day(now).to_string()}}});
                api.patch_metadata(name(&*secret), &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
            }
            Plan::Delete => {
                tracing::info!(secret = %key, "a token that was not used for long is deleted");
                let exactly = Preconditions {
                    uid: secret.metadata.uid.clone(),
                    resource_version: secret.metadata.resource_version.clone(),
                };
                let params = DeleteParams { preconditions: Some(exactly), ..Default::default() };
                api.delete(name(&*secret), &params).await.map(drop)
            }
        };
        match done {
            Err(error) if !is_not_found(&error) => Err(error.into()),
            _ => Ok(Some(EVERY)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::simulation::{Simulation, by_seed};

    #[test]
    fn tokens_that_nobody_uses() {
        let check = |change: &dyn Fn(&mut Value), days: i64, expect: Plan, why: &str| {
            let mut all = json!({"mounted": false, "since": "2026-01-01",
                "secret": {"type": TYPE, "metadata": {"name": "robot-token-x", "creationTimestamp": "2020-01-01T00:00:00Z",
                    "labels": {}, "annotations": {ACCOUNT: "robot", ACCOUNT_UID: "u"}}},
                "account": {"metadata": {"name": "robot", "uid": "u"}, "secrets": [{"name": "robot-token-x"}]}});
            change(&mut all);
            let read = |name: &str| all[name].clone();
            let secret: Secret = serde_json::from_value(read("secret")).unwrap();
            let account: Option<ServiceAccount> = serde_json::from_value(read("account")).unwrap();
            let since = all["since"].as_str().unwrap().parse().unwrap();
            let now = "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap() + DAY * (days as i32);
            let plan = plan(&secret, account.as_ref(), all["mounted"] == true, since, now, DAY * 30);
            assert_eq!(plan, expect, "{why}, on day {days}");
        };
        fn labels(all: &mut Value) -> &mut Value {
            &mut all["secret"]["metadata"]["labels"]
        }
        check(&|_| (), 30, Plan::Keep, "nobody knows yet what was used");
        check(&|_| (), 31, Plan::Mark, "not used since uses are written down");
        check(&|all| labels(all)[LAST_USED] = "2026-02-01".into(), 61, Plan::Keep, "used a month ago");
        check(&|all| labels(all)[LAST_USED] = "2026-02-01".into(), 62, Plan::Mark, "used longer ago");
        check(&|all| labels(all)[LAST_USED] = "yesterday".into(), 99, Plan::Keep, "used, nobody knows when");
        check(&|all| labels(all)[INVALID_SINCE] = "2026-02-01".into(), 61, Plan::Keep, "marked a month ago");
        check(&|all| labels(all)[INVALID_SINCE] = "2026-02-01".into(), 62, Plan::Delete, "marked longer ago");
        check(&|all| labels(all)[INVALID_SINCE] = "x".into(), 62, Plan::Mark, "marked, nobody knows when");
        let created = |all: &mut Value| all["secret"]["metadata"]["creationTimestamp"] = "2026-02-01T12:00:00Z".into();
        check(&created, 61, Plan::Keep, "a new one");
        check(&created, 62, Plan::Mark, "one that was new");
        check(&|all| all["mounted"] = true.into(), 99, Plan::Keep, "a pod has it");
        check(&|all| all["account"]["secrets"] = json!([]), 99, Plan::Keep, "somebody has asked for it");
        check(&|all| all["account"] = Value::Null, 99, Plan::Keep, "its account is gone: so is it, soon");
        check(&|all| all["account"]["metadata"]["uid"] = "v".into(), 99, Plan::Keep, "the token of a former account");
        check(&|all| all["secret"]["type"] = "Opaque".into(), 99, Plan::Keep, "no token");
        let going = |all: &mut Value| all["secret"]["metadata"]["deletionTimestamp"] = "2026-02-01T12:00:00Z".into();
        check(&going, 99, Plan::Keep, "it goes already");
    }

    #[test]
    fn a_pod_that_mounts_it() {
        let pod = json!({"metadata": {}, "spec": {"containers": [], "volumes": [
            {"name": "a", "emptyDir": {}}, {"name": "b", "secret": {"secretName": "robot"}}]}});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        assert!(mounts(&pod, "robot"));
        assert!(!mounts(&pod, "b"));
    }

    #[test]
    fn two_years_of_days() {
        by_seed(4, async |seed| {
            let mut simulation = Simulation::new(seed, LegacyTokens::start);
            let meta = |name: &str| json!({"name": name, "namespace": "n"});
            let tracking = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"since": "2026-01-01"},
                "metadata": {"name": TRACKING, "namespace": "kube-system"}});
            simulation.create(tracking);
            let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta("robot"),
                "secrets": [{"name": "unused"}, {"name": "used"}, {"name": "freed"}]});
            simulation.create(account);
            for name in ["unused", "used", "freed", "wanted"] {
                let mut secret = json!({"apiVersion": "v1", "kind": "Secret", "type": TYPE, "metadata": meta(name)});
                secret["metadata"]["annotations"] = json!({ACCOUNT: "robot"});
                simulation.create(secret);
            }
            let label = |simulation: &Simulation, name: &str, label: &str, value: Option<&str>| {
                simulation.world.lock().edit("secrets", name, |secret| {
                    let labels = &mut secret["metadata"]["labels"];
                    match value {
                        Some(value) => labels[label] = value.into(),
                        None => drop(labels.as_object_mut().map(|labels| labels.remove(label))),
                    }
                });
            };
            let names = |simulation: &Simulation, marked: bool| -> Vec<String> {
                let secrets = simulation.world.lock().all("secrets");
                let marked = secrets.iter().filter(|s| s["metadata"]["labels"][INVALID_SINCE].is_string() == marked);
                marked.map(|secret| secret["metadata"]["name"].as_str().unwrap().to_owned()).collect()
            };
            for passed in (4..750).step_by(4) {
                simulation.pass_time(4 * 86_400).await;
                let today = day(simulation.world.lock().now).to_string();
                label(&simulation, "used", LAST_USED, Some(&today));
                if passed == 400 {
                    // Somebody misses it.
                    label(&simulation, "freed", INVALID_SINCE, None);
                    label(&simulation, "freed", LAST_USED, Some(&today));
                }
                simulation.random(10, |_, _| (), |_| ()).await;
                simulation.settle(|_, _| (), |_| true).await;
                match passed {
                    360 => assert!(names(&simulation, true).is_empty()),
                    380 => assert_eq!(names(&simulation, true), ["freed", "unused"]),
                    400..=725 => assert_eq!(names(&simulation, true), ["unused"], "on day {passed}"),
                    _ => {}
                }
            }
            assert_eq!((names(&simulation, true), names(&simulation, false).len()), (vec![], 3), "one is deleted");
        });
    }
}
