//! What answers behind the API: the subresource `proxy` of pods, Services and nodes.

use seawall_tests::{Server, kubectl::has, on_a_machine, until};

use super::IMAGE;

const WEB: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: IMAGE
    command:
    - sh
    - -c
    - |
      mkdir -p /www/deep /www/cgi-bin
      echo 'the page' >/www/deep/index.html
      printf '#!/bin/sh\\necho Content-Type: text/plain\\necho\\necho \"$REQUEST_METHOD $QUERY_STRING $HTTP_AUTHORIZATION.\"\\ncat\\n' \\
        >/www/cgi-bin/echo
      chmod +x /www/cgi-bin/echo
      exec httpd -f -p 8080 -h /www
    ports: [{containerPort: 8080}]
    readinessProbe: {httpGet: {path: /deep/, port: 8080}, periodSeconds: 1}
---
";

#[test]
fn requests_reach_pods_services_and_nodes() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        k.apply(&WEB.replace("IMAGE", IMAGE)).await;
        k.run("wait pod/web --for=condition=Ready --timeout=60s").await.ok();
        let raw = async |path: &str| k.args(&["get", "--raw", &format!("/api/v1{path}")]).await;
        let pod = "/namespaces/default/pods/web";
        has(raw(&format!("{pod}/proxy/deep/")).await.ok(), &["the page"]);
        has(raw(&format!("{pod}:8080/proxy/deep/index.html")).await.ok(), &["the page"]);
        // It says that what is meant is elsewhere, by a path of its own.
        has(raw(&format!("{pod}:8080/proxy/deep")).await.ok(), &["the page"]);
        until("the Service has its pod", async || {
            raw("/namespaces/default/services/web:http/proxy/deep/").await.status.success().then_some(())
        })
        .await;
        let service = "/namespaces/default/services/web";
        has(raw(&format!("{service}:80/proxy/deep/")).await.ok(), &["the page"]);
        has(raw(&format!("{service}:http/proxy/cgi-bin/echo?a=b%20c")).await.ok(), &["GET a=b+c .\n"]);
        // What is sent arrives. (kubectl sends without a length, which this small server does not understand.)
        let role = "create clusterrolebinding all --clusterrole=cluster-admin --serviceaccount=default:default";
        k.run(role).await.ok();
        let header = format!("Authorization: Bearer {}", k.run("create token default").await.ok().trim());
        let url = format!("https://192.0.2.10:6443/api/v1{service}:http/proxy/cgi-bin/echo");
        let words = ["-sk", "-m", "10", "-H", &header, "-d", r#"{"some": "thing"}"#, &url];
        // Nor is it told whose token it was.
        has(server.on_machine("curl", &words).await.ok(), &["POST  .\n", r#"{"some": "thing"}"#]);

        let node = k.path("nodes", "{.items[0].metadata.name}").await;
        until("the agent tells what pods use", async || {
            let told = raw(&format!("/nodes/{node}/proxy/metrics/resource")).await.stdout;
            told.contains("container_memory_working_set_bytes").then_some(())
        })
        .await;
        has(raw(&format!("/nodes/{node}:10250/proxy/pods")).await.ok(), &["PodList"]);

        for (path, said) in [
            ("/namespaces/default/pods/none/proxy/", "pods \"none\" not found"),
            ("/namespaces/default/pods/web:9/proxy/", "error trying to reach pod"),
            ("/namespaces/default/pods/ftp:web:21/proxy/", "invalid pod request \"ftp:web:21\""),
            ("/namespaces/default/services/web:81/proxy/", "no service port 81 found for service \"web\""),
            ("/namespaces/default/services/nobody:80/proxy/", "no endpoints available for service \"nobody\""),
            ("/nodes/none/proxy/", "nodes \"none\" not found"),
        ] {
            has(raw(path).await.stderr, &[said]);
        }
        let denied = k.args(&["--as", "jane", "get", "--raw", &format!("/api/v1{service}:http/proxy/deep/")]).await;
        has(denied.stderr, &["cannot get resource \"services/proxy\""]);
    });
}
