//! What expressions of webhooks and policies may name, and of which types these are
//! (<https://kubernetes.io/docs/reference/access-authn-authz/validating-admission-policy/#validation-expression>).

use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};

use super::{Fields, Program, Type, Variable};

/// An object with fields that are texts, and these.
fn object(texts: &[&str], others: &[(&str, Value)]) -> Value {
    let texts = texts.iter().map(|name| ((*name).to_owned(), json!({"type": "string"})));
    let others = others.iter().map(|(name, schema)| ((*name).to_owned(), schema.clone()));
    let properties: serde_json::Map<String, Value> = texts.chain(others).collect();
    json!({"type": "object", "properties": properties})
}

fn read(schema: &Value) -> Type {
    Type::of_schema(schema, false).unwrap_or(Type::Dyn)
}

/// `request`: an AdmissionRequest without its objects.
static REQUEST: LazyLock<Type> = LazyLock::new(|| {
    let texts = json!({"type": "array", "items": {"type": "string"}});
    let kind = object(&["group", "version", "kind"], &[]);
    let resource = object(&["group", "version", "resource"], &[]);
    let extra = json!({"type": "object", "additionalProperties": texts});
    let user = object(&["username", "uid"], &[("groups", texts), ("extra", extra)]);
    let others = [
        ("kind", kind.clone()),
        ("resource", resource.clone()),
        ("requestKind", kind),
        ("requestResource", resource),
        ("userInfo", user),
        ("dryRun", json!({"type": "boolean"})),
        ("options", json!({"x-kubernetes-int-or-string": true})),
    ];
    let names = ["name", "namespace", "operation", "subResource", "requestSubResource", "uid"];
    read(&object(&names, &others))
});

/// `namespaceObject`: the Namespace, as far as expressions may see it.
static NAMESPACE: LazyLock<Type> = LazyLock::new(|| {
    let map = json!({"type": "object", "additionalProperties": {"type": "string"}});
    let texts = json!({"type": "array", "items": {"type": "string"}});
    let any = json!({"x-kubernetes-int-or-string": true});
    let (whole, names) =
        (json!({"type": "integer"}), ["name", "generateName", "namespace", "UID", "uid", "resourceVersion"]);
    let others = [
        ("labels", map.clone()),
        ("annotations", map),
        ("creationTimestamp", any.clone()),
        ("deletionTimestamp", any),
        ("deletionGracePeriodSeconds", whole.clone()),
        ("generation", whole),
        ("finalizers", texts.clone()),
    ];
    let (meta, spec) = (object(&names, &others), object(&[], &[("finalizers", texts)]));
    let parts = [("metadata", meta), ("spec", spec), ("status", object(&["phase"], &[]))];
    read(&object(&["apiVersion", "kind"], &parts))
});

/// For match conditions of webhooks. The objects could be anything.
pub fn of_webhooks() -> Vec<Variable<'static>> {
    vec![
        ("object", Type::Dyn),
        ("oldObject", Type::Dyn),
        ("request", REQUEST.clone()),
        ("authorizer", Type::Named("Authorizer")),
    ]
}

/// For expressions of a policy, but for `variables`.
pub fn of_policy(has_params: bool) -> Vec<Variable<'static>> {
    let mut names = of_webhooks();
    names.push(("namespaceObject", NAMESPACE.clone()));
    if has_params {
        names.push(("params", Type::Dyn));
    }
    names
}

/// For expressions of a policy that is asked about objects of this type, with parameters of that one if it has any.
pub fn of_policy_about(object: &Type, params: Option<&Type>) -> Vec<Variable<'static>> {
    let mut names = of_policy(params.is_some());
    for (name, ty) in &mut names {
        match *name {
            "object" | "oldObject" => *ty = object.clone(),
            "params" => *ty = params.cloned().unwrap_or(Type::Dyn),
            _ => {}
        }
    }
    names
}

/// With `variables`, as far as they have been read. One that could not be read could be anything.
pub fn with_variables<'n>(names: &[Variable<'n>], variables: &[(String, Option<Program>)]) -> Vec<Variable<'n>> {
    let ty = |program: &Option<Program>| program.as_ref().map_or(Type::Dyn, |program| program.ty().clone());
    let fields: Fields = variables.iter().map(|(name, program)| (name.as_str().into(), ty(program))).collect();
    names.iter().cloned().chain([("variables", Type::Object(Arc::new(fields)))]).collect()
}
