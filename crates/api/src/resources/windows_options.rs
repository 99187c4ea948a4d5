//! What Windows has instead of Linux' security contexts
//! (<https://kubernetes.io/docs/tasks/configure-pod-container/create-hostprocess-pod/>).

use serde_json::Value;

use super::items;
use crate::{
    field::{Errors, Path},
    names,
};

const MAX_SPEC: usize = 64 * 1024;
const MAX_DOMAIN: usize = 256;
const MAX_USER: usize = 104;

/// Validates `windowsOptions` of a pod or a container.
pub(super) fn validate(context: &Value, path: Path<'_>, errors: &mut Errors) {
    let (options, path) = (&context["windowsOptions"], path.at("windowsOptions"));
    if let Some(name) = options["gmsaCredentialSpecName"].as_str() {
        errors.expect(path.at("gmsaCredentialSpecName"), name, names::dns_subdomain);
    }
    match options["gmsaCredentialSpec"].as_str() {
        Some("") => errors.invalid(path.at("gmsaCredentialSpec"), "", "gmsaCredentialSpec cannot be an empty string"),
        Some(spec) if spec.len() > MAX_SPEC => {
            errors.invalid(path.at("gmsaCredentialSpec"), spec, "gmsaCredentialSpec size must be under 64 KiB");
        }
        _ => {}
    }
    if let Some(name) = options["runAsUserName"].as_str() {
        user(name, path.at("runAsUserName"), errors);
    }
}

/// Validates `USER` or `DOMAIN\USER`.
fn user(name: &str, path: Path<'_>, errors: &mut Errors) {
    let mut wrong = |why: String| errors.invalid(path, name, format!("runAsUserName{why}"));
    let parts: Vec<&str> = name.split('\\').collect();
    let (domain, user) = match parts[..] {
        _ if name.is_empty() => return wrong(" cannot be an empty string".into()),
        _ if name.chars().any(|c| c.is_ascii_control()) => return wrong(" cannot contain control characters".into()),
        [user] => (None, user),
        [domain, user] => (Some(domain), user),
        _ => return wrong(" cannot contain more than one backslash".into()),
    };
    if let Some(domain) = domain {
        if domain.len() >= MAX_DOMAIN {
            wrong(format!("'s Domain length must be under {MAX_DOMAIN} characters"));
        }
        let netbios = (1..=15).contains(&domain.chars().count())
            && !domain.starts_with('.')
            && !domain.contains(['\\', '/', ':', '*', '?', '"', '<', '>', '|']);
        let dns = domain.split('.').all(|label| names::dns_label(&label.to_ascii_lowercase()).is_ok());
        if !netbios && !dns {
            wrong("'s Domain doesn't match the NetBios nor the DNS format".into());
        }
    }
    if user.is_empty() {
        wrong("'s User cannot be empty".into());
    } else if user.len() > MAX_USER {
        wrong(format!("'s User length must not be longer than {MAX_USER} characters"));
    }
    if !user.is_empty() && user.chars().all(|c| c == '.' || c == ' ') {
        wrong("'s User cannot contain only periods or spaces".into());
    }
    if user.contains(['"', '/', '\\', ':', ';', '|', '=', ',', '+', '*', '?', '<', '>', '@', '[', ']']) {
        wrong("'s User cannot contain the following characters: \"/\\:;|=,+*?<>@[]".into());
    }
}

/// Validates that all containers of a pod run as processes of the machine, or none.
pub(super) fn host_process(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let of = |object: &Value| object["securityContext"]["windowsOptions"]["hostProcess"].as_bool();
    let whole = of(spec);
    let (mut all, mut on_host) = (0, 0);
    for key in ["initContainers", "containers", "ephemeralContainers"] {
        let list = path.at(key);
        for (index, container) in items(spec, key).enumerate() {
            let own = of(container);
            all += 1;
            on_host += usize::from(own.or(whole) == Some(true));
            if let (Some(whole), Some(own)) = (whole, own)
                && whole != own
            {
                let at = list.index(index);
                let at = at.at("securityContext");
                let at = at.at("windowsOptions");
                let why = format!("pod hostProcess value must be identical if both are specified, was {whole}");
                errors.invalid(at.at("hostProcess"), own, why);
            }
        }
    }
    if on_host == 0 {
        return;
    }
    if on_host != all {
        let why = "If pod contains any hostProcess containers then all containers must be HostProcess containers";
        errors.invalid(path, "", why);
    }
    if spec["hostNetwork"] != true {
        let why = "hostNetwork must be true if pod contains any hostProcess containers";
        errors.invalid(path.at("hostNetwork"), false, why);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn users() {
        for (name, expect) in [
            ("ContainerAdministrator", None),
            ("NT AUTHORITY\\NETWORK SERVICE", None),
            ("shop.example.com\\worker", None),
            ("", Some(" cannot be an empty string")),
            ("a\u{1}", Some(" cannot contain control characters")),
            ("a\\b\\c", Some(" cannot contain more than one backslash")),
            ("a_much_too_long_domain\\b", Some("'s Domain doesn't match the NetBios nor the DNS format")),
            ("a\\", Some("'s User cannot be empty")),
            ("a\\. .", Some("'s User cannot contain only periods or spaces")),
            ("a@b", Some("'s User cannot contain the following characters: \"/\\:;|=,+*?<>@[]")),
        ] {
            let mut errors = Errors::default();
            validate(&json!({"windowsOptions": {"runAsUserName": name}}), Path::Root, &mut errors);
            let expect: Vec<String> = expect
                .iter()
                .map(|why| format!("windowsOptions.runAsUserName: Invalid value: {name:?}: runAsUserName{why}"))
                .collect();
            assert_eq!(errors.0.iter().map(ToString::to_string).collect::<Vec<_>>(), expect);
        }
    }

    #[test]
    fn processes_of_the_machine() {
        let options = |on_host: Value| json!({"windowsOptions": {"hostProcess": on_host}});
        let check = |whole: Value, each: [Value; 2], network: bool, expect: &[&str]| {
            let containers: Vec<Value> = each.into_iter().map(|own| json!({"securityContext": options(own)})).collect();
            let spec = json!({"securityContext": options(whole), "hostNetwork": network, "containers": containers});
            let mut errors = Errors::default();
            host_process(&spec, Path::Root.at("spec"), &mut errors);
            assert_eq!(errors.0.iter().map(ToString::to_string).collect::<Vec<_>>(), expect);
        };
        let (yes, no, none) = (json!(true), json!(false), Value::Null);
        check(none.clone(), [none.clone(), none.clone()], false, &[]);
        check(yes.clone(), [none.clone(), yes.clone()], true, &[]);
        check(
            yes.clone(),
            [none.clone(), none.clone()],
            false,
            &[
                "spec.hostNetwork: Invalid value: false: hostNetwork must be true if pod contains any hostProcess containers",
            ],
        );
        check(
            none.clone(),
            [yes.clone(), none.clone()],
            true,
            &[
                "spec: Invalid value: \"\": If pod contains any hostProcess containers then all containers must be HostProcess containers",
            ],
        );
        check(
            no,
            [yes.clone(), yes],
            true,
            &[
                "spec.containers[0].securityContext.windowsOptions.hostProcess: Invalid value: true: pod hostProcess value must be identical if both are specified, was false",
                "spec.containers[1].securityContext.windowsOptions.hostProcess: Invalid value: true: pod hostProcess value must be identical if both are specified, was false",
            ],
        );
    }
}
