//! Random requests, one after the other: what the server answers, keeps and tells its watchers is what a simple model
//! says, on either store.

use std::{cell::Cell, collections::BTreeMap, sync::Arc};

use http::Method;
use proptest::{
    prelude::*,
    test_runner::{TestCaseResult, TestRunner},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{MERGE, etcd::EtcdCluster, harness::Api};

/// What a request says of a version or a uid.
#[derive(Clone, Copy, Debug)]
enum Guess {
    Nothing,
    Right,
    Wrong,
}

#[derive(Clone, Debug)]
enum Op {
    /// With a finalizer or without.
    Create(bool, u8),
    Update(Guess, u8),
    Merge(Guess, u8),
    Strategic(u8),
    /// A JSON patch that first tests for a value.
    Json(u8, u8),
    /// Takes the finalizer away.
    Release,
    Delete {
        version: Guess,
        uid: Guess,
    },
    Get,
    /// In pages of so many.
    List(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let guess = || prop_oneof![3 => Just(Guess::Right), 2 => Just(Guess::Nothing), 1 => Just(Guess::Wrong)];
    let value = || 0..3u8;
    prop_oneof![
        4 => (any::<bool>(), value()).prop_map(|(held, value)| Op::Create(held, value)),
        3 => (guess(), value()).prop_map(|(version, value)| Op::Update(version, value)),
        2 => (guess(), value()).prop_map(|(version, value)| Op::Merge(version, value)),
        1 => value().prop_map(Op::Strategic),
        1 => (value(), value()).prop_map(|(test, value)| Op::Json(test, value)),
        2 => Just(Op::Release),
        3 => (guess(), guess()).prop_map(|(version, uid)| Op::Delete { version, uid }),
        1 => Just(Op::Get),
        1 => (1..4usize).prop_map(Op::List),
    ]
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Object {
    uid: String,
    version: u64,
    value: u8,
    /// It has a finalizer.
    held: bool,
    /// It was deleted, and waits for its finalizer.
    ending: bool,
}

impl Object {
    fn of(answer: &Value) -> Object {
        let meta = &answer["metadata"];
        Object {
            uid: meta["uid"].as_str().unwrap().to_owned(),
            version: version_of(answer),
            value: answer["data"]["k"].as_str().unwrap().parse().unwrap(),
            held: !meta["finalizers"].is_null(),
            ending: !meta["deletionTimestamp"].is_null(),
        }
    }
}

fn version_of(answer: &Value) -> u64 {
    answer["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

/// A namespace, and what should be in it.
struct Case<'a> {
    api: &'a Api,
    maps: String,
    objects: BTreeMap<String, Object>,
    /// No version is older that was not there yet.
    newest: u64,
    /// What watchers should have seen. What version the end of an object has is not answered to anybody.
    log: Vec<(&'static str, String, Option<u64>)>,
}

impl Case<'_> {
    async fn request(&self, method: Method, name: &str, kind: &str, body: Value) -> (u16, Value) {
        let path = if name.is_empty() { self.maps.clone() } else { format!("{}/{name}", self.maps) };
        let (status, answer) = self.api.call(method, &path, kind, body).await;
        (status.as_u16(), answer)
    }

    /// The metadata of a request that makes this guess at the object's version.
    fn metadata(&self, name: &str, version: Guess) -> Value {
        let now = self.objects.get(name).map_or(self.newest, |object| object.version);
        match version {
            Guess::Nothing => json!({"name": name}),
            Guess::Right => json!({"name": name, "resourceVersion": now.to_string()}),
            Guess::Wrong => json!({"name": name, "resourceVersion": (now - 1).to_string()}),
        }
    }

    /// What a request is answered that makes these guesses.
    fn code(&self, name: &str, guesses: &[Guess]) -> u16 {
        match self.objects.get(name) {
            None => 404,
            Some(_) if guesses.iter().any(|guess| matches!(guess, Guess::Wrong)) => 409,
            Some(_) => 200,
        }
    }

    /// A request changes an object, or does not if it is as it should be already.
    async fn change(
        &mut self,
        name: &str,
        expect: u16,
        (method, kind, body): (Method, &str, Value),
        change: impl FnOnce(&mut Object),
    ) -> TestCaseResult {
        let (code, answer) = self.request(method, name, kind, body).await;
        prop_assert_eq!(code, expect, "{}", answer);
        if code != 200 {
            return Ok(());
        }
        let before = self.objects[name].clone();
        let mut after = before.clone();
        change(&mut after);
        if after == before {
            prop_assert_eq!(Object::of(&answer), before, "nothing changed");
        } else if after.ending && !after.held {
            self.objects.remove(name);
            self.log.push(("DELETED", name.to_owned(), None));
        } else {
            after.version = version_of(&answer);
            prop_assert_eq!(Object::of(&answer), after.clone());
            self.written("MODIFIED", name, after)?;
        }
        Ok(())
    }

    fn written(&mut self, event: &'static str, name: &str, object: Object) -> TestCaseResult {
        prop_assert!(object.version > self.newest, "{} after {}", object.version, self.newest);
        self.newest = object.version;
        self.log.push((event, name.to_owned(), Some(object.version)));
        self.objects.insert(name.to_owned(), object);
        Ok(())
    }

    async fn step(&mut self, name: &str, op: Op) -> TestCaseResult {
        let held = self.objects.get(name).is_some_and(|object| object.held);
        let data = |value: u8| json!({"k": value.to_string()});
        match op {
            Op::Create(held, value) => {
                let finalizers = if held { json!(["example.org/held"]) } else { Value::Null };
                let body = json!({"metadata": {"name": name, "finalizers": finalizers}, "data": data(value)});
                let (code, answer) = self.request(Method::POST, "", "application/json", body).await;
                prop_assert_eq!(code, if self.objects.contains_key(name) { 409 } else { 201 }, "{}", answer);
                if code == 201 {
                    let object = Object::of(&answer);
                    prop_assert_eq!((object.value, object.held, object.ending), (value, held, false));
                    self.written("ADDED", name, object)?;
                }
            }
            Op::Update(version, value) => {
                let mut metadata = self.metadata(name, version);
                if held {
                    metadata["finalizers"] = json!(["example.org/held"]);
                }
                let request = (Method::PUT, "application/json", json!({"metadata": metadata, "data": data(value)}));
                self.change(name, self.code(name, &[version]), request, |object| object.value = value).await?;
            }
            Op::Merge(version, value) => {
                let body = json!({"metadata": self.metadata(name, version), "data": data(value)});
                let expect = self.code(name, &[version]);
                self.change(name, expect, (Method::PATCH, MERGE, body), |object| object.value = value).await?;
            }
            Op::Strategic(value) => {
                let kind = "application/strategic-merge-patch+json";
                let request = (Method::PATCH, kind, json!({"data": data(value)}));
                self.change(name, self.code(name, &[]), request, |object| object.value = value).await?;
            }
            Op::Json(test, value) => {
                let steps = [("test", test), ("replace", value)];
                let steps = steps.map(|(op, value)| json!({"op": op, "path": "/data/k", "value": value.to_string()}));
                let request = (Method::PATCH, "application/json-patch+json", json!(steps));
                let passes = self.objects.get(name).is_none_or(|object| object.value == test);
                let expect = if passes { self.code(name, &[]) } else { 422 };
                self.change(name, expect, request, |object| object.value = value).await?;
            }
            Op::Release => {
                let request = (Method::PATCH, MERGE, json!({"metadata": {"finalizers": null}}));
                self.change(name, self.code(name, &[]), request, |object| object.held = false).await?;
            }
            Op::Delete { version, uid } => {
                let mut preconditions = json!({"resourceVersion": self.metadata(name, version)["resourceVersion"]});
                let known = self.objects.get(name).map_or("gone", |object| object.uid.as_str());
                preconditions["uid"] = match uid {
                    Guess::Nothing => Value::Null,
                    Guess::Right => known.into(),
                    Guess::Wrong => "another".into(),
                };
                let expect = self.code(name, &[version, uid]);
                let request = (Method::DELETE, "application/json", json!({"preconditions": preconditions}));
                if held {
                    self.change(name, expect, request, |object| object.ending = true).await?;
                } else {
                    let (code, answer) = self.request(request.0, name, request.1, request.2).await;
                    prop_assert_eq!(code, expect, "{}", answer);
                    if code == 200 {
                        self.objects.remove(name);
                        self.log.push(("DELETED", name.to_owned(), None));
                    }
                }
            }
            Op::Get => {
                let (code, answer) = self.request(Method::GET, name, "", Value::Null).await;
                prop_assert_eq!(code, self.code(name, &[]));
                if code == 200 {
                    prop_assert_eq!(&Object::of(&answer), &self.objects[name]);
                }
            }
            Op::List(limit) => self.list(limit).await?,
        }
        Ok(())
    }

    async fn list(&self, limit: usize) -> TestCaseResult {
        let (mut found, mut token) = (BTreeMap::new(), String::new());
        loop {
            let page = self.api.get(&format!("{}?limit={limit}&continue={token}", self.maps)).await;
            prop_assert!(version_of(&page) >= self.newest);
            let items = page["items"].as_array().unwrap();
            prop_assert!(items.len() <= limit);
            found.extend(
                items.iter().map(|item| (item["metadata"]["name"].as_str().unwrap().to_owned(), Object::of(item))),
            );
            match page["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                Some(next) => token = next.to_owned(),
                None => break,
            }
        }
        prop_assert_eq!(&found, &self.objects);
        Ok(())
    }

    /// Who watches from the beginning is told each change, in order, once.
    async fn watch(&self, from: u64) -> TestCaseResult {
        let mut watch = self.api.watch(&format!("{}?watch=1&resourceVersion={from}", self.maps)).await;
        let mut last = from;
        for (kind, name, version) in &self.log {
            let event = watch.next().await;
            let object = &event["object"];
            let (kind_told, name_told) = (event["type"].as_str(), object["metadata"]["name"].as_str());
            prop_assert_eq!((kind_told, name_told), (Some(*kind), Some(name.as_str())));
            let told = version_of(object);
            prop_assert!(told > last && version.is_none_or(|version| version == told), "{}", event);
            last = told;
        }
        Ok(())
    }
}

/// Runs so many cases, each in a namespace of its own.
fn agrees(runtime: &Runtime, api: &Api, cases: u32) {
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let number = Cell::new(0);
    let ops = proptest::collection::vec((0..3u8, op()), 1..60);
    let result = TestRunner::new(config).run(&ops, |ops| {
        number.set(number.get() + 1);
        runtime.block_on(Box::pin(async {
            let namespace = format!("case-{}", number.get());
            let made = api.create("/api/v1/namespaces", json!({"metadata": {"name": namespace}})).await;
            let from = version_of(&made);
            let maps = format!("/api/v1/namespaces/{namespace}/configmaps");
            let mut case = Case { api, maps, objects: BTreeMap::new(), newest: from, log: Vec::new() };
            for (name, op) in ops {
                case.step(["a", "b", "c"][usize::from(name)], op).await?;
            }
            case.list(100).await?;
            case.watch(from).await
        }))
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn the_embedded_store_agrees_with_a_model() {
    let runtime = Runtime::new().unwrap();
    let api = runtime.block_on(Api::new());
    agrees(&runtime, &api, 48);
}

#[test]
fn etcd_agrees_with_a_model() {
    let runtime = Runtime::new().unwrap();
    let (etcd, api) = runtime.block_on(async {
        let etcd = EtcdCluster::start(1, false).await;
        let store = etcd.connect(Some(0)).await;
        (etcd, Api::on(Arc::new(store), |config| config.shared_store = true).await)
    });
    agrees(&runtime, &api, 12);
    drop(etcd);
}
