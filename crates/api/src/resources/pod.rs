//! Pod.

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{items, items_mut, meta, pod_claims, pod_resize, pod_resources, pod_spec};
use crate::{
    cell,
    field::{Errors, Path},
    quantity::Quantity,
    row::{Row, Subresource, Validation, col, row as base, wide},
};

pub(super) fn row() -> Row {
    Row {
        short_names: &["po"],
        categories: &["all"],
        subresources: &[
            Subresource::Attach,
            Subresource::Binding,
            Subresource::EphemeralContainers,
            Subresource::Eviction,
            Subresource::Exec,
            Subresource::Log,
            Subresource::PortForward,
            Subresource::Proxy("PodProxyOptions"),
            Subresource::Resize,
            Subresource::Status,
        ],
        columns: const {
            &[
                col("Ready", "string"),
                col("Status", "string"),
                col("Restarts", "string"),
                col("Age", "string"),
                wide("IP", "string"),
                wide("Node", "string"),
                wide("Nominated Node", "string"),
                wide("Readiness Gates", "string"),
            ]
        },
        cells,
        seen: &[
            "metadata.creationTimestamp",
            "metadata.deletionTimestamp",
            "spec.containers.name",
            "spec.initContainers.name",
            "spec.initContainers.restartPolicy",
            "spec.nodeName",
            "spec.readinessGates",
            "status.conditions.reason",
            "status.conditions.status",
            "status.conditions.type",
            "status.containerStatuses",
            "status.initContainerStatuses",
            "status.nominatedNodeName",
            "status.phase",
            "status.podIP",
            "status.reason",
        ],
        selectable: &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        defaults: |o| {
            if let Some(spec) = o.get_mut("spec") {
                pod_spec::defaults(spec);
                pod_resources::defaults(spec);
            }
        },
        validate,
        prepare_create: |o| {
            // `nominatedNodeName` and conditions are never a client's to set at creation.
            o["status"] = json!({"phase": "Pending", "qosClass": qos_class(&o["spec"])});
        },
        generation: true,
        ..base::<Pod>()
    }
}

/// The quality of service class
/// (<https://kubernetes.io/docs/concepts/workloads/pods/pod-qos/>).
pub fn qos_class(spec: &Value) -> &'static str {
    let (mut any, mut guaranteed, mut containers) = (false, true, 0);
    let quantity = |v: &Value| v.as_str().and_then(|s| s.parse::<Quantity>().ok()).filter(|q| *q != Quantity::new(0));
    // What a pod says of itself counts instead of what its containers say.
    let own =
        ["requests", "limits"].iter().any(|part| spec["resources"][*part].as_object().is_some_and(|of| !of.is_empty()));
    let each = items(spec, "containers").chain(items(spec, "initContainers")).filter(|_| !own);
    for container in each.chain(own.then_some(spec)) {
        containers += 1;
        for resource in ["cpu", "memory"] {
            let request = quantity(&container["resources"]["requests"][resource]);
            let limit = quantity(&container["resources"]["limits"][resource]);
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed && containers > 0) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// What `kubectl get pods` shows: not the phase alone, but the reason that matters most at the moment.
fn cells(o: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let (spec, status) = (&o["spec"], &o["status"]);
    let word = |v: &Value| v.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
    let mut reason = word(&status["phase"]).unwrap_or_default();
    if let Some(why) = word(&status["reason"]) {
        reason = why;
    }
    let gated = items(status, "conditions").any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated");
    if gated {
        reason = "SchedulingGated".into();
    }
    let sidecar =
        |name: &Value| items(spec, "initContainers").any(|c| c["name"] == *name && c["restartPolicy"] == "Always");
    let exited = |terminated: &Value| match (word(&terminated["reason"]), terminated["signal"].as_i64()) {
        (Some(reason), _) => reason,
        (None, Some(signal)) if signal != 0 => format!("Signal:{signal}"),
        (None, _) => format!("ExitCode:{}", cell::int(&terminated["exitCode"])),
    };
    let (mut restarts, mut last_restart) = (0, None::<jiff::Timestamp>);
    let mut total = items(spec, "containers").count();
    let mut ready = 0;
    let mut restarted = |status: &Value, restarts: &mut i64| {
        *restarts += status["restartCount"].as_i64().unwrap_or_default();
        let finished = status["lastState"]["terminated"]["finishedAt"].as_str().and_then(|t| t.parse().ok());
        last_restart = last_restart.max(finished);
    };
    let mut initializing = false;
    let init_total = items(spec, "initContainers").count();
    for (index, container) in items(status, "initContainerStatuses").enumerate() {
        let is_sidecar = sidecar(&container["name"]);
        if is_sidecar {
            total += 1;
            ready += usize::from(container["ready"] == true);
        }
        restarted(container, &mut restarts);
        if initializing {
            continue;
        }
        let state = &container["state"];
        if state["terminated"].is_object() && state["terminated"]["exitCode"].as_i64() == Some(0) {
            continue;
        }
        if is_sidecar && container["started"] == true {
            continue;
        }
        reason = match (&state["terminated"], word(&state["waiting"]["reason"])) {
            (Value::Object(_), _) => format!("Init:{}", exited(&state["terminated"])),
            (_, Some(waiting)) if waiting != "PodInitializing" => format!("Init:{waiting}"),
            _ => format!("Init:{index}/{init_total}"),
        };
        initializing = true;
    }
    let initialized = items(status, "conditions").any(|c| c["type"] == "Initialized" && c["status"] == "True");
    if !initializing || initialized {
        let mut running = false;
        for container in items(status, "containerStatuses").collect::<Vec<_>>().into_iter().rev() {
            restarted(container, &mut restarts);
            let state = &container["state"];
            if let Some(waiting) = word(&state["waiting"]["reason"]) {
                reason = waiting;
            } else if state["terminated"].is_object() {
                reason = exited(&state["terminated"]);
            } else if container["ready"] == true && state["running"].is_object() {
                running = true;
                ready += 1;
            }
        }
        if reason == "Completed" && running {
            let pod_ready = items(status, "conditions").any(|c| c["type"] == "Ready" && c["status"] == "True");
            reason = if pod_ready { "Running".into() } else { "NotReady".into() };
        }
    }
    if o["metadata"]["deletionTimestamp"].is_string() {
        let lost = status["reason"] == "NodeLost";
        let done = status["phase"] == "Succeeded" || status["phase"] == "Failed";
        if lost {
            reason = "Unknown".into();
        } else if !done {
            reason = "Terminating".into();
        }
    }
    let restarts = match last_restart {
        Some(at) if restarts > 0 => {
            format!("{restarts} ({} ago)", cell::duration(now.as_second() - at.as_second()))
        }
        _ => restarts.to_string(),
    };
    let gates = items(spec, "readinessGates").count();
    let open = items(spec, "readinessGates")
        .filter(|g| items(status, "conditions").any(|c| c["type"] == g["conditionType"] && c["status"] == "True"))
        .count();
    vec![
        format!("{ready}/{total}").into(),
        reason.into(),
        restarts.into(),
        cell::age(o, now),
        cell::text(&status["podIP"]),
        cell::text(&spec["nodeName"]),
        cell::text(&status["nominatedNodeName"]),
        if gates == 0 { "<none>".into() } else { format!("{open}/{gates}").into() },
    ]
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    let Some(old) = v.old else {
        if !spec.is_object() {
            errors.required(path, "");
            return;
        }
        pod_spec::validate(spec, path, errors);
        pod_claims::made(v.new, errors);
        if items(spec, "ephemeralContainers").next().is_some() {
            errors.forbidden(path.at("ephemeralContainers"), "cannot be set on create");
        }
        let bound = spec["nodeName"].as_str().is_some_and(|name| !name.is_empty());
        if bound && items(spec, "schedulingGates").next().is_some() {
            errors.forbidden(path.at("nodeName"), "cannot be set until all schedulingGates have been cleared");
        }
        return;
    };
    if v.subresource == "status" {
        return;
    }
    match v.subresource {
        "ephemeralcontainers" => return pod_spec::validate(spec, path, errors),
        "resize" => return pod_resize::validate(v.new, old, errors),
        _ => {}
    }
    // Of a pod that exists, few fields may change.
    const ALLOWED: &str = "pod updates may not change fields other than `spec.containers[*].image`,\
        `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing \
        tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
    let fixed = |spec: &Value| {
        let mut spec = spec.clone();
        for list in ["containers", "initContainers"] {
            for container in items_mut(&mut spec, list) {
                container["image"] = Value::Null;
            }
        }
        for key in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
            spec[key] = Value::Null;
        }
        spec
    };
    for (list_index, list) in ["containers", "initContainers"].iter().enumerate() {
        for (index, container) in items(spec, list).enumerate() {
            if container["image"].as_str().unwrap_or_default().is_empty() && list_index == 0 {
                let at = path.at(list);
                let at = at.index(index);
                errors.required(at.at("image"), "");
            }
        }
    }
    if fixed(spec) != fixed(&old["spec"]) {
        errors.forbidden(path, ALLOWED);
    }
    if items(&old["spec"], "tolerations").any(|t| !items(spec, "tolerations").any(|n| n == t)) {
        errors
            .forbidden(path.at("tolerations"), "existing toleration can not be modified except its tolerationSeconds");
    }
    if items(spec, "schedulingGates").any(|g| !items(&old["spec"], "schedulingGates").any(|o| o == g)) {
        errors.forbidden(path.at("schedulingGates"), "only deletion is allowed, but found new scheduling gate");
    }
    match (old["spec"]["activeDeadlineSeconds"].as_i64(), spec["activeDeadlineSeconds"].as_i64()) {
        (Some(was), Some(is)) if is > was => {
            errors.invalid(path.at("activeDeadlineSeconds"), is, "must be less than or equal to previous value");
        }
        (Some(_), None) => errors.invalid(
            path.at("activeDeadlineSeconds"),
            Value::Null,
            "must not update from a positive integer to nil value",
        ),
        _ => {}
    }
    meta::non_negative(spec, "activeDeadlineSeconds", path, errors);
}

/// Makes sure a pod that is created carries nothing of a node yet: used by generators of pods in tests.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qos() {
        let class = |c: Value| qos_class(&json!({"containers": [c]}));
        assert_eq!(class(json!({})), "BestEffort");
        assert_eq!(class(json!({"resources": {"requests": {"cpu": "1"}}})), "Burstable");
        let full = json!({"cpu": "1", "memory": "1Gi"});
        assert_eq!(class(json!({"resources": {"requests": full, "limits": full}})), "Guaranteed");
        assert_eq!(
            class(json!({"resources": {"requests": {"cpu": "1000m", "memory": "1Gi"}, "limits": full}})),
            "Guaranteed"
        );
        assert_eq!(class(json!({"resources": {"limits": {"cpu": "1"}}})), "Burstable");
    }

    #[test]
    fn status_column() {
        let check = |status: Value, deleted: bool, expect: (&str, &str)| {
            let mut pod = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}, "status": status});
            if deleted {
                pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
            }
            let cells = cells(&pod, jiff::Timestamp::UNIX_EPOCH);
            assert_eq!((cells[0].as_str().unwrap(), cells[1].as_str().unwrap()), expect, "{pod}");
        };
        check(json!({"phase": "Pending"}), false, ("0/1", "Pending"));
        check(
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"waiting": {"reason": "PodInitializing"}}}]}),
            false,
            ("0/1", "Init:0/1"),
        );
        check(
            json!({"phase": "Running", "containerStatuses": [{"name": "a", "ready": true, "state": {"running": {}}}]}),
            false,
            ("1/1", "Running"),
        );
        check(
            json!({"phase": "Running", "containerStatuses": [{"name": "a", "ready": false, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
            false,
            ("0/1", "CrashLoopBackOff"),
        );
        check(
            json!({"phase": "Running", "containerStatuses": [{"name": "a", "ready": true, "state": {"running": {}}}]}),
            true,
            ("1/1", "Terminating"),
        );
        check(
            json!({"phase": "Failed", "containerStatuses": [{"name": "a", "state": {"terminated": {"exitCode": 3, "reason": "Error"}}}]}),
            false,
            ("0/1", "Error"),
        );
    }
}
