//! Custom resources: rows that are made from CustomResourceDefinitions
//! (<https://kubernetes.io/docs/concepts/extend-kubernetes/api-extension/custom-resources/>).
//!
//! A definition becomes one [`Definition`] and one [`Row`] for each version that is served; the same engine serves them
//! as serves built-in kinds. Whatever depends on the schema goes through the row's [`Version`].

pub mod arena;
pub mod costs;
pub mod format;
pub mod jsonpath;
pub mod names;
pub mod prune;
pub mod rules;
pub mod schema;
pub mod structural;
pub mod validate;

#[cfg(test)]
mod tests;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    cell,
    field::Errors,
    row::{MOST_SEEN, Row, Scope, Subresource, intern, intern_list, minimal},
    schema::{
        Schemas, TypeId,
        check::{TypeError, conform},
    },
};
use jsonpath::JsonPath;
use schema::Node;
use validate::Rules;

/// Where references start in OpenAPI version 2.
pub const PREFIX_2: &str = "#/definitions/";
/// Where references start in OpenAPI version 3.
pub const PREFIX_3: &str = "#/components/schemas/";

/// How objects are taken from one version into another.
#[derive(Clone, Debug, PartialEq)]
pub enum Conversion {
    /// Only `apiVersion` differs.
    None,
    /// Somebody is asked: `spec.conversion.webhook`.
    Webhook(Value),
}

/// What all versions of a custom resource have in common.
#[derive(Debug)]
pub struct Definition {
    /// The name of the CustomResourceDefinition.
    pub name: Box<str>,
    /// The group.
    pub group: &'static str,
    /// The plural.
    pub plural: &'static str,
    /// The kind of lists.
    pub list_kind: &'static str,
    /// The version that is stored.
    pub storage: &'static str,
    /// How versions relate.
    pub conversion: Conversion,
    /// What it was made from: whether a changed definition means other rows is seen by this.
    pub source: Value,
    terminating: AtomicBool,
}

impl Definition {
    /// Whether the definition is being deleted: nothing is created any more.
    pub fn terminating(&self) -> bool {
        self.terminating.load(Ordering::Acquire)
    }

    /// Notes whether it is being deleted.
    pub fn set_terminating(&self, terminating: bool) {
        self.terminating.store(terminating, Ordering::Release);
    }
}

/// A column from `additionalPrinterColumns`.
#[derive(Clone, Debug)]
pub struct Column {
    /// The heading.
    pub name: String,
    /// The OpenAPI type.
    pub ty: String,
    /// The OpenAPI format.
    pub format: String,
    /// What it shows.
    pub description: String,
    /// 0 is always shown.
    pub priority: i64,
    /// Where the cell comes from.
    pub path: Option<JsonPath>,
    /// The same, as it was written.
    pub source: String,
}

/// Where `/scale` finds its numbers.
#[derive(Clone, Debug)]
pub struct Scale {
    /// `specReplicasPath`.
    pub spec: Vec<String>,
    /// `statusReplicasPath`.
    pub status: Vec<String>,
    /// `labelSelectorPath`.
    pub selector: Option<Vec<String>>,
}

/// One version of a custom resource.
#[derive(Debug)]
pub struct Version {
    /// What all versions share.
    pub definition: Arc<Definition>,
    /// The name of the version.
    pub name: &'static str,
    /// What to tell those who use it, if it is deprecated.
    pub deprecation: Option<String>,
    /// The schema.
    pub root: Node,
    /// The schema as it was written.
    pub source: Value,
    /// The types by which server-side apply walks.
    pub schemas: Arc<Schemas>,
    /// That of the object.
    pub ty: TypeId,
    meta: Option<TypeId>,
    /// The columns after the name.
    pub columns: Vec<Column>,
    /// `/scale`.
    pub scale: Option<Scale>,
    has_defaults: bool,
}

impl Version {
    /// Brings an object that a client sent into the form that is stored: metadata is decoded, what is not known goes,
    /// nulls go. Returns the paths of what was not known.
    pub fn conform(&self, object: &mut Value) -> Result<Vec<String>, TypeError> {
        let mut unknown = self.conform_meta(&mut object["metadata"], "metadata")?;
        let mut wrong = None;
        prune::embedded(&self.root, object, &mut |meta| {
            let mut value = Value::Object(std::mem::take(meta));
            match self.conform_meta(&mut value, "metadata") {
                Ok(found) => unknown.extend(found),
                Err(error) => wrong = wrong.take().or(Some(error)),
            }
            if let Value::Object(map) = value {
                *meta = map;
            }
        });
        if let Some(error) = wrong {
            return Err(error);
        }
        unknown.extend(prune::prune(&self.root, object));
        prune::drop_nulls(&self.root, object);
        Ok(unknown)
    }

    fn conform_meta(&self, meta: &mut Value, path: &str) -> Result<Vec<String>, TypeError> {
        match (self.meta, meta.is_null()) {
            (Some(ty), false) => {
                let unknown = conform(&self.schemas, ty, meta)?;
                Ok(unknown.into_iter().map(|field| format!("{path}.{field}")).collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Fills in defaults.
    pub fn default(&self, object: &mut Value) {
        if self.has_defaults {
            prune::default(&self.root, object);
        }
    }

    /// Whether there are any.
    pub fn has_defaults(&self) -> bool {
        self.has_defaults
    }

    /// Says everything that is wrong with an object.
    pub fn validate(&self, new: &Value, old: Option<&Value>, rules: &dyn Rules, errors: &mut Errors) {
        validate::validate(&self.root, new, old, rules, errors);
    }

    /// What columns look at, for [`Row::seen`]; nothing if that cannot be said.
    fn seen(&self) -> &'static [&'static str] {
        let starts = self.columns.iter().filter_map(|column| Some(column.path.as_ref()?.start().join(".")));
        let starts: Vec<String> = starts.collect();
        match starts.len() > MOST_SEEN || starts.iter().any(String::is_empty) {
            true => &[],
            false => intern_list(starts.iter().map(String::as_str)),
        }
    }

    /// The cells of an object, in the order of the columns.
    pub fn cells(&self, object: &Value, now: Timestamp) -> Vec<Value> {
        self.columns.iter().map(|column| column.cell(object, now)).collect()
    }
}

impl Column {
    fn cell(&self, object: &Value, now: Timestamp) -> Value {
        let found = self.path.as_ref().map(|path| path.find(object)).unwrap_or_default();
        let Some(first) = found.first().filter(|v| !v.is_null()) else { return Value::Null };
        match &*self.ty {
            "integer" => match first.as_i64().or_else(|| first.as_f64().map(|f| f as i64)) {
                Some(number) => number.into(),
                None => Value::Null,
            },
            "number" => first.as_f64().map_or(Value::Null, |_| (*first).clone()),
            "boolean" => first.as_bool().map_or(Value::Null, Value::from),
            "date" => match first.as_str().and_then(|text| text.parse::<Timestamp>().ok()) {
                Some(_) => cell::since(first, now),
                None => Value::Null,
            },
            // A string shows whatever is there.
            _ => match first {
                Value::String(text) => text.as_str().into(),
                other => other.to_string().into(),
            },
        }
    }
}

fn fields(text: &str) -> Option<Vec<String>> {
    let path = JsonPath::parse(text).ok()?;
    Some(path.fields()?.into_iter().map(str::to_owned).collect())
}

/// Whether a condition of a definition is true.
pub fn condition(definition: &Value, ty: &str) -> bool {
    let conditions = definition["status"]["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|c| c["type"] == ty && c["status"] == "True")
}

/// What rows depend on, in a definition; nothing if it is not established.
pub fn source(definition: &Value) -> Option<Value> {
    condition(definition, "Established").then(
        || json!({"spec": definition["spec"], "names": definition["status"]["acceptedNames"], "uid": definition["metadata"]["uid"]}),
    )
}

/// The rows of a definition that is established, that of the stored version first, and whether each is served.
pub fn rows(definition: &Value, base: &Arc<Schemas>) -> Option<Vec<(Row, bool)>> {
    let source = source(definition)?;
    let spec = &definition["spec"];
    let names = &definition["status"]["acceptedNames"];
    let text = |v: &Value| intern(v.as_str().unwrap_or_default());
    let texts = |v: &Value| -> &'static [&'static str] {
        intern_list(v.as_array().into_iter().flatten().filter_map(Value::as_str))
    };
    let versions = spec["versions"].as_array()?;
    let storage = text(&versions.iter().find(|v| v["storage"] == true)?["name"]);
    let (group, plural) = (text(&spec["group"]), text(&names["plural"]));
    if group.is_empty() || plural.is_empty() {
        return None;
    }
    let shared = Arc::new(Definition {
        name: definition["metadata"]["name"].as_str().unwrap_or_default().into(),
        group,
        plural,
        list_kind: text(&names["listKind"]),
        storage,
        conversion: match spec["conversion"]["strategy"].as_str() {
            Some("Webhook") => Conversion::Webhook(spec["conversion"]["webhook"].clone()),
            _ => Conversion::None,
        },
        source,
        terminating: AtomicBool::new(definition["metadata"]["deletionTimestamp"].is_string()),
    });
    let selectable: Vec<String> = versions
        .iter()
        .flat_map(|v| v["selectableFields"].as_array().into_iter().flatten())
        .filter_map(|field| Some(fields(field["jsonPath"].as_str()?)?.join(".")))
        .collect();
    let selectable = intern_list(selectable.iter().map(String::as_str));
    let mut rows: Vec<(Row, bool)> = Vec::with_capacity(versions.len());
    for version in versions {
        let name = text(&version["name"]);
        let kind = text(&names["kind"]);
        let schema = &version["schema"]["openAPIV3Schema"];
        let mut root = Node::parse(schema);
        // The object's own metadata has a type of its own; what the schema says of it is checked as well.
        root.preserve |= schema.is_null();
        let mut schemas = Schemas::over(base.clone());
        let type_name = arena::type_name(group, name, kind);
        let ty = arena::add(&mut schemas, &type_name, &root);
        let meta = schemas.by_name(arena::META);
        let status = version["subresources"]["status"].is_object();
        let scale = &version["subresources"]["scale"];
        let scale = scale.is_object().then(|| Scale {
            spec: fields(scale["specReplicasPath"].as_str().unwrap_or_default()).unwrap_or_default(),
            status: fields(scale["statusReplicasPath"].as_str().unwrap_or_default()).unwrap_or_default(),
            selector: scale["labelSelectorPath"].as_str().and_then(fields),
        });
        let subresources: &'static [Subresource] = match (status, scale.is_some()) {
            (true, true) => &[Subresource::Status, Subresource::Scale],
            (true, false) => &[Subresource::Status],
            (false, true) => &[Subresource::Scale],
            (false, false) => &[],
        };
        let has_defaults = root.has_defaults();
        let custom = Version {
            definition: shared.clone(),
            name,
            deprecation: (version["deprecated"] == true).then(|| match version["deprecationWarning"].as_str() {
                Some(warning) => warning.to_owned(),
                None => deprecation(group, name, kind, versions),
            }),
            root,
            source: schema.clone(),
            schemas: Arc::new(schemas),
            ty,
            meta,
            columns: columns(&version["additionalPrinterColumns"]),
            scale,
            has_defaults,
        };
        let row = Row {
            group,
            version: name,
            kind,
            plural,
            singular: text(&names["singular"]),
            short_names: texts(&names["shortNames"]),
            categories: texts(&names["categories"]),
            scope: if spec["scope"] == "Namespaced" { Scope::Namespaced } else { Scope::Cluster },
            subresources,
            selectable,
            seen: custom.seen(),
            type_name: intern(&type_name),
            generation: true,
            custom: Some(Arc::new(custom)),
            ..minimal()
        };
        let served = version["served"] == true;
        match name == storage {
            true => rows.insert(0, (row, served)),
            false => rows.push((row, served)),
        }
    }
    Some(rows)
}

fn deprecation(group: &str, name: &str, kind: &str, versions: &[Value]) -> String {
    let better = versions
        .iter()
        .filter(|v| v["served"] == true && v["deprecated"] != true)
        .filter_map(|v| v["name"].as_str())
        .filter(|other| names::priority(other) > names::priority(name))
        .max_by_key(|other| names::priority(other));
    let tail = better.map(|other| format!("; use {group}/{other} {kind}")).unwrap_or_default();
    format!("{group}/{name} {kind} is deprecated{tail}")
}

fn columns(columns: &Value) -> Vec<Column> {
    let column = |column: &Value| {
        let text = |key: &str| column[key].as_str().unwrap_or_default().to_owned();
        Column {
            name: text("name"),
            ty: text("type"),
            format: text("format"),
            description: text("description"),
            priority: column["priority"].as_i64().unwrap_or_default(),
            path: JsonPath::parse(&text("jsonPath")).ok(),
            source: text("jsonPath"),
        }
    };
    match columns.as_array().filter(|list| !list.is_empty()) {
        Some(list) => list.iter().map(column).collect(),
        None => vec![Column {
            name: "Age".into(),
            ty: "date".into(),
            format: String::new(),
            description: "The time since the object was created.".into(),
            priority: 0,
            path: JsonPath::parse(".metadata.creationTimestamp").ok(),
            source: ".metadata.creationTimestamp".into(),
        }],
    }
}
