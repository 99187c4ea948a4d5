//! Whether a user may do something.
//!
//! The seam is [`Authorizer`]. The one here knows administrators, nodes and the components; rules of RBAC are not
//! evaluated yet (see `docs/DIFFERENCES.md`).

use super::{AUTHENTICATED, MASTERS, NODES, UserInfo, bootstrap_token};

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
    /// The object's name.
    pub name: &'a str,
    /// The path, if no resource is asked for.
    pub path: &'a str,
}

/// Decides.
pub trait Authorizer: Send + Sync {
    /// `Ok` if the user may, else why not (empty if no rule speaks of it).
    fn authorize(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Result<(), String>;
}

/// Administrators may do everything, components and nodes what they need, every user may look at what the server
/// offers and ask about themselves, and everyone may ask whether it is healthy.
pub struct BuiltIn;

const COMPONENTS: [&str; 4] =
    ["system:kube-controller-manager", "system:kube-scheduler", "system:apiserver", "system:seawall"];

impl Authorizer for BuiltIn {
    fn authorize(&self, user: &UserInfo, a: &Attributes<'_>) -> Result<(), String> {
        let health = ["/healthz", "/livez", "/readyz", "/version"];
        let under = |path: &str| a.path == path || a.path.starts_with(&format!("{path}/"));
        if a.resource.is_empty() && health.iter().any(|p| under(p)) {
            return Ok(());
        }
        if user.is_in(MASTERS) || COMPONENTS.contains(&user.username.as_str()) {
            return Ok(());
        }
        if user.is_in(AUTHENTICATED) {
            let discovery = ["/api", "/apis", "/openapi", "/openid", "/.well-known"];
            if a.resource.is_empty() && discovery.iter().any(|p| under(p)) {
                return Ok(());
            }
            let about_self = matches!(
                (a.group, a.resource),
                ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews")
                    | ("authentication.k8s.io", "selfsubjectreviews")
            );
            if about_self && a.verb == "create" {
                return Ok(());
            }
        }
        if a.resource.is_empty() && joining(user, a) {
            return Ok(());
        }
        if user.is_in(bootstrap_token::GROUP) && bootstrapper_may(a) {
            return Ok(());
        }
        if user.is_in(NODES) && user.username.starts_with("system:node:") && node_may(user, a) {
            return Ok(());
        }
        Err(String::new())
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

/// What a node agent needs. That it may only touch its own objects follows with the node authorizer.
fn node_may(user: &UserInfo, a: &Attributes<'_>) -> bool {
    let node = user.username.trim_start_matches("system:node:");
    // Reading an object is not entering it: `pods/exec` is a get as well.
    let read = matches!(a.verb, "get" | "list" | "watch") && matches!(a.subresource, "" | "status");
    match (a.group, a.resource) {
        ("", "nodes") => read || a.verb == "create" || (a.name == node && matches!(a.verb, "update" | "patch")),
        ("", "pods") => {
            read || a.verb == "delete" || (a.subresource == "status" && matches!(a.verb, "update" | "patch"))
        }
        ("", "services" | "endpoints" | "persistentvolumes" | "persistentvolumeclaims") => read,
        ("", "configmaps" | "secrets") => read,
        ("", "serviceaccounts") => a.subresource == "token" && a.verb == "create" || a.verb == "get",
        ("", "events") | ("events.k8s.io", "events") => matches!(a.verb, "create" | "update" | "patch"),
        ("discovery.k8s.io", "endpointslices") | ("node.k8s.io", "runtimeclasses") => read,
        ("coordination.k8s.io", "leases") => a.namespace == "kube-node-lease" && a.verb != "list",
        ("storage.k8s.io", "csidrivers" | "csinodes" | "volumeattachments") => read || a.resource == "csinodes",
        ("certificates.k8s.io", "certificatesigningrequests") => matches!(a.verb, "create" | "get" | "list" | "watch"),
        ("authentication.k8s.io", "tokenreviews") | ("authorization.k8s.io", "subjectaccessreviews") => {
            a.verb == "create"
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_what() {
        let node = UserInfo::new("system:node:n1", &[NODES]);
        let someone = UserInfo::new("system:serviceaccount:default:default", &["system:serviceaccounts"]);
        let check = |user: &UserInfo, verb: &str, resource: &str, name: &str, expect: bool| {
            let attributes = Attributes { verb, resource, name, ..Default::default() };
            assert_eq!(
                BuiltIn.authorize(user, &attributes).is_ok(),
                expect,
                "{} {verb} {resource} {name}",
                user.username
            );
        };
        check(&UserInfo::new("admin", &[MASTERS]), "delete", "nodes", "x", true);
        check(&node, "patch", "nodes", "n1", true);
        check(&node, "patch", "nodes", "n2", false);
        check(&node, "delete", "nodes", "n1", false);
        check(&node, "create", "pods", "", false);
        check(&someone, "list", "secrets", "", false);
        check(&UserInfo::anonymous(), "list", "pods", "", false);
        let path = |user: &UserInfo, path: &str| {
            BuiltIn.authorize(user, &Attributes { verb: "get", path, ..Default::default() }).is_ok()
        };
        let enter = Attributes { verb: "get", resource: "pods", subresource: "exec", ..Default::default() };
        assert!(BuiltIn.authorize(&node, &enter).is_err(), "a node must not enter pods through the API");
        assert!(path(&UserInfo::anonymous(), "/readyz"));
        assert!(!path(&UserInfo::anonymous(), "/apis"));
        assert!(!path(&UserInfo::anonymous(), "/metrics"));
        assert!(path(&someone, "/apis/apps/v1"));
    }
}
