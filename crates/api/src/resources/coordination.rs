//! Lease.

use k8s_openapi::api::coordination::v1::Lease;

use crate::{
    cell,
    field::Path,
    row::{Row, col, row as base},
};

pub(super) fn row() -> Row {
    Row {
        columns: const { &[col("Holder", "string"), col("Age", "date")] },
        cells: |o, now| vec![cell::plain(&o["spec"]["holderIdentity"]), cell::age(o, now)],
        validate: |v, errors| {
            let path = Path::Root.at("spec");
            for (key, least) in [("leaseDurationSeconds", 1), ("leaseTransitions", 0)] {
                if let Some(n) = v.new["spec"][key].as_i64().filter(|n| *n < least) {
                    let detail =
                        if least == 1 { "must be greater than 0" } else { "must be greater than or equal to 0" };
                    errors.invalid(path.at(key), n, detail);
                }
            }
        },
        ..base::<Lease>()
    }
}
