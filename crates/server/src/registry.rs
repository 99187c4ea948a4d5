//! All resources that are served, and how a path finds its row.

use std::{collections::HashMap, sync::Arc};

use seawall_api::{
    Row, Subresource, resources,
    row::{Alias, api_version},
    schema::{Schemas, TypeId},
};

/// The number of a resource: its place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceId(pub usize);

/// A resource under one group and version.
#[derive(Clone)]
pub struct Served {
    /// Which resource.
    pub id: ResourceId,
    /// Set if this is not the stored version.
    pub alias: Option<Alias>,
    /// The group in the URL.
    pub group: &'static str,
    /// The version in the URL.
    pub version: &'static str,
    /// The type in this version.
    pub ty: TypeId,
}

/// The table of resources with its indexes.
pub struct Registry {
    rows: Vec<Arc<Row>>,
    served: HashMap<String, Served>,
    prefixes: HashMap<String, ResourceId>,
    /// The shapes of all types.
    pub schemas: Schemas,
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
            let entry = Served { id, alias: None, group: row.group, version: row.version, ty };
            served.insert(place(row.group, row.version, row.plural), entry);
            for alias in row.aliases {
                let ty = schemas.by_name(alias.conversion.type_name).ok_or_else(|| NoSchema(row.qualified()))?;
                let entry = Served { id, alias: Some(*alias), group: alias.group, version: alias.version, ty };
                served.insert(place(alias.group, alias.version, row.plural), entry);
            }
            if row.stored {
                prefixes.insert(row.prefix(), id);
            }
        }
        Ok(Registry { rows, served, prefixes, schemas })
    }

    /// All rows with their numbers.
    pub fn rows(&self) -> impl Iterator<Item = (ResourceId, &Arc<Row>)> {
        self.rows.iter().enumerate().map(|(index, row)| (ResourceId(index), row))
    }

    /// How many resources there are.
    #[allow(clippy::len_without_is_empty, reason = "a table without rows does not occur")]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// A row by number.
    pub fn row(&self, id: ResourceId) -> &Arc<Row> {
        &self.rows[id.0]
    }

    /// The resource under this group, version and plural.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Served> {
        self.served.get(&place(group, version, plural))
    }

    /// The row of a core or named resource in its stored version.
    pub fn by_name(&self, group: &str, plural: &str) -> Option<(ResourceId, &Arc<Row>)> {
        self.rows().find(|(_, row)| row.group == group && row.plural == plural)
    }

    /// The resource that a key of the store belongs to.
    pub fn by_key(&self, key: &str) -> Option<ResourceId> {
        // `/registry/pods/…` or `/registry/services/specs/…`.
        let slashes: Vec<usize> = key.match_indices('/').map(|(i, _)| i).take(4).collect();
        let end = |n: usize| slashes.get(n).and_then(|end| self.prefixes.get(&key[..=*end]));
        end(2).or_else(|| end(3)).copied()
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
        all
    }

    /// What is served under one group and version, in order.
    pub fn served_in(&self, group: &str, version: &str) -> Vec<(&Served, &Arc<Row>)> {
        let rows = self.rows.iter();
        rows.filter_map(|row| self.find(group, version, row.plural).map(|s| (s, row)))
            .filter(|(s, row)| Arc::ptr_eq(self.row(s.id), row))
            .collect()
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
