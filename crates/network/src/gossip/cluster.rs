//! What the gossip learns from the API, and what it says there.
//!
//! Members are the Nodes that say in an annotation what their public key is, which only they may write (NodeRestriction).
//! The cluster's keys stand in one Secret, which nodes may read; servers that are no nodes write themselves in there.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures::StreamExt as _;
use k8s_openapi::{
    ByteString,
    api::core::v1::{Node, Secret},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use seawall_client::watch::Backoff;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Publish, Shared,
    roster::{Disk, Entry, Roster},
    seal::{ClusterKey, Keyring},
};

/// Where a Node says what its member's public key is.
pub const KEY: &str = "seawall.dev/gossip-key";
/// Where it says which of the cluster's keys it accepts.
pub const ACCEPTED: &str = "seawall.dev/gossip-cluster-keys";
/// The Secret with the cluster's keys.
pub const SECRET: &str = "seawall-gossip";
/// Where it is.
pub const NAMESPACE: &str = "kube-system";
/// What kind of Secret it is.
pub const TYPE: &str = "seawall.dev/gossip";
/// The key that is sealed with.
pub const CURRENT: &str = "current";
/// The key that will be.
pub const NEXT: &str = "next";
/// The key that was.
pub const PREVIOUS: &str = "previous";
/// Before the name of a server that is no node.
const MEMBER: &str = "member.";
/// How long after a failure it is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// How often it is looked whether the Secret is there.
const LOOK: Duration = Duration::from_secs(30);

/// What a Node says about its member.
pub fn entry(node: &Node) -> Option<Entry> {
    let key = node.annotations().get(KEY)?.clone();
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    let mut internal = addresses.iter().filter(|address| address.type_ == "InternalIP");
    let ip: IpAddr = internal.find_map(|address| address.address.parse().ok())?;
    let entry = Entry { ip, key };
    entry.public().map(|_| entry)
}

/// The keys in the Secret: the first is sealed with.
pub fn keyring(secret: &Secret) -> Keyring {
    let read = |name: &str| ClusterKey::new(&secret.data.as_ref()?.get(name)?.0);
    Keyring { keys: [CURRENT, NEXT, PREVIOUS].into_iter().filter_map(read).collect() }
}

/// The servers that have written themselves into the Secret.
pub fn servers(secret: &Secret) -> Roster {
    let all = secret.data.iter().flatten();
    let members = all.filter_map(|(name, value)| {
        let entry: Entry = serde_json::from_slice(&value.0).ok()?;
        Some((name.strip_prefix(MEMBER)?.to_owned(), entry))
    });
    members.collect()
}

/// What is known of the cluster.
#[derive(Default)]
struct Known {
    nodes: Roster,
    servers: Roster,
    /// What our own Node says, if there is one.
    said: Option<(Option<String>, Option<String>)>,
    /// What the Secret says of us, if there is one.
    written: Option<Option<Entry>>,
    listing: Roster,
    /// Whether the nodes, and the Secret, have been listed.
    listed: (bool, bool),
}

/// Follows the API until `stop`.
pub async fn follow(shared: Arc<Shared>, client: Client, stop: CancellationToken) -> anyhow::Result<()> {
    let nodes = watcher(Api::<Node>::all(client.clone()), watcher::Config::default());
    let only = watcher::Config::default().fields(&format!("metadata.name={SECRET}"));
    let secrets = watcher(Api::<Secret>::namespaced(client.clone(), NAMESPACE), only);
    let mut nodes = Box::pin(nodes.backoff(Backoff::default()));
    let mut secrets = Box::pin(secrets.backoff(Backoff::default()));
    let mut known = Known::default();
    let mut again = Instant::now();
    loop {
        let mut roster = false;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            event = nodes.next() => match event {
                Some(Ok(event)) => roster = known.take_node(&shared, event),
                Some(Err(error)) => tracing::debug!(%error, "the gossip does not see the nodes"),
                None => anyhow::bail!("the watch on nodes has ended"),
            },
            event = secrets.next() => match event {
                Some(Ok(Event::Apply(secret) | Event::InitApply(secret))) => {
                    roster = known.take_secret(&shared, &secret).await;
                }
                // The first list counts even if there is no Secret.
                Some(Ok(Event::InitDone)) => roster = !std::mem::replace(&mut known.listed.1, true),
                Some(Ok(_)) => {}
                Some(Err(error)) => tracing::debug!(%error, "the gossip does not see its keys"),
                None => anyhow::bail!("the watch on the gossip's keys has ended"),
            },
            () = tokio::time::sleep_until(again), if again > Instant::now() => {}
        }
        if roster {
            known.publish(&shared).await;
        }
        if again <= Instant::now()
            && let Err(error) = known.say(&shared, &client).await
        {
            tracing::debug!("this member could not say who it is: {error:#}");
            again = Instant::now() + AGAIN;
        }
    }
}

impl Known {
    /// Takes a change of a Node in; whether the members may be others now.
    fn take_node(&mut self, shared: &Shared, event: Event<Node>) -> bool {
        let own = &shared.config.name;
        match event {
            Event::Init => {
                self.listing.clear();
                self.said = None;
                return false;
            }
            Event::InitApply(node) => {
                self.look_at_own(own, &node);
                let found = entry(&node);
                self.listing.extend(found.map(|entry| (node.name_any(), entry)));
                return false;
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listing);
                let differs = self.nodes != listed;
                self.nodes = listed;
                // The first list counts even if it is empty.
                return !std::mem::replace(&mut self.listed.0, true) || differs;
            }
            Event::Apply(node) => {
                self.look_at_own(own, &node);
                let name = node.name_any();
                match entry(&node) {
                    Some(entry) if self.nodes.get(&name) == Some(&entry) => return false,
                    Some(entry) => drop(self.nodes.insert(name, entry)),
                    None => return self.nodes.remove(&name).is_some(),
                }
            }
            Event::Delete(node) => {
                let name = node.name_any();
                if name == *own {
                    self.said = None;
                }
                return self.nodes.remove(&name).is_some();
            }
        }
        true
    }

    fn look_at_own(&mut self, own: &str, node: &Node) {
        if node.name_any() == own {
            let says = |name: &str| node.annotations().get(name).cloned();
            self.said = Some((says(KEY), says(ACCEPTED)));
        }
    }

    /// Takes the Secret in; whether the members may be others now.
    async fn take_secret(&mut self, shared: &Arc<Shared>, secret: &Secret) -> bool {
        let ring = keyring(secret);
        if ring.keys.is_empty() {
            tracing::warn!(
                "Secret {NAMESPACE}/{SECRET} has no key {CURRENT:?} of 32 bytes: the former ones stay in use"
            );
        } else if *shared.keys.borrow() != ring {
            let names: Vec<String> = ring.keys.iter().map(ClusterKey::name).collect();
            tracing::info!(keys = names.join(","), "the gossip's keys");
            keep(shared, {
                let ring = ring.clone();
                move |disk| disk.keep_keys(&ring)
            })
            .await;
            shared.keys.send_replace(ring);
        }
        let servers = servers(secret);
        self.written = Some(servers.get(&shared.config.name).cloned());
        let differs = self.servers != servers;
        self.servers = servers;
        differs
    }

    /// The members, where `former` ones were known from the disk.
    fn members(&self, former: &Roster) -> Roster {
        // Whom the API has not had the chance to name is not struck off.
        let mut roster = if self.listed == (true, true) { Roster::new() } else { former.clone() };
        // A Node is written by the node itself; a server that has become one is listed there.
        roster.extend(self.servers.clone());
        roster.extend(self.nodes.clone());
        roster
    }

    async fn publish(&self, shared: &Arc<Shared>) {
        let roster = self.members(&shared.roster.borrow());
        if **shared.roster.borrow() == roster {
            return;
        }
        tracing::debug!(members = roster.len(), "the members of the gossip");
        keep(shared, {
            let roster = roster.clone();
            move |disk| disk.keep_members(&roster)
        })
        .await;
        shared.roster.send_replace(Arc::new(roster));
    }

    /// Says who we are, where it is not said yet.
    async fn say(&mut self, shared: &Shared, client: &Client) -> anyhow::Result<()> {
        let name = &shared.config.name;
        let key = STANDARD.encode(shared.public);
        match (shared.config.publish, &self.said, &self.written) {
            (Publish::Node, Some(said), _) => {
                let names: Vec<String> = shared.keys.borrow().keys.iter().map(ClusterKey::name).collect();
                let wanted = (Some(key), Some(names.join(",")));
                if *said != wanted {
                    let patch = json!({"metadata": {"annotations": {KEY: wanted.0, ACCEPTED: wanted.1}}});
                    let nodes = Api::<Node>::all(client.clone());
                    nodes.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
                    self.said = Some(wanted);
                }
            }
            (Publish::Secret, _, Some(written)) => {
                let entry = Entry { ip: shared.config.address.ip(), key };
                if written.as_ref() != Some(&entry) {
                    let value = STANDARD.encode(serde_json::to_vec(&entry)?);
                    let patch = json!({"data": {format!("{MEMBER}{name}"): value}});
                    let secrets = Api::<Secret>::namespaced(client.clone(), NAMESPACE);
                    secrets.patch(SECRET, &PatchParams::default(), &Patch::Merge(patch)).await?;
                    self.written = Some(Some(entry));
                }
            }
            // Neither the Node nor the Secret is there yet.
            _ => {}
        }
        Ok(())
    }
}

/// Keeps something on the disk, which may be slow.
async fn keep(shared: &Arc<Shared>, write: impl FnOnce(&Disk) -> anyhow::Result<()> + Send + 'static) {
    let disk = Disk::new(&shared.config.directory);
    match tokio::task::spawn_blocking(move || write(&disk)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!("the gossip could not keep what it needs without the API: {error:#}"),
        Err(error) => tracing::warn!(%error, "the gossip could not keep what it needs without the API"),
    }
}

/// Sees to it that the cluster has a key: the first server makes it. One that was deleted comes back as `known`.
///
/// # Errors
/// None that end it: what fails is tried again.
pub async fn keep_key(client: Client, known: impl Fn() -> Keyring, stop: CancellationToken) -> anyhow::Result<()> {
    let secrets = Api::<Secret>::namespaced(client, NAMESPACE);
    loop {
        let pause = match make_key(&secrets, known()).await {
            Ok(()) => LOOK,
            Err(error) => {
                tracing::warn!("the gossip has no key yet: {error:#}");
                AGAIN
            }
        };
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return Ok(());
        }
    }
}

async fn make_key(secrets: &Api<Secret>, known: Keyring) -> anyhow::Result<()> {
    if secrets.get_opt(SECRET).await?.is_some() {
        return Ok(());
    }
    let key = match known.keys.into_iter().next() {
        Some(key) => key,
        None => ClusterKey::random().map_err(|_| anyhow::anyhow!("the system has no randomness"))?,
    };
    let secret = Secret {
        metadata: ObjectMeta { name: Some(SECRET.into()), namespace: Some(NAMESPACE.into()), ..ObjectMeta::default() },
        type_: Some(TYPE.into()),
        data: Some(BTreeMap::from([(CURRENT.to_owned(), ByteString(key.bytes().to_vec()))])),
        ..Secret::default()
    };
    match secrets.create(&PostParams::default(), &secret).await {
        Ok(_) => tracing::info!(key = key.name(), "made the gossip's key"),
        // Another server was faster.
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_the_nodes_that_say_so() {
        let check = |annotations: serde_json::Value, addresses: serde_json::Value, expect: Option<&str>| {
            let node: Node = serde_json::from_value(json!({"metadata": {"name": "a", "annotations": annotations},
                "status": {"addresses": addresses}}))
            .unwrap();
            assert_eq!(entry(&node).map(|entry| entry.ip.to_string()).as_deref(), expect);
        };
        let key = STANDARD.encode([7; 32]);
        let address = json!([{"type": "Hostname", "address": "a"}, {"type": "InternalIP", "address": "10.0.0.1"}]);
        check(json!({KEY: key}), address.clone(), Some("10.0.0.1"));
        check(json!({}), address.clone(), None);
        check(json!({KEY: "AAAA"}), address.clone(), None);
        check(json!({KEY: "?"}), address, None);
        check(json!({KEY: key}), json!([{"type": "InternalIP", "address": "a"}]), None);
    }

    #[test]
    fn the_secret() {
        let bytes = |n: u8| STANDARD.encode([n; 32]);
        let server = STANDARD.encode(json!({"ip": "10.0.0.9", "key": bytes(9)}).to_string());
        let secret: Secret = serde_json::from_value(json!({"data": {"previous": bytes(1), "current": bytes(2),
            "next": STANDARD.encode("short"), "member.s1": server, "member.s2": STANDARD.encode("{")}}))
        .unwrap();
        let keys: Vec<ClusterKey> = [2, 1].iter().filter_map(|n| ClusterKey::new(&[*n; 32])).collect();
        assert_eq!(keyring(&secret), Keyring { keys });
        let entry = Entry { ip: "10.0.0.9".parse().unwrap(), key: bytes(9) };
        assert_eq!(servers(&secret), [("s1".to_owned(), entry)].into());
    }

    #[test]
    fn whom_the_disk_knows_stays_until_all_have_been_listed() {
        let roster = |names: &[&str]| -> Roster {
            let entry = |name: &str| Entry { ip: [10, 0, 0, name.len() as u8].into(), key: STANDARD.encode([7; 32]) };
            names.iter().map(|name| ((*name).to_owned(), entry(name))).collect()
        };
        let former = roster(&["node", "server", "gone"]);
        let check = |listed: (bool, bool), nodes: &[&str], servers: &[&str], expect: &[&str]| {
            let known = Known { nodes: roster(nodes), servers: roster(servers), listed, ..Known::default() };
            assert_eq!(known.members(&former), roster(expect), "{listed:?} {nodes:?} {servers:?}");
        };
        check((false, false), &[], &[], &["node", "server", "gone"]);
        check((true, false), &["node", "new"], &[], &["node", "server", "gone", "new"]);
        check((false, true), &[], &["server", "other"], &["node", "server", "gone", "other"]);
        check((true, true), &["node"], &["server"], &["node", "server"]);
        check((true, true), &[], &[], &[]);
    }
}
