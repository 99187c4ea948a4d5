//! API priority and fairness: a noisy client waits for itself, and neither nodes nor leaders wait for it
//! (<https://kubernetes.io/docs/concepts/cluster-administration/flow-control/>, KEP-1040).
//!
//! [`plan`] says where a request belongs, [`queues`] who goes on; here they are put together, with the clock.

pub mod bootstrap;
pub mod plan;
pub mod queues;

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{self, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Response};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use k8s_openapi::api::flowcontrol::v1::FlowSchema;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{sync::oneshot, time::Instant};

use self::{
    plan::Plan,
    queues::{Arrival, Queues},
};
use crate::{
    Inflight, Server,
    auth::{UserInfo, authorize::Attributes},
    cache::{Objects, Snapshot},
    encode::{Body, BodyError},
    error::{ApiError, Result},
    registry::{Registry, ResourceId},
    request::{Query, ResourcePath, is_stream},
};

/// The group of levels and schemas.
pub const GROUP: &str = "flowcontrol.apiserver.k8s.io";
/// How long a request waits for its turn, at most: a quarter of what it may take altogether, as upstream.
const WAIT: Duration = Duration::from_secs(15);
/// How many objects of a list make one seat, and the most seats of a request: upstream's figures.
const OBJECTS_A_SEAT: usize = 100;
const MOST_SEATS: u32 = 10;

/// Where requests wait.
pub struct Flow {
    inflight: Inflight,
    ids: OnceLock<Option<[ResourceId; 2]>>,
    known: Mutex<Known>,
    state: Mutex<State>,
    next: AtomicU64,
    /// What became of requests, by level and schema.
    counts: Mutex<HashMap<(String, String), Counts>>,
}

#[derive(Default)]
struct Known {
    maps: Vec<Objects>,
    plan: Arc<Plan>,
}

#[derive(Default)]
struct State {
    queues: Queues,
    waiting: HashMap<u64, oneshot::Sender<()>>,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    dispatched: u64,
    full: u64,
    busy: u64,
    late: u64,
    waited: Duration,
}

/// A request's place among those that are carried out; given back when it is dropped.
pub struct Seat {
    flow: Arc<Flow>,
    level: usize,
    queue: usize,
    seats: u32,
    id: u64,
    /// Since when it is carried out; `None` while it waits.
    since: Option<Instant>,
    uids: [String; 2],
}

impl Flow {
    /// With so many seats.
    pub fn new(inflight: Inflight) -> Arc<Flow> {
        Arc::new(Flow {
            inflight,
            ids: OnceLock::new(),
            known: Mutex::default(),
            state: Mutex::default(),
            next: AtomicU64::new(0),
            counts: Mutex::default(),
        })
    }

    /// What is configured in a snapshot; it is only made anew when something has changed.
    fn plan(&self, registry: &Registry, snapshot: &Snapshot) -> Arc<Plan> {
        let ids = self.ids.get_or_init(|| {
            let id = |plural| registry.by_name(GROUP, plural).map(|(id, _)| id);
            Some([id("flowschemas")?, id("prioritylevelconfigurations")?])
        });
        let mut known = self.known.lock();
        let Some(ids) = ids else { return known.plan.clone() };
        let is_same = |(map, id): (&Objects, &ResourceId)| map.ptr_eq(snapshot.of(*id));
        if known.maps.len() == ids.len() && known.maps.iter().zip(ids).all(is_same) {
            return known.plan.clone();
        }
        let [schemas, levels] = ids.map(|id| snapshot.of(id).clone());
        let plan = Arc::new(match self.inflight.fair {
            true => Plan::of(&read::<FlowSchema>(&schemas), &read(&levels), &known.plan),
            false => Plan::of(&[], &[], &known.plan),
        });
        known.maps = vec![schemas, levels];
        known.plan = plan.clone();
        let total = self.inflight.most;
        let mut state = self.state.lock();
        for id in state.queues.set(plan.limits(total), total) {
            state.let_through(id);
        }
        state.go_on();
        plan
    }

    /// Waits for the turn of a request of so many seats.
    async fn admit(self: &Arc<Self>, plan: &Plan, user: &UserInfo, what: &Attributes<'_>, seats: u32) -> Result<Seat> {
        let Some((schema, number)) = plan.find(user, what) else {
            return Err(ApiError::internal("priority and fairness", "there is no catch-all"));
        };
        let level = &plan.levels[schema.level];
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut seat = Seat {
            flow: self.clone(),
            level: schema.level,
            queue: 0,
            seats: 0,
            id,
            since: None,
            uids: [schema.uid.clone(), level.uid.clone()],
        };
        if level.exempt {
            return Ok(seat);
        }
        let count = |add: &dyn Fn(&mut Counts)| {
            add(self.counts.lock().entry((level.name.clone(), schema.name.clone())).or_default());
        };
        let started = Instant::now();
        let turn = {
            let mut state = self.state.lock();
            let seats = seats.min(state.queues.widest(schema.level));
            match state.queues.arrive(schema.level, id, number, seats) {
                Arrival::Runs(queue) => {
                    (seat.queue, seat.seats, seat.since) = (queue, seats, Some(started));
                    None
                }
                Arrival::Waits(queue) => {
                    (seat.queue, seat.seats) = (queue, seats);
                    let (sender, receiver) = oneshot::channel();
                    state.waiting.insert(id, sender);
                    Some(receiver)
                }
                Arrival::Full => {
                    count(&|c| c.full += 1);
                    return Err(too_many());
                }
                Arrival::Busy => {
                    count(&|c| c.busy += 1);
                    return Err(too_many());
                }
            }
        };
        if let Some(turn) = turn {
            // Whoever gives up while it is told to go on has been told: dropping the seat knows which of them it is.
            match tokio::time::timeout(WAIT, turn).await {
                Ok(_) => seat.since = Some(Instant::now()),
                Err(_) => {
                    count(&|c| c.late += 1);
                    return Err(too_many());
                }
            }
        }
        count(&|c| {
            c.dispatched += 1;
            c.waited += started.elapsed();
        });
        Ok(seat)
    }

    /// Figures by upstream's names, as Prometheus reads them.
    pub fn metrics(&self) -> String {
        use std::fmt::Write as _;
        if self.inflight.most == 0 {
            return String::new();
        }
        let mut text = String::new();
        let plan = self.known.lock().plan.clone();
        let counts: Vec<((String, String), Counts)> =
            self.counts.lock().iter().map(|(key, counts)| (key.clone(), *counts)).collect();
        let mut family = |name: &str, kind: &str, help: &str, lines: Vec<(String, f64)>| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in lines {
                let _ = writeln!(text, "{name}{{{labels}}} {value}");
            }
        };
        let of = |(level, schema): &(String, String)| format!("priority_level=\"{level}\",flow_schema=\"{schema}\"");
        #[allow(clippy::cast_precision_loss, reason = "counts of requests")]
        let number = |n: u64| n as f64;
        family(
            "apiserver_flowcontrol_dispatched_requests_total",
            "counter",
            "Requests that were carried out.",
            counts.iter().map(|(key, c)| (of(key), number(c.dispatched))).collect(),
        );
        let rejected = counts.iter().flat_map(|(key, c)| {
            [("queue-full", c.full), ("concurrency-limit", c.busy), ("time-out", c.late)]
                .map(|(why, n)| (format!("{},reason=\"{why}\"", of(key)), number(n)))
        });
        family(
            "apiserver_flowcontrol_rejected_requests_total",
            "counter",
            "Requests that were refused.",
            rejected.filter(|(_, n)| *n > 0.0).collect(),
        );
        family(
            "apiserver_flowcontrol_request_wait_seconds_total",
            "counter",
            "How long requests that were carried out had waited, in seconds.",
            counts.iter().map(|(key, c)| (of(key), c.waited.as_secs_f64())).collect(),
        );
        let state = self.state.lock();
        let limits = plan.limits(self.inflight.most);
        let limited = || plan.levels.iter().enumerate().filter(|(_, level)| !level.exempt);
        let label = |name: &str| format!("priority_level=\"{name}\"");
        family(
            "apiserver_flowcontrol_nominal_limit_seats",
            "gauge",
            "Seats of a level's own.",
            limited().map(|(at, level)| (label(&level.name), f64::from(limits[at].nominal))).collect(),
        );
        family(
            "apiserver_flowcontrol_current_executing_seats",
            "gauge",
            "Seats in use.",
            limited().map(|(at, level)| (label(&level.name), f64::from(state.queues.load(at).0))).collect(),
        );
        family(
            "apiserver_flowcontrol_current_inqueue_requests",
            "gauge",
            "Requests that wait.",
            limited().map(|(at, level)| (label(&level.name), number(state.queues.load(at).1 as u64))).collect(),
        );
        text
    }
}

fn read<T: DeserializeOwned>(objects: &Objects) -> Vec<T> {
    // What cannot be read was written before it was validated, and limits nobody.
    objects.values().filter_map(|object| serde_json::from_slice(&object.bytes).ok()).collect()
}

fn too_many() -> ApiError {
    let mut error = ApiError::too_many_requests("too many requests, please try again later", Value::Null);
    error.details = json!({});
    error.retry_after = Some(1);
    error
}

impl State {
    fn let_through(&mut self, id: u64) {
        if let Some(turn) = self.waiting.remove(&id) {
            // Who has given up gives the seat back when it is dropped.
            let _ = turn.send(());
        }
    }

    fn go_on(&mut self) {
        while let Some(id) = self.queues.next() {
            self.let_through(id);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.seats == 0 {
            return;
        }
        let mut state = self.flow.state.lock();
        let waits = self.since.is_none() && state.waiting.remove(&self.id).is_some();
        if waits {
            state.queues.abandon(self.level, self.queue, self.id);
        } else {
            let took = self.since.map_or(Duration::ZERO, |since| since.elapsed());
            state.queues.finish(self.level, self.queue, self.seats, took.as_secs_f64());
        }
        state.go_on();
    }
}

impl Seat {
    /// Names the schema and the level in an answer, and keeps the seat until a body that is made while it is sent has
    /// ended; nothing is kept for one that is there as a whole, or that has no end.
    pub fn leave(self, mut response: Response<Body>, endless: bool) -> Response<Body> {
        for (name, uid) in
            ["x-kubernetes-pf-flowschema-uid", "x-kubernetes-pf-prioritylevel-uid"].iter().zip(&self.uids)
        {
            if let Ok(value) = HeaderValue::from_str(uid) {
                response.headers_mut().insert(*name, value);
            }
        }
        use http_body::Body as _;
        if self.seats == 0 || endless || response.body().size_hint().exact().is_some() {
            return response;
        }
        response.map(|body| Seated { body, _seat: self }.boxed_unsync())
    }
}

struct Seated {
    body: Body,
    _seat: Seat,
}

impl http_body::Body for Seated {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Server {
    /// Waits until a request may be carried out. `None` if nothing is limited, or not this: streams to and from pods go on
    /// for as long as people want.
    pub(crate) async fn seat(
        &self,
        user: &UserInfo,
        what: &Attributes<'_>,
        target: Option<(&ResourcePath, &Query)>,
    ) -> Result<Option<Seat>> {
        if self.flow.inflight.most == 0 || is_stream(what.subresource) {
            return Ok(None);
        }
        let snapshot = self.cache.snapshot();
        let plan = self.flow.plan(&self.registry, &snapshot);
        let seats =
            target.filter(|_| what.verb == "list").map_or(1, |(path, query)| self.seats_of(&snapshot, path, query));
        drop(snapshot);
        self.flow.admit(&plan, user, what, seats).await.map(Some)
    }

    /// How many seats a list takes: the more objects it goes through, the more.
    fn seats_of(&self, snapshot: &Snapshot, path: &ResourcePath, query: &Query) -> u32 {
        let Some(served) = self.registry.find(&path.group, &path.version, &path.resource) else { return 1 };
        let count = snapshot.of(served.id).len();
        let selects = query.text("labelSelector").is_some() || query.text("fieldSelector").is_some();
        let limit = query.number::<usize>("limit").ok().flatten().filter(|limit| *limit > 0 && !selects);
        let objects = limit.map_or(count, |limit| limit.min(count));
        u32::try_from(objects.div_ceil(OBJECTS_A_SEAT)).unwrap_or(MOST_SEATS).clamp(1, MOST_SEATS)
    }
}
