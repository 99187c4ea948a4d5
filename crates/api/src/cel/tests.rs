use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Authorizer, Program, Question, Session, Type, untyped};

fn pod() -> Value {
    json!({"metadata": {"name": "web", "labels": {"app": "web", "x.y/z": "1"}},
        "spec": {"replicas": 3, "ratio": 0.5, "containers": [
            {"name": "a", "image": "registry.k8s.io/pause:3.9", "resources": {"limits": {"memory": "64Mi"}}},
            {"name": "b", "image": "nginx"}], "__dash": 1, "a-b": {"namespace": 5}}})
}

fn eval(text: &str) -> Result<Value, String> {
    let object = pod();
    let old = json!({"spec": {"replicas": 1}});
    let program = Program::compile(text, &untyped(&["self", "oldSelf", "object"])).map_err(|e| e.to_string())?;
    program.eval(&[("self", &object), ("oldSelf", &old), ("object", &object)]).map_err(|e| e.to_string())
}

fn holds(cases: &[&str]) {
    for text in cases {
        assert_eq!(eval(text), Ok(json!(true)), "{text}");
    }
}

#[test]
fn the_language() {
    holds(&[
        "self.spec.replicas == 3 && self.spec.ratio == 0.5",
        "self.spec.replicas > oldSelf.spec.replicas",
        "has(self.spec.replicas) && !has(self.spec.nothing)",
        "self.spec.containers.all(c, c.name.size() == 1)",
        "self.spec.containers.exists(c, c.image.startsWith('registry.k8s.io/'))",
        "self.spec.containers.exists_one(c, c.name == 'a')",
        "self.spec.containers.map(c, c.name) == ['a', 'b']",
        "self.spec.containers.map(c, c.name == 'a', c.image).size() == 1",
        "self.spec.containers.filter(c, has(c.resources)).size() == 1",
        "self.metadata.labels['app'] == 'web' && 'app' in self.metadata.labels",
        "self.metadata.labels.all(k, k.size() > 0)",
        "self.metadata.labels.exists(k, v, k == 'app' && v == 'web')",
        "[1, 2, 3].transformList(i, v, i + v) == [1, 3, 5]",
        "{'a': 1}.transformMap(k, v, v + 1) == {'a': 2}",
        "'a' in ['a', 'b'] && !('c' in ['a'])",
        "1 + 2 * 3 == 7 && 7 / 2 == 3 && -7 % 3 == -1 && dyn(7u) == 7",
        "1 < 2.5 && 3u > 2 && 'a' < 'b' && dyn(1) == 1.0",
        "(true ? 1 : 2) == 1",
        // One side that decides makes up for the other one's failure.
        "true || self.nothing == 1",
        "self.nothing == 1 || true",
        "!(false && self.nothing == 1)",
        "[1, 0].exists(x, 4 / x == 4) && [0, 1].exists(x, 4 / x == 4)",
        "![0, 1].all(x, 4 / x == 5)",
        "self.?spec.?nothing.orValue(5) == 5 && self.?spec.?replicas.orValue(5) == 3",
        "self.?spec.nothing.hasValue() == false && self.spec.?replicas.value() == 3",
        "self.metadata.labels[?'none'].orValue('x') == 'x' && [1][?5].orValue(2) == 2",
        "optional.of(1).optMap(x, x + 1).value() == 2 && optional.none().or(optional.of(2)).value() == 2",
        "optional.ofNonZeroValue('').hasValue() == false",
        "{?'a': optional.none(), ?'b': optional.of(1)} == {'b': 1} && [?optional.none(), 1] == [1]",
        "cel.bind(x, self.spec.replicas, x + x) == 6",
        "self.spec.a__dash__b.__namespace__ == 5 && self.spec.`a-b`.namespace == 5 && self.spec.__dash == 1",
        "int('7') == 7 && double('0.5') == 0.5 && string(7) == '7' && bool('true') && uint(7) == 7u",
        "type(1) == int && type('') == string && type(self) == map",
        "duration('1h30m').getMinutes() == 90 && duration('1h') > duration('59m') && string(duration('90s')) == '90s'",
        "timestamp('2020-01-02T03:04:05Z').getFullYear() == 2020 && timestamp('2020-01-02T03:04:05Z').getDayOfWeek() == 4",
        "timestamp('2020-01-02T00:00:00Z') - timestamp('2020-01-01T00:00:00Z') == duration('24h')",
        "b'abc'.size() == 3 && bytes('abc') == b'abc'",
        "[[1], [2]] == [[1], [2]] && {'a': [1]} == {'a': [1]} && [1] != [2]",
        "null == null && self != null",
    ]);
}

#[test]
fn what_kubernetes_adds() {
    holds(&[
        "'TacoCat'.lowerAscii() == 'tacocat' && 'taco'.upperAscii() == 'TACO'",
        "' a '.trim() == 'a' && 'hello'.substring(1, 3) == 'el' && 'hello'.substring(2) == 'llo'",
        "'a-b-c'.split('-') == ['a', 'b', 'c'] && 'a-b-c'.split('-', 2) == ['a', 'b-c'] && 'ab'.split('') == ['a', 'b']",
        "['a', 'b'].join('-') == 'a-b' && ['a', 'b'].join() == 'ab'",
        "'hello hello'.replace('he', 'we') == 'wello wello' && 'hello hello'.replace('he', 'we', 1) == 'wello hello'",
        "'hello'.indexOf('l') == 2 && 'hello'.lastIndexOf('l') == 3 && 'hello'.indexOf('x') == -1 && 'tacö'.charAt(3) == 'ö'",
        "'hello'.indexOf('l', 3) == 3 && 'hello'.lastIndexOf('l', 2) == 2 && ''.indexOf('') == 0",
        "'abc123'.matches('^[a-z]+[0-9]+$') && !'abc'.matches('[0-9]') && matches('abc', 'b')",
        "'abc 123'.find('[0-9]+') == '123' && '1 2 3'.findAll('[0-9]') == ['1', '2', '3'] && '1 2'.findAll('[0-9]', 1) == ['1']",
        "[1, 2, 2].isSorted() && ![2, 1].isSorted() && [1, 2].sum() == 3 && [3, 1].min() == 1 && [3, 1].max() == 3",
        "[1, 2, 1].indexOf(1) == 0 && [1, 2, 1].lastIndexOf(1) == 2 && [1, 1].distinct() == [1]",
        "sets.contains([1, 2], [1]) && sets.equivalent([1, 2], [2, 1]) && !sets.intersects([1], [2])",
        "quantity('1Gi').isGreaterThan(quantity('1G')) && quantity('500m').compareTo(quantity('0.5')) == 0",
        "isQuantity('1Ki') && !isQuantity('1 Ki') && quantity('2k').asInteger() == 2000 && !quantity('1m').isInteger()",
        "quantity('1').add(quantity('500m')).isGreaterThan(quantity('1.4')) && quantity('2').sub(1).compareTo(quantity('1')) == 0",
        "quantity('1Ki') == quantity('1024') && quantity('-1').sign() == -1",
        "semver('1.2.3').isLessThan(semver('1.10.0')) && semver('1.0.0-rc.1').compareTo(semver('1.0.0')) == -1",
        "isSemver('1.2.3+x') && !isSemver('v1.2') && isSemver('v1.2', true) && semver('v01.2', true).minor() == 2",
        "semver('1.2.3+a') == semver('1.2.3+b') && semver('3.2.1').major() == 3 && semver('3.2.1').patch() == 1",
        "semver('v1.0', true) == semver('1.0.0') && semver('1.0.0') != semver('1.0.1') && semver('1.2.3').minor() == 2",
        "isSemver('1.0.0') && !isSemver('v1.0') && isSemver('v1.0', true)",
        "!format.dns1123Label().validate('a-b').hasValue() && format.dns1123Label().validate('a.b').value().size() == 1",
        "!format.named('x').hasValue() && format.named('uuid').value().validate('x').value()[0].contains('UUID')",
        "format.uri() == format.named('uri').value() && format.uri() != format.date() && format.uri().validate('/') != null",
        "isURL('https://a.b:80/c?d=e') && !isURL('../c') && url('https://a.b:80/c?d=e').getHost() == 'a.b:80'",
        "url('https://[::1]:80/c?d=e&d=f').getHostname() == '::1' && url('https://a.b/c?d=e').getQuery() == {'d': ['e']}",
        "url('https://a.b:80/c').getPort() == '80' && url('/c').getEscapedPath() == '/c' && url('https://a').getScheme() == 'https'",
        "isIP('10.0.0.1') && !isIP('10.0.0.256') && ip('::1').family() == 6 && ip('127.0.0.1').isLoopback()",
        "cidr('10.0.0.0/8').containsIP('10.1.2.3') && cidr('10.0.0.0/8').containsCIDR('10.1.0.0/16') && !cidr('10.0.0.0/8').containsIP(ip('11.0.0.1'))",
        "cidr('10.1.2.3/8').masked() == cidr('10.0.0.0/8') && cidr('10.0.0.0/8').prefixLength() == 8 && string(ip('10.0.0.1')) == '10.0.0.1'",
        "'%s has %d of %.2f%%'.format(['a', 3, 1.5]) == 'a has 3 of 1.50%' && '%x'.format([255]) == 'ff' && '%s'.format([[1, 'a']]) == '[1, a]'",
        "base64.encode(b'abc') == 'YWJj' && base64.decode('YWJj') == b'abc'",
        "math.greatest(1, 3, 2) == 3 && math.least([4, 2]) == 2 && math.abs(-1) == 1",
        "jsonpatch.escapeKey('a/b~c') == 'a~1b~0c'",
        "self.spec.containers.filter(c, has(c.resources)).all(c, quantity(c.resources.limits.memory).isLessThan(quantity('65Mi')))",
    ]);
}

#[test]
fn objects_are_made() {
    let check = |text: &str, expect: Value| assert_eq!(eval(text), Ok(expect), "{text}");
    check("Object{spec: Object.spec{replicas: 4, ?none: optional.none()}}", json!({"spec": {"replicas": 4}}));
    check(
        "[JSONPatch{op: 'add', path: '/metadata/labels/' + jsonpatch.escapeKey('a/b'), value: 'x'}]",
        json!([{"op": "add", "path": "/metadata/labels/a~1b", "value": "x"}]),
    );
    check("{'a': dyn(1), 'b': [1.5, dyn(true), null]}", json!({"a": 1, "b": [1.5, true, null]}));
}

#[test]
fn what_cannot_be_read() {
    let check = |text: &str, part: &str| {
        let error = Program::compile(text, &untyped(&["self"])).map(|p| format!("{p:?}")).unwrap_err().to_string();
        assert!(error.starts_with("compilation failed: ") && error.contains(part), "{text}: {error}");
    };
    check("self.", "Syntax error");
    check("", "empty");
    check("other.spec", "undeclared reference to 'other' (in container '')");
    check("self.nonsense()", "undeclared reference to 'nonsense'");
    check("optional.nonsense(1)", "undeclared reference to 'optional.nonsense'");
    check("self.a.matches('[')", "invalid matches argument");
    check("Other{a: 1}", "undeclared reference to 'Other'");
    check("self.all(x, y)", "undeclared reference to 'y'");
    check(&"(".repeat(5000), "");
    check(&"1 + ".repeat(8000), "");
    check(&format!("{}1", "1 + ".repeat(5000)), "nests too deep");
    check(&format!("self{}", ".a".repeat(5000)), "nests too deep");
    check(&format!("{}1{}", "[".repeat(300), "]".repeat(300)), "");
    check(&"a".repeat(40_000), "too long");
}

#[test]
fn what_has_no_value() {
    let check = |text: &str, expect: &str| assert_eq!(eval(text), Err(expect.to_owned()), "{text}");
    check("self.nothing", "no such key: nothing");
    check("self.spec.containers[7].name", "index out of bounds: 7");
    check("1 / 0", "division by zero");
    check("9223372036854775807 + 1", "integer overflow");
    check("self.spec.replicas + 'x'", "no such overload: _+_");
    check("self.spec.replicas.name", "type 'int' does not support field selection");
    check("'a'.substring(3)", "index out of range: 3");
    check("optional.none().value()", "optional.none() dereference");
    check(
        "quantity('x')",
        "quantity: \"x\" is not a quantity: expected a number with an optional suffix such as m, k, M, G, Ki, Mi, Gi or e3",
    );
    check("semver('1')", "No Major.Minor.Patch elements found");
    check("[1, dyn('a')].isSorted()", "no such overload: isSorted");
    check("[].min()", "min called on empty list");
}

#[test]
fn evaluation_is_bounded() {
    let list = json!((0..2000).collect::<Vec<_>>());
    let text = json!("a".repeat(1 << 20));
    let run = |expr: &str| {
        let program = Program::compile(expr, &untyped(&["list", "text"])).unwrap();
        program.eval(&[("list", &list), ("text", &text)])
    };
    for expr in [
        "list.all(a, list.all(b, a + b >= 0))",
        "list.map(a, list.map(b, list.map(c, a)))",
        "list.map(a, text.replace('a', 'aaaaaaaaaa'))",
        "text.split('').map(x, x).map(x, text + x)",
        "list.all(a, text.matches('^a*$'))",
        "list.map(a, list) == list.map(a, list)",
    ] {
        let error = run(expr).unwrap_err();
        assert!(error.exhausted, "{expr}: {error}");
        assert_eq!(error.message, "operation cancelled: actual cost limit exceeded");
    }
    assert_eq!(run("list.all(a, a >= 0)"), Ok(json!(true)));
}

#[test]
fn expressions_share_a_budget() {
    let list = json!((0..2000).collect::<Vec<_>>());
    let program = Program::compile("list.all(a, a >= 0)", &untyped(&["list"])).unwrap();
    let one = {
        let session = Session::new(vec![("list", &list)]);
        session.eval(&program).unwrap();
        session.cost()
    };
    let session = Session::new(vec![("list", &list)]).with_budget(2 * one);
    assert_eq!([session.eval(&program), session.eval(&program)], [Ok(json!(true)), Ok(json!(true))]);
    assert!(session.eval(&program).unwrap_err().exhausted);
}

/// What is nested as deep as may be fits the stack of a thread that serves requests.
#[test]
fn depth_fits_the_stack() {
    let work = || {
        let object = json!({"a": 1});
        let longest = format!("{}1", "1 + ".repeat(super::DEEPEST - 4));
        let programs: Vec<(String, Program)> = (0..20)
            .map(|n| {
                let more = if n == 0 { "0".to_owned() } else { format!("variables.v{}", n - 1) };
                let program = Program::compile(&format!("{more} + {longest}"), &untyped(&["self", "variables"]));
                (format!("v{n}"), program.unwrap())
            })
            .collect();
        let last = Program::compile("variables.v19", &untyped(&["variables"])).unwrap();
        let session = Session::new(vec![("self", &object)]).with_named(&programs);
        assert_eq!(session.eval(&last).unwrap_err().message, "the expression nests too deep");
        let first = Program::compile("variables.v0", &untyped(&["variables"])).unwrap();
        let session = Session::new(vec![("self", &object)]).with_named(&programs);
        assert_eq!(session.eval(&first), Ok(json!(147)));
    };
    std::thread::Builder::new().stack_size(1 << 20).spawn(work).unwrap().join().unwrap();
}

#[test]
fn named_expressions() {
    let object = pod();
    let names = ["object", "variables"];
    let program = |text: &str| Program::compile(text, &untyped(&names)).unwrap();
    let named = vec![
        ("replicas".to_owned(), program("object.spec.replicas")),
        ("double".to_owned(), program("variables.replicas * 2")),
        ("wrong".to_owned(), program("object.nothing")),
        ("itself".to_owned(), program("variables.itself")),
    ];
    let check = |text: &str, expect: Result<Value, &str>| {
        let wanted = program(text);
        let session = Session::new(vec![("object", &object)]).with_named(&named);
        assert_eq!(session.eval(&wanted), expect.map_err(super::EvalError::new), "{text}");
    };
    check("variables.double", Ok(json!(6)));
    check("has(variables.double)", Ok(json!(true)));
    check("variables.replicas == 3 || variables.wrong == 1", Ok(json!(true)));
    check("variables.wrong", Err("no such key: nothing"));
    check("variables.itself", Err("variable \"itself\" uses itself"));
    check("variables.other", Err("no such key: other"));
}

struct OnlyPods;

impl Authorizer for OnlyPods {
    fn check(&self, question: &Question) -> (bool, String) {
        let allowed = question.resource == "pods" && question.verb == "get" && question.fields != "a=b";
        (allowed, format!("{:?}{}", question.service_account, question.labels))
    }
}

#[test]
fn the_authorizer_is_asked() {
    let check = |text: &str, expect: Value| {
        let program = Program::compile(text, &super::of_policy(false)).unwrap();
        let request = json!({"resource": {"group": "", "resource": "pods"}, "namespace": "a", "name": "p"});
        let session = Session::new(vec![("request", &request)]).with_authorizer(&OnlyPods);
        assert_eq!(session.eval(&program), Ok(expect), "{text}");
    };
    check("authorizer.requestResource.check('get').allowed()", json!(true));
    check("authorizer.requestResource.check('delete').allowed()", json!(false));
    check("authorizer.group('').resource('pods').namespace('a').check('get').allowed()", json!(true));
    check("authorizer.group('').resource('nodes').name('n').check('get').allowed()", json!(false));
    let pods = "authorizer.group('').resource('pods')";
    check(&format!("{pods}.fieldSelector('a=b').check('get').allowed()"), json!(false));
    check(&format!("{pods}.labelSelector('c=d').check('get').reason()"), json!("Nonec=d"));
    check("authorizer.serviceAccount('a', 'b').path('/x').check('get').reason()", json!("Some((\"a\", \"b\"))"));
}

#[test]
fn types_are_known_before() {
    let check = |text: &str, expect: &str| {
        let schema = json!({"type": "object", "properties": {
            "name": {"type": "string"}, "count": {"type": "integer"}, "ratio": {"type": "number"}, "on": {"type": "boolean"},
            "since": {"type": "string", "format": "date-time"}, "port": {"x-kubernetes-int-or-string": true},
            "tags": {"type": "array", "items": {"type": "string"}}, "a-b": {"type": "integer"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "parts": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}}}});
        let ty = Type::of_schema(&schema, true).unwrap();
        let variables = [("self", ty.clone()), ("oldSelf", Type::optional(ty)), ("any", Type::Dyn)];
        let found = match Program::compile(text, &variables) {
            Ok(program) => program.ty().to_string(),
            Err(error) => error.0.lines().next().unwrap().to_owned(),
        };
        assert_eq!(found, expect, "{text}");
    };
    check("1 + 1", "int");
    check("self.name + 'x'", "string");
    check("self.tags.map(t, t.size())", "list(int)");
    check("self.tags.filter(t, t != '')", "list(string)");
    check("self.parts.all(p, p.n > 0 && p.n < 2.5)", "bool");
    check("self.labels.all(k, k.startsWith('a') && self.labels[k] != '')", "bool");
    check("self.labels.transformMap(k, v, v.size())", "map(string, int)");
    check("self.labels[?'x'].orValue('y')", "string");
    check("self.?name.hasValue() && oldSelf.name.orValue('') == self.name", "bool");
    check("oldSelf.optMap(o, o.count).orValue(0)", "int");
    check("has(self.metadata.name) ? self.count : 0", "int");
    check("cel.bind(n, self.count, n + n)", "int");
    check("self.port == 80 || self.port == '80'", "bool");
    check("self.since < timestamp('2020-01-01T00:00:00Z') + duration('1h')", "bool");
    check("self.a__dash__b", "int");
    check("any.whatever + 1", "int");
    check("any.whatever + any.other", "dyn");
    check("[]", "list(dyn)");
    check("[] + [1]", "list(int)");
    check("'%s %d'.format(['a', 1])", "string");
    check("[1, 2].sum() + math.greatest(1, 2)", "int");
    check("self.parts == oldSelf.parts.orValue([])", "bool");
    check("sets.contains(self.tags, ['a'])", "bool");
    check("quantity('1').add(2).isGreaterThan(quantity('1'))", "bool");

    check("self.nothing", "ERROR: <input>:1:5: undefined field 'nothing'");
    check("has(self.metadata.labels)", "ERROR: <input>:1:4: undefined field 'labels'");
    check("self.name.size", "ERROR: <input>:1:10: type 'string' does not support field selection");
    check("self.name + 1", "ERROR: <input>:1:11: found no matching overload for '_+_' applied to '(string, int)'");
    check("self.count == 'a'", "ERROR: <input>:1:12: found no matching overload for '_==_' applied to '(int, string)'");
    check("self.count == 1.0", "ERROR: <input>:1:12: found no matching overload for '_==_' applied to '(int, double)'");
    check(
        "self.name == null",
        "ERROR: <input>:1:11: found no matching overload for '_==_' applied to '(string, null)'",
    );
    check(
        "self.count.startsWith('a')",
        "ERROR: <input>:1:22: found no matching overload for 'startsWith' applied to 'int.(string)'",
    );
    check(
        "self.tags.all(t, t.size())",
        "ERROR: <input>:1:14: found no matching overload for '_&&_' applied to '(bool, int)'",
    );
    check(
        "self.name.all(c, c == 'a')",
        "ERROR: <input>:1:5: expression of type 'string' cannot be range of a comprehension (must be list, map, or dynamic)",
    );
    check("[1, 'a']", "ERROR: <input>:1:5: expected type 'int' but found 'string'");
    check("{'a': 1, 'b': 'c'}", "ERROR: <input>:1:15: expected type 'int' but found 'string'");
    check("self.parts[0].m == 1", "ERROR: <input>:1:14: undefined field 'm'");
    check(
        "self.on ?\n 1 :\n  'a'",
        "ERROR: <input>:1:9: found no matching overload for '_?_:_' applied to '(bool, int, string)'",
    );
    check("true &&\n self.x", "ERROR: <input>:2:6: undefined field 'x'");
}

#[test]
fn errors_show_the_place() {
    let error = Program::compile("1 +\n  self.a + x", &untyped(&["self"])).unwrap_err();
    let expect = "ERROR: <input>:2:12: undeclared reference to 'x' (in container '')\n |   self.a + x\n | ...........^";
    assert_eq!(error.0, expect);
}

/// A type of a few lines that would be larger than any memory if it was written down.
#[test]
fn types_are_bounded() {
    let mut text = "1".to_owned();
    for n in (0..30).rev() {
        text = format!("cel.bind(m{}, {{}}, [m{}[m{n}] == m{n}].size() + {text})", n + 1, n + 1);
    }
    let done = Program::compile(&format!("cel.bind(m0, {{}}, {text})"), &[]).map(|program| program.ty().to_string());
    assert_eq!(done.unwrap_err().0, "the types of the expression are too complex");
}

proptest! {
    /// Whatever somebody writes, it is an answer or an error.
    #[test]
    fn nothing_panics(text in "\\PC{0,60}") {
        if let Ok(program) = Program::compile(&text, &untyped(&["self"])) {
            let _ = program.eval(&[("self", &pod())]);
        }
    }

    #[test]
    fn nothing_that_looks_right_panics(
        parts in prop::collection::vec(prop::sample::select(vec![
            "self", ".spec", ".containers", "[0]", "['a']", ".size()", ".map(x, x)", ".all(x, x)", " + ", " - ", " * ",
            " / ", " % ", " == ", " && ", " || ", "!", "-", "1", "0", "2.5", "'a'", "'%s%d'", ".format([1])", "[", "]", "(",
            ")", "{", "}", ":", ",", "?", ".?a", ".substring(1, 9)", ".charAt(-1)", ".split('')", "has(self.a)", " in ",
            "9223372036854775807", "-9223372036854775808", "duration('1h')", "timestamp('2020-01-01T00:00:00Z')", "u",
            "quantity('1Gi')", ".orValue(1)", "optional.of(1)", "cidr('1.2.3.4/8')", "b'a'", ".join()", "'ö'", "Object{a: 1}",
        ]), 0..12)
    ) {
        if let Ok(program) = Program::compile(&parts.concat(), &untyped(&["self"])) {
            let _ = program.eval(&[("self", &pod())]);
        }
    }
}
