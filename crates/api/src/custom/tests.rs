use std::sync::Mutex;

use serde_json::{Value, json};

use super::{
    format,
    jsonpath::JsonPath,
    prune,
    schema::{Node, Rule},
    structural,
    validate::{NoRules, Rules, validate},
};
use crate::{
    cell,
    field::{Errors, Path},
};

fn object(properties: Value) -> Value {
    json!({"type": "object", "properties": properties})
}

fn texts(errors: &Errors) -> Vec<String> {
    errors.0.iter().map(ToString::to_string).collect()
}

#[test]
fn schemas_are_structural() {
    let check = |schema: Value, expect: &[&str]| {
        let mut errors = Errors::default();
        structural::check(&schema, false, Path::Root.at("s"), &mut errors);
        assert_eq!(texts(&errors), expect, "{schema}");
    };
    let deep = |field: Value| object(json!({"f": field}));
    check(deep(json!({"type": "string"})), &[]);
    check(json!({"properties": {}}), &["s.type: Required value: must not be empty at the root"]);
    check(
        json!({"type": "array", "items": {"type": "string"}}),
        &["s.type: Invalid value: \"array\": must be object at the root"],
    );
    check(deep(json!({"type": "array"})), &["s.properties[f].items: Required value: must be specified"]);
    check(
        deep(json!({"type": "array", "items": {}})),
        &["s.properties[f].items.type: Required value: must not be empty for specified array items"],
    );
    check(deep(json!({"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]})), &[]);
    check(
        deep(json!({"type": "string", "anyOf": [{"type": "string"}]})),
        &["s.properties[f].anyOf[0].type: Forbidden: must be empty to be structural"],
    );
    check(
        deep(
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "oneOf": [{"required": ["a"]}, {"properties": {"b": {"minLength": 1}}}]}),
        ),
        &[
            "s.properties[f].properties[b]: Required value: because it is defined in s.properties[f].oneOf[1].properties[b]",
        ],
    );
    check(
        deep(
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "string"}}),
        ),
        &["s.properties[f].additionalProperties: Forbidden: additionalProperties and properties are mutual exclusive"],
    );
    check(deep(json!({"type": "string", "$ref": "#/x"})), &["s.properties[f].$ref: Forbidden: ref is not supported"]);
    check(
        deep(json!({"type": "text"})),
        &[
            "s.properties[f].type: Unsupported value: \"text\": supported values: \"array\", \"boolean\", \"integer\", \"number\", \"object\", \"string\"",
        ],
    );
    check(
        deep(json!({"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["a", "b"],
            "items": {"type": "object", "properties": {"a": {"type": "string"}}}})),
        &[
            "s.properties[f].items.properties[a].default: Required value: this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
            "s.properties[f].x-kubernetes-list-map-keys[1]: Invalid value: \"b\": entries must all be names of item properties",
        ],
    );
    check(
        object(json!({"metadata": {"type": "object", "properties": {"labels": {"type": "object"}}}})),
        &[
            "s.properties[metadata]: Forbidden: must not specify anything other than name and generateName, but metadata is implicitly specified",
        ],
    );
    check(
        object(json!({"metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}}})),
        &[],
    );
    check(
        deep(json!({"type": "string", "default": "abcd", "maxLength": 3})),
        &["s.properties[f].default: Too long: may not be more than 3 bytes"],
    );
    check(
        deep(json!({"type": "object", "default": {"x": 1}, "properties": {"a": {"type": "string"}}})),
        &["s.properties[f].default: Invalid value: {\"x\":1}: must not have unknown fields"],
    );
    let mut errors = Errors::default();
    structural::check(&deep(json!({"type": "string", "pattern": "("})), false, Path::Root.at("s"), &mut errors);
    assert!(
        texts(&errors)[0]
            .starts_with("s.properties[f].pattern: Invalid value: \"(\": must be a valid regular expression")
    );
}

#[test]
fn rules_fit_what_they_are_about() {
    let check = |rule: Value, expect: &[&str]| {
        let mut schema = object(json!({"spec": object(json!({"n": {"type": "integer"}, "any": {
            "type": "object", "x-kubernetes-preserve-unknown-fields": true}}))}));
        schema["x-kubernetes-validations"] = json!([rule]);
        let mut errors = Errors::default();
        structural::check(&schema, false, Path::Root.at("s"), &mut errors);
        let found: Vec<String> = texts(&errors).iter().map(|text| text.lines().next().unwrap().to_owned()).collect();
        assert_eq!(found, expect, "{rule}");
    };
    let at = "s.x-kubernetes-validations[0]";
    check(json!({"rule": "self.spec.n > 1 && self.metadata.name != self.kind"}), &[]);
    check(json!({"rule": "self.spec.n > oldSelf.spec.n"}), &[]);
    check(json!({"rule": "!oldSelf.hasValue() || oldSelf.spec.n.value() < 5", "optionalOldSelf": true}), &[]);
    check(
        json!({"rule": "self.spec.m > 1"}),
        &[&format!(
            "{at}.rule: Invalid value: \"self.spec.m > 1\": compilation failed: ERROR: <input>:1:10: undefined field 'm'"
        )],
    );
    check(
        json!({"rule": "self.spec.any.x == 1"}),
        &[&format!(
            "{at}.rule: Invalid value: \"self.spec.any.x == 1\": compilation failed: ERROR: <input>:1:14: undefined field 'x'"
        )],
    );
    let why = "cel expression must evaluate to a bool";
    check(json!({"rule": "self.spec.n"}), &[&format!("{at}.rule: Invalid value: \"self.spec.n\": {why}")]);
    let why = "messageExpression must evaluate to a string";
    let message = json!({"rule": "true", "messageExpression": "self.spec.n"});
    check(message, &[&format!("{at}.messageExpression: Invalid value: \"self.spec.n\": {why}")]);
    let why = "may not be set unless rule uses the variable oldSelf";
    let unused = json!({"rule": "self.spec.n > 1", "optionalOldSelf": true});
    check(unused, &[&format!("{at}.optionalOldSelf: Invalid value: true: {why}")]);
}

/// A definition with a list of objects, whose items have a rule.
fn with_rule(rule: Value, most_items: Option<u64>, most_length: Option<u64>) -> Value {
    let mut v = json!({"type": "string"});
    if let Some(most) = most_length {
        v["maxLength"] = most.into();
    }
    let mut list = json!({"type": "array", "items": object(json!({"v": v}))});
    list["items"]["x-kubernetes-validations"] = json!([rule]);
    if let Some(most) = most_items {
        list["maxItems"] = most.into();
    }
    object(json!({"spec": object(json!({"list": list}))}))
}

const HINT: &str = "(try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)";

#[test]
fn rules_may_not_cost_too_much() {
    let check = |schema: &Value, expect: &[&str]| {
        let mut errors = Errors::default();
        structural::check(schema, false, Path::Root.at("s"), &mut errors);
        assert_eq!(texts(&errors), expect, "{schema}");
    };
    let rule = || json!({"rule": "self.v.contains('test')"});
    let at = "s.properties[spec].properties[list].items.x-kubernetes-validations[0]";
    check(&with_rule(rule(), Some(10), Some(100)), &[]);
    // 314575 for an item, and at most so many items.
    check(&with_rule(rule(), Some(31), None), &[]);
    check(
        &with_rule(rule(), Some(32), None),
        &[&format!("{at}.rule: Forbidden: estimated rule cost exceeds budget by factor of 1.006640x {HINT}")],
    );
    let all = "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema";
    check(
        &with_rule(rule(), None, None),
        &[
            &format!("{at}.rule: Forbidden: estimated rule cost exceeds budget by factor of more than 100x {HINT}"),
            &format!(
                "{at}.rule: Forbidden: contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema"
            ),
            &format!("s: Forbidden: {all} exceeds budget by factor of more than 100x {HINT}"),
        ],
    );
    // What is said when a rule does not hold is said once.
    let message = "self.v + self.v + self.v";
    check(&with_rule(json!({"rule": "true", "messageExpression": message}), None, None), &[]);
    let message = "[1,2,3,4,5,6].all(x, [1,2,3,4,5,6].all(y, self.v + self.v != 'a')) ? 'a' : 'b'";
    check(
        &with_rule(json!({"rule": "true", "messageExpression": message}), None, None),
        &[&format!(
            "{at}.messageExpression: Forbidden: estimated messageExpression cost exceeds budget by factor of 2.3x {HINT}"
        )],
    );
}

#[test]
fn a_schema_that_stays_is_not_asked_what_it_costs() {
    let rows = crate::resources::all();
    let row = rows.iter().find(|row| row.plural == "customresourcedefinitions").unwrap();
    let definition = |schemas: &[&Value]| {
        let versions = schemas.iter().enumerate().map(|(index, schema)| {
            json!({"name": format!("v{}", index + 1), "served": true, "storage": index == 0, "schema": {"openAPIV3Schema": schema}})
        });
        json!({"metadata": {"name": "as.x.y"}, "status": {"storedVersions": ["v1"]}, "spec": {"group": "x.y", "scope": "Cluster",
            "conversion": {"strategy": "None"}, "versions": versions.collect::<Vec<_>>(),
            "names": {"plural": "as", "singular": "a", "kind": "A", "listKind": "AList"}}})
    };
    let check = |old: Option<&Value>, new: &Value, expect: &[&str]| {
        let mut errors = Errors::default();
        (row.validate)(&crate::row::Validation { new, old, subresource: "" }, &mut errors);
        let places: Vec<String> = errors.0.iter().map(|error| error.field.replace("openAPIV3Schema", "_")).collect();
        assert_eq!(places, expect, "{new}");
    };
    let (dear, dearer, cheap) = (
        with_rule(json!({"rule": "self.v.contains('test')"}), None, None),
        with_rule(json!({"rule": "self.v.contains('tests')"}), None, None),
        with_rule(json!({"rule": "self.v.contains('test')"}), Some(1), Some(1)),
    );
    let rule = "properties[spec].properties[list].items.x-kubernetes-validations[0].rule";
    let of = |version: usize| {
        let schema = format!("spec.versions[{version}].schema._");
        [format!("{schema}.{rule}"), format!("{schema}.{rule}"), schema]
    };
    let (first, second) = (of(0), of(1));
    let (first, second) = (first.each_ref().map(String::as_str), second.each_ref().map(String::as_str));
    check(None, &definition(&[&dear]), &first);
    check(None, &definition(&[&cheap]), &[]);
    let old = definition(&[&dear]);
    check(Some(&old), &definition(&[&dear, &cheap]), &[]);
    check(Some(&old), &definition(&[&dearer]), &first);
    check(Some(&old), &definition(&[&dear, &dear]), &second);
}

#[test]
fn what_is_not_known_goes() {
    let check = |schema: Value, mut value: Value, expect: Value, gone: &[&str]| {
        assert_eq!(prune::prune(&Node::parse(&schema), &mut value), gone);
        assert_eq!(value, expect);
    };
    let schema = object(json!({
        "a": {"type": "object", "properties": {"x": {"type": "string"}}},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"tight": {"type": "object", "properties": {"x": {"type": "string"}}}}},
        "list": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "string"}}}},
        "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {"x": {"type": "string"}}}},
        "pod": {"type": "object", "x-kubernetes-embedded-resource": true, "properties": {"spec": {"type": "object"}}}}));
    check(
        schema,
        json!({"apiVersion": "v", "kind": "k", "metadata": {"odd": 1}, "b": 1, "a": {"x": "1", "y": 2},
            "free": {"any": {"y": 1}, "tight": {"x": "1", "y": 2}}, "list": [{"x": "1"}, {"y": 2}],
            "map": {"k": {"x": "1", "y": 2}}, "pod": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "n"}, "spec": {"y": 1}, "odd": 1}}),
        json!({"apiVersion": "v", "kind": "k", "metadata": {"odd": 1}, "a": {"x": "1"},
            "free": {"any": {"y": 1}, "tight": {"x": "1"}}, "list": [{"x": "1"}, {}],
            "map": {"k": {"x": "1"}}, "pod": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "n"}, "spec": {}}}),
        &["a.y", "b", "free.tight.y", "list[1].y", "map.k.y", "pod.odd", "pod.spec.y"],
    );
}

#[test]
fn what_was_left_out_is_filled_in() {
    let schema = Node::parse(&object(json!({
        "a": {"type": "string", "default": "x"},
        "maybe": {"type": "string", "nullable": true, "default": "x"},
        "gone": {"type": "string"},
        "o": {"type": "object", "default": {}, "properties": {"n": {"type": "integer", "default": 3}}},
        "none": {"type": "object", "properties": {"n": {"type": "integer", "default": 3}}},
        "list": {"type": "array", "items": {"type": "object", "properties": {"p": {"type": "string", "default": "TCP"}}}}})));
    let mut value = json!({"a": null, "maybe": null, "gone": null, "list": [{}, {"p": "UDP"}]});
    prune::drop_nulls(&schema, &mut value);
    prune::default(&schema, &mut value);
    assert_eq!(value, json!({"a": "x", "maybe": null, "o": {"n": 3}, "list": [{"p": "TCP"}, {"p": "UDP"}]}));
}

#[test]
fn values_are_checked_in_upstreams_words() {
    let check = |field: Value, value: Value, expect: &[&str]| {
        let mut errors = Errors::default();
        let root = Node::parse(&object(json!({"f": field})));
        validate(&root, &json!({"f": value}), None, &NoRules, &mut errors);
        assert_eq!(texts(&errors), expect, "{field}");
    };
    let number = json!({"type": "number", "minimum": 1, "exclusiveMinimum": true, "maximum": 2.5, "multipleOf": 0.5});
    check(number.clone(), json!(1.5), &[]);
    check(number.clone(), json!(1), &["f: Invalid value: 1: f in body should be greater than 1"]);
    check(
        number,
        json!(2.6),
        &[
            "f: Invalid value: 2.6: f in body should be less than or equal to 2.5",
            "f: Invalid value: 2.6: f in body should be a multiple of 0.5",
        ],
    );
    check(
        json!({"type": "integer"}),
        json!(1.5),
        &["f: Invalid value: \"number\": f in body must be of type integer: \"number\""],
    );
    check(json!({"type": "integer"}), json!(2.0), &[]);
    check(
        json!({"type": "string"}),
        json!(null),
        &["f: Invalid value: \"null\": f in body must be of type string: \"null\""],
    );
    check(json!({"type": "string", "nullable": true}), json!(null), &[]);
    check(
        json!({"type": "string", "minLength": 2}),
        json!("ä"),
        &["f: Invalid value: \"ä\": f in body should be at least 2 chars long"],
    );
    check(json!({"type": "string", "maxLength": 1}), json!("ab"), &["f: Too long: may not be more than 1 bytes"]);
    check(
        json!({"type": "string", "format": "date-time"}),
        json!("now"),
        &["f: Invalid value: \"now\": f in body must be of type date-time: \"now\""],
    );
    check(
        json!({"type": "array", "items": {"type": "string"}, "maxItems": 1}),
        json!(["a", 1]),
        &[
            "f: Too many: 2: must have at most 1 item",
            "f[1]: Invalid value: \"integer\": f[1] in body must be of type string: \"integer\"",
        ],
    );
    check(
        json!({"type": "array", "items": {"type": "string"}, "minItems": 2}),
        json!(["a"]),
        &["f: Invalid value: 1: f in body should have at least 2 items"],
    );
    check(
        json!({"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}),
        json!({}),
        &["f: Invalid value: 0: f in body should have at least 1 properties"],
    );
    check(
        json!({"type": "integer", "enum": [1, 2]}),
        json!(3),
        &["f: Unsupported value: 3: supported values: \"1\", \"2\""],
    );
    check(
        json!({"type": "string", "enum": ["b", "a"]}),
        json!("c"),
        &["f: Unsupported value: \"c\": supported values: \"a\", \"b\""],
    );
    let choice = json!({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}]});
    check(choice.clone(), json!({"a": ""}), &[]);
    check(
        choice.clone(),
        json!({}),
        &[
            "<nil>: Invalid value: \"\": \"f\" must validate one and only one schema (oneOf). Found none valid",
            "f.a: Required value",
        ],
    );
    check(
        choice,
        json!({"a": "", "b": ""}),
        &[
            "<nil>: Invalid value: \"\": \"f\" must validate one and only one schema (oneOf). Found 2 valid alternatives",
        ],
    );
    check(
        json!({"type": "string", "not": {"enum": ["x"]}}),
        json!("x"),
        &["<nil>: Invalid value: \"\": \"f\" must not validate the schema (not)"],
    );
    check(json!({"type": "string", "anyOf": [{"maxLength": 1}, {"pattern": "^a"}]}), json!("abc"), &[]);
    check(
        json!({"type": "object", "x-kubernetes-embedded-resource": true, "x-kubernetes-preserve-unknown-fields": true}),
        json!({"kind": "Pod"}),
        &["f.apiVersion: Required value: must not be empty"],
    );
}

#[test]
fn what_is_as_it_was_is_tolerated() {
    let root = Node::parse(&object(json!({
        "n": {"type": "integer", "minimum": 5}, "m": {"type": "integer", "minimum": 5},
        "list": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "required": ["k"], "properties": {"k": {"type": "string"}, "v": {"type": "integer", "minimum": 5}}}},
        "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}}})));
    let check = |old: Value, new: Value, expect: &[&str]| {
        let mut errors = Errors::default();
        validate(&root, &new, Some(&old), &NoRules, &mut errors);
        let fields: Vec<&str> = errors.0.iter().map(|e| e.field.as_str()).collect();
        assert_eq!(fields, expect);
    };
    check(json!({"n": 1, "m": 1}), json!({"n": 1, "m": 2}), &["m"]);
    // Items are known again by their keys, wherever they stand.
    check(
        json!({"list": [{"k": "a", "v": 1}, {"k": "b", "v": 1}]}),
        json!({"list": [{"k": "b", "v": 1}, {"k": "a", "v": 2}]}),
        &["list[1].v"],
    );
    check(json!({"set": ["a", "a"]}), json!({"set": ["a", "a"], "n": 5}), &[]);
    check(json!({"set": ["a"]}), json!({"set": ["a", "a"]}), &["set[1]"]);
}

#[test]
fn rules_are_asked_where_they_stand() {
    struct Seen(Mutex<Vec<String>>);
    impl Rules for Seen {
        fn check(
            &self,
            rules: &[Rule],
            _: &Node,
            path: Path<'_>,
            new: &Value,
            old: Option<&Value>,
            errors: &mut Errors,
        ) {
            let old = old.map_or("-".to_owned(), Value::to_string);
            self.0.lock().unwrap().push(format!("{path} {} {new} {old}", rules[0].rule));
            errors.invalid(path, new.clone(), &rules[0].message);
        }
    }
    let rule = |text: &str| json!([{"rule": text, "message": "no"}]);
    let root = Node::parse(&json!({"type": "object", "properties": {
        "n": {"type": "integer", "minimum": 0, "x-kubernetes-validations": rule("self > 1")},
        "list": {"type": "array", "items": {"type": "string", "x-kubernetes-validations": rule("self != ''")}}}}));
    let seen = Seen(Mutex::default());
    let mut errors = Errors::default();
    validate(&root, &json!({"n": 1, "list": ["a"]}), Some(&json!({"n": 2, "list": ["a"]})), &seen, &mut errors);
    assert_eq!(*seen.0.lock().unwrap(), ["list[0] self != '' \"a\" -", "n self > 1 1 2"]);
    assert_eq!(errors.0.len(), 2);
    // What breaks the schema already is not asked about.
    validate(&root, &json!({"n": -1}), None, &seen, &mut Errors::default());
    assert_eq!(seen.0.lock().unwrap().len(), 2);
}

#[test]
fn paths_lead_to_values() {
    let value = json!({"spec": {"a.b": 1, "list": [{"n": "x", "v": 1}, {"n": "y", "v": 2}], "m": {"k": {"v": 3}}},
        "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Old", "status": "False"}]}});
    let check = |path: &str, expect: Value| {
        let found: Vec<&Value> = JsonPath::parse(path).unwrap().find(&value);
        assert_eq!(json!(found), expect, "{path}");
    };
    check(".spec.list[0].n", json!(["x"]));
    check(".spec.list[-1].n", json!(["y"]));
    check(".spec.list[*].n", json!(["x", "y"]));
    check(".spec.list[?(@.v>1)].n", json!(["y"]));
    check(".status.conditions[?(@.type==\"Ready\")].status", json!(["True"]));
    check(".status.conditions[?(@.type == 'Gone')].status", json!([]));
    check(".spec['a.b']", json!([1]));
    check(".spec.a\\.b", json!([1]));
    check(".spec.m.*.v", json!([3]));
    check(".spec..v", json!([1, 2, 3]));
    check(".spec.none.at.all", json!([]));
    for bad in ["spec", ".spec[", ".spec[x]", ".spec[?(type)]", ".spec..", ""] {
        assert!(JsonPath::parse(bad).is_err() || bad == ".spec..", "{bad}");
    }
    let start = |path: &str| JsonPath::parse(path).unwrap().start().join(" ");
    assert_eq!([".a.b", ".a[0].b", ".a['b.c'].d", "..a"].map(start), ["a b", "a", "a", ""]);
    assert_eq!(JsonPath::parse(".a.b").unwrap().fields(), Some(vec!["a", "b"]));
    assert_eq!(JsonPath::parse(".a[0]").unwrap().fields(), None);
}

#[test]
fn columns_show_what_is_there() {
    let now = "2026-01-01T01:00:00Z".parse().unwrap();
    let object = json!({"n": 3, "f": 1.5, "b": true, "o": {"a": 1}, "t": "2026-01-01T00:00:00Z", "s": "text"});
    let check = |ty: &str, path: &str, expect: Value| {
        let columns = super::columns(&json!([{"name": "C", "type": ty, "jsonPath": path}]));
        assert_eq!(columns[0].cell(&object, now), expect, "{ty} {path}");
    };
    check("integer", ".n", json!(3));
    check("string", ".n", json!("3"));
    check("string", ".o", json!("{\"a\":1}"));
    check("number", ".f", json!(1.5));
    check("boolean", ".b", json!(true));
    check("integer", ".s", Value::Null);
    check("date", ".t", cell::since(&json!("2026-01-01T00:00:00Z"), now));
    check("date", ".s", Value::Null);
    check("string", ".none", Value::Null);
    assert_eq!(super::columns(&Value::Null)[0].name, "Age");
}

#[test]
fn formats() {
    let check = |format: &str, good: &[&str], bad: &[&str]| {
        good.iter().for_each(|text| assert!(format::is_valid(format, text), "{format} {text}"));
        bad.iter().for_each(|text| assert!(!format::is_valid(format, text), "{format} {text}"));
    };
    check("date-time", &["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.5+02:00"], &["2026-01-02", "now", ""]);
    check("date", &["2026-01-02"], &["2026-13-02", "2026-01-02T00:00:00Z"]);
    check("ipv4", &["10.0.0.1"], &["10.0.0.256", "::1"]);
    check("ipv6", &["::1"], &["10.0.0.1"]);
    check("cidr", &["10.0.0.0/8", "fd00::/8"], &["10.0.0.0", "10.0.0.0/33"]);
    check("uuid", &["7c9e6679-7425-40de-944b-e07fc1f90ae7"], &["7c9e6679", ""]);
    check("uuid3", &[], &["7c9e6679-7425-40de-944b-e07fc1f90ae7"]);
    check("email", &["a@example.com"], &["a", "@example.com", "a b@example.com"]);
    check("hostname", &["a.example.com"], &["-a", "a..b", ""]);
    check("uri", &["https://example.com/a?b"], &["example.com", "https://a b"]);
    check("byte", &["YWJj"], &["%"]);
    check("duration", &["1h30m", "10s", "1.5h"], &["ten", "5", "1x"]);
    check("mac", &["00:1b:44:11:3a:b7"], &["00:1b:44"]);
    check("nobody-knows", &["anything"], &[]);
}
