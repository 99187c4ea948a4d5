//! Roles and bindings (<https://kubernetes.io/docs/reference/access-authn-authz/rbac/>).

use k8s_openapi::api::rbac::v1 as rbac;
use serde_json::Value;

use super::meta;
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Validation, col, row as base},
};

const GROUP: &str = "rbac.authorization.k8s.io";

pub(super) fn rows() -> [Row; 4] {
    [
        Row {
            name: names::path_segment,
            columns: const { &[col("Role", "string"), col("Age", "date")] },
            cells: role_binding,
            defaults: default_binding,
            validate: |v, errors| validate_binding(v, &["ClusterRole"], errors),
            ..base::<rbac::ClusterRoleBinding>()
        },
        Row {
            name: names::path_segment,
            columns: const { &[col("Created At", "date")] },
            cells: |o, _| vec![o["metadata"]["creationTimestamp"].clone()],
            validate: |v, errors| {
                validate_rules(&v.new["rules"], false, errors);
                let path = Path::Root.at("aggregationRule");
                let rule = &v.new["aggregationRule"];
                if rule.is_object() && rule["clusterRoleSelectors"].as_array().is_none_or(Vec::is_empty) {
                    errors.required(
                        path.at("clusterRoleSelectors"),
                        "at least one clusterRoleSelector required if aggregationRule is non-nil",
                    );
                }
                for (index, selector) in rule["clusterRoleSelectors"].as_array().into_iter().flatten().enumerate() {
                    meta::selector(selector, path.at("clusterRoleSelectors").index(index), errors);
                }
            },
            ..base::<rbac::ClusterRole>()
        },
        Row {
            name: names::path_segment,
            columns: const { &[col("Created At", "date")] },
            cells: |o, _| vec![o["metadata"]["creationTimestamp"].clone()],
            validate: |v, errors| validate_rules(&v.new["rules"], true, errors),
            ..base::<rbac::Role>()
        },
        Row {
            name: names::path_segment,
            columns: const { &[col("Role", "string"), col("Age", "date")] },
            cells: role_binding,
            defaults: default_binding,
            validate: |v, errors| validate_binding(v, &["ClusterRole", "Role"], errors),
            ..base::<rbac::RoleBinding>()
        },
    ]
}

fn role_binding(o: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let role = &o["roleRef"];
    let name = format!("{}/{}", role["kind"].as_str().unwrap_or_default(), role["name"].as_str().unwrap_or_default());
    vec![name.into(), cell::age(o, now)]
}

fn default_binding(binding: &mut Value) {
    if binding["roleRef"].is_object() && binding["roleRef"]["apiGroup"].as_str().unwrap_or_default().is_empty() {
        binding["roleRef"]["apiGroup"] = GROUP.into();
    }
    for subject in binding["subjects"].as_array_mut().into_iter().flatten() {
        if subject["apiGroup"].as_str().unwrap_or_default().is_empty()
            && matches!(subject["kind"].as_str(), Some("User" | "Group"))
        {
            subject["apiGroup"] = GROUP.into();
        }
    }
}

fn is_empty(list: &Value) -> bool {
    list.as_array().is_none_or(Vec::is_empty)
}

fn validate_rules(rules: &Value, namespaced: bool, errors: &mut Errors) {
    let all = Path::Root.at("rules");
    for (index, rule) in rules.as_array().into_iter().flatten().enumerate() {
        let path = all.index(index);
        if is_empty(&rule["verbs"]) {
            errors.required(path.at("verbs"), "verbs must contain at least one value");
        }
        if !is_empty(&rule["nonResourceURLs"]) {
            let urls = path.at("nonResourceURLs");
            if namespaced {
                errors.invalid(
                    urls,
                    rule["nonResourceURLs"].clone(),
                    "namespaced rules cannot apply to non-resource URLs",
                );
            }
            if ["apiGroups", "resources", "resourceNames"].iter().any(|field| !is_empty(&rule[*field])) {
                let why = "rules cannot apply to both regular resources and non-resource URLs";
                errors.invalid(urls, rule["nonResourceURLs"].clone(), why);
            }
            continue;
        }
        if is_empty(&rule["apiGroups"]) {
            errors.required(path.at("apiGroups"), "resource rules must supply at least one api group");
        }
        if is_empty(&rule["resources"]) {
            errors.required(path.at("resources"), "resource rules must supply at least one resource");
        }
    }
}

fn validate_binding(v: &Validation<'_>, kinds: &[&str], errors: &mut Errors) {
    let (role, path) = (&v.new["roleRef"], Path::Root.at("roleRef"));
    let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
    if text(role, "apiGroup") != GROUP {
        errors.not_supported(path.at("apiGroup"), text(role, "apiGroup"), &[GROUP]);
    }
    if !kinds.contains(&&*text(role, "kind")) {
        errors.not_supported(path.at("kind"), text(role, "kind"), kinds);
    }
    if text(role, "name").is_empty() {
        errors.required(path.at("name"), "");
    }
    if let Some(old) = v.old
        && old["roleRef"] != *role
    {
        errors.invalid(path, role.clone(), "cannot change roleRef");
    }
    let all = Path::Root.at("subjects");
    for (index, subject) in v.new["subjects"].as_array().into_iter().flatten().enumerate() {
        let path = all.index(index);
        let group = text(subject, "apiGroup");
        if text(subject, "name").is_empty() {
            errors.required(path.at("name"), "");
        }
        match &*text(subject, "kind") {
            "ServiceAccount" => {
                if !group.is_empty() {
                    errors.not_supported(path.at("apiGroup"), group, &[""]);
                }
                if text(subject, "namespace").is_empty() {
                    errors.required(path.at("namespace"), "");
                }
            }
            "User" | "Group" if group == GROUP => {}
            "User" | "Group" => errors.not_supported(path.at("apiGroup"), group, &[GROUP]),
            other => errors.not_supported(path.at("kind"), other, &["Group", "ServiceAccount", "User"]),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_wrong_with_roles_and_bindings() {
        let [cluster_binding, cluster_role, role, binding] = rows();
        let check = |row: &Row, mut new: Value, old: Option<Value>, expect: &[&str]| {
            let mut errors = Errors::default();
            (row.defaults)(&mut new);
            (row.validate)(&Validation { new: &new, old: old.as_ref(), subresource: "" }, &mut errors);
            let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
            assert_eq!(found.len(), expect.len(), "{found:?}");
            found.iter().zip(expect).for_each(|(found, expect)| assert!(found.contains(expect), "{found}"));
        };
        let rules = |rule: Value| json!({"rules": [rule]});
        check(&role, rules(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]})), None, &[]);
        check(
            &role,
            rules(json!({"apiGroups": [""], "resources": ["pods"]})),
            None,
            &["rules[0].verbs: Required value"],
        );
        check(
            &role,
            rules(json!({"verbs": ["get"]})),
            None,
            &["rules[0].apiGroups: Required", "rules[0].resources: Required"],
        );
        let urls = rules(json!({"verbs": ["get"], "nonResourceURLs": ["/healthz"]}));
        check(&role, urls.clone(), None, &["namespaced rules cannot apply"]);
        check(&cluster_role, urls, None, &[]);
        let both = rules(json!({"verbs": ["get"], "nonResourceURLs": ["/x"], "resources": ["pods"]}));
        check(&cluster_role, both, None, &["both regular resources and non-resource URLs"]);
        check(&cluster_role, json!({"aggregationRule": {}}), None, &["clusterRoleSelectors: Required value"]);
        let bind = |kind: &str, subject: Value| json!({"roleRef": {"kind": kind, "name": "a"}, "subjects": [subject]});
        let jane = json!({"kind": "User", "name": "jane"});
        check(&binding, bind("Role", jane.clone()), None, &[]);
        check(&cluster_binding, bind("Role", jane.clone()), None, &["roleRef.kind: Unsupported value: \"Role\""]);
        check(
            &binding,
            bind("Role", json!({"kind": "ServiceAccount", "name": "a"})),
            None,
            &["subjects[0].namespace: Required"],
        );
        check(
            &binding,
            bind("Role", json!({"kind": "Robot", "name": "a"})),
            None,
            &["subjects[0].kind: Unsupported value: \"Robot\""],
        );
        check(
            &binding,
            bind("Role", json!({"kind": "User", "apiGroup": "x"})),
            None,
            &["name: Required", "apiGroup: Unsupported value: \"x\""],
        );
        check(&binding, json!({"roleRef": {"kind": "Role"}}), None, &["roleRef.name: Required"]);
        let mut old = bind("Role", jane.clone());
        default_binding(&mut old);
        check(&binding, bind("Role", jane.clone()), Some(old.clone()), &[]);
        check(&binding, bind("ClusterRole", jane), Some(old), &["cannot change roleRef"]);
    }
}
