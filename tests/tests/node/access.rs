//! The agent's own API, as somebody else's monitoring reads it: with the token of a pod's service account.

use seawall_tests::{Server, kubectl::has, on_a_machine, until};

use super::IMAGE;

/// Where the agent listens.
const AGENT: &str = "https://192.0.2.10:10250";

const READER: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: metrics-of-nodes}
rules: [{apiGroups: [''], resources: [nodes/metrics], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: metrics-of-nodes}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: metrics-of-nodes}
subjects: [{kind: ServiceAccount, name: reader, namespace: default}]
---
";

/// A pod with an account.
fn pod(name: &str, account: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  serviceAccountName: {account}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: {IMAGE}
    command: [sleep, '10000']
---"
    )
}

#[test]
fn tokens_read_what_they_may() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        k.apply(&format!("{READER}{}{}", pod("may", "reader"), pod("must-not", "default"))).await;
        k.run("wait pod/may pod/must-not --for=condition=Ready --timeout=60s").await.ok();
        let ask = async |token: Option<&str>, path: &str| {
            let (header, url) = (token.map(|token| format!("Authorization: Bearer {token}")), format!("{AGENT}{path}"));
            let mut words = vec!["-sk", "-m", "10", "-w", "\n%{http_code}", &url];
            words.extend(header.iter().flat_map(|header| ["-H", header.as_str()]));
            let said = server.on_machine("curl", &words).await.ok();
            let (body, code) = said.trim_end().rsplit_once('\n').unwrap();
            (code.to_owned(), body.to_owned())
        };
        let code = async |token: &str, path: &str| ask(Some(token), path).await.0;
        // The tokens that the pods have themselves.
        let own = async |name: &str| {
            let file = "/var/run/secrets/kubernetes.io/serviceaccount/token";
            k.run(&format!("exec {name} -- cat {file}")).await.ok().trim().to_owned()
        };
        let (may, must_not) = (own("may").await, own("must-not").await);
        until("what pods use is told", async || {
            let (code, body) = ask(Some(&may), "/metrics/resource").await;
            (code == "200" && body.contains("container_memory_working_set_bytes{")).then_some(())
        })
        .await;
        assert_eq!(code(&may, "/metrics").await, "200");
        // What it has no right to, and who has none.
        let (refused, why) = ask(Some(&may), "/pods").await;
        assert_eq!(refused, "403");
        let user = "Forbidden (user=system:serviceaccount:default:reader, verb=get, resource=nodes, subresource(s)=[pods proxy])";
        has(why, &[user]);
        assert_eq!(code(&may, "/exec/default/may/main?command=id").await, "403");
        assert_eq!(code(&must_not, "/metrics/resource").await, "403");
        assert_eq!(code("no.such.token", "/metrics/resource").await, "401");
        assert_eq!(ask(None, "/metrics").await, ("401".to_owned(), "Unauthorized".to_owned()));

        // A finer right than nodes/proxy is enough; that one is enough as well, but for commands.
        for (name, resource, path, expect) in [
            ("finer", "nodes/pods", "/pods", "200"),
            ("coarser", "nodes/proxy", "/pods", "200"),
            ("runner", "nodes/proxy", "/exec/default/may/main?command=id", "403"),
        ] {
            k.run(&format!("create serviceaccount {name}")).await.ok();
            k.run(&format!("create clusterrole {name} --verb=get --resource={resource}")).await.ok();
            k.run(&format!("create clusterrolebinding {name} --clusterrole={name} --serviceaccount=default:{name}"))
                .await
                .ok();
            let token = k.run(&format!("create token {name}")).await.ok();
            assert_eq!(code(token.trim(), path).await, expect, "{name}");
        }
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}
