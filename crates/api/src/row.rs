//! What a resource is: a row. Routes, discovery, OpenAPI, storage keys, watches, tables and tests follow from it.

use std::{
    borrow::Cow,
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::Value;

use crate::{
    custom::{self, rules::Expressions},
    field::Errors,
    names,
    schema::{Schemas, TypeId},
};

/// Whether objects live in a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In a namespace.
    Namespaced,
    /// In the cluster.
    Cluster,
}

/// A column of a table, as `kubectl get` shows it.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// The heading.
    pub name: &'static str,
    /// The OpenAPI type: `string`, `integer`, `date`.
    pub ty: &'static str,
    /// 0 is always shown, 1 only with `-o wide`.
    pub priority: i32,
}

/// A column that is always shown.
pub const fn col(name: &'static str, ty: &'static str) -> Column {
    Column { name, ty, priority: 0 }
}

/// A column of `-o wide`.
pub const fn wide(name: &'static str, ty: &'static str) -> Column {
    Column { name, ty, priority: 1 }
}

/// Of how many paths [`Row::seen`] consists at most.
pub const MOST_SEEN: usize = 64;

/// Makes the cells of one object, without the first one (the name), in the order of the columns.
pub type Cells = fn(&Value, Timestamp) -> Vec<Value>;

/// What a validation may look at.
pub struct Validation<'a> {
    /// The object after defaults.
    pub new: &'a Value,
    /// The object before an update; `None` on create.
    pub old: Option<&'a Value>,
    /// The subresource that is written, empty for the object itself.
    pub subresource: &'a str,
}

/// A special verb of a resource, beyond reading and writing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subresource {
    /// `/status`: get, update, patch of the status alone.
    Status,
    /// `/scale`: the replica count as an `autoscaling/v1` Scale.
    Scale,
    /// `/finalize` of a namespace.
    Finalize,
    /// `/binding` of a pod.
    Binding,
    /// `/eviction` of a pod.
    Eviction,
    /// `/log` of a pod.
    Log,
    /// `/exec` in a pod.
    Exec,
    /// `/attach` to a pod.
    Attach,
    /// `/portforward` to a pod.
    PortForward,
    /// `/proxy` of a pod, a Service or a node: what runs there answers. With the kind that its options have in discovery.
    Proxy(&'static str),
    /// `/ephemeralcontainers` of a pod.
    EphemeralContainers,
    /// `/resize` of a pod.
    Resize,
    /// `/token` of a service account.
    Token,
    /// `/approval` of a certificate signing request.
    Approval,
}

impl Subresource {
    /// The last segment of its URL.
    pub fn name(self) -> &'static str {
        match self {
            Subresource::Status => "status",
            Subresource::Scale => "scale",
            Subresource::Finalize => "finalize",
            Subresource::Binding => "binding",
            Subresource::Eviction => "eviction",
            Subresource::Log => "log",
            Subresource::Exec => "exec",
            Subresource::Attach => "attach",
            Subresource::PortForward => "portforward",
            Subresource::Proxy(_) => "proxy",
            Subresource::EphemeralContainers => "ephemeralcontainers",
            Subresource::Resize => "resize",
            Subresource::Token => "token",
            Subresource::Approval => "approval",
        }
    }

    /// Its verbs and the kind it takes (group, version, kind) where that is not the resource's own.
    pub fn discovery(self) -> (&'static [&'static str], Option<(&'static str, &'static str, &'static str)>) {
        match self {
            Subresource::Status | Subresource::EphemeralContainers | Subresource::Resize | Subresource::Approval => {
                (&["get", "patch", "update"], None)
            }
            Subresource::Scale => (&["get", "patch", "update"], Some(("autoscaling", "v1", "Scale"))),
            Subresource::Finalize => (&["update"], None),
            Subresource::Binding => (&["create"], Some(("", "v1", "Binding"))),
            Subresource::Eviction => (&["create"], Some(("policy", "v1", "Eviction"))),
            Subresource::Log => (&["get"], None),
            Subresource::Exec => (&["create", "get"], Some(("", "v1", "PodExecOptions"))),
            Subresource::Attach => (&["create", "get"], Some(("", "v1", "PodAttachOptions"))),
            Subresource::PortForward => (&["create", "get"], Some(("", "v1", "PodPortForwardOptions"))),
            Subresource::Proxy(kind) => (&["create", "delete", "get", "patch", "update"], Some(("", "v1", kind))),
            Subresource::Token => (&["create"], Some(("authentication.k8s.io", "v1", "TokenRequest"))),
        }
    }
}

/// How the outside form of another version relates to the stored one.
#[derive(Clone, Copy)]
pub struct Conversion {
    /// The name of the type in this version.
    pub type_name: &'static str,
    /// Registers this version's schema.
    pub schema: fn(&mut SchemaGenerator),
    /// From this version to the stored one.
    pub to_stored: fn(&mut Value),
    /// From the stored version to this one.
    pub from_stored: fn(&mut Value),
}

/// A further version, or group and version, under which a resource is served.
#[derive(Clone, Copy)]
pub struct Alias {
    /// The group.
    pub group: &'static str,
    /// The version.
    pub version: &'static str,
    /// How it relates to the stored version.
    pub conversion: Conversion,
    /// Says what is wrong, beyond what the row says, if an object is written under this name. It is in its stored form.
    pub validate: fn(&Validation<'_>, &mut Errors),
}

/// A resource.
#[derive(Clone)]
pub struct Row {
    /// The API group, empty for the core.
    pub group: &'static str,
    /// The version that is stored and preferred.
    pub version: &'static str,
    /// The kind.
    pub kind: &'static str,
    /// The plural, as in URLs and storage keys.
    pub plural: &'static str,
    /// The singular.
    pub singular: &'static str,
    /// Abbreviations for kubectl.
    pub short_names: &'static [&'static str],
    /// Groupings such as `all`.
    pub categories: &'static [&'static str],
    /// Where objects live.
    pub scope: Scope,
    /// The special verbs.
    pub subresources: &'static [Subresource],
    /// Other groups and versions it is served under.
    pub aliases: &'static [Alias],
    /// False for reviews and other objects that are answered but never stored: only `create` is served.
    pub stored: bool,
    /// The full name of the type.
    pub type_name: &'static str,
    /// Registers its schema.
    pub schema: fn(&mut SchemaGenerator),
    /// What a name may look like.
    pub name: fn(&str) -> Result<(), String>,
    /// Columns after the name.
    pub columns: &'static [Column],
    /// Their cells.
    pub cells: Cells,
    /// What cells look at, [`MOST_SEEN`] at most: names with dots between them, which lead into the elements of lists as into
    /// objects. A table reads nothing else. If nothing is said, it reads everything but `managedFields`.
    pub seen: &'static [&'static str],
    /// Fills in what was left out.
    pub defaults: fn(&mut Value),
    /// Says everything that is wrong.
    pub validate: fn(&Validation<'_>, &mut Errors),
    /// Fields that a field selector may name, besides `metadata.name` and `metadata.namespace`.
    pub selectable: &'static [&'static str],
    /// Resets what a client may not set on create (by default the status of a resource that has the subresource).
    pub prepare_create: fn(&mut Value),
    /// Carries over what a client may not change on update.
    pub prepare_update: fn(&mut Value, &Value),
    /// The same for an update of the status.
    pub prepare_status: fn(&mut Value, &Value),
    /// Whether a change of `spec` raises `metadata.generation`.
    pub generation: bool,
    /// Set for a custom resource: what its schema says takes the place of the hooks above.
    pub custom: Option<Arc<custom::Version>>,
}

impl Row {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        api_version(self.group, self.version)
    }

    /// `pods` or `deployments.apps`.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// The prefix of all its keys in the store.
    pub fn prefix(&self) -> String {
        format!("/registry/{}/", self.storage_name())
    }

    /// Upstream stores some resources under a historic name, and custom ones under their group as well.
    fn storage_name(&self) -> Cow<'static, str> {
        match (self.group, self.plural) {
            ("", "services") => "services/specs".into(),
            ("", "endpoints") => "services/endpoints".into(),
            ("", "nodes") => "minions".into(),
            (group, plural) if self.custom.is_some() => format!("{group}/{plural}").into(),
            (_, plural) => plural.into(),
        }
    }

    /// Whether it is this resource of the core group.
    pub fn is_core(&self, plural: &str) -> bool {
        self.group.is_empty() && self.plural == plural
    }

    /// The kind of its lists.
    pub fn list_kind(&self) -> String {
        match &self.custom {
            Some(custom) => custom.definition.list_kind.to_owned(),
            None => format!("{}List", self.kind),
        }
    }

    /// Fills in what was left out.
    pub fn fill_in(&self, object: &mut Value) {
        match &self.custom {
            Some(custom) => custom.default(object),
            None => (self.defaults)(object),
        }
    }

    /// Says everything that is wrong, beyond the metadata.
    pub fn check(&self, validation: &Validation<'_>, errors: &mut Errors) {
        match &self.custom {
            Some(custom) => custom.validate(validation.new, validation.old, &Expressions::default(), errors),
            None => (self.validate)(validation, errors),
        }
    }

    /// The cells of an object after the first one.
    pub fn row_cells(&self, object: &Value, now: Timestamp) -> Vec<Value> {
        match &self.custom {
            Some(custom) => custom.cells(object, now),
            None => (self.cells)(object, now),
        }
    }

    /// The key of an object.
    pub fn key(&self, namespace: &str, name: &str) -> String {
        match self.scope {
            Scope::Namespaced => format!("/registry/{}/{namespace}/{name}", self.storage_name()),
            Scope::Cluster => format!("/registry/{}/{name}", self.storage_name()),
        }
    }

    /// Whether it has this special verb.
    pub fn has(&self, subresource: Subresource) -> bool {
        self.subresources.contains(&subresource)
    }

    /// The type in `schemas`.
    pub fn ty(&self, schemas: &Schemas) -> Option<TypeId> {
        schemas.by_name(self.type_name)
    }
}

/// `v1` or `apps/v1`.
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

fn nothing(_: &mut Value) {}
fn unchanged(_: &mut Value, _: &Value) {}
pub(crate) fn valid(_: &Validation<'_>, _: &mut Errors) {}

const AGE: &[Column] = &[col("Age", "date")];

/// Says of a `k8s-openapi` scope which of ours it is.
pub trait ScopeOf {
    /// Ours.
    const SCOPE: Scope;
}

impl ScopeOf for k8s_openapi::NamespaceResourceScope {
    const SCOPE: Scope = Scope::Namespaced;
}

impl ScopeOf for k8s_openapi::ClusterResourceScope {
    const SCOPE: Scope = Scope::Cluster;
}

/// Registers the schema of `T`.
pub fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) {
    generator.subschema_for::<T>();
}

/// The full name of the type `T`.
pub fn name_of<T: JsonSchema>() -> &'static str {
    match T::schema_name() {
        Cow::Borrowed(name) => name,
        Cow::Owned(name) => name.leak(),
    }
}

/// A row with what most resources have: the name is a subdomain, one column says the age.
pub fn row<T>() -> Row
where
    T: k8s_openapi::Resource + JsonSchema,
    T::Scope: ScopeOf,
{
    Row {
        group: T::GROUP,
        version: T::VERSION,
        kind: T::KIND,
        plural: T::URL_PATH_SEGMENT,
        // Rows are made once for the life of the process.
        singular: T::KIND.to_lowercase().leak(),
        scope: T::Scope::SCOPE,
        type_name: name_of::<T>(),
        schema: schema_of::<T>,
        columns: AGE,
        cells: |object, now| vec![crate::cell::age(object, now)],
        ..minimal()
    }
}

/// Names of custom resources live as long as the process, like those of built-in ones: each is kept once, however often
/// definitions come, change and go.
pub fn intern(text: &str) -> &'static str {
    static NAMES: Mutex<Option<HashSet<&'static str>>> = Mutex::new(None);
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    let names = names.get_or_insert_default();
    match names.get(text) {
        Some(known) => known,
        None => {
            let kept: &'static str = text.to_owned().leak();
            names.insert(kept);
            kept
        }
    }
}

/// The same for lists of names.
pub fn intern_list<'a>(texts: impl Iterator<Item = &'a str>) -> &'static [&'static str] {
    static LISTS: Mutex<Option<HashSet<&'static [&'static str]>>> = Mutex::new(None);
    let list: Vec<&'static str> = texts.map(intern).collect();
    let mut lists = LISTS.lock().unwrap_or_else(PoisonError::into_inner);
    let lists = lists.get_or_insert_default();
    match lists.get(&*list) {
        Some(known) => known,
        None => {
            let kept: &'static [&'static str] = list.leak();
            lists.insert(kept);
            kept
        }
    }
}

fn drop_status(row: &Row, object: &mut Value) {
    if row.has(Subresource::Status)
        && let Some(object) = object.as_object_mut()
    {
        object.remove("status");
    }
}

impl Row {
    /// Resets what a client may not set on create.
    pub fn prepare_new(&self, object: &mut Value) {
        match &self.custom {
            Some(_) => drop_status(self, object),
            None => (self.prepare_create)(object),
        }
    }
}

/// A row without anything of its own.
pub(crate) fn minimal() -> Row {
    Row {
        group: "",
        version: "",
        kind: "",
        plural: "",
        singular: "",
        short_names: &[],
        categories: &[],
        scope: Scope::Namespaced,
        subresources: &[],
        aliases: &[],
        stored: true,
        seen: &[],
        type_name: "",
        schema: |_| {},
        name: names::dns_subdomain,
        columns: &[],
        cells: |_, _| Vec::new(),
        defaults: nothing,
        validate: valid,
        selectable: &[],
        prepare_create: nothing,
        prepare_update: unchanged,
        prepare_status: unchanged,
        generation: false,
        custom: None,
    }
}
