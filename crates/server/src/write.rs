//! CREATE, UPDATE, PATCH, DELETE: one pipeline for all resources.

use std::sync::Arc;

use http::{Response, StatusCode};
use jiff::Timestamp;
use rand::Rng;
use seawall_api::{
    Row, Scope, Subresource,
    field::Errors,
    managed::Managed,
    patch::{DEEPEST, is_deep},
    proto,
    resources::{pod_resize, validate_metadata},
    row::Validation,
    schema::{
        TypeId,
        check::{self, conform, parse},
    },
};
use seawall_store::{self as store, Expect, Revision};
use serde_json::{Map, Value, json};

use crate::{
    Context, MAX_BODY, Server, apply,
    delete::is_finished,
    encode::Body,
    error::{ApiError, Result},
    object::Object,
};

/// How often a change is tried again when somebody else was faster.
pub(crate) const ATTEMPTS: usize = 8;
/// How many random names are tried for `generateName`.
const NAMES: usize = 8;

/// What a pipeline does with an object between decoding and storing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The object is new.
    Create,
    /// The object is there.
    Update,
}

/// An object that is to be written.
#[derive(Clone)]
pub(crate) struct Change {
    pub object: Value,
    /// Who manages its fields, if that is known already; else the write is recorded as an update.
    pub managed: Option<Managed>,
}

impl From<Value> for Change {
    fn from(object: Value) -> Change {
        Change { object, managed: None }
    }
}

/// How strict decoding is (<https://kubernetes.io/docs/reference/using-api/api-concepts/#field-validation>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

impl Context<'_> {
    fn field_validation(&self) -> Result<FieldValidation> {
        match self.query.text("fieldValidation") {
            None | Some("Warn") => Ok(FieldValidation::Warn),
            Some("Ignore") => Ok(FieldValidation::Ignore),
            Some("Strict") => Ok(FieldValidation::Strict),
            Some(other) => Err(ApiError::bad_request(format!(
                "fieldValidation: Unsupported value: {other:?}: supported values: \"\", \"Ignore\", \"Strict\", \"Warn\""
            ))),
        }
    }

    /// Whether the request is only tried out.
    pub fn dry_run(&self) -> Result<bool> {
        match self.query.text("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => {
                Err(ApiError::bad_request(format!("dryRun: Unsupported value: {other:?}: supported values: \"All\"")))
            }
        }
    }

    /// The body as a value, from JSON or YAML, with the paths of keys that stand twice.
    ///
    /// A protobuf message is decoded as one of type `ty`.
    pub fn body(&self, server: &Server, ty: TypeId) -> Result<(Value, Vec<String>)> {
        match self.content_type() {
            "application/json" | "" | "*/*" => parse(&self.body)
                .map_err(|e| ApiError::bad_request(format!("couldn't get version/kind; json parse error: {e}"))),
            "application/yaml" | "application/x-yaml" => yaml(&self.body)
                .map_err(|e| ApiError::bad_request(format!("couldn't get version/kind; yaml parse error: {e}"))),
            "application/vnd.kubernetes.protobuf" if self.row.custom.is_none() => {
                proto::decode(&server.registry.schemas, ty, &self.body)
                    .map(|v| (v, Vec::new()))
                    .map_err(|e| ApiError::bad_request(e.to_string()))
            }
            other => {
                let known = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];
                let known = if self.row.custom.is_some() { &known[..2] } else { &known };
                Err(ApiError::unsupported_media_type(other, known))
            }
        }
    }

    /// Checks the body against the type of the resource in the version of the URL, and converts it to the stored one.
    pub(crate) fn conform(&self, server: &Server, mut value: Value, duplicates: Vec<String>) -> Result<Value> {
        let (kind, version) = (self.row.kind, self.served.api_version());
        if !value.is_object() {
            return Err(ApiError::bad_request(format!(
                "the body is not an object of kind {kind}: expected {{\"kind\":{kind:?}, …}}"
            )));
        }
        let (found_kind, found_version) =
            (value["kind"].as_str().unwrap_or(kind), value["apiVersion"].as_str().unwrap_or(&version));
        if found_kind != kind || found_version != version {
            return Err(ApiError::bad_request(format!(
                "{found_kind} in version {found_version:?} cannot be handled as a {kind}: the API version and kind in the data ({found_version}, Kind={found_kind}) do not match the expected ones ({version}, Kind={kind})"
            )));
        }
        let unknown = match &self.row.custom {
            Some(version) => version.conform(&mut value),
            None => conform(&server.registry.schemas, self.served.ty, &mut value),
        };
        let unknown = unknown.map_err(|e| {
            ApiError::bad_request(format!(
                "{kind} in version {:?} cannot be handled as a {kind}: {e}",
                self.served.version
            ))
        })?;
        if is_deep(&value, DEEPEST) {
            return Err(ApiError::bad_request(format!("the object is nested deeper than {DEEPEST} levels")));
        }
        let complaints: Vec<String> = duplicates
            .iter()
            .map(|path| format!("duplicate field {path:?}"))
            .chain(unknown.iter().map(|path| format!("unknown field {path:?}")))
            .collect();
        if !complaints.is_empty() {
            match self.field_validation()? {
                FieldValidation::Strict => {
                    return Err(ApiError::bad_request(format!(
                        "{kind} in version {:?} cannot be handled as a {kind}: strict decoding error: {}",
                        self.served.version,
                        complaints.join(", ")
                    )));
                }
                FieldValidation::Warn => self.warn(complaints),
                FieldValidation::Ignore => {}
            }
        }
        if let Some(alias) = &self.served.alias {
            (alias.conversion.to_stored)(&mut value);
        }
        value["kind"] = kind.into();
        value["apiVersion"] = self.row.api_version().into();
        if !value["metadata"].is_object() {
            value["metadata"] = json!({});
        }
        Ok(value)
    }

    /// Says everything that is wrong with an object, beyond the metadata, when it is written under the name of this request.
    fn check(&self, validation: &Validation<'_>, errors: &mut Errors) {
        self.row.check(validation, errors);
        if let Some(alias) = &self.served.alias {
            (alias.validate)(validation, errors);
        }
    }
}

/// A body in YAML, with the paths of keys that stand twice. Once its aliases are followed it may be no larger than one in
/// JSON.
pub(crate) fn yaml(body: &[u8]) -> Result<(Value, Vec<String>), serde_yaml_ng::Error> {
    check::read(serde_yaml_ng::Deserializer::from_slice(body), MAX_BODY)
}

/// The metadata as an object. [`Context::conform`] has made sure that it is one.
pub(crate) fn meta(object: &mut Value) -> &mut Map<String, Value> {
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    object["metadata"].as_object_mut().expect("made an object above")
}

pub(crate) fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// The time as Kubernetes writes it: whole seconds.
pub fn timestamp(now: Timestamp) -> Value {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into()
}

fn generate(prefix: &str) -> String {
    // Without vowels and digits that look like letters, so that no words come out.
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut random = rand::rng();
    let suffix: String = (0..5).map(|_| ALPHABET[random.random_range(0..ALPHABET.len())] as char).collect();
    format!("{}{suffix}", &prefix[..prefix.len().min(58)])
}

impl Server {
    /// POST of a new object.
    pub(crate) async fn create(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let (value, duplicates) = context.body(self, context.served.ty)?;
        let object = context.conform(self, value, duplicates)?;
        let (object, revision) = self.create_object(context, object.into()).await?;
        self.answer(context, object, revision, StatusCode::CREATED)
    }

    pub(crate) fn answer(
        &self,
        context: &Context<'_>,
        mut object: Value,
        revision: Revision,
        status: StatusCode,
    ) -> Result<Response<Body>> {
        if revision.0 > 0 {
            object["metadata"]["resourceVersion"] = revision.to_string().into();
        }
        Ok(context.encoder()?.value(object, status))
    }

    /// Takes a decoded object through the pipeline and stores it.
    pub(crate) async fn create_object(
        self: &Arc<Self>,
        context: &Context<'_>,
        mut new: Change,
    ) -> Result<(Value, Revision)> {
        let row = context.row.clone();
        let object = &mut new.object;
        if object["metadata"]["resourceVersion"].as_str().is_some_and(|v| !v.is_empty()) {
            return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
        }
        self.place(context, object)?;
        let prefix = object["metadata"]["generateName"].as_str().filter(|p| !p.is_empty()).map(str::to_owned);
        let generated = name_of(object).is_empty() && prefix.is_some();
        for attempt in 1.. {
            let mut candidate = new.clone();
            if let (true, Some(prefix)) = (generated, &prefix) {
                candidate.object["metadata"]["name"] = generate(prefix).into();
            }
            match self.create_named(context, candidate).await {
                Err(error) if generated && error.reason == "AlreadyExists" && attempt < NAMES => {}
                Err(error) if generated && error.reason == "AlreadyExists" => {
                    let prefix = prefix.unwrap_or_default();
                    return Err(ApiError::conflict(
                        &row,
                        &prefix,
                        "no free name was found for generateName; try again",
                    ));
                }
                other => return other,
            }
        }
        unreachable!("the loop returns")
    }

    async fn create_named(self: &Arc<Self>, context: &Context<'_>, new: Change) -> Result<(Value, Revision)> {
        let Change { mut object, managed } = new;
        let row = &context.row;
        let sent = meta(&mut object).remove("managedFields");
        let now = Timestamp::now();
        {
            let meta = meta(&mut object);
            for key in ["resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"] {
                meta.remove(key);
            }
            meta.insert("uid".into(), uuid::Uuid::new_v4().to_string().into());
            meta.insert("creationTimestamp".into(), timestamp(now));
            drop_empty(meta);
            match row.generation {
                true => meta.insert("generation".into(), 1.into()),
                false => meta.remove("generation"),
            };
        }
        row.fill_in(&mut object);
        match managed {
            Some(managed) => apply::write(&mut object, &managed),
            None => self.record(context, &mut object, None, sent.as_ref())?,
        }
        self.admit_mutating(context, Operation::Create, &mut object, None).await?;
        row.fill_in(&mut object);
        row.prepare_new(&mut object);
        let name = name_of(&object).to_owned();
        let mut errors = Errors::default();
        validate_metadata(row, &object, None, &mut errors);
        context.check(&Validation { new: &object, old: None, subresource: "" }, &mut errors);
        if !errors.is_empty() {
            let shown =
                if name.is_empty() { object["metadata"]["generateName"].as_str().unwrap_or_default() } else { &name };
            return Err(ApiError::invalid(row, shown, &errors));
        }
        self.admit_validating(context, Operation::Create, &object, None).await?;
        let dry = context.dry_run()?;
        let reserved = self.reserve(context, &object, None, dry).await?;
        let claimed = match self.allocate(row, &mut object, None, dry).await {
            Ok(claimed) => claimed,
            Err(error) => {
                self.give_back(context.namespace(), reserved).await;
                return Err(error);
            }
        };
        let key = row.key(object["metadata"]["namespace"].as_str().unwrap_or_default(), &name);
        if dry {
            let taken = self.consistent().await?.get(context.served.id, &key).is_some();
            return if taken { Err(ApiError::already_exists(row, &name)) } else { Ok((object, Revision(0))) };
        }
        let bytes = self.stored_form(row, &object).await?;
        match self.store.put(&key, bytes, Expect::Absent, context.fence.as_ref()).await {
            Ok(revision) => {
                self.in_force(row, revision).await;
                Ok((object, revision))
            }
            Err(error) => {
                self.release(claimed).await;
                self.give_back(context.namespace(), reserved).await;
                Err(match error {
                    store::Error::Conflict { .. } => ApiError::already_exists(row, &name),
                    other => ApiError::store(other),
                })
            }
        }
    }

    /// Makes namespace and name of an object agree with the URL.
    pub(crate) fn place(&self, context: &Context<'_>, object: &mut Value) -> Result<()> {
        let row = &context.row;
        if let Some(name) = context.path.name.as_deref() {
            match name_of(object) {
                "" => object["metadata"]["name"] = name.into(),
                found if found != name => {
                    return Err(ApiError::bad_request(format!(
                        "the name of the object ({found}) does not match the name on the URL ({name})"
                    )));
                }
                _ => {}
            }
        }
        if row.scope == Scope::Cluster {
            if object["metadata"]["namespace"].as_str() == Some("") {
                meta(object).remove("namespace");
            }
            return Ok(());
        }
        let Some(namespace) = context.path.namespace.as_deref() else {
            return Err(ApiError::bad_request(format!(
                "a {} lives in a namespace: use /namespaces/NAMESPACE/{}",
                row.kind, row.plural
            )));
        };
        match object["metadata"]["namespace"].as_str().unwrap_or_default() {
            "" => object["metadata"]["namespace"] = namespace.into(),
            found if found != namespace => {
                return Err(ApiError::bad_request(format!(
                    "the namespace of the provided object does not match the namespace sent on the request: {found} is not {namespace}"
                )));
            }
            _ => {}
        }
        Ok(())
    }

    /// PUT of an object or of one of its parts.
    pub(crate) async fn update(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let (value, duplicates) = context.body(self, context.served.ty)?;
        let mut object = context.conform(self, value, duplicates)?;
        self.place(context, &mut object)?;
        let version = object["metadata"]["resourceVersion"].as_str().filter(|v| !v.is_empty()).map(str::to_owned);
        let expected = version.map(|v| expected_version(&v)).transpose()?;
        let (object, revision) = self.change(context, expected, |_| Ok(object.clone().into())).await?;
        self.answer(context, object, revision, StatusCode::OK)
    }

    /// PATCH of an object or of one of its parts.
    pub(crate) async fn patch(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        if context.content_type() == apply::APPLY {
            return self.apply(context).await;
        }
        let patch = self.patcher(context, context.served.ty)?;
        let encoder = context.encoder()?;
        let (object, revision) = self
            .change(context, None, |current| {
                // A patch is written against the version in the URL and sees the resource version.
                let mut object = encoder.convert(current.value());
                patch(&mut object)?;
                if let Some(version) = object["metadata"]["resourceVersion"].as_str()
                    && version != current.revision.to_string()
                {
                    return Err(ApiError::modified(&context.row, current.name()));
                }
                let mut object = context.conform(self, object, Vec::new())?;
                self.place(context, &mut object)?;
                Ok(object.into())
            })
            .await?;
        self.answer(context, object, revision, StatusCode::OK)
    }

    /// Changes an object: reads it, makes the new one, takes it through the pipeline, and writes it if nobody else was
    /// faster; else tries again, unless the client named the version it wants to change.
    pub(crate) async fn change(
        self: &Arc<Self>,
        context: &Context<'_>,
        expected: Option<Revision>,
        make: impl Fn(&Object) -> Result<Change> + Send + Sync,
    ) -> Result<(Value, Revision)> {
        let (row, name) = (&context.row, context.name()?);
        let key = row.key(context.namespace(), name);
        let mut snapshot = self.consistent().await?;
        for _ in 0..ATTEMPTS {
            let current = snapshot.get(context.served.id, &key).ok_or_else(|| ApiError::not_found(row, name))?.clone();
            if expected.is_some_and(|e| e != current.revision) {
                return Err(ApiError::modified(row, name));
            }
            let current = self.one_in_version(row, current).await?;
            let new = make(&current)?;
            match self.replace(context, &key, &current, new).await {
                Err(Replace::Raced) if expected.is_some() => return Err(ApiError::modified(row, name)),
                Err(Replace::Raced) => snapshot = self.consistent().await?,
                Err(Replace::Failed(error)) => return Err(error),
                Ok(done) => return Ok(done),
            }
        }
        Err(ApiError::modified(row, name))
    }

    async fn replace(
        self: &Arc<Self>,
        context: &Context<'_>,
        key: &str,
        current: &Object,
        change: Change,
    ) -> Result<(Value, Revision), Replace> {
        let Change { object: mut new, managed } = change;
        let row = &context.row;
        let sub = context.path.subresource.as_deref().unwrap_or_default();
        let old: Value = current.value();
        if let Some(uid) = new["metadata"]["uid"].as_str().filter(|u| !u.is_empty())
            && old["metadata"]["uid"] != uid
        {
            let why = format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                old["metadata"]["uid"].as_str().unwrap_or_default()
            );
            return Err(ApiError::conflict(row, current.name(), why).into());
        }
        let sent = meta(&mut new).remove("managedFields");
        carry_over(row, sub, &mut new, &old);
        row.fill_in(&mut new);
        prepare(row, sub, &mut new, &old);
        match managed {
            Some(managed) => apply::write(&mut new, &managed),
            None => self.record(context, &mut new, Some(&old), sent.as_ref())?,
        }
        if self.admit_mutating(context, Operation::Update, &mut new, Some(&old)).await? {
            // What the request could not have changed, nobody else can change on its behalf.
            let managed = new["metadata"]["managedFields"].take();
            carry_over(row, sub, &mut new, &old);
            row.fill_in(&mut new);
            prepare(row, sub, &mut new, &old);
            if !managed.is_null() {
                new["metadata"]["managedFields"] = managed;
            }
        }
        // Parts of a pod's spec that have a way of their own count too (KEP-5067).
        let of_spec = matches!(sub, "" | "resize" | "ephemeralcontainers");
        if row.generation && of_spec && content(row, &new) != content(row, &old) {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or_default() + 1;
            new["metadata"]["generation"] = generation.into();
        }
        let mut errors = Errors::default();
        validate_metadata(row, &new, Some(&old), &mut errors);
        context.check(&Validation { new: &new, old: Some(&old), subresource: sub }, &mut errors);
        if !errors.is_empty() {
            return Err(ApiError::invalid(row, current.name(), &errors).into());
        }
        self.admit_validating(context, Operation::Update, &new, Some(&old)).await?;
        let dry = context.dry_run()?;
        let reserved = self.reserve(context, &new, Some(&old), dry).await?;
        let claimed = match self.allocate(row, &mut new, Some(&old), dry).await {
            Ok(claimed) => claimed,
            Err(error) => {
                self.give_back(context.namespace(), reserved).await;
                return Err(error.into());
            }
        };
        let bytes = match self.stored_form(row, &new).await {
            Ok(bytes) => bytes,
            Err(error) => {
                self.release(claimed).await;
                self.give_back(context.namespace(), reserved).await;
                return Err(error.into());
            }
        };
        if bytes == *current.stored() {
            return Ok((new, current.revision));
        }
        if dry {
            return Ok((new, current.revision));
        }
        let expect = Expect::At(current.revision);
        let finished = is_finished(row, &new);
        let written = match finished {
            true => self.store.delete(key, expect, context.fence.as_ref()).await,
            false => self.store.put(key, bytes, expect, context.fence.as_ref()).await,
        };
        match written {
            Ok(revision) => {
                self.in_force(row, revision).await;
                self.after_write(row, &old, (!finished).then_some(&new)).await;
                self.free(row, &old, (!finished).then_some(&new)).await;
                Ok((new, revision))
            }
            Err(error) => {
                self.release(claimed).await;
                self.give_back(context.namespace(), reserved).await;
                Err(match error {
                    store::Error::Conflict { .. } => Replace::Raced,
                    other => ApiError::store(other).into(),
                })
            }
        }
    }

    /// A type that is in the table for certain.
    pub(crate) fn type_named(&self, name: &str) -> Result<TypeId> {
        let found = self.registry.schemas.by_name(name);
        found.ok_or_else(|| ApiError::internal("a type has no schema", name))
    }
}

enum Replace {
    /// Somebody else wrote in between.
    Raced,
    Failed(ApiError),
}

impl From<ApiError> for Replace {
    fn from(error: ApiError) -> Replace {
        Replace::Failed(error)
    }
}

pub(crate) fn expected_version(text: &str) -> Result<Revision> {
    text.parse().map(Revision).map_err(|_| {
        ApiError::bad_request(format!(
            "metadata.resourceVersion: Invalid value: {text:?}: must be the version of an object as the server gave it"
        ))
    })
}

/// What follows from what an update writes.
fn prepare(row: &Row, sub: &str, new: &mut Value, old: &Value) {
    match sub {
        "" => (row.prepare_update)(new, old),
        "status" => (row.prepare_status)(new, old),
        _ => {}
    }
}

/// What an update cannot change, and what the part that is written leaves alone.
fn carry_over(row: &Row, sub: &str, new: &mut Value, old: &Value) {
    let has_status = row.has(Subresource::Status);
    match sub {
        "status" | "approval" => {
            let status = new["status"].take();
            let meta = new["metadata"].take();
            let conditions = (sub == "approval").then(|| status["conditions"].clone());
            *new = old.clone();
            match conditions {
                Some(conditions) => new["status"]["conditions"] = conditions,
                None if status.is_null() => {
                    if let Some(object) = new.as_object_mut() {
                        object.remove("status");
                    }
                }
                None => new["status"] = status,
            }
            // Agents mark their own objects when they write a status; elsewhere metadata is not part of it.
            if row.is_core("pods") || row.is_core("nodes") {
                for key in ["labels", "annotations"] {
                    if !meta[key].is_null() {
                        new["metadata"][key] = meta[key].clone();
                    }
                }
            }
        }
        "ephemeralcontainers" => {
            let added = new["spec"]["ephemeralContainers"].take();
            *new = old.clone();
            new["spec"]["ephemeralContainers"] = added;
        }
        "resize" => pod_resize::merge(new, old),
        "finalize" => {
            let finalizers = new["spec"]["finalizers"].take();
            *new = old.clone();
            new["spec"]["finalizers"] = if finalizers.is_null() { json!([]) } else { finalizers };
        }
        _ => {
            if has_status && let Some(object) = new.as_object_mut() {
                match old.get("status") {
                    Some(status) => object.insert("status".into(), status.clone()),
                    None => object.remove("status"),
                };
            }
        }
    }
    let meta = meta(new);
    meta.remove("resourceVersion");
    meta.remove("managedFields");
    meta.remove("selfLink");
    for key in
        ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "generateName"]
    {
        match old["metadata"].get(key) {
            Some(value) => meta.insert(key.to_owned(), value.clone()),
            None => meta.remove(key),
        };
    }
    drop_empty(meta);
}

/// Lists and maps without content are not kept, as upstream's encoding leaves them out.
fn drop_empty(meta: &mut Map<String, Value>) {
    for key in ["labels", "annotations", "ownerReferences", "finalizers"] {
        let empty = |v: &Value| v.as_object().is_some_and(|m| m.is_empty()) || v.as_array().is_some_and(Vec::is_empty);
        if meta.get(key).is_some_and(empty) {
            meta.remove(key);
        }
    }
}

/// What raises the generation when it changes: of a custom resource without `/status` everything but the metadata
/// (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#status-subresource>).
fn content(row: &Row, object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(object) = object.as_object_mut() {
        object.remove("metadata");
        if row.custom.is_none() || row.has(Subresource::Status) {
            object.remove("status");
        }
    }
    object
}
