//! GET and LIST, from the snapshot cache.

use std::sync::Arc;

use base64::Engine as _;
use http::{Response, StatusCode};
use seawall_api::{
    Row,
    selector::{FieldRequirement, LabelSelector, parse_fields},
};
use seawall_store::{Entry, ListOptions, Revision};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Context, Server,
    cache::{Objects, Snapshot, by_node, range},
    encode::{Body, Encoder, Include},
    error::{ApiError, Result, future},
    object::Object,
    registry::ResourceId,
    request::Query,
};

/// What a list or watch selects.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// By label.
    pub labels: LabelSelector,
    /// By field.
    pub fields: Vec<FieldRequirement>,
}

impl Selection {
    /// Reads `labelSelector` and `fieldSelector`.
    pub fn parse(row: &Row, query: &Query, name: Option<&str>) -> Result<Selection> {
        let labels =
            LabelSelector::parse(query.get("labelSelector").unwrap_or_default()).map_err(ApiError::bad_request)?;
        let mut fields = parse_fields(query.get("fieldSelector").unwrap_or_default()).map_err(ApiError::bad_request)?;
        for requirement in &fields {
            let known = ["metadata.name", "metadata.namespace"].contains(&requirement.field.as_str())
                || row.selectable.contains(&requirement.field.as_str());
            if !known {
                return Err(ApiError::bad_request(format!("field label not supported: {}", requirement.field)));
            }
        }
        if let Some(name) = name {
            fields.push(FieldRequirement { field: "metadata.name".into(), equal: true, value: name.into() });
        }
        Ok(Selection { labels, fields })
    }

    /// Whether an object is selected.
    pub fn picks(&self, row: &Row, object: &Object) -> bool {
        object.selected(row, &self.labels, &self.fields)
    }

    /// Whether everything is selected.
    pub fn is_everything(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// The value a field must have.
    pub fn equal(&self, field: &str) -> Option<&str> {
        self.fields.iter().find(|r| r.equal && r.field == field).map(|r| r.value.as_str())
    }
}

/// Where a list that was cut off by its limit goes on.
#[derive(Serialize, Deserialize)]
struct Continue {
    /// The revision of the first page.
    rv: u64,
    /// The last key that was sent.
    start: String,
}

impl Continue {
    fn encode(&self) -> String {
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json!(self).to_string())
    }

    fn decode(text: &str) -> Result<Continue> {
        let bad = || ApiError::bad_request("continue key is not valid: use the token of the list's metadata unchanged");
        let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text).map_err(|_| bad())?;
        serde_json::from_slice(&bytes).map_err(|_| bad())
    }
}

/// Reads the parameter `resourceVersion`.
pub fn resource_version(query: &Query) -> Result<Option<Revision>> {
    query
        .text("resourceVersion")
        .map(|text| {
            text.parse().map(Revision).map_err(|_| {
                ApiError::bad_request(format!("resourceVersion: Invalid value: {text:?}: invalid resource version"))
            })
        })
        .transpose()
}

impl Server {
    /// A snapshot that holds everything acknowledged before the call, by this server or another.
    pub(crate) async fn consistent(&self) -> Result<Arc<Snapshot>> {
        let revision = match self.config.shared_store {
            true => self.reads.revision().await,
            // In this process it costs less than sharing it.
            false => self.store.revision().await,
        };
        self.cache.at_least(revision.map_err(ApiError::store)?).await
    }

    /// GET of one object.
    pub(crate) async fn get(&self, context: &Context<'_>) -> Result<Response<Body>> {
        let row = &context.row;
        let name = context.name()?;
        let snapshot = match resource_version(&context.query)? {
            // "0" and older versions are content with what is here, if it is not older than asked.
            Some(revision) => self.cache.at_least(revision).await?,
            None => self.consistent().await?,
        };
        let object = snapshot.get(context.served.id, &row.key(context.namespace(), name));
        let object = object.ok_or_else(|| ApiError::not_found(row, name))?.clone();
        drop(snapshot);
        let object = self.one_in_version(row, object).await?;
        Ok(context.encoder()?.object(&object, StatusCode::OK))
    }

    /// LIST (<https://kubernetes.io/docs/reference/using-api/api-concepts/#semantics-for-get-and-list>).
    pub(crate) async fn list(&self, context: &Context<'_>) -> Result<Response<Body>> {
        let (row, query) = (&context.row, &context.query);
        let selection = Selection::parse(row, query, None)?;
        let limit: usize = query.number("limit")?.unwrap_or(0);
        let requested = resource_version(query)?;
        let token = query.text("continue").map(Continue::decode).transpose()?;
        let exact = match (query.text("resourceVersionMatch"), requested) {
            (None, _) | (Some("NotOlderThan"), Some(_)) => None,
            (Some("Exact"), Some(Revision(0))) => {
                return Err(ApiError::bad_request(
                    "resourceVersionMatch: Forbidden: resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\"",
                ));
            }
            (Some("Exact"), Some(revision)) => Some(revision),
            (Some("Exact" | "NotOlderThan"), None) => {
                return Err(ApiError::bad_request(
                    "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
                ));
            }
            (Some(other), _) => {
                return Err(ApiError::bad_request(format!(
                    "resourceVersionMatch: Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\", \"\""
                )));
            }
        };
        if token.is_some() && requested.is_some_and(|r| r.0 != 0) {
            return Err(ApiError::bad_request("specifying resource version is not allowed when using continue"));
        }
        let prefix = match context.path.namespace.as_deref() {
            Some(namespace) => format!("{}{namespace}/", row.prefix()),
            None => row.prefix(),
        };
        let at = token.as_ref().map(|t| Revision(t.rv)).or(exact);
        let newest;
        let (objects, revision, index) = match at {
            Some(revision) => (self.objects_at(context.served.id, row, revision).await?, revision, None),
            None => {
                newest = match requested {
                    Some(revision) => self.cache.at_least(revision).await?,
                    None => self.consistent().await?,
                };
                let id = context.served.id;
                let index = newest.by_node(id).zip(selection.equal(by_node::FIELD));
                (newest.of(id).clone(), newest.revision, index)
            }
        };
        let after = token.as_ref().map(|t| t.start.as_str());
        let mut found = Vec::new();
        let mut more = false;
        // A name leads straight to its object.
        if let (Some(name), Some(namespace)) = (
            selection.equal("metadata.name"),
            context.path.namespace.as_deref().or((row.scope == seawall_api::Scope::Cluster).then_some("")),
        ) {
            found.extend(objects.get(row.key(namespace, name).as_str()).filter(|o| selection.picks(row, o)).cloned());
        } else {
            let candidates: Box<dyn Iterator<Item = &Arc<Object>> + Send> = match index {
                Some((pods, node)) => Box::new(pods.on(node, &prefix, after)),
                None => Box::new(range(&objects, &prefix, after)),
            };
            for object in candidates.filter(|o| selection.is_everything() || selection.picks(row, o)) {
                if limit > 0 && found.len() == limit {
                    more = true;
                    break;
                }
                found.push(object.clone());
            }
        }
        let mut meta = json!({"resourceVersion": revision.to_string()});
        if more && let Some(last) = found.last() {
            self.pages.pin(context.served.id, revision, &objects);
            meta["continue"] = Continue { rv: revision.0, start: last.key.to_string() }.encode().into();
            if selection.is_everything() {
                let left = range(&objects, &prefix, Some(&last.key)).count();
                meta["remainingItemCount"] = left.into();
            }
        } else if token.is_some() {
            self.pages.done(context.served.id, revision);
        }
        let found = self.in_version(row, found).await?;
        Ok(context.encoder()?.list(found, meta).await)
    }

    /// All objects of a resource exactly at `revision`: from a page's snapshot, or from the store's history.
    async fn objects_at(&self, id: ResourceId, row: &Row, revision: Revision) -> Result<Objects> {
        let snapshot = self.cache.snapshot();
        if snapshot.revision == revision {
            return Ok(snapshot.of(id).clone());
        }
        if let Some(objects) = self.pages.find(id, revision) {
            return Ok(objects);
        }
        if revision > snapshot.revision {
            return Err(future(revision.0, snapshot.revision.0));
        }
        let options = ListOptions { at: Some(revision), ..Default::default() };
        let listing = self.store.list(&row.prefix(), options).await.map_err(|error| match error {
            seawall_store::Error::Compacted { .. } => ApiError::expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.",
            ),
            other => ApiError::store(other),
        })?;
        let read = |entry: &Entry| Object::read(row, entry).ok().map(|o| (o.key.clone(), Arc::new(o)));
        Ok(listing.entries.iter().filter_map(read).collect())
    }
}

impl<'a> Context<'a> {
    /// Answers in the form that the client asked for.
    pub fn encoder(&'a self) -> Result<Encoder<'a>> {
        Ok(Encoder {
            row: &self.row,
            served: self.served,
            schemas: self.schemas,
            form: self.form,
            include: Include::parse(self.query.get("includeObject"))?,
            now: jiff::Timestamp::now(),
        })
    }
}

/// Snapshots that pages of lists still need, a few, for two minutes or until the last page.
#[derive(Default)]
pub struct Pages(parking_lot::Mutex<std::collections::VecDeque<Page>>);

struct Page {
    id: ResourceId,
    revision: Revision,
    objects: Objects,
    until: tokio::time::Instant,
}

impl Pages {
    const MOST: usize = 32;
    const AGE: std::time::Duration = std::time::Duration::from_secs(120);

    fn pin(&self, id: ResourceId, revision: Revision, objects: &Objects) {
        let now = tokio::time::Instant::now();
        let mut pages = self.0.lock();
        pages.retain(|p| p.until > now && !(p.id == id && p.revision == revision));
        pages.push_back(Page { id, revision, objects: objects.clone(), until: now + Self::AGE });
        while pages.len() > Self::MOST {
            pages.pop_front();
        }
    }

    /// Its last page has been read. Should somebody else be on their way through the same one, the store's history serves.
    fn done(&self, id: ResourceId, revision: Revision) {
        self.0.lock().retain(|p| !(p.id == id && p.revision == revision));
    }

    /// Lets go of those whose time is over, for they keep alive what has been deleted since.
    pub fn prune(&self) {
        let now = tokio::time::Instant::now();
        self.0.lock().retain(|p| p.until > now);
    }

    fn find(&self, id: ResourceId, revision: Revision) -> Option<Objects> {
        let pages = self.0.lock();
        pages.iter().find(|p| p.id == id && p.revision == revision).map(|p| p.objects.clone())
    }
}
