//! Lease.

use k8s_openapi::api::coordination::v1::Lease;

use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Validation, col, row as base},
};

/// The way of choosing a leader that is Kubernetes' own.
const STRATEGY: &str = "OldestEmulationVersion";

pub(super) fn row() -> Row {
    Row {
        columns: const { &[col("Holder", "string"), col("Age", "date")] },
        cells: |o, now| vec![cell::plain(&o["spec"]["holderIdentity"]), cell::age(o, now)],
        validate,
        ..base::<Lease>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let spec = &v.new["spec"];
    let path = Path::Root.at("spec");
    for (key, least) in [("leaseDurationSeconds", 1), ("leaseTransitions", 0)] {
        if let Some(n) = spec[key].as_i64().filter(|n| *n < least) {
            let detail = if least == 1 { "must be greater than 0" } else { "must be greater than or equal to 0" };
            errors.invalid(path.at(key), n, detail);
        }
    }
    let strategy = spec["strategy"].as_str();
    match strategy {
        // Upstream's path names the field twice.
        Some(strategy) if strategy.contains('/') => {
            errors.expect(path.at("strategy").at("strategy"), strategy, names::qualified_name);
        }
        Some(strategy) if strategy != STRATEGY => {
            errors.not_supported(path.at("strategy").at("strategy"), strategy, &[STRATEGY]);
        }
        _ => {}
    }
    let preferred = spec["preferredHolder"].as_str().is_some_and(|holder| !holder.is_empty());
    if preferred && strategy.unwrap_or_default().is_empty() {
        errors.forbidden(path.at("preferredHolder"), "may only be specified if `strategy` is defined");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::testing::check, *};

    #[test]
    fn what_a_lease_must_be() {
        for (spec, expect) in [
            (json!({"leaseDurationSeconds": 15, "leaseTransitions": 0}), &[][..]),
            (
                json!({"leaseDurationSeconds": 0}),
                &["spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0"],
            ),
            (
                json!({"leaseTransitions": -1}),
                &["spec.leaseTransitions: Invalid value: -1: must be greater than or equal to 0"],
            ),
            (json!({"strategy": "a.b/c", "preferredHolder": "h"}), &[]),
            (
                json!({"strategy": "Newest"}),
                &[
                    "spec.strategy.strategy: Unsupported value: \"Newest\": supported values: \"OldestEmulationVersion\"",
                ],
            ),
            (
                json!({"preferredHolder": "h"}),
                &["spec.preferredHolder: Forbidden: may only be specified if `strategy` is defined"],
            ),
        ] {
            check(&row(), json!({"spec": spec}), expect);
        }
    }
}
