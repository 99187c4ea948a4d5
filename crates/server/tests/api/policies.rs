//! Admission policies, through the whole pipeline.

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{MAPS, MERGE, harness::Api, map};

const GROUP: &str = "/apis/admissionregistration.k8s.io/v1";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";

fn deployment(name: &str, replicas: i64) -> Value {
    let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    json!({"metadata": {"name": name}, "spec": {"replicas": replicas, "selector": {"matchLabels": {"a": "b"}}, "template": template}})
}

fn rule(group: &str, resource: &str) -> Value {
    json!({"operations": ["CREATE", "UPDATE"], "apiGroups": [group], "apiVersions": ["v1"], "resources": [resource]})
}

async fn policy(api: &Api, name: &str, rule: Value, more: Value) {
    let mut spec = json!({"matchConstraints": {"resourceRules": [rule]}});
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    let made = json!({"metadata": {"name": name}, "spec": spec});
    let plural = if spec["mutations"].is_array() { "mutatingadmissionpolicies" } else { "validatingadmissionpolicies" };
    api.create(&format!("{GROUP}/{plural}"), made).await;
}

async fn bind(api: &Api, policy: &str, more: Value) {
    let mut spec = json!({"policyName": policy, "validationActions": ["Deny"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    let made = json!({"metadata": {"name": format!("{policy}-binding")}, "spec": spec});
    api.create(&format!("{GROUP}/validatingadmissionpolicybindings"), made).await;
}

#[tokio::test]
async fn a_policy_refuses() {
    let api = Api::new().await;
    let checks = json!([
        {"expression": "variables.replicas <= 5", "messageExpression": "'at most 5 replicas, not ' + string(variables.replicas)"},
        {"expression": "object.metadata.name != 'ugly'", "message": "give it a better name", "reason": "Forbidden"},
        {"expression": "object.metadata.name != 'plain'"},
        {"expression": "object.metadata.name != 'wrong' || object.spec.nothing == 1"},
        {"expression": "object.metadata.name != 'secret' || authorizer.group('').resource('secrets').check('get').allowed() == false"},
        {"expression": "object.metadata.name != 'home' || namespaceObject.metadata.name == 'elsewhere'", "message": "wrong home"},
    ]);
    let variables = json!([{"name": "replicas", "expression": "object.spec.replicas"}]);
    policy(&api, "p", rule("apps", "deployments"), json!({"validations": checks, "variables": variables})).await;
    // Without a binding it is in force nowhere.
    api.create(DEPLOYMENTS, deployment("many", 7)).await;
    bind(&api, "p", json!({})).await;
    let by = "denied request: ";
    for (name, replicas, code, reason, why) in [
        ("more", 6, 422, "Invalid", "at most 5 replicas, not 6"),
        ("ugly", 1, 403, "Forbidden", "give it a better name"),
        ("plain", 1, 422, "Invalid", "failed expression: object.metadata.name != 'plain'"),
        (
            "wrong",
            1,
            422,
            "Invalid",
            "expression 'object.metadata.name != 'wrong' || object.spec.nothing == 1' resulted in error: no such key: nothing",
        ),
        ("home", 1, 422, "Invalid", "wrong home"),
    ] {
        let (found, why_code, message) = api.fails(Method::POST, DEPLOYMENTS, deployment(name, replicas)).await;
        assert_eq!((found, &*why_code), (code, reason), "{message}");
        let prefix =
            format!("deployments.apps {name:?} is forbidden: ValidatingAdmissionPolicy 'p' with binding 'p-binding' ");
        assert_eq!(message, format!("{prefix}{by}{why}"));
    }
    let message = api.fails(Method::POST, DEPLOYMENTS, deployment("secret", 1)).await.2;
    assert!(message.contains("failed expression"), "{message}");
    api.create(DEPLOYMENTS, deployment("good", 1)).await;
    let (status, _) =
        api.call(Method::PATCH, &format!("{DEPLOYMENTS}/good"), MERGE, json!({"spec": {"replicas": 6}})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    // It is gone as soon as its removal has been answered.
    let path = format!("{GROUP}/validatingadmissionpolicybindings/p-binding");
    assert_eq!(api.call(Method::DELETE, &path, "", Value::Null).await.0, StatusCode::OK);
    api.create(DEPLOYMENTS, deployment("ugly", 9)).await;
}

/// Parameters are usually of a kind that was made for them.
#[tokio::test]
async fn parameters_of_a_custom_kind() {
    let api = Api::new().await;
    let schema = json!({"type": "object", "properties": {"most": {"type": "integer"}}});
    crate::crd::define(
        &api,
        json!({"metadata": {"name": "limits.example.com"}, "spec": {
        "group": "example.com", "scope": "Namespaced", "names": {"plural": "limits", "kind": "Limit"},
        "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}]}}),
    )
    .await;
    let param = json!({"apiVersion": "example.com/v1", "kind": "Limit"});
    let check = json!([{"expression": "object.spec.replicas <= params.most"}]);
    policy(&api, "p", rule("apps", "deployments"), json!({"validations": check, "paramKind": param})).await;
    let reference = json!({"name": "l", "namespace": "default", "parameterNotFoundAction": "Deny"});
    bind(&api, "p", json!({"paramRef": reference})).await;
    assert_eq!(api.fails(Method::POST, DEPLOYMENTS, deployment("a", 1)).await.0, 422);
    api.create(
        "/apis/example.com/v1/namespaces/default/limits",
        json!({"apiVersion": "example.com/v1", "kind": "Limit",
        "metadata": {"name": "l"}, "most": 2}),
    )
    .await;
    api.create(DEPLOYMENTS, deployment("a", 2)).await;
    assert_eq!(api.fails(Method::POST, DEPLOYMENTS, deployment("b", 3)).await.0, 422);
}

#[tokio::test]
async fn parameters_actions_and_failures() {
    let api = Api::new().await;
    let param = json!({"apiVersion": "v1", "kind": "ConfigMap"});
    let check = json!([{"expression": "object.spec.replicas <= int(params.data.most)"}]);
    policy(&api, "p", rule("apps", "deployments"), json!({"validations": check, "paramKind": param})).await;
    let reference = json!({"name": "limits", "namespace": "default", "parameterNotFoundAction": "Deny"});
    bind(&api, "p", json!({"paramRef": reference})).await;
    let message = api.fails(Method::POST, DEPLOYMENTS, deployment("a", 1)).await.2;
    assert!(message.contains("no params found for policy binding with `Deny` parameterNotFoundAction"), "{message}");
    api.create(MAPS, map("limits", json!({"most": "2"}))).await;
    api.create(DEPLOYMENTS, deployment("a", 2)).await;
    assert_eq!(api.fails(Method::POST, DEPLOYMENTS, deployment("b", 3)).await.0, 422);
    // By selector: each of those that are found counts.
    let path = format!("{GROUP}/validatingadmissionpolicybindings/p-binding");
    let selector = json!({"spec": {"paramRef": {"name": null, "selector": {"matchLabels": {"limits": "yes"}}, "parameterNotFoundAction": "Allow"}}});
    assert_eq!(api.call(Method::PATCH, &path, MERGE, selector).await.0, StatusCode::OK);
    api.create(DEPLOYMENTS, deployment("b", 3)).await;
    for (name, most) in [("five", "5"), ("four", "4")] {
        let map = json!({"metadata": {"name": name, "labels": {"limits": "yes"}}, "data": {"most": most}});
        api.create(MAPS, map).await;
    }
    assert_eq!(api.fails(Method::POST, DEPLOYMENTS, deployment("c", 5)).await.0, 422);
    api.create(DEPLOYMENTS, deployment("c", 4)).await;
    // A warning lets it through.
    let actions = json!({"spec": {"validationActions": ["Warn", "Audit"]}});
    assert_eq!(api.call(Method::PATCH, &path, MERGE, actions).await.0, StatusCode::OK);
    let response = api
        .raw(Method::POST, DEPLOYMENTS, &[("content-type", "application/json")], deployment("d", 9).to_string())
        .await;
    assert_eq!(response.status(), StatusCode::CREATED);
    let warning = response.headers()["warning"].to_str().unwrap();
    assert!(
        warning.contains(
            "Validation failed for ValidatingAdmissionPolicy 'p' with binding 'p-binding': failed expression:"
        ),
        "{warning}"
    );
    // Failures can be let through, refusals cannot.
    let lax = json!({"failurePolicy": "Ignore", "validations": [{"expression": "object.nothing == 1"}, {"expression": "object.metadata.name != 'e'"}]});
    policy(&api, "lax", rule("apps", "deployments"), lax).await;
    bind(&api, "lax", json!({})).await;
    api.create(DEPLOYMENTS, deployment("f", 1)).await;
    assert_eq!(api.fails(Method::POST, DEPLOYMENTS, deployment("e", 1)).await.0, 422);
    // Something that is not bounded is stopped.
    let numbers = (0..60).map(|n| n.to_string()).collect::<Vec<_>>().join(", ");
    let text = format!("cel.bind(x, [{numbers}], x.all(a, x.all(b, x.all(c, x.all(d, a + b + c + d >= 0)))))");
    policy(&api, "slow", rule("", "configmaps"), json!({"validations": [{"expression": text}]})).await;
    bind(&api, "slow", json!({})).await;
    let message = api.fails(Method::POST, MAPS, map("x", json!({}))).await.2;
    assert!(message.ends_with("operation cancelled: actual cost limit exceeded"), "{message}");
}

#[tokio::test]
async fn conditions_scopes_and_bindings() {
    let api = Api::new().await;
    api.create("/api/v1/namespaces", json!({"metadata": {"name": "prod", "labels": {"env": "prod"}}})).await;
    let checks = json!([{"expression": "false", "message": "no"}]);
    let conditions = json!([{"name": "no-system", "expression": "!object.metadata.name.startsWith('system-')"}]);
    policy(&api, "p", rule("", "configmaps"), json!({"validations": checks, "matchConditions": conditions})).await;
    bind(&api, "p", json!({"matchResources": {"namespaceSelector": {"matchLabels": {"env": "prod"}}}})).await;
    api.create(MAPS, map("a", json!({}))).await;
    let prod = "/api/v1/namespaces/prod/configmaps";
    assert_eq!(api.fails(Method::POST, prod, map("a", json!({}))).await.0, 422);
    api.create(prod, map("system-a", json!({}))).await;
}

#[tokio::test]
async fn policies_that_change_objects() {
    let api = Api::new().await;
    let mutate = |mutations: Value| json!({"reinvocationPolicy": "Never", "mutations": mutations});
    let apply = "Object{metadata: Object.metadata{labels: {'team': object.metadata.name}}, \
        spec: Object.spec{template: Object.spec.template{spec: Object.spec.template.spec{containers: [\
            Object.spec.template.spec.containers{name: 'sidecar', image: 'proxy'}]}}}}";
    let patch = "[JSONPatch{op: 'add', path: '/metadata/annotations', value: {'a/b': 'c'}}, \
        JSONPatch{op: 'add', path: '/metadata/annotations/' + jsonpatch.escapeKey('d/e'), value: string(object.spec.replicas)}]";
    let mutations = json!([
        {"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": apply}},
        {"patchType": "JSONPatch", "jsonPatch": {"expression": patch}},
    ]);
    let spec = mutate(mutations);
    policy(&api, "m", rule("apps", "deployments"), spec).await;
    let binding = json!({"metadata": {"name": "m"}, "spec": {"policyName": "m"}});
    api.create(&format!("{GROUP}/mutatingadmissionpolicybindings"), binding).await;
    let made = api.create(DEPLOYMENTS, deployment("a", 2)).await;
    assert_eq!(made["metadata"]["labels"], json!({"team": "a"}));
    assert_eq!(made["metadata"]["annotations"], json!({"a/b": "c", "d/e": "2"}));
    let containers = made["spec"]["template"]["spec"]["containers"].as_array().unwrap();
    let mut names: Vec<&str> = containers.iter().map(|c| c["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["c", "sidecar"]);
    // What it adds has defaults, as everything has.
    assert!(containers.iter().all(|c| c["terminationMessagePath"] == "/dev/termination-log"));
    // What cannot be done refuses.
    let wrong =
        json!([{"patchType": "JSONPatch", "jsonPatch": {"expression": "[JSONPatch{op: 'remove', path: '/nothing'}]"}}]);
    policy(&api, "wrong", rule("", "configmaps"), mutate(wrong)).await;
    let binding = json!({"metadata": {"name": "wrong"}, "spec": {"policyName": "wrong"}});
    api.create(&format!("{GROUP}/mutatingadmissionpolicybindings"), binding).await;
    let (code, _, message) = api.fails(Method::POST, MAPS, map("a", json!({}))).await;
    assert_eq!(code, 403, "{message}");
    assert!(message.contains("policy 'wrong' with binding 'wrong' denied request: JSON patch: "), "{message}");
}

#[tokio::test]
async fn what_is_no_policy() {
    let api = Api::new().await;
    let path = format!("{GROUP}/validatingadmissionpolicies");
    let bad = json!({"metadata": {"name": "p"}, "spec": {"matchConstraints": {"resourceRules": [rule("", "configmaps")]},
        "validations": [{"expression": "objekt.a"}]}});
    let (code, _, message) = api.fails(Method::POST, &path, bad).await;
    assert_eq!(code, 422);
    assert!(
        message.contains("spec.validations[0].expression: Invalid value: \"objekt.a\": compilation failed: "),
        "{message}"
    );
}
