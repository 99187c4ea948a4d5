//! Which requests a webhook or a policy is asked about
//! (<https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/#matching-requests-rules>).

use seawall_api::selector::LabelSelector;
use serde_json::Value;

/// Which operations on which resources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    operations: Vec<String>,
    groups: Vec<String>,
    versions: Vec<String>,
    resources: Vec<String>,
    scope: String,
    /// Only policies can name objects.
    names: Vec<String>,
}

/// What a rule looks at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    pub operation: &'a str,
    pub group: &'a str,
    pub version: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub name: &'a str,
    /// Whether the object lives in a namespace. A Namespace does not.
    pub namespaced: bool,
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|found| found == "*" || found == wanted)
}

impl Rule {
    /// Reads a rule.
    pub fn read(value: &Value) -> Rule {
        Rule {
            operations: texts(&value["operations"]),
            groups: texts(&value["apiGroups"]),
            versions: texts(&value["apiVersions"]),
            resources: texts(&value["resources"]),
            scope: value["scope"].as_str().unwrap_or("*").to_owned(),
            names: texts(&value["resourceNames"]),
        }
    }

    /// Reads a list of rules.
    pub fn read_all(value: &Value) -> Vec<Rule> {
        value.as_array().into_iter().flatten().map(Rule::read).collect()
    }

    /// Whether the rule speaks of a request.
    pub fn matches(&self, asked: &Asked<'_>) -> bool {
        let scope = match self.scope.as_str() {
            "Namespaced" => asked.namespaced,
            "Cluster" => !asked.namespaced,
            _ => true,
        };
        let resource = |pattern: &String| match pattern.split_once('/') {
            None => asked.subresource.is_empty() && (pattern == "*" || pattern == asked.resource),
            Some((resource, sub)) => {
                (resource == "*" || resource == asked.resource)
                    && (sub == "*" || (sub == asked.subresource && !asked.subresource.is_empty()))
            }
        };
        scope
            && has(&self.operations, asked.operation)
            && has(&self.groups, asked.group)
            && has(&self.versions, asked.version)
            && self.resources.iter().any(resource)
            && (self.names.is_empty() || self.names.iter().any(|name| name == asked.name))
    }
}

/// A selector of labels; one that cannot be read selects everything, so that nothing escapes by it.
#[derive(Clone, Debug)]
pub(crate) struct Selector(Option<LabelSelector>);

impl Selector {
    /// Reads a selector. None selects everything.
    pub fn read(value: &Value) -> Selector {
        match value {
            Value::Null => Selector(None),
            value => Selector(LabelSelector::from_value(value).filter(|selector| !selector.is_empty())),
        }
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        self.0.is_none()
    }

    /// Whether it selects labels.
    pub fn picks(&self, labels: &Value) -> bool {
        self.0.as_ref().is_none_or(|selector| selector.matches_labels(labels))
    }
}

/// What webhooks, policies and bindings have in common: which requests they are about.
#[derive(Clone, Debug)]
pub(crate) struct Scope {
    pub rules: Vec<Rule>,
    pub exclude: Vec<Rule>,
    pub exact: bool,
    pub namespaces: Selector,
    pub objects: Selector,
    /// Whether no rules stand for all resources, as in a binding.
    pub any: bool,
}

impl Scope {
    /// Reads the scope of a webhook.
    pub fn of_webhook(webhook: &Value) -> Scope {
        Scope {
            rules: Rule::read_all(&webhook["rules"]),
            exclude: Vec::new(),
            exact: webhook["matchPolicy"] == "Exact",
            namespaces: Selector::read(&webhook["namespaceSelector"]),
            objects: Selector::read(&webhook["objectSelector"]),
            any: false,
        }
    }

    /// Reads `matchConstraints` of a policy, or `matchResources` of a binding, where rules may be left out.
    pub fn of_policy(value: &Value, any: bool) -> Scope {
        Scope {
            rules: Rule::read_all(&value["resourceRules"]),
            exclude: Rule::read_all(&value["excludeResourceRules"]),
            exact: value["matchPolicy"] == "Exact",
            namespaces: Selector::read(&value["namespaceSelector"]),
            objects: Selector::read(&value["objectSelector"]),
            any,
        }
    }

    /// Whether the rules speak of a request: in which of the versions (group and version) that the object has, the one
    /// of the request first.
    pub fn version<'v>(&self, asked: &Asked<'_>, versions: &[(&'v str, &'v str)]) -> Option<(&'v str, &'v str)> {
        let of = |(group, version): (&'v str, &'v str)| Asked { group, version, ..*asked };
        let mut candidates = versions.iter().copied().take(if self.exact { 1 } else { versions.len() });
        if candidates.clone().any(|version| self.exclude.iter().any(|rule| rule.matches(&of(version)))) {
            return None;
        }
        if self.any && self.rules.is_empty() {
            return versions.first().copied();
        }
        candidates.find(|version| self.rules.iter().any(|rule| rule.matches(&of(*version))))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked<'a>(operation: &'a str, resource: &'a str, subresource: &'a str) -> Asked<'a> {
        Asked { operation, group: "", version: "v1", resource, subresource, name: "n", namespaced: resource == "pods" }
    }

    fn rule(operations: Value, resources: Value, more: Value) -> Value {
        let mut rule =
            json!({"operations": operations, "apiGroups": [""], "apiVersions": ["v1"], "resources": resources});
        for (key, value) in more.as_object().into_iter().flatten() {
            rule[key] = value.clone();
        }
        rule
    }

    #[test]
    fn rules_and_requests() {
        let check = |value: Value, request: Asked<'_>, expect: bool| {
            assert_eq!(Rule::read(&value).matches(&request), expect, "{value} {request:?}");
        };
        let none = || json!({});
        check(rule(json!(["CREATE"]), json!(["pods"]), none()), asked("CREATE", "pods", ""), true);
        check(rule(json!(["CREATE"]), json!(["pods"]), none()), asked("UPDATE", "pods", ""), false);
        check(rule(json!(["*"]), json!(["pods"]), none()), asked("DELETE", "pods", ""), true);
        check(rule(json!(["*"]), json!(["pods"]), none()), asked("CREATE", "pods", "exec"), false);
        check(rule(json!(["*"]), json!(["*"]), none()), asked("CREATE", "pods", "exec"), false);
        check(rule(json!(["*"]), json!(["*"]), none()), asked("CREATE", "pods", ""), true);
        check(rule(json!(["*"]), json!(["pods/*"]), none()), asked("CREATE", "pods", "exec"), true);
        check(rule(json!(["*"]), json!(["pods/*"]), none()), asked("CREATE", "pods", ""), true);
        check(rule(json!(["*"]), json!(["*/exec"]), none()), asked("CONNECT", "pods", "exec"), true);
        check(rule(json!(["*"]), json!(["*/*"]), none()), asked("CONNECT", "nodes", ""), true);
        check(rule(json!(["*"]), json!(["pods/log"]), none()), asked("CONNECT", "pods", "exec"), false);
        check(rule(json!(["*"]), json!(["*"]), json!({"scope": "Cluster"})), asked("CREATE", "pods", ""), false);
        check(rule(json!(["*"]), json!(["*"]), json!({"scope": "Cluster"})), asked("CREATE", "nodes", ""), true);
        check(rule(json!(["*"]), json!(["*"]), json!({"scope": "Namespaced"})), asked("CREATE", "pods", ""), true);
        check(rule(json!(["*"]), json!(["*"]), json!({"apiGroups": ["apps"]})), asked("CREATE", "pods", ""), false);
        check(rule(json!(["*"]), json!(["*"]), json!({"resourceNames": ["m"]})), asked("CREATE", "pods", ""), false);
        check(rule(json!(["*"]), json!(["*"]), json!({"resourceNames": ["n"]})), asked("CREATE", "pods", ""), true);
    }

    #[test]
    fn versions_of_the_same_resource() {
        let versions = [("autoscaling", "v1"), ("autoscaling", "v2")];
        let check = |policy: &str, version: &str, expect: Option<(&str, &str)>| {
            let scope = Scope::of_webhook(&json!({"matchPolicy": policy, "rules": [{"operations": ["*"],
                "apiGroups": ["autoscaling"], "apiVersions": [version], "resources": ["*"]}]}));
            assert_eq!(scope.version(&asked("CREATE", "pods", ""), &versions), expect, "{policy} {version}");
        };
        check("Exact", "v1", Some(("autoscaling", "v1")));
        check("Exact", "v2", None);
        check("Equivalent", "v2", Some(("autoscaling", "v2")));
        check("Equivalent", "*", Some(("autoscaling", "v1")));
    }

    #[test]
    fn what_is_excluded() {
        let all = rule(json!(["*"]), json!(["*"]), json!({}));
        let scope = Scope::of_policy(
            &json!({"resourceRules": [all], "excludeResourceRules": [rule(json!(["DELETE"]), json!(["pods"]), json!({}))]}),
            false,
        );
        let at = [("", "v1")];
        assert!(scope.version(&asked("CREATE", "pods", ""), &at).is_some());
        assert!(scope.version(&asked("DELETE", "pods", ""), &at).is_none());
        let binding = Scope::of_policy(&json!(null), true);
        assert!(binding.version(&asked("CREATE", "pods", ""), &at).is_some());
        assert!(Scope::of_policy(&json!({}), false).version(&asked("CREATE", "pods", ""), &at).is_none());
    }

    #[test]
    fn selectors() {
        assert!(Selector::read(&json!(null)).picks(&json!({"a": "b"})));
        assert!(Selector::read(&json!({})).is_everything());
        assert!(!Selector::read(&json!({"matchLabels": {"a": "c"}})).picks(&json!({"a": "b"})));
    }
}
