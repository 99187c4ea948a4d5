//! ResourceQuota: counts what a namespace holds (<https://kubernetes.io/docs/concepts/policy/resource-quotas/>).
//!
//! The server itself takes from quotas and gives back, write by write. What is left to do here is the first count, a new
//! limit, and whatever a server that died in between has left behind.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::ResourceQuota;
use kube::{
    Api,
    api::{ApiResource, DynamicObject, ListParams},
    discovery,
};
use parking_lot::Mutex;
use seawall_api::{
    quantity::Quantity,
    quota::{Amounts, amounts, is_about, limited, resource_of, sum, usage, write},
};
use serde_json::{Value, json};

use crate::{
    context::Context,
    runtime::{Controller, Key, Queue, objects::is_deleting},
};

/// How often everything is counted anew (upstream's `--resource-quota-sync-period`).
const PERIOD: Duration = Duration::from_secs(300);
/// A count that differs from what the quota says must stay the same for this long before it is believed: between the
/// reservation and the write of an object, the count lacks what the quota already has.
const SETTLE: Duration = Duration::from_secs(3);

/// What to do about a quota whose namespace holds `counted`.
#[derive(Debug, PartialEq)]
pub enum Plan {
    /// It says what is so.
    Nothing,
    /// It has said nothing yet, or of other limits: write this status.
    Write(Value),
    /// It says something else: write this status if it still does in a while.
    Doubt(Value),
}

/// Decides.
pub fn plan(quota: &Value, counted: &Amounts) -> Plan {
    let hard = amounts(&quota["spec"]["hard"]);
    let zero = Quantity::new(0);
    let used: Amounts = hard.keys().map(|name| (name.clone(), counted.get(name).copied().unwrap_or(zero))).collect();
    let status = json!({"hard": quota["spec"]["hard"], "used": write(&used)});
    let known = amounts(&quota["status"]["used"]);
    let complete = amounts(&quota["status"]["hard"]) == hard && hard.keys().all(|name| known.contains_key(name));
    match (complete, limited(&known, &hard) == used) {
        (true, true) => Plan::Nothing,
        (true, false) => Plan::Doubt(status),
        (false, _) => Plan::Write(status),
    }
}

pub(crate) struct Quotas {
    context: Arc<Context>,
    /// What was counted last, at which version of the quota, where it was not what the quota says.
    doubts: Mutex<HashMap<Key, (Option<String>, Amounts)>>,
}

impl Quotas {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.quotas.on_change(move |old, new| {
            // Its status changes with every write in the namespace: that is no reason to count.
            if let Some(quota) = new
                && old.is_none_or(|old| old.spec != quota.spec)
            {
                q.add(Key::of(&**quota));
            }
        });
        (Arc::new(Quotas { context, doubts: Mutex::default() }), queue)
    }

    /// What the namespace holds of everything that a quota limits.
    async fn count(&self, quota: &Value, namespace: &str) -> anyhow::Result<Amounts> {
        let hard = amounts(&quota["spec"]["hard"]);
        let mut kinds: Vec<(&str, &str)> = hard.keys().map(|name| resource_of(name)).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let mut counted = Amounts::new();
        for (group, plural) in kinds {
            let Some(kind) = self.kind(group, plural).await? else { continue };
            let api: Api<DynamicObject> = Api::namespaced_with(self.context.client.clone(), namespace, &kind);
            for object in api.list(&ListParams::default()).await?.items {
                let object = serde_json::to_value(&object)?;
                if is_about(quota, group, plural, &object) {
                    counted = sum(counted, &usage(group, plural, &object));
                }
            }
        }
        Ok(counted)
    }

    async fn kind(&self, group: &str, plural: &str) -> anyhow::Result<Option<ApiResource>> {
        let found = match discovery::group(&self.context.client, group).await {
            Ok(found) => found,
            // A quota may limit what nobody serves.
            Err(kube::Error::Discovery(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(found.recommended_resources().into_iter().map(|(kind, _)| kind).find(|kind| kind.plural == plural))
    }
}

#[async_trait]
impl Controller for Quotas {
    fn name(&self) -> &'static str {
        "resourcequota"
    }

    async fn ready(&self) {
        self.context.caches.quotas.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = &self.context.caches.quotas;
        let Some(known) = cache.get(key).filter(|quota| !is_deleting(&**quota)) else {
            self.doubts.lock().remove(key);
            return Ok(None);
        };
        // The cache may be behind the writes of servers: what is compared is what the API says now.
        let api: Api<ResourceQuota> = self.context.api(&key.namespace);
        let Some(current) = api.get_opt(known.metadata.name.as_deref().unwrap_or_default()).await? else {
            return Ok(None);
        };
        let value = serde_json::to_value(&current)?;
        let counted = limited(&self.count(&value, &key.namespace).await?, &amounts(&value["spec"]["hard"]));
        let status = match plan(&value, &counted) {
            Plan::Nothing => {
                self.doubts.lock().remove(key);
                return Ok(Some(PERIOD));
            }
            Plan::Write(status) => status,
            Plan::Doubt(status) => {
                let doubt = (current.metadata.resource_version.clone(), counted);
                let settled = self.doubts.lock().insert(key.clone(), doubt.clone()) == Some(doubt);
                if !settled {
                    return Ok(Some(SETTLE));
                }
                tracing::info!(quota = %value["metadata"]["name"], "what a quota said was used was not so");
                status
            }
        };
        // The version that was looked at: whoever takes from it meanwhile is not overwritten.
        let mut updated = current;
        updated.status = Some(serde_json::from_value(status)?);
        match self.context.replace_status(cache, &updated).await {
            // Once more soon: what was admitted just before there was a quota may have been stored just after it was counted.
            Ok(_) => Ok(Some(SETTLE)),
            Err(kube::Error::Api(status)) if status.is_conflict() => Ok(Some(SETTLE)),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_quota_should_say() {
        let counted = amounts(&json!({"pods": "2", "configmaps": "9"}));
        let check = |status: Value, expect: Plan| {
            let quota = json!({"spec": {"hard": {"pods": "5"}}, "status": status});
            assert_eq!(plan(&quota, &counted), expect, "{quota}");
        };
        let right = json!({"hard": {"pods": "5"}, "used": {"pods": "2"}});
        check(Value::Null, Plan::Write(right.clone()));
        check(json!({"hard": {"pods": "4"}, "used": {"pods": "2"}}), Plan::Write(right.clone()));
        check(json!({"hard": {"pods": "5"}, "used": {"pods": "3"}}), Plan::Doubt(right.clone()));
        check(right, Plan::Nothing);
    }
}
