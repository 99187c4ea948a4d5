//! DeviceClass.

use k8s_openapi::api::resource::v1::DeviceClass;
use serde_json::json;

use super::{
    super::default,
    parts::{MAX_CONFIGS, configuration, each},
    selector::selectors,
};
use crate::{
    field::{Errors, Path, same},
    names,
    row::{Row, Validation, row as base},
};

pub(super) fn row() -> Row {
    Row { defaults: |o| default(o, "spec", json!({})), validate, generation: true, ..base::<DeviceClass>() }
}

/// What stays as it was is not read again: limits may have become tighter since.
fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let (spec, path) = (&v.new["spec"], Path::Root.at("spec"));
    let stored = |key: &str| v.old.is_some_and(|old| same(&old["spec"][key], &spec[key]));
    selectors(spec, stored("selectors"), path, errors);
    each(spec, "config", MAX_CONFIGS, path, errors, |config, path, errors| {
        configuration(config, stored("config"), path, errors);
    });
    if let Some(name) = spec["extendedResourceName"].as_str() {
        extended_resource(name, path.at("extendedResourceName"), errors);
    }
}

/// Validates a name under which pods ask for devices as for other resources (KEP-5004).
fn extended_resource(name: &str, path: Path<'_>, errors: &mut Errors) {
    if !name.contains('/') {
        errors.invalid(path, name, "a name must be a domain-prefixed path, such as 'example.com/my-prop'");
    } else if name.contains("kubernetes.io/") {
        errors.invalid(path, name, "must not have \"kubernetes.io/\" domain");
    }
    if name.starts_with("requests.") {
        errors.invalid(path, name, "must not have \"requests.\" prefix");
    }
    // Quotas name it so.
    if let Err(detail) = names::qualified_name(&format!("requests.{name}")) {
        errors.invalid(path, name, detail);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{
        super::super::testing::{check, check_update},
        *,
    };

    fn class(spec: Value) -> Value {
        json!({"metadata": {"name": "c"}, "spec": spec})
    }

    #[test]
    fn classes() {
        let qualified = names::qualified_name("requests.a.b/c/d").unwrap_err();
        let selectors: Vec<Value> = (0..33).map(|_| json!({"cel": {"expression": "true"}})).collect();
        for (spec, expect) in [
            (json!({"selectors": [{"cel": {"expression": "device.driver == 'a.b'"}}]}), vec![]),
            (json!({"extendedResourceName": "example.com/gpu"}), vec![]),
            (
                json!({"extendedResourceName": "gpu"}),
                vec![
                    "spec.extendedResourceName: Invalid value: \"gpu\": a name must be a domain-prefixed path, such as 'example.com/my-prop'".to_owned(),
                ],
            ),
            (
                json!({"extendedResourceName": "a.kubernetes.io/gpu"}),
                vec!["spec.extendedResourceName: Invalid value: \"a.kubernetes.io/gpu\": must not have \"kubernetes.io/\" domain".into()],
            ),
            (
                json!({"extendedResourceName": "a.b/c/d"}),
                vec![format!("spec.extendedResourceName: Invalid value: \"a.b/c/d\": {qualified}")],
            ),
            (json!({"selectors": selectors}), vec!["spec.selectors: Too many: 33: must have at most 32 items".into()]),
            (json!({"config": [{}]}), vec!["spec.config[0].opaque: Required value".into()]),
        ] {
            let expect: Vec<&str> = expect.iter().map(String::as_str).collect();
            check(&row(), class(spec), &expect);
        }
    }

    #[test]
    fn what_was_stored_is_not_read_again() {
        let long = json!({"driver": "a.b", "parameters": {"a": "x".repeat(11_000)}});
        let of = |selectors: &[&str], name: &str| {
            let selectors: Vec<Value> = selectors.iter().map(|text| json!({"cel": {"expression": text}})).collect();
            class(json!({"selectors": selectors, "config": [{"opaque": long}], "extendedResourceName": name}))
        };
        check_update(&row(), of(&["nonsense"], "a.b/c"), of(&["nonsense"], "a.b/d"), &[]);
        let why = "spec.selectors[0].cel.expression: Invalid value: \"nonsense\": compilation failed: ERROR: <input>:1:1: undeclared reference to 'nonsense' (in container '')\n | nonsense\n | ^";
        check_update(&row(), of(&["nonsense"], "a.b/c"), of(&["nonsense", "true"], "a.b/c"), &[why]);
    }
}
