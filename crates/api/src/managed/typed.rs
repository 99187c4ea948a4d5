//! Walks over values by their types: which fields there are, what changed, how a configuration is merged, and what is
//! taken out again (<https://kubernetes.io/docs/reference/using-api/server-side-apply/#merge-strategy>).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value};

use super::set::{Element, FieldSet, Node};
use crate::schema::{Field, ListType, MapType, Schemas, Shape, TypeId};

/// A configuration that cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TypedError {
    /// An item of a list lacks what identifies it.
    #[error(
        "{path}: element {index}: associative list with keys has an element that omits key field {key:?} (and doesn't have default value)"
    )]
    MissingKey {
        /// The list.
        path: String,
        /// The item.
        index: usize,
        /// The field.
        key: String,
    },
    /// An item of a list stands twice.
    #[error("{path}: duplicate entries for key {element}")]
    Duplicate {
        /// The list.
        path: String,
        /// What both have.
        element: String,
    },
}

/// What two values differ by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Only in the new one.
    pub added: FieldSet,
    /// In both, with different values.
    pub modified: FieldSet,
    /// Only in the old one.
    pub removed: FieldSet,
}

/// A type, and the field whose value it is.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) ty: TypeId,
    pub(super) field: Option<&'a Field>,
}

/// What a value consists of, as far as ownership goes.
enum Form<'a> {
    /// It belongs to somebody as a whole.
    Leaf,
    Object(&'a HashMap<Box<str>, Field>),
    Map(TypeId),
    Set,
    List(TypeId, &'a Field),
}

/// Types to walk by.
#[derive(Clone, Copy)]
pub(super) struct Typed<'a>(pub(super) &'a Schemas);

fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(_) => false,
    }
}

impl<'a> Typed<'a> {
    fn form(self, at: At<'a>) -> Form<'a> {
        let ty = self.0.get(at.ty);
        let atomic = match at.field.and_then(|field| field.map) {
            Some(MapType::Atomic) => true,
            Some(MapType::Granular) => false,
            None => ty.atomic,
        };
        match &ty.shape {
            _ if atomic => Form::Leaf,
            Shape::Object(fields) => Form::Object(fields),
            Shape::Map(item) => Form::Map(*item),
            Shape::Array(item) => match at.field {
                Some(Field { list: ListType::Set, .. }) => Form::Set,
                Some(field @ Field { list: ListType::Map, .. }) => Form::List(*item, field),
                _ => Form::Leaf,
            },
            Shape::Free => Form::Map(at.ty),
            _ => Form::Leaf,
        }
    }

    /// The type of a key's value, unless the type does not know it.
    fn child(form: &Form<'a>, key: &str) -> Option<At<'a>> {
        match form {
            Form::Object(fields) => fields.get(key).map(|field| At { ty: field.ty, field: Some(field) }),
            Form::Map(ty) => Some(At { ty: *ty, field: None }),
            _ => None,
        }
    }

    fn element(form: &Form<'a>, index: usize, item: &Value, path: &str) -> Result<Element, TypedError> {
        let Form::List(_, Field { keys, key_defaults, .. }) = form else { return Ok(Element::value(item)) };
        let mut found = BTreeMap::new();
        for key in keys {
            let default = || key_defaults.iter().find(|(of, _)| of == key).map(|(_, value)| value);
            match item.get(&**key).filter(|value| !value.is_null()).or_else(default) {
                Some(value) => found.insert(&**key, value),
                // One of several keys may be missing; an item without any has no name.
                None if keys.len() > 1 => None,
                None => {
                    return Err(TypedError::MissingKey { path: path.to_owned(), index, key: key.to_string() });
                }
            };
        }
        if found.is_empty() {
            let key = keys.first().map(|key| key.to_string()).unwrap_or_default();
            return Err(TypedError::MissingKey { path: path.to_owned(), index, key });
        }
        Ok(Element::key(&found))
    }

    fn item(form: &Form<'a>) -> Option<At<'a>> {
        match form {
            Form::List(ty, _) => Some(At { ty: *ty, field: None }),
            _ => None,
        }
    }

    /// The items of a list by what identifies them; in objects that were stored, one may stand there several times.
    fn items<'v>(form: &Form<'a>, list: Option<&'v Value>) -> Option<BTreeMap<Element, Vec<&'v Value>>> {
        let mut items: BTreeMap<Element, Vec<&Value>> = BTreeMap::new();
        for (index, item) in list.and_then(Value::as_array).into_iter().flatten().enumerate() {
            items.entry(Self::element(form, index, item, "").ok()?).or_default().push(item);
        }
        Some(items)
    }

    /// The fields that a configuration has an opinion about. Its lists must be what their types say.
    pub(super) fn fields(self, at: At<'a>, value: &Value, path: &str) -> Result<Node, TypedError> {
        let form = self.form(at);
        let mut below = FieldSet::default();
        match (&form, value) {
            (Form::Object(_) | Form::Map(_), Value::Object(map)) => {
                for (key, value) in map {
                    let mut node = match Self::child(&form, key) {
                        Some(at) => self.fields(at, value, &format!("{path}.{key}"))?,
                        None => Node { member: true, below: FieldSet::default() },
                    };
                    node.member |= !matches!(form, Form::Object(_)) || value.is_null();
                    below.put(Element::Field(key.as_str().into()), node);
                }
                Ok(Node { member: map.is_empty(), below })
            }
            (Form::Set | Form::List(..), Value::Array(items)) => {
                for (index, item) in items.iter().enumerate() {
                    let element = Self::element(&form, index, item, path)?;
                    if below.0.contains_key(&element) {
                        return Err(TypedError::Duplicate { path: path.to_owned(), element: element.to_string() });
                    }
                    let mut node = match Self::item(&form) {
                        Some(at) => self.fields(at, item, &format!("{path}{element}"))?,
                        None => Node::default(),
                    };
                    node.member = true;
                    below.put(element, node);
                }
                Ok(Node { member: false, below })
            }
            _ => Ok(Node { member: true, below }),
        }
    }

    /// What is different.
    pub(super) fn changes(self, at: At<'a>, old: Option<&Value>, new: Option<&Value>) -> [Node; 3] {
        let form = self.form(at);
        let known = match &form {
            Form::Leaf => false,
            _ if is_empty(old) && is_empty(new) => false,
            Form::Object(_) | Form::Map(_) => [old, new].iter().flatten().all(|v| v.is_object() || v.is_null()),
            Form::Set | Form::List(..) => [old, new].iter().flatten().all(|v| v.is_array() || v.is_null()),
        };
        if !known {
            return leaf(old, new);
        }
        let mut below = <[FieldSet; 3]>::default();
        match &form {
            Form::Object(_) | Form::Map(_) => {
                let (old, new) = (old.and_then(Value::as_object), new.and_then(Value::as_object));
                let only_new =
                    new.into_iter().flatten().filter(|(key, _)| !old.is_some_and(|old| old.contains_key(*key)));
                for key in old.into_iter().flatten().chain(only_new).map(|(key, _)| key) {
                    let (old, new) = (old.and_then(|m| m.get(key)), new.and_then(|m| m.get(key)));
                    let nodes = match Self::child(&form, key) {
                        Some(at) => self.changes(at, old, new),
                        None => leaf(old, new),
                    };
                    put(&mut below, &Element::Field(key.as_str().into()), nodes);
                }
            }
            _ => {
                let (Some(olds), Some(news)) = (Self::items(&form, old), Self::items(&form, new)) else {
                    return leaf(old, new);
                };
                for element in olds.keys().chain(news.keys()).collect::<BTreeSet<_>>() {
                    let found = |items: &BTreeMap<_, Vec<_>>| items.get(element).map_or(0, Vec::len);
                    let whole = |member| Node { member, below: FieldSet::default() };
                    let mut nodes = match (found(&olds), found(&news), Self::item(&form)) {
                        (0 | 1, 0 | 1, Some(at)) => {
                            self.changes(at, first_of(&olds, element), first_of(&news, element))
                        }
                        // What stands there several times is compared as one.
                        _ => [whole(false), whole(olds.get(element) != news.get(element)), whole(false)],
                    };
                    // An item that appears or goes is itself such a change, even if it has no fields.
                    if found(&olds) == 0 {
                        (nodes[0].member, nodes[1].member) = (true, false);
                    } else if found(&news) == 0 {
                        (nodes[2].member, nodes[1].member) = (true, false);
                    }
                    put(&mut below, element, nodes);
                }
            }
        }
        let [added, modified, removed] = below;
        [
            Node { member: old.is_none(), below: added },
            Node { member: false, below: modified },
            Node { member: new.is_none(), below: removed },
        ]
    }

    /// Lays a configuration over what is there.
    pub(super) fn merge(self, at: At<'a>, live: &mut Value, config: Value) {
        let form = self.form(at);
        match (&form, live, config) {
            (Form::Object(_) | Form::Map(_), Value::Object(live), Value::Object(config)) => {
                for (key, value) in config {
                    match (Self::child(&form, &key), live.get_mut(&key)) {
                        (Some(at), Some(live)) => self.merge(at, live, value),
                        _ => {
                            live.insert(key, value);
                        }
                    }
                }
            }
            (Form::Set | Form::List(..), Value::Array(live), Value::Array(config)) => {
                *live = self.merge_list(&form, std::mem::take(live), config);
            }
            (_, live, config) => *live = config,
        }
    }

    /// The items of both. Those of the configuration come in its order; those that only are there stay behind whom they
    /// stood behind.
    fn merge_list(self, form: &Form<'a>, live: Vec<Value>, config: Vec<Value>) -> Vec<Value> {
        let element = |item: &Value| Self::element(form, 0, item, "").ok();
        let mut ours: Vec<(Option<Element>, Option<Value>)> =
            live.into_iter().map(|item| (element(&item), Some(item))).collect();
        let theirs: Vec<(Option<Element>, Value)> = config.into_iter().map(|item| (element(&item), item)).collect();
        let configured: BTreeSet<Element> = theirs.iter().filter_map(|(element, _)| element.clone()).collect();
        let shared = |element: &Option<Element>| element.as_ref().is_some_and(|element| configured.contains(element));
        let mut merged = Vec::with_capacity(ours.len() + theirs.len());
        let mut next = 0;
        for (element, item) in theirs {
            while let Some((ours, item)) = ours.get_mut(next)
                && (item.is_none() || !shared(ours))
            {
                merged.extend(item.take());
                next += 1;
            }
            let live = ours.iter_mut().find(|(ours, item)| item.is_some() && *ours == element);
            match (live.and_then(|(_, live)| live.take()), Self::item(form)) {
                (Some(mut live), Some(at)) => {
                    self.merge(at, &mut live, item);
                    merged.push(live);
                }
                _ => merged.push(item),
            }
        }
        // What stood twice is applied as one.
        merged.extend(ours.into_iter().filter(|(element, _)| !shared(element)).filter_map(|(_, item)| item));
        merged
    }

    /// Takes out what was applied once, is not any more, and belongs to nobody.
    pub(super) fn prune(self, at: At<'a>, value: &mut Value, last: &FieldSet, managed: &FieldSet) {
        let form = self.form(at);
        let nothing = FieldSet::default();
        // Whether it goes, and what is to be looked at below.
        let judge = |element: &Element, named: bool| {
            let (was, is) = (last.at(element), managed.at(element));
            let (was_below, is_below) = (was.map(|n| &n.below), is.map(|n| &n.below));
            let has = |node: Option<&Node>| node.is_some_and(|n| n.member || (named && !n.below.is_empty()));
            let goes = has(was) && !has(is);
            let look = was_below.filter(|below| !below.is_empty());
            (goes, look.map(|below| (below.clone(), is_below.unwrap_or(&nothing).clone())))
        };
        match value {
            Value::Object(map) if matches!(form, Form::Object(_) | Form::Map(_)) => {
                map.retain(|key, value| {
                    let child = Self::child(&form, key);
                    let named = matches!(form, Form::Object(_)) && child.is_some();
                    let (goes, look) = judge(&Element::Field(key.as_str().into()), named);
                    if !goes && let (Some(at), Some((last, managed))) = (child, look) {
                        self.prune(at, value, &last, &managed);
                    }
                    !goes
                });
            }
            Value::Array(items) if matches!(form, Form::Set | Form::List(..)) => {
                items.retain_mut(|item| {
                    let Ok(element) = Self::element(&form, 0, item, "") else { return true };
                    let (goes, look) = judge(&element, false);
                    if !goes && let (Some(at), Some((last, managed))) = (Self::item(&form), look) {
                        self.prune(at, item, &last, &managed);
                    }
                    !goes
                });
            }
            _ => {}
        }
    }
}

fn first_of<'v>(items: &BTreeMap<Element, Vec<&'v Value>>, element: &Element) -> Option<&'v Value> {
    items.get(element).and_then(|found| found.first().copied())
}

fn leaf(old: Option<&Value>, new: Option<&Value>) -> [Node; 3] {
    let of = |member| Node { member, below: FieldSet::default() };
    match (old, new) {
        (None, Some(_)) => [of(true), of(false), of(false)],
        (Some(_), None) => [of(false), of(false), of(true)],
        (old, new) => [of(false), of(old != new), of(false)],
    }
}

fn put(sets: &mut [FieldSet; 3], element: &Element, nodes: [Node; 3]) {
    for (set, node) in sets.iter_mut().zip(nodes) {
        set.put(element.clone(), node);
    }
}

/// Empty objects where all was taken out.
pub(super) fn without_nulls(value: &mut Value) {
    if let Value::Object(map) = value {
        map.retain(|_, value| !value.is_null());
        map.values_mut().for_each(without_nulls);
    }
}

/// What has no place in a set of fields, since nobody owns it.
pub(super) fn strip(set: &mut FieldSet) {
    for path in [
        &["apiVersion"][..],
        &["kind"],
        &["metadata", "name"],
        &["metadata", "namespace"],
        &["metadata", "creationTimestamp"],
        &["metadata", "selfLink"],
        &["metadata", "uid"],
        &["metadata", "clusterName"],
        &["metadata", "generation"],
        &["metadata", "managedFields"],
        &["metadata", "resourceVersion"],
    ] {
        set.take(path);
    }
    // The outermost fields are always there, so that nobody has put them there.
    for (element, node) in &mut set.0 {
        if let Element::Field(name) = element
            && matches!(&**name, "metadata" | "spec" | "status")
            && !node.below.is_empty()
        {
            node.member = false;
        }
    }
    set.0.retain(|element, node| !node.below.is_empty() || *element != Element::Field("metadata".into()));
}

pub(super) fn empty() -> Value {
    Value::Object(Map::new())
}
