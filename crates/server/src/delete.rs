//! DELETE: at once, after a grace period, or when the last finalizer has gone
//! (<https://kubernetes.io/docs/concepts/overview/working-with-objects/finalizers/>).

use std::sync::Arc;

use futures::TryStreamExt as _;
use http::{Response, StatusCode};
use jiff::Timestamp;
use seawall_api::{Row, schema::check::conform};
use seawall_store::{self as store, Expect, Revision};
use serde_json::{Value, json};

use crate::{
    Context, Server, definitions,
    encode::Body,
    error::{ApiError, Result},
    object::{Object, encode},
    read::Selection,
    write::{ATTEMPTS, expected_version, meta, name_of, timestamp},
};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// How many objects of a collection are deleted at a time.
const AT_ONCE: usize = 16;

impl Server {
    /// DELETE of one object.
    pub(crate) async fn delete(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let options = self.delete_options(context)?;
        let (object, revision, gone) = self.delete_object(context, context.name()?, &options).await?;
        // What is gone is answered with a Status, what is still going with the object.
        if gone && !context.row.is_core("pods") && !context.row.is_core("namespaces") {
            let details = json!({"name": name_of(&object), "group": context.row.group, "kind": context.row.plural, "uid": object["metadata"]["uid"]});
            let status =
                json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
            return Ok(crate::encode::value(StatusCode::OK, &status, context.form.media));
        }
        let object = self.presented(&context.row, object).await?;
        self.answer(context, object, revision, StatusCode::OK)
    }

    /// DELETE of all objects that selectors pick.
    pub(crate) async fn delete_collection(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let options = self.delete_options(context)?;
        let row = &context.row;
        let selection = Selection::parse(row, &context.query, None)?;
        let prefix = match context.path.namespace.as_deref() {
            Some(namespace) => format!("{}{namespace}/", row.prefix()),
            None => row.prefix(),
        };
        let snapshot = self.consistent().await?;
        let picked: Vec<Arc<Object>> =
            snapshot.range(context.served.id, &prefix, None).filter(|o| selection.picks(row, o)).cloned().collect();
        let revision = snapshot.revision;
        drop(snapshot);
        let (server, options) = (&self, &options);
        let remove = |object: Arc<Object>| async move {
            let mut one = context.clone();
            one.path.namespace = Some(object.namespace(row).to_owned()).filter(|n| !n.is_empty());
            match server.delete_object(&one, object.name(), options).await {
                Err(error) if error.code != StatusCode::NOT_FOUND => Err(error),
                _ => Ok(()),
            }
        };
        // Several at a time, since each waits for the disk: one after the other, ten thousand take longer than a request may.
        futures::stream::iter(picked.iter().cloned().map(Ok)).try_for_each_concurrent(AT_ONCE, remove).await?;
        let picked = self.in_version(row, picked).await?;
        Ok(context.encoder()?.list(picked, json!({"resourceVersion": revision.to_string()})).await)
    }

    fn delete_options(&self, context: &Context<'_>) -> Result<DeleteOptions> {
        let ty = self.type_named("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions")?;
        let mut value = match context.body.is_empty() {
            true => json!({}),
            false => context.body(self, ty)?.0,
        };
        conform(&self.registry.schemas, ty, &mut value).map_err(|e| ApiError::bad_request(e.to_string()))?;
        let policy = value["propagationPolicy"].as_str().or(context.query.text("propagationPolicy"));
        let orphan = match (policy, value["orphanDependents"].as_bool()) {
            (Some(_), Some(_)) => {
                return Err(ApiError::bad_request(
                    "propagationPolicy and orphanDependents may not be set at the same time",
                ));
            }
            (Some("Orphan"), _) | (None, Some(true)) => Some(ORPHAN),
            (Some("Foreground"), _) => Some(FOREGROUND),
            (Some("Background"), _) | (None, _) => None,
            (Some(other), _) => {
                return Err(ApiError::bad_request(format!(
                    "propagationPolicy: Unsupported value: {other:?}: supported values: \"Background\", \"Foreground\", \"Orphan\""
                )));
            }
        };
        let grace = match value["gracePeriodSeconds"].as_i64() {
            Some(seconds) => Some(seconds),
            None => context.query.number::<i64>("gracePeriodSeconds")?,
        };
        if grace.is_some_and(|g| g < 0) {
            return Err(ApiError::bad_request("gracePeriodSeconds: Invalid value: must be greater than or equal to 0"));
        }
        let preconditions = &value["preconditions"];
        Ok(DeleteOptions {
            grace,
            finalizer: orphan,
            uid: preconditions["uid"].as_str().map(str::to_owned),
            version: preconditions["resourceVersion"].as_str().map(expected_version).transpose()?,
            admitted: false,
            dry_run: context.dry_run()? || value["dryRun"].as_array().is_some_and(|d| d.iter().any(|v| v == "All")),
        })
    }

    /// Deletes an object, or begins to: with a grace period, or finalizers that somebody has to work through. Says
    /// whether it is gone.
    pub(crate) async fn delete_object(
        self: &Arc<Self>,
        context: &Context<'_>,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<(Value, Revision, bool)> {
        let row = &context.row;
        let key = row.key(context.namespace(), name);
        for _ in 0..ATTEMPTS {
            let snapshot = self.consistent().await?;
            let current = snapshot.get(context.served.id, &key).ok_or_else(|| ApiError::not_found(row, name))?.clone();
            drop(snapshot);
            let old = current.value();
            let uid = old["metadata"]["uid"].as_str().unwrap_or_default();
            if let Some(wanted) = &options.uid
                && wanted != uid
            {
                let why = format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}");
                return Err(ApiError::conflict(row, name, why));
            }
            if let Some(wanted) = options.version
                && wanted != current.revision
            {
                let why = format!(
                    "Precondition failed: ResourceVersion in precondition: {wanted}, ResourceVersion in object meta: {}",
                    current.revision
                );
                return Err(ApiError::conflict(row, name, why));
            }
            if !options.admitted {
                self.admit_delete(context, &old, options.dry_run).await?;
            }
            let (new, finished) = begin_deletion(row, old.clone(), options, Timestamp::now());
            if options.dry_run {
                return Ok((new, current.revision, finished));
            }
            let expect = Expect::At(current.revision);
            let bytes = encode(&new);
            if !finished && bytes == current.bytes {
                return Ok((new, current.revision, false));
            }
            let written = match finished {
                true => self.store.delete(&key, expect, context.fence.as_ref()).await,
                false => self.store.put(&key, bytes, expect, context.fence.as_ref()).await,
            };
            match written {
                Ok(revision) => {
                    self.in_force(row, revision).await;
                    self.after_write(row, &old, (!finished).then_some(&new)).await;
                    self.free(row, &old, (!finished).then_some(&new)).await;
                    return Ok((new, revision, finished));
                }
                Err(store::Error::Conflict { .. }) => {}
                Err(other) => return Err(ApiError::store(other)),
            }
        }
        Err(ApiError::modified(row, name))
    }
}

/// How to delete.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    /// Seconds a pod has to end.
    pub grace: Option<i64>,
    /// The finalizer that stands for the propagation policy.
    pub finalizer: Option<&'static str>,
    /// Delete only the object with this uid.
    pub uid: Option<String>,
    /// Delete only this version.
    pub version: Option<Revision>,
    /// Only try it out.
    pub dry_run: bool,
    /// It was admitted as something else: an eviction is no deletion to those who are asked.
    pub admitted: bool,
}

fn has_finalizers(row: &Row, object: &Value) -> bool {
    let listed = |v: &Value| v.as_array().is_some_and(|f| !f.is_empty());
    listed(&object["metadata"]["finalizers"])
        || (row.plural == "namespaces" && row.group.is_empty() && listed(&object["spec"]["finalizers"]))
}

/// Whether the last finalizer of an object that is being deleted has gone, and its grace period with it.
pub(crate) fn is_finished(row: &Row, object: &Value) -> bool {
    object["metadata"]["deletionTimestamp"].is_string()
        && !has_finalizers(row, object)
        && object["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or_default() == 0
}

/// Marks an object as being deleted. Says whether it can go at once.
fn begin_deletion(row: &Row, mut object: Value, options: &DeleteOptions, now: Timestamp) -> (Value, bool) {
    meta(&mut object).remove("resourceVersion");
    let pod = row.is_core("pods");
    let grace = match pod {
        false => 0,
        true => {
            let asked =
                options.grace.unwrap_or_else(|| object["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30));
            // Nothing runs, so there is nothing to wait for.
            let unscheduled = object["spec"]["nodeName"].as_str().unwrap_or_default().is_empty();
            let over = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
            if unscheduled || over { 0 } else { asked.max(0) }
        }
    };
    if let Some(finalizer) = options.finalizer {
        let mut finalizers: Vec<Value> = object["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
        // A later choice replaces an earlier one.
        finalizers.retain(|f| f != FOREGROUND && f != ORPHAN);
        finalizers.push(finalizer.into());
        object["metadata"]["finalizers"] = finalizers.into();
    }
    let deleting = object["metadata"]["deletionTimestamp"].is_string();
    let left = object["metadata"]["deletionGracePeriodSeconds"].as_i64();
    // A grace period can be shortened, never extended.
    if !deleting || left.is_some_and(|left| grace < left) {
        let start = match (
            deleting,
            object["metadata"]["deletionTimestamp"].as_str().and_then(|t| t.parse::<Timestamp>().ok()),
        ) {
            (true, Some(end)) => end.as_second() - left.unwrap_or_default(),
            _ => now.as_second(),
        };
        let end = Timestamp::from_second(start.saturating_add(grace)).unwrap_or(now);
        let meta = meta(&mut object);
        meta.insert("deletionTimestamp".into(), timestamp(end));
        meta.insert("deletionGracePeriodSeconds".into(), grace.into());
        if row.generation && !deleting {
            let generation = meta.get("generation").and_then(Value::as_i64).unwrap_or_default() + 1;
            meta.insert("generation".into(), generation.into());
        }
    }
    if !deleting && row.plural == "customresourcedefinitions" && row.group == "apiextensions.k8s.io" {
        definitions::begin_deletion(&mut object, now);
    }
    if row.plural == "namespaces" && row.group.is_empty() {
        object["status"]["phase"] = "Terminating".into();
    }
    let finished = is_finished(row, &object);
    (object, finished)
}
