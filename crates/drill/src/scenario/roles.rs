//! Who leads what at the moment.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::Who;
use crate::{
    connection::Target,
    lab::{Lab, Machine, Power, Role},
    traffic::Site,
};

/// Where each server's etcd tells its figures, on its own machine.
const METRICS: &str = "127.0.0.1:2381";
/// The Lease of the controllers.
const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/kube-controller-manager";
const PATIENCE: Duration = Duration::from_secs(2);

/// The machines that are meant.
pub async fn find(who: Who, lab: &Lab, targets: &[Target], same: &[Machine]) -> anyhow::Result<Vec<Machine>> {
    let servers = lab.servers();
    Ok(match who {
        Who::Same => same.to_vec(),
        Who::AllServers => servers,
        Who::Worker => workers(lab).last().cloned().into_iter().collect(),
        Who::Workers => workers(lab),
        Who::EtcdLeader => vec![etcd_leader(lab).await?],
        Who::ControllersLeader => vec![controllers_leader(lab, targets).await?],
        Who::Follower => {
            let leaders = [etcd_leader(lab).await?, controllers_leader(lab, targets).await?];
            let free = servers.into_iter().find(|s| leaders.iter().all(|l| l.name() != s.name()));
            vec![free.context("no server leads nothing: this scenario needs three servers")?]
        }
        Who::Two => {
            let mut two = vec![etcd_leader(lab).await?, controllers_leader(lab, targets).await?];
            two.extend(servers);
            let mut names = Vec::new();
            two.retain(|m| {
                !names.contains(&m.name().to_owned()) && {
                    names.push(m.name().to_owned());
                    true
                }
            });
            two.truncate(2);
            two
        }
    })
}

/// The machines that run nothing but pods.
pub fn workers(lab: &Lab) -> Vec<Machine> {
    lab.machines().into_iter().filter(|m| m.role() == Role::Agent).collect()
}

async fn etcd_leader(lab: &Lab) -> anyhow::Result<Machine> {
    for server in lab.servers() {
        if server.power()? == Power::On && metrics(server.network()).await.is_ok_and(|m| leads(&m)) {
            return Ok(server);
        }
    }
    bail!("no server's member says that it leads etcd: is the lab's store etcd? (seawall lab up)")
}

/// Whether every server that has power has a voting member of etcd that knows its leader.
pub async fn members_are_well(lab: &Lab) -> anyhow::Result<bool> {
    for server in lab.servers() {
        if server.power()? == Power::On && !metrics(server.network()).await.is_ok_and(|m| votes(&m)) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn votes(metrics: &str) -> bool {
    let says = |wanted: &str| metrics.lines().any(|line| line == wanted);
    says("etcd_server_has_leader 1") && !says("etcd_server_is_learner 1")
}

fn leads(metrics: &str) -> bool {
    metrics.lines().any(|line| line == "etcd_server_is_leader 1")
}

async fn metrics(network: PathBuf) -> anyhow::Result<String> {
    let site = tokio::task::spawn_blocking(move || Site::new(Some(network))).await??;
    let answer = site.spawn(tokio::time::timeout(PATIENCE, async {
        let stream = TcpStream::connect(METRICS).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::get("/metrics").header("host", METRICS).body(Empty::<Bytes>::new())?;
        let body = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
        Ok(String::from_utf8_lossy(&body).into_owned())
    }));
    let answer = answer.await?;
    tokio::task::spawn_blocking(move || drop(site)).await?;
    answer?
}

/// The machine whose controllers act, as their Lease says.
pub async fn controllers_leader(lab: &Lab, targets: &[Target]) -> anyhow::Result<Machine> {
    let holder = holder(targets).await?;
    // A candidate is a machine's name and a life of its server.
    let name = holder.rsplit_once('_').map_or(holder.as_str(), |(name, _)| name);
    Ok(lab.machine(name)?)
}

async fn holder(targets: &[Target]) -> anyhow::Result<String> {
    let mut said = anyhow::anyhow!("there is no server to ask");
    for target in targets {
        let answer = tokio::time::timeout(PATIENCE, async {
            target.connect().await?.expect(Method::GET, LEASE, Bytes::new()).await
        });
        match answer.await {
            Ok(Ok(body)) => {
                let lease: Value = serde_json::from_slice(&body)?;
                return Ok(lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned());
            }
            Ok(Err(error)) => said = error,
            Err(_) => said = anyhow::anyhow!("{} does not answer", target.address()),
        }
    }
    Err(said.context("who leads the controllers?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leader_says_so() {
        assert!(leads("# TYPE etcd_server_is_leader gauge\netcd_server_is_leader 1\n"));
        assert!(votes("etcd_server_has_leader 1\netcd_server_is_learner 0\n"));
        assert!(!votes("etcd_server_has_leader 1\netcd_server_is_learner 1\n"));
        assert!(!votes("etcd_server_has_leader 0\n"));
        assert!(!leads("etcd_server_is_leader 0\netcd_server_is_leader_sometimes 1\n"));
    }
}
