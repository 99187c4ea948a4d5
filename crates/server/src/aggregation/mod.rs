//! Groups of the API that others serve, and that clients find here
//! (<https://kubernetes.io/docs/concepts/extend-kubernetes/api-extension/apiserver-aggregation/>).
//!
//! Who asks is authenticated and authorized here; the other server is told who it is, by headers that it believes because of
//! the certificate with which they come ([`identity`]). [`available`] looks after the other servers, [`specs`] asks them for
//! their OpenAPI documents, which [`join`] makes part of ours.

pub mod available;
mod identity;
mod join;
mod pass;
pub(crate) mod specs;

pub(crate) use join::join;
pub(crate) use pass::{OF_THE_CONNECTION, believe_anybody};

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::{
    Server,
    cache::{Objects, Snapshot},
    registry::{Registry, ResourceId},
};

/// The group of APIServices.
pub const GROUP: &str = "apiregistration.k8s.io";
const PLURAL: &str = "apiservices";

/// A group and version that another server serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The name of its APIService.
    pub name: String,
    /// The group.
    pub group: String,
    /// The version.
    pub version: String,
    /// Namespace, name and port of the Service that it is behind.
    pub service: (String, String, u16),
    /// Whom to believe, in base64 of PEM.
    authorities: String,
    /// Believes anybody.
    insecure: bool,
    /// Where its group and version stand among others: more comes first.
    priority: (i64, i64),
}

impl Remote {
    fn read(object: &Value) -> Option<Remote> {
        let spec = &object["spec"];
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let service = &spec["service"];
        let port = service["port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or(443);
        Some(Remote {
            name: text(&object["metadata"]["name"])?,
            group: text(&spec["group"]).filter(|group| !group.is_empty())?,
            version: text(&spec["version"])?,
            service: (text(&service["namespace"])?, text(&service["name"])?, port),
            authorities: text(&spec["caBundle"]).unwrap_or_default(),
            insecure: spec["insecureSkipTLSVerify"] == true,
            priority: (
                spec["groupPriorityMinimum"].as_i64().unwrap_or_default(),
                spec["versionPriority"].as_i64().unwrap_or_default(),
            ),
        })
    }

    /// The name in its certificate.
    fn host(&self) -> String {
        let (namespace, name, _) = &self.service;
        format!("{name}.{namespace}.svc")
    }
}

/// APIServices as they were last looked at, and what they come to.
#[derive(Default)]
struct Last {
    objects: Option<Objects>,
    remotes: Arc<Vec<Arc<Remote>>>,
}

/// What is known of the other servers.
#[derive(Default)]
pub struct Aggregation {
    id: std::sync::OnceLock<Option<ResourceId>>,
    last: Mutex<Last>,
    /// What each serves, as it said last: the list of its resources, and whether it still says so.
    discovered: Mutex<HashMap<String, (Value, bool)>>,
    /// How each describes what it serves.
    pub(crate) specs: specs::Specs,
    /// How this server proves who it is.
    identity: ArcSwapOption<identity::Identity>,
    /// By whom they believe, since that takes a while to read.
    tls: Mutex<HashMap<(String, bool), Arc<ClientConfig>>>,
}

impl Aggregation {
    /// All that others serve, those of greater priority first.
    pub fn remotes(&self, registry: &Registry, snapshot: &Snapshot) -> Arc<Vec<Arc<Remote>>> {
        let id = self.id.get_or_init(|| registry.by_name(GROUP, PLURAL).map(|(id, _)| id));
        let mut last = self.last.lock();
        let Some(id) = *id else { return last.remotes.clone() };
        let objects = snapshot.of(id);
        if last.objects.as_ref().is_some_and(|known| known.ptr_eq(objects)) {
            return last.remotes.clone();
        }
        let read = |object: &Arc<crate::object::Object>| Remote::read(&object.value()).map(Arc::new);
        let mut remotes: Vec<Arc<Remote>> = objects.values().filter_map(read).collect();
        remotes.sort_by(|a, b| (b.priority, &a.name).cmp(&(a.priority, &b.name)));
        *last = Last { objects: Some(objects.clone()), remotes: Arc::new(remotes) };
        last.remotes.clone()
    }
}

impl Server {
    pub(crate) fn remotes(&self) -> Arc<Vec<Arc<Remote>>> {
        self.aggregation.remotes(&self.registry, &self.cache.snapshot())
    }

    /// Who serves a group and version, if somebody else does.
    pub(crate) fn remote(&self, group: &str, version: &str) -> Option<Arc<Remote>> {
        self.remotes().iter().find(|remote| remote.group == group && remote.version == version).cloned()
    }

    /// Groups that only others serve, as discovery names them.
    pub(crate) fn remote_groups(&self) -> Vec<(String, Vec<Arc<Remote>>)> {
        let own = self.registry.group_versions();
        let mut groups: Vec<(String, Vec<Arc<Remote>>)> = Vec::new();
        for remote in self.remotes().iter().filter(|r| !own.iter().any(|(group, _)| *group == r.group)) {
            match groups.iter_mut().find(|(group, _)| *group == remote.group) {
                Some((_, versions)) => versions.push(remote.clone()),
                None => groups.push((remote.group.clone(), vec![remote.clone()])),
            }
        }
        for (_, versions) in &mut groups {
            versions.sort_by_key(|remote| std::cmp::Reverse(remote.priority.1));
        }
        groups
    }

    /// A group that only others serve, as an APIGroup.
    pub(crate) fn remote_group(group: &str, versions: &[Arc<Remote>]) -> Value {
        let versions: Vec<Value> = versions
            .iter()
            .map(|r| json!({"groupVersion": format!("{group}/{}", r.version), "version": r.version}))
            .collect();
        json!({"name": group, "versions": versions, "preferredVersion": versions.first()})
    }

    /// The same for aggregated discovery, with what each version has, as it said last.
    pub(crate) fn remote_discovery(&self, group: &str, versions: &[Arc<Remote>]) -> Value {
        let discovered = self.aggregation.discovered.lock();
        let versions: Vec<Value> = versions
            .iter()
            .map(|remote| {
                let (list, current) = discovered.get(&remote.name).cloned().unwrap_or_default();
                json!({"version": remote.version, "freshness": if current { "Current" } else { "Stale" },
                    "resources": aggregated(remote, &list)})
            })
            .collect();
        json!({"metadata": {"name": group, "creationTimestamp": null}, "versions": versions})
    }
}

/// From a list of resources in the old form of discovery to the aggregated one (KEP-3352).
fn aggregated(remote: &Remote, list: &Value) -> Value {
    let all = || list["resources"].as_array().into_iter().flatten();
    let kind = |entry: &Value| {
        let or = |key: &str, own: &str| entry[key].as_str().filter(|t| !t.is_empty()).unwrap_or(own).to_owned();
        json!({"group": or("group", &remote.group), "version": or("version", &remote.version), "kind": entry["kind"]})
    };
    let of = |entry: &Value| {
        let name = entry["name"].as_str().unwrap_or_default();
        let subs: Vec<Value> = all()
            .filter_map(|sub| {
                let sub_name = sub["name"].as_str()?.strip_prefix(name)?.strip_prefix('/')?;
                Some(json!({"subresource": sub_name, "responseKind": kind(sub), "verbs": sub["verbs"]}))
            })
            .collect();
        let mut out = json!({"resource": name, "responseKind": kind(entry), "verbs": entry["verbs"],
            "scope": if entry["namespaced"] == true { "Namespaced" } else { "Cluster" },
            "singularResource": entry["singularName"]});
        for key in ["shortNames", "categories"] {
            if entry[key].is_array() {
                out[key] = entry[key].clone();
            }
        }
        if !subs.is_empty() {
            out["subresources"] = subs.into();
        }
        out
    };
    all().filter(|entry| entry["name"].as_str().is_some_and(|name| !name.contains('/'))).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_resources_in_the_other_form() {
        let object = json!({"metadata": {"name": "v1.a.example"}, "spec": {"group": "a.example", "version": "v1",
            "service": {"namespace": "n", "name": "s"}}});
        let remote = Remote::read(&object).unwrap();
        assert_eq!((remote.host(), remote.service.2), ("s.n.svc".to_owned(), 443));
        let list = json!({"resources": [
            {"name": "things", "singularName": "thing", "namespaced": true, "kind": "Thing", "verbs": ["get"],
                "shortNames": ["th"]},
            {"name": "things/scale", "namespaced": true, "kind": "Scale", "group": "autoscaling", "version": "v1",
                "verbs": ["get"]}]});
        assert_eq!(
            aggregated(&remote, &list),
            json!([{"resource": "things", "singularResource": "thing", "scope": "Namespaced", "verbs": ["get"],
                "shortNames": ["th"], "responseKind": {"group": "a.example", "version": "v1", "kind": "Thing"},
                "subresources": [{"subresource": "scale", "verbs": ["get"],
                    "responseKind": {"group": "autoscaling", "version": "v1", "kind": "Scale"}}]}])
        );
        assert_eq!(aggregated(&remote, &Value::Null), json!([]));
        assert!(
            Remote::read(&json!({"metadata": {"name": "v1.apps"}, "spec": {"group": "apps", "version": "v1"}}))
                .is_none()
        );
    }
}
