//! `seawall agent`: a node.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use seawall_client::tls::{self, Credentials, Tls};
use seawall_network::balancer;
use seawall_server::tls::{ClientAuthorities, ServingCertificate, server_config};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    authorities::node::{Follower, all_hashes},
    csr,
    files::{AgentState, Files},
    gossip, join, leave, node,
    options::{Component, Machine, MachineOptions, TimingOptions},
    paths,
    server::{raise_open_files, wait_for_signal},
    supervise::component,
};

/// How long a machine that has joined tries to join again before it goes on as it is.
const AGAIN: Duration = Duration::from_secs(45);

/// Options of `seawall agent`.
#[derive(clap::Args)]
pub struct Args {
    /// Join the cluster of the server at this address, e.g. https://192.0.2.1:6443. Only at the first start.
    #[arg(long, value_name = "URL", requires = "token")]
    join: Option<String>,
    /// What `seawall token create` printed.
    #[arg(long, env = "SEAWALL_TOKEN", hide_env_values = true)]
    token: Option<String>,
    #[command(flatten)]
    machine: MachineOptions,
    #[command(flatten)]
    timing: TimingOptions,
}

/// Runs a node until it is told to stop. Its pods go on, unless the machine goes down.
///
/// # Errors
/// What kept it from starting.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let (join, token, timing) = (args.join, args.token, args.timing);
    let machine = Arc::new(Machine::new(args.machine)?);
    machine.may_run_pods()?;
    raise_open_files();
    let files = Files::new(&machine.options.data_dir);
    let mut signal = tokio::spawn(wait_for_signal());
    let state = tokio::select! {
        state = decide(&machine, &files, join.as_deref(), token.as_deref()) => state?,
        _ = &mut signal => return Ok(()),
    };
    machine.fits(&state.cluster)?;
    let timing = timing.resolve(state.cluster.timing)?;
    let leaving = leave::handle(&machine, &timing)?;
    let stop = CancellationToken::new();
    let client_pair = csr::read(&files.agent_client())?.context("the agent's certificate is gone: join again")?;
    let tls = Tls::new(&Credentials {
        ca_pem: state.ca.clone(),
        certificate: Some((client_pair.certificate, client_pair.key)),
        token: None,
    })?;
    let client = tls::connect(node::balancer_address(&machine), &tls);
    let follower = Arc::new(Follower {
        name: machine.name.clone(),
        files: files.clone(),
        ca: watch::channel(state.ca.clone()).0,
        tls,
        callers: ClientAuthorities::new(&state.ca)?,
        state: Mutex::new(state.clone()),
    });
    let mut parts = Vec::new();
    let gossip = gossip::member(&machine, &timing)?;
    parts.extend(gossip.iter().map(|member| gossip::start(member, &client, &stop)));
    if machine.runs(Component::Balancer) {
        let config = balancer::Config {
            listen: node::balancer_address(&machine),
            initial: state.servers.clone(),
            file: files.balancer_list(),
            ca_pem: follower.ca.subscribe(),
            probe_interval: timing.probe_interval,
            probe_timeout: timing.probe_timeout,
            ..balancer::Config::default()
        };
        let client = client.clone();
        parts
            .push(component("balancer", stop.clone(), move |stop| balancer::run(config.clone(), client.clone(), stop)));
    }
    // Its serving certificate comes when its Node is known.
    let certificate = ServingCertificate::pending();
    let serving = server_config(certificate.clone(), follower.callers.clone(), &["http/1.1"])?;
    parts.push(csr::keep_serving(
        &machine.name,
        &machine.ips,
        &files.agent_serving(),
        client.clone(),
        follower.ca.subscribe(),
        certificate,
        stop.clone(),
    ));
    let identity = node::Identity { tls: Arc::new(serving) };
    parts.extend(node::components(
        &machine,
        &state.cluster,
        &timing,
        &client,
        &identity,
        &gossip::verdicts(gossip.as_ref()),
        &leaving,
        &stop,
    ));
    let (ca, path) = (follower.ca.subscribe(), files.agent_client());
    parts.push(follower.start(&client, &stop));
    parts.push(csr::keep_client(&machine.name, &path, client.clone(), ca, stop.clone(), move |_| follower.reconnect()));
    signal.await??;
    leave::leave(&machine, &leaving, gossip.as_ref()).await;
    tracing::info!("stopping{}", if leaving.is_down() { "" } else { "; pods go on" });
    stop.cancel();
    for part in parts {
        let _ = part.await;
    }
    Ok(())
}

async fn decide(
    machine: &Machine,
    files: &Files,
    url: Option<&str>,
    token: Option<&str>,
) -> anyhow::Result<AgentState> {
    let parsed = token.map(str::parse::<join::Token>);
    if let Some(mut state) = files.read_agent()? {
        if state.known.is_empty() {
            state.known = all_hashes(&state.ca);
        }
        let path = files.agent_client();
        let usable = csr::read(&path)?.is_some_and(|pair| !csr::has_ended(&pair));
        match (usable, url) {
            (true, Some(_)) => {
                tracing::info!("this machine has joined already: --join and --token are for its first start")
            }
            (true, None) => {}
            // It was away for longer than its certificate lived.
            (false, Some(_)) => tracing::info!("the certificate of this node is gone or has ended: it joins again"),
            (false, None) => bail!(
                "the certificate of this node ({}) is gone or has ended: give --join https://SERVER:6443 and --token once \
                 more, as printed by `seawall token create` on a server",
                path.display()
            ),
        }
        if usable {
            // The cluster's authority was replaced while this machine was away, and somebody gave it a token since.
            let token = parsed.as_ref().and_then(|token| token.as_ref().ok());
            let Some((url, token)) = url.zip(token).filter(|(_, token)| !state.known.contains(&token.hash)) else {
                return Ok(state);
            };
            tracing::info!("the token is for an authority that this machine does not know: it joins again");
            match tokio::time::timeout(AGAIN, try_join(machine, files, url, token)).await {
                Ok(Ok(state)) => return Ok(state),
                Ok(Err(failure)) => {
                    tracing::warn!("it did not join again, and goes on as what it was: {:#}", failure.error)
                }
                Err(_) => tracing::warn!("{url} did not answer: this machine goes on as what it was"),
            }
            return Ok(state);
        }
    }
    let (Some(url), Some(token)) = (url, parsed) else {
        bail!(
            "this machine has not joined a cluster: give --join https://SERVER:6443 and --token, as printed by `seawall \
             token create` on a server"
        );
    };
    let token = token.map_err(|e| anyhow::anyhow!("--token: {e}"))?;
    join::insist(async || try_join(machine, files, url, &token).await).await
}

async fn try_join(
    machine: &Machine,
    files: &Files,
    url: &str,
    token: &join::Token,
) -> Result<AgentState, join::Failure> {
    let to = join::connect(url, token).await?;
    let answer: join::ClusterAnswer = join::ask(&to.client, paths::CONFIG, None::<&()>)
        .await
        .map_err(|error| join::Failure::answered(url, error, "seawall token create"))?;
    machine.fits(&answer.cluster).map_err(join::Failure::for_good)?;
    let pair = csr::request_client(&to.client, &machine.name).await.map_err(|error| match error {
        csr::Error::Denied { .. } => join::Failure::for_good(error),
        error => join::Failure::for_now(error),
    })?;
    csr::write(&files.agent_client(), &pair).map_err(join::Failure::for_good)?;
    let mut servers: Vec<SocketAddr> = answer.servers;
    if servers.is_empty() {
        servers.extend(join::address_of(url).await.ok());
    }
    // A server of an older version says no more than what the token is for.
    let ca = if answer.ca.is_empty() { to.ca } else { answer.ca };
    let known = all_hashes(&ca);
    let state = AgentState { cluster: answer.cluster, ca, ca_revision: answer.ca_revision, known, servers };
    files.write_agent(&state).map_err(join::Failure::for_good)?;
    tracing::info!(url, "joined the cluster");
    Ok(state)
}
