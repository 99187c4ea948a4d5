//! The whole machine loses its power and comes back: processes, network and rules are gone, disks are not.

use seawall_tests::{Options, Server, kubectl::has, on_a_machine};

const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: once}
spec:
  restartPolicy: Never
  containers: [{name: once, image: example.test/web:v1, command: [sh, -c, 'echo done']}]
---
apiVersion: v1
kind: Pod
metadata: {name: keeper}
spec:
  containers: [{name: keeper, image: example.test/web:v1, volumeMounts: [{name: data, mountPath: /data}]}]
  volumes: [{name: data, emptyDir: {}}]
";

#[test]
fn a_machine_comes_back_with_its_pods() {
    let node = || vec!["--node-name=node-1".to_owned()];
    let directory = on_a_machine(async |machine| {
        let server = Server::start(Options { machine: Some(machine), args: node() }).await;
        server.node_ready().await;
        server.serve_web().await;
        let k = &server.kubectl;
        k.apply(PODS).await;
        k.run("wait pod/keeper --for=condition=Ready --timeout=60s").await.ok();
        k.reaches("pod/once", "{.status.phase}", "Succeeded").await;
        k.run("exec keeper -- sh -c echo>/data/kept").await.ok();
        server.cut_off().await
    });
    on_a_machine(async |machine| {
        let server = Server::start_in(directory, Options { machine: Some(machine), args: node() }).await;
        server.node_ready().await;
        let k = &server.kubectl;
        // The same pods, in new containers.
        let restarts = "{.items[*].status.containerStatuses[0].restartCount}";
        k.reaches("pods -l app=web", restarts, "1 1").await;
        k.reaches("pod/keeper", "{.status.containerStatuses[0].restartCount}", "1").await;
        k.run("wait pod -l app=web --for=condition=Ready --timeout=60s").await.ok();
        k.run("wait pod/keeper --for=condition=Ready --timeout=60s").await.ok();
        server.web_answers().await;
        // What had ended stays ended, and an emptyDir lives as long as its pod.
        assert_eq!(k.path("pod/once", "{.status.phase}").await, "Succeeded");
        has(k.run("exec keeper -- ls /data").await.ok(), &["kept"]);
        assert_eq!(k.run("get pods -o name").await.ok().lines().count(), 4, "no pod too many");
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}
