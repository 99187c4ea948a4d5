//! What a claim asks for: `devices` of a ResourceClaim and of a template.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::{
    super::{default, items, items_mut},
    parts::{MAX_CONFIGS, MAX_REQUESTS, configuration, each, fully_qualified, text, unique},
    selector::{expression, selectors},
    taint::{toleration_defaults, tolerations},
};
use crate::{
    cel::Type,
    field::{Errors, Path},
    names,
};

const MAX_CONSTRAINTS: usize = 32;
const MAX_ALTERNATIVES: usize = 8;
const MAX_DERIVED: usize = 32;

/// The names of requests and of their alternatives, as constraints and results refer to them.
pub(super) struct Requests<'v>(HashMap<&'v str, HashSet<&'v str>>);

impl<'v> Requests<'v> {
    /// Those of `devices`.
    pub(super) fn of(devices: &'v Value) -> Requests<'v> {
        let below = |request: &'v Value| items(request, "firstAvailable").map(|sub| text(sub, "name")).collect();
        Requests(items(devices, "requests").map(|request| (text(request, "name"), below(request))).collect())
    }

    /// Validates a reference: `request`, or `request/alternative`.
    pub(super) fn refer(&self, name: &str, path: Path<'_>, errors: &mut Errors) {
        let parts: Vec<&str> = name.split('/').collect();
        let known = match parts[..] {
            [request] => self.0.contains_key(request),
            [request, sub] => self.0.get(request).is_some_and(|below| below.contains(sub)),
            _ => false,
        };
        if parts.len() <= 2 {
            parts.iter().for_each(|part| errors.expect(path, part, names::dns_label));
        }
        if !known {
            let why =
                "must be the name of a request in the claim or the name of a request and a subrequest separated by '/'";
            errors.invalid(path, name, why);
        }
    }

    /// Validates a list of references.
    pub(super) fn refer_all(&self, object: &Value, path: Path<'_>, errors: &mut Errors) {
        each(object, "requests", MAX_REQUESTS, path, errors, |name, path, errors| {
            self.refer(name.as_str().unwrap_or_default(), path, errors);
        });
        unique(object, "requests", MAX_REQUESTS, path, errors, |name| (name.as_str(), name.clone()));
    }
}

/// Fills in what requests leave out.
pub(super) fn defaults(spec: &mut Value) {
    let Some(devices) = spec.get_mut("devices") else { return };
    for request in items_mut(devices, "requests") {
        if let Some(exactly) = request.get_mut("exactly").filter(|exactly| exactly.is_object()) {
            amount_defaults(exactly);
        }
        items_mut(request, "firstAvailable").for_each(amount_defaults);
    }
}

fn amount_defaults(request: &mut Value) {
    if text(request, "allocationMode").is_empty() {
        request["allocationMode"] = "ExactCount".into();
    }
    if request["allocationMode"] == "ExactCount" && request["count"] == 0 {
        request["count"] = 1.into();
    }
    if request["allocationMode"] == "ExactCount" {
        default(request, "count", 1);
    }
    toleration_defaults(request);
}

/// Validates `devices`.
pub(super) fn validate(devices: &Value, path: Path<'_>, errors: &mut Errors) {
    let known = Requests::of(devices);
    each(devices, "requests", MAX_REQUESTS, path, errors, |one, path, errors| request(devices, one, path, errors));
    unique(devices, "requests", MAX_REQUESTS, path, errors, |one| (text(one, "name"), one.clone()));
    each(devices, "constraints", MAX_CONSTRAINTS, path, errors, |constraint, path, errors| {
        known.refer_all(constraint, path, errors);
        match attribute(constraint) {
            Some((key, name)) => fully_qualified(name, path.at(key), errors),
            None => {
                let why = r#"exactly one of "matchAttribute" or "distinctAttribute" is required, but multiple fields are set"#;
                errors.required(path, why);
            }
        }
    });
    each(devices, "config", MAX_CONFIGS, path, errors, |config, path, errors| {
        known.refer_all(config, path, errors);
        configuration(config, false, path, errors);
    });
}

/// The attribute that a constraint is about.
fn attribute(constraint: &Value) -> Option<(&'static str, &str)> {
    ["matchAttribute", "distinctAttribute"].into_iter().find_map(|key| Some((key, constraint[key].as_str()?)))
}

fn request(devices: &Value, request: &Value, path: Path<'_>, errors: &mut Errors) {
    let name = text(request, "name");
    errors.expect(path.at("name"), name, names::dns_label);
    match (request["exactly"].is_object(), items(request, "firstAvailable").next().is_some()) {
        (false, false) => errors.required(path, "exactly one of `exactly` or `firstAvailable` is required"),
        (true, true) => {
            let why = "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set";
            errors.invalid(path, Value::Null, why);
        }
        (true, false) => amount(devices, &request["exactly"], name, path.at("exactly"), errors),
        (false, true) => {
            const KEY: &str = "firstAvailable";
            each(request, KEY, MAX_ALTERNATIVES, path, errors, |sub, path, errors| {
                errors.expect(path.at("name"), text(sub, "name"), names::dns_label);
                amount(devices, sub, &format!("{name}/{}", text(sub, "name")), path, errors);
            });
            unique(request, KEY, MAX_ALTERNATIVES, path, errors, |sub| (text(sub, "name"), sub.clone()));
        }
    }
}

/// Validates which devices are wanted, and how many of them.
fn amount(devices: &Value, request: &Value, name: &str, path: Path<'_>, errors: &mut Errors) {
    errors.expect_some(path.at("deviceClassName"), &request["deviceClassName"], names::dns_subdomain);
    selectors(request, false, path, errors);
    derived(devices, request, name, path, errors);
    let count = request["count"].as_i64().unwrap_or_default();
    match text(request, "allocationMode") {
        "All" if count != 0 => {
            errors.invalid(path.at("count"), count, "must not be specified when allocationMode is 'All'");
        }
        "All" => {}
        "ExactCount" if count <= 0 => errors.invalid(path.at("count"), count, "must be greater than zero"),
        "ExactCount" => {}
        other => errors.not_supported(path.at("allocationMode"), other, &["All", "ExactCount"]),
    }
    tolerations(request, path, errors);
}

/// Validates attributes that are worked out of others, so that constraints can compare devices of several drivers.
fn derived(devices: &Value, request: &Value, name: &str, path: Path<'_>, errors: &mut Errors) {
    const KEY: &str = "derivedAttributes";
    let scalar = |ty: &Type| matches!(ty, Type::Bool | Type::Int | Type::String | Type::Named("Semver") | Type::Dyn);
    let may_be = |ty: &Type| scalar(ty) || matches!(ty, Type::List(of) if scalar(of));
    each(request, KEY, MAX_DERIVED, path, errors, |one, path, errors| {
        let (attribute, text) = (text(one, "name"), text(one, "expression"));
        if attribute.is_empty() {
            errors.required(path.at("name"), "");
        } else {
            fully_qualified(attribute, path.at("name"), errors);
            if !is_compared(devices, attribute, name) {
                let why = "must be referenced by at least one matchAttribute or distinctAttribute constraint targeting this request";
                errors.invalid(path.at("name"), attribute, why);
            }
        }
        match text {
            "" => errors.required(path.at("expression"), ""),
            text => expression(text, may_be, "a scalar or a list of scalars", path.at("expression"), errors),
        }
    });
    unique(request, KEY, MAX_DERIVED, path, errors, |one| (text(one, "name"), one["name"].clone()));
}

/// Whether a constraint looks at this attribute of this request.
fn is_compared(devices: &Value, name: &str, request: &str) -> bool {
    let parent = request.split('/').next().unwrap_or_default();
    items(devices, "constraints").any(|constraint| {
        let mut of = items(constraint, "requests").peekable();
        attribute(constraint).is_some_and(|(_, attribute)| attribute == name)
            && (of.peek().is_none() || of.any(|of| of == request || of == parent))
    })
}
