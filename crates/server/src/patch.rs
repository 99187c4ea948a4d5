//! What a PATCH does to a value, in each of the forms that it may come in
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#patch-and-update>). Applying a configuration is another
//! matter (`apply.rs`).

use std::sync::Arc;

use http::header;
use seawall_api::{
    field::Errors,
    patch,
    schema::{TypeId, check::parse},
};
use serde_json::{Value, json};

use crate::{
    Context, MAX_BODY, Server, apply,
    error::{ApiError, Result},
};

/// A JSON patch of more operations is refused (upstream's `maxJSONPatchOperations`).
const OPERATIONS: usize = 10_000;
const JSON: &str = "application/json-patch+json";
const MERGE: &str = "application/merge-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// Applies a patch to an object.
pub(crate) type Patch = Box<dyn Fn(&mut Value) -> Result<()> + Send + Sync>;

impl Context<'_> {
    /// What the body is said to be, without parameters.
    pub fn content_type(&self) -> &str {
        let kind = self.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        kind.split(';').next().unwrap_or_default().trim()
    }
}

impl Server {
    /// What the body of a PATCH does to a value of this type.
    pub(crate) fn patcher(self: &Arc<Self>, context: &Context<'_>, ty: TypeId) -> Result<Patch> {
        let malformed = |e: &dyn std::fmt::Display| ApiError::bad_request(format!("error decoding patch: {e}"));
        let object = |form: &str| {
            let (patch, _) = parse(&context.body).map_err(|e| malformed(&e))?;
            if patch.is_object() { Ok(patch) } else { Err(malformed(&format!("a {form} patch is an object"))) }
        };
        match context.content_type() {
            JSON => {
                let patch: json_patch::Patch = serde_json::from_slice(&context.body).map_err(|e| malformed(&e))?;
                if patch.0.len() > OPERATIONS {
                    return Err(ApiError::too_large(OPERATIONS));
                }
                let (row, name) = (context.row.clone(), context.path.name.clone().unwrap_or_default());
                Ok(Box::new(move |object| {
                    patch::json(object, &patch, MAX_BODY).map_err(|e| {
                        let mut error = ApiError::invalid(&row, &name, &Errors::default());
                        error.message = format!("the server rejected our request due to an error in our request: {e}");
                        // kubectl leaves the message out of what it prints when an object is named.
                        error.details = json!({});
                        error
                    })
                }))
            }
            MERGE => {
                let patch = object("merge")?;
                Ok(Box::new(move |object| {
                    json_patch::merge(object, &patch);
                    Ok(())
                }))
            }
            STRATEGIC if context.row.custom.is_none() => {
                let (patch, server) = (object("strategic merge")?, self.clone());
                Ok(Box::new(move |object| {
                    patch::strategic(&server.registry.schemas, ty, object, patch.clone())
                        .map_err(|e| ApiError::bad_request(e.to_string()))
                }))
            }
            other if context.row.custom.is_some() => {
                Err(ApiError::unsupported_media_type(other, &[JSON, MERGE, apply::APPLY]))
            }
            other => Err(ApiError::unsupported_media_type(other, &[JSON, MERGE, STRATEGIC, apply::APPLY])),
        }
    }
}
