//! PodCertificateRequest: a node asks for a certificate on behalf of a pod
//! (<https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/#pod-certificate-requests>).
//!
//! Who may ask and who may answer is the server's business.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::certificates::v1::PodCertificateRequest;
use serde_json::{Value, json};
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    oid_registry::{OID_EC_P256, OID_NIST_EC_P384, OID_NIST_EC_P521, OID_SIG_ED25519},
    prelude::FromDer,
    public_key::PublicKey,
    x509::SubjectPublicKeyInfo,
};

use super::{STATUS, certificate_signing_request::validate_signer, default, drop_status, items, meta};
use crate::{
    certificate_request::{CertificateRequest, Malformed},
    field::{Errors, Path, same},
    names,
    row::{Row, Validation, row as base},
};

/// The shortest and the longest life of a certificate that may be asked for, in seconds; those of Kubernetes' own signers
/// end sooner.
const SHORTEST: i64 = 3600;
const LONGEST: i64 = 91 * 24 * 3600;
const LONGEST_OF_KUBERNETES: i64 = 24 * 3600;
const MAX_UID: usize = 128;
const MAX_REQUEST: usize = 10 * 1024;
const MAX_CHAIN: usize = 100 * 1024;
const MAX_ANNOTATIONS: usize = 256 * 1024;
/// One of these ends a request.
const FINAL: [&str; 3] = ["Issued", "Denied", "Failed"];
/// How long before its end, and after its beginning, a certificate is not yet renewed.
const MARGIN: SignedDuration = SignedDuration::from_mins(10);

pub(super) fn row() -> Row {
    Row {
        subresources: STATUS,
        prepare_create: drop_status,
        selectable: &["spec.signerName", "spec.podName", "spec.nodeName"],
        defaults: |o| {
            if let Some(spec) = o.get_mut("spec") {
                default(spec, "maxExpirationSeconds", LONGEST_OF_KUBERNETES);
            }
        },
        validate: |v, errors| match v.old {
            Some(old) if v.subresource == "status" => status(v, old, errors),
            Some(old) => errors.immutable(Path::Root.at("spec"), &old["spec"], &v.new["spec"]),
            None => spec(&v.new["spec"], Path::Root.at("spec"), errors),
        },
        ..base::<PodCertificateRequest>()
    }
}

fn spec(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let text = |key: &str| spec[key].as_str().unwrap_or_default();
    let signer = text("signerName");
    validate_signer(signer, path.at("signerName"), errors);
    user_annotations(spec, path.at("unverifiedUserAnnotations"), errors);
    for (name, uid) in [("podName", "podUID"), ("serviceAccountName", "serviceAccountUID"), ("nodeName", "nodeUID")] {
        errors.expect(path.at(name), text(name), names::dns_subdomain);
        match text(uid) {
            "" => errors.invalid(path.at(uid), "", "must not be empty"),
            text if text.len() > MAX_UID => errors.too_long(path.at(uid), MAX_UID),
            _ => {}
        }
    }
    let at = path.at("maxExpirationSeconds");
    let own =
        signer.split('/').next().is_some_and(|domain| domain == "kubernetes.io" || domain.ends_with(".kubernetes.io"));
    let longest = if own { LONGEST_OF_KUBERNETES } else { LONGEST };
    match spec["maxExpirationSeconds"].as_i64() {
        None => errors.required(at, "must be set"),
        Some(seconds) if !(SHORTEST..=longest).contains(&seconds) => {
            errors.invalid(at, seconds, format!("must be in the range [{SHORTEST}, {longest}]"));
        }
        Some(_) => {}
    }
    let at = path.at("stubPKCS10Request");
    let der = STANDARD.decode(text("stubPKCS10Request")).unwrap_or_default();
    if der.len() > MAX_REQUEST {
        return errors.too_long(at, MAX_REQUEST);
    }
    match CertificateRequest::from_der(der) {
        Ok(request) => {
            if let Err((shown, why)) = key(&request.key) {
                errors.invalid(at, shown, why);
            }
        }
        Err(Malformed::Signature(why)) => {
            errors.invalid_unshown(at, format!("could not verify proof-of-possession signature: {why}"));
        }
        Err(why) => errors.invalid_unshown(at, format!("must be a valid PKCS#10 certificate signing request: {why}")),
    }
}

/// Validates what whoever made the pod says to the signer: annotations with domains.
fn user_annotations(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut total = 0;
    for (key, value) in spec["unverifiedUserAnnotations"].as_object().into_iter().flatten() {
        total += key.len() + value.as_str().map_or(0, str::len);
        errors.expect(path, &key.to_lowercase(), names::qualified_name);
        if !key.contains('/') {
            errors.invalid(path, key.as_str(), "must be a domain-prefixed key (such as \"acme.io/foo\")");
        }
    }
    if total > MAX_ANNOTATIONS {
        errors.too_long(path, MAX_ANNOTATIONS);
    }
}

/// Whether certificates are issued for keys of this sort.
fn key(der: &[u8]) -> Result<(), (String, &'static str)> {
    let unknown = "unknown public key type; supported types are Ed25519, ECDSA, and RSA";
    let Ok((_, info)) = SubjectPublicKeyInfo::from_der(der) else { return Err((String::new(), unknown)) };
    match info.parsed() {
        Ok(PublicKey::RSA(rsa)) => match rsa.key_size() {
            3072 | 4096 => Ok(()),
            bits => Err((format!("{bits}-bit modulus"), "RSA keys must have modulus size 3072 or 4096")),
        },
        Ok(PublicKey::EC(_)) => {
            let curve = info.algorithm.parameters.as_ref().and_then(|curve| curve.as_oid().ok());
            match curve {
                Some(curve) if [OID_EC_P256, OID_NIST_EC_P384, OID_NIST_EC_P521].contains(&curve) => Ok(()),
                curve => {
                    let shown = curve.map_or_else(String::new, |curve| curve.to_id_string());
                    Err((format!("curve {shown}"), "elliptic public keys must use curve P256 or P384"))
                }
            }
        }
        _ if info.algorithm.algorithm == OID_SIG_ED25519 => Ok(()),
        _ => Err((info.algorithm.algorithm.to_id_string(), unknown)),
    }
}

fn ends(status: &Value) -> Option<&str> {
    let types = items(status, "conditions").filter(|c| c["status"] == "True").filter_map(|c| c["type"].as_str());
    types.into_iter().find(|ty| FINAL.contains(ty))
}

fn status(v: &Validation<'_>, old: &Value, errors: &mut Errors) {
    let (status, path) = (&v.new["status"], Path::Root.at("status"));
    conditions(status, path, errors);
    if !errors.is_empty() {
        return;
    }
    let unchanged = same(status, &old["status"]);
    let why = match (ends(&old["status"]), ends(status)) {
        (Some(_), _) if !unchanged => "immutable after PodCertificateRequest is issued, denied, or failed",
        (Some(_), _) => return,
        (None, Some("Issued")) => {
            if let Err(error) = issued(status, &old["spec"], errors) {
                errors.invalid(path.at(error.field), error.value, error.why);
            }
            return;
        }
        (None, Some(_)) if !same(status, &json!({"conditions": status["conditions"]})) => {
            "non-condition status fields must be empty when denying or failing the PodCertificateRequest"
        }
        (None, None) if !unchanged => {
            "status is immutable unless transitioning to \"Issued\", \"Denied\", or \"Failed\""
        }
        _ => return,
    };
    errors.invalid_unshown(path, why);
}

fn conditions(status: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.at("conditions");
    let mut known = 0;
    for (index, condition) in items(status, "conditions").enumerate() {
        // Upstream writes the place like the name of a field.
        let place = format!("[{index}]");
        let at = list.at(&place);
        let (ty, holds) = (condition["type"].as_str().unwrap_or_default(), condition["status"].as_str());
        if !FINAL.contains(&ty) {
            errors.unsupported(at.at("type"), ty, &FINAL);
            continue;
        }
        known += 1;
        if known > 1 {
            let why = "There may be at most one condition with type \"Issued\", \"Denied\", or \"Failed\"";
            errors.invalid(at.at("type"), ty, why);
        }
        if holds != Some("True") {
            errors.not_supported(at.at("status"), holds.unwrap_or_default(), &["True"]);
        }
    }
    meta::conditions(status, usize::MAX, path, errors);
}

/// The first thing that is wrong with what was issued.
struct Wrong {
    field: &'static str,
    value: Value,
    why: String,
}

/// Validates a certificate against what was asked for, and what is said of it.
fn issued(status: &Value, spec: &Value, errors: &mut Errors) -> Result<(), Wrong> {
    const CHAIN: &str = "certificateChain";
    let path = Path::Root.at("status");
    let chain = status[CHAIN].as_str().unwrap_or_default();
    if chain.len() > MAX_CHAIN {
        errors.too_long(path.at(CHAIN), MAX_CHAIN);
        return Ok(());
    }
    let of_chain = |why: &str| Wrong { field: CHAIN, value: chain.into(), why: why.to_owned() };
    let blocks = pem::parse_many(chain).unwrap_or_default();
    let first =
        blocks.first().ok_or_else(|| of_chain("issued certificate chain must contain at least one certificate"))?;
    if blocks.iter().any(|block| block.tag() != "CERTIFICATE") {
        return Err(of_chain("issued certificate chain must consist entirely of CERTIFICATE PEM blocks"));
    }
    let (_, leaf) = x509_parser::parse_x509_certificate(first.contents())
        .map_err(|_| of_chain("leaf certificate does not parse as valid X.509"))?;
    leaf_names(&leaf, path.at(CHAIN), errors);
    let request = STANDARD.decode(spec["stubPKCS10Request"].as_str().unwrap_or_default()).unwrap_or_default();
    if CertificateRequest::from_der(request).map_or(true, |request| request.key != leaf.public_key().raw) {
        return Err(of_chain("leaf certificate was not issued to the requested public key"));
    }
    let said = |key: &str| status[key].as_str().and_then(|text| text.parse::<Timestamp>().ok());
    let consistent = "must be present and consistent with the issued certificate";
    let (from, to, refresh) = (said("notBefore"), said("notAfter"), said("beginRefreshAt"));
    for (key, missing, why) in [
        ("notBefore", from.is_none(), consistent),
        ("notAfter", to.is_none(), consistent),
        ("beginRefreshAt", refresh.is_none(), "must be present and in the range [notbefore+10min, notafter-10min]"),
    ] {
        if missing {
            errors.required(path.at(key), why);
        }
    }
    let (Some(from), Some(to), Some(refresh)) = (from, to, refresh) else { return Ok(()) };
    let of = |field: &'static str, why: &str| Wrong { field, value: status[field].clone(), why: why.to_owned() };
    let validity = leaf.validity();
    let (begins, finishes) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    if from.as_second() != begins {
        return Err(of("notBefore", "must be set to the NotBefore time encoded in the leaf certificate"));
    }
    if to.as_second() != finishes {
        return Err(of("notAfter", "must be set to the NotAfter time encoded in the leaf certificate"));
    }
    let life = finishes - begins;
    let of_life = |why: String| Wrong { field: CHAIN, value: life.saturating_mul(1_000_000_000).into(), why };
    if life < SHORTEST {
        return Err(of_life("leaf certificate lifetime must be >= 1 hour".into()));
    }
    if let Some(most) = spec["maxExpirationSeconds"].as_i64().filter(|most| life > *most) {
        return Err(of_life(format!("leaf certificate lifetime must be <= spec.maxExpirationSeconds ({most})")));
    }
    if refresh.duration_since(from) < MARGIN {
        return Err(of("beginRefreshAt", "must be at least 10 minutes after status.notBefore"));
    }
    if to.duration_since(refresh) < MARGIN {
        return Err(of("beginRefreshAt", "must be at least 10 minutes before status.notAfter"));
    }
    if blocks.iter().any(|block| x509_parser::parse_x509_certificate(block.contents()).is_err()) {
        return Err(of_chain("intermediate certificate does not parse as valid X.509"));
    }
    Ok(())
}

fn leaf_names(leaf: &X509Certificate<'_>, path: Path<'_>, errors: &mut Errors) {
    let alternative = leaf.subject_alternative_name().ok().flatten();
    for name in alternative.iter().flat_map(|extension| &extension.value.general_names) {
        let GeneralName::DNSName(name) = name else { continue };
        if name.is_empty() {
            errors.invalid(path, *name, "leaf certificate should not contain empty DNSName");
        }
        if name.contains("..") {
            errors.invalid(path, *name, "leaf certificate's DNSName should not contain '..'");
        }
        if name.starts_with('.') || name.ends_with('.') {
            errors.invalid(path, *name, "leaf certificate's DNSName should not start or end with '.'");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{check, check_status, check_update, with},
        *,
    };

    const BEGIN: i64 = 1_767_225_600;

    fn time(second: i64) -> String {
        Timestamp::from_second(second).unwrap().to_string()
    }

    /// A key, and a request with it.
    fn request_of(key: &rcgen::KeyPair) -> Value {
        let stub = rcgen::CertificateParams::default().serialize_request(key).unwrap();
        json!({"spec": {"signerName": "example.com/signer", "podName": "p", "podUID": "1", "serviceAccountName": "s",
            "serviceAccountUID": "2", "nodeName": "n", "nodeUID": "3", "maxExpirationSeconds": 86400,
            "stubPKCS10Request": STANDARD.encode(stub.der())}})
    }

    #[test]
    fn requests() {
        let request = request_of(&rcgen::KeyPair::generate().unwrap());
        check(&row(), request.clone(), &[]);
        check(&row(), with(&request, "/spec/maxExpirationSeconds", Value::Null), &[]);
        check(&row(), with(&request, "/spec/maxExpirationSeconds", json!(7_862_400)), &[]);
        let subdomain = names::dns_subdomain("").unwrap_err();
        for (key, value, expect) in [
            ("signerName", json!(""), "spec.signerName: Required value: signerName must be provided".to_owned()),
            ("podName", json!(""), format!("spec.podName: Invalid value: \"\": {subdomain}")),
            ("nodeUID", json!(""), "spec.nodeUID: Invalid value: \"\": must not be empty".into()),
            ("podUID", json!("x".repeat(129)), "spec.podUID: Too long: may not be more than 128 bytes".into()),
            ("maxExpirationSeconds", json!(60), "spec.maxExpirationSeconds: Invalid value: 60: must be in the range [3600, 7862400]".into()),
            (
                "unverifiedUserAnnotations",
                json!({"a": "b"}),
                "spec.unverifiedUserAnnotations: Invalid value: \"a\": must be a domain-prefixed key (such as \"acme.io/foo\")".into(),
            ),
        ] {
            check(&row(), with(&request, &format!("/spec/{key}"), value), &[&expect]);
        }
        let own = with(&request, "/spec/signerName", "kubernetes.io/kube-apiserver-client-pod".into());
        check(
            &row(),
            with(&own, "/spec/maxExpirationSeconds", json!(86_401)),
            &["spec.maxExpirationSeconds: Invalid value: 86401: must be in the range [3600, 86400]"],
        );
        check_update(
            &row(),
            request.clone(),
            with(&request, "/spec/podName", "q".into()),
            &[&format!(
                "spec: Invalid value: {}: field is immutable",
                with(&request, "/spec/podName", "q".into())["spec"]
            )],
        );
    }

    #[test]
    fn who_asks_has_the_key() {
        let request = request_of(&rcgen::KeyPair::generate().unwrap());
        let mut stub = STANDARD.decode(request["spec"]["stubPKCS10Request"].as_str().unwrap()).unwrap();
        // The last byte belongs to the signature.
        *stub.last_mut().unwrap() ^= 1;
        let forged = with(&request, "/spec/stubPKCS10Request", STANDARD.encode(&stub).into());
        let mut errors = Errors::default();
        spec(&forged["spec"], Path::Root.at("spec"), &mut errors);
        let shown = errors.to_string();
        assert!(
            shown.starts_with("spec.stubPKCS10Request: Invalid value: could not verify proof-of-possession signature"),
            "{shown}"
        );
    }

    #[test]
    fn answers() {
        let key = rcgen::KeyPair::generate().unwrap();
        let request = request_of(&key);
        let chain = |key: &rcgen::KeyPair, life: i64| {
            let mut params = rcgen::CertificateParams::default();
            let at = |second: i64| rcgen::date_time_ymd(1970, 1, 1) + std::time::Duration::from_secs(second as u64);
            (params.not_before, params.not_after) = (at(BEGIN), at(BEGIN + life));
            params.self_signed(key).unwrap().pem()
        };
        let answer = |ty: &str, rest: Value| {
            let mut status = rest;
            status["conditions"] = json!([{"type": ty, "status": "True", "reason": "R", "message": "m",
                "lastTransitionTime": time(BEGIN)}]);
            with(&request, "/status", status)
        };
        let issued = |chain: &str, life: i64, refresh: i64| {
            answer(
                "Issued",
                json!({"certificateChain": chain, "notBefore": time(BEGIN), "notAfter": time(BEGIN + life),
                "beginRefreshAt": time(BEGIN + refresh)}),
            )
        };
        let (day, good) = (86_400, chain(&key, 86_400));
        check_status(&row(), request.clone(), issued(&good, day, 3600), &[]);
        check_status(&row(), request.clone(), answer("Denied", json!({})), &[]);
        for (new, expect) in [
            (answer("Later", json!({})), "status.conditions.[0].type: Unsupported value: \"Later\": supported values: \"Issued\", \"Denied\", \"Failed\"".to_owned()),
            (
                answer("Failed", json!({"certificateChain": "x"})),
                "status: Invalid value: non-condition status fields must be empty when denying or failing the PodCertificateRequest".into(),
            ),
            (
                with(&request, "/status", json!({"certificateChain": "x"})),
                "status: Invalid value: status is immutable unless transitioning to \"Issued\", \"Denied\", or \"Failed\"".into(),
            ),
            (
                answer("Issued", json!({})),
                "status.certificateChain: Invalid value: \"\": issued certificate chain must contain at least one certificate".into(),
            ),
            (
                issued(&chain(&rcgen::KeyPair::generate().unwrap(), day), day, 3600),
                "issued to the requested public key".into(),
            ),
            (
                issued(&good, day + 1, 3600),
                format!("status.notAfter: Invalid value: \"{}\": must be set to the NotAfter time encoded in the leaf certificate", time(BEGIN + day + 1)),
            ),
            (
                issued(&chain(&key, 1800), 1800, 900),
                "status.certificateChain: Invalid value: 1800000000000: leaf certificate lifetime must be >= 1 hour".into(),
            ),
            (
                issued(&chain(&key, day * 2), day * 2, 3600),
                "status.certificateChain: Invalid value: 172800000000000: leaf certificate lifetime must be <= spec.maxExpirationSeconds (86400)".into(),
            ),
            (
                issued(&good, day, day - 60),
                format!("status.beginRefreshAt: Invalid value: \"{}\": must be at least 10 minutes before status.notAfter", time(BEGIN + day - 60)),
            ),
        ] {
            let mut errors = Errors::default();
            (row().validate)(&Validation { new: &new, old: Some(&request), subresource: "status" }, &mut errors);
            let shown = errors.to_string();
            assert!(errors.0.len() == 1 && shown.ends_with(&expect) || shown.contains(&expect), "{shown} instead of {expect}");
        }
        check_status(
            &row(),
            answer("Denied", json!({})),
            answer("Failed", json!({})),
            &["status: Invalid value: immutable after PodCertificateRequest is issued, denied, or failed"],
        );
    }
}
