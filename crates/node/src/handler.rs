//! What probes and lifecycle hooks do: an HTTP request, a TCP connection, a gRPC health check, a command.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Context, anyhow, bail};
use bytes::{Buf, BufMut, Bytes};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::{
    api::core::v1::{Container, ExecAction, GRPCAction, HTTPGetAction, TCPSocketAction},
    apimachinery::pkg::util::intstr::IntOrString,
};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};

use crate::cri::Cri;

/// Where and in which container a handler works.
#[derive(Clone)]
pub struct Target {
    /// The runtime.
    pub cri: Cri,
    /// The container's id.
    pub container: String,
    /// The pod's address.
    pub address: Option<IpAddr>,
    /// The container's named ports.
    pub ports: Vec<(String, u16)>,
}

impl Target {
    /// The names of a container's ports.
    pub fn ports(container: &Container) -> Vec<(String, u16)> {
        let ports = container.ports.iter().flatten();
        ports.filter_map(|p| Some((p.name.clone()?, u16::try_from(p.container_port).ok()?))).collect()
    }

    fn port(&self, port: &IntOrString) -> anyhow::Result<u16> {
        let number = match port {
            IntOrString::Int(number) => u16::try_from(*number).ok(),
            IntOrString::String(name) => {
                self.ports.iter().find(|(n, _)| n == name).map(|(_, p)| *p).or_else(|| name.parse().ok())
            }
        };
        number.filter(|n| *n > 0).ok_or_else(|| anyhow!("invalid port number: {port:?}"))
    }

    fn host(&self, named: Option<&String>) -> anyhow::Result<String> {
        match (named.filter(|h| !h.is_empty()), self.address) {
            (Some(host), _) => Ok(host.clone()),
            (None, Some(address)) => Ok(address.to_string()),
            (None, None) => bail!("the pod has no address yet"),
        }
    }
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

async fn dial(authority: &str) -> anyhow::Result<TcpStream> {
    match TcpStream::connect(authority).await {
        Ok(stream) => {
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
        Err(error) => {
            let text = match error.kind() {
                std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
                std::io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
                _ => error.to_string(),
            };
            bail!("dial tcp {authority}: {text}")
        }
    }
}

/// Connects, and that is all.
pub async fn tcp(target: &Target, action: &TCPSocketAction, limit: Duration) -> anyhow::Result<String> {
    let authority = authority(&target.host(action.host.as_ref())?, target.port(&action.port)?);
    match timeout(limit, dial(&authority)).await {
        Ok(result) => result.map(|_| String::new()),
        Err(_) => bail!("dial tcp {authority}: i/o timeout"),
    }
}

/// Asks by HTTP; any status from 200 to 399 is a yes.
pub async fn http_get(target: &Target, action: &HTTPGetAction, agent: &str, limit: Duration) -> anyhow::Result<String> {
    let scheme = action.scheme.as_deref().unwrap_or("HTTP").to_ascii_lowercase();
    let (host, port) = (target.host(action.host.as_ref())?, target.port(&action.port)?);
    let authority = authority(&host, port);
    let path = action.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let url = format!("{scheme}://{authority}{path}");
    let mut request = http::Request::builder()
        .uri(&path)
        .header("user-agent", agent)
        .header("accept", "*/*")
        .header("connection", "close");
    let mut host_header = authority.clone();
    for header in action.http_headers.iter().flatten() {
        if header.name.eq_ignore_ascii_case("host") {
            host_header.clone_from(&header.value);
        } else {
            request = request.header(&header.name, &header.value);
        }
    }
    let request = request
        .header("host", &host_header)
        .body(Empty::<Bytes>::new())
        .with_context(|| format!("request for {url}"))?;
    let work = async {
        let stream = dial(&authority).await?;
        if scheme == "https" {
            let name = ServerName::try_from(host.clone()).map_err(|e| anyhow!("{e}"))?;
            let stream = tokio_rustls::TlsConnector::from(trusting()?).connect(name, stream).await?;
            send(stream, request).await
        } else {
            send(stream, request).await
        }
    };
    let (status, body) = match timeout(limit, work).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => bail!("Get {url:?}: {error:#}"),
        Err(_) => bail!("Get {url:?}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)"),
    };
    if (200..400).contains(&status) {
        return Ok(body);
    }
    bail!("HTTP probe failed with statuscode: {status}")
}

async fn send<S>(stream: S, request: http::Request<Empty<Bytes>>) -> anyhow::Result<(u16, String)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the response: the request says `connection: close`, and dropping the sender closes it too.
    tokio::spawn(async move {
        let _ = timeout(Duration::from_secs(60), connection).await;
    });
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = match Limited::new(response.into_body(), 10 << 10).collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        Err(_) => String::new(),
    };
    Ok((status, body))
}

/// Probes do not verify certificates: a pod's own certificate names whatever it names (as upstream).
fn trusting() -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &[rustls_pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls_pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls_pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Runs a command; its output is the message.
pub async fn exec(target: &Target, action: &ExecAction, limit: Duration) -> anyhow::Result<String> {
    let command = action.command.clone().unwrap_or_default();
    match target.cri.exec_sync(&target.container, command, limit).await {
        Ok(reply) => {
            let mut output = reply.stdout;
            output.extend(reply.stderr);
            output.truncate(10 << 10);
            let text = String::from_utf8_lossy(&output).into_owned();
            if reply.exit_code == 0 {
                Ok(text)
            } else {
                bail!("{}", if text.is_empty() { format!("command exited with {}", reply.exit_code) } else { text })
            }
        }
        Err(status) if status.code() == tonic::Code::DeadlineExceeded => bail!("command timed out after {limit:?}"),
        Err(status) => bail!("{}", status.message()),
    }
}

/// `grpc.health.v1.Health/Check`. The two messages are one field each, so they are written out by hand:
/// <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>.
pub async fn grpc(target: &Target, action: &GRPCAction, agent: &str, limit: Duration) -> anyhow::Result<String> {
    let authority = authority(&target.host(None)?, u16::try_from(action.port).context("invalid port number")?);
    let service = action.service.clone().unwrap_or_default();
    let work = async {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{authority}"))?.user_agent(agent)?;
        let channel = endpoint
            .connect()
            .await
            .map_err(|_| anyhow!("failed to connect service {authority:?} within {limit:?}: connection refused"))?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await?;
        let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
        let reply: tonic::Response<u64> = client.unary(tonic::Request::new(service), path, HealthCodec).await?;
        match reply.into_inner() {
            1 => Ok(String::new()),
            other => {
                let name =
                    ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"].get(other as usize).unwrap_or(&"UNKNOWN");
                bail!("service unhealthy (responded with {name:?})")
            }
        }
    };
    match timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => bail!("timeout: failed to connect service {authority:?} within {limit:?}: context deadline exceeded"),
    }
}

struct HealthCodec;

impl tonic::codec::Codec for HealthCodec {
    type Encode = String;
    type Decode = u64;
    type Encoder = HealthCodec;
    type Decoder = HealthCodec;

    fn encoder(&mut self) -> Self::Encoder {
        HealthCodec
    }
    fn decoder(&mut self) -> Self::Decoder {
        HealthCodec
    }
}

impl tonic::codec::Encoder for HealthCodec {
    type Item = String;
    type Error = tonic::Status;

    /// `message HealthCheckRequest { string service = 1; }`
    fn encode(&mut self, service: String, out: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        if !service.is_empty() {
            out.put_u8(0x0a);
            let mut length = service.len();
            while length >= 0x80 {
                out.put_u8(length as u8 | 0x80);
                length >>= 7;
            }
            out.put_u8(length as u8);
            out.put_slice(service.as_bytes());
        }
        Ok(())
    }
}

impl tonic::codec::Decoder for HealthCodec {
    type Item = u64;
    type Error = tonic::Status;

    /// `message HealthCheckResponse { ServingStatus status = 1; }`; a default (UNKNOWN) is not on the wire.
    fn decode(&mut self, from: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<u64>, tonic::Status> {
        let mut status = 0;
        if from.remaining() >= 2 && from.get_u8() == 0x08 {
            status = u64::from(from.get_u8());
        }
        from.advance(from.remaining());
        Ok(Some(status))
    }
}

/// The user agent of probes and hooks.
pub const PROBE_AGENT: &str = "kube-probe/1.37";
