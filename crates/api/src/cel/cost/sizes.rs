//! How large the values may be that a schema describes
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#resource-use-by-validation-functions>).

use std::collections::BTreeMap;

use serde_json::Value;

use super::super::value::unescape;

/// The largest request, in bytes, as upstream's estimates assume it.
const REQUEST: u64 = 3 << 20;
/// The longest name of an object, in characters.
const NAME: u64 = 253;

/// How many attributes or capacities a device has at most.
const ATTRIBUTES: u64 = 32;
/// The longest name of a driver, of a domain and of what is in one, and the longest attribute.
const DRIVER: u64 = 63;
const DOMAIN: u64 = 63;
const IDENTIFIER: u64 = 32;
const ATTRIBUTE: u64 = 64;

/// The largest size of a value, and of what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Characters, bytes, items or entries that it may have at most; none for what has one size.
    pub(super) most: u64,
    /// How many bytes of JSON it takes at least.
    least: u64,
    parts: Parts,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Parts {
    #[default]
    None,
    Items(Box<Sizes>),
    Values(Box<Sizes>),
    Fields(BTreeMap<Box<str>, Sizes>),
    /// A map whose keys have a size of their own.
    Entries(Box<Entries>),
    /// The fields of a variable that no schema describes.
    Variable(BTreeMap<Box<str>, Sizes>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entries {
    key: Sizes,
    value: Sizes,
    /// Whether the size is also known of a value that is read as a field (`map.key`); as a rule it is not.
    as_field: bool,
}

/// The way from a value to one in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step<'n> {
    Item,
    Index,
    Key,
    Value,
    Field(&'n str),
}

/// Upstream says nothing of the size of keys.
static KEY: Sizes = Sizes { most: 0, least: 2, parts: Parts::None };

impl Sizes {
    /// What a structural schema says, for values that expressions can see. A `root` is an object with `apiVersion`, `kind` and
    /// `metadata`.
    pub fn of_schema(schema: &Value, root: bool) -> Option<Sizes> {
        let limit = |key: &str| Some(u64::try_from(schema[key].as_i64()?).unwrap_or(0));
        let simple = |most: u64, least: u64| Some(Sizes { most, least, parts: Parts::None });
        // A character is four bytes at most.
        let text = || limit("maxLength").map(|length| length.saturating_mul(4));
        if schema["x-kubernetes-int-or-string"] == true {
            return simple(text().unwrap_or(REQUEST - 2), 1);
        }
        let below = |schema: &Value| Sizes::of_schema(schema, schema["x-kubernetes-embedded-resource"] == true);
        match schema["type"].as_str()? {
            "array" => {
                let items = below(schema.get("items")?)?;
                let most = limit("maxItems").unwrap_or((REQUEST - 2) / (items.least + 1));
                Some(Sizes { most, least: 2, parts: Parts::Items(items.into()) })
            }
            "object" if schema["additionalProperties"].is_object() => {
                let values = below(&schema["additionalProperties"])?;
                let most = limit("maxProperties").unwrap_or((REQUEST - 2) / (values.least + 6));
                Some(Sizes { most, least: 2, parts: Parts::Values(values.into()) })
            }
            "object" => Some(Sizes::of_object(schema, root, below)),
            "string" => match (schema["format"].as_str(), schema["enum"].as_array()) {
                (Some("byte"), _) => simple(limit("maxLength").unwrap_or(REQUEST - 2), 2),
                (Some("duration"), _) => simple(32, 3),
                (Some("date"), _) => simple(12, 12),
                (Some("date-time"), _) => simple(32, 21),
                (_, Some(values)) if !values.is_empty() && text().is_none() => {
                    let longest = values.iter().filter_map(Value::as_str).map(str::len).max();
                    simple(longest.unwrap_or(0) as u64, 2)
                }
                _ => simple(text().unwrap_or(REQUEST - 2), 2),
            },
            "boolean" => simple(0, 4),
            "integer" | "number" => simple(0, 1),
            _ => None,
        }
    }

    fn of_object(schema: &Value, root: bool, below: impl Fn(&Value) -> Option<Sizes>) -> Sizes {
        let required = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|v| v == name));
        let mut least = 2;
        let mut fields = BTreeMap::new();
        let added = root && !describes_metadata(schema);
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            if added && matches!(&**name, "apiVersion" | "kind" | "metadata") {
                continue;
            }
            let Some(sizes) = below(schema) else { continue };
            if required(name) && schema["default"].is_null() {
                least += name.len() as u64 + sizes.least + 4;
            }
            fields.insert(name.as_str().into(), sizes);
        }
        if added {
            let unlimited = Sizes { most: REQUEST - 2, least: 2, parts: Parts::None };
            let meta = &schema["properties"]["metadata"]["properties"];
            let name = |name: &str, most: u64| {
                let most = meta[name]["maxLength"].as_u64().map_or(most, |own| own.min(most));
                (name.into(), Sizes { most: most * 4, least: 2, parts: Parts::None })
            };
            let names = [name("name", NAME), name("generateName", NAME - 1)];
            let metadata = Sizes { most: 0, least: 2, parts: Parts::Fields(names.into()) };
            for (name, sizes) in [("apiVersion", unlimited.clone()), ("kind", unlimited), ("metadata", metadata)] {
                if required(name) {
                    least += name.len() as u64 + sizes.least + 4;
                }
                fields.insert(name.into(), sizes);
            }
        }
        Sizes { most: 0, least, parts: Parts::Fields(fields) }
    }

    /// The variable `device` of expressions that choose devices, whose sizes are those that validation allows. Of
    /// `allowMultipleAllocations` upstream's estimates know nothing
    /// (<https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/dynamic-resource-allocation/cel/compile.go>).
    pub fn of_device() -> Sizes {
        let simple = |most: u64| Sizes { most, least: 0, parts: Parts::None };
        let map = |key: u64, value: Sizes, as_field: bool| {
            let entries = Entries { key: simple(key), value, as_field };
            Sizes { most: ATTRIBUTES, least: 0, parts: Parts::Entries(entries.into()) }
        };
        let fields = [
            ("driver", simple(DRIVER)),
            ("attributes", map(DOMAIN, map(IDENTIFIER, simple(ATTRIBUTE), true), false)),
            ("capacity", map(DOMAIN, map(IDENTIFIER, simple(0), false), false)),
        ];
        let fields = fields.map(|(name, sizes)| (name.into(), sizes));
        Sizes { most: 0, least: 0, parts: Parts::Variable(fields.into()) }
    }

    /// Whether what is in the result of something counts as if it stood in the variable. Upstream's estimates of rules do
    /// so, those about devices do not.
    pub(super) fn stand_for_results(&self) -> bool {
        !matches!(self.parts, Parts::Variable(_))
    }

    /// How many of these a request can have at most, in lists and maps without limits of their own.
    pub fn most_in_request(&self) -> u64 {
        REQUEST / (self.least + 1)
    }

    pub(super) fn step(&self, step: Step<'_>) -> Option<&Sizes> {
        match (&self.parts, step) {
            (Parts::Items(inner), Step::Item | Step::Value) | (Parts::Values(inner), Step::Item | Step::Value) => {
                Some(inner)
            }
            (Parts::Values(_), Step::Key) => Some(&KEY),
            (Parts::Entries(entries), Step::Key) => Some(&entries.key),
            (Parts::Entries(entries), Step::Item | Step::Value) => Some(&entries.value),
            (Parts::Entries(entries), Step::Field(_)) => entries.as_field.then_some(&entries.value),
            (Parts::Fields(fields) | Parts::Variable(fields), Step::Field(name)) => {
                fields.get(name).or_else(|| name.contains("__").then(|| fields.get(&*unescape(name))).flatten())
            }
            _ => None,
        }
    }
}

/// Whether a schema has everything that expressions see of every object; then it is taken as it is.
fn describes_metadata(schema: &Value) -> bool {
    let properties = &schema["properties"];
    let texts = [&properties["kind"], &properties["apiVersion"]];
    let meta = &properties["metadata"];
    meta["type"] == "object"
        && texts.iter().all(|schema| schema["type"] == "string")
        && ["name", "generateName"].iter().all(|name| meta["properties"][name]["type"] == "string")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(schema: Value, most: u64, times: u64) {
        let sizes = Sizes::of_schema(&schema, false).expect("a size");
        assert_eq!((sizes.most, sizes.most_in_request()), (most, times), "{schema}");
    }

    #[test]
    fn limits_and_what_stands_in_for_them() {
        check(json!({"type": "string"}), 3_145_726, 1_048_576);
        check(json!({"type": "string", "maxLength": 10}), 40, 1_048_576);
        check(json!({"type": "string", "maxLength": -1}), 0, 1_048_576);
        check(json!({"type": "string", "enum": ["a", "long"]}), 4, 1_048_576);
        check(json!({"type": "string", "enum": ["a", "long"], "maxLength": 1}), 4, 1_048_576);
        check(json!({"type": "string", "format": "byte", "maxLength": 10}), 10, 1_048_576);
        check(json!({"type": "string", "format": "date-time"}), 32, 142_987);
        check(json!({"type": "string", "format": "date", "maxLength": 3}), 12, 241_979);
        check(json!({"type": "integer"}), 0, 1_572_864);
        check(json!({"type": "boolean"}), 0, 629_145);
        check(json!({"x-kubernetes-int-or-string": true}), 3_145_726, 1_572_864);
        check(json!({"type": "array", "items": {"type": "integer"}, "maxItems": 7}), 7, 1_048_576);
        check(json!({"type": "array", "items": {"type": "integer"}}), 1_572_863, 1_048_576);
        check(json!({"type": "object", "additionalProperties": {"type": "string"}}), 393_215, 1_048_576);
        let required = json!({"type": "object", "required": ["name", "mode"], "properties": {
            "name": {"type": "string"}, "mode": {"type": "string", "default": "x"}, "other": {"type": "string"}}});
        check(required, 0, 3_145_728 / (2 + 4 + 2 + 4 + 1));
        assert_eq!(Sizes::of_schema(&json!({"x-kubernetes-preserve-unknown-fields": true}), false), None);
    }

    #[test]
    fn names_of_objects_are_short() {
        let name = |schema: Value| {
            let root = Sizes::of_schema(&schema, true).expect("an object");
            root.step(Step::Field("metadata")).and_then(|meta| meta.step(Step::Field("name"))).map(|name| name.most)
        };
        assert_eq!(name(json!({"type": "object"})), Some(1012));
        let shorter = json!({"type": "object", "properties": {"metadata": {"type": "object", "properties": {
            "name": {"type": "string", "maxLength": 20}}}}});
        assert_eq!(name(shorter), Some(80));
    }
}
