//! What the tests of probes ask: a real gRPC health service, an HTTPS server with a certificate that nobody signed, and
//! a port that accepts and never answers. All of it is well until `/tmp/sick` exists.
#![allow(clippy::unwrap_used)]

use std::{convert::Infallible, path::Path, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tonic_health::{ServingStatus, server::health_reporter};

fn sick() -> bool {
    Path::new("/tmp/sick").exists()
}

#[tokio::main]
async fn main() {
    tokio::try_join!(health(), https(), silence()).unwrap();
}

/// Port 5000, services `well`, `sick` and `both` (which depends on the file).
async fn health() -> anyhow::Result<()> {
    let (reporter, service) = health_reporter();
    reporter.set_service_status("well", ServingStatus::Serving).await;
    reporter.set_service_status("sick", ServingStatus::NotServing).await;
    tokio::spawn(async move {
        loop {
            let status = if sick() { ServingStatus::NotServing } else { ServingStatus::Serving };
            reporter.set_service_status("both", status).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    Ok(tonic::transport::Server::builder().add_service(service).serve("0.0.0.0:5000".parse()?).await?)
}

/// Port 8443: `/STATUS` answers with it (and leads to `/500`), `/both` with 200 or 503.
async fn https() -> anyhow::Result<()> {
    let signed = rcgen::generate_simple_self_signed(vec!["another.example".into()])?;
    let key =
        rustls_pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key)?;
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("0.0.0.0:8443").await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let stream = acceptor.accept(stream).await?;
            let answer = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async move {
                let path = request.uri().path();
                let status = match path.trim_start_matches('/').parse() {
                    Ok(status) => status,
                    Err(_) if path == "/both" && !sick() => 200,
                    Err(_) => 503,
                };
                let agent = request.headers().get("user-agent").and_then(|a| a.to_str().ok()).unwrap_or_default();
                println!("{path} {status} {agent}");
                let response = http::Response::builder().status(status).header("location", "/500");
                Ok::<_, Infallible>(response.body(Full::new(bytes::Bytes::from("body\n"))).unwrap())
            });
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            builder.serve_connection(TokioIo::new(stream), answer).await.map_err(anyhow::Error::msg)
        });
    }
}

/// Port 9000.
async fn silence() -> anyhow::Result<()> {
    let listener = TcpListener::bind("0.0.0.0:9000").await?;
    let mut open = Vec::new();
    loop {
        open.push(listener.accept().await?);
    }
}
