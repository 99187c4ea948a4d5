//! The agent's own HTTPS API, which the API server forwards logs, exec, attach and port-forward to, and which others read
//! that may ([`access`]).

pub mod access;
pub mod exec;
pub mod logs;
pub mod portforward;
pub mod spdy;
pub mod ws;

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use self::access::Access;
use crate::{Agent, NodeConfig, pod, stats};

/// What handlers answer with.
pub type Body = BoxBody<Bytes, std::io::Error>;

/// A whole body.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// An error as plain text, as upstream's kubelet answers.
pub fn refuse(code: StatusCode, message: impl Into<String>) -> Response<Body> {
    let mut response = Response::new(full(message.into()));
    *response.status_mut() = code;
    response
}

fn tls(config: &NodeConfig) -> anyhow::Result<ServerConfig> {
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(config.client_ca_pem.as_bytes()) {
        roots.add(cert.context("client_ca_pem")?).context("client_ca_pem")?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .context("client_ca_pem")?;
    let chain = CertificateDer::pem_slice_iter(config.serving_cert_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .context("serving_cert_pem")?;
    let key = PrivateKeyDer::from_pem_slice(config.serving_key_pem.as_bytes()).context("serving_key_pem")?;
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .context("the serving certificate and its key")?;
    // Upgrades need HTTP/1.1.
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

/// How many connections wait to be taken.
const BACKLOG: u32 = 1024;

/// Takes the port, at each address of the node.
///
/// # Errors
/// If it is in use, most likely by another node agent.
pub fn bind(config: &NodeConfig) -> anyhow::Result<Vec<TcpListener>> {
    let bind = |ip: &IpAddr| {
        let address = SocketAddr::new(*ip, config.port);
        listen(address).with_context(|| {
            format!(
                "the node agent cannot listen on {address}: if another one runs on this machine, stop it, or run this \
                 server with --disable agent,proxy; for another port give --agent-port"
            )
        })
    };
    config.node_ips.iter().map(bind).collect()
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        // While the machine boots it may not be settled yet that nobody else has the address (DAD).
        setsockopt(&socket, sockopt::IpFreebind, &true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Takes the next connection of any of these.
async fn accept(listeners: &[TcpListener]) -> std::io::Result<TcpStream> {
    let all = listeners.iter().map(|listener| Box::pin(listener.accept()));
    let (accepted, ..) = futures::future::select_all(all).await;
    accepted.map(|(stream, _)| stream)
}

/// Serves until shutdown.
pub async fn run(agent: Arc<Agent>, listeners: Vec<TcpListener>, shutdown: CancellationToken) -> anyhow::Result<()> {
    let acceptor = TlsAcceptor::from(match &agent.config.tls {
        Some(tls) => Arc::clone(tls),
        None => Arc::new(tls(&agent.config)?),
    });
    let config = &agent.config;
    let access = Arc::new(Access::new(agent.client.clone(), config.node_name.clone(), config.api_users.clone()));
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listeners), if connections.len() < 1000 => match accepted {
                Ok(stream) => stream,
                // Out of files, most likely: do not spin.
                Err(error) => {
                    tracing::warn!("accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let _ = stream.set_nodelay(true);
        let (agent, acceptor, access) = (Arc::clone(&agent), acceptor.clone(), Arc::clone(&access));
        connections.spawn(async move {
            let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream)).await else {
                return;
            };
            let peer = stream.get_ref().1.peer_certificates().and_then(|c| c.first());
            let certificate = peer.map(|certificate| certificate.to_vec());
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let (agent, access, certificate) = (Arc::clone(&agent), Arc::clone(&access), certificate.clone());
                async move {
                    let (headers, path) = (request.headers(), request.uri().path());
                    let checked = access.check(certificate.as_deref(), headers, request.method(), path).await;
                    Ok::<_, Infallible>(match checked {
                        Ok(()) => handle(agent, request).await,
                        Err((code, message)) => refuse(code, message),
                    })
                }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            let _ = connection.with_upgrades().await;
        });
    }
}

/// Query parameters, in order; a name may come several times.
#[derive(Clone, Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// From a request's query string.
    pub fn parse(query: &str) -> Self {
        let decode =
            |text: &str| percent_encoding::percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
        let pairs = query.split('&').filter(|p| !p.is_empty());
        Self(
            pairs
                .map(|pair| {
                    pair.split_once('=').map_or_else(|| (decode(pair), String::new()), |(k, v)| (decode(k), decode(v)))
                })
                .collect(),
        )
    }

    /// The first value of a name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// All values of a name.
    pub fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(k, _)| k == name).map(|(_, v)| v.clone()).collect()
    }

    /// Whether one of these names is set to a true value.
    pub fn flag(&self, names: &[&str]) -> bool {
        names.iter().any(|n| self.get(n).is_some_and(|v| matches!(v, "1" | "true" | "True" | "t")))
    }
}

/// A pod of this node with the status that its worker computed last.
pub fn find_pod(agent: &Agent, namespace: &str, name: &str) -> Option<(Arc<Pod>, PodStatus)> {
    let pods = agent.pods.read();
    let mut found =
        pods.values().map(|v| v.read().clone()).filter(|(p, _)| pod::namespace(p) == namespace && pod::name(p) == name);
    let first = found.next()?;
    // A successor of the same name counts, not the one that is being cleaned up.
    found.find(|(p, _)| p.metadata.deletion_timestamp.is_none()).or(Some(first))
}

/// A container's status in a pod's, whatever its kind.
pub fn find_status<'a>(status: &'a PodStatus, container: &str) -> Option<&'a ContainerStatus> {
    let lists = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    lists.into_iter().flatten().flatten().find(|s| s.name == container)
}

/// The runtime's id of a running container, or the answer to give instead.
pub fn running_id(agent: &Agent, namespace: &str, name: &str, container: &str) -> Result<String, Box<Response<Body>>> {
    let Some((_, status)) = find_pod(agent, namespace, name) else {
        return Err(Box::new(refuse(
            StatusCode::NOT_FOUND,
            format!("pod {name:?} in namespace {namespace:?} is not on this node"),
        )));
    };
    let found = find_status(&status, container).filter(|s| s.state.as_ref().is_some_and(|s| s.running.is_some()));
    let id =
        found.and_then(|s| s.container_id.as_deref()).and_then(|id| id.split_once("://")).map(|(_, id)| id.to_owned());
    id.ok_or_else(|| Box::new(refuse(StatusCode::NOT_FOUND, format!("container not found ({container:?})"))))
}

/// An answer in a form that has a name.
fn as_kind(text: String, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(full(text));
    response.headers_mut().insert("content-type", http::HeaderValue::from_static(kind));
    response
}

fn prometheus(text: String) -> Response<Body> {
    as_kind(text, "text/plain; version=0.0.4; charset=utf-8")
}

fn json(value: &serde_json::Value) -> Response<Body> {
    as_kind(value.to_string(), "application/json")
}

async fn handle(agent: Arc<Agent>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let read = *request.method() == Method::GET;
    match parts.as_slice() {
        ["healthz"] if read => Response::new(full("ok")),
        // The kubelet's path (https://kubernetes.io/docs/concepts/cluster-administration/system-metrics/).
        ["metrics"] if read => prometheus(agent.config.metrics.as_ref().map(|counted| counted.0()).unwrap_or_default()),
        ["metrics", "resource"] if read => prometheus(stats::text::resource(&stats::now(&agent, false).await)),
        ["metrics", "cadvisor"] if read => prometheus(stats::text::cadvisor(&stats::now(&agent, true).await)),
        ["stats", "summary"] if read => {
            let short = query.flag(&["only_cpu_and_memory"]);
            json(&stats::summary::summary(&stats::now(&agent, !short).await, short))
        }
        ["pods"] if read => {
            let items: Vec<Pod> = agent
                .pods
                .read()
                .values()
                .map(|view| {
                    let (pod, status) = view.read().clone();
                    Pod { status: Some(status), ..(*pod).clone() }
                })
                .collect();
            json(&serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}))
        }
        ["containerLogs", namespace, pod, container] if read => {
            logs::handle(agent, namespace, pod, container, &query).await
        }
        ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container] => {
            exec::handle(agent, exec::What::Exec, namespace, pod, container, &query, request).await
        }
        ["attach", namespace, pod, container] | ["attach", namespace, pod, _, container] => {
            exec::handle(agent, exec::What::Attach, namespace, pod, container, &query, request).await
        }
        ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
            portforward::handle(agent, namespace, pod, &query, request).await
        }
        _ => refuse(StatusCode::NOT_FOUND, "404 page not found"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        let query = Query::parse("command=sh&command=-c&command=echo%20a%2Bb+c&stdin=true&tty=0&x");
        assert_eq!(query.all("command"), ["sh", "-c", "echo a+b c"]);
        assert!(query.flag(&["input", "stdin"]) && !query.flag(&["tty"]));
        assert_eq!(query.get("x"), Some(""));
    }
}
