//! The schema of a version of a custom resource, read once into a tree
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>).
//!
//! Reading is lenient: what is wrong with a schema is said by [`super::structural`] when its definition is written.

use super::rules::Compiled;
use std::collections::BTreeMap;

use regex::Regex;
use serde_json::Value;

use crate::{cel::Type, schema::ListType};

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Kind {
    /// Not said.
    #[default]
    Any,
    /// `object`.
    Object,
    /// `array`.
    Array,
    /// `string`.
    String,
    /// `integer`.
    Integer,
    /// `number`.
    Number,
    /// `boolean`.
    Boolean,
}

impl Kind {
    /// Reads `type`.
    pub fn parse(text: &str) -> Option<Kind> {
        Some(match text {
            "" => Kind::Any,
            "object" => Kind::Object,
            "array" => Kind::Array,
            "string" => Kind::String,
            "integer" => Kind::Integer,
            "number" => Kind::Number,
            "boolean" => Kind::Boolean,
            _ => return None,
        })
    }

    /// As in a schema.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Any => "",
            Kind::Object => "object",
            Kind::Array => "array",
            Kind::String => "string",
            Kind::Integer => "integer",
            Kind::Number => "number",
            Kind::Boolean => "boolean",
        }
    }
}

/// What keys beside the named ones may hold.
#[derive(Clone, Debug, Default)]
pub enum Additional {
    /// Nothing is said.
    #[default]
    Unset,
    /// `true` or `false`.
    Allowed(bool),
    /// Values of this schema.
    Schema(Box<Node>),
}

/// A rule in CEL, as it stands in `x-kubernetes-validations`
/// (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#validation-rules>).
#[derive(Clone, Debug)]
pub struct Rule {
    /// The expression.
    pub rule: String,
    /// What to say when it does not hold.
    pub message: String,
    /// An expression that says it.
    pub message_expression: String,
    /// The kind of error; empty for `FieldValueInvalid`.
    pub reason: String,
    /// The field that is blamed, relative to the rule's place.
    pub field_path: String,
    /// `oldSelf` is optional, and the rule is evaluated on create as well.
    pub optional_old_self: Option<bool>,
    /// What its expressions mean.
    pub compiled: Compiled,
}

/// The least or the greatest that a number may be.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// The number.
    pub value: f64,
    /// Whether the number itself is excluded.
    pub exclusive: bool,
}

/// A place in a schema.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// `type`.
    pub kind: Kind,
    /// `nullable`.
    pub nullable: bool,
    /// `x-kubernetes-int-or-string`.
    pub int_or_string: bool,
    /// `x-kubernetes-preserve-unknown-fields`.
    pub preserve: bool,
    /// `x-kubernetes-embedded-resource`.
    pub embedded: bool,
    /// `properties`.
    pub properties: BTreeMap<Box<str>, Node>,
    /// `additionalProperties`.
    pub additional: Additional,
    /// `items`.
    pub items: Option<Box<Node>>,
    /// `default`.
    pub default: Option<Value>,
    /// `x-kubernetes-list-type`.
    pub list: ListType,
    /// `x-kubernetes-list-map-keys`.
    pub keys: Vec<Box<str>>,
    /// `x-kubernetes-map-type: atomic`.
    pub atomic: bool,
    /// `format`.
    pub format: Box<str>,
    /// `pattern`, and the expression unless it is malformed.
    pub pattern: Option<(Box<str>, Option<Regex>)>,
    /// `minimum`.
    pub minimum: Option<Bound>,
    /// `maximum`.
    pub maximum: Option<Bound>,
    /// `multipleOf`.
    pub multiple_of: Option<f64>,
    /// `minLength` and `maxLength`.
    pub length: (Option<u64>, Option<u64>),
    /// `minItems` and `maxItems`.
    pub count: (Option<u64>, Option<u64>),
    /// `minProperties` and `maxProperties`.
    pub size: (Option<u64>, Option<u64>),
    /// `uniqueItems`.
    pub unique: bool,
    /// `enum`.
    pub one_of_values: Vec<Value>,
    /// `required`.
    pub required: Vec<Box<str>>,
    /// `allOf`.
    pub all_of: Vec<Node>,
    /// `anyOf`.
    pub any_of: Vec<Node>,
    /// `oneOf`.
    pub one_of: Vec<Node>,
    /// `not`.
    pub not: Option<Box<Node>>,
    /// `x-kubernetes-validations`.
    pub rules: Vec<Rule>,
}

impl Node {
    /// Reads the schema of whole objects.
    pub fn parse(schema: &Value) -> Node {
        Node::read(schema, true)
    }

    /// Reads the schema of a part of them.
    pub(super) fn below(schema: &Value) -> Node {
        Node::read(schema, schema["x-kubernetes-embedded-resource"] == true)
    }

    /// `root` says whether these are objects with `apiVersion`, `kind` and `metadata`.
    fn read(schema: &Value, root: bool) -> Node {
        let text = |key: &str| schema[key].as_str().unwrap_or_default();
        let flag = |key: &str| schema[key].as_bool().unwrap_or_default();
        let texts = |key: &str| -> Vec<Box<str>> {
            schema[key].as_array().into_iter().flatten().filter_map(Value::as_str).map(Into::into).collect()
        };
        let nodes =
            |key: &str| -> Vec<Node> { schema[key].as_array().into_iter().flatten().map(Node::below).collect() };
        let range = |low: &str, high: &str| (schema[low].as_u64(), schema[high].as_u64());
        let bound =
            |key: &str, exclusive: &str| schema[key].as_f64().map(|value| Bound { value, exclusive: flag(exclusive) });
        Node {
            kind: Kind::parse(text("type")).unwrap_or_default(),
            nullable: flag("nullable"),
            int_or_string: flag("x-kubernetes-int-or-string"),
            preserve: flag("x-kubernetes-preserve-unknown-fields"),
            embedded: flag("x-kubernetes-embedded-resource"),
            properties: schema["properties"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(key, value)| (key.as_str().into(), Node::below(value)))
                .collect(),
            additional: match &schema["additionalProperties"] {
                Value::Bool(allowed) => Additional::Allowed(*allowed),
                Value::Object(_) => Additional::Schema(Box::new(Node::below(&schema["additionalProperties"]))),
                _ => Additional::Unset,
            },
            items: schema["items"].is_object().then(|| Box::new(Node::below(&schema["items"]))),
            default: schema.get("default").filter(|v| !v.is_null()).cloned(),
            list: match text("x-kubernetes-list-type") {
                "map" => ListType::Map,
                "set" => ListType::Set,
                _ => ListType::Atomic,
            },
            keys: texts("x-kubernetes-list-map-keys"),
            atomic: text("x-kubernetes-map-type") == "atomic",
            format: text("format").into(),
            pattern: Some(text("pattern")).filter(|p| !p.is_empty()).map(|p| (p.into(), Regex::new(p).ok())),
            minimum: bound("minimum", "exclusiveMinimum"),
            maximum: bound("maximum", "exclusiveMaximum"),
            multiple_of: schema["multipleOf"].as_f64().filter(|f| *f > 0.0),
            length: range("minLength", "maxLength"),
            count: range("minItems", "maxItems"),
            size: range("minProperties", "maxProperties"),
            unique: flag("uniqueItems"),
            one_of_values: schema["enum"].as_array().cloned().unwrap_or_default(),
            required: texts("required"),
            all_of: nodes("allOf"),
            any_of: nodes("anyOf"),
            one_of: nodes("oneOf"),
            not: schema["not"].is_object().then(|| Box::new(Node::below(&schema["not"]))),
            rules: rules(schema, root),
        }
    }

    /// The schema of the value of a key; none if nothing is said of it.
    pub fn child(&self, key: &str) -> Option<&Node> {
        match (self.properties.get(key), &self.additional) {
            (Some(node), _) => Some(node),
            (None, Additional::Schema(node)) => Some(node),
            _ => None,
        }
    }

    /// Calls `visit` for this place and all below it that values can have (not those of `allOf` and its kin).
    pub fn walk<'a>(&'a self, visit: &mut impl FnMut(&'a Node)) {
        visit(self);
        for node in self.properties.values() {
            node.walk(visit);
        }
        if let Additional::Schema(node) = &self.additional {
            node.walk(visit);
        }
        if let Some(items) = &self.items {
            items.walk(visit);
        }
    }

    /// Whether a default stands anywhere.
    pub fn has_defaults(&self) -> bool {
        let mut found = false;
        self.walk(&mut |node| found |= node.default.is_some());
        found
    }

    /// Whether a rule stands anywhere.
    pub fn has_rules(&self) -> bool {
        let mut found = false;
        self.walk(&mut |node| found |= !node.rules.is_empty());
        found
    }
}

fn rules(schema: &Value, root: bool) -> Vec<Rule> {
    let Some(list) = schema["x-kubernetes-validations"].as_array().filter(|list| !list.is_empty()) else {
        return Vec::new();
    };
    let subject = Type::of_schema(schema, root).unwrap_or(Type::Dyn);
    list.iter().map(|value| rule(value, &subject)).collect()
}

fn rule(value: &Value, subject: &Type) -> Rule {
    let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
    Rule {
        rule: text("rule"),
        message: text("message"),
        message_expression: text("messageExpression"),
        reason: text("reason"),
        field_path: text("fieldPath"),
        optional_old_self: value["optionalOldSelf"].as_bool(),
        compiled: Compiled::new(value, subject),
    }
}
