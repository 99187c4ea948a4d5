//! Rules about Services.

use super::{
    Finding, Severity,
    facts::{Facts, title},
};

pub(super) const BALANCER: &str = "balancer";

/// The class that the cluster's own controller gives addresses to.
const CLASS: &str = "seawall.dev/load-balancer";

/// Services of type LoadBalancer that wait for an address.
pub fn balancer(facts: &Facts) -> Vec<Finding> {
    let class = |class: &serde_json::Value| class.is_null() || class == CLASS;
    let waits = |service: &&serde_json::Value| {
        let ingress = service["status"]["loadBalancer"]["ingress"].as_array();
        service["spec"]["type"] == "LoadBalancer"
            && class(&service["spec"]["loadBalancerClass"])
            && ingress.is_none_or(Vec::is_empty)
    };
    let finding = |service| {
        Finding {
        severity: Severity::Warning,
        rule: BALANCER,
        object: title(service, "Service"),
        why: "It waits for an address: nobody outside the cluster reaches it but by a node's port, which goes with the node."
            .into(),
        mend: "kubectl describe service says why; where nobody gives addresses, start the servers with \
               --load-balancer-pool FIRST-LAST, unused addresses of the machines' network"
            .into(),
    }
    };
    facts.services.iter().filter(waits).map(finding).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn who_waits_for_an_address() {
        let check = |spec: Value, status: Value, expect: usize| {
            let service = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": spec, "status": status});
            let facts = Facts { services: vec![service], ..Facts::default() };
            assert_eq!(balancer(&facts).len(), expect, "{spec} {status}");
        };
        let given = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.7"}]}});
        check(json!({"type": "LoadBalancer"}), json!({"loadBalancer": {}}), 1);
        check(json!({"type": "LoadBalancer"}), given, 0);
        check(json!({"type": "LoadBalancer", "loadBalancerClass": CLASS}), json!({}), 1);
        check(json!({"type": "LoadBalancer", "loadBalancerClass": "other.example/x"}), json!({}), 0);
        check(json!({"type": "NodePort"}), json!({}), 0);
    }
}
