//! A request as admission sees it.

use seawall_api::{
    Row, Scope as RowScope,
    row::{Alias, api_version},
};
use serde_json::{Value, json};

use super::rules::Asked;
use crate::{Context, apply::Recording, error::Result};

/// What is done.
pub(crate) const CREATE: &str = "CREATE";
/// What is done.
pub(crate) const UPDATE: &str = "UPDATE";
/// What is done.
pub(crate) const DELETE: &str = "DELETE";
/// What is done.
pub(crate) const CONNECT: &str = "CONNECT";

/// What is asked for, and who asks.
pub(crate) struct Request<'a> {
    pub context: &'a Context<'a>,
    pub operation: &'static str,
    pub subresource: &'a str,
    pub name: String,
    /// Group, version and kind of the object that is sent along, if it is not one of the resource.
    pub other: Option<(&'static str, &'static str, &'static str)>,
    pub options: Value,
    pub dry_run: bool,
    /// The new object in the stored version, or what was sent to a subresource; null when something is deleted.
    pub object: Value,
    /// The object before.
    pub old: Value,
}

impl<'a> Request<'a> {
    /// Of a write.
    pub fn new(
        context: &'a Context<'a>,
        operation: &'static str,
        object: Value,
        old: Option<&Value>,
    ) -> Result<Request<'a>> {
        let named = if object.is_null() { old.unwrap_or(&Value::Null) } else { &object };
        let name = context.path.name.clone();
        let name = name.unwrap_or_else(|| named["metadata"]["name"].as_str().unwrap_or_default().to_owned());
        let dry_run = context.dry_run()?;
        let kind = match operation {
            CREATE => "CreateOptions",
            UPDATE if context.headers.get(http::header::CONTENT_TYPE).is_some_and(is_patch) => "PatchOptions",
            UPDATE => "UpdateOptions",
            _ => "DeleteOptions",
        };
        let mut options = json!({"kind": kind, "apiVersion": "meta.k8s.io/v1"});
        if dry_run {
            options["dryRun"] = json!(["All"]);
        }
        for key in ["fieldManager", "fieldValidation"] {
            if let (Some(value), true) = (context.query.text(key), matches!(operation, CREATE | UPDATE)) {
                options[key] = value.into();
            }
        }
        let subresource = match context.recording {
            Recording::As(part) => part,
            Recording::OfPath => context.path.subresource.as_deref().unwrap_or_default(),
        };
        let old = old.cloned().unwrap_or_default();
        Ok(Request { context, operation, subresource, name, other: None, options, dry_run, object, old })
    }

    /// Of something that is sent to a subresource and is no object of the resource.
    pub fn of_other(
        context: &'a Context<'a>,
        operation: &'static str,
        object: Value,
        kind: (&'static str, &'static str, &'static str),
    ) -> Result<Request<'a>> {
        let mut request = Request::new(context, operation, object, None)?;
        request.object["apiVersion"] = api_version(kind.0, kind.1).into();
        request.object["kind"] = kind.2.into();
        request.other = Some(kind);
        Ok(request)
    }

    pub fn row(&self) -> &Row {
        &self.context.row
    }

    /// The namespace; that of a Namespace is itself, as upstream has it.
    pub fn namespace(&self) -> &str {
        match (self.row().group, self.row().plural) {
            ("", "namespaces") => &self.name,
            _ => self.context.namespace(),
        }
    }

    /// Whether the object lives in a namespace.
    pub fn is_namespaced(&self) -> bool {
        self.row().scope == RowScope::Namespaced
    }

    /// What rules look at.
    pub fn asked(&self) -> Asked<'_> {
        Asked {
            operation: self.operation,
            group: self.context.served.group,
            version: self.context.served.version,
            resource: self.row().plural,
            subresource: self.subresource,
            name: &self.name,
            namespaced: self.is_namespaced(),
        }
    }

    /// The groups and versions in which the resource is served, that of the request first.
    pub fn versions(&self) -> Vec<(&'static str, &'static str)> {
        let row = self.row();
        let mut all = vec![(self.context.served.group, self.context.served.version)];
        let others = std::iter::once((row.group, row.version)).chain(row.aliases.iter().map(|a| (a.group, a.version)));
        for version in others {
            if !all.contains(&version) {
                all.push(version);
            }
        }
        all
    }

    fn alias(&self, version: (&str, &str)) -> Option<&Alias> {
        let row = self.row();
        match self.other.is_some() || version == (row.group, row.version) {
            true => None,
            false => row.aliases.iter().find(|alias| (alias.group, alias.version) == version),
        }
    }

    /// An object in a version in which the resource is served.
    pub fn convert(&self, object: &Value, version: (&str, &str)) -> Value {
        let mut object = object.clone();
        if let (Some(alias), true) = (self.alias(version), object.is_object()) {
            (alias.conversion.from_stored)(&mut object);
            object["apiVersion"] = api_version(version.0, version.1).into();
        }
        object
    }

    /// Back to the stored version.
    pub fn restore(&self, object: &mut Value, version: (&str, &str)) {
        if let Some(alias) = self.alias(version) {
            (alias.conversion.to_stored)(object);
            object["apiVersion"] = self.row().api_version().into();
        }
    }

    fn kind_in(&self, version: (&str, &str)) -> Value {
        match self.other {
            Some((group, version, kind)) => json!({"group": group, "version": version, "kind": kind}),
            None => json!({"group": version.0, "version": version.1, "kind": self.row().kind}),
        }
    }

    /// The request without its objects, as webhooks and policies get it
    /// (<https://kubernetes.io/docs/reference/config-api/apiserver-admission.v1/>).
    pub fn describe(&self, version: (&str, &str)) -> Value {
        let of =
            |version: (&str, &str)| json!({"group": version.0, "version": version.1, "resource": self.row().plural});
        let sent = (self.context.served.group, self.context.served.version);
        let mut out = json!({
            "kind": self.kind_in(version), "resource": of(version),
            "requestKind": self.kind_in(sent), "requestResource": of(sent),
            "name": self.name, "operation": self.operation, "userInfo": self.context.user,
            "dryRun": self.dry_run, "options": self.options,
        });
        if self.is_namespaced() || self.row().plural == "namespaces" {
            out["namespace"] = self.namespace().into();
        }
        if !self.subresource.is_empty() {
            out["subResource"] = self.subresource.into();
            out["requestSubResource"] = self.subresource.into();
        }
        out
    }

    /// Whether a request is about the configuration of admission itself, which nothing may get into the way of
    /// (<https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/#what-are-admission-webhooks>).
    pub fn is_exempt(&self) -> bool {
        self.row().group == super::registered::GROUP
    }
}

fn is_patch(kind: &http::HeaderValue) -> bool {
    kind.to_str().is_ok_and(|kind| kind.contains("patch"))
}
