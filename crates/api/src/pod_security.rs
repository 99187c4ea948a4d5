//! The Pod Security Standards (<https://kubernetes.io/docs/concepts/security/pod-security-standards/>), checked as
//! upstream's admission does, in its words.

use std::{fmt, str::FromStr};

use serde_json::Value;

/// How much a pod may do to its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Everything.
    Privileged,
    /// Nothing that is known to lead out of a container.
    Baseline,
    /// What hardened pods do.
    Restricted,
}

impl FromStr for Level {
    type Err = ();
    fn from_str(text: &str) -> Result<Level, ()> {
        match text {
            "privileged" => Ok(Level::Privileged),
            "baseline" => Ok(Level::Baseline),
            "restricted" => Ok(Level::Restricted),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Privileged => "privileged",
            Level::Baseline => "baseline",
            Level::Restricted => "restricted",
        })
    }
}

/// A level as of a minor version of Kubernetes; none is the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The level.
    pub level: Level,
    /// The minor version.
    pub minor: Option<u32>,
}

impl Policy {
    fn since(&self, minor: u32) -> bool {
        self.minor.is_none_or(|version| version >= minor)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.minor {
            Some(minor) => write!(f, "{}:v1.{minor}", self.level),
            None => write!(f, "{}:latest", self.level),
        }
    }
}

/// Reads a version: `latest` or `v1.N`.
pub fn version(text: &str) -> Result<Option<u32>, String> {
    if text == "latest" {
        return Ok(None);
    }
    let minor = text.strip_prefix("v1.").and_then(|minor| minor.parse().ok());
    minor.map(Some).ok_or_else(|| "must be \"latest\" or \"v1.x\"".to_owned())
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

fn containers(spec: &Value) -> Vec<&Value> {
    ["initContainers", "containers", "ephemeralContainers"].into_iter().flat_map(|key| list(spec, key)).collect()
}

fn name(container: &Value) -> &str {
    container["name"].as_str().unwrap_or_default()
}

/// `container "a"` or `containers "a", "b"`.
fn named(what: &str, names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    format!("{what}{} {}", if names.len() == 1 { "" } else { "s" }, quoted.join(", "))
}

fn quoted(mut texts: Vec<&str>) -> String {
    texts.sort_unstable();
    texts.dedup();
    texts.iter().map(|text| format!("{text:?}")).collect::<Vec<_>>().join(", ")
}

fn bad_containers(spec: &Value, bad: impl Fn(&Value) -> bool) -> Vec<&str> {
    containers(spec).into_iter().filter(|container| bad(container)).map(name).collect()
}

fn context(container: &Value) -> &Value {
    &container["securityContext"]
}

/// The pod and its containers that have something: `pod and container "a"`.
fn who(pod: bool, names: &[&str]) -> String {
    match (pod, names.is_empty()) {
        (true, true) => "pod".to_owned(),
        (true, false) => format!("pod and {}", named("container", names)),
        (false, _) => named("container", names),
    }
}

/// A check: what it is about, and the details if it does not pass.
type Finding = Option<(String, String)>;

fn finding(reason: impl Into<String>, detail: impl Into<String>) -> Finding {
    Some((reason.into(), detail.into()))
}

fn app_armor(meta: &Value, spec: &Value) -> Finding {
    let forbidden = |value: &str| !(value.is_empty() || value == "runtime/default" || value.starts_with("localhost/"));
    let mut bad: Vec<String> = Vec::new();
    let unconfined = |at: &Value| at["appArmorProfile"]["type"] == "Unconfined";
    let names = bad_containers(spec, |c| unconfined(context(c)));
    if unconfined(&spec["securityContext"]) || !names.is_empty() {
        let pod = unconfined(&spec["securityContext"]);
        bad.push(format!("{} must not set AppArmor profile type to \"Unconfined\"", who(pod, &names)));
    }
    let mut annotated: Vec<String> = Vec::new();
    for (key, value) in meta["annotations"].as_object().into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        if key.starts_with("container.apparmor.security.beta.kubernetes.io/") && forbidden(value) {
            annotated.push(format!("{key}={value:?}"));
        }
    }
    annotated.sort();
    let count = bad.len() + annotated.len();
    if !annotated.is_empty() {
        bad.push(format!("annotation{} {}", if annotated.len() == 1 { "" } else { "s" }, annotated.join(", ")));
    }
    match count {
        0 => None,
        1 => finding("forbidden AppArmor profile", bad.join("; ")),
        _ => finding("forbidden AppArmor profiles", bad.join("; ")),
    }
}

const DEFAULT_CAPABILITIES: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
    "",
];

/// Containers that add a capability that is not among `allowed`, and which.
fn added<'a>(spec: &'a Value, allowed: &[&str]) -> (Vec<&'a str>, Vec<&'a str>) {
    let (mut names, mut capabilities) = (Vec::new(), Vec::new());
    for container in containers(spec) {
        let bad: Vec<&str> = list(&context(container)["capabilities"], "add")
            .filter_map(Value::as_str)
            .filter(|capability| !allowed.contains(capability))
            .collect();
        if !bad.is_empty() {
            names.push(name(container));
            capabilities.extend(bad);
        }
    }
    (names, capabilities)
}

fn capabilities_baseline(spec: &Value) -> Finding {
    let (names, bad) = added(spec, &DEFAULT_CAPABILITIES[..13]);
    if names.is_empty() {
        return None;
    }
    let detail =
        format!("{} must not include {} in securityContext.capabilities.add", named("container", &names), quoted(bad));
    finding("non-default capabilities", detail)
}

fn host_namespaces(spec: &Value) -> Finding {
    let used: Vec<String> = ["hostNetwork", "hostPID", "hostIPC"]
        .into_iter()
        .filter(|key| spec[*key] == true)
        .map(|key| format!("{key}=true"))
        .collect();
    if used.is_empty() { None } else { finding("host namespaces", used.join(", ")) }
}

fn host_path(spec: &Value) -> Finding {
    let names: Vec<&str> = list(spec, "volumes").filter(|v| !v["hostPath"].is_null()).map(name).collect();
    if names.is_empty() { None } else { finding("hostPath volumes", named("volume", &names)) }
}

fn host_ports(spec: &Value) -> Finding {
    let (mut names, mut ports): (Vec<&str>, Vec<i64>) = (Vec::new(), Vec::new());
    for container in containers(spec) {
        let used: Vec<i64> =
            list(container, "ports").filter_map(|p| p["hostPort"].as_i64()).filter(|p| *p != 0).collect();
        if !used.is_empty() {
            names.push(name(container));
            ports.extend(used);
        }
    }
    if names.is_empty() {
        return None;
    }
    ports.sort_unstable();
    ports.dedup();
    let shown = ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let (verb, what) =
        (if names.len() == 1 { "uses" } else { "use" }, if ports.len() == 1 { "hostPort" } else { "hostPorts" });
    finding("hostPort", format!("{} {verb} {what} {shown}", named("container", &names)))
}

/// Since 1.34 (KEP-4940): a probe or hook that names a host reaches out from the node.
fn host_probes(spec: &Value) -> Finding {
    let names_host = |action: &Value| {
        ["httpGet", "tcpSocket"].iter().any(|kind| {
            let host = action[*kind]["host"].as_str().unwrap_or_default();
            !matches!(host, "" | "127.0.0.1" | "::1")
        })
    };
    let bad = |c: &Value| {
        ["livenessProbe", "readinessProbe", "startupProbe"].iter().any(|probe| names_host(&c[*probe]))
            || ["postStart", "preStop"].iter().any(|hook| names_host(&c["lifecycle"][*hook]))
    };
    let names = bad_containers(spec, bad);
    if names.is_empty() {
        return None;
    }
    finding(
        "probe or lifecycle host",
        format!("{} must not set probe or lifecycle hook host", named("container", &names)),
    )
}

fn privileged(spec: &Value) -> Finding {
    let names = bad_containers(spec, |c| context(c)["privileged"] == true);
    if names.is_empty() {
        return None;
    }
    finding("privileged", format!("{} must not set securityContext.privileged=true", named("container", &names)))
}

fn proc_mount(spec: &Value) -> Finding {
    let unusual = |c: &Value| context(c)["procMount"].as_str().is_some_and(|mount| mount != "Default");
    let names = bad_containers(spec, unusual);
    if names.is_empty() {
        return None;
    }
    let mounts =
        containers(spec).into_iter().filter_map(|c| context(c)["procMount"].as_str()).filter(|m| *m != "Default");
    let detail = format!(
        "{} must not set securityContext.procMount to {}",
        named("container", &names),
        quoted(mounts.collect())
    );
    finding("procMount", detail)
}

fn se_linux(spec: &Value, policy: Policy) -> Finding {
    let mut types = vec!["", "container_t", "container_init_t", "container_kvm_t"];
    if policy.since(31) {
        types.push("container_engine_t");
    }
    let options = |at: &Value| at["seLinuxOptions"].clone();
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let bad = |options: &Value| {
        !types.contains(&&*text(options, "type"))
            || !text(options, "user").is_empty()
            || !text(options, "role").is_empty()
    };
    let pod = bad(&options(&spec["securityContext"]));
    let names = bad_containers(spec, |c| bad(&options(context(c))));
    if !pod && names.is_empty() {
        return None;
    }
    let all: Vec<Value> = std::iter::once(options(&spec["securityContext"]))
        .chain(containers(spec).into_iter().map(|c| options(context(c))))
        .collect();
    let wrong: Vec<String> = all.iter().map(|o| text(o, "type")).filter(|ty| !types.contains(&&**ty)).collect();
    let mut details = Vec::new();
    if !wrong.is_empty() {
        let (plural, list) =
            (if wrong.len() == 1 { "" } else { "s" }, quoted(wrong.iter().map(String::as_str).collect()));
        details.push(format!("type{plural} {list}"));
    }
    for key in ["user", "role"] {
        if all.iter().any(|options| !text(options, key).is_empty()) {
            details.push(format!("{key} may not be set"));
        }
    }
    finding(
        "seLinuxOptions",
        format!("{} set forbidden securityContext.seLinuxOptions: {}", who(pod, &names), details.join("; ")),
    )
}

fn seccomp_type(at: &Value) -> &str {
    at["seccompProfile"]["type"].as_str().unwrap_or_default()
}

fn seccomp_baseline(spec: &Value) -> Finding {
    let bad = |ty: &str| !matches!(ty, "" | "RuntimeDefault" | "Localhost");
    let pod = bad(seccomp_type(&spec["securityContext"]));
    let names = bad_containers(spec, |c| bad(seccomp_type(context(c))));
    if !pod && names.is_empty() {
        return None;
    }
    let types: Vec<&str> = std::iter::once(seccomp_type(&spec["securityContext"]))
        .chain(containers(spec).into_iter().map(|c| seccomp_type(context(c))))
        .filter(|ty| bad(ty))
        .collect();
    let detail = format!("{} must not set securityContext.seccompProfile.type to {}", who(pod, &names), quoted(types));
    finding("seccompProfile", detail)
}

fn sysctls(spec: &Value, policy: Policy) -> Finding {
    let safe = |name: &str| match name {
        "kernel.shm_rmid_forced"
        | "net.ipv4.ip_local_port_range"
        | "net.ipv4.tcp_syncookies"
        | "net.ipv4.ping_group_range"
        | "net.ipv4.ip_unprivileged_port_start" => true,
        "net.ipv4.ip_local_reserved_ports" => policy.since(27),
        "net.ipv4.tcp_keepalive_time"
        | "net.ipv4.tcp_fin_timeout"
        | "net.ipv4.tcp_keepalive_intvl"
        | "net.ipv4.tcp_keepalive_probes" => policy.since(29),
        "net.ipv4.tcp_rmem" | "net.ipv4.tcp_wmem" => policy.since(32),
        _ => false,
    };
    let mut bad: Vec<&str> = list(&spec["securityContext"], "sysctls").map(name).filter(|name| !safe(name)).collect();
    if bad.is_empty() {
        return None;
    }
    bad.sort_unstable();
    bad.dedup();
    finding("forbidden sysctls", bad.join(", "))
}

fn host_process(spec: &Value) -> Finding {
    let bad = |at: &Value| at["windowsOptions"]["hostProcess"] == true;
    let pod = bad(&spec["securityContext"]);
    let names = bad_containers(spec, |c| bad(context(c)));
    if !pod && names.is_empty() {
        return None;
    }
    finding("hostProcess", format!("{} must not set securityContext.windowsOptions.hostProcess=true", who(pod, &names)))
}

fn privilege_escalation(spec: &Value) -> Finding {
    let names = bad_containers(spec, |c| context(c)["allowPrivilegeEscalation"] != false);
    if names.is_empty() {
        return None;
    }
    let detail = format!("{} must set securityContext.allowPrivilegeEscalation=false", named("container", &names));
    finding("allowPrivilegeEscalation != false", detail)
}

fn capabilities_restricted(spec: &Value) -> Finding {
    let keeps = |c: &Value| !list(&context(c)["capabilities"], "drop").any(|dropped| dropped == "ALL");
    let kept = bad_containers(spec, keeps);
    let (names, bad) = added(spec, &["NET_BIND_SERVICE"]);
    let mut details = Vec::new();
    if !kept.is_empty() {
        details.push(format!("{} must set securityContext.capabilities.drop=[\"ALL\"]", named("container", &kept)));
    }
    if !names.is_empty() {
        let who = named("container", &names);
        details.push(format!("{who} must not include {} in securityContext.capabilities.add", quoted(bad)));
    }
    if details.is_empty() { None } else { finding("unrestricted capabilities", details.join("; ")) }
}

fn restricted_volumes(spec: &Value) -> Finding {
    const ALLOWED: [&str; 9] = [
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
        "name",
    ];
    let (mut names, mut types) = (Vec::new(), Vec::new());
    for volume in list(spec, "volumes") {
        let ty = volume.as_object().into_iter().flatten().find(|(k, v)| !ALLOWED.contains(&&***k) && !v.is_null());
        if let Some((ty, _)) = ty {
            names.push(name(volume));
            types.push(ty.as_str());
        }
    }
    if names.is_empty() {
        return None;
    }
    let (verb, plural) = if names.len() == 1 { ("uses", "") } else { ("use", "s") };
    let count = types.iter().collect::<std::collections::BTreeSet<_>>().len();
    let plural = if count == 1 { "" } else { plural };
    let detail = format!("{} {verb} restricted volume type{plural} {}", named("volume", &names), quoted(types));
    finding("restricted volume types", detail)
}

fn run_as_non_root(spec: &Value) -> Finding {
    let pod = &spec["securityContext"]["runAsNonRoot"];
    let explicit = bad_containers(spec, |c| context(c)["runAsNonRoot"] == false);
    let unset = bad_containers(spec, |c| context(c)["runAsNonRoot"].is_null());
    let mut details = Vec::new();
    if *pod == false {
        details.push("pod must not set securityContext.runAsNonRoot=false".to_owned());
    }
    if !explicit.is_empty() {
        details.push(format!("{} must not set securityContext.runAsNonRoot=false", named("container", &explicit)));
    }
    if details.is_empty() && pod.is_null() && !unset.is_empty() {
        details.push(format!("pod or {} must set securityContext.runAsNonRoot=true", named("container", &unset)));
    }
    if details.is_empty() { None } else { finding("runAsNonRoot != true", details.join("; ")) }
}

fn run_as_user(spec: &Value) -> Finding {
    let pod = spec["securityContext"]["runAsUser"] == 0;
    let names = bad_containers(spec, |c| context(c)["runAsUser"] == 0);
    if !pod && names.is_empty() {
        return None;
    }
    finding("runAsUser=0", format!("{} must not set runAsUser=0", who(pod, &names)))
}

fn seccomp_restricted(spec: &Value) -> Finding {
    let bad = |ty: &str| !matches!(ty, "" | "RuntimeDefault" | "Localhost");
    let pod = seccomp_type(&spec["securityContext"]);
    let explicit = bad_containers(spec, |c| bad(seccomp_type(context(c))));
    let mut details = Vec::new();
    if bad(pod) {
        details.push(format!("pod must not set securityContext.seccompProfile.type to {pod:?}"));
    }
    if !explicit.is_empty() {
        let types = containers(spec).into_iter().map(|c| seccomp_type(context(c))).filter(|ty| bad(ty)).collect();
        let who = named("container", &explicit);
        details.push(format!("{who} must not set securityContext.seccompProfile.type to {}", quoted(types)));
    }
    if details.is_empty() && pod.is_empty() {
        let unset = bad_containers(spec, |c| seccomp_type(context(c)).is_empty());
        if !unset.is_empty() {
            details.push(format!(
                "pod or {} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\"",
                named("container", &unset)
            ));
        }
    }
    if details.is_empty() { None } else { finding("seccompProfile", details.join("; ")) }
}

/// What a pod does that a policy does not allow: `host namespaces (hostNetwork=true), …`. Nothing if it may.
pub fn violations(policy: Policy, meta: &Value, spec: &Value) -> Option<String> {
    if policy.level == Level::Privileged {
        return None;
    }
    let restricted = policy.level == Level::Restricted;
    let windows = spec["os"]["name"] == "windows" && policy.since(25);
    let mut found = Vec::new();
    if restricted && !windows && policy.since(8) {
        found.push(privilege_escalation(spec));
    }
    found.push(app_armor(meta, spec));
    // What is restricted takes the place of the same check of the baseline.
    match restricted && policy.since(22) {
        true if windows => {}
        true => found.push(capabilities_restricted(spec)),
        false => found.push(capabilities_baseline(spec)),
    }
    found.push(host_namespaces(spec));
    if !restricted {
        found.push(host_path(spec));
    }
    found.push(host_ports(spec));
    if policy.since(34) {
        found.push(host_probes(spec));
    }
    found.push(privileged(spec));
    found.push(proc_mount(spec));
    if restricted {
        found.push(restricted_volumes(spec));
        found.push(run_as_non_root(spec));
        if policy.since(23) {
            found.push(run_as_user(spec));
        }
    }
    found.push(se_linux(spec, policy));
    match restricted && policy.since(19) {
        true if windows => {}
        true => found.push(seccomp_restricted(spec)),
        false => found.push(seccomp_baseline(spec)),
    }
    found.push(sysctls(spec, policy));
    found.push(host_process(spec));
    let shown: Vec<String> =
        found.into_iter().flatten().map(|(reason, detail)| format!("{reason} ({detail})")).collect();
    (!shown.is_empty()).then(|| shown.join(", "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(level: &str, spec: Value, expect: Option<&str>) {
        let policy = Policy { level: level.parse().unwrap(), minor: None };
        assert_eq!(violations(policy, &json!({}), &spec).as_deref(), expect, "{level} {spec}");
    }

    fn one(context: Value) -> Value {
        json!({"containers": [{"name": "c", "securityContext": context}]})
    }

    #[test]
    fn baseline() {
        check("privileged", one(json!({"privileged": true})), None);
        check("baseline", one(json!({})), None);
        check(
            "baseline",
            one(json!({"privileged": true})),
            Some("privileged (container \"c\" must not set securityContext.privileged=true)"),
        );
        check(
            "baseline",
            json!({"hostNetwork": true, "hostPID": true}),
            Some("host namespaces (hostNetwork=true, hostPID=true)"),
        );
        check(
            "baseline",
            json!({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}),
            Some("hostPath volumes (volume \"v\")"),
        );
        check(
            "baseline",
            json!({"containers": [{"name": "a", "ports": [{"hostPort": 80}]}, {"name": "b", "ports": [{"hostPort": 81}]}]}),
            Some("hostPort (containers \"a\", \"b\" use hostPorts 80, 81)"),
        );
        check(
            "baseline",
            one(json!({"capabilities": {"add": ["NET_ADMIN", "CHOWN"]}})),
            Some(
                "non-default capabilities (container \"c\" must not include \"NET_ADMIN\" in securityContext.capabilities.add)",
            ),
        );
        check(
            "baseline",
            one(json!({"seccompProfile": {"type": "Unconfined"}})),
            Some("seccompProfile (container \"c\" must not set securityContext.seccompProfile.type to \"Unconfined\")"),
        );
        check(
            "baseline",
            json!({"securityContext": {"sysctls": [{"name": "kernel.msgmax"}, {"name": "net.ipv4.tcp_syncookies"}]}}),
            Some("forbidden sysctls (kernel.msgmax)"),
        );
        check(
            "baseline",
            one(json!({"procMount": "Unmasked"})),
            Some("procMount (container \"c\" must not set securityContext.procMount to \"Unmasked\")"),
        );
        check(
            "baseline",
            one(json!({"seLinuxOptions": {"type": "spc_t", "user": "u"}})),
            Some(
                "seLinuxOptions (container \"c\" set forbidden securityContext.seLinuxOptions: type \"spc_t\"; user may not be set)",
            ),
        );
        check(
            "baseline",
            json!({"securityContext": {"windowsOptions": {"hostProcess": true}}}),
            Some("hostProcess (pod must not set securityContext.windowsOptions.hostProcess=true)"),
        );
    }

    #[test]
    fn restricted() {
        check(
            "restricted",
            one(json!({})),
            Some(
                "allowPrivilegeEscalation != false (container \"c\" must set securityContext.allowPrivilegeEscalation=false), \
                 unrestricted capabilities (container \"c\" must set securityContext.capabilities.drop=[\"ALL\"]), \
                 runAsNonRoot != true (pod or container \"c\" must set securityContext.runAsNonRoot=true), \
                 seccompProfile (pod or container \"c\" must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\")",
            ),
        );
        let hard = json!({"allowPrivilegeEscalation": false, "runAsNonRoot": true, "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
            "seccompProfile": {"type": "RuntimeDefault"}});
        check("restricted", one(hard.clone()), None);
        let with = |key: &str, value: Value| {
            let mut hard = hard.clone();
            hard[key] = value;
            one(hard)
        };
        check(
            "restricted",
            with("runAsUser", 0.into()),
            Some("runAsUser=0 (container \"c\" must not set runAsUser=0)"),
        );
        check(
            "restricted",
            with("runAsNonRoot", false.into()),
            Some("runAsNonRoot != true (container \"c\" must not set securityContext.runAsNonRoot=false)"),
        );
        let mut spec = one(hard.clone());
        spec["volumes"] = json!([{"name": "v", "hostPath": {}}, {"name": "e", "emptyDir": {}}]);
        check(
            "restricted",
            spec,
            Some("restricted volume types (volume \"v\" uses restricted volume type \"hostPath\")"),
        );
    }

    #[test]
    fn versions() {
        assert_eq!(version("latest"), Ok(None));
        assert_eq!(version("v1.25"), Ok(Some(25)));
        assert!(version("1.25").is_err());
        let spec = json!({"containers": [{"name": "c", "livenessProbe": {"tcpSocket": {"host": "10.0.0.1"}}}]});
        let at = |minor| violations(Policy { level: Level::Baseline, minor }, &json!({}), &spec).is_some();
        assert!(at(None) && at(Some(34)) && !at(Some(33)));
    }
}
