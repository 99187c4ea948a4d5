//! The authority that signs: certificates in the cluster's name.
//!
//! Name, key and alternative names go from the request into the certificate byte by byte; what it may be used for, and
//! for how long, comes from elsewhere. The pair can be exchanged while the cluster runs.

use std::{fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use parking_lot::RwLock;
use rcgen::{KeyPair, PublicKeyData as _, SigningKey as _};
use seawall_api::certificate_request::CertificateRequest;
use x509_cert::{
    Certificate, TbsCertificate, Version,
    certificate::Rfc5280,
    der::{
        Decode, Encode, EncodePem, asn1,
        asn1::{Any, BitString, GeneralizedTime, ObjectIdentifier, OctetString, UtcTime},
        oid::AssociatedOid,
        pem::LineEnding,
    },
    ext::{
        Extension,
        pkix::{
            AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, KeyUsages, SubjectAltName,
            SubjectKeyIdentifier,
        },
    },
    request::{CertReq, ExtensionReq},
    serial_number::SerialNumber,
    spki::AlgorithmIdentifierOwned,
    time::{Time, Validity},
};

/// A certificate begins a little before it is made, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(5 * 60);
/// One that lives shorter than this does not pay for that with its end.
const SHORT: Duration = Duration::from_secs(8 * 3600);
/// Shorter lives are not given.
const SHORTEST: Duration = Duration::from_secs(600);

/// A pair that cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The certificate cannot be read.
    #[error("the certificate of the authority cannot be read: {0}")]
    Certificate(String),
    /// The key cannot be read.
    #[error("the key of the authority cannot be read: {0}")]
    Key(#[source] rcgen::Error),
    /// They do not belong together.
    #[error("none of the {0} certificates of the authority is that of its key")]
    Mismatch(usize),
}

/// Why a certificate was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// It never will be.
    #[error("{0}")]
    Request(String),
    /// It may be later.
    #[error("{0}")]
    Authority(String),
}

struct Pair {
    certificate: Certificate,
    key: KeyPair,
    algorithm: AlgorithmIdentifierOwned,
    key_id: Option<OctetString>,
    not_after: Timestamp,
}

/// The cluster's authority.
pub struct Authority(RwLock<Arc<Pair>>);

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.0.read().not_after).finish_non_exhaustive()
    }
}

impl Authority {
    /// Signs with this pair, in PEM. The certificate may be a bundle: the one of the key is found in it.
    pub fn new(certificate: &str, key: &str) -> Result<Arc<Authority>, AuthorityError> {
        Ok(Arc::new(Authority(RwLock::new(Arc::new(Pair::new(certificate, key)?)))))
    }

    /// Signs with this pair from now on. If it cannot sign, the one before stays.
    pub fn replace(&self, certificate: &str, key: &str) -> Result<(), AuthorityError> {
        let pair = Arc::new(Pair::new(certificate, key)?);
        *self.0.write() = pair;
        Ok(())
    }

    /// Makes a certificate in PEM for as long as was asked for (`seconds`), and no longer than `longest`.
    pub fn issue(
        &self,
        request: &CertificateRequest,
        usages: &[String],
        seconds: Option<i32>,
        longest: Duration,
        now: Timestamp,
    ) -> Result<String, IssueError> {
        let pair = self.0.read().clone();
        if pair.not_after <= now {
            return Err(IssueError::Authority(format!("the signer has expired: NotAfter={}", pair.not_after)));
        }
        let asked = seconds.map(|s| Duration::from_secs(u64::from(s.unsigned_abs())));
        let life = asked.map_or(longest, |asked| asked.max(SHORTEST).min(longest));
        let end = if life < SHORT { life } else { life - BACKDATE };
        let later = |t: Timestamp, d: Duration| t.checked_add(d).unwrap_or(Timestamp::MAX);
        let not_before = now.checked_sub(BACKDATE).unwrap_or(now);
        // It cannot outlive who vouches for it.
        let not_after = later(now, end).min(pair.not_after);
        let wrong = |e: x509_cert::der::Error| IssueError::Request(format!("the certificate cannot be encoded: {e}"));
        let request = CertReq::from_der(&request.der)
            .map_err(|e| IssueError::Request(format!("the certificate request cannot be parsed: {e}")))?;
        let mut serial: [u8; 16] = rand::random();
        // A positive number of full length.
        serial[0] = serial[0] & 0x7f | 0x40;
        let mut extensions = purposes(usages)?;
        extensions.push(extension(&BasicConstraints { ca: false, path_len_constraint: None }, true).map_err(wrong)?);
        if let Some(id) = &pair.key_id {
            let id = AuthorityKeyIdentifier { key_identifier: Some(id.clone()), ..Default::default() };
            extensions.push(extension(&id, false).map_err(wrong)?);
        }
        extensions.extend(alternative_names(&request).map_err(wrong)?);
        let tbs = TbsCertificate {
            version: Version::V3,
            serial_number: SerialNumber::<Rfc5280>::new(&serial).map_err(wrong)?,
            signature: pair.algorithm.clone(),
            issuer: pair.certificate.tbs_certificate.subject.clone(),
            validity: Validity {
                not_before: time(not_before).map_err(wrong)?,
                not_after: time(not_after).map_err(wrong)?,
            },
            subject: request.info.subject,
            subject_public_key_info: request.info.public_key,
            issuer_unique_id: None,
            subject_unique_id: None,
            extensions: Some(extensions),
        };
        let signature = pair.key.sign(&tbs.to_der().map_err(wrong)?);
        let signature = signature.map_err(|e| IssueError::Authority(format!("the authority cannot sign: {e}")))?;
        let certificate = Certificate {
            tbs_certificate: tbs,
            signature_algorithm: pair.algorithm.clone(),
            signature: BitString::from_bytes(&signature).map_err(wrong)?,
        };
        certificate.to_pem(LineEnding::LF).map_err(wrong)
    }
}

impl Pair {
    fn new(certificate: &str, key: &str) -> Result<Pair, AuthorityError> {
        let key = KeyPair::from_pem(key).map_err(AuthorityError::Key)?;
        let unreadable = |e: x509_cert::der::Error| AuthorityError::Certificate(e.to_string());
        let blocks = pem::parse_many(certificate).map_err(|e| AuthorityError::Certificate(e.to_string()))?;
        let bundle = blocks.iter().map(|b| Certificate::from_der(b.contents())).collect::<Result<Vec<_>, _>>();
        let bundle = bundle.map_err(unreadable)?;
        let count = bundle.len();
        let own = key.subject_public_key_info();
        let is_ours =
            |c: &Certificate| c.tbs_certificate.subject_public_key_info.to_der().is_ok_and(|found| found == own);
        let certificate = bundle.into_iter().find(is_ours).ok_or(AuthorityError::Mismatch(count))?;
        let id: Option<(bool, SubjectKeyIdentifier)> = certificate.tbs_certificate.get().map_err(unreadable)?;
        let end = certificate.tbs_certificate.validity.not_after.to_unix_duration();
        let not_after = Timestamp::from_second(i64::try_from(end.as_secs()).unwrap_or(i64::MAX));
        Ok(Pair {
            key_id: id.map(|(_, id)| id.0),
            not_after: not_after.unwrap_or(Timestamp::MAX),
            algorithm: algorithm(&key)?,
            certificate,
            key,
        })
    }
}

/// How the key's algorithm is written in a certificate (RFC 5758, RFC 8410, RFC 4055).
fn algorithm(key: &KeyPair) -> Result<AlgorithmIdentifierOwned, AuthorityError> {
    let known = [
        (&rcgen::PKCS_ECDSA_P256_SHA256, "1.2.840.10045.4.3.2", false),
        (&rcgen::PKCS_ECDSA_P384_SHA384, "1.2.840.10045.4.3.3", false),
        (&rcgen::PKCS_ED25519, "1.3.101.112", false),
        (&rcgen::PKCS_RSA_SHA256, "1.2.840.113549.1.1.11", true),
    ];
    let found = known.into_iter().find(|(algorithm, _, _)| *algorithm == key.algorithm());
    let (_, oid, null) = found.ok_or(AuthorityError::Key(rcgen::Error::UnsupportedSignatureAlgorithm))?;
    Ok(AlgorithmIdentifierOwned {
        oid: ObjectIdentifier::new_unwrap(oid),
        parameters: null.then(|| Any::from(asn1::AnyRef::NULL)),
    })
}

fn extension<T: Encode + AssociatedOid>(value: &T, critical: bool) -> x509_cert::der::Result<Extension> {
    Ok(Extension { extn_id: T::OID, critical, extn_value: OctetString::new(value.to_der()?)? })
}

/// What `spec.usages` allows. Signers have checked them before, so the others do not occur.
fn purposes(usages: &[String]) -> Result<Vec<Extension>, IssueError> {
    let (mut key, mut purposes) = (None, Vec::new());
    let mut unknown = Vec::new();
    for usage in usages {
        match usage.as_str() {
            "digital signature" => key = Some(key.unwrap_or_default() | KeyUsages::DigitalSignature),
            "key encipherment" => key = Some(key.unwrap_or_default() | KeyUsages::KeyEncipherment),
            "server auth" => purposes.push(ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.1")),
            "client auth" => purposes.push(ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2")),
            other => unknown.push(other),
        }
    }
    if !unknown.is_empty() {
        return Err(IssueError::Request(format!("unrecognized usage values: {unknown:?}")));
    }
    let wrong = |e: x509_cert::der::Error| IssueError::Request(e.to_string());
    let mut extensions = Vec::new();
    if let Some(key) = key {
        extensions.push(extension(&KeyUsage(key), true).map_err(wrong)?);
    }
    if !purposes.is_empty() {
        extensions.push(extension(&ExtendedKeyUsage(purposes), false).map_err(wrong)?);
    }
    Ok(extensions)
}

/// The list of alternative names of a request, as it stands there.
fn alternative_names(request: &CertReq) -> x509_cert::der::Result<Option<Extension>> {
    for attribute in request.info.attributes.iter().filter(|a| a.oid == ExtensionReq::OID) {
        for value in attribute.values.iter() {
            let requested = ExtensionReq::from_der(&value.to_der()?)?;
            if let Some(names) = requested.0.into_iter().find(|e| e.extn_id == SubjectAltName::OID) {
                // RFC 5280, 4.2.1.6: critical if there is no other name.
                return Ok(Some(Extension { critical: request.info.subject.is_empty(), ..names }));
            }
        }
    }
    Ok(None)
}

/// RFC 5280, 4.1.2.5: two digits of the year up to 2049.
fn time(at: Timestamp) -> x509_cert::der::Result<Time> {
    let since = Duration::from_secs(u64::try_from(at.as_second()).unwrap_or_default());
    match at.to_zoned(jiff::tz::TimeZone::UTC).year() {
        ..=2049 => UtcTime::from_unix_duration(since).map(Time::UtcTime),
        _ => GeneralizedTime::from_unix_duration(since).map(Time::GeneralTime),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints as Constraint, CertificateParams, DnType, IsCa, SanType, SignatureAlgorithm};

    use super::*;

    const NOW: &str = "2026-03-01T12:00:00Z";
    const YEAR: Duration = Duration::from_secs(365 * 86_400);

    /// An authority that ends in `end`, a year.
    fn pair(algorithm: &'static SignatureAlgorithm, end: i32) -> (String, String) {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(Constraint::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, format!("authority until {end}"));
        params.not_after = rcgen::date_time_ymd(end, 1, 1);
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn request(algorithm: &'static SignatureAlgorithm, names: &[&str]) -> CertificateRequest {
        let mut params = CertificateParams::default();
        params.distinguished_name = Default::default();
        params.distinguished_name.push(DnType::CommonName, "jane");
        params.distinguished_name.push(DnType::OrganizationName, "dev");
        // A second organization, which this library writes only under a type of its own.
        params.distinguished_name.push(DnType::CustomDnType(vec![2, 5, 4, 10]), "ops");
        params.subject_alt_names = names
            .iter()
            .map(|n| n.parse().map_or_else(|_| SanType::DnsName((*n).try_into().unwrap()), SanType::IpAddress))
            .collect();
        let key = KeyPair::generate_for(algorithm).unwrap();
        let pem = params.serialize_request(&key).unwrap().pem().unwrap();
        CertificateRequest::from_pem(pem.as_bytes()).unwrap()
    }

    fn usages(list: &[&str]) -> Vec<String> {
        list.iter().map(|u| (*u).to_owned()).collect()
    }

    #[test]
    fn a_certificate_says_what_was_asked_and_no_more() {
        for of_authority in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            for of_request in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
                let (ca, key) = pair(of_authority, 2040);
                let authority = Authority::new(&ca, &key).unwrap();
                let request = request(of_request, &["a.example", "10.0.0.1"]);
                let usages = usages(&["digital signature", "key encipherment", "server auth"]);
                let pem = authority.issue(&request, &usages, None, YEAR, NOW.parse().unwrap()).unwrap();
                let block = pem::parse(&pem).unwrap();
                let (rest, found) = x509_parser::parse_x509_certificate(block.contents()).unwrap();
                assert!(rest.is_empty());
                let ca_block = pem::parse(&ca).unwrap();
                let (_, signer) = x509_parser::parse_x509_certificate(ca_block.contents()).unwrap();
                found.verify_signature(Some(signer.public_key())).unwrap();
                assert_eq!(found.issuer().as_raw(), signer.subject().as_raw());
                assert_eq!(found.subject().to_string(), "CN=jane, O=dev, O=ops");
                let end: Timestamp = NOW.parse::<Timestamp>().unwrap() + YEAR - BACKDATE;
                assert_eq!(found.validity().not_after.timestamp(), end.as_second());
                assert_eq!(found.validity().not_before.to_string(), "Mar  1 11:55:00 2026 +00:00");
                assert!(!found.is_ca());
                let key_usage = found.key_usage().unwrap().unwrap().value;
                assert_eq!((key_usage.flags, key_usage.digital_signature()), (0b101, true));
                let purposes = found.extended_key_usage().unwrap().unwrap().value;
                assert!(purposes.server_auth && !purposes.client_auth && !purposes.any);
                let names = found.subject_alternative_name().unwrap().unwrap();
                assert!(!names.critical);
                assert_eq!(names.value.general_names.len(), 2);
                // The key is that of the request, whatever it was signed with.
                let (_, asked) = {
                    use x509_parser::prelude::FromDer;
                    x509_parser::certification_request::X509CertificationRequest::from_der(&request.der).unwrap()
                };
                assert_eq!(found.public_key().raw, asked.certification_request_info.subject_pki.raw);
            }
        }
    }

    #[test]
    fn how_long_it_lives() {
        let (ca, key) = pair(&rcgen::PKCS_ECDSA_P256_SHA256, 2027);
        let authority = Authority::new(&ca, &key).unwrap();
        let request = request(&rcgen::PKCS_ECDSA_P256_SHA256, &[]);
        let check = |seconds: Option<i32>, longest: u64, expect: &str| {
            let longest = Duration::from_secs(longest);
            let pem = authority.issue(&request, &usages(&["client auth"]), seconds, longest, NOW.parse().unwrap());
            let block = pem::parse(pem.unwrap()).unwrap();
            let (_, found) = x509_parser::parse_x509_certificate(block.contents()).unwrap();
            let end = Timestamp::from_second(found.validity().not_after.timestamp()).unwrap();
            assert_eq!(end.to_string(), expect, "{seconds:?} {longest:?}");
        };
        check(Some(3600), 86_400, "2026-03-01T13:00:00Z");
        check(Some(10), 86_400, "2026-03-01T12:10:00Z");
        check(Some(1_000_000), 86_400, "2026-03-02T11:55:00Z");
        check(None, 86_400, "2026-03-02T11:55:00Z");
        check(None, 365 * 86_400, "2027-01-01T00:00:00Z");
        let late = authority.issue(&request, &[], None, YEAR, "2027-01-01T00:00:00Z".parse().unwrap());
        assert_eq!(late, Err(IssueError::Authority("the signer has expired: NotAfter=2027-01-01T00:00:00Z".into())));
        let unknown = authority.issue(&request, &usages(&["cert sign"]), None, YEAR, NOW.parse().unwrap());
        assert_eq!(unknown, Err(IssueError::Request("unrecognized usage values: [\"cert sign\"]".into())));
    }

    #[test]
    fn one_pair_takes_over_from_another() {
        let (old, old_key) = pair(&rcgen::PKCS_ECDSA_P256_SHA256, 2030);
        let (new, new_key) = pair(&rcgen::PKCS_ECDSA_P256_SHA256, 2040);
        let authority = Authority::new(&old, &old_key).unwrap();
        let issuer = |authority: &Authority| {
            let request = request(&rcgen::PKCS_ECDSA_P256_SHA256, &[]);
            let pem = authority.issue(&request, &usages(&["client auth"]), None, YEAR, NOW.parse().unwrap()).unwrap();
            let block = pem::parse(pem).unwrap();
            x509_parser::parse_x509_certificate(block.contents()).unwrap().1.issuer().to_string()
        };
        assert!(issuer(&authority).ends_with("until 2030"));
        let error = authority.replace(&old, &new_key).unwrap_err();
        assert_eq!(error.to_string(), "none of the 1 certificates of the authority is that of its key");
        let error = authority.replace("", &new_key).unwrap_err();
        assert_eq!(error.to_string(), "none of the 0 certificates of the authority is that of its key");
        let error = authority.replace(&new, "").unwrap_err();
        assert!(error.to_string().starts_with("the key of the authority cannot be read: "), "{error}");
        assert!(issuer(&authority).ends_with("until 2030"));
        authority.replace(&format!("{old}{new}"), &new_key).unwrap();
        assert!(issuer(&authority).ends_with("until 2040"), "the certificate of the key is found in the bundle");
    }
}
