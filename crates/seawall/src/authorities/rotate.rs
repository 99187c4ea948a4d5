//! `seawall certs rotate-ca`: leads everybody from one authority to the next.
//!
//! It keeps nothing to itself: the phase stands in the Secret, and who has reached it is asked of the machines' reports.
//! So it can be interrupted at any moment, and run again on any server.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::{
        coordination::v1::Lease,
        core::v1::{ConfigMap, Namespace, Node, Secret},
        discovery::v1::EndpointSlice,
    },
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, ObjectMeta, PostParams},
};
use seawall_server::{pki::Authority, presence};
use tokio::time::Instant;

use super::{Authorities, NAMESPACE, Phase, REPORT, Report, SECRET, TYPE};
use crate::{files::Files, kubeconfig, token::Place};

/// How often the machines are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long one look may take.
const ONE: Duration = Duration::from_secs(10);
/// How long the API may be away.
const GRACE: Duration = Duration::from_secs(15);
/// A node renews its Lease every ten seconds. One that has not for so long, by a clock that need not be ours, is watched.
const STALE: Duration = Duration::from_secs(25);
/// A machine whose Lease does not move for so long, while it is watched, is away.
const SILENT: Duration = Duration::from_secs(15);

/// What the command's help says.
pub const HELP: &str = "Replace the cluster's certificate authority while everything runs.

Three phases, each of which every machine has to reach before the next one begins:
  trust  everybody trusts the new authority beside the old one (also pods: kube-root-ca.crt in every namespace)
  sign   the new one signs: servers, nodes and the administrator's kubeconfig on every server get new certificates
  drop   the old one is trusted no more

It can be interrupted, and goes on where it was when it is run again, on any server. It refuses to go on while a server \
or node is away, since that one would miss what it needs to know. With --even-without NAME it does so all the same: a \
server catches up when it comes back, a node that comes back after the last phase has to join again with a new token.

With the old authority end all certificates that it signed: kubeconfigs that were handed out (`seawall kubeconfig` prints \
new ones), those that people asked for with a CertificateSigningRequest, and tokens for joining. Until then they work. Pods \
that read ca.crt only when they start have to be started again before the last phase: --until sign stops in time for that.

etcd has an authority of its own, which only servers use. It is not replaced.";

/// Options of `seawall certs rotate-ca`.
#[derive(clap::Args)]
pub struct Args {
    /// Go on although this server or node is away. May be repeated.
    #[arg(long, value_name = "NAME")]
    even_without: Vec<String>,
    /// Stop when everybody has reached this phase. Run the command again to go on.
    #[arg(long, value_enum, default_value = "drop")]
    until: Phase,
    #[command(flatten)]
    place: Place,
}

/// A server or node.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    name: String,
    /// Why it may be away.
    doubt: Option<&'static str>,
    /// The version of its Lease.
    beat: String,
    /// Why it is away.
    away: Option<&'static str>,
    report: Report,
}

/// Finds out who is away without trusting anybody's clock.
#[derive(Default)]
struct Watch(BTreeMap<String, Seen>);

struct Seen {
    beat: String,
    since: Instant,
    /// It has moved while it was watched.
    moved: bool,
}

impl Watch {
    /// Says of the machines that are in doubt which are away; whether all of them are decided.
    fn judge(&mut self, now: Instant, machines: &mut [Machine]) -> bool {
        let mut decided = true;
        for machine in machines {
            let first = || Seen { beat: machine.beat.clone(), since: now, moved: false };
            let seen = self.0.entry(machine.name.clone()).or_insert_with(first);
            if seen.beat != machine.beat || machine.doubt.is_none() {
                *seen = Seen { beat: machine.beat.clone(), since: now, moved: machine.doubt.is_some() };
            }
            let silent = now.saturating_duration_since(seen.since) >= SILENT;
            machine.away = machine.doubt.filter(|_| silent);
            // If it moves, the doubt was one of clocks.
            decided &= silent || seen.moved || machine.doubt.is_none();
        }
        decided
    }
}

/// Who keeps a phase from being complete.
#[derive(Debug, Default, PartialEq, Eq)]
struct Missing {
    late: BTreeSet<String>,
    away: BTreeMap<String, &'static str>,
}

/// Whether a machine does what all do that have reached a phase.
fn has_reached(report: &Report, goal: &Report, phase: Phase) -> bool {
    // A certificate that it has not got yet is not one of the old authority.
    let shows: BTreeSet<&String> = report.shows.iter().filter(|hash| *hash != "none").collect();
    report.trusts == goal.trusts && (phase == Phase::Trust || shows.iter().all(|hash| goal.shows.contains(*hash)))
}

/// Who has not reached a phase. One that has is waited for no more, wherever it is.
fn missing(machines: &[Machine], goal: &Report, phase: Phase, without: &[String]) -> Missing {
    let mut found = Missing::default();
    for machine in machines.iter().filter(|m| !has_reached(&m.report, goal, phase)) {
        match machine.away {
            Some(_) if without.contains(&machine.name) => {}
            Some(why) => drop(found.away.insert(machine.name.clone(), why)),
            None => drop(found.late.insert(machine.name.clone())),
        }
    }
    found
}

fn refuse_away(away: &BTreeMap<String, &'static str>) -> anyhow::Result<()> {
    let Some(first) = away.keys().next() else { return Ok(()) };
    let list: Vec<String> = away.iter().map(|(name, why)| format!("{name} ({why})")).collect();
    bail!(
        "these machines are away, and would not learn of the new authority: {}. Run this again when they are back, or delete \
         what is gone for good (kubectl delete node, seawall member remove), or go on with --even-without {first}: a server \
         catches up by itself, a node may have to join again",
        list.join(", ")
    )
}

/// What there is to be seen of the cluster.
struct Look {
    machines: Vec<Machine>,
    /// The authorities in the namespaces where there are any, or should be.
    namespaces: BTreeMap<String, Option<String>>,
}

async fn look(client: &Client) -> anyhow::Result<Look> {
    let all = ListParams::default();
    let of_servers = ListParams::default().labels("apiserver.kubernetes.io/identity=kube-apiserver");
    let of_api = ListParams::default().labels("kubernetes.io/service-name=kubernetes");
    let roots = ListParams::default().fields("metadata.name=kube-root-ca.crt");
    let leases_api = Api::<Lease>::namespaced(client.clone(), NAMESPACE);
    let slices_api = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    let (nodes_api, namespaces_api) = (Api::<Node>::all(client.clone()), Api::<Namespace>::all(client.clone()));
    let roots_api = Api::<ConfigMap>::all(client.clone());
    let beats_api = Api::<Lease>::namespaced(client.clone(), "kube-node-lease");
    let (leases, beats, slices, nodes, namespaces, roots) = tokio::try_join!(
        leases_api.list(&of_servers),
        beats_api.list(&all),
        slices_api.list(&of_api),
        nodes_api.list(&all),
        namespaces_api.list(&all),
        roots_api.list(&roots),
    )?;
    let serving: BTreeSet<String> = slices
        .iter()
        .flat_map(|slice| slice.endpoints.iter().flatten())
        .flat_map(|endpoint| endpoint.addresses.iter().cloned())
        .collect();
    let report = |annotations: &BTreeMap<String, String>| -> Report {
        annotations.get(REPORT).and_then(|text| text.parse().ok()).unwrap_or_default()
    };
    let stale = |lease: &Lease| {
        let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref()).map(|time| time.0);
        renewed.is_none_or(|at| Timestamp::now().duration_since(at).unsigned_abs() > STALE)
    };
    let mut machines = BTreeMap::new();
    for node in nodes {
        let name = node.name_any();
        let lease = beats.iter().find(|lease| lease.name_any() == name);
        let machine = Machine {
            doubt: lease.is_none_or(stale).then_some("its node does not renew its Lease"),
            beat: lease.and_then(|lease| lease.metadata.resource_version.clone()).unwrap_or_default(),
            away: None,
            report: report(node.annotations()),
            name: name.clone(),
        };
        machines.insert(name, machine);
    }
    // A server speaks for its node, which is a part of it.
    for lease in leases {
        let name = lease.name_any().trim_start_matches("apiserver-").to_owned();
        let address = lease.annotations().get(presence::ADDRESS).cloned().unwrap_or_default();
        let ip = address.parse::<std::net::SocketAddr>().map(|a| a.ip().to_string()).unwrap_or_default();
        let machine = Machine {
            doubt: (!serving.contains(&ip)).then_some("its server does not renew its Lease"),
            beat: lease.metadata.resource_version.clone().unwrap_or_default(),
            away: None,
            report: report(lease.annotations()),
            name: name.clone(),
        };
        machines.insert(name, machine);
    }
    let going = |namespace: &Namespace| namespace.metadata.deletion_timestamp.is_some();
    let mut found: BTreeMap<String, Option<String>> =
        namespaces.iter().filter(|n| !going(n)).map(|n| (n.name_any(), None)).collect();
    for map in roots {
        if let Some(place) = found.get_mut(&map.namespace().unwrap_or_default()) {
            *place = map.data.and_then(|mut data| data.remove("ca.crt"));
        }
    }
    Ok(Look { machines: machines.into_values().collect(), namespaces: found })
}

/// Runs the command.
///
/// # Errors
/// If a machine is away, or the API does not answer.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    let mut state = match read(args).await? {
        Some(state) if state.next.is_some() => {
            println!("a rotation that was begun earlier goes on");
            state
        }
        found => {
            let before = match found {
                Some(state) => state,
                None => on_disk(args)?,
            };
            check(args).await?;
            write(args, &before.begin()?).await?
        }
    };
    while let Some(phase) = state.next.as_ref().map(|next| next.phase) {
        println!("{phase}: {}", what_happens(phase));
        wait(args, &state, phase).await?;
        if phase == args.until && phase != Phase::Drop {
            println!("everybody has reached this phase. Run seawall certs rotate-ca again to go on");
            return Ok(());
        }
        state = write(args, &state.advanced()).await?;
    }
    println!(
        "the cluster has a new certificate authority. Kubeconfigs from before are of no use any more: seawall kubeconfig \
         prints a new one"
    );
    Ok(())
}

/// Refuses if a machine is away before anything has begun.
async fn check(args: &Args) -> anyhow::Result<()> {
    let admin = kubeconfig::admin(&args.place.data_dir).await?;
    let (mut watch, mut said) = (Watch::default(), false);
    loop {
        let seen = tokio::time::timeout(ONE, look(&admin.client)).await.context("the API does not answer")?;
        let mut machines = seen?.machines;
        let known: Vec<&str> = machines.iter().map(|m| m.name.as_str()).collect();
        if let Some(name) = args.even_without.iter().find(|name| !known.contains(&name.as_str())) {
            bail!("--even-without {name}: there is no such server or node; there are: {}", known.join(", "));
        }
        if watch.judge(Instant::now(), &mut machines) {
            let none = Report { trusts: ["nobody".to_owned()].into(), shows: BTreeSet::new() };
            return refuse_away(&missing(&machines, &none, Phase::Trust, &args.even_without).away);
        }
        if !std::mem::replace(&mut said, true) {
            let doubtful: Vec<&str> = machines.iter().filter(|m| m.doubt.is_some()).map(|m| m.name.as_str()).collect();
            println!("sees whether {} is there", doubtful.join(", "));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn what_happens(phase: Phase) -> &'static str {
    match phase {
        Phase::Trust => "everybody learns to trust the new authority beside the old one",
        Phase::Sign => "the new authority signs, and everybody gets new certificates",
        Phase::Drop => "the old authority is trusted no more",
    }
}

/// Waits until everybody has reached the phase.
async fn wait(args: &Args, state: &Authorities, phase: Phase) -> anyhow::Result<()> {
    let (goal, bundle) = (state.report()?, state.bundle());
    let (mut said, mut watch, mut failing_since) = (String::new(), Watch::default(), None);
    loop {
        // The kubeconfig is another one after the second phase.
        let looked = async { look(&kubeconfig::admin(&args.place.data_dir).await?.client).await };
        match tokio::time::timeout(ONE, looked).await.context("the API does not answer").flatten() {
            Ok(mut seen) => {
                failing_since = None;
                watch.judge(Instant::now(), &mut seen.machines);
                let missing = missing(&seen.machines, &goal, phase, &args.even_without);
                let mut late: Vec<String> = missing.late.iter().chain(missing.away.keys()).cloned().collect();
                let behind = seen.namespaces.iter().filter(|(_, found)| found.as_ref() != Some(&bundle));
                match behind.clone().count() {
                    0 => {}
                    n => late.push(format!(
                        "kube-root-ca.crt in {n} of {} namespaces ({}…)",
                        seen.namespaces.len(),
                        behind.clone().next().map_or("", |(name, _)| name)
                    )),
                }
                if late.is_empty() {
                    println!("  done by all {} machines", seen.machines.len());
                    return Ok(());
                }
                if late.join(", ") != said {
                    said = late.join(", ");
                    println!("  waits for {said}");
                }
                refuse_away(&missing.away)?;
            }
            Err(error) => {
                let since = *failing_since.get_or_insert_with(Instant::now);
                if since.elapsed() > GRACE {
                    return Err(error.context("the rotation stopped; run this again to go on"));
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn on_disk(args: &Args) -> anyhow::Result<Authorities> {
    let files = Files::new(&args.place.data_dir);
    match files.read_authorities()? {
        Some(authorities) => Ok(authorities),
        None => Ok(Authorities::one(&Authority::open_existing(&files.tls())?)),
    }
}

async fn read(args: &Args) -> anyhow::Result<Option<Authorities>> {
    let admin = kubeconfig::admin(&args.place.data_dir).await?;
    let secrets = Api::<Secret>::namespaced(admin.client, NAMESPACE);
    let found = secrets.get_opt(SECRET).await.with_context(|| format!("the Secret {NAMESPACE}/{SECRET}"))?;
    found.map(|secret| Authorities::of_secret(&serde_json::to_value(secret)?)).transpose()
}

/// Writes the Secret, unless somebody else has since; gives what stands there then.
async fn write(args: &Args, state: &Authorities) -> anyhow::Result<Authorities> {
    let data: BTreeMap<String, ByteString> =
        state.data().into_iter().map(|(key, text)| (key, ByteString(text.into_bytes()))).collect();
    let deadline = Instant::now() + GRACE;
    loop {
        let admin = kubeconfig::admin(&args.place.data_dir).await?;
        let secrets = Api::<Secret>::namespaced(admin.client, NAMESPACE);
        let revision = (state.revision > 0).then(|| state.revision.to_string());
        let metadata =
            ObjectMeta { name: Some(SECRET.into()), resource_version: revision.clone(), ..Default::default() };
        let secret = Secret { metadata, type_: Some(TYPE.into()), data: Some(data.clone()), ..Default::default() };
        let written = match revision {
            Some(_) => secrets.replace(SECRET, &PostParams::default(), &secret).await,
            None => secrets.create(&PostParams::default(), &secret).await,
        };
        match written {
            Ok(secret) => return Authorities::of_secret(&serde_json::to_value(secret)?),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                return read(args).await?.context("the Secret was deleted while the rotation went on: run this again");
            }
            Err(error) if Instant::now() > deadline => {
                return Err(error).context("the next phase cannot be written down");
            }
            // The server's certificates, or ours, may just have been exchanged.
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(name: &str, away: bool, report: &str) -> Machine {
        let why = away.then_some("gone");
        Machine { name: name.into(), doubt: why, beat: "1".into(), away: why, report: report.parse().unwrap() }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_silent_is_away() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        let mut check = |seconds: u64, beat: &str, doubt: bool, decided: bool, away: bool| {
            let mut all = [Machine { beat: beat.into(), away: None, ..machine("a", doubt, "") }];
            assert_eq!(watch.judge(start + Duration::from_secs(seconds), &mut all), decided, "after {seconds} s");
            assert_eq!(all[0].away.is_some(), away, "after {seconds} s");
        };
        check(0, "1", true, false, false);
        check(14, "1", true, false, false);
        check(15, "1", true, true, true);
        // Only its clock is wrong.
        check(16, "2", true, true, false);
        check(25, "3", true, true, false);
        check(39, "3", true, true, false);
        check(41, "3", false, true, false);
        check(50, "3", true, false, false);
        check(56, "3", true, true, true);
    }

    #[test]
    fn who_keeps_a_phase_from_being_complete() {
        let check = |phase: Phase, goal: &str, report: &str, expect: bool| {
            let goal = goal.parse().unwrap();
            let found = missing(&[machine("a", false, report)], &goal, phase, &[]);
            assert_eq!(found.late.is_empty(), expect, "{phase}: {report}");
            assert!(found.away.is_empty());
        };
        let trust = "trusts=n,o shows=o";
        check(Phase::Trust, trust, "", false);
        check(Phase::Trust, trust, "trusts=o shows=o", false);
        check(Phase::Trust, trust, "trusts=n shows=n", false);
        check(Phase::Trust, trust, "trusts=o,n shows=o", true);
        check(Phase::Trust, trust, "trusts=n,o shows=n", true);
        check(Phase::Trust, trust, "trusts=n,o shows=another", true);
        let sign = "trusts=n,o shows=n";
        check(Phase::Sign, sign, "trusts=n,o shows=o", false);
        check(Phase::Sign, sign, "trusts=n,o shows=n,o", false);
        check(Phase::Sign, sign, "trusts=n,o shows=n,another", false);
        check(Phase::Sign, sign, "trusts=n,o shows=n,none", true);
        check(Phase::Sign, sign, "trusts=n,o shows=n", true);
        let last = "trusts=n shows=n";
        check(Phase::Drop, last, "trusts=n,o shows=n", false);
        check(Phase::Drop, last, "trusts=n shows=n", true);
    }

    #[test]
    fn who_is_away_is_not_gone_on_without() {
        let goal = "trusts=n,o shows=o".parse().unwrap();
        let all = [machine("a", true, ""), machine("b", true, "trusts=n,o shows=o"), machine("c", false, "")];
        let found = missing(&all, &goal, Phase::Trust, &[]);
        assert_eq!(found.away.keys().collect::<Vec<_>>(), ["a"], "b has reached it before it went");
        assert_eq!(found.late.iter().collect::<Vec<_>>(), ["c"]);
        let error = refuse_away(&found.away).unwrap_err().to_string();
        assert!(error.contains("a (gone)") && error.contains("--even-without a"), "{error}");
        // What is there is waited for all the same.
        let found = missing(&all, &goal, Phase::Trust, &["a".into(), "c".into()]);
        assert!(found.away.is_empty() && found.late.len() == 1);
        assert!(refuse_away(&found.away).is_ok());
    }
}
