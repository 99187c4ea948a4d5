//! The roles and bindings that every cluster has from the start. They are brought up to date whenever a server starts,
//! unless whoever runs the cluster has said otherwise in an annotation
//! (<https://kubernetes.io/docs/reference/access-authn-authz/rbac/#auto-reconciliation>).

use serde_json::{Value, json};

use super::GROUP;

/// `"false"` in this annotation keeps a role or binding as it is.
pub const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
const TABLE: &str = include_str!("policy.txt");

/// All of them, by plural.
pub fn objects() -> Vec<(&'static str, Value)> {
    let mut objects: Vec<(&'static str, Value)> = Vec::new();
    let meta = |name: &str| json!({"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}, "annotations": {AUTOUPDATE: "true"}});
    for line in TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        if line.starts_with(' ') {
            let role = objects.iter_mut().rev().find(|(plural, _)| *plural == "clusterroles");
            if let (Some((_, role)), Some(rule)) = (role, rule(words))
                && let Some(rules) = role["rules"].as_array_mut()
            {
                rules.push(rule);
            }
            continue;
        }
        let name = words.next().unwrap_or_default();
        let mut role = json!({"metadata": meta(name), "rules": []});
        let mut binding = None;
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let label = |role: &str| format!("{GROUP}/aggregate-to-{role}");
            match key {
                "into" => role["metadata"]["labels"][label(value)] = "true".into(),
                "of" => {
                    role["aggregationRule"] =
                        json!({"clusterRoleSelectors": [{"matchLabels": {(label(value)): "true"}}]});
                    // Who collects them writes them.
                    if let Some(role) = role.as_object_mut() {
                        role.remove("rules");
                    }
                }
                _ => {
                    let subjects: Vec<Value> = value.split(',').filter_map(subject).collect();
                    binding = Some(json!({"metadata": meta(name), "subjects": subjects,
                        "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": name}}));
                }
            }
        }
        objects.extend(binding.map(|binding| ("clusterrolebindings", binding)));
        objects.push(("clusterroles", role));
    }
    objects
}

fn subject(text: &str) -> Option<Value> {
    let (kind, name) = text.split_once(':')?;
    let kind = if kind == "group" { "Group" } else { "User" };
    Some(json!({"apiGroup": GROUP, "kind": kind, "name": name}))
}

fn rule<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<Value> {
    let (verbs, group, what) = (words.next()?, words.next()?, words.next()?);
    let verbs: Vec<&str> = verbs
        .split(',')
        .flat_map(|verb| match verb {
            "READ" => vec!["get", "list", "watch"],
            "WRITE" => vec!["create", "delete", "deletecollection", "patch", "update"],
            verb => vec![verb],
        })
        .collect();
    let list: Vec<&str> = what.split(',').collect();
    if group == "url" {
        return Some(json!({"nonResourceURLs": list, "verbs": verbs}));
    }
    let groups: Vec<&str> = group.split(',').map(|group| if group == "core" { "" } else { group }).collect();
    let mut rule = json!({"apiGroups": groups, "resources": list, "verbs": verbs});
    if let Some(names) = words.next() {
        rule["resourceNames"] = names.split(',').collect();
    }
    Some(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read() {
        let objects = objects();
        let find = |plural: &str, name: &str| {
            let found = objects.iter().find(|(p, object)| *p == plural && object["metadata"]["name"] == name);
            found.unwrap_or_else(|| panic!("{plural}/{name} is missing")).1.clone()
        };
        assert_eq!(
            find("clusterroles", "cluster-admin")["rules"][0],
            json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]})
        );
        assert_eq!(
            find("clusterroles", "cluster-admin")["rules"][1],
            json!({"nonResourceURLs": ["*"], "verbs": ["*"]})
        );
        assert_eq!(find("clusterrolebindings", "cluster-admin")["subjects"][0]["name"], "system:masters");
        let edit = find("clusterroles", "edit");
        assert_eq!(edit["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-admin"], "true");
        assert!(edit["rules"].is_null() && edit["aggregationRule"].is_object());
        let view = find("clusterroles", "system:aggregate-to-view");
        assert_eq!(view["rules"][0]["verbs"], json!(["get", "list", "watch"]));
        assert!(view["rules"][0]["resources"].as_array().unwrap().contains(&json!("pods/log")));
        assert!(!view.to_string().contains("secrets"), "who looks on sees no secrets");
        let approver = "system:certificates.k8s.io:kubelet-serving-approver";
        assert_eq!(
            find("clusterroles", approver)["rules"][0]["resourceNames"],
            json!(["kubernetes.io/kubelet-serving"])
        );
        for (plural, object) in &objects {
            let aggregated = object["aggregationRule"].is_object();
            let empty = object["rules"].as_array().is_none_or(Vec::is_empty);
            assert!(*plural != "clusterroles" || aggregated || !empty, "{object}");
        }
    }
}
