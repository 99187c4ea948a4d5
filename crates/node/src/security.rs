//! Who a container runs as and what it may do.
//!
//! <https://kubernetes.io/docs/tasks/configure-pod-container/security-context/>

use std::path::Path;

use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use crate::{pod, sandbox};

/// Refuses a container that must not run as root and would.
pub fn check_non_root(pod: &Pod, spec: &PodSpec, container: &Container, image: &cri::Image) -> Result<(), String> {
    let (own, shared) = (container.security_context.as_ref(), spec.security_context.as_ref());
    let wanted = own.and_then(|c| c.run_as_non_root).or(shared.and_then(|c| c.run_as_non_root)) == Some(true);
    if !wanted {
        return Ok(());
    }
    let user = own.and_then(|c| c.run_as_user).or(shared.and_then(|c| c.run_as_user));
    let about = format!("(pod: {:?}, container: {})", pod::full_name(pod), container.name);
    match (user, &image.uid) {
        (Some(0), _) => Err(format!("container's runAsUser breaks non-root policy {about}")),
        (Some(_), _) => Ok(()),
        (None, Some(uid)) if uid.value != 0 => Ok(()),
        (None, None) if !image.username.is_empty() => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root {about}",
            image.username
        )),
        _ => Err(format!("container has runAsNonRoot and image will run as root {about}")),
    }
}

const MASKED: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The container's security context, in the runtime's words.
pub fn context(
    spec: &PodSpec,
    container: &Container,
    target: Option<String>,
    data: &Path,
) -> cri::LinuxContainerSecurityContext {
    let (own, shared) = (container.security_context.as_ref(), spec.security_context.as_ref());
    let int = |v: Option<i64>| v.map(|value| cri::Int64Value { value });
    let privileged = own.and_then(|c| c.privileged).unwrap_or(false);
    let mut namespaces = sandbox::namespaces(spec);
    if let Some(target) = target {
        namespaces.pid = cri::NamespaceMode::Target as i32;
        namespaces.target_id = target;
    }
    let profile = own.and_then(|c| c.seccomp_profile.as_ref()).or(shared.and_then(|c| c.seccomp_profile.as_ref()));
    use cri::security_profile::ProfileType;
    let seccomp = match profile.map(|p| (p.type_.as_str(), p.localhost_profile.as_deref())) {
        Some(("RuntimeDefault", _)) => {
            cri::SecurityProfile { profile_type: ProfileType::RuntimeDefault as i32, ..Default::default() }
        }
        Some(("Localhost", Some(file))) => cri::SecurityProfile {
            profile_type: ProfileType::Localhost as i32,
            localhost_ref: data.join("seccomp").join(file).display().to_string(),
        },
        _ => cri::SecurityProfile { profile_type: ProfileType::Unconfined as i32, ..Default::default() },
    };
    let unmasked = own.and_then(|c| c.proc_mount.as_deref()) == Some("Unmasked") || privileged;
    let paths = |list: &[&str]| if unmasked { Vec::new() } else { list.iter().map(|p| (*p).to_owned()).collect() };
    let user = own.and_then(|c| c.run_as_user).or(shared.and_then(|c| c.run_as_user));
    let capabilities = own.and_then(|c| c.capabilities.as_ref()).map(|c| cri::Capability {
        add_capabilities: c.add.clone().unwrap_or_default(),
        drop_capabilities: c.drop.clone().unwrap_or_default(),
        ..Default::default()
    });
    cri::LinuxContainerSecurityContext {
        capabilities: Some(capabilities.unwrap_or_default()),
        privileged,
        namespace_options: Some(namespaces),
        run_as_user: int(user),
        run_as_group: int(own.and_then(|c| c.run_as_group).or(shared.and_then(|c| c.run_as_group))),
        readonly_rootfs: own.and_then(|c| c.read_only_root_filesystem).unwrap_or(false),
        supplemental_groups: sandbox::supplemental_groups(spec),
        no_new_privs: own.and_then(|c| c.allow_privilege_escalation) == Some(false),
        masked_paths: paths(&MASKED),
        readonly_paths: paths(&READONLY),
        seccomp: Some(seccomp),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn non_root() {
        let pod = Pod::default();
        let spec: PodSpec =
            serde_json::from_value(json!({"containers": [], "securityContext": {"runAsNonRoot": true}})).unwrap();
        let check = |container: serde_json::Value, uid: Option<i64>, name: &str| {
            let image = cri::Image {
                uid: uid.map(|value| cri::Int64Value { value }),
                username: name.into(),
                ..Default::default()
            };
            check_non_root(&pod, &spec, &serde_json::from_value(container).unwrap(), &image).is_ok()
        };
        assert!(!check(json!({"name": "a"}), None, ""));
        assert!(!check(json!({"name": "a"}), None, "www"));
        assert!(check(json!({"name": "a"}), Some(5), ""));
        assert!(check(json!({"name": "a", "securityContext": {"runAsUser": 7}}), None, ""));
        assert!(!check(json!({"name": "a", "securityContext": {"runAsUser": 0}}), Some(5), ""));
        assert!(check(json!({"name": "a", "securityContext": {"runAsNonRoot": false}}), None, ""));
    }
}
