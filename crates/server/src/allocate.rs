//! Cluster addresses and node ports of Services.
//!
//! What is taken is a key in the store, written only if it is absent, so that several servers never hand out the same
//! twice: an `IPAddress` object for an address (KEP-1880), a key of its own for a port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::Bytes;
use ipnet::IpNet;
use jiff::Timestamp;
use rand::Rng;
use seawall_api::{
    Row,
    field::{Errors, Path},
    resources::{cluster_ips, needs_health_check, settle_families},
};
use seawall_store::{self as store, Expect, Revision};
use serde_json::{Value, json};

use crate::{
    Server,
    error::{ApiError, Result},
    object::encode,
    write::timestamp,
};

const PORTS: &str = "/registry/ranges/servicenodeports/";

fn is_service(row: &Row) -> bool {
    row.group.is_empty() && row.plural == "services"
}

fn port_key(protocol: &str, port: i64) -> String {
    format!("{PORTS}{}-{port}", protocol.to_lowercase())
}

/// The keys of what a Service has taken. An address of a family that the cluster does not have was never taken, and may be
/// another Service's.
fn claims(server: &Server, service: &Value) -> Vec<String> {
    let mut keys = Vec::new();
    if let Some((_, row)) = server.registry.by_name("networking.k8s.io", "ipaddresses") {
        keys.extend(
            cluster_ips(service)
                .filter(|ip| server.config.service_cidr.of(ip.is_ipv6()).is_some())
                .map(|ip| row.key("", &ip.to_string())),
        );
    }
    for port in service["spec"]["ports"].as_array().into_iter().flatten() {
        if let Some(number) = port["nodePort"].as_i64().filter(|n| *n > 0) {
            keys.push(port_key(port["protocol"].as_str().unwrap_or("TCP"), number));
        }
    }
    if let Some(number) = service["spec"]["healthCheckNodePort"].as_i64().filter(|n| *n > 0) {
        keys.push(port_key("TCP", number));
    }
    keys
}

impl Server {
    /// Gives a new or changed Service what it lacks. Returns what was newly taken, to be released if it is not stored.
    pub(crate) async fn allocate(
        &self,
        row: &Row,
        service: &mut Value,
        old: Option<&Value>,
        dry: bool,
    ) -> Result<Vec<String>> {
        let mut taken = Vec::new();
        if !is_service(row) {
            return Ok(taken);
        }
        match self.allocate_all(row, service, old, dry, &mut taken).await {
            Ok(()) => Ok(taken),
            Err(error) => {
                self.release(taken).await;
                Err(error)
            }
        }
    }

    async fn allocate_all(
        &self,
        row: &Row,
        service: &mut Value,
        old: Option<&Value>,
        dry: bool,
        taken: &mut Vec<String>,
    ) -> Result<()> {
        let kind = service["spec"]["type"].as_str().unwrap_or("ClusterIP").to_owned();
        let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = service["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let held = old.map(|old| claims(self, old)).unwrap_or_default();
        let mut errors = Errors::default();
        settle_families(service, old, &self.config.service_cidr.families(), &mut errors);
        if !errors.is_empty() {
            return Err(ApiError::invalid(row, &name, &errors));
        }
        let spec = &mut service["spec"];
        if kind == "ExternalName" {
            for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                if let Some(spec) = spec.as_object_mut() {
                    spec.remove(key);
                }
            }
            return Ok(());
        }
        if spec["clusterIP"] == "None" {
            spec["clusterIPs"] = json!(["None"]);
        } else {
            self.allocate_addresses(row, service, &held, dry, taken).await?;
        }
        let spec = &mut service["spec"];
        let with_ports =
            kind == "NodePort" || (kind == "LoadBalancer" && spec["allocateLoadBalancerNodePorts"] != false);
        let old_ports = old.map(|o| o["spec"]["ports"].clone()).unwrap_or_default();
        for (index, port) in spec["ports"].as_array_mut().into_iter().flatten().enumerate() {
            let protocol = port["protocol"].as_str().unwrap_or("TCP").to_owned();
            if kind == "ClusterIP" {
                if let Some(port) = port.as_object_mut() {
                    port.remove("nodePort");
                }
                continue;
            }
            if port["nodePort"].as_i64().unwrap_or_default() == 0 {
                let same = |p: &&Value| p["port"] == port["port"] && p["protocol"] == port["protocol"];
                let kept = old_ports.as_array().into_iter().flatten().find(same).map(|p| p["nodePort"].clone());
                match kept.filter(|n| n.as_i64().unwrap_or_default() > 0) {
                    Some(number) => port["nodePort"] = number,
                    None if with_ports => {
                        port["nodePort"] = self.free_port(&protocol, &namespace, &name, dry, taken).await?.into();
                    }
                    None => {}
                }
                continue;
            }
            let number = port["nodePort"].as_i64().unwrap_or_default();
            let key = port_key(&protocol, number);
            if held.contains(&key) {
                continue;
            }
            if let Err(why) = self.take_port(&key, number, &namespace, &name, dry, taken).await? {
                let mut errors = Errors::default();
                let path = Path::Root.at("spec");
                let path = path.at("ports");
                let path = path.index(index);
                errors.invalid(path.at("nodePort"), number, why);
                return Err(ApiError::invalid(row, &name, &errors));
            }
        }
        self.allocate_health_check(row, service, old, &held, dry, taken).await
    }

    /// Takes the port at which balancers ask whether a node has an endpoint, or gives one.
    async fn allocate_health_check(
        &self,
        row: &Row,
        service: &mut Value,
        old: Option<&Value>,
        held: &[String],
        dry: bool,
        taken: &mut Vec<String>,
    ) -> Result<()> {
        const KEY: &str = "healthCheckNodePort";
        let of = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (namespace, name) = (of(&service["metadata"]["namespace"]), of(&service["metadata"]["name"]));
        let spec = &mut service["spec"];
        if !needs_health_check(spec) {
            return Ok(());
        }
        let kept = old.and_then(|old| old["spec"][KEY].as_i64()).filter(|number| *number > 0);
        match spec[KEY].as_i64().filter(|number| *number > 0).or(kept) {
            None => spec[KEY] = self.free_port("TCP", &namespace, &name, dry, taken).await?.into(),
            Some(number) => {
                spec[KEY] = number.into();
                let key = port_key("TCP", number);
                if !held.contains(&key)
                    && let Err(why) = self.take_port(&key, number, &namespace, &name, dry, taken).await?
                {
                    let mut errors = Errors::default();
                    let path = Path::Root.at("spec");
                    let why = format!("failed to allocate requested HealthCheck NodePort {number}: {why}");
                    errors.invalid(path.at(KEY), number, why);
                    return Err(ApiError::invalid(row, &name, &errors));
                }
            }
        }
        Ok(())
    }

    /// Takes a port of the nodes that somebody chose. Says why not, if it cannot be had.
    async fn take_port(
        &self,
        key: &str,
        number: i64,
        namespace: &str,
        name: &str,
        dry: bool,
        taken: &mut Vec<String>,
    ) -> Result<std::result::Result<(), String>> {
        let range = &self.config.node_ports;
        if !u16::try_from(number).is_ok_and(|n| range.contains(&n)) {
            let (start, end) = (range.start(), range.end());
            return Ok(Err(format!(
                "provided port is not in the valid range. The range of valid ports is {start}-{end}"
            )));
        }
        if !dry && !self.claim(key, port_owner(namespace, name), taken).await? {
            return Ok(Err("provided port is already allocated".into()));
        }
        Ok(Ok(()))
    }

    /// Takes the addresses that a Service names, and gives it those that it lacks: one of each of its families.
    async fn allocate_addresses(
        &self,
        row: &Row,
        service: &mut Value,
        held: &[String],
        dry: bool,
        taken: &mut Vec<String>,
    ) -> Result<()> {
        let of = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (namespace, name) = (of(&service["metadata"]["namespace"]), of(&service["metadata"]["name"]));
        let list = |key: &str| service["spec"][key].as_array().into_iter().flatten().map(of).collect::<Vec<_>>();
        let (mut ips, families) = (list("clusterIPs"), list("ipFamilies"));
        let asked = ips.clone();
        ips.resize(ips.len().max(families.len()), String::new());
        for (index, text) in ips.iter_mut().enumerate() {
            if text.is_empty() {
                let range = self.config.service_cidr.of(families.get(index).is_some_and(|family| family == "IPv6"));
                let range = range
                    .ok_or_else(|| ApiError::internal("a Service has a family without a range", families.join(", ")))?;
                *text = self.free_address(range, &namespace, &name, dry, taken).await?.to_string();
                continue;
            }
            let ip: IpAddr = text.parse().map_err(|_| {
                ApiError::bad_request(format!("spec.clusterIPs: Invalid value: {text:?}: must be a valid IP address"))
            })?;
            let Some(range) = self.config.service_cidr.of(ip.is_ipv6()) else { continue };
            let refused = |why: String| {
                let mut errors = Errors::default();
                let path = Path::Root.at("spec");
                errors.invalid(path.at("clusterIPs"), asked.clone(), format!("failed to allocate IP {ip}: {why}"));
                ApiError::invalid(row, &name, &errors)
            };
            if held.contains(&self.address_key(ip)) {
                continue;
            }
            if !range.contains(&ip) {
                return Err(refused(format!(
                    "the provided IP ({ip}) is not in the valid range. The range of valid IPs is {range}"
                )));
            }
            if !dry && !self.claim_address(ip, &namespace, &name, taken).await? {
                return Err(refused("provided IP is already allocated".into()));
            }
        }
        service["spec"]["clusterIP"] = ips.first().cloned().into();
        service["spec"]["clusterIPs"] = ips.into();
        Ok(())
    }

    fn address_key(&self, ip: IpAddr) -> String {
        // The resource is in the table.
        self.registry
            .by_name("networking.k8s.io", "ipaddresses")
            .map(|(_, row)| row.key("", &ip.to_string()))
            .unwrap_or_default()
    }

    async fn claim(&self, key: &str, value: Bytes, taken: &mut Vec<String>) -> Result<bool> {
        match self.store.put(key, value, Expect::Absent, None).await {
            Ok(_) => {
                taken.push(key.to_owned());
                Ok(true)
            }
            Err(store::Error::Conflict { .. }) => Ok(false),
            Err(error) => Err(ApiError::store(error)),
        }
    }

    async fn claim_address(&self, ip: IpAddr, namespace: &str, name: &str, taken: &mut Vec<String>) -> Result<bool> {
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "IPAddress",
            "metadata": {"name": ip.to_string(), "uid": uuid::Uuid::new_v4().to_string(), "creationTimestamp": timestamp(Timestamp::now()),
                "labels": {"ipaddress.kubernetes.io/ip-family": family, "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"}},
            "spec": {"parentRef": {"group": "", "resource": "services", "namespace": namespace, "name": name}}});
        self.claim(&self.address_key(ip), encode(&object), taken).await
    }

    async fn free_address(
        &self,
        range: IpNet,
        namespace: &str,
        name: &str,
        dry: bool,
        taken: &mut Vec<String>,
    ) -> Result<IpAddr> {
        // The lower part of the range is left to those who choose an address themselves (KEP-3070).
        let size = 1_u128 << (range.max_prefix_len() - range.prefix_len()).min(64);
        let reserved = (size / 16).clamp(16.min(size / 2), 256);
        let (low, high) = (reserved, size.saturating_sub(1));
        let count = high.saturating_sub(low).max(1);
        let start = rand::rng().random_range(0..count);
        for step in 0..count.min(4096) {
            let ip = nth(range, low + (start + step) % count);
            let free = match dry {
                true => self
                    .lookup(&self.cache.snapshot(), "networking.k8s.io", "ipaddresses", "", &ip.to_string())
                    .is_none(),
                false => self.claim_address(ip, namespace, name, taken).await?,
            };
            if free {
                return Ok(ip);
            }
        }
        Err(ApiError::unavailable(format!("no free address was found in the range of Services {range}")))
    }

    async fn free_port(
        &self,
        protocol: &str,
        namespace: &str,
        name: &str,
        dry: bool,
        taken: &mut Vec<String>,
    ) -> Result<i64> {
        let (low, high) = (i64::from(*self.config.node_ports.start()), i64::from(*self.config.node_ports.end()));
        let count = high - low + 1;
        let start = rand::rng().random_range(0..count);
        for step in 0..count {
            let port = low + (start + step) % count;
            if dry || self.claim(&port_key(protocol, port), port_owner(namespace, name), taken).await? {
                return Ok(port);
            }
        }
        Err(ApiError::unavailable(format!("no free node port was found in {low}-{high}")))
    }

    /// Gives back what was taken for an object that was not stored.
    pub(crate) async fn release(&self, keys: Vec<String>) {
        for key in keys {
            if let Err(error) = self.store.delete(&key, Expect::Any, None).await {
                // It is found and released after the next start.
                tracing::warn!(%error, key, "an allocation could not be released");
            }
        }
    }

    /// Gives back what an object had and has no longer.
    pub(crate) async fn after_write(&self, row: &Row, old: &Value, new: Option<&Value>) {
        if !is_service(row) {
            return;
        }
        let kept = new.map(|new| claims(self, new)).unwrap_or_default();
        let gone = claims(self, old).into_iter().filter(|key| !kept.contains(key)).collect();
        self.release(gone).await;
    }

    /// Releases what was taken by a server that died before it stored the Service. What another server may be about to
    /// use is left alone: only what was unused before and after the longest time that a request takes is released.
    pub(crate) async fn repair_allocations(&self, pause: std::time::Duration) -> Result<()> {
        let before = self.unused_allocations().await?;
        if before.is_empty() {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.stop.cancelled() => return Ok(()),
        }
        let after = self.unused_allocations().await?;
        for (key, revision) in before.into_iter().filter(|held| after.contains(held)) {
            match self.store.delete(&key, Expect::At(revision), None).await {
                Ok(_) => tracing::info!(key, "an allocation that nothing uses was released"),
                Err(error) => tracing::debug!(%error, "an allocation stays"),
            }
        }
        Ok(())
    }

    /// Addresses and ports that are taken and that no Service has, with the revision at which they were taken.
    async fn unused_allocations(&self) -> Result<Vec<(String, Revision)>> {
        let ports = self.store.list(PORTS, Default::default()).await.map_err(ApiError::store)?;
        let mut held: Vec<_> = ports.entries.iter().map(|e| (e.key.to_string(), e.revision)).collect();
        let snapshot = self.consistent().await?;
        let Some((id, row)) = self.registry.by_name("", "services") else { return Ok(Vec::new()) };
        let prefix = row.prefix();
        let used: std::collections::HashSet<String> =
            snapshot.range(id, &prefix, None).flat_map(|o| claims(self, &o.value())).collect();
        if let Some((id, row)) = self.registry.by_name("networking.k8s.io", "ipaddresses") {
            let prefix = row.prefix();
            held.extend(snapshot.range(id, &prefix, None).map(|o| (o.key.to_string(), o.revision)));
        }
        held.retain(|(key, _)| !used.contains(key));
        Ok(held)
    }
}

/// An address of a range by its number.
fn nth(range: IpNet, number: u128) -> IpAddr {
    match range.network() {
        IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits().wrapping_add(number as u32)).into(),
        IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits().wrapping_add(number)).into(),
    }
}

fn port_owner(namespace: &str, name: &str) -> Bytes {
    json!({"namespace": namespace, "name": name}).to_string().into()
}
