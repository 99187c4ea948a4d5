//! The cluster's certificate authority, and what it signs
//! (<https://kubernetes.io/docs/setup/best-practices/certificates/>).

use std::{net::IpAddr, path::Path};

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};

/// How long the authority is valid, in days.
const CA_DAYS: i64 = 3650;
/// How long a certificate is valid, in days. They are made anew at every start.
const LEAF_DAYS: i64 = 365;

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// A key or certificate is malformed.
    #[error("{what}: {source}")]
    Certificate {
        /// What was made or read.
        what: String,
        /// What happened.
        #[source]
        source: rcgen::Error,
    },
    /// A name that cannot stand in a certificate.
    #[error("the name {0:?} cannot stand in a certificate: use a DNS name or an IP address")]
    Name(String),
}

/// A certificate and its key, in PEM.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The certificate, followed by those that signed it.
    pub certificate: String,
    /// The key.
    pub key: String,
}

/// The authority.
pub struct Authority {
    /// Its certificate in PEM.
    pub pem: String,
    key: KeyPair,
    /// What follows every certificate it signs, in PEM.
    chain: String,
}

fn bad(what: &str) -> impl Fn(rcgen::Error) -> PkiError + '_ {
    move |source| PkiError::Certificate { what: what.to_owned(), source }
}

impl Authority {
    /// Reads the authority in `dir`, which has to be there.
    pub fn open_existing(dir: &Path) -> Result<Authority, PkiError> {
        let pem = read(&dir.join("ca.crt"))?;
        Authority::from_pem(&pem, &read(&dir.join("ca.key"))?)
    }

    /// Reads a certificate and its key.
    pub fn from_pem(pem: &str, key: &str) -> Result<Authority, PkiError> {
        let key = KeyPair::from_pem(key).map_err(bad("ca.key"))?;
        Ok(Authority { pem: pem.to_owned(), key, chain: String::new() })
    }

    /// Makes one of this name.
    pub fn generate(name: &str) -> Result<Authority, PkiError> {
        let key = KeyPair::generate().map_err(bad("the key of the authority"))?;
        let pem = authority_params(name).self_signed(&key).map_err(bad("the authority"))?.pem();
        Ok(Authority { pem, key, chain: String::new() })
    }

    /// Vouches for another authority of this name: a certificate of its key, with which those who trust only this
    /// authority trust what the other one signs.
    pub fn vouch_for(&self, other: &Authority, name: &str) -> Result<String, PkiError> {
        let issuer = Issuer::from_ca_cert_pem(&self.pem, &self.key).map_err(bad("ca.crt"))?;
        let certificate = authority_params(name).signed_by(&other.key, &issuer).map_err(bad("the authority"))?;
        Ok(certificate.pem())
    }

    /// Adds certificates that follow each one it signs.
    pub fn with_chain(self, chain: &str) -> Authority {
        Authority { chain: chain.to_owned(), ..self }
    }

    /// Reads the authority in `dir` (`ca.crt`, `ca.key`), or makes one.
    pub fn open(dir: &Path) -> Result<Authority, PkiError> {
        let (certificate, key) = (dir.join("ca.crt"), dir.join("ca.key"));
        if certificate.exists() && key.exists() {
            return Authority::open_existing(dir);
        }
        let authority = Authority::generate("seawall-ca")?;
        std::fs::create_dir_all(dir).map_err(|source| PkiError::Io { path: dir.display().to_string(), source })?;
        // The key first: a certificate without its key would be kept for good.
        write(&key, &authority.key_pem(), 0o600)?;
        write(&certificate, &authority.pem, 0o644)?;
        Ok(authority)
    }

    /// Its key in PEM.
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    fn sign(&self, params: CertificateParams, what: &str) -> Result<Pair, PkiError> {
        let key = KeyPair::generate().map_err(bad(what))?;
        let issuer = Issuer::from_ca_cert_pem(&self.pem, &self.key).map_err(bad("ca.crt"))?;
        let certificate = params.signed_by(&key, &issuer).map_err(bad(what))?;
        Ok(Pair { certificate: certificate.pem() + &self.chain, key: key.serialize_pem() })
    }

    /// A certificate that proves who its bearer is: a user name and a group
    /// (none if it is empty).
    pub fn client(&self, name: &str, group: &str) -> Result<Pair, PkiError> {
        let mut params = params(name, group, LEAF_DAYS);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, name)
    }

    /// A certificate of a server that is reached under these names and addresses. It is
    /// also that of a client, of this name and group.
    pub fn server(&self, name: &str, group: &str, names: &[String], addresses: &[IpAddr]) -> Result<Pair, PkiError> {
        let mut params = params(name, group, LEAF_DAYS);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        for name in names {
            let text = name.as_str().try_into().map_err(|_| PkiError::Name(name.clone()))?;
            params.subject_alt_names.push(SanType::DnsName(text));
        }
        params.subject_alt_names.extend(addresses.iter().map(|ip| SanType::IpAddress(*ip)));
        self.sign(params, name)
    }
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = params(name, "", CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn params(name: &str, group: &str, days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    if !group.is_empty() {
        subject.push(DnType::OrganizationName, group);
    }
    params.distinguished_name = subject;
    let now = Timestamp::now();
    let date = |t: Timestamp| {
        let date = t.to_zoned(jiff::tz::TimeZone::UTC).date();
        rcgen::date_time_ymd(i32::from(date.year()), date.month() as u8, date.day() as u8)
    };
    // A clock that is a little behind still accepts it.
    params.not_before = date(now.checked_sub(SignedDuration::from_hours(48)).unwrap_or(now));
    params.not_after = date(now.checked_add(SignedDuration::from_hours(24 * days)).unwrap_or(now));
    params.serial_number = Some(SerialNumber::from(uuid::Uuid::new_v4().as_bytes().to_vec()));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params
}

/// Reads the key that signs tokens (`service-account.key`, its public part `service-account.pub`), or makes one.
pub fn service_account_key(dir: &Path) -> Result<(String, String), PkiError> {
    let (private, public) = (dir.join("service-account.key"), dir.join("service-account.pub"));
    if private.exists() {
        let pem = read(&private)?;
        let pair = KeyPair::from_pem(&pem).map_err(bad("service-account.key"))?;
        return Ok((pem, pair.public_key_pem()));
    }
    let pair = KeyPair::generate().map_err(bad("the key of service accounts"))?;
    write(&private, &pair.serialize_pem(), 0o600)?;
    write(&public, &pair.public_key_pem(), 0o644)?;
    Ok((pair.serialize_pem(), pair.public_key_pem()))
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|source| PkiError::Io { path: path.display().to_string(), source })
}

/// Writes a file whole or not at all, readable as `mode` says.
pub fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let io = |source| PkiError::Io { path: path.display().to_string(), source };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(io)?;
    }
    let temporary = path.with_extension("new");
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary).map_err(io)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
    std::fs::rename(&temporary, path).map_err(io)
}
