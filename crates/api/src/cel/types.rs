//! The types of expressions, known before anything is evaluated: what can only fail is refused when it is written.

use std::{cell::Cell, collections::BTreeMap, fmt, sync::Arc};

use serde_json::Value;

use super::value::unescape;

/// The fields of an object, by their names as they are in JSON.
pub type Fields = BTreeMap<Box<str>, Type>;

/// The type of a value.
#[derive(Clone, Debug, PartialEq)]
pub enum Type {
    /// Whatever it is: nothing is said before it is evaluated.
    Dyn,
    /// `null`.
    Null,
    /// A boolean.
    Bool,
    /// A whole number.
    Int,
    /// One without a sign.
    Uint,
    /// Any number.
    Double,
    /// A text.
    String,
    /// Bytes.
    Bytes,
    /// A time span.
    Duration,
    /// A point in time.
    Timestamp,
    /// What `type(x)` is.
    Type,
    /// One of Kubernetes' own, by the name in `signatures.txt`.
    Named(&'static str),
    /// A list.
    List(Arc<Type>),
    /// A map.
    Map(Arc<(Type, Type)>),
    /// A value that may be missing.
    Optional(Arc<Type>),
    /// An object whose fields are known.
    Object(Arc<Fields>),
    /// Not known yet.
    Variable(usize),
}

impl Type {
    /// A list of these.
    pub fn list(of: Type) -> Type {
        Type::List(Arc::new(of))
    }

    /// A map. Keys that contain other values are not followed.
    pub fn map(key: Type, value: Type) -> Type {
        let key = match key {
            Type::List(_) | Type::Map(_) | Type::Optional(_) | Type::Object(_) => Type::Dyn,
            key => key,
        };
        Type::Map(Arc::new((key, value)))
    }

    /// An optional value.
    pub fn optional(of: Type) -> Type {
        Type::Optional(Arc::new(of))
    }

    /// The type that a structural schema describes, as upstream declares it to expressions; `None` for what a schema does not
    /// describe, which expressions cannot see. A `root` is an object with `apiVersion`, `kind` and `metadata`.
    pub fn of_schema(schema: &Value, root: bool) -> Option<Type> {
        if schema["x-kubernetes-int-or-string"] == true {
            return Some(Type::Dyn);
        }
        let below = |schema: &Value| Type::of_schema(schema, schema["x-kubernetes-embedded-resource"] == true);
        Some(match schema["type"].as_str()? {
            "array" => Type::list(below(schema.get("items")?)?),
            "object" if schema["additionalProperties"].is_object() => {
                Type::map(Type::String, below(&schema["additionalProperties"])?)
            }
            "object" => {
                let properties = schema["properties"].as_object().into_iter().flatten();
                let mut fields: Fields =
                    properties.filter_map(|(name, schema)| Some((name.as_str().into(), below(schema)?))).collect();
                if root {
                    let names = ["name", "generateName"].map(|name| (name.into(), Type::String));
                    fields.insert("apiVersion".into(), Type::String);
                    fields.insert("kind".into(), Type::String);
                    fields.insert("metadata".into(), Type::Object(Arc::new(names.into())));
                }
                Type::Object(Arc::new(fields))
            }
            "string" => match schema["format"].as_str() {
                Some("byte") => Type::Bytes,
                Some("duration") => Type::Duration,
                Some("date" | "date-time") => Type::Timestamp,
                _ => Type::String,
            },
            "boolean" => Type::Bool,
            "integer" => Type::Int,
            "number" => Type::Double,
            _ => return None,
        })
    }

    /// A field of an object, by its name in an expression: names that are no identifiers are escaped in it.
    pub(super) fn field<'t>(fields: &'t Fields, name: &str) -> Option<&'t Type> {
        fields.get(name).or_else(|| name.contains("__").then(|| fields.get(&*unescape(name))).flatten())
    }

    /// Whether values of JSON have to be read as something else to be of this type.
    pub fn converts(&self) -> bool {
        match self {
            Type::Double | Type::Bytes | Type::Duration | Type::Timestamp => true,
            Type::List(of) | Type::Optional(of) => of.converts(),
            Type::Map(of) => of.1.converts(),
            Type::Object(fields) => fields.values().any(Type::converts),
            _ => false,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::Dyn | Type::Variable(_) => "dyn",
            Type::Null => "null",
            Type::Bool => "bool",
            Type::Int => "int",
            Type::Uint => "uint",
            Type::Double => "double",
            Type::String => "string",
            Type::Bytes => "bytes",
            Type::Duration => "google.protobuf.Duration",
            Type::Timestamp => "google.protobuf.Timestamp",
            Type::Type => "type",
            Type::Object(_) => "object",
            Type::Named("IP") => "net.IP",
            Type::Named("CIDR") => "net.CIDR",
            Type::Named("Format") => "kubernetes.NamedFormat",
            Type::Named(name @ ("Authorizer" | "Decision")) => return write!(f, "kubernetes.authorization.{name}"),
            Type::Named(name) => return write!(f, "kubernetes.{name}"),
            Type::List(of) => return write!(f, "list({of})"),
            Type::Map(of) => return write!(f, "map({}, {})", of.0, of.1),
            Type::Optional(of) => return write!(f, "optional_type({of})"),
        })
    }
}

/// How many steps comparing the types of one expression may take. A few lines can describe a type without end.
const STEPS: u32 = 2_000_000;
/// How many parts of a type are followed when it is shown or kept; those beyond could be anything.
const PARTS: u32 = 500;

/// What is known of variables so far.
#[derive(Default)]
pub(super) struct Known {
    bound: Vec<Option<Type>>,
    /// Those that were bound, in order, to be taken back.
    trail: Vec<usize>,
    steps: Cell<u32>,
}

impl Known {
    pub(super) fn fresh(&mut self) -> Type {
        self.bound.push(None);
        Type::Variable(self.bound.len() - 1)
    }

    /// A point to come back to.
    pub(super) fn mark(&self) -> usize {
        self.trail.len()
    }

    pub(super) fn back_to(&mut self, mark: usize) {
        for variable in self.trail.drain(mark..) {
            self.bound[variable] = None;
        }
    }

    /// The type, with what is known of it at its top.
    pub(super) fn top(&self, ty: &Type) -> Type {
        let mut ty = ty;
        while let Type::Variable(variable) = ty {
            match &self.bound[*variable] {
                Some(known) => ty = known,
                None => break,
            }
        }
        ty.clone()
    }

    /// The type, with all that is known of it. What is not known could be anything.
    pub(super) fn whole(&self, ty: &Type) -> Type {
        self.expand(ty, &mut PARTS.clone())
    }

    fn expand(&self, ty: &Type, parts: &mut u32) -> Type {
        if *parts == 0 {
            return Type::Dyn;
        }
        *parts -= 1;
        match self.top(ty) {
            Type::Variable(_) => Type::Dyn,
            Type::List(of) => Type::list(self.expand(&of, parts)),
            Type::Optional(of) => Type::optional(self.expand(&of, parts)),
            Type::Map(of) => Type::map(self.expand(&of.0, parts), self.expand(&of.1, parts)),
            ty => ty,
        }
    }

    /// Whether comparing types took more steps than it may. Then nothing fits.
    pub(super) fn is_exhausted(&self) -> bool {
        self.steps.get() > STEPS
    }

    fn step(&self) -> bool {
        self.steps.set(self.steps.get().saturating_add(1));
        !self.is_exhausted()
    }

    fn occurs(&self, variable: usize, ty: &Type) -> bool {
        match self.top(ty) {
            _ if !self.step() => true,
            Type::Variable(other) => other == variable,
            Type::List(of) | Type::Optional(of) => self.occurs(variable, &of),
            Type::Map(of) => self.occurs(variable, &of.0) || self.occurs(variable, &of.1),
            _ => false,
        }
    }

    /// Whether a value of one type can stand where the other one is wanted. Variables become what that takes.
    pub(super) fn fits(&mut self, is: &Type, wanted: &Type) -> bool {
        match (self.top(is), self.top(wanted)) {
            _ if !self.step() => false,
            (Type::Variable(a), Type::Variable(b)) if a == b => true,
            (Type::Variable(variable), ty) | (ty, Type::Variable(variable)) => {
                let can = !self.occurs(variable, &ty);
                if can {
                    self.bound[variable] = Some(ty);
                    self.trail.push(variable);
                }
                can
            }
            (Type::Dyn, _) | (_, Type::Dyn) => true,
            (Type::Null, other) | (other, Type::Null) => {
                // Of what is opaque to the language, nothing says that it is not null.
                use Type::{Duration, Named, Null, Object, Optional, Timestamp};
                matches!(other, Null | Object(_) | Named(_) | Duration | Timestamp | Optional(_))
            }
            (Type::List(a), Type::List(b)) | (Type::Optional(a), Type::Optional(b)) => self.fits(&a, &b),
            (Type::Map(a), Type::Map(b)) => self.fits(&a.0, &b.0) && self.fits(&a.1, &b.1),
            // Which of two objects with the same fields it is makes no difference.
            (Type::Object(a), Type::Object(b)) => Arc::ptr_eq(&a, &b) || a.keys().eq(b.keys()),
            (a, b) => a == b,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schemas_describe_types() {
        let check = |schema: Value, expect: Option<&str>| {
            assert_eq!(Type::of_schema(&schema, false).map(|ty| ty.to_string()).as_deref(), expect, "{schema}");
        };
        check(json!({"type": "string"}), Some("string"));
        check(json!({"type": "string", "format": "date-time"}), Some("google.protobuf.Timestamp"));
        check(json!({"type": "string", "format": "duration"}), Some("google.protobuf.Duration"));
        check(json!({"type": "string", "format": "byte"}), Some("bytes"));
        check(json!({"type": "string", "format": "uuid"}), Some("string"));
        check(json!({"type": "number"}), Some("double"));
        check(json!({"type": "array", "items": {"type": "integer"}}), Some("list(int)"));
        check(json!({"type": "object", "additionalProperties": {"type": "boolean"}}), Some("map(string, bool)"));
        check(json!({"x-kubernetes-int-or-string": true}), Some("dyn"));
        check(json!({"x-kubernetes-preserve-unknown-fields": true}), None);
        check(json!({"type": "array", "items": {}}), None);
        let object = json!({"type": "object", "properties": {"spec": {"type": "object"}, "any": {}}});
        let Some(Type::Object(fields)) = Type::of_schema(&object, true) else { panic!("no object") };
        assert_eq!(fields.keys().map(|k| &**k).collect::<Vec<_>>(), ["apiVersion", "kind", "metadata", "spec"]);
    }

    #[test]
    fn what_fits() {
        let check = |a: Type, b: Type, expect: bool| {
            let mut known = Known { bound: vec![None, None], ..Known::default() };
            assert_eq!(known.fits(&a, &b), expect, "{a:?} {b:?}");
        };
        let object = || Type::Object(Arc::default());
        check(Type::Int, Type::Int, true);
        check(Type::Int, Type::Double, false);
        check(Type::Dyn, Type::Int, true);
        check(Type::Null, Type::String, false);
        check(Type::Null, object(), true);
        check(Type::optional(Type::String), Type::Null, true);
        check(object(), Type::map(Type::String, Type::Int), false);
        check(Type::list(Type::Variable(0)), Type::list(Type::Int), true);
        check(Type::Variable(0), Type::list(Type::Variable(0)), false);
        let pair = |a, b| Type::map(a, b);
        check(pair(Type::Variable(0), Type::Variable(0)), pair(Type::String, Type::Int), false);
        check(pair(Type::Variable(0), Type::Variable(1)), pair(Type::String, Type::Int), true);
    }

    #[test]
    fn what_was_tried_is_taken_back() {
        let mut known = Known::default();
        let variable = known.fresh();
        let mark = known.mark();
        assert!(known.fits(&variable, &Type::Int));
        known.back_to(mark);
        assert!(known.fits(&variable, &Type::String));
        assert_eq!(known.whole(&Type::list(variable)), Type::list(Type::String));
    }
}
