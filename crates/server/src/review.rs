//! Reviews: questions about users and tokens that are answered and not stored.

use std::sync::Arc;

use http::{Response, StatusCode};
use seawall_api::{
    schema::check::conform,
    selector::{FieldRequirement, parse_fields},
};
use serde_json::{Value, json};

use crate::{
    Context, Server,
    auth::{MASTERS, NODES, UserInfo, authorize::Attributes, rbac::everything},
    encode::{Body, value},
    error::{ApiError, Result},
};

impl Server {
    /// POST of a review.
    pub(crate) async fn review(self: &Arc<Self>, context: &Context<'_>) -> Result<Response<Body>> {
        let (mut review, _) = context.body(self, context.served.ty)?;
        conform(&self.registry.schemas, context.served.ty, &mut review).map_err(|e| {
            ApiError::bad_request(format!("{0} in version \"v1\" cannot be handled as a {0}: {e}", context.row.kind))
        })?;
        review["kind"] = context.row.kind.into();
        review["apiVersion"] = context.row.api_version().into();
        if review["metadata"].is_null() {
            review["metadata"] = json!({"creationTimestamp": null});
        }
        review["status"] = match context.row.kind {
            "SelfSubjectReview" => json!({"userInfo": context.user}),
            "SelfSubjectAccessReview" => self.access(&context.user, &review["spec"]).await,
            "SelfSubjectRulesReview" => {
                self.rules(&context.user, review["spec"]["namespace"].as_str().unwrap_or_default())
            }
            "SubjectAccessReview" | "LocalSubjectAccessReview" => {
                let spec = &review["spec"];
                let groups: Vec<String> = spec["groups"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|g| g.as_str().map(str::to_owned))
                    .collect();
                let user = UserInfo {
                    username: spec["user"].as_str().unwrap_or_default().to_owned(),
                    groups,
                    ..Default::default()
                };
                if user.username.is_empty() && user.groups.is_empty() {
                    return Err(ApiError::bad_request(
                        "spec.user: Required value: at least one of user or group must be specified",
                    ));
                }
                self.access(&user, spec).await
            }
            "TokenReview" => {
                let token = review["spec"]["token"].as_str().unwrap_or_default();
                let asked: Vec<&str> =
                    review["spec"]["audiences"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let audiences = if asked.is_empty() { vec![self.config.issuer.as_str()] } else { asked };
                match self.user_of_token(token, &audiences).await {
                    Ok((user, audiences)) => json!({"authenticated": true, "user": user, "audiences": audiences}),
                    Err(why) => json!({"authenticated": false, "user": {}, "error": why}),
                }
            }
            _ => return Err(ApiError::no_route()),
        };
        Ok(value(StatusCode::CREATED, &review, context.form.media))
    }

    /// What a user may do in a namespace, as far as roles say it. Nodes may more: of their own objects.
    fn rules(&self, user: &UserInfo, namespace: &str) -> Value {
        let mut rules = self.rbac().rules(user, namespace);
        if user.is_in(MASTERS) {
            rules = everything().into();
        }
        let (paths, resources): (Vec<_>, Vec<_>) =
            rules.iter().partition(|rule| rule.non_resource_urls.as_ref().is_some_and(|urls| !urls.is_empty()));
        json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": user.is_in(NODES)})
    }

    async fn access(&self, user: &UserInfo, spec: &Value) -> Value {
        let text = |v: &'_ Value| -> String { v.as_str().unwrap_or_default().to_owned() };
        let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
        let verb = text(if path.is_object() { &path["verb"] } else { &resource["verb"] });
        let [group, plural, sub, namespace, name] =
            ["group", "resource", "subresource", "namespace", "name"].map(|key| text(&resource[key]));
        let path = text(&path["path"]);
        let fields = selector(&resource["fieldSelector"]);
        let attributes = Attributes {
            fields: &fields,
            verb: &verb,
            group: &group,
            resource: &plural,
            subresource: &sub,
            namespace: &namespace,
            name: &name,
            path: &path,
        };
        match self.authorize(user, &attributes).await {
            Ok(reason) if reason.is_empty() => json!({"allowed": true}),
            Ok(reason) => json!({"allowed": true, "reason": reason}),
            Err(reason) => json!({"allowed": false, "reason": reason}),
        }
    }
}

/// The field selector of a question, in either of its two forms (KEP-4601).
fn selector(value: &Value) -> Vec<FieldRequirement> {
    let list = value["requirements"].as_array().into_iter().flatten();
    let one = |requirement: &Value| {
        let [value] = requirement["values"].as_array()?.as_slice() else { return None };
        let equal = match requirement["operator"].as_str()? {
            "In" => true,
            "NotIn" => false,
            _ => return None,
        };
        Some(FieldRequirement { field: requirement["key"].as_str()?.into(), equal, value: value.as_str()?.into() })
    };
    let raw = value["rawSelector"].as_str().and_then(|text| parse_fields(text).ok()).unwrap_or_default();
    list.filter_map(one).chain(raw).collect()
}
