//! exec and attach: a WebSocket of `v5.channel.k8s.io` or `v4.channel.k8s.io` on the client's side, SPDY towards the
//! runtime's streaming server. A client that speaks SPDY itself is connected straight through.
//!
//! <https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/4006-transition-spdy-to-websockets>

use std::{io, sync::Arc};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_cri::v1 as cri;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::Message;

use super::{
    Body, Query, full, refuse, running_id,
    spdy::{Role, Session, Stream},
    ws,
};
use crate::Agent;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A new process in the container.
    Exec,
    /// The container's own.
    Attach,
}

/// The streams that the client wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Wanted {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Wanted {
    fn from_query(query: &Query) -> Self {
        let tty = query.flag(&["tty"]);
        Self {
            stdin: query.flag(&["input", "stdin"]),
            stdout: query.flag(&["output", "stdout"]),
            // With a terminal both are one.
            stderr: query.flag(&["error", "stderr"]) && !tty,
            tty,
        }
    }
}

/// Subprotocols, the preferred one first. v5 adds the closing of stdin.
const PROTOCOLS: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];

/// `/exec/...` and `/attach/...`
pub async fn handle(
    agent: Arc<Agent>,
    what: What,
    namespace: &str,
    pod: &str,
    container: &str,
    query: &Query,
    request: Request<Incoming>,
) -> Response<Body> {
    let wanted = Wanted::from_query(query);
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return refuse(StatusCode::BAD_REQUEST, "you must specify at least 1 of stdin, stdout, stderr");
    }
    let command = query.all("command");
    if what == What::Exec && command.is_empty() {
        return refuse(StatusCode::BAD_REQUEST, "you must specify a command to execute: command is required");
    }
    let id = match running_id(&agent, namespace, pod, container) {
        Ok(id) => id,
        Err(response) => return *response,
    };
    let url = start(&agent.cri, what, id, command, wanted).await;
    let url = match url {
        Ok(url) => url,
        Err(status) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, status.message()),
    };
    serve(&url, wanted.stdin, wanted.stdout, wanted.stderr, wanted.tty, request).await
}

async fn start(
    cri: &crate::cri::Cri,
    what: What,
    id: String,
    command: Vec<String>,
    wanted: Wanted,
) -> Result<String, tonic::Status> {
    let Wanted { stdin, stdout, stderr, tty } = wanted;
    match what {
        What::Exec => cri.exec(cri::ExecRequest { container_id: id, cmd: command, tty, stdin, stdout, stderr }).await,
        What::Attach => cri.attach(cri::AttachRequest { container_id: id, tty, stdin, stdout, stderr }).await,
    }
}

/// Answers an upgrade request by connecting the client with the runtime's stream at `url`.
async fn serve(
    url: &str,
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
    request: Request<Incoming>,
) -> Response<Body> {
    let wanted = Wanted { stdin, stdout, stderr, tty };
    let headers = request.headers();
    if ws::wants(headers, "websocket") {
        let Some(protocol) = ws::choose(headers, &PROTOCOLS) else {
            return refuse(
                StatusCode::BAD_REQUEST,
                format!("unable to negotiate a subprotocol; the node agent speaks {PROTOCOLS:?}"),
            );
        };
        let Some(response) = ws::accept(headers, protocol) else {
            return refuse(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing");
        };
        let runtime = match Runtime::connect(url, wanted).await {
            Ok(runtime) => runtime,
            Err(error) => {
                return refuse(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    format!("error dialing the container runtime: {error}"),
                );
            }
        };
        tokio::spawn(async move {
            match ws::upgrade(request).await {
                Ok(socket) => bridge(socket, runtime, protocol == PROTOCOLS[0]).await,
                Err(error) => tracing::debug!("upgrade: {error}"),
            }
        });
        return response;
    }
    if ws::wants(headers, "SPDY/3.1") {
        return match pass_through(url, request).await {
            Ok(response) => response,
            Err(error) => {
                refuse(StatusCode::INTERNAL_SERVER_ERROR, format!("error dialing the container runtime: {error}"))
            }
        };
    }
    refuse(StatusCode::BAD_REQUEST, "Upgrade request required: websocket or SPDY/3.1")
}

/// Connects to the runtime's streaming server and asks for an upgrade. Returns what it answered, and the connection.
async fn dial(url: &str, protocols: &[&str]) -> io::Result<(HeaderMap, TcpStream, Vec<u8>)> {
    let uri: http::Uri = url.parse().map_err(io::Error::other)?;
    let authority =
        uri.authority().ok_or_else(|| io::Error::other(format!("the runtime's stream address {url:?} has no host")))?;
    let mut stream = TcpStream::connect(authority.as_str()).await?;
    stream.set_nodelay(true)?;
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let mut head = format!(
        "POST {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 0\r\n"
    );
    for protocol in protocols {
        head.push_str(&format!("X-Stream-Protocol-Version: {protocol}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    let end = loop {
        if let Some(at) = answer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
        if answer.len() > 16 << 10 || stream.read_buf(&mut answer).await? == 0 {
            return Err(io::Error::other("the runtime's stream server gave no complete answer"));
        }
    };
    let rest = answer.split_off(end + 4);
    let text = String::from_utf8_lossy(&answer);
    let mut lines = text.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("101") {
        return Err(io::Error::other(format!("the runtime's stream server answered {status:?}")));
    }
    let mut headers = HeaderMap::new();
    for (name, value) in lines.filter_map(|l| l.split_once(':')) {
        if let (Ok(name), Ok(value)) = (name.trim().parse::<http::HeaderName>(), value.trim().parse()) {
            headers.append(name, value);
        }
    }
    Ok((headers, stream, rest))
}

/// A SPDY client is connected with the runtime byte by byte.
async fn pass_through(url: &str, request: Request<Incoming>) -> io::Result<Response<Body>> {
    let offered = request.headers().get_all("x-stream-protocol-version");
    let offered: Vec<&str> =
        offered.into_iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).map(str::trim).collect();
    let (headers, mut runtime, rest) = dial(url, &offered).await?;
    let mut response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header("connection", "Upgrade")
        .header("upgrade", "SPDY/3.1");
    if let Some(version) = headers.get("x-stream-protocol-version") {
        response = response.header("x-stream-protocol-version", version);
    }
    let response = response.body(full(Bytes::new())).map_err(io::Error::other)?;
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else { return };
        let mut client = TokioIo::new(upgraded);
        if client.write_all(&rest).await.is_ok() {
            let _ = tokio::io::copy_bidirectional(&mut client, &mut runtime).await;
        }
    });
    Ok(response)
}

/// The runtime's end: one SPDY stream per channel.
pub struct Runtime {
    error: Stream,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
    work: tokio::task::AbortHandle,
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.work.abort();
    }
}

impl Runtime {
    async fn connect(url: &str, wanted: Wanted) -> io::Result<Self> {
        let (_, stream, rest) = dial(url, &["v4.channel.k8s.io"]).await?;
        let (reader, writer) = stream.into_split();
        let joined = tokio::io::join(io::Cursor::new(rest).chain(reader), writer);
        let (session, _, work) = Session::start(joined, Role::Client)?;
        let work = tokio::spawn(work).abort_handle();
        let open = async |kind: &str, wanted: bool| match wanted {
            true => session.open(vec![("streamtype".to_owned(), kind.to_owned())]).await.map(Some),
            false => Ok(None),
        };
        let error = open("error", true).await?.ok_or_else(|| io::Error::other("no error stream"))?;
        Ok(Self {
            error,
            stdin: open("stdin", wanted.stdin).await?,
            stdout: open("stdout", wanted.stdout).await?,
            stderr: open("stderr", wanted.stderr).await?,
            resize: open("resize", wanted.tty).await?,
            work,
        })
    }
}

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

fn message(channel: u8, bytes: &[u8]) -> Message {
    let mut out = Vec::with_capacity(bytes.len() + 1);
    out.push(channel);
    out.extend_from_slice(bytes);
    Message::binary(out)
}

/// Carries bytes between the client's channels and the runtime's streams until the process is over or the client gone.
async fn bridge(socket: ws::Socket, mut runtime: Runtime, can_close: bool) {
    let (mut sink, mut source) = socket.split();
    let (stdin, resize) = (runtime.stdin.take(), runtime.resize.take());
    let (out, mut messages) = mpsc::channel::<Message>(16);

    let inward = async {
        while let Some(Ok(received)) = source.next().await {
            let bytes = match received {
                Message::Binary(bytes) => bytes,
                Message::Close(_) => return,
                _ => continue,
            };
            let Some((channel, data)) = bytes.split_first() else { continue };
            let data = bytes.slice_ref(data);
            let result = match (*channel, &stdin, &resize) {
                (STDIN, Some(stdin), _) if !data.is_empty() => stdin.writer.send(data).await,
                (RESIZE, _, Some(resize)) if !data.is_empty() => resize.writer.send(data).await,
                (CLOSE, Some(stdin), _) if can_close && data.first() == Some(&STDIN) => stdin.writer.finish().await,
                _ => Ok(()),
            };
            // The process is over; its last words are still on the way out.
            if result.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let outward = async move {
        // An empty message tells the client that the connection stands.
        let first = if runtime.stdout.is_some() {
            STDOUT
        } else if runtime.stderr.is_some() {
            STDERR
        } else {
            ERROR
        };
        let _ = out.send(message(first, &[])).await;
        let copy = async |stream: Option<Stream>, channel: u8| {
            let Some(mut stream) = stream else { return };
            while let Some(bytes) = stream.reader.recv().await {
                if out.send(message(channel, &bytes)).await.is_err() {
                    return;
                }
            }
        };
        let (stdout, stderr) = (runtime.stdout.take(), runtime.stderr.take());
        let verdict = async {
            let mut all = Vec::new();
            while let Some(bytes) = runtime.error.reader.recv().await {
                all.extend_from_slice(&bytes);
            }
            all
        };
        let ((), (), verdict) = tokio::join!(copy(stdout, STDOUT), copy(stderr, STDERR), verdict);
        let verdict = if verdict.is_empty() {
            br#"{"metadata":{},"status":"Failure","message":"the container runtime closed the stream","reason":"InternalError","code":500}"#.to_vec()
        } else {
            verdict
        };
        let _ = out.send(message(ERROR, &verdict)).await;
        let _ = out.send(ws::goodbye()).await;
    };
    let write = async {
        while let Some(message) = messages.recv().await {
            let last = matches!(message, Message::Close(_));
            if sink.send(message).await.is_err() || last {
                return;
            }
        }
    };
    tokio::select! {
        () = inward => {}
        ((), ()) = async { tokio::join!(outward, write) } => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_names_of_the_streams() {
        let w = |q: &str| Wanted::from_query(&Query::parse(q));
        assert_eq!(w("input=1&output=1&tty=1&error=1"), Wanted { stdin: true, stdout: true, stderr: false, tty: true });
        assert_eq!(w("stdout=true&stderr=true"), Wanted { stdout: true, stderr: true, ..Default::default() });
    }
}
