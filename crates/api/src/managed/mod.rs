//! Who manages which field: server-side apply and `metadata.managedFields`
//! (<https://kubernetes.io/docs/reference/using-api/server-side-apply/>, KEP-555).
//!
//! Every writer's fields are recorded. Who applies a configuration owns what it says; what it no longer says and nobody
//! else owns is removed. Pure: objects, types and the records give objects and records.

use serde_json::{Map, Value};

use crate::schema::{Schemas, TypeId};

mod set;
mod typed;

pub use set::{BadSet, Element, FieldSet, Node};
use typed::{At, Typed};
pub use typed::{Changes, TypedError};

/// More records of updates than this are not kept; the oldest become one.
const UPDATERS: usize = 10;
/// Whose those are then.
const ANCIENT: &str = "ancient-changes";
/// Who owns what was there before anything was recorded.
const BEFORE: &str = "before-first-apply";

/// What a writer did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// Applied a configuration.
    Apply,
    /// Anything else.
    Update,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        }
    }
}

/// Who wrote, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manager {
    /// The name that it gave itself.
    pub name: String,
    /// What it did.
    pub operation: Operation,
    /// The version of the object that it wrote.
    pub api_version: String,
    /// The part that it wrote; empty for the whole.
    pub subresource: String,
}

impl Manager {
    /// Appliers remain the same under every version.
    fn is(&self, other: &Manager) -> bool {
        self.name == other.name
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == Operation::Apply || self.api_version == other.api_version)
    }

    /// As upstream names it in messages.
    fn describe(&self) -> String {
        let mut text = format!("{:?}", self.name);
        if !self.subresource.is_empty() {
            text += &format!(" with subresource {:?}", self.subresource);
        }
        if self.operation == Operation::Update {
            text += &format!(" using {}", self.api_version);
        }
        text
    }
}

/// What one manager owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who.
    pub manager: Manager,
    /// Since when, as in the object; may be empty.
    pub time: String,
    /// What.
    pub fields: FieldSet,
}

/// The records of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Managed(Vec<Record>);

/// A field that somebody else manages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Who, described.
    pub manager: String,
    /// The field.
    pub field: String,
}

/// Why a configuration is not applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// Others manage fields that it would change.
    #[error("{}", describe(.0))]
    Conflicts(Vec<Conflict>),
    /// It is not what its type says.
    #[error(transparent)]
    Typed(#[from] TypedError),
}

/// As upstream puts it.
fn describe(conflicts: &[Conflict]) -> String {
    if let [conflict] = conflicts {
        return format!("Apply failed with 1 conflict: conflict with {}: {}", conflict.manager, conflict.field);
    }
    let mut managers: Vec<&str> = conflicts.iter().map(|c| &*c.manager).collect();
    managers.sort_unstable();
    managers.dedup();
    let mut lines = Vec::new();
    for manager in managers {
        lines.push(format!("conflicts with {manager}:"));
        let fields = conflicts.iter().filter(|c| c.manager == manager);
        lines.extend(fields.map(|c| format!("- {}", c.field)));
    }
    format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
}

/// What is wrong with the `managedFields` that a client sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", self.field(), self.message())]
pub struct BadRecord {
    index: usize,
    field: &'static str,
    value: String,
    why: String,
}

impl BadRecord {
    /// The path of the field.
    pub fn field(&self) -> String {
        format!("metadata.managedFields[{}].{}", self.index, self.field)
    }

    /// What is wrong with it.
    pub fn message(&self) -> String {
        format!("Invalid value: {}: {}", self.value, self.why)
    }
}

impl Managed {
    /// Reads `metadata.managedFields`. A list of one empty record stands for none.
    pub fn read(value: &Value) -> Result<Managed, BadRecord> {
        let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
        if matches!(list, [Value::Object(one)] if one.is_empty()) {
            return Ok(Managed::default());
        }
        let mut records = Vec::with_capacity(list.len());
        for (index, record) in list.iter().enumerate() {
            let text = |field: &str| record[field].as_str().unwrap_or_default().to_owned();
            let bad = |field, why: &dyn std::fmt::Display| BadRecord {
                index,
                field,
                value: record[field].to_string(),
                why: why.to_string(),
            };
            let operation = match &*text("operation") {
                "Apply" => Operation::Apply,
                "Update" => Operation::Update,
                _ => return Err(bad("operation", &"must be `Apply` or `Update`")),
            };
            if !matches!(&*text("fieldsType"), "FieldsV1") {
                return Err(bad("fieldsType", &"must be `FieldsV1`"));
            }
            if text("manager").len() > 128 {
                return Err(bad("manager", &"must be at most 128 bytes"));
            }
            let fields = FieldSet::read(&record["fieldsV1"]).map_err(|e| bad("fieldsV1", &e))?;
            records.push(Record {
                manager: Manager {
                    name: text("manager"),
                    operation,
                    api_version: text("apiVersion"),
                    subresource: text("subresource"),
                },
                time: text("time"),
                fields,
            });
        }
        Ok(Managed(records))
    }

    /// Writes `metadata.managedFields`; nothing if nobody owns anything.
    pub fn write(&self) -> Option<Value> {
        let mut records: Vec<&Record> = self.0.iter().collect();
        records.sort_by(|a, b| {
            let key = |r: &Record| (r.manager.operation, r.time.clone(), r.manager.name.clone());
            key(a).cmp(&key(b)).then_with(|| a.manager.subresource.cmp(&b.manager.subresource))
        });
        let write = |record: &&Record| {
            let manager = &record.manager;
            let mut map = Map::new();
            map.insert("manager".into(), manager.name.as_str().into());
            map.insert("operation".into(), manager.operation.name().into());
            map.insert("apiVersion".into(), manager.api_version.as_str().into());
            if !record.time.is_empty() {
                map.insert("time".into(), record.time.as_str().into());
            }
            map.insert("fieldsType".into(), "FieldsV1".into());
            map.insert("fieldsV1".into(), record.fields.write());
            if !manager.subresource.is_empty() {
                map.insert("subresource".into(), manager.subresource.as_str().into());
            }
            Value::Object(map)
        };
        (!records.is_empty()).then(|| records.iter().map(write).collect())
    }

    /// The records.
    pub fn records(&self) -> &[Record] {
        &self.0
    }

    fn of(&self, manager: &Manager) -> Option<&Record> {
        self.0.iter().find(|record| record.manager.is(manager))
    }

    /// Gives fields to a manager; with none, its record goes.
    fn set(&mut self, manager: &Manager, fields: FieldSet, now: &str) {
        let before = self.0.iter().position(|record| record.manager.is(manager));
        let record = Record { manager: manager.clone(), time: now.to_owned(), fields };
        match before {
            _ if record.fields.is_empty() => self.0.retain(|record| !record.manager.is(manager)),
            Some(at) => self.0[at] = record,
            None => self.0.push(record),
        }
    }

    /// Takes from everybody but one what somebody changed or removed.
    fn take(&mut self, from: impl Fn(&Manager) -> bool, taken: &FieldSet) {
        for record in self.0.iter_mut().filter(|record| from(&record.manager)) {
            record.fields = std::mem::take(&mut record.fields).difference(taken);
        }
        self.0.retain(|record| !record.fields.is_empty());
    }

    /// Makes one of the oldest records of updates when there are too many.
    fn cap(&mut self) {
        let updates = |records: &[Record]| -> Vec<usize> {
            let of = |(at, record): (usize, &Record)| (record.manager.operation == Operation::Update).then_some(at);
            records.iter().enumerate().filter_map(of).collect()
        };
        while updates(&self.0).len() > UPDATERS {
            let mut places = updates(&self.0);
            places.sort_by_key(|at| {
                let record = &self.0[*at];
                (record.manager.name != ANCIENT, record.time.clone())
            });
            let api_version = self.0[places[0]].manager.api_version.clone();
            let other = places[1..].iter().copied().find(|at| self.0[*at].manager.api_version == api_version);
            // Fields of different versions cannot be one record.
            let Some(other) = other else { return };
            let taken = self.0[other].clone();
            let into = &mut self.0[places[0]];
            into.manager.name = ANCIENT.to_owned();
            into.manager.subresource = String::new();
            into.time = into.time.clone().max(taken.time);
            into.fields = std::mem::take(&mut into.fields).union(&taken.fields);
            self.0.remove(other);
        }
    }
}

/// The types of an object, and the parts of it that the write in question leaves alone (for example the status).
#[derive(Clone, Copy)]
pub struct Types<'a> {
    /// All types.
    pub schemas: &'a Schemas,
    /// That of the object.
    pub ty: TypeId,
    /// Paths that do not count.
    pub without: &'a [&'a [&'a str]],
    /// Whether null is a value: fields of custom resources may be nullable. Elsewhere it is nothing.
    pub nulls: bool,
}

impl Types<'_> {
    fn at(&self) -> At<'_> {
        At { ty: self.ty, field: None }
    }

    fn own(&self, mut set: FieldSet) -> FieldSet {
        typed::strip(&mut set);
        self.without.iter().for_each(|path| set.take(path));
        set
    }

    /// What is different between two objects.
    pub fn changes(&self, old: &Value, new: &Value) -> Changes {
        let [added, modified, removed] =
            Typed(self.schemas).changes(self.at(), Some(old), Some(new)).map(|node| node.below);
        Changes { added: self.own(added), modified: self.own(modified), removed: self.own(removed) }
    }

    /// The fields of a configuration.
    pub fn fields(&self, value: &Value) -> Result<FieldSet, TypedError> {
        Ok(self.own(Typed(self.schemas).fields(self.at(), value, "")?.below))
    }
}

/// Records a write that was not an apply. `old` is an empty object for one that is new.
pub fn update(
    types: Types<'_>,
    old: &Value,
    new: &Value,
    mut managed: Managed,
    manager: &Manager,
    now: &str,
) -> Managed {
    let changes = types.changes(old, new);
    let touched = changes.added.clone().union(&changes.modified);
    managed.take(|other| !other.is(manager), &touched);
    managed.take(|_| true, &changes.removed);
    if !touched.is_empty() {
        let fields = managed.of(manager).map(|record| record.fields.clone()).unwrap_or_default();
        managed.set(manager, fields.union(&touched), now);
    }
    managed.cap();
    managed
}

/// Applies a configuration to what is there, or to nothing.
pub fn apply(
    types: Types<'_>,
    live: Option<&Value>,
    config: &Value,
    mut managed: Managed,
    manager: &Manager,
    force: bool,
    now: &str,
) -> Result<(Value, Managed), ApplyError> {
    let typed = Typed(types.schemas);
    let fields = types.fields(config)?;
    let nothing = typed::empty();
    let old = live.unwrap_or(&nothing);
    // What was there before anything was recorded belongs to somebody, so that it is not overwritten unasked.
    if let Some(live) = live
        && managed.0.is_empty()
    {
        let before = Manager {
            name: BEFORE.to_owned(),
            operation: Operation::Update,
            api_version: manager.api_version.clone(),
            subresource: String::new(),
        };
        // Everything in it is new to an empty object.
        let all = types.changes(&nothing, live).added;
        managed.set(&before, all, now);
    }
    let last = managed.of(manager).map(|record| record.fields.clone()).unwrap_or_default();
    let mut new = old.clone();
    typed.merge(types.at(), &mut new, config.clone());
    if !types.nulls {
        typed::without_nulls(&mut new);
    }
    let before = managed.of(manager).cloned();
    managed.set(manager, fields.clone(), now);
    let owned = managed.0.iter().fold(FieldSet::default(), |all, record| all.union(&record.fields));
    typed.prune(types.at(), &mut new, &last, &owned);

    let changes = types.changes(old, &new);
    let touched = changes.added.clone().union(&changes.modified);
    let mut conflicts = Vec::new();
    for record in managed.0.iter().filter(|record| !record.manager.is(manager)) {
        let paths = record.fields.intersection(&touched).paths();
        let describe = |field| Conflict { manager: record.manager.describe(), field };
        conflicts.extend(paths.into_iter().map(describe));
    }
    if !force && !conflicts.is_empty() {
        return Err(ApplyError::Conflicts(conflicts));
    }
    managed.take(|other| !other.is(manager), &touched);
    managed.take(|_| true, &changes.removed);
    // Who says the same again has done nothing.
    if let Some(before) = before.filter(|before| before.fields == fields)
        && let Some(record) = managed.0.iter_mut().find(|record| record.manager.is(manager))
        && changes == Changes::default()
    {
        record.time = before.time;
    }
    Ok((new, managed))
}

/// Lays a configuration over an object without asking whose fields it changes: what a policy says holds.
///
/// # Errors
/// If the configuration is not what its type says.
pub fn overlay(types: Types<'_>, live: &mut Value, config: Value) -> Result<(), TypedError> {
    types.fields(&config)?;
    Typed(types.schemas).merge(types.at(), live, config);
    Ok(())
}

/// The configuration that an annotation of `kubectl apply` holds: what those have applied who did so on the client.
pub const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Whether all conflicts are about fields that were applied on the client before, so that one may change over without
/// insisting
/// (<https://kubernetes.io/docs/reference/using-api/server-side-apply/#upgrading-from-client-side-apply-to-server-side-apply>).
pub fn changes_over(types: Types<'_>, live: &Value, conflicts: &[Conflict]) -> bool {
    let text = live["metadata"]["annotations"][LAST_APPLIED].as_str().unwrap_or_default();
    let last = serde_json::from_str::<Value>(text).ok();
    let Some(fields) = last.and_then(|last| types.fields(&last).ok()) else { return false };
    let applied = fields.paths();
    conflicts.iter().all(|conflict| applied.contains(&conflict.field))
}

#[cfg(test)]
mod tests;
