//! Classes that objects get by default, and what a runtime class adds to a pod
//! (<https://kubernetes.io/docs/reference/access-authn-authz/admission-controllers/#defaultstorageclass> and what follows).

use jiff::Timestamp;
use seawall_api::quantity::Quantity;
use serde_json::{Value, json};

use super::pods::push;
use crate::{
    Context, Server,
    error::{ApiError, Result},
};

const DEFAULT_STORAGE: &str = "storageclass.kubernetes.io/is-default-class";
const DEFAULT_STORAGE_BETA: &str = "storageclass.beta.kubernetes.io/is-default-class";
const DEFAULT_INGRESS: &str = "ingressclass.kubernetes.io/is-default-class";

/// The default among classes: the newest one that says so, by name among those of the same age.
fn default_class(classes: impl Iterator<Item = Value>, marks: &[&str]) -> Option<String> {
    let marked = |class: &Value| marks.iter().any(|mark| class["metadata"]["annotations"][*mark] == "true");
    let age = |class: &Value| {
        let made = class["metadata"]["creationTimestamp"].as_str().and_then(|t| t.parse::<Timestamp>().ok());
        (std::cmp::Reverse(made), class["metadata"]["name"].as_str().unwrap_or_default().to_owned())
    };
    classes.filter(marked).min_by_key(age).map(|class| age(&class).1)
}

impl Server {
    fn default_of(&self, group: &str, plural: &str, marks: &[&str]) -> Option<String> {
        let (id, row) = self.registry.by_name(group, plural)?;
        let snapshot = self.cache.snapshot();
        default_class(snapshot.range(id, &row.prefix(), None).map(|class| class.value()), marks)
    }

    /// Gives a claim and an Ingress the class that is the default, if they do not name one.
    pub(super) fn default_classes(&self, context: &Context<'_>, object: &mut Value) {
        match (context.row.group, context.row.plural) {
            ("", "persistentvolumeclaims") => {
                let annotated = &object["metadata"]["annotations"]["volume.beta.kubernetes.io/storage-class"];
                if !annotated.is_null() || !object["spec"]["storageClassName"].is_null() || !object["spec"].is_object()
                {
                    return;
                }
                let marks = [DEFAULT_STORAGE, DEFAULT_STORAGE_BETA];
                if let Some(class) = self.default_of("storage.k8s.io", "storageclasses", &marks) {
                    object["spec"]["storageClassName"] = class.into();
                }
            }
            ("networking.k8s.io", "ingresses") => {
                let annotated = &object["metadata"]["annotations"]["kubernetes.io/ingress.class"];
                if !annotated.is_null() || !object["spec"]["ingressClassName"].is_null() || !object["spec"].is_object()
                {
                    return;
                }
                if let Some(class) = self.default_of("networking.k8s.io", "ingressclasses", &[DEFAULT_INGRESS]) {
                    object["spec"]["ingressClassName"] = class.into();
                }
            }
            _ => {}
        }
    }

    /// Protects claims and volumes from being taken away while they are used
    /// (<https://kubernetes.io/docs/reference/access-authn-authz/admission-controllers/#storageobjectinuseprotection>).
    /// `controllers/storage_protection.rs` lets them go.
    pub(super) fn protect_storage(context: &Context<'_>, object: &mut Value) {
        let finalizer = match (context.row.group, context.row.plural) {
            ("", "persistentvolumeclaims") => "kubernetes.io/pvc-protection",
            ("", "persistentvolumes") => "kubernetes.io/pv-protection",
            _ => return,
        };
        let meta = &mut object["metadata"];
        if !meta["finalizers"].is_array() {
            meta["finalizers"] = json!([]);
        }
        if let Some(finalizers) = meta["finalizers"].as_array_mut()
            && !finalizers.iter().any(|own| own == finalizer)
        {
            finalizers.push(finalizer.into());
        }
    }

    /// Adds what the runtime class of a pod costs, and where it can run
    /// (<https://kubernetes.io/docs/concepts/containers/runtime-class/>).
    pub(super) async fn runtime_class(&self, context: &Context<'_>, pod: &mut Value) -> Result<()> {
        let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let refuse = |why: String| Err(ApiError::forbidden(&context.row, &pod_name, why));
        let Some(name) = pod["spec"]["runtimeClassName"].as_str().map(str::to_owned) else {
            return match pod["spec"]["overhead"].as_object().is_some_and(|overhead| !overhead.is_empty()) {
                true => {
                    refuse("pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead".into())
                }
                false => Ok(()),
            };
        };
        let Some(class) = self.find("node.k8s.io", "runtimeclasses", "", &name).await? else {
            return refuse(format!("pod rejected: RuntimeClass {name:?} not found"));
        };
        match apply_runtime_class(pod, &class.value()) {
            Ok(()) => Ok(()),
            Err(why) => refuse(why),
        }
    }
}

/// Whether two maps have the same quantities.
fn same_amounts(a: &Value, b: &Value) -> bool {
    let read = |value: &Value| -> Vec<(String, Option<Quantity>)> {
        let entries = value.as_object().into_iter().flatten();
        entries.map(|(name, amount)| (name.clone(), amount.as_str().and_then(|a| a.parse().ok()))).collect()
    };
    read(a) == read(b)
}

fn apply_runtime_class(pod: &mut Value, class: &Value) -> Result<(), String> {
    let spec = &mut pod["spec"];
    let fixed = &class["overhead"]["podFixed"];
    if !spec["overhead"].is_null() && !same_amounts(&spec["overhead"], fixed) {
        return Err("pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead".to_owned());
    }
    if fixed.is_object() {
        spec["overhead"] = fixed.clone();
    }
    for (key, value) in class["scheduling"]["nodeSelector"].as_object().into_iter().flatten() {
        match spec["nodeSelector"].get(key) {
            Some(own) if own != value => {
                return Err(format!(
                    "conflict: runtimeClass.scheduling.nodeSelector[{key}] = {}; pod.spec.nodeSelector[{key}] = {}",
                    value.as_str().unwrap_or_default(),
                    own.as_str().unwrap_or_default()
                ));
            }
            _ => {
                if !spec["nodeSelector"].is_object() {
                    spec["nodeSelector"] = json!({});
                }
                spec["nodeSelector"][key] = value.clone();
            }
        }
    }
    for toleration in class["scheduling"]["tolerations"].as_array().into_iter().flatten() {
        if !spec["tolerations"].as_array().into_iter().flatten().any(|own| own == toleration) {
            push(spec, "tolerations", toleration.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_default() {
        let class = |name: &str, made: &str, default: &str| json!({"metadata": {"name": name, "creationTimestamp": made, "annotations": {DEFAULT_STORAGE: default}}});
        let (old, new) = ("2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z");
        let check = |classes: &[Value], expect: Option<&str>| {
            assert_eq!(default_class(classes.iter().cloned(), &[DEFAULT_STORAGE]).as_deref(), expect, "{classes:?}");
        };
        check(&[], None);
        check(&[class("a", old, "false")], None);
        check(&[class("a", old, "true"), class("b", new, "true")], Some("b"));
        check(&[class("b", new, "true"), class("a", new, "true")], Some("a"));
    }

    #[test]
    fn what_a_runtime_class_adds() {
        let class = json!({"overhead": {"podFixed": {"memory": "64Mi"}}, "scheduling": {
            "nodeSelector": {"a": "b"}, "tolerations": [{"key": "k", "operator": "Exists"}]}});
        let check = |spec: Value, expect: Result<Value, &str>| {
            let mut pod = json!({"spec": spec});
            let found = apply_runtime_class(&mut pod, &class).map(|()| pod["spec"].clone());
            assert_eq!(found, expect.map_err(str::to_owned), "{spec}");
        };
        let expect = json!({"overhead": {"memory": "64Mi"}, "nodeSelector": {"a": "b"},
            "tolerations": [{"key": "k", "operator": "Exists"}]});
        check(json!({}), Ok(expect.clone()));
        check(expect.clone(), Ok(expect));
        check(
            json!({"overhead": {"memory": "1Mi"}}),
            Err("pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead"),
        );
        check(
            json!({"nodeSelector": {"a": "c"}}),
            Err("conflict: runtimeClass.scheduling.nodeSelector[a] = b; pod.spec.nodeSelector[a] = c"),
        );
    }
}
