//! The subresource `proxy` of pods, Services and nodes: requests that what runs there answers
//! (<https://kubernetes.io/docs/tasks/access-application-cluster/access-cluster-services/>).
//!
//! Who asks is authenticated and authorized here; what identifies them is taken away before the request is passed on.
//! Bodies are streamed both ways, and connections may be taken over by another protocol.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header, request::Parts};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rand::seq::IndexedRandom;
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::{
    Context, RequestBody, Server,
    aggregation::{OF_THE_CONNECTION, believe_anybody},
    audit::Trail,
    encode::{Body, full},
    error::{ApiError, Result},
    kubelet::{Agent, join},
    request::ResourcePath,
    webhook::{CONNECT, endpoints},
};

/// How many endpoints of a Service are tried.
const TRIES: usize = 3;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What a path names: `[SCHEME:]NAME[:PORT]`.
#[derive(Debug, PartialEq, Eq)]
struct Target<'a> {
    https: bool,
    name: &'a str,
    /// A number or a name; empty if none is given.
    port: &'a str,
}

impl<'a> Target<'a> {
    fn parse(text: &'a str) -> Option<Target<'a>> {
        let parts: Vec<&str> = text.split(':').collect();
        let (scheme, name, port) = match parts[..] {
            [name] => ("", name, ""),
            [name, port] => ("", name, port),
            [scheme, name, port] => (scheme, name, port),
            _ => return None,
        };
        let https = match scheme {
            "" | "http" => false,
            "https" => true,
            _ => return None,
        };
        (!name.is_empty()).then_some(Target { https, name, port })
    }

    fn number(&self) -> Result<u16> {
        self.port.parse().map_err(|_| ApiError::bad_request(format!("invalid port {:?}: give a number", self.port)))
    }
}

/// Who answers.
enum Place {
    /// The agent of a node.
    Agent(Agent),
    /// One of these, the first that takes a connection.
    Any(Vec<SocketAddr>),
}

impl Server {
    /// Passes a request on to what the path names, and its answer back.
    pub(crate) async fn proxy(
        self: &Arc<Self>,
        context: &Context<'_>,
        parts: &mut Parts,
        body: RequestBody,
    ) -> Result<Response<Body>> {
        let path = parts.uri.path();
        let rest = after_proxy(path, &context.path);
        if rest.is_empty() && matches!(parts.method, Method::GET | Method::HEAD) {
            return Ok(to_the_root(&parts.uri));
        }
        let start = &path[..path.len() - rest.len()];
        let start = start.strip_suffix('/').unwrap_or(start).to_owned();
        let name = context.name()?;
        let target = Target::parse(name).ok_or_else(|| {
            ApiError::bad_request(format!(
                "invalid {} request {name:?}: write [https:]NAME[:PORT]",
                context.row.singular
            ))
        })?;
        let place = match context.row.plural {
            "pods" => self.of_a_pod(context.namespace(), &target).await?,
            "services" => self.of_a_service(context.namespace(), &target).await?,
            _ => self.of_a_node(&target).await?,
        };
        let query = parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let rest = if rest.is_empty() { "/" } else { rest };
        let uri =
            format!("{rest}{query}").parse().map_err(|_| ApiError::bad_request(format!("{path:?} is no valid URL")))?;
        let forwarded = format!("{start}{rest}");

        let client = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = headers(&context.headers, client.is_some(), &forwarded);
        let mut response = self
            .send_to(place, target.https, request)
            .await
            .map_err(|why| ApiError::unavailable(format!("error trying to reach {}: {why}", context.row.singular)))?;
        if let (StatusCode::SWITCHING_PROTOCOLS, Some(client)) = (response.status(), client) {
            let trail = parts.extensions.get::<Arc<Trail>>().cloned();
            return Ok(join(client, &mut response, self.stop.clone(), trail));
        }
        for name in OF_THE_CONNECTION {
            response.headers_mut().remove(name);
        }
        if let Some(place) = response.headers().get(header::LOCATION).and_then(|place| moved(place, &start)) {
            response.headers_mut().insert(header::LOCATION, place);
        }
        Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()))
    }

    async fn of_a_pod(&self, namespace: &str, target: &Target<'_>) -> Result<Place> {
        let (_, row) = self.registry.by_name("", "pods").ok_or_else(ApiError::no_route)?;
        let found = self.find("", "pods", namespace, target.name).await?;
        let pod = found.ok_or_else(|| ApiError::not_found(row, target.name))?.value();
        let port = match target.port {
            "" => first_port(&pod).unwrap_or(if target.https { 443 } else { 80 }),
            _ => target.number()?,
        };
        let address = pod["status"]["podIP"].as_str().unwrap_or_default();
        let ip = address.parse().ok().filter(|ip| may_be_asked(*ip)).ok_or_else(not_allowed)?;
        Ok(Place::Any(vec![SocketAddr::new(ip, port)]))
    }

    async fn of_a_service(&self, namespace: &str, target: &Target<'_>) -> Result<Place> {
        let (_, row) = self.registry.by_name("", "services").ok_or_else(ApiError::no_route)?;
        let found = self.find("", "services", namespace, target.name).await?;
        let service = found.ok_or_else(|| ApiError::not_found(row, target.name))?.value();
        let port = port_name(&service, target)?;
        let nobody = || ApiError::unavailable(format!("no endpoints available for service {:?}", target.name));
        let (id, row) = self.registry.by_name("discovery.k8s.io", "endpointslices").ok_or_else(nobody)?;
        let snapshot = self.cache.snapshot();
        let mut all: Vec<SocketAddr> = Vec::new();
        for slice in snapshot.range(id, &format!("{}{namespace}/", row.prefix()), None).map(|slice| slice.value()) {
            if slice["metadata"]["labels"]["kubernetes.io/service-name"] == target.name {
                all.extend(endpoints(&slice, &port));
            }
        }
        all.retain(|address| may_be_asked(address.ip()));
        let chosen: Vec<SocketAddr> = all.choose_multiple(&mut rand::rng(), TRIES).copied().collect();
        if chosen.is_empty() { Err(nobody()) } else { Ok(Place::Any(chosen)) }
    }

    async fn of_a_node(&self, target: &Target<'_>) -> Result<Place> {
        let (_, row) = self.registry.by_name("", "nodes").ok_or_else(ApiError::no_route)?;
        let found = self.find("", "nodes", "", target.name).await?;
        let node = found.ok_or_else(|| ApiError::not_found(row, target.name))?.value();
        let agent = Agent::of(target.name.to_owned(), &node)?;
        if target.port.is_empty() || target.port == agent.port.to_string() {
            return Ok(Place::Agent(agent));
        }
        let port = target.number()?;
        if !may_be_asked(agent.address) {
            return Err(not_allowed());
        }
        Ok(Place::Any(vec![SocketAddr::new(agent.address, port)]))
    }

    async fn send_to(
        &self,
        place: Place,
        https: bool,
        mut request: Request<RequestBody>,
    ) -> Result<Response<hyper::body::Incoming>, String> {
        let (stream, address): (Box<dyn Stream>, SocketAddr) = match place {
            Place::Agent(agent) => {
                let stream = self.kubelet.connect(agent.address, agent.port).await.map_err(|e| e.to_string())?;
                (Box::new(stream), SocketAddr::new(agent.address, agent.port))
            }
            Place::Any(addresses) => {
                let mut found = Err("there is no address".to_owned());
                for address in addresses {
                    found = dial(address, https).await.map(|stream| (stream, address));
                    if found.is_ok() {
                        break;
                    }
                }
                found?
            }
        };
        let host = HeaderValue::try_from(address.to_string()).map_err(|e| e.to_string())?;
        request.headers_mut().insert(header::HOST, host);
        let connection = hyper::client::conn::http1::handshake(TokioIo::new(stream));
        let (mut sender, connection) = connection.await.map_err(|e| e.to_string())?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection that requests were passed on to ended");
            }
        });
        sender.send_request(request).await.map_err(|e| e.to_string())
    }
}

async fn dial(address: SocketAddr, https: bool) -> Result<Box<dyn Stream>, String> {
    let connect = async {
        let stream = TcpStream::connect(address).await.map_err(|e| format!("dial tcp {address}: {e}"))?;
        let _ = stream.set_nodelay(true);
        if !https {
            return Ok(Box::new(stream) as Box<dyn Stream>);
        }
        // Pods have certificates of their own making, as upstream takes it.
        let connector = TlsConnector::from(Arc::new(believe_anybody().with_no_client_auth()));
        let stream =
            connector.connect(ServerName::from(address.ip()), stream).await.map_err(|e| format!("tls: {e}"))?;
        Ok(Box::new(stream) as Box<dyn Stream>)
    };
    tokio::time::timeout(CONNECT, connect).await.map_err(|_| format!("dial tcp {address}: i/o timeout"))?
}

/// What follows `/proxy` in a path, as the client wrote it: nothing, or something that begins with a slash.
fn after_proxy<'p>(path: &'p str, target: &ResourcePath) -> &'p str {
    // `/api/v1/nodes/NAME/proxy`, or `/api/v1/namespaces/NAMESPACE/pods/NAME/proxy`.
    let parts = if target.namespace.is_some() { 7 } else { 5 };
    let mut rest = path;
    for _ in 0..parts {
        rest = rest.trim_start_matches('/');
        rest = &rest[rest.find('/').unwrap_or(rest.len())..];
    }
    rest
}

/// Relative links of a page need the slash at the end.
fn to_the_root(uri: &Uri) -> Response<Body> {
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    // With two slashes in front it would be the name of another machine.
    if let Ok(place) = HeaderValue::try_from(format!("/{}/{query}", uri.path().trim_start_matches('/'))) {
        response.headers_mut().insert(header::LOCATION, place);
    }
    response
}

/// The headers that are passed on.
fn headers(client: &HeaderMap, upgrades: bool, forwarded: &str) -> HeaderMap {
    let mut out = client.clone();
    let upgrade = out.get(header::UPGRADE).cloned().filter(|_| upgrades);
    let host = out.get(header::HOST).cloned();
    let ours = [header::AUTHORIZATION, header::HOST];
    let impersonating: Vec<HeaderName> =
        out.keys().filter(|name| name.as_str().starts_with("impersonate-")).cloned().collect();
    for name in OF_THE_CONNECTION.iter().chain(&ours).chain(&impersonating) {
        out.remove(name);
    }
    out.remove("keep-alive");
    if let Some(protocol) = upgrade {
        out.insert(header::UPGRADE, protocol);
        out.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    }
    if let Ok(uri) = HeaderValue::try_from(forwarded) {
        out.insert("x-forwarded-uri", uri);
    }
    if let Some(host) = host {
        out.insert("x-forwarded-host", host);
    }
    out.insert("x-forwarded-proto", HeaderValue::from_static("https"));
    out
}

/// A redirection to another path of the same server, as a path of this one.
fn moved(place: &HeaderValue, start: &str) -> Option<HeaderValue> {
    let path = place.to_str().ok()?;
    let elsewhere = !path.starts_with('/') || path.starts_with("//") || path.starts_with(start);
    if elsewhere { None } else { HeaderValue::try_from(format!("{start}{path}")).ok() }
}

/// The first port that a container of the pod names.
fn first_port(pod: &Value) -> Option<u16> {
    let containers = pod["spec"]["containers"].as_array()?;
    let port = containers.iter().find_map(|container| container["ports"][0]["containerPort"].as_u64())?;
    u16::try_from(port).ok()
}

/// The name of the Service's port that is meant. A number is the Service's, not the pods'.
fn port_name(service: &Value, target: &Target<'_>) -> Result<String> {
    let Ok(number) = target.port.parse::<u64>() else { return Ok(target.port.to_owned()) };
    let mut ports = service["spec"]["ports"].as_array().into_iter().flatten();
    let found = ports.find(|port| port["port"].as_u64() == Some(number)).ok_or_else(|| {
        ApiError::unavailable(format!("no service port {number} found for service {:?}", target.name))
    })?;
    Ok(found["name"].as_str().unwrap_or_default().to_owned())
}

/// Addresses of the machine itself and of its link are not for those who may only speak to pods.
fn may_be_asked(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.to_ipv4_mapped().is_some(),
    };
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || link_local)
}

fn not_allowed() -> ApiError {
    ApiError::bad_request("address not allowed")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_path_names() {
        let target = |https, name, port| Some(Target { https, name, port });
        assert_eq!(Target::parse("web"), target(false, "web", ""));
        assert_eq!(Target::parse("web:http"), target(false, "web", "http"));
        assert_eq!(Target::parse("https:web:"), target(true, "web", ""));
        assert_eq!(Target::parse("https:web:8443"), target(true, "web", "8443"));
        for bad in ["", ":80", "ftp:web:21", "a:b:c:d"] {
            assert_eq!(Target::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_follows_is_as_it_was_written() {
        let rest = |path: &str| {
            let target = ResourcePath::parse(path).unwrap();
            assert_eq!(target.subresource.as_deref(), Some("proxy"), "{path}");
            after_proxy(path, &target).to_owned()
        };
        assert_eq!(rest("/api/v1/namespaces/a/pods/b/proxy"), "");
        assert_eq!(rest("/api/v1/namespaces/a/pods/b:80/proxy/"), "/");
        assert_eq!(rest("/api/v1/namespaces/proxy/services/proxy/proxy/proxy//x%2Fy/"), "/proxy//x%2Fy/");
        assert_eq!(rest("/api/v1/nodes/n/proxy/metrics"), "/metrics");
    }

    #[test]
    fn ports() {
        let service = json!({"spec": {"ports": [{"port": 80, "name": "web", "targetPort": 8080}, {"port": 90}]}});
        let name = |port| port_name(&service, &Target { https: false, name: "s", port });
        assert_eq!(name("80").unwrap(), "web");
        assert_eq!(name("90").unwrap(), "");
        assert_eq!(name("web").unwrap(), "web");
        assert_eq!(name("").unwrap(), "");
        assert_eq!(name("8080").unwrap_err().message, "no service port 8080 found for service \"s\"");
        let pod = json!({"spec": {"containers": [{"name": "a"}, {"ports": [{"containerPort": 9}]}]}});
        assert_eq!(first_port(&pod), Some(9));
        assert_eq!(first_port(&json!({})), None);
    }

    #[test]
    fn nobody_reaches_the_machine_itself() {
        for (ip, may) in [
            ("10.1.2.3", true),
            ("fd00::1", true),
            ("127.0.0.1", false),
            ("169.254.169.254", false),
            ("0.0.0.0", false),
            ("::1", false),
            ("fe80::1", false),
            ("::ffff:127.0.0.1", false),
        ] {
            assert_eq!(may_be_asked(ip.parse().unwrap()), may, "{ip}");
        }
    }

    #[test]
    fn the_root_is_on_this_server() {
        for (uri, expect) in [
            ("/api/v1/nodes/n/proxy?a=b", "/api/v1/nodes/n/proxy/?a=b"),
            ("//api/v1/nodes/n/proxy", "/api/v1/nodes/n/proxy/"),
        ] {
            let response = to_the_root(&uri.parse().unwrap());
            assert_eq!(response.status(), StatusCode::MOVED_PERMANENTLY);
            assert_eq!(response.headers()[header::LOCATION], expect, "{uri}");
        }
    }

    #[test]
    fn redirections_stay_below_the_path() {
        let moved = |place: &str| {
            let place = moved(&HeaderValue::try_from(place).unwrap(), "/api/v1/nodes/n/proxy");
            place.map(|place| place.to_str().unwrap().to_owned())
        };
        assert_eq!(moved("/logs/").as_deref(), Some("/api/v1/nodes/n/proxy/logs/"));
        for other in ["logs/", "https://elsewhere.example/x", "//elsewhere.example/x", "/api/v1/nodes/n/proxy/x"] {
            assert_eq!(moved(other), None, "{other}");
        }
    }

    #[test]
    fn who_asks_is_not_told() {
        let mut client = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer secret"),
            ("impersonate-user", "jane"),
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("host", "api.example"),
            ("accept", "text/html"),
        ] {
            client.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let named = |upgrades| {
            let out = headers(&client, upgrades, "/x");
            let mut names: Vec<String> = out.keys().map(|name| name.as_str().to_owned()).collect();
            names.sort();
            names
        };
        let forwarded = ["x-forwarded-host", "x-forwarded-proto", "x-forwarded-uri"];
        assert_eq!(named(false), [&["accept"][..], &forwarded].concat());
        assert_eq!(named(true), [&["accept", "connection", "upgrade"][..], &forwarded].concat());
    }
}
