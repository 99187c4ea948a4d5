//! One OpenAPI document of those of several servers. All of it is pure; what is no OpenAPI is passed over.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

const KINDS: &str = "x-kubernetes-group-version-kind";
/// What other parts of a document refer to by name.
const NAMED: [&str; 2] = ["definitions", "parameters"];

/// Of a document of version 2, the paths that `keep` says. What only other paths refer to goes with them.
pub(super) fn only_paths(mut document: Value, keep: impl Fn(&str) -> bool) -> Value {
    let before = reached(&document);
    let Some(paths) = document.get_mut("paths").and_then(Value::as_object_mut) else { return document };
    let all = paths.len();
    paths.retain(|path, _| keep(path));
    if paths.len() == all {
        return document;
    }
    let after = reached(&document);
    for section in NAMED {
        if let Some(named) = document.get_mut(section).and_then(Value::as_object_mut) {
            let of = |name: &str| format!("#/{section}/{name}");
            named.retain(|name, _| after.contains(&of(name)) || !before.contains(&of(name)));
        }
    }
    document
}

/// Adds another server's document of version 2 to ours. Paths that are known already stay as they are. A name that
/// means something else there is made another one (`NAME_v2`), as upstream's aggregator does; that the two are about
/// different kinds is no difference.
pub(crate) fn join(into: &mut Value, other: &Value) {
    let known = |path: &str| into["paths"].get(path).is_some();
    let mut other = only_paths(other.clone(), |path| !known(path));
    let mut renames = HashMap::new();
    for section in NAMED {
        let empty = Map::new();
        let of = |document: &'_ Value| document.get(section).and_then(Value::as_object).cloned();
        let (ours, theirs) = (into.get(section).and_then(Value::as_object).unwrap_or(&empty), of(&other));
        for (name, new) in new_names(ours, &theirs.unwrap_or_default()) {
            renames.insert(format!("#/{section}/{name}"), format!("#/{section}/{new}"));
        }
    }
    rename(&mut other, &renames);
    for section in NAMED {
        let Some(theirs) = other.get_mut(section).and_then(Value::as_object_mut).map(std::mem::take) else { continue };
        let Some(ours) = part(into, section) else { continue };
        for (name, content) in theirs {
            let new = renames.get(&format!("#/{section}/{name}")).and_then(|new| new.rsplit('/').next());
            match ours.get_mut(new.unwrap_or(&name)) {
                Some(there) => join_kinds(there, &content),
                None => {
                    ours.insert(new.unwrap_or(&name).to_owned(), content);
                }
            }
        }
    }
    if let (Some(ours), Some(Value::Object(theirs))) = (part(into, "paths"), other.get_mut("paths").map(Value::take)) {
        ours.extend(theirs);
    }
}

fn part<'a>(document: &'a mut Value, section: &str) -> Option<&'a mut Map<String, Value>> {
    let document = document.as_object_mut()?;
    document.entry(section).or_insert_with(|| json!({})).as_object_mut()
}

/// Which names of theirs mean something else with us, and what they are called then.
fn new_names(ours: &Map<String, Value>, theirs: &Map<String, Value>) -> Vec<(String, String)> {
    let mut taken = HashSet::new();
    let mut new_names = Vec::new();
    for (name, content) in theirs {
        if ours.get(name).is_none_or(|there| same(there, content)) {
            continue;
        }
        let free = |new: &String| match ours.get(new) {
            Some(there) => same(there, content),
            None => !theirs.contains_key(new) && !taken.contains(new),
        };
        let numbered = (2..).map(|number: u64| format!("{name}_v{number}"));
        if let Some(new) = numbered.into_iter().find(free) {
            taken.insert(new.clone());
            new_names.push((name.clone(), new));
        }
    }
    new_names
}

/// Whether two definitions say the same, whatever kinds they are of.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let rest = |all: &Map<String, Value>| all.len() - usize::from(all.contains_key(KINDS));
            rest(a) == rest(b) && a.iter().all(|(key, value)| key == KINDS || b.get(key) == Some(value))
        }
        _ => a == b,
    }
}

/// A definition is of the kinds that either document says.
fn join_kinds(into: &mut Value, other: &Value) {
    let (Some(into), Some(more)) = (into.as_object_mut(), other.get(KINDS).and_then(Value::as_array)) else { return };
    if let Some(kinds) = into.entry(KINDS).or_insert_with(|| json!([])).as_array_mut() {
        for kind in more {
            if !kinds.contains(kind) {
                kinds.push(kind.clone());
            }
        }
    }
}

/// All that a document's paths refer to, directly or not.
fn reached(document: &Value) -> HashSet<String> {
    let mut reached = HashSet::new();
    let mut next = Vec::new();
    references(document.get("paths").unwrap_or(&Value::Null), &mut next);
    while let Some(reference) = next.pop() {
        if let Some(there) = reference.strip_prefix('#').and_then(|pointer| document.pointer(pointer))
            && reached.insert(reference.to_owned())
        {
            references(there, &mut next);
        }
    }
    reached
}

fn references<'a>(value: &'a Value, into: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value.as_str() {
                    Some(reference) if key == "$ref" => into.push(reference),
                    _ => references(value, into),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, into)),
        _ => {}
    }
}

fn rename(value: &mut Value, names: &HashMap<String, String>) {
    each_reference(value, &|reference: &mut String| {
        if let Some(new) = names.get(reference) {
            reference.clone_from(new);
        }
    });
}

fn each_reference(value: &mut Value, change: &impl Fn(&mut String)) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(reference) if key == "$ref" => change(reference),
                    _ => each_reference(value, change),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| each_reference(item, change)),
        _ => {}
    }
}

/// What a document of version 2 says, in version 3, for servers that have no other. Some is lost on the way, as it is
/// upstream: what only version 3 can tell was never there.
pub(super) fn version_3(document: &Value) -> Value {
    let mut document = document.clone();
    each_reference(&mut document, &|reference: &mut String| {
        if let Some(name) = reference.strip_prefix("#/definitions/") {
            *reference = format!("#/components/schemas/{name}");
        }
    });
    let common = document.get("parameters").cloned().unwrap_or_default();
    let media = |operation: &Value, key: &str| -> Vec<String> {
        let all = operation.get(key).or_else(|| document.get(key)).and_then(Value::as_array);
        let all: Vec<String> = all.into_iter().flatten().filter_map(|m| m.as_str().map(str::to_owned)).collect();
        if all.is_empty() { vec!["application/json".into()] } else { all }
    };
    let content = |schema: &Value, media: Vec<String>| -> Value {
        media.into_iter().map(|media| (media, json!({"schema": schema}))).collect::<Map<_, _>>().into()
    };
    let parameters = |item: &Value| -> Vec<Value> {
        let all = item.get("parameters").and_then(Value::as_array).into_iter().flatten();
        let named = |parameter: &Value| {
            let name = parameter.get("$ref").and_then(Value::as_str)?.strip_prefix("#/parameters/")?;
            common.get(name).cloned()
        };
        all.map(|parameter| named(parameter).unwrap_or_else(|| parameter.clone())).collect()
    };
    let mut paths = Map::new();
    for (path, item) in document.get("paths").and_then(Value::as_object).into_iter().flatten() {
        let mut out = Map::new();
        for (key, value) in item.as_object().into_iter().flatten() {
            let converted = match key.as_str() {
                "parameters" => parameters(item).iter().filter(|p| p["in"] != "body").map(parameter).collect(),
                "get" | "put" | "post" | "delete" | "options" | "head" | "patch" => {
                    let mut operation = value.clone();
                    let Some(fields) = operation.as_object_mut() else { continue };
                    for key in ["consumes", "produces", "schemes", "parameters"] {
                        fields.remove(key);
                    }
                    let all = parameters(value);
                    let simple: Vec<Value> = all.iter().filter(|p| p["in"] != "body").map(parameter).collect();
                    if !simple.is_empty() {
                        fields.insert("parameters".into(), simple.into());
                    }
                    if let Some(body) = all.iter().find(|p| p["in"] == "body") {
                        let content = content(&body["schema"], media(value, "consumes"));
                        fields.insert("requestBody".into(), json!({"content": content}));
                    }
                    let answers = fields.get_mut("responses").and_then(Value::as_object_mut);
                    for (_, answer) in answers.into_iter().flatten() {
                        if let Some(schema) = answer.as_object_mut().and_then(|answer| answer.remove("schema")) {
                            answer["content"] = content(&schema, media(value, "produces"));
                        }
                    }
                    operation
                }
                _ => value.clone(),
            };
            out.insert(key.clone(), converted);
        }
        paths.insert(path.clone(), out.into());
    }
    json!({"openapi": "3.0.0", "info": document["info"], "paths": paths,
        "components": {"schemas": document.get("definitions").cloned().unwrap_or_else(|| json!({}))}})
}

/// A parameter that is not the body: what it may be stands in a schema of its own.
fn parameter(old: &Value) -> Value {
    let mut new = Map::new();
    let mut schema = Map::new();
    for (key, value) in old.as_object().into_iter().flatten() {
        match key.as_str() {
            "name" | "in" | "description" | "required" | "allowEmptyValue" => new.insert(key.clone(), value.clone()),
            "collectionFormat" => None,
            _ => schema.insert(key.clone(), value.clone()),
        };
    }
    new.insert("schema".into(), schema.into());
    new.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refers(name: &str) -> Value {
        json!({"$ref": format!("#/definitions/{name}")})
    }

    fn path(name: &str) -> Value {
        json!({"get": {"responses": {"200": {"schema": refers(name)}}}})
    }

    #[test]
    fn what_only_other_paths_need_goes() {
        let document = json!({"paths": {"/apis/a/v1/x": path("X"), "/apis/b/v1/y": path("Y")},
            "definitions": {"X": refers("Both"), "Y": {"items": [refers("Both"), refers("OfY")]}, "OfY": refers("Y"),
                "Both": {"type": "object"}, "Nobodys": {}}});
        let only = only_paths(document.clone(), |path| path.starts_with("/apis/a/v1/"));
        assert_eq!(only["paths"], json!({"/apis/a/v1/x": path("X")}));
        assert_eq!(only["definitions"].as_object().unwrap().keys().collect::<Vec<_>>(), ["Both", "Nobodys", "X"]);
        assert_eq!(only_paths(document.clone(), |_| true), document);
        assert_eq!(only_paths(json!([1]), |_| false), json!([1]));
        assert_eq!(only_paths(json!({"paths": 3}), |_| false), json!({"paths": 3}));
    }

    #[test]
    fn a_name_that_means_something_else_gets_another() {
        let meta = |field: &str| json!({"properties": {field: {"type": "string"}}});
        let of_kind = |mut schema: Value, kind: &str| {
            schema[KINDS] = json!([{"group": "", "version": "v1", "kind": kind}]);
            schema
        };
        let mut ours = json!({"paths": {"/apis/a/v1/x": path("X")},
            "definitions": {"X": refers("Meta"), "Meta": meta("name"), "Shared": of_kind(meta("a"), "A")}});
        let theirs = json!({"paths": {"/apis/a/v1/x": path("Mine"), "/apis/b/v1/y": path("Y")},
            "definitions": {"Y": {"items": [refers("Meta"), refers("Shared")]}, "Meta": meta("uid"), "Meta_v2": {},
                "Mine": {}, "Shared": of_kind(meta("a"), "B")}});
        join(&mut ours, &theirs);
        let wanted = json!({"paths": {"/apis/a/v1/x": path("X"), "/apis/b/v1/y": path("Y")},
            "definitions": {"X": refers("Meta"), "Meta": meta("name"), "Meta_v2": {}, "Meta_v3": meta("uid"),
                "Y": {"items": [refers("Meta_v3"), refers("Shared")]}, "Shared": {"properties": {"a": {"type": "string"}},
                    KINDS: [{"group": "", "version": "v1", "kind": "A"}, {"group": "", "version": "v1", "kind": "B"}]}}});
        assert_eq!(ours, wanted);
        // A third one that means the same as the second has no name of its own.
        join(&mut ours, &json!({"paths": {"/apis/c/v1/z": path("Meta")}, "definitions": {"Meta": meta("uid")}}));
        assert_eq!(ours["paths"]["/apis/c/v1/z"], path("Meta_v3"));
        assert_eq!(ours["definitions"], wanted["definitions"]);
        // And what is no document changes nothing.
        let before = ours.clone();
        for odd in [json!(1), json!({"paths": [], "definitions": 2}), json!({})] {
            join(&mut ours, &odd);
            assert_eq!(ours, before);
        }
    }

    #[test]
    fn parameters_are_renamed_as_well() {
        let of = |kind: &str, path: &str| {
            json!({"paths": {path: {"parameters": [{"$ref": "#/parameters/name"}]}},
                "parameters": {"name": {"name": "name", "in": "path", "type": kind}}})
        };
        let mut ours = of("string", "/a");
        join(&mut ours, &of("integer", "/b"));
        assert_eq!(ours["paths"]["/b"]["parameters"][0]["$ref"], "#/parameters/name_v2");
        assert_eq!(ours["parameters"]["name_v2"]["type"], "integer");
    }

    #[test]
    fn version_2_in_version_3() {
        let document = json!({"swagger": "2.0", "info": {"title": "T", "version": "1"}, "consumes": ["application/yaml"],
            "parameters": {"pretty": {"name": "pretty", "in": "query", "type": "string", "uniqueItems": true}},
            "paths": {"/apis/a/v1/x": {
                "parameters": [{"$ref": "#/parameters/pretty"}],
                "post": {"operationId": "o", "produces": ["application/json"], "parameters": [
                        {"name": "body", "in": "body", "schema": refers("X")},
                        {"name": "n", "in": "path", "required": true, "type": "integer"}],
                    "responses": {"200": {"description": "OK", "schema": refers("X")}, "401": {"description": "no"}}}}},
            "definitions": {"X": {"properties": {"spec": refers("Spec")}}, "Spec": {}}});
        let to = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
        assert_eq!(
            version_3(&document),
            json!({"openapi": "3.0.0", "info": {"title": "T", "version": "1"},
                "paths": {"/apis/a/v1/x": {
                    "parameters": [{"name": "pretty", "in": "query", "schema": {"type": "string", "uniqueItems": true}}],
                    "post": {"operationId": "o",
                        "parameters": [{"name": "n", "in": "path", "required": true, "schema": {"type": "integer"}}],
                        "requestBody": {"content": {"application/yaml": {"schema": to("X")}}},
                        "responses": {"401": {"description": "no"}, "200": {"description": "OK",
                            "content": {"application/json": {"schema": to("X")}}}}}}},
                "components": {"schemas": {"X": {"properties": {"spec": to("Spec")}}, "Spec": {}}}})
        );
        assert_eq!(version_3(&json!({}))["paths"], json!({}));
    }
}
