//! An HTTPS server with an authority of its own, for what the server calls.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls_pki_types::PrivateKeyDer;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// What was asked of a site.
pub(crate) struct Asked {
    pub(crate) path: String,
    #[allow(dead_code, reason = "not everybody looks at them")]
    pub(crate) headers: HeaderMap,
    /// What was sent, if it is JSON.
    #[allow(dead_code, reason = "not everybody looks at it")]
    pub(crate) body: Value,
}

/// What a site answers.
pub(crate) type Answer = (StatusCode, Value);

type Say = dyn Fn(Asked) -> BoxFuture<'static, Answer> + Send + Sync;

pub(crate) struct Site {
    pub(crate) port: u16,
    /// Who signed its certificate, in PEM.
    pub(crate) ca: String,
    #[allow(dead_code, reason = "not everybody counts them")]
    pub(crate) connections: Arc<AtomicUsize>,
}

impl Site {
    /// With a certificate for these names.
    pub(crate) async fn new(
        names: &[&str],
        say: impl Fn(Asked) -> BoxFuture<'static, Answer> + Send + Sync + 'static,
    ) -> Site {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let site = Site { port, ca: authority.pem(), connections: Arc::default() };
        let connections = site.connections.clone();
        let say: Arc<Say> = Arc::new(say);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                let (acceptor, say) = (acceptor.clone(), say.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = service_fn(move |request| answer(request, say.clone()));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        site
    }
}

async fn answer(request: Request<Incoming>, say: Arc<Say>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (path, headers) = (request.uri().path().to_owned(), request.headers().clone());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (status, body) = say(Asked { path, headers, body }).await;
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    Ok(response)
}
