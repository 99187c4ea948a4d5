//! Role-based access control (<https://kubernetes.io/docs/reference/access-authn-authz/rbac/>).
//!
//! [`Index`] is what roles and bindings come to, and is pure; [`Rbac`] makes it anew when one of them has changed.

pub mod policy;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, OnceLock},
};

use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject};
use parking_lot::Mutex;
use seawall_store::Revision;
use serde::de::DeserializeOwned;

use super::{UserInfo, authorize::Attributes};
use crate::{
    cache::{Objects, Snapshot},
    registry::{Registry, ResourceId},
};

/// The group of roles and bindings.
pub const GROUP: &str = "rbac.authorization.k8s.io";
const ANY: &str = "*";

fn has(list: &Option<Vec<String>>, wanted: &str) -> bool {
    list.iter().flatten().any(|found| found == wanted)
}

fn is_empty(list: &Option<Vec<String>>) -> bool {
    list.as_ref().is_none_or(Vec::is_empty)
}

/// The rules of who may do everything.
pub fn everything() -> [PolicyRule; 2] {
    let any = || vec![ANY.to_owned()];
    [
        PolicyRule { api_groups: Some(any()), resources: Some(any()), verbs: any(), ..PolicyRule::default() },
        PolicyRule { non_resource_urls: Some(any()), verbs: any(), ..PolicyRule::default() },
    ]
}

/// Whether a rule speaks of what somebody wants to do.
pub fn allows(rule: &PolicyRule, a: &Attributes<'_>) -> bool {
    if !rule.verbs.iter().any(|verb| verb == ANY || verb == a.verb) {
        return false;
    }
    if a.resource.is_empty() {
        let under = |pattern: &str| match pattern.strip_suffix('*') {
            Some(prefix) => a.path.starts_with(prefix),
            None => pattern == a.path,
        };
        return rule.non_resource_urls.iter().flatten().any(|pattern| under(pattern));
    }
    let resource = |pattern: &str| match (pattern.split_once('/'), a.subresource) {
        _ if pattern == ANY => true,
        (None, "") => pattern == a.resource,
        (Some((resource, sub)), wanted) => (resource == ANY || resource == a.resource) && sub == wanted,
        (None, _) => false,
    };
    (has(&rule.api_groups, ANY) || has(&rule.api_groups, a.group))
        && rule.resources.iter().flatten().any(|pattern| resource(pattern))
        && (is_empty(&rule.resource_names) || has(&rule.resource_names, a.name))
}

/// One thing that a rule allows: a verb on a resource, or on a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Grant {
    verb: String,
    group: String,
    resource: String,
    names: Option<Vec<String>>,
    path: String,
}

fn grants(rule: &PolicyRule) -> Vec<Grant> {
    let mut grants = Vec::new();
    for verb in &rule.verbs {
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                let names = rule.resource_names.clone().filter(|names| !names.is_empty());
                let (group, resource) = (group.clone(), resource.clone());
                grants.push(Grant { verb: verb.clone(), group, resource, names, path: String::new() });
            }
        }
        for path in rule.non_resource_urls.iter().flatten() {
            let (group, resource) = (String::new(), String::new());
            grants.push(Grant { verb: verb.clone(), group, resource, names: None, path: path.clone() });
        }
    }
    grants
}

/// Whether whoever has a rule has this.
fn covers(rule: &PolicyRule, grant: &Grant) -> bool {
    if !rule.verbs.iter().any(|verb| verb == ANY || *verb == grant.verb) {
        return false;
    }
    if !grant.path.is_empty() {
        let under = |pattern: &str| match pattern.strip_suffix('*') {
            Some(prefix) => grant.path.starts_with(prefix),
            None => pattern == grant.path,
        };
        return rule.non_resource_urls.iter().flatten().any(|pattern| under(pattern));
    }
    let resource = |pattern: &str| {
        pattern == ANY
            || pattern == grant.resource
            || pattern
                .strip_prefix("*/")
                .is_some_and(|sub| grant.resource.split_once('/').is_some_and(|(_, s)| s == sub))
    };
    let named = match &grant.names {
        _ if is_empty(&rule.resource_names) => true,
        Some(names) => names.iter().all(|name| has(&rule.resource_names, name)),
        None => false,
    };
    (has(&rule.api_groups, ANY) || has(&rule.api_groups, &grant.group))
        && rule.resources.iter().flatten().any(|pattern| resource(pattern))
        && named
}

/// What of `wanted` is not in `held`, as upstream writes it in the message about it.
pub fn not_held(held: &[PolicyRule], wanted: &[PolicyRule]) -> Vec<String> {
    let mut missing: Vec<Grant> = Vec::new();
    for grant in wanted.iter().flat_map(grants) {
        if !held.iter().any(|rule| covers(rule, &grant)) && !missing.contains(&grant) {
            missing.push(grant);
        }
    }
    // Verbs of the same thing stand together.
    let mut lines: Vec<(Grant, Vec<String>)> = Vec::new();
    for grant in missing {
        let same = |other: &Grant| {
            Grant { verb: String::new(), ..other.clone() } == Grant { verb: String::new(), ..grant.clone() }
        };
        match lines.iter_mut().find(|(other, _)| same(other)) {
            Some((_, verbs)) => verbs.push(grant.verb),
            None => {
                let verb = grant.verb.clone();
                lines.push((grant, vec![verb]));
            }
        }
    }
    let mut lines: Vec<String> = lines
        .into_iter()
        .map(|(grant, verbs)| match &*grant.path {
            "" => {
                let names = grant.names.map(|names| format!(", ResourceNames:{names:?}")).unwrap_or_default();
                format!("{{APIGroups:[{:?}], Resources:[{:?}]{names}, Verbs:{verbs:?}}}", grant.group, grant.resource)
            }
            path => format!("{{NonResourceURLs:[{path:?}], Verbs:{verbs:?}}}"),
        })
        .collect();
    lines.sort();
    lines
}

/// Who is bound: names and groups; a service account is its user name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Who {
    User(String),
    Group(String),
}

fn who(subject: &Subject, namespace: &str) -> Option<Who> {
    match &*subject.kind {
        "User" => Some(Who::User(subject.name.clone())),
        "Group" => Some(Who::Group(subject.name.clone())),
        "ServiceAccount" => {
            let namespace = subject.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(namespace);
            Some(Who::User(format!("system:serviceaccount:{namespace}:{}", subject.name)))
        }
        _ => None,
    }
}

/// A role by namespace, which is empty for a ClusterRole, and name.
type RoleKey = (String, String);

#[derive(Clone, Debug)]
struct Bound {
    binding: Arc<str>,
    role: RoleKey,
}

/// A binding, as far as it matters.
#[derive(Debug)]
struct Binding {
    name: Arc<str>,
    /// Empty for one of the cluster.
    namespace: String,
    subjects: Vec<Who>,
    role: RoleKey,
}

/// Where a role is that a binding of this namespace refers to.
pub fn role_key(namespace: &str, role: &RoleRef) -> RoleKey {
    let namespace = if role.kind == "Role" { namespace.to_owned() } else { String::new() };
    (namespace, role.name.clone())
}

/// All roles and who has them.
#[derive(Debug, Default)]
pub struct Index {
    roles: HashMap<RoleKey, Arc<Vec<PolicyRule>>>,
    /// By namespace, which is empty for bindings of the cluster.
    bindings: HashMap<String, HashMap<Who, Vec<Bound>>>,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::User(name) => write!(f, "User {name:?}"),
            Who::Group(name) => write!(f, "Group {name:?}"),
        }
    }
}

impl Index {
    fn add(&mut self, binding: &Binding) {
        let of = self.bindings.entry(binding.namespace.clone()).or_default();
        for subject in &binding.subjects {
            let bound = Bound { binding: binding.name.clone(), role: binding.role.clone() };
            of.entry(subject.clone()).or_default().push(bound);
        }
    }

    /// The rules of a role, if it exists.
    pub fn role(&self, key: &RoleKey) -> Option<&[PolicyRule]> {
        self.roles.get(key).map(|rules| &rules[..])
    }

    /// Everything that binds a user in a namespace, those of the cluster first.
    fn bound<'a>(&'a self, user: &'a UserInfo, namespace: &'a str) -> impl Iterator<Item = (&'a str, Who, &'a Bound)> {
        let scopes = std::iter::once("").chain((!namespace.is_empty()).then_some(namespace));
        scopes.flat_map(move |scope| {
            let whos = std::iter::once(Who::User(user.username.clone()))
                .chain(user.groups.iter().map(|group| Who::Group(group.clone())));
            whos.flat_map(move |who| {
                let bound = self.bindings.get(scope).and_then(|of| of.get(&who)).map(Vec::as_slice).unwrap_or_default();
                bound.iter().map(move |bound| (scope, who.clone(), bound))
            })
        })
    }

    /// Whether a user may, and by what.
    pub fn authorize(&self, user: &UserInfo, a: &Attributes<'_>) -> Result<String, String> {
        let mut lacking = HashSet::new();
        for (scope, who, bound) in self.bound(user, a.namespace) {
            let role = match &*bound.role.0 {
                "" => "ClusterRole",
                _ => "Role",
            };
            let Some(rules) = self.role(&bound.role) else {
                lacking.insert(format!("{}.{GROUP} {:?} not found", role.to_lowercase(), bound.role.1));
                continue;
            };
            if rules.iter().any(|rule| allows(rule, a)) {
                let (kind, binding) = match scope {
                    "" => ("ClusterRoleBinding", bound.binding.to_string()),
                    namespace => ("RoleBinding", format!("{}/{namespace}", bound.binding)),
                };
                return Ok(format!("RBAC: allowed by {kind} {binding:?} of {role} {:?} to {who}", bound.role.1));
            }
        }
        if lacking.is_empty() {
            return Err(String::new());
        }
        let mut lacking: Vec<String> = lacking.into_iter().collect();
        lacking.sort();
        Err(format!("RBAC: {}", lacking.join(", ")))
    }

    /// Every rule that a user has in a namespace.
    pub fn rules(&self, user: &UserInfo, namespace: &str) -> Vec<PolicyRule> {
        let roles = self.bound(user, namespace).filter_map(|(_, _, bound)| self.role(&bound.role));
        roles.flatten().cloned().collect()
    }
}

/// What was read from an object.
enum Read {
    Role(RoleKey, Arc<Vec<PolicyRule>>),
    Binding(Binding),
}

/// Roles and bindings, as the cache has them.
#[derive(Default)]
pub struct Rbac {
    ids: OnceLock<Vec<(ResourceId, &'static str)>>,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    maps: Vec<Objects>,
    read: HashMap<Arc<str>, (Revision, Arc<Read>)>,
    index: Arc<Index>,
}

const PLURALS: [&str; 4] = ["clusterroles", "roles", "clusterrolebindings", "rolebindings"];

impl Rbac {
    /// The index of a snapshot. It is only made anew when something has changed, from what has changed.
    pub fn index(&self, registry: &Registry, snapshot: &Snapshot) -> Arc<Index> {
        // Every request asks: they are looked up once.
        let ids = self.ids.get_or_init(|| {
            PLURALS.iter().filter_map(|plural| Some((registry.by_name(GROUP, plural)?.0, *plural))).collect()
        });
        let mut last = self.last.lock();
        let same = |(at, (id, _)): (usize, &(ResourceId, &str))| {
            last.maps.get(at).is_some_and(|map| map.ptr_eq(snapshot.of(*id)))
        };
        if last.maps.len() == ids.len() && ids.iter().enumerate().all(same) {
            return last.index.clone();
        }
        let mut read = HashMap::with_capacity(last.read.len());
        let mut index = Index::default();
        for (id, plural) in ids {
            for (key, object) in snapshot.of(*id) {
                let known = last.read.get(key).filter(|(revision, _)| *revision == object.revision);
                let found =
                    known.map(|(_, found)| found.clone()).or_else(|| parse(plural, &object.bytes).map(Arc::new));
                // What was written before it was validated is no permission.
                let Some(found) = found else { continue };
                match &*found {
                    Read::Role(key, rules) => {
                        index.roles.insert(key.clone(), rules.clone());
                    }
                    Read::Binding(binding) => index.add(binding),
                }
                read.insert(key.clone(), (object.revision, found));
            }
        }
        last.maps = ids.iter().map(|(id, _)| snapshot.of(*id).clone()).collect();
        last.read = read;
        last.index = Arc::new(index);
        last.index.clone()
    }
}

fn parse(plural: &str, bytes: &[u8]) -> Option<Read> {
    fn of<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
        serde_json::from_slice(bytes).ok()
    }
    let text = |text: Option<String>| text.unwrap_or_default();
    match plural {
        "clusterroles" => {
            let role: ClusterRole = of(bytes)?;
            let key = (String::new(), text(role.metadata.name));
            Some(Read::Role(key, Arc::new(role.rules.unwrap_or_default())))
        }
        "roles" => {
            let role: Role = of(bytes)?;
            let key = (text(role.metadata.namespace), text(role.metadata.name));
            Some(Read::Role(key, Arc::new(role.rules.unwrap_or_default())))
        }
        "clusterrolebindings" => {
            let binding: ClusterRoleBinding = of(bytes)?;
            let role = role_key("", &binding.role_ref);
            Some(Read::Binding(bound(text(binding.metadata.name), String::new(), binding.subjects, role)))
        }
        "rolebindings" => {
            let binding: RoleBinding = of(bytes)?;
            let namespace = text(binding.metadata.namespace);
            let role = role_key(&namespace, &binding.role_ref);
            Some(Read::Binding(bound(text(binding.metadata.name), namespace, binding.subjects, role)))
        }
        _ => None,
    }
}

fn bound(name: String, namespace: String, subjects: Option<Vec<Subject>>, role: RoleKey) -> Binding {
    let subjects = subjects.iter().flatten().filter_map(|subject| who(subject, &namespace)).collect();
    Binding { name: name.into(), namespace, subjects, role }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rule(value: Value) -> PolicyRule {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_a_rule_speaks_of() {
        let check = |rule_of: Value, a: Attributes<'_>, expect: bool| {
            assert_eq!(allows(&rule(rule_of.clone()), &a), expect, "{rule_of} {a:?}");
        };
        let pods = Attributes { verb: "get", resource: "pods", ..Default::default() };
        let log = Attributes { subresource: "log", ..pods.clone() };
        let named = Attributes { name: "a", ..pods.clone() };
        let core =
            |resources: &str, verbs: &str| json!({"apiGroups": [""], "resources": [resources], "verbs": [verbs]});
        check(core("pods", "get"), pods.clone(), true);
        check(core("pods", "list"), pods.clone(), false);
        check(core("pods", "*"), pods.clone(), true);
        check(core("*", "get"), log.clone(), true);
        check(core("pods", "get"), log.clone(), false);
        check(core("pods/log", "get"), log.clone(), true);
        check(core("pods/log", "get"), pods.clone(), false);
        check(core("*/log", "get"), log.clone(), true);
        check(core("*/exec", "get"), log, false);
        check(json!({"apiGroups": ["apps"], "resources": ["pods"], "verbs": ["get"]}), pods.clone(), false);
        check(json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}), pods.clone(), true);
        let one = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["get"], "resourceNames": ["a"]});
        check(one.clone(), named, true);
        check(one, pods, false);
        let path = |path| Attributes { verb: "get", path, ..Default::default() };
        let urls = |url: &str| json!({"nonResourceURLs": [url], "verbs": ["get"]});
        check(urls("/healthz"), path("/healthz"), true);
        check(urls("/healthz"), path("/healthz/ping"), false);
        check(urls("/healthz/*"), path("/healthz/ping"), true);
        check(urls("*"), path("/metrics"), true);
        check(core("*", "*"), path("/metrics"), false);
    }

    #[test]
    fn nobody_gives_what_they_do_not_have() {
        let check = |held: Value, wanted: Value, expect: &[&str]| {
            let rules = |value: Value| -> Vec<PolicyRule> { serde_json::from_value(value).unwrap() };
            assert_eq!(not_held(&rules(held.clone()), &rules(wanted.clone())), expect, "{held} {wanted}");
        };
        let pods = |verbs: Value| json!([{"apiGroups": [""], "resources": ["pods"], "verbs": verbs}]);
        check(pods(json!(["get", "list"])), pods(json!(["get"])), &[]);
        check(
            pods(json!(["get"])),
            pods(json!(["get", "delete", "patch"])),
            &["{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"delete\", \"patch\"]}"],
        );
        check(json!([{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]), pods(json!(["*"])), &[]);
        check(pods(json!(["*"])), pods(json!(["get", "*"])), &[]);
        check(
            pods(json!(["get", "list"])),
            pods(json!(["*"])),
            &["{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"*\"]}"],
        );
        let named = |names: Value| json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"], "resourceNames": names}]);
        check(pods(json!(["get"])), named(json!(["a"])), &[]);
        check(named(json!(["a", "b"])), named(json!(["a"])), &[]);
        check(
            named(json!(["a"])),
            named(json!(["a", "b"])),
            &["{APIGroups:[\"\"], Resources:[\"pods\"], ResourceNames:[\"a\", \"b\"], Verbs:[\"get\"]}"],
        );
        assert_eq!(
            not_held(&[rule(named(json!(["a"]))[0].clone())], &[rule(pods(json!(["get"]))[0].clone())]).len(),
            1
        );
        let sub = |resource: &str| json!([{"apiGroups": [""], "resources": [resource], "verbs": ["get"]}]);
        check(sub("*/scale"), sub("deployments/scale"), &[]);
        check(
            sub("deployments"),
            sub("deployments/scale"),
            &["{APIGroups:[\"\"], Resources:[\"deployments/scale\"], Verbs:[\"get\"]}"],
        );
        let url = |url: &str| json!([{"nonResourceURLs": [url], "verbs": ["get"]}]);
        check(url("/a/*"), url("/a/b"), &[]);
        check(url("/a"), url("/b"), &["{NonResourceURLs:[\"/b\"], Verbs:[\"get\"]}"]);
    }

    #[test]
    fn who_is_bound_to_what() {
        let mut index = Index::default();
        let rules = |value: Value| Arc::new(vec![rule(value)]);
        let read = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]});
        index.roles.insert((String::new(), "reader".into()), rules(read));
        let write = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]});
        index.roles.insert(("a".into(), "writer".into()), rules(write));
        let subject = |kind: &str, name: &str| json!({"kind": kind, "name": name});
        let mut bind = |name: &str, namespace: &str, subject: Value, kind: &str, role: &str| {
            let subjects = serde_json::from_value(json!([subject])).unwrap();
            let role = RoleRef { api_group: Some(GROUP.into()), kind: kind.into(), name: role.into() };
            index.add(&bound(name.into(), namespace.into(), Some(subjects), role_key(namespace, &role)));
        };
        bind("everyone", "", subject("Group", "team"), "ClusterRole", "reader");
        bind("robot", "a", subject("ServiceAccount", "robot"), "Role", "writer");
        bind("jane", "a", subject("User", "jane"), "ClusterRole", "reader");
        bind("lost", "b", subject("User", "jane"), "Role", "none");
        let check = |user: &UserInfo, verb: &str, namespace: &str, expect: Result<&str, &str>| {
            let a = Attributes { verb, resource: "pods", namespace, ..Default::default() };
            let found = index.authorize(user, &a);
            assert_eq!(found.as_deref().map_err(|e| &**e), expect, "{} {verb} {namespace}", user.username);
        };
        let member = UserInfo::new("x", &["team"]);
        let by_group = "RBAC: allowed by ClusterRoleBinding \"everyone\" of ClusterRole \"reader\" to Group \"team\"";
        check(&member, "get", "", Ok(by_group));
        check(&member, "get", "b", Ok(by_group));
        check(&member, "delete", "a", Err(""));
        let robot = UserInfo::new("system:serviceaccount:a:robot", &[]);
        check(
            &robot,
            "delete",
            "a",
            Ok("RBAC: allowed by RoleBinding \"robot/a\" of Role \"writer\" to User \"system:serviceaccount:a:robot\""),
        );
        check(&robot, "delete", "b", Err(""));
        check(&robot, "delete", "", Err(""));
        let jane = UserInfo::new("jane", &[]);
        check(
            &jane,
            "get",
            "a",
            Ok("RBAC: allowed by RoleBinding \"jane/a\" of ClusterRole \"reader\" to User \"jane\""),
        );
        check(&jane, "get", "b", Err("RBAC: role.rbac.authorization.k8s.io \"none\" not found"));
        assert_eq!(index.rules(&jane, "a").len(), 1);
        assert_eq!(index.rules(&jane, "c").len(), 0);
    }
}
