//! Requests that a node agent answers: logs, and connections into pods.
//!
//! Exec, attach and port-forward are passed on byte by byte: the agent speaks WebSocket with the client itself
//! (KEP-4006), so that nothing is buffered or translated here.

use std::{net::IpAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header, request::Parts};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;

use crate::{
    Context, Server,
    audit::Trail,
    encode::{Body, full},
    error::{ApiError, Result},
    request::{Query, ResourcePath},
};

const CONNECT: Duration = Duration::from_secs(5);
/// The longest answer that is read as a whole, in bytes: that of a node with some thousand pods.
const ANSWER: usize = 16 << 20;

/// Calls node agents over mutual TLS.
pub struct Client {
    tls: ArcSwap<ClientConfig>,
}

impl Client {
    /// Reads the certificates.
    pub fn new(ca: &str, pair: &(String, String)) -> Result<Client, Box<dyn std::error::Error>> {
        Ok(Client { tls: ArcSwap::from(tls(ca, pair)?) })
    }

    /// Uses others from the next connection on. If they are of no use, the ones before stay.
    pub fn replace(&self, ca: &str, pair: &(String, String)) -> Result<(), Box<dyn std::error::Error>> {
        self.tls.store(tls(ca, pair)?);
        Ok(())
    }

    /// Connects to an agent.
    pub(crate) async fn connect(&self, address: IpAddr, port: u16) -> std::io::Result<TlsStream<TcpStream>> {
        let connect = async {
            let stream = TcpStream::connect((address, port)).await?;
            stream.set_nodelay(true)?;
            TlsConnector::from(self.tls.load_full()).connect(ServerName::from(address), stream).await
        };
        tokio::time::timeout(CONNECT, connect).await.map_err(|_| std::io::ErrorKind::TimedOut)?
    }

    /// Sends a request without a body and returns the answer, whose connection is driven in the background.
    async fn send(
        &self,
        address: IpAddr,
        port: u16,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<hyper::body::Incoming>, String> {
        let stream = self.connect(address, port).await.map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to a node agent ended");
            }
        });
        sender.send_request(request).await.map_err(|e| e.to_string())
    }
}

fn tls(ca: &str, (certificate, key): &(String, String)) -> Result<Arc<ClientConfig>, Box<dyn std::error::Error>> {
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots.add(der?)?;
    }
    let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())?;
    Ok(Arc::new(ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key)?))
}

/// Where the agent of a pod's node listens.
pub(crate) struct Agent {
    node: String,
    pub address: IpAddr,
    pub port: u16,
}

impl Agent {
    /// As the Node says it.
    pub fn of(name: String, node: &Value) -> Result<Agent> {
        let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
        let address = addresses.filter(|a| a["type"] == "InternalIP").find_map(|a| a["address"].as_str()?.parse().ok());
        let Some(address) = address else {
            return Err(ApiError::bad_gateway(format!("node {name} has no InternalIP address")));
        };
        let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
            .as_u64()
            .and_then(|p| u16::try_from(p).ok())
            .unwrap_or(10250);
        Ok(Agent { node: name, address, port })
    }
}

impl Server {
    async fn pod_and_agent(&self, namespace: &str, name: &str) -> Result<(Value, Agent)> {
        let (_, row) = self.registry.by_name("", "pods").ok_or_else(ApiError::no_route)?;
        let pod = self.find("", "pods", namespace, name).await?.ok_or_else(|| ApiError::not_found(row, name))?.value();
        let node_name = pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
        if node_name.is_empty() {
            return Err(ApiError::bad_request(format!("pod {name} does not have a host assigned")));
        }
        let (_, nodes) = self.registry.by_name("", "nodes").ok_or_else(ApiError::no_route)?;
        let node = self
            .find("", "nodes", "", &node_name)
            .await?
            .ok_or_else(|| ApiError::not_found(nodes, &node_name))?
            .value();
        Ok((pod, Agent::of(node_name, &node)?))
    }

    /// What the agent of a node answers on a path, in JSON.
    pub(crate) async fn agent_says(&self, name: &str, node: &Value, path: &str) -> Result<Value> {
        let agent = Agent::of(name.to_owned(), node)?;
        let response = self.ask(&agent, request(Method::GET, path, &agent)?).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        let unreadable = |why: String| ApiError::bad_gateway(format!("the agent of node {name} cannot be read: {why}"));
        let body = Limited::new(response.into_body(), ANSWER).collect().await.map_err(|e| unreadable(e.to_string()))?;
        serde_json::from_slice(&body.to_bytes()).map_err(|e| unreadable(e.to_string()))
    }

    /// GET of a pod's log.
    pub(crate) async fn pod_log(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let name = context.name()?;
        let (pod, agent) = self.pod_and_agent(context.namespace(), name).await?;
        let container = container_of(&pod, name, context.query.text("container"))?;
        for key in ["tailLines", "sinceSeconds", "limitBytes"] {
            if context.query.number::<i64>(key)?.is_some_and(|n| n < 0) {
                return Err(ApiError::bad_request(format!("{key}: Invalid value: must be greater than or equal to 0")));
            }
        }
        let query = context.query.pairs().iter().filter(|(k, _)| k != "container");
        let path = format!("/containerLogs/{}/{name}/{container}?{}", context.namespace(), encode_query(query));
        let request = request(Method::GET, &path, &agent)?;
        let response = self.ask(&agent, request).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        let mut out = Response::new(response.into_body().map_err(Into::into).boxed_unsync());
        out.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        Ok(out)
    }

    async fn ask(&self, agent: &Agent, request: Request<Empty<Bytes>>) -> Result<Response<hyper::body::Incoming>> {
        self.kubelet.send(agent.address, agent.port, request).await.map_err(|why| {
            ApiError::bad_gateway(format!(
                "error dialing backend: the agent of node {} at {}:{} does not answer: {why}",
                agent.node, agent.address, agent.port
            ))
        })
    }

    /// Exec, attach, port-forward: the connection is passed on to the agent.
    pub(crate) async fn stream_to_pod(
        self: &Arc<Self>,
        parts: &mut Parts,
        target: &ResourcePath,
        query: &Query,
    ) -> Result<Response<Body>> {
        let name = target.name.as_deref().unwrap_or_default();
        let namespace = target.namespace.as_deref().unwrap_or_default();
        let (pod, agent) = self.pod_and_agent(namespace, name).await?;
        let sub = target.subresource.as_deref().unwrap_or_default();
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
        let path = match sub {
            "portforward" => {
                format!("/portForward/{namespace}/{name}?uid={uid}&{}", encode_query(query.pairs().iter()))
            }
            _ => {
                let container = container_of(&pod, name, query.text("container"))?;
                let pairs = query.pairs().iter().filter(|(k, _)| k != "container");
                format!("/{sub}/{namespace}/{name}/{container}?uid={uid}&{}", encode_query(pairs))
            }
        };
        let Some(client) = parts.extensions.remove::<hyper::upgrade::OnUpgrade>() else {
            return Err(ApiError::bad_request("Upgrade request required"));
        };
        let mut request = request(parts.method.clone(), &path, &agent)?;
        for (key, value) in &parts.headers {
            let hop = [header::HOST, header::AUTHORIZATION, header::CONTENT_LENGTH].contains(key);
            if !hop {
                request.headers_mut().append(key, value.clone());
            }
        }
        let mut response = self.ask(&agent, request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        // The request ends with the connection.
        let trail = parts.extensions.get::<Arc<Trail>>().cloned();
        Ok(join(client, &mut response, self.stop.clone(), trail))
    }
}

/// Passes what comes on a client's connection on to the server that has just taken over its own, and back, until one of
/// them ends or this server stops. Gives the answer for the client.
pub(crate) fn join(
    client: hyper::upgrade::OnUpgrade,
    response: &mut Response<hyper::body::Incoming>,
    stop: CancellationToken,
    trail: Option<Arc<Trail>>,
) -> Response<Body> {
    let upstream = hyper::upgrade::on(&mut *response);
    tokio::spawn(async move {
        let _trail = trail;
        let (client, upstream) = match tokio::try_join!(client, upstream) {
            Ok(both) => both,
            Err(error) => {
                tracing::debug!(%error, "a connection was not taken over");
                return;
            }
        };
        let (mut client, mut upstream) = (TokioIo::new(client), TokioIo::new(upstream));
        let copy = tokio::io::copy_bidirectional(&mut client, &mut upstream);
        tokio::select! {
            result = copy => if let Err(error) = result { tracing::debug!(%error, "a connection that was passed on ended") },
            () = stop.cancelled() => {}
        }
    });
    let mut out = Response::new(full(Bytes::new()));
    *out.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *out.headers_mut() = response.headers().clone();
    out
}

fn request(method: Method, path: &str, agent: &Agent) -> Result<Request<Empty<Bytes>>> {
    let uri: Uri =
        path.parse().map_err(|_| ApiError::bad_request(format!("the parameters make no valid URL: {path:?}")))?;
    Request::builder()
        .method(method)
        .uri(uri)
        .header(header::HOST, format!("{}:{}", agent.address, agent.port))
        .body(Empty::new())
        .map_err(|e| ApiError::bad_request(e.to_string()))
}

fn encode_query<'a>(pairs: impl Iterator<Item = &'a (String, String)>) -> String {
    let encode =
        |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
    pairs.map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect::<Vec<_>>().join("&")
}

/// What an agent said when it refused.
async fn refusal(response: Response<hyper::body::Incoming>) -> ApiError {
    let code = response.status();
    let text = match Limited::new(response.into_body(), 4096).collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).trim().to_owned(),
        Err(_) => String::new(),
    };
    let mut error = match code {
        StatusCode::BAD_REQUEST => ApiError::bad_request(text),
        _ => ApiError::bad_gateway(text),
    };
    if code.is_client_error() || code.is_server_error() {
        error.code = code;
    }
    if code == StatusCode::NOT_FOUND {
        error.reason = "NotFound".into();
    }
    error
}

/// The container that is meant: the one named, the annotated default, or the only one.
fn container_of(pod: &Value, name: &str, wanted: Option<&str>) -> Result<String> {
    let names = |list: &str| -> Vec<&str> {
        pod["spec"][list].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect()
    };
    let (init, main, debug) = (names("initContainers"), names("containers"), names("ephemeralContainers"));
    if let Some(wanted) = wanted {
        return match init.iter().chain(&main).chain(&debug).any(|n| *n == wanted) {
            true => Ok(wanted.to_owned()),
            false => Err(ApiError::bad_request(format!("container {wanted} is not valid for pod {name}"))),
        };
    }
    let chosen = pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
    match (chosen.filter(|c| main.contains(c)), &main[..]) {
        (Some(chosen), _) => Ok(chosen.to_owned()),
        (None, [only]) => Ok((*only).to_owned()),
        (None, many) => {
            let mut message =
                format!("a container name must be specified for pod {name}, choose one of: [{}]", many.join(" "));
            if !init.is_empty() {
                message.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
            }
            Err(ApiError::bad_request(message))
        }
    }
}
