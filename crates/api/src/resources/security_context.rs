//! Security contexts of pods and containers, and what an operating system does not have
//! (<https://kubernetes.io/docs/tasks/configure-pod-container/security-context/>).

use std::collections::HashSet;

use serde_json::Value;

use super::{items, meta, windows_options};
use crate::field::{Errors, Path};

const LOCALHOST: &str = "Localhost";
/// How profiles of seccomp and AppArmor are found.
const PROFILES: [&str; 3] = [LOCALHOST, "RuntimeDefault", "Unconfined"];
/// The longest path that Linux takes, without its end.
const LONGEST_PATH: usize = 4095;
const LONGEST_SYSCTL: usize = 253;
/// Kernel parameters that belong to the namespace of the network, or of System V IPC and message queues.
const NETWORK_SYSCTLS: [&str; 1] = ["net."];
const IPC_SYSCTLS: [&str; 4] = ["kernel.shm", "kernel.msg", "fs.mqueue.", "kernel.sem"];

/// Validates the security context of a pod.
pub(super) fn of_pod(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let context = &spec["securityContext"];
    let at = path.at("securityContext");
    for key in ["fsGroup", "runAsUser", "runAsGroup"] {
        id(&context[key], at.at(key), errors);
    }
    let list = at.at("supplementalGroups");
    for (index, group) in items(context, "supplementalGroups").enumerate() {
        id(group, list.index(index), errors);
    }
    if spec["hostPID"] == true && spec["shareProcessNamespace"] == true {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        errors.invalid(at.at("shareProcessNamespace"), true, detail);
    }
    sysctls(spec, at.at("sysctls"), errors);
    meta::one_of(context, "fsGroupChangePolicy", &["Always", "OnRootMismatch"], at, errors);
    profiles(context, at, errors);
    windows_options::validate(context, at, errors);
    meta::one_of(context, "supplementalGroupsPolicy", &["Merge", "Strict"], at, errors);
    meta::one_of(context, "seLinuxChangePolicy", &["MountOption", "Recursive"], at, errors);
    if spec["hostUsers"] == false {
        for (key, shown) in [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
            if spec[key] == true {
                errors.forbidden(path.at(shown), "when `pod.Spec.HostUsers` is false");
            }
        }
    }
}

/// Validates the security context of a container.
pub(super) fn of_container(context: &Value, host_users: bool, path: Path<'_>, errors: &mut Errors) {
    if !context.is_object() {
        return;
    }
    for key in ["runAsUser", "runAsGroup"] {
        id(&context[key], path.at(key), errors);
    }
    meta::one_of(context, "procMount", &["Default", "Unmasked"], path, errors);
    if host_users && context["procMount"] == "Unmasked" {
        errors.invalid(path.at("procMount"), "Unmasked", "`hostUsers` must be false to use `Unmasked`");
    }
    if context["allowPrivilegeEscalation"] == false {
        if context["privileged"] == true {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            errors.invalid(path, context.clone(), detail);
        }
        if items(&context["capabilities"], "add").any(|capability| capability == "CAP_SYS_ADMIN") {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.invalid(path, context.clone(), detail);
        }
    }
    profiles(context, path, errors);
    windows_options::validate(context, path, errors);
}

/// Validates the operating system of a pod, and that it asks for nothing that this one does not have.
pub(super) fn operating_system(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    const NOT_ON_WINDOWS: &str = "cannot be set for a windows pod";
    if !spec["os"].is_object() {
        return;
    }
    let at = path.at("os");
    let windows = match spec["os"]["name"].as_str().unwrap_or_default() {
        "" => return errors.required(at.at("name"), "cannot be empty"),
        "linux" => false,
        "windows" => true,
        other => return errors.not_supported(at, other, &["linux", "windows"]),
    };
    let check = |context: &Value, of_pod: bool, at: Path<'_>, errors: &mut Errors| {
        if !windows && context["windowsOptions"].is_object() {
            errors.forbidden(at.at("windowsOptions"), "windows options cannot be set for a linux pod");
        }
        let keys: &[&str] = match of_pod {
            true => &[
                "appArmorProfile",
                "seLinuxOptions",
                "seccompProfile",
                "fsGroup",
                "fsGroupChangePolicy",
                "sysctls",
                "runAsUser",
                "runAsGroup",
                "supplementalGroups",
                "supplementalGroupsPolicy",
                "seLinuxChangePolicy",
            ],
            false => &[
                "appArmorProfile",
                "seLinuxOptions",
                "seccompProfile",
                "capabilities",
                "readOnlyRootFilesystem",
                "privileged",
                "allowPrivilegeEscalation",
                "procMount",
                "runAsUser",
                "runAsGroup",
            ],
        };
        for key in keys.iter().filter(|key| windows && !context[**key].is_null()) {
            errors.forbidden(at.at(key), NOT_ON_WINDOWS);
        }
    };
    check(&spec["securityContext"], true, path.at("securityContext"), errors);
    for key in ["hostUsers", "hostPID", "hostIPC", "shareProcessNamespace"] {
        let set = !spec[key].is_null() && (spec[key] != false || matches!(key, "hostUsers" | "shareProcessNamespace"));
        if windows && set {
            errors.forbidden(path.at(key), NOT_ON_WINDOWS);
        }
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        let at = path.at(list);
        for (index, container) in items(spec, list).enumerate() {
            let at = at.index(index);
            check(&container["securityContext"], false, at.at("securityContext"), errors);
        }
    }
}

/// A number of a user or a group.
fn id(value: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = value.as_i64().filter(|n| !(0..=i64::from(i32::MAX)).contains(n)) {
        errors.invalid(path, number, "must be between 0 and 2147483647, inclusive");
    }
}

fn profiles(context: &Value, path: Path<'_>, errors: &mut Errors) {
    seccomp(&context["seccompProfile"], path.at("seccompProfile"), errors);
    app_armor(&context["appArmorProfile"], path.at("appArmorProfile"), errors);
}

fn seccomp(profile: &Value, path: Path<'_>, errors: &mut Errors) {
    if !profile.is_object() {
        return;
    }
    let kind = profile["type"].as_str().unwrap_or_default();
    match kind {
        "" => errors.required(path.at("type"), "type is required when seccompProfile is set"),
        _ if PROFILES.contains(&kind) => {}
        _ => errors.not_supported(path.at("type"), kind, &PROFILES),
    }
    let at = path.at("localhostProfile");
    match profile["localhostProfile"].as_str() {
        None if kind == LOCALHOST => errors.required(at, "must be set when seccomp type is Localhost"),
        None => {}
        Some(file) if kind == LOCALHOST => super::reference::descending_path(file, at, errors),
        Some(_) => errors.invalid(at, profile.clone(), "can only be set when seccomp type is Localhost"),
    }
}

fn app_armor(profile: &Value, path: Path<'_>, errors: &mut Errors) {
    if !profile.is_object() {
        return;
    }
    let kind = profile["type"].as_str().unwrap_or_default();
    match kind {
        "" => return errors.required(path.at("type"), "type is required when appArmorProfile is set"),
        _ if PROFILES.contains(&kind) => {}
        _ => return errors.not_supported(path.at("type"), kind, &PROFILES),
    }
    let at = path.at("localhostProfile");
    match profile["localhostProfile"].as_str() {
        None | Some("") if kind == LOCALHOST => errors.required(at, "must be set when AppArmor type is Localhost"),
        None => {}
        Some(name) if kind != LOCALHOST => {
            errors.invalid(at, name, "can only be set when AppArmor type is Localhost");
        }
        Some(name) if name.trim() != name => errors.invalid(at, name, "must not be padded with whitespace"),
        Some(name) if name.len() > LONGEST_PATH => errors.too_long(at, LONGEST_PATH),
        Some(_) => {}
    }
}

fn sysctls(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (index, sysctl) in items(&spec["securityContext"], "sysctls").enumerate() {
        let at = path.index(index);
        let at = at.at("name");
        let name = sysctl["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            errors.required(at, "");
        } else if !is_sysctl(name) {
            let detail = format!(
                "must have at most {LONGEST_SYSCTL} characters and match regex \
                 ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$"
            );
            errors.invalid(at, name, detail);
        } else if !seen.insert(name) {
            errors.duplicate(at, name);
        }
        let dotted = dotted(name);
        let of = |prefixes: &[&str]| prefixes.iter().any(|prefix| dotted.starts_with(prefix));
        for (key, shared) in [("hostNetwork", of(&NETWORK_SYSCTLS)), ("hostIPC", of(&IPC_SYSCTLS))] {
            if shared && spec[key] == true {
                errors.invalid(at, name, format!("may not be specified when '{key}' is true"));
            }
        }
    }
}

/// The name with dots: where a slash comes first, dots and slashes have changed places (`sysctl.d(5)`).
fn dotted(name: &str) -> String {
    match name.find(['.', '/']).map(|at| name.as_bytes()[at]) {
        Some(b'/') => name
            .chars()
            .map(|c| {
                if c == '/' {
                    '.'
                } else if c == '.' {
                    '/'
                } else {
                    c
                }
            })
            .collect(),
        _ => name.to_owned(),
    }
}

fn is_sysctl(name: &str) -> bool {
    let edge = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let part = |part: &str| match part.as_bytes() {
        [] => false,
        bytes => {
            edge(bytes[0])
                && bytes.last().is_some_and(|c| edge(*c))
                && bytes.iter().all(|c| edge(*c) || matches!(c, b'-' | b'_'))
        }
    };
    name.len() <= LONGEST_SYSCTL && name.split(['.', '/']).all(part)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(spec: Value) -> Vec<String> {
        let mut errors = Errors::default();
        of_pod(&spec, Path::Root.at("spec"), &mut errors);
        operating_system(&spec, Path::Root.at("spec"), &mut errors);
        let host_users = spec["hostUsers"] != false;
        for container in items(&spec, "containers") {
            of_container(&container["securityContext"], host_users, Path::Root.at("c"), &mut errors);
        }
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn contexts_of_pods() {
        let check = |context: Value, expect: &[&str]| assert_eq!(found(json!({"securityContext": context})), expect);
        check(json!({}), &[]);
        check(
            json!({"runAsUser": 0, "fsGroup": 2147483647, "supplementalGroups": [1, 2], "fsGroupChangePolicy": "Always"}),
            &[],
        );
        let range = "must be between 0 and 2147483647, inclusive";
        check(json!({"runAsUser": -1}), &[&format!("spec.securityContext.runAsUser: Invalid value: -1: {range}")]);
        check(
            json!({"supplementalGroups": [1, 1i64 << 31]}),
            &[&format!("spec.securityContext.supplementalGroups[1]: Invalid value: 2147483648: {range}")],
        );
        check(
            json!({"fsGroupChangePolicy": "Never"}),
            &[
                "spec.securityContext.fsGroupChangePolicy: Unsupported value: \"Never\": supported values: \"Always\", \"OnRootMismatch\"",
            ],
        );
        let at = "spec.securityContext.seccompProfile";
        check(json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "a/b.json"}}), &[]);
        check(
            json!({"seccompProfile": {}}),
            &[&format!("{at}.type: Required value: type is required when seccompProfile is set")],
        );
        check(
            json!({"seccompProfile": {"type": "Localhost"}}),
            &[&format!("{at}.localhostProfile: Required value: must be set when seccomp type is Localhost")],
        );
        check(
            json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "../x"}}),
            &[&format!("{at}.localhostProfile: Invalid value: \"../x\": must not contain '..'")],
        );
        check(
            json!({"seccompProfile": {"type": "Some"}}),
            &[&format!(
                "{at}.type: Unsupported value: \"Some\": supported values: \"Localhost\", \"RuntimeDefault\", \"Unconfined\""
            )],
        );
        let at = "spec.securityContext.appArmorProfile.localhostProfile";
        check(
            json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": " a"}}),
            &[&format!("{at}: Invalid value: \" a\": must not be padded with whitespace")],
        );
        check(
            json!({"appArmorProfile": {"type": "Unconfined", "localhostProfile": "a"}}),
            &[&format!("{at}: Invalid value: \"a\": can only be set when AppArmor type is Localhost")],
        );
    }

    #[test]
    fn parameters_of_the_kernel() {
        let check = |names: Value, host: Value, expect: &[&str]| {
            let list: Vec<Value> = names.as_array().unwrap().iter().map(|n| json!({"name": n, "value": "1"})).collect();
            let mut spec = host;
            spec["securityContext"] = json!({"sysctls": list});
            let found = found(spec);
            assert_eq!(found.len(), expect.len(), "{found:?}");
            assert!(found.iter().zip(expect).all(|(f, e)| f.contains(e)), "{found:?}");
        };
        check(
            json!(["net.core.somaxconn", "kernel/shm_rmid_forced", "net/ipv4/conf/eth0.1/forwarding"]),
            json!({}),
            &[],
        );
        check(json!(["Net.a"]), json!({}), &["sysctls[0].name: Invalid value: \"Net.a\": must have at most 253"]);
        check(json!(["a..b"]), json!({}), &["must have at most 253"]);
        check(json!(["a.b", "a.b"]), json!({}), &["sysctls[1].name: Duplicate value: \"a.b\""]);
        check(json!([""]), json!({}), &["sysctls[0].name: Required value"]);
        for name in ["net.ipv4.tcp_syncookies", "net/ipv4/tcp_syncookies"] {
            check(json!([name]), json!({"hostNetwork": true}), &["may not be specified when 'hostNetwork' is true"]);
        }
        check(json!(["kernel.sem"]), json!({"hostIPC": true}), &["may not be specified when 'hostIPC' is true"]);
        check(json!(["kernel.sem"]), json!({"hostNetwork": true}), &[]);
    }

    #[test]
    fn contexts_of_containers() {
        let check = |context: Value, expect: &[&str]| {
            let found = found(json!({"containers": [{"securityContext": context}]}));
            assert_eq!(found.len(), expect.len(), "{found:?}");
            assert!(found.iter().zip(expect).all(|(f, e)| f.contains(e)), "{found:?}");
        };
        check(
            json!({"runAsUser": 1000, "allowPrivilegeEscalation": false, "capabilities": {"add": ["NET_ADMIN"]}}),
            &[],
        );
        check(json!({"runAsGroup": -2}), &["c.runAsGroup: Invalid value: -2"]);
        check(json!({"allowPrivilegeEscalation": false, "privileged": true}), &["`privileged` to true"]);
        check(
            json!({"allowPrivilegeEscalation": false, "capabilities": {"add": ["CAP_SYS_ADMIN"]}}),
            &["cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN"],
        );
        check(json!({"procMount": "Some"}), &["c.procMount: Unsupported value: \"Some\""]);
        check(json!({"procMount": "Unmasked"}), &["`hostUsers` must be false to use `Unmasked`"]);
        assert!(
            found(json!({"hostUsers": false, "containers": [{"securityContext": {"procMount": "Unmasked"}}]}))
                .is_empty()
        );
        assert_eq!(
            found(json!({"hostUsers": false, "hostPID": true})),
            ["spec.HostPID: Forbidden: when `pod.Spec.HostUsers` is false"]
        );
    }

    #[test]
    fn operating_systems() {
        let check = |spec: Value, expect: &[&str]| assert_eq!(found(spec), expect);
        check(json!({"os": {}}), &["spec.os.name: Required value: cannot be empty"]);
        check(
            json!({"os": {"name": "plan9"}}),
            &["spec.os: Unsupported value: \"plan9\": supported values: \"linux\", \"windows\""],
        );
        check(
            json!({"os": {"name": "linux"}, "securityContext": {"windowsOptions": {}}}),
            &["spec.securityContext.windowsOptions: Forbidden: windows options cannot be set for a linux pod"],
        );
        check(
            json!({"os": {"name": "windows"}, "hostPID": true, "hostIPC": false, "securityContext": {"fsGroup": 1}, "containers": [{"securityContext": {"privileged": false}}]}),
            &[
                "spec.securityContext.fsGroup: Forbidden: cannot be set for a windows pod",
                "spec.hostPID: Forbidden: cannot be set for a windows pod",
                "spec.containers[0].securityContext.privileged: Forbidden: cannot be set for a windows pod",
            ],
        );
    }
}
