//! Webhooks and policies, read once when they have changed.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, OnceLock},
};

use parking_lot::Mutex;
use seawall_api::cel::{CompileError, Program, Variable, of_policy, of_webhooks, with_variables};
use seawall_store::Revision;
use serde_json::Value;

use super::rules::{Scope, Selector};
use crate::{
    cache::{Objects, Snapshot},
    registry::{Registry, ResourceId},
};

/// The group of webhooks and policies.
pub(crate) const GROUP: &str = "admissionregistration.k8s.io";

/// An expression with its name; one that does not compile fails whenever it is asked.
pub(crate) type Named = (String, Result<Program, CompileError>);

/// A webhook.
#[derive(Debug)]
pub(crate) struct Webhook {
    pub name: String,
    pub scope: Scope,
    pub conditions: Vec<Named>,
    /// `failurePolicy: Ignore`.
    pub ignore_failure: bool,
    pub timeout: u64,
    /// Whether it may be called when nothing is written.
    pub dry_run: bool,
    pub reinvoke: bool,
    pub client: Value,
}

/// What a violation leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) enum Action {
    Deny,
    Warn,
    Audit,
}

/// A rule of a policy.
#[derive(Debug)]
pub(crate) struct Check {
    pub expression: Named,
    pub message: Option<String>,
    pub message_expression: Option<Result<Program, CompileError>>,
    pub reason: Option<String>,
}

/// What a mutating policy does.
#[derive(Debug)]
pub(crate) struct Mutation {
    /// Whether the expression makes a list of patches, or an object that is merged.
    pub json_patch: bool,
    pub expression: Named,
}

/// A policy.
#[derive(Debug)]
pub(crate) struct Policy {
    pub name: String,
    pub scope: Scope,
    pub conditions: Vec<Named>,
    pub variables: Vec<(String, Program)>,
    /// The first variable that does not compile.
    pub broken: Option<CompileError>,
    pub checks: Vec<Check>,
    pub annotations: Vec<Named>,
    pub mutations: Vec<Mutation>,
    pub ignore_failure: bool,
    pub reinvoke: bool,
    /// `apiVersion` and `kind` of its parameters.
    pub params: Option<(String, String)>,
}

/// What puts a policy in force.
#[derive(Debug)]
pub(crate) struct Binding {
    pub name: String,
    pub policy: String,
    pub scope: Scope,
    pub actions: Vec<Action>,
    pub param_name: String,
    pub param_namespace: String,
    pub param_selector: Option<Selector>,
    /// `parameterNotFoundAction: Allow`.
    pub allow_missing: bool,
}

/// A policy with what puts it in force.
pub(crate) type Bound = (Arc<Policy>, Vec<Arc<Binding>>);

/// Everything that is registered, in the order in which it is asked.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub mutating_webhooks: Vec<Arc<Webhook>>,
    pub validating_webhooks: Vec<Arc<Webhook>>,
    pub mutating_policies: Vec<Bound>,
    pub validating_policies: Vec<Bound>,
}

impl Index {
    /// Whether nothing is registered.
    pub fn is_empty(&self) -> bool {
        self.mutating_webhooks.is_empty()
            && self.validating_webhooks.is_empty()
            && self.mutating_policies.is_empty()
            && self.validating_policies.is_empty()
    }
}

#[derive(Clone)]
enum Read {
    Webhooks(Vec<Arc<Webhook>>),
    Policy(Arc<Policy>),
    Binding(Arc<Binding>),
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn named(values: &Value, key: &str, expression: &str, variables: &[Variable<'_>]) -> Vec<Named> {
    let one = |value: &Value| {
        let source = value[expression].as_str().unwrap_or_default();
        (text(&value[key]), Program::compile(source, variables))
    };
    list(values).map(one).collect()
}

fn webhook(value: &Value) -> Webhook {
    Webhook {
        name: text(&value["name"]),
        scope: Scope::of_webhook(value),
        conditions: named(&value["matchConditions"], "name", "expression", &of_webhooks()),
        ignore_failure: value["failurePolicy"] == "Ignore",
        timeout: value["timeoutSeconds"].as_u64().unwrap_or(10).clamp(1, 30),
        dry_run: matches!(value["sideEffects"].as_str(), Some("None" | "NoneOnDryRun")),
        reinvoke: value["reinvocationPolicy"] == "IfNeeded",
        client: value["clientConfig"].clone(),
    }
}

fn policy(object: &Value) -> Policy {
    let spec = &object["spec"];
    let plain = of_policy(spec["paramKind"].is_object());
    let (mut variables, mut broken): (Vec<(String, Option<Program>)>, _) = (Vec::new(), None);
    for variable in list(&spec["variables"]) {
        let source = variable["expression"].as_str().unwrap_or_default();
        let program = Program::compile(source, &with_variables(&plain, &variables));
        let program = program.map_err(|error| broken = broken.take().or(Some(error))).ok();
        variables.push((text(&variable["name"]), program));
    }
    let names = with_variables(&plain, &variables);
    let variables = variables.into_iter().filter_map(|(name, program)| Some((name, program?))).collect();
    let compile = |value: &Value| Program::compile(value.as_str().unwrap_or_default(), &names);
    let check = |value: &Value| Check {
        expression: (text(&value["expression"]), compile(&value["expression"])),
        message: value["message"].as_str().filter(|m| !m.is_empty()).map(str::to_owned),
        message_expression: value["messageExpression"]
            .as_str()
            .filter(|m| !m.is_empty())
            .map(|m| Program::compile(m, &names)),
        reason: value["reason"].as_str().filter(|r| !r.is_empty()).map(str::to_owned),
    };
    let mutation = |value: &Value| {
        let json_patch = value["patchType"] == "JSONPatch";
        let source = &value[if json_patch { "jsonPatch" } else { "applyConfiguration" }]["expression"];
        Mutation { json_patch, expression: (text(source), compile(source)) }
    };
    Policy {
        name: text(&object["metadata"]["name"]),
        scope: Scope::of_policy(&spec["matchConstraints"], false),
        conditions: named(&spec["matchConditions"], "name", "expression", &plain),
        variables,
        broken,
        checks: list(&spec["validations"]).map(check).collect(),
        annotations: named(&spec["auditAnnotations"], "key", "valueExpression", &names),
        mutations: list(&spec["mutations"]).map(mutation).collect(),
        ignore_failure: spec["failurePolicy"] == "Ignore",
        reinvoke: spec["reinvocationPolicy"] == "IfNeeded",
        params: spec["paramKind"]
            .is_object()
            .then(|| (text(&spec["paramKind"]["apiVersion"]), text(&spec["paramKind"]["kind"]))),
    }
}

fn binding(object: &Value) -> Binding {
    let spec = &object["spec"];
    let action = |value: &Value| match value.as_str() {
        Some("Warn") => Action::Warn,
        Some("Audit") => Action::Audit,
        _ => Action::Deny,
    };
    let param = &spec["paramRef"];
    Binding {
        name: text(&object["metadata"]["name"]),
        policy: text(&spec["policyName"]),
        scope: Scope::of_policy(&spec["matchResources"], true),
        actions: list(&spec["validationActions"]).map(action).collect(),
        param_name: text(&param["name"]),
        param_namespace: text(&param["namespace"]),
        param_selector: param["selector"].is_object().then(|| Selector::read(&param["selector"])),
        allow_missing: param["parameterNotFoundAction"] == "Allow",
    }
}

const PLURALS: [&str; 6] = [
    "mutatingwebhookconfigurations",
    "validatingwebhookconfigurations",
    "mutatingadmissionpolicies",
    "mutatingadmissionpolicybindings",
    "validatingadmissionpolicies",
    "validatingadmissionpolicybindings",
];

/// What is registered, as the cache has it.
#[derive(Default)]
pub(crate) struct Registered {
    ids: OnceLock<Vec<(ResourceId, &'static str)>>,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    maps: Vec<Objects>,
    read: HashMap<Arc<str>, (Revision, Read)>,
    index: Arc<Index>,
}

impl Registered {
    /// The index of a snapshot. It is only made anew when something has changed, from what has changed.
    pub fn index(&self, registry: &Registry, snapshot: &Snapshot) -> Arc<Index> {
        let ids = self.ids.get_or_init(|| {
            PLURALS.iter().filter_map(|plural| Some((registry.by_name(GROUP, plural)?.0, *plural))).collect()
        });
        let mut last = self.last.lock();
        let same = |(at, (id, _)): (usize, &(ResourceId, &str))| {
            last.maps.get(at).is_some_and(|map| map.ptr_eq(snapshot.of(*id)))
        };
        if last.maps.len() == ids.len() && ids.iter().enumerate().all(same) {
            return last.index.clone();
        }
        let mut read = HashMap::with_capacity(last.read.len());
        let mut index = Index::default();
        let mut bindings: HashMap<(bool, String), Vec<Arc<Binding>>> = HashMap::new();
        let mut policies: BTreeMap<(bool, String), Arc<Policy>> = BTreeMap::new();
        for (id, plural) in ids {
            let mutating = plural.starts_with("mutating");
            for (key, object) in snapshot.of(*id) {
                let known = last.read.get(key).filter(|(revision, _)| *revision == object.revision);
                let found = known.map(|(_, found)| found.clone()).unwrap_or_else(|| parse(plural, &object.value()));
                match &found {
                    Read::Webhooks(hooks) if mutating => index.mutating_webhooks.extend(hooks.iter().cloned()),
                    Read::Webhooks(hooks) => index.validating_webhooks.extend(hooks.iter().cloned()),
                    Read::Policy(policy) => {
                        policies.insert((mutating, policy.name.clone()), policy.clone());
                    }
                    Read::Binding(binding) => {
                        bindings.entry((mutating, binding.policy.clone())).or_default().push(binding.clone());
                    }
                }
                read.insert(key.clone(), (object.revision, found));
            }
        }
        for (key, policy) in policies {
            let Some(bindings) = bindings.remove(&key) else { continue };
            match key.0 {
                true => index.mutating_policies.push((policy, bindings)),
                false => index.validating_policies.push((policy, bindings)),
            }
        }
        let index = Arc::new(index);
        *last = Last { maps: ids.iter().map(|(id, _)| snapshot.of(*id).clone()).collect(), read, index: index.clone() };
        index
    }
}

fn parse(plural: &str, object: &Value) -> Read {
    match plural {
        "mutatingwebhookconfigurations" | "validatingwebhookconfigurations" => {
            Read::Webhooks(list(&object["webhooks"]).map(|value| Arc::new(webhook(value))).collect())
        }
        "mutatingadmissionpolicies" | "validatingadmissionpolicies" => Read::Policy(Arc::new(policy(object))),
        _ => Read::Binding(Arc::new(binding(object))),
    }
}
