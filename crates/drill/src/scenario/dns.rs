//! What clients of cluster DNS notice when machines are switched off.
//!
//! The clients are stub resolvers in the networks of nodes that stay: they ask the cluster's address, wait a second, and ask
//! once more, as `options timeout:1 attempts:2` has it (resolv.conf(5)).

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

use super::{
    Scenario, roles,
    run::{Say, Stage, looked, well},
};
use crate::{
    bench::dns::question,
    check::Verdict,
    connection::Target,
    history::{At, Class},
    lab::Lab,
    report::{Report, Times},
    traffic::{Client, PATIENT, Recorder, Site},
};

/// What is asked for, in turn.
const NAMES: [&str; 2] = ["kubernetes.default.svc.cluster.local", "kube-dns.kube-system.svc.cluster.local"];
/// How long an answer is waited for.
const TIMEOUT: Duration = Duration::from_secs(1);
/// How often it is asked at most.
const ATTEMPTS: u32 = 2;
const PACE: Duration = Duration::from_millis(10);
const BEFORE: Duration = Duration::from_secs(3);
const AFTER: Duration = Duration::from_secs(2);

/// The figure of these drills: the longest time between two answers that a client had.
pub(super) const STOPPED: &str = "look-ups stop";

/// A look-up that was not answered at once.
struct Delayed {
    client: Arc<str>,
    start: At,
    /// How many questions had no answer.
    lost: u32,
}

/// Carries the scenario out and reports.
pub async fn run(lab: &Lab, scenario: &Scenario<'_>, say: Say<'_>) -> anyhow::Result<Report> {
    well(lab).await.context("before the drill")?;
    let workers = roles::workers(lab);
    // The last one is whose power is cut.
    let stay = workers.get(..workers.len().saturating_sub(1)).unwrap_or_default();
    ensure!(!stay.is_empty(), "lab {} has {} agents: this drill needs two", lab.name(), workers.len());
    let target = Target::from_kubeconfig(&lab.kubeconfig())?;
    let targets: Vec<Target> = lab.servers().iter().map(|s| target.at(&s.address().to_string(), 6443)).collect();
    let address = service(&mut Client::new(targets.clone(), PATIENT)).await?;

    let (recorder, busy) = (Recorder::default(), CancellationToken::new());
    let delayed: Arc<Mutex<Vec<Delayed>>> = Arc::default();
    let (mut sites, mut clients) = (Vec::new(), Vec::new());
    for machine in stay {
        let site = Site::new(Some(machine.network()))?;
        let task = ask(machine.name().into(), address, recorder.clone(), delayed.clone(), busy.clone());
        clients.push(site.spawn(task));
        sites.push(site);
    }
    tokio::time::sleep(BEFORE).await;
    let mut stage = Stage::new(lab, targets, recorder.clone(), say);
    let done = stage.steps(scenario.steps).await;
    tokio::time::sleep(AFTER).await;
    busy.cancel();
    for client in clients {
        client.await.context("a client panicked")??;
    }
    stage.undo().await;
    done?;
    let end = recorder.now();
    tokio::task::spawn_blocking(move || drop(sites)).await?;

    let history = std::mem::take(&mut *recorder.history());
    let delayed = delayed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let total = history.requests.iter().filter(|request| request.error.is_none()).count();
    let most = |lost: u32| {
        let more = delayed.iter().filter(move |one| one.lost > lost);
        more.map(|one| format!("{}, {:.3} s: {} questions lost", one.client, one.start.as_secs_f64(), one.lost))
    };
    let mut verdicts = vec![
        Verdict {
            name: "every look-up was answered, with one retry at most",
            violations: most(1).collect(),
            looked_at: total,
        },
        // Their own node answers, and it stays.
        Verdict { name: "no question was lost", violations: most(0).collect(), looked_at: total },
    ];
    verdicts.push(looked(&verdicts));
    let fault = stage.marks.first().map_or(end, |(at, _)| *at);
    let times = Times { fault, end, marks: stage.marks };
    let mut report = Report::new(scenario.name, &history, &times, &verdicts, &[]);
    report.windows.clear();
    let target = scenario.targets.iter().find(|(name, _)| *name == STOPPED).map(|(_, limit)| *limit);
    for machine in stay {
        let own = history.requests.iter().filter(|r| r.error.is_none() && *r.client == *machine.name());
        let mut ends: Vec<At> = own.map(|request| request.end).collect();
        ends.sort_unstable();
        let stopped = ends.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(end);
        report.window(&format!("{STOPPED}, {}", machine.name()), stopped, target);
    }
    Ok(report)
}

/// Where pods ask.
async fn service(client: &mut Client) -> anyhow::Result<SocketAddr> {
    let none = "the lab has no cluster DNS: `seawall lab up` without `--disable dns` makes one that has";
    let body = client.insist("/api/v1/namespaces/kube-system/services/kube-dns").await.context(none)?;
    let service: Value = serde_json::from_slice(&body)?;
    let ip: IpAddr = service["spec"]["clusterIP"].as_str().unwrap_or_default().parse().context(none)?;
    Ok(SocketAddr::new(ip, 53))
}

/// Looks names up until `stop`.
async fn ask(
    name: Arc<str>,
    server: SocketAddr,
    recorder: Recorder,
    delayed: Arc<Mutex<Vec<Delayed>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let questions = NAMES.iter().map(|name| question(name, 1)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut number: u16 = 0;
    while !stop.is_cancelled() {
        let (start, mut lost) = (recorder.now(), 0);
        while lost < ATTEMPTS {
            number = number.wrapping_add(1);
            let mut question = questions[usize::from(number) % questions.len()].clone();
            question[..2].copy_from_slice(&number.to_be_bytes());
            let began = recorder.now();
            let answer = tokio::time::timeout(TIMEOUT, once(server, &question)).await;
            let error = match answer {
                Ok(Ok(())) => None,
                Ok(Err(error)) => {
                    // A refusal is as good as silence, to a resolver that has no other server to turn to.
                    tokio::time::sleep(PACE).await;
                    Some(format!("{error:#}"))
                }
                Err(_) => Some(format!("no answer in {} s", TIMEOUT.as_secs())),
            };
            let answered = error.is_none();
            recorder.request(&name, Class::Datagram, began, error);
            if answered {
                break;
            }
            lost += 1;
        }
        if lost > 0 {
            let mut delayed = delayed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            delayed.push(Delayed { client: name.clone(), start, lost });
        }
        tokio::time::sleep(PACE).await;
    }
    Ok(())
}

/// One question from a port of its own, as resolvers of programs do.
async fn once(server: SocketAddr, question: &[u8]) -> anyhow::Result<()> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = [0; 1500];
    let length = socket.recv(&mut answer).await?;
    answered(question, &answer[..length])
}

/// Whether an answer is one to this question, without an error and with an address.
fn answered(question: &[u8], answer: &[u8]) -> anyhow::Result<()> {
    ensure!(answer.len() >= 12 && answer[..2] == question[..2], "an answer to something else");
    let code = answer[3] & 0xf;
    ensure!(code == 0, "response code {code}");
    ensure!(answer[6..8] != [0, 0], "no address");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_as_an_answer() {
        let asked = question(NAMES[0], 1).unwrap();
        let mut good = asked.clone();
        good[7] = 1;
        answered(&asked, &good).unwrap();
        let with = |at: usize, byte: u8| {
            let mut answer = good.clone();
            answer[at] = byte;
            answered(&asked, &answer).unwrap_err().to_string()
        };
        assert_eq!(with(1, 9), "an answer to something else");
        assert_eq!(with(3, 2), "response code 2");
        assert_eq!(with(7, 0), "no address");
        assert!(answered(&asked, &good[..11]).is_err());
    }
}
