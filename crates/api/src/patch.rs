//! Strategic merge patch
//! (<https://github.com/kubernetes/community/blob/master/contributors/devel/sig-api-machinery/strategic-merge-patch.md>),
//! and the bounds of a JSON patch.

use json_patch::{
    AddOperation, CopyOperation, MoveOperation, PatchOperation, ReplaceOperation, TestOperation, jsonptr::Pointer,
};
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

/// A JSON patch that cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum JsonPatchError {
    /// An operation fails.
    #[error(transparent)]
    Operation(#[from] json_patch::PatchError),
    /// Copies of copies grow by their number as a power of two.
    #[error("operation '/{operation}' failed: what is copied exceeds the limit of {limit} bytes")]
    Copied {
        /// Which operation.
        operation: usize,
        /// How many bytes may be copied.
        limit: usize,
    },
    /// The object could not be read again.
    #[error("operation '/{operation}' failed: the object would be nested deeper than {DEEPEST} levels")]
    Deep {
        /// Which operation.
        operation: usize,
    },
}

/// How deep an object may be nested. What is built step by step could not be read again: the decoder has a limit, too.
pub const DEEPEST: usize = 100;

/// Whether a value is nested deeper than so many levels.
pub fn is_deep(value: &Value, levels: usize) -> bool {
    match (value, levels.checked_sub(1)) {
        (Value::Array(_) | Value::Object(_), None) => true,
        (Value::Array(list), Some(left)) => list.iter().any(|value| is_deep(value, left)),
        (Value::Object(map), Some(left)) => map.values().any(|value| is_deep(value, left)),
        _ => false,
    }
}

/// Applies a JSON patch, which may copy no more than so many bytes and nest no deeper than [`DEEPEST`]. After an error
/// the target is nobody's any more.
///
/// # Errors
/// If an operation fails, or makes too much of the object.
pub fn json(target: &mut Value, patch: &[PatchOperation], copied: usize) -> Result<(), JsonPatchError> {
    let mut left = copied;
    for (operation, step) in patch.iter().enumerate() {
        let from = |from: &Pointer| target.pointer(from.as_str());
        let put = match step {
            PatchOperation::Add(AddOperation { path, value })
            | PatchOperation::Replace(ReplaceOperation { path, value }) => Some((path, value)),
            PatchOperation::Move(MoveOperation { from: place, path }) => from(place).map(|value| (path, value)),
            PatchOperation::Copy(CopyOperation { from: place, path }) => {
                if let Some(value) = from(place) {
                    let too_much = JsonPatchError::Copied { operation, limit: copied };
                    left = left.checked_sub(value.to_string().len()).ok_or(too_much)?;
                }
                from(place).map(|value| (path, value))
            }
            // kube-rs asks so whether there are no finalizers yet.
            PatchOperation::Test(TestOperation { path, value }) if value.is_null() && is_missing(target, path) => {
                continue;
            }
            PatchOperation::Remove(_) | PatchOperation::Test(_) => None,
        };
        if put.is_some_and(|(path, value)| is_deep(value, DEEPEST.saturating_sub(path.count()))) {
            return Err(JsonPatchError::Deep { operation });
        }
        // Alone it is the first.
        json_patch::patch(target, std::slice::from_ref(step)).map_err(|mut error| {
            error.operation = operation;
            error
        })?;
    }
    Ok(())
}

/// Whether an object has no such field. To a test that is null, as in upstream's library.
fn is_missing(target: &Value, path: &Pointer) -> bool {
    let Some((parent, key)) = path.split_back() else { return false };
    let parent = target.pointer(parent.as_str()).and_then(Value::as_object);
    parent.is_some_and(|object| !object.contains_key(&*key.decoded()))
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
        let Some(id) = item.get(key).filter(|id| !id.is_null()).cloned() else {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resources;

    /// Null is no key, or each time that the patch came there would be one more.
    #[test]
    fn an_item_has_a_key() {
        let schemas = Schemas::new(resources::all().iter().map(|row| row.schema));
        let ty = schemas.by_name("io.k8s.api.core.v1.Pod").unwrap();
        let patch = json!({"spec": {"containers": [{"name": null, "image": "i"}]}});
        let error = strategic(&schemas, ty, &mut json!({}), patch).unwrap_err();
        assert!(matches!(error, PatchError::MissingKey { key, .. } if key == "name"));
    }

    #[track_caller]
    fn check(target: Value, steps: Value, expect: Result<Value, &str>) {
        let (mut target, steps): (_, json_patch::Patch) = (target, serde_json::from_value(steps).unwrap());
        let result = json(&mut target, &steps, 64).map(|()| target).map_err(|error| error.to_string());
        assert_eq!(result, expect.map_err(str::to_owned));
    }

    #[test]
    fn a_json_patch_says_which_operation_failed() {
        let steps = json!([
            {"op": "test", "path": "/a", "value": 1}, {"op": "copy", "from": "/a", "path": "/b"},
            {"op": "move", "from": "/a", "path": "/c"}, {"op": "add", "path": "/d", "value": [2]},
            {"op": "replace", "path": "/d/0", "value": 3},
        ]);
        check(json!({"a": 1}), steps, Ok(json!({"b": 1, "c": 1, "d": [3]})));
        let steps = json!([{"op": "add", "path": "/a", "value": 1}, {"op": "remove", "path": "/b"}]);
        check(json!({}), steps, Err("operation '/1' failed at path '/b': path is invalid"));
        let steps = json!([{"op": "copy", "from": "/b", "path": "/a"}]);
        check(json!({}), steps, Err("operation '/0' failed at path '/a': \"from\" path is invalid"));
    }

    #[test]
    fn what_is_not_there_is_null_to_a_test() {
        let test = |path: &str, value: Value| json!([{"op": "test", "path": path, "value": value}]);
        check(json!({"a": {}}), test("/a/b", Value::Null), Ok(json!({"a": {}})));
        check(json!({}), test("/a/b", Value::Null), Err("operation '/0' failed at path '/a/b': path is invalid"));
        check(json!({}), test("/a", json!(1)), Err("operation '/0' failed at path '/a': path is invalid"));
    }

    #[test]
    fn copies_of_copies_have_an_end() {
        let steps = vec![json!({"op": "copy", "from": "", "path": "/x"}); 40];
        let message = "operation '/3' failed: what is copied exceeds the limit of 64 bytes";
        check(json!({"a": 1}), steps.into(), Err(message));
    }

    #[test]
    fn what_is_built_step_by_step_can_be_read_again() {
        let mut steps: Vec<Value> =
            (1..DEEPEST).map(|depth| json!({"op": "add", "path": "/a".repeat(depth), "value": {}})).collect();
        let mut target = json!({});
        let read = |steps: &[Value]| serde_json::from_value::<json_patch::Patch>(json!(steps)).unwrap();
        json(&mut target, &read(&steps), 0).unwrap();
        assert!(!is_deep(&target, DEEPEST) && is_deep(&target, DEEPEST - 1));
        steps.push(json!({"op": "add", "path": "/a".repeat(DEEPEST), "value": 1}));
        json(&mut target, &read(&steps[DEEPEST - 1..]), 0).unwrap();
        steps.push(json!({"op": "replace", "path": "/a".repeat(DEEPEST), "value": []}));
        let error = json(&mut target, &read(&steps), 0).unwrap_err();
        assert_eq!(error.to_string(), "operation '/100' failed: the object would be nested deeper than 100 levels");
    }
}
