//! Admission: what is completed or refused between decoding and storing
//! (<https://kubernetes.io/docs/reference/access-authn-authz/admission-controllers/>).
//!
//! It has two halves, as upstream's: what changes an object ([`Server::admit_mutating`]), and, after defaults and
//! validation, what only looks at it ([`Server::admit_validating`]). In each half the built-in part comes first, then
//! policies, then webhooks; quotas come last of all, since they take something. Whatever fails refuses the request,
//! unless whoever configured it said otherwise.

mod certificates;
mod conditions;
mod defaults;
mod device_access;
mod limits;
mod mutating_policy;
mod node_restriction;
mod pod_security;
mod pods;
mod policy;
mod quota;
mod rbac;
pub(crate) mod registered;
pub(crate) mod request;
mod rules;
mod webhook;

use std::sync::Arc;

pub(crate) use quota::Turns;
use registered::Index;
use request::{CONNECT, CREATE, DELETE, Request, UPDATE};
use seawall_api::{Row, Scope, schema::check::conform};
use seawall_store::Revision;
use serde_json::{Value, json};

use crate::{
    Context, Server,
    apply::Recording,
    cache::Snapshot,
    error::{ApiError, Result},
    object::Object,
    write::Operation,
};

/// Namespaces that cannot be deleted.
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

impl Server {
    /// The first half: completes and changes what is to be written. Says whether anything but the server itself changed
    /// the object, so that what nobody may change can be put back.
    pub(crate) async fn admit_mutating(
        &self,
        context: &Context<'_>,
        operation: Operation,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<bool> {
        self.mutate_built_in(context, operation, object, old).await?;
        let index = self.registered();
        if index.mutating_policies.is_empty() && index.mutating_webhooks.is_empty() {
            return Ok(false);
        }
        let name = if operation == Operation::Create { CREATE } else { UPDATE };
        let mut request = Request::new(context, name, Value::Null, old)?;
        request.present(object, old);
        if request.name.is_empty() {
            request.name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        }
        let namespace = self.namespace_of(&request).await?;
        let before = request.object.clone();
        let reinvoke = self.mutate_registered(&index, &mut request, &namespace, None).await?;
        if !reinvoke.is_empty() {
            // The built-in part sees what the others have added (containers, most of all), once.
            if request.other.is_none() {
                let mut changed = std::mem::take(&mut request.object);
                self.mutate_built_in(context, operation, &mut changed, old).await?;
                request.object = changed;
            }
            self.mutate_registered(&index, &mut request, &namespace, Some(&reinvoke)).await?;
        }
        let changed = request.object != before;
        if changed {
            request.accept(object);
        }
        Ok(changed)
    }

    /// Asks policies and webhooks in their order, or again those that want to see what came after them. Gives the
    /// states that each of them left, if the object has changed.
    async fn mutate_registered(
        &self,
        index: &Index,
        request: &mut Request<'_>,
        namespace: &Value,
        again: Option<&[Value]>,
    ) -> Result<Vec<Value>> {
        let (mut left, mut changed) = (Vec::new(), false);
        let mut place = 0;
        // The one that left an object as it is now has nothing new to see.
        let due = |reinvoke: bool, place: usize, object: &Value| match again {
            None => true,
            Some(left) => reinvoke && left.get(place).is_none_or(|seen| seen != object),
        };
        for (policy, bindings) in &index.mutating_policies {
            if due(policy.reinvoke, place, &request.object) {
                changed |= self.mutate_by_policy(policy, bindings, request, namespace).await?;
            }
            left.push(request.object.clone());
            place += 1;
        }
        for webhook in &index.mutating_webhooks {
            if due(webhook.reinvoke, place, &request.object) {
                changed |= self.mutate_by_webhook(webhook, request, namespace).await?;
            }
            left.push(request.object.clone());
            place += 1;
        }
        Ok(if changed { left } else { Vec::new() })
    }

    /// The second half: refuses, after defaults and validation, what policies and webhooks do not want.
    pub(crate) async fn admit_validating(
        &self,
        context: &Context<'_>,
        operation: Operation,
        object: &Value,
        old: Option<&Value>,
    ) -> Result<()> {
        self.check_limits(context, object, operation == Operation::Create)?;
        self.pod_security(context, object, old).await?;
        self.device_access(context, object, old).await?;
        let index = self.registered();
        if index.validating_policies.is_empty() && index.validating_webhooks.is_empty() {
            return Ok(());
        }
        let name = if operation == Operation::Create { CREATE } else { UPDATE };
        let mut request = Request::new(context, name, Value::Null, old)?;
        request.present(object, old);
        if request.name.is_empty() {
            request.name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        }
        self.validate_registered(&request).await
    }

    async fn validate_registered(&self, request: &Request<'_>) -> Result<()> {
        let namespace = self.namespace_of(request).await?;
        self.validate_by_policies(request, &namespace).await?;
        self.validate_by_webhooks(request, &namespace).await
    }

    /// Both halves for what is sent to a subresource and is no object of the resource: a binding, an eviction, a
    /// connection. What mutating webhooks make of it is what is carried out.
    pub(crate) async fn admit_other(&self, request: &mut Request<'_>) -> Result<()> {
        let index = self.registered();
        if !index.mutating_policies.is_empty() || !index.mutating_webhooks.is_empty() {
            let namespace = self.namespace_of(request).await?;
            let left = self.mutate_registered(&index, request, &namespace, None).await?;
            if !left.is_empty() {
                self.mutate_registered(&index, request, &namespace, Some(&left)).await?;
            }
        }
        match index.validating_policies.is_empty() && index.validating_webhooks.is_empty() {
            true => Ok(()),
            false => self.validate_registered(request).await,
        }
    }

    /// Admits a connection into a pod, or to what answers on behalf of something, as it was asked for in the URL.
    pub(crate) async fn admit_connect(&self, context: &Context<'_>) -> Result<()> {
        let index = self.registered();
        if index.is_empty() {
            return Ok(());
        }
        let kind = match context.path.subresource.as_deref() {
            Some("exec") => "PodExecOptions",
            Some("attach") => "PodAttachOptions",
            Some("proxy") => match context.row.plural {
                "pods" => "PodProxyOptions",
                "services" => "ServiceProxyOptions",
                _ => "NodeProxyOptions",
            },
            _ => "PodPortForwardOptions",
        };
        let mut options = match kind.ends_with("ProxyOptions") {
            true => json!({"path": format!("/{}", context.path.rest)}),
            false => json!({}),
        };
        for (key, value) in context.query.pairs() {
            match key.as_str() {
                "stdin" | "stdout" | "stderr" | "tty" => options[key] = context.query.flag(key).into(),
                "container" => options[key] = value.as_str().into(),
                "command" => pods::push(&mut options, key, value.as_str().into()),
                "ports" => pods::push(&mut options, key, value.parse::<u16>().map_or(Value::Null, Value::from)),
                _ => {}
            }
        }
        let mut request = Request::of_other(context, CONNECT, options, ("", "v1", kind))?;
        // Options of a connection are what the URL says; there are none beside them.
        request.options = Value::Null;
        self.admit_other(&mut request).await
    }

    /// Admits a deletion.
    pub(crate) async fn admit_delete(&self, context: &Context<'_>, object: &Value, dry_run: bool) -> Result<()> {
        self.restrict_node_deletion(context, object)?;
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        if context.row.plural == "namespaces" && context.row.group.is_empty() && IMMORTAL.contains(&name) {
            return Err(ApiError::forbidden(&context.row, name, "this namespace may not be deleted"));
        }
        let mut request = Request::new(context, DELETE, Value::Null, Some(object))?;
        request.name = name.to_owned();
        request.dry_run |= dry_run;
        self.admit_other(&mut request).await
    }

    /// What is registered, as the cache has it.
    pub(crate) fn registered(&self) -> Arc<Index> {
        self.registered.index(&self.registry, &self.cache.snapshot())
    }

    /// The namespace that a request is about; null if it is about none.
    async fn namespace_of(&self, request: &Request<'_>) -> Result<Value> {
        let name = request.namespace();
        if name.is_empty() {
            return Ok(Value::Null);
        }
        Ok(self.find("", "namespaces", "", name).await?.map(|found| found.value()).unwrap_or_default())
    }

    /// Takes what a webhook or policy made of an object, if it is one of its type. Says whether it is another one.
    fn take_mutated(
        &self,
        request: &mut Request<'_>,
        mut object: Value,
        version: (&'static str, &'static str),
    ) -> Result<bool, String> {
        if request.other.is_none() {
            let served = self.registry.find(version.0, version.1, request.row().plural);
            let ty = served.map(|served| served.ty).ok_or("the version is not served")?;
            conform(&self.registry.schemas, ty, &mut object).map_err(|e| e.to_string())?;
            if !object["metadata"].is_object() {
                return Err("the object has lost its metadata".to_owned());
            }
        } else if !object.is_object() {
            return Err("it is no object any more".to_owned());
        }
        request.restore(&mut object, version);
        for key in ["apiVersion", "kind"] {
            object[key] = request.object[key].clone();
        }
        let changed = object != request.object;
        request.object = object;
        Ok(changed)
    }

    /// What is built in and may change an object, and what is known before anything changes it.
    async fn mutate_built_in(
        &self,
        context: &Context<'_>,
        operation: Operation,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<()> {
        self.restrict_node(context, operation, object, old)?;
        if context.row.plural == "certificatesigningrequests" && context.row.custom.is_none() {
            self.admit_signing_request(context, object, old).await?;
        }
        self.guard_roles(context, object, old).await?;
        if operation != Operation::Create {
            return Ok(());
        }
        if context.row.custom.as_ref().is_some_and(|version| version.definition.terminating()) {
            // As upstream: nothing new while everything is being deleted.
            return Err(ApiError::method_not_allowed());
        }
        if context.row.scope == Scope::Namespaced {
            self.namespace_lifecycle(context).await?;
        }
        self.default_classes(context, object);
        Self::protect_storage(context, object);
        if context.row.plural == "pods" && context.row.group.is_empty() {
            self.service_account(context, object).await?;
            self.priority(context, object)?;
            self.namespace_tolerations(context, object).await?;
            pods::default_tolerations(object, self.config.tolerations);
            self.runtime_class(context, object).await?;
            self.fill_limits(context, object);
        }
        if context.row.plural == "nodes" && context.row.group.is_empty() {
            pods::taint_new_node(object);
        }
        Ok(())
    }

    /// Waits until what was written counts for whoever asks this server next, if it says who may do what.
    pub(crate) async fn in_force(&self, row: &Row, revision: Revision) {
        let decides = matches!(
            (row.group, row.plural),
            ("rbac.authorization.k8s.io" | "scheduling.k8s.io" | "apiextensions.k8s.io" | registered::GROUP, _)
                | ("node.k8s.io", _)
                | ("storage.k8s.io", "storageclasses")
                | ("networking.k8s.io", "ingressclasses")
                | ("", "limitranges" | "resourcequotas" | "namespaces")
        );
        // It is stored: that it will be seen a little later is no reason to say otherwise.
        if decides && let Err(error) = self.cache.at_least(revision).await {
            tracing::debug!(error = error.message, "the cache is behind");
        }
    }

    /// An object by group, plural, namespace and name, of which a slightly old state will do.
    pub(crate) fn lookup(
        &self,
        snapshot: &Snapshot,
        group: &str,
        plural: &str,
        namespace: &str,
        name: &str,
    ) -> Option<Arc<Object>> {
        let (id, row) = self.registry.by_name(group, plural)?;
        snapshot.get(id, &row.key(namespace, name)).cloned()
    }

    /// The same, asking for the newest state before saying that there is none.
    pub(crate) async fn find(
        &self,
        group: &str,
        plural: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<Object>>> {
        match self.lookup(&self.cache.snapshot(), group, plural, namespace, name) {
            Some(object) => Ok(Some(object)),
            None => Ok(self.lookup(&*self.consistent().await?, group, plural, namespace, name)),
        }
    }

    /// Nothing is created in a namespace that does not exist or is going.
    async fn namespace_lifecycle(&self, context: &Context<'_>) -> Result<()> {
        let name = context.namespace();
        let Some((_, row)) = self.registry.by_name("", "namespaces") else { return Ok(()) };
        let namespace = self.find("", "namespaces", "", name).await?.ok_or_else(|| ApiError::not_found(row, name))?;
        if namespace.field(row, "status.phase") == "Terminating" {
            let why = format!("unable to create new content in namespace {name} because it is being terminated");
            let mut error = ApiError::forbidden(&context.row, "", why);
            error.details["causes"] = json!([{"reason": "NamespaceTerminating", "message": format!("namespace {name} is being terminated"), "field": "metadata.namespace"}]);
            return Err(error);
        }
        Ok(())
    }
}

impl Request<'_> {
    /// Shows an object as clients send and get it: with its version; of a scale, as a Scale.
    fn present(&mut self, object: &Value, old: Option<&Value>) {
        match self.context.recording {
            Recording::As("scale") => {
                let form = |object: &Value| {
                    let revision = object["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse().ok());
                    crate::subresource::scale_form(object, Revision(revision.unwrap_or_default()))
                };
                self.other = Some(("autoscaling", "v1", "Scale"));
                self.object = form(object);
                self.old = old.map(form).unwrap_or_default();
                self.object["metadata"]["resourceVersion"] = self.old["metadata"]["resourceVersion"].clone();
            }
            _ => {
                self.object = object.clone();
                if let Some(old) = old {
                    self.object["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
                }
            }
        }
    }

    /// Takes over what was made of the object, but for what says which object it is.
    fn accept(&mut self, object: &mut Value) {
        if self.other.is_some() {
            object["spec"]["replicas"] = self.object["spec"]["replicas"].clone();
            return;
        }
        let before = std::mem::replace(object, std::mem::take(&mut self.object));
        let kept = [
            "name",
            "namespace",
            "uid",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generation",
            "generateName",
            "managedFields",
            "selfLink",
            "resourceVersion",
        ];
        let meta = crate::write::meta(object);
        for key in kept {
            match before["metadata"].get(key) {
                Some(value) => meta.insert(key.to_owned(), value.clone()),
                None => meta.remove(key),
            };
        }
    }
}
