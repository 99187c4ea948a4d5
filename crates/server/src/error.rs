//! What a client is told when a request fails: one `Status`, made in one place
//! (<https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/>).

use std::borrow::Cow;

use http::StatusCode;
use seawall_api::{Row, field::Errors, managed::Conflict, row::api_version};
use seawall_store as store;
use serde_json::{Value, json};

/// A failed request.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub code: StatusCode,
    /// Upstream's machine-readable reason.
    pub reason: Cow<'static, str>,
    /// What a person reads.
    pub message: String,
    /// `details` of the Status.
    pub details: Value,
    /// Ask the client to come back after this many seconds.
    pub retry_after: Option<u32>,
}

/// The result of a request.
pub type Result<T, E = ApiError> = std::result::Result<T, E>;

impl ApiError {
    /// An error with this status, reason and message.
    pub fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { code, reason: reason.into(), message: message.into(), details: Value::Null, retry_after: None }
    }

    fn about(mut self, row: &Row, name: &str) -> ApiError {
        self.details = json!({"name": name, "group": row.group, "kind": row.plural});
        self
    }

    /// 400: the request cannot be understood.
    pub fn bad_request(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// 401.
    pub fn unauthorized() -> ApiError {
        ApiError::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
    }

    /// 403: authorization or admission said no.
    pub fn forbidden(row: &Row, name: &str, why: impl std::fmt::Display) -> ApiError {
        let message = match name {
            "" => format!("{} is forbidden: {why}", row.qualified()),
            _ => format!("{} {name:?} is forbidden: {why}", row.qualified()),
        };
        ApiError::new(StatusCode::FORBIDDEN, "Forbidden", message).about(row, name)
    }

    /// 403 without an object.
    pub fn forbidden_path(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// 404: no such object.
    pub fn not_found(row: &Row, name: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "NotFound", format!("{} {name:?} not found", row.qualified()))
            .about(row, name)
    }

    /// 404: no such path.
    pub fn no_route() -> ApiError {
        let mut error =
            ApiError::new(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource");
        error.details = json!({});
        error
    }

    /// 405.
    pub fn method_not_allowed() -> ApiError {
        ApiError::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
    }

    /// 406.
    pub fn not_acceptable(accept: &str) -> ApiError {
        ApiError::new(
            StatusCode::NOT_ACCEPTABLE,
            "NotAcceptable",
            format!(
                "only the following media types are accepted: application/json, application/yaml (asked for {accept:?})"
            ),
        )
    }

    /// 409: the name is taken.
    pub fn already_exists(row: &Row, name: &str) -> ApiError {
        ApiError::new(StatusCode::CONFLICT, "AlreadyExists", format!("{} {name:?} already exists", row.qualified()))
            .about(row, name)
    }

    /// 409: the object changed in between.
    pub fn conflict(row: &Row, name: &str, why: impl std::fmt::Display) -> ApiError {
        let message = format!("Operation cannot be fulfilled on {} {name:?}: {why}", row.qualified());
        ApiError::new(StatusCode::CONFLICT, "Conflict", message).about(row, name)
    }

    /// 409: others manage fields that a configuration would change. The causes are those that kubectl reads.
    pub fn apply_conflict(message: String, conflicts: &[Conflict]) -> ApiError {
        let causes: Vec<Value> = conflicts
            .iter()
            .map(|c| {
                json!({"reason": "FieldManagerConflict", "message": format!("conflict with {}", c.manager), "field": c.field})
            })
            .collect();
        let mut error = ApiError::new(StatusCode::CONFLICT, "Conflict", message);
        error.details = json!({"causes": causes});
        error
    }

    /// 409 with upstream's usual text.
    pub fn modified(row: &Row, name: &str) -> ApiError {
        ApiError::conflict(
            row,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 410: the history asked for is gone.
    pub fn expired(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::GONE, "Expired", message)
    }

    /// 413.
    pub fn too_large(limit: usize) -> ApiError {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit}"),
        )
    }

    /// 415.
    pub fn unsupported_media_type(found: &str, supported: &[&str]) -> ApiError {
        ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format ({found:?}) - accepted media types include: {}",
                supported.join(", ")
            ),
        )
    }

    /// 422: the object is wrong in these fields.
    pub fn invalid(row: &Row, name: &str, errors: &Errors) -> ApiError {
        let kind = match row.group {
            "" => row.kind.to_owned(),
            group => format!("{}.{group}", row.kind),
        };
        let mut error =
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", format!("{kind} {name:?} is invalid: {errors}"));
        let causes: Vec<Value> = errors
            .0
            .iter()
            .map(|e| json!({"reason": e.reason.cause(), "message": e.message, "field": e.field}))
            .collect();
        error.details = json!({"name": name, "group": row.group, "kind": row.kind, "causes": causes});
        error
    }

    /// 429: an eviction has to wait.
    pub fn too_many_requests(message: impl Into<String>, causes: Value) -> ApiError {
        let mut error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message);
        error.details = json!({"causes": causes});
        error
    }

    /// 500. `source` goes to the log, not to the client.
    pub fn internal(what: &str, source: impl std::fmt::Display) -> ApiError {
        tracing::error!(%source, "{what}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", format!("Internal error occurred: {what}"))
    }

    /// 500, with a reason that the client is told: it is about what the client has set up.
    pub fn internal_to_client(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message)
    }

    /// 502: what the server asked on the client's behalf did not answer.
    pub fn bad_gateway(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_GATEWAY, "ServiceUnavailable", message)
    }

    /// 503: come back later.
    pub fn unavailable(message: impl Into<String>) -> ApiError {
        let mut error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message);
        error.retry_after = Some(1);
        error
    }

    /// 504: it took too long.
    pub fn timeout(message: impl Into<String>) -> ApiError {
        let mut error = ApiError::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message);
        error.retry_after = Some(1);
        error
    }

    /// The store's errors that mean the same whatever was asked.
    pub fn store(error: store::Error) -> ApiError {
        match error {
            store::Error::Compacted { requested, oldest } => {
                ApiError::expired(format!("too old resource version: {requested} ({oldest})"))
            }
            store::Error::Future { requested, newest } => future(requested.0, newest.0),
            store::Error::Fenced { .. } => {
                let message = "the leader that sent this write has been deposed: its term is over";
                ApiError::new(StatusCode::CONFLICT, "Conflict", message)
            }
            store::Error::Unavailable { ref reason, .. } => {
                tracing::debug!(%error, "the store is unavailable");
                let mut error = ApiError::unavailable(format!(
                    "the store is unavailable ({reason}): try again; reads with resourceVersion=0 need no quorum"
                ));
                // It has been waited for already. Clients that are told to come back do so ten times, in silence.
                error.retry_after = None;
                error
            }
            other => ApiError::internal("the store failed", other),
        }
    }

    /// The Status object.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": api_version("", "v1"), "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code.as_u16(),
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        if let Some(seconds) = self.retry_after {
            status["details"]["retryAfterSeconds"] = seconds.into();
        }
        status
    }
}

/// A resource version that the server has not reached: upstream answers 504 with this cause, and clients retry.
pub fn future(requested: u64, newest: u64) -> ApiError {
    let mut error = ApiError::timeout(format!("Too large resource version: {requested}, current: {newest}"));
    error.details = json!({"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]});
    error
}
