//! A thin layer over kube-rs: clients that call the server in process, or over TLS.

pub mod election;
pub mod tls;
pub mod watch;

use std::{convert::Infallible, future::Future};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response};
use kube::{Client, client::Body};

/// A client whose requests are answered by a function of this process instead of a socket. They take the same way
/// through the server as anyone's, save for TLS and authentication.
pub fn in_process<F, Fut, B>(handle: F) -> Client
where
    F: Fn(Request<Body>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let service = tower::service_fn(move |request: Request<Body>| {
        let answer = handle(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    Client::new(service, "default")
}

/// The same client, whose every request carries one more header.
pub fn with_header(client: Client, name: HeaderName, value: HeaderValue) -> Client {
    let service = tower::service_fn(move |mut request: Request<Body>| {
        request.headers_mut().insert(name.clone(), value.clone());
        let client = client.clone();
        async move { client.send(request).await }
    });
    Client::new(service, "default")
}
