//! MutatingAdmissionPolicy
//! (<https://kubernetes.io/docs/reference/access-authn-authz/mutating-admission-policy/>).

use std::sync::Arc;

use seawall_api::{
    cel::Session,
    managed::{self, Types},
    patch,
};
use serde_json::{Value, json};

use super::{
    conditions::Asker,
    policy::Inputs,
    registered::{Binding, Mutation, Policy},
    request::Request,
};
use crate::{
    MAX_BODY, Server,
    error::{ApiError, Result},
};

/// Fields that the merge may not touch: they say which object it is.
const IDENTITY: [&str; 5] = ["apiVersion", "kind", "name", "namespace", "generateName"];

impl Server {
    /// Lets a policy change the object, by each of its bindings. Says whether it did.
    pub(super) async fn mutate_by_policy(
        &self,
        policy: &Arc<Policy>,
        bindings: &[Arc<Binding>],
        request: &mut Request<'_>,
        namespace: &Value,
    ) -> Result<bool> {
        let mut changed = false;
        // Nothing can be changed of what is deleted.
        if request.object.is_null() {
            return Ok(false);
        }
        let Some(version) = Self::policy_version(policy, request, namespace) else { return Ok(false) };
        for binding in bindings {
            if !Self::is_bound(binding, request, namespace) {
                continue;
            }
            let failed = |request: &Request<'_>, why: String| match policy.ignore_failure {
                true => Ok(()),
                false => {
                    let why = format!("policy '{}' with binding '{}' denied request: {why}", policy.name, binding.name);
                    Err(ApiError::forbidden(request.row(), &request.name, why))
                }
            };
            let params = match self.params_of(policy, binding, request).await {
                Ok(params) => params,
                Err(why) => {
                    failed(request, format!("failed to configure binding: {why}"))?;
                    continue;
                }
            };
            for params in params {
                match self.mutate_once(policy, &params, request, version, namespace) {
                    Ok(done) => changed |= done,
                    Err(why) => failed(request, why)?,
                }
            }
        }
        Ok(changed)
    }

    fn mutate_once(
        &self,
        policy: &Policy,
        params: &Value,
        request: &mut Request<'_>,
        version: (&'static str, &'static str),
        namespace: &Value,
    ) -> Result<bool, String> {
        let inputs = Inputs::new(request, version, namespace);
        if !self.conditions_hold(policy, &inputs, params, request)? {
            return Ok(false);
        }
        if let Some(error) = &policy.broken {
            return Err(error.to_string());
        }
        let mut changed = false;
        for mutation in &policy.mutations {
            // Each one sees what the one before has made.
            let inputs = Inputs::new(request, version, namespace);
            let made = {
                let asker = Asker { server: self, user: &request.context.user };
                let session =
                    Session::new(inputs.variables(params)).with_named(&policy.variables).with_authorizer(&asker);
                let program = mutation.expression.1.as_ref().map_err(ToString::to_string)?;
                session.eval(program).map_err(|e| format!("evaluation error: {e}"))?
            };
            let object = self.mutated(mutation, inputs.object.clone(), made, request, version)?;
            changed |= self.take_mutated(request, object, version)?;
        }
        Ok(changed)
    }

    fn mutated(
        &self,
        mutation: &Mutation,
        mut object: Value,
        mut made: Value,
        request: &Request<'_>,
        (group, version): (&str, &str),
    ) -> Result<Value, String> {
        if mutation.json_patch {
            for step in made.as_array_mut().into_iter().flatten() {
                // A patch is made as an object with a field for each of what a step may have.
                if let Some(step) = step.as_object_mut() {
                    step.retain(|key, value| key == "value" || !value.is_null());
                }
            }
            let patch: json_patch::Patch = serde_json::from_value(made).map_err(|e| format!("JSON patch: {e}"))?;
            patch::json(&mut object, &patch, MAX_BODY).map_err(|e| format!("JSON patch: {e}"))?;
            return Ok(object);
        }
        if request.other.is_some() {
            return Err("an ApplyConfiguration can only be merged into an object of the resource".to_owned());
        }
        if !made.is_object() {
            return Err("the expression must make an Object".to_owned());
        }
        let fixed = IDENTITY.iter().any(|key| !made["metadata"][*key].is_null()) || !made["kind"].is_null();
        if fixed {
            return Err("the identity of an object (apiVersion, kind, name, namespace) may not be applied".to_owned());
        }
        let served = self.registry.find(group, version, request.row().plural).ok_or("the version is not served")?;
        let types = Types { schemas: &self.registry.schemas, ty: served.ty, without: &[], nulls: false };
        let config = without_nulls(made);
        managed::overlay(types, &mut object, config).map_err(|e| e.to_string())?;
        Ok(object)
    }
}

/// Fields of an object that were made from what is not there.
fn without_nulls(mut value: Value) -> Value {
    match &mut value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            for value in map.values_mut() {
                *value = without_nulls(value.take());
            }
        }
        Value::Array(list) => {
            for value in list {
                *value = without_nulls(value.take());
            }
        }
        _ => {}
    }
    match value {
        Value::Null => json!(null),
        value => value,
    }
}
