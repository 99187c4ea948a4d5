//! What the garbage collector knows, and what it decides from it. No I/O happens here.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ApiResource;

/// Holds an owner until the dependents that block its deletion are gone.
pub const FOREGROUND: &str = "foregroundDeletion";
/// Holds an owner until its dependents have been cut loose.
pub const ORPHAN: &str = "orphan";
/// Remembered absences; a uid is never used again, so that forgetting one costs a request and nothing else.
const REMEMBERED: usize = 4096;

/// The uid of an object.
pub type Uid = Arc<str>;

/// A kind of object.
#[derive(Clone, Debug, PartialEq)]
pub struct Kind {
    /// How to reach it.
    pub resource: ApiResource,
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
}

/// A reference to an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Whom it means. The rest only says where to look.
    pub uid: Uid,
    /// The group of its kind.
    pub group: Box<str>,
    /// Its kind.
    pub kind: Box<str>,
    /// Its name.
    pub name: Box<str>,
    /// Whether the owner's foreground deletion waits for this dependent.
    pub blocks: bool,
}

/// What is kept of an object.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its kind.
    pub kind: Arc<Kind>,
    /// Its namespace, or nothing.
    pub namespace: Box<str>,
    /// Its name.
    pub name: Box<str>,
    /// Its uid.
    pub uid: Uid,
    /// The version that was last seen.
    pub version: Box<str>,
    /// Its owners.
    pub owners: Box<[Owner]>,
    /// It is being deleted.
    pub deleting: bool,
    /// It has the finalizer [`FOREGROUND`].
    pub foreground: bool,
    /// It has the finalizer [`ORPHAN`].
    pub orphan: bool,
}

impl Node {
    /// What is kept of an object of `kind`; nothing if it has no uid, which the API server never leaves out.
    pub fn new(kind: &Arc<Kind>, meta: &ObjectMeta) -> Option<Node> {
        let has = |finalizer: &str| meta.finalizers.iter().flatten().any(|f| f == finalizer);
        let owners = meta.owner_references.iter().flatten().map(|owner| Owner {
            uid: owner.uid.as_str().into(),
            group: owner.api_version.rsplit_once('/').map_or("", |(group, _)| group).into(),
            kind: owner.kind.as_str().into(),
            name: owner.name.as_str().into(),
            blocks: owner.block_owner_deletion == Some(true),
        });
        Some(Node {
            kind: kind.clone(),
            namespace: meta.namespace.as_deref().unwrap_or_default().into(),
            name: meta.name.as_deref()?.into(),
            uid: meta.uid.as_deref()?.into(),
            version: meta.resource_version.as_deref().unwrap_or_default().into(),
            owners: owners.collect(),
            deleting: meta.deletion_timestamp.is_some(),
            foreground: has(FOREGROUND),
            orphan: has(ORPHAN),
        })
    }

    /// It is being deleted, and its dependents go first.
    fn waits(&self) -> bool {
        self.deleting && self.foreground
    }

    /// It is being deleted, and waits for the garbage collector.
    fn wants_us(&self) -> bool {
        self.deleting && (self.foreground || self.orphan)
    }
}

/// How an owner stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is there.
    Solid,
    /// It is being deleted and waits for its dependents.
    Waiting,
    /// It is not there.
    Gone,
}

/// How dependents are treated when an object is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// They go afterwards.
    Background,
    /// They go first.
    Foreground,
    /// They stay.
    Orphan,
}

/// What to do about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// All is as it should be.
    Nothing,
    /// Ask the API server about these owners and decide again.
    Ask(Vec<Owner>),
    /// Delete it. Before, let it no longer hold its owners if it is part of a circle in which each would wait for the
    /// other.
    Delete {
        /// How its own dependents are treated.
        policy: Policy,
        /// Whether it is part of a circle.
        unblock: bool,
    },
    /// Take away its references to these owners.
    Unlink(Vec<Uid>),
    /// No dependent holds it any more: take the finalizer away.
    Release,
    /// Take the references to it away from these dependents, then the finalizer from it.
    Orphan(Vec<Uid>),
}

/// All objects, by uid, and who depends on whom.
#[derive(Default)]
pub struct Graph {
    nodes: HashMap<Uid, Node>,
    dependents: HashMap<Uid, BTreeSet<Uid>>,
    /// Owners known not to be there, with the namespace in which they were looked for; nothing for everywhere.
    gone: HashSet<(Uid, Option<Box<str>>)>,
    gone_order: VecDeque<(Uid, Option<Box<str>>)>,
}

impl Graph {
    /// The object with this uid.
    pub fn get(&self, uid: &str) -> Option<&Node> {
        self.nodes.get(uid)
    }

    /// How many objects are known.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    fn dependents(&self, uid: &str) -> impl Iterator<Item = &Node> {
        self.dependents.get(uid).into_iter().flatten().filter_map(|uid| self.nodes.get(uid))
    }

    /// Takes in how an object is now, and returns what to look at because of it. A change that concerns neither owners
    /// nor deletion, as most do, concerns nobody here.
    pub fn apply(&mut self, node: Node) -> Vec<Uid> {
        let uid = node.uid.clone();
        let old = self.nodes.insert(uid.clone(), node);
        let node = &self.nodes[&uid];
        let mut look = Vec::new();
        let before: &[Owner] = old.as_ref().map_or(&[], |old| &old.owners);
        let relinked = *before != *node.owners;
        let flags = |n: &Node| (n.deleting, n.foreground, n.orphan);
        if relinked || old.as_ref().map(flags) != Some(flags(node)) {
            look.push(uid.clone());
        }
        if node.waits() && !old.as_ref().is_some_and(Node::waits) {
            look.extend(self.dependents.get(&uid).into_iter().flatten().cloned());
        }
        if relinked {
            for owner in before.iter().chain(&node.owners) {
                if self.nodes.get(&owner.uid).is_some_and(Node::wants_us) {
                    look.push(owner.uid.clone());
                }
            }
            let now: Vec<Uid> = node.owners.iter().map(|owner| owner.uid.clone()).collect();
            for owner in before {
                unlink(&mut self.dependents, &owner.uid, &uid);
            }
            for owner in now {
                self.dependents.entry(owner).or_default().insert(uid.clone());
            }
        }
        look
    }

    /// Takes in that an object is gone, and returns what to look at because of it.
    pub fn remove(&mut self, uid: &str) -> Vec<Uid> {
        if self.nodes.contains_key(uid) {
            self.note_gone(uid.into(), None);
        }
        self.take(uid)
    }

    fn take(&mut self, uid: &str) -> Vec<Uid> {
        let Some(node) = self.nodes.remove(uid) else { return Vec::new() };
        for owner in &node.owners {
            unlink(&mut self.dependents, &owner.uid, uid);
        }
        let mut look: Vec<Uid> = self.dependents.get(uid).into_iter().flatten().cloned().collect();
        let waiting = node.owners.iter().filter(|o| self.nodes.get(&o.uid).is_some_and(Node::wants_us));
        look.extend(waiting.map(|o| o.uid.clone()));
        look
    }

    /// Removes the objects of `kind` that a complete listing did not have.
    pub fn retain(&mut self, kind: &Arc<Kind>, listed: &HashSet<Uid>) -> Vec<Uid> {
        let missing: Vec<Uid> = self.of(kind).filter(|uid| !listed.contains(*uid)).cloned().collect();
        missing.iter().flat_map(|uid| self.remove(uid)).collect()
    }

    fn of(&self, kind: &Arc<Kind>) -> impl Iterator<Item = &Uid> {
        self.nodes.values().filter(|n| Arc::ptr_eq(&n.kind, kind)).map(|n| &n.uid)
    }

    /// Removes the objects of a kind that is no longer served, and returns those who depended on them. Whether they are
    /// there nobody can say: a server behind the aggregation layer that does not answer keeps what it has.
    pub fn forget(&mut self, kind: &Arc<Kind>) -> Vec<Uid> {
        let ours: Vec<Uid> = self.of(kind).cloned().collect();
        ours.iter().flat_map(|uid| self.take(uid)).collect()
    }

    /// Those who depend on an object of `kind` that no watch has shown. After a complete listing they are looked at: the
    /// object may have been asked for while it was there, and have gone before it was watched.
    pub fn unseen(&self, kind: &Kind) -> Vec<Uid> {
        let of = |owner: &Owner| *owner.group == kind.resource.group && *owner.kind == kind.resource.kind;
        let unseen = self.dependents.iter().filter(|(owner, _)| !self.nodes.contains_key(&**owner));
        let dependents = unseen.flat_map(|(owner, uids)| uids.iter().map(move |uid| (owner, uid)));
        let ours = dependents.filter(|(owner, uid)| {
            self.nodes.get(*uid).is_some_and(|n| n.owners.iter().any(|o| o.uid == **owner && of(o)))
        });
        ours.map(|(_, uid)| uid.clone()).collect()
    }

    /// Remembers that there is no such owner; in one namespace if that is where it was looked for.
    pub fn note_gone(&mut self, uid: Uid, namespace: Option<Box<str>>) {
        if self.gone.insert((uid.clone(), namespace.clone())) {
            self.gone_order.push_back((uid, namespace));
        }
        if self.gone_order.len() > REMEMBERED
            && let Some(oldest) = self.gone_order.pop_front()
        {
            self.gone.remove(&oldest);
        }
    }

    fn standing(&self, node: &Node, owner: &Owner) -> Option<Standing> {
        match self.nodes.get(&owner.uid) {
            // A namespaced owner in another namespace is none: what the reference means is looked for in the
            // dependent's own.
            Some(found) if found.namespace.is_empty() || found.namespace == node.namespace => {
                Some(if found.waits() { Standing::Waiting } else { Standing::Solid })
            }
            _ => {
                let gone = self.gone.contains(&(owner.uid.clone(), None))
                    || self.gone.contains(&(owner.uid.clone(), Some(node.namespace.clone())));
                gone.then_some(Standing::Gone)
            }
        }
    }

    /// Decides about one object, given what the API server has answered about owners that are not in the graph.
    pub fn plan(&self, uid: &str, answers: &HashMap<Uid, Standing>) -> Step {
        let Some(node) = self.nodes.get(uid) else { return Step::Nothing };
        if node.deleting {
            return match () {
                () if node.orphan => Step::Orphan(self.dependents(uid).map(|d| d.uid.clone()).collect()),
                () if node.foreground && !self.is_held(node) => Step::Release,
                () => Step::Nothing,
            };
        }
        let (mut solid, mut waiting, mut gone, mut ask) = (0, Vec::new(), Vec::new(), Vec::new());
        for owner in &node.owners {
            match self.standing(node, owner).or_else(|| answers.get(&owner.uid).copied()) {
                Some(Standing::Solid) => solid += 1,
                Some(Standing::Waiting) => waiting.push(owner.uid.clone()),
                Some(Standing::Gone) => gone.push(owner.uid.clone()),
                None => ask.push(owner.clone()),
            }
        }
        if !ask.is_empty() {
            return Step::Ask(ask);
        }
        if solid > 0 || node.owners.is_empty() {
            gone.append(&mut waiting);
            return if gone.is_empty() { Step::Nothing } else { Step::Unlink(gone) };
        }
        if !waiting.is_empty() && self.dependents(uid).next().is_some() {
            let unblock = self.dependents(uid).any(Node::waits);
            return Step::Delete { policy: Policy::Foreground, unblock };
        }
        // A finalizer set beforehand is somebody's wish.
        let policy = match () {
            () if node.orphan => Policy::Orphan,
            () if node.foreground => Policy::Foreground,
            () => Policy::Background,
        };
        Step::Delete { policy, unblock: false }
    }

    fn is_held(&self, owner: &Node) -> bool {
        self.dependents(&owner.uid).any(|dependent| {
            let here = owner.namespace.is_empty() || owner.namespace == dependent.namespace;
            here && dependent.owners.iter().any(|o| o.uid == owner.uid && o.blocks)
        })
    }
}

fn unlink(dependents: &mut HashMap<Uid, BTreeSet<Uid>>, owner: &str, dependent: &str) {
    if let Some(set) = dependents.get_mut(owner) {
        set.remove(dependent);
        if set.is_empty() {
            dependents.remove(owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn kind_of_pods() -> ApiResource {
        ApiResource::erase::<k8s_openapi::api::core::v1::Pod>(&())
    }

    fn kind() -> Arc<Kind> {
        Arc::new(Kind { resource: kind_of_pods(), namespaced: true })
    }

    /// `what` is a name, marks (`-` deleting, `f` foreground, `o` orphan), a colon and the owners; `!` blocks.
    fn node(what: &str) -> Node {
        let (head, owners) = what.split_once(':').unwrap_or((what, ""));
        let (name, marks) = head.split_once('/').unwrap_or((head, ""));
        let finalizers: Vec<&str> =
            [("f", FOREGROUND), ("o", ORPHAN)].iter().filter(|(m, _)| marks.contains(m)).map(|(_, f)| *f).collect();
        let owners: Vec<Value> = owners
            .split(',')
            .filter(|o| !o.is_empty())
            .map(|o| {
                let uid = o.trim_end_matches('!');
                json!({"apiVersion": "apps/v1", "kind": "K", "name": uid, "uid": uid, "blockOwnerDeletion": o.ends_with('!')})
            })
            .collect();
        let namespace = if marks.contains('x') { "other" } else { "default" };
        let mut meta = json!({"name": name, "uid": name, "namespace": namespace, "finalizers": finalizers, "ownerReferences": owners});
        if marks.contains('-') {
            meta["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        Node::new(&kind(), &serde_json::from_value(meta).unwrap()).unwrap()
    }

    fn graph(nodes: &[&str]) -> Graph {
        let mut graph = Graph::default();
        for what in nodes {
            graph.apply(node(what));
        }
        graph
    }

    fn uids(names: &[&str]) -> Vec<Uid> {
        names.iter().map(|n| Uid::from(*n)).collect()
    }

    #[test]
    fn decides() {
        let delete = |policy, unblock| Step::Delete { policy, unblock };
        let check = |nodes: &[&str], gone: &[&str], expect: Step, why: &str| {
            let answers = gone.iter().map(|n| (Uid::from(*n), Standing::Gone)).collect();
            assert_eq!(graph(nodes).plan("a", &answers), expect, "{why}");
        };
        check(&["a"], &[], Step::Nothing, "it has no owners");
        check(&["a:b", "b"], &[], Step::Nothing, "its owner is there");
        check(&["a:b", "b/-"], &[], Step::Nothing, "its owner is there until it is gone");
        check(&["a:b"], &[], Step::Ask(node("a:b").owners.into_vec()), "nobody has seen the owner");
        check(&["a:b"], &["b"], delete(Policy::Background, false), "the owner is gone");
        check(&["a/o:b"], &["b"], delete(Policy::Orphan, false), "its dependents are to stay");
        check(&["a/f:b"], &["b"], delete(Policy::Foreground, false), "its dependents are to go first");
        check(&["a/-:b"], &["b"], Step::Nothing, "it is going already");
        check(&["a:b,c", "c"], &["b"], Step::Unlink(uids(&["b"])), "one owner is gone, one is there");
        check(&["a:b!,c", "b/-f", "c"], &[], Step::Unlink(uids(&["b"])), "one owner waits, one is there");
        check(&["a:b!", "b/-f"], &[], delete(Policy::Background, false), "the owner waits");
        check(&["a:b!", "b/-f", "c:a"], &[], delete(Policy::Foreground, false), "its own dependents go first, too");
        check(&["a:b!", "b/-f:a!"], &[], delete(Policy::Foreground, true), "a circle");
        check(&["a/-f", "b:a!"], &[], Step::Nothing, "a dependent holds it");
        check(&["a/-f", "b:a"], &[], Step::Release, "a dependent that does not hold it");
        check(&["a/-f", "b/x:a!"], &[], Step::Release, "a reference from another namespace means nothing");
        check(&["a/-f"], &[], Step::Release, "no dependents");
        check(&["a/-o", "b:a", "c:a!"], &[], Step::Orphan(uids(&["b", "c"])), "dependents are cut loose");
        check(&["a:b", "b/x"], &[], Step::Ask(node("a:b").owners.into_vec()), "the owner is in another namespace");
        check(&[], &[], Step::Nothing, "it is not there");
    }

    #[test]
    fn looks_where_something_may_have_to_be_done() {
        let check = |before: &[&str], change: &str, expect: &[&str]| {
            let mut graph = graph(before);
            let look = match change.strip_prefix('~') {
                Some(uid) => graph.remove(uid),
                None => graph.apply(node(change)),
            };
            assert_eq!(look, uids(expect), "{before:?} {change}");
        };
        check(&[], "a:b", &["a"]);
        check(&["a:b"], "a:b", &[]);
        check(&["a", "b:a"], "a/-f", &["a", "b"]);
        check(&["a/-f", "b:a"], "a/-f", &[]);
        check(&["a", "b:a", "c:a"], "~a", &["b", "c"]);
        check(&["a/-f", "b:a!"], "~b", &["a"]);
        check(&["a/-f", "b:a!"], "b", &["b", "a"]);
        check(&["a", "b:a!"], "~b", &[]);
        check(&["a"], "~b", &[]);
    }

    #[test]
    fn what_is_known_to_be_gone_is_not_asked_for() {
        let mut graph = graph(&["a:b", "b", "c/x:d"]);
        graph.remove("b");
        assert_eq!(graph.plan("a", &HashMap::new()), Step::Delete { policy: Policy::Background, unblock: false });
        graph.note_gone("d".into(), Some("default".into()));
        assert!(matches!(graph.plan("c", &HashMap::new()), Step::Ask(_)), "it was looked for elsewhere");
        graph.note_gone("d".into(), Some("other".into()));
        assert!(matches!(graph.plan("c", &HashMap::new()), Step::Delete { .. }));
        for n in 0..2 * REMEMBERED {
            graph.note_gone(n.to_string().into(), None);
        }
        assert_eq!(graph.gone.len(), REMEMBERED, "and memory is bounded");
    }

    #[test]
    fn a_kind_that_vanishes_says_nothing_about_its_objects() {
        let kind = kind();
        let mut graph = graph(&["b:a"]);
        graph.apply(Node { kind: kind.clone(), ..node("a") });
        assert_eq!(graph.forget(&kind), uids(&["b"]));
        assert!(matches!(graph.plan("b", &HashMap::new()), Step::Ask(_)), "it is not taken for gone");
        assert_eq!(graph.plan("b", &HashMap::from([("a".into(), Standing::Solid)])), Step::Nothing);
    }

    #[test]
    fn who_depends_on_what_no_watch_has_shown() {
        let graph = graph(&["b:a", "c:b", "d:a,b", "e"]);
        let resource = |kind: &str| ApiResource { kind: kind.into(), group: "apps".into(), ..kind_of_pods() };
        let unseen = |name: &str| graph.unseen(&Kind { resource: resource(name), namespaced: true });
        assert_eq!(unseen("K"), uids(&["b", "d"]));
        assert_eq!(unseen("L"), uids(&[]), "owners of another kind");
    }

    #[test]
    fn a_new_listing_replaces_the_old() {
        let kind = kind();
        let mut graph = Graph::default();
        for what in ["a", "b:a", "c"] {
            graph.apply(Node { kind: kind.clone(), ..node(what) });
        }
        let other = node("d");
        graph.apply(other);
        let look = graph.retain(&kind, &uids(&["b", "c"]).into_iter().collect());
        assert_eq!(look, uids(&["b"]));
        assert_eq!(graph.len(), 3, "other kinds are not concerned");
        assert!(graph.dependents("a").next().is_some(), "b still refers to what is gone");
    }
}
