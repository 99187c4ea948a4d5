//! Calls to webhooks: a JSON question over HTTPS, a JSON answer
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definition-versioning/#configure-customresourcedefinition-to-use-conversion-webhooks>).

use std::{net::SocketAddr, sync::Arc, time::Duration};

use base64::Engine as _;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::Server;

/// How long a conversion may take; upstream's limit.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);
/// The largest answer.
const LARGEST: usize = 64 << 20;

/// Where a webhook is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// A name to look up, or an address.
    host: String,
    port: u16,
    /// The name in its certificate.
    name: String,
    path: String,
    /// The authorities that may have signed that, in PEM.
    authorities: Vec<u8>,
}

impl Server {
    /// Reads a `clientConfig`. A Service is called at the address of one of its endpoints.
    pub(crate) fn webhook_target(&self, config: &Value) -> Result<Target, String> {
        let bundle = config["caBundle"].as_str().unwrap_or_default();
        let authorities = base64::engine::general_purpose::STANDARD
            .decode(bundle)
            .map_err(|_| "clientConfig.caBundle is not base64".to_owned())?;
        if authorities.is_empty() {
            return Err(
                "clientConfig.caBundle is empty: set it to the authority that signed the webhook's certificate".into(),
            );
        }
        if let Some(url) = config["url"].as_str() {
            let uri: http::Uri = url.parse().map_err(|e| format!("clientConfig.url {url:?}: {e}"))?;
            let host = uri.host().ok_or_else(|| format!("clientConfig.url {url:?} has no host"))?;
            let host = host.trim_matches(['[', ']']).to_owned();
            let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
            return Ok(Target { name: host.clone(), host, port: uri.port_u16().unwrap_or(443), path, authorities });
        }
        let service = &config["service"];
        let text = |key: &str| service[key].as_str().unwrap_or_default();
        let (namespace, name) = (text("namespace"), text("name"));
        let port = service["port"].as_u64().and_then(|p| u16::try_from(p).ok()).unwrap_or(443);
        let address = self.endpoint_of(namespace, name, port)?;
        Ok(Target {
            host: address.ip().to_string(),
            port: address.port(),
            name: format!("{name}.{namespace}.svc"),
            path: format!("/{}", text("path").trim_start_matches('/')),
            authorities,
        })
    }

    /// An endpoint of a port of a Service that is ready, or the address of the Service itself.
    fn endpoint_of(&self, namespace: &str, name: &str, port: u16) -> Result<SocketAddr, String> {
        let snapshot = self.cache.snapshot();
        let service = self
            .lookup(&snapshot, "", "services", namespace, name)
            .ok_or_else(|| format!("service {name:?} not found in namespace {namespace:?}"))?
            .value();
        let ports = service["spec"]["ports"].as_array().into_iter().flatten();
        let wanted = ports
            .into_iter()
            .find(|p| p["port"] == port)
            .ok_or_else(|| format!("no service port {port} found for service {name:?}"))?;
        let mut ready: Vec<SocketAddr> = Vec::new();
        if let Some((id, row)) = self.registry.by_name("discovery.k8s.io", "endpointslices") {
            let prefix = format!("{}{namespace}/", row.prefix());
            for slice in snapshot.range(id, &prefix, None).map(|o| o.value()) {
                if slice["metadata"]["labels"]["kubernetes.io/service-name"] != name {
                    continue;
                }
                let named =
                    |p: &&Value| p["name"].as_str().unwrap_or_default() == wanted["name"].as_str().unwrap_or_default();
                let port = slice["ports"].as_array().into_iter().flatten().find(named).and_then(|p| p["port"].as_u64());
                let Some(port) = port.and_then(|p| u16::try_from(p).ok()) else { continue };
                for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
                    if endpoint["conditions"]["ready"] != false
                        && let Some(ip) = endpoint["addresses"][0].as_str().and_then(|a| a.parse().ok())
                    {
                        ready.push(SocketAddr::new(ip, port));
                    }
                }
            }
        }
        if !ready.is_empty() {
            return Ok(ready[rand::random_range(0..ready.len())]);
        }
        let address = service["spec"]["clusterIP"].as_str().and_then(|ip| ip.parse().ok());
        address
            .map(|ip| SocketAddr::new(ip, port))
            .ok_or_else(|| format!("no endpoints available for service {name:?}"))
    }
}

/// Asks, and waits for the answer no longer than `timeout`.
pub(crate) async fn call(target: &Target, question: &Value, timeout: Duration) -> Result<Value, String> {
    let url = format!("https://{}:{}{}", target.name, target.port, target.path);
    let post = |why: String| format!("Post {url:?}: {why}");
    match tokio::time::timeout(timeout, ask(target, question)).await {
        Ok(answer) => answer.map_err(post),
        Err(_) => Err(post(format!("no answer within {timeout:?}"))),
    }
}

async fn ask(target: &Target, question: &Value) -> Result<Value, String> {
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(&target.authorities) {
        let der = der.map_err(|e| format!("clientConfig.caBundle: {e}"))?;
        roots.add(der).map_err(|e| format!("clientConfig.caBundle: {e}"))?;
    }
    let tls = Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth());
    let name = ServerName::try_from(target.name.clone()).map_err(|e| e.to_string())?;
    let stream = TcpStream::connect((&*target.host, target.port)).await.map_err(|e| e.to_string())?;
    let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let driven = async {
        let request = Request::post(&*target.path)
            .header(header::HOST, format!("{}:{}", target.name, target.port))
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .body(Full::new(Bytes::from(question.to_string())))
            .map_err(|e| e.to_string())?;
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LARGEST).collect().await.map_err(|e| e.to_string())?;
        if !status.is_success() {
            return Err(format!("the webhook answered {status}"));
        }
        serde_json::from_slice(&body.to_bytes()).map_err(|e| format!("the answer is no JSON: {e}"))
    };
    tokio::pin!(connection);
    tokio::select! {
        answer = driven => answer,
        ended = &mut connection => Err(match ended {
            Ok(()) => "the connection was closed".to_owned(),
            Err(error) => error.to_string(),
        }),
    }
}
