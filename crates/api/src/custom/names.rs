//! Which names a definition gets, and the conditions that say so
//! (<https://kubernetes.io/docs/reference/kubernetes-api/extend-resources/custom-resource-definition-v1/>).

use std::{cmp::Ordering, collections::HashSet};

use serde_json::{Value, json};

/// How a version ranks among others: general availability before beta before alpha, then by number
/// (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definition-versioning/#version-priority>).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Priority(Option<(u8, u64, u64)>, String);

/// The rank of a version; the greatest comes first.
pub fn priority(version: &str) -> Priority {
    Priority(parts(version), version.to_owned())
}

fn parts(version: &str) -> Option<(u8, u64, u64)> {
    let rest = version.strip_prefix('v')?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let major = rest[..end].parse().ok()?;
    let rest = &rest[end..];
    if rest.is_empty() {
        return Some((2, major, 0));
    }
    let (stage, minor) = match (rest.strip_prefix("beta"), rest.strip_prefix("alpha")) {
        (Some(minor), _) => (1, minor),
        (_, Some(minor)) => (0, minor),
        _ => return None,
    };
    Some((stage, major, minor.parse().ok()?))
}

impl PartialOrd for Priority {
    fn partial_cmp(&self, other: &Priority) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Priority {
    fn cmp(&self, other: &Priority) -> Ordering {
        // Names that follow no scheme come last, in the order of the alphabet.
        match (&self.0, &other.0) {
            (Some(a), Some(b)) => a.cmp(b),
            (None, None) => other.1.cmp(&self.1),
            (Some(_), None) => Ordering::Greater,
            (None, Some(_)) => Ordering::Less,
        }
    }
}

/// Names that other definitions of the group have been given.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    resources: HashSet<String>,
    kinds: HashSet<String>,
}

impl Taken {
    /// Adds what a definition has been given (`status.acceptedNames`).
    pub fn add(&mut self, accepted: &Value) {
        let text = |key: &str| accepted[key].as_str().filter(|t| !t.is_empty()).map(str::to_owned);
        self.resources.extend([text("plural"), text("singular")].into_iter().flatten());
        let short = accepted["shortNames"].as_array().into_iter().flatten();
        self.resources.extend(short.filter_map(Value::as_str).map(str::to_owned));
        self.kinds.extend([text("kind"), text("listKind")].into_iter().flatten());
    }
}

/// The status of a definition, given the names that others have. `now` is the time of what changes.
pub fn judge(definition: &Value, taken: &Taken, now: &str) -> Value {
    let wanted = &definition["spec"]["names"];
    let mut status = definition["status"].as_object().cloned().unwrap_or_default();
    let before = definition["status"]["acceptedNames"].clone();
    let mut accepted = if before.is_object() { before.clone() } else { json!({}) };
    let mut conflict = None;
    let fresh = |key: &str, set: &HashSet<String>| match wanted[key].as_str() {
        Some(name) if before[key] != wanted[key] && set.contains(name) => Err(format!("{name:?} is already in use")),
        _ => Ok(()),
    };
    for (key, set, reason) in [
        ("plural", &taken.resources, "PluralConflict"),
        ("singular", &taken.resources, "SingularConflict"),
        ("shortNames", &taken.resources, "ShortNamesConflict"),
        ("kind", &taken.kinds, "KindConflict"),
        ("listKind", &taken.kinds, "ListKindConflict"),
    ] {
        let judged = match &wanted[key] {
            Value::Array(names) => {
                let ours = |name: &str| {
                    before[key].as_array().into_iter().flatten().any(|v| v == name)
                        || before["plural"] == name
                        || before["singular"] == name
                };
                let bad: Vec<String> = names
                    .iter()
                    .filter_map(Value::as_str)
                    .filter(|name| !ours(name) && set.contains(*name))
                    .map(|name| format!("{name:?} is already in use"))
                    .collect();
                match &bad[..] {
                    [] => Ok(()),
                    [one] => Err(one.clone()),
                    many => Err(format!("[{}]", many.join(", "))),
                }
            }
            _ => fresh(key, set),
        };
        match judged {
            Ok(()) if wanted[key].is_null() => {
                accepted.as_object_mut().map(|names| names.remove(key));
            }
            Ok(()) => accepted[key] = wanted[key].clone(),
            Err(message) => conflict = Some((reason, message)),
        }
    }
    match &wanted["categories"] {
        Value::Null => {
            accepted.as_object_mut().map(|names| names.remove("categories"));
        }
        categories => accepted["categories"] = categories.clone(),
    }
    let conditions = &mut status.entry("conditions").or_insert_with(|| json!([])).take();
    let names_accepted = match &conflict {
        Some((reason, message)) => ("NamesAccepted", "False", *reason, message.clone()),
        None => ("NamesAccepted", "True", "NoConflicts", "no conflicts found".to_owned()),
    };
    set_condition(conditions, names_accepted, now);
    // Once established, always established: objects are there.
    let was = conditions.as_array().into_iter().flatten().any(|c| c["type"] == "Established" && c["status"] == "True");
    if !was {
        let established = match &conflict {
            Some(_) => ("Established", "False", "NotAccepted", "not all names are accepted"),
            None => ("Established", "True", "InitialNamesAccepted", "the initial names have been accepted"),
        };
        set_condition(conditions, (established.0, established.1, established.2, established.3.to_owned()), now);
    }
    if let Some((approved, reason, message)) = approval(definition) {
        let status = if approved { "True" } else { "False" };
        set_condition(conditions, ("KubernetesAPIApprovalPolicyConformant", status, reason, message), now);
    }
    status.insert("conditions".into(), conditions.clone());
    status.insert("acceptedNames".into(), accepted);
    if !status.get("storedVersions").is_some_and(Value::is_array) {
        status.insert("storedVersions".into(), json!([storage_version(definition)]));
    }
    Value::Object(status)
}

/// The version that is stored.
pub fn storage_version(definition: &Value) -> &str {
    let versions = definition["spec"]["versions"].as_array().into_iter().flatten();
    versions.into_iter().find(|v| v["storage"] == true).and_then(|v| v["name"].as_str()).unwrap_or_default()
}

/// Sets a condition; its time changes with its status.
pub fn set_condition(conditions: &mut Value, (ty, status, reason, message): (&str, &str, &str, String), now: &str) {
    if !conditions.is_array() {
        *conditions = json!([]);
    }
    let Some(list) = conditions.as_array_mut() else { return };
    match list.iter_mut().find(|c| c["type"] == ty) {
        Some(old) => {
            if old["status"] != status {
                old["lastTransitionTime"] = now.into();
            }
            old["status"] = status.into();
            old["reason"] = reason.into();
            old["message"] = message.into();
        }
        None => list.push(json!({"type": ty, "status": status, "reason": reason, "message": message,
            "lastTransitionTime": now})),
    }
}

/// The annotation with which a group of the project itself says who has approved it.
pub const APPROVED: &str = "api-approved.kubernetes.io";

/// Whether a group belongs to the Kubernetes project
/// (<https://github.com/kubernetes/enhancements/pull/1111>).
pub fn is_protected(group: &str) -> bool {
    ["k8s.io", "kubernetes.io"].iter().any(|own| group == *own || group.ends_with(&format!(".{own}")))
}

fn approval(definition: &Value) -> Option<(bool, &'static str, String)> {
    if !is_protected(definition["spec"]["group"].as_str().unwrap_or_default()) {
        return None;
    }
    let text = definition["metadata"]["annotations"][APPROVED].as_str().unwrap_or_default();
    Some(match text {
        "" => (
            false,
            "MissingAnnotation",
            format!(
                "protected groups must have approval annotation {APPROVED:?}, see https://github.com/kubernetes/enhancements/pull/1111"
            ),
        ),
        _ if text.starts_with("unapproved") => (false, "UnapprovedAnnotation", format!("not approved: {text:?}")),
        _ if text.starts_with("http://") || text.starts_with("https://") => {
            (true, "ApprovedAnnotation", format!("approved in {text}"))
        }
        _ => (
            false,
            "InvalidAnnotation",
            format!(
                "protected groups must have approval annotation {APPROVED:?} with either a URL or a reason starting with \"unapproved\", see https://github.com/kubernetes/enhancements/pull/1111"
            ),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_rank() {
        let mut versions = [
            "foo1",
            "v1beta1",
            "v10",
            "v2",
            "v11alpha2",
            "v3beta1",
            "v12alpha1",
            "foo10",
            "v11beta2",
            "v10beta3",
            "v1",
        ];
        versions.sort_by_key(|v| std::cmp::Reverse(priority(v)));
        assert_eq!(
            versions,
            [
                "v10",
                "v2",
                "v1",
                "v11beta2",
                "v10beta3",
                "v3beta1",
                "v1beta1",
                "v12alpha1",
                "v11alpha2",
                "foo1",
                "foo10"
            ]
        );
    }

    fn definition(short: &str) -> Value {
        json!({"spec": {"group": "example.com", "names": {"plural": "widgets", "singular": "widget", "kind": "Widget",
            "listKind": "WidgetList", "shortNames": [short]}, "versions": [{"name": "v1", "storage": true}]}})
    }

    #[test]
    fn names_are_given_once() {
        let given = judge(&definition("w"), &Taken::default(), "t1");
        assert_eq!(given["acceptedNames"], definition("w")["spec"]["names"]);
        assert_eq!(given["storedVersions"], json!(["v1"]));
        assert_eq!(given["conditions"][1]["reason"], "InitialNamesAccepted");

        let mut taken = Taken::default();
        taken.add(&json!({"plural": "wheels", "singular": "w", "kind": "Widget"}));
        let refused = judge(&definition("w"), &taken, "t1");
        // The last conflict is told; names without conflict are given all the same.
        assert_eq!(refused["conditions"][0]["reason"], "KindConflict");
        assert_eq!(refused["conditions"][0]["message"], "\"Widget\" is already in use");
        assert_eq!(
            refused["conditions"][1],
            json!({"type": "Established", "status": "False", "reason": "NotAccepted",
            "message": "not all names are accepted", "lastTransitionTime": "t1"})
        );
        assert_eq!(
            refused["acceptedNames"],
            json!({"plural": "widgets", "singular": "widget", "listKind": "WidgetList"})
        );

        // What is established stays so when a new name is taken; the time of a condition is that of its change.
        let mut changed = definition("x");
        changed["status"] = given;
        let mut taken = Taken::default();
        taken.add(&json!({"shortNames": ["x"]}));
        let kept = judge(&changed, &taken, "t2");
        assert_eq!(kept["conditions"][0]["reason"], "ShortNamesConflict");
        assert_eq!(kept["conditions"][0]["lastTransitionTime"], "t2");
        assert_eq!(
            (&kept["conditions"][1]["status"], &kept["conditions"][1]["lastTransitionTime"]),
            (&json!("True"), &json!("t1"))
        );
        assert_eq!(kept["acceptedNames"]["shortNames"], json!(["w"]));
    }
}
