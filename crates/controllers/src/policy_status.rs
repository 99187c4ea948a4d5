//! Whether the expressions of validating policies fit the kinds that they are about
//! (<https://kubernetes.io/docs/reference/access-authn-authz/validating-admission-policy/#type-checking>). What does not is a
//! warning in the policy's status: it changes nothing of what the policy does.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use k8s_openapi::api::admissionregistration::v1::{ExpressionWarning, ValidatingAdmissionPolicy};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use seawall_api::cel::{Program, Type, of_policy_about, openapi, with_variables};
use serde_json::{Map, Value, json};

use crate::{
    context::Context,
    runtime::{Controller, Key, Queue, is_not_found, objects::name},
};

/// How many kinds of one rule a policy is checked against; with so many, those of further rules are not looked for.
const MOST_KINDS: usize = 10;

/// A group, a version, and a plural or a kind.
pub type Named = (String, String, String);

/// What a policy's expressions are about.
#[derive(Debug)]
pub struct Subject {
    /// The kind.
    pub kind: Named,
    /// What is known of its objects.
    pub ty: Type,
}

/// The resources of each rule of a policy that are named: with `*` nobody knows which.
pub fn resources(policy: &ValidatingAdmissionPolicy) -> Vec<Vec<Named>> {
    let constraints = policy.spec.as_ref().and_then(|spec| spec.match_constraints.as_ref());
    let rules = constraints.and_then(|constraints| constraints.resource_rules.as_ref()).into_iter().flatten();
    let sorted = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter().flatten().cloned().collect::<BTreeSet<_>>().into_iter().collect()
    };
    let of_rule = |groups: Vec<String>, versions: Vec<String>, plurals: &[String]| -> Vec<Named> {
        if groups.iter().chain(&versions).any(|name| name.contains('*')) {
            return Vec::new();
        }
        let plurals = || plurals.iter().filter(|plural| !plural.contains(['*', '/']));
        let all = groups.iter().flat_map(|group| versions.iter().map(move |version| (group, version)));
        all.flat_map(|(group, version)| plurals().map(|plural| (group.clone(), version.clone(), plural.clone())))
            .collect()
    };
    rules.map(|rule| of_rule(sorted(&rule.api_groups), sorted(&rule.api_versions), &sorted(&rule.resources))).collect()
}

/// The kinds of a policy's rules, of which `find` knows those that are served; in the order of group, version and kind.
pub fn kinds(rules: &[Vec<Named>], find: impl Fn(&Named) -> Option<Named>) -> BTreeSet<Named> {
    let mut kinds = BTreeSet::new();
    for rule in rules {
        let found: Vec<Named> = rule.iter().filter_map(&find).take(MOST_KINDS).collect();
        let full = found.len() == MOST_KINDS;
        kinds.extend(found);
        if full {
            break;
        }
    }
    kinds
}

/// What to warn of. `params` is of what type the parameters are, if the policy has any.
pub fn plan(policy: &ValidatingAdmissionPolicy, subjects: &[Subject], params: Option<&Type>) -> Vec<ExpressionWarning> {
    let Some(spec) = &policy.spec else { return Vec::new() };
    let scopes: Vec<_> = subjects
        .iter()
        .map(|subject| {
            let names = of_policy_about(&subject.ty, params);
            let mut variables: Vec<(String, Option<Program>)> = Vec::new();
            // A variable that does not fit is not warned of where it stands: what uses it could be anything.
            for variable in spec.variables.iter().flatten() {
                let program = Program::compile(&variable.expression, &with_variables(&names, &variables)).ok();
                variables.push((variable.name.clone(), program));
            }
            (subject, with_variables(&names, &variables))
        })
        .collect();
    let check = |field: String, expression: &str| {
        let mut warnings = Vec::new();
        for (subject, names) in &scopes {
            if let Err(error) = Program::compile(expression, names) {
                let (group, version, kind) = &subject.kind;
                warnings.push(format!("{group}/{version}, Kind={kind}: {}\n", error.0));
            }
        }
        (!warnings.is_empty()).then(|| ExpressionWarning { field_ref: field, warning: warnings.join("\n") })
    };
    let mut all = Vec::new();
    for (index, validation) in spec.validations.iter().flatten().enumerate() {
        all.extend(check(format!("spec.validations[{index}].expression"), &validation.expression));
        if let Some(message) = validation.message_expression.as_deref().filter(|text| !text.is_empty()) {
            all.extend(check(format!("spec.validations[{index}].messageExpression"), message));
        }
    }
    all
}

pub(crate) struct Policies {
    context: Arc<Context>,
}

impl Policies {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.validating_policies.on_change(move |_, new| {
            if let Some(policy) = new {
                q.add(Key::of(&**policy));
            }
        });
        (Arc::new(Policies { context }), queue)
    }
}

#[async_trait]
impl Controller for Policies {
    fn name(&self) -> &'static str {
        "validatingadmissionpolicystatus"
    }

    async fn ready(&self) {
        self.context.caches.validating_policies.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = &self.context.caches.validating_policies;
        let Some(policy) = cache.get(key) else { return Ok(None) };
        let observed = policy.status.as_ref().and_then(|status| status.observed_generation).unwrap_or(0);
        let generation = policy.metadata.generation.unwrap_or(0);
        if generation <= observed {
            return Ok(None);
        }
        let mut served =
            Served { client: self.context.client.clone(), resources: BTreeMap::new(), documents: BTreeMap::new() };
        let (subjects, params) = served.look(&policy).await?;
        let checked = policy.clone();
        let warnings = tokio::task::spawn_blocking(move || plan(&checked, &subjects, params.as_ref())).await?;
        let warnings = if warnings.is_empty() { Value::Null } else { json!(warnings) };
        let patch = json!({"metadata": {"resourceVersion": policy.metadata.resource_version},
            "status": {"observedGeneration": generation, "typeChecking": {"expressionWarnings": warnings}}});
        let api: Api<ValidatingAdmissionPolicy> = Api::all(self.context.client.clone());
        match api.patch_status(name(&*policy), &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(patched) => cache.note(patched),
            Err(error) if is_not_found(&error) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(None)
    }
}

/// What is served, as far as one policy asks.
struct Served {
    client: Client,
    /// The kinds of plurals, by group and version.
    resources: BTreeMap<(String, String), BTreeMap<String, String>>,
    /// What is described of a group and version.
    documents: BTreeMap<(String, String), Map<String, Value>>,
}

impl Served {
    async fn look(&mut self, policy: &ValidatingAdmissionPolicy) -> anyhow::Result<(Vec<Subject>, Option<Type>)> {
        let rules = resources(policy);
        for (group, version, _) in rules.iter().flatten() {
            self.discover(group, version).await?;
        }
        let kinds = kinds(&rules, |(group, version, plural)| {
            let kind = self.resources.get(&(group.clone(), version.clone()))?.get(plural)?;
            Some((group.clone(), version.clone(), kind.clone()))
        });
        let mut subjects = Vec::new();
        for kind in kinds {
            if let Some(ty) = self.describe(&kind).await? {
                subjects.push(Subject { kind, ty });
            }
        }
        let params = match policy.spec.as_ref().and_then(|spec| spec.param_kind.as_ref()) {
            None => None,
            Some(kind) => {
                let version = kind.api_version.as_deref().unwrap_or_default();
                let (group, version) = version.split_once('/').unwrap_or(("", version));
                let kind = (group.to_owned(), version.to_owned(), kind.kind.clone().unwrap_or_default());
                Some(self.describe(&kind).await?.unwrap_or(Type::Dyn))
            }
        };
        Ok((subjects, params))
    }

    async fn discover(&mut self, group: &str, version: &str) -> anyhow::Result<()> {
        let key = (group.to_owned(), version.to_owned());
        if self.resources.contains_key(&key) {
            return Ok(());
        }
        let found = match group {
            "" => self.client.list_core_api_resources(version).await,
            group => self.client.list_api_group_resources(&format!("{group}/{version}")).await,
        };
        let found = match found {
            Ok(found) => found.resources.into_iter().map(|resource| (resource.name, resource.kind)).collect(),
            Err(error) if is_not_found(&error) => BTreeMap::new(),
            Err(error) => return Err(error.into()),
        };
        self.resources.insert(key, found);
        Ok(())
    }

    /// What is known of a kind's objects; `None` if nothing is.
    async fn describe(&mut self, (group, version, kind): &Named) -> anyhow::Result<Option<Type>> {
        let key = (group.clone(), version.clone());
        if !self.documents.contains_key(&key) {
            let place = if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") };
            let request = http::Request::get(format!("/openapi/v3/{place}")).body(Vec::new())?;
            let mut document: Value = match self.client.request(request).await {
                Ok(document) => document,
                Err(error) if is_not_found(&error) => Value::Null,
                Err(error) => return Err(error.into()),
            };
            let schemas = document.pointer_mut("/components/schemas").map(Value::take);
            let schemas = if let Some(Value::Object(schemas)) = schemas { schemas } else { Map::new() };
            self.documents.insert(key.clone(), schemas);
        }
        Ok(self.documents.get(&key).and_then(|schemas| openapi::of_kind(schemas, group, version, kind)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(spec: Value) -> ValidatingAdmissionPolicy {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    fn rule(groups: &[&str], versions: &[&str], plurals: &[&str]) -> Value {
        json!({"apiGroups": groups, "apiVersions": versions, "resources": plurals, "operations": ["*"]})
    }

    fn named(group: &str, version: &str, kind: &str) -> Named {
        (group.into(), version.into(), kind.into())
    }

    #[test]
    fn which_kinds_a_policy_is_about() {
        // Plurals are kinds with an `s`, as far as anybody knows; of `x` nothing is served.
        let find = |(group, version, plural): &Named| {
            (group != "x").then(|| named(group, version, plural.trim_end_matches('s')))
        };
        let check = |rules: Value, expect: &[Named]| {
            let policy = policy(json!({"matchConstraints": {"resourceRules": rules}}));
            let found: Vec<Named> = kinds(&resources(&policy), find).into_iter().collect();
            assert_eq!(found, expect, "{rules}");
        };
        let deployments = rule(&["apps"], &["v1"], &["deployments"]);
        let deployment = named("apps", "v1", "deployment");
        check(json!([]), &[]);
        check(json!([deployments]), std::slice::from_ref(&deployment));
        check(json!([deployments, rule(&[""], &["v1"], &["pods"])]), &[named("", "v1", "pod"), deployment.clone()]);
        check(json!([rule(&["apps"], &["v1"], &["*"])]), &[]);
        check(json!([rule(&["apps"], &["v1"], &["pods/*", "deployments/scale"])]), &[]);
        check(json!([rule(&["*"], &["v1"], &["pods"])]), &[]);
        check(json!([deployments, rule(&["apps"], &["*"], &["deployments"])]), std::slice::from_ref(&deployment));
        check(json!([rule(&["x", "apps"], &["v1"], &["deployments"])]), std::slice::from_ref(&deployment));
        let many: Vec<String> = (0..12).map(|n| format!("k{n:02}s")).collect();
        let many = rule(&["g"], &["v1"], &many.iter().map(String::as_str).collect::<Vec<_>>());
        let first: Vec<Named> = (0..10).map(|n| named("g", "v1", &format!("k{n:02}"))).collect();
        check(json!([many, deployments]), &first);
        // Each rule has as many.
        let with_first: Vec<Named> = std::iter::once(deployment).chain(first).collect();
        check(json!([deployments, many]), &with_first);
    }

    fn type_of(properties: Value) -> Type {
        let document = json!({"k": {"type": "object", "properties": properties,
            "x-kubernetes-group-version-kind": [{"group": "", "version": "v1", "kind": "K"}]}});
        openapi::of_kind(document.as_object().unwrap(), "", "v1", "K").unwrap()
    }

    #[test]
    fn what_does_not_fit_is_warned_of() {
        let text =
            || Subject { kind: named("apps", "v1", "Deployment"), ty: type_of(json!({"foo": {"type": "string"}})) };
        let number = || Subject { kind: named("", "v1", "Pod"), ty: type_of(json!({"foo": {"type": "integer"}})) };
        let check = |spec: Value, subjects: &[Subject], params: Option<Type>, expect: &[(&str, &str)]| {
            let found = plan(&policy(spec.clone()), subjects, params.as_ref());
            let found: Vec<(&str, &str)> = found.iter().map(|w| (&*w.field_ref, &*w.warning)).collect();
            assert_eq!(found, expect, "{spec}");
        };
        let one = |expression: &str| json!({"validations": [{"expression": expression}]});
        check(one("object.foo == 'bar'"), &[text()], None, &[]);
        check(one("oldObject == null || oldObject.foo == 'bar'"), &[text()], None, &[]);
        check(one("object.bar == 'bar'"), &[], None, &[]);
        let undefined =
            "apps/v1, Kind=Deployment: ERROR: <input>:1:7: undefined field 'bar'\n | object.bar == 'x'\n | ......^\n";
        check(one("object.bar == 'x'"), &[text()], None, &[("spec.validations[0].expression", undefined)]);
        let overload = "/v1, Kind=Pod: ERROR: <input>:1:12: found no matching overload for '_==_' applied to '(int, string)'\n | object.foo == 'x'\n | ...........^\n";
        check(one("object.foo == 'x'"), &[text(), number()], None, &[("spec.validations[0].expression", overload)]);
        let both = [
            "apps/v1, Kind=Deployment: ERROR: <input>:1:7: undefined field 'a'\n | object.a\n | ......^\n",
            "/v1, Kind=Pod: ERROR: <input>:1:7: undefined field 'a'\n | object.a\n | ......^\n",
        ]
        .join("\n");
        check(one("object.a"), &[text(), number()], None, &[("spec.validations[0].expression", &both)]);
        let message = json!({"validations": [{"expression": "true"}, {"expression": "object.foo == 'x'", "messageExpression": "object.a"}]});
        let warning = "apps/v1, Kind=Deployment: ERROR: <input>:1:7: undefined field 'a'\n | object.a\n | ......^\n";
        check(message, &[text()], None, &[("spec.validations[1].messageExpression", warning)]);
        // What it comes to is not looked at: that was when it was written.
        check(one("1 + 1"), &[text()], None, &[]);
        check(one("authorizer.group('').resource('pods').check('get').allowed()"), &[text()], None, &[]);
    }

    #[test]
    fn parameters_and_variables_have_types() {
        let subject = || [Subject { kind: named("", "v1", "K"), ty: type_of(json!({"foo": {"type": "string"}})) }];
        let count = |spec: Value, params: Option<Type>| plan(&policy(spec), &subject(), params.as_ref()).len();
        let one = |expression: &str| {
            json!({"validations": [{"expression": expression}], "variables": [
            {"name": "foo", "expression": "object.foo"}, {"name": "wrong", "expression": "object.none"},
            {"name": "more", "expression": "variables.foo.size()"}]})
        };
        assert_eq!(count(one("params.most == object.foo"), Some(type_of(json!({"most": {"type": "string"}})))), 0);
        assert_eq!(count(one("params.most == object.foo"), Some(type_of(json!({"most": {"type": "integer"}})))), 1);
        assert_eq!(count(one("params.most == object.foo"), Some(Type::Dyn)), 0);
        assert_eq!(count(one("params.most == object.foo"), None), 1);
        assert_eq!(count(one("variables.foo == 'a' && variables.more == 1"), None), 0);
        assert_eq!(count(one("variables.foo == 1"), None), 1);
        assert_eq!(count(one("variables.wrong.x == 1"), None), 0);
        assert_eq!(count(one("variables.none == 1"), None), 1);
    }
}
