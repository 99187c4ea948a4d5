//! Pods that stand in files: they run as the files say, whatever becomes of their mirrors and of the API.

use std::{fs, path::Path, time::Duration};

use seawall_tests::{Options, Server, kubectl::has, on_a_machine, traffic, until, within};
use serde_json::Value;

use super::IMAGE;

fn manifest(page: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: web, labels: {{app: web}}}}
spec:
  terminationGracePeriodSeconds: 1
  priorityClassName: system-node-critical
  containers:
  - name: web
    image: {IMAGE}
    command: [sh, -c, 'mkdir /named; echo {page} >/named/index.html; exec httpd -f -p 8080 -h /named']
    readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}
"
    )
}

async fn answers(pod: &Value) -> Option<String> {
    let address = format!("{}:8080", pod["status"]["podIP"].as_str()?).parse().ok()?;
    traffic::get(address).await.ok()
}

#[test]
fn a_pod_from_a_file() {
    on_a_machine(async |machine| {
        let mut server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let file = server.directory().join("data/manifests/web.yaml");
        fs::write(&file, manifest("one")).unwrap();
        let node = server.kubectl.path("nodes", "{.items[0].metadata.name}").await;
        let (k, name) = (server.kubectl.clone(), format!("web-{node}"));
        let what = format!("pod/{name}");
        k.reaches(&what, "{.metadata.name}", &name).await;
        k.run(&format!("wait {what} --for=condition=Ready --timeout=60s")).await.ok();
        let first = k.json(&what).await;
        let annotations = &first["metadata"]["annotations"];
        assert_eq!(annotations["kubernetes.io/config.source"], "file");
        assert_eq!(annotations["kubernetes.io/config.mirror"], annotations["kubernetes.io/config.hash"]);
        let owner = &first["metadata"]["ownerReferences"][0];
        assert_eq!((owner["kind"].as_str(), owner["name"].as_str()), (Some("Node"), Some(&*node)));
        assert_eq!(first["spec"]["priority"], 2_000_001_000);
        assert_eq!(answers(&first).await.as_deref(), Some("one"));
        has(k.run(&format!("exec {name} -- cat /named/index.html")).await.ok(), &["one"]);
        k.run(&format!("logs {name}")).await.ok();
        has(k.run(&format!("describe {what}")).await.ok(), &["Controlled By:  Node/", "Started container"]);

        // Who deletes the mirror deletes a picture.
        k.run(&format!("delete {what} --timeout=60s")).await.ok();
        let another = |old: &Value| old["metadata"]["uid"].as_str().unwrap().to_owned();
        let uid = another(&first);
        let second = until("there is another mirror", async || {
            let found = k.run(&format!("get {what} -o json")).await;
            let found: Value = serde_json::from_str(&found.stdout).ok()?;
            let ready = found["status"]["containerStatuses"][0]["ready"] == true;
            (ready && found["metadata"]["uid"] != uid.as_str()).then_some(found)
        })
        .await;
        let container = |pod: &Value| pod["status"]["containerStatuses"][0].clone();
        assert_eq!(container(&second)["containerID"], container(&first)["containerID"]);
        assert_eq!(second["status"]["podIP"], first["status"]["podIP"]);

        // A restart of the agent changes nothing about it.
        server.crash().await;
        server.launch().await;
        until("it is ready", async || (container(&k.json(&what).await)["ready"] == true).then_some(())).await;
        assert_eq!(container(&k.json(&what).await)["containerID"], container(&first)["containerID"]);

        // A file that makes no sense changes nothing; one that does, does.
        fs::write(&file, "kind: [").unwrap();
        until("it is said", async || server.logged("it is left as it was").then_some(())).await;
        assert_eq!(answers(&second).await.as_deref(), Some("one"));
        fs::write(&file, manifest("two")).unwrap();
        let third = until("the new version answers", async || {
            let found: Value = serde_json::from_str(&k.run(&format!("get {what} -o json")).await.stdout).ok()?;
            (answers(&found).await.as_deref() == Some("two")).then_some(found)
        })
        .await;
        assert_ne!(
            third["metadata"]["annotations"]["kubernetes.io/config.hash"],
            annotations["kubernetes.io/config.hash"]
        );

        // What was changed while nobody looked: one version at a time, also over a restart.
        server.crash().await;
        fs::write(&file, manifest("three")).unwrap();
        server.launch().await;
        until("the newest version answers", async || {
            let found: Value = serde_json::from_str(&k.run(&format!("get {what} -o json")).await.stdout).ok()?;
            (answers(&found).await.as_deref() == Some("three")).then_some(())
        })
        .await;

        // A stranger's annotation makes no static pod of another.
        k.apply(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: other, annotations: {{kubernetes.io/config.source: file}}}}, \
             spec: {{terminationGracePeriodSeconds: 0, containers: [{{name: c, image: '{IMAGE}', command: [sleep, '100']}}]}}}}"
        ))
        .await;
        k.run("wait pod/other --for=condition=Ready --timeout=60s").await.ok();
        k.run("delete pod other --timeout=60s").await.ok();

        fs::remove_file(&file).unwrap();
        until("it is gone", async || k.path(&what, "{.metadata.name}").await.is_empty().then_some(())).await;
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

/// etcd as documented in docs/STATIC_PODS.md.
fn etcd(data: &Path) -> String {
    include_str!("../../../examples/etcd-static-pod.yaml")
        .replace("registry.k8s.io/etcd:3.6.5-0", "example.test/etcd:v1")
        .replace("/var/lib/etcd", &data.display().to_string())
}

/// The server keeps its objects in an etcd that its own node runs from a file: there is no API before etcd is there, and
/// nobody but the file says that it should be.
#[test]
fn etcd_as_a_static_pod() {
    on_a_machine(async |machine| {
        let directory = tempfile::Builder::new().prefix("seawall-e2e-").tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("data/manifests")).unwrap();
        fs::write(at("data/manifests/etcd.yaml"), etcd(&at("etcd"))).unwrap();
        let socket = at("run/containerd/containerd.sock").display().to_string();
        // The image has to be there without a registry: it is brought as soon as there is a containerd.
        let (seawall, enter) = (seawall_tests::seawall(), machine.clone());
        let bring = async move {
            within(Duration::from_secs(50), "etcd's image is brought", async || {
                let mut command = enter.command(&seawall);
                command.args([
                    "image",
                    "build",
                    "-t",
                    "example.test/etcd:v1",
                    "--program",
                    "/usr/bin/etcd:/usr/local/bin/etcd",
                ]);
                command.args(["--socket", &socket]);
                let output = command.output().await.unwrap();
                output.status.success().then_some(())
            })
            .await;
        };
        let args = vec!["--etcd-servers=http://127.0.0.1:2379".to_owned()];
        let options = Options { machine: Some(machine.clone()), args };
        let (mut server, ()) = tokio::join!(Server::start_in(directory, options), bring);
        server.node_ready().await;
        let k = server.kubectl.clone();
        let node = k.path("nodes", "{.items[0].metadata.name}").await;
        let what = format!("pod/etcd-{node} -n kube-system");
        k.reaches(&what, "{.status.containerStatuses[0].ready}", "true").await;
        k.run("create configmap kept --from-literal=a=b").await.ok();

        // Everything ends as in a power cut, but for what is on the disk; the file is enough to come back.
        let before = k.path(&what, "{.status.containerStatuses[0].restartCount}").await;
        server.stop().await;
        server.launch().await;
        assert_eq!(k.path("configmap/kept", "{.data.a}").await, "b");
        assert_eq!(k.path(&what, "{.status.containerStatuses[0].restartCount}").await, before, "it went on meanwhile");
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}
