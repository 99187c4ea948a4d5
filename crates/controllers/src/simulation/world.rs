//! The objects of the API server in memory. Defaults, what a client may not set, and validation are those of the real one: they
//! come from the table of resources.

use std::{collections::BTreeMap, fmt::Write as _, sync::LazyLock};

use jiff::Timestamp;
use rand::{Rng, rngs::StdRng};
use seawall_api::{
    field::Errors,
    resources::{self, validate_metadata},
    row::{Row, Scope, Subresource, Validation},
};
use serde_json::{Value, json};

static ROWS: LazyLock<Vec<Row>> = LazyLock::new(resources::all);

/// All resources.
pub(super) fn rows() -> &'static [Row] {
    &ROWS
}

/// The row of a resource.
pub(super) fn row(group: &str, plural: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.group == group && row.plural == plural)
}

/// What becomes of the requests of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// They are answered.
    Well,
    /// One of the writes fails: after so many others; carried out all the same, or not; and the process dies, or goes on.
    Fails { after: u32, carried_out: bool, dies: bool },
}

impl Fate {
    pub fn random(rng: &mut StdRng) -> Fate {
        match rng.random_range(0..3) {
            0 => Fate::Fails { after: rng.random_range(0..6), carried_out: rng.random(), dies: rng.random() },
            _ => Fate::Well,
        }
    }
}

/// Something that has changed.
pub(crate) struct Change {
    pub resource: &'static str,
    pub object: Value,
    pub gone: bool,
}

/// Why a request is refused: the HTTP status, the reason, and a message.
pub(super) type Refusal = (u16, &'static str, String);

/// Resource, namespace, name.
pub(crate) type Id = (&'static str, String, String);

/// All that is.
pub(crate) struct World {
    pub now: Timestamp,
    /// Every change since the beginning. The length is the revision.
    pub log: Vec<Change>,
    pub fate: Fate,
    /// The process has died in this pass: nothing of it reaches the world any more.
    pub crashed: bool,
    /// The work that all running pods share, in thousandths of a CPU.
    pub load: i64,
    objects: BTreeMap<Id, Value>,
    made: u64,
}

pub(super) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value["metadata"][key].as_str().unwrap_or_default()
}

impl World {
    pub fn new() -> World {
        World {
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
            log: Vec::new(),
            fate: Fate::Well,
            crashed: false,
            load: 0,
            objects: BTreeMap::new(),
            made: 0,
        }
    }

    pub fn get(&self, resource: &str, name: &str) -> Option<&Value> {
        self.objects.iter().find(|((r, _, n), _)| *r == resource && n == name).map(|(_, object)| object)
    }

    /// All objects of a resource.
    pub fn all(&self, resource: &str) -> Vec<Value> {
        self.of(resource).cloned().collect()
    }

    /// All objects of a resource.
    pub fn of(&self, resource: &str) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(move |((r, ..), _)| *r == resource).map(|(_, object)| object)
    }

    pub(super) fn ids(&self, resource: &str) -> Vec<Id> {
        self.objects.keys().filter(|(r, ..)| *r == resource).cloned().collect()
    }

    pub(super) fn find(&self, id: &Id) -> Option<&Value> {
        self.objects.get(id)
    }

    /// Whether a request reaches its end: nothing if all is well, or whether it is carried out although it fails.
    pub(super) fn strike(&mut self, writes: bool) -> Option<bool> {
        if self.crashed {
            return Some(false);
        }
        let Fate::Fails { after, carried_out, dies } = self.fate else { return None };
        if !writes {
            return None;
        }
        if after > 0 {
            self.fate = Fate::Fails { after: after - 1, carried_out, dies };
            return None;
        }
        self.fate = Fate::Well;
        self.crashed = dies;
        Some(carried_out)
    }

    fn store(&mut self, id: Id, mut object: Value) -> Value {
        object["metadata"]["resourceVersion"] = (self.log.len() + 1).to_string().into();
        self.log.push(Change { resource: id.0, object: object.clone(), gone: false });
        self.objects.insert(id, object.clone());
        object
    }

    pub fn remove(&mut self, id: &Id) {
        if let Some(mut object) = self.objects.remove(id) {
            object["metadata"]["resourceVersion"] = (self.log.len() + 1).to_string().into();
            self.log.push(Change { resource: id.0, object, gone: true });
        }
    }

    /// Changes an object as the rest of the cluster does.
    pub fn edit(&mut self, resource: &str, name: &str, change: impl FnOnce(&mut Value)) {
        let Some(id) = self.objects.keys().find(|(r, _, n)| *r == resource && n == name).cloned() else { return };
        let mut object = self.objects[&id].clone();
        change(&mut object);
        if object["spec"] != self.objects[&id]["spec"] {
            let generation = object["metadata"]["generation"].as_i64().unwrap_or(0);
            object["metadata"]["generation"] = (generation + 1).into();
        }
        self.store(id, object);
    }

    fn check(&self, row: &Row, new: &Value, old: Option<&Value>, subresource: &str) {
        let mut errors = Errors::default();
        validate_metadata(row, new, old, &mut errors);
        row.check(&Validation { new, old, subresource }, &mut errors);
        assert!(errors.is_empty(), "the API refuses this {}: {:?}\n{new}", row.kind, errors.0);
    }

    /// Creates an object by its `apiVersion` and `kind`.
    pub fn put_new(&mut self, object: Value) -> Value {
        let version = object["apiVersion"].as_str().unwrap();
        let group = version.split_once('/').map_or("", |(group, _)| group);
        let row = ROWS.iter().find(|row| row.group == group && object["kind"] == row.kind).unwrap();
        let namespace = text(&object, "namespace").to_owned();
        self.create(row, &namespace, object).unwrap()
    }

    pub(super) fn create(&mut self, row: &'static Row, namespace: &str, mut object: Value) -> Result<Value, Refusal> {
        self.made += 1;
        let meta = &mut object["metadata"];
        if let (None, Some(prefix)) = (meta["name"].as_str(), meta["generateName"].as_str()) {
            meta["name"] = format!("{prefix}{:05}", self.made).into();
        }
        meta["uid"] = format!("uid-{}", self.made).into();
        meta["creationTimestamp"] = self.now.to_string().into();
        if row.scope == Scope::Namespaced {
            meta["namespace"] = namespace.into();
        }
        if row.generation {
            meta["generation"] = 1.into();
        }
        object["apiVersion"] = row.api_version().into();
        object["kind"] = row.kind.into();
        row.fill_in(&mut object);
        row.prepare_new(&mut object);
        if row.plural == "pods" {
            object["status"] = json!({"phase": "Pending"});
        }
        self.check(row, &object, None, "");
        let id = (row.plural, namespace.to_owned(), text(&object, "name").to_owned());
        if self.objects.contains_key(&id) {
            return Err((409, "AlreadyExists", format!("{} {:?} already exists", row.plural, id.2)));
        }
        Ok(self.store(id, object))
    }

    /// Replaces an object, or its status alone.
    pub(super) fn update(
        &mut self,
        row: &'static Row,
        id: &Id,
        subresource: &str,
        change: impl FnOnce(Value) -> Value,
    ) -> Result<Value, Refusal> {
        let old = self.objects.get(id).cloned().ok_or_else(|| not_found(id))?;
        let mut new = change(old.clone());
        let conflict = |key: &str| !text(&new, key).is_empty() && text(&new, key) != text(&old, key);
        if conflict("resourceVersion") || conflict("uid") {
            return Err((409, "Conflict", format!("{} {:?} has been modified", id.0, id.2)));
        }
        let keep = |from: &Value, to: &mut Value, key: &str| {
            to[key] = from[key].clone();
            if to[key].is_null() {
                to.as_object_mut().unwrap().remove(key);
            }
        };
        if subresource == "status" {
            let status = new;
            new = old.clone();
            keep(&status, &mut new, "status");
            (row.prepare_status)(&mut new, &old);
        } else {
            row.fill_in(&mut new);
            (row.prepare_update)(&mut new, &old);
            if row.has(Subresource::Status) {
                keep(&old, &mut new, "status");
            }
        }
        for key in ["resourceVersion", "uid", "creationTimestamp", "generation", "deletionTimestamp"] {
            keep(&old["metadata"], &mut new["metadata"], key);
        }
        self.check(row, &new, Some(&old), subresource);
        if new == old {
            return Ok(old);
        }
        if row.generation && new["spec"] != old["spec"] {
            new["metadata"]["generation"] = (old["metadata"]["generation"].as_i64().unwrap_or(0) + 1).into();
        }
        if is_over(&new) {
            // What is reported is what it became last.
            self.objects.insert(id.clone(), new.clone());
            self.remove(id);
            return Ok(new);
        }
        Ok(self.store(id.clone(), new))
    }

    /// Deletes an object, or begins with it.
    pub(super) fn delete(&mut self, id: &Id, options: &Value) -> Result<Value, Refusal> {
        let mut object = self.objects.get(id).cloned().ok_or_else(|| not_found(id))?;
        let wanted = &options["preconditions"]["uid"];
        if wanted.is_string() && wanted != &object["metadata"]["uid"] {
            return Err((409, "Conflict", "the UID in the precondition differs".into()));
        }
        let runs = id.0 == "pods" && object["spec"]["nodeName"].is_string() && !is_ended(&object);
        let grace = if runs { 30 } else { 0 };
        if object["metadata"]["deletionTimestamp"].is_null() {
            object["metadata"]["deletionTimestamp"] = self.now.to_string().into();
            object["metadata"]["deletionGracePeriodSeconds"] = grace.into();
            if options["propagationPolicy"] == "Foreground" {
                let list = &mut object["metadata"]["finalizers"];
                let mut finalizers = list.as_array().cloned().unwrap_or_default();
                finalizers.push("foregroundDeletion".into());
                *list = finalizers.into();
            }
            if is_over(&object) {
                // What is answered is what it was.
                let was = self.objects[id].clone();
                self.remove(id);
                return Ok(was);
            }
            object = self.store(id.clone(), object);
        }
        Ok(object)
    }

    /// Deletes what has owners of which none is there any more, and takes away what waited for that.
    pub fn collect_garbage(&mut self) {
        let there: Vec<String> = self.objects.values().map(|o| text(o, "uid").to_owned()).collect();
        let owners = |o: &Value| o["metadata"]["ownerReferences"].as_array().cloned().unwrap_or_default();
        let waits = |o: &Value| {
            let finalizers = o["metadata"]["finalizers"].as_array();
            finalizers.is_some_and(|list| list.iter().any(|f| f == "foregroundDeletion"))
        };
        let ids: Vec<Id> = self.objects.keys().cloned().collect();
        for id in ids {
            let Some(object) = self.objects.get(&id).cloned() else { continue };
            let owners_of = owners(&object);
            let gone = |uid: &Value| {
                let owner = self.objects.values().find(|o| &o["metadata"]["uid"] == uid);
                !there.iter().any(|there| uid == there) || owner.is_some_and(waits)
            };
            if !owners_of.is_empty() && owners_of.iter().all(|owner| gone(&owner["uid"])) {
                let _ = self.delete(&id, &json!({}));
            }
            if waits(&object)
                && !self
                    .objects
                    .values()
                    .any(|o| owners(o).iter().any(|owner| owner["uid"] == object["metadata"]["uid"]))
            {
                let mut object = object;
                let finalizers = object["metadata"]["finalizers"].as_array_mut().unwrap();
                finalizers.retain(|f| f != "foregroundDeletion");
                if is_over(&object) { self.remove(&id) } else { drop(self.store(id, object)) }
            }
        }
    }

    /// What `metrics.k8s.io` says: the load is shared by the pods that run.
    pub(super) fn metrics(&self) -> Value {
        let running: Vec<&Value> = self.of("pods").filter(|pod| pod["status"]["phase"] == "Running").collect();
        let each = self.load / running.len().max(1) as i64;
        let items: Vec<Value> = running
            .iter()
            .map(|pod| {
                json!({"metadata": {"name": text(pod, "name")}, "timestamp": self.now.to_string(), "window": "15s",
                    "containers": [{"name": "c", "usage": {"cpu": format!("{each}m")}}]})
            })
            .collect();
        json!({"kind": "PodMetricsList", "items": items})
    }

    /// What there is, for whoever has to find out what went wrong.
    pub fn describe(&self) -> String {
        self.objects.values().fold(String::new(), |mut out, object| {
            let _ = writeln!(out, "{object}");
            out
        })
    }
}

pub(super) fn not_found(id: &Id) -> Refusal {
    (404, "NotFound", format!("{} {:?} not found", id.0, id.2))
}

pub(super) fn is_ended(pod: &Value) -> bool {
    pod["status"]["phase"] == "Succeeded" || pod["status"]["phase"] == "Failed"
}

/// Whether nothing holds an object any more that is being deleted.
pub(super) fn is_over(object: &Value) -> bool {
    let meta = &object["metadata"];
    meta["deletionTimestamp"].is_string()
        && meta["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && meta["finalizers"].as_array().is_none_or(Vec::is_empty)
}
