//! A controller as it runs, on an API server in memory, by seed: its caches lag behind, each by itself; requests fail before or
//! after they have been carried out; the process dies between any two of its writes and starts again; meanwhile pods start and
//! end and time goes on. Whatever happened, things have to be right when it is left alone.
//!
//! What runs is the controller itself, with its handlers, queue and writes, and not only its plan. Only the watches are
//! replaced: what they report is handed to the caches when the simulation says so.

mod nodes;
mod requests;
mod world;

use std::{collections::BTreeMap, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use jiff::SignedDuration;
use kube::runtime::watcher::Event;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use world::Change;
pub(crate) use world::{Fate, World};

use crate::{
    Config,
    context::{Caches, Context},
    runtime::{Controller, Informer, Object, Queue, Recorder},
};

/// Makes a controller.
pub(crate) type Start = fn(Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>);

/// What a watch reports.
enum News<'a> {
    All(Vec<Value>),
    One(&'a Change),
}

type Feed = fn(&Caches, News<'_>);

/// The caches that are fed, by the resource that they are of.
const WATCHED: &[(&str, Feed)] = &[
    ("pods", |caches, news| feed(&caches.pods, news)),
    ("nodes", |caches, news| feed(&caches.nodes, news)),
    ("services", |caches, news| feed(&caches.services, news)),
    ("endpoints", |caches, news| feed(&caches.endpoints, news)),
    ("endpointslices", |caches, news| feed(&caches.endpoint_slices, news)),
    ("replicasets", |caches, news| feed(&caches.replica_sets, news)),
    ("replicationcontrollers", |caches, news| feed(&caches.replication_controllers, news)),
    ("statefulsets", |caches, news| feed(&caches.stateful_sets, news)),
    ("daemonsets", |caches, news| feed(&caches.daemon_sets, news)),
    ("controllerrevisions", |caches, news| feed(&caches.revisions, news)),
    ("jobs", |caches, news| feed(&caches.jobs, news)),
    ("cronjobs", |caches, news| feed(&caches.cron_jobs, news)),
    ("horizontalpodautoscalers", |caches, news| feed(&caches.autoscalers, news)),
    ("persistentvolumeclaims", |caches, news| feed(&caches.claims, news)),
    ("secrets", |caches, news| feed(&caches.legacy_tokens, news)),
];

fn feed<K: Object>(cache: &Informer<K>, news: News<'_>) {
    let read = |object: Value| -> K { serde_json::from_value(object).unwrap() };
    match news {
        News::All(objects) => {
            let mut listed = objects.into_iter().map(read).collect();
            cache.handle(Event::InitDone, &mut listed);
        }
        News::One(change) if change.gone => cache.handle(Event::Delete(read(change.object.clone())), &mut Vec::new()),
        News::One(change) => cache.handle(Event::Apply(read(change.object.clone())), &mut Vec::new()),
    }
}

/// The process with the controller in it: all that a crash takes away.
struct Process {
    context: Arc<Context>,
    controller: Arc<dyn Controller>,
    queue: Arc<Queue>,
    /// How far into the world's changes each cache has been fed.
    fed: BTreeMap<&'static str, usize>,
}

/// A controller and its world.
pub(crate) struct Simulation {
    pub world: Arc<Mutex<World>>,
    pub rng: StdRng,
    start: Start,
    process: Process,
}

impl Process {
    fn new(world: &Arc<Mutex<World>>, start: Start) -> Process {
        let client = requests::client(world.clone());
        // Events are not written: nobody's decision depends on them.
        let (recorder, _) = Recorder::new(client.clone(), "simulation", CancellationToken::new());
        let clock = world.clone();
        let context = Arc::new(Context {
            client,
            config: Config::default(),
            recorder,
            caches: Caches::default(),
            clock: Arc::new(move || clock.lock().now),
        });
        let (controller, queue) = start(context.clone());
        let world = world.lock();
        for (resource, feed) in WATCHED {
            feed(&context.caches, News::All(world.all(resource)));
        }
        let fed = WATCHED.iter().map(|(resource, _)| (*resource, world.log.len())).collect();
        Process { context, controller, queue, fed }
    }

    /// Feeds at most so many changes of a resource to its cache.
    fn deliver(&mut self, world: &World, resource: &'static str, feed: Feed, most: usize) {
        let fed = self.fed.get_mut(resource).unwrap();
        let mut left = most;
        while left > 0 && *fed < world.log.len() {
            let change = &world.log[*fed];
            *fed += 1;
            if change.resource == resource {
                feed(&self.context.caches, News::One(change));
                left -= 1;
            }
        }
    }
}

impl Simulation {
    pub fn new(seed: u64, start: Start) -> Simulation {
        let world = Arc::new(Mutex::new(World::new()));
        let process = Process::new(&world, start);
        Simulation { world, rng: StdRng::seed_from_u64(seed), start, process }
    }

    /// Writes an object as a user does.
    pub fn create(&self, object: Value) {
        self.world.lock().put_new(object);
    }

    fn restart(&mut self) {
        self.process = Process::new(&self.world, self.start);
    }

    /// Lets time go by.
    pub async fn pass_time(&mut self, seconds: u64) {
        let span = SignedDuration::from_secs(seconds as i64);
        {
            let mut world = self.world.lock();
            world.now = world.now.checked_add(span).unwrap();
        }
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    /// One pass over one key, if one waits. Whether there was one.
    async fn pass(&mut self, fate: Fate) -> bool {
        let Some(key) = self.process.queue.next().now_or_never() else { return false };
        self.world.lock().fate = fate;
        let queue = self.process.queue.clone();
        match self.process.controller.reconcile(&key).await {
            Ok(again) => {
                queue.forget(&key);
                if let Some(delay) = again {
                    queue.add_after(key.clone(), delay);
                }
            }
            Err(_) => drop(queue.retry(key.clone())),
        }
        queue.done(&key);
        let crashed = {
            let mut world = self.world.lock();
            world.fate = Fate::Well;
            std::mem::take(&mut world.crashed)
        };
        if crashed {
            self.restart();
        }
        true
    }

    fn deliver_all(&mut self) {
        let world = self.world.lock();
        for (resource, feed) in WATCHED {
            self.process.deliver(&world, resource, *feed, usize::MAX);
        }
    }

    /// So many random steps. `chance` is what else may happen in the world; `check` holds after each.
    pub async fn random(
        &mut self,
        steps: usize,
        mut chance: impl FnMut(&mut World, &mut StdRng),
        check: impl Fn(&World),
    ) {
        for _ in 0..steps {
            match self.rng.random_range(0..100) {
                0..35 => {
                    let (resource, feed) = WATCHED.choose(&mut self.rng).unwrap();
                    let most = self.rng.random_range(1..6);
                    let world = self.world.clone();
                    self.process.deliver(&world.lock(), resource, *feed, most);
                }
                35..65 => {
                    let fate = Fate::random(&mut self.rng);
                    self.pass(fate).await;
                }
                65..90 => {
                    let world = self.world.clone();
                    let mut world = world.lock();
                    match self.rng.random_range(0..4) {
                        0 => world.collect_garbage(),
                        1 => chance(&mut world, &mut self.rng),
                        _ => world.some_pod_goes_on(&mut self.rng),
                    }
                }
                90..97 => {
                    let seconds = self.rng.random_range(1..30);
                    self.pass_time(seconds).await;
                }
                _ => self.restart(),
            }
            check(&self.world.lock());
        }
    }

    /// Lets everything go well until `done` holds and the controller does not write any more. `goes_on` is what happens in the
    /// world beside.
    pub async fn settle(&mut self, mut goes_on: impl FnMut(&mut World, &mut StdRng), done: impl Fn(&World) -> bool) {
        for _ in 0..400 {
            let before = self.world.lock().log.len();
            for _ in 0..200 {
                self.deliver_all();
                if !self.pass(Fate::Well).await {
                    break;
                }
            }
            let quiet = self.world.lock().log.len() == before;
            if quiet && done(&self.world.lock()) {
                return;
            }
            {
                let world = self.world.clone();
                let mut world = world.lock();
                world.all_pods_go_on(&mut self.rng);
                world.collect_garbage();
                goes_on(&mut world, &mut self.rng);
            }
            self.pass_time(10).await;
        }
        panic!("it does not come to rest:\n{}", self.world.lock().describe());
    }
}

/// Runs a test with many seeds, or with the one in `SEED`. The seed of a failure is told.
pub(crate) fn by_seed(count: u64, test: impl AsyncFn(u64)) {
    let chosen = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = chosen.map_or(0..count, |seed| seed..seed + 1);
    for seed in seeds {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let run = AssertUnwindSafe(|| runtime.block_on(test(seed)));
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("it was SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
