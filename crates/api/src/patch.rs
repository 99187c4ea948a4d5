//! Strategic merge patch
//! (<https://github.com/kubernetes/community/blob/master/contributors/devel/sig-api-machinery/strategic-merge-patch.md>).

use serde_json::{Map, Value};

use crate::schema::{Field, Schemas, Shape, TypeId};

/// A patch that cannot be applied. Phrased as upstream's messages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// A list item lacks the key it is identified by.
    #[error("map: {item} does not contain declared merge key: {key}")]
    MissingKey {
        /// The item.
        item: String,
        /// The merge key.
        key: String,
    },
    /// A `$patch` directive that does not exist.
    #[error("Unknown patch type found: {0}")]
    UnknownDirective(String),
    /// A directive of the wrong type.
    #[error("invalid {0} directive in a strategic merge patch: expected a list")]
    Directive(String),
}

const DIRECTIVE: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const DELETE_PREFIX: &str = "$deleteFromPrimitiveList/";
const ORDER_PREFIX: &str = "$setElementOrder/";

/// Merges `patch` into `target`, which is of type `ty`.
pub fn strategic(schemas: &Schemas, ty: TypeId, target: &mut Value, patch: Value) -> Result<(), PatchError> {
    let Value::Object(patch) = patch else {
        *target = patch;
        return Ok(());
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        merge(schemas, Some(ty), target, patch)?;
    }
    Ok(())
}

fn merge(
    schemas: &Schemas,
    ty: Option<TypeId>,
    target: &mut Map<String, Value>,
    mut patch: Map<String, Value>,
) -> Result<(), PatchError> {
    match patch.remove(DIRECTIVE) {
        None => {}
        Some(Value::String(s)) if s == "replace" => {
            *target = patch;
            return Ok(());
        }
        Some(Value::String(s)) if s == "delete" => {
            target.clear();
            return Ok(());
        }
        Some(Value::String(s)) if s == "merge" => {}
        Some(other) => return Err(PatchError::UnknownDirective(other.to_string())),
    }
    if let Some(retain) = patch.remove(RETAIN) {
        let Value::Array(keys) = retain else { return Err(PatchError::Directive(RETAIN.into())) };
        target.retain(|key, _| keys.iter().any(|k| k.as_str() == Some(key)));
    }
    let mut orders = Vec::new();
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix(DELETE_PREFIX) {
            let Value::Array(gone) = value else { return Err(PatchError::Directive(key)) };
            if let Some(Value::Array(items)) = target.get_mut(list) {
                items.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if let Some(list) = key.strip_prefix(ORDER_PREFIX) {
            let Value::Array(order) = value else { return Err(PatchError::Directive(key)) };
            orders.push((list.to_owned(), order));
            continue;
        }
        if value.is_null() {
            target.remove(&key);
            continue;
        }
        let (field, child) = child_of(schemas, ty, &key);
        match value {
            Value::Object(patch) => match target.get_mut(&key) {
                Some(Value::Object(current)) => merge(schemas, child, current, patch)?,
                _ => {
                    let mut fresh = Map::new();
                    merge(schemas, child, &mut fresh, patch)?;
                    target.insert(key, Value::Object(fresh));
                }
            },
            Value::Array(patch) => {
                let current = match target.remove(&key) {
                    Some(Value::Array(items)) => items,
                    _ => Vec::new(),
                };
                let merged = merge_list(schemas, field, child, current, patch)?;
                target.insert(key, Value::Array(merged));
            }
            scalar => {
                target.insert(key, scalar);
            }
        }
    }
    for (list, order) in orders {
        let (field, _) = child_of(schemas, ty, &list);
        if let Some(Value::Array(items)) = target.get_mut(&list) {
            reorder(items, &order, field.and_then(|f| f.merge_key.as_deref()));
        }
    }
    Ok(())
}

fn child_of<'a>(schemas: &'a Schemas, ty: Option<TypeId>, key: &str) -> (Option<&'a Field>, Option<TypeId>) {
    match ty.map(|ty| &schemas.get(ty).shape) {
        Some(Shape::Object(fields)) => fields.get(key).map_or((None, None), |f| (Some(f), Some(f.ty))),
        Some(Shape::Map(item)) => (None, Some(*item)),
        _ => (None, None),
    }
}

fn merge_list(
    schemas: &Schemas,
    field: Option<&Field>,
    ty: Option<TypeId>,
    mut current: Vec<Value>,
    patch: Vec<Value>,
) -> Result<Vec<Value>, PatchError> {
    let item_type = match ty.map(|ty| &schemas.get(ty).shape) {
        Some(Shape::Array(item)) => Some(*item),
        _ => None,
    };
    let directive = |item: &Value| item.get(DIRECTIVE).and_then(Value::as_str).map(str::to_owned);
    if patch.iter().any(|item| directive(item).as_deref() == Some("replace")) {
        return Ok(patch.into_iter().filter(|item| directive(item).as_deref() != Some("replace")).collect());
    }
    let Some(field) = field.filter(|f| f.merge) else { return Ok(patch) };
    let Some(key) = field.merge_key.as_deref() else {
        for item in patch {
            if !current.contains(&item) {
                current.push(item);
            }
        }
        return Ok(current);
    };
    for item in patch {
        let Value::Object(mut item) = item else {
            return Err(PatchError::MissingKey { item: item.to_string(), key: key.to_owned() });
        };
        let Some(id) = item.get(key).cloned() else {
            return Err(PatchError::MissingKey { item: Value::Object(item).to_string(), key: key.to_owned() });
        };
        let place = current.iter().position(|c| c.get(key) == Some(&id));
        match item.get(DIRECTIVE).and_then(Value::as_str) {
            Some("delete") => {
                current.retain(|c| c.get(key) != Some(&id));
                continue;
            }
            Some("merge") => {
                item.remove(DIRECTIVE);
            }
            Some(other) => return Err(PatchError::UnknownDirective(other.to_owned())),
            None => {}
        }
        match place.and_then(|at| current[at].as_object_mut()) {
            Some(target) => merge(schemas, item_type, target, item)?,
            None => {
                let mut fresh = Map::new();
                merge(schemas, item_type, &mut fresh, item)?;
                current.push(Value::Object(fresh));
            }
        }
    }
    Ok(current)
}

/// Sorts items into the order the client gave; items it does not know keep their place after their old predecessor.
fn reorder(items: &mut Vec<Value>, order: &[Value], key: Option<&str>) {
    fn id<'a>(item: &'a Value, key: Option<&str>) -> Option<&'a Value> {
        match key {
            Some(key) => item.get(key),
            None => Some(item),
        }
    }
    let rank = |item: &Value| order.iter().position(|o| id(o, key).is_some() && id(o, key) == id(item, key));
    let mut ranked = Vec::with_capacity(items.len());
    let mut last = -1i64;
    for (index, item) in items.drain(..).enumerate() {
        match rank(&item) {
            Some(rank) => {
                last = rank as i64;
                ranked.push(((last, 0, 0), item));
            }
            None => ranked.push(((last, 1, index), item)),
        }
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    items.extend(ranked.into_iter().map(|(_, item)| item));
}
