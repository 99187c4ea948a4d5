//! From FlowSchemas and PriorityLevelConfigurations to a decision: which level a request belongs to, and as part of which
//! flow. Pure.

use std::hash::{DefaultHasher, Hash, Hasher};

use k8s_openapi::api::flowcontrol::v1::{
    FlowSchema, GroupSubject, NonResourcePolicyRule, PolicyRulesWithSubjects, PriorityLevelConfiguration,
    ResourcePolicyRule, Subject,
};

use super::queues::{Limits, Queuing};
use crate::auth::{MASTERS, UserInfo, authorize::Attributes};

/// Has no limits.
pub const EXEMPT: &str = "exempt";
/// Where requests belong that nothing else speaks of.
pub const CATCH_ALL: &str = "catch-all";
const ANY: &str = "*";

/// A level, as it was configured.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// Its name.
    pub name: String,
    /// The identity of its object.
    pub uid: String,
    /// Nothing ever waits.
    pub exempt: bool,
    shares: f64,
    lendable: f64,
    borrowing: Option<f64>,
    queuing: Option<Queuing>,
}

impl Level {
    fn read(object: &PriorityLevelConfiguration) -> Option<Level> {
        let name = object.metadata.name.clone()?;
        let uid = object.metadata.uid.clone().unwrap_or_default();
        let spec = &object.spec;
        let count = |number: Option<i32>, default: i32| f64::from(number.unwrap_or(default).max(0));
        let size = |number: Option<i32>, default: usize| {
            number.and_then(|n| usize::try_from(n).ok()).map_or(default, |n| n.clamp(1, 10_000))
        };
        if spec.type_ == "Exempt" {
            let exempt = spec.exempt.clone().unwrap_or_default();
            return Some(Level {
                name,
                uid,
                exempt: true,
                shares: count(exempt.nominal_concurrency_shares, 0),
                lendable: count(exempt.lendable_percent, 0) / 100.0,
                borrowing: None,
                queuing: None,
            });
        }
        let limited = spec.limited.clone().unwrap_or_default();
        let response = limited.limit_response;
        let queuing = (response.type_ == "Queue").then(|| {
            let queuing = response.queuing.unwrap_or_default();
            Queuing {
                queues: size(queuing.queues, 64),
                hand: size(queuing.hand_size, 8),
                length: size(queuing.queue_length_limit, 50),
            }
        });
        Some(Level {
            name,
            uid,
            exempt: false,
            shares: count(limited.nominal_concurrency_shares, 30),
            lendable: count(limited.lendable_percent, 0) / 100.0,
            borrowing: limited.borrowing_limit_percent.map(|percent| f64::from(percent.max(0)) / 100.0),
            queuing,
        })
    }

    /// The seats of a level whose part of all `total` seats is `shares` of `all`
    /// (<https://kubernetes.io/docs/concepts/cluster-administration/flow-control/#prioritylevelconfiguration>).
    fn limits(&self, all: f64, total: u32) -> Limits {
        if self.exempt {
            return Limits { nominal: 0, guaranteed: 0, most: u32::MAX / 2, queuing: None };
        }
        let nominal = if all > 0.0 { (f64::from(total) * self.shares / all).ceil() } else { 0.0 };
        let lent = (nominal * self.lendable).round();
        let most = match self.borrowing {
            Some(part) => nominal + (nominal * part).round(),
            None => nominal + f64::from(total),
        };
        // Rounded above, and far from the limits of the type.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let seats = |number: f64| number as u32;
        Limits {
            nominal: seats(nominal),
            guaranteed: seats(nominal - lent),
            most: seats(most).max(1),
            queuing: self.queuing,
        }
    }
}

/// What tells flows of a schema apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Nothing,
    User,
    Namespace,
}

/// Everything that is asked by members of a group.
fn rules_of(group: &str) -> Vec<PolicyRulesWithSubjects> {
    let any = || vec![ANY.to_owned()];
    let group = Some(GroupSubject { name: group.to_owned() });
    vec![PolicyRulesWithSubjects {
        subjects: vec![Subject { kind: "Group".into(), group, ..Subject::default() }],
        resource_rules: Some(vec![ResourcePolicyRule {
            verbs: any(),
            api_groups: any(),
            resources: any(),
            namespaces: Some(any()),
            cluster_scope: Some(true),
        }]),
        non_resource_rules: Some(vec![NonResourcePolicyRule { verbs: any(), non_resource_urls: any() }]),
    }]
}

/// A schema.
#[derive(Clone, Debug)]
pub struct Schema {
    /// Its name.
    pub name: String,
    /// The identity of its object.
    pub uid: String,
    /// The place of its level in [`Plan::levels`].
    pub level: usize,
    precedence: i32,
    by: By,
    rules: Vec<PolicyRulesWithSubjects>,
}

/// Everything that is configured.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The levels.
    pub levels: Vec<Level>,
    schemas: Vec<Schema>,
    /// Schemas that lead to no level, by name.
    pub dangling: Vec<String>,
}

impl Plan {
    /// Of the objects as they are. Those that every cluster has are made up if they are missing. Levels keep the places
    /// that they have in `before`.
    pub fn of(schemas: &[FlowSchema], levels: &[PriorityLevelConfiguration], before: &Plan) -> Plan {
        let mut plan = Plan::default();
        let unused = |level: &Level| Level { shares: 0.0, ..level.clone() };
        plan.levels.extend(before.levels.iter().map(unused));
        let read = levels.iter().filter_map(Level::read);
        let mut known: Vec<Level> = read.collect();
        for (name, exempt) in [(EXEMPT, true), (CATCH_ALL, false)] {
            if !known.iter().any(|level| level.name == name) {
                known.push(Level {
                    name: name.into(),
                    uid: String::new(),
                    exempt,
                    shares: if exempt { 0.0 } else { 5.0 },
                    lendable: 0.0,
                    borrowing: None,
                    queuing: None,
                });
            }
        }
        let names: Vec<String> = known.iter().map(|level| level.name.clone()).collect();
        for level in known {
            match plan.levels.iter_mut().find(|other| other.name == level.name) {
                Some(place) => *place = level,
                None => plan.levels.push(level),
            }
        }
        for object in schemas {
            let (Some(name), spec) = (object.metadata.name.clone(), &object.spec) else { continue };
            let level = &spec.priority_level_configuration.name;
            let at = plan.levels.iter().position(|l| l.name == *level).filter(|_| names.contains(level));
            let Some(level) = at else {
                plan.dangling.push(name);
                continue;
            };
            plan.schemas.push(Schema {
                name,
                uid: object.metadata.uid.clone().unwrap_or_default(),
                level,
                precedence: spec.matching_precedence.unwrap_or(1000),
                by: match spec.distinguisher_method.as_ref().map(|m| m.type_.as_str()) {
                    Some("ByUser") => By::User,
                    Some("ByNamespace") => By::Namespace,
                    _ => By::Nothing,
                },
                rules: spec.rules.clone().unwrap_or_default(),
            });
        }
        let place = |name: &str| plan.levels.iter().position(|level| level.name == name).unwrap_or_default();
        // Administrators get through whatever is said, and nobody falls through.
        let made_up = [(EXEMPT, i32::MIN, By::Nothing, rules_of(MASTERS)), (CATCH_ALL, i32::MAX, By::User, Vec::new())];
        let made_up = made_up.map(|(name, precedence, by, rules)| {
            let known = schemas.iter().find(|s| s.metadata.name.as_deref() == Some(name));
            let uid = known.and_then(|s| s.metadata.uid.clone()).unwrap_or_default();
            Schema { name: name.into(), uid, level: place(name), precedence, by, rules }
        });
        plan.schemas.extend(made_up);
        plan.schemas.sort_by(|a, b| (a.precedence, &a.name).cmp(&(b.precedence, &b.name)));
        plan
    }

    /// The seats of every level, out of so many.
    pub fn limits(&self, total: u32) -> Vec<Limits> {
        let all: f64 = self.levels.iter().map(|level| level.shares).sum();
        self.levels.iter().map(|level| level.limits(all, total)).collect()
    }

    /// The schema that a request belongs to, and the number of its flow.
    pub fn find(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Option<(&Schema, u64)> {
        let fits = |schema: &&Schema| schema.rules.iter().any(|rule| matches(rule, user, attributes));
        let schema = self.schemas.iter().find(fits).or(self.schemas.last())?;
        let mut hasher = DefaultHasher::new();
        schema.name.hash(&mut hasher);
        match schema.by {
            By::Nothing => {}
            By::User => user.username.hash(&mut hasher),
            By::Namespace => attributes.namespace.hash(&mut hasher),
        }
        Some((schema, hasher.finish()))
    }
}

fn matches(rule: &PolicyRulesWithSubjects, user: &UserInfo, a: &Attributes<'_>) -> bool {
    let asked = match a.resource {
        "" => rule.non_resource_rules.iter().flatten().any(|rule| of_path(rule, a)),
        _ => rule.resource_rules.iter().flatten().any(|rule| of_resource(rule, a)),
    };
    asked && rule.subjects.iter().any(|subject| speaks_of(subject, user))
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|found| found == ANY || found == wanted)
}

fn of_path(rule: &NonResourcePolicyRule, a: &Attributes<'_>) -> bool {
    let under = |pattern: &String| match pattern.strip_suffix('*') {
        Some(prefix) => a.path.starts_with(prefix),
        None => a.path == pattern,
    };
    has(&rule.verbs, a.verb) && rule.non_resource_urls.iter().any(under)
}

fn of_resource(rule: &ResourcePolicyRule, a: &Attributes<'_>) -> bool {
    let resource = |pattern: &String| match pattern.split_once('/') {
        None => pattern == ANY || (pattern == a.resource && a.subresource.is_empty()),
        Some((resource, sub)) => (resource == ANY || resource == a.resource) && (sub == ANY || sub == a.subresource),
    };
    let place = match a.namespace {
        "" => rule.cluster_scope == Some(true),
        namespace => has(rule.namespaces.as_deref().unwrap_or_default(), namespace),
    };
    place && has(&rule.verbs, a.verb) && has(&rule.api_groups, a.group) && rule.resources.iter().any(resource)
}

fn speaks_of(subject: &Subject, user: &UserInfo) -> bool {
    let is = |name: &str, wanted: &str| name == ANY || name == wanted;
    if let Some(group) = &subject.group {
        return user.groups.iter().any(|own| is(&group.name, own));
    }
    if let Some(named) = &subject.user {
        return is(&named.name, &user.username);
    }
    let Some(account) = &subject.service_account else { return false };
    let mut parts = user.username.strip_prefix("system:serviceaccount:").unwrap_or_default().splitn(2, ':');
    let (Some(namespace), Some(name)) = (parts.next(), parts.next()) else { return false };
    account.namespace == namespace && is(&account.name, name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{auth::NODES, flow::bootstrap};

    fn usual() -> Plan {
        let (levels, schemas) = bootstrap::objects();
        let read = |values: Vec<serde_json::Value>| {
            values.into_iter().map(|v| serde_json::from_value(v).unwrap()).collect::<Vec<FlowSchema>>()
        };
        let levels: Vec<PriorityLevelConfiguration> =
            levels.into_iter().map(|v| serde_json::from_value(v).unwrap()).collect();
        Plan::of(&read(schemas), &levels, &Plan::default())
    }

    #[test]
    fn who_belongs_where() {
        let plan = usual();
        assert!(plan.dangling.is_empty());
        let check = |user: &UserInfo, what: (&str, &str, &str, &str), expect: (&str, &str)| {
            let (verb, group, resource, namespace) = what;
            let path = if resource.starts_with('/') { resource } else { "" };
            let resource = if path.is_empty() { resource } else { "" };
            let attributes = Attributes { verb, group, resource, namespace, path, ..Default::default() };
            let (schema, _) = plan.find(user, &attributes).unwrap();
            assert_eq!((&*schema.name, &*plan.levels[schema.level].name), expect, "{user:?} {what:?}");
        };
        let node = UserInfo::new("system:node:a", &[NODES]);
        let account = |namespace: &str, name: &str| {
            let groups = ["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")];
            UserInfo::new(format!("system:serviceaccount:{namespace}:{name}"), &groups)
        };
        let admin = UserInfo::new("kubernetes-admin", &[MASTERS]);
        let anna = UserInfo::new("anna", &[]);
        let controllers = UserInfo::new("system:kube-controller-manager", &[]);
        check(&admin, ("delete", "", "pods", "a"), ("exempt", "exempt"));
        check(&UserInfo::anonymous(), ("get", "", "/healthz", ""), ("probes", "exempt"));
        check(&node, ("update", "coordination.k8s.io", "leases", "kube-node-lease"), ("system-node-high", "node-high"));
        check(&node, ("list", "", "pods", ""), ("system-nodes", "system"));
        check(&controllers, ("list", "", "pods", ""), ("kube-controller-manager", "workload-high"));
        check(
            &controllers,
            ("update", "coordination.k8s.io", "leases", "kube-system"),
            ("system-leader-election", "leader-election"),
        );
        check(
            &account("kube-system", "x"),
            ("list", "", "pods", ""),
            ("kube-system-service-accounts", "workload-high"),
        );
        check(&account("a", "x"), ("list", "", "pods", ""), ("service-accounts", "workload-low"));
        check(
            &account("kube-system", "x"),
            ("update", "coordination.k8s.io", "leases", "a"),
            ("workload-leader-election", "leader-election"),
        );
        check(&UserInfo::new("system:seawall", &[]), ("list", "", "pods", ""), ("system-servers", "system"));
        check(&anna, ("list", "", "pods", ""), ("global-default", "global-default"));
        check(&anna, ("get", "", "/version", ""), ("global-default", "global-default"));
    }

    #[test]
    fn flows() {
        let plan = usual();
        let flow = |user: &str| {
            let attributes = Attributes { verb: "list", resource: "pods", ..Default::default() };
            plan.find(&UserInfo::new(user, &[]), &attributes).unwrap().1
        };
        assert_eq!(flow("anna"), flow("anna"));
        assert_ne!(flow("anna"), flow("berta"));
    }

    #[test]
    fn seats() {
        let plan = usual();
        let limits = plan.limits(600);
        let of = |name: &str| &limits[plan.levels.iter().position(|l| l.name == name).unwrap()];
        // 600 seats in 245 shares.
        assert_eq!((of("system").nominal, of("system").guaranteed), (74, 50));
        assert_eq!((of("leader-election").nominal, of("leader-election").guaranteed), (25, 25));
        assert_eq!((of("workload-low").nominal, of("workload-low").guaranteed), (245, 24));
        assert_eq!(of("catch-all").queuing, None);
    }

    #[test]
    fn without_objects_everything_goes_through_one_level() {
        let plan = Plan::of(&[], &[], &Plan::default());
        let (schema, _) = plan.find(&UserInfo::anonymous(), &Attributes::default()).unwrap();
        assert_eq!(plan.levels[schema.level].name, "catch-all");
        let dangling: FlowSchema = serde_json::from_value(serde_json::json!({"metadata": {"name": "x"},
            "spec": {"priorityLevelConfiguration": {"name": "nowhere"}}}))
        .unwrap();
        let after = Plan::of(&[dangling], &[], &usual());
        assert_eq!(after.dangling, ["x"]);
        let places = |plan: &Plan| plan.levels.iter().map(|l| l.name.clone()).collect::<Vec<_>>();
        assert_eq!(places(&after), places(&usual()), "levels keep their places");
    }
}
