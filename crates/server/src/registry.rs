//! All resources that are served, and how a path finds its row.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use seawall_api::{
    Row, Subresource,
    custom::{self, names},
    resources,
    row::{Alias, api_version},
    schema::{Schemas, TypeId},
};
use serde_json::Value;
use tokio::sync::watch;

/// The number of a resource: its place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceId(pub usize);

/// A resource under one group and version.
#[derive(Clone)]
pub struct Served {
    /// Which resource.
    pub id: ResourceId,
    /// The row: that of the stored version of a built-in resource, that of this version of a custom one.
    pub row: Arc<Row>,
    /// Set if this is not the stored version.
    pub alias: Option<Alias>,
    /// The group in the URL.
    pub group: &'static str,
    /// The version in the URL.
    pub version: &'static str,
    /// The type in this version.
    pub ty: TypeId,
}

/// The table of resources with its indexes: those built in, which stay, and the custom ones, which come and go.
pub struct Registry {
    rows: Vec<Arc<Row>>,
    served: HashMap<String, Arc<Served>>,
    prefixes: HashMap<String, ResourceId>,
    /// The shapes of all built-in types.
    pub schemas: Arc<Schemas>,
    custom: ArcSwap<Custom>,
    changed: watch::Sender<u64>,
}

/// The custom resources at one moment.
#[derive(Clone, Default)]
pub struct Custom {
    /// How often the table has changed.
    pub generation: u64,
    /// By number, behind those of the built-in resources. One that is gone leaves its number to whoever comes back under
    /// its name, so that numbers mean the same for as long as the process runs.
    slots: Vec<Slot>,
    /// By the name of the definition.
    numbers: HashMap<String, usize>,
    served: HashMap<String, Arc<Served>>,
    prefixes: HashMap<String, ResourceId>,
}

#[derive(Clone, Default)]
struct Slot {
    /// That of the stored version.
    row: Option<Arc<Row>>,
    /// Those that are served, the preferred one first.
    served: Vec<Arc<Served>>,
}

/// What a definition did to the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Nothing.
    Nothing,
    /// A resource is there that was not.
    New(ResourceId),
    /// A resource is another than before.
    Row(ResourceId),
    /// It is gone.
    Gone(ResourceId),
}

/// A row that refers to something that does not exist: a mistake in the table.
#[derive(Debug, thiserror::Error)]
#[error("the resource {0} has no schema")]
pub struct NoSchema(String);

impl Registry {
    /// Reads the table.
    pub fn new() -> Result<Registry, NoSchema> {
        let rows: Vec<Arc<Row>> = resources::all().into_iter().map(Arc::new).collect();
        let schemas = Schemas::new(roots(&rows));
        let (mut served, mut prefixes) = (HashMap::new(), HashMap::new());
        for (index, row) in rows.iter().enumerate() {
            let id = ResourceId(index);
            let ty = row.ty(&schemas).ok_or_else(|| NoSchema(row.qualified()))?;
            let of = |group, version, ty, alias| Arc::new(Served { id, row: row.clone(), alias, group, version, ty });
            served.insert(place(row.group, row.version, row.plural), of(row.group, row.version, ty, None));
            for alias in row.aliases {
                let ty = schemas.by_name(alias.conversion.type_name).ok_or_else(|| NoSchema(row.qualified()))?;
                let entry = of(alias.group, alias.version, ty, Some(*alias));
                served.insert(place(alias.group, alias.version, row.plural), entry);
            }
            if row.stored {
                prefixes.insert(row.prefix(), id);
            }
        }
        Ok(Registry {
            rows,
            served,
            prefixes,
            schemas: Arc::new(schemas),
            custom: ArcSwap::default(),
            changed: watch::Sender::new(0),
        })
    }

    /// The custom resources as they are.
    pub fn custom(&self) -> Arc<Custom> {
        self.custom.load_full()
    }

    /// Tells when the table changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Takes in the definitions that have come or changed (with their objects) or gone (by name alone). Only the cache's
    /// writer calls this.
    pub fn define<'a>(&self, definitions: impl IntoIterator<Item = (&'a str, Option<&'a Value>)>) -> Vec<Changed> {
        let mut next = Custom::clone(&self.custom.load());
        let mut changes = Vec::new();
        for (name, definition) in definitions {
            let change = next.take_in(self.rows.len(), &self.schemas, name, definition);
            if change != Changed::Nothing {
                changes.push(change);
            }
        }
        if !changes.is_empty() {
            next.generation += 1;
            next.index(self.rows.len());
            let generation = next.generation;
            self.custom.store(Arc::new(next));
            self.changed.send_replace(generation);
        }
        changes
    }

    /// All built-in rows with their numbers.
    pub fn rows(&self) -> impl Iterator<Item = (ResourceId, &Arc<Row>)> {
        self.rows.iter().enumerate().map(|(index, row)| (ResourceId(index), row))
    }

    /// All rows that there are, with their numbers; of a custom resource that of the stored version.
    pub fn all_rows(&self) -> Vec<(ResourceId, Arc<Row>)> {
        let mut all: Vec<_> = self.rows().map(|(id, row)| (id, row.clone())).collect();
        let slots = self.custom.load_full();
        let custom = slots.slots.iter().enumerate();
        all.extend(custom.filter_map(|(at, slot)| Some((ResourceId(self.rows.len() + at), slot.row.clone()?))));
        all
    }

    /// How many numbers have been given.
    #[allow(clippy::len_without_is_empty, reason = "a table without rows does not occur")]
    pub fn len(&self) -> usize {
        self.rows.len() + self.custom.load().slots.len()
    }

    /// A row by number: of a custom resource that of the stored version, nothing if it is gone.
    pub fn row(&self, id: ResourceId) -> Option<Arc<Row>> {
        match self.rows.get(id.0) {
            Some(row) => Some(row.clone()),
            None => self.custom.load().slots.get(id.0 - self.rows.len())?.row.clone(),
        }
    }

    /// The resource under this group, version and plural.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Served>> {
        let place = place(group, version, plural);
        self.served.get(&place).cloned().or_else(|| self.custom.load().served.get(&place).cloned())
    }

    /// The row of a core or named built-in resource in its stored version.
    pub fn by_name(&self, group: &str, plural: &str) -> Option<(ResourceId, &Arc<Row>)> {
        self.rows().find(|(_, row)| row.group == group && row.plural == plural)
    }

    /// The resource that a key of the store belongs to.
    pub fn by_key(&self, key: &str) -> Option<ResourceId> {
        // `/registry/pods/…` or `/registry/services/specs/…`.
        let slashes: Vec<usize> = key.match_indices('/').map(|(i, _)| i).take(4).collect();
        let end = |n: usize| slashes.get(n).and_then(|end| self.prefixes.get(&key[..=*end]));
        let built_in = end(2).or_else(|| end(3)).copied();
        built_in.or_else(|| self.custom.load().prefixes.get(&key[..=*slashes.get(3)?]).copied())
    }

    /// The groups and versions in the order of discovery: core first, preferred versions first.
    pub fn group_versions(&self) -> Vec<(&'static str, &'static str)> {
        let mut all: Vec<(&'static str, &'static str)> = Vec::new();
        let mut add = |gv| {
            if !all.contains(&gv) {
                all.push(gv);
            }
        };
        for row in &self.rows {
            add((row.group, row.version));
        }
        for row in &self.rows {
            row.aliases.iter().for_each(|alias| add((alias.group, alias.version)));
        }
        let custom = self.custom.load();
        let mut own: Vec<(&'static str, &'static str)> =
            custom.slots.iter().flat_map(|slot| &slot.served).map(|served| (served.group, served.version)).collect();
        own.sort_by_key(|(group, version)| (*group, std::cmp::Reverse(names::priority(version))));
        own.into_iter().for_each(add);
        all
    }

    /// What is served under one group and version, in order.
    pub fn served_in(&self, group: &str, version: &str) -> Vec<Arc<Served>> {
        let rows = self.rows.iter();
        let built_in = rows
            .filter_map(|row| self.served.get(&place(group, version, row.plural)).map(|s| (s, row)))
            .filter(|(s, row)| Arc::ptr_eq(&s.row, row))
            .map(|(served, _)| served.clone());
        let custom = self.custom.load_full();
        let mut own: Vec<Arc<Served>> = custom
            .slots
            .iter()
            .flat_map(|slot| &slot.served)
            .filter(|served| served.group == group && served.version == version)
            .cloned()
            .collect();
        own.sort_by_key(|served| served.row.plural);
        built_in.chain(own).collect()
    }
}

impl Custom {
    fn take_in(&mut self, first: usize, base: &Arc<Schemas>, name: &str, definition: Option<&Value>) -> Changed {
        let number = self.numbers.get(name).copied();
        let before = number.and_then(|at| self.slots[at].row.clone());
        let shared = before.as_ref().and_then(|row| row.custom.as_ref()).map(|version| &version.definition);
        let source = definition.and_then(custom::source);
        if let (Some(shared), Some(definition)) = (shared, definition)
            && source.as_ref() == Some(&shared.source)
        {
            shared.set_terminating(definition["metadata"]["deletionTimestamp"].is_string());
            return Changed::Nothing;
        }
        let rows = source.and(definition).and_then(|definition| custom::rows(definition, base));
        match (rows, number, before) {
            (None, Some(at), Some(_)) => {
                self.slots[at] = Slot::default();
                Changed::Gone(ResourceId(first + at))
            }
            (None, ..) => Changed::Nothing,
            (Some(rows), number, before) => {
                let at = number.unwrap_or_else(|| {
                    self.slots.push(Slot::default());
                    self.numbers.insert(name.to_owned(), self.slots.len() - 1);
                    self.slots.len() - 1
                });
                let id = ResourceId(first + at);
                let rows: Vec<(Arc<Row>, bool)> =
                    rows.into_iter().map(|(row, served)| (Arc::new(row), served)).collect();
                let mut served: Vec<Arc<Served>> = rows
                    .iter()
                    .filter(|(_, served)| *served)
                    .filter_map(|(row, _)| {
                        let ty = row.custom.as_ref()?.ty;
                        let (group, version) = (row.group, row.version);
                        Some(Arc::new(Served { id, row: row.clone(), alias: None, group, version, ty }))
                    })
                    .collect();
                served.sort_by_key(|served| std::cmp::Reverse(names::priority(served.version)));
                self.slots[at] = Slot { row: rows.into_iter().next().map(|(row, _)| row), served };
                if before.is_some() { Changed::Row(id) } else { Changed::New(id) }
            }
        }
    }

    fn index(&mut self, first: usize) {
        let served = self.slots.iter().flat_map(|slot| &slot.served);
        self.served = served.map(|s| (place(s.group, s.version, s.row.plural), s.clone())).collect();
        let of = |(at, slot): (usize, &Slot)| Some((slot.row.as_ref()?.prefix(), ResourceId(first + at)));
        self.prefixes = self.slots.iter().enumerate().filter_map(of).collect();
    }

    /// A version of a resource that is served, the preferred one.
    pub fn served_of(&self, row: &Row) -> Option<Arc<Served>> {
        let own = |slot: &&Slot| slot.row.as_ref().is_some_and(|r| r.group == row.group && r.plural == row.plural);
        self.slots.iter().find(own)?.served.first().cloned()
    }

    /// The row that serves a version of a resource now.
    pub fn version(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Row>> {
        self.served.get(&place(group, version, plural)).map(|served| &served.row)
    }
}

fn place(group: &str, version: &str, plural: &str) -> String {
    format!("{group}/{version}/{plural}")
}

/// The schema roots of all rows, their other versions, and the types that subresources take.
pub fn roots(rows: &[Arc<Row>]) -> Vec<fn(&mut schemars::SchemaGenerator)> {
    use k8s_openapi::{
        api::{authentication::v1::TokenRequest, autoscaling::v1::Scale, core::v1::Binding, policy::v1::Eviction},
        apimachinery::pkg::apis::meta::v1::{DeleteOptions, Status},
    };
    use seawall_api::row::schema_of;
    let own =
        rows.iter().flat_map(|row| std::iter::once(row.schema).chain(row.aliases.iter().map(|a| a.conversion.schema)));
    let extra: [fn(&mut schemars::SchemaGenerator); 6] = [
        schema_of::<Scale>,
        schema_of::<Binding>,
        schema_of::<Eviction>,
        schema_of::<TokenRequest>,
        schema_of::<DeleteOptions>,
        schema_of::<Status>,
    ];
    own.chain(extra).collect()
}

impl Served {
    /// `v1` or `apps/v1`, as in the URL.
    pub fn api_version(&self) -> String {
        api_version(self.group, self.version)
    }
}

/// Finds a subresource by its URL segment.
pub fn subresource(row: &Row, name: &str) -> Option<Subresource> {
    row.subresources.iter().copied().find(|s| s.name() == name)
}
