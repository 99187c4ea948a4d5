//! Namespace: empties one that is being deleted, and lets it go
//! (<https://kubernetes.io/docs/concepts/overview/working-with-objects/namespaces/>).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Namespace, NamespaceCondition},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams, PropagationPolicy},
    core::PartialObjectMeta,
    discovery::{Discovery, Scope, verbs},
};
use serde_json::json;

use crate::{
    context::Context,
    runtime::{Controller, Key, Queue, objects::is_deleting},
};

/// The finalizer in `spec` that holds a namespace until it is empty.
const FINALIZER: &str = "kubernetes";
/// How soon to look again while something is left.
const AGAIN: Duration = Duration::from_millis(200);
/// How soon to look again while what is left waits for its own finalizers.
const SLOWLY: Duration = Duration::from_secs(2);

/// What is left of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// e.g. `pods.`, `deployments.apps`.
    pub resource: String,
    /// How many objects.
    pub objects: usize,
    /// The finalizers that hold them, each with how many it holds.
    pub finalizers: Vec<(String, usize)>,
}

/// What to do about a namespace that is being deleted.
#[derive(Debug, PartialEq)]
pub enum Plan {
    /// It is empty and can go.
    Finalize,
    /// Something is left: say so, look again.
    Wait {
        /// The conditions that say it.
        conditions: Vec<(&'static str, &'static str, &'static str, String)>,
        /// When to look again.
        again: Duration,
    },
}

/// Decides from what is left, and the kinds that could not be looked at.
pub fn plan(left: &[Left], failures: &[String]) -> Plan {
    let some: Vec<&Left> = left.iter().filter(|l| l.objects > 0).collect();
    if some.is_empty() && failures.is_empty() {
        return Plan::Finalize;
    }
    let flag = |bad: bool| if bad { "True" } else { "False" };
    let remaining: Vec<String> =
        some.iter().map(|l| format!("{} has {} resource instances", l.resource, l.objects)).collect();
    let mut held: std::collections::BTreeMap<&str, usize> = Default::default();
    for (finalizer, count) in some.iter().flat_map(|l| &l.finalizers) {
        *held.entry(finalizer).or_default() += count;
    }
    let finalizers: Vec<String> = held.iter().map(|(f, n)| format!("{f} in {n} resource instances")).collect();
    let text = |list: &[String], lead: &str, good: &str| match list.is_empty() {
        true => good.to_owned(),
        false => format!("{lead}{}", list.join(", ")),
    };
    let conditions = vec![
        (
            "NamespaceDeletionDiscoveryFailure",
            flag(!failures.is_empty()),
            if failures.is_empty() { "ResourcesDiscovered" } else { "DiscoveryFailed" },
            text(failures, "Discovery failed for some groups: ", "All resources successfully discovered"),
        ),
        (
            "NamespaceContentRemaining",
            flag(!some.is_empty()),
            if some.is_empty() { "ContentRemoved" } else { "SomeResourcesRemain" },
            text(&remaining, "Some resources are remaining: ", "All content successfully removed"),
        ),
        (
            "NamespaceFinalizersRemaining",
            flag(!finalizers.is_empty()),
            if finalizers.is_empty() { "ContentHasNoFinalizers" } else { "SomeFinalizersRemain" },
            text(
                &finalizers,
                "Some content in the namespace has finalizers remaining: ",
                "All content-preserving finalizers finished",
            ),
        ),
    ];
    Plan::Wait { conditions, again: if finalizers.is_empty() { AGAIN } else { SLOWLY } }
}

pub(crate) struct Namespaces {
    context: Arc<Context>,
}

impl Namespaces {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.namespaces.on_change(move |_, new| {
            if let Some(namespace) = new.filter(|n| is_deleting(&***n)) {
                q.add(Key::of(&**namespace));
            }
        });
        (Arc::new(Namespaces { context }), queue)
    }

    /// The namespace as it is now, if it is still the one that was to be deleted. What the cache has may have gone since, and
    /// what is there now under its name may be somebody's new one: nothing of that may be touched.
    async fn look(&self, cached: &Namespace) -> kube::Result<Option<Namespace>> {
        let api: Api<Namespace> = Api::all(self.context.client.clone());
        let now = api.get_opt(cached.metadata.name.as_deref().unwrap_or_default()).await?;
        Ok(now.filter(|now| now.metadata.uid == cached.metadata.uid && is_deleting(now)))
    }

    /// Deletes everything of one kind and says what is left.
    async fn empty(&self, kind: &ApiResource, namespace: &str) -> kube::Result<Left> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.context.client.clone(), namespace, kind);
        let resource = format!("{}.{}", kind.plural, kind.group);
        let first = api.list_metadata(&ListParams::default().limit(1)).await?;
        if first.items.is_empty() {
            return Ok(Left { resource, ..Default::default() });
        }
        let params = DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..Default::default() };
        api.delete_collection(&params, &ListParams::default()).await?;
        let rest = api.list_metadata(&ListParams::default()).await?;
        let mut left = Left { resource, objects: rest.items.len(), finalizers: Vec::new() };
        for finalizer in
            rest.items.iter().flat_map(|o: &PartialObjectMeta<DynamicObject>| o.metadata.finalizers.iter().flatten())
        {
            match left.finalizers.iter_mut().find(|(f, _)| f == finalizer) {
                Some((_, count)) => *count += 1,
                None => left.finalizers.push((finalizer.clone(), 1)),
            }
        }
        Ok(left)
    }

    async fn finalize(&self, namespace: &Namespace) -> anyhow::Result<()> {
        let mut next = namespace.clone();
        if let Some(finalizers) = next.spec.as_mut().and_then(|s| s.finalizers.as_mut()) {
            finalizers.retain(|f| f != FINALIZER);
        }
        let api: Api<Namespace> = Api::all(self.context.client.clone());
        let name = namespace.metadata.name.as_deref().unwrap_or_default();
        match api.replace_subresource::<Namespace>("finalize", name, &PostParams::default(), &next).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            other => {
                other?;
                Ok(())
            }
        }
    }
}

/// The kinds that live in namespaces and can be listed and deleted.
async fn discover(client: Client) -> anyhow::Result<Vec<ApiResource>> {
    let discovery = Discovery::new(client).run_aggregated().await?;
    let mut kinds = Vec::new();
    for group in discovery.groups() {
        for (kind, capabilities) in group.recommended_resources() {
            let can =
                capabilities.supports_operation(verbs::LIST) && capabilities.supports_operation("deletecollection");
            // Events of the second group are the core's.
            if capabilities.scope == Scope::Namespaced && can && kind.group != "events.k8s.io" {
                kinds.push(kind);
            }
        }
    }
    // What others react to goes last: while there are owners, dependents would come back.
    kinds.sort_by_key(|k| matches!(k.plural.as_str(), "events" | "configmaps" | "secrets" | "serviceaccounts"));
    Ok(kinds)
}

#[async_trait]
impl Controller for Namespaces {
    fn name(&self) -> &'static str {
        "namespace"
    }

    async fn ready(&self) {
        self.context.caches.namespaces.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let Some(cached) = self.context.caches.namespaces.get(key).filter(|cached| is_deleting(&**cached)) else {
            return Ok(None);
        };
        let Some(namespace) = self.look(&cached).await? else { return Ok(None) };
        let held = namespace
            .spec
            .as_ref()
            .and_then(|s| s.finalizers.as_ref())
            .is_some_and(|f| f.iter().any(|f| f == FINALIZER));
        if !held {
            return Ok(None);
        }
        let (mut left, mut failures) = (Vec::new(), Vec::new());
        // Each time anew: kinds come with their definitions.
        for kind in discover(self.context.client.clone()).await? {
            match self.empty(&kind, &key.name).await {
                // It went with its definition, and took its objects along.
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                Ok(found) => left.push(found),
                Err(error) => failures.push(format!("{}: {error}", kind.plural)),
            }
        }
        let (conditions, again) = match plan(&left, &failures) {
            Plan::Finalize => {
                self.finalize(&namespace).await?;
                return Ok(None);
            }
            Plan::Wait { conditions, again } => (conditions, again),
        };
        let old = namespace.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
        let now = Timestamp::now();
        let new: Vec<NamespaceCondition> = conditions
            .into_iter()
            .map(|(type_, status, reason, message)| {
                let same = old.iter().find(|c| c.type_ == type_ && c.status == status);
                NamespaceCondition {
                    type_: type_.into(),
                    status: status.into(),
                    reason: Some(reason.into()),
                    message: Some(message),
                    last_transition_time: same.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
                }
            })
            .collect();
        if new != old {
            let api: Api<Namespace> = Api::all(self.context.client.clone());
            let patch = kube::api::Patch::Merge(json!({"status": {"conditions": new}}));
            api.patch_status(&key.name, &Default::default(), &patch).await?;
        }
        Ok(Some(again))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(objects: usize, finalizers: &[(&str, usize)]) -> Left {
        Left {
            resource: "pods.".into(),
            objects,
            finalizers: finalizers.iter().map(|(f, n)| ((*f).into(), *n)).collect(),
        }
    }

    /// What is done about a namespace that is being deleted for all that the cache knows, when this is what there is.
    async fn asked(there: Option<serde_json::Value>) -> Vec<String> {
        let asked = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let seen = asked.clone();
        let client = seawall_client::in_process(move |request: http::Request<kube::client::Body>| {
            seen.lock().push(format!("{} {}", request.method(), request.uri().path()));
            let (status, body) = match (request.uri().path(), &there) {
                ("/api/v1/namespaces/shop", Some(namespace)) => (200, namespace.clone()),
                ("/api/v1/namespaces/shop", None) => {
                    (404, json!({"kind": "Status", "reason": "NotFound", "code": 404}))
                }
                _ => (503, json!({"kind": "Status", "reason": "ServiceUnavailable", "code": 503})),
            };
            let body = kube::client::Body::from(body.to_string().into_bytes());
            async move { http::Response::builder().status(status).body(body).unwrap() }
        });
        let shutdown = tokio_util::sync::CancellationToken::new();
        let (recorder, _) = crate::runtime::Recorder::new(client.clone(), "test", shutdown);
        let context = Arc::new(Context {
            client,
            config: Default::default(),
            recorder,
            caches: Default::default(),
            clock: Arc::new(Timestamp::now),
        });
        let cached: Namespace = serde_json::from_value(namespace("old", true)).unwrap();
        let (controller, _) = Namespaces::start(context.clone());
        let key = Key::of(&cached);
        context.caches.namespaces.note(cached);
        // What comes after the look is not served here.
        let _ = controller.reconcile(&key).await;
        asked.lock().drain(..).collect()
    }

    fn namespace(uid: &str, deleting: bool) -> serde_json::Value {
        let mut namespace = json!({"apiVersion": "v1", "kind": "Namespace", "spec": {"finalizers": ["kubernetes"]},
            "metadata": {"name": "shop", "uid": uid, "resourceVersion": "7"}});
        if deleting {
            namespace["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        namespace
    }

    #[tokio::test]
    async fn a_new_one_of_the_same_name_is_left_alone() {
        let look = "GET /api/v1/namespaces/shop";
        assert_eq!(asked(None).await, [look]);
        assert_eq!(asked(Some(namespace("new", false))).await, [look]);
        assert_eq!(asked(Some(namespace("new", true))).await, [look]);
        let goes_on = asked(Some(namespace("old", true))).await;
        assert!(goes_on.len() > 1 && goes_on[0] == look, "{goes_on:?}");
    }

    #[test]
    fn it_goes_when_it_is_empty() {
        assert_eq!(plan(&[], &[]), Plan::Finalize);
        assert_eq!(plan(&[left(0, &[])], &[]), Plan::Finalize);
    }

    #[test]
    fn it_says_what_holds_it() {
        let check = |left: &[Left], failures: &[String], expect: [&str; 3], soon: Duration| {
            let Plan::Wait { conditions, again } = plan(left, failures) else { panic!("it waits") };
            assert_eq!(conditions.iter().map(|c| c.1).collect::<Vec<_>>(), expect);
            assert_eq!(again, soon);
            conditions
        };
        check(&[left(2, &[])], &[], ["False", "True", "False"], AGAIN);
        let told = check(&[left(2, &[("example.com/x", 1)])], &[], ["False", "True", "True"], SLOWLY);
        assert_eq!(told[1].3, "Some resources are remaining: pods. has 2 resource instances");
        assert_eq!(
            told[2].3,
            "Some content in the namespace has finalizers remaining: example.com/x in 1 resource instances"
        );
        check(&[], &["pods: gone".into()], ["True", "False", "False"], AGAIN);
    }
}
