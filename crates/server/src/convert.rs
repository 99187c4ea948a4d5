//! Custom resources in the version that was asked for
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definition-versioning/>).
//!
//! The whole pipeline works in the version of the URL: what is read is converted on the way out of the cache, what is
//! written on the way into the store.

use std::sync::Arc;

use bytes::Bytes;
use seawall_api::{
    Row,
    custom::{Conversion, Version},
};
use serde_json::{Value, json};

use crate::{
    Server,
    error::{ApiError, Result},
    object::{Object, encode},
};

/// How long a conversion may take, in seconds; upstream's limit.
const TIMEOUT: u64 = 30;
/// The largest answer of a conversion, in bytes: it may hold a whole list.
const LARGEST: usize = 64 << 20;

/// How many objects are sent to a webhook at a time.
const BATCH: usize = 500;

impl Server {
    /// Whether an object is not in the version of `row`.
    pub(crate) fn is_foreign(&self, row: &Row, object: &Object) -> bool {
        row.custom.is_some() && object.api_version() != row.api_version()
    }

    /// Objects in the version of `row`, in the same order.
    pub(crate) async fn in_version(&self, row: &Row, objects: Vec<Arc<Object>>) -> Result<Vec<Arc<Object>>> {
        let Some(version) = &row.custom else { return Ok(objects) };
        let foreign: Vec<usize> = (0..objects.len()).filter(|at| self.is_foreign(row, &objects[*at])).collect();
        let mut objects = objects;
        for places in foreign.chunks(BATCH) {
            let values = places.iter().map(|at| without_version(objects[*at].value())).collect();
            let converted = self.convert(row, version, &row.api_version(), values).await?;
            for (at, mut value) in places.iter().zip(converted) {
                seawall_api::custom::prune::prune(&version.root, &mut value);
                version.default(&mut value);
                let object =
                    objects[*at].with(row, &value).map_err(|e| ApiError::internal("an object was not converted", e))?;
                objects[*at] = Arc::new(object);
            }
        }
        Ok(objects)
    }

    /// One object in the version of `row`.
    pub(crate) async fn one_in_version(&self, row: &Row, object: Arc<Object>) -> Result<Arc<Object>> {
        if !self.is_foreign(row, &object) {
            return Ok(object);
        }
        let mut converted = self.in_version(row, vec![object]).await?;
        converted.pop().ok_or_else(|| ApiError::internal("an object was not converted", row.plural))
    }

    /// A value in the version of `row`.
    pub(crate) async fn presented(&self, row: &Row, object: Value) -> Result<Value> {
        match &row.custom {
            Some(version) if object["apiVersion"] != row.api_version() => {
                let mut converted = self.convert(row, version, &row.api_version(), vec![object]).await?;
                converted.pop().ok_or_else(|| ApiError::internal("an object was not converted", row.plural))
            }
            _ => Ok(object),
        }
    }

    /// The bytes for the store: in the stored version.
    pub(crate) async fn stored_form(&self, row: &Row, object: &Value) -> Result<Bytes> {
        let object = without_version(object.clone());
        match &row.custom {
            Some(version) if version.definition.storage != row.version => {
                let to = format!("{}/{}", row.group, version.definition.storage);
                let mut converted = self.convert(row, version, &to, vec![object]).await?;
                let object = converted.pop().ok_or_else(|| ApiError::internal("an object was not converted", &to))?;
                Ok(encode(&object))
            }
            _ => Ok(encode(&object)),
        }
    }

    async fn convert(&self, row: &Row, version: &Version, to: &str, mut values: Vec<Value>) -> Result<Vec<Value>> {
        match &version.definition.conversion {
            Conversion::None => {
                for value in &mut values {
                    value["apiVersion"] = to.into();
                }
                Ok(values)
            }
            Conversion::Webhook(config) => {
                let failed = |why: String| {
                    let kind = format!("{}, Kind={}", row.api_version(), row.kind);
                    ApiError::internal_to_client(format!("conversion webhook for {kind} failed: {why}"))
                };
                let converted = self.ask_converter(config, to, &values).await.map_err(failed)?;
                for (before, after) in values.iter().zip(&converted) {
                    unchanged_metadata(before, after, to).map_err(failed)?;
                }
                Ok(values.into_iter().zip(converted).map(|(before, after)| with_metadata(&before, after)).collect())
            }
        }
    }

    /// Asks a webhook with a `ConversionReview`.
    async fn ask_converter(&self, config: &Value, to: &str, values: &[Value]) -> Result<Vec<Value>, String> {
        let uid = uuid::Uuid::new_v4().to_string();
        let review = json!({"kind": "ConversionReview", "apiVersion": "apiextensions.k8s.io/v1",
            "request": {"uid": uid, "desiredAPIVersion": to, "objects": values}});
        let mut answer = self.call_webhook(&config["clientConfig"], &review, TIMEOUT, LARGEST).await?;
        if answer["kind"] != "ConversionReview" || answer["apiVersion"] != "apiextensions.k8s.io/v1" {
            return Err("the answer is no ConversionReview of apiextensions.k8s.io/v1".to_owned());
        }
        let response = &mut answer["response"];
        if response["uid"] != uid {
            return Err(format!("invalid response: expected response.uid={uid:?}, got {}", response["uid"]));
        }
        if response["result"]["status"] != "Success" {
            return Err(response["result"]["message"].as_str().unwrap_or("no reason was given").to_owned());
        }
        let Value::Array(converted) = response["convertedObjects"].take() else {
            return Err("invalid response: no convertedObjects".to_owned());
        };
        match converted.len() == values.len() {
            true => Ok(converted),
            false => Err(format!("expected {} converted objects, got {}", values.len(), converted.len())),
        }
    }
}

fn without_version(mut object: Value) -> Value {
    if let Some(meta) = object["metadata"].as_object_mut() {
        meta.remove("resourceVersion");
    }
    object
}

/// A webhook may change labels and annotations, and nothing else of the metadata
/// (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definition-versioning/#response>).
fn unchanged_metadata(before: &Value, after: &Value, to: &str) -> Result<(), String> {
    if after["apiVersion"] != to {
        return Err(format!("invalid converted object: expected apiVersion {to:?}, got {}", after["apiVersion"]));
    }
    if after["kind"] != before["kind"] {
        return Err(format!("invalid converted object: expected kind {}, got {}", before["kind"], after["kind"]));
    }
    for key in ["name", "namespace", "uid"] {
        if after["metadata"][key] != before["metadata"][key] {
            return Err(format!(
                "invalid metadata of the converted object: metadata.{key} must not change, was {}, is {}",
                before["metadata"][key], after["metadata"][key]
            ));
        }
    }
    Ok(())
}

/// What a webhook said of other metadata is not taken over.
fn with_metadata(before: &Value, mut after: Value) -> Value {
    let mut meta = before["metadata"].clone();
    for key in ["labels", "annotations"] {
        match after["metadata"].get(key).filter(|v| !v.is_null()) {
            Some(value) => meta[key] = value.clone(),
            None => {
                meta.as_object_mut().map(|meta| meta.remove(key));
            }
        }
    }
    after["metadata"] = meta;
    after
}
