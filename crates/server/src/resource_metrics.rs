//! `metrics.k8s.io/v1beta1`: what nodes and pods use, asked of the node agents, for `kubectl top` and autoscalers
//! (<https://kubernetes.io/docs/tasks/debug/debug-cluster/resource-metrics-pipeline/>).
//!
//! It is served as long as nobody else has registered for the group: an APIService `v1beta1.metrics.k8s.io`, or a custom
//! resource in it, comes first. Nothing is stored, and a server asks an agent once in a few seconds at most.

pub mod schema;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream};
use http::{HeaderMap, Response, StatusCode};
use parking_lot::Mutex;
use seawall_api::Row;
use serde_json::{Value, json};
use tokio::{sync::Mutex as AsyncMutex, time::Instant};

use crate::{
    Server,
    cache::range,
    encode::{Body, Shape, negotiate, value},
    error::{ApiError, Result},
    read::Selection,
    request::{Query, ResourcePath},
};

/// The group.
pub const GROUP: &str = "metrics.k8s.io";
/// Its version.
pub const VERSION: &str = "v1beta1";
/// Both, as they stand in `apiVersion`.
pub const API_VERSION: &str = "metrics.k8s.io/v1beta1";
/// How long an agent's answer is good for. Agents look every ten seconds.
const FRESH: Duration = Duration::from_secs(3);
/// How long an agent has to answer; autoscalers wait for ten seconds.
const ANSWER: Duration = Duration::from_secs(5);
/// How many agents are asked at a time.
const AT_ONCE: usize = 64;
/// The time that an agent's rates are of, in the form of a duration: it looks that often.
const WINDOW: &str = "10s";
/// What agents are asked: the documented short form of the kubelet's summary.
const PATH: &str = "/stats/summary?only_cpu_and_memory=true";

type Answer = std::result::Result<Arc<Value>, String>;

/// What agents said last, and when. One question is under way for each.
#[derive(Default)]
pub struct Answers(Mutex<HashMap<String, Slot>>);

type Slot = Arc<AsyncMutex<Option<(Instant, Answer)>>>;

impl Answers {
    fn of(&self, node: &str) -> Slot {
        self.0.lock().entry(node.to_owned()).or_default().clone()
    }

    /// Nodes that are there no more are forgotten.
    fn keep(&self, nodes: impl Fn(&str) -> bool) {
        self.0.lock().retain(|name, _| nodes(name));
    }
}

/// Which of the two kinds is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nodes,
    Pods,
}

impl Kind {
    fn of(plural: &str) -> Option<Kind> {
        match plural {
            "nodes" => Some(Kind::Nodes),
            "pods" => Some(Kind::Pods),
            _ => None,
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Kind::Nodes => "nodes",
            Kind::Pods => "pods",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Nodes => "NodeMetrics",
            Kind::Pods => "PodMetrics",
        }
    }
}

/// The group, as discovery names it.
pub fn group() -> Value {
    let version = json!({"groupVersion": API_VERSION, "version": VERSION});
    json!({"name": GROUP, "versions": [version], "preferredVersion": version})
}

/// Its resources, in the old form.
pub fn resources() -> Value {
    let one = |kind: Kind| {
        json!({"name": kind.plural(), "singularName": "", "namespaced": kind == Kind::Pods, "kind": kind.name(),
            "verbs": ["get", "list"]})
    };
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": API_VERSION,
        "resources": [one(Kind::Nodes), one(Kind::Pods)]})
}

/// The same for aggregated discovery.
pub fn aggregated() -> Value {
    let one = |kind: Kind| {
        json!({"resource": kind.plural(), "singularResource": "", "verbs": ["get", "list"],
            "responseKind": {"group": GROUP, "version": VERSION, "kind": kind.name()},
            "scope": if kind == Kind::Pods { "Namespaced" } else { "Cluster" }})
    };
    let resources = [one(Kind::Nodes), one(Kind::Pods)];
    json!({"metadata": {"name": GROUP, "creationTimestamp": null},
        "versions": [{"version": VERSION, "freshness": "Current", "resources": resources}]})
}

/// A usage, as the metrics server writes it: CPU in billionths, memory in kibibytes.
fn usage(measured: &Value) -> Option<Value> {
    let cpu = measured["cpu"]["usageNanoCores"].as_u64()?;
    let memory = measured["memory"]["workingSetBytes"].as_u64()?;
    Some(json!({"cpu": format!("{cpu}n"), "memory": format!("{}Ki", memory.div_ceil(1024))}))
}

/// A NodeMetrics, if the agent's answer has one.
fn of_node(node: &Value, summary: &Value) -> Option<Value> {
    let measured = &summary["node"];
    let time = measured["cpu"]["time"].clone();
    Some(json!({"metadata": metadata(node, &time), "timestamp": time, "window": WINDOW, "usage": usage(measured)?}))
}

/// A PodMetrics, if the agent's answer has all of its containers.
fn of_pod(pod: &Value, summary: &Value) -> Option<Value> {
    if pod["status"]["phase"] != "Running" {
        return None;
    }
    let meta = &pod["metadata"];
    // The uid of a node's own pod is not that of its mirror.
    let own = [&meta["uid"], &meta["annotations"]["kubernetes.io/config.mirror"]];
    let found = summary["pods"].as_array()?.iter().find(|found| {
        let reference = &found["podRef"];
        reference["name"] == meta["name"]
            && reference["namespace"] == meta["namespace"]
            && own.contains(&&reference["uid"])
    })?;
    let mut time = Value::Null;
    let mut containers = Vec::new();
    for measured in found["containers"].as_array()? {
        time = measured["cpu"]["time"].clone();
        containers.push(json!({"name": measured["name"], "usage": usage(measured)?}));
    }
    // One of the pod's own that was not measured at all would make the pod look idle.
    let declared = pod["spec"]["containers"].as_array()?;
    let is_whole = declared.iter().all(|c| containers.iter().any(|measured| measured["name"] == c["name"]));
    is_whole.then(
        || json!({"metadata": metadata(pod, &time), "timestamp": time, "window": WINDOW, "containers": containers}),
    )
}

fn metadata(of: &Value, time: &Value) -> Value {
    let meta = &of["metadata"];
    let mut out = json!({"name": meta["name"], "creationTimestamp": time});
    for key in ["namespace", "labels"] {
        if !meta[key].is_null() {
            out[key] = meta[key].clone();
        }
    }
    out
}

/// A table of metrics, as the metrics server prints it.
fn table(items: &[Value], kind: Kind) -> Value {
    let quantity = |object: &Value, resource: &str| match kind {
        Kind::Nodes => object["usage"][resource].clone(),
        Kind::Pods => sum(&object["containers"], resource),
    };
    let column = |name: &str, format: &str| json!({"name": name, "type": "string", "format": format, "description": "", "priority": 0});
    let columns = [column("Name", "name"), column("cpu", ""), column("memory", ""), column("Window", "")];
    let rows: Vec<Value> = items
        .iter()
        .map(|object| {
            let cells = [
                object["metadata"]["name"].clone(),
                quantity(object, "cpu"),
                quantity(object, "memory"),
                object["window"].clone(),
            ];
            let about = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                "metadata": object["metadata"]});
            json!({"cells": cells, "object": about})
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "columnDefinitions": columns, "rows": rows})
}

/// 404, in the metrics server's words.
fn not_found(kind: Kind, namespace: Option<&str>, name: &str) -> ApiError {
    let what = kind.name().to_lowercase();
    let name = namespace.map_or_else(|| name.to_owned(), |namespace| format!("{namespace}/{name}"));
    let message = format!("{what}.{GROUP} {name:?} not found");
    let mut error = ApiError::new(StatusCode::NOT_FOUND, "NotFound", message);
    error.details = json!({"name": name, "group": GROUP, "kind": what});
    error
}

/// The sum of what containers use, in the unit that all of them have.
fn sum(containers: &Value, resource: &str) -> Value {
    let unit = if resource == "cpu" { "n" } else { "Ki" };
    let all = containers.as_array().into_iter().flatten();
    let numbers = all.filter_map(|c| c["usage"][resource].as_str()?.strip_suffix(unit)?.parse::<u64>().ok());
    format!("{}{unit}", numbers.fold(0, u64::saturating_add)).into()
}

impl Server {
    /// Whether the group is served here: nobody else has registered for it.
    pub(crate) fn serves_metrics(&self) -> bool {
        let custom = self.registry.group_versions().iter().any(|(group, _)| *group == GROUP);
        !custom && !self.remotes().iter().any(|remote| remote.group == GROUP)
    }

    /// Answers a request for metrics by somebody who may make it.
    pub(crate) async fn resource_metrics(
        self: &Arc<Self>,
        target: &ResourcePath,
        query: &Query,
        headers: &HeaderMap,
        verb: &str,
    ) -> Result<Response<Body>> {
        let kind = Kind::of(&target.resource).ok_or_else(ApiError::no_route)?;
        if target.subresource.is_some() || (kind == Kind::Nodes && target.namespace.is_some()) {
            return Err(ApiError::no_route());
        }
        let form = negotiate(headers, false)?;
        let name = match (verb, target.name.as_deref()) {
            ("get", Some(name)) if kind == Kind::Nodes || target.namespace.is_some() => Some(name),
            ("list", None) => None,
            _ => return Err(ApiError::method_not_allowed()),
        };
        let (_, row) = self.registry.by_name("", kind.plural()).ok_or_else(ApiError::no_route)?;
        let selection = Selection::parse(row, query, name)?;
        let mut items = self.measured(kind, row, target.namespace.as_deref(), &selection).await?;
        if let Some(name) = name {
            let mut found = items.pop().ok_or_else(|| not_found(kind, target.namespace.as_deref(), name))?;
            if form.shape == Shape::Table {
                return Ok(value(StatusCode::OK, &table(&[found], kind), form.media));
            }
            found["kind"] = kind.name().into();
            found["apiVersion"] = API_VERSION.into();
            return Ok(value(StatusCode::OK, &found, form.media));
        }
        let list = match form.shape {
            Shape::Table => table(&items, kind),
            _ => {
                let list = format!("{}List", kind.name());
                json!({"kind": list, "apiVersion": API_VERSION, "metadata": {}, "items": items})
            }
        };
        Ok(value(StatusCode::OK, &list, form.media))
    }

    /// The metrics of what is selected, as far as agents have them, by namespace and name.
    async fn measured(
        self: &Arc<Self>,
        kind: Kind,
        row: &Row,
        namespace: Option<&str>,
        selection: &Selection,
    ) -> Result<Vec<Value>> {
        let snapshot = self.consistent().await?;
        let (nodes_id, nodes_row) = self.registry.by_name("", "nodes").ok_or_else(ApiError::no_route)?;
        let (id, _) = self.registry.by_name("", kind.plural()).ok_or_else(ApiError::no_route)?;
        let prefix = match namespace {
            Some(namespace) => format!("{}{namespace}/", row.prefix()),
            None => row.prefix(),
        };
        let wanted: Vec<Value> = range(snapshot.of(id), &prefix, None)
            .filter(|object| selection.picks(row, object))
            .map(|object| object.value())
            .collect();
        let node_of = |object: &Value| match kind {
            Kind::Nodes => object["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
            Kind::Pods => object["spec"]["nodeName"].as_str().unwrap_or_default().to_owned(),
        };
        let names: BTreeSet<String> = wanted.iter().map(node_of).filter(|name| !name.is_empty()).collect();
        let node = |name: &str| Some(snapshot.get(nodes_id, &nodes_row.key("", name))?.value());
        let asked: Vec<(String, Value)> = names.into_iter().filter_map(|n| Some((n.clone(), node(&n)?))).collect();
        self.metrics_of_nodes.keep(|name| snapshot.get(nodes_id, &nodes_row.key("", name)).is_some());
        drop(snapshot);
        let answers: BTreeMap<String, Arc<Value>> = stream::iter(asked)
            .map(|(name, node)| async move {
                let answer = self.ask_node(&name, &node).await;
                if let Err(why) = &answer {
                    tracing::debug!(node = name, why, "a node has no metrics");
                }
                Some((name, answer.ok()?))
            })
            .buffer_unordered(AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await;
        let of = |object: &Value| {
            let summary = answers.get(&node_of(object))?;
            match kind {
                Kind::Nodes => of_node(object, summary),
                Kind::Pods => of_pod(object, summary),
            }
        };
        Ok(wanted.iter().filter_map(of).collect())
    }

    /// What a node's agent says, now or a moment ago. That it does not answer is remembered as long.
    async fn ask_node(&self, name: &str, node: &Value) -> Answer {
        let slot = self.metrics_of_nodes.of(name);
        let mut known = slot.lock().await;
        if let Some((at, answer)) = &*known
            && at.elapsed() < FRESH
        {
            return answer.clone();
        }
        let asked = tokio::time::timeout(ANSWER, self.agent_says(name, node, PATH)).await;
        let answer = match asked {
            Ok(Ok(said)) => Ok(Arc::new(said)),
            Ok(Err(error)) => Err(error.message),
            Err(_) => Err(format!("no answer within {ANSWER:?}")),
        };
        *known = Some((Instant::now(), answer.clone()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(name: &str, cpu: u64) -> Value {
        json!({"name": name, "cpu": {"time": "2026-01-01T00:00:00Z", "usageNanoCores": cpu},
            "memory": {"workingSetBytes": 2049}})
    }

    #[test]
    fn metrics_of_nodes() {
        let node = json!({"metadata": {"name": "n", "labels": {"a": "b"}, "uid": "u"}});
        assert_eq!(
            of_node(&node, &json!({"node": measured("n", 5)})),
            Some(json!({"metadata": {"name": "n", "labels": {"a": "b"}, "creationTimestamp": "2026-01-01T00:00:00Z"},
                "timestamp": "2026-01-01T00:00:00Z", "window": "10s", "usage": {"cpu": "5n", "memory": "3Ki"}}))
        );
        for hostile in [json!(null), json!({"node": 3}), json!({"node": {"cpu": {"usageNanoCores": "5"}}})] {
            assert_eq!(of_node(&node, &hostile), None);
        }
    }

    #[test]
    fn metrics_of_pods() {
        let pod = |phase: &str, annotations: Value| {
            json!({"metadata": {"name": "p", "namespace": "s", "uid": "u", "annotations": annotations},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}]}, "status": {"phase": phase}})
        };
        let summary = |uid: &str, containers: Value| {
            json!({"pods": [{"podRef": {"name": "p", "namespace": "s", "uid": "other"}},
                {"podRef": {"name": "p", "namespace": "s", "uid": uid}, "containers": containers}]})
        };
        let both = json!([measured("a", 5), measured("b", 6)]);
        let check = |pod: Value, summary: Value, expect: Option<&[&str]>| {
            let found = of_pod(&pod, &summary);
            let containers = found.as_ref().map(|found| {
                let all = found["containers"].as_array().unwrap().iter();
                all.map(|c| c["usage"]["cpu"].as_str().unwrap()).collect::<Vec<_>>()
            });
            assert_eq!(containers.as_deref(), expect, "{summary}");
        };
        check(pod("Running", json!({})), summary("u", both.clone()), Some(&["5n", "6n"]));
        let mirror = json!({"kubernetes.io/config.mirror": "hash"});
        check(pod("Running", mirror), summary("hash", both.clone()), Some(&["5n", "6n"]));
        check(pod("Pending", json!({})), summary("u", both.clone()), None);
        check(pod("Running", json!({})), summary("another", both), None);
        check(pod("Running", json!({})), summary("u", json!([measured("a", 5)])), None);
        check(pod("Running", json!({})), summary("u", json!([measured("a", 5), {"name": "b"}])), None);
        check(pod("Running", json!({})), json!({"pods": 3}), None);
    }

    #[test]
    fn tables() {
        let pod = json!({"metadata": {"name": "p"}, "window": "10s",
            "containers": [{"usage": {"cpu": "5n", "memory": "3Ki"}}, {"usage": {"cpu": "6n", "memory": "4Ki"}}]});
        assert_eq!(table(&[pod], Kind::Pods)["rows"][0]["cells"], json!(["p", "11n", "7Ki", "10s"]));
        let node = json!({"metadata": {"name": "n"}, "window": "10s", "usage": {"cpu": "5n", "memory": "3Ki"}});
        assert_eq!(table(&[node], Kind::Nodes)["rows"][0]["cells"], json!(["n", "5n", "3Ki", "10s"]));
    }

    #[tokio::test]
    async fn answers_of_nodes_that_are_gone_are_forgotten() {
        let answers = Answers::default();
        let (a, again) = (answers.of("a"), answers.of("a"));
        assert!(Arc::ptr_eq(&a, &again));
        answers.of("b");
        answers.keep(|name| name == "a");
        assert_eq!(answers.0.lock().keys().collect::<Vec<_>>(), ["a"]);
    }
}
