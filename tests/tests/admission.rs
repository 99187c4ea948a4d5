//! Admission as people use it: policies, limits, quotas and levels, with kubectl.

use seawall_tests::{Options, Server, kubectl::has};

const POLICY: &str = "
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: few}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [apps], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [deployments]}
  validations:
  - expression: object.spec.replicas <= 2
    messageExpression: \"'at most 2 replicas, not ' + string(object.spec.replicas)\"
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: few}
spec: {policyName: few, validationActions: [Deny]}
";

/// One that does not fit what it is about.
const ODD: &str = "
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: odd}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [apps], apiVersions: [v1], operations: [CREATE], resources: [deployments]}
  validations:
  - expression: object.spec.replicsa <= 2
";

const LIMITS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: small, labels: {pod-security.kubernetes.io/enforce: baseline}}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: q, namespace: small}
spec: {hard: {configmaps: '3', pods: '2'}}
---
apiVersion: v1
kind: LimitRange
metadata: {name: r, namespace: small}
spec:
  limits:
  - {type: Container, max: {memory: 1Gi}, default: {memory: 128Mi}}
";

fn pod(name: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: small}}\nspec:\n  containers:\n  - {{name: c, image: i{more}}}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_is_told_what_is_not_allowed() {
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler".into()] }).await;
    let k = &server.kubectl;
    k.reaches("namespace/default", "{.metadata.name}", "default").await;
    k.apply(POLICY).await;
    k.apply(ODD).await;
    let (few, odd) = ("validatingadmissionpolicy/few", "validatingadmissionpolicy/odd");
    k.reaches(few, "{.status.observedGeneration}:{.status.typeChecking}", "1:{}").await;
    k.reaches(odd, "{.status.observedGeneration}", "1").await;
    let warning = "{.status.typeChecking.expressionWarnings[*]";
    assert_eq!(k.path(odd, &format!("{warning}.fieldRef}}")).await, "spec.validations[0].expression");
    has(
        k.path(odd, &format!("{warning}.warning}}")).await,
        &["apps/v1, Kind=Deployment: ERROR: <input>:1:12: undefined field 'replicsa'"],
    );
    has(k.run("get validatingadmissionpolicies").await.ok(), &["NAME", "VALIDATIONS", "few"]);
    let refused = k.run("create deployment web --image=web:1 --replicas=3").await.fails();
    has(
        &refused,
        &[
            "deployments.apps \"web\" is forbidden: ValidatingAdmissionPolicy 'few' with binding 'few' denied request: at most 2 replicas, not 3",
        ],
    );
    k.run("create deployment web --image=web:1 --replicas=2").await.ok();
    has(k.run("scale deployment/web --replicas=1").await.ok(), &["scaled"]);

    k.apply(LIMITS).await;
    k.reaches("-n small serviceaccount/default", "{.metadata.name}", "default").await;
    // The certificate of the authority is one of the three.
    k.reaches("-n small resourcequota/q", "{.status.used.configmaps}", "1").await;
    k.run("-n small create configmap a").await.ok();
    k.run("-n small create configmap b").await.ok();
    has(
        k.run("-n small create configmap c").await.fails(),
        &["exceeded quota: q, requested: configmaps=1, used: configmaps=3, limited: configmaps=3"],
    );
    k.run("-n small delete configmap a").await.ok();
    k.run("-n small create configmap c").await.ok();
    has(k.run("-n small describe quota q").await.ok(), &["configmaps  3", "pods        0"]);

    k.pipe("create -f -", &pod("p", "")).await.ok();
    k.reaches("-n small pod/p", "{.spec.containers[0].resources.limits.memory}", "128Mi").await;
    let large = k.pipe("create -f -", &pod("large", ", resources: {limits: {memory: 2Gi}}")).await.fails();
    has(&large, &["maximum memory usage per Container is 1Gi, but limit is 2Gi"]);
    let strong = k.pipe("create -f -", &pod("strong", ", securityContext: {privileged: true}")).await.fails();
    has(
        &strong,
        &[
            "violates PodSecurity \"baseline:latest\": privileged (container \"c\" must not set securityContext.privileged=true)",
        ],
    );
    k.run("delete validatingadmissionpolicybinding few").await.ok();
    k.run("create deployment many --image=web:1 --replicas=3").await.ok();
}
