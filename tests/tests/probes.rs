//! gRPC and HTTPS probes, against real servers in pods.

use seawall_tests::{Server, kubectl::has, on_a_machine, until};
use serde_json::{Value, json};

fn grpc(port: u16, service: &str) -> Value {
    json!({"grpc": {"port": port, "service": service}, "periodSeconds": 1, "failureThreshold": 1})
}

fn https(port: u16, path: &str) -> Value {
    json!({"httpGet": {"scheme": "HTTPS", "port": port, "path": path}, "periodSeconds": 1, "failureThreshold": 1})
}

fn pod(name: &str, probes: Value) -> String {
    let mut container = json!({"name": "c", "image": "example.test/target:v1"});
    container.as_object_mut().unwrap().extend(probes.as_object().unwrap().clone());
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"terminationGracePeriodSeconds": 0, "containers": [container]}})
    .to_string()
}

#[test]
fn grpc_and_https() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        let k = &server.kubectl;
        let (program, socket) =
            (format!("{}:/target", env!("CARGO_BIN_EXE_probe-target")), server.containerd().display().to_string());
        let build = ["image", "build", "--busybox", "-t", "example.test/target:v1", "--program", &program];
        server.seawall(&[&build[..], &["--socket", &socket, "--", "/target"]].concat()).await.ok();

        // What fails, and how that is said: https://github.com/kubernetes/kubernetes/tree/master/pkg/probe
        let failing = [
            ("sick", grpc(5000, "sick"), "service unhealthy (responded with \"NOT_SERVING\")"),
            ("nobody", grpc(5000, "nobody"), "error: health rpc probe failed: rpc error: code = NotFound desc ="),
            ("closed", grpc(5001, ""), "connection refused"),
            ("silent", grpc(9000, ""), "timeout: "),
            ("error", https(8443, "/503"), "HTTP probe failed with statuscode: 503"),
            ("plain", https(5000, "/200"), "Get \"https://"),
            ("astray", https(8443, "/302"), "HTTP probe failed with statuscode: 500"),
            ("slow", https(9000, "/200"), "context deadline exceeded"),
        ];
        for (name, probe, _) in &failing {
            k.apply(&pod(name, json!({"readinessProbe": probe}))).await;
        }
        let well = [("whole", grpc(5000, "")), ("well", grpc(5000, "well")), ("secure", https(8443, "/200"))];
        for (name, probe) in &well {
            k.apply(&pod(name, json!({"readinessProbe": probe, "startupProbe": probe}))).await;
        }
        for (name, _) in &well {
            k.run(&format!("wait pod/{name} --for=condition=Ready --timeout=60s")).await.ok();
        }
        for (name, _, words) in &failing {
            let events = format!("events --field-selector=reason=Unhealthy,involvedObject.name={name}");
            let said = until(&format!("a failure of {name}"), async || {
                let said = k.path(&events, "{.items[*].message}").await;
                said.contains(words).then_some(said)
            })
            .await;
            has(said, &["Readiness probe failed: ", words]);
            assert_eq!(k.path(&format!("pod/{name}"), "{.status.containerStatuses[0].ready}").await, "false", "{name}");
        }
        has(k.run("logs secure").await.ok(), &["/200 200 kube-probe/1.37"]);

        // From well to sick and back for readiness; liveness restarts the container, and the new one is well.
        for (name, probe) in [("both-grpc", grpc(5000, "both")), ("both-https", https(8443, "/both"))] {
            k.apply(&pod(name, json!({"readinessProbe": probe}))).await;
            let live = format!("{name}-live");
            k.apply(&pod(&live, json!({"livenessProbe": probe, "readinessProbe": probe}))).await;
            for pod in [name, &live] {
                k.run(&format!("wait pod/{pod} --for=condition=Ready --timeout=60s")).await.ok();
                k.run(&format!("exec {pod} -- touch /tmp/sick")).await.ok();
            }
            let restarts = "{.status.containerStatuses[0].restartCount}";
            k.run(&format!("wait pod/{name} --for=condition=Ready=false --timeout=60s")).await.ok();
            k.run(&format!("exec {name} -- rm /tmp/sick")).await.ok();
            k.run(&format!("wait pod/{name} --for=condition=Ready --timeout=60s")).await.ok();
            assert_eq!(k.path(&format!("pod/{name}"), restarts).await, "0");
            k.reaches(&format!("pod/{live}"), restarts, "1").await;
            k.run(&format!("wait pod/{live} --for=condition=Ready --timeout=60s")).await.ok();
        }
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}
