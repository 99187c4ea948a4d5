//! Port forwarding: SPDY, directly or inside a WebSocket (`SPDY/3.1+portforward.k8s.io`, KEP-4006). Each connection is
//! a pair of streams, one for data and one for an error.

use std::{collections::HashMap, net::SocketAddr, os::fd::AsFd, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use super::{
    Body, Query, find_pod, full, refuse,
    spdy::{Role, Session, Stream},
    ws,
};
use crate::Agent;

const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// `/portForward/{namespace}/{pod}`
pub async fn handle(
    agent: Arc<Agent>,
    namespace: &str,
    pod: &str,
    _query: &Query,
    request: Request<Incoming>,
) -> Response<Body> {
    let Some((found, _)) = find_pod(&agent, namespace, pod) else {
        return refuse(StatusCode::NOT_FOUND, format!("pod {pod:?} in namespace {namespace:?} is not on this node"));
    };
    let uid = crate::pod::uid(&found).to_owned();
    let Some(sandbox) = agent.pleg.pods().get(&uid).and_then(|p| p.sandbox().filter(|s| s.ready).map(|s| s.id.clone()))
    else {
        return refuse(StatusCode::BAD_REQUEST, format!("pod {pod:?} has no running sandbox"));
    };
    let host_network = found.spec.as_ref().is_some_and(|s| s.host_network == Some(true));
    let place = match network_namespace(&agent.cri, &sandbox, host_network).await {
        Ok(place) => place,
        Err(error) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")),
    };
    serve(place, request)
}

/// Answers the upgrade request.
fn serve(place: Option<String>, request: Request<Incoming>) -> Response<Body> {
    let headers = request.headers();
    if ws::wants(headers, "websocket") {
        if ws::choose(headers, &[TUNNEL]).is_none() {
            return refuse(
                StatusCode::BAD_REQUEST,
                format!("unable to negotiate a subprotocol; the node agent speaks {TUNNEL:?}"),
            );
        }
        let Some(response) = ws::accept(headers, TUNNEL) else {
            return refuse(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing");
        };
        tokio::spawn(async move {
            let Ok(socket) = ws::upgrade(request).await else { return };
            let (ours, theirs) = tokio::io::duplex(64 << 10);
            tokio::join!(ws::tunnel(socket, theirs), forward(ours, place));
        });
        return response;
    }
    if ws::wants(headers, "SPDY/3.1") {
        let response = Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header("connection", "Upgrade")
            .header("upgrade", "SPDY/3.1")
            .header("x-stream-protocol-version", "portforward.k8s.io")
            .body(full(Bytes::new()));
        tokio::spawn(async move {
            if let Ok(upgraded) = hyper::upgrade::on(request).await {
                forward(TokioIo::new(upgraded), place).await;
            }
        });
        return response.unwrap_or_else(|e| refuse(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()));
    }
    refuse(StatusCode::BAD_REQUEST, "Upgrade request required: websocket or SPDY/3.1")
}

/// The path of a sandbox's network namespace, `None` for the host's.
async fn network_namespace(cri: &crate::cri::Cri, sandbox: &str, host: bool) -> anyhow::Result<Option<String>> {
    if host {
        return Ok(None);
    }
    let status = cri
        .sandbox_status(sandbox, true)
        .await
        .map_err(|s| anyhow!("{}", s.message()))?
        .context("the sandbox is gone")?;
    let info: serde_json::Value =
        serde_json::from_str(status.info.get("info").context("the runtime gives no details of the sandbox")?)?;
    let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array();
    let path = namespaces.into_iter().flatten().find(|n| n["type"] == "network").and_then(|n| n["path"].as_str());
    if let Some(path) = path.filter(|p| !p.is_empty()) {
        return Ok(Some(path.to_owned()));
    }
    let pid =
        info["pid"].as_u64().filter(|p| *p > 0).context("the runtime does not say where the sandbox's network is")?;
    Ok(Some(format!("/proc/{pid}/ns/net")))
}

/// Connects to a port on the loopback of a network namespace, by IPv4, then by IPv6. The socket is made by a thread of
/// its own, which enters the namespace and ends there; a socket stays in the namespace that it was made in.
async fn connect(place: Option<String>, port: u16) -> anyhow::Result<TcpStream> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("portforward".into()).spawn(move || {
        let work = || -> anyhow::Result<std::net::TcpStream> {
            if let Some(place) = &place {
                let file = std::fs::File::open(place).with_context(|| format!("open {place}"))?;
                nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("enter {place}"))?;
            }
            let mut errors = Vec::new();
            for address in
                [SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from(([0_u16, 0, 0, 0, 0, 0, 0, 1], port))]
            {
                match std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
                    Ok(stream) => {
                        stream.set_nonblocking(true)?;
                        return Ok(stream);
                    }
                    Err(error) => errors.push(format!("dial tcp {address}: {error}")),
                }
            }
            Err(anyhow!("failed to connect to localhost:{port} inside the pod: {}", errors.join("; ")))
        };
        let _ = sender.send(work());
    })?;
    let stream = TcpStream::from_std(receiver.await??)?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// Pairs of streams that wait for their other half are bounded; a client opens both at once.
const MAX_PENDING: usize = 256;

/// Serves one client until it goes.
async fn forward<S: AsyncRead + AsyncWrite + Send + 'static>(io: S, place: Option<String>) {
    let Ok((session, mut incoming, work)) = Session::start(io, Role::Server) else { return };
    let mut connections = JoinSet::new();
    let mut waiting: HashMap<String, Stream> = HashMap::new();
    let accept = async {
        loop {
            tokio::select! {
                Some(_) = connections.join_next() => {}
                stream = incoming.recv() => {
                    let Some(stream) = stream else { return };
                    // Old clients give no id; they use the port for it.
                    let key = stream.header("requestid").or(stream.header("port")).unwrap_or_default().to_owned();
                    match waiting.remove(&key) {
                        None if waiting.len() < MAX_PENDING => drop(waiting.insert(key, stream)),
                        None => drop(stream.writer.reset().await),
                        Some(other) => {
                            let (data, error) = if stream.header("streamtype") == Some("data") { (stream, other) } else { (other, stream) };
                            connections.spawn(one(data, error, place.clone()));
                        }
                    }
                }
            }
        }
    };
    tokio::select! {
        _ = work => {}
        () = accept => {}
    }
    drop(session);
}

/// One forwarded connection.
async fn one(mut data: Stream, error: Stream, place: Option<String>) {
    let port = data.header("port").and_then(|p| p.parse().ok()).unwrap_or(0);
    let stream = match connect(place, port).await {
        Ok(stream) => stream,
        Err(why) => {
            let _ = error.writer.send(Bytes::from(format!("error forwarding port {port} to pod: {why:#}"))).await;
            let _ = error.writer.finish().await;
            let _ = data.writer.finish().await;
            return;
        }
    };
    let (mut reader, mut writer) = stream.into_split();
    let inward = async {
        while let Some(bytes) = data.reader.recv().await {
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = writer.shutdown().await;
    };
    let outward = async {
        let mut buffer = vec![0; 32 << 10];
        while let Ok(length @ 1..) = reader.read(&mut buffer).await {
            if data.writer.send(Bytes::copy_from_slice(&buffer[..length])).await.is_err() {
                return;
            }
        }
        let _ = data.writer.finish().await;
        let _ = error.writer.finish().await;
    };
    // The pod's end decides: a client that has half-closed still gets its answer.
    tokio::pin!(inward);
    let mut through = false;
    tokio::pin!(outward);
    loop {
        tokio::select! {
            () = &mut outward => return,
            () = &mut inward, if !through => through = true,
        }
    }
}
