//! The audit log: who asked for what, when, and what came of it
//! (<https://kubernetes.io/docs/tasks/debug/debug-cluster/audit/>).
//!
//! A request that the policy wants written down has a [`Trail`] from its authentication to the end of its answer. The last
//! event is written when the last holder lets go of the trail: the pipeline, the answer's body, and whoever passes on a
//! connection. So nothing ends without it, whatever the way.

mod event;
pub mod log;
pub mod policy;
mod queue;
mod tap;
pub mod webhook;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header, request::Parts};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    Context, Server,
    auth::{UserInfo, authorize},
    encode::Body,
    error::ApiError,
    outside::kubeconfig::Target,
    request::{Query, ResourcePath, verb},
    write::yaml,
};
use event::{Event, ObjectRef};
use policy::{Asked, Decision, Level, Policy, Stage};
use queue::Queue;

/// The header that names a request, in the log and to whoever sent it.
pub(crate) const ID: HeaderName = HeaderName::from_static("audit-id");
/// How long the end of the process waits for what is still to be written.
const FLUSH: Duration = Duration::from_secs(5);

/// The address that a request came from, which whoever took the connection puts into its extensions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub IpAddr);

/// Writes down what the policy wants.
pub struct Auditor {
    policy: Policy,
    queues: Vec<Queue>,
    /// Events, by level.
    events: [AtomicU64; Level::ALL.len()],
}

impl Auditor {
    /// With this policy, and nowhere to write yet.
    pub fn new(policy: Policy) -> Auditor {
        Auditor { policy, queues: Vec::new(), events: Default::default() }
    }

    /// Writes into a file as well.
    ///
    /// # Errors
    /// If it cannot be written to.
    pub fn with_log(mut self, options: &log::Options) -> std::io::Result<Auditor> {
        self.queues.push(log::open(options)?);
        Ok(self)
    }

    /// Sends to a webhook as well.
    ///
    /// # Errors
    /// If the credentials cannot be used.
    pub fn with_webhook(mut self, target: &Target, options: webhook::Options) -> Result<Auditor, String> {
        self.queues.push(webhook::open(target, options)?);
        Ok(self)
    }

    /// Waits until what happened up to now has been written, but not for long.
    pub async fn flush(&self) {
        let all = futures::future::join_all(self.queues.iter().map(Queue::flush));
        if tokio::time::timeout(FLUSH, all).await.is_err() {
            tracing::warn!("the audit log was not written to its end within {} s", FLUSH.as_secs());
        }
    }

    fn put(&self, level: Level, event: &Event<'_>) {
        self.events[level as usize].fetch_add(1, Ordering::Relaxed);
        if let Some(line) = log::line(event) {
            self.queues.iter().for_each(|queue| queue.put(line.clone()));
        }
    }

    /// What is counted, as Prometheus reads it, by upstream's names.
    pub(crate) fn metrics(&self) -> String {
        use std::fmt::Write;
        let count = |level: Level| self.events[level as usize].load(Ordering::Relaxed);
        let mut text = String::from("# HELP apiserver_audit_event_total Audit events that were made.\n");
        text.push_str("# TYPE apiserver_audit_event_total counter\n");
        let _ = writeln!(text, "apiserver_audit_event_total {}", Level::ALL.into_iter().map(count).sum::<u64>());
        text.push_str("# HELP apiserver_audit_level_total Audit events by level.\n");
        text.push_str("# TYPE apiserver_audit_level_total counter\n");
        for level in &Level::ALL[1..] {
            let _ = writeln!(text, "apiserver_audit_level_total{{level={:?}}} {}", level.name(), count(*level));
        }
        text.push_str("# HELP apiserver_audit_error_total Audit events that were lost.\n");
        text.push_str("# TYPE apiserver_audit_error_total counter\n");
        for queue in &self.queues {
            let _ = writeln!(text, "apiserver_audit_error_total{{plugin={:?}}} {}", queue.plugin, queue.lost());
        }
        text
    }
}

/// When a request came.
#[derive(Clone, Copy)]
struct Received(Timestamp);

/// Gives a request its name: the one that it brings, or a new one. The answer bears it as well.
pub(crate) fn begin(parts: &mut Parts) -> HeaderValue {
    parts.extensions.insert(Received(Timestamp::now()));
    if let Some(own) = parts.headers.get(&ID).filter(|id| !id.is_empty() && id.to_str().is_ok()) {
        return own.clone();
    }
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text = uuid::Uuid::new_v4().as_hyphenated().encode_lower(&mut text);
    let id = HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""));
    parts.headers.insert(ID, id.clone());
    id
}

/// Adds to the trail of a request, if it has one.
pub(crate) fn note(trail: Option<&Arc<Trail>>, add: impl FnOnce(&Trail)) {
    if let Some(trail) = trail {
        add(trail);
    }
}

/// Puts an answer before its trail's end, if there is one.
pub(crate) fn answered(
    trail: Option<Arc<Trail>>,
    response: Response<Body>,
    failure: Option<&ApiError>,
) -> Response<Body> {
    match trail {
        Some(trail) => trail.answered(response, failure),
        None => response,
    }
}

/// What is known of one request, up to its end.
pub(crate) struct Trail {
    auditor: Arc<Auditor>,
    decision: Decision,
    id: String,
    uri: String,
    verb: String,
    user: UserInfo,
    source_ips: Vec<String>,
    user_agent: String,
    received: Timestamp,
    long_running: bool,
    /// How somebody tried to say who they are, in vain: then there is one event, and no more.
    refused: Option<String>,
    known: Mutex<Known>,
}

/// What comes to be known on the way.
#[derive(Default)]
struct Known {
    impersonated: Option<UserInfo>,
    object: Option<ObjectRef>,
    request: Option<Value>,
    response: Option<Value>,
    status: Option<Value>,
    annotations: BTreeMap<String, String>,
}

impl Server {
    /// Begins the trail of a request, if the policy wants one. Without a user, it is one whose sender could not say who
    /// they are: then there is one event, and no more.
    pub(crate) fn audit(&self, parts: &mut Parts, user: Option<&UserInfo>) -> Option<Arc<Trail>> {
        let received = parts.extensions.get::<Received>().map_or_else(Timestamp::now, |received| received.0);
        let auditor = self.config.access.audit.as_ref()?;
        let target = ResourcePath::parse(parts.uri.path());
        let query = Query::parse(parts.uri.query());
        let verb = match &target {
            Some(target) => verb(&parts.method, target, &query).to_owned(),
            None => parts.method.as_str().to_lowercase(),
        };
        let object = target.as_ref().map(|target| object_of(target, &verb, &query));
        let about = object.clone().unwrap_or_default();
        let asked = Asked {
            user,
            verb: &verb,
            path: target.is_none().then(|| parts.uri.path()),
            group: &about.api_group,
            resource: &about.resource,
            subresource: &about.subresource,
            namespace: &about.namespace,
            name: &about.name,
        };
        let decision = auditor.policy.decide(&asked)?.clone();
        let text = |name: &HeaderName| parts.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let long_running =
            verb == "watch" || matches!(&*about.subresource, "attach" | "exec" | "proxy" | "log" | "portforward");
        let trail = Trail {
            auditor: auditor.clone(),
            decision,
            id: text(&ID).to_owned(),
            uri: parts.uri.path_and_query().map_or("", |uri| uri.as_str()).to_owned(),
            user: user.cloned().unwrap_or_default(),
            source_ips: source_ips(parts),
            user_agent: text(&header::USER_AGENT).to_owned(),
            received,
            long_running,
            verb,
            refused: user.is_none().then(|| attempted(&parts.headers)),
            known: Mutex::new(Known { object, ..Default::default() }),
        };
        if user.is_some() {
            trail.write(Stage::RequestReceived, &trail.known.lock(), received);
        }
        let trail = Arc::new(trail);
        parts.extensions.insert(trail.clone());
        Some(trail)
    }

    /// Waits until the audit log is written.
    pub async fn flush_audit(&self) {
        if let Some(audit) = &self.config.access.audit {
            audit.flush().await;
        }
    }
}

/// What a request is about, as upstream sees it: a namespace is in itself.
fn object_of(target: &ResourcePath, verb: &str, query: &Query) -> ObjectRef {
    let fields = authorize::field_selector(verb, query);
    let name = authorize::Attributes::of(verb, target, &fields).name.to_owned();
    let itself = target.resource == "namespaces" && target.group.is_empty();
    let namespace = target.namespace.clone().or_else(|| target.name.clone().filter(|_| itself));
    ObjectRef {
        resource: target.resource.clone(),
        namespace: namespace.unwrap_or_default(),
        name,
        api_group: target.group.clone(),
        api_version: target.version.clone(),
        subresource: target.subresource.clone().unwrap_or_default(),
        ..Default::default()
    }
}

/// Where a request comes from: what proxies say on the way, and last the connection, which alone is certain. What asks from
/// within this process comes from the loopback.
fn source_ips(parts: &Parts) -> Vec<String> {
    let header = |name: &str| parts.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let mut found: Vec<IpAddr> =
        header("x-forwarded-for").split(',').filter_map(|part| part.trim().parse().ok()).take(16).collect();
    let real = header("x-real-ip").trim().parse::<IpAddr>().ok();
    if let Some(real) = real.filter(|real| !found.contains(real)) {
        found.push(real);
    }
    let peer = parts.extensions.get::<Peer>().map_or(IpAddr::from([127, 0, 0, 1]), |peer| peer.0.to_canonical());
    if found.last() != Some(&peer) {
        found.push(peer);
    }
    found.iter().map(ToString::to_string).collect()
}

/// By what somebody tried to say who they are.
fn attempted(headers: &HeaderMap) -> String {
    let scheme = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(|v| v.split_once(' '));
    match scheme.map(|(scheme, _)| scheme.to_ascii_lowercase()).as_deref() {
        Some(scheme @ ("bearer" | "basic")) => format!("Authentication failed, attempted: {scheme}"),
        _ => "Authentication failed, no credentials provided".to_owned(),
    }
}

/// What of an object says which one it is.
#[derive(Default, Deserialize)]
struct Named {
    #[serde(default)]
    metadata: NamedMeta,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NamedMeta {
    name: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
}

impl Trail {
    /// It is taken for a request of somebody else.
    pub fn impersonated(&self, user: &UserInfo) {
        if *user != self.user {
            self.known.lock().impersonated = Some(user.clone());
        }
    }

    /// Whether it was allowed, and why.
    pub fn decided(&self, decision: &Result<String, String>) {
        let (said, reason) = match decision {
            Ok(reason) => ("allow", reason),
            Err(reason) => ("forbid", reason),
        };
        self.annotate("authorization.k8s.io/decision", said.to_owned());
        self.annotate("authorization.k8s.io/reason", reason.clone());
    }

    /// Whether what is answered is written down. Then it is answered in JSON, if whoever asks reads that.
    pub fn wants_answer(&self) -> bool {
        self.decision.level == Level::RequestResponse && !self.long_running
    }

    /// Says something more of it. What was said first stays.
    pub fn annotate(&self, key: &str, value: String) {
        self.known.lock().annotations.entry(key.to_owned()).or_insert(value);
    }

    /// What was sent.
    pub fn sent(&self, server: &Server, context: &Context<'_>) {
        if context.body.is_empty() {
            return;
        }
        let whole = self.decision.level >= Level::Request;
        let json = matches!(context.content_type(), "application/json" | "" | "*/*");
        let body = match (whole, json || context.content_type().ends_with("+json")) {
            (true, true) => serde_json::from_slice(&context.body).ok(),
            (_, false) if context.content_type() == "application/apply-patch+yaml" => {
                yaml(&context.body).ok().map(|(body, _)| body)
            }
            (_, false) => context.body(server, context.served.ty).ok().map(|(body, _)| body),
            (false, true) => None,
        };
        let mut known = self.known.lock();
        // Upstream takes from the body what the URL does not say.
        if matches!(&*self.verb, "create" | "update") {
            let named = match &body {
                Some(body) => Named::deserialize(body).unwrap_or_default(),
                None => serde_json::from_slice(&context.body).unwrap_or_default(),
            };
            if let Some(object) = &mut known.object {
                let fill = |field: &mut String, found: Option<String>| {
                    if field.is_empty() {
                        *field = found.unwrap_or_default();
                    }
                };
                fill(&mut object.name, named.metadata.name);
                fill(&mut object.uid, named.metadata.uid);
                fill(&mut object.resource_version, named.metadata.resource_version);
            }
        }
        if whole {
            known.request = body.map(|body| self.trimmed(body));
        }
    }

    fn trimmed(&self, mut object: Value) -> Value {
        if self.decision.omit_managed_fields && object.is_object() {
            event::without_managed_fields(&mut object);
        }
        object
    }

    /// It is answered. What follows is the body, whose end is the request's.
    fn answered(self: &Arc<Self>, response: Response<Body>, failure: Option<&ApiError>) -> Response<Body> {
        let code = response.status().as_u16();
        let status = match failure {
            None => json!({"metadata": {}, "code": code}),
            Some(error) => {
                let message = self.refused.as_ref().unwrap_or(&error.message);
                let mut status = json!({"metadata": {}, "status": "Failure", "message": message,
                    "reason": error.reason, "code": code});
                if error.details.is_object() {
                    status["details"] = error.details.clone();
                }
                status
            }
        };
        {
            let mut known = self.known.lock();
            known.status = Some(status);
            if self.long_running || self.refused.is_some() {
                self.write(Stage::ResponseStarted, &known, Timestamp::now());
            }
        }
        let (parts, body) = response.into_parts();
        let taken = tap::Taken::of(self, &parts);
        Response::from_parts(parts, tap::body(body, self.clone(), taken))
    }

    fn write(&self, stage: Stage, known: &Known, at: Timestamp) {
        if self.decision.omit_stages.contains(&stage) {
            return;
        }
        let level = self.decision.level;
        self.auditor.put(
            level,
            &Event {
                kind: "Event",
                api_version: "audit.k8s.io/v1",
                level,
                audit_id: &self.id,
                stage,
                request_uri: &self.uri,
                verb: &self.verb,
                user: &self.user,
                impersonated_user: known.impersonated.as_ref(),
                source_ips: &self.source_ips,
                user_agent: &self.user_agent,
                object_ref: known.object.as_ref(),
                response_status: known.status.as_ref(),
                request_object: known.request.as_ref(),
                response_object: known.response.as_ref(),
                request_received_timestamp: self.received,
                stage_timestamp: at,
                annotations: &known.annotations,
            },
        );
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        let mut known = std::mem::take(self.known.get_mut());
        if self.refused.is_some() {
            return;
        }
        let stage = match std::thread::panicking() {
            true => Stage::Panic,
            false => Stage::ResponseComplete,
        };
        if stage == Stage::Panic {
            known.status = Some(json!({"metadata": {}, "status": "Failure", "message": "the server panicked",
                "reason": "InternalError", "code": StatusCode::INTERNAL_SERVER_ERROR.as_u16()}));
        }
        // Whoever asked went away before there was an answer.
        known.status.get_or_insert_with(|| {
            json!({"metadata": {}, "status": "Failure", "message": "the client went away before it was answered",
                "reason": "Timeout", "code": StatusCode::GATEWAY_TIMEOUT.as_u16()})
        });
        self.write(stage, &known, Timestamp::now());
    }
}
