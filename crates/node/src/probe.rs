//! Probes: [`Counter`] turns results into verdicts by the thresholds; [`run`] asks in time.
//!
//! <https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/>

use std::time::Duration;

use k8s_openapi::api::core::v1::Probe;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::handler::{self, Target};

/// Which of a container's probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Until it succeeds, the others wait.
    Startup,
    /// Whether the container gets traffic.
    Readiness,
    /// Whether the container is restarted.
    Liveness,
}

impl Kind {
    /// As in `Readiness probe failed: ...`.
    pub fn title(self) -> &'static str {
        match self {
            Kind::Startup => "Startup",
            Kind::Readiness => "Readiness",
            Kind::Liveness => "Liveness",
        }
    }
}

/// What a prober reports.
#[derive(Clone, Debug)]
pub enum Report {
    /// A verdict changed.
    Verdict {
        /// The container's id.
        container: String,
        /// The probe.
        kind: Kind,
        /// The new verdict.
        healthy: bool,
    },
    /// One attempt failed; worth an event.
    Failure {
        /// The container's name.
        name: String,
        /// The probe.
        kind: Kind,
        /// What the handler said.
        message: String,
    },
}

/// Counts results in a row.
#[derive(Clone, Debug)]
pub struct Counter {
    success_threshold: u32,
    failure_threshold: u32,
    verdict: Option<bool>,
    last: Option<bool>,
    run: u32,
}

impl Counter {
    /// For a probe; a container that has just started is neither healthy nor not.
    pub fn new(probe: &Probe, verdict: Option<bool>) -> Self {
        let positive =
            |v: Option<i32>, default| v.and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default);
        Self {
            success_threshold: positive(probe.success_threshold, 1),
            failure_threshold: positive(probe.failure_threshold, 3),
            verdict,
            last: None,
            run: 0,
        }
    }

    /// Takes a result; a new verdict, if it changes.
    pub fn step(&mut self, success: bool) -> Option<bool> {
        self.run = if self.last == Some(success) { self.run + 1 } else { 1 };
        self.last = Some(success);
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        if self.run < threshold || self.verdict == Some(success) {
            return None;
        }
        self.verdict = Some(success);
        self.verdict
    }
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default))
}

/// The waits before the attempts that come in addition, right after a container's start: a container that is up after
/// 200 ms should not wait for the end of a ten-second period. Such an attempt may succeed but does not count as failed.
/// Upstream too probes readiness outside of the period while a container is not ready.
fn early(probe: &Probe, period: Duration) -> Vec<Duration> {
    let start = Duration::from_millis(if probe.exec.is_some() { 500 } else { 100 });
    let mut waits = vec![Duration::ZERO];
    let mut sum = Duration::ZERO;
    let mut wait = start;
    while sum + wait < period {
        waits.push(wait);
        sum += wait;
        wait = (wait * 3 / 2).min(Duration::from_secs(2));
    }
    waits
}

async fn attempt(probe: &Probe, target: &Target) -> anyhow::Result<String> {
    let limit = seconds(probe.timeout_seconds, 1);
    if let Some(action) = &probe.exec {
        handler::exec(target, action, limit).await
    } else if let Some(action) = &probe.http_get {
        handler::http_get(target, action, handler::PROBE_AGENT, limit).await
    } else if let Some(action) = &probe.tcp_socket {
        handler::tcp(target, action, limit).await
    } else if let Some(action) = &probe.grpc {
        handler::grpc(target, action, handler::PROBE_AGENT, limit).await
    } else {
        Err(anyhow::anyhow!("missing probe handler"))
    }
}

/// Probes one container until dropped, or, for a startup probe, until the verdict is in. `age` is how long the
/// container has been running, `verdict` what is already known of it.
pub async fn run(
    name: String,
    kind: Kind,
    probe: Probe,
    target: Target,
    age: Duration,
    verdict: Option<bool>,
    reports: mpsc::Sender<Report>,
) {
    let period = seconds(probe.period_seconds, 10);
    let initial = probe.initial_delay_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(0);
    let mut counter = Counter::new(&probe, verdict);
    let begin = Instant::now() + Duration::from_secs(initial).saturating_sub(age);
    sleep_until(begin).await;
    let mut due = begin;
    if kind != Kind::Liveness && verdict != Some(true) && age < period {
        for wait in early(&probe, period) {
            due += wait;
            sleep_until(due).await;
            if attempt(&probe, &target).await.is_ok() {
                if let Some(healthy) = counter.step(true) {
                    let _ = reports.send(Report::Verdict { container: target.container.clone(), kind, healthy }).await;
                    if kind == Kind::Startup {
                        return;
                    }
                }
                break;
            }
            // A slow handler must not be asked twice at once, nor in a burst afterwards.
            due = due.max(Instant::now());
        }
        due += period;
    } else if initial == 0 || age > Duration::from_secs(initial) {
        // The first liveness probe comes a period after the start, or somewhere in the period after our own restart.
        due += if verdict.is_some() { period.mul_f64(rand::random::<f64>()) } else { period };
    }
    loop {
        sleep_until(due).await;
        let result = attempt(&probe, &target).await;
        if let Err(error) = &result {
            let message = format!("{error:#}");
            tracing::debug!(name, ?kind, message, "probe failed");
            let _ = reports.send(Report::Failure { name: name.clone(), kind, message }).await;
        }
        if let Some(healthy) = counter.step(result.is_ok()) {
            let report = Report::Verdict { container: target.container.clone(), kind, healthy };
            if reports.send(report).await.is_err() || kind == Kind::Startup {
                return;
            }
        }
        due = (due + period).max(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds() {
        let probe = Probe { success_threshold: Some(2), failure_threshold: Some(3), ..Default::default() };
        let mut counter = Counter::new(&probe, None);
        let results = [true, true, true, false, false, true, false, false, false, false, true, true];
        let verdicts = [None, Some(true), None, None, None, None, None, None, Some(false), None, None, Some(true)];
        for (index, (result, verdict)) in results.into_iter().zip(verdicts).enumerate() {
            assert_eq!(counter.step(result), verdict, "step {index}");
        }
    }

    #[test]
    fn early_attempts_stay_within_the_period() {
        for period in [1, 5, 10] {
            let waits = early(&Probe::default(), Duration::from_secs(period));
            assert!(waits.iter().sum::<Duration>() < Duration::from_secs(period));
            assert!(waits.len() > 3);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_that_opens_is_ready_within_the_period() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let probe: Probe =
            serde_json::from_value(serde_json::json!({"tcpSocket": {"port": port}, "periodSeconds": 10})).unwrap();
        let target = Target {
            cri: crate::cri::Cri::connect(std::path::Path::new("/nonexistent")).unwrap(),
            container: "c".into(),
            address: Some([127, 0, 0, 1].into()),
            ports: vec![],
        };
        let (tx, mut rx) = mpsc::channel(4);
        let prober = tokio::spawn(run("c".into(), Kind::Readiness, probe, target, Duration::ZERO, None, tx));
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(rx.try_recv().is_err());
        let _listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
        let report = tokio::time::timeout(Duration::from_secs(5), rx.recv()).await.unwrap().unwrap();
        assert!(matches!(report, Report::Verdict { healthy: true, kind: Kind::Readiness, .. }));
        prober.abort();
    }
}
