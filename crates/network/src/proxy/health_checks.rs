//! Whether this node has endpoints of a Service, for load balancers that send it connections only if it has
//! (`healthCheckNodePort`: <https://kubernetes.io/docs/tasks/access-application-cluster/create-external-load-balancer/#preserving-the-client-source-ip>).
//!
//! What is to be said on which port is worked out by [`of`], which is pure. [`HealthChecks`] listens on these ports, on all
//! addresses of the machine, and answers as kube-proxy does.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::{AbortHandle, JoinSet},
};

use super::endpoints::{Scope, View, policies};

/// How many may ask on one port at the same time. Whoever comes after them waits.
const AT_ONCE: usize = 64;
/// How long a connection may last.
const LONGEST: Duration = Duration::from_secs(10);
/// How many connections wait to be taken.
const BACKLOG: i32 = 128;

/// What is asked about on a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The Service's namespace.
    pub namespace: String,
    /// The Service's name.
    pub name: String,
    /// How many of its endpoints on this node are ready. One with an address of each family is one.
    pub local: usize,
}

/// What is asked about, by port.
pub fn of(view: &View<'_>) -> BTreeMap<u16, Check> {
    let mut checks: BTreeMap<u16, Check> = BTreeMap::new();
    for served in view.services() {
        let spec = served.service.spec.as_ref();
        let port = spec.and_then(|spec| spec.health_check_node_port).and_then(|port| u16::try_from(port).ok());
        let balanced = spec.and_then(|spec| spec.type_.as_deref()) == Some("LoadBalancer");
        let local = balanced && policies(served.service).1 == Scope::Local;
        let Some(port) = port.filter(|port| *port != 0 && local) else { continue };
        let ready: BTreeSet<_> = served.slices.iter().flat_map(|slice| view.ready_here(slice)).collect();
        let (namespace, name) = (served.namespace.to_owned(), served.name.to_owned());
        let check = checks.entry(port).or_insert(Check { namespace, name, local: 0 });
        // Two Services have no port in common, two families of one have.
        if (&*check.namespace, &*check.name) == (served.namespace, served.name) {
            check.local = check.local.max(ready.len());
        }
    }
    checks
}

/// Ports on which the health of Services is told.
#[derive(Default)]
pub struct HealthChecks {
    open: BTreeMap<u16, Open>,
    listeners: JoinSet<()>,
    /// Ports that somebody else has. That is said once.
    refused: BTreeSet<u16>,
    healthy: Arc<AtomicBool>,
}

struct Open {
    check: Arc<Mutex<Check>>,
    listener: AbortHandle,
}

impl HealthChecks {
    /// From now on this is told, and whether the proxy has set up what it should. A port that could not be had is tried
    /// again every time.
    pub fn tell(&mut self, wanted: &BTreeMap<u16, Check>, healthy: bool) {
        self.healthy.store(healthy, Ordering::Relaxed);
        while self.listeners.try_join_next().is_some() {}
        self.open.retain(|port, open| {
            let stays = wanted.contains_key(port) && !open.listener.is_finished();
            if !stays {
                open.listener.abort();
            }
            stays
        });
        self.refused.retain(|port| wanted.contains_key(port));
        for (port, check) in wanted {
            if let Some(open) = self.open.get(port) {
                open.check.lock().clone_from(check);
                continue;
            }
            match listen(*port) {
                Ok(listener) => {
                    self.refused.remove(port);
                    let told = Arc::new(Mutex::new(check.clone()));
                    let listener = self.listeners.spawn(serve(listener, told.clone(), self.healthy.clone()));
                    self.open.insert(*port, Open { check: told, listener });
                }
                Err(error) if self.refused.insert(*port) => {
                    let Check { namespace, name, .. } = check;
                    tracing::warn!(%error, "nobody learns the health of {namespace}/{name} on port {port} of this node");
                }
                Err(_) => {}
            }
        }
    }
}

/// On all addresses of both families, as far as the machine has them.
fn listen(port: u16) -> io::Result<TcpListener> {
    let on = |domain: Domain, address: SocketAddr| -> io::Result<TcpListener> {
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    match on(Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            on(Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into())
        }
        result => result,
    }
}

async fn serve(listener: TcpListener, check: Arc<Mutex<Check>>, healthy: Arc<AtomicBool>) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a health check was not taken");
                // Out of files, as a rule, which does not end at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let (check, healthy) = (check.clone(), healthy.clone());
        connections.spawn(async move {
            let _place = place;
            let _ = tokio::time::timeout(LONGEST, converse(stream, &check, &healthy)).await;
        });
    }
}

async fn converse(stream: TcpStream, check: &Mutex<Check>, healthy: &AtomicBool) {
    let answer = service_fn(|_: Request<Incoming>| {
        let answer = answer(&check.lock(), healthy.load(Ordering::Relaxed));
        async move { Ok::<_, Infallible>(answer) }
    });
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(LONGEST / 2);
    if let Err(error) = server.serve_connection(TokioIo::new(stream), answer).await {
        tracing::debug!(%error, "a health check was not answered");
    }
}

/// What is answered, whatever the path.
fn answer(check: &Check, healthy: bool) -> Response<Full<Bytes>> {
    let Check { namespace, name, local } = check;
    let body = json!({"service": {"namespace": namespace, "name": name}, "localEndpoints": local,
        "serviceProxyHealthy": healthy});
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    if *local == 0 || !healthy {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // How much of the load this node may get of it.
    headers.insert("x-load-balancing-endpoint-weight", HeaderValue::from(*local));
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::*;
    use crate::proxy::state::{self, State};

    /// A Service with slices of these families and endpoints: `m` ready here, `a` ready elsewhere, `m!` ending, `m-` not
    /// ready.
    fn checks(spec: Value, slices: &[(&str, &str)]) -> BTreeMap<u16, Check> {
        let mut known = State::default();
        let service = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": spec});
        known.services.extend([state::service(serde_json::from_value(service).unwrap())]);
        for (number, (family, endpoints)) in slices.iter().enumerate() {
            let endpoint = |(place, word): (usize, &str)| {
                let address = if *family == "IPv6" { format!("fd00::{place}") } else { format!("10.0.0.{place}") };
                json!({"addresses": [address], "nodeName": word[..1], "conditions": {"ready": word.len() == 1,
                    "serving": !word.contains('-'), "terminating": word.contains('!')}})
            };
            let endpoints: Vec<Value> = endpoints.split(' ').enumerate().map(endpoint).collect();
            let slice = json!({"metadata": {"name": format!("s-{number}"), "namespace": "n",
                "labels": {"kubernetes.io/service-name": "s"}}, "addressType": family,
                "ports": [{"name": "", "port": 80}], "endpoints": endpoints});
            known.slices.extend([state::slice(serde_json::from_value(slice).unwrap())]);
        }
        of(&View::new(&known, "m", &BTreeMap::new()))
    }

    #[test]
    fn what_is_told() {
        let spec = |policy: &str, kind: &str| {
            json!({"type": kind, "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:96::9"],
                "externalTrafficPolicy": policy, "healthCheckNodePort": 30009, "ports": [{"port": 80}]})
        };
        let local = |slices: &[(&str, &str)]| {
            let checks = checks(spec("Local", "LoadBalancer"), slices);
            assert_eq!(checks.len(), 1, "{checks:?}");
            checks[&30009].local
        };
        assert_eq!(local(&[]), 0);
        assert_eq!(local(&[("IPv4", "a")]), 0);
        assert_eq!(local(&[("IPv4", "m a m")]), 2);
        // What ends takes no new connections of a load balancer.
        assert_eq!(local(&[("IPv4", "m! m- m")]), 1);
        // The same pods in both families, and an endpoint in two slices.
        assert_eq!(local(&[("IPv4", "m m"), ("IPv6", "m m")]), 2);
        assert_eq!(local(&[("IPv4", "m"), ("IPv4", "m a")]), 1);
        assert!(checks(spec("Cluster", "LoadBalancer"), &[("IPv4", "m")]).is_empty());
        assert!(checks(spec("Local", "NodePort"), &[("IPv4", "m")]).is_empty());
    }

    async fn ask(address: SocketAddr) -> io::Result<(u16, Value)> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await?;
        let mut said = String::new();
        stream.read_to_string(&mut said).await?;
        let status = said.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default();
        let body = said.split("\r\n\r\n").nth(1).and_then(|body| serde_json::from_str(body).ok());
        Ok((status, body.unwrap_or_default()))
    }

    #[tokio::test]
    async fn it_is_told_on_its_port() {
        let free = std::net::TcpListener::bind("[::]:0").unwrap();
        let port = free.local_addr().unwrap().port();
        let address: SocketAddr = (Ipv4Addr::LOCALHOST, port).into();
        let check = |local: usize| BTreeMap::from([(port, Check { namespace: "n".into(), name: "s".into(), local })]);
        let said = |local: usize, healthy: bool| json!({"service": {"namespace": "n", "name": "s"}, "localEndpoints": local, "serviceProxyHealthy": healthy});
        let mut told = HealthChecks::default();
        // Somebody else has the port, and lets it go.
        told.tell(&check(2), true);
        assert!(told.open.is_empty() && told.refused.contains(&port));
        drop(free);
        told.tell(&check(2), true);
        assert_eq!(ask(address).await.unwrap(), (200, said(2, true)));
        assert_eq!(ask((Ipv6Addr::LOCALHOST, port).into()).await.unwrap(), (200, said(2, true)));
        told.tell(&check(0), true);
        assert_eq!(ask(address).await.unwrap(), (503, said(0, true)));
        told.tell(&check(1), false);
        assert_eq!(ask(address).await.unwrap(), (503, said(1, false)));
        // Who says nothing does not keep others away.
        let _silent = TcpStream::connect(address).await.unwrap();
        told.tell(&check(1), true);
        assert_eq!(ask(address).await.unwrap(), (200, said(1, true)));
        told.tell(&BTreeMap::new(), true);
        let gone = async {
            while TcpStream::connect(address).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the port is closed");
    }
}
