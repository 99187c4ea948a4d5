//! What every cluster has from the start: namespaces, the `kubernetes` Service, the range of Service addresses, the
//! priority classes of the system.

use std::{net::IpAddr, sync::Arc};

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    Context, Server,
    auth::rbac::{self, policy},
    error::{ApiError, Result},
    request::ResourcePath,
};

impl Server {
    pub(crate) async fn bootstrap(self: &Arc<Self>) -> Result<()> {
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            self.ensure("", "namespaces", json!({"metadata": {"name": name}}), false).await?;
        }
        for (name, value, description) in [
            (
                "system-node-critical",
                2_000_001_000,
                "Used for system critical pods that must not be moved from their current node.",
            ),
            (
                "system-cluster-critical",
                2_000_000_000,
                "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
            ),
        ] {
            let class = json!({"metadata": {"name": name}, "value": value, "description": description});
            self.ensure("scheduling.k8s.io", "priorityclasses", class, false).await?;
        }
        let cidrs: Vec<String> = self.config.service_cidr.iter().map(|range| range.to_string()).collect();
        let range = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}});
        self.ensure("networking.k8s.io", "servicecidrs", range, false).await?;
        for (plural, object) in policy::objects() {
            self.ensure_policy(plural, object).await?;
        }
        self.ensure_flow().await?;
        // Nobody needs it at once, and it is tried again.
        if let Err(error) = self.identify().await {
            tracing::warn!(error = error.message, "other API servers are not told whom to believe");
        }
        self.kubernetes_service().await
    }

    /// A role or binding that every cluster has: what it lacks of it is added, unless that was forbidden. A binding that
    /// leads to another role is left alone, since it cannot be changed.
    async fn ensure_policy(self: &Arc<Self>, plural: &str, wanted: Value) -> Result<()> {
        let name = wanted["metadata"]["name"].as_str().unwrap_or_default();
        let there = self.find(rbac::GROUP, plural, "", name).await?;
        let Some(mut there) = there.map(|there| there.value()) else {
            return self.ensure(rbac::GROUP, plural, wanted, false).await;
        };
        if there["metadata"]["annotations"][policy::AUTOUPDATE] != "true" || there["roleRef"] != wanted["roleRef"] {
            return Ok(());
        }
        let before = there.clone();
        for list in ["rules", "subjects"] {
            let missing: Vec<Value> = wanted[list].as_array().into_iter().flatten().cloned().collect();
            for item in missing {
                let known = there[list].as_array().is_some_and(|known| known.contains(&item));
                if !known && !there[list].is_array() {
                    there[list] = json!([item]);
                } else if !known && let Some(known) = there[list].as_array_mut() {
                    known.push(item);
                }
            }
        }
        for (label, value) in wanted["metadata"]["labels"].as_object().into_iter().flatten() {
            there["metadata"]["labels"][label] = value.clone();
        }
        if there == before {
            return Ok(());
        }
        self.ensure(rbac::GROUP, plural, there, true).await
    }

    /// The Service under which pods reach the API: the first address of the range, with this server behind it.
    async fn kubernetes_service(self: &Arc<Self>) -> Result<()> {
        let labels = json!({"component": "apiserver", "provider": "kubernetes"});
        let ip = first_address(self.config.service_cidr.first());
        let (address, port) = self.config.advertise;
        let service = json!({"metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
            "spec": {"clusterIP": ip.to_string(), "type": "ClusterIP", "sessionAffinity": "None",
                "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]}});
        self.ensure("", "services", service, false).await?;
        self.set_kubernetes_endpoints(&[(address, port)], false).await
    }

    /// Says which servers stand behind the `kubernetes` Service. Without `update`, only if nothing is said yet.
    pub(crate) async fn set_kubernetes_endpoints(
        self: &Arc<Self>,
        servers: &[(IpAddr, u16)],
        update: bool,
    ) -> Result<()> {
        let Some((first, port)) = servers.first().copied() else { return Ok(()) };
        let family = if first.is_ipv4() { "IPv4" } else { "IPv6" };
        // A port is said once for all endpoints, as upstream's reconciler does.
        let addresses: Vec<String> = servers
            .iter()
            .filter(|(ip, p)| ip.is_ipv4() == first.is_ipv4() && *p == port)
            .map(|(ip, _)| ip.to_string())
            .collect();
        let ports = json!([{"name": "https", "port": port, "protocol": "TCP"}]);
        let subset: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let endpoints = json!({"metadata": {"name": "kubernetes", "namespace": "default",
                "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": [{"addresses": subset, "ports": ports}]});
        let each: Vec<Value> =
            addresses.iter().map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect();
        let slice = json!({"metadata": {"name": "kubernetes", "namespace": "default",
                "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": family, "ports": ports, "endpoints": each});
        // The slice is what proxies and balancers follow.
        self.ensure("discovery.k8s.io", "endpointslices", slice, update).await?;
        self.ensure("", "endpoints", endpoints, update).await
    }

    /// Writes the status of an object of the cluster as it was read before. That another server was faster is no error: it
    /// thinks the same, or whoever asked for this looks again.
    pub(crate) async fn put_status(self: &Arc<Self>, group: &'static str, plural: &str, object: Value) -> Result<()> {
        let (_, row) = self.registry.by_name(group, plural).ok_or_else(ApiError::no_route)?;
        let served = self.registry.find(row.group, row.version, row.plural).ok_or_else(ApiError::no_route)?;
        let path = ResourcePath {
            group: row.group.into(),
            version: row.version.into(),
            resource: row.plural.into(),
            name: object["metadata"]["name"].as_str().map(str::to_owned),
            subresource: Some("status".into()),
            ..Default::default()
        };
        let mut context = Context::own(&self.registry, path, &served);
        context.body = object.to_string().into();
        match self.subresource(&context, &Method::PUT).await {
            Err(error) if ![StatusCode::CONFLICT, StatusCode::NOT_FOUND].contains(&error.code) => Err(error),
            _ => Ok(()),
        }
    }

    /// Creates an object if it is not there; `update` makes it as given if it is.
    pub(crate) async fn ensure(
        self: &Arc<Self>,
        group: &'static str,
        plural: &str,
        mut object: Value,
        update: bool,
    ) -> Result<()> {
        let (id, row) = self.registry.by_name(group, plural).ok_or_else(ApiError::no_route)?;
        let served = self.registry.find(row.group, row.version, row.plural).ok_or_else(ApiError::no_route)?;
        debug_assert_eq!(served.id, id);
        object["kind"] = row.kind.into();
        object["apiVersion"] = row.api_version().into();
        let text = |v: &Value| v.as_str().map(str::to_owned);
        let (name, namespace) = (text(&object["metadata"]["name"]), text(&object["metadata"]["namespace"]));
        let path = ResourcePath {
            group: group.into(),
            version: row.version.into(),
            resource: plural.into(),
            namespace,
            ..Default::default()
        };
        let mut context = Context::own(&self.registry, path, &served);
        let key = row.key(context.namespace(), name.as_deref().unwrap_or_default());
        let there = self.consistent().await?.get(id, &key).is_some();
        if there && update {
            context.path.name = name;
            context.body = object.to_string().into();
            self.update(&context).await?;
            return Ok(());
        }
        if there {
            return Ok(());
        }
        match self.create_object(&context, object.into()).await {
            Ok(_) => Ok(()),
            // Another server was faster.
            Err(error) if error.reason == "AlreadyExists" => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The address of the API inside the cluster: the first of the range of Services.
pub fn first_address(cidr: ipnet::IpNet) -> IpAddr {
    cidr.hosts().next().unwrap_or_else(|| cidr.network())
}
