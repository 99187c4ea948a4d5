//! What the proxy knows of the cluster, and the copy of it on disk.
//!
//! Verdicts about machines have to be acted on while the API is away, also by a proxy that was started just then. So what
//! is known is kept, and with it which machines were thought dead.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::IpAddr,
    path::Path,
    sync::Arc,
};

use anyhow::Context as _;
use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{ResourceExt, runtime::watcher};
use serde::{Deserialize, Serialize};

use super::faults;
use crate::{routes::NodeRoutes, verdict::Verdict};

/// A larger state is not kept: a disk is not filled by a proxy.
const MOST_BYTES: usize = 64 << 20;

/// Namespace and name.
pub type Key = (String, String);

/// What is known of the cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// By namespace and name.
    pub services: BTreeMap<Key, Arc<Service>>,
    /// By namespace and name.
    pub slices: BTreeMap<Key, Arc<EndpointSlice>>,
    /// By an empty namespace and name.
    pub nodes: BTreeMap<Key, Arc<Machine>>,
}

/// What counts of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// Its pods' addresses.
    pub pods: Vec<IpNet>,
    /// Where it stands.
    pub zone: Option<String>,
}

impl State {
    /// A machine by its name.
    pub fn machine(&self, name: &str) -> Option<&Machine> {
        // The key has to be owned; there are few lookups.
        self.nodes.get(&(String::new(), name.to_owned())).map(Arc::as_ref)
    }
}

/// What is only for others takes no room.
fn trim(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

/// A Service as it is known.
pub fn service(mut object: Service) -> (Key, Arc<Service>) {
    trim(&mut object.metadata);
    if let Some(fault) = faults::of_service(&object) {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        tracing::warn!("not all of the service {namespace}/{name} is served: {fault}");
    }
    ((object.namespace().unwrap_or_default(), object.name_any()), Arc::new(object))
}

/// A slice as it is known.
pub fn slice(mut object: EndpointSlice) -> (Key, Arc<EndpointSlice>) {
    trim(&mut object.metadata);
    if let Some(fault) = faults::of_slice(&object) {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        tracing::warn!("not all of the endpoint slice {namespace}/{name} is used: {fault}");
    }
    ((object.namespace().unwrap_or_default(), object.name_any()), Arc::new(object))
}

/// A Node as it is known. Its status changes all the time, what counts of it hardly ever.
pub fn machine(object: Node) -> (Key, Arc<Machine>) {
    let NodeRoutes { name, addresses, pods } = NodeRoutes::of(&object);
    let zone = object.labels().get("topology.kubernetes.io/zone").cloned();
    ((String::new(), name.clone()), Arc::new(Machine { name, addresses, pods, zone }))
}

/// One kind of object, as a watch brings it: those seen since a full list began.
pub struct Fed<V> {
    fresh: Option<BTreeMap<Key, V>>,
    /// Whether there was a full list.
    pub listed: bool,
}

impl<V> Default for Fed<V> {
    fn default() -> Fed<V> {
        Fed { fresh: None, listed: false }
    }
}

impl<V: PartialEq> Fed<V> {
    /// Takes an event into `known`. Says whether `known` changed, or was listed for the first time.
    pub fn take<K>(
        &mut self,
        known: &mut BTreeMap<Key, V>,
        event: watcher::Event<K>,
        of: impl Fn(K) -> (Key, V),
    ) -> bool {
        match event {
            watcher::Event::Init => {
                self.fresh = Some(BTreeMap::new());
                false
            }
            watcher::Event::InitApply(object) => {
                if let Some(fresh) = &mut self.fresh {
                    fresh.extend([of(object)]);
                }
                false
            }
            watcher::Event::InitDone => {
                let Some(fresh) = self.fresh.take() else { return false };
                let first = !std::mem::replace(&mut self.listed, true);
                let changed = *known != fresh;
                *known = fresh;
                first || changed
            }
            watcher::Event::Apply(object) => {
                let (key, value) = of(object);
                let changed = known.get(&key) != Some(&value);
                known.insert(key, value);
                changed
            }
            watcher::Event::Delete(object) => known.remove(&of(object).0).is_some(),
        }
    }
}

/// What is kept on disk.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kept {
    /// The cluster.
    pub state: State,
    /// The machines that were thought dead.
    pub dead: BTreeSet<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    services: Vec<Service>,
    slices: Vec<EndpointSlice>,
    nodes: Vec<Machine>,
    dead: BTreeSet<String>,
}

/// Reads the copy; `None` if there is none.
///
/// # Errors
/// If it cannot be read or understood.
pub fn read(file: &Path) -> anyhow::Result<Option<Kept>> {
    let text = match std::fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| file.display().to_string()),
    };
    let File { services, slices, nodes, dead } =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", file.display()))?;
    let nodes = nodes.into_iter().map(|m| ((String::new(), m.name.clone()), Arc::new(m))).collect();
    let services = services.into_iter().map(service).collect();
    let slices = slices.into_iter().map(slice).collect();
    Ok(Some(Kept { state: State { services, slices, nodes }, dead }))
}

/// Replaces the copy: whoever reads it sees the old one or the new one. It is not forced to the disk: after a power cut
/// an older one does, or none.
///
/// # Errors
/// If it is too large or cannot be written.
pub fn write(file: &Path, kept: &Kept) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Out<'a> {
        services: Vec<&'a Service>,
        slices: Vec<&'a EndpointSlice>,
        nodes: Vec<&'a Machine>,
        dead: &'a BTreeSet<String>,
    }
    let text = serde_json::to_vec(&Out {
        services: kept.state.services.values().map(Arc::as_ref).collect(),
        slices: kept.state.slices.values().map(Arc::as_ref).collect(),
        nodes: kept.state.nodes.values().map(Arc::as_ref).collect(),
        dead: &kept.dead,
    })?;
    anyhow::ensure!(text.len() <= MOST_BYTES, "{} bytes are more than are kept", text.len());
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    let temporary = file.with_extension("new");
    let mut out = std::fs::File::create(&temporary).with_context(|| temporary.display().to_string())?;
    out.write_all(&text)?;
    std::fs::rename(&temporary, file).with_context(|| file.display().to_string())
}

/// The verdicts to act on: the gossip's, and while it is still learning (`relearning`) those of `remembered` that it has
/// not named yet. These count as suspected only: nothing is reset on the word of an earlier life.
pub fn settled(
    verdicts: &BTreeMap<String, Verdict>,
    remembered: &BTreeSet<String>,
    relearning: bool,
) -> BTreeMap<String, Verdict> {
    let mut all = verdicts.clone();
    for name in remembered.iter().filter(|_| relearning) {
        all.entry(name.clone()).or_insert(Verdict::Suspect);
    }
    all
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(cidr: &str) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "a", "labels": {"topology.kubernetes.io/zone": "z"}},
            "spec": {"podCIDRs": [cidr]},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.9.0.2"}], "conditions": []},
        }))
        .unwrap()
    }

    #[test]
    fn the_copy() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("sub/proxy.json");
        assert!(read(&file).unwrap().is_none());
        let mut kept = Kept { dead: ["a".into()].into(), ..Default::default() };
        let with = |name: &str| json!({"metadata": {"name": name, "namespace": "n", "managedFields": []}});
        kept.state.services.extend([service(serde_json::from_value(with("s")).unwrap())]);
        let mut one = with("s-1");
        one["addressType"] = "IPv4".into();
        kept.state.slices.extend([slice(serde_json::from_value(one).unwrap())]);
        kept.state.nodes.extend([machine(node("10.244.1.0/24"))]);
        write(&file, &kept).unwrap();
        assert_eq!(read(&file).unwrap(), Some(kept.clone()));
        assert_eq!(kept.state.machine("a").unwrap().zone.as_deref(), Some("z"));
        std::fs::write(&file, "{").unwrap();
        assert!(format!("{:#}", read(&file).unwrap_err()).contains("damaged"));
    }

    #[test]
    fn a_list_replaces_what_was_known_when_it_is_complete() {
        let (mut fed, mut known) = (Fed::default(), BTreeMap::new());
        known.extend([machine(node("10.244.9.0/24"))]);
        assert!(!fed.take(&mut known, watcher::Event::<Node>::Init, machine));
        assert!(!fed.take(&mut known, watcher::Event::InitApply(node("10.244.1.0/24")), machine));
        assert_eq!(known.values().next().unwrap().pods, ["10.244.9.0/24".parse::<IpNet>().unwrap()], "not yet");
        assert!(fed.take(&mut known, watcher::Event::<Node>::InitDone, machine) && fed.listed);
        assert_eq!(known.values().next().unwrap().pods, ["10.244.1.0/24".parse::<IpNet>().unwrap()]);
        assert!(!fed.take(&mut known, watcher::Event::Apply(node("10.244.1.0/24")), machine), "nothing new");
        // The watch breaks and lists again: the same is no change.
        fed.take(&mut known, watcher::Event::<Node>::Init, machine);
        fed.take(&mut known, watcher::Event::InitApply(node("10.244.1.0/24")), machine);
        assert!(!fed.take(&mut known, watcher::Event::<Node>::InitDone, machine));
        assert!(fed.take(&mut known, watcher::Event::Delete(node("10.244.1.0/24")), machine) && known.is_empty());
    }

    #[test]
    fn who_was_dead_is_not_used_before_the_gossip_speaks() {
        let remembered = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let said = BTreeMap::from([("a".to_owned(), Verdict::Alive)]);
        let all = settled(&said, &remembered, true);
        assert_eq!(all["a"], Verdict::Alive);
        assert_eq!(all["b"], Verdict::Suspect);
        assert_eq!(settled(&said, &remembered, false), said);
    }
}
