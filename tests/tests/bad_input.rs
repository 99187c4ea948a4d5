//! What clients should not do: each time a clear error or a bounded cost, and a server that goes on serving.

use std::time::Duration;

use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt as _;
use seawall_tests::{
    Options, Server,
    http::{Api, Connection, Shared},
    within,
};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

async fn server() -> Server {
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler,controllers".into()] }).await;
    server.kubectl.reaches("namespace/default", "{.metadata.name}", "default").await;
    // What a controller makes in each namespace.
    server.kubectl.run("create serviceaccount default").await.ok();
    server
}

/// What was not as it should be: all of it is told at the end, not only the first.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn check(&mut self, what: &str, said: &str, parts: &[&str]) {
        for part in parts.iter().filter(|part| !said.contains(**part)) {
            self.0.push(format!("{what}\n  should say: {part}\n  but says: {}", said.trim()));
        }
    }
}

impl Drop for Problems {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.0.is_empty(), "{} problems:\n{}", self.0.len(), self.0.join("\n"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_that_are_wrong_get_clear_errors() {
    let server = server().await;
    let k = &server.kubectl;
    let mut problems = Problems::default();
    let pod = |spec: &str| format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: x}}\nspec: {spec}");
    let map = |metadata: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {metadata}\ndata: {{a: b}}");
    let name = |name: &str| map(&format!("{{name: {name:?}}}"));
    let long = "x".repeat(254);
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: c}}, spec: {containers: [{name: c, image: i}]}}}";
    let create: &[(String, &[&str])] = &[
        // Broken YAML, unknown kinds, wrong types.
        ("apiVersion: v1\nkind: ConfigMap\n  metadata: {name: x".into(), &["error parsing"]),
        (
            "apiVersion: v1\nkind: Gadget\nmetadata: {name: x}".into(),
            &["no matches for kind \"Gadget\" in version \"v1\""],
        ),
        (
            "apiVersion: nowhere.example/v1\nkind: Gadget\nmetadata: {name: x}".into(),
            &["no matches for kind \"Gadget\""],
        ),
        (pod("{containers: wrong}"), &["containers"]),
        (pod("{containers: [{name: c, image: i, ports: [{containerPort: lots}]}]}"), &["containerPort"]),
        (pod("{containers: [{name: c, image: i}], replicas: 3}"), &["unknown field \"spec.replicas\""]),
        // Several mistakes are told at once, as upstream tells them.
        (
            pod(
                "{restartPolicy: Perhaps, containers: [{name: Bad_Name, image: i}, {name: d, image: e, ports: [{containerPort: 70000}]}]}",
            ),
            &[
                "The Pod \"x\" is invalid",
                "spec.containers[0].name: Invalid value: \"Bad_Name\"",
                "spec.containers[1].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
                "spec.restartPolicy: Unsupported value: \"Perhaps\"",
            ],
        ),
        (pod("{containers: []}"), &["spec.containers: Required value"]),
        (
            pod("{containers: [{name: c, image: i, resources: {requests: {cpu: a lot}}}]}"),
            &["quantities must match the regular expression"],
        ),
        (
            pod("{containers: [{name: c, image: i, resources: {requests: {memory: 2Gi}, limits: {memory: 1Gi}}}]}"),
            &[
                "spec.containers[0].resources.requests: Invalid value: \"2Gi\": must be less than or equal to memory limit",
            ],
        ),
        (
            map(&format!("{{name: x, annotations: {{big: {}}}}}", "x".repeat(256 << 10))),
            &["metadata.annotations: Too long: may not be more than 262144 bytes"],
        ),
        // Names, labels, namespaces.
        (name("Upper"), &["metadata.name: Invalid value: \"Upper\"", "RFC 1123"]),
        (name("under_score"), &["metadata.name: Invalid value", "RFC 1123"]),
        (name("-dash"), &["metadata.name: Invalid value", "RFC 1123"]),
        (name("dot."), &["metadata.name: Invalid value", "RFC 1123"]),
        (name("sp ace"), &["metadata.name: Invalid value", "RFC 1123"]),
        (name(&long), &["metadata.name: Invalid value", "must be no more than 253"]),
        (map("{labels: {a: b}}"), &["metadata.name: Required value: name or generateName is required"]),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a.b}".into(), &["metadata.name: Invalid value: \"a.b\""]),
        (map("{name: x, labels: {'a b': c}}"), &["metadata.labels: Invalid value: \"a b\""]),
        (map("{name: x, namespace: nowhere}"), &["namespaces \"nowhere\" not found"]),
        // A selector that does not select what it templates.
        (
            deployment.into(),
            &["spec.template.metadata.labels: Invalid value", "`selector` does not match template `labels`"],
        ),
    ];
    for (yaml, parts) in create {
        problems.check(yaml, &k.pipe("create -f -", yaml).await.fails(), parts);
    }
    k.apply(&name("target")).await;
    let patch = ["patch", "configmap", "target", "--type"];
    let commands: &[(&[&str], &[&str])] = &[
        (&["get", "pods", "-l", "a=b,,="], &["unable to parse requirement"]),
        (&["get", "pods", "--field-selector", "spec.nonsense=1"], &["field label not supported: spec.nonsense"]),
        (&["get", "gadgets"], &["the server doesn't have a resource type \"gadgets\""]),
        (&["json", "-p", r#"[{"op": "remove", "path": "/data/missing"}]"#], &["the server rejected our request"]),
        (&["json", "-p", r#"[{"op": "test", "path": "/data/a", "value": "c"}]"#], &["rejected"]),
        (&["merge", "-p", r#"{"data": {"a": 5}}"#], &["data"]),
        (&["merge", "-p", r#"{"metadata": {"name": "other"}}"#], &["name"]),
    ];
    for (words, parts) in commands {
        let args = if words[0] == "get" { words.to_vec() } else { [&patch[..], words].concat() };
        problems.check(&args.join(" "), &k.args(&args).await.fails(), parts);
    }
    alive(&server).await;
}

/// The server answers, and has not panicked on the way.
async fn alive(server: &Server) {
    let k = &server.kubectl;
    k.run("create configmap alive").await.ok();
    k.run("delete configmap alive").await.ok();
    assert!(!server.logged("panicked"), "a task of the server panicked:\n{}", server.log_tail());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_wrong_get_clear_errors() {
    let server = server().await;
    let api = server.api();
    let maps = "/api/v1/namespaces/default/configmaps";
    let mut problems = Problems::default();
    let mut check =
        async |method: Method, path: &str, kind: &str, body: Bytes, status: u16, reason: &str, part: &str| {
            let what = format!("{method} {path} ({} bytes of {kind})", body.len());
            let answer = api
                .connect()
                .await
                .unwrap()
                .send(method, path, kind, body)
                .await
                .unwrap_or_else(|e| panic!("{what}: {e:#}"));
            let said = answer.json();
            let found = format!(
                "{} {} {}",
                answer.status,
                said["reason"].as_str().unwrap_or("-"),
                said["message"].as_str().unwrap_or("-")
            );
            problems.check(&what, &found, &[&format!("{status} {reason} "), part]);
        };
    let json = "application/json";
    let bytes = |value: Value| Bytes::from(serde_json::to_vec(&value).unwrap());
    let map =
        |name: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "b"}});
    check(Method::POST, maps, json, "{\"apiVersion\": \"v1\", ".into(), 400, "BadRequest", "").await;
    check(Method::POST, maps, json, "[]".into(), 400, "BadRequest", "").await;
    check(Method::POST, maps, json, "null".into(), 400, "BadRequest", "").await;
    check(Method::POST, maps, json, Bytes::new(), 400, "BadRequest", "").await;
    check(Method::POST, maps, json, vec![0xff, 0xfe, 0x00].into(), 400, "BadRequest", "").await;
    check(Method::POST, maps, "text/plain", "hello".into(), 415, "UnsupportedMediaType", "").await;
    check(Method::POST, maps, "application/vnd.kubernetes.protobuf", vec![b'k'; 64].into(), 400, "BadRequest", "")
        .await;
    check(
        Method::POST,
        maps,
        json,
        bytes(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}})),
        400,
        "BadRequest",
        "",
    )
    .await;
    check(
        Method::GET,
        "/api/v1/namespaces/default/configmaps/none",
        "",
        Bytes::new(),
        404,
        "NotFound",
        "configmaps \"none\" not found",
    )
    .await;
    check(
        Method::GET,
        "/apis/nowhere/v1/things",
        "",
        Bytes::new(),
        404,
        "NotFound",
        "could not find the requested resource",
    )
    .await;
    check(Method::PATCH, "/api/v1/namespaces/default", json, "{}".into(), 415, "UnsupportedMediaType", "").await;
    check(Method::PUT, maps, json, bytes(map("x")), 405, "MethodNotAllowed", "").await;
    check(Method::GET, &format!("{maps}?limit=some"), "", Bytes::new(), 400, "BadRequest", "").await;
    check(Method::GET, &format!("{maps}?resourceVersion=new"), "", Bytes::new(), 400, "BadRequest", "").await;
    check(Method::GET, &format!("{maps}?continue=nonsense"), "", Bytes::new(), 400, "BadRequest", "continue").await;

    // Too deep, too large. Upstream takes three mebibytes of request, and a mebibyte of config map.
    let deep = format!("{}{}", "{\"a\":".repeat(50_000), "}".repeat(50_000));
    check(Method::POST, maps, json, deep.into(), 400, "BadRequest", "").await;
    let filled = |size: usize| {
        let mut map = map("big");
        map["data"] = json!({"a": "x".repeat(size)});
        bytes(map)
    };
    check(
        Method::POST,
        maps,
        json,
        filled((1 << 20) + 1),
        422,
        "Invalid",
        "[]: Too long: may not be more than 1048576 bytes",
    )
    .await;
    check(Method::POST, maps, json, filled(4 << 20), 413, "RequestEntityTooLarge", "limit is 3145728").await;
    // A body that never ends is cut off instead of kept.
    let before = server.memory();
    let endless = endless_body(&api, maps).await;
    assert!(endless < 64 << 20, "the server took {} MiB of one request", endless >> 20);
    server.memory_below(before + 100, "after an endless request").await;

    // Conflicts: an old version, a wrong uid, a name that is taken.
    let created = api.send(Method::POST, maps, &map("c")).await.unwrap();
    assert_eq!(created.status, 201, "{}", created.text());
    let first = created.json();
    let path = format!("{maps}/c");
    let mut second = first.clone();
    second["data"]["a"] = "c".into();
    assert_eq!(api.send(Method::PUT, &path, &second).await.unwrap().status, 200);
    second["data"]["a"] = "d".into();
    check(
        Method::PUT,
        &path,
        json,
        bytes(second.clone()),
        409,
        "Conflict",
        "the object has been modified; please apply your changes to the latest version and try again",
    )
    .await;
    check(Method::POST, maps, json, bytes(map("c")), 409, "AlreadyExists", "configmaps \"c\" already exists").await;
    let wrong = json!({"preconditions": {"uid": "11111111-2222-3333-4444-555555555555"}});
    check(Method::DELETE, &path, json, bytes(wrong), 409, "Conflict", "").await;
    second["metadata"]["name"] = "d".into();
    check(Method::PUT, &path, json, bytes(second), 400, "BadRequest", "").await;
    racing_updates(&api, &path).await;
    alive(&server).await;
}

/// Sends a body without end; tells how much was taken of it.
async fn endless_body(api: &Api, path: &str) -> usize {
    let mut stream = api.stream(false).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
    let mut sent = 0;
    for _ in 0..2048 {
        let writing = tokio::time::timeout(Duration::from_secs(10), stream.write_all(chunk.as_bytes()));
        match writing.await {
            Ok(Ok(())) => sent += chunk.len(),
            _ => break,
        }
    }
    sent
}

/// Many clients change one object by reading and writing it back: nothing is lost, and who is late is told so.
async fn racing_updates(api: &Api, path: &str) {
    const CLIENTS: usize = 16;
    const EACH: usize = 5;
    let tasks = (0..CLIENTS).map(|client| {
        let (api, path) = (api.clone(), path.to_owned());
        tokio::spawn(async move {
            let mut conflicts = 0;
            let mut done = 0;
            while done < EACH {
                let mut object = api.get(&path).await.unwrap().json();
                object["data"][format!("k{client}-{done}")] = "x".into();
                let answer = api.send(Method::PUT, &path, &object).await.unwrap();
                match answer.status {
                    200 => done += 1,
                    409 => conflicts += 1,
                    other => panic!("{other}: {}", answer.text()),
                }
            }
            conflicts
        })
    });
    let conflicts: usize = futures::future::join_all(tasks).await.into_iter().map(|c| c.unwrap()).sum();
    let object = api.get(path).await.unwrap().json();
    let keys = object["data"].as_object().unwrap().len();
    assert_eq!(keys, CLIENTS * EACH + 1, "an acknowledged change is lost");
    eprintln!("{} updates, {conflicts} conflicts", CLIENTS * EACH);
}

/// A watch that has been answered, and what is left of its body.
struct Watcher {
    body: hyper::body::Incoming,
    shared: Option<Shared>,
    _own: Option<Connection>,
}

async fn watch(api: &Api, path: &str) -> Watcher {
    let mut connection = api.connect().await.unwrap();
    let answer = connection.open(Method::GET, path, "", Bytes::new()).await.unwrap();
    assert_eq!(answer.status(), 200);
    Watcher { body: answer.into_body(), shared: None, _own: Some(connection) }
}

impl Watcher {
    async fn sharing(api: &Api, path: &str, mut connection: Shared) -> Watcher {
        connection.ready().await.unwrap();
        let answer = connection.send_request(api.request2(path).unwrap()).await.unwrap();
        assert_eq!(answer.status(), 200);
        Watcher { body: answer.into_body(), shared: Some(connection), _own: None }
    }

    /// Another watch on the connection of this one.
    async fn beside(&self, api: &Api, path: &str) -> Watcher {
        Watcher::sharing(api, path, self.shared.clone().unwrap()).await
    }

    /// Reads until all of these changes have come, which they must in their order.
    async fn sees(mut self, changes: usize) {
        let mut text = String::new();
        let mut next = 0;
        while next < changes {
            let frame = self.body.frame().await.expect("the watch goes on").unwrap();
            let Ok(data) = frame.into_data() else { continue };
            text += std::str::from_utf8(&data).unwrap();
            while let Some((line, rest)) = text.split_once('\n') {
                let event: Value = serde_json::from_str(line).unwrap();
                assert_eq!(event["type"], "MODIFIED", "{line:.300}");
                let n = event["object"]["data"]["n"].as_str().unwrap();
                assert_eq!(n.split(':').next().unwrap(), next.to_string(), "a change is missing or out of order");
                next += 1;
                text = rest.to_owned();
            }
        }
    }
}

/// Changes the object this many times.
async fn change(api: &Api, path: &str, changes: usize, filling: usize) {
    let filling = "x".repeat(filling);
    let mut connection = api.connect().await.unwrap();
    for n in 0..changes {
        let body = serde_json::to_vec(&json!({"data": {"n": format!("{n}:{filling}")}})).unwrap();
        let answer = connection.send(Method::PATCH, path, "application/merge-patch+json", body.into()).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_watchers_cost_little() {
    const WATCHERS: usize = 1000;
    const CHANGES: usize = 20;
    let server = server().await;
    let api = server.api();
    let maps = "/api/v1/namespaces/default/configmaps";
    let created = api.send(Method::POST, maps, &json!({"metadata": {"name": "watched"}})).await.unwrap().json();
    let from = created["metadata"]["resourceVersion"].as_str().unwrap();
    let path = format!("{maps}?watch=1&resourceVersion={from}");
    let idle = server.memory();

    // Handshakes one after the other in a few lanes, so that none of them waits too long.
    let lanes = (0..10).map(|_| {
        let (api, path) = (api.clone(), path.clone());
        tokio::spawn(async move {
            let mut open = Vec::new();
            for n in 0..WATCHERS / 10 {
                // Half of them with connections of their own, half sharing one, as Go's clients do.
                match open.iter().find(|w: &&Watcher| w.shared.is_some()) {
                    Some(other) if n % 2 == 0 => open.push(other.beside(&api, &path).await),
                    None if n % 2 == 0 => open.push(Watcher::sharing(&api, &path, api.connect2().await.unwrap()).await),
                    _ => open.push(watch(&api, &path).await),
                }
            }
            open
        })
    });
    let open: Vec<_> = futures::future::join_all(lanes).await.into_iter().flat_map(|lane| lane.unwrap()).collect();
    let watching = server.memory();
    eprintln!("{WATCHERS} watchers: {idle} -> {watching} MiB");
    assert!(watching < idle + 250, "{WATCHERS} watchers cost {} MiB", watching - idle);

    let began = tokio::time::Instant::now();
    let readers: Vec<_> = open.into_iter().map(|watcher| tokio::spawn(watcher.sees(CHANGES))).collect();
    change(&api, &format!("{maps}/watched"), CHANGES, 2000).await;
    eprintln!("{CHANGES} changes written in {:?}", began.elapsed());
    let all = tokio::time::timeout(Duration::from_secs(100), futures::future::join_all(readers)).await;
    all.expect("every watcher gets every change").into_iter().for_each(|reader| reader.unwrap());
    eprintln!("{WATCHERS} watchers have them after {:?}", began.elapsed());
    server.memory_below(idle + 250, "after the watchers left").await;
    alive(&server).await;
}

/// Clients that never read what they are sent, or never end what they send: nobody else waits for them.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stall_hold_up_nobody() {
    const CHANGES: usize = 150;
    let server = server().await;
    let api = server.api();
    let maps = "/api/v1/namespaces/default/configmaps";
    let created = api.send(Method::POST, maps, &json!({"metadata": {"name": "watched"}})).await.unwrap().json();
    let from = created["metadata"]["resourceVersion"].as_str().unwrap();
    let path = format!("{maps}?watch=1&resourceVersion={from}");
    let mut stalled = Vec::new();
    for request in ["GET {path} HTTP/1.1\r\nhost: x\r\n\r\n", "GET {path} HTTP/1.1\r\nhost: x\r\nx-slow: "] {
        for _ in 0..50 {
            let mut stream = api.stream(false).await.unwrap();
            stream.write_all(request.replace("{path}", &path).as_bytes()).await.unwrap();
            stalled.push(stream);
        }
    }
    let before = server.memory();
    // More than fits into the buffers of sockets and of TLS.
    let reader = tokio::spawn(watch(&api, &path).await.sees(CHANGES));
    let began = tokio::time::Instant::now();
    change(&api, &format!("{maps}/watched"), CHANGES, 200_000).await;
    eprintln!("{CHANGES} changes of 200 kB written in {:?}", began.elapsed());
    let done = tokio::time::timeout(Duration::from_secs(60), reader).await;
    done.expect("who reads is not held up by who does not").unwrap();
    // One copy of each change at most, however many do not read it.
    server.memory_below(before + 300, "with clients that stall").await;
    // Lists as well: asked for, and not read.
    for n in 0..40 {
        let map = json!({"metadata": {"name": format!("big-{n}")}, "data": {"a": "x".repeat(500_000)}});
        assert_eq!(api.send(Method::POST, maps, &map).await.unwrap().status, 201);
    }
    for _ in 0..50 {
        let mut stream = api.stream(false).await.unwrap();
        stream.write_all(format!("GET {maps} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        stalled.push(stream);
    }
    within(Duration::from_secs(30), "a list while others do not read theirs", async || {
        api.get(maps).await.is_ok_and(|a| a.status == 200 && a.body.len() > 20_000_000).then_some(())
    })
    .await;
    server.memory_below(before + 500, "with lists that nobody reads").await;
    alive(&server).await;
    drop(stalled);
}
