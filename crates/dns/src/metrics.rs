//! What DNS counts, and how Prometheus reads it.

use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use hickory_proto::op::ResponseCode;

/// What is counted. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    udp: AtomicU64,
    tcp: AtomicU64,
    codes: [AtomicU64; 7],
    own: AtomicU64,
    cached: AtomicU64,
    stale: AtomicU64,
    forwarded: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
    dropped: AtomicU64,
    services: AtomicU64,
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// The cluster.
    Own,
    /// The cache.
    Cache,
    /// The cache, though its time was over, since nobody answered.
    Stale,
    /// Others.
    Others,
    /// Nowhere: others did not answer.
    Nobody,
}

const CODES: [(ResponseCode, &str); 6] = [
    (ResponseCode::NoError, "NOERROR"),
    (ResponseCode::FormErr, "FORMERR"),
    (ResponseCode::ServFail, "SERVFAIL"),
    (ResponseCode::NXDomain, "NXDOMAIN"),
    (ResponseCode::NotImp, "NOTIMP"),
    (ResponseCode::Refused, "REFUSED"),
];

impl Metrics {
    pub(crate) fn asked(&self, transport: crate::message::Transport) {
        let counter = match transport {
            crate::message::Transport::Udp => &self.counts.udp,
            crate::message::Transport::Tcp => &self.counts.tcp,
        };
        counter.fetch_add(1, Relaxed);
    }

    pub(crate) fn answered(&self, code: ResponseCode) {
        let index = CODES.iter().position(|(known, _)| *known == code).unwrap_or(CODES.len());
        self.counts.codes[index].fetch_add(1, Relaxed);
    }

    pub(crate) fn from(&self, from: From) {
        let counter = match from {
            From::Own => &self.counts.own,
            From::Cache => &self.counts.cached,
            From::Stale => &self.counts.stale,
            From::Others => &self.counts.forwarded,
            From::Nobody => &self.counts.failed,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// Somebody had more under way than is allowed.
    pub(crate) fn refused(&self) {
        self.counts.refused.fetch_add(1, Relaxed);
    }

    /// What came was no question, or the answer could not be sent.
    pub(crate) fn dropped(&self) {
        self.counts.dropped.fetch_add(1, Relaxed);
    }

    /// So many Services are known.
    pub fn known(&self, services: usize) {
        self.counts.services.store(services as u64, Relaxed);
    }

    /// In the format of Prometheus.
    pub fn render(&self) -> String {
        let counts = &self.counts;
        let mut out = String::new();
        let mut family = |name: &str, kind: &str, help: &str, values: &[(String, &AtomicU64)]| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in values {
                let _ = writeln!(out, "{name}{labels} {}", value.load(Relaxed));
            }
        };
        let label = |key: &str, value: &str| format!("{{{key}=\"{value}\"}}");
        let transports = [(label("transport", "udp"), &counts.udp), (label("transport", "tcp"), &counts.tcp)];
        family("seawall_dns_questions_total", "counter", "Questions that were asked.", &transports);
        let names = CODES.iter().map(|(_, name)| *name).chain(["other"]);
        let codes: Vec<_> = names.zip(&counts.codes).map(|(name, count)| (label("code", name), count)).collect();
        family("seawall_dns_answers_total", "counter", "Answers by how it went.", &codes);
        let sources = [
            (label("from", "cluster"), &counts.own),
            (label("from", "cache"), &counts.cached),
            (label("from", "stale"), &counts.stale),
            (label("from", "others"), &counts.forwarded),
            (label("from", "nobody"), &counts.failed),
        ];
        family("seawall_dns_sources_total", "counter", "Where answers came from.", &sources);
        let none = String::new();
        let refused = "Questions of clients that had too many under way.";
        family("seawall_dns_refused_total", "counter", refused, &[(none.clone(), &counts.refused)]);
        let dropped = "Packets that were no questions, and answers that could not be sent.";
        family("seawall_dns_dropped_total", "counter", dropped, &[(none.clone(), &counts.dropped)]);
        family("seawall_dns_services", "gauge", "Services that are known.", &[(none, &counts.services)]);
        out
    }
}
