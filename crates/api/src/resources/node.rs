//! Node.

use k8s_openapi::api::core::v1::Node;
use serde_json::Value;

use super::{items, meta};
use crate::{
    cell,
    field::{Errors, Path},
    row::{Row, Subresource, Validation, col, row as base, wide},
};

pub(super) fn row() -> Row {
    Row {
        short_names: &["no"],
        subresources: &[Subresource::Proxy("NodeProxyOptions"), Subresource::Status],
        columns: const {
            &[
                col("Status", "string"),
                col("Roles", "string"),
                col("Age", "date"),
                col("Version", "string"),
                wide("Internal-IP", "string"),
                wide("External-IP", "string"),
                wide("OS-Image", "string"),
                wide("Kernel-Version", "string"),
                wide("Container-Runtime", "string"),
            ]
        },
        cells: |o, now| {
            let (meta, status) = (&o["metadata"], &o["status"]);
            let ready = items(status, "conditions").find(|c| c["type"] == "Ready");
            let mut words = vec![match ready.map(|c| c["status"] == "True") {
                Some(true) => "Ready",
                Some(false) => "NotReady",
                None => "Unknown",
            }];
            if o["spec"]["unschedulable"] == true {
                words.push("SchedulingDisabled");
            }
            let mut roles: Vec<&str> = Vec::new();
            for (key, value) in meta["labels"].as_object().into_iter().flatten() {
                match key.strip_prefix("node-role.kubernetes.io/") {
                    Some(role) if !role.is_empty() => roles.push(role),
                    _ if key == "kubernetes.io/role" => roles.extend(value.as_str()),
                    _ => {}
                }
            }
            let roles = if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") };
            let address = |ty: &str| {
                let found = items(status, "addresses").find(|a| a["type"] == ty);
                found.map_or(Value::from("<none>"), |a| a["address"].clone())
            };
            let info = |key: &str| match status["nodeInfo"][key].as_str() {
                Some(text) if !text.is_empty() => Value::from(text),
                _ => Value::from("<unknown>"),
            };
            vec![
                words.join(",").into(),
                roles.into(),
                cell::age(o, now),
                cell::plain(&status["nodeInfo"]["kubeletVersion"]),
                address("InternalIP"),
                address("ExternalIP"),
                info("osImage"),
                info("kernelVersion"),
                info("containerRuntimeVersion"),
            ]
        },
        selectable: &["spec.unschedulable"],
        validate,
        ..base::<Node>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    let list = path.at("taints");
    let mut seen = std::collections::HashSet::new();
    for (index, taint) in items(spec, "taints").enumerate() {
        let path = list.index(index);
        let key = taint["key"].as_str().unwrap_or_default();
        if let Err(detail) = crate::names::qualified_name(key) {
            errors.invalid(path.at("key"), key, detail);
        }
        if let Err(detail) = crate::names::label_value(taint["value"].as_str().unwrap_or_default()) {
            errors.invalid(path.at("value"), taint["value"].clone(), detail);
        }
        match taint["effect"].as_str() {
            None | Some("") => errors.required(path.at("effect"), ""),
            _ => meta::one_of(taint, "effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"], path, errors),
        }
        if !seen.insert((key, taint["effect"].as_str())) {
            errors.duplicate(path, taint.clone());
        }
    }
    if let Some(old) = v.old {
        for key in ["podCIDR", "podCIDRs", "providerID"] {
            let old = &old["spec"][key];
            if !old.is_null() && old != &spec[key] {
                errors.forbidden(path.at(key), "node updates may not change it once it is set");
            }
        }
    }
}
