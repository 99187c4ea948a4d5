//! What several objects of the group have in common: limited lists, names, conditions of a binding, configuration.

use std::{collections::HashSet, hash::Hash};

use serde_json::Value;

use super::super::{csi, items};
use crate::{
    field::{Errors, Path},
    names,
};

/// Requests of a claim, its results, and names of requests wherever they are listed.
pub(super) const MAX_REQUESTS: usize = 32;
/// Configurations of a class or a claim.
pub(super) const MAX_CONFIGS: usize = 32;
/// A domain and an identifier with a slash between them.
pub(super) const MAX_DOMAIN: usize = 63;
const MAX_IDENTIFIER: usize = 32;
const MAX_POOL: usize = 253;
const MAX_PARAMETERS: usize = 10 * 1024;
const MAX_CONDITIONS: usize = 4;

/// A text that may be missing.
pub(super) fn text<'v>(object: &'v Value, key: &str) -> &'v str {
    object[key].as_str().unwrap_or_default()
}

/// Checks each item of a list. If there are more than it may have, that is all that is said of it.
pub(super) fn each<'v>(
    object: &'v Value,
    key: &str,
    most: usize,
    path: Path<'_>,
    errors: &mut Errors,
    mut check: impl FnMut(&'v Value, Path<'_>, &mut Errors),
) {
    let list = path.at(key);
    let count = items(object, key).count();
    if count > most {
        return errors.too_many(list, count as u64, most as u64);
    }
    for (index, item) in items(object, key).enumerate() {
        check(item, list.index(index), errors);
    }
}

/// Refuses items that are there already by their identity. A list that is too long is not looked through.
pub(super) fn unique<'v, K: Hash + Eq>(
    object: &'v Value,
    key: &str,
    most: usize,
    path: Path<'_>,
    errors: &mut Errors,
    identity: impl Fn(&'v Value) -> (K, Value),
) {
    let list = path.at(key);
    if items(object, key).count() > most {
        return;
    }
    let mut seen = HashSet::new();
    for (index, item) in items(object, key).enumerate() {
        let (identity, shown) = identity(item);
        if !seen.insert(identity) {
            errors.duplicate(list.index(index), shown);
        }
    }
}

/// Says which of several fields that exclude each other are set, as upstream shows them.
pub(super) fn listed(set: &[&str]) -> String {
    format!("{{{}}}", set.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "))
}

/// Validates the name of a pool: subdomains with slashes between them.
pub(super) fn pool(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        return errors.required(path, "");
    }
    if name.len() > MAX_POOL {
        errors.too_long(path, MAX_POOL);
    }
    name.split('/').for_each(|part| errors.expect(path, part, names::dns_subdomain));
}

/// The same where a rule beside the type says so.
pub(super) fn declared_pool(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        return errors.required(path, "");
    }
    if name.len() > MAX_POOL {
        errors.too_long(path, MAX_POOL);
    }
    for (index, part) in name.split('/').enumerate() {
        match names::dns_subdomain(part) {
            _ if part.is_empty() => errors.invalid(path, name, format!("segment {index}: must not be empty")),
            Err(detail) => errors.invalid(path, part, format!("segment {index}: {detail}")),
            Ok(()) => {}
        }
    }
}

/// Validates the name of a driver where a rule beside the type says so.
pub(super) fn declared_driver(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        return errors.required(path, "");
    }
    if name.chars().count() > MAX_DOMAIN {
        errors.too_many_characters(path, MAX_DOMAIN);
    }
    errors.expect(path, name, names::dns_subdomain_caseless);
}

fn identifier(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.len() > MAX_IDENTIFIER {
        errors.too_long(path, MAX_IDENTIFIER);
    }
    errors.expect(path, name, names::c_identifier);
}

/// Validates the name of an attribute or a capacity: an identifier, perhaps with a domain and a slash in front.
pub(super) fn qualified(name: &str, path: Path<'_>, errors: &mut Errors) {
    match name.split('/').collect::<Vec<_>>()[..] {
        [id] => identifier(id, path, errors),
        [domain, id] => {
            match domain {
                "" => errors.invalid(path, "", "the domain must not be empty"),
                domain => csi::driver_name(domain, path, errors),
            }
            match id {
                "" => errors.invalid(path, "", "the name must not be empty"),
                id => identifier(id, path, errors),
            }
        }
        _ => errors.invalid(path, name, "must not contain more than one slash"),
    }
}

/// Validates the name of an attribute that must have a domain.
pub(super) fn fully_qualified(name: &str, path: Path<'_>, errors: &mut Errors) {
    match name.split('/').collect::<Vec<_>>()[..] {
        [id] => {
            identifier(id, path, errors);
            errors.invalid(path, name, "a fully qualified name must be a domain and a name separated by a slash");
        }
        [domain, id] => {
            if domain.is_empty() {
                errors.invalid(path, "", "prefix must not be empty");
            } else {
                if domain.len() > MAX_DOMAIN {
                    errors.too_long(path, MAX_DOMAIN);
                }
                errors.expect(path, domain, |d| names::dns_subdomain(d).map_err(|detail| format!("prefix: {detail}")));
            }
            match id {
                "" => errors.invalid(path, "", "name must not be empty"),
                id => identifier(id, path, errors),
            }
        }
        _ => errors.invalid(path, name, "must not contain more than one slash"),
    }
}

/// Validates what a device waits for, and what makes it fail, before a pod is bound (KEP-5007).
pub(super) fn binding_conditions(object: &Value, path: Path<'_>, errors: &mut Errors) {
    const TRUE: &str = "bindingConditions";
    const FAILED: &str = "bindingFailureConditions";
    for key in [TRUE, FAILED] {
        each(object, key, MAX_CONDITIONS, path, errors, |condition, path, errors| {
            errors.expect(path, condition.as_str().unwrap_or_default(), names::qualified_name);
        });
        unique(object, key, usize::MAX, path, errors, |condition| (condition.as_str(), condition.clone()));
    }
    let list = path.at(FAILED);
    for (index, condition) in items(object, FAILED).enumerate() {
        if items(object, TRUE).any(|other| other == condition) {
            let why = "bindingFailureConditions must not overlap with bindingConditions";
            errors.invalid(list.index(index), condition.clone(), why);
        }
    }
    for (missing, other) in [(TRUE, FAILED), (FAILED, TRUE)] {
        if items(object, missing).next().is_none() && items(object, other).next().is_some() {
            let why = format!("{missing} are required to use {other}");
            errors.invalid(path.at(missing), object[missing].clone(), why);
        }
    }
}

/// Validates which calls of a driver on the node are left out.
pub(super) fn skipped_operations(object: &Value, path: Path<'_>, errors: &mut Errors) {
    const KEY: &str = "skipNodeOperations";
    const KNOWN: [&str; 3] = ["*", "NodePrepareResources", "NodeUnprepareResources"];
    let skips = |operation: &str| items(object, KEY).any(|item| item == operation);
    if skips(KNOWN[1]) && !skips(KNOWN[2]) && !skips(KNOWN[0]) {
        let why = "NodePrepareResources cannot be skipped unless NodeUnprepareResources is also skipped";
        errors.invalid(path.at(KEY), object[KEY].clone(), why);
    }
    each(object, KEY, usize::MAX, path, errors, |operation, path, errors| {
        if !KNOWN.iter().any(|known| operation == known) {
            errors.not_supported(path, operation.clone(), &KNOWN);
        }
    });
    unique(object, KEY, usize::MAX, path, errors, |operation| (operation.as_str(), operation.clone()));
}

/// Validates the configuration of a driver. One that is `stored` may be longer than new ones.
pub(super) fn configuration(config: &Value, stored: bool, path: Path<'_>, errors: &mut Errors) {
    let (opaque, at) = (&config["opaque"], path.at("opaque"));
    if !opaque.is_object() {
        return errors.required(at, "");
    }
    declared_driver(text(opaque, "driver"), at.at("driver"), errors);
    let most = if stored { usize::MAX } else { MAX_PARAMETERS };
    raw_object(&opaque["parameters"], most, at.at("parameters"), errors);
}

/// Validates an object that only a driver understands.
pub(super) fn raw_object(value: &Value, most: usize, path: Path<'_>, errors: &mut Errors) {
    match value {
        Value::Null => errors.required(path, ""),
        value if value.to_string().len() > most => errors.too_long(path, most),
        Value::Object(_) => {}
        _ => errors.invalid(path, "<value omitted>", "must be a valid JSON object"),
    }
}
