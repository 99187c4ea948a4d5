//! The node's certificates: asked for by a CertificateSigningRequest, kept on disk, renewed before they end
//! (<https://kubernetes.io/docs/reference/access-authn-authz/kubelet-tls-bootstrapping/>).

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
    runtime::{WatchStreamExt as _, watcher::watch_object},
};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use seawall_api::certificate_request::{KUBELET_CLIENT, KUBELET_SERVING};
use seawall_server::{
    auth::NODES,
    pki::{self, Pair},
    tls::ServingCertificate,
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::supervise::component;

/// How long a machine that joins waits for its certificate. It is approved and signed by controllers, in no time if they
/// have a leader.
const JOINING: Duration = Duration::from_secs(30);
/// How long a node waits otherwise: a person may have to approve (upstream's certificate manager: 15 minutes).
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// How long to wait before a request that failed is made again, at first and at last.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key or the request could not be made.
    #[error("the certificate request of {user} cannot be made: {source}")]
    Make {
        /// Whom it is for.
        user: String,
        /// What went wrong.
        #[source]
        source: rcgen::Error,
    },
    /// The API did not take it.
    #[error("the certificate request of {user} was not accepted: {source}")]
    Create {
        /// Whom it is for.
        user: String,
        /// What the API said.
        #[source]
        source: kube::Error,
    },
    /// Somebody said no.
    #[error(
        "the certificate request {name} was denied ({why}): ask who denied it; a request is made again after a restart"
    )]
    Denied {
        /// The request.
        name: String,
        /// What they said.
        why: String,
    },
    /// It was approved but cannot be signed.
    #[error("the certificate request {name} failed ({why}): `kubectl describe csr {name}` says more")]
    Failed {
        /// The request.
        name: String,
        /// What the signer said.
        why: String,
    },
    /// Nobody approved it in time.
    #[error(
        "the certificate request {name} was not approved within {waited:?}: `kubectl describe csr {name}` says why, \
         `kubectl certificate approve {name}` approves it"
    )]
    NotApproved {
        /// The request.
        name: String,
        /// How long it waited.
        waited: Duration,
    },
    /// Nobody signed it in time.
    #[error(
        "the certificate request {name} was approved, but not signed within {waited:?}: are the controllers running on \
         any server?"
    )]
    NotSigned {
        /// The request.
        name: String,
        /// How long it waited.
        waited: Duration,
    },
    /// It is gone.
    #[error("the certificate request {name} was deleted while it was waited for")]
    Deleted {
        /// The request.
        name: String,
    },
    /// What was signed is not what was asked for.
    #[error("the certificate of request {name} cannot be used: {why}")]
    Unusable {
        /// The request.
        name: String,
        /// Why.
        why: String,
    },
}

/// What a node asks for.
struct Wanted {
    signer: &'static str,
    purpose: &'static str,
    user: String,
    names: Vec<SanType>,
}

impl Wanted {
    fn client(node: &str) -> Wanted {
        let user = format!("system:node:{node}");
        Wanted { signer: KUBELET_CLIENT, purpose: "client auth", user, names: Vec::new() }
    }

    fn serving(node: &str, addresses: &[IpAddr]) -> Wanted {
        let names = node.try_into().map(SanType::DnsName).into_iter();
        let names = names.chain(addresses.iter().map(|ip| SanType::IpAddress(*ip))).collect();
        Wanted { signer: KUBELET_SERVING, purpose: "server auth", names, ..Wanted::client(node) }
    }
}

/// Reads a pair, if there is one.
///
/// # Errors
/// If the file is there and cannot be read, or does not hold a certificate and its key.
pub fn read(path: &Path) -> anyhow::Result<Option<Pair>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => anyhow::bail!("{} cannot be read: {error}", path.display()),
    };
    let pair = split(&text);
    if let Err(error) = ServingCertificate::new(&pair) {
        anyhow::bail!("{}: {error}: delete the file, and join again if it is client.pem", path.display());
    }
    Ok(Some(pair))
}

/// The certificates and the key in one text.
fn split(text: &str) -> Pair {
    let (mut pair, mut in_key) = (Pair { certificate: String::new(), key: String::new() }, false);
    for line in text.lines() {
        in_key |= line.starts_with("-----BEGIN ") && line.contains("PRIVATE KEY");
        let part = if in_key { &mut pair.key } else { &mut pair.certificate };
        part.push_str(line);
        part.push('\n');
        in_key &= !line.starts_with("-----END ");
    }
    pair
}

/// Writes a pair into one file, whole or not at all, for us alone.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, pair: &Pair) -> anyhow::Result<()> {
    let text = format!("{}\n{}\n", pair.certificate.trim_end(), pair.key.trim_end());
    Ok(pki::write(path, &text, 0o600)?)
}

/// Whether a pair has ended.
pub fn has_ended(pair: &Pair) -> bool {
    ServingCertificate::new(pair).is_ok_and(|c| c.not_after() <= Timestamp::now())
}

/// When to ask for the next one: at 70 to 90 percent of its life, so that nodes which joined together do not all come
/// at once (upstream's `jitteryDuration`). `share` is where between the two.
fn renewal(not_before: Timestamp, not_after: Timestamp, share: f64) -> Timestamp {
    let life = not_after.as_second().saturating_sub(not_before.as_second());
    let part = (life as f64 * (0.7 + 0.2 * share.clamp(0.0, 1.0))).round() as i64;
    not_before.checked_add(SignedDuration::from_secs(part)).unwrap_or(not_after)
}

/// Asks for a client certificate, to join.
///
/// # Errors
/// If it does not get one soon.
pub async fn request_client(client: &Client, node: &str) -> Result<Pair, Error> {
    request(client, &Wanted::client(node), JOINING).await
}

async fn request(client: &Client, wanted: &Wanted, patience: Duration) -> Result<Pair, Error> {
    let user = || wanted.user.clone();
    let make = |source| Error::Make { user: user(), source };
    let key = KeyPair::generate().map_err(make)?;
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, NODES);
    subject.push(DnType::CommonName, wanted.user.as_str());
    params.distinguished_name = subject;
    params.subject_alt_names = wanted.names.clone();
    let pem = params.serialize_request(&key).and_then(|r| r.pem()).map_err(make)?;
    let csr = CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("csr-".into()), ..Default::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: wanted.signer.into(),
            usages: Some(vec!["digital signature".into(), wanted.purpose.into()]),
            ..Default::default()
        },
        status: None,
    };
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let created = api.create(&PostParams::default(), &csr).await;
    let name = created.map_err(|source| Error::Create { user: user(), source })?.metadata.name.unwrap_or_default();
    let certificate = answer(api, &name, patience).await?;
    let pair = Pair { certificate, key: key.serialize_pem() };
    // It is for our key, and nobody else's.
    ServingCertificate::new(&pair).map_err(|e| Error::Unusable { name, why: e.to_string() })?;
    Ok(pair)
}

/// Waits until a request has been answered.
async fn answer(api: Api<CertificateSigningRequest>, name: &str, patience: Duration) -> Result<String, Error> {
    let mut approved = false;
    let follow = async {
        // Whatever breaks is set up again, until patience ends.
        let mut states = watch_object(api, name).default_backoff().boxed();
        let mut seen = false;
        loop {
            let csr = match states.next().await {
                Some(Ok(Some(csr))) => csr,
                Some(Ok(None)) if seen => return Err(Error::Deleted { name: name.into() }),
                Some(Ok(None)) => continue,
                Some(Err(error)) => {
                    tracing::debug!(request = name, %error, "the watch is set up again");
                    continue;
                }
                None => return Err(Error::Deleted { name: name.into() }),
            };
            seen = true;
            let status = csr.status.unwrap_or_default();
            let said = |ty: &str| {
                let found = status.conditions.iter().flatten().find(|c| c.type_ == ty && c.status == "True");
                found.map(|c| {
                    let text = |t: &Option<String>| t.clone().unwrap_or_default();
                    format!("{}: {}", text(&c.reason), text(&c.message))
                })
            };
            if let Some(why) = said("Denied") {
                return Err(Error::Denied { name: name.into(), why });
            }
            if let Some(why) = said("Failed") {
                return Err(Error::Failed { name: name.into(), why });
            }
            approved |= said("Approved").is_some();
            if let Some(certificate) = status.certificate.filter(|c| !c.0.is_empty()) {
                let pem = String::from_utf8(certificate.0);
                return pem.map_err(|e| Error::Unusable { name: name.into(), why: e.to_string() });
            }
        }
    };
    let (name, waited) = (name.to_owned(), patience);
    match tokio::time::timeout(patience, follow).await {
        Ok(result) => result,
        Err(_) if approved => Err(Error::NotSigned { name, waited }),
        Err(_) => Err(Error::NotApproved { name, waited }),
    }
}

/// Renews the client certificate in `path` before it ends, and when another of the `authorities` signs now, and hands each
/// new one to `use_it`.
pub fn keep_client(
    node: &str,
    path: &Path,
    client: Client,
    authorities: watch::Receiver<String>,
    stop: CancellationToken,
    use_it: impl Fn(&Pair) -> anyhow::Result<()> + Send + Sync + 'static,
) -> JoinHandle<()> {
    keep("client-certificate", Wanted::client(node), path, client, authorities, stop, use_it)
}

/// Shows `certificate` what the node serves with: what is in `path`, and whatever replaces it, which is asked for when
/// there is none, when it belongs to other addresses, before it ends, and when another of the `authorities` signs now.
pub fn keep_serving(
    node: &str,
    addresses: &[IpAddr],
    path: &Path,
    client: Client,
    authorities: watch::Receiver<String>,
    certificate: Arc<ServingCertificate>,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let wanted = Wanted::serving(node, addresses);
    keep("serving-certificate", wanted, path, client, authorities, stop, move |pair| Ok(certificate.replace(pair)?))
}

fn keep(
    part: &'static str,
    wanted: Wanted,
    path: &Path,
    client: Client,
    authorities: watch::Receiver<String>,
    stop: CancellationToken,
    use_it: impl Fn(&Pair) -> anyhow::Result<()> + Send + Sync + 'static,
) -> JoinHandle<()> {
    let shared = Arc::new((wanted, path.to_path_buf(), use_it));
    component(part, stop, move |stop| {
        let (shared, client, authorities) = (shared.clone(), client.clone(), authorities.clone());
        async move {
            let (wanted, path, use_it) = &*shared;
            stop.run_until_cancelled(renew(wanted, path, &client, authorities, use_it)).await.unwrap_or(Ok(()))
        }
    })
}

/// Never returns without an error.
async fn renew(
    wanted: &Wanted,
    path: &Path,
    client: &Client,
    mut authorities: watch::Receiver<String>,
    use_it: &(impl Fn(&Pair) -> anyhow::Result<()> + Send + Sync),
) -> anyhow::Result<()> {
    let mut due = Timestamp::now();
    let mut shown = read(path)?.filter(|pair| has_names(pair, wanted));
    if let Some(pair) = &shown {
        use_it(pair)?;
        due = next(pair)?;
    }
    let mut pause = FIRST_PAUSE;
    loop {
        // In small steps: the clock may be set, and a machine may sleep.
        while let Some(left) = Duration::try_from(due.duration_since(Timestamp::now())).ok().filter(|l| !l.is_zero()) {
            if shown.as_ref().is_some_and(|pair| !is_of_signer(pair, &authorities.borrow_and_update())) {
                break;
            }
            let other_authorities = async {
                if authorities.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = tokio::time::sleep(left.min(LONGEST_PAUSE)) => {}
                () = other_authorities => {}
            }
        }
        match request(client, wanted, PATIENCE).await {
            Ok(pair) => {
                write(path, &pair)?;
                use_it(&pair)?;
                due = next(&pair)?;
                tracing::info!(signer = wanted.signer, renewal = %due, "the node has a new certificate");
                // Who signed it may not know yet of the authority that takes over.
                let good = is_of_signer(&pair, &authorities.borrow());
                match good {
                    true => pause = FIRST_PAUSE,
                    false => {
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
                shown = Some(pair);
            }
            Err(error) => {
                tracing::warn!(
                    signer = wanted.signer,
                    "the node has no new certificate yet: {:#}",
                    anyhow::Error::new(error)
                );
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

fn next(pair: &Pair) -> anyhow::Result<Timestamp> {
    let certificate = ServingCertificate::new(pair)?;
    Ok(renewal(certificate.not_before(), certificate.not_after(), rand::random()))
}

/// Whether a certificate was issued by the authority that signs now, the first of those that are trusted.
fn is_of_signer(pair: &Pair, authorities: &str) -> bool {
    // When there is nothing to compare with, there is nothing to renew for.
    seawall_server::tls::is_issued_by(&pair.certificate, authorities).unwrap_or(true)
}

/// Whether a certificate has the names that are wanted: the machine may have got another address since.
fn has_names(pair: &Pair, wanted: &Wanted) -> bool {
    let Ok(names) = seawall_server::tls::names(&pair.certificate) else { return false };
    wanted.names.iter().all(|san| match san {
        SanType::DnsName(name) => names.iter().any(|n| n == name.as_str()),
        SanType::IpAddress(ip) => names.iter().any(|n| *n == ip.to_string()),
        _ => false,
    })
}

#[cfg(test)]
#[path = "csr_tests.rs"]
mod tests;
