//! Server-side apply, and the records of who manages which field
//! (<https://kubernetes.io/docs/reference/using-api/server-side-apply/>).

use std::sync::Arc;

use http::{Response, StatusCode, header};
use jiff::Timestamp;
use seawall_api::{
    Row, Subresource,
    field::{Errors, FieldError, Reason},
    managed::{self, ApplyError, LAST_APPLIED, Managed, Manager, Operation, Types},
    schema::check::{conform, parse},
};
use seawall_store::Revision;
use serde_json::{Value, json};

use crate::{
    Context, Server,
    auth::authorize::{Attributes, field_selector},
    denied,
    encode::Body,
    error::{ApiError, Result},
    registry::Registry,
    write::{ATTEMPTS, Change, expected_version, meta, name_of, timestamp, yaml},
};

/// The content type of a configuration.
pub(crate) const APPLY: &str = "application/apply-patch+yaml";
/// A larger configuration is not noted in the annotation of `kubectl apply`: annotations have a limit.
const LARGEST_NOTE: usize = 256 * 1024;
/// The longest name of a manager, in bytes (upstream's `FieldManagerMaxLength`).
const LONGEST_NAME: usize = 128;

/// How it is recorded who wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recording {
    /// Under the subresource of the URL.
    OfPath,
    /// Under this one: the change goes to the object itself.
    As(&'static str),
}

/// What a write of this part of an object leaves alone.
fn untouched(row: &Row, subresource: &str) -> &'static [&'static [&'static str]] {
    match subresource {
        "status" if row.is_core("pods") || row.is_core("nodes") => {
            &[&["spec"], &["metadata", "ownerReferences"], &["metadata", "finalizers"]]
        }
        "status" | "approval" => &[&["spec"], &["metadata"]],
        _ if row.has(Subresource::Status) => &[&["status"]],
        _ => &[],
    }
}

impl Registry {
    /// The types by which fields of a resource are told apart. Records of a built-in kind name the stored version, whatever
    /// was written; those of a custom one the version that was written.
    fn types<'a>(&'a self, row: &'a Row, subresource: &str) -> Result<Types<'a>> {
        let without = untouched(row, subresource);
        if let Some(version) = &row.custom {
            return Ok(Types { schemas: &version.schemas, ty: version.ty, without, nulls: true });
        }
        let ty = row.ty(&self.schemas).ok_or_else(ApiError::no_route)?;
        Ok(Types { schemas: &self.schemas, ty, without, nulls: false })
    }
}

impl Context<'_> {
    fn part(&self) -> &str {
        match self.recording {
            Recording::OfPath => self.path.subresource.as_deref().unwrap_or_default(),
            Recording::As(part) => part,
        }
    }

    /// Who writes: what the client calls itself, or else what it is.
    fn manager(&self, operation: Operation) -> Result<Manager> {
        let name = self.query.text("fieldManager").unwrap_or_default();
        let wrong = |why: String| ApiError::bad_request(format!("fieldManager: Invalid value: {name:?}: {why}"));
        if name.len() > LONGEST_NAME {
            return Err(wrong(format!("Too long: may not be more than {LONGEST_NAME} bytes")));
        }
        if name.chars().any(char::is_control) {
            return Err(wrong("should only contain printable characters".to_owned()));
        }
        let agent = || self.headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok())?.split('/').next();
        let name = match name {
            "" if operation == Operation::Apply => {
                return Err(ApiError::bad_request(
                    "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
                ));
            }
            "" => agent().filter(|name| !name.is_empty()).unwrap_or_else(|| match &*self.user.username {
                name if name.starts_with("system:node:") => "kubelet",
                name => name.strip_prefix("system:").unwrap_or(name),
            }),
            name => name,
        };
        let end = (0..=name.len().min(LONGEST_NAME)).rev().find(|end| name.is_char_boundary(*end)).unwrap_or_default();
        Ok(Manager {
            name: name[..end].to_owned(),
            operation,
            api_version: self.row.api_version(),
            subresource: self.part().to_owned(),
        })
    }
}

impl Server {
    /// Records a write that is not an apply in `metadata.managedFields` of the new object. `sent` is what the client
    /// said those are. An object without records is left without: nobody has asked for them.
    pub(crate) fn record(
        &self,
        context: &Context<'_>,
        new: &mut Value,
        old: Option<&Value>,
        sent: Option<&Value>,
    ) -> Result<()> {
        let (row, empty) = (&context.row, json!({}));
        let manager = context.manager(Operation::Update)?;
        let reset = sent.is_some_and(|sent| *sent == json!([{}]));
        let sent = sent.filter(|sent| sent.as_array().is_some_and(|list| !list.is_empty()));
        let live = old.map(|old| &old["metadata"]["managedFields"]);
        let managed = match (sent, live) {
            (Some(sent), _) => Managed::read(sent).map_err(|bad| {
                let error = FieldError { reason: Reason::Invalid, field: bad.field(), message: bad.message() };
                ApiError::invalid(row, name_of(new), &Errors(vec![error]))
            })?,
            // What we cannot read we have not written; an update must not fail for it.
            (None, Some(live)) => Managed::read(live).unwrap_or_default(),
            (None, None) => Managed::default(),
        };
        let managed = match old {
            Some(_) if reset || managed.records().is_empty() => Managed::default(),
            old => {
                let types = self.registry.types(row, context.part())?;
                managed::update(types, old.unwrap_or(&empty), new, managed, &manager, &now())
            }
        };
        write(new, &managed);
        Ok(())
    }

    /// PATCH with a configuration: creates the object or merges into it.
    pub(crate) async fn apply(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let (mut config, duplicates) = match parse(&context.body) {
            Ok(parsed) => parsed,
            // YAML of which JSON is a part.
            Err(_) => yaml(&context.body).map_err(|e| ApiError::bad_request(format!("error decoding YAML: {e}")))?,
        };
        let (row, name) = (&context.row, context.name()?);
        let about = format!("({}/{name}; {}, Kind={})", context.namespace(), context.served.api_version(), row.kind);
        for field in ["apiVersion", "kind"] {
            if config[field].as_str().unwrap_or_default().is_empty() {
                return Err(ApiError::bad_request(format!(
                    "{field}: Required value: a configuration says what it is of"
                )));
            }
        }
        if !config["metadata"]["managedFields"].is_null() {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        let mut looked_at = config.clone();
        let unknown = match &context.row.custom {
            Some(version) => version.conform(&mut looked_at),
            None => conform(&self.registry.schemas, context.served.ty, &mut looked_at),
        };
        let unknown =
            unknown.map_err(|e| ApiError::bad_request(format!("failed to create typed patch object {about}: {e}")))?;
        // What is not declared cannot be merged: nobody knows what it consists of.
        if let Some(path) = unknown.first() {
            let why = format!("failed to create typed patch object {about}: .{path}: field not declared in schema");
            return Err(ApiError::bad_request(why));
        }
        config = context.conform(self, config, duplicates)?;
        self.place(context, &mut config)?;
        let (object, revision, status) = self.apply_config(context, &config).await?;
        self.answer(context, object, revision, status)
    }

    /// Applies a configuration that has been looked through.
    pub(crate) async fn apply_config(
        self: &Arc<Self>,
        context: &Context<'_>,
        config: &Value,
    ) -> Result<(Value, Revision, StatusCode)> {
        let (row, name) = (&context.row, context.name()?);
        let manager = context.manager(Operation::Apply)?;
        let force = match context.query.text("force") {
            None | Some("false" | "0") => false,
            Some("" | "true" | "1") => true,
            Some(other) => {
                return Err(ApiError::bad_request(format!("force: Invalid value: {other:?}: must be true or false")));
            }
        };
        let text = |field: &str| config["metadata"][field].as_str().filter(|v| !v.is_empty());
        let expected = text("resourceVersion").map(expected_version).transpose()?;
        let key = row.key(context.namespace(), name);
        for _ in 0..ATTEMPTS {
            let there = self.consistent().await?.get(context.served.id, &key).is_some();
            if there {
                let make = |current: &crate::object::Object| {
                    let (object, managed) = self.merged(context, Some(&current.value()), config, &manager, force)?;
                    Ok(Change { object, managed: Some(managed) })
                };
                let (object, revision) = self.change(context, expected, make).await?;
                return Ok((object, revision, StatusCode::OK));
            }
            if !context.part().is_empty() {
                return Err(ApiError::not_found(row, name));
            }
            if let Some(uid) = text("uid") {
                let why =
                    format!("uid mismatch: the provided object specified uid {uid}, and no existing object was found");
                return Err(ApiError::conflict(row, name, why));
            }
            if expected.is_some() {
                return Err(ApiError::not_found(row, name));
            }
            self.may_create(context).await?;
            let (object, managed) = self.merged(context, None, config, &manager, force)?;
            match self.create_object(context, Change { object, managed: Some(managed) }).await {
                // Somebody else was faster: then it is there.
                Err(error) if error.reason == "AlreadyExists" => {}
                Err(error) => return Err(error),
                Ok((object, revision)) => return Ok((object, revision, StatusCode::CREATED)),
            }
        }
        Err(ApiError::modified(row, name))
    }

    fn merged(
        &self,
        context: &Context<'_>,
        live: Option<&Value>,
        config: &Value,
        manager: &Manager,
        force: bool,
    ) -> Result<(Value, Managed)> {
        let types = self.registry.types(&context.row, context.part())?;
        let managed =
            live.map(|live| Managed::read(&live["metadata"]["managedFields"]).unwrap_or_default()).unwrap_or_default();
        let apply = |force| managed::apply(types, live, config, managed.clone(), manager, force, &now());
        let applied = match (apply(force), live) {
            (Err(ApplyError::Conflicts(conflicts)), Some(live))
                if manager.name == "kubectl" && managed::changes_over(types, live, &conflicts) =>
            {
                apply(true)
            }
            (applied, _) => applied,
        };
        let (mut object, managed) = applied.map_err(|error| match &error {
            ApplyError::Conflicts(conflicts) => ApiError::apply_conflict(error.to_string(), conflicts),
            ApplyError::Typed(_) => ApiError::bad_request(format!("failed to create typed patch object: {error}")),
        })?;
        // Whoever goes back to applying on the client finds what was applied last.
        if manager.name == "kubectl"
            && live.is_some_and(|live| live["metadata"]["annotations"][LAST_APPLIED].is_string())
        {
            let mut last = config.clone();
            if let Some(annotations) = last["metadata"]["annotations"].as_object_mut() {
                annotations.remove(LAST_APPLIED);
            }
            let text = last.to_string();
            if text.len() <= LARGEST_NOTE {
                object["metadata"]["annotations"][LAST_APPLIED] = text.into();
            }
        }
        Ok((object, managed))
    }

    /// Who applies what is not there yet must be allowed to create it.
    async fn may_create(&self, context: &Context<'_>) -> Result<()> {
        let fields = field_selector("create", &context.query);
        let attributes = Attributes::of("create", &context.path, &fields);
        let allowed = self.authorize(&context.user, &attributes).await;
        allowed.map(|_| ()).map_err(|why| denied(&context.user, &attributes, &why))
    }
}

/// Puts the records into an object.
pub(crate) fn write(object: &mut Value, managed: &Managed) {
    match managed.write() {
        Some(fields) => meta(object).insert("managedFields".into(), fields),
        None => meta(object).remove("managedFields"),
    };
}

fn now() -> String {
    timestamp(Timestamp::now()).as_str().unwrap_or_default().to_owned()
}
