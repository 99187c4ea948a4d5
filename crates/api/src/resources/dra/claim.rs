//! ResourceClaim and ResourceClaimTemplate. The status is in `status.rs`, what is asked for in `request.rs`.

use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimTemplate};
use serde_json::Value;

use super::{
    super::{meta, with_status},
    request, status,
};
use crate::{
    field::{Errors, Path, same},
    row::{Row, Validation, row as base},
};

pub(super) fn claim() -> Row {
    Row {
        defaults: |o| {
            if let Some(spec) = o.get_mut("spec") {
                request::defaults(spec);
            }
            status::defaults(o);
        },
        validate,
        prepare_status: status::prepare,
        ..with_status(base::<ResourceClaim>())
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let path = Path::Root.at("spec");
    match v.old {
        _ if v.subresource == "status" => status::validate(v, errors),
        None => request::validate(&v.new["spec"]["devices"], path.at("devices"), errors),
        Some(old) if !same(&old["spec"], &v.new["spec"]) => errors.invalid(path, Value::Null, "field is immutable"),
        Some(_) => {}
    }
}

pub(super) fn template() -> Row {
    Row {
        defaults: |o| {
            if let Some(spec) = o.pointer_mut("/spec/spec") {
                request::defaults(spec);
            }
        },
        validate: |v, errors| {
            let (spec, path) = (&v.new["spec"], Path::Root.at("spec"));
            if let Some(old) = v.old {
                return errors.immutable(path, &old["spec"], spec);
            }
            meta::labels(&spec["metadata"], path.at("metadata"), errors);
            meta::annotations(&spec["metadata"], path.at("metadata"), errors);
            let path = path.at("spec");
            request::validate(&spec["spec"]["devices"], path.at("devices"), errors);
        },
        ..base::<ResourceClaimTemplate>()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::super::testing::{check, check_update, with},
        *,
    };
    use crate::names;

    fn gpu() -> Value {
        json!({"spec": {"devices": {
            "requests": [
                {"name": "gpu", "exactly": {"deviceClassName": "gpu.example.com", "selectors": [
                    {"cel": {"expression": "device.attributes['gpu.example.com'].memory.compareTo(semver('1.0.0')) > 0"}}]}},
                {"name": "nic", "firstAvailable": [
                    {"name": "fast", "deviceClassName": "nic"},
                    {"name": "slow", "deviceClassName": "nic", "allocationMode": "All",
                        "tolerations": [{"key": "old", "operator": "Exists"}]}]}],
            "constraints": [{"requests": ["gpu", "nic/fast"], "matchAttribute": "example.com/numa"}],
            "config": [{"requests": ["nic"], "opaque": {"driver": "nic.example.com", "parameters": {"mtu": 9000}}}]}}})
    }

    #[test]
    fn what_is_asked_for() {
        check(&claim(), gpu(), &[]);
        let no_label = names::dns_label("a b").unwrap_err();
        let unknown =
            "must be the name of a request in the claim or the name of a request and a subrequest separated by '/'";
        let name_in_c = names::c_identifier("1").unwrap_err();
        let caseless = names::dns_subdomain_caseless("a_b").unwrap_err();
        let requests: Vec<Value> =
            (0..33).map(|n| json!({"name": format!("r{n}"), "exactly": {"deviceClassName": "c"}})).collect();
        for (pointer, value, expect) in [
            ("/requests/1/firstAvailable/1/name", json!("a b"), format!("requests[1].firstAvailable[1].name: Invalid value: \"a b\": {no_label}")),
            ("/requests/0/exactly", Value::Null, "requests[0]: Required value: exactly one of `exactly` or `firstAvailable` is required".into()),
            (
                "/requests/1/exactly",
                json!({"deviceClassName": "c"}),
                "requests[1]: Invalid value: null: exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set".into(),
            ),
            ("/requests/0/exactly/deviceClassName", json!(""), "requests[0].exactly.deviceClassName: Required value".into()),
            ("/requests/0/exactly/count", json!(-1), "requests[0].exactly.count: Invalid value: -1: must be greater than zero".into()),
            (
                "/requests/1/firstAvailable/1/count",
                json!(1),
                "requests[1].firstAvailable[1].count: Invalid value: 1: must not be specified when allocationMode is 'All'".into(),
            ),
            (
                "/requests/0/exactly/allocationMode",
                json!("Some"),
                "requests[0].exactly.allocationMode: Unsupported value: \"Some\": supported values: \"All\", \"ExactCount\"".into(),
            ),
            (
                "/requests/1/firstAvailable/1/tolerations/0/value",
                json!("x"),
                "requests[1].firstAvailable[1].tolerations[0].value: Invalid value: \"x\": must be empty for operator `Exists`".into(),
            ),
            ("/requests/0/exactly/selectors/0/cel", Value::Null, "requests[0].exactly.selectors[0].cel: Required value".into()),
            ("/constraints/0/requests/0", json!("nic/slower"), format!("constraints[0].requests[0]: Invalid value: \"nic/slower\": {unknown}")),
            ("/constraints/0/requests/0", json!("a/b/c"), format!("constraints[0].requests[0]: Invalid value: \"a/b/c\": {unknown}")),
            ("/constraints/0/requests/1", json!("gpu"), "constraints[0].requests[1]: Duplicate value: \"gpu\"".into()),
            (
                "/constraints/0/matchAttribute",
                Value::Null,
                "constraints[0]: Required value: exactly one of \"matchAttribute\" or \"distinctAttribute\" is required, but multiple fields are set".into(),
            ),
            (
                "/constraints/0/matchAttribute",
                json!("numa"),
                "constraints[0].matchAttribute: Invalid value: \"numa\": a fully qualified name must be a domain and a name separated by a slash".into(),
            ),
            ("/constraints/0/matchAttribute", json!("a.b/1"), format!("constraints[0].matchAttribute: Invalid value: \"1\": {name_in_c}")),
            ("/config/0/opaque", Value::Null, "config[0].opaque: Required value".into()),
            ("/config/0/opaque/driver", json!("a_b"), format!("config[0].opaque.driver: Invalid value: \"a_b\": {caseless}")),
            ("/config/0/opaque/parameters", json!([]), "config[0].opaque.parameters: Invalid value: \"<value omitted>\": must be a valid JSON object".into()),
            (
                "/config/0/opaque/parameters",
                json!({"a": "x".repeat(10_240)}),
                "config[0].opaque.parameters: Too long: may not be more than 10240 bytes".into(),
            ),
        ] {
            let expect = format!("spec.devices.{expect}");
            check(&claim(), with(&gpu(), &format!("/spec/devices{pointer}"), value), &[&expect]);
        }
        let many = with(&json!({"spec": {"devices": {}}}), "/spec/devices/requests", requests.into());
        check(&claim(), many, &["spec.devices.requests: Too many: 33: must have at most 32 items"]);
    }

    #[test]
    fn expressions_are_compiled() {
        for (expression, expect) in [
            ("device.driver == 'a.example.com' && device.allowMultipleAllocations", None),
            ("device.capacity['a.example.com'].memory.isGreaterThan(quantity('10Gi'))", None),
            ("device.attributes['a.example.com'].fast", None),
            ("cel.bind(a, device.attributes['a.example.com'], a.models.includes('x'))", None),
            ("device.driver", Some("must evaluate to bool or the unknown type, not string")),
            (
                "device.nope",
                Some("compilation failed: ERROR: <input>:1:7: undefined field 'nope'\n | device.nope\n | ......^"),
            ),
        ] {
            let at = "/spec/devices/requests/0/exactly/selectors/0/cel/expression";
            let path = "spec.devices.requests[0].exactly.selectors[0].cel.expression";
            let expect: Vec<String> =
                expect.iter().map(|why| format!("{path}: Invalid value: {expression:?}: {why}")).collect();
            let expect: Vec<&str> = expect.iter().map(String::as_str).collect();
            check(&claim(), with(&gpu(), at, expression.into()), &expect);
        }
    }

    #[test]
    fn derived_attributes() {
        let of =
            |attribute: Value| with(&gpu(), "/spec/devices/requests/0/exactly/derivedAttributes", json!([attribute]));
        let path = "spec.devices.requests[0].exactly.derivedAttributes[0]";
        check(
            &claim(),
            of(json!({"name": "example.com/numa", "expression": "int(device.attributes['a.b'].numa)"})),
            &[],
        );
        let other =
            "must be referenced by at least one matchAttribute or distinctAttribute constraint targeting this request";
        for (attribute, expect) in [
            (
                json!({"name": "example.com/other", "expression": "1"}),
                format!("{path}.name: Invalid value: \"example.com/other\": {other}"),
            ),
            (json!({"name": "example.com/numa"}), format!("{path}.expression: Required value")),
            (
                json!({"name": "example.com/numa", "expression": "1.5"}),
                format!(
                    "{path}.expression: Invalid value: \"1.5\": must evaluate to a scalar or a list of scalars, not double"
                ),
            ),
        ] {
            check(&claim(), of(attribute), &[&expect]);
        }
    }

    #[test]
    fn what_was_left_out() {
        let mut claim_of = json!({"spec": {"devices": {"requests": [
            {"name": "a", "exactly": {"deviceClassName": "c", "tolerations": [{}]}},
            {"name": "b", "firstAvailable": [{"name": "c", "count": 0}, {"name": "d", "allocationMode": "All"}]}]}}});
        (claim().defaults)(&mut claim_of);
        assert_eq!(
            claim_of["spec"]["devices"]["requests"],
            json!([
            {"name": "a", "exactly": {"deviceClassName": "c", "allocationMode": "ExactCount", "count": 1,
                "tolerations": [{"operator": "Equal"}]}},
            {"name": "b", "firstAvailable": [{"name": "c", "allocationMode": "ExactCount", "count": 1},
                {"name": "d", "allocationMode": "All"}]}])
        );
    }

    #[test]
    fn specs_stay() {
        let other = with(&gpu(), "/spec/devices/requests/0/name", "other".into());
        check_update(&claim(), gpu(), gpu(), &[]);
        check_update(&claim(), gpu(), other, &["spec: Invalid value: null: field is immutable"]);
        let of = |name: &str| {
            json!({"spec": {"metadata": {"labels": {"a": "b"}}, "spec": {"devices": {
            "requests": [{"name": name, "exactly": {"deviceClassName": "c"}}]}}}})
        };
        check(&template(), of("r"), &[]);
        check(
            &template(),
            with(&of("r"), "/spec/spec/devices/requests/0/exactly/deviceClassName", json!("")),
            &["spec.spec.devices.requests[0].exactly.deviceClassName: Required value"],
        );
        check_update(&template(), of("r"), of("r"), &[]);
        let mut refused = of("s");
        (template().defaults)(&mut refused);
        let why = format!("spec: Invalid value: {}: field is immutable", refused["spec"]);
        check_update(&template(), of("r"), refused, &[&why]);
    }
}
