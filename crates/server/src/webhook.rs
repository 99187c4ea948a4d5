//! Calls webhooks over TLS, for admission and for conversion: where one is, whom to believe, and connections that are used
//! again.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rand::seq::IndexedRandom;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::Value;
use tokio::{net::TcpStream, time::Instant};
use tokio_rustls::TlsConnector;

use crate::Server;

/// How many idle connections to one webhook are kept.
const IDLE: usize = 8;
/// How long an idle connection is kept.
const KEEP: Duration = Duration::from_secs(90);
/// How long one address is tried before the next one is.
pub(crate) const CONNECT: Duration = Duration::from_secs(3);
/// Where systems keep the authorities that they trust.
const SYSTEM: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Where a webhook is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    /// The name in its certificate.
    name: String,
    port: u16,
    path: String,
    /// Namespace and name of the Service it is behind.
    service: Option<(String, String)>,
    /// Whom to believe, in base64 of PEM; empty for the authorities of the system.
    authorities: String,
}

impl Place {
    fn read(client: &Value) -> Result<Place, String> {
        let authorities = client["caBundle"].as_str().unwrap_or_default().to_owned();
        if let Some(url) = client["url"].as_str() {
            let uri: Uri = url.parse().map_err(|e| format!("url {url:?}: {e}"))?;
            let host = uri.host().ok_or_else(|| format!("url {url:?} has no host"))?;
            let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
            let name = host.trim_matches(['[', ']']).to_owned();
            return Ok(Place { name, port: uri.port_u16().unwrap_or(443), path, service: None, authorities });
        }
        let service = &client["service"];
        let text = |key: &str| service[key].as_str().unwrap_or_default().to_owned();
        let (namespace, name) = (text("namespace"), text("name"));
        let path = match text("path") {
            path if path.starts_with('/') => path,
            path => format!("/{path}"),
        };
        let port = service["port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or(443);
        let service = Some((namespace.clone(), name.clone()));
        Ok(Place { name: format!("{name}.{namespace}.svc"), port, path, service, authorities })
    }

    fn url(&self, timeout: u64) -> String {
        let host = if self.name.contains(':') { format!("[{}]", self.name) } else { self.name.clone() };
        let mark = if self.path.contains('?') { '&' } else { '?' };
        format!("https://{host}:{}{}{mark}timeout={timeout}s", self.port, self.path)
    }
}

pub(crate) type Sender = SendRequest<Full<Bytes>>;

/// Calls webhooks.
#[derive(Default)]
pub(crate) struct Caller {
    idle: Mutex<HashMap<Place, Vec<(Sender, Instant)>>>,
    trust: Mutex<HashMap<String, Arc<ClientConfig>>>,
}

impl Caller {
    /// What is trusted, read once for each bundle. Bundles that nobody has any more are few, and are forgotten together.
    fn trust(&self, authorities: &str) -> Result<Arc<ClientConfig>, String> {
        if let Some(known) = self.trust.lock().get(authorities) {
            return Ok(known.clone());
        }
        let roots = match authorities {
            "" => system_roots(),
            bundle => {
                use base64::Engine;
                let pem = base64::engine::general_purpose::STANDARD.decode(bundle);
                roots(&pem.map_err(|e| format!("caBundle: {e}"))?).map_err(|e| format!("caBundle: {e}"))?
            }
        };
        let config = Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth());
        let mut trust = self.trust.lock();
        if trust.len() >= 256 {
            trust.clear();
        }
        trust.insert(authorities.to_owned(), config.clone());
        Ok(config)
    }

    fn take(&self, place: &Place) -> Option<Sender> {
        let mut idle = self.idle.lock();
        let list = idle.get_mut(place)?;
        while let Some((sender, since)) = list.pop() {
            if !sender.is_closed() && since.elapsed() < KEEP {
                return Some(sender);
            }
        }
        idle.remove(place);
        None
    }

    fn give(&self, place: &Place, sender: Sender) {
        let mut idle = self.idle.lock();
        idle.retain(|_, list| {
            list.retain(|(sender, since)| !sender.is_closed() && since.elapsed() < KEEP);
            !list.is_empty()
        });
        let list = idle.entry(place.clone()).or_default();
        if list.len() < IDLE {
            list.push((sender, Instant::now()));
        }
    }
}

/// The authorities of a bundle in PEM.
///
/// # Errors
/// If one of them cannot be used.
pub(crate) fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(pem) {
        roots.add(der.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    }
    Ok(roots)
}

/// The authorities that the system trusts, as far as they can be used.
pub(crate) fn system_roots() -> RootCertStore {
    let pem = SYSTEM.iter().find_map(|path| std::fs::read(path).ok()).unwrap_or_default();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).flatten());
    roots
}

pub(crate) async fn connect(config: Arc<ClientConfig>, name: &str, addresses: &[SocketAddr]) -> Result<Sender, String> {
    let name = ServerName::try_from(name.to_owned()).map_err(|e| format!("{name:?}: {e}"))?;
    let mut failure = "it has no address".to_owned();
    for address in addresses {
        let attempt = async {
            let stream = TcpStream::connect(address).await.map_err(|e| format!("dial tcp {address}: {e}"))?;
            let _ = stream.set_nodelay(true);
            let tls = TlsConnector::from(config.clone()).connect(name.clone(), stream).await;
            tls.map_err(|e| format!("tls: failed to verify certificate: {e}"))
        };
        let stream = match tokio::time::timeout(CONNECT, attempt).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(why)) => {
                failure = why;
                continue;
            }
            Err(_) => {
                failure = format!("dial tcp {address}: i/o timeout");
                continue;
            }
        };
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a webhook ended");
            }
        });
        return Ok(sender);
    }
    Err(failure)
}

impl Server {
    /// Asks a webhook and gives its answer, of at most so many bytes, or why there is none.
    pub(crate) async fn call_webhook(
        &self,
        client: &Value,
        review: &Value,
        timeout: u64,
        most: usize,
    ) -> Result<Value, String> {
        let place = Place::read(client)?;
        let url = place.url(timeout);
        let call = self.call_place(&place, &url, review, most);
        match tokio::time::timeout(Duration::from_secs(timeout), call).await {
            Ok(answer) => answer.map_err(|why| format!("Post {url:?}: {why}")),
            Err(_) => Err(format!("Post {url:?}: context deadline exceeded")),
        }
    }

    async fn call_place(&self, place: &Place, url: &str, review: &Value, most: usize) -> Result<Value, String> {
        let uri: Uri = url.parse().map_err(|e| format!("{e}"))?;
        let path = uri.path_and_query().map_or("/", |p| p.as_str());
        let host = uri.authority().map_or("", |a| a.as_str());
        let body = Bytes::from(review.to_string());
        let request = || {
            Request::builder()
                .method(Method::POST)
                .uri(path)
                .header(header::HOST, host)
                .header(header::CONTENT_TYPE, "application/json")
                .header(header::ACCEPT, "application/json")
                .header(header::USER_AGENT, "seawall")
                .body(Full::new(body.clone()))
                .map_err(|e| e.to_string())
        };
        // A connection that was idle may have been closed by the other side just now: then nothing has been sent on it.
        if let Some(mut sender) = self.webhooks.take(place)
            && sender.ready().await.is_ok()
        {
            match sender.try_send_request(request()?).await {
                Ok(response) => return self.read_answer(place, sender, response, most).await,
                Err(error) if error.message().is_some() => {}
                Err(error) => return Err(error.into_error().to_string()),
            }
        }
        let addresses = self.webhook_addresses(place).await?;
        let mut sender = connect(self.webhooks.trust(&place.authorities)?, &place.name, &addresses).await?;
        let response = sender.send_request(request()?).await.map_err(|e| e.to_string())?;
        self.read_answer(place, sender, response, most).await
    }

    async fn read_answer(
        &self,
        place: &Place,
        sender: Sender,
        response: http::Response<hyper::body::Incoming>,
        most: usize,
    ) -> Result<Value, String> {
        let status = response.status();
        let body = Limited::new(response.into_body(), most).collect().await.map_err(|e| e.to_string())?;
        self.webhooks.give(place, sender);
        let body = body.to_bytes();
        match status {
            StatusCode::OK => serde_json::from_slice(&body).map_err(|e| format!("couldn't read the answer: {e}")),
            StatusCode::NOT_FOUND => Err("the server could not find the requested resource".to_owned()),
            status => {
                let text = String::from_utf8_lossy(&body[..body.len().min(512)]).trim().to_owned();
                Err(format!("an error on the server ({text:?}) has prevented the request from succeeding: {status}"))
            }
        }
    }

    async fn webhook_addresses(&self, place: &Place) -> Result<Vec<SocketAddr>, String> {
        match &place.service {
            Some((namespace, name)) => self.service_addresses(namespace, name, place.port).await,
            None => resolve(&place.name, place.port).await,
        }
    }

    /// Where a port of a Service is reached from this machine, whether or not it balances Services.
    pub(crate) async fn service_addresses(
        &self,
        namespace: &str,
        name: &str,
        wanted: u16,
    ) -> Result<Vec<SocketAddr>, String> {
        let snapshot = self.cache.snapshot();
        let service = self.lookup(&snapshot, "", "services", namespace, name);
        let service = service.ok_or_else(|| format!("service {name:?} not found"))?.value();
        let spec = &service["spec"];
        if spec["type"] == "ExternalName" {
            return resolve(spec["externalName"].as_str().unwrap_or_default(), wanted).await;
        }
        let ports = spec["ports"].as_array().into_iter().flatten();
        let port = ports.into_iter().find(|port| port["port"].as_u64() == Some(u64::from(wanted)));
        let port = port.ok_or_else(|| format!("no service port {wanted} found for service {name:?}"))?;
        let mut addresses = Vec::new();
        if let Some((id, row)) = self.registry.by_name("discovery.k8s.io", "endpointslices") {
            let prefix = format!("{}{namespace}/", row.prefix());
            for slice in snapshot.range(id, &prefix, None).map(|slice| slice.value()) {
                if slice["metadata"]["labels"]["kubernetes.io/service-name"] == name {
                    addresses.extend(endpoints(&slice, port["name"].as_str().unwrap_or_default()));
                }
            }
        }
        // One endpoint is taken at random, one more if it does not answer, and then the Service's own address.
        let mut chosen: Vec<SocketAddr> = addresses.choose_multiple(&mut rand::rng(), 2).copied().collect();
        let own = spec["clusterIP"].as_str().and_then(|ip| ip.parse::<IpAddr>().ok());
        chosen.extend(own.map(|ip| SocketAddr::new(ip, wanted)));
        Ok(chosen)
    }
}

async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let found = tokio::net::lookup_host((host, port)).await.map_err(|e| format!("lookup {host}: {e}"))?;
    Ok(found.collect())
}

/// The ready endpoints of a slice for a port of this name.
pub(crate) fn endpoints(slice: &Value, port: &str) -> Vec<SocketAddr> {
    let mut ports = slice["ports"].as_array().into_iter().flatten();
    let found = ports.find(|p| p["name"].as_str().unwrap_or_default() == port);
    let Some(port) = found.and_then(|p| p["port"].as_u64()).and_then(|p| u16::try_from(p).ok()) else {
        return Vec::new();
    };
    let ready = slice["endpoints"].as_array().into_iter().flatten().filter(|e| e["conditions"]["ready"] != false);
    let addresses = ready.filter_map(|e| e["addresses"][0].as_str()?.parse::<IpAddr>().ok());
    addresses.map(|ip| SocketAddr::new(ip, port)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn where_webhooks_are() {
        let check = |client: Value, expect: &str| {
            assert_eq!(Place::read(&client).map(|place| place.url(5)), Ok(expect.to_owned()), "{client}");
        };
        check(json!({"url": "https://a.b/c"}), "https://a.b:443/c?timeout=5s");
        check(json!({"url": "https://a.b:8443"}), "https://a.b:8443/?timeout=5s");
        check(json!({"url": "https://[::1]:8443/x?y=z"}), "https://[::1]:8443/x?y=z&timeout=5s");
        check(json!({"service": {"namespace": "n", "name": "s"}}), "https://s.n.svc:443/?timeout=5s");
        check(
            json!({"service": {"namespace": "n", "name": "s", "path": "/p", "port": 8443}}),
            "https://s.n.svc:8443/p?timeout=5s",
        );
    }

    #[test]
    fn endpoints_of_a_port() {
        let slice = json!({"ports": [{"name": "https", "port": 8443}, {"name": "http", "port": 8080}], "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false}},
            {"addresses": ["10.0.0.3"]}]});
        let found: Vec<String> = endpoints(&slice, "https").iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.1:8443", "10.0.0.3:8443"]);
        assert!(endpoints(&slice, "other").is_empty());
    }
}
