//! TLS whose certificates can be exchanged while connections live.
//!
//! A handshake takes what is current; connections that are open keep what they were made with. So a certificate is
//! renewed, an address added to it, or an authority rotated, without anyone being cut off.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use arc_swap::{ArcSwap, ArcSwapOption};
use jiff::Timestamp;
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, ring},
    server::{
        ClientHello, ResolvesServerCert, ServerSessionMemoryCache, StoresServerSessions, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject};
use x509_parser::extensions::GeneralName;

use crate::pki::Pair;

/// How many sessions are remembered for resumption.
const SESSIONS: usize = 1024;

/// What is wrong with a certificate, a key, or a bundle of authorities.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It is not PEM, or not what it should be.
    #[error("{what} is not valid PEM: {source}")]
    Pem {
        /// Which one.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// There is none.
    #[error("{what} holds no certificate")]
    Empty {
        /// Which one.
        what: &'static str,
    },
    /// It cannot be used.
    #[error("{what} cannot be used: {reason}")]
    Unusable {
        /// Which one.
        what: &'static str,
        /// Why.
        reason: String,
    },
}

impl TlsError {
    fn unusable(what: &'static str, reason: impl fmt::Display) -> TlsError {
        TlsError::Unusable { what, reason: reason.to_string() }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(pem: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let list = list.map_err(|source| TlsError::Pem { what, source })?;
    if list.is_empty() { Err(TlsError::Empty { what }) } else { Ok(list) }
}

/// When the first certificate of a PEM file ends.
pub fn not_after(pem: &str) -> Result<Timestamp, TlsError> {
    validity(&certificates(pem, "the certificate")?[0], "the certificate").map(|(_, end)| end)
}

/// How long a certificate is still valid; no time if it has ended.
pub fn life(der: &CertificateDer<'_>, now: Timestamp) -> Result<Duration, TlsError> {
    let (_, end) = validity(der, "the certificate")?;
    Ok(Duration::try_from(end.duration_since(now)).unwrap_or_default())
}

/// The certificates of a bundle, each in a PEM of its own.
pub fn split_bundle(bundle: &str) -> Result<Vec<String>, TlsError> {
    let list = certificates(bundle, "the certificate authorities")?;
    Ok(list.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()))).collect())
}

/// Whether the first certificate of `pem` says that the first one of `authority` signed it.
pub fn is_issued_by(pem: &str, authority: &str) -> Result<bool, TlsError> {
    const WHAT: &str = "the certificate";
    let (leaf, authority) = (certificates(pem, WHAT)?, certificates(authority, WHAT)?);
    let (_, leaf) = x509_parser::parse_x509_certificate(&leaf[0]).map_err(|e| TlsError::unusable(WHAT, e))?;
    let (_, authority) = x509_parser::parse_x509_certificate(&authority[0]).map_err(|e| TlsError::unusable(WHAT, e))?;
    Ok(leaf.issuer().as_raw() == authority.subject().as_raw())
}

/// The alternative names of the first certificate of a PEM file: hosts and addresses.
pub fn names(pem: &str) -> Result<Vec<String>, TlsError> {
    const WHAT: &str = "the certificate";
    let list = certificates(pem, WHAT)?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&list[0]).map_err(|e| TlsError::unusable(WHAT, e))?;
    let found = parsed.subject_alternative_name().map_err(|e| TlsError::unusable(WHAT, e))?;
    let found = found.iter().flat_map(|extension| &extension.value.general_names);
    Ok(found
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => {
                let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)).ok().map(|ip| ip.to_string())
            }
            _ => None,
        })
        .collect())
}

/// When a certificate begins and ends to be valid.
fn validity(der: &CertificateDer<'_>, what: &'static str) -> Result<(Timestamp, Timestamp), TlsError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|e| TlsError::unusable(what, e))?;
    let at = |time: x509_parser::time::ASN1Time| {
        Timestamp::from_second(time.timestamp()).map_err(|e| TlsError::unusable(what, e))
    };
    Ok((at(parsed.validity().not_before)?, at(parsed.validity().not_after)?))
}

struct Serving {
    key: Arc<CertifiedKey>,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl Serving {
    fn new(pair: &Pair) -> Result<Serving, TlsError> {
        const WHAT: &str = "the serving certificate";
        let chain = certificates(&pair.certificate, WHAT)?;
        let (not_before, not_after) = validity(&chain[0], WHAT)?;
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes())
            .map_err(|source| TlsError::Pem { what: "the serving key", source })?;
        // Refused if the key is that of another certificate.
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|e| TlsError::unusable(WHAT, e))?;
        Ok(Serving { key: Arc::new(key), not_before, not_after })
    }
}

/// The certificate that a server shows.
pub struct ServingCertificate(ArcSwapOption<Serving>);

impl ServingCertificate {
    /// Begins with this one.
    pub fn new(pair: &Pair) -> Result<Arc<ServingCertificate>, TlsError> {
        Ok(Arc::new(ServingCertificate(ArcSwapOption::from_pointee(Serving::new(pair)?))))
    }

    /// Begins without one: handshakes fail until it is there.
    pub fn pending() -> Arc<ServingCertificate> {
        Arc::new(ServingCertificate(ArcSwapOption::empty()))
    }

    /// From now on handshakes get this one. If it cannot be used, the one before stays.
    pub fn replace(&self, pair: &Pair) -> Result<(), TlsError> {
        self.0.store(Some(Arc::new(Serving::new(pair)?)));
        Ok(())
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.0.load().is_some()
    }

    /// When the current one begins to be valid; long ago if there is none.
    pub fn not_before(&self) -> Timestamp {
        self.0.load().as_ref().map_or(Timestamp::UNIX_EPOCH, |c| c.not_before)
    }

    /// When the current one ends; long ago if there is none.
    pub fn not_after(&self) -> Timestamp {
        self.0.load().as_ref().map_or(Timestamp::UNIX_EPOCH, |c| c.not_after)
    }
}

impl fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServingCertificate").field("not_after", &self.not_after()).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load().as_ref().map(|c| c.key.clone())
    }
}

#[derive(Debug)]
struct Trust {
    verifier: Arc<dyn ClientCertVerifier>,
    /// A resumed session is not verified again, so sessions end with the trust they were made under.
    sessions: Arc<ServerSessionMemoryCache>,
}

impl Trust {
    fn new(bundle: &str) -> Result<Trust, TlsError> {
        const WHAT: &str = "the certificate authority of clients";
        let mut roots = RootCertStore::empty();
        for der in certificates(bundle, WHAT)? {
            roots.add(der).map_err(|e| TlsError::unusable(WHAT, e))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .allow_unauthenticated()
            .build()
            .map_err(|e| TlsError::unusable(WHAT, e))?;
        Ok(Trust { verifier, sessions: ServerSessionMemoryCache::new(SESSIONS) })
    }
}

/// Who may sign the certificates of clients: one authority, or several while one takes over from another. A client
/// without a certificate is let in as nobody; one with a certificate of somebody else's is not let in.
#[derive(Debug)]
pub struct ClientAuthorities {
    current: ArcSwap<Trust>,
    /// Any client certificate is checked against what is current, but what schemes there are does not change.
    schemes: Vec<SignatureScheme>,
}

impl ClientAuthorities {
    /// Begins with the authorities of a PEM bundle.
    pub fn new(bundle: &str) -> Result<Arc<ClientAuthorities>, TlsError> {
        let trust = Trust::new(bundle)?;
        let schemes = trust.verifier.supported_verify_schemes();
        Ok(Arc::new(ClientAuthorities { current: ArcSwap::from_pointee(trust), schemes }))
    }

    /// From now on handshakes go by this bundle. If it cannot be used, the one before stays.
    pub fn replace(&self, bundle: &str) -> Result<(), TlsError> {
        self.current.store(Arc::new(Trust::new(bundle)?));
        Ok(())
    }
}

impl ClientCertVerifier for ClientAuthorities {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// No hints: they would be borrowed from a bundle that may be exchanged. A client with one certificate sends it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.current.load().verifier.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current.load().verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current.load().verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

/// The sessions of the current trust.
#[derive(Debug)]
struct Sessions(Arc<ClientAuthorities>);

impl StoresServerSessions for Sessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.0.current.load().sessions.put(key, value)
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.current.load().sessions.get(key)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.current.load().sessions.take(key)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// The configuration of a server that shows `certificate` and knows clients by `authorities`; both may be exchanged
/// later. `protocols` is what ALPN offers, in order: `h2` and `http/1.1`, or the latter alone where connections are
/// upgraded.
pub fn server_config(
    certificate: Arc<ServingCertificate>,
    authorities: Arc<ClientAuthorities>,
    protocols: &[&str],
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| TlsError::unusable("TLS", e))?
        .with_client_cert_verifier(authorities.clone())
        .with_cert_resolver(certificate);
    config.session_storage = Arc::new(Sessions(authorities));
    config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
    Ok(config)
}
