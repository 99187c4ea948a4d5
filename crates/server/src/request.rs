//! What a request asks for: its path, verb and parameters.

use http::Method;
use percent_encoding::percent_decode_str;

use crate::error::{ApiError, Result};

/// A path of the API, taken apart.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ResourcePath {
    /// The group, empty for the core.
    pub group: String,
    /// The version.
    pub version: String,
    /// The namespace, if the path names one.
    pub namespace: Option<String>,
    /// The plural.
    pub resource: String,
    /// The object's name, if the path names one.
    pub name: Option<String>,
    /// The subresource.
    pub subresource: Option<String>,
    /// What follows the subresource, for `/proxy/…`.
    pub rest: String,
}

impl ResourcePath {
    /// Takes `/api/v1/…` and `/apis/GROUP/VERSION/…` apart; `None` for any other path.
    pub fn parse(path: &str) -> Option<ResourcePath> {
        let decoded: Vec<String> = path
            .trim_start_matches('/')
            .split('/')
            .map(|part| percent_decode_str(part).decode_utf8_lossy().into_owned())
            .collect();
        let mut parts = decoded.into_iter().filter(|part| !part.is_empty());
        let (group, version) = match parts.next()?.as_str() {
            "api" => (String::new(), parts.next()?),
            "apis" => (parts.next()?, parts.next()?),
            _ => return None,
        };
        let mut out = ResourcePath { group, version, ..Default::default() };
        let first = parts.next()?;
        if first == "namespaces" {
            match (parts.next(), parts.next()) {
                (None, _) => out.resource = first,
                (Some(name), None) => {
                    out.resource = first;
                    out.name = Some(name);
                }
                // `/namespaces/x/status` is a subresource of the namespace itself.
                (Some(name), Some(sub)) if sub == "status" || sub == "finalize" => {
                    out.resource = first;
                    out.name = Some(name);
                    out.subresource = Some(sub);
                }
                (Some(namespace), Some(resource)) => {
                    out.namespace = Some(namespace);
                    out.resource = resource;
                    out.name = parts.next();
                    out.subresource = parts.next();
                }
            }
        } else {
            out.resource = first;
            out.name = parts.next();
            out.subresource = parts.next();
        }
        out.rest = parts.collect::<Vec<_>>().join("/");
        Some(out)
    }
}

/// The parameters of a query.
#[derive(Clone, Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Takes a query string apart.
    pub fn parse(text: Option<&str>) -> Query {
        let decode = |s: &str| percent_decode_str(&s.replace('+', " ")).decode_utf8_lossy().into_owned();
        let pairs = text.unwrap_or_default().split('&').filter(|p| !p.is_empty());
        Query(pairs.map(|p| p.split_once('=').unwrap_or((p, ""))).map(|(k, v)| (decode(k), decode(v))).collect())
    }

    /// The first value of a parameter.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// The first value, if it is not empty.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).filter(|v| !v.is_empty())
    }

    /// Whether a parameter is true.
    pub fn flag(&self, key: &str) -> bool {
        matches!(self.get(key), Some("true" | "1" | "True" | "TRUE"))
    }

    /// A number.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        self.text(key)
            .map(|v| {
                v.parse().map_err(|_| {
                    ApiError::bad_request(format!("{key}: Invalid value: {v:?}: must be a non-negative integer"))
                })
            })
            .transpose()
    }

    /// All pairs.
    pub fn pairs(&self) -> &[(String, String)] {
        &self.0
    }
}

/// Whether a subresource is a stream, which goes on for as long as its client wants.
pub fn is_stream(subresource: &str) -> bool {
    matches!(subresource, "exec" | "attach" | "portforward" | "log" | "proxy")
}

/// The verb, as authorization and the audit log know it.
pub fn verb(method: &Method, path: &ResourcePath, query: &Query) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if path.name.is_none() => "deletecollection",
        Method::DELETE => "delete",
        _ if query.flag("watch") && path.subresource.is_none() => "watch",
        _ if path.name.is_some() => "get",
        _ => "list",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        type Parts<'a> = Option<(&'a str, &'a str, Option<&'a str>, &'a str, Option<&'a str>, Option<&'a str>)>;
        let check = |path: &str, expect: Parts<'_>| {
            let found = ResourcePath::parse(path);
            let found = found.as_ref().map(|p| {
                (
                    p.group.as_str(),
                    p.version.as_str(),
                    p.namespace.as_deref(),
                    p.resource.as_str(),
                    p.name.as_deref(),
                    p.subresource.as_deref(),
                )
            });
            assert_eq!(found, expect, "{path}");
        };
        check("/api/v1/pods", Some(("", "v1", None, "pods", None, None)));
        check("/api/v1/namespaces", Some(("", "v1", None, "namespaces", None, None)));
        check("/api/v1/namespaces/a", Some(("", "v1", None, "namespaces", Some("a"), None)));
        check("/api/v1/namespaces/a/finalize", Some(("", "v1", None, "namespaces", Some("a"), Some("finalize"))));
        check("/api/v1/namespaces/a/pods/b/log", Some(("", "v1", Some("a"), "pods", Some("b"), Some("log"))));
        check(
            "/apis/apps/v1/namespaces/a/deployments/b",
            Some(("apps", "v1", Some("a"), "deployments", Some("b"), None)),
        );
        check(
            "/apis/rbac.authorization.k8s.io/v1/clusterroles/system%3Anode",
            Some(("rbac.authorization.k8s.io", "v1", None, "clusterroles", Some("system:node"), None)),
        );
        check("/apis/apps/v1", None);
        check("/healthz", None);
    }

    #[test]
    fn queries() {
        let query = Query::parse(Some("labelSelector=a%3Db%2Cc&watch=true&command=x&command=y+z"));
        assert_eq!(query.get("labelSelector"), Some("a=b,c"));
        assert!(query.flag("watch"));
        assert_eq!(query.pairs()[3].1, "y z");
        assert!(Query::parse(Some("limit=many")).number::<u32>("limit").is_err());
    }
}
