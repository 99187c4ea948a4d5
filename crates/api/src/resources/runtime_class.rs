//! RuntimeClass (<https://kubernetes.io/docs/concepts/containers/runtime-class/>).

use k8s_openapi::api::node::v1::RuntimeClass;

use super::{container, meta, pod_spec};
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Validation, col, row as base},
};

pub(super) fn row() -> Row {
    Row {
        columns: const { &[col("Handler", "string"), col("Age", "date")] },
        cells: |o, now| vec![cell::plain(&o["handler"]), cell::age(o, now)],
        validate,
        ..base::<RuntimeClass>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let at = Path::Root.at("handler");
    if let Some(old) = v.old {
        errors.immutable(at, &old["handler"], &v.new["handler"]);
        return;
    }
    errors.expect(at, v.new["handler"].as_str().unwrap_or_default(), names::dns_label);
    container::amounts(&v.new["overhead"], "podFixed", Path::Root.at("overhead"), errors);
    let scheduling = &v.new["scheduling"];
    let path = Path::Root.at("scheduling");
    meta::label_map(&scheduling["nodeSelector"], path.at("nodeSelector"), errors);
    pod_spec::tolerations(scheduling, path, errors);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::testing::{check, check_update},
        *,
    };

    #[test]
    fn what_a_class_must_be() {
        check(
            &row(),
            json!({"handler": "kata", "overhead": {"podFixed": {"memory": "64Mi"}},
                "scheduling": {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "k", "operator": "Exists"}]}}),
            &[],
        );
        let why = names::dns_label("").unwrap_err();
        check(&row(), json!({}), &[&*format!("handler: Invalid value: \"\": {why}")]);
        check(
            &row(),
            json!({"handler": "h", "overhead": {"podFixed": {"cpu": "-1"}}, "scheduling": {"tolerations": [{"operator": "Equal"}]}}),
            &[
                "overhead.podFixed[cpu]: Invalid value: \"-1\": must be greater than or equal to 0",
                "scheduling.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            ],
        );
    }

    #[test]
    fn the_handler_stays() {
        let why = "handler: Invalid value: \"b\": field is immutable";
        check_update(&row(), json!({"handler": "a"}), json!({"handler": "b"}), &[why]);
        // What was wrong before may stay.
        let wrong = json!({"handler": "A"});
        check_update(&row(), wrong.clone(), wrong, &[]);
    }
}
