//! Estimates beside those of upstream for the same rules and schemas
//! (<https://github.com/kubernetes/apiextensions-apiserver/blob/master/pkg/apiserver/schema/cel/compilation_test.go>,
//! <https://github.com/kubernetes/apiserver/blob/master/pkg/cel/library/cost_test.go>).

use serde_json::{Value, json};

use super::Sizes;
use crate::cel::{Program, Type};

#[track_caller]
fn check(schema: Value, rule: &str, expect: u64) {
    let subject = Type::of_schema(&schema, false).expect("a type");
    let sizes = Sizes::of_schema(&schema, false).expect("a size");
    let variables = [("self", subject.clone()), ("oldSelf", subject)];
    let (_, cost) = Program::estimate(rule, &variables, &sizes).expect(rule);
    assert_eq!(cost, expect, "{rule} of {schema}");
}

fn with(mut schema: Value, key: &str, limit: u64) -> Value {
    schema[key] = limit.into();
    schema
}

fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

fn map(values: Value) -> Value {
    json!({"type": "object", "additionalProperties": values})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn formatted(format: &str) -> Value {
    json!({"type": "string", "format": format})
}

fn number() -> Value {
    json!({"type": "number"})
}

#[test]
fn loops() {
    check(list(number()), "self.all(x, true)", 4_718_591);
    check(with(list(number()), "maxItems", 10), "self.all(x, true)", 32);
    check(list(text()), "self.all(x, true)", 3_145_727);
    check(list(json!({"type": "boolean"})), "self.all(x, true)", 1_887_437);
    check(list(list(number())), "self.all(x, true)", 3_145_727);
    check(list(json!({"x-kubernetes-int-or-string": true})), "self.all(x, true)", 4_718_591);
    check(list(formatted("duration")), "self.all(x, true)", 2_359_295);
    check(list(formatted("date")), "self.all(x, true)", 725_936);
    check(list(formatted("date-time")), "self.all(x, true)", 428_963);
    check(map(number()), "self.all(x, true)", 1_348_169);
    check(with(map(number()), "maxProperties", 10), "self.all(x, true)", 32);
    check(map(text()), "self.all(x, true)", 1_179_647);
    check(map(list(number())), "self.all(x, true)", 1_179_647);
    check(with(list(number()), "maxItems", 10), "self.all(x, self.all(y, true))", 352);
    check(with(list(number()), "maxItems", 10), "self.all(x, self.all(y, self.all(z, true)))", 3552);
    check(list(number()), "self.all(x, x == 0.0)", 6_291_454);
    check(with(list(number()), "maxItems", 3 * 1024 * 2048), "self.all(x, x == 0.0)", 25_165_826);
    let short = with(map(with(text(), "maxLength", 10)), "maxProperties", 10);
    check(short, "self.all(x, x.contains(self[x]))", 72);
    check(map(text()), "self.all(x, x.contains(self[x]))", 2_752_507);
    check(list(map(number())), "self.all(x, x.y == 25.2)", 6_291_452);
}

#[test]
fn loops_over_keys_and_values() {
    let nothing = || json!({"type": "object"});
    check(nothing(), "{'a': 1, 'b': 2}.all(k, v, v > 0)", 41);
    check(nothing(), "{'a': 1, 'b': 2}.exists(k, v, v > 0)", 43);
    check(nothing(), "{'a': 1, 'b': 2}.existsOne(k, v, v > 0)", 40);
    check(nothing(), "{'a': 1, 'b': 2}.transformMap(k, v, v + 1).size() == 2", 71 + 2);
    check(nothing(), "{'a': 1, 'b': 2}.transformMap(k, v, v < 5, v + 1).size() == 2", 75 + 2);
    check(nothing(), "[1, 2].all(i, v, v > 0)", 21);
    check(nothing(), "[1, 2].exists(i, v, v > 0)", 23);
    check(nothing(), "[1, 2].existsOne(i, v, v > 0)", 20);
    check(nothing(), "[1, 2].transformList(i, v, v + 1).size() == 2", 49 + 2);
    check(nothing(), "[1, 2].transformList(i, v, v < 5, v + 1).size() == 2", 53 + 2);
}

#[test]
fn texts() {
    let short = |length| with(text(), "maxLength", length);
    check(text(), "self.contains('test')", 314_574);
    check(short(10), "self.contains('test')", 5);
    check(text(), "self.startsWith('test')", 2);
    check(text(), r#"size(self + "hello") > size("hello")"#, 314_578);
    check(short(4), r#"size(self + "hello") > size("hello")"#, 7);
    check(text(), r#"self.matches("x")"#, 314_574);
    check(short(50), r#"self.matches("x")"#, 22);
    check(text(), r#""".matches("(((((((((())))))))))[0-9]")"#, 7);
    check(text(), r#"self.matches("")"#, 1);
    check(text(), "self == 'x'", 2);
    check(short(0), "self == 'x'", 1);
    check(with(formatted("byte"), "maxLength", 0), "self == b'x'", 1);
    check(formatted("byte"), "self == b'x'", 2);
    check(text(), "self.find('[0-9]+') == ''", 629_147);
    check(short(10), "self.find('[0-9]+') == ''", 11);
    check(text(), "self.lowerAscii() == 'lower!'", 314_575);
    check(short(10), "self.lowerAscii() == 'lower!'", 6);
    check(json!({"type": "string", "enum": ["A", "B", "LongValue"]}), "self.contains('A')", 2);
    check(json!({"type": "string", "enum": ["A", "B"], "maxLength": 1000}), "self.contains('A')", 401);
    check(json!({"x-kubernetes-int-or-string": true}), "isQuantity(self)", 314_574);
    check(json!({"x-kubernetes-int-or-string": true, "maxLength": 20}), "isQuantity(self)", 9);
    let parts = |length: Option<u64>| {
        let text = length.map_or_else(text, short);
        json!({"type": "object", "properties": {"str": text, "separator": text, "before": short(2), "after": short(4)}})
    };
    check(parts(None), "self.str.replace(self.before, self.after) == 'does not matter'", 629_154);
    check(parts(Some(4)), "self.str.replace(self.before, self.after) == 'does not matter'", 12);
    check(parts(None), "self.str.split(self.separator) == []", 629_160);
    check(parts(Some(10)), "self.str.split(self.separator) == []", 22);
}

#[test]
fn what_is_in_lists_and_maps() {
    check(list(number()), "self[1] == 0.0", 2);
    check(list(text()), "self[1] == self[1]", 314_577);
    check(list(json!({"type": "object"})), "self[0] == null", 2);
    check(list(list(number())), "self[0][0] == -1.0", 3);
    check(list(map(number())), "self[0].x > 2.0", 4);
    check(list(json!({"x-kubernetes-int-or-string": true})), "self[0] == 5", 3);
    check(list(formatted("duration")), "self[0].getHours() == 2", 4);
    check(map(number()), "has(self.x)", 1);
    check(map(number()), r#"self["x"] == 0.0"#, 2);
    check(map(formatted("date-time")), r#"self["a"] == self["b"]"#, 8);
    check(map(number()), "oldSelf.size() == self.size()", 5);
    let texts = || with(list(with(text(), "maxLength", 10)), "maxItems", 10);
    check(list(text()), "self.join(' ') == 'aa bb'", 329_853_068_905);
    check(texts(), "self.join(' ') == 'aa bb'", 43);
    check(list(text()), "self.isSorted() == true", 329_854_432_052);
    check(texts(), "self.isSorted() == true", 52);
    check(with(list(number()), "maxItems", 7), "self.sum() == self.max()", 7 + 7 + 2 + 1);
}

#[test]
fn what_the_expression_makes_itself() {
    let nothing = || json!({"type": "object"});
    check(nothing(), "[1, 2, 3, 4, 5].sum() == 15", 16);
    check(nothing(), "sets.contains([1, 2], [2])", 23);
    check(nothing(), "sets.equivalent([1, 2], [2, 1])", 29);
    check(nothing(), "[3, 1, 2].sort() == [1, 2, 3]", 10 + 10 + 18 + 11 + 1);
    check(nothing(), "quantity('12M').isGreaterThan(quantity('1M'))", 3);
    check(nothing(), "format.named('dns1123Subdomain').value().validate('my-name').hasValue()", 34 + 1);
    check(nothing(), "format.named('uri').value() == format.named('uuid').value()", 11);
    check(nothing(), "isSemver('1234.56789012345.67890123456789')", 4);
    check(nothing(), "semver('1.0.0').isLessThan(semver('1.1.0'))", 3);
    check(nothing(), "ip('127.0.0.1').isLoopback()", 2);
    check(nothing(), "cidr('10.0.0.0/8').containsIP('10.0.0.1')", 1 + 4 + 1);
    check(nothing(), "url('https://example.org/a') == url('https://example.org/b')", 3 + 3 + 3);
}
