//! What probes and lifecycle hooks do: an HTTP request, a TCP connection, a gRPC health check, a command.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

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

/// Asks by HTTP; any status from 200 to 399 is a yes. Redirects within the host are followed.
pub async fn http_get(target: &Target, action: &HTTPGetAction, agent: &str, limit: Duration) -> anyhow::Result<String> {
    let scheme = action.scheme.as_deref().unwrap_or("HTTP").to_ascii_lowercase();
    let authority = authority(&target.host(action.host.as_ref())?, target.port(&action.port)?);
    let path = action.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
    let slash = if path.starts_with('/') { "" } else { "/" };
    let mut url = format!("{scheme}://{authority}{slash}{path}");
    let work = async {
        for _ in 0..10 {
            let answer = ask(&url, action, agent).await?;
            match answer.location.as_deref().and_then(|l| redirected(&url, l)) {
                Some(next) if (300..400).contains(&answer.status) => url = next,
                _ => return Ok(answer),
            }
        }
        bail!("stopped after 10 redirects")
    };
    let answer = match timeout(limit, work).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => bail!("Get {url:?}: {error:#}"),
        Err(_) => bail!("Get {url:?}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)"),
    };
    match answer.status {
        200..400 => Ok(answer.body),
        status => bail!("HTTP probe failed with statuscode: {status}"),
    }
}

/// Where a redirect from `url` leads, if that is on the same host; upstream takes any other for a yes.
fn redirected(url: &str, location: &str) -> Option<String> {
    let from: http::Uri = url.parse().ok()?;
    let origin = format!("{}://{}", from.scheme_str()?, from.authority()?);
    if location.starts_with("//") {
        return None;
    }
    let next = match location.split_once("://") {
        Some(_) => location.to_owned(),
        None if location.starts_with('/') => format!("{origin}{location}"),
        None => format!("{origin}{}{location}", &from.path()[..=from.path().rfind('/')?]),
    };
    let to: http::Uri = next.parse().ok()?;
    (to.host() == from.host() && matches!(to.scheme_str(), Some("http" | "https"))).then_some(next)
}

struct Answer {
    status: u16,
    location: Option<String>,
    body: String,
}

async fn ask(url: &str, action: &HTTPGetAction, agent: &str) -> anyhow::Result<Answer> {
    let uri: http::Uri = url.parse()?;
    let secure = uri.scheme_str() == Some("https");
    let host = uri.host().ok_or_else(|| anyhow!("no host in {url}"))?.trim_matches(['[', ']']).to_owned();
    let authority = authority(&host, uri.port_u16().unwrap_or(if secure { 443 } else { 80 }));
    let mut request = http::Request::builder()
        .uri(uri.path_and_query().map_or("/", |p| p.as_str()))
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
    let request = request.header("host", &host_header).body(Empty::<Bytes>::new())?;
    let stream = dial(&authority).await?;
    if secure {
        let name = ServerName::try_from(host).map_err(|e| anyhow!("{e}"))?;
        send(tokio_rustls::TlsConnector::from(trusting()?).connect(name, stream).await?, request).await
    } else {
        send(stream, request).await
    }
}

async fn send<S>(stream: S, request: http::Request<Empty<Bytes>>) -> anyhow::Result<Answer>
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
    let location = response.headers().get("location").and_then(|l| l.to_str().ok()).map(str::to_owned);
    let body = match Limited::new(response.into_body(), 10 << 10).collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        Err(_) => String::new(),
    };
    Ok(Answer { status, location, body })
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
    let connected = AtomicBool::new(false);
    let work = async {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{authority}"))?.user_agent(agent)?;
        let channel = endpoint
            .connect()
            .await
            .map_err(|_| anyhow!("failed to connect service {authority:?} within {limit:?}: connection refused"))?;
        connected.store(true, Ordering::Relaxed);
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await?;
        let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
        let reply: Result<tonic::Response<u64>, tonic::Status> =
            client.unary(tonic::Request::new(service), path, HealthCodec).await;
        let reply = reply.map_err(|status| match status.code() {
            tonic::Code::Unimplemented => anyhow!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
                status.message()
            ),
            code => {
                anyhow!("error: health rpc probe failed: rpc error: code = {code:?} desc = {}", status.message())
            }
        })?;
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
        Err(_) if connected.load(Ordering::Relaxed) => {
            bail!("timeout: health rpc did not complete within {limit:?}")
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_on_the_host() {
        let check = |url, location, expect: Option<&str>| assert_eq!(redirected(url, location).as_deref(), expect);
        check("http://10.0.0.1:80/a/b?c", "/d", Some("http://10.0.0.1:80/d"));
        check("http://10.0.0.1:80/a/b?c", "d?e", Some("http://10.0.0.1:80/a/d?e"));
        check("http://10.0.0.1:80/", "https://10.0.0.1:8443/x", Some("https://10.0.0.1:8443/x"));
        check("http://[fd00::1]:80/", "https://[fd00::1]/x", Some("https://[fd00::1]/x"));
        check("http://10.0.0.1:80/", "http://login.example/", None);
        check("http://10.0.0.1:80/", "//login.example/", None);
        check("http://10.0.0.1:80/", "ftp://10.0.0.1/", None);
    }
}
