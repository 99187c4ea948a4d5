//! What is to be done about a request for a certificate: approve, sign, fail, forget. Purely.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::{certificates::v1::CertificateSigningRequest, core::v1::Node};
use seawall_api::{
    certificate_request::{CertificateRequest, KUBELET_CLIENT, KUBELET_SERVING},
    names,
};

use crate::{
    context::delay,
    runtime::objects::{created, name},
};

/// How long requests are kept that have been answered, one way or the other, and those that have not
/// (upstream's csrcleaner).
const ANSWERED: Duration = Duration::from_secs(3600);
const PENDING: Duration = Duration::from_secs(24 * 3600);

const BOOTSTRAPPERS: &str = "system:bootstrappers";
const NODES: &str = "system:nodes";
const MASTERS: &str = "system:masters";
/// Nodes with this label run an API server. A node cannot give it to itself.
const CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane";

/// What is known beside the request itself.
pub struct Facts<'a> {
    /// All nodes.
    pub nodes: &'a [Arc<Node>],
    /// The addresses of API servers.
    pub servers: &'a [IpAddr],
    /// Addresses that belong to Services and pods.
    pub ranges: &'a [IpNet],
    /// The time.
    pub now: Timestamp,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Nothing.
    Nothing,
    /// Nothing, since it is not what is approved without a person. With the reason, if it is nearly that.
    Leave(String),
    /// Approve, with this message.
    Approve(&'static str),
    /// Sign.
    Sign,
    /// Say that it cannot be signed, and why.
    Fail(String),
    /// Delete.
    Delete(&'static str),
}

/// A step, and after which time to look again.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What to do now.
    pub step: Step,
    /// When to look again.
    pub again: Option<Duration>,
}

/// Decides. `issued_until` is the end of the certificate that has been issued.
pub fn plan(csr: &CertificateSigningRequest, issued_until: Option<Timestamp>, facts: &Facts<'_>) -> Plan {
    let left = match life(csr, issued_until, facts.now) {
        Ok(left) => left,
        Err(why) => return Plan { step: Step::Delete(why), again: None },
    };
    Plan { step: step(csr, facts), again: left }
}

fn condition(csr: &CertificateSigningRequest, ty: &str) -> Option<Timestamp> {
    let mut conditions = csr.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let found = conditions.find(|c| c.type_ == ty && c.status == "True")?;
    Some(found.last_update_time.as_ref().map_or(created(csr), |t| t.0))
}

fn is_issued(csr: &CertificateSigningRequest) -> bool {
    csr.status.iter().any(|s| s.certificate.as_ref().is_some_and(|c| !c.0.is_empty()))
}

/// How long it is still kept (for good, if it has no end), or why no longer.
fn life(
    csr: &CertificateSigningRequest,
    issued_until: Option<Timestamp>,
    now: Timestamp,
) -> Result<Option<Duration>, &'static str> {
    let (approved, issued) = (condition(csr, "Approved"), is_issued(csr));
    let any = csr.status.iter().any(|s| s.conditions.as_ref().is_some_and(|c| !c.is_empty()));
    let after = |t: Timestamp, d: Duration| t.checked_add(d).unwrap_or(Timestamp::MAX);
    let ends = [
        (approved.filter(|_| issued).map(|t| after(t, ANSWERED)), "it was answered an hour ago"),
        (condition(csr, "Denied").map(|t| after(t, ANSWERED)), "it was denied an hour ago"),
        (condition(csr, "Failed").map(|t| after(t, ANSWERED)), "it failed an hour ago"),
        (approved.filter(|_| !issued).map(|t| after(t, PENDING)), "it was approved a day ago and nobody signed it"),
        ((!any).then(|| after(created(csr), PENDING)), "nobody has approved it for a day"),
        (issued_until.filter(|_| issued), "its certificate has expired"),
    ];
    let mut left: Option<Duration> = None;
    for (end, why) in ends {
        let Some(end) = end else { continue };
        if end <= now {
            return Err(why);
        }
        let remaining = delay(end.duration_since(now));
        left = Some(left.map_or(remaining, |left| left.min(remaining)));
    }
    Ok(left)
}

fn step(csr: &CertificateSigningRequest, facts: &Facts<'_>) -> Step {
    let (approved, denied) = (condition(csr, "Approved").is_some(), condition(csr, "Denied").is_some());
    if is_issued(csr) || denied || condition(csr, "Failed").is_some() {
        return Step::Nothing;
    }
    let usages = csr.spec.usages.clone().unwrap_or_default();
    let signer = csr.spec.signer_name.as_str();
    let request = match CertificateRequest::from_pem(&csr.spec.request.0) {
        Ok(request) => request,
        // The API does not let it in. Whoever approved it nevertheless is told.
        Err(error) if approved => return Step::Fail(error.to_string()),
        Err(_) => return Step::Nothing,
    };
    match request.check(signer, &usages) {
        // Somebody else's.
        None => Step::Nothing,
        Some(Err(why)) if approved => Step::Fail(why),
        Some(Err(_)) => Step::Nothing,
        Some(Ok(())) if approved => Step::Sign,
        Some(Ok(())) => approve(csr, &request, facts),
    }
}

/// Whether it is one of those that need no person's approval.
fn approve(csr: &CertificateSigningRequest, request: &CertificateRequest, facts: &Facts<'_>) -> Step {
    let in_group = |group: &str| csr.spec.groups.iter().flatten().any(|g| g == group);
    let own = csr.spec.username.as_deref() == Some(&request.common_name) && in_group(NODES);
    let Some(node) = request.node() else { return Step::Nothing };
    if let Err(why) = names::dns_subdomain(node) {
        return Step::Leave(format!("{node:?} cannot be the name of a node: {why}"));
    }
    match csr.spec.signer_name.as_str() {
        KUBELET_CLIENT if own => Step::Approve("Auto approving self kubelet client certificate."),
        KUBELET_CLIENT if in_group(BOOTSTRAPPERS) || in_group(MASTERS) => {
            Step::Approve("Auto approving kubelet client certificate.")
        }
        KUBELET_SERVING if own => match serving_names(request, node, facts) {
            Ok(()) => Step::Approve("Auto approving kubelet serving certificate: its names are those of its Node."),
            Err(Not::Yet) => Step::Nothing,
            Err(Not::Ever(why)) => Step::Leave(why),
        },
        _ => Step::Nothing,
    }
}

/// Why a serving certificate is not approved.
enum Not {
    /// The Node has not yet said where it is.
    Yet,
    /// Something is wrong with its names.
    Ever(String),
}

/// Whether the names and addresses of a serving certificate are those of the Node, and nobody else's.
///
/// A node says itself in its status which addresses it has. So they must not be anything that it could gain by: names
/// and addresses of the API, of Services and pods, and of other nodes.
fn serving_names(request: &CertificateRequest, node_name: &str, facts: &Facts<'_>) -> Result<(), Not> {
    let Some(node) = facts.nodes.iter().find(|n| name(&***n) == node_name) else { return Err(Not::Yet) };
    if node.status.iter().flat_map(|s| s.addresses.iter().flatten()).next().is_none() {
        return Err(Not::Yet);
    }
    check_names(request, node, facts).map_err(Not::Ever)
}

fn check_names(request: &CertificateRequest, node: &Node, facts: &Facts<'_>) -> Result<(), String> {
    let node_name = name(node);
    let addresses = |node: &Node| -> Vec<(String, String)> {
        let list = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
        list.map(|a| (a.type_.clone(), a.address.clone())).collect()
    };
    let own = addresses(node);
    let others = || facts.nodes.iter().filter(|n| name(&***n) != node_name);
    for dns in &request.dns_names {
        let lower = dns.to_lowercase();
        names::dns_subdomain(&lower).map_err(|_| format!("{dns:?} is not the name of a host"))?;
        if is_reserved(&lower) {
            return Err(format!("{dns:?} is a name of the cluster's own"));
        }
        let is_own = |(ty, address): &(String, String)| {
            matches!(ty.as_str(), "Hostname" | "InternalDNS" | "ExternalDNS") && *address == lower
        };
        if lower != node_name && !own.iter().any(is_own) {
            return Err(format!("{dns:?} is not in status.addresses of Node {node_name:?}"));
        }
        let taken = |n: &&Arc<Node>| name(&***n) == lower || addresses(n).iter().any(|(_, a)| *a == lower);
        if let Some(other) = others().find(taken) {
            return Err(format!("{dns:?} belongs to Node {:?}", name(&**other)));
        }
    }
    for ip in &request.addresses {
        let is = |(ty, address): &(String, String)| {
            matches!(ty.as_str(), "InternalIP" | "ExternalIP") && address.parse() == Ok(*ip)
        };
        if !own.iter().any(is) {
            return Err(format!("{ip} is not in status.addresses of Node {node_name:?}"));
        }
        if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
            return Err(format!("{ip} is not the address of a machine"));
        }
        if let Some(range) = facts.ranges.iter().find(|r| r.contains(ip)) {
            return Err(format!("{ip} lies in {range}, which is for pods or Services"));
        }
        if let Some(other) = others().find(|n| addresses(n).iter().any(is)) {
            return Err(format!("{ip} belongs to Node {:?}", name(&**other)));
        }
        let serves = node.metadata.labels.as_ref().is_some_and(|l| l.contains_key(CONTROL_PLANE));
        if facts.servers.contains(ip) && !serves {
            return Err(format!(
                "{ip} is the address of an API server, and Node {node_name:?} has no label {CONTROL_PLANE}"
            ));
        }
    }
    Ok(())
}

/// Names under which the API and Services are reached.
fn is_reserved(name: &str) -> bool {
    let first = name.split('.').next().unwrap_or_default();
    matches!(first, "kubernetes" | "localhost") || name.split('.').any(|label| label == "svc")
}
