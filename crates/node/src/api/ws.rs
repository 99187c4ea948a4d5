//! WebSocket: the handshake on our side, and a byte stream through binary messages.

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, Request, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, frame::coding::CloseCode},
    },
};

use super::{Body, full};

/// A connection after the handshake.
pub type Socket = WebSocketStream<TokioIo<Upgraded>>;

fn has(headers: &HeaderMap, name: header::HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).any(|t| t.trim().eq_ignore_ascii_case(token))
}

/// Whether a request asks to become this protocol.
pub fn wants(headers: &HeaderMap, protocol: &str) -> bool {
    has(headers, header::CONNECTION, "upgrade") && has(headers, header::UPGRADE, protocol)
}

/// The first of our protocols that the client offers.
pub fn choose(headers: &HeaderMap, ours: &[&'static str]) -> Option<&'static str> {
    ours.iter().find(|p| has(headers, header::SEC_WEBSOCKET_PROTOCOL, p)).copied()
}

/// The answer that accepts the handshake, `None` if the request has no key.
pub fn accept(headers: &HeaderMap, protocol: &str) -> Option<Response<Body>> {
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?;
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::UPGRADE, "websocket")
        .header(header::CONNECTION, "Upgrade")
        .header(header::SEC_WEBSOCKET_ACCEPT, derive_accept_key(key.as_bytes()))
        .header(header::SEC_WEBSOCKET_PROTOCOL, protocol)
        .body(full(Bytes::new()))
        .ok()
}

/// The socket, once the answer is out.
pub async fn upgrade(request: Request<Incoming>) -> Result<Socket, hyper::Error> {
    let upgraded = hyper::upgrade::on(request).await?;
    Ok(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await)
}

/// Ends a connection as planned: clients take a close without a code for an accident.
pub fn goodbye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

/// Carries bytes between a socket's binary messages and one end of a pipe, until either side ends.
pub async fn tunnel(socket: Socket, pipe: DuplexStream) {
    let (mut sink, mut source) = socket.split();
    let (mut reader, mut writer) = tokio::io::split(pipe);
    let inward = async {
        while let Some(Ok(message)) = source.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Close(_) => break,
                _ => continue,
            };
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = writer.shutdown().await;
    };
    let outward = async {
        let mut buffer = vec![0; 32 << 10];
        while let Ok(length @ 1..) = reader.read(&mut buffer).await {
            if sink.send(Message::binary(buffer[..length].to_vec())).await.is_err() {
                return;
            }
        }
        let _ = sink.send(goodbye()).await;
    };
    tokio::select! {
        () = inward => {}
        () = outward => {}
    }
}
