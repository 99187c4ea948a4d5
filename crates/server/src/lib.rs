//! The API server: request pipeline, snapshot cache, watch, discovery, OpenAPI, authentication, authorization, admission.
//!
//! A request passes, from top to bottom of [`Server::handle`]: authentication, the size limit, routing, authorization,
//! and then a verb ([`read`], [`watch`], [`write`]) or a special one ([`subresource`], [`kubelet`], [`review`]).

pub mod access;
mod admission;
mod aggregation;
mod allocate;
mod apply;
pub mod audit;
pub mod auth;
pub mod balancers;
mod bootstrap;
mod cache;
mod consistent;
mod convert;
mod definitions;
mod delete;
mod discovery;
mod encode;
mod error;
mod expire;
mod flow;
mod kubelet;
mod lean;
mod metrics;
mod object;
mod openapi;
pub mod outside;
mod patch;
pub mod paths;
pub mod pki;
pub mod presence;
mod proxy;
mod read;
mod registry;
mod request;
mod resource_metrics;
mod review;
pub mod serve;
mod subresource;
pub mod tls;
mod watch;
mod webhook;
mod write;

use std::{net::IpAddr, sync::Arc, time::Duration};

use auth::{
    UserInfo,
    authorize::{Attributes, Authorizer, BuiltIn, field_selector},
    node::Known,
    rbac::{Index, Rbac},
    token::Tokens,
};
use bytes::Bytes;
use cache::Cache;
pub use encode::{Body, BodyError};
use error::{ApiError, Result};
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, Limited};
use parking_lot::Mutex;
use read::Pages;
use registry::{Registry, Served};
use request::{Query, ResourcePath, verb};
use seawall_api::{Row, proto, ranges::Ranges, schema::Schemas};
use seawall_store::{Fence, Revision, Store};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The largest body of a request, in bytes; upstream's limit.
pub const MAX_BODY: usize = 3 * 1024 * 1024;
/// The header with which a leader's client says in which term it writes: `<namespace>/<lease>/<term>`, where the term is
/// the resourceVersion at which the Lease was created. A write of a term that is over is refused with 409.
pub const TERM_HEADER: &str = "seawall-term";
/// How long a request that is no watch may take; upstream's default.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// What a server is told at start.
#[derive(Clone)]
pub struct Config {
    /// The addresses of Services, of one family or of both. The first one is the API's own.
    pub service_cidr: Ranges,
    /// The ports of Services on nodes.
    pub node_ports: std::ops::RangeInclusive<u16>,
    /// The addresses and port under which clients in the cluster reach this server: endpoints of `kubernetes`.
    pub advertise: (IpAddr, u16),
    /// The key that signs tokens, and its public part, in PEM.
    pub service_account_key: (String, String),
    /// The issuer of tokens, and the audience of the API.
    pub issuer: String,
    /// The certificate authorities of the cluster, in PEM, by which node agents are known.
    pub ca_pem: String,
    /// The certificate and key with which the server calls node agents, in PEM.
    pub kubelet_client: (String, String),
    /// The version that is reported, e.g. `v1.37.0+seawall`.
    pub version: String,
    /// The name of this server among others.
    pub name: String,
    /// How often this server says that it lives, and how long a silent one stays an endpoint of `kubernetes`.
    pub presence: presence::Times,
    /// Who answers below [`paths::PREFIX`].
    pub paths: Option<Arc<dyn paths::Paths>>,
    /// Whether other servers use the same store.
    pub shared_store: bool,
    /// How long pods stay on nodes that are not well, if they do not say.
    pub tolerations: Tolerations,
    /// How many requests are carried out at a time.
    pub inflight: Inflight,
    /// `--goaway-chance`: with which probability a request tells an HTTP/2 client to come again on another connection, which
    /// spreads clients over servers.
    pub goaway_chance: f64,
    /// `--event-ttl`: how long an event is kept after it was last seen.
    pub event_ttl: Duration,
    /// What was said of access to this server.
    pub access: access::Access,
}

/// How many requests are carried out at a time
/// (<https://kubernetes.io/docs/concepts/cluster-administration/flow-control/>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inflight {
    /// `--max-requests-inflight` and `--max-mutating-requests-inflight` together; 0 for as many as come.
    pub most: u32,
    /// `--enable-priority-and-fairness`: whether they are shared out to levels, and wait for their turn. If not, what is
    /// too much is refused.
    pub fair: bool,
}

impl Default for Inflight {
    fn default() -> Inflight {
        Inflight { most: 600, fair: true }
    }
}

/// How many seconds a pod stays on a node that is not ready, or not heard of, if it does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tolerations {
    /// `--default-not-ready-toleration-seconds`.
    pub not_ready: u64,
    /// `--default-unreachable-toleration-seconds`.
    pub unreachable: u64,
}

impl Default for Tolerations {
    fn default() -> Tolerations {
        Tolerations { not_ready: 300, unreachable: 300 }
    }
}

/// The API server.
pub struct Server {
    config: Config,
    registry: Arc<Registry>,
    store: Arc<dyn Store>,
    cache: Arc<Cache>,
    pages: Pages,
    tokens: Tokens,
    authorizer: Box<dyn Authorizer>,
    rbac: Arc<Rbac>,
    kubelet: kubelet::Client,
    registered: admission::registered::Registered,
    webhooks: webhook::Caller,
    turns: admission::Turns,
    /// What this server says of itself beside its address: annotations of its Lease.
    notes: Mutex<std::collections::BTreeMap<String, String>>,
    openapi: openapi::Documents,
    metrics: metrics::Metrics,
    store_health: metrics::StoreHealth,
    reads: consistent::Reads,
    flow: Arc<flow::Flow>,
    aggregation: aggregation::Aggregation,
    metrics_of_nodes: resource_metrics::Answers,
    legacy_uses: auth::legacy_token::Uses,
    /// The authorities by which clients are known, in PEM: what other API servers are told.
    client_ca: arc_swap::ArcSwap<String>,
    balancers: balancers::Balancers,
    /// Requests that are being answered and end by themselves.
    requests: TaskTracker,
    ready: std::sync::atomic::AtomicBool,
    stop: CancellationToken,
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The table of resources has a mistake.
    #[error(transparent)]
    Registry(#[from] registry::NoSchema),
    /// A key or certificate cannot be read.
    #[error("{0}")]
    Key(String),
    /// The store cannot be read, or the first objects cannot be written.
    #[error("{what}: {message}")]
    Store {
        /// What was tried.
        what: &'static str,
        /// What went wrong.
        message: String,
    },
}

/// What is known of a request once it has been routed.
#[derive(Clone)]
pub(crate) struct Context<'a> {
    pub user: UserInfo,
    pub path: ResourcePath,
    pub row: Arc<Row>,
    pub served: &'a Served,
    /// The types of built-in kinds.
    pub schemas: &'a Schemas,
    pub query: Query,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub form: encode::Form,
    pub fence: Option<Fence>,
    pub recording: apply::Recording,
    pub warnings: Arc<Mutex<Vec<String>>>,
    pub audit: Option<Arc<audit::Trail>>,
}

impl<'a> Context<'a> {
    #[allow(
        clippy::too_many_arguments,
        reason = "each is a part of a request, and this is the only place that puts them together"
    )]
    fn of(
        registry: &'a Registry,
        user: UserInfo,
        path: ResourcePath,
        row: Arc<Row>,
        served: &'a Served,
        query: Query,
        headers: HeaderMap,
        body: Bytes,
    ) -> Context<'a> {
        Context {
            user,
            path,
            row,
            served,
            schemas: &registry.schemas,
            query,
            headers,
            body,
            form: encode::Form { shape: encode::Shape::Full, media: encode::Media::Json },
            fence: None,
            recording: apply::Recording::OfPath,
            warnings: Arc::default(),
            audit: None,
        }
    }

    /// A request that the server makes of itself.
    pub(crate) fn own(registry: &'a Registry, path: ResourcePath, served: &'a Served) -> Context<'a> {
        let (user, row) = (UserInfo::new("system:apiserver", &[auth::MASTERS]), served.row.clone());
        Context::of(registry, user, path, row, served, Query::default(), HeaderMap::new(), Bytes::new())
    }

    /// The name in the URL.
    pub fn name(&self) -> Result<&str> {
        self.path.name.as_deref().ok_or_else(ApiError::method_not_allowed)
    }

    /// The namespace in the URL; empty for a cluster-scoped resource.
    pub fn namespace(&self) -> &str {
        self.path.namespace.as_deref().unwrap_or_default()
    }

    /// Says something more in the audit log, if the request is audited.
    pub fn annotate(&self, key: &str, value: impl Into<String>) {
        if let Some(trail) = &self.audit {
            trail.annotate(key, value.into());
        }
    }

    /// Sends warnings along with the answer (<https://kubernetes.io/docs/reference/using-api/api-concepts/#warnings>).
    pub fn warn(&self, texts: Vec<String>) {
        let mut warnings = self.warnings.lock();
        // A change that is tried again complains again.
        for text in texts {
            if !warnings.contains(&text) && warnings.len() < 32 {
                warnings.push(text);
            }
        }
    }
}

impl Server {
    /// Reads the store and makes sure that what every cluster has is there.
    pub fn start(
        config: Config,
        store: Arc<dyn Store>,
        stop: CancellationToken,
    ) -> BoxFuture<'static, Result<Arc<Server>, StartError>> {
        Box::pin(Server::begin(config, store, stop))
    }

    async fn begin(config: Config, store: Arc<dyn Store>, stop: CancellationToken) -> Result<Arc<Server>, StartError> {
        let registry = Arc::new(Registry::new()?);
        let key = |e: &dyn std::fmt::Display| StartError::Key(e.to_string());
        let (private, public) = &config.service_account_key;
        let tokens = Tokens::new(&config.issuer, private, public).map_err(|e| key(&e))?;
        let kubelet = kubelet::Client::new(&config.ca_pem, &config.kubelet_client).map_err(|e| key(&e))?;
        let cache = Cache::start(registry.clone(), store.clone(), stop.clone())
            .await
            .map_err(|e| StartError::Store { what: "the store cannot be read", message: e.message })?;
        let rbac = Arc::new(Rbac::default());
        let known = Known { registry: registry.clone(), cache: cache.clone(), rbac: rbac.clone() };
        let reads = consistent::Reads::new(store.clone());
        let flow = flow::Flow::new(config.inflight);
        let client_ca = arc_swap::ArcSwap::from_pointee(config.ca_pem.clone());
        let server = Arc::new(Server {
            config,
            registry,
            store,
            cache,
            pages: Pages::default(),
            tokens,
            authorizer: Box::new(BuiltIn(known)),
            rbac,
            kubelet,
            registered: Default::default(),
            webhooks: Default::default(),
            turns: Default::default(),
            notes: Mutex::default(),
            openapi: openapi::Documents::default(),
            metrics: metrics::Metrics::default(),
            store_health: metrics::StoreHealth::default(),
            reads,
            flow,
            aggregation: Default::default(),
            metrics_of_nodes: Default::default(),
            legacy_uses: Default::default(),
            client_ca,
            balancers: Default::default(),
            requests: TaskTracker::new(),
            ready: false.into(),
            stop,
        });
        server
            .bootstrap()
            .await
            .map_err(|e| StartError::Store { what: "the first objects cannot be written", message: e.message })?;
        tokio::spawn(expire::keep(server.clone()));
        tokio::spawn(presence::keep(server.clone()));
        tokio::spawn(auth::legacy_token::keep(server.clone()));
        tokio::spawn(definitions::keep(server.clone()));
        tokio::spawn(flow::bootstrap::keep(server.clone()));
        tokio::spawn(aggregation::available::keep(server.clone()));
        tokio::spawn(aggregation::specs::keep(server.clone()));
        let repair = server.clone();
        tokio::spawn(async move {
            if let Err(error) = repair.repair_allocations(REQUEST_TIMEOUT + REQUEST_TIMEOUT / 6).await {
                tracing::warn!(error = error.message, "allocations were not looked through");
            }
        });
        server.ready.store(true, std::sync::atomic::Ordering::Release);
        Ok(server)
    }

    /// An object as the cache has it.
    pub fn peek(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Option<serde_json::Value> {
        Some(self.lookup(&self.cache.snapshot(), group, plural, namespace, name)?.value())
    }

    /// Says something of this server in an annotation of its Lease, from the next renewal on.
    pub fn note(&self, key: &str, value: String) {
        self.notes.lock().insert(key.to_owned(), value);
    }

    /// From now on node agents are known by these authorities, and called with this certificate and key, all in PEM.
    ///
    /// # Errors
    /// If they cannot be used; then the ones before stay.
    pub fn call_agents_with(&self, ca_pem: &str, pair: &(String, String)) -> Result<(), StartError> {
        self.kubelet.replace(ca_pem, pair).map_err(|e| StartError::Key(e.to_string()))?;
        self.client_ca.store(Arc::new(ca_pem.to_owned()));
        Ok(())
    }

    /// Answers a request. `user` is who the connection proved to be: by client certificate, or a component in this
    /// process. A bearer token in the request speaks for itself.
    pub async fn handle<B>(self: &Arc<Self>, request: Request<B>, user: Option<UserInfo>) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BodyError>,
    {
        self.respond(request.map(|body| body.map_err(|error| Broken(error.into())).boxed_unsync()), user).await
    }

    /// In a box, and for one kind of body: so the whole pipeline is compiled here, once, and not by every caller.
    fn respond(
        self: &Arc<Self>,
        request: Request<RequestBody>,
        user: Option<UserInfo>,
    ) -> BoxFuture<'_, Response<Body>> {
        Box::pin(self.respond_to(request, user))
    }

    async fn respond_to(self: &Arc<Self>, request: Request<RequestBody>, user: Option<UserInfo>) -> Response<Body> {
        let started = tokio::time::Instant::now();
        let (mut parts, body) = request.into_parts();
        let form = encode::negotiate(&parts.headers, false);
        let media = form.map_or(encode::Media::Json, |form| form.media);
        self.balancers.note(&parts);
        let observed = metrics::Observed::of(&parts);
        let _answering = observed.ends().then(|| self.requests.token());
        let id = audit::begin(&mut parts);
        let outcome = self.route(&mut parts, body, user).await;
        let trail = parts.extensions.remove::<Arc<audit::Trail>>();
        let mut response = match outcome {
            Ok(response) => audit::answered(trail, response, None),
            Err(error) => {
                let mut response = encode::value(error.code, &error.status(), media);
                if let Some(seconds) = error.retry_after {
                    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
                }
                if error.code == StatusCode::UNAUTHORIZED {
                    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                }
                audit::answered(trail, response, Some(&error))
            }
        };
        response.headers_mut().insert(audit::ID, id);
        self.metrics.observe(observed, response.status(), started.elapsed());
        response
    }

    async fn route(
        self: &Arc<Self>,
        parts: &mut Parts,
        body: RequestBody,
        user: Option<UserInfo>,
    ) -> Result<Response<Body>> {
        let user = self.authenticate(parts, user).await;
        let trail = self.audit(parts, user.as_ref().ok());
        let user = auth::impersonate(&**self, user?, &mut parts.headers).await?;
        audit::note(trail.as_ref(), |trail| trail.impersonated(&user));
        let path = parts.uri.path().to_owned();
        let query = Query::parse(parts.uri.query());
        let Some(target) = ResourcePath::parse(&path) else {
            let verb = parts.method.as_str().to_lowercase();
            let attributes = Attributes { verb: &verb, path: &path, ..Default::default() };
            let seat = self.seat(&user, &attributes, None).await?;
            let response = if paths::is_open(&path) || path.starts_with(paths::PREFIX) {
                self.extra_path(&user, &verb, parts, body).await?
            } else {
                self.authorize_path(&user, &verb, parts).await?;
                match self.remote_of_document(&path).await? {
                    Some(remote) => self.pass_on(&remote, parts, body, &user).await?,
                    None => self.plain(&parts.method, &path, &query, &parts.headers).await?,
                }
            };
            return Ok(match seat {
                Some(seat) => seat.leave(response, false),
                None => response,
            });
        };
        let verb = verb(&parts.method, &target, &query);
        let fields = field_selector(verb, &query);
        let attributes = Attributes::of(verb, &target, &fields);
        let seat = self.seat(&user, &attributes, Some((&target, &query))).await?;
        let decision = self.authorize(&user, &attributes).await;
        audit::note(trail.as_ref(), |trail| trail.decided(&decision));
        if let Err(why) = decision {
            return Err(denied(&user, &attributes, &why));
        }
        let response = self.resource(parts, body, user, target.clone(), query, verb).await?;
        Ok(match seat {
            Some(seat) => seat.leave(response, verb == "watch"),
            None => response,
        })
    }

    /// Answers a request for a resource, by somebody who may make it.
    async fn resource(
        self: &Arc<Self>,
        parts: &mut Parts,
        body: RequestBody,
        user: UserInfo,
        target: ResourcePath,
        query: Query,
        verb: &str,
    ) -> Result<Response<Body>> {
        let trail = parts.extensions.get::<Arc<audit::Trail>>().cloned();
        let served = match self.served(&target).await {
            Ok(served) => served,
            Err(error) => {
                // Who has just registered a server, or taken it away, finds it so.
                self.consistent().await?;
                if let Some(remote) = self.remote(&target.group, &target.version) {
                    return self.pass_on(&remote, parts, body, &user).await;
                }
                let metrics = (resource_metrics::GROUP, resource_metrics::VERSION);
                if (&*target.group, &*target.version) == metrics && self.serves_metrics() {
                    return self.resource_metrics(&target, &query, &parts.headers, verb).await;
                }
                return Err(error);
            }
        };
        let row = served.row.clone();
        if let Some(sub) = &target.subresource
            && row.has(seawall_api::Subresource::Exec)
            && matches!(sub.as_str(), "exec" | "attach" | "portforward")
        {
            // These take over the connection, so their body is not read.
            let headers = parts.headers.clone();
            let context = Context::of(&self.registry, user, target, row, &served, query, headers, Bytes::new());
            self.admit_connect(&context).await?;
            return self.stream_to_pod(parts, &context.path, &context.query).await;
        }
        if target.subresource.as_deref().and_then(|sub| registry::subresource(&row, sub)).is_some_and(is_proxy) {
            // What is sent is for somebody else to read.
            let headers = std::mem::take(&mut parts.headers);
            let context = Context::of(&self.registry, user, target, row, &served, query, headers, Bytes::new());
            self.admit_connect(&context).await?;
            return self.proxy(&context, parts, body).await;
        }
        let body = collect(body).await?;
        let headers = std::mem::take(&mut parts.headers);
        let context = Context::of(&self.registry, user, target, row, &served, query, headers, body);
        let fence = self.fence(&context.headers)?;
        let protobuf = self.speaks_protobuf(&context);
        let form = match trail.as_ref().is_some_and(|trail| trail.wants_answer()) {
            true => {
                encode::negotiate(&context.headers, false).or_else(|_| encode::negotiate(&context.headers, protobuf))
            }
            false => encode::negotiate(&context.headers, protobuf),
        }?;
        audit::note(trail.as_ref(), |trail| trail.sent(self, &context));
        let context = Context { form, fence, audit: trail, ..context };
        if let Some(warning) = context.row.custom.as_ref().and_then(|version| version.deprecation.clone()) {
            context.warn(vec![warning]);
        }
        let answer = self.dispatch(&context, verb, &parts.method);
        let mut response = match verb == "watch" || context.path.subresource.as_deref() == Some("log") {
            true => answer.await?,
            false => tokio::time::timeout(REQUEST_TIMEOUT, answer)
                .await
                .map_err(|_| ApiError::timeout("the request did not complete within 60 seconds"))??,
        };
        for text in context.warnings.lock().iter() {
            let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
            if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
                response.headers_mut().append(header::WARNING, value);
            }
        }
        Ok(response)
    }

    /// Who serves a document of discovery or of OpenAPI, if somebody else does.
    async fn remote_of_document(&self, path: &str) -> Result<Option<Arc<aggregation::Remote>>> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let (["apis", group, version] | ["openapi", "v3", "apis", group, version]) = parts[..] else { return Ok(None) };
        if self.registry.group_versions().iter().any(|(g, v)| *g == group && *v == version) {
            return Ok(None);
        }
        self.consistent().await?;
        let remote = self.remote(group, version);
        Ok(remote.filter(|remote| parts[0] == "apis" || !self.made_for(remote)))
    }

    /// The resource that a path names. One that another server has made known a moment ago is known here as well.
    async fn served(&self, path: &ResourcePath) -> Result<Arc<Served>> {
        let find = || self.registry.find(&path.group, &path.version, &path.resource);
        if let Some(served) = find() {
            return Ok(served);
        }
        if self.config.shared_store && path.group.contains('.') {
            self.consistent().await?;
        }
        find().ok_or_else(ApiError::no_route)
    }

    async fn dispatch(self: &Arc<Self>, context: &Context<'_>, verb: &str, method: &Method) -> Result<Response<Body>> {
        if context.path.subresource.is_some() {
            return self.subresource(context, method).await;
        }
        if !context.row.stored {
            return match verb {
                "create" => self.review(context).await,
                _ => Err(ApiError::method_not_allowed()),
            };
        }
        match verb {
            "get" => self.get(context).await,
            "list" => self.list(context).await,
            "watch" => self.watch(context).await,
            "create" if context.path.name.is_none() => self.create(context).await,
            "update" => self.update(context).await,
            "patch" => self.patch(context).await,
            "delete" => self.delete(context).await,
            "deletecollection" => self.delete_collection(context).await,
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// Roles and bindings, as they are.
    pub(crate) fn rbac(&self) -> Arc<Index> {
        self.rbac.index(&self.registry, &self.cache.snapshot())
    }

    /// Finds out who asks.
    async fn authenticate(&self, parts: &Parts, user: Option<UserInfo>) -> Result<UserInfo> {
        let bearer = parts.headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        match (user, bearer) {
            (Some(user), _) => Ok(user),
            (None, Some(text)) => match text.split_once(' ') {
                Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                    let user = self.user_of_token(token.trim(), &[&self.config.issuer]).await;
                    user.map(|(user, _)| user).map_err(|_| ApiError::unauthorized())
                }
                _ => Err(ApiError::unauthorized()),
            },
            (None, None) if paths::is_open(parts.uri.path()) => Ok(UserInfo::anonymous()),
            // The balancers of machines ask this before they have anybody to speak for.
            (None, None) if parts.uri.path() == "/readyz" => Ok(UserInfo::anonymous()),
            (None, None) => match self.config.access.authentication.load().anonymous.allows(parts.uri.path()) {
                true => Ok(UserInfo::anonymous()),
                false => Err(ApiError::unauthorized()),
            },
        }
    }

    /// Whether objects of this resource are written in protobuf; upstream does for built-in kinds.
    fn speaks_protobuf(&self, context: &Context<'_>) -> bool {
        let row = &context.row;
        row.custom.is_none() && row.stored && proto::encode::is_known(context.schemas, context.served.ty)
    }

    /// The term of a leader, from the header that its client sends with every write.
    fn fence(&self, headers: &HeaderMap) -> Result<Option<Fence>> {
        let Some(value) = headers.get(TERM_HEADER) else { return Ok(None) };
        let bad = || {
            ApiError::bad_request(format!("{TERM_HEADER}: {value:?} is no term: write NAMESPACE/LEASE/RESOURCEVERSION"))
        };
        let text = value.to_str().map_err(|_| bad())?;
        let mut parts = text.split('/');
        let (Some(namespace), Some(name), Some(term), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad());
        };
        let created = Revision(term.parse().map_err(|_| bad())?);
        let (_, row) = self.registry.by_name("coordination.k8s.io", "leases").ok_or_else(ApiError::no_route)?;
        Ok(Some(Fence { key: row.key(namespace, name).into(), created }))
    }

    async fn authorize_path(&self, user: &UserInfo, verb: &str, parts: &Parts) -> Result<()> {
        let path = parts.uri.path();
        let decision = self.authorize(user, &Attributes { verb, path, ..Default::default() }).await;
        audit::note(parts.extensions.get(), |trail| trail.decided(&decision));
        decision.map(|_| ()).map_err(|why| {
            let why = if why.is_empty() { why } else { format!(": {why}") };
            ApiError::forbidden_path(format!("forbidden: User {:?} cannot {verb} path {path:?}{why}", user.username))
        })
    }

    /// Paths that are no resources.
    async fn plain(
        self: &Arc<Self>,
        method: &Method,
        path: &str,
        query: &Query,
        headers: &HeaderMap,
    ) -> Result<Response<Body>> {
        if method != Method::GET && method != Method::HEAD {
            return Err(ApiError::method_not_allowed());
        }
        let trimmed = path.trim_end_matches('/');
        match trimmed {
            "/version" => Ok(encode::value(StatusCode::OK, &self.version(), encode::Media::Json)),
            "/metrics" => Ok(self.metrics_text()),
            "/openid/v1/jwks" => Ok(encode::json_as("application/jwk-set+json", &self.tokens.jwks())),
            "/.well-known/openid-configuration" => Ok(encode::json_as("application/json", &self.openid())),
            _ if trimmed.starts_with("/healthz") || trimmed.starts_with("/livez") || trimmed.starts_with("/readyz") => {
                self.health(trimmed, query).await
            }
            _ if trimmed.starts_with("/openapi") => self.openapi(trimmed, headers),
            _ if trimmed.is_empty() || trimmed.starts_with("/api") => self.discovery(trimmed, headers),
            _ => Err(ApiError::no_route()),
        }
    }

    /// How others check tokens of service accounts
    /// (<https://kubernetes.io/docs/tasks/configure-pod-container/configure-service-account/#service-account-issuer-discovery>).
    fn openid(&self) -> serde_json::Value {
        let (address, port) = self.config.advertise;
        let keys = format!("https://{}/openid/v1/jwks", std::net::SocketAddr::new(address, port));
        serde_json::json!({"issuer": self.config.issuer, "jwks_uri": keys, "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["ES256"]})
    }

    fn version(&self) -> serde_json::Value {
        let version = &self.config.version;
        let mut numbers = version.trim_start_matches('v').split('.');
        serde_json::json!({
            "major": numbers.next().unwrap_or_default(), "minor": numbers.next().unwrap_or_default(),
            "gitVersion": version, "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
            "goVersion": "", "compiler": "rustc", "platform": format!("linux/{}", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }),
        })
    }
}

fn is_proxy(sub: seawall_api::Subresource) -> bool {
    matches!(sub, seawall_api::Subresource::Proxy(_))
}

fn denied(user: &UserInfo, a: &Attributes<'_>, why: &str) -> ApiError {
    let resource =
        if a.subresource.is_empty() { a.resource.to_owned() } else { format!("{}/{}", a.resource, a.subresource) };
    let place = if a.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", a.namespace)
    };
    let why = if why.is_empty() { String::new() } else { format!(": {why}") };
    let qualified = if a.group.is_empty() { a.resource.to_owned() } else { format!("{}.{}", a.resource, a.group) };
    let name = if a.name.is_empty() { String::new() } else { format!(" {:?}", a.name) };
    let mut error = ApiError::forbidden_path(format!(
        "{qualified}{name} is forbidden: User {:?} cannot {} resource {resource:?} in API group {:?} {place}{why}",
        user.username, a.verb, a.group
    ));
    error.details = serde_json::json!({"name": a.name, "group": a.group, "kind": a.resource});
    error
}

/// The body of a request, whoever it came from.
type RequestBody = http_body_util::combinators::UnsyncBoxBody<Bytes, Broken>;

/// A body that broke off.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Broken(BodyError);

/// Reads a body up to the limit.
async fn collect<B>(body: B) -> Result<Bytes>
where
    B: http_body::Body<Data = Bytes> + Send,
    B::Error: Into<BodyError>,
{
    let read = tokio::time::timeout(REQUEST_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
    match read {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::too_large(MAX_BODY)),
        Ok(Err(error)) => Err(ApiError::bad_request(format!("the body of the request cannot be read: {error}"))),
        Err(_) => Err(ApiError::timeout("the body of the request did not arrive within 60 seconds")),
    }
}
