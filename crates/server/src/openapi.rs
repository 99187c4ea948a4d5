//! OpenAPI documents (<https://kubernetes.io/docs/concepts/overview/kubernetes-api/#openapi-interface-definition>).

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use parking_lot::Mutex;
use seawall_api::{Row, Scope, custom::arena, row::api_version, schema::definitions};
use serde_json::{Map, Value, json};
use sha2::Digest as _;

use crate::{
    Server,
    encode::{Body, json_bytes},
    error::{ApiError, Result},
    registry::{Served, roots},
};

/// Documents that have been asked for; they change with the custom resources.
#[derive(Default)]
pub struct Documents(Mutex<(u64, HashMap<String, Bytes>)>);

impl Documents {
    /// A document of this state of the table.
    fn find(&self, generation: u64, path: &str) -> Option<Bytes> {
        let documents = self.0.lock();
        if documents.0 == generation { documents.1.get(path).cloned() } else { None }
    }

    fn keep(&self, generation: u64, path: &str, bytes: Bytes) {
        let mut documents = self.0.lock();
        if documents.0 < generation {
            *documents = (generation, HashMap::new());
        }
        if documents.0 == generation {
            documents.1.insert(path.to_owned(), bytes);
        }
    }
}

impl Server {
    /// `/openapi/v2`, `/openapi/v3` and what is below.
    pub(crate) fn openapi(&self, path: &str, headers: &HeaderMap) -> Result<Response<Body>> {
        let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("*/*");
        if path == "/openapi/v2" && accept.contains("proto-openapi") && !accept.contains("json") {
            return Ok(self.version_2_protobuf());
        }
        let generation = self.registry.custom().generation;
        if let Some(bytes) = self.openapi.find(generation, path) {
            return Ok(json_bytes(StatusCode::OK, bytes));
        }
        let document = match path.trim_start_matches("/openapi/") {
            "v2" => {
                if !accept.contains("json") && !accept.contains("*/*") {
                    return Err(ApiError::not_acceptable(accept));
                }
                self.version_2()
            }
            "v3" => {
                let entry = |(group, version): (&str, &str)| {
                    let name = match group {
                        "" => format!("api/{version}"),
                        _ => format!("apis/{group}/{version}"),
                    };
                    let url = format!("/openapi/v3/{name}?hash={}", self.hash(group, version));
                    (name, json!({"serverRelativeURL": url}))
                };
                let mut paths: Map<String, Value> = self.registry.group_versions().into_iter().map(entry).collect();
                for remote in self.remotes().iter() {
                    let name = format!("apis/{}/{}", remote.group, remote.version);
                    let url = json!({"serverRelativeURL": format!("/openapi/v3/{name}")});
                    paths.entry(name).or_insert(url);
                }
                // It changes with other things than custom resources.
                return Ok(json_bytes(StatusCode::OK, json!({"paths": paths}).to_string().into()));
            }
            rest => {
                let parts: Vec<&str> = rest.split('/').collect();
                match parts[..] {
                    ["v3", "api", version] => self.version_3("", version)?,
                    ["v3", "apis", group, version] => self.version_3(group, version)?,
                    _ => return Err(ApiError::no_route()),
                }
            }
        };
        let bytes = Bytes::from(document.to_string());
        self.openapi.keep(generation, path, bytes.clone());
        let mut response = json_bytes(StatusCode::OK, bytes);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
        Ok(response)
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
        digest.finalize().iter().map(|byte| format!("{byte:02X}")).collect()
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
        // Only what this group and version refers to.
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
        Ok(json!({"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": self.config.version},
            "paths": paths, "components": {"schemas": schemas}}))
    }

    /// The head of version 2's document, without definitions. kubectl asks for the protobuf form only when version 3
    /// knows nothing of a kind, and then looks up that kind in vain here as well.
    fn version_2_protobuf(&self) -> Response<Body> {
        let field = |number: u8, content: &[u8]| {
            // A version is far shorter than the 127 bytes that one byte of length can tell.
            let length = u8::try_from(content.len().min(127)).unwrap_or_default();
            [&[number << 3 | 2, length], &content[..usize::from(length)]].concat()
        };
        let info = [field(1, b"Kubernetes"), field(2, self.config.version.as_bytes())].concat();
        let document = [field(1, b"2.0"), field(2, &info), field(8, b"")].concat();
        let mut response = json_bytes(StatusCode::OK, document.into());
        let kind = HeaderValue::from_static("application/com.github.proto-openapi.spec.v2.v1.0+protobuf");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
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
