//! Sets of fields, and how they stand in `managedFields`.

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

/// A step of a path. The order is upstream's: names, then keys, then values, then positions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// A field of an object, or a key of a map.
    Field(Box<str>),
    /// The keys of an item of a list of type map, as compact JSON.
    Key(Box<str>),
    /// An item of a list of type set, as compact JSON.
    Value(Box<str>),
    /// An item by its place.
    Index(u32),
}

impl Element {
    /// The item of a list of type map that has these keys.
    pub fn key(keys: &BTreeMap<&str, &Value>) -> Element {
        Element::Key(serde_json::to_string(keys).unwrap_or_default().into())
    }

    /// An item of a set.
    pub fn value(value: &Value) -> Element {
        Element::Value(value.to_string().into())
    }

    fn parse(text: &str) -> Result<Element, BadSet> {
        let bad = || BadSet(text.to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
        match kind {
            "f" => Ok(Element::Field(rest.into())),
            "k" => {
                let keys: BTreeMap<&str, Value> = serde_json::from_str(rest).map_err(|_| bad())?;
                Ok(Element::key(&keys.iter().map(|(key, value)| (*key, value)).collect()))
            }
            "v" => serde_json::from_str::<Value>(rest).map(|value| Element::value(&value)).map_err(|_| bad()),
            "i" => rest.parse().map(Element::Index).map_err(|_| bad()),
            _ => Err(bad()),
        }
    }

    fn write(&self) -> String {
        match self {
            Element::Field(name) => format!("f:{name}"),
            Element::Key(keys) => format!("k:{keys}"),
            Element::Value(value) => format!("v:{value}"),
            Element::Index(index) => format!("i:{index}"),
        }
    }
}

/// As upstream writes paths in messages: `.spec.containers[name="web"].image`.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Element::Field(name) => write!(f, ".{name}"),
            Element::Key(keys) => {
                let keys: BTreeMap<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let keys: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
                write!(f, "[{}]", keys.join(","))
            }
            Element::Value(value) => write!(f, "[={value}]"),
            Element::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// A key of `fieldsV1` that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no step of a path: expected f:NAME, k:{{KEYS}}, v:VALUE or i:INDEX")]
pub struct BadSet(String);

/// Paths into an object, as a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSet(pub(super) BTreeMap<Element, Node>);

/// What is known of the paths that begin with one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The path itself is in the set.
    pub member: bool,
    /// What is below it.
    pub below: FieldSet,
}

impl FieldSet {
    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is known of a step.
    pub fn at(&self, element: &Element) -> Option<&Node> {
        self.0.get(element)
    }

    /// The steps, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Element, &Node)> {
        self.0.iter()
    }

    /// Takes a path out, and all below it.
    pub fn take(&mut self, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else { return };
        let element = Element::Field((*first).into());
        if rest.is_empty() {
            self.0.remove(&element);
        } else if let Some(node) = self.0.get_mut(&element) {
            node.below.take(rest);
            if !node.member && node.below.is_empty() {
                self.0.remove(&element);
            }
        }
    }

    /// Puts a node in, unless it says nothing.
    pub(super) fn put(&mut self, element: Element, node: Node) {
        if node.member || !node.below.is_empty() {
            self.0.insert(element, node);
        }
    }

    /// What is in this one or in the other.
    pub fn union(mut self, other: &FieldSet) -> FieldSet {
        for (element, theirs) in &other.0 {
            let ours = self.0.entry(element.clone()).or_default();
            ours.member |= theirs.member;
            ours.below = std::mem::take(&mut ours.below).union(&theirs.below);
        }
        self
    }

    /// What is in both.
    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        let mut result = FieldSet::default();
        for (element, ours) in &self.0 {
            if let Some(theirs) = other.0.get(element) {
                let below = ours.below.intersection(&theirs.below);
                result.put(element.clone(), Node { member: ours.member && theirs.member, below });
            }
        }
        result
    }

    /// What is in this one, and not in the other.
    pub fn difference(mut self, other: &FieldSet) -> FieldSet {
        self.subtract(other);
        self
    }

    fn subtract(&mut self, other: &FieldSet) {
        self.0.retain(|element, ours| {
            if let Some(theirs) = other.0.get(element) {
                ours.member &= !theirs.member;
                ours.below.subtract(&theirs.below);
            }
            ours.member || !ours.below.is_empty()
        });
    }

    /// Every path, as upstream writes them in messages.
    pub fn paths(&self) -> Vec<String> {
        fn walk(set: &FieldSet, prefix: &str, into: &mut Vec<String>) {
            for (element, node) in &set.0 {
                let path = format!("{prefix}{element}");
                if node.member {
                    into.push(path.clone());
                }
                walk(&node.below, &path, into);
            }
        }
        let mut paths = Vec::new();
        walk(self, "", &mut paths);
        paths
    }

    /// Reads a `fieldsV1`.
    pub fn read(value: &Value) -> Result<FieldSet, BadSet> {
        let mut set = FieldSet::default();
        for (key, value) in value.as_object().into_iter().flatten() {
            if key == "." {
                continue;
            }
            let below = FieldSet::read(value)?;
            let member = below.is_empty() || value.get(".").is_some();
            set.0.insert(Element::parse(key)?, Node { member, below });
        }
        Ok(set)
    }

    /// Writes a `fieldsV1`.
    pub fn write(&self) -> Value {
        let mut map = Map::new();
        for (element, node) in &self.0 {
            let mut below = Map::new();
            if node.member && !node.below.is_empty() {
                below.insert(".".into(), Value::Object(Map::new()));
            }
            if let Value::Object(rest) = node.below.write() {
                below.extend(rest);
            }
            map.insert(element.write(), Value::Object(below));
        }
        Value::Object(map)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn element() -> impl Strategy<Value = Element> {
        prop_oneof![
            "[a-c.]{1,2}".prop_map(|name| Element::Field(name.into())),
            "[a-b]".prop_map(|name| Element::key(&BTreeMap::from([("name", &json!(name))]))),
            (0..3).prop_map(|value| Element::value(&json!(value))),
            (0u32..3).prop_map(Element::Index),
        ]
    }

    fn set() -> impl Strategy<Value = FieldSet> {
        prop::collection::vec(prop::collection::vec(element(), 1..4), 0..12).prop_map(|paths| {
            let mut set = FieldSet::default();
            for path in paths {
                let (last, before) = path.split_last().unwrap();
                let mut at = &mut set;
                for step in before {
                    at = &mut at.0.entry(step.clone()).or_default().below;
                }
                at.0.entry(last.clone()).or_default().member = true;
            }
            set
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(set in set()) {
            prop_assert_eq!(FieldSet::read(&set.write()).unwrap(), set);
        }

        #[test]
        fn they_are_sets(a in set(), b in set()) {
            let (both, either) = (a.intersection(&b), a.clone().union(&b));
            prop_assert_eq!(a.clone().difference(&b).union(&both), a.clone());
            prop_assert_eq!(either.clone().difference(&b), a.clone().difference(&b));
            prop_assert_eq!(either.intersection(&a), a.clone());
            prop_assert_eq!(both.clone().difference(&b).is_empty(), true);
            prop_assert_eq!(both, b.intersection(&a));
        }
    }

    #[test]
    fn upstreams_form() {
        let fields = json!({"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {"f:containers": {
            "k:{\"name\":\"web\"}": {".": {}, "f:image": {}, "f:ports": {
                "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}}},
            "f:finalizers": {"v:\"a\"": {}}});
        let set = FieldSet::read(&fields).unwrap();
        assert_eq!(set.write(), fields);
        assert_eq!(
            set.paths()[..3],
            [".finalizers[=\"a\"]".to_owned(), ".metadata.labels".to_owned(), ".metadata.labels.app".to_owned()]
        );
        assert!(set.paths().contains(
            &".spec.containers[name=\"web\"].ports[containerPort=80,protocol=\"TCP\"].containerPort".to_owned()
        ));
        for bad in ["x", "q:x", "k:{", "v:{", "i:x"] {
            let error = FieldSet::read(&json!({bad: {}})).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }
}
