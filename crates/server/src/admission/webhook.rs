//! Admission webhooks
//! (<https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/>).

use base64::Engine as _;
use futures::future::join_all;
use http::StatusCode;
use seawall_api::{
    cel::{PER_CONDITIONS, Session},
    patch,
};
use serde_json::{Value, json};

use super::{
    conditions::{Asker, Conditions},
    registered::Webhook,
    request::{CREATE, Request, UPDATE},
    rules::Scope,
};
use crate::{
    MAX_BODY, Server,
    error::{ApiError, Result},
};

/// What a webhook said.
struct Answer {
    /// The patch, if it changes something.
    patch: Option<Value>,
}

/// A refusal in upstream's words: whatever else a webhook says, it is one.
fn denied(name: &str, status: &Value) -> ApiError {
    let by = format!("admission webhook {name:?} denied the request");
    let text = |key: &str| status[key].as_str().filter(|text| !text.is_empty());
    let message = match (text("message"), text("reason")) {
        (Some(why), _) | (None, Some(why)) => format!("{by}: {why}"),
        (None, None) => format!("{by} without explanation"),
    };
    let code = status["code"].as_u64().and_then(|code| u16::try_from(code).ok()).filter(|code| *code >= 400);
    let code = code.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::BAD_REQUEST);
    let mut error = ApiError::new(code, "", message);
    error.reason = text("reason").unwrap_or_default().to_owned().into();
    error.details = status["details"].clone();
    error
}

/// Reads an AdmissionReview. `Ok(Err(…))` is a refusal.
fn read(webhook: &Webhook, review: &Value, uid: &str) -> Result<Result<(Answer, Vec<String>)>, String> {
    let invalid = |why: String| format!("received invalid webhook response: {why}");
    let expected = ("admission.k8s.io/v1", "AdmissionReview");
    let found = (review["apiVersion"].as_str().unwrap_or_default(), review["kind"].as_str().unwrap_or_default());
    let response = &review["response"];
    if response.is_null() {
        return Err(invalid("webhook response was absent".to_owned()));
    }
    if found != expected {
        let gvk = |(version, kind): (&str, &str)| format!("{version}, Kind={kind}");
        return Err(invalid(format!("expected webhook response of {}, got {}", gvk(expected), gvk(found))));
    }
    let answered = response["uid"].as_str().unwrap_or_default();
    if answered != uid {
        return Err(invalid(format!("expected response.uid={uid:?}, got {answered:?}")));
    }
    let warnings = response["warnings"].as_array().into_iter().flatten();
    let warnings: Vec<String> = warnings.filter_map(Value::as_str).map(str::to_owned).collect();
    for (key, value) in response["auditAnnotations"].as_object().into_iter().flatten() {
        tracing::debug!(webhook = webhook.name, key, %value, "a webhook annotates the audit event");
    }
    if response["allowed"] != true {
        return Ok(Err(denied(&webhook.name, &response["status"])));
    }
    let (patch, kind) = (response["patch"].as_str().filter(|p| !p.is_empty()), response["patchType"].as_str());
    let patch = match (patch, kind) {
        (None, None) => None,
        (Some(_), None) => {
            return Err(invalid("webhook returned response.patch but not response.patchType".to_owned()));
        }
        (None, Some(_)) => {
            return Err(invalid("webhook returned response.patchType but not response.patch".to_owned()));
        }
        (Some(patch), Some("JSONPatch")) => {
            let bytes = base64::engine::general_purpose::STANDARD.decode(patch);
            let bytes = bytes.map_err(|e| invalid(format!("response.patch: {e}")))?;
            Some(serde_json::from_slice(&bytes).map_err(|e| invalid(format!("response.patch: {e}")))?)
        }
        (_, Some(other)) => {
            return Err(invalid(format!(
                "webhook returned invalid response.patchType of {other:?}, expected \"JSONPatch\""
            )));
        }
    };
    Ok(Ok((Answer { patch }, warnings)))
}

/// Whether two objects are the same to a selector: it is enough if one of them is picked.
pub(super) fn picks_object(scope: &Scope, request: &Request<'_>) -> bool {
    let labels = |object: &Value| {
        let has_meta = object["metadata"].is_object();
        has_meta && scope.objects.picks(&object["metadata"]["labels"])
    };
    scope.objects.is_everything() || labels(&request.object) || labels(&request.old)
}

/// Whether the namespace of a request is picked. What lives in no namespace always is.
pub(super) fn picks_namespace(scope: &Scope, request: &Request<'_>, namespace: &Value) -> bool {
    if scope.namespaces.is_everything() {
        return true;
    }
    let itself = request.row().plural == "namespaces" && request.row().group.is_empty();
    match (request.is_namespaced(), itself) {
        (false, false) => true,
        // One that is being written is picked by the labels that it will have.
        (false, true) if matches!(request.operation, CREATE | UPDATE) => {
            scope.namespaces.picks(&request.object["metadata"]["labels"])
        }
        (false, true) => scope.namespaces.picks(&request.old["metadata"]["labels"]),
        (true, _) => scope.namespaces.picks(&namespace["metadata"]["labels"]),
    }
}

impl Server {
    /// Whether a webhook is to be asked, and about the object in which version.
    fn webhook_version(
        &self,
        webhook: &Webhook,
        request: &Request<'_>,
        namespace: &Value,
    ) -> Result<Option<(&'static str, &'static str)>> {
        if request.is_exempt()
            || !picks_namespace(&webhook.scope, request, namespace)
            || !picks_object(&webhook.scope, request)
        {
            return Ok(None);
        }
        let Some(version) = webhook.scope.version(&request.asked(), &request.versions()) else { return Ok(None) };
        if webhook.conditions.is_empty() {
            return Ok(Some(version));
        }
        let (object, old) = (request.convert(&request.object, version), request.convert(&request.old, version));
        let described = request.describe(version);
        let asker = Asker { server: self, user: &request.context.user };
        let variables = vec![("object", &object), ("oldObject", &old), ("request", &described)];
        let session = Session::new(variables).with_authorizer(&asker).with_budget(PER_CONDITIONS);
        match Conditions::of(&webhook.conditions).hold(|program| session.holds(program)) {
            Ok(true) => Ok(Some(version)),
            Ok(false) => Ok(None),
            Err(_) if webhook.ignore_failure => Ok(None),
            Err(why) => Err(ApiError::forbidden(request.row(), &request.name, why)),
        }
    }

    async fn ask_webhook(
        &self,
        webhook: &Webhook,
        request: &Request<'_>,
        version: (&'static str, &'static str),
    ) -> Result<Answer> {
        if request.dry_run && !webhook.dry_run {
            return Err(ApiError::bad_request(format!(
                "admission webhook {:?} does not support dry run",
                webhook.name
            )));
        }
        let uid = uuid::Uuid::new_v4().to_string();
        let mut described = request.describe(version);
        described["uid"] = uid.as_str().into();
        described["object"] = request.convert(&request.object, version);
        described["oldObject"] = request.convert(&request.old, version);
        let review = json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": described});
        let called = self.call_webhook(&webhook.client, &review, webhook.timeout, MAX_BODY).await;
        let answer = called
            .map_err(|why| format!("failed to call webhook: {why}"))
            .and_then(|review| read(webhook, &review, &uid));
        match answer {
            Ok(answer) => answer.map(|(answer, warnings)| {
                request.context.warn(warnings);
                answer
            }),
            Err(why) if webhook.ignore_failure => {
                tracing::warn!(webhook = webhook.name, why, "failed calling webhook, failing open");
                Ok(Answer { patch: None })
            }
            Err(why) => {
                tracing::warn!(webhook = webhook.name, why, "failed calling webhook, failing closed");
                let what = format!("failed calling webhook {:?}: {why}", webhook.name);
                Err(ApiError::internal(&what, "a webhook failed"))
            }
        }
    }

    /// Asks a mutating webhook. Says whether it changed the object.
    pub(super) async fn mutate_by_webhook(
        &self,
        webhook: &Webhook,
        request: &mut Request<'_>,
        namespace: &Value,
    ) -> Result<bool> {
        let Some(version) = self.webhook_version(webhook, request, namespace)? else { return Ok(false) };
        let Some(patch) = self.ask_webhook(webhook, request, version).await?.patch else { return Ok(false) };
        let wrong = |why: &dyn std::fmt::Display| {
            ApiError::internal(
                &format!("admission webhook {:?} sent a patch that cannot be applied: {why}", webhook.name),
                "a webhook's patch",
            )
        };
        if request.object.is_null() {
            let what = format!(
                "admission webhook {:?} attempted to modify the object, which is not supported for this operation",
                webhook.name
            );
            return Err(ApiError::internal(&what, "a webhook's patch"));
        }
        let patch: json_patch::Patch = serde_json::from_value(patch).map_err(|e| wrong(&e))?;
        let mut object = request.convert(&request.object, version);
        patch::json(&mut object, &patch, MAX_BODY).map_err(|e| wrong(&e))?;
        self.take_mutated(request, object, version).map_err(|why| wrong(&why))
    }

    /// Asks all validating webhooks at once. The first refusal, in their order, is the answer.
    pub(super) async fn validate_by_webhooks(&self, request: &Request<'_>, namespace: &Value) -> Result<()> {
        let index = self.registered();
        let mut asked = Vec::new();
        for webhook in &index.validating_webhooks {
            if let Some(version) = self.webhook_version(webhook, request, namespace)? {
                asked.push(self.ask_webhook(webhook, request, version));
            }
        }
        join_all(asked).await.into_iter().try_for_each(|answer| answer.map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook() -> Webhook {
        Webhook {
            name: "a.b.c".into(),
            scope: Scope::of_webhook(&json!({})),
            conditions: Vec::new(),
            ignore_failure: false,
            timeout: 1,
            dry_run: true,
            reinvoke: false,
            client: Value::Null,
        }
    }

    #[test]
    fn refusals_in_upstreams_words() {
        let check = |status: Value, expect: &str, code: u16| {
            let error = denied("a.b.c", &status);
            assert_eq!((error.message.as_str(), error.code.as_u16()), (expect, code), "{status}");
        };
        check(Value::Null, "admission webhook \"a.b.c\" denied the request without explanation", 400);
        check(json!({"message": "no"}), "admission webhook \"a.b.c\" denied the request: no", 400);
        check(
            json!({"reason": "Forbidden", "code": 403}),
            "admission webhook \"a.b.c\" denied the request: Forbidden",
            403,
        );
        check(json!({"message": "no", "code": 200}), "admission webhook \"a.b.c\" denied the request: no", 400);
    }

    #[test]
    fn answers_that_are_none() {
        let review = |response: Value| json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response});
        let check = |review: Value, expect: &str| {
            let found = read(&hook(), &review, "u").map(|_| ()).unwrap_err();
            assert_eq!(found, format!("received invalid webhook response: {expect}"), "{review}");
        };
        check(json!({}), "webhook response was absent");
        check(
            json!({"apiVersion": "v1", "kind": "X", "response": {}}),
            "expected webhook response of admission.k8s.io/v1, Kind=AdmissionReview, got v1, Kind=X",
        );
        check(review(json!({"uid": "v", "allowed": true})), "expected response.uid=\"u\", got \"v\"");
        check(
            review(json!({"uid": "u", "allowed": true, "patch": "W10="})),
            "webhook returned response.patch but not response.patchType",
        );
        check(
            review(json!({"uid": "u", "allowed": true, "patchType": "JSONPatch"})),
            "webhook returned response.patchType but not response.patch",
        );
        // What is not allowed outright is refused.
        assert!(matches!(read(&hook(), &review(json!({"uid": "u"})), "u"), Ok(Err(_))));
        assert!(matches!(read(&hook(), &review(json!({"uid": "u", "allowed": "true"})), "u"), Ok(Err(_))));
    }
}
