//! The objects that the replicas of the cluster's DNS are. Every server makes them at its start, and brings them up to
//! date; an annotation keeps it from that.

use std::{net::IpAddr, time::Duration};

use anyhow::Context as _;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::options::Cluster;

const NAMESPACE: &str = "kube-system";
const NAME: &str = "seawall-dns";
/// With `false`, an object is left as it is.
const AUTOUPDATE: &str = "seawall.dev/autoupdate";
/// As whom the objects are applied.
const MANAGER: &str = "seawall-dns";
/// How often the number of nodes is looked at, which says how replicas are spread.
const LOOK: Duration = Duration::from_secs(5);

/// Makes the objects and keeps them up to date until `stop`.
///
/// # Errors
/// If the API refuses.
pub async fn keep(client: Client, cluster: Cluster, image: String, stop: CancellationToken) -> anyhow::Result<()> {
    let mut spread = several(&client).await?;
    for object in objects(&cluster, &image, spread) {
        apply(&client, object, true).await?;
    }
    loop {
        if stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_none() {
            return Ok(());
        }
        // A failure is no reason to begin anew: what was taken away meanwhile was meant to be.
        match spread_again(&client, &cluster, &image, spread).await {
            Ok(now) => spread = now,
            Err(error) => tracing::warn!("the replicas of DNS are not spread anew: {error:#}"),
        }
    }
}

async fn spread_again(client: &Client, cluster: &Cluster, image: &str, before: bool) -> anyhow::Result<bool> {
    let now = several(client).await?;
    if now != before {
        apply(client, deployment(cluster, image, now), false).await?;
    }
    Ok(now)
}

/// Whether there is more than one node.
async fn several(client: &Client) -> anyhow::Result<bool> {
    let nodes = Api::<k8s_openapi::api::core::v1::Node>::all(client.clone());
    let list = nodes.list_metadata(&ListParams::default().limit(2)).await.context("count the nodes")?;
    Ok(list.items.len() > 1)
}

async fn apply(client: &Client, mut object: Value, create: bool) -> anyhow::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, kind, name) = (text(&object["apiVersion"]), text(&object["kind"]), text(&object["metadata"]["name"]));
    let (group, version) = version.rsplit_once('/').unwrap_or(("", &version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
    let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    match api.get_opt(&name).await.with_context(|| format!("read {kind} {name}"))? {
        None if !create => return Ok(()),
        None => {}
        Some(there) => {
            let annotations = there.metadata.annotations.as_ref();
            if annotations.and_then(|a| a.get(AUTOUPDATE)).is_some_and(|value| value == "false") {
                return Ok(());
            }
            // How many there are is the owner's to say.
            if kind == "Deployment" && there.data["spec"]["replicas"].is_u64() {
                object["spec"]["replicas"] = there.data["spec"]["replicas"].clone();
            }
        }
    }
    let how = PatchParams::apply(MANAGER).force();
    api.patch(&name, &how, &Patch::Apply(&object)).await.with_context(|| format!("apply {kind} {name}"))?;
    Ok(())
}

fn objects(cluster: &Cluster, image: &str, spread: bool) -> Vec<Value> {
    let labels = json!({"k8s-app": "kube-dns", "kubernetes.io/name": "SeawallDNS"});
    let meta = |name: &str| json!({"name": name, "namespace": NAMESPACE, "labels": labels});
    let account = json!([{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}]);
    let own = cluster.dns.iter().find(|ip| cluster.service_cidr.contains(**ip)).map(IpAddr::to_string);
    let rbac = "rbac.authorization.k8s.io/v1";
    let role = format!("system:{NAME}");
    let reads = |group: &str, resource: &str| json!({"apiGroups": [group], "resources": [resource], "verbs": ["get", "list", "watch"]});
    let mut of_map = reads("", "configmaps");
    of_map["resourceNames"] = json!([seawall_dns::watch::CONFIG_MAP]);
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta(NAME)}),
        json!({"apiVersion": rbac, "kind": "ClusterRole", "metadata": {"name": role, "labels": labels},
            "rules": [reads("", "services"), reads("discovery.k8s.io", "endpointslices")]}),
        json!({"apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": {"name": role, "labels": labels},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}, "subjects": account}),
        json!({"apiVersion": rbac, "kind": "Role", "metadata": meta(NAME), "rules": [of_map]}),
        json!({"apiVersion": rbac, "kind": "RoleBinding", "metadata": meta(NAME),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": NAME}, "subjects": account}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": meta("kube-dns"),
            "spec": {"clusterIP": own, "selector": {"k8s-app": "kube-dns"}, "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "dns"},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": "dns-tcp"}]}}),
        json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": meta(NAME),
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"k8s-app": "kube-dns"}}}}),
        deployment(cluster, image, spread),
    ]
}

/// `spread`: no two replicas on one node. On a lone node both are there, since one that waits forever looks like an error.
fn deployment(cluster: &Cluster, image: &str, spread: bool) -> Value {
    let labels = json!({"k8s-app": "kube-dns"});
    let apart = json!({"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}});
    let affinity = match spread {
        true => json!({"requiredDuringSchedulingIgnoredDuringExecution": [apart]}),
        false => {
            json!({"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]})
        }
    };
    let mut args = vec!["dns".to_owned(), format!("--cluster-domain={}", cluster.domain)];
    args.extend(cluster.dns.iter().map(|ip| format!("--cluster-dns={ip}")));
    args.extend(super::ranges(cluster).map(|range| format!("--range={range}")));
    let probe = |path: &str, every: u32| {
        json!({"httpGet": {"path": path, "port": "metrics", "scheme": "HTTP"}, "periodSeconds": every,
            "timeoutSeconds": 5, "successThreshold": 1, "failureThreshold": 3})
    };
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": NAME, "namespace": NAMESPACE, "labels": {"k8s-app": "kube-dns", "kubernetes.io/name": "SeawallDNS"}},
        "spec": {
            "replicas": 2,
            "minReadySeconds": 2,
            // Where replicas may not be neighbours, there may be no room for a third.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "priorityClassName": "system-cluster-critical",
                    "serviceAccountName": NAME,
                    "nodeSelector": {"kubernetes.io/os": "linux"},
                    "tolerations": [
                        {"key": "CriticalAddonsOnly", "operator": "Exists"},
                        {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule", "operator": "Exists"}],
                    "affinity": {"podAntiAffinity": affinity},
                    // It asks whom the node asks: to ask itself would be a circle.
                    "dnsPolicy": "Default",
                    "terminationGracePeriodSeconds": 15,
                    "containers": [{
                        "name": "dns",
                        "image": image,
                        "imagePullPolicy": "IfNotPresent",
                        "args": args,
                        "ports": [
                            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
                            {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"},
                            {"name": "metrics", "containerPort": 8081, "protocol": "TCP"}],
                        "readinessProbe": probe("/readyz", 1),
                        "livenessProbe": probe("/healthz", 10),
                        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
                        "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                            "runAsNonRoot": true, "runAsUser": 65532,
                            "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}},
                    }],
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> Cluster {
        Cluster {
            cluster_cidr: "10.244.0.0/16".parse().unwrap(),
            node_masks: Default::default(),
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            node_ports: (30000, 32767),
            domain: "cluster.local".into(),
            dns: vec!["10.96.0.10".parse().unwrap()],
            timing: Default::default(),
        }
    }

    #[test]
    fn what_the_replicas_are() {
        let all = objects(&cluster(), "example.test/x:1", true);
        let of = |kind: &str| all.iter().find(|o| o["kind"] == kind).unwrap();
        assert_eq!(of("Service")["spec"]["clusterIP"], "10.96.0.10");
        let pod = &of("Deployment")["spec"]["template"]["spec"];
        assert_eq!(pod["containers"][0]["image"], "example.test/x:1");
        let affinity = &pod["affinity"]["podAntiAffinity"];
        let required = "requiredDuringSchedulingIgnoredDuringExecution";
        assert_eq!(affinity[required][0]["topologyKey"], "kubernetes.io/hostname");
        let alone = deployment(&cluster(), "example.test/x:1", false);
        assert!(alone["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"][required].is_null());
    }
}
