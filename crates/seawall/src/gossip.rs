//! This machine's member of the gossip, and `seawall gossip`.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use k8s_openapi::{
    ByteString,
    api::core::v1::{Node, Secret},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, PostParams},
};
use seawall_client::election::Gone;
use seawall_controllers::node_lifecycle::evidence::{self, AllEvidence, Evidence};
use seawall_network::{
    gossip::{
        Config, Gossip, Opinion, Opinions, Publish,
        cluster::{self, ACCEPTED, CURRENT, KEY, NAMESPACE, NEXT, PREVIOUS, SECRET},
        judge::Times,
        seal::ClusterKey,
    },
    verdict,
};
use seawall_quorum::timing::Timing;
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    files::Files,
    kubeconfig,
    options::{Component, Machine},
    supervise::component,
    token::Place,
};

/// How often the nodes are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long a node has to take a key in.
const PATIENCE: Duration = Duration::from_secs(60);
/// Servers that are no nodes do not say what they have taken in. They watch the same Secret.
const PAUSE: Duration = Duration::from_secs(3);

/// Commands of `seawall gossip`.
#[derive(Subcommand)]
pub enum Command {
    /// Replace the key with which machines tell each other which of them live, while everything runs.
    ///
    /// First everybody accepts the new key, then everybody uses it, then nobody accepts the old one; each step waits for
    /// all nodes. It can be interrupted, and goes on where it was when it is run again.
    RotateKey {
        /// Go on although this node does not take the key in: it is away, and reads the new one when it is back. May be
        /// repeated.
        #[arg(long, value_name = "NAME")]
        even_without: Vec<String>,
        #[command(flatten)]
        place: Place,
    },
}

/// Runs a command.
///
/// # Errors
/// What went wrong, with the way out.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::RotateKey { even_without, place } => {
            let admin = kubeconfig::admin(&place.data_dir).await?;
            rotate(&admin.client, &even_without).await
        }
    }
}

type Data = BTreeMap<String, ByteString>;

/// What comes next on the way from one key to another.
#[derive(Debug, PartialEq)]
enum Step {
    /// Nothing has begun: there is to be another key.
    Begin,
    /// Everybody has to accept this key before it is used.
    Use(ClusterKey),
    /// Everybody has to use this key before the old one is dropped.
    Drop(ClusterKey),
}

fn step(data: &Data) -> anyhow::Result<Step> {
    let key = |name: &str| data.get(name).and_then(|bytes| ClusterKey::new(&bytes.0));
    let current = key(CURRENT).with_context(|| {
        format!(
            "Secret {NAMESPACE}/{SECRET} has no key {CURRENT:?} of 32 bytes: delete it, and a server makes a new one"
        )
    })?;
    Ok(match (key(NEXT), key(PREVIOUS)) {
        (Some(next), _) => Step::Use(next),
        (None, Some(_)) => Step::Drop(current),
        (None, None) => Step::Begin,
    })
}

fn after(data: &Data, step: &Step, fresh: &ClusterKey) -> Data {
    let mut data = data.clone();
    match step {
        Step::Begin => drop(data.insert(NEXT.into(), ByteString(fresh.bytes().to_vec()))),
        Step::Use(_) => {
            for (from, to) in [(CURRENT, PREVIOUS), (NEXT, CURRENT)] {
                if let Some(key) = data.remove(from) {
                    data.insert(to.into(), key);
                }
            }
        }
        Step::Drop(_) => drop(data.remove(PREVIOUS)),
    }
    data
}

/// The nodes that have not done what the step waits for.
fn missing<'a>(nodes: &'a [Node], step: &Step, without: &[String]) -> Vec<&'a str> {
    let done = |node: &Node| {
        let names = node.annotations().get(ACCEPTED).map(String::as_str).unwrap_or_default();
        match step {
            Step::Begin => true,
            Step::Use(key) => names.split(',').any(|name| name == key.name()),
            Step::Drop(key) => names.split(',').next() == Some(&key.name()),
        }
    };
    let members = nodes.iter().filter(|node| node.annotations().contains_key(KEY) && !done(node));
    let names = members.filter_map(|node| node.metadata.name.as_deref());
    names.filter(|name| !without.iter().any(|other| other == name)).collect()
}

/// Refuses names that no node has: they are mistyped, most likely.
fn known(nodes: &[Node], without: &[String]) -> anyhow::Result<()> {
    let names: Vec<&str> = nodes.iter().filter_map(|node| node.metadata.name.as_deref()).collect();
    match without.iter().find(|name| !names.contains(&name.as_str())) {
        Some(name) => bail!("--even-without {name}: there is no such node; there are: {}", names.join(", ")),
        None => Ok(()),
    }
}

async fn rotate(client: &Client, without: &[String]) -> anyhow::Result<()> {
    let secrets = Api::<Secret>::namespaced(client.clone(), NAMESPACE);
    let nodes = Api::<Node>::all(client.clone());
    loop {
        let unread = || {
            format!(
                "Secret {NAMESPACE}/{SECRET} cannot be read: does the server of this machine run, and does it take part in \
                 the gossip (--disable)?"
            )
        };
        let mut secret = secrets.get(SECRET).await.with_context(unread)?;
        let data = secret.data.take().unwrap_or_default();
        let step = step(&data)?;
        let begun = Instant::now();
        loop {
            let list = nodes.list(&ListParams::default()).await.context("the nodes cannot be listed")?;
            known(&list.items, without)?;
            let missing = missing(&list.items, &step, without);
            if missing.is_empty() {
                break;
            }
            if begun.elapsed() > PATIENCE {
                bail!(
                    "these nodes have not taken the key in within {PATIENCE:?}: {}. Run the command again when they are \
                     there, or with --even-without NAME",
                    missing.join(", ")
                );
            }
            tokio::time::sleep(LOOK).await;
        }
        if step != Step::Begin {
            tokio::time::sleep(PAUSE).await;
        }
        let fresh = ClusterKey::random().map_err(|_| anyhow::anyhow!("the system has no randomness"))?;
        secret.data = Some(after(&data, &step, &fresh));
        match secrets.replace(SECRET, &PostParams::default(), &secret).await {
            // A server has written itself in meanwhile.
            Err(kube::Error::Api(status)) if status.code == 409 => continue,
            replaced => replaced.with_context(|| format!("the key in Secret {NAMESPACE}/{SECRET} was not replaced"))?,
        };
        match step {
            Step::Begin => println!("{} is to be accepted by all", fresh.name()),
            Step::Use(key) => println!("{} is used from now on", key.name()),
            Step::Drop(key) => {
                println!("{} is the only key", key.name());
                return Ok(());
            }
        }
    }
}

/// Makes this machine's member, unless it is to have none.
///
/// # Errors
/// If its files cannot be read or written.
pub fn member(machine: &Machine, timing: &Timing) -> anyhow::Result<Option<Gossip>> {
    if !machine.runs(Component::Gossip) {
        return Ok(None);
    }
    let config = Config {
        name: machine.name.clone(),
        address: SocketAddr::new(machine.ip, machine.options.gossip_port),
        directory: Files::new(&machine.options.data_dir).gossip(),
        times: Times::of(timing),
        publish: if machine.runs(Component::Agent) { Publish::Node } else { Publish::Secret },
    };
    let gossip = Gossip::open(config)?;
    let counted = gossip.clone();
    machine.metrics.add("gossip", move || counted.render());
    Ok(Some(gossip))
}

/// Runs it. What it knows of the cluster it learns through `client`.
pub fn start(gossip: &Gossip, client: &Client, stop: &CancellationToken) -> JoinHandle<()> {
    let (gossip, client) = (gossip.clone(), client.clone());
    component("gossip", stop.clone(), move |stop| {
        let (gossip, client) = (gossip.clone(), client.clone());
        async move { gossip.run(client, stop).await }
    })
}

/// What the machines think of each other, for those who act on a node. Without a gossip nobody says anything.
pub fn verdicts(gossip: Option<&Gossip>) -> verdict::Receiver {
    gossip.map_or_else(verdict::none, Gossip::verdicts)
}

/// The same with how many say so, for the controllers.
pub fn evidence(gossip: &Gossip, stop: &CancellationToken) -> watch::Receiver<AllEvidence> {
    let (told, heard) = watch::channel(AllEvidence::default());
    let (mut opinions, stop) = (gossip.opinions(), stop.clone());
    tokio::spawn(stop.run_until_cancelled_owned(async move {
        loop {
            let all = as_evidence(&opinions.borrow_and_update());
            if told.send(Arc::new(all)).is_err() || opinions.changed().await.is_err() {
                return;
            }
        }
    }));
    heard
}

fn as_evidence(opinions: &Opinions) -> BTreeMap<String, Evidence> {
    // We are a member, and have no opinion of ourselves.
    let members = opinions.len() + usize::from(!opinions.is_empty());
    let one = |opinion: &Opinion| Evidence {
        verdict: match opinion.verdict {
            verdict::Verdict::Alive => evidence::Verdict::Alive,
            verdict::Verdict::Suspect => evidence::Verdict::Suspect,
            verdict::Verdict::Dead => evidence::Verdict::Dead,
        },
        accusers: opinion.accusers,
        members,
    };
    opinions.iter().map(|(name, opinion)| (name.clone(), one(opinion))).collect()
}

/// Whether the machine of a candidate is dead, by the word of enough others. A candidate's identity is its machine's name
/// and a life of its server.
pub fn gone(gossip: &Gossip) -> Gone {
    let opinions = gossip.opinions();
    Arc::new(move |identity: &str| {
        let machine = identity.rsplit_once('_').map_or(identity, |(machine, _)| machine);
        as_evidence(&opinions.borrow()).get(machine).is_some_and(Evidence::is_conclusive)
    })
}

/// Sees to it, on a server, that the cluster has a key.
pub fn keep_key(gossip: &Gossip, client: &Client, stop: &CancellationToken) -> JoinHandle<()> {
    let (gossip, client) = (gossip.clone(), client.clone());
    component("gossip key", stop.clone(), move |stop| {
        let (gossip, client) = (gossip.clone(), client.clone());
        async move { cluster::keep_key(client, || gossip.keys(), stop).await }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn from_one_key_to_another() {
        let keys: Vec<ClusterKey> = (1..4).filter_map(|n| ClusterKey::new(&[n; 32])).collect();
        let bytes = |n: usize| ByteString(keys[n].bytes().to_vec());
        let start: Data = [(CURRENT.to_owned(), bytes(0)), ("member.s".to_owned(), ByteString(b"x".to_vec()))].into();
        let mut data = start.clone();
        let mut seen = Vec::new();
        for _ in 0..3 {
            let step = step(&data).unwrap();
            data = after(&data, &step, &keys[1]);
            seen.push(step);
        }
        assert_eq!(seen, [Step::Begin, Step::Use(keys[1].clone()), Step::Drop(keys[1].clone())]);
        let mut end = start;
        end.insert(CURRENT.into(), bytes(1));
        assert_eq!(data, end);
        assert!(step(&Data::new()).unwrap_err().to_string().contains("has no key \"current\""));
    }

    #[test]
    fn every_node_is_waited_for() {
        let keys: Vec<ClusterKey> = (1..3).filter_map(|n| ClusterKey::new(&[n; 32])).collect();
        let (old, new) = (keys[0].name(), keys[1].name());
        let node = |name: &str, accepted: &str| -> Node {
            let annotations = json!({KEY: "k", ACCEPTED: accepted});
            serde_json::from_value(json!({"metadata": {"name": name, "annotations": annotations}})).unwrap()
        };
        let stranger: Node = serde_json::from_value(json!({"metadata": {"name": "no-member"}})).unwrap();
        let nodes = [
            node("neither", &old),
            node("accepts", &format!("{old},{new}")),
            node("uses", &format!("{new},{old}")),
            stranger,
        ];
        let check = |step: Step, without: &[&str], expect: &[&str]| {
            let without: Vec<String> = without.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(missing(&nodes, &step, &without), expect);
        };
        check(Step::Begin, &[], &[]);
        check(Step::Use(keys[1].clone()), &[], &["neither"]);
        check(Step::Use(keys[1].clone()), &["neither"], &[]);
        check(Step::Drop(keys[1].clone()), &[], &["neither", "accepts"]);
        assert!(known(&nodes, &["uses".into(), "no-member".into()]).is_ok());
        let error = known(&nodes, &["uses".into(), "user".into()]).unwrap_err().to_string();
        assert_eq!(error, "--even-without user: there is no such node; there are: neither, accepts, uses, no-member");
    }

    #[test]
    fn nodes_may_read_the_secret_that_is_used() {
        assert_eq!(seawall_server::auth::node::GOSSIP, (NAMESPACE, SECRET));
    }
}
