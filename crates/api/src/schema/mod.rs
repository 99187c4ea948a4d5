//! The shape of every type: what a decoder may accept, and how a strategic merge patch treats a field.
//!
//! Shapes are taken from `k8s-openapi`'s JSON Schemas once at start and kept in a compact arena. What those lack, list
//! types, map keys and patch keys, is in `facts.txt` (facts of upstream's OpenAPI document, one line a field).

use std::{collections::HashMap, sync::Arc};

use schemars::SchemaGenerator;
use serde_json::{Map, Value};

pub mod check;
mod openapi;

pub use openapi::definitions;

/// An index into [`Schemas`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TypeId(u32);

/// What a value may be.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// An object with known fields.
    Object(HashMap<Box<str>, Field>),
    /// An object whose keys are data.
    Map(TypeId),
    /// A list.
    Array(TypeId),
    /// A string. The second form says which Go type a number is rejected in favour of.
    String,
    /// Base64 in a string.
    Bytes,
    /// An RFC 3339 time in a string.
    Time,
    /// An integer of 32 bits.
    Int32,
    /// An integer of 64 bits.
    Int64,
    /// A number.
    Number,
    /// True or false.
    Boolean,
    /// A port: a number or a name.
    IntOrString,
    /// A quantity: `100m`, `2Gi`, or a number.
    Quantity,
    /// Anything (raw extensions, JSON schemas).
    Any,
    /// Anything, whose objects are still told apart key by key (parts of custom resources that nobody described).
    Free,
}

/// How a list is merged (<https://kubernetes.io/docs/reference/using-api/server-side-apply/#merge-strategy>).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ListType {
    /// Replaced as a whole.
    #[default]
    Atomic,
    /// Each value at most once.
    Set,
    /// Items identified by keys.
    Map,
}

/// Whether the parts of an object belong to whoever wrote them, or the object as a whole to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapType {
    /// As a whole.
    Atomic,
    /// Field by field.
    Granular,
}

/// A field of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// The type of its value.
    pub ty: TypeId,
    /// How its list is merged by server-side apply.
    pub list: ListType,
    /// The keys that identify an item of a list of type map.
    pub keys: Vec<Box<str>>,
    /// What those keys are where they may be left out.
    pub key_defaults: Vec<(Box<str>, Value)>,
    /// How its object is merged, where that differs from what its type says.
    pub map: Option<MapType>,
    /// Strategic merge patch: lists are merged instead of replaced.
    pub merge: bool,
    /// Strategic merge patch: fields that the patch does not list are dropped from a union.
    pub retain_keys: bool,
    /// Strategic merge patch: the field that identifies an item; `None` for lists of scalars.
    pub merge_key: Option<Box<str>>,
}

/// A named type.
#[derive(Clone, Debug)]
pub struct Type {
    /// e.g. `io.k8s.api.core.v1.PodSpec`; empty for inline types.
    pub name: Box<str>,
    /// Its objects are replaced as a whole.
    pub atomic: bool,
    /// Its shape.
    pub shape: Shape,
}

impl Type {
    /// The last part of the name: Go's name of the struct.
    pub fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or_default()
    }
}

/// All types, by number and by name.
#[derive(Clone, Debug, Default)]
pub struct Schemas {
    /// Those that these add to; their numbers come first.
    base: Option<Arc<Schemas>>,
    types: Vec<Type>,
    names: HashMap<Box<str>, TypeId>,
}

impl Schemas {
    /// Reads the schemas of all `roots` and what they refer to.
    pub fn new(roots: impl IntoIterator<Item = fn(&mut SchemaGenerator)>) -> Schemas {
        let mut definitions = openapi::generate(roots);
        let mut schemas = Schemas::default();
        let facts = Facts::parse(include_str!("facts.txt"));
        // Numbers first, since types refer to each other in cycles.
        for name in definitions.keys() {
            let id = TypeId(schemas.types.len() as u32);
            let atomic = facts.0.get(&(name.as_str(), ".")).is_some_and(|fact| fact.words.contains(&("map", "atomic")));
            schemas.types.push(Type { name: name.as_str().into(), atomic, shape: Shape::Any });
            schemas.names.insert(name.as_str().into(), id);
        }
        for (name, schema) in std::mem::take(&mut definitions) {
            let shape = schemas.read(&name, &schema, &facts);
            let id = schemas.names[name.as_str()];
            schemas.types[id.0 as usize].shape = shape;
        }
        schemas
    }

    /// Nothing of its own yet, beside what `base` has.
    pub fn over(base: Arc<Schemas>) -> Schemas {
        Schemas { base: Some(base), ..Default::default() }
    }

    fn len(&self) -> usize {
        self.types.len() + self.base.as_ref().map_or(0, |base| base.len())
    }

    /// Adds a type; an empty name is none.
    pub fn add(&mut self, name: &str, atomic: bool, shape: Shape) -> TypeId {
        let first = self.base.as_ref().map_or(0, |base| base.len());
        let plain = name.is_empty() && !atomic && !matches!(shape, Shape::Object(_) | Shape::Map(_) | Shape::Array(_));
        // Scalars are shared.
        if plain && let Some(at) = self.types.iter().position(|t| t.name.is_empty() && !t.atomic && t.shape == shape) {
            return TypeId((first + at) as u32);
        }
        let id = TypeId(self.len() as u32);
        self.types.push(Type { name: name.into(), atomic, shape });
        if !name.is_empty() {
            self.names.insert(name.into(), id);
        }
        id
    }

    /// The type with this full name.
    pub fn by_name(&self, name: &str) -> Option<TypeId> {
        self.names.get(name).copied().or_else(|| self.base.as_ref()?.by_name(name))
    }

    /// A type by number.
    pub fn get(&self, id: TypeId) -> &Type {
        let at = id.0 as usize;
        match &self.base {
            Some(base) if at < base.len() => base.get(id),
            Some(base) => &self.types[at - base.len()],
            None => &self.types[at],
        }
    }

    fn read(&mut self, name: &str, schema: &Value, facts: &Facts) -> Shape {
        match name.rsplit('.').next().unwrap_or_default() {
            "Quantity" => return Shape::Quantity,
            "IntOrString" => return Shape::IntOrString,
            "Time" | "MicroTime" => return Shape::Time,
            "RawExtension"
            | "JSON"
            | "JSONSchemaPropsOrArray"
            | "JSONSchemaPropsOrBool"
            | "JSONSchemaPropsOrStringArray"
            | "FieldsV1"
            | "Patch" => return Shape::Any,
            _ => {}
        }
        if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
            let fields = properties.iter().map(|(key, value)| {
                let ty = self.inline(value, facts);
                let mut field = Field {
                    ty,
                    list: ListType::Atomic,
                    keys: vec![],
                    key_defaults: vec![],
                    map: None,
                    merge: false,
                    retain_keys: false,
                    merge_key: None,
                };
                if let Some(fact) = facts.0.get(&(name, key.as_str())) {
                    fact.apply(&mut field);
                }
                (key.as_str().into(), field)
            });
            return Shape::Object(fields.collect());
        }
        if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
            return Shape::Map(self.inline(values, facts));
        }
        let format = schema.get("format").and_then(Value::as_str).unwrap_or_default();
        match schema.get("type").and_then(Value::as_str) {
            Some("string") => match format {
                "byte" => Shape::Bytes,
                "date-time" => Shape::Time,
                "int-or-string" => Shape::IntOrString,
                _ => Shape::String,
            },
            Some("integer") if format == "int64" => Shape::Int64,
            Some("integer") => Shape::Int32,
            Some("number") => Shape::Number,
            Some("boolean") => Shape::Boolean,
            Some("array") => match schema.get("items") {
                Some(items) => Shape::Array(self.inline(items, facts)),
                None => Shape::Any,
            },
            // An object without properties: a name with nothing in it (`{}`) unless it holds free data.
            _ => Shape::Any,
        }
    }

    fn inline(&mut self, schema: &Value, facts: &Facts) -> TypeId {
        if let Some(name) = openapi::reference(schema)
            && let Some(id) = self.by_name(name)
        {
            return id;
        }
        let shape = self.read("", schema, facts);
        // Scalars are shared: there are thousands of string fields.
        let scalar = match &shape {
            Shape::Object(_) | Shape::Map(_) | Shape::Array(_) => None,
            _ => self.types.iter().position(|t| t.name.is_empty() && t.shape == shape),
        };
        TypeId(scalar.unwrap_or_else(|| {
            self.types.push(Type { name: "".into(), atomic: false, shape });
            self.types.len() - 1
        }) as u32)
    }
}

struct Fact<'a> {
    words: Vec<(&'a str, &'a str)>,
}

impl Fact<'_> {
    fn apply(&self, field: &mut Field) {
        for (word, value) in &self.words {
            match *word {
                "list" if *value == "map" => field.list = ListType::Map,
                "list" if *value == "set" => field.list = ListType::Set,
                "map" if *value == "atomic" => field.map = Some(MapType::Atomic),
                "map" => field.map = Some(MapType::Granular),
                "keys" => {
                    field.keys = value.split(',').map(Into::into).collect();
                    if field.keys.iter().any(|key| &**key == "protocol") {
                        field.key_defaults = vec![("protocol".into(), "TCP".into())];
                    }
                }
                "patch" => {
                    field.merge = value.split(',').any(|s| s == "merge");
                    field.retain_keys = value.split(',').any(|s| s == "retainKeys");
                }
                "mergekey" => field.merge_key = Some((*value).into()),
                _ => {}
            }
        }
    }
}

struct Facts<'a>(HashMap<(&'a str, &'a str), Fact<'a>>);

impl<'a> Facts<'a> {
    fn parse(text: &'a str) -> Facts<'a> {
        let mut facts = HashMap::new();
        for line in text.lines() {
            let mut words = line.split(' ');
            if let (Some(ty), Some(field)) = (words.next(), words.next()) {
                facts.insert((ty, field), Fact { words: words.filter_map(|w| w.split_once('=')).collect() });
            }
        }
        Facts(facts)
    }

    fn extensions(&self, ty: &str, field: &str, into: &mut Map<String, Value>) {
        let Some(fact) = self.0.get(&(ty, field)) else { return };
        for (word, value) in &fact.words {
            let (key, value) = match *word {
                "list" => ("x-kubernetes-list-type", Value::from(*value)),
                "keys" => ("x-kubernetes-list-map-keys", value.split(',').collect()),
                "map" => ("x-kubernetes-map-type", Value::from(*value)),
                "patch" => ("x-kubernetes-patch-strategy", Value::from(*value)),
                "mergekey" => ("x-kubernetes-patch-merge-key", Value::from(*value)),
                _ => continue,
            };
            into.insert(key.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{check::conform, *};
    use crate::resources;

    fn schemas() -> Schemas {
        Schemas::new(resources::all().iter().map(|row| row.schema))
    }

    #[test]
    fn every_row_has_a_type_with_metadata() {
        let schemas = schemas();
        for row in resources::all() {
            let ty = row.ty(&schemas).unwrap_or_else(|| panic!("{} has no schema", row.type_name));
            let Shape::Object(fields) = &schemas.get(ty).shape else { panic!("{} is no object", row.type_name) };
            assert!(fields.contains_key("metadata"), "{}", row.type_name);
        }
    }

    #[test]
    fn every_list_that_upstream_merges_is_merged() {
        let schemas = schemas();
        let facts = Facts::parse(include_str!("facts.txt"));
        let mut known = 0;
        for (name, field) in facts.0.keys() {
            if let Some(ty) = schemas.by_name(name)
                && let Shape::Object(fields) = &schemas.get(ty).shape
                && fields.contains_key(*field)
            {
                known += 1;
            }
        }
        assert!(known > 250, "only {known} facts name a field that exists");
    }

    #[test]
    fn decoding_names_the_field_that_is_wrong() {
        let schemas = schemas();
        let check = |ty: &str, mut value: Value| {
            let ty = schemas.by_name(ty).unwrap();
            conform(&schemas, ty, &mut value).map(|unknown| (unknown, value)).map_err(|e| e.to_string())
        };
        let pod = "io.k8s.api.core.v1.Pod";
        let deployment = "io.k8s.api.apps.v1.Deployment";
        assert_eq!(
            check(deployment, json!({"spec": {"replicas": "three"}})),
            Err("json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32".into())
        );
        let (unknown, value) = check(
            pod,
            json!({"spec": {"containers": [{"name": "a", "imagee": "x", "resources": {"limits": {"cpu": 0.5}}}], "nodeName": null}}),
        )
        .unwrap();
        assert_eq!(unknown, ["spec.containers[0].imagee"]);
        assert_eq!(value, json!({"spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": "500m"}}}]}}));
        assert!(check(pod, json!({"spec": {"containers": {}}})).unwrap_err().contains("of type []v1.Container"));
        assert!(check(pod, json!({"metadata": {"creationTimestamp": "yesterday"}})).is_err());
        assert!(check("io.k8s.api.core.v1.Secret", json!({"data": {"a": "%%"}})).is_err());
    }

    #[test]
    fn a_hostile_document_is_read_within_bounds() {
        let text = format!("{{\"{}\": {{{}}}}}", "k".repeat(2000), ["\"a\": 1"; 300].join(","));
        let (_, duplicates) = check::parse(text.as_bytes()).unwrap();
        assert_eq!((duplicates.len(), duplicates[0].len()), (100, 1000));
        let read = |most| check::read(&mut serde_json::Deserializer::from_str(r#"{"ab": ["c"]}"#), most).is_ok();
        assert!(read(6) && !read(5));
    }

    #[test]
    fn times_are_kept_as_upstream_writes_them() {
        let schemas = schemas();
        let ty = schemas.by_name("io.k8s.api.coordination.v1.Lease").unwrap();
        let check = |written: &str, expect: Option<(&str, &str)>| {
            let mut lease = json!({"metadata": {"creationTimestamp": written}, "spec": {"renewTime": written}});
            let result = conform(&schemas, ty, &mut lease).ok();
            let (time, micro) = (lease["metadata"]["creationTimestamp"].as_str(), lease["spec"]["renewTime"].as_str());
            assert_eq!(result.and(time.zip(micro)), expect, "{written}");
        };
        check("2026-01-02T03:04:05Z", Some(("2026-01-02T03:04:05Z", "2026-01-02T03:04:05.000000Z")));
        check("2026-01-02t03:04:05.6789019+02:00", Some(("2026-01-02T01:04:05Z", "2026-01-02T01:04:05.678901Z")));
        check("0001-01-01T00:00:00Z", Some(("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000000Z")));
        check("-000001-12-31T23:59:59Z", None);
    }

    #[test]
    fn strategic_merge_merges_lists_by_key() {
        let schemas = schemas();
        let ty = schemas.by_name("io.k8s.api.apps.v1.Deployment").unwrap();
        let check = |mut target: Value, patch: Value, expect: Value| {
            crate::patch::strategic(&schemas, ty, &mut target, patch).unwrap();
            assert_eq!(target, expect);
        };
        let spec = |containers: Value| json!({"spec": {"template": {"spec": {"containers": containers}}}});
        check(
            spec(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}])),
            spec(json!([{"name": "b", "image": "2"}])),
            spec(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}])),
        );
        check(
            spec(json!([{"name": "a"}, {"name": "b"}])),
            spec(json!([{"name": "a", "$patch": "delete"}])),
            spec(json!([{"name": "b"}])),
        );
        check(
            spec(json!([{"name": "a", "args": ["x"]}])),
            spec(json!([{"name": "a", "args": ["y"]}])),
            spec(json!([{"name": "a", "args": ["y"]}])),
        );
        check(
            json!({"metadata": {"labels": {"a": "1", "b": "2"}, "finalizers": ["x", "y"]}}),
            json!({"metadata": {"labels": {"a": null}, "$deleteFromPrimitiveList/finalizers": ["x"], "finalizers": ["z"]}}),
            json!({"metadata": {"labels": {"b": "2"}, "finalizers": ["y", "z"]}}),
        );
        check(
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
            json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
            json!({"spec": {"strategy": {"type": "Recreate"}}}),
        );
        check(
            spec(json!([{"name": "a"}, {"name": "b"}])),
            json!({"spec": {"template": {"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}], "containers": [{"name": "c"}]}}}}),
            spec(json!([{"name": "c"}, {"name": "b"}, {"name": "a"}])),
        );
    }
}
