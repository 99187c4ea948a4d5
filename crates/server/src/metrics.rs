//! Health checks and metrics.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::{
    Server,
    encode::{Body, full},
    error::{ApiError, Result},
    request::{Query, ResourcePath, is_stream, verb},
};

/// What is counted, by upstream's names.
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    durations: Family<DurationLabels, Histogram>,
    objects: Family<ObjectLabels, Gauge>,
    /// What else this process counts.
    more: OnceLock<Box<dyn Fn() -> String + Send + Sync>>,
}

/// In seconds.
const BUCKETS: [f64; 14] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: String,
    group: String,
    version: String,
    resource: String,
    subresource: String,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    verb: String,
    group: String,
    resource: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ObjectLabels {
    resource: String,
}

/// What a request was, kept until its answer is known.
pub struct Observed {
    verb: &'static str,
    path: Option<ResourcePath>,
}

impl Observed {
    /// Looks at a request.
    pub fn of(parts: &Parts) -> Observed {
        let path = ResourcePath::parse(parts.uri.path());
        let query = Query::parse(parts.uri.query());
        let verb = path.as_ref().map_or("get", |p| verb(&parts.method, p, &query));
        Observed { verb, path }
    }

    /// Whether such a request ends by itself: others go on for as long as their clients want.
    pub fn ends(&self) -> bool {
        let subresource = self.path.as_ref().and_then(|path| path.subresource.as_deref());
        self.verb != "watch" && !subresource.is_some_and(is_stream)
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        let metrics = Metrics {
            registry: Registry::default(),
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            objects: Family::default(),
            more: OnceLock::new(),
        };
        let mut registry = Registry::default();
        registry.register("apiserver_request", "Requests by verb, resource and status code", metrics.requests.clone());
        registry.register(
            "apiserver_request_duration_seconds",
            "Time until the answer began",
            metrics.durations.clone(),
        );
        registry.register("apiserver_storage_objects", "Objects by resource", metrics.objects.clone());
        Metrics { registry, ..metrics }
    }
}

impl Metrics {
    /// Counts an answered request.
    pub fn observe(&self, request: Observed, status: StatusCode, took: Duration) {
        let path = request.path.unwrap_or_default();
        // Only resources that exist make labels, so that a client cannot make them up without end.
        let known = status != StatusCode::NOT_FOUND || path.name.is_some();
        let resource = if known { path.resource } else { String::new() };
        let verb = request.verb.to_uppercase();
        let labels = RequestLabels {
            verb: verb.clone(),
            group: if known { path.group.clone() } else { String::new() },
            version: if known { path.version } else { String::new() },
            resource: resource.clone(),
            subresource: if known { path.subresource.unwrap_or_default() } else { String::new() },
            code: status.as_u16(),
        };
        self.requests.get_or_create(&labels).inc();
        if verb != "WATCH" {
            let labels = DurationLabels { verb, group: labels.group, resource };
            self.durations.get_or_create(&labels).observe(took.as_secs_f64());
        }
    }
}

/// Whether the store answered when it was last asked.
pub type StoreHealth = tokio::sync::Mutex<Option<(tokio::time::Instant, Result<(), String>)>>;

/// How long an answer of the store counts for all who ask: balancers of every node do, many times a second.
const HEALTH_VALID: Duration = Duration::from_millis(200);
/// How long the store has to answer.
const HEALTH_TIMEOUT: Duration = Duration::from_millis(1000);

/// OpenMetrics and what Prometheus reads, in one OpenMetrics text: there the name of a counter's family is without
/// `_total`, and the text ends with a mark (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
fn joined(openmetrics: &str, prometheus: &str) -> String {
    const END: &str = "# EOF\n";
    let mut text = openmetrics.strip_suffix(END).unwrap_or(openmetrics).to_owned();
    let counters: BTreeSet<&str> =
        prometheus.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    for line in prometheus.lines() {
        let about = line.strip_prefix("# ").and_then(|rest| rest.split_once(' '));
        let counter = about.and_then(|(what, rest)| {
            let (name, rest) = rest.split_once(' ')?;
            let family = name.strip_suffix("_total").filter(|_| counters.contains(name))?;
            Some(format!("# {what} {family} {rest}"))
        });
        text.push_str(counter.as_deref().unwrap_or(line));
        text.push('\n');
    }
    text + END
}

impl Server {
    /// Adds to `/metrics` what else this process counts, as Prometheus reads it. Only the first call counts.
    pub fn show_metrics(&self, more: impl Fn() -> String + Send + Sync + 'static) {
        if self.metrics.more.set(Box::new(more)).is_err() {
            tracing::warn!("what else is counted is known already");
        }
    }

    /// Whether the store answers a read that needs its majority. One read serves all who ask at about the same time.
    async fn store_answers(&self) -> Result<(), String> {
        let mut last = self.store_health.lock().await;
        if let Some((at, answer)) = &*last
            && at.elapsed() < HEALTH_VALID
        {
            return answer.clone();
        }
        let answer = match tokio::time::timeout(HEALTH_TIMEOUT, self.store.revision()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {HEALTH_TIMEOUT:?}")),
        };
        *last = Some((tokio::time::Instant::now(), answer.clone()));
        answer
    }

    /// `/metrics`.
    pub(crate) fn metrics_text(&self) -> Response<Body> {
        let snapshot = self.cache.snapshot();
        for (id, row) in self.registry.all_rows().into_iter().filter(|(_, row)| row.stored) {
            let labels = ObjectLabels { resource: row.qualified() };
            self.metrics.objects.get_or_create(&labels).set(snapshot.of(id).len() as i64);
        }
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.metrics.registry) {
            tracing::warn!(%error, "the metrics cannot be encoded");
        }
        let more = self.metrics.more.get().map_or(String::new(), |more| more());
        let audit = self.config.access.audit.as_ref().map_or(String::new(), |audit| audit.metrics());
        text = joined(&text, &(self.flow.metrics() + &audit + &self.balancers.metrics() + &more));
        let mut response = Response::new(full(text));
        let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    /// `/healthz`, `/livez`, `/readyz`, whole (`?verbose`) or a single check (`/readyz/store`)
    /// (<https://kubernetes.io/docs/reference/using-api/health-checks/>).
    pub(crate) async fn health(self: &Arc<Self>, path: &str, query: &Query) -> Result<Response<Body>> {
        let mut parts = path.trim_start_matches('/').splitn(2, '/');
        let endpoint = parts.next().unwrap_or_default();
        let single = parts.next();
        let store = match endpoint {
            "livez" => Ok(()),
            _ => self.store_answers().await,
        };
        let started = match self.ready.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err("not finished".to_owned()),
        };
        let draining = match self.stop.is_cancelled() {
            false => Ok(()),
            true => Err("the server is shutting down".to_owned()),
        };
        let mut checks = vec![("ping", Ok(()))];
        match endpoint {
            "livez" => {}
            _ => checks.extend([("store", store), ("poststarthook/bootstrap", started), ("shutdown", draining)]),
        }
        let excluded: Vec<&str> =
            query.pairs().iter().filter(|(k, _)| k == "exclude").map(|(_, v)| v.as_str()).collect();
        if let Some(single) = single {
            let name = if single == "etcd" { "store" } else { single };
            checks.retain(|(check, _)| *check == name);
            if checks.is_empty() {
                return Err(ApiError::no_route());
            }
        }
        checks.retain(|(check, _)| !excluded.contains(check));
        let failed = checks.iter().any(|(_, result)| result.is_err());
        let mut text = String::new();
        if failed || query.get("verbose").is_some() {
            for (check, result) in &checks {
                let _ = match result {
                    Ok(()) => writeln!(text, "[+]{check} ok"),
                    Err(why) => writeln!(text, "[-]{check} failed: {why}"),
                };
            }
            let _ = writeln!(text, "{endpoint} check {}", if failed { "failed" } else { "passed" });
        } else {
            text.push_str("ok");
        }
        let mut response = Response::new(full(text));
        *response.status_mut() = if failed { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK };
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_formats_become_one() {
        let check = |one: &str, other: &str, expect: &str| assert_eq!(joined(one, other), expect);
        check("# EOF\n", "", "# EOF\n");
        check(
            "a 1\n# EOF\n",
            "# HELP b_total All b.\n# TYPE b_total counter\nb_total{x=\"y\"} 2\n# HELP c_total Odd.\n# TYPE c_total gauge\n\
             c_total 3\n",
            "a 1\n# HELP b All b.\n# TYPE b counter\nb_total{x=\"y\"} 2\n# HELP c_total Odd.\n# TYPE c_total gauge\n\
             c_total 3\n# EOF\n",
        );
    }
}
