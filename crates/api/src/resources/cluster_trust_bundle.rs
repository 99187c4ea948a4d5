//! ClusterTrustBundle (<https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/#cluster-trust-bundles>).

use k8s_openapi::api::certificates::v1::ClusterTrustBundle;

use super::certificate_signing_request::validate_signer;
use crate::{
    cell,
    field::{Errors, Path},
    names,
    row::{Row, Validation, col, row as base},
};

/// The largest bundle, in bytes.
const MAX_SIZE: usize = 1024 * 1024;
const CERTIFICATE: &str = "CERTIFICATE";

pub(super) fn row() -> Row {
    Row {
        // What a name must be besides depends on the signer.
        name: names::path_segment,
        selectable: &["spec.signerName"],
        columns: const { &[col("SignerName", "string"), col("Age", "date")] },
        cells: |o, now| vec![cell::text(&o["spec"]["signerName"]), cell::age(o, now)],
        validate,
        ..base::<ClusterTrustBundle>()
    }
}

fn validate(v: &Validation<'_>, errors: &mut Errors) {
    let (spec, path) = (&v.new["spec"], Path::Root.at("spec"));
    let signer = spec["signerName"].as_str().unwrap_or_default();
    let name = v.new["metadata"]["name"].as_str().unwrap_or_default();
    errors.expect(Path::Root.at("metadata").at("name"), name, |name| name_of(name, signer));
    if !signer.is_empty() {
        validate_signer(signer, path.at("signerName"), errors);
    }
    // What was read once is not read again.
    if v.old.is_none_or(|old| old["spec"]["trustBundle"] != spec["trustBundle"]) {
        bundle(spec["trustBundle"].as_str().unwrap_or_default(), path.at("trustBundle"), errors);
    }
    if let Some(old) = v.old {
        let before = old["spec"]["signerName"].as_str().unwrap_or_default();
        if before != signer {
            errors.invalid(path.at("signerName"), signer, "field is immutable");
        }
    }
}

/// A bundle of a signer has the signer's name in front of its own.
fn name_of(name: &str, signer: &str) -> Result<(), String> {
    if signer.is_empty() {
        return match name.contains(':') {
            true => Err("ClusterTrustBundle without signer name must not have \":\" in its name".into()),
            false => names::dns_subdomain(name),
        };
    }
    let prefix = format!("{}:", signer.replace('/', ":"));
    let rest = name
        .strip_prefix(&prefix)
        .ok_or_else(|| format!("ClusterTrustBundle for signerName {signer} must be named with prefix {prefix}"))?;
    names::dns_subdomain(rest)
}

fn bundle(text: &str, path: Path<'_>, errors: &mut Errors) {
    if text.len() > MAX_SIZE {
        return errors.too_long(path, MAX_SIZE);
    }
    let mut wrong = |why: String| errors.invalid(path, "<value omitted>", why);
    let blocks = pem::parse_many(text).unwrap_or_default();
    let mut good = true;
    for (index, block) in blocks.iter().enumerate() {
        let why = match x509_parser::parse_x509_certificate(block.contents()) {
            _ if block.tag() != CERTIFICATE => format!("has bad block type: {}", block.tag()),
            _ if block.headers().iter().next().is_some() => "has PEM block headers".into(),
            Err(_) => "does not parse as X.509".into(),
            Ok((rest, _)) if !rest.is_empty() => "does not parse as X.509".into(),
            Ok((_, certificate)) if !certificate.is_ca() => "does not have the CA bit set".into(),
            Ok(_) => continue,
        };
        good = false;
        wrong(format!("entry {index} {why}"));
    }
    if !good {
        return;
    }
    if blocks.is_empty() {
        wrong("at least one trust anchor must be provided".into());
    }
    for (index, block) in blocks.iter().enumerate() {
        let same = |other: &pem::Pem| other.contents() == block.contents();
        if blocks[..index].iter().any(same) {
            continue;
        }
        let places: Vec<String> =
            (0..blocks.len()).filter(|at| same(&blocks[*at])).map(|place| place.to_string()).collect();
        if places.len() > 1 {
            wrong(format!("duplicate trust anchor (indices [{}])", places.join(" ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{
        super::testing::{check, check_update},
        *,
    };

    fn certificate(ca: bool) -> String {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = if ca { rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained) } else { rcgen::IsCa::NoCa };
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
    }

    fn of(name: &str, signer: &str, bundle: &str) -> Value {
        json!({"metadata": {"name": name}, "spec": {"signerName": signer, "trustBundle": bundle}})
    }

    #[test]
    fn names_of_bundles() {
        let ca = certificate(true);
        check(&row(), of("roots", "", &ca), &[]);
        check(&row(), of("example.com:signer:roots", "example.com/signer", &ca), &[]);
        check(
            &row(),
            of("a:roots", "", &ca),
            &[
                "metadata.name: Invalid value: \"a:roots\": ClusterTrustBundle without signer name must not have \":\" in its name",
            ],
        );
        check(
            &row(),
            of("roots", "example.com/signer", &ca),
            &[
                "metadata.name: Invalid value: \"roots\": ClusterTrustBundle for signerName example.com/signer must be named with prefix example.com:signer:",
            ],
        );
        let subdomain = names::dns_subdomain("A").unwrap_err();
        check(
            &row(),
            of("example.com:signer:A", "example.com/signer", &ca),
            &[&format!("metadata.name: Invalid value: \"example.com:signer:A\": {subdomain}")],
        );
    }

    #[test]
    fn anchors() {
        let (ca, other) = (certificate(true), certificate(true));
        let broken = pem::encode(&pem::Pem::new(CERTIFICATE, "x"));
        let key = pem::encode(&pem::Pem::new("PUBLIC KEY", "x"));
        for (bundle, expect) in [
            (format!("# ours\n{ca}{other}"), None),
            (String::new(), Some("at least one trust anchor must be provided")),
            (format!("{ca}{other}{ca}"), Some("duplicate trust anchor (indices [0 2])")),
            (format!("{ca}{}", certificate(false)), Some("entry 1 does not have the CA bit set")),
            (format!("{broken}{ca}{ca}"), Some("entry 0 does not parse as X.509")),
            (format!("{ca}{key}"), Some("entry 1 has bad block type: PUBLIC KEY")),
        ] {
            let expect = expect.map(|why| format!("spec.trustBundle: Invalid value: \"<value omitted>\": {why}"));
            let expect: Vec<&str> = expect.iter().map(String::as_str).collect();
            check(&row(), of("roots", "", &bundle), &expect);
        }
        check(
            &row(),
            of("roots", "", &"x".repeat(MAX_SIZE + 1)),
            &["spec.trustBundle: Too long: may not be more than 1048576 bytes"],
        );
    }

    #[test]
    fn what_may_change() {
        let ca = certificate(true);
        check_update(&row(), of("roots", "", "read before"), of("roots", "", "read before"), &[]);
        check_update(&row(), of("roots", "", "read before"), of("roots", "", &ca), &[]);
        check_update(
            &row(),
            of("a.b:c:d", "a.b/c", &ca),
            of("a.b:c:d", "a.b/e", &ca),
            &[
                "metadata.name: Invalid value: \"a.b:c:d\": ClusterTrustBundle for signerName a.b/e must be named with prefix a.b:e:",
                "spec.signerName: Invalid value: \"a.b/e\": field is immutable",
            ],
        );
    }
}
