//! Devices that a pod uses: its claims, and which container sees which of them
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/dynamic-resource-allocation/>).

use std::collections::HashSet;

use serde_json::Value;

use super::items;
use crate::{
    field::{Errors, Path},
    names,
};

const NAME: &str = "resourceClaimName";
const TEMPLATE: &str = "resourceClaimTemplateName";

/// Validates `resourceClaims`.
pub(super) fn validate(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    let list = path.at("resourceClaims");
    for (index, claim) in items(spec, "resourceClaims").enumerate() {
        let at = list.index(index);
        match claim["name"].as_str().unwrap_or_default() {
            "" => errors.required(at.at("name"), ""),
            name if !seen.insert(name) => errors.duplicate(at.at("name"), name),
            name => errors.expect(at.at("name"), name, names::dns_label),
        }
        let why = match (claim[NAME].is_string(), claim[TEMPLATE].is_string()) {
            (true, true) => format!("at most one of `{NAME}` or `{TEMPLATE}` may be specified"),
            (false, false) => format!("must specify one of: `{NAME}`, `{TEMPLATE}`"),
            _ => String::new(),
        };
        if !why.is_empty() {
            errors.invalid(at, claim.clone(), why);
        }
        for key in [NAME, TEMPLATE] {
            if let Some(name) = claim[key].as_str() {
                errors.expect(at.at(key), name, names::dns_subdomain);
            }
        }
    }
}

/// Validates the names of claims that are made for a pod: its own, and that in its spec.
pub(super) fn made(pod: &Value, errors: &mut Errors) {
    let path = Path::Root.at("spec");
    let list = path.at("resourceClaims");
    for (index, claim) in items(&pod["spec"], "resourceClaims").enumerate() {
        let (pod, own) = (pod["metadata"]["name"].as_str(), claim["name"].as_str());
        let (Some(pod), Some(own), true) = (pod, own, claim[TEMPLATE].is_string()) else { continue };
        let name = format!("{pod}-{own}");
        if names::dns_label(own).is_ok()
            && let Err(detail) = names::dns_subdomain(&name)
        {
            errors.invalid(list.index(index).at("name"), name, format!("final ResourceClaim name: {detail}"));
        }
    }
}

/// Validates `claims` of a container's resources, which are some of the pod's.
pub(super) fn of_container(resources: &Value, spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut known: Vec<&str> = items(spec, "resourceClaims").filter_map(|claim| claim["name"].as_str()).collect();
    known.retain(|name| !name.is_empty());
    known.sort_unstable();
    let mut seen = HashSet::new();
    let list = path.at("claims");
    for (index, claim) in items(resources, "claims").enumerate() {
        let at = list.index(index);
        let (name, request) =
            (claim["name"].as_str().unwrap_or_default(), claim["request"].as_str().unwrap_or_default());
        if name.is_empty() {
            errors.required(at, "");
            continue;
        }
        if !seen.insert((name, request)) {
            let shown = if request.is_empty() { name.to_owned() } else { format!("{name}/{request}") };
            errors.duplicate(at, shown);
        }
        if !known.contains(&name) {
            let rest = if known.is_empty() { " which is empty".to_owned() } else { format!(": {}", known.join(", ")) };
            errors.not_found_among(at, name, format!("must be one of the names in pod.spec.resourceClaims{rest}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(spec: Value, expect: &[&str]) {
        let mut errors = Errors::default();
        let path = Path::Root.at("spec");
        validate(&spec, path, &mut errors);
        of_container(&spec["resources"], &spec, path.at("resources"), &mut errors);
        assert_eq!(errors.0.iter().map(ToString::to_string).collect::<Vec<_>>(), expect, "{spec:#}");
    }

    #[test]
    fn claims_of_pods() {
        let subdomain = names::dns_subdomain("A").unwrap_err();
        check(json!({"resourceClaims": [{"name": "a", NAME: "x"}, {"name": "b", TEMPLATE: "y"}]}), &[]);
        check(
            json!({"resourceClaims": [{"name": "a", NAME: "A"}, {"name": "a", NAME: "x"}, {"name": "", NAME: "x"}]}),
            &[
                &format!("spec.resourceClaims[0].resourceClaimName: Invalid value: \"A\": {subdomain}"),
                "spec.resourceClaims[1].name: Duplicate value: \"a\"",
                "spec.resourceClaims[2].name: Required value",
            ],
        );
        check(
            json!({"resourceClaims": [{"name": "a"}]}),
            &[
                "spec.resourceClaims[0]: Invalid value: {\"name\":\"a\"}: must specify one of: `resourceClaimName`, `resourceClaimTemplateName`",
            ],
        );
        check(
            json!({"resourceClaims": [{"name": "a", NAME: "x", TEMPLATE: "y"}]}),
            &[
                "spec.resourceClaims[0]: Invalid value: {\"name\":\"a\",\"resourceClaimName\":\"x\",\"resourceClaimTemplateName\":\"y\"}: at most one of `resourceClaimName` or `resourceClaimTemplateName` may be specified",
            ],
        );
    }

    #[test]
    fn claims_of_containers() {
        let of = |claims: Value| json!({"resourceClaims": [{"name": "b", NAME: "x"}, {"name": "a", NAME: "y"}], "resources": {"claims": claims}});
        check(of(json!([{"name": "a"}, {"name": "b", "request": "r"}, {"name": "b", "request": "s"}])), &[]);
        check(
            of(json!([{"name": "c"}, {"name": ""}, {"name": "a"}, {"name": "a"}])),
            &[
                "spec.resources.claims[0]: Not found: \"c\": must be one of the names in pod.spec.resourceClaims: a, b",
                "spec.resources.claims[1]: Required value",
                "spec.resources.claims[3]: Duplicate value: \"a\"",
            ],
        );
        check(
            json!({"resources": {"claims": [{"name": "a"}]}}),
            &[
                "spec.resources.claims[0]: Not found: \"a\": must be one of the names in pod.spec.resourceClaims which is empty",
            ],
        );
    }

    #[test]
    fn names_of_claims_that_are_made() {
        let pod = |length: usize| json!({"metadata": {"name": "p".repeat(length)}, "spec": {"resourceClaims": [{"name": "gpu", TEMPLATE: "t"}]}});
        let found = |pod: &Value| {
            let mut errors = Errors::default();
            made(pod, &mut errors);
            errors.0.iter().map(ToString::to_string).collect::<String>()
        };
        assert_eq!(found(&pod(249)), "");
        assert!(found(&pod(250)).ends_with("final ResourceClaim name: must be no more than 253 bytes"));
    }
}
