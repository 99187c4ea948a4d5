//! Calls to servers that are not part of the cluster, over TLS: issuers of tokens, and webhooks that decide who somebody is
//! and what they may.

pub mod kubeconfig;

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::Value;

use crate::webhook;

/// How many bytes an answer may have.
const MOST: usize = 4 << 20;

/// Whom to believe, and what to show.
#[derive(Clone, Default)]
pub struct Credentials {
    /// The authorities in PEM; without them, those of the system.
    pub authorities: Option<String>,
    /// A certificate and its key, in PEM.
    pub pair: Option<(String, String)>,
    /// A bearer token.
    pub token: Option<String>,
    /// The name in the other side's certificate, if it is not that of the URL.
    pub server_name: Option<String>,
}

/// Calls one or several servers with the same credentials.
pub(crate) struct Client {
    tls: Arc<ClientConfig>,
    token: Option<String>,
    server_name: Option<String>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// Whether something can be called at this URL: with TLS, and with a host.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_url(text: &str) -> Result<Uri, &'static str> {
    let uri: Uri = text.parse().map_err(|_| "must be a URL")?;
    if uri.scheme_str() != Some("https") {
        return Err("URL scheme must be https");
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err("URL must have a host");
    }
    match uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        true => Err("URL must not contain a username or password"),
        false => Ok(uri),
    }
}

impl Client {
    /// Reads the credentials.
    ///
    /// # Errors
    /// Which of them cannot be used.
    pub fn new(credentials: &Credentials) -> Result<Client, String> {
        let roots = match &credentials.authorities {
            Some(pem) => webhook::roots(pem.as_bytes())?,
            None => webhook::system_roots(),
        };
        let config = ClientConfig::builder().with_root_certificates(roots);
        let config = match &credentials.pair {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect();
                let chain = chain.map_err(|e| format!("the client certificate: {e}"))?;
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| format!("the client key: {e}"))?;
                config.with_client_auth_cert(chain, key).map_err(|e| format!("the client certificate: {e}"))?
            }
        };
        let (token, server_name) = (credentials.token.clone(), credentials.server_name.clone());
        Ok(Client { tls: Arc::new(config), token, server_name })
    }

    /// Reads JSON from a URL.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn get(&self, url: &str, timeout: Duration) -> Result<Value, String> {
        self.call(Method::GET, url, Bytes::new(), timeout).await.map_err(|why| format!("Get {url:?}: {why}"))
    }

    /// Sends JSON to a URL and reads the answer.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn post(&self, url: &str, body: impl Into<Bytes>, timeout: Duration) -> Result<Value, String> {
        self.call(Method::POST, url, body.into(), timeout).await.map_err(|why| format!("Post {url:?}: {why}"))
    }

    async fn call(&self, method: Method, url: &str, body: Bytes, timeout: Duration) -> Result<Value, String> {
        match tokio::time::timeout(timeout, self.exchange(method, url, body)).await {
            Ok(answer) => answer,
            Err(_) => Err("context deadline exceeded".to_owned()),
        }
    }

    async fn exchange(&self, method: Method, url: &str, body: Bytes) -> Result<Value, String> {
        let uri = check_url(url)?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let found = tokio::net::lookup_host((host, uri.port_u16().unwrap_or(443))).await;
        let addresses: Vec<_> = found.map_err(|e| format!("lookup {host}: {e}"))?.collect();
        let name = self.server_name.as_deref().unwrap_or(host);
        let mut sender = webhook::connect(self.tls.clone(), name, &addresses).await?;
        let mut request = Request::builder()
            .method(method)
            .uri(uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(header::HOST, uri.authority().map_or("", |authority| authority.as_str()))
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, "seawall");
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Full::new(body)).map_err(|e| e.to_string())?;
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MOST).collect().await.map_err(|e| e.to_string())?.to_bytes();
        match status {
            StatusCode::OK | StatusCode::CREATED if body.is_empty() => Ok(Value::Null),
            StatusCode::OK | StatusCode::CREATED => {
                serde_json::from_slice(&body).map_err(|e| format!("couldn't read the answer: {e}"))
            }
            status => Err(format!("the answer was {status}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let check = |url: &str, expect: Option<&str>| assert_eq!(check_url(url).err(), expect, "{url}");
        check("https://a.example", None);
        check("https://a.example:8443/x?y=z", None);
        check("https://[::1]/x", None);
        check("http://a.example", Some("URL scheme must be https"));
        check("a.example", Some("URL scheme must be https"));
        check("https://me:secret@a.example", Some("URL must not contain a username or password"));
        check("https:// a", Some("must be a URL"));
    }
}
