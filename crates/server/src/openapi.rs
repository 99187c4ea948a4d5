//! OpenAPI documents (<https://kubernetes.io/docs/concepts/overview/kubernetes-api/#openapi-interface-definition>).

mod proto;

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use parking_lot::Mutex;
use seawall_api::{Row, Scope, custom::arena, row::api_version, schema::definitions};
use serde_json::{Map, Value, json};
use sha2::Digest as _;

use crate::{
    Server,
    aggregation::{self, Remote, specs::Three},
    encode::{Body, json_bytes},
    error::{ApiError, Result},
    registry::{Served, roots},
    resource_metrics::{self, schema},
};

/// The group and version of what is measured, which no row describes.
const OF_METRICS: (&str, &str) = (resource_metrics::GROUP, resource_metrics::VERSION);

/// The document of version 2 in protobuf.
const PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// What a document was made of: the custom resources, and for version 2 what other servers say.
type State = (u64, u64);

/// Documents that have been asked for; they change with the custom resources and with other servers.
#[derive(Default)]
pub struct Documents(Mutex<(State, HashMap<String, Document>)>);

/// A document as it is sent.
#[derive(Clone)]
struct Document {
    bytes: Bytes,
    /// Its `ETag`.
    tag: HeaderValue,
}

impl Document {
    fn new(bytes: Bytes) -> Document {
        let hash = hexadecimal(&sha2::Sha256::digest(&bytes));
        let tag = HeaderValue::try_from(format!("{hash:?}")).unwrap_or(HeaderValue::from_static("\"\""));
        Document { bytes, tag }
    }

    /// The answer to a client, which may have it already.
    fn answer(self, headers: &HeaderMap) -> Response<Body> {
        let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|tags| tags.to_str().ok());
        let mut known = known.flat_map(|tags| tags.split(',').map(|tag| tag.trim().trim_start_matches("W/")));
        let mut response = match known.any(|tag| tag == "*" || self.tag == tag) {
            true => json_bytes(StatusCode::NOT_MODIFIED, Bytes::new()),
            false => json_bytes(StatusCode::OK, self.bytes),
        };
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
        response.headers_mut().insert(header::ETAG, self.tag);
        response
    }
}

impl Documents {
    /// A document of this state of the table.
    fn find(&self, state: State, path: &str) -> Option<Document> {
        let documents = self.0.lock();
        if documents.0 == state { documents.1.get(path).cloned() } else { None }
    }

    fn keep(&self, state: State, path: &str, document: Document) {
        let mut documents = self.0.lock();
        if documents.0 < state {
            *documents = (state, HashMap::new());
        }
        if documents.0 == state {
            documents.1.insert(path.to_owned(), document);
        }
    }
}

fn hexadecimal(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02X}")).collect()
}

impl Server {
    /// `/openapi/v2`, `/openapi/v3` and what is below.
    pub(crate) fn openapi(&self, path: &str, headers: &HeaderMap) -> Result<Response<Body>> {
        let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("*/*");
        let state = (self.registry.custom().generation, self.aggregation.specs.generation());
        if path == "/openapi/v2" && accept.contains("proto-openapi") && !accept.contains("json") {
            let document = self.openapi.find(state, PROTOBUF).unwrap_or_else(|| {
                let document = Document::new(proto::encode(&self.joined_version_2()).into());
                self.openapi.keep(state, PROTOBUF, document.clone());
                document
            });
            let mut response = document.answer(headers);
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROTOBUF));
            return Ok(response);
        }
        if let Some(document) = self.openapi.find(state, path) {
            return Ok(document.answer(headers));
        }
        let document = match path.trim_start_matches("/openapi/") {
            "v2" => {
                if !accept.contains("json") && !accept.contains("*/*") {
                    return Err(ApiError::not_acceptable(accept));
                }
                self.joined_version_2()
            }
            // It changes with other things than custom resources.
            "v3" => return Ok(json_bytes(StatusCode::OK, self.list_of_version_3().to_string().into())),
            rest => {
                let parts: Vec<&str> = rest.split('/').collect();
                match parts[..] {
                    ["v3", "api", version] => self.version_3("", version)?,
                    ["v3", "apis", group, version] if self.registry.served_in(group, version).is_empty() => {
                        let remote = self.remote(group, version);
                        let made = remote.map(|remote| self.aggregation.specs.of_version_3(&remote));
                        // Whether these are served changes with other things than custom resources.
                        return match made {
                            Some(Three::Made { document, .. }) => Ok(Document::new(document).answer(headers)),
                            _ if (group, version) == OF_METRICS && self.serves_metrics() => {
                                Ok(json_bytes(StatusCode::OK, self.of_metrics().to_string().into()))
                            }
                            _ => Err(ApiError::no_route()),
                        };
                    }
                    ["v3", "apis", group, version] => self.version_3(group, version)?,
                    _ => return Err(ApiError::no_route()),
                }
            }
        };
        let document = Document::new(document.to_string().into());
        self.openapi.keep(state, path, document.clone());
        Ok(document.answer(headers))
    }

    /// The documents of version 3 that there are. Those of others are at the address that they say, under which nobody
    /// keeps one that has changed.
    fn list_of_version_3(&self) -> Value {
        let entry = |(group, version): (&str, &str)| {
            let name = match group {
                "" => format!("api/{version}"),
                _ => format!("apis/{group}/{version}"),
            };
            let url = format!("/openapi/v3/{name}?hash={}", self.hash(group, version));
            (name, json!({"serverRelativeURL": url}))
        };
        let mut paths: Map<String, Value> = self.registry.group_versions().into_iter().map(entry).collect();
        if self.serves_metrics() {
            let name = format!("apis/{}", resource_metrics::API_VERSION);
            let url = format!("/openapi/v3/{name}?hash={}", self.config.version);
            paths.insert(name, json!({"serverRelativeURL": url}));
        }
        for remote in self.remotes().iter() {
            let name = format!("apis/{}/{}", remote.group, remote.version);
            let url = match self.aggregation.specs.of_version_3(remote) {
                Three::Unknown => continue,
                Three::There(url) => url,
                Three::Made { hash, .. } => format!("/openapi/v3/{name}?hash={hash}"),
            };
            paths.entry(name).or_insert(json!({"serverRelativeURL": url}));
        }
        json!({"paths": paths})
    }

    /// Whether another server has no document of version 3, so that it is made here.
    pub(crate) fn made_for(&self, remote: &Remote) -> bool {
        matches!(self.aggregation.specs.of_version_3(remote), Three::Made { .. })
    }

    fn definitions(&self, prefix: &str) -> BTreeMap<String, Value> {
        let rows: Vec<_> = self.registry.rows().map(|(_, row)| row.clone()).collect();
        let mut all = definitions(roots(&rows), prefix);
        for (group, version) in self.registry.group_versions() {
            for served in self.registry.served_in(group, version) {
                let row = &served.row;
                if let Some(custom) = &row.custom {
                    all.insert(row.type_name.to_owned(), arena::openapi(&custom.source, prefix));
                    all.insert(list_name(row), list_of(row, prefix));
                }
                if let Some(schema) = all.get_mut(&*self.type_name(&served)) {
                    schema["x-kubernetes-group-version-kind"] = json!([gvk(row, &served)]);
                }
            }
        }
        all
    }

    fn type_name(&self, served: &Served) -> String {
        match &served.row.custom {
            Some(_) => served.row.type_name.to_owned(),
            None => self.registry.schemas.get(served.ty).name.to_string(),
        }
    }

    /// Stands in the address of a document, so that nobody keeps one that has changed.
    fn hash(&self, group: &str, version: &str) -> String {
        let mut digest = sha2::Sha256::new();
        digest.update(&self.config.version);
        let mut custom = false;
        for served in self.registry.served_in(group, version) {
            if let Some(version) = &served.row.custom {
                custom = true;
                digest.update(served.row.plural);
                digest.update(version.definition.source.to_string());
            }
        }
        if !custom {
            return self.config.version.clone();
        }
        hexadecimal(&digest.finalize())
    }

    fn version_3(&self, group: &str, version: &str) -> Result<Value> {
        let served = self.registry.served_in(group, version);
        if served.is_empty() {
            return Err(ApiError::no_route());
        }
        let all = self.definitions("#/components/schemas/");
        let mut paths = Map::new();
        let mut needed: Vec<String> = Vec::new();
        for served in &served {
            let name = self.type_name(served);
            describe(&served.row, served, &name, &mut paths);
            needed.push(name);
            if served.row.custom.is_some() {
                needed.push(list_name(&served.row));
            }
        }
        needed.push("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions".into());
        needed.push("io.k8s.apimachinery.pkg.apis.meta.v1.Status".into());
        if served.iter().any(|served| served.row.has(seawall_api::Subresource::Scale)) {
            needed.push("io.k8s.api.autoscaling.v1.Scale".into());
        }
        let schemas = referred_to(&all, needed);
        Ok(json!({"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": self.config.version},
            "paths": paths, "components": {"schemas": schemas}}))
    }

    /// The document of what is measured, which no row describes.
    fn of_metrics(&self) -> Value {
        let needed = ["ObjectMeta", "ListMeta"].map(|name| format!("io.k8s.apimachinery.pkg.apis.meta.v1.{name}"));
        schema::document(referred_to(&self.definitions("#/components/schemas/"), needed.to_vec()))
    }

    /// Our document of version 2 with those of other servers, those of greater priority first.
    fn joined_version_2(&self) -> Value {
        let mut document = self.version_2();
        let own = self.registry.group_versions();
        for remote in self.remotes().iter() {
            let served_here = own.iter().any(|(group, version)| *group == remote.group && *version == remote.version);
            if let Some(theirs) = self.aggregation.specs.of_version_2(remote).filter(|_| !served_here) {
                aggregation::join(&mut document, &theirs);
            }
        }
        document
    }

    fn version_2(&self) -> Value {
        let mut paths = Map::new();
        for (group, version) in self.registry.group_versions() {
            for served in self.registry.served_in(group, version) {
                let (row, served) = (&served.row, &served);
                let kind = gvk(row, served);
                let operation = |action: &str| json!({"operationId": format!("{action}{}{}", row.kind, served.version), "x-kubernetes-action": action, "x-kubernetes-group-version-kind": kind, "responses": {"200": {"description": "OK"}}});
                paths.insert(url(row, served, true), json!({"get": operation("get"), "patch": operation("patch")}));
            }
        }
        json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": self.config.version},
            "paths": paths, "definitions": self.definitions("#/definitions/")})
    }
}

fn list_name(row: &Row) -> String {
    let base = row.type_name.rsplit_once('.').map_or("", |(base, _)| base);
    format!("{base}.{}", row.list_kind())
}

fn list_of(row: &Row, prefix: &str) -> Value {
    json!({"type": "object", "description": format!("{} is a list of {}", row.list_kind(), row.kind), "required": ["items"],
        "properties": {"apiVersion": {"type": "string"}, "kind": {"type": "string"},
            "metadata": {"$ref": format!("{prefix}io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta")},
            "items": {"type": "array", "items": {"$ref": format!("{prefix}{}", row.type_name)}}},
        "x-kubernetes-group-version-kind": [{"group": row.group, "version": row.version, "kind": row.list_kind()}]})
}

fn gvk(row: &Row, served: &Served) -> Value {
    json!({"group": served.group, "version": served.version, "kind": row.kind})
}

fn url(row: &Row, served: &Served, one: bool) -> String {
    let base = match served.group {
        "" => format!("/api/{}", served.version),
        _ => format!("/apis/{}", api_version(served.group, served.version)),
    };
    let namespace = if row.scope == Scope::Namespaced { "/namespaces/{namespace}" } else { "" };
    let name = if one { "/{name}" } else { "" };
    format!("{base}{namespace}/{}{name}", row.plural)
}

/// These definitions and what they refer to.
fn referred_to(all: &BTreeMap<String, Value>, mut needed: Vec<String>) -> Map<String, Value> {
    let mut schemas = Map::new();
    while let Some(name) = needed.pop() {
        if schemas.contains_key(&name) {
            continue;
        }
        if let Some(schema) = all.get(&name) {
            references(schema, &mut needed);
            schemas.insert(name, schema.clone());
        }
    }
    schemas
}

fn references(schema: &Value, into: &mut Vec<String>) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object {
                match (key.as_str(), value.as_str().and_then(|r| r.rsplit('/').next())) {
                    ("$ref", Some(name)) => into.push(name.to_owned()),
                    _ => references(value, into),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|v| references(v, into)),
        _ => {}
    }
}

/// Adds the paths of a resource.
fn describe(row: &Row, served: &Served, ty: &str, paths: &mut Map<String, Value>) {
    let kind = gvk(row, served);
    let schema = json!({"$ref": format!("#/components/schemas/{ty}")});
    let parameter = |name: &str, description: &str| json!({"name": name, "in": "query", "description": description, "schema": {"type": "string", "uniqueItems": true}});
    let write = json!([
        parameter("dryRun", "When present, indicates that modifications should not be persisted: All."),
        parameter("fieldManager", "The name of the actor that makes the change."),
        parameter("fieldValidation", "How to treat unknown and duplicate fields: Ignore, Warn or Strict."),
    ]);
    let answer = json!({"200": {"description": "OK", "content": {"application/json": {"schema": schema}}}});
    let operation = |action: &str, word: &str| -> Value {
        let place = if row.scope == Scope::Namespaced { "Namespaced" } else { "" };
        let mut out = json!({"operationId": format!("{word}{}{}{place}{}", served.group.replace(['.', '-'], ""), served.version, row.kind),
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind": kind, "responses": answer});
        if matches!(action, "post" | "put" | "patch") {
            out["parameters"] = write.clone();
            let media = match action {
                "patch" if row.custom.is_some() => "application/merge-patch+json",
                "patch" => "application/strategic-merge-patch+json",
                _ => "application/json",
            };
            out["requestBody"] = json!({"content": {media: {"schema": schema}}});
        }
        out
    };
    let path_parameters = |one: bool| {
        let mut all = Vec::new();
        let mut add = |name: &str| {
            all.push(json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "uniqueItems": true}}))
        };
        if row.scope == Scope::Namespaced {
            add("namespace");
        }
        if one {
            add("name");
        }
        all
    };
    if !row.stored {
        paths.insert(
            url(row, served, false),
            json!({"post": operation("post", "create"), "parameters": path_parameters(false)}),
        );
        return;
    }
    paths.insert(
        url(row, served, false),
        json!({"get": operation("list", "list"), "post": operation("post", "create"), "delete": operation("deletecollection", "deleteCollection"), "parameters": path_parameters(false)}),
    );
    let one = json!({"get": operation("get", "read"), "put": operation("put", "replace"), "patch": operation("patch", "patch"),
        "delete": operation("delete", "delete"), "parameters": path_parameters(true)});
    paths.insert(url(row, served, true), one);
    for sub in row.subresources.iter().filter(|s| matches!(s.name(), "status" | "scale")) {
        let path = format!("{}/{}", url(row, served, true), sub.name());
        paths.insert(path, json!({"get": operation("get", "read"), "put": operation("put", "replace"), "patch": operation("patch", "patch"), "parameters": path_parameters(true)}));
    }
}
