//! Roles that collect the rules of others
//! (<https://kubernetes.io/docs/reference/access-authn-authz/rbac/#aggregated-clusterroles>).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue,
        objects::{name, selects},
    },
};

/// The rules that a role is to have, if those are not the ones it has.
pub fn plan(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Option<Vec<PolicyRule>> {
    let selectors = role.aggregation_rule.as_ref()?.cluster_role_selectors.as_deref().unwrap_or_default();
    let mut sources: Vec<&ClusterRole> = all
        .iter()
        .map(|source| &**source)
        .filter(|source| name(*source) != name(role))
        .filter(|source| selectors.iter().any(|s| selects(Some(s), source.metadata.labels.as_ref())))
        .collect();
    sources.sort_by_key(|source| name(*source).to_owned());
    let mut rules: Vec<PolicyRule> = Vec::new();
    for rule in sources.iter().flat_map(|source| source.rules.iter().flatten()) {
        if !rules.contains(rule) {
            rules.push(rule.clone());
        }
    }
    (role.rules.as_deref().unwrap_or_default() != rules).then_some(rules)
}

pub(crate) struct Aggregation {
    context: Arc<Context>,
}

impl Aggregation {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let (q, roles) = (queue.clone(), context.caches.cluster_roles.clone());
        // Any role may be one that others collect, before the change or after it.
        context.caches.cluster_roles.on_change(move |_, _| {
            for role in roles.all().iter().filter(|role| role.aggregation_rule.is_some()) {
                q.add(Key::of(&**role));
            }
        });
        (Arc::new(Aggregation { context }), queue)
    }
}

#[async_trait]
impl Controller for Aggregation {
    fn name(&self) -> &'static str {
        "clusterroleaggregation"
    }

    async fn ready(&self) {
        self.context.caches.cluster_roles.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = &self.context.caches.cluster_roles;
        let Some(role) = cache.get(key) else { return Ok(None) };
        if let Some(rules) = plan(&role, &cache.all()) {
            let version = role.metadata.resource_version.as_deref();
            let patch = json!({"metadata": {"resourceVersion": version}, "rules": rules});
            let api: Api<ClusterRole> = Api::all(self.context.client.clone());
            cache.note(api.patch(name(&*role), &PatchParams::default(), &Patch::Merge(patch)).await?);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn role(name: &str, label: &str, resources: &[&str]) -> Arc<ClusterRole> {
        let rules: Vec<Value> =
            resources.iter().map(|r| json!({"apiGroups": [""], "resources": [r], "verbs": ["get"]})).collect();
        let role = json!({"metadata": {"name": name, "labels": {label: "true"}}, "rules": rules});
        Arc::new(serde_json::from_value(role).unwrap())
    }

    #[test]
    fn a_role_has_what_those_have_that_it_selects() {
        let collector = |rules: &[&str]| {
            let mut role = (*role("all", "into", rules)).clone();
            let rule = json!({"clusterRoleSelectors": [{"matchLabels": {"into": "true"}}]});
            role.aggregation_rule = Some(serde_json::from_value(rule).unwrap());
            role
        };
        let check = |had: &[&str], sources: &[Arc<ClusterRole>], expect: Option<&[&str]>| {
            let role = collector(had);
            let mut all = sources.to_vec();
            all.push(Arc::new(role.clone()));
            let found = plan(&role, &all);
            let names = |rules: Vec<PolicyRule>| -> Vec<String> {
                rules.into_iter().flat_map(|rule| rule.resources.unwrap_or_default()).collect()
            };
            let expect: Option<Vec<String>> = expect.map(|names| names.iter().map(|n| (*n).to_owned()).collect());
            assert_eq!(found.map(names), expect, "{had:?}");
        };
        let (a, b, other) =
            (role("a", "into", &["pods"]), role("b", "into", &["nodes", "pods"]), role("c", "x", &["secrets"]));
        // In the order of their names, each rule once.
        check(&[], &[b.clone(), a.clone(), other.clone()], Some(&["pods", "nodes"]));
        check(&["pods", "nodes"], &[a.clone(), b], None);
        // What nobody has any more goes.
        check(&["pods", "nodes"], &[a], Some(&["pods"]));
        check(&["pods"], std::slice::from_ref(&other), Some(&[]));
        assert_eq!(plan(&other, std::slice::from_ref(&other)), None);
    }
}
