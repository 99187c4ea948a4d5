//! What the targets share: types by a letter, documents by lines, so that seeds can be written by hand.

use std::sync::LazyLock;

use seawall_api::{
    resources,
    schema::{Schemas, TypeId, check},
};
use serde_json::Value;

static SCHEMAS: LazyLock<Schemas> = LazyLock::new(|| Schemas::new(resources::all().iter().map(|row| row.schema)));

/// The types that bodies are read as: small ones, and those with everything in them.
const TYPES: [&str; 8] = [
    "io.k8s.api.core.v1.Pod",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.core.v1.Secret",
    "io.k8s.api.core.v1.Service",
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.apps.v1.ControllerRevision",
    "io.k8s.api.coordination.v1.Lease",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition",
];

/// All types of the API.
pub fn schemas() -> &'static Schemas {
    &SCHEMAS
}

/// The first byte (`0` to `7`) names a type, the rest is for the target.
pub fn typed(data: &[u8]) -> Option<(TypeId, &[u8])> {
    let (first, rest) = data.split_first()?;
    let name = TYPES[usize::from(first.wrapping_sub(b'0')) % TYPES.len()];
    Some((schemas().by_name(name).expect("the types are there"), rest))
}

/// The documents of an input: one on each line, no more than `most`.
pub fn documents(data: &[u8], most: usize) -> Vec<Value> {
    let lines = data.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.take(most).map_while(|line| check::parse(line).ok()).map(|(value, _)| value).collect()
}

/// The documents as the server takes them in: of this type.
pub fn objects(ty: TypeId, data: &[u8], most: usize) -> Vec<Value> {
    let conforms = |mut value: Value| check::conform(schemas(), ty, &mut value).is_ok().then_some(value);
    documents(data, most).into_iter().filter(Value::is_object).map_while(conforms).collect()
}

/// Whether two values are the same, but for the last digit of a fraction: reading one is not exact.
pub fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) if x.is_f64() || y.is_f64() => {
            let (Some(x), Some(y)) = (x.as_f64(), y.as_f64()) else { return false };
            (x - y).abs() <= x.abs() * 1e-12 + 1e-300
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same(x, y)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(key, x)| y.get(key).is_some_and(|y| same(x, y)))
        }
        _ => a == b,
    }
}
