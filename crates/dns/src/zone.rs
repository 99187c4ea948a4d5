//! What is known of the cluster, arranged so that a name is found by looking once or twice.
//!
//! A [`Zone`] never changes: the [`Book`] makes the next one, which shares with the last whatever stayed as it was.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use hickory_proto::rr::Name;
use imbl::HashMap as Shared;
use ipnet::IpNet;

use crate::{
    facts::{Key, Service, Slice},
    name,
};

/// What the whole cluster has in common.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The domain in small letters, without the last dot: `cluster.local`.
    pub domain: String,
    /// The same as a name.
    pub origin: Name,
    /// The addresses of the cluster's DNS.
    pub dns: Vec<IpAddr>,
    /// The addresses of pods and Services: nobody else knows names for them.
    pub ranges: Vec<IpNet>,
}

impl Shape {
    /// Checks the domain.
    ///
    /// # Errors
    /// If it is none.
    pub fn new(domain: &str, dns: Vec<IpAddr>, ranges: Vec<IpNet>) -> anyhow::Result<Shape> {
        let domain = domain.trim_end_matches('.').to_ascii_lowercase();
        let origin = Name::from_ascii(format!("{domain}."))
            .map_err(|e| anyhow::anyhow!("{domain:?} is no domain for a cluster: {e}"))?;
        anyhow::ensure!(!origin.is_root(), "a cluster needs a domain: cluster.local, say");
        Ok(Shape { domain, origin, dns, ranges })
    }

    /// A name below the domain.
    pub(crate) fn name(&self, below: &str) -> Option<Name> {
        let labels = below.split('.').map(str::as_bytes).chain(self.origin.iter());
        Name::from_labels(labels).ok()
    }
}

/// An endpoint of a headless Service: an address under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its label below the Service.
    pub label: String,
    /// Its whole name.
    pub name: Name,
    /// Where it is.
    pub ip: IpAddr,
    /// The machine that it is on.
    pub node: Option<Arc<str>>,
}

/// A port by name and protocol, and where it is: the number, and which of the hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The port's name.
    pub name: String,
    /// Its protocol.
    pub protocol: String,
    /// Its number.
    pub number: u16,
    /// The hosts that have it, by their index; empty for a Service with an address.
    pub hosts: Vec<usize>,
}

/// What a Service's names lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leads {
    /// To its addresses.
    Addresses(Vec<IpAddr>),
    /// To its endpoints.
    Hosts(Vec<Host>),
    /// To another name.
    Name(Name),
}

/// All that DNS says of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: Name,
    /// Where that leads.
    pub leads: Leads,
    /// Ports with names.
    pub ports: Vec<Named>,
}

/// The names of a cluster at a moment.
#[derive(Clone, Debug)]
pub struct Zone {
    /// What does not change.
    pub shape: Arc<Shape>,
    /// By `service.namespace`.
    entries: Shared<String, Arc<Entry>>,
    /// How many Services a namespace has.
    namespaces: Shared<String, usize>,
    /// By address: names, by the Service that they come from. Those of Services stand before those of endpoints.
    reverse: Shared<IpAddr, BTreeMap<(bool, String), Name>>,
    /// Machines whose pods had better not be used, if there are others.
    pub avoided: Arc<HashSet<String>>,
}

impl Zone {
    /// Without any Service.
    pub fn empty(shape: Arc<Shape>) -> Zone {
        Zone {
            shape,
            entries: Shared::new(),
            namespaces: Shared::new(),
            reverse: Shared::new(),
            avoided: Arc::default(),
        }
    }

    /// What `service.namespace` is.
    pub fn entry(&self, key: &str) -> Option<&Arc<Entry>> {
        self.entries.get(key)
    }

    /// Whether there is a Service in this namespace.
    pub fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name)
    }

    /// The names of an address: its Service's, else those of the endpoints there.
    pub fn names_of(&self, ip: IpAddr) -> impl Iterator<Item = &Name> {
        let all = self.reverse.get(&ip);
        let of_service = all.and_then(|all| all.keys().next()).is_some_and(|(endpoint, _)| !endpoint);
        all.into_iter().flatten().filter(move |((endpoint, _), _)| !(of_service && *endpoint)).map(|(_, name)| name)
    }

    /// How many Services it has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn put(&mut self, key: &str, namespace: &str, entry: Option<Entry>) -> bool {
        let old = self.entries.get(key).cloned();
        if old.as_deref() == entry.as_ref() {
            return false;
        }
        if let Some(old) = old {
            for (ip, mark, _) in addresses(&old, key) {
                let Some(names) = self.reverse.get_mut(&ip) else { continue };
                names.remove(&mark);
                if names.is_empty() {
                    self.reverse.remove(&ip);
                }
            }
            if entry.is_none() {
                self.entries.remove(key);
                match self.namespaces.get(namespace).copied() {
                    Some(count) if count > 1 => drop(self.namespaces.insert(namespace.to_owned(), count - 1)),
                    _ => drop(self.namespaces.remove(namespace)),
                }
            }
        } else if entry.is_some() {
            let count = self.namespaces.get(namespace).copied().unwrap_or_default();
            self.namespaces.insert(namespace.to_owned(), count + 1);
        }
        if let Some(entry) = entry {
            for (ip, mark, name) in addresses(&entry, key) {
                self.reverse.entry(ip).or_default().insert(mark, name);
            }
            self.entries.insert(key.to_owned(), Arc::new(entry));
        }
        true
    }
}

/// The names that addresses of a Service have.
fn addresses(entry: &Entry, key: &str) -> Vec<(IpAddr, (bool, String), Name)> {
    match &entry.leads {
        Leads::Addresses(ips) => ips.iter().map(|ip| (*ip, (false, key.to_owned()), entry.name.clone())).collect(),
        Leads::Hosts(hosts) => {
            let mark = |host: &Host| (true, format!("{}.{key}", host.label));
            hosts.iter().map(|host| (host.ip, mark(host), host.name.clone())).collect()
        }
        Leads::Name(_) => Vec::new(),
    }
}

/// Services and slices as they come, and the zone that follows from them.
#[derive(Debug)]
pub struct Book {
    services: HashMap<Key, Service>,
    /// By the Service that they belong to, then by their own name.
    slices: HashMap<Key, BTreeMap<String, Slice>>,
    zone: Zone,
}

impl Book {
    /// An empty one.
    pub fn new(shape: Arc<Shape>) -> Book {
        Book { services: HashMap::new(), slices: HashMap::new(), zone: Zone::empty(shape) }
    }

    /// The zone as it is now.
    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// Machines whose pods are to be avoided.
    pub fn avoid(&mut self, nodes: HashSet<String>) -> bool {
        let changed = *self.zone.avoided != nodes;
        self.zone.avoided = Arc::new(nodes);
        changed
    }

    /// A Service is there, or is otherwise.
    pub fn set_service(&mut self, service: Service) -> bool {
        let key = (service.namespace.clone(), service.name.clone());
        self.services.insert(key.clone(), service);
        self.refresh(&key)
    }

    /// A Service is gone.
    pub fn remove_service(&mut self, key: &Key) -> bool {
        self.services.remove(key);
        self.refresh(key)
    }

    /// All Services there are.
    pub fn replace_services(&mut self, all: Vec<Service>) -> bool {
        let now: HashSet<Key> = all.iter().map(|s| (s.namespace.clone(), s.name.clone())).collect();
        let gone: Vec<Key> = self.services.keys().filter(|key| !now.contains(*key)).cloned().collect();
        let mut changed = false;
        for key in gone {
            changed |= self.remove_service(&key);
        }
        for service in all {
            changed |= self.set_service(service);
        }
        changed
    }

    /// A slice is there, or is otherwise.
    pub fn set_slice(&mut self, slice: Slice) -> bool {
        let owner = (slice.namespace.clone(), slice.service.clone());
        // Its label may have led elsewhere before.
        let moved = self.owner_of(&slice.namespace, &slice.name).filter(|before| *before != owner);
        let mut changed = false;
        if let Some(before) = moved {
            changed |= self.take_slice(&before, &slice.name);
        }
        self.slices.entry(owner.clone()).or_default().insert(slice.name.clone(), slice);
        changed | self.refresh(&owner)
    }

    /// A slice is gone.
    pub fn remove_slice(&mut self, slice: &Slice) -> bool {
        let owner = self.owner_of(&slice.namespace, &slice.name);
        owner.is_some_and(|owner| self.take_slice(&owner, &slice.name))
    }

    /// All slices there are.
    pub fn replace_slices(&mut self, all: Vec<Slice>) -> bool {
        let mut now: HashMap<Key, BTreeMap<String, Slice>> = HashMap::new();
        for slice in all {
            let owner = (slice.namespace.clone(), slice.service.clone());
            now.entry(owner).or_default().insert(slice.name.clone(), slice);
        }
        let before = std::mem::replace(&mut self.slices, now);
        let owners: HashSet<Key> = before.keys().chain(self.slices.keys()).cloned().collect();
        let mut changed = false;
        for owner in owners {
            if before.get(&owner) != self.slices.get(&owner) {
                changed |= self.refresh(&owner);
            }
        }
        changed
    }

    fn owner_of(&self, namespace: &str, name: &str) -> Option<Key> {
        // A slice's name begins with its Service's, by custom only: usually the first look finds it.
        let guess = name.rsplit_once('-').map(|(service, _)| (namespace.to_owned(), service.to_owned()));
        if let Some(guess) = guess
            && self.slices.get(&guess).is_some_and(|of| of.contains_key(name))
        {
            return Some(guess);
        }
        let mut of = self.slices.iter().filter(|((n, _), _)| n == namespace);
        of.find(|(_, slices)| slices.contains_key(name)).map(|(owner, _)| owner.clone())
    }

    fn take_slice(&mut self, owner: &Key, name: &str) -> bool {
        let Some(slices) = self.slices.get_mut(owner) else { return false };
        slices.remove(name);
        if slices.is_empty() {
            self.slices.remove(owner);
        }
        self.refresh(owner)
    }

    /// Works out anew what is said of a Service.
    fn refresh(&mut self, key: &Key) -> bool {
        let service = self.services.get(key);
        let entry = service.and_then(|s| entry(s, self.slices.get(key), &self.zone.shape));
        let text = format!("{}.{}", key.1, key.0);
        self.zone.put(&text, &key.0, entry)
    }
}

/// What is said of a Service: <https://github.com/kubernetes/dns/blob/master/docs/specification.md>.
fn entry(service: &Service, slices: Option<&BTreeMap<String, Slice>>, shape: &Shape) -> Option<Entry> {
    let own = format!("{}.{}.svc", service.name, service.namespace);
    let name = shape.name(&own)?;
    if let Some(external) = &service.external {
        let target = Name::from_ascii(external).ok().map(|mut name| {
            name.set_fqdn(true);
            name
        })?;
        return Some(Entry { name, leads: Leads::Name(target), ports: Vec::new() });
    }
    if !service.headless {
        if service.cluster_ips.is_empty() {
            return None;
        }
        let named = service.ports.iter().filter(|p| !p.name.is_empty());
        let named = named.map(|p| Named {
            name: p.name.clone(),
            protocol: p.protocol.clone(),
            number: p.number,
            hosts: Vec::new(),
        });
        return Some(Entry { name, leads: Leads::Addresses(service.cluster_ips.clone()), ports: named.collect() });
    }
    let mut hosts: Vec<Host> = Vec::new();
    let mut known: HashMap<(String, IpAddr), usize> = HashMap::new();
    let mut ports: BTreeMap<(String, String, u16), BTreeSet<usize>> = BTreeMap::new();
    for slice in slices.into_iter().flat_map(BTreeMap::values) {
        for endpoint in slice.endpoints.iter().filter(|e| e.ready || service.publish_not_ready) {
            for ip in &endpoint.addresses {
                let label = endpoint.hostname.clone().unwrap_or_else(|| name::label(*ip));
                // It may stand in two slices while it moves from one to the other.
                let index = *known.entry((label.clone(), *ip)).or_insert(hosts.len());
                if index == hosts.len() {
                    let Some(name) = shape.name(&format!("{label}.{own}")) else { continue };
                    let node = endpoint.node.as_deref().map(Arc::from);
                    hosts.push(Host { label, name, ip: *ip, node });
                }
                for port in slice.ports.iter().filter(|p| !p.name.is_empty()) {
                    let key = (port.name.clone(), port.protocol.clone(), port.number);
                    ports.entry(key).or_default().insert(index);
                }
            }
        }
    }
    let named = ports.into_iter().map(|((name, protocol, number), hosts)| Named {
        name,
        protocol,
        number,
        hosts: hosts.into_iter().collect(),
    });
    Some(Entry { name, leads: Leads::Hosts(hosts), ports: named.collect() })
}

#[cfg(test)]
#[path = "zone_tests.rs"]
pub(crate) mod tests;
