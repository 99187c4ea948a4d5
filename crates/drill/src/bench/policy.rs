//! How long a NetworkPolicy takes from its creation until it holds, and from its deletion until it does not.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::{StreamExt, stream::FuturesOrdered};
use http::Method;
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{Common, Report, Samples, emptied, namespace, start_pods};
use crate::connection::Target;

/// How often the pod is called: figures are as coarse as that.
const EVERY: Duration = Duration::from_millis(2);
/// A pod that is not heard of for so long is out of reach. Less than the kernel waits before it calls again.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long a policy has to show.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// An image that is on the nodes and listens.
    #[arg(long)]
    image: String,
    /// The port on which it does.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// How many policies, one after the other.
    #[arg(long, default_value_t = 20)]
    count: usize,
}

/// Runs the benchmark.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let target = Target::from_kubeconfig(&args.common.kubeconfig)?;
    let ns = &args.common.namespace;
    let mut connection = namespace(&target, ns).await?;
    let mut report = Report::new(args.common.json);
    let pods = format!("/api/v1/namespaces/{ns}/pods");
    let policies = format!("/apis/networking.k8s.io/v1/namespaces/{ns}/networkpolicies");
    start_pods(&target, &pods, &args.image, &["called".to_owned()]).await?;
    let pod: Value = serde_json::from_slice(&connection.fetch(&format!("{pods}/called"), "application/json").await?)?;
    let ip = pod["status"]["podIP"].as_str().context("the pod has no address")?;
    let pod = SocketAddr::new(ip.parse().with_context(|| format!("the pod's address {ip:?}"))?, args.port);
    changes(pod, true, Instant::now()).await.with_context(|| format!("nothing in the pod listens on {pod}"))?;

    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "deny"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}})
    .to_string();
    let (mut holds, mut ends) = (Samples::default(), Samples::default());
    for _ in 0..args.count {
        let since = Instant::now();
        let create = connection.expect(Method::POST, &policies, policy.clone());
        let (_, took) = tokio::try_join!(create, changes(pod, false, since))
            .context("what a node says to its own pods is always let through: is this the pod's node?")?;
        holds.0.push(took);
        let since = Instant::now();
        let path = format!("{policies}/deny");
        let delete = connection.expect(Method::DELETE, &path, Bytes::new());
        ends.0.push(tokio::try_join!(delete, changes(pod, true, since))?.1);
    }
    for (what, samples) in [("created", &mut holds), ("deleted", &mut ends)] {
        for (name, part) in [("p50", 0.5), ("p99", 0.99), ("worst", 1.0)] {
            report.add(format!("policy, {what} to in effect, {name}"), samples.quantile(part), "ms");
        }
    }
    connection.expect(Method::DELETE, &pods, Bytes::new()).await?;
    emptied(&mut connection, &pods).await?;
    report.finish();
    Ok(())
}

/// How long after `since` the first call began that was answered, or was not.
async fn changes(pod: SocketAddr, answered: bool, since: Instant) -> anyhow::Result<Duration> {
    let mut calls = FuturesOrdered::new();
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = tick.tick() => calls.push_back(call(pod)),
            Some((began, was)) = calls.next(), if !calls.is_empty() => {
                if was == answered {
                    return Ok(began.saturating_duration_since(since));
                }
                if since.elapsed() > LIMIT {
                    let words = if answered { "does not answer" } else { "still answers" };
                    bail!("{pod} {words} after {} s", LIMIT.as_secs());
                }
            }
        }
    }
}

/// When it began, and whether somebody answered.
async fn call(pod: SocketAddr) -> (Instant, bool) {
    let began = Instant::now();
    (began, matches!(timeout(PATIENCE, TcpStream::connect(pod)).await, Ok(Ok(_))))
}
