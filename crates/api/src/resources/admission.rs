//! Admission webhooks and policies
//! (<https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/>,
//! <https://kubernetes.io/docs/reference/access-authn-authz/validating-admission-policy/>).

use k8s_openapi::api::admissionregistration::v1::{
    MutatingAdmissionPolicy, MutatingAdmissionPolicyBinding, MutatingWebhookConfiguration, ValidatingAdmissionPolicy,
    ValidatingAdmissionPolicyBinding, ValidatingWebhookConfiguration,
};
use serde_json::{Value, json};

use super::{default, items, meta, with_status};
use crate::{
    cel::{Program, Type, Variable, of_policy, of_webhooks, with_variables},
    field::{Errors, Path},
    row::{Row, Validation, col, row as base},
};

const OPERATIONS: [&str; 5] = ["*", "CREATE", "UPDATE", "DELETE", "CONNECT"];
/// How many conditions something may have.
const CONDITIONS: usize = 64;

pub(super) fn rows() -> [Row; 6] {
    let webhooks = |row: Row| Row {
        columns: const { &[col("Webhooks", "integer"), col("Age", "date")] },
        cells: |o, now| vec![items(o, "webhooks").count().into(), crate::cell::age(o, now)],
        generation: true,
        ..row
    };
    let policy = |row: Row| Row { defaults: policy_defaults, ..row };
    [
        Row {
            defaults: |o| webhook_defaults(o, true),
            validate: |v, errors| validate_webhooks(v, true, errors),
            ..webhooks(base::<MutatingWebhookConfiguration>())
        },
        Row {
            defaults: |o| webhook_defaults(o, false),
            validate: |v, errors| validate_webhooks(v, false, errors),
            ..webhooks(base::<ValidatingWebhookConfiguration>())
        },
        Row {
            columns: const { &[col("Validations", "integer"), col("ParamKind", "string"), col("Age", "date")] },
            cells: |o, now| {
                let spec = &o["spec"];
                vec![items(spec, "validations").count().into(), param_kind(spec), crate::cell::age(o, now)]
            },
            validate: validating_policy,
            ..policy(with_status(base::<ValidatingAdmissionPolicy>()))
        },
        Row {
            columns: const { &[col("PolicyName", "string"), col("ParamRef", "string"), col("Age", "date")] },
            cells: binding_cells,
            defaults: |o| scope_defaults(o.pointer_mut("/spec/matchResources")),
            validate: |v, errors| binding(v, true, errors),
            generation: true,
            ..base::<ValidatingAdmissionPolicyBinding>()
        },
        Row {
            columns: const { &[col("Mutations", "integer"), col("ParamKind", "string"), col("Age", "date")] },
            cells: |o, now| {
                let spec = &o["spec"];
                vec![items(spec, "mutations").count().into(), param_kind(spec), crate::cell::age(o, now)]
            },
            validate: mutating_policy,
            generation: true,
            ..policy(base::<MutatingAdmissionPolicy>())
        },
        Row {
            columns: const { &[col("PolicyName", "string"), col("ParamRef", "string"), col("Age", "date")] },
            cells: binding_cells,
            defaults: |o| scope_defaults(o.pointer_mut("/spec/matchResources")),
            validate: |v, errors| binding(v, false, errors),
            generation: true,
            ..base::<MutatingAdmissionPolicyBinding>()
        },
    ]
}

fn param_kind(spec: &Value) -> Value {
    match (spec["paramKind"]["apiVersion"].as_str(), spec["paramKind"]["kind"].as_str()) {
        (Some(version), Some(kind)) => format!("{version}/{kind}").into(),
        _ => "<unset>".into(),
    }
}

fn binding_cells(o: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let param = &o["spec"]["paramRef"];
    let shown = match (param["namespace"].as_str(), param["name"].as_str()) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
        (None, Some(name)) => name.to_owned(),
        _ if param["selector"].is_object() => {
            return vec![
                crate::cell::text(&o["spec"]["policyName"]),
                crate::cell::selector(&param["selector"]),
                crate::cell::age(o, now),
            ];
        }
        _ => "<unset>".to_owned(),
    };
    vec![crate::cell::text(&o["spec"]["policyName"]), shown.into(), crate::cell::age(o, now)]
}

fn rule_defaults(rules: Option<&mut Value>) {
    for rule in rules.and_then(Value::as_array_mut).into_iter().flatten() {
        default(rule, "scope", "*");
    }
}

/// What leaves nothing out is written down.
fn scope_defaults(scope: Option<&mut Value>) {
    let Some(scope) = scope.filter(|scope| scope.is_object()) else { return };
    default(scope, "matchPolicy", "Equivalent");
    default(scope, "namespaceSelector", json!({}));
    default(scope, "objectSelector", json!({}));
    rule_defaults(scope.get_mut("resourceRules"));
    rule_defaults(scope.get_mut("excludeResourceRules"));
}

fn webhook_defaults(o: &mut Value, mutating: bool) {
    for webhook in o.get_mut("webhooks").and_then(Value::as_array_mut).into_iter().flatten() {
        if !webhook.is_object() {
            continue;
        }
        default(webhook, "failurePolicy", "Fail");
        default(webhook, "matchPolicy", "Equivalent");
        default(webhook, "namespaceSelector", json!({}));
        default(webhook, "objectSelector", json!({}));
        default(webhook, "timeoutSeconds", 10);
        if mutating {
            default(webhook, "reinvocationPolicy", "Never");
        }
        if let Some(service) = webhook.pointer_mut("/clientConfig/service").filter(|service| service.is_object()) {
            default(service, "port", 443);
        }
        rule_defaults(webhook.get_mut("rules"));
    }
}

fn policy_defaults(o: &mut Value) {
    let Some(spec) = o.get_mut("spec").filter(|spec| spec.is_object()) else { return };
    default(spec, "failurePolicy", "Fail");
    scope_defaults(spec.get_mut("matchConstraints"));
}

/// A text in a list with others, where one of them stands for all.
fn all_or_some(rule: &Value, key: &str, what: &str, path: Path<'_>, errors: &mut Errors) {
    let path = path.at(key);
    let list: Vec<&str> = items(rule, key).filter_map(Value::as_str).collect();
    if list.is_empty() {
        errors.required(path, "");
    }
    if list.len() > 1 && list.contains(&"*") {
        errors.invalid(path, json!(list), format!("if '*' is present, must not specify other {what}"));
    }
    for (index, text) in list.iter().enumerate() {
        if text.is_empty() && key != "apiGroups" {
            errors.required(path.index(index), "");
        }
    }
}

fn rules(list: &Value, key: &str, path: Path<'_>, errors: &mut Errors) {
    let path = path.at(key);
    for (index, rule) in items(list, key).enumerate() {
        let path = path.index(index);
        all_or_some(rule, "operations", "operations", path, errors);
        for (index, operation) in items(rule, "operations").filter_map(Value::as_str).enumerate() {
            if !OPERATIONS.contains(&operation) {
                errors.not_supported(path.at("operations").index(index), operation, &OPERATIONS);
            }
        }
        all_or_some(rule, "apiGroups", "API groups", path, errors);
        all_or_some(rule, "apiVersions", "API versions", path, errors);
        let resources: Vec<&str> = items(rule, "resources").filter_map(Value::as_str).collect();
        let at = path.at("resources");
        if resources.is_empty() {
            errors.required(at, "");
        }
        if resources.len() > 1 && resources.contains(&"*/*") {
            errors.invalid(at, json!(resources), "if '*/*' is present, must not specify other resources");
        }
        for (index, resource) in resources.iter().enumerate() {
            if resource.is_empty() {
                errors.required(at.index(index), "");
            }
        }
        meta::one_of(rule, "scope", &["*", "Cluster", "Namespaced"], path, errors);
    }
}

fn scope(value: &Value, path: Path<'_>, errors: &mut Errors) {
    meta::selector(&value["namespaceSelector"], path.at("namespaceSelector"), errors);
    meta::selector(&value["objectSelector"], path.at("objectSelector"), errors);
    meta::one_of(value, "matchPolicy", &["Equivalent", "Exact"], path, errors);
}

/// What an expression has to come to: how that is called, and whether values of a type may be one.
type Wanted = (&'static str, fn(&Type) -> bool);

const BOOL: Wanted = ("bool", |ty| *ty == Type::Bool);
const STRING: Wanted = ("string", |ty| *ty == Type::String);

/// Compiles an expression and says where it cannot be.
fn expression(
    value: &Value,
    key: &str,
    names: &[Variable<'_>],
    wanted: Option<Wanted>,
    path: Path<'_>,
    errors: &mut Errors,
) -> Option<Program> {
    let path = path.at(key);
    let text = value[key].as_str().unwrap_or_default();
    if text.trim().is_empty() {
        errors.required(path, "");
        return None;
    }
    match Program::compile(text, names) {
        Err(error) => {
            errors.invalid(path, text, error);
            None
        }
        Ok(program) => {
            let ty = program.ty();
            if let Some((name, may_be)) = wanted
                && *ty != Type::Dyn
                && !may_be(ty)
            {
                errors.invalid(path, text, format!("must evaluate to {name} but got {ty}"));
            }
            Some(program)
        }
    }
}

fn conditions(value: &Value, names: &[Variable<'_>], path: Path<'_>, errors: &mut Errors) {
    let path = path.at("matchConditions");
    let mut known: Vec<&str> = Vec::new();
    if items(value, "matchConditions").count() > CONDITIONS {
        errors.invalid(path, items(value, "matchConditions").count(), "must have at most 64 items");
        return;
    }
    for (index, condition) in items(value, "matchConditions").enumerate() {
        let path = path.index(index);
        let name = condition["name"].as_str().unwrap_or_default();
        match name {
            "" => errors.required(path.at("name"), ""),
            _ if known.contains(&name) => errors.duplicate(path.at("name"), name),
            _ => {
                if let Err(why) = crate::names::qualified_name(name) {
                    errors.invalid(path.at("name"), name, why);
                }
            }
        }
        known.push(name);
        expression(condition, "expression", names, Some(BOOL), path, errors);
    }
}

const FORM: &str = "desired format: https://host[/path]";

fn client(config: &Value, path: Path<'_>, errors: &mut Errors) {
    match (config["url"].as_str(), config["service"].is_object()) {
        (None, false) | (Some(_), true) => {
            errors.required(path, "exactly one of url or service is required");
        }
        (Some(url), false) => {
            let at = path.at("url");
            let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
            let (before, fragment) = rest.split_once('#').unwrap_or((rest, ""));
            let (before, query) = before.split_once('?').unwrap_or((before, ""));
            let authority = before.split('/').next().unwrap_or_default();
            if scheme != "https" {
                errors.invalid(at, scheme, format!("'https' is the only allowed URL scheme; {FORM}"));
            }
            if authority.is_empty() || authority.starts_with(':') {
                errors.invalid(at, authority, format!("host must be specified; {FORM}"));
            }
            if let Some((user, _)) = authority.rsplit_once('@') {
                errors.invalid(at, user, "user information is not permitted in the URL");
            }
            if !fragment.is_empty() {
                errors.invalid(at, fragment, "fragments are not permitted in the URL");
            }
            if !query.is_empty() {
                errors.invalid(at, query, "query parameters are not permitted in the URL");
            }
        }
        (None, true) => {
            let (service, at) = (&config["service"], path.at("service"));
            for (key, what) in [("name", "service name is required"), ("namespace", "service namespace is required")] {
                if service[key].as_str().unwrap_or_default().is_empty() {
                    errors.required(at.at(key), what);
                }
            }
            if let Some(port) = service["port"].as_i64()
                && !(1..=65535).contains(&port)
            {
                errors.invalid(at.at("port"), port, "port is not valid: must be between 1 and 65535, inclusive");
            }
            if let Some(text) = service["path"].as_str()
                && !text.is_empty()
                && (!text.starts_with('/') || text.contains("//"))
            {
                errors.invalid(at.at("path"), text, "must start with a '/'");
            }
        }
    }
    if let Some(bundle) = config["caBundle"].as_str().filter(|bundle| !bundle.is_empty()) {
        use base64::Engine;
        let pem = base64::engine::general_purpose::STANDARD.decode(bundle).unwrap_or_default();
        if pem::parse_many(&pem).map_or(0, |found| found.len()) == 0 {
            errors.invalid(
                path.at("caBundle"),
                bundle,
                "unable to load root certificates: unable to parse bytes as PEM block",
            );
        }
    }
}

fn validate_webhooks(v: &Validation<'_>, mutating: bool, errors: &mut Errors) {
    let root = Path::Root.at("webhooks");
    let mut known: Vec<&str> = Vec::new();
    for (index, webhook) in items(v.new, "webhooks").enumerate() {
        let path = root.index(index);
        let name = webhook["name"].as_str().unwrap_or_default();
        match name {
            "" => errors.required(path.at("name"), ""),
            _ if crate::names::dns_subdomain(name).is_err() || name.split('.').count() < 3 => {
                errors.invalid(
                    path.at("name"),
                    name,
                    "should be a domain with at least three segments separated by dots",
                );
            }
            _ if known.contains(&name) => errors.duplicate(path.at("name"), name),
            _ => {}
        }
        known.push(name);
        let versions: Vec<&str> = items(webhook, "admissionReviewVersions").filter_map(Value::as_str).collect();
        let at = path.at("admissionReviewVersions");
        match versions.is_empty() {
            true => errors.required(at, "must specify one of v1, v1beta1"),
            false if !versions.contains(&"v1") => {
                // Upstream also speaks v1beta1; nothing has needed it since 1.19.
                errors.invalid(at, json!(versions), "must include at least one of v1");
            }
            false => {}
        }
        match webhook["sideEffects"].as_str() {
            None | Some("") => errors.required(path.at("sideEffects"), "must specify one of None, NoneOnDryRun"),
            _ => meta::one_of(webhook, "sideEffects", &["None", "NoneOnDryRun"], path, errors),
        }
        rules(webhook, "rules", path, errors);
        meta::one_of(webhook, "failurePolicy", &["Fail", "Ignore"], path, errors);
        if mutating {
            meta::one_of(webhook, "reinvocationPolicy", &["IfNeeded", "Never"], path, errors);
        }
        scope(webhook, path, errors);
        if let Some(seconds) = webhook["timeoutSeconds"].as_i64()
            && !(1..=30).contains(&seconds)
        {
            errors.invalid(path.at("timeoutSeconds"), seconds, "the timeout value must be between 1 and 30 seconds");
        }
        client(&webhook["clientConfig"], path.at("clientConfig"), errors);
        conditions(webhook, &of_webhooks(), path, errors);
    }
}

fn match_resources(value: &Value, required: bool, path: Path<'_>, errors: &mut Errors) {
    if value.is_null() {
        if required {
            errors.required(path, "");
        }
        return;
    }
    if required && items(value, "resourceRules").next().is_none() {
        errors.required(path.at("resourceRules"), "");
    }
    rules(value, "resourceRules", path, errors);
    rules(value, "excludeResourceRules", path, errors);
    scope(value, path, errors);
}

/// What both kinds of policies have. Gives what their expressions may name.
fn policy_parts<'a>(spec: &'a Value, path: Path<'_>, errors: &mut Errors) -> Vec<Variable<'static>> {
    meta::one_of(spec, "failurePolicy", &["Fail", "Ignore"], path, errors);
    if spec["paramKind"].is_object() {
        let at = path.at("paramKind");
        for key in ["apiVersion", "kind"] {
            if spec["paramKind"][key].as_str().unwrap_or_default().is_empty() {
                errors.required(at.at(key), "");
            }
        }
    }
    match_resources(&spec["matchConstraints"], true, path.at("matchConstraints"), errors);
    let names = of_policy(spec["paramKind"].is_object());
    conditions(spec, &names, path, errors);
    let at = path.at("variables");
    let (mut known, mut variables): (Vec<&'a str>, Vec<(String, Option<Program>)>) = Default::default();
    for (index, variable) in items(spec, "variables").enumerate() {
        let path = at.index(index);
        let name = variable["name"].as_str().unwrap_or_default();
        let identifier = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            && !name.starts_with(|c: char| c.is_ascii_digit());
        match name {
            "" => errors.required(path.at("name"), ""),
            _ if !identifier => errors.invalid(path.at("name"), name, "name is not a valid CEL identifier"),
            _ if known.contains(&name) => errors.duplicate(path.at("name"), name),
            _ => {}
        }
        known.push(name);
        // A variable may use those before it.
        let program = expression(variable, "expression", &with_variables(&names, &variables), None, path, errors);
        variables.push((name.to_owned(), program));
    }
    with_variables(&names, &variables)
}

fn validating_policy(v: &Validation<'_>, errors: &mut Errors) {
    let (spec, root) = (&v.new["spec"], Path::Root);
    let path = root.at("spec");
    let names = policy_parts(spec, path, errors);
    if items(spec, "validations").next().is_none() && items(spec, "auditAnnotations").next().is_none() {
        errors.required(path.at("validations"), "validations or auditAnnotations must not be empty");
    }
    let at = path.at("validations");
    for (index, check) in items(spec, "validations").enumerate() {
        let path = at.index(index);
        expression(check, "expression", &names, Some(BOOL), path, errors);
        if let Some(message) = check["message"].as_str() {
            if !message.is_empty() && message.trim().is_empty() {
                errors.invalid(path.at("message"), message, "message must be non-empty if specified");
            }
            if message.trim().contains('\n') {
                errors.invalid(path.at("message"), message, "message must not contain line breaks");
            }
        }
        if check["messageExpression"].as_str().is_some_and(|text| !text.is_empty()) {
            expression(check, "messageExpression", &names, Some(STRING), path, errors);
        }
        let reasons = ["Forbidden", "Invalid", "RequestEntityTooLarge", "Unauthorized"];
        meta::one_of(check, "reason", &reasons, path, errors);
    }
    let at = path.at("auditAnnotations");
    for (index, annotation) in items(spec, "auditAnnotations").enumerate() {
        let path = at.index(index);
        if annotation["key"].as_str().unwrap_or_default().is_empty() {
            errors.required(path.at("key"), "");
        }
        expression(annotation, "valueExpression", &names, None, path, errors);
    }
}

fn mutating_policy(v: &Validation<'_>, errors: &mut Errors) {
    let (spec, root) = (&v.new["spec"], Path::Root);
    let path = root.at("spec");
    let names = policy_parts(spec, path, errors);
    match spec["reinvocationPolicy"].as_str() {
        None | Some("") => errors.required(path.at("reinvocationPolicy"), ""),
        _ => meta::one_of(spec, "reinvocationPolicy", &["IfNeeded", "Never"], path, errors),
    }
    if items(spec, "mutations").next().is_none() {
        errors.required(path.at("mutations"), "mutations must contain at least one item");
    }
    let at = path.at("mutations");
    for (index, mutation) in items(spec, "mutations").enumerate() {
        let path = at.index(index);
        let (key, wanted): (_, Wanted) = match mutation["patchType"].as_str() {
            Some("JSONPatch") => ("jsonPatch", ("list", |ty| matches!(ty, Type::List(_)))),
            Some("ApplyConfiguration") => ("applyConfiguration", ("object", |ty| matches!(ty, Type::Object(_)))),
            None | Some("") => {
                errors.required(path.at("patchType"), "");
                continue;
            }
            _ => {
                meta::one_of(mutation, "patchType", &["ApplyConfiguration", "JSONPatch"], path, errors);
                continue;
            }
        };
        match mutation[key].is_object() {
            true => _ = expression(&mutation[key], "expression", &names, Some(wanted), path.at(key), errors),
            false => errors.required(path.at(key), ""),
        }
    }
}

fn binding(v: &Validation<'_>, validating: bool, errors: &mut Errors) {
    let (spec, root) = (&v.new["spec"], Path::Root);
    let path = root.at("spec");
    match spec["policyName"].as_str().unwrap_or_default() {
        "" => errors.required(path.at("policyName"), ""),
        name => {
            if let Err(why) = crate::names::dns_subdomain(name) {
                errors.invalid(path.at("policyName"), name, why);
            }
        }
    }
    match_resources(&spec["matchResources"], false, path.at("matchResources"), errors);
    let (param, at) = (&spec["paramRef"], path.at("paramRef"));
    if param.is_object() {
        match (param["name"].as_str().filter(|n| !n.is_empty()), param["selector"].is_object()) {
            (None, false) => errors.required(at, "one of name or selector must be specified"),
            (Some(_), true) => errors.forbidden(at.at("name"), "name and selector are mutually exclusive"),
            _ => {}
        }
        meta::selector(&param["selector"], at.at("selector"), errors);
        match param["parameterNotFoundAction"].as_str() {
            None | Some("") => errors.required(at.at("parameterNotFoundAction"), ""),
            _ => meta::one_of(param, "parameterNotFoundAction", &["Allow", "Deny"], at, errors),
        }
    }
    if !validating {
        return;
    }
    let at = path.at("validationActions");
    let actions: Vec<&str> = items(spec, "validationActions").filter_map(Value::as_str).collect();
    if actions.is_empty() {
        errors.required(at, "at least one validation action is required");
    }
    for (index, action) in actions.iter().enumerate() {
        if !["Audit", "Deny", "Warn"].contains(action) {
            errors.not_supported(at.index(index), *action, &["Audit", "Deny", "Warn"]);
        }
        if actions[..index].contains(action) {
            errors.duplicate(at.index(index), *action);
        }
    }
    if actions.contains(&"Deny") && actions.contains(&"Warn") {
        errors.invalid(at, json!(actions), "must not contain both Deny and Warn (repeating the same validation failure information in the API response and headers serves no purpose)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(plural: &str, mut object: Value, expect: &[&str]) {
        let rows = rows();
        let row = rows.iter().find(|row| row.plural == plural).unwrap();
        (row.defaults)(&mut object);
        let mut errors = Errors::default();
        (row.validate)(&Validation { new: &object, old: None, subresource: "" }, &mut errors);
        let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        assert_eq!(found, expect, "{object}");
    }

    fn with(base: &Value, pointer: &str, value: Value) -> Value {
        let mut out = base.clone();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        out.pointer_mut(parent).unwrap()[key] = value;
        out
    }

    fn rule() -> Value {
        json!({"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]})
    }

    #[test]
    fn webhooks() {
        let plural = "validatingwebhookconfigurations";
        let good = json!({"webhooks": [{"name": "a.b.c", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "rules": [rule()], "clientConfig": {"url": "https://a.b/c"}}]});
        check(plural, good.clone(), &[]);
        let one = |key: &str, value: Value| with(&good, &format!("/webhooks/0/{key}"), value);
        check(
            plural,
            one("name", "a.b".into()),
            &[
                "webhooks[0].name: Invalid value: \"a.b\": should be a domain with at least three segments separated by dots",
            ],
        );
        check(
            plural,
            one("admissionReviewVersions", json!([])),
            &["webhooks[0].admissionReviewVersions: Required value: must specify one of v1, v1beta1"],
        );
        check(
            plural,
            one("sideEffects", json!(null)),
            &["webhooks[0].sideEffects: Required value: must specify one of None, NoneOnDryRun"],
        );
        check(
            plural,
            one("sideEffects", "Unknown".into()),
            &["webhooks[0].sideEffects: Unsupported value: \"Unknown\": supported values: \"None\", \"NoneOnDryRun\""],
        );
        check(
            plural,
            one("timeoutSeconds", 31.into()),
            &["webhooks[0].timeoutSeconds: Invalid value: 31: the timeout value must be between 1 and 30 seconds"],
        );
        check(
            plural,
            one("clientConfig", json!({})),
            &["webhooks[0].clientConfig: Required value: exactly one of url or service is required"],
        );
        check(
            plural,
            one("clientConfig", json!({"url": "http://a"})),
            &[
                "webhooks[0].clientConfig.url: Invalid value: \"http\": 'https' is the only allowed URL scheme; desired format: https://host[/path]",
            ],
        );
        check(
            plural,
            one("clientConfig", json!({"service": {"name": "s"}})),
            &["webhooks[0].clientConfig.service.namespace: Required value: service namespace is required"],
        );
        check(
            plural,
            one(
                "rules",
                json!([{"operations": ["*", "CREATE"], "resources": ["pods"], "apiGroups": [""], "apiVersions": ["v1"]}]),
            ),
            &[
                "webhooks[0].rules[0].operations: Invalid value: [\"*\",\"CREATE\"]: if '*' is present, must not specify other operations",
            ],
        );
        check(
            plural,
            one("matchConditions", json!([{"name": "x", "expression": "objet.a == 1"}])),
            &[
                "webhooks[0].matchConditions[0].expression: Invalid value: \"objet.a == 1\": compilation failed: ERROR: <input>:1:1: undeclared reference to 'objet' (in container '')\n | objet.a == 1\n | ^",
            ],
        );
        check(
            plural,
            one("matchConditions", json!([{"name": "x", "expression": "1 + 1"}])),
            &["webhooks[0].matchConditions[0].expression: Invalid value: \"1 + 1\": must evaluate to bool but got int"],
        );
    }

    #[test]
    fn what_is_filled_in() {
        let mut object = json!({"webhooks": [{"rules": [rule()], "clientConfig": {"service": {}}}]});
        webhook_defaults(&mut object, true);
        let webhook = &object["webhooks"][0];
        assert_eq!(webhook["failurePolicy"], "Fail");
        assert_eq!(webhook["timeoutSeconds"], 10);
        assert_eq!(webhook["reinvocationPolicy"], "Never");
        assert_eq!(webhook["clientConfig"]["service"]["port"], 443);
        assert_eq!(webhook["rules"][0]["scope"], "*");
    }

    #[test]
    fn policies() {
        let plural = "validatingadmissionpolicies";
        let good = json!({"spec": {"matchConstraints": {"resourceRules": [rule()]},
            "validations": [{"expression": "object.spec.replicas <= 5"}]}});
        check(plural, good.clone(), &[]);
        check(
            plural,
            with(&good, "/spec/validations", json!([])),
            &["spec.validations: Required value: validations or auditAnnotations must not be empty"],
        );
        check(
            plural,
            with(&good, "/spec/validations/0/expression", "'a'".into()),
            &["spec.validations[0].expression: Invalid value: \"'a'\": must evaluate to bool but got string"],
        );
        check(plural, with(&good, "/spec/matchConstraints", json!(null)), &["spec.matchConstraints: Required value"]);
        check(
            plural,
            with(&good, "/spec/variables", json!([{"name": "1", "expression": "1"}])),
            &["spec.variables[0].name: Invalid value: \"1\": name is not a valid CEL identifier"],
        );
        let plural = "mutatingadmissionpolicies";
        let good = json!({"spec": {"matchConstraints": {"resourceRules": [rule()]}, "reinvocationPolicy": "Never",
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": "Object{}"}}]}});
        check(plural, good.clone(), &[]);
        check(
            plural,
            with(&good, "/spec/mutations/0/patchType", "JSONPatch".into()),
            &["spec.mutations[0].jsonPatch: Required value"],
        );
        let plural = "validatingadmissionpolicybindings";
        let good = json!({"spec": {"policyName": "p", "validationActions": ["Deny"]}});
        check(plural, good.clone(), &[]);
        check(
            plural,
            with(&good, "/spec/validationActions", json!([])),
            &["spec.validationActions: Required value: at least one validation action is required"],
        );
        check(
            plural,
            with(&good, "/spec/paramRef", json!({"parameterNotFoundAction": "Deny"})),
            &["spec.paramRef: Required value: one of name or selector must be specified"],
        );
    }
}
