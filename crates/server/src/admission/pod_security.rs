//! PodSecurity: what labels of a namespace ask of its pods
//! (<https://kubernetes.io/docs/concepts/security/pod-security-admission/>).

use seawall_api::{
    field::{Errors, Path},
    pod_security::{Level, Policy, version, violations},
};
use serde_json::Value;

use crate::{
    Context, Server,
    apply::Recording,
    error::{ApiError, Result},
};

const LABEL: &str = "pod-security.kubernetes.io/";

/// Reads the policy of a mode (`enforce`, `audit`, `warn`) from labels. What cannot be read is the strictest one for what
/// is warned of and enforced, as upstream has it.
fn policy(labels: &Value, mode: &str) -> Option<Policy> {
    let label = |suffix: &str| labels[format!("{LABEL}{mode}{suffix}").as_str()].as_str();
    let level = label("")?.parse().unwrap_or(Level::Restricted);
    Some(Policy { level, minor: label("-version").and_then(|text| version(text).ok()).flatten() })
}

/// Where a kind has the template of its pods.
fn template<'a>(group: &str, plural: &str, object: &'a Value) -> Option<&'a Value> {
    match (group, plural) {
        ("apps", "deployments" | "replicasets" | "statefulsets" | "daemonsets")
        | ("batch", "jobs")
        | ("", "replicationcontrollers") => Some(&object["spec"]["template"]),
        ("batch", "cronjobs") => Some(&object["spec"]["jobTemplate"]["spec"]["template"]),
        ("", "podtemplates") => Some(&object["template"]),
        _ => None,
    }
}

impl Server {
    /// Checks a pod, warns of a template, or looks at the labels of a namespace.
    pub(super) async fn pod_security(&self, context: &Context<'_>, object: &Value, old: Option<&Value>) -> Result<()> {
        let (group, plural) = (context.row.group, context.row.plural);
        let part = match context.recording {
            Recording::As(part) => part,
            Recording::OfPath => context.path.subresource.as_deref().unwrap_or_default(),
        };
        if group.is_empty() && plural == "namespaces" && part.is_empty() {
            return self.check_levels(context, object, old);
        }
        let pod = group.is_empty() && plural == "pods";
        let looked_at = match pod {
            true => matches!(part, "" | "ephemeralcontainers" | "resize"),
            false => part.is_empty(),
        };
        let shape = match (pod, looked_at) {
            (_, false) => None,
            (true, true) => Some(object),
            (false, true) => template(group, plural, object).filter(|template| template["spec"].is_object()),
        };
        let Some(shape) = shape else { return Ok(()) };
        // What has been let in is not looked at again as long as it stays what it was.
        if let Some(old) = old
            && pod
            && old["spec"] == object["spec"]
        {
            return Ok(());
        }
        let Some(namespace) = self.find("", "namespaces", "", context.namespace()).await? else { return Ok(()) };
        let namespace = namespace.value();
        let labels = &namespace["metadata"]["labels"];
        let found = |mode: &str| -> Option<(Policy, String)> {
            let policy = policy(labels, mode)?;
            violations(policy, &shape["metadata"], &shape["spec"]).map(|what| (policy, what))
        };
        if let Some(policy) = policy(labels, "enforce").filter(|_| pod) {
            context.annotate(&format!("{LABEL}enforce-policy"), policy.to_string());
        }
        if let Some((policy, what)) = found("enforce").filter(|_| pod) {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let why = format!("violates PodSecurity \"{policy}\": {what}");
            return Err(ApiError::forbidden(&context.row, name, why));
        }
        if let Some((policy, what)) = found("warn") {
            context.warn(vec![format!("would violate PodSecurity \"{policy}\": {what}")]);
        }
        if let Some((policy, what)) = found("audit") {
            let text = format!("would violate PodSecurity \"{policy}\": {what}");
            context.annotate(&format!("{LABEL}audit-violations"), text);
        }
        Ok(())
    }

    /// Labels that say nothing are refused; a stricter level says which pods that are there would not be let in.
    fn check_levels(&self, context: &Context<'_>, namespace: &Value, old: Option<&Value>) -> Result<()> {
        let labels = &namespace["metadata"]["labels"];
        let mut errors = Errors::default();
        let meta = Path::Root.at("metadata");
        let path = meta.at("labels");
        for mode in ["enforce", "audit", "warn"] {
            let (level, versioned) = (format!("{LABEL}{mode}"), format!("{LABEL}{mode}-version"));
            if let Some(text) = labels[level.as_str()].as_str()
                && text.parse::<Level>().is_err()
            {
                errors.invalid(path.key(&level), text, "must be one of privileged, baseline, restricted");
            }
            if let Some(text) = labels[versioned.as_str()].as_str()
                && let Err(why) = version(text)
            {
                errors.invalid(path.key(&versioned), text, why);
            }
        }
        let name = namespace["metadata"]["name"].as_str().unwrap_or_default();
        let same = |label: &str| old.is_some_and(|old| old["metadata"]["labels"][label] == labels[label]);
        let enforced = [format!("{LABEL}enforce"), format!("{LABEL}enforce-version")];
        if !errors.is_empty() {
            return Err(ApiError::invalid(&context.row, name, &errors));
        }
        if old.is_none() || enforced.iter().all(|label| same(label)) {
            return Ok(());
        }
        let Some(policy) = policy(labels, "enforce") else { return Ok(()) };
        let Some((id, row)) = self.registry.by_name("", "pods") else { return Ok(()) };
        let prefix = format!("{}{name}/", row.prefix());
        let snapshot = self.cache.snapshot();
        let mut warnings = Vec::new();
        // Upstream looks at three thousand pods at most, and for a second.
        for pod in snapshot.range(id, &prefix, None).take(3000) {
            let value = pod.value();
            if let Some(what) = violations(policy, &value["metadata"], &value["spec"]) {
                let reasons: Vec<&str> = what.split(" (").next().into_iter().collect();
                warnings.push(format!("{}: {}", pod.name(), reasons.join(", ")));
            }
            if warnings.len() >= 20 {
                break;
            }
        }
        if !warnings.is_empty() {
            let first =
                format!("existing pods in namespace {name:?} violate the new PodSecurity enforce level \"{policy}\"");
            context.warn(std::iter::once(first).chain(warnings).collect());
        }
        Ok(())
    }
}
