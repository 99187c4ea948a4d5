//! Special verbs: `/status`, `/scale`, `/binding`, `/eviction`, `/token` and the rest.

use std::sync::Arc;

use http::{Method, Response, StatusCode};
use jiff::{SignedDuration, Timestamp};
use seawall_api::{Row, Subresource, schema::check::conform, selector::LabelSelector};
use seawall_store::{self as store, Expect, Revision};
use serde_json::{Value, json};

use crate::{
    Context, Server,
    admission::request::{CREATE, Request},
    apply::{APPLY, Recording},
    auth::token::{Bound, Claims, Reference},
    delete::DeleteOptions,
    encode::{Body, value},
    error::{ApiError, Result},
    object::encode,
    registry::subresource,
    write::{timestamp, yaml},
};

/// The longest life of a token, in seconds.
const TOKEN_MAX: i64 = 48 * 3600;
/// The shortest (upstream's `--service-account-max-token-expiration` lower bound).
const TOKEN_MIN: i64 = 600;

/// The value at a path of fields.
fn value_at<'v>(value: &'v Value, path: &[String]) -> &'v Value {
    path.iter().fold(value, |value, field| &value[field])
}

fn set_at(value: &mut Value, path: &[String], new: Value) {
    let mut at = value;
    for field in path {
        if !at.is_object() {
            *at = json!({});
        }
        at = &mut at[field];
    }
    *at = new;
}

/// A custom resource as a Scale
/// (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#scale-subresource>).
fn scale_of(scale: &seawall_api::custom::Scale, object: &Value, revision: Revision) -> Value {
    let number = |path: &[String]| value_at(object, path).as_i64().unwrap_or_default();
    let meta = &object["metadata"];
    let mut status = json!({"replicas": number(&scale.status)});
    if let Some(selector) = scale.selector.as_ref().and_then(|path| value_at(object, path).as_str()) {
        status["selector"] = selector.into();
    }
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {"name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"],
            "resourceVersion": revision.to_string(), "creationTimestamp": meta["creationTimestamp"]},
        "spec": {"replicas": number(&scale.spec)}, "status": status})
}

impl Server {
    /// Routes to a special verb.
    pub(crate) async fn subresource(
        self: &Arc<Self>,
        context: &Context<'_>,
        method: &Method,
    ) -> Result<Response<Body>> {
        let name = context.path.subresource.as_deref().unwrap_or_default();
        let sub = subresource(&context.row, name).ok_or_else(ApiError::no_route)?;
        match (sub, method.as_str()) {
            (Subresource::Scale, _) => self.scale(context, method).await,
            (Subresource::Log, "GET") => self.pod_log(context).await,
            (Subresource::Binding, "POST") => self.bind(context).await,
            (Subresource::Eviction, "POST") => self.evict(context).await,
            (Subresource::Token, "POST") => self.token(context).await,
            (
                Subresource::Status
                | Subresource::EphemeralContainers
                | Subresource::Resize
                | Subresource::Approval
                | Subresource::Finalize,
                method,
            ) => match method {
                "GET" => self.get(context).await,
                "PUT" => self.update(context).await,
                "PATCH" => self.patch(context).await,
                _ => Err(ApiError::method_not_allowed()),
            },
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// `/scale` as an `autoscaling/v1` Scale.
    async fn scale(self: &Arc<Self>, context: &Context<'_>, method: &Method) -> Result<Response<Body>> {
        let custom = context.row.custom.as_ref().and_then(|version| version.scale.clone());
        let replicas_at =
            custom.as_ref().map_or_else(|| vec!["spec".into(), "replicas".into()], |scale| scale.spec.clone());
        let form = |object: Value, revision: Revision| match &custom {
            Some(scale) => scale_of(scale, &object, revision),
            None => scale_form(&object, revision),
        };
        if method == Method::GET {
            let snapshot = self.consistent().await?;
            let name = context.name()?;
            let object = snapshot.get(context.served.id, &context.row.key(context.namespace(), name));
            let object = object.ok_or_else(|| ApiError::not_found(&context.row, name))?.clone();
            let object = self.one_in_version(&context.row, object).await?;
            return Ok(value(StatusCode::OK, &form(object.value(), object.revision), context.form.media));
        }
        if *method != Method::PUT && *method != Method::PATCH {
            return Err(ApiError::method_not_allowed());
        }
        let ty = self.type_named("io.k8s.api.autoscaling.v1.Scale")?;
        // From here on it is an update of the object itself.
        let mut plain = context.clone();
        plain.path.subresource = None;
        plain.recording = Recording::As("scale");
        if *method == Method::PATCH && context.content_type() == APPLY {
            let (body, _) =
                yaml(&context.body).map_err(|e| ApiError::bad_request(format!("error decoding YAML: {e}")))?;
            let replicas = body["spec"]["replicas"].as_i64().ok_or_else(|| {
                ApiError::bad_request("spec.replicas: Required value: a number is what a Scale is about")
            })?;
            let mut config = json!({"apiVersion": context.row.api_version(), "kind": context.row.kind,
                "metadata": {"name": context.name()?}});
            set_at(&mut config, &replicas_at, replicas.into());
            let (object, revision, status) = self.apply_config(&plain, &config).await?;
            return Ok(value(status, &form(object, revision), context.form.media));
        }
        let (put, patch) = match *method {
            Method::PUT => (Some(context.body(self, ty)?.0), None),
            _ => (None, Some(self.patcher(context, ty)?)),
        };
        let make = |current: Value, revision: Revision| -> Result<(i64, Option<Revision>)> {
            let mut scale = put.clone().unwrap_or_else(|| form(current, revision));
            if let Some(patch) = &patch {
                patch(&mut scale)?;
            }
            conform(&self.registry.schemas, ty, &mut scale).map_err(|e| {
                ApiError::bad_request(format!("Scale in version \"v1\" cannot be handled as a Scale: {e}"))
            })?;
            let replicas = scale["spec"]["replicas"].as_i64().unwrap_or_default();
            let version = scale["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse().ok()).map(Revision);
            Ok((replicas, version))
        };
        let (object, revision) = self
            .change(&plain, None, |current| {
                let mut object = current.value();
                let (replicas, version) = make(object.clone(), current.revision)?;
                if version.is_some_and(|v| v.0 > 0 && v != current.revision) {
                    return Err(ApiError::modified(&context.row, current.name()));
                }
                set_at(&mut object, &replicas_at, replicas.into());
                Ok(object.into())
            })
            .await?;
        Ok(value(StatusCode::OK, &form(object, revision), context.form.media))
    }

    /// Changes an object without the pipeline: for what the server itself decides.
    async fn modify(
        &self,
        context: &Context<'_>,
        row: &Row,
        key: &str,
        name: &str,
        change: impl Fn(&mut Value) -> Result<()>,
    ) -> Result<(Value, Revision)> {
        let (id, _) = self.registry.by_name(row.group, row.plural).ok_or_else(ApiError::no_route)?;
        let dry = context.dry_run()?;
        for _ in 0..8 {
            let snapshot = self.consistent().await?;
            let current = snapshot.get(id, key).ok_or_else(|| ApiError::not_found(row, name))?.clone();
            drop(snapshot);
            let mut object = current.value();
            change(&mut object)?;
            if let Some(meta) = object["metadata"].as_object_mut() {
                meta.remove("resourceVersion");
            }
            if dry {
                return Ok((object, current.revision));
            }
            match self.store.put(key, encode(&object), Expect::At(current.revision), context.fence.as_ref()).await {
                Ok(revision) => return Ok((object, revision)),
                Err(store::Error::Conflict { .. }) => {}
                Err(error) => return Err(ApiError::store(error)),
            }
        }
        Err(ApiError::modified(row, name))
    }

    /// `/binding`: the scheduler gives a pod its node.
    async fn bind(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let (binding, _) = context.body(self, self.type_named("io.k8s.api.core.v1.Binding")?)?;
        let (row, name) = (&context.row, context.name()?);
        let mut request = Request::of_other(context, CREATE, binding, ("", "v1", "Binding"))?;
        self.admit_other(&mut request).await?;
        let binding = request.object;
        let node = binding["target"]["name"].as_str().unwrap_or_default().to_owned();
        if node.is_empty() {
            return Err(ApiError::bad_request("target.name: Required value: the name of the node"));
        }
        let uid = binding["metadata"]["uid"].as_str().filter(|u| !u.is_empty());
        let key = row.key(context.namespace(), name);
        let now = timestamp(Timestamp::now());
        self.modify(context, row, &key, name, |pod| {
            if let Some(uid) = uid
                && pod["metadata"]["uid"] != uid
            {
                return Err(ApiError::conflict(row, name, "the uid of the binding is not that of the pod"));
            }
            if pod["metadata"]["deletionTimestamp"].is_string() {
                return Err(ApiError::conflict(
                    row,
                    name,
                    format!("pod {name} is being deleted, cannot be assigned to a host"),
                ));
            }
            if let Some(taken) = pod["spec"]["nodeName"].as_str().filter(|n| !n.is_empty()) {
                return Err(ApiError::conflict(row, name, format!("pod {name} is already assigned to node {taken:?}")));
            }
            if pod["spec"]["schedulingGates"].as_array().is_some_and(|g| !g.is_empty()) {
                return Err(ApiError::conflict(row, name, format!("pod {name} has non-empty .spec.schedulingGates")));
            }
            pod["spec"]["nodeName"] = node.as_str().into();
            for (k, v) in binding["metadata"]["annotations"].as_object().into_iter().flatten() {
                pod["metadata"]["annotations"][k] = v.clone();
            }
            let scheduled =
                json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now});
            set_condition(&mut pod["status"], scheduled);
            if let Some(status) = pod["status"].as_object_mut() {
                // The claim is redeemed (KEP-5278).
                status.remove("nominatedNodeName");
            }
            Ok(())
        })
        .await?;
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
        Ok(value(StatusCode::CREATED, &status, context.form.media))
    }

    /// `/eviction`: a deletion that respects disruption budgets
    /// (<https://kubernetes.io/docs/concepts/scheduling-eviction/api-eviction/>).
    async fn evict(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let (eviction, _) = match context.body.is_empty() {
            true => (json!({}), Vec::new()),
            false => context.body(self, self.type_named("io.k8s.api.policy.v1.Eviction")?)?,
        };
        let (row, name) = (&context.row, context.name()?);
        let snapshot = self.consistent().await?;
        let pod = snapshot
            .get(context.served.id, &row.key(context.namespace(), name))
            .ok_or_else(|| ApiError::not_found(row, name))?;
        let pod = pod.value();
        self.restrict_node_deletion(context, &pod)?;
        drop(snapshot);
        let mut request = Request::of_other(context, CREATE, eviction, ("policy", "v1", "Eviction"))?;
        self.admit_other(&mut request).await?;
        let eviction = request.object;
        let snapshot = self.consistent().await?;
        let asked = &eviction["deleteOptions"];
        let options = DeleteOptions {
            grace: asked["gracePeriodSeconds"].as_i64(),
            uid: asked["preconditions"]["uid"].as_str().map(str::to_owned),
            admitted: true,
            dry_run: context.dry_run()? || asked["dryRun"].as_array().is_some_and(|d| d.iter().any(|v| v == "All")),
            ..Default::default()
        };
        let phase = pod["status"]["phase"].as_str().unwrap_or_default();
        let disposable =
            matches!(phase, "Succeeded" | "Failed" | "Pending") || pod["metadata"]["deletionTimestamp"].is_string();
        if !disposable {
            let (id, budget_row) =
                self.registry.by_name("policy", "poddisruptionbudgets").ok_or_else(ApiError::no_route)?;
            let prefix = format!("{}{}/", budget_row.prefix(), context.namespace());
            let picks = |budget: &Value| {
                LabelSelector::from_value(&budget["spec"]["selector"])
                    .is_some_and(|s| s.matches_labels(&pod["metadata"]["labels"]))
            };
            let budgets: Vec<Value> = snapshot.range(id, &prefix, None).map(|o| o.value()).filter(picks).collect();
            drop(snapshot);
            if budgets.len() > 1 {
                return Err(ApiError::internal(
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                    name,
                ));
            }
            if let Some(budget) = budgets.first() {
                let budget_name = budget["metadata"]["name"].as_str().unwrap_or_default();
                let key = budget_row.key(context.namespace(), budget_name);
                let now = timestamp(Timestamp::now());
                let ready = pod["status"]["conditions"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True");
                let unhealthy_may_go = budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
                    || budget["status"]["currentHealthy"].as_i64() >= budget["status"]["desiredHealthy"].as_i64();
                if ready || !unhealthy_may_go {
                    let budget_row = budget_row.clone();
                    let take = |budget: &mut Value| {
                        let generation = budget["metadata"]["generation"].as_i64().unwrap_or_default();
                        let status = &mut budget["status"];
                        let observed = status["observedGeneration"].as_i64().unwrap_or_default();
                        let allowed = status["disruptionsAllowed"].as_i64().unwrap_or_default();
                        if allowed < 1 || observed < generation {
                            let needs = status["desiredHealthy"].as_i64().unwrap_or_default();
                            let has = status["currentHealthy"].as_i64().unwrap_or_default();
                            let cause = json!([{"reason": "DisruptionBudget", "message": format!("The disruption budget {budget_name} needs {needs} healthy pods and has {has} currently")}]);
                            return Err(ApiError::too_many_requests(
                                "Cannot evict pod as it would violate the pod's disruption budget.",
                                cause,
                            ));
                        }
                        status["disruptionsAllowed"] = (allowed - 1).into();
                        status["disruptedPods"][name] = now.clone();
                        Ok(())
                    };
                    let mut of_budget = context.clone();
                    if options.dry_run {
                        of_budget.query = crate::request::Query::parse(Some("dryRun=All"));
                    }
                    self.modify(&of_budget, &budget_row, &key, budget_name, take).await?;
                }
            }
        }
        self.delete_object(context, name, &options).await?;
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
        Ok(value(StatusCode::CREATED, &status, context.form.media))
    }

    /// `/token`: a token for a service account, bound to a pod or secret
    /// (<https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-request-v1/>).
    async fn token(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let (request, _) = context.body(self, self.type_named("io.k8s.api.authentication.v1.TokenRequest")?)?;
        let name = context.name()?;
        let namespace = context.namespace();
        let account = self
            .find("", "serviceaccounts", namespace, name)
            .await?
            .ok_or_else(|| ApiError::not_found(&context.row, name))?;
        let account = account.value();
        let kind = ("authentication.k8s.io", "v1", "TokenRequest");
        let mut admitted = Request::of_other(context, CREATE, request, kind)?;
        self.admit_other(&mut admitted).await?;
        let mut request = admitted.object;
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let seconds = request["spec"]["expirationSeconds"].as_i64().unwrap_or(3600);
        if seconds < TOKEN_MIN {
            let mut errors = seawall_api::field::Errors::default();
            let path = seawall_api::field::Path::Root.at("spec");
            errors.invalid(path.at("expirationSeconds"), seconds, "may not specify a duration less than 10 minutes");
            let mut row = (*context.row).clone();
            (row.kind, row.group) = ("TokenRequest", "authentication.k8s.io");
            return Err(ApiError::invalid(&row, name, &errors));
        }
        let seconds = seconds.min(TOKEN_MAX);
        let mut audiences: Vec<String> =
            request["spec"]["audiences"].as_array().into_iter().flatten().map(text).filter(|a| !a.is_empty()).collect();
        if audiences.is_empty() {
            audiences.push(self.config.issuer.clone());
        }
        let mut bound = Bound {
            namespace: namespace.to_owned(),
            serviceaccount: Reference { name: name.to_owned(), uid: text(&account["metadata"]["uid"]) },
            ..Default::default()
        };
        let wanted = &request["spec"]["boundObjectRef"];
        self.restrict_node_token(context, &request, None)?;
        if wanted.is_object() {
            let kind = text(&wanted["kind"]);
            let plural = match kind.as_str() {
                "Pod" => "pods",
                "Secret" => "secrets",
                other => {
                    return Err(ApiError::bad_request(format!(
                        "spec.boundObjectRef.kind: Unsupported value: {other:?}: supported values: \"Pod\", \"Secret\""
                    )));
                }
            };
            let object_name = text(&wanted["name"]);
            let (_, row) = self.registry.by_name("", plural).ok_or_else(ApiError::no_route)?;
            let object = self
                .find("", plural, namespace, &object_name)
                .await?
                .ok_or_else(|| ApiError::not_found(row, &object_name))?
                .value();
            let uid = text(&object["metadata"]["uid"]);
            let wanted_uid = text(&wanted["uid"]);
            if !wanted_uid.is_empty() && wanted_uid != uid {
                return Err(ApiError::conflict(
                    row,
                    &object_name,
                    format!(
                        "the UID in the bound object reference ({wanted_uid}) does not match the UID in record. The object might have been deleted and then recreated"
                    ),
                ));
            }
            let reference = Some(Reference { name: object_name.clone(), uid });
            if kind == "Pod" {
                self.restrict_node_token(context, &request, Some(&object))?;
                if object["spec"]["serviceAccountName"] != name {
                    return Err(ApiError::forbidden(
                        row,
                        &object_name,
                        format!(
                            "cannot bind token for serviceaccount {name:?} to pod running with different serviceaccount name."
                        ),
                    ));
                }
                bound.pod = reference;
                let node = text(&object["spec"]["nodeName"]);
                if let Some(node) = self.find("", "nodes", "", &node).await? {
                    bound.node =
                        Some(Reference { name: node.name().to_owned(), uid: text(&node.value()["metadata"]["uid"]) });
                }
            } else {
                bound.secret = reference;
            }
        }
        let now = Timestamp::now();
        let end = now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(now);
        let claims = Claims {
            iss: self.config.issuer.clone(),
            sub: format!("system:serviceaccount:{namespace}:{name}"),
            aud: audiences.clone(),
            exp: end.as_second(),
            iat: now.as_second(),
            nbf: now.as_second(),
            jti: uuid::Uuid::new_v4().to_string(),
            kubernetes: bound,
        };
        let token = self.tokens.sign(&claims).map_err(|e| ApiError::internal("the token cannot be signed", e))?;
        request["kind"] = "TokenRequest".into();
        request["apiVersion"] = "authentication.k8s.io/v1".into();
        request["metadata"] = json!({"name": name, "namespace": namespace, "creationTimestamp": timestamp(now)});
        request["spec"]["audiences"] = json!(audiences);
        request["spec"]["expirationSeconds"] = seconds.into();
        request["status"] = json!({"token": token, "expirationTimestamp": timestamp(end)});
        Ok(value(StatusCode::CREATED, &request, context.form.media))
    }
}

/// An object as a Scale.
pub(crate) fn scale_form(object: &Value, revision: Revision) -> Value {
    let selector = match &object["spec"]["selector"] {
        s if s["matchLabels"].is_object() || s["matchExpressions"].is_array() => seawall_api::cell::selector(s),
        s => seawall_api::cell::labels(s),
    };
    let meta = &object["metadata"];
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {"name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"],
            "resourceVersion": revision.to_string(), "creationTimestamp": meta["creationTimestamp"]},
        "spec": {"replicas": object["spec"]["replicas"].as_i64().unwrap_or_default()},
        "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or_default(), "selector": selector}})
}

/// Sets a condition by its type.
fn set_condition(status: &mut Value, condition: Value) {
    match status["conditions"].as_array_mut() {
        Some(conditions) => {
            conditions.retain(|c| c["type"] != condition["type"]);
            conditions.push(condition);
        }
        None => status["conditions"] = json!([condition]),
    }
}
