//! The levels and schemas that every cluster has, with upstream's names and figures
//! (<https://kubernetes.io/docs/reference/debug-cluster/flow-control/>).

use std::{collections::HashSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{GROUP, plan};
use crate::{Server, cache::Objects, error::Result};

/// How often what was taken away or changed is put back: upstream's time.
const AGAIN: Duration = Duration::from_secs(60);
/// How often it is looked whether schemas lead to levels that exist.
const LOOK: Duration = Duration::from_secs(1);

/// A value of this annotation other than `true` keeps an object as its owner has made it.
pub const AUTOUPDATE: &str = "apf.kubernetes.io/autoupdate-spec";

fn meta(name: &str) -> Value {
    json!({"name": name, "annotations": {AUTOUPDATE: "true"}})
}

fn level(name: &str, shares: u32, lendable: u32, queues: u32, hand: u32) -> Value {
    json!({"metadata": meta(name), "spec": {"type": "Limited", "limited": {
        "nominalConcurrencyShares": shares, "lendablePercent": lendable,
        "limitResponse": {"type": "Queue", "queuing": {"queues": queues, "handSize": hand, "queueLengthLimit": 50}}}}})
}

fn groups(names: &[&str]) -> Value {
    names.iter().map(|name| json!({"kind": "Group", "group": {"name": name}})).collect()
}

fn users(names: &[&str]) -> Value {
    names.iter().map(|name| json!({"kind": "User", "user": {"name": name}})).collect()
}

fn accounts_of_the_system() -> Value {
    json!([{"kind": "ServiceAccount", "serviceAccount": {"namespace": "kube-system", "name": "*"}}])
}

fn resources(verbs: &[&str], group: &str, resources: &[&str], namespaces: &[&str], cluster: bool) -> Value {
    let mut rule = json!({"verbs": verbs, "apiGroups": [group], "resources": resources, "namespaces": namespaces});
    if cluster {
        rule["clusterScope"] = true.into();
    }
    rule
}

fn schema(name: &str, level: &str, precedence: u32, by: &str, rules: Value) -> Value {
    let mut schema = json!({"metadata": meta(name), "spec": {"matchingPrecedence": precedence,
        "priorityLevelConfiguration": {"name": level}, "rules": [rules]}});
    if !by.is_empty() {
        schema["spec"]["distinguisherMethod"] = json!({"type": by});
    }
    schema
}

/// Everything that these do.
fn all_of(subjects: Value) -> Value {
    json!({"subjects": subjects, "resourceRules": [resources(&["*"], "*", &["*"], &["*"], true)],
        "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}]})
}

/// The levels, and the schemas.
pub fn objects() -> (Vec<Value>, Vec<Value>) {
    let everyone = || groups(&["system:unauthenticated", "system:authenticated"]);
    let leading: &[&str] = &["get", "create", "update"];
    let levels = vec![
        json!({"metadata": meta("exempt"), "spec": {"type": "Exempt",
            "exempt": {"nominalConcurrencyShares": 0, "lendablePercent": 0}}}),
        json!({"metadata": meta("catch-all"), "spec": {"type": "Limited", "limited": {
            "nominalConcurrencyShares": 5, "lendablePercent": 0, "limitResponse": {"type": "Reject"}}}}),
        level("system", 30, 33, 64, 6),
        level("node-high", 40, 25, 64, 6),
        level("leader-election", 10, 0, 16, 4),
        level("workload-high", 40, 50, 128, 6),
        level("workload-low", 100, 90, 128, 6),
        level("global-default", 20, 50, 128, 6),
    ];
    let schemas = vec![
        schema("exempt", "exempt", 1, "", all_of(groups(&["system:masters"]))),
        schema(
            "probes",
            "exempt",
            2,
            "",
            json!({"subjects": everyone(), "nonResourceRules": [
                {"verbs": ["get"], "nonResourceURLs": ["/healthz", "/readyz", "/livez"]}]}),
        ),
        schema(
            "system-leader-election",
            "leader-election",
            100,
            "ByUser",
            json!({"subjects": users(&["system:kube-controller-manager", "system:kube-scheduler"]),
                "resourceRules": [resources(leading, "coordination.k8s.io", &["leases"], &["*"], false)]}),
        ),
        schema(
            "endpoint-controller",
            "workload-high",
            150,
            "ByUser",
            json!({"subjects": users(&["system:kube-controller-manager"]), "resourceRules": [
                resources(leading, "", &["endpoints"], &["*"], false),
                resources(leading, "discovery.k8s.io", &["endpointslices"], &["*"], false)]}),
        ),
        schema(
            "workload-leader-election",
            "leader-election",
            200,
            "ByUser",
            json!({"subjects": accounts_of_the_system(), "resourceRules": [
                resources(leading, "", &["endpoints", "configmaps"], &["*"], false),
                resources(leading, "coordination.k8s.io", &["leases"], &["*"], false)]}),
        ),
        schema(
            "system-node-high",
            "node-high",
            400,
            "ByUser",
            json!({"subjects": groups(&["system:nodes"]), "resourceRules": [
                resources(&["*"], "", &["nodes", "nodes/status"], &["*"], true),
                resources(&["*"], "coordination.k8s.io", &["leases"], &["*"], false)]}),
        ),
        schema("system-nodes", "system", 500, "ByUser", all_of(groups(&["system:nodes"]))),
        // Our own parts, which upstream does not have.
        schema("system-servers", "system", 600, "ByUser", all_of(users(&["system:seawall", "system:apiserver"]))),
        schema(
            "kube-controller-manager",
            "workload-high",
            800,
            "ByNamespace",
            all_of(users(&["system:kube-controller-manager"])),
        ),
        schema("kube-scheduler", "workload-high", 800, "ByNamespace", all_of(users(&["system:kube-scheduler"]))),
        schema("kube-system-service-accounts", "workload-high", 900, "ByNamespace", all_of(accounts_of_the_system())),
        schema("service-accounts", "workload-low", 9000, "ByUser", all_of(groups(&["system:serviceaccounts"]))),
        schema("global-default", "global-default", 9900, "ByUser", all_of(everyone())),
        schema("catch-all", "catch-all", 10_000, "ByUser", all_of(everyone())),
    ];
    (levels, schemas)
}

/// Keeps these objects there, and says of schemas whether they lead anywhere, until the server stops.
pub(crate) async fn keep(server: Arc<Server>) {
    let stop = server.stop.clone();
    stop.run_until_cancelled(async {
        let (mut last, mut seen) = (Instant::now(), None);
        loop {
            tokio::time::sleep(LOOK).await;
            let mut looked = server.say_what_dangles(&mut seen).await;
            if last.elapsed() >= AGAIN {
                last = Instant::now();
                looked = looked.and(server.ensure_flow().await);
            }
            if let Err(error) = looked {
                tracing::debug!(error = error.message, "levels and schemas were not looked through");
            }
        }
    })
    .await;
}

/// The condition of a schema that says whether the level it names exists; `None` if it says so already.
fn dangling(schema: &Value, exists: bool, now: &Value) -> Option<Value> {
    let level = schema["spec"]["priorityLevelConfiguration"]["name"].as_str().unwrap_or_default();
    let object = format!("This FlowSchema references the PriorityLevelConfiguration object named {level:?}");
    let (status, reason, message) = match exists {
        true => ("False", "Found", format!("{object} and it exists")),
        false => ("True", "NotFound", format!("{object} but there is no such object")),
    };
    let conditions = schema["status"]["conditions"].as_array();
    let known = conditions.into_iter().flatten().find(|condition| condition["type"] == "Dangling");
    if known.is_some_and(|known| known["status"] == status && known["message"] == *message) {
        return None;
    }
    let since = known
        .filter(|known| known["status"] == status)
        .map_or_else(|| now.clone(), |k| k["lastTransitionTime"].clone());
    Some(json!({"type": "Dangling", "status": status, "reason": reason, "message": message,
        "lastTransitionTime": since}))
}

impl Server {
    /// Writes the conditions of schemas that say something else than what is, if anything has changed since all was well.
    async fn say_what_dangles(self: &Arc<Self>, seen: &mut Option<[Objects; 2]>) -> Result<()> {
        let snapshot = self.cache.snapshot();
        let of = |plural| self.registry.by_name(GROUP, plural).map(|(id, _)| snapshot.of(id).clone());
        let (Some(schemas), Some(levels)) = (of("flowschemas"), of("prioritylevelconfigurations")) else {
            return Ok(());
        };
        if seen.as_ref().is_some_and(|[s, l]| s.ptr_eq(&schemas) && l.ptr_eq(&levels)) {
            return Ok(());
        }
        let names: HashSet<String> =
            levels.values().filter_map(|level| level.value()["metadata"]["name"].as_str().map(str::to_owned)).collect();
        let now = crate::write::timestamp(Timestamp::now());
        for schema in schemas.values() {
            let mut schema = schema.value();
            let level = schema["spec"]["priorityLevelConfiguration"]["name"].as_str().unwrap_or_default();
            if let Some(condition) = dangling(&schema, names.contains(level), &now) {
                schema["status"] = json!({"conditions": [condition]});
                self.put_status(GROUP, "flowschemas", schema).await?;
            }
        }
        *seen = Some([schemas, levels]);
        Ok(())
    }

    /// Creates what is missing, and puts right what was changed; not what is the cluster's own by its annotation, unless
    /// the server could not do without it.
    pub(crate) async fn ensure_flow(self: &Arc<Self>) -> Result<()> {
        let (levels, schemas) = objects();
        for (plural, wanted) in [("prioritylevelconfigurations", levels), ("flowschemas", schemas)] {
            for mut wanted in wanted {
                let name = wanted["metadata"]["name"].as_str().unwrap_or_default();
                let needed = [plan::EXEMPT, plan::CATCH_ALL].contains(&name);
                let there = self.find(GROUP, plural, "", name).await?.map(|there| there.value());
                let Some(there) = there else {
                    self.ensure(GROUP, plural, wanted, false).await?;
                    continue;
                };
                let own = there["metadata"]["annotations"][AUTOUPDATE] != "true" && !needed;
                if own || contains(&there["spec"], &wanted["spec"]) {
                    continue;
                }
                let spec = wanted["spec"].take();
                let mut next = there;
                next["spec"] = spec;
                self.ensure(GROUP, plural, next, true).await?;
            }
        }
        Ok(())
    }
}

/// Whether a value has everything of another; it may have defaults besides.
fn contains(there: &Value, wanted: &Value) -> bool {
    match (there, wanted) {
        (Value::Object(there), Value::Object(wanted)) => {
            wanted.iter().all(|(key, wanted)| there.get(key).is_some_and(|there| contains(there, wanted)))
        }
        (Value::Array(there), Value::Array(wanted)) => {
            there.len() == wanted.len() && there.iter().zip(wanted).all(|(there, wanted)| contains(there, wanted))
        }
        _ => there == wanted,
    }
}
