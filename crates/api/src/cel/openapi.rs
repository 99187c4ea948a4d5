//! The types of objects as an OpenAPI document describes them, for expressions of policies
//! (<https://kubernetes.io/docs/reference/access-authn-authz/validating-admission-policy/#type-checking>).
//!
//! A policy sees objects as JSON has them. What the document does not say, or says of texts that mean something else (times,
//! bytes), could be anything: nobody is warned of what works.

use std::{collections::HashMap, sync::Arc};

use serde_json::{Map, Value};

use super::{Fields, Type};

/// The type of a kind in `components.schemas` of a document of version 3; `None` if it is not described there.
pub fn of_kind(schemas: &Map<String, Value>, group: &str, version: &str, kind: &str) -> Option<Type> {
    let is_it = |named: &Value| named["group"] == group && named["version"] == version && named["kind"] == kind;
    let schema = schemas.values().find(|schema| {
        schema["x-kubernetes-group-version-kind"].as_array().is_some_and(|named| named.iter().any(is_it))
    })?;
    Some(Reader { schemas, known: HashMap::new() }.read(schema))
}

struct Reader<'d> {
    schemas: &'d Map<String, Value>,
    /// Types that were referred to; those that are being read could be anything.
    known: HashMap<&'d str, Type>,
}

impl<'d> Reader<'d> {
    fn read(&mut self, schema: &'d Value) -> Type {
        if let Some(name) = reference(schema) {
            return self.named(name);
        }
        if schema["x-kubernetes-int-or-string"] == true || schema["x-kubernetes-preserve-unknown-fields"] == true {
            return Type::Dyn;
        }
        match (schema["type"].as_str(), schema["format"].as_str()) {
            (Some("string"), None) => Type::String,
            (Some("string"), Some("int-or-string" | "byte" | "date" | "date-time" | "duration")) => Type::Dyn,
            (Some("string"), _) => Type::String,
            (Some("boolean"), _) => Type::Bool,
            (Some("integer"), _) => Type::Int,
            (Some("number"), _) => Type::Double,
            (Some("array"), _) => Type::list(schema.get("items").map_or(Type::Dyn, |items| self.read(items))),
            (Some("object") | None, _) if schema["properties"].is_object() => {
                let properties = schema["properties"].as_object().into_iter().flatten();
                let fields: Fields =
                    properties.map(|(name, schema)| (name.as_str().into(), self.read(schema))).collect();
                Type::Object(Arc::new(fields))
            }
            (Some("object"), _) => match &schema["additionalProperties"] {
                Value::Null => Type::Object(Arc::default()),
                values => Type::map(Type::String, self.read(values)),
            },
            _ => Type::Dyn,
        }
    }

    fn named(&mut self, name: &'d str) -> Type {
        if let Some(known) = self.known.get(name) {
            return known.clone();
        }
        self.known.insert(name, Type::Dyn);
        let ty = match self.schemas.get(name) {
            // What has a name and no fields holds anything: a raw extension, a schema's default.
            Some(schema) if schema["properties"].is_object() || schema["type"] != "object" => self.read(schema),
            _ => Type::Dyn,
        };
        self.known.insert(name, ty.clone());
        ty
    }
}

/// The name that a schema refers to, directly or (to carry a description) by `allOf`.
fn reference(schema: &Value) -> Option<&str> {
    let name = |schema: &'_ Value| schema["$ref"].as_str().is_some();
    let found = if name(schema) { schema } else { schema["allOf"].as_array()?.iter().find(|part| name(part))? };
    found["$ref"].as_str()?.rsplit('/').next()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{cel::Program, resources, schema};

    /// The document of the built-in kinds, as the server makes it, as far as is needed here.
    fn built_in() -> Map<String, Value> {
        let rows = resources::all();
        let mut all = schema::definitions(rows.iter().map(|row| row.schema), "#/components/schemas/");
        for row in &rows {
            if let Some(schema) = all.get_mut(row.type_name) {
                schema["x-kubernetes-group-version-kind"] =
                    json!([{"group": row.group, "version": row.version, "kind": row.kind}]);
            }
        }
        all.into_iter().collect()
    }

    #[test]
    fn built_in_kinds_are_described() {
        let schemas = built_in();
        let check = |(group, version, kind): (&str, &str, &str), rule: &str, expect: Option<&str>| {
            let ty = of_kind(&schemas, group, version, kind).expect(kind);
            let found = Program::compile(rule, &[("object", ty)]).err().map(|error| error.0);
            match (found, expect) {
                (None, None) => {}
                (Some(found), Some(expect)) if found.contains(expect) => {}
                (found, _) => panic!("{rule}: {found:?} instead of {expect:?}"),
            }
        };
        let (deployment, pod) = (("apps", "v1", "Deployment"), ("", "v1", "Pod"));
        check(deployment, "object.spec.replicas <= 5 && object.metadata.name != object.kind", None);
        check(deployment, "object.spec.template.spec.containers.all(c, c.image.startsWith('a'))", None);
        check(deployment, "object.metadata.labels.all(k, k.size() > 1)", None);
        check(
            deployment,
            "has(object.spec.strategy.rollingUpdate) && object.spec.strategy.rollingUpdate.maxSurge == 1",
            None,
        );
        check(deployment, "object.spec.replicasCount <= 5", Some("undefined field 'replicasCount'"));
        check(deployment, "object.spec.replicas == 'a'", Some("found no matching overload for '_==_'"));
        check(pod, "quantity(object.spec.containers[0].resources.limits['cpu']).isLessThan(quantity('2'))", None);
        // Times are texts to a policy.
        check(pod, "timestamp(object.metadata.creationTimestamp) > timestamp('2020-01-01T00:00:00Z')", None);
        check(pod, "object.metadata.creationTimestamp.startsWith('2')", None);
        check(("", "v1", "Secret"), "object.data['a'] == 'YQ=='", None);
        let definition = ("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
        check(
            definition,
            "object.spec.versions.all(v, v.schema.openAPIV3Schema.properties['a'].items.type == 'x')",
            None,
        );
        check(definition, "object.spec.versions.all(v, v.shema.x)", Some("undefined field 'shema'"));
        assert_eq!(of_kind(&schemas, "apps", "v2", "Deployment"), None);
    }

    #[test]
    fn what_is_not_described_could_be_anything() {
        let schemas = json!({"a": {"type": "object", "x-kubernetes-group-version-kind": [{"group": "g", "version": "v", "kind": "K"}],
            "properties": {"free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}, "none": {},
                "empty": {"type": "object"}, "raw": {"$ref": "#/components/schemas/raw"}, "again": {"$ref": "#/components/schemas/again"}}},
            "raw": {"type": "object"}, "again": {"type": "object", "properties": {"more": {"allOf": [{"$ref": "#/components/schemas/again"}]}}}});
        let ty = of_kind(schemas.as_object().unwrap(), "g", "v", "K").unwrap();
        let fails = |rule: &str| Program::compile(rule, &[("object", ty.clone())]).is_err();
        for rule in ["object.free.x == 1", "object.none.x", "object.raw.x", "object.again.more.more.more"] {
            assert!(!fails(rule), "{rule}");
        }
        assert!(fails("object.empty.x") && fails("object.again.less"));
    }
}
