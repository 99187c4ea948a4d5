use arc_swap::ArcSwap;
use futures::FutureExt;
use imbl::OrdMap;
use seawall_store::{Entry, Event};
use serde_json::json;
use tokio::sync::watch;

use super::*;
use crate::{
    cache::Snapshot,
    registry::{Registry, ResourceId},
};

/// A cache to which nobody but the test writes.
struct Pods {
    cache: Arc<Cache>,
    id: ResourceId,
    revision: u64,
}

const A: &str = "/registry/pods/a/";

impl Pods {
    fn new() -> Pods {
        let registry = Arc::new(Registry::new().unwrap());
        let (id, _) = registry.by_name("", "pods").unwrap();
        let maps = (0..registry.len()).map(|_| OrdMap::new()).collect();
        let cache = Arc::new(Cache {
            definitions: None,
            snapshot: ArcSwap::from_pointee(Snapshot::new(&registry, Revision(1), maps)),
            logs: ArcSwap::from_pointee((0..registry.len()).map(|_| Arc::new(Log::new(Revision(1)))).collect()),
            strays: Mutex::default(),
            revision: watch::Sender::new(Revision(1)),
            registry,
        });
        Pods { cache, id, revision: 1 }
    }

    fn put(&mut self, pod: &str, node: &str) {
        self.revision += 1;
        let (namespace, name) = pod.split_once('/').unwrap();
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": {"nodeName": node}});
        let revision = Revision(self.revision);
        let value = crate::object::encode(&object);
        let entry = Entry { key: format!("/registry/pods/{pod}").into(), value, revision, created: revision };
        self.cache.apply(vec![Event::Put(entry)], revision);
    }

    fn follow(&self, interest: Interest) -> Subscription {
        self.cache.subscribe(self.id, Revision(self.revision), interest)
    }

    fn key(&self, key: &str) -> Subscription {
        self.follow(Interest::Key(format!("/registry/pods/{key}")))
    }

    fn topics(&self) -> usize {
        self.cache.log_of(self.id).topics.lock().all().count()
    }
}

/// What those see who look only when they are woken; `None` if they have to list again.
fn seen(subscription: &mut Subscription) -> Option<Vec<String>> {
    let mut names = Vec::new();
    while subscription.changed().now_or_never().is_some() {
        loop {
            let changes = subscription.take(256).ok()?;
            if changes.is_empty() {
                break;
            }
            let keys = changes.iter().map(|change| change.new.as_ref().unwrap().key.clone());
            names.extend(keys.filter_map(|key| Some(key.strip_prefix("/registry/pods/")?.to_owned())));
        }
    }
    Some(names)
}

#[test]
fn a_change_wakes_those_whom_it_may_concern() {
    let mut pods = Pods::new();
    pods.put("a/x", "one");
    let mut all = [
        ("everything", pods.follow(Interest::Everything)),
        ("a", pods.follow(Interest::Key(A.to_owned()))),
        ("b", pods.key("b/")),
        ("a/x", pods.key("a/x")),
        ("a/xy", pods.key("a/xy")),
        ("b/x", pods.key("b/x")),
        ("one", pods.follow(Interest::Node("one".to_owned()))),
        ("two", pods.follow(Interest::Node("two".to_owned()))),
    ];
    let mut check = |pod: &str, node: &str, expect: &[&str]| {
        pods.put(pod, node);
        let woken: Vec<&str> = all
            .iter_mut()
            .filter_map(|(name, subscription)| {
                let seen = seen(subscription).unwrap();
                assert!(seen.is_empty() || seen.last().unwrap() == pod, "{name} saw {seen:?}");
                (!seen.is_empty()).then_some(*name)
            })
            .collect();
        assert_eq!(woken, expect, "{pod} on {node}");
    };
    check("a/x", "one", &["everything", "a", "a/x", "one"]);
    // Whoever loses it hears of it as well.
    check("a/x", "two", &["everything", "a", "a/x", "one", "two"]);
    check("b/x", "", &["everything", "b", "b/x"]);
    check("c/x", "two", &["everything", "two"]);
    check("a/xy", "three", &["everything", "a", "a/xy"]);
}

#[test]
fn what_others_do_makes_nobody_list_again() {
    let mut pods = Pods::new();
    pods.put("a/x", "one");
    pods.put("b/x", "two");
    let (mut quiet, mut node) = (pods.key("a/x"), pods.follow(Interest::Node("one".to_owned())));
    let (mut busy, mut everything) = (pods.key("b/x"), pods.follow(Interest::Everything));
    for _ in 0..LOG_EVENTS + 10 {
        pods.put("b/x", "two");
    }
    pods.put("a/x", "one");
    assert_eq!(seen(&mut quiet).unwrap().iter().filter(|key| *key == "a/x").count(), 1);
    assert_eq!(seen(&mut node).unwrap().iter().filter(|key| *key == "a/x").count(), 1);
    assert_eq!(seen(&mut busy), None);
    assert_eq!(seen(&mut everything), None);
    // Of what concerned it nothing may be missing.
    let mut late = pods.key("a/x");
    pods.put("a/x", "one");
    for _ in 0..LOG_EVENTS {
        pods.put("b/x", "two");
    }
    assert_eq!(seen(&mut late), None);
}

#[tokio::test(start_paused = true)]
async fn what_is_old_is_lost_but_for_a_few() {
    let mut pods = Pods::new();
    let mut before = pods.follow(Interest::Everything);
    for _ in 0..FEW + 50 {
        pods.put("a/x", "one");
    }
    let mut late = pods.follow(Interest::Everything);
    let kept = |pods: &Pods| pods.cache.log_of(pods.id).changes.read().ring.len();
    tokio::time::advance(FRESH).await;
    pods.cache.lose_old();
    assert_eq!(kept(&pods), FEW + 50);
    tokio::time::advance(Duration::from_secs(1)).await;
    pods.put("b/x", "two");
    pods.cache.lose_old();
    assert_eq!(kept(&pods), FEW);
    assert_eq!(seen(&mut late).unwrap(), ["b/x"]);
    assert_eq!(seen(&mut before), None);
    // A new one that begins where the log does.
    let oldest = pods.cache.oldest(pods.id);
    let mut again = pods.cache.subscribe(pods.id, oldest, Interest::Key(A.to_owned()));
    assert_eq!(again.take(1000).unwrap().len(), FEW);
}

#[test]
fn what_nobody_follows_any_more_is_forgotten() {
    let mut pods = Pods::new();
    let (first, second) = (pods.key("a/x"), pods.key("a/x"));
    let other = pods.follow(Interest::Node("one".to_owned()));
    assert_eq!(pods.topics(), 2);
    drop(first);
    assert_eq!(pods.topics(), 2);
    pods.put("a/x", "one");
    drop((second, other));
    assert_eq!(pods.topics(), 0);
    drop(pods.follow(Interest::Everything));
    pods.put("a/x", "one");
}
