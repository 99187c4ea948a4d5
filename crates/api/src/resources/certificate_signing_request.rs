//! CertificateSigningRequest.
//!
//! What depends on who asks (the user in `spec`, the signers that somebody may speak for) is the server's business.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use serde_json::Value;

use super::{drop_status, items};
use crate::{
    cell,
    certificate_request::{CertificateRequest, LEGACY_UNKNOWN},
    field::{Errors, Path},
    names,
    row::{Row, Subresource, Validation, col, row as base},
};

const USAGES: &[&str] = &[
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];
/// The shortest life of a certificate that may be asked for, in seconds.
const SHORTEST: i64 = 600;
/// Conditions that are there for good once they are there.
const FINAL: [&str; 3] = ["Approved", "Denied", "Failed"];

pub(super) fn row() -> Row {
    Row {
        short_names: &["csr"],
        subresources: &[Subresource::Status, Subresource::Approval],
        prepare_create: drop_status,
        prepare_update: |new, old| new["spec"] = old["spec"].clone(),
        selectable: &["spec.signerName"],
        name: names::path_segment,
        columns: const {
            &[
                col("Age", "date"),
                col("SignerName", "string"),
                col("Requestor", "string"),
                col("RequestedDuration", "string"),
                col("Condition", "string"),
            ]
        },
        cells: |o, now| {
            let spec = &o["spec"];
            let duration = match spec["expirationSeconds"].as_i64() {
                Some(seconds) => cell::duration(seconds).into(),
                None => "<none>".into(),
            };
            vec![cell::age(o, now), cell::text(&spec["signerName"]), cell::plain(&spec["username"]), duration, state(o)]
        },
        validate,
        ..base::<CertificateSigningRequest>()
    }
}

/// `Pending`, `Approved,Issued`, … as kubectl's users know it.
fn state(object: &Value) -> Value {
    let has = |ty: &str| items(&object["status"], "conditions").any(|c| c["type"] == ty);
    let mut state = match (has("Denied"), has("Approved")) {
        (true, _) => "Denied",
        (false, true) => "Approved",
        (false, false) => "Pending",
    }
    .to_owned();
    if has("Failed") {
        state.push_str(",Failed");
    }
    if !certificate(object).is_empty() {
        state.push_str(",Issued");
    }
    state.into()
}

fn certificate(object: &Value) -> &str {
    object["status"]["certificate"].as_str().unwrap_or_default()
}

/// Upstream's rules. A request that was stored once was valid then, and its `spec` never changes.
fn validate(v: &Validation<'_>, errors: &mut Errors) {
    if v.old.is_none() {
        validate_spec(&v.new["spec"], errors);
    }
    let status = Path::Root.at("status");
    let list = status.at("conditions");
    let (mut seen, mut decided): (Vec<&str>, Option<&str>) = (Vec::new(), None);
    for (index, condition) in items(&v.new["status"], "conditions").enumerate() {
        let path = list.index(index);
        let ty = condition["type"].as_str().unwrap_or_default();
        if ty.is_empty() {
            errors.required(path.at("type"), "");
        }
        // A decision that is not true would be none.
        let known: &[&str] = if FINAL.contains(&ty) { &["True"] } else { &["False", "True", "Unknown"] };
        match condition["status"].as_str().unwrap_or_default() {
            "" => errors.required(path.at("status"), ""),
            other if !known.contains(&other) => errors.not_supported(path.at("status"), other, known),
            _ => {}
        }
        if matches!(ty, "Approved" | "Denied") {
            if decided.is_some_and(|other| other != ty) {
                errors.invalid(path.at("type"), ty, "Approved and Denied conditions are mutually exclusive");
            }
            decided = Some(ty);
        }
        if seen.contains(&ty) {
            errors.duplicate(path.at("type"), ty);
        }
        seen.push(ty);
    }
    let issued = certificate(v.new);
    if !issued.is_empty()
        && let Err(detail) = check_certificate(issued)
    {
        errors.invalid(status.at("certificate"), "<certificate data>", detail);
    }
    let Some(old) = v.old else { return };
    let of = |object: &Value, ty: &str| -> Vec<Value> {
        items(&object["status"], "conditions").filter(|c| c["type"] == ty).cloned().collect()
    };
    for ty in FINAL {
        let (before, after) = (of(old, ty), of(v.new, ty));
        let mut forbid =
            |what: &str| errors.forbidden(list, format!("updates may not {what} a condition of type {ty:?}"));
        if after.len() < before.len() {
            forbid("remove");
        } else if v.subresource != "approval" && ty != "Failed" {
            if after.len() > before.len() {
                forbid("add");
            } else if before != after {
                forbid("modify");
            }
        }
    }
    let before = certificate(old);
    if issued != before {
        if v.subresource != "status" {
            errors.forbidden(status.at("certificate"), "updates may not set certificate content");
        } else if !before.is_empty() {
            errors.forbidden(status.at("certificate"), "updates may not modify existing certificate content");
        }
    }
}

fn validate_spec(spec: &Value, errors: &mut Errors) {
    let path = Path::Root.at("spec");
    if let Err(error) = CertificateRequest::from_base64(spec["request"].as_str().unwrap_or_default()) {
        errors.invalid(path.at("request"), "<certificate request data>", error);
    }
    let usages = path.at("usages");
    let mut seen: Vec<&str> = Vec::new();
    for (index, usage) in items(spec, "usages").enumerate() {
        let usage = usage.as_str().unwrap_or_default();
        if !USAGES.contains(&usage) {
            errors.not_supported(usages.index(index), usage, USAGES);
        }
        if seen.contains(&usage) {
            errors.duplicate(usages.index(index), usage);
        }
        seen.push(usage);
    }
    if seen.is_empty() {
        errors.required(usages, "usages must be provided");
    }
    let signer = spec["signerName"].as_str().unwrap_or_default();
    if signer == LEGACY_UNKNOWN {
        let detail = "the legacy signerName is not allowed via this API version";
        errors.invalid(path.at("signerName"), signer, detail);
    } else {
        validate_signer(signer, path.at("signerName"), errors);
    }
    if let Some(seconds) = spec["expirationSeconds"].as_i64().filter(|s| *s < SHORTEST) {
        let detail = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.invalid(path.at("expirationSeconds"), seconds, detail);
    }
}

/// `example.com/signer-name`.
pub(super) fn validate_signer(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        return errors.required(path, "signerName must be provided");
    }
    let segments: Vec<&str> = name.split('/').collect();
    let [domain, rest] = segments[..] else {
        let detail = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
        return errors.invalid(path, name, detail);
    };
    if domain.len() > 253 {
        errors.too_long(path, 253);
    }
    // One mistake of each part is enough to see.
    let wrong = |part: &str, check: fn(&str) -> Result<(), String>| {
        part.split('.').find_map(|label| check(label).err().map(|e| format!("validating label {label:?}: {e}")))
    };
    if let Some(detail) = wrong(domain, names::dns_label) {
        errors.invalid(path, domain, detail);
    }
    if !domain.contains('.') {
        errors.invalid(path, domain, "should be a domain with at least two segments separated by dots");
    }
    if let Some(detail) = wrong(rest, names::dns_subdomain) {
        errors.invalid(path, rest, detail);
    }
    // A domain, a slash, and a name in a namespace.
    if name.len() > 253 + 1 + 253 + 63 + 1 {
        errors.too_long(path, 253 + 1 + 253 + 63 + 1);
    }
}

/// Certificates in PEM and nothing else.
fn check_certificate(base64: &str) -> Result<(), String> {
    let text = STANDARD.decode(base64).map_err(|e| e.to_string())?;
    let blocks = pem::parse_many(&text).map_err(|e| e.to_string())?;
    for block in &blocks {
        if block.tag() != "CERTIFICATE" {
            return Err(format!("only CERTIFICATE PEM blocks are allowed, found {:?}", block.tag()));
        }
        if block.headers().iter().next().is_some() {
            return Err("no PEM block headers are permitted".into());
        }
        x509_parser::parse_x509_certificate(block.contents()).map_err(|e| e.to_string())?;
    }
    if blocks.is_empty() { Err("must contain at least one CERTIFICATE PEM block".into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pem_of_request() -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        STANDARD.encode(rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap())
    }

    fn pem_of_certificate() -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertificateParams::default().self_signed(&key).unwrap().pem()
    }

    fn errors(new: &Value, old: Option<&Value>, subresource: &str) -> Vec<String> {
        let mut errors = Errors::default();
        validate(&Validation { new, old, subresource }, &mut errors);
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_spec_of_a_request() {
        let good = json!({"request": pem_of_request(), "signerName": "example.com/a.b", "usages": ["client auth"], "expirationSeconds": 600});
        let check = |key: &str, value: Value, expect: &[&str]| {
            let mut spec = good.clone();
            spec[key] = value;
            assert_eq!(errors(&json!({"spec": spec}), None, ""), expect, "{key}");
        };
        check("username", "x".into(), &[]);
        check(
            "request",
            "".into(),
            &[
                "spec.request: Invalid value: \"<certificate request data>\": PEM block type must be CERTIFICATE REQUEST",
            ],
        );
        check("usages", json!([]), &["spec.usages: Required value: usages must be provided"]);
        check("usages", json!(["any", "any"]), &["spec.usages[1]: Duplicate value: \"any\""]);
        let unknown =
            errors(&json!({"spec": {"request": good["request"], "signerName": "a.b/c", "usages": ["x"]}}), None, "");
        assert!(
            unknown[0]
                .starts_with("spec.usages[0]: Unsupported value: \"x\": supported values: \"any\", \"cert sign\"")
        );
        check(
            "expirationSeconds",
            599.into(),
            &[
                "spec.expirationSeconds: Invalid value: 599: may not specify a duration less than 600 seconds (10 minutes)",
            ],
        );
        check("signerName", "".into(), &["spec.signerName: Required value: signerName must be provided"]);
        check(
            "signerName",
            "a".into(),
            &[
                "spec.signerName: Invalid value: \"a\": must be a fully qualified domain and path of the form 'example.com/signer-name'",
            ],
        );
        check(
            "signerName",
            "a/b".into(),
            &["spec.signerName: Invalid value: \"a\": should be a domain with at least two segments separated by dots"],
        );
        check(
            "signerName",
            LEGACY_UNKNOWN.into(),
            &[
                "spec.signerName: Invalid value: \"kubernetes.io/legacy-unknown\": the legacy signerName is not allowed via this API version",
            ],
        );
        let mut spec = good.clone();
        spec["signerName"] = "exa_mple.com/b".into();
        let found = errors(&json!({"spec": spec}), None, "");
        assert!(
            found[0].starts_with("spec.signerName: Invalid value: \"exa_mple.com\": validating label \"exa_mple\": "),
            "{found:?}"
        );
    }

    #[test]
    fn decisions_are_for_good() {
        let condition = |ty: &str, status: &str| json!({"type": ty, "status": status});
        let object = |conditions: &[&Value]| json!({"status": {"conditions": conditions}});
        let check = |old: &[&Value], new: &[&Value], subresource: &str, expect: &[&str]| {
            assert_eq!(errors(&object(new), Some(&object(old)), subresource), expect, "{subresource} {old:?} {new:?}");
        };
        let (yes, no, failed) =
            (condition("Approved", "True"), condition("Denied", "True"), condition("Failed", "True"));
        check(&[], &[&yes], "approval", &[]);
        check(&[], &[&no], "approval", &[]);
        check(
            &[],
            &[&yes],
            "status",
            &["status.conditions: Forbidden: updates may not add a condition of type \"Approved\""],
        );
        check(&[&yes], &[&yes, &failed], "status", &[]);
        check(
            &[&yes],
            &[],
            "approval",
            &["status.conditions: Forbidden: updates may not remove a condition of type \"Approved\""],
        );
        check(
            &[&failed],
            &[],
            "status",
            &["status.conditions: Forbidden: updates may not remove a condition of type \"Failed\""],
        );
        let mut reworded = yes.clone();
        reworded["message"] = "x".into();
        check(
            &[&yes],
            &[&reworded],
            "status",
            &["status.conditions: Forbidden: updates may not modify a condition of type \"Approved\""],
        );
        check(
            &[&yes],
            &[&yes, &no],
            "approval",
            &[
                "status.conditions[1].type: Invalid value: \"Denied\": Approved and Denied conditions are mutually exclusive",
            ],
        );
        check(
            &[],
            &[&condition("Approved", "False")],
            "approval",
            &["status.conditions[0].status: Unsupported value: \"False\": supported values: \"True\""],
        );
        check(&[], &[&condition("Custom", "")], "status", &["status.conditions[0].status: Required value"]);
        check(&[], &[&condition("", "True")], "status", &["status.conditions[0].type: Required value"]);
        check(&[], &[&yes, &yes], "approval", &["status.conditions[1].type: Duplicate value: \"Approved\""]);
    }

    #[test]
    fn a_certificate_is_given_once() {
        let object = |pem: &str| json!({"status": {"certificate": STANDARD.encode(pem)}});
        let good = pem_of_certificate();
        let check = |old: &Value, new: &Value, subresource: &str, expect: &[&str]| {
            assert_eq!(errors(new, Some(old), subresource), expect);
        };
        check(&json!({}), &object(&good), "status", &[]);
        check(
            &json!({}),
            &object(&good),
            "approval",
            &["status.certificate: Forbidden: updates may not set certificate content"],
        );
        check(
            &object(&good),
            &object(&pem_of_certificate()),
            "status",
            &["status.certificate: Forbidden: updates may not modify existing certificate content"],
        );
        check(
            &json!({}),
            &object("x"),
            "status",
            &[
                "status.certificate: Invalid value: \"<certificate data>\": must contain at least one CERTIFICATE PEM block",
            ],
        );
        let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
        check(
            &json!({}),
            &object(&format!("{good}{key}")),
            "status",
            &[
                "status.certificate: Invalid value: \"<certificate data>\": only CERTIFICATE PEM blocks are allowed, found \"PRIVATE KEY\"",
            ],
        );
    }

    #[test]
    fn what_kubectl_shows() {
        let check = |conditions: &[&str], certificate: &str, expect: &str| {
            let list: Vec<Value> = conditions.iter().map(|ty| json!({"type": ty, "status": "True"})).collect();
            assert_eq!(state(&json!({"status": {"conditions": list, "certificate": certificate}})), expect);
        };
        check(&[], "", "Pending");
        check(&["Approved"], "", "Approved");
        check(&["Approved"], "QQ==", "Approved,Issued");
        check(&["Approved", "Failed"], "", "Approved,Failed");
        check(&["Denied"], "", "Denied");
    }
}
