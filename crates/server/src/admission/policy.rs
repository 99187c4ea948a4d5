//! ValidatingAdmissionPolicy, and what it has in common with its mutating kind
//! (<https://kubernetes.io/docs/reference/access-authn-authz/validating-admission-policy/>).

use std::sync::Arc;

use http::StatusCode;
use seawall_api::{
    Scope as RowScope,
    cel::{EvalError, PER_CONDITIONS, Session},
};
use serde_json::{Value, json};

use super::{
    conditions::{Asker, Conditions},
    registered::{Action, Binding, Check, Policy},
    request::Request,
    webhook::{picks_namespace, picks_object},
};
use crate::{
    Server,
    error::{ApiError, Result},
};

/// The values that expressions of a policy name.
pub(super) struct Inputs {
    pub object: Value,
    pub old: Value,
    pub request: Value,
    pub namespace: Value,
}

impl Inputs {
    pub fn new(request: &Request<'_>, version: (&'static str, &'static str), namespace: &Value) -> Inputs {
        let namespace = if request.is_namespaced() { namespace.clone() } else { Value::Null };
        Inputs {
            object: request.convert(&request.object, version),
            old: request.convert(&request.old, version),
            request: request.describe(version),
            namespace,
        }
    }

    pub fn variables<'a>(&'a self, params: &'a Value) -> Vec<(&'a str, &'a Value)> {
        vec![
            ("object", &self.object),
            ("oldObject", &self.old),
            ("request", &self.request),
            ("namespaceObject", &self.namespace),
            ("params", params),
        ]
    }
}

/// Why a policy refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Violation {
    message: String,
    reason: String,
}

impl Violation {
    fn of_error(message: String) -> Violation {
        Violation { message, reason: "Invalid".to_owned() }
    }

    fn code(&self) -> StatusCode {
        match self.reason.as_str() {
            "Unauthorized" => StatusCode::UNAUTHORIZED,
            "Forbidden" => StatusCode::FORBIDDEN,
            "RequestEntityTooLarge" => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::UNPROCESSABLE_ENTITY,
        }
    }
}

fn message_of<'a>(check: &'a Check, session: &Session<'a>) -> String {
    let fallback = || match &check.message {
        Some(message) => message.trim().to_owned(),
        None => format!("failed expression: {}", check.expression.0.trim()),
    };
    // A message is one line that says something; else the plain one is used.
    let made = match &check.message_expression {
        Some(Ok(program)) => session.eval(program).ok(),
        _ => None,
    };
    match made.as_ref().and_then(Value::as_str).map(str::trim) {
        Some(made) if !made.is_empty() && made.len() <= 5 * 1024 && !made.contains('\n') => made.to_owned(),
        _ => fallback(),
    }
}

fn run_checks<'a>(policy: &'a Policy, session: &Session<'a>, annotate: impl Fn(&str, String)) -> Vec<Violation> {
    let mut found = Vec::new();
    for check in &policy.checks {
        let (text, program) = &check.expression;
        let failed = |why: &dyn std::fmt::Display| {
            Violation::of_error(format!("expression '{}' resulted in error: {why}", text.trim()))
        };
        let held = match (&policy.broken, program) {
            (Some(error), _) | (None, Err(error)) => Err(failed(error)),
            (None, Ok(program)) => session.holds(program).map_err(|e| failed(&e)),
        };
        match held {
            Ok(true) => {}
            Ok(false) => found.push(Violation {
                message: message_of(check, session),
                reason: check.reason.clone().unwrap_or_else(|| "Invalid".to_owned()),
            }),
            Err(_) if policy.ignore_failure => {}
            Err(violation) => found.push(violation),
        }
    }
    for (key, program) in &policy.annotations {
        let value = match program {
            Ok(program) => session.eval(program).map_err(|e: EvalError| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match value {
            Ok(Value::Null) => {}
            Ok(Value::String(text)) => annotate(&format!("{}/{key}", policy.name), text),
            Ok(_) | Err(_) if policy.ignore_failure => {}
            Ok(_) => found.push(Violation::of_error(format!(
                "valueExpression of audit annotation {key:?} must evaluate to either a string or null"
            ))),
            Err(why) => found.push(Violation::of_error(format!("audit annotation {key:?} resulted in error: {why}"))),
        }
    }
    found
}

impl Server {
    /// Whether a policy's conditions hold.
    pub(super) fn conditions_hold(
        &self,
        policy: &Policy,
        inputs: &Inputs,
        params: &Value,
        request: &Request<'_>,
    ) -> Result<bool, String> {
        let asker = Asker { server: self, user: &request.context.user };
        let session = Session::new(inputs.variables(params)).with_authorizer(&asker).with_budget(PER_CONDITIONS);
        match Conditions::of(&policy.conditions).hold(|program| session.holds(program)) {
            Err(_) if policy.ignore_failure => Ok(false),
            held => held,
        }
    }

    /// The parameters that a binding gives to a policy; null where it has none. `Err` if they cannot be had.
    pub(super) async fn params_of(
        &self,
        policy: &Policy,
        binding: &Binding,
        request: &Request<'_>,
    ) -> Result<Vec<Value>, String> {
        let Some((api_version, kind)) = &policy.params else { return Ok(vec![Value::Null]) };
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let rows = self.registry.all_rows();
        let found = rows.iter().find(|(_, row)| row.stored && row.group == group && row.kind == kind);
        let Some((id, row)) = found else {
            return Err(format!("failed to find resource referenced by paramKind: '{group}/{version}, Kind={kind}'"));
        };
        if binding.param_name.is_empty() && binding.param_selector.is_none() {
            return Ok(vec![Value::Null]);
        }
        let namespace = match (row.scope, binding.param_namespace.as_str()) {
            (RowScope::Cluster, "") => "",
            (RowScope::Cluster, _) => {
                return Err("paramRef.namespace must not be provided for a cluster-scoped `paramKind`".to_owned());
            }
            (RowScope::Namespaced, "") if !request.is_namespaced() => {
                return Err(
                    "cannot use namespaced paramRef in policy binding that matches cluster-scoped resources".to_owned()
                );
            }
            (RowScope::Namespaced, "") => request.context.namespace(),
            (RowScope::Namespaced, namespace) => namespace,
        };
        let found: Vec<Value> = match &binding.param_selector {
            None => {
                let key = row.key(namespace, &binding.param_name);
                let known = self.cache.snapshot().get(*id, &key).cloned();
                let found = match known {
                    Some(object) => Some(object),
                    // It may be newer than what is known here.
                    None => self.consistent().await.map_err(|e| e.message)?.get(*id, &key).cloned(),
                };
                found.map(|object| object.value()).into_iter().collect()
            }
            Some(selector) => {
                let prefix = match row.scope {
                    RowScope::Namespaced => format!("{}{namespace}/", row.prefix()),
                    RowScope::Cluster => row.prefix(),
                };
                let snapshot = self.consistent().await.map_err(|e| e.message)?;
                let objects = snapshot.range(*id, &prefix, None).map(|object| object.value());
                objects.filter(|object| selector.picks(&object["metadata"]["labels"])).collect()
            }
        };
        match (found.is_empty(), binding.allow_missing) {
            (false, _) => Ok(found),
            (true, true) => Ok(Vec::new()),
            (true, false) => Err("no params found for policy binding with `Deny` parameterNotFoundAction".to_owned()),
        }
    }

    /// Whether a policy and one of its bindings are about a request, and in which version.
    pub(super) fn policy_version(
        policy: &Policy,
        request: &Request<'_>,
        namespace: &Value,
    ) -> Option<(&'static str, &'static str)> {
        if request.is_exempt()
            || !picks_namespace(&policy.scope, request, namespace)
            || !picks_object(&policy.scope, request)
        {
            return None;
        }
        policy.scope.version(&request.asked(), &request.versions())
    }

    pub(super) fn is_bound(binding: &Binding, request: &Request<'_>, namespace: &Value) -> bool {
        picks_namespace(&binding.scope, request, namespace)
            && picks_object(&binding.scope, request)
            && binding.scope.version(&request.asked(), &request.versions()).is_some()
    }

    /// What a policy says of a request by one of its bindings.
    async fn evaluate(
        &self,
        policy: &Arc<Policy>,
        binding: &Binding,
        request: &Request<'_>,
        inputs: &Inputs,
    ) -> Vec<Violation> {
        let failed = |why: String| match policy.ignore_failure {
            true => Vec::new(),
            false => vec![Violation::of_error(format!("failed to configure binding: {why}"))],
        };
        let params = match self.params_of(policy, binding, request).await {
            Ok(params) => params,
            Err(why) => return failed(why),
        };
        let mut found = Vec::new();
        for params in params {
            match self.conditions_hold(policy, inputs, &params, request) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(why) => {
                    found.push(Violation::of_error(why));
                    continue;
                }
            }
            let asker = Asker { server: self, user: &request.context.user };
            let session = Session::new(inputs.variables(&params)).with_named(&policy.variables).with_authorizer(&asker);
            found.extend(run_checks(policy, &session, |key, text| request.context.annotate(key, text)));
        }
        found
    }

    /// Asks all validating policies.
    pub(super) async fn validate_by_policies(&self, request: &Request<'_>, namespace: &Value) -> Result<()> {
        let index = self.registered();
        let (mut refusal, mut audited) = (None, Vec::new());
        for (policy, bindings) in &index.validating_policies {
            let Some(version) = Self::policy_version(policy, request, namespace) else { continue };
            let inputs = Inputs::new(request, version, namespace);
            for binding in bindings.iter().filter(|binding| Self::is_bound(binding, request, namespace)) {
                for violation in self.evaluate(policy, binding, request, &inputs).await {
                    let by = (&*policy.name, &*binding.name);
                    if binding.actions.contains(&Action::Warn) {
                        request.context.warn(vec![format!(
                            "Validation failed for ValidatingAdmissionPolicy '{}' with binding '{}': {}",
                            by.0, by.1, violation.message
                        )]);
                    }
                    if binding.actions.contains(&Action::Audit) {
                        audited.push(json!({"message": violation.message, "policy": by.0, "binding": by.1,
                            "validationActions": binding.actions}));
                    }
                    if binding.actions.contains(&Action::Deny) {
                        refusal.get_or_insert_with(|| denied(request, by, &violation));
                    }
                }
            }
        }
        if !audited.is_empty() {
            let key = "validation.policy.admission.k8s.io/validation_failure";
            request.context.annotate(key, Value::from(audited).to_string());
        }
        refusal.map_or(Ok(()), Err)
    }
}

fn denied(request: &Request<'_>, (policy, binding): (&str, &str), violation: &Violation) -> ApiError {
    let why =
        format!("ValidatingAdmissionPolicy '{policy}' with binding '{binding}' denied request: {}", violation.message);
    let mut error = ApiError::forbidden(request.row(), &request.name, why);
    error.code = violation.code();
    error.reason = violation.reason.clone().into();
    error.details["causes"] = json!([{"message": violation.message}]);
    error
}
