//! The end of a process on a machine with pods: whether they leave first.

use std::sync::Arc;

use anyhow::bail;
use seawall_network::gossip::Gossip;
use seawall_node::shutdown::{self, Handle, going_down, logind, plan::Graces, sequence::Times};
use seawall_quorum::timing::Timing;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    options::{Component, Machine, OnSigterm, duration},
    server::wait_for_signal,
    supervise::component,
};

/// How this machine goes down.
///
/// # Errors
/// Times that do not fit together, and signals that could do nothing.
pub fn handle(machine: &Machine, timing: &Timing) -> anyhow::Result<Arc<Handle>> {
    let options = &machine.options;
    let graces = match &options.shutdown_grace_period_by_pod_priority {
        Some(text) => Graces::by_priority(text, |time| duration(time).ok())?,
        None => Graces::new(timing.shutdown_grace, timing.shutdown_grace_critical)?,
    };
    if graces.is_off() && options.shutdown_on_sigterm == OnSigterm::Always {
        bail!(
            "--shutdown-on-sigterm is always, but pods have no time to leave: give --shutdown-grace-period, e.g. 30s, or \
             leave it at auto"
        );
    }
    let times = Times { settle: timing.shutdown_settle, proxies: timing.shutdown_proxies };
    Ok(Handle::new(shutdown::Config { graces, times, ..shutdown::Config::default() }))
}

/// Has logind hold shutdowns back.
pub fn hold_back(machine: &Machine, handle: &Arc<Handle>, stop: &CancellationToken) -> Option<JoinHandle<()>> {
    let handle = handle.clone();
    let runs = machine.runs(Component::Agent) && !handle.is_off();
    runs.then(|| component("logind", stop.clone(), move |stop| logind::run(handle.clone(), stop)))
}

/// After the signal to end: leads the pods out if that was meant. Another signal ends that. When they have left, the other
/// machines are told that this one ends, and not only its process.
pub async fn leave(machine: &Machine, handle: &Handle, gossip: Option<&Gossip>) {
    if handle.is_off() || !machine.runs(Component::Agent) {
        return;
    }
    let led = async {
        // If logind has said so, they are gone or on their way.
        let meant = handle.is_down()
            || match machine.options.shutdown_on_sigterm {
                OnSigterm::Always => true,
                OnSigterm::Never => false,
                OnSigterm::Auto => going_down::is_going_down(handle.config()).await,
            };
        if meant {
            tracing::info!("the machine goes down: pods leave before this process ends");
            handle.begin();
            if !handle.over().await {
                tracing::warn!("not all pods have left in time");
            }
            if let Some(gossip) = gossip {
                gossip.machine_ends();
            }
        }
    };
    tokio::select! {
        () = led => {}
        _ = wait_for_signal() => tracing::warn!("told to end once more: pods that are left stay as they are"),
    }
}
