//! Requests for certificates (PKCS#10), as they stand in `spec.request` of a CertificateSigningRequest.

use std::{collections::BTreeSet, net::IpAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME,
    prelude::FromDer,
};

/// The signer of the certificates with which nodes are clients of the API.
pub const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// The signer of the certificates with which nodes serve their own API.
pub const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
/// The signer of the certificates of other clients of the API.
pub const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
/// A signer of old, which nobody may ask any more.
pub const LEGACY_UNKNOWN: &str = "kubernetes.io/legacy-unknown";

/// The group of nodes, and what their names as users start with.
const NODES: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateRequest {
    /// The name of the one who is to have the certificate.
    pub common_name: String,
    /// Their groups.
    pub organizations: Vec<String>,
    /// Alternative names: of hosts,
    pub dns_names: Vec<String>,
    /// addresses,
    pub addresses: Vec<IpAddr>,
    /// mailboxes,
    pub emails: Vec<String>,
    /// and identifiers.
    pub uris: Vec<String>,
    /// How many alternative names there are of other sorts.
    pub others: usize,
    /// The public key that it is for (a SubjectPublicKeyInfo in DER).
    pub key: Vec<u8>,
    /// The request as it was signed.
    pub der: Vec<u8>,
}

/// A request that cannot be read, or was not signed with the key that it is for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not base64, or not PEM, or PEM of something else. Upstream's words.
    #[error("PEM block type must be CERTIFICATE REQUEST")]
    Pem,
    /// Not a request.
    #[error("the certificate request cannot be parsed: {0}")]
    Der(String),
    /// Signed with another key.
    #[error("the signature of the certificate request is not valid: {0}")]
    Signature(String),
}

impl CertificateRequest {
    /// Reads `spec.request`, and verifies that who made it has the key.
    pub fn from_base64(text: &str) -> Result<CertificateRequest, Malformed> {
        Self::from_pem(&STANDARD.decode(text).map_err(|_| Malformed::Pem)?)
    }

    /// Reads a request in PEM, and verifies that who made it has the key.
    pub fn from_pem(pem: &[u8]) -> Result<CertificateRequest, Malformed> {
        let block = pem::parse(pem).map_err(|_| Malformed::Pem)?;
        if block.tag() != "CERTIFICATE REQUEST" {
            return Err(Malformed::Pem);
        }
        Self::from_der(block.into_contents())
    }

    /// Reads a request in DER, and verifies that who made it has the key.
    pub fn from_der(der: Vec<u8>) -> Result<CertificateRequest, Malformed> {
        let bad = |e: &dyn std::fmt::Display| Malformed::Der(e.to_string());
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|e| bad(&e))?;
        if !rest.is_empty() {
            return Err(bad(&"something follows it"));
        }
        request.verify_signature().map_err(|e| Malformed::Signature(e.to_string()))?;
        let subject = &request.certification_request_info.subject;
        let text = |value: &x509_parser::x509::AttributeTypeAndValue<'_>| value.as_str().map(str::to_owned);
        let mut found = CertificateRequest {
            // The last one counts, as in Go's library, by which upstream's checks go.
            common_name: match subject.iter_common_name().last() {
                Some(name) => text(name).map_err(|e| bad(&e))?,
                None => String::new(),
            },
            organizations: subject.iter_organization().map(text).collect::<Result<_, _>>().map_err(|e| bad(&e))?,
            key: request.certification_request_info.subject_pki.raw.to_vec(),
            ..Default::default()
        };
        // Two lists of names would be read as one by some and as the other by others.
        let mut lists = 0;
        for attribute in request.certification_request_info.iter_attributes() {
            let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() else { continue };
            for extension in &requested.extensions {
                match extension.parsed_extension() {
                    ParsedExtension::SubjectAlternativeName(names) => {
                        lists += 1;
                        found.take(&names.general_names)?;
                    }
                    _ if extension.oid == OID_X509_EXT_SUBJECT_ALT_NAME => {
                        return Err(bad(&"the alternative names cannot be read"));
                    }
                    _ => {}
                }
            }
        }
        if lists > 1 {
            return Err(bad(&"there is more than one list of alternative names"));
        }
        found.der = der;
        Ok(found)
    }

    fn take(&mut self, names: &[GeneralName<'_>]) -> Result<(), Malformed> {
        for name in names {
            match name {
                GeneralName::DNSName(name) => self.dns_names.push((*name).to_owned()),
                GeneralName::RFC822Name(name) => self.emails.push((*name).to_owned()),
                GeneralName::URI(name) => self.uris.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                    let address = four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
                    let wrong = |_| Malformed::Der(format!("an IP address of {} bytes", bytes.len()));
                    self.addresses.push(address.map_err(wrong)?);
                }
                _ => self.others += 1,
            }
        }
        Ok(())
    }

    /// The node that it is for, if it has a node's name.
    pub fn node(&self) -> Option<&str> {
        self.common_name.strip_prefix(NODE_PREFIX)
    }

    /// Whether the signer that is named may sign it, for these usages. `None` if the signer is not one of the cluster's.
    /// The words are upstream's
    /// (<https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/#kubernetes-signers>).
    pub fn check(&self, signer: &str, usages: &[String]) -> Option<Result<(), String>> {
        match signer {
            KUBELET_CLIENT => Some(self.check_kubelet_client(usages)),
            KUBELET_SERVING => Some(self.check_kubelet_serving(usages)),
            CLIENT => Some(check_client_usages(usages).and_then(|()| self.no_other_names())),
            _ => None,
        }
    }

    fn check_kubelet_client(&self, usages: &[String]) -> Result<(), String> {
        self.check_organization()?;
        for (any, what) in [
            (!self.dns_names.is_empty(), "DNS"),
            (!self.emails.is_empty(), "email"),
            (!self.addresses.is_empty(), "IP"),
            (!self.uris.is_empty(), "URI"),
        ] {
            if any {
                return Err(format!("{what} subjectAltNames are not allowed"));
            }
        }
        self.no_other_names()?;
        check_usages(usages, "client auth")?;
        self.check_node()
    }

    fn check_kubelet_serving(&self, usages: &[String]) -> Result<(), String> {
        self.check_organization()?;
        if self.dns_names.is_empty() && self.addresses.is_empty() {
            return Err("DNS or IP subjectAltName is required".into());
        }
        for (any, what) in [(!self.emails.is_empty(), "email"), (!self.uris.is_empty(), "URI")] {
            if any {
                return Err(format!("{what} subjectAltNames are not allowed"));
            }
        }
        self.no_other_names()?;
        check_usages(usages, "server auth")?;
        self.check_node()
    }

    fn check_organization(&self) -> Result<(), String> {
        if self.organizations != [NODES] {
            return Err("subject organization is not system:nodes".into());
        }
        Ok(())
    }

    fn check_node(&self) -> Result<(), String> {
        if self.node().is_none() {
            return Err("subject common name does not begin with system:node:".into());
        }
        Ok(())
    }

    /// The name in a certificate is carried over byte by byte, so nothing may be in it that was not looked at.
    fn no_other_names(&self) -> Result<(), String> {
        if self.others > 0 {
            return Err("subjectAltNames other than DNS, IP, email and URI are not allowed".into());
        }
        Ok(())
    }
}

/// Exactly these usages, the encipherment of keys being only for RSA.
fn check_usages(usages: &[String], purpose: &str) -> Result<(), String> {
    let given: BTreeSet<&str> = usages.iter().map(String::as_str).collect();
    let mut wanted = BTreeSet::from(["digital signature", purpose]);
    if given == wanted {
        return Ok(());
    }
    wanted.insert("key encipherment");
    if given == wanted {
        return Ok(());
    }
    let list: Vec<&str> = wanted.into_iter().collect();
    Err(format!("usages did not match [{}]", list.join(" ")))
}

fn check_client_usages(usages: &[String]) -> Result<(), String> {
    for usage in usages {
        if !matches!(usage.as_str(), "digital signature" | "key encipherment" | "client auth") {
            return Err(format!("invalid usage for client certificate: {usage}"));
        }
    }
    match usages.iter().any(|u| u == "client auth") {
        true => Ok(()),
        false => Err("missing required usage for client certificate: client auth".into()),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn request(name: &str, organization: &str, sans: &[SanType]) -> CertificateRequest {
        let mut params = CertificateParams::default();
        let mut subject = DistinguishedName::new();
        subject.push(DnType::CommonName, name);
        if !organization.is_empty() {
            subject.push(DnType::OrganizationName, organization);
        }
        params.distinguished_name = subject;
        params.subject_alt_names = sans.to_vec();
        let pem = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        CertificateRequest::from_base64(&STANDARD.encode(pem)).unwrap()
    }

    fn dns(name: &str) -> SanType {
        SanType::DnsName(name.try_into().unwrap())
    }

    fn ip(text: &str) -> SanType {
        SanType::IpAddress(text.parse().unwrap())
    }

    #[test]
    fn what_is_asked_for() {
        let found = request("system:node:a", NODES, &[dns("a"), ip("10.0.0.1"), ip("fd00::1")]);
        assert_eq!(found.node(), Some("a"));
        assert_eq!(found.organizations, [NODES]);
        assert_eq!(found.dns_names, ["a"]);
        assert_eq!(found.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert!(!found.der.is_empty());
    }

    #[test]
    fn what_is_no_request() {
        let key = KeyPair::generate().unwrap();
        let good = CertificateParams::default().serialize_request(&key).unwrap();
        let certificate = CertificateParams::default().self_signed(&key).unwrap();
        let mut forged = good.der().to_vec();
        *forged.last_mut().unwrap() ^= 1;
        let pem = |tag: &str, der: &[u8]| pem::encode(&pem::Pem::new(tag, der));
        let check = |pem: &str, expect: &str| {
            let error = CertificateRequest::from_pem(pem.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expect), "{error}");
        };
        check("", "PEM block type must be CERTIFICATE REQUEST");
        check(&certificate.pem(), "PEM block type must be CERTIFICATE REQUEST");
        check(&pem("CERTIFICATE REQUEST", certificate.der()), "the certificate request cannot be parsed: ");
        check(
            &pem("CERTIFICATE REQUEST", &[good.der(), &[0u8][..]].concat()),
            "the certificate request cannot be parsed: ",
        );
        check(&pem("CERTIFICATE REQUEST", &forged), "the signature of the certificate request is not valid: ");
        assert_eq!(CertificateRequest::from_base64("%"), Err(Malformed::Pem));
    }

    #[test]
    fn who_signs_what() {
        let check = |signer: &str, request: &CertificateRequest, usages: &[&str], expect: Option<Result<(), &str>>| {
            let usages: Vec<String> = usages.iter().map(|u| (*u).to_owned()).collect();
            let expect = expect.map(|r| r.map_err(str::to_owned));
            assert_eq!(request.check(signer, &usages), expect, "{signer} {request:?} {usages:?}");
        };
        const CLIENT_USAGES: &[&str] = &["digital signature", "client auth"];
        const SERVER_USAGES: &[&str] = &["key encipherment", "digital signature", "server auth"];
        let node = request("system:node:a", NODES, &[]);
        let serving = request("system:node:a", NODES, &[dns("a"), ip("10.0.0.1")]);
        check(KUBELET_CLIENT, &node, CLIENT_USAGES, Some(Ok(())));
        check(KUBELET_CLIENT, &node, &["digital signature", "key encipherment", "client auth"], Some(Ok(())));
        check(
            KUBELET_CLIENT,
            &node,
            SERVER_USAGES,
            Some(Err("usages did not match [client auth digital signature key encipherment]")),
        );
        check(KUBELET_CLIENT, &serving, CLIENT_USAGES, Some(Err("DNS subjectAltNames are not allowed")));
        let with_ip = request("system:node:a", NODES, &[ip("10.0.0.1")]);
        check(KUBELET_CLIENT, &with_ip, CLIENT_USAGES, Some(Err("IP subjectAltNames are not allowed")));
        let other = request("system:node:a", "system:masters", &[]);
        check(KUBELET_CLIENT, &other, CLIENT_USAGES, Some(Err("subject organization is not system:nodes")));
        let unnamed = request("a", NODES, &[]);
        let expect = "subject common name does not begin with system:node:";
        check(KUBELET_CLIENT, &unnamed, CLIENT_USAGES, Some(Err(expect)));

        check(KUBELET_SERVING, &serving, SERVER_USAGES, Some(Ok(())));
        check(KUBELET_SERVING, &serving, &["digital signature", "server auth"], Some(Ok(())));
        check(KUBELET_SERVING, &node, SERVER_USAGES, Some(Err("DNS or IP subjectAltName is required")));
        check(
            KUBELET_SERVING,
            &serving,
            CLIENT_USAGES,
            Some(Err("usages did not match [digital signature key encipherment server auth]")),
        );
        let mail = request("system:node:a", NODES, &[dns("a"), SanType::Rfc822Name("a@b".try_into().unwrap())]);
        check(KUBELET_SERVING, &mail, SERVER_USAGES, Some(Err("email subjectAltNames are not allowed")));
        let uri = request("system:node:a", NODES, &[dns("a"), SanType::URI("spiffe://a".try_into().unwrap())]);
        check(KUBELET_SERVING, &uri, SERVER_USAGES, Some(Err("URI subjectAltNames are not allowed")));

        let anyone = request("jane", "dev", &[]);
        check(CLIENT, &anyone, &["client auth"], Some(Ok(())));
        check(CLIENT, &anyone, SERVER_USAGES, Some(Err("invalid usage for client certificate: server auth")));
        let expect = "missing required usage for client certificate: client auth";
        check(CLIENT, &anyone, &["digital signature"], Some(Err(expect)));
        check(LEGACY_UNKNOWN, &anyone, &["client auth"], None);
        check("example.com/own", &anyone, &["client auth"], None);
    }
}
