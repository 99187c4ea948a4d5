//! Discovery: what is served, in the old form (a document a group) and the aggregated one (KEP-3352).

use http::{HeaderMap, Response, StatusCode, header};
use seawall_api::{Row, Scope, custom::names};
use serde_json::{Value, json};

use crate::{
    Server,
    encode::{Body, Media, value},
    error::{ApiError, Result},
    registry::Served,
    resource_metrics,
};

const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

impl Server {
    /// `/api`, `/apis` and what is below.
    pub(crate) fn discovery(&self, path: &str, headers: &HeaderMap) -> Result<Response<Body>> {
        let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let aggregated = accept.split(',').next().is_some_and(|first| first.contains("as=APIGroupDiscoveryList"))
            && accept.contains("v=v2");
        let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
        let document = match parts[..] {
            [] => {
                json!({"paths": ["/api", "/apis", "/healthz", "/livez", "/metrics", "/openapi/v2", "/openapi/v3", "/readyz", "/version"]})
            }
            ["api"] if aggregated => return Ok(aggregate(self.groups(true))),
            ["apis"] if aggregated => return Ok(aggregate(self.groups(false))),
            ["api"] => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
            ["apis"] => {
                let names = self.group_names();
                let mut groups: Vec<Value> = names.iter().map(|name| self.group(name)).collect();
                groups.extend(self.serves_metrics().then(resource_metrics::group));
                groups
                    .extend(self.remote_groups().iter().map(|(group, versions)| Server::remote_group(group, versions)));
                json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
            }
            ["api", version] => self.resources("", version)?,
            ["apis", group] => {
                let mut document = match self.group_names().contains(&group) {
                    true => self.group(group),
                    false if group == resource_metrics::GROUP && self.serves_metrics() => resource_metrics::group(),
                    false => {
                        let remote = self.remote_groups().into_iter().find(|(name, _)| name == group);
                        let (group, versions) = remote.ok_or_else(ApiError::no_route)?;
                        Server::remote_group(&group, &versions)
                    }
                };
                document["kind"] = "APIGroup".into();
                document["apiVersion"] = "v1".into();
                document
            }
            ["apis", resource_metrics::GROUP, resource_metrics::VERSION] if self.serves_metrics() => {
                resource_metrics::resources()
            }
            ["apis", group, version] => self.resources(group, version)?,
            _ => return Err(ApiError::no_route()),
        };
        Ok(value(StatusCode::OK, &document, Media::Json))
    }

    fn group_names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for (group, _) in self.registry.group_versions() {
            if !group.is_empty() && !names.contains(&group) {
                names.push(group);
            }
        }
        names
    }

    fn versions(&self, group: &str) -> Vec<&'static str> {
        let mut versions: Vec<&'static str> =
            self.registry.group_versions().into_iter().filter(|(g, _)| *g == group).map(|(_, v)| v).collect();
        // Newer stable versions are preferred.
        versions.sort_by_key(|v| std::cmp::Reverse(names::priority(v)));
        versions
    }

    fn group(&self, group: &str) -> Value {
        let versions: Vec<Value> = self
            .versions(group)
            .iter()
            .map(|v| json!({"groupVersion": format!("{group}/{v}"), "version": v}))
            .collect();
        json!({"name": group, "versions": versions, "preferredVersion": versions.first()})
    }

    fn resources(&self, group: &str, version: &str) -> Result<Value> {
        let served = self.registry.served_in(group, version);
        if served.is_empty() {
            return Err(ApiError::no_route());
        }
        let mut resources = Vec::new();
        for served in &served {
            let row = &served.row;
            let namespaced = row.scope == Scope::Namespaced;
            let mut entry = json!({"name": row.plural, "singularName": row.singular, "namespaced": namespaced,
                "kind": row.kind, "verbs": verbs(row)});
            if !row.short_names.is_empty() {
                entry["shortNames"] = json!(row.short_names);
            }
            if !row.categories.is_empty() {
                entry["categories"] = json!(row.categories);
            }
            if row.stored {
                entry["storageVersionHash"] = storage_hash(row).into();
            }
            resources.push(entry);
            for sub in row.subresources {
                let (verbs, kind) = sub.discovery();
                let (sub_group, sub_version, kind) = kind.unwrap_or(("", "", row.kind));
                let mut entry = json!({"name": format!("{}/{}", row.plural, sub.name()), "singularName": "",
                    "namespaced": namespaced, "kind": kind, "verbs": verbs});
                if !sub_version.is_empty() && (sub_group, sub_version) != (served.group, served.version) {
                    entry["group"] = sub_group.into();
                    entry["version"] = sub_version.into();
                }
                resources.push(entry);
            }
        }
        let name = seawall_api::row::api_version(group, version);
        Ok(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": resources}))
    }

    fn groups(&self, core: bool) -> Vec<Value> {
        let names = if core { vec![""] } else { self.group_names() };
        let group = |name: &&'static str| {
            let versions: Vec<Value> = self
                .versions(name)
                .iter()
                .map(|version| {
                    let resources: Vec<Value> =
                        self.registry.served_in(name, version).iter().map(|s| aggregated(&s.row, s)).collect();
                    json!({"version": version, "freshness": "Current", "resources": resources})
                })
                .collect();
            let meta = if name.is_empty() {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": name, "creationTimestamp": null})
            };
            json!({"metadata": meta, "versions": versions})
        };
        let mut groups: Vec<Value> = names.iter().map(group).collect();
        if !core {
            groups.extend(self.serves_metrics().then(resource_metrics::aggregated));
            let remote = self.remote_groups();
            groups.extend(remote.iter().map(|(group, versions)| self.remote_discovery(group, versions)));
        }
        groups
    }
}

fn verbs(row: &Row) -> &'static [&'static str] {
    if row.stored { &VERBS } else { &["create"] }
}

fn aggregated(row: &Row, served: &Served) -> Value {
    let subs: Vec<Value> = row.subresources
        .iter()
        .map(|sub| {
            let (verbs, kind) = sub.discovery();
            let (group, version, kind) = kind.unwrap_or((served.group, served.version, row.kind));
            json!({"subresource": sub.name(), "responseKind": {"group": group, "version": version, "kind": kind}, "verbs": verbs})
        })
        .collect();
    let mut entry = json!({"resource": row.plural,
        "responseKind": {"group": served.group, "version": served.version, "kind": row.kind},
        "scope": if row.scope == Scope::Namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": row.singular, "verbs": verbs(row)});
    if !row.short_names.is_empty() {
        entry["shortNames"] = json!(row.short_names);
    }
    if !row.categories.is_empty() {
        entry["categories"] = json!(row.categories);
    }
    if !subs.is_empty() {
        entry["subresources"] = subs.into();
    }
    entry
}

fn aggregate(groups: Vec<Value>) -> Response<Body> {
    let list = json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": groups});
    let mut response = value(StatusCode::OK, &list, Media::Json);
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"),
    );
    response
}

fn storage_hash(row: &Row) -> String {
    use base64::Engine as _;
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(format!("{}/{}/{}", row.group, row.version, row.kind).as_bytes());
    base64::engine::general_purpose::STANDARD.encode(&digest[..8])
}
