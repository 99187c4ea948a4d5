//! `kubectl debug`: a container that joins a pod's processes, and pods that share theirs from the start.

use seawall_tests::{Server, kubectl::has, on_a_machine, until};

use super::IMAGE;

fn pod(name: &str, shared: bool) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  shareProcessNamespace: {shared}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: web, image: {IMAGE}, command: [sleep, '1111']}}
  - {{name: side, image: {IMAGE}, command: [sleep, '2222']}}
"
    )
}

#[test]
fn a_pod_is_debugged() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        k.apply(&pod("apart", false)).await;
        k.apply(&pod("together", true)).await;
        for name in ["apart", "together"] {
            k.run(&format!("wait pod/{name} --for=condition=Ready --timeout=60s")).await.ok();
        }
        // Without a shared namespace a container sees itself; with one all do, and the sandbox has number 1.
        let seen = k.run("exec apart -c web -- ps").await.ok();
        assert!(seen.contains("sleep 1111") && !seen.contains("sleep 2222"), "{seen}");
        let seen = k.run("exec together -c web -- ps").await.ok();
        has(&seen, &["sleep 1111", "sleep 2222", "pause"]);

        // A debugger sees the processes of the container that it was pointed at, and its files.
        let image = format!("--image={IMAGE}");
        let mut debugger = k.follow(&format!("debug -i apart {image} --target=web --container=look -- sh"));
        // Until somebody reads, what is typed waits.
        debugger.say("ps; ls -d /proc/1/root/etc; echo end").await;
        debugger.line("sleep 1111").await;
        debugger.line("/proc/1/root/etc").await;
        debugger.line("end").await;
        let seen = k.run("exec apart -c look -- ps").await.ok();
        assert!(seen.contains("sleep 1111") && !seen.contains("sleep 2222"), "{seen}");
        let state = "{.status.ephemeralContainerStatuses[?(@.name==\"look\")].state";
        until("it is said to run", async || {
            (!k.path("pod/apart", &format!("{state}.running.startedAt}}")).await.is_empty()).then_some(())
        })
        .await;
        debugger.say("exit 3").await;
        debugger.hang_up();
        debugger.ends().await;
        k.reaches("pod/apart", &format!("{state}.terminated.exitCode}}"), "3").await;
        // It is over, and nobody starts it again; the pod is none the worse.
        assert_eq!(k.path("pod/apart", "{.status.phase}").await, "Running");
        assert_eq!(k.path("pod/apart", "{.status.containerStatuses[*].restartCount}").await, "0 0");
        has(k.run("logs apart -c look").await.ok(), &["sleep 1111"]);

        // One that has no target sees only itself, but for the network.
        let ask = format!("debug apart {image} --container=alone -- sh -c");
        let mut words: Vec<&str> = ask.split(' ').collect();
        words.push("ps; ip addr show eth0");
        k.args(&words).await.ok();
        let said = until("it has said what it sees", async || {
            let said = k.run("logs apart -c alone").await;
            (said.status.success() && said.stdout.contains("inet")).then_some(said.stdout)
        })
        .await;
        let ip = k.path("pod/apart", "{.status.podIP}").await;
        assert!(said.contains(&ip) && !said.contains("sleep 1111"), "{said}");

        // What cannot be: a target that is not there, and a name twice.
        let wrong = k.run(&format!("debug apart {image} --target=nobody --container=lost -- sh")).await;
        has(wrong.fails(), &["spec.ephemeralContainers[2].targetContainerName", "Not found"]);
        // A copy of a pod that is debugged with other processes to look at.
        k.run(&format!("debug apart --copy-to=copy --share-processes --container=web --image={IMAGE} -- sleep 3333"))
            .await
            .ok();
        k.run("wait pod/copy --for=condition=Ready --timeout=60s").await.ok();
        has(k.run("exec copy -c web -- ps").await.ok(), &["sleep 2222", "sleep 3333"]);
        // On the node itself: its processes and files.
        let node = k.path("nodes", "{.items[0].metadata.name}").await;
        k.run(&format!("debug node/{node} {image} --profile=sysadmin -- ls -d /host/etc")).await.ok();
        let said = until("the node's files are seen", async || {
            let name = k.run("get pods -o name").await.ok();
            let name = name.lines().find(|name| name.contains("node-debugger"))?.to_owned();
            let said = k.run(&format!("logs {name}")).await;
            said.stdout.contains("/host/etc").then_some(said.stdout)
        });
        said.await;
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}
