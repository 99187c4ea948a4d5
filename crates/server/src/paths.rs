//! Paths that are ours and not Kubernetes': how machines join.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Response, StatusCode, request::Parts};
use serde_json::Value;

use crate::{
    Server,
    auth::UserInfo,
    collect,
    encode::{self, Body, BodyError},
    error::{ApiError, Result},
};

/// Where they are.
pub const PREFIX: &str = "/seawall/";
/// The cluster's certificate authority, for everyone: who joins knows its hash.
pub const CA: &str = "/seawall/v1/ca";

/// Whether a path is for those who have not proved who they are.
pub(crate) fn is_open(path: &str) -> bool {
    path == CA
}

/// What was asked.
pub struct Ask {
    /// Who asks. Whether they may has been checked, save for [`CA`].
    pub user: UserInfo,
    /// The method.
    pub method: Method,
    /// The path.
    pub path: String,
    /// The body.
    pub body: Bytes,
}

/// A refusal: status, reason and a message for who asked.
pub struct Refusal(pub StatusCode, pub &'static str, pub String);

/// Who answers.
#[async_trait]
pub trait Paths: Send + Sync {
    /// Answers with JSON.
    async fn answer(&self, ask: Ask) -> Result<Value, Refusal>;
}

impl Server {
    pub(crate) async fn extra_path<B>(
        self: &Arc<Self>,
        user: &UserInfo,
        verb: &str,
        parts: &Parts,
        body: B,
    ) -> Result<Response<Body>>
    where
        B: http_body::Body<Data = Bytes> + Send,
        B::Error: Into<BodyError>,
    {
        let path = parts.uri.path();
        if !is_open(path) {
            self.authorize_path(user, verb, parts).await?;
        }
        let Some(paths) = &self.config.paths else { return Err(ApiError::no_route()) };
        let ask =
            Ask { user: user.clone(), method: parts.method.clone(), path: path.to_owned(), body: collect(body).await? };
        match paths.answer(ask).await {
            Ok(value) => Ok(encode::value(StatusCode::OK, &value, encode::Media::Json)),
            Err(Refusal(code, reason, message)) => Err(ApiError::new(code, reason, message)),
        }
    }
}
