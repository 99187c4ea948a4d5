//! Pods choose the runtime's handler by a RuntimeClass.

use seawall_tests::{Server, kubectl::has, on_a_machine, until};

use super::IMAGE;

#[test]
fn a_pod_chooses_its_runtime() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        let class = |name: &str, handler: &str| {
            format!(
                "{{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {{name: {name}}}, handler: {handler}, \
                 overhead: {{podFixed: {{memory: 16Mi}}}}}}"
            )
        };
        k.apply(&class("known", "runc")).await;
        k.apply(&class("strange", "kata")).await;
        let pod = |name: &str, class: &str| {
            format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{runtimeClassName: {class}, \
                 terminationGracePeriodSeconds: 0, containers: [{{name: c, image: '{IMAGE}', command: [sleep, '1000'], \
                 resources: {{limits: {{memory: 32Mi}}}}}}]}}}}"
            )
        };
        k.apply(&pod("good", "known")).await;
        k.apply(&pod("bad", "strange")).await;
        k.run("wait pod/good --for=condition=Ready --timeout=60s").await.ok();
        // What the sandbox takes is the pod's, beside its containers' limits.
        let uid = k.path("pod/good", "{.metadata.uid}").await;
        let file = format!("/sys/fs/cgroup/memory/kubepods/burstable/pod{uid}/memory.limit_in_bytes");
        let limit = machine.command("cat").arg(file).output().await.unwrap();
        assert_eq!(String::from_utf8_lossy(&limit.stdout).trim(), (48_u64 << 20).to_string(), "{limit:?}");
        let said = until("it is said why the other does not start", async || {
            let said = k.run("describe pod bad").await.ok();
            said.contains("FailedCreatePodSandBox").then_some(said)
        });
        has(said.await, &["no runtime for \"kata\" is configured"]);
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}
