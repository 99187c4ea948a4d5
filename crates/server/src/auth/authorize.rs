//! Whether a user may do something.
//!
//! The seam is [`Authorizer`]. The one here knows administrators, the components, nodes and those who want to become
//! nodes; for all others, and for what nodes may beyond that, roles and bindings decide ([`super::rbac`]).

use seawall_api::selector::{FieldRequirement, parse_fields};

use std::sync::Arc;

use super::{
    MASTERS, NODES, UserInfo, bootstrap_token,
    node::{self, Relations},
    rbac::Index,
};
use crate::request::{Query, ResourcePath};

/// What a user wants to do.
#[derive(Clone, Debug, Default)]
pub struct Attributes<'a> {
    /// `get`, `list`, `create`, …
    pub verb: &'a str,
    /// The group of the resource.
    pub group: &'a str,
    /// The plural of the resource, empty for a path.
    pub resource: &'a str,
    /// The subresource.
    pub subresource: &'a str,
    /// The namespace.
    pub namespace: &'a str,
    /// The object's name. Of a list or watch, the one that its field selector says.
    pub name: &'a str,
    /// The field selector of a list or watch.
    pub fields: &'a [FieldRequirement],
    /// The path, if no resource is asked for.
    pub path: &'a str,
}

impl<'a> Attributes<'a> {
    /// What a request for a resource wants. `fields` is its [`field_selector`].
    pub(crate) fn of(verb: &'a str, target: &'a ResourcePath, fields: &'a [FieldRequirement]) -> Attributes<'a> {
        let selected = fields.iter().find(|f| f.equal && f.field == "metadata.name").map(|f| f.value.as_str());
        Attributes {
            verb,
            group: &target.group,
            resource: &target.resource,
            subresource: target.subresource.as_deref().unwrap_or_default(),
            namespace: target.namespace.as_deref().unwrap_or_default(),
            name: target.name.as_deref().or(selected).unwrap_or_default(),
            fields,
            path: "",
        }
    }
}

/// The field selector of a request that selects. One that cannot be read selects nothing; it is refused later.
pub(crate) fn field_selector(verb: &str, query: &Query) -> Vec<FieldRequirement> {
    match verb {
        "list" | "watch" | "deletecollection" => {
            parse_fields(query.get("fieldSelector").unwrap_or_default()).unwrap_or_default()
        }
        _ => Vec::new(),
    }
}

/// Decides.
pub trait Authorizer: Send + Sync {
    /// `Ok` if the user may, with the reason; else why not (empty if no rule speaks of it).
    fn authorize(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Result<String, String>;
}

/// What is known of the cluster when somebody wants something.
pub trait Knowledge: Relations {
    /// Roles and bindings, as they are.
    fn rbac(&self) -> Arc<Index>;
}

/// Administrators may do everything, components and nodes what they need; the rest is said by roles and bindings. While
/// those cannot be read yet, everyone may ask whether the server is healthy.
pub struct BuiltIn<R>(
    /// What nodes have to do with, and who has which role.
    pub R,
);

const COMPONENTS: [&str; 4] =
    ["system:kube-controller-manager", "system:kube-scheduler", "system:apiserver", "system:seawall"];

/// Whether this is allowed whatever roles say: the cluster cannot do without it.
pub(crate) fn is_built_in(user: &UserInfo, a: &Attributes<'_>) -> bool {
    let health = ["/healthz", "/livez", "/readyz", "/version"];
    let under = |path: &str| a.path == path || a.path.starts_with(&format!("{path}/"));
    (a.resource.is_empty() && (health.iter().any(|p| under(p)) || joining(user, a)))
        || user.is_in(MASTERS)
        || COMPONENTS.contains(&user.username.as_str())
        || (user.is_in(bootstrap_token::GROUP) && bootstrapper_may(a))
}

impl<R: Knowledge> Authorizer for BuiltIn<R> {
    fn authorize(&self, user: &UserInfo, a: &Attributes<'_>) -> Result<String, String> {
        if is_built_in(user, a) {
            return Ok(String::new());
        }
        let node = match node::identity(user) {
            None => Err(String::new()),
            Some("") => Err(format!("unknown node for user {:?}", user.username)),
            Some(name) => node::authorize(name, a, &self.0),
        };
        let Err(node) = node else { return Ok(String::new()) };
        self.0.rbac().authorize(user, a).map_err(|rbac| match (&*node, &*rbac) {
            ("", _) | (_, "") => node + &rbac,
            _ => format!("{node}, {rbac}"),
        })
    }
}

/// The paths by which machines join, and learn later what changed.
fn joining(user: &UserInfo, a: &Attributes<'_>) -> bool {
    match a.path {
        "/seawall/v1/config" => a.verb == "get" && (user.is_in(bootstrap_token::GROUP) || user.is_in(NODES)),
        "/seawall/v1/join" => user.is_in(bootstrap_token::GROUP_SERVERS),
        _ => false,
    }
}

/// Who only has a token may ask for a certificate and wait for it
/// (<https://kubernetes.io/docs/reference/access-authn-authz/kubelet-tls-bootstrapping/#authorize-kubelet-to-create-csr>).
fn bootstrapper_may(a: &Attributes<'_>) -> bool {
    matches!((a.group, a.resource, a.subresource), ("certificates.k8s.io", "certificatesigningrequests", ""))
        && matches!(a.verb, "create" | "get" | "list" | "watch")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes have nothing.
    struct Nothing;

    impl Knowledge for Nothing {
        fn rbac(&self) -> Arc<Index> {
            Arc::default()
        }
    }

    impl Relations for Nothing {
        fn relate(&self, _: &str, _: node::Kind, _: &str, _: &str) -> bool {
            false
        }
    }

    #[test]
    fn a_selector_names_an_object() {
        let target = ResourcePath::parse("/api/v1/namespaces/a/secrets").unwrap();
        let check = |verb: &str, query: &str, expect: &str| {
            let fields = field_selector(verb, &Query::parse(Some(query)));
            assert_eq!(Attributes::of(verb, &target, &fields).name, expect, "{verb} {query}");
        };
        check("watch", "fieldSelector=metadata.name%3Dx", "x");
        check("list", "fieldSelector=type%3DOpaque,metadata.name%3D%3Dx", "x");
        check("list", "fieldSelector=metadata.name!%3Dx", "");
        check("create", "fieldSelector=metadata.name%3Dx", "");
        check("list", "fieldSelector=x", "");
    }

    #[test]
    fn who_may_what() {
        let node = UserInfo::new("system:node:n1", &[NODES]);
        let someone = UserInfo::new("system:serviceaccount:default:default", &["system:serviceaccounts"]);
        let check = |user: &UserInfo, verb: &str, resource: &str, name: &str, expect: bool| {
            let attributes = Attributes { verb, resource, name, ..Default::default() };
            assert_eq!(
                BuiltIn(Nothing).authorize(user, &attributes).is_ok(),
                expect,
                "{} {verb} {resource} {name}",
                user.username
            );
        };
        check(&UserInfo::new("admin", &[MASTERS]), "delete", "nodes", "x", true);
        check(&node, "patch", "nodes", "n1", true);
        check(&node, "get", "secrets", "s", false);
        check(&node, "delete", "nodes", "n1", false);
        check(&node, "create", "deployments", "", false);
        check(&someone, "list", "secrets", "", false);
        check(&UserInfo::anonymous(), "list", "pods", "", false);
        let path = |user: &UserInfo, path: &str| {
            BuiltIn(Nothing).authorize(user, &Attributes { verb: "get", path, ..Default::default() }).is_ok()
        };
        let enter = Attributes { verb: "get", resource: "pods", subresource: "exec", ..Default::default() };
        assert!(BuiltIn(Nothing).authorize(&node, &enter).is_err(), "a node must not enter pods through the API");
        let unnamed = UserInfo::new("system:node:", &[NODES]);
        let anything = Attributes { verb: "get", resource: "nodes", ..Default::default() };
        assert_eq!(
            BuiltIn(Nothing).authorize(&unnamed, &anything),
            Err("unknown node for user \"system:node:\"".to_owned())
        );
        assert!(path(&UserInfo::anonymous(), "/readyz"));
        assert!(!path(&UserInfo::anonymous(), "/apis"));
        assert!(!path(&UserInfo::anonymous(), "/metrics"));
    }
}
