//! `seawall check` against a real server: what it says of a cluster with faults, and that its own commands mend them.

use std::path::Path;

use seawall_tests::{Options, Server, seawall};
use serde_json::Value;
use tokio::process::Command;

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: c, image: i, ports: [{containerPort: 80}]}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: other}
spec: {selector: {matchLabels: {app: other}}, maxUnavailable: 0}
"#;

async fn check(kubeconfig: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(seawall());
    command.arg("check").arg("--kubeconfig").arg(kubeconfig).args(args);
    let done = command.output().await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (done.status.code(), text(done.stdout), text(done.stderr))
}

async fn rules(kubeconfig: &Path) -> Vec<String> {
    let (_, out, error) = check(kubeconfig, &["--json", "-n", "default"]).await;
    let found: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{error}"));
    let about = |f: &Value| format!("{} {}", f["rule"].as_str().unwrap(), f["object"].as_str().unwrap());
    found.as_array().unwrap().iter().map(about).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_cluster_lacks_is_said_and_mended() {
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler".into()] }).await;
    let k = &server.kubectl;
    k.reaches("serviceaccount/default", "{.metadata.name}", "default").await;
    k.apply(WEB).await;
    let kubeconfig = &k.kubeconfig;
    assert_eq!(rules(kubeconfig).await, ["replicas Deployment default/web", "probe Deployment default/web"]);

    // Two replicas lack a budget; the command that is told makes one.
    k.run("scale deployment/web --replicas=2").await.ok();
    let (code, out, _) = check(kubeconfig, &["--json", "-n", "default", "--skip", "probe,toleration"]).await;
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, found.as_array().unwrap().len()), (Some(3), 1), "{out}");
    let mend = found[0]["mend"].as_str().unwrap().strip_prefix("kubectl ").unwrap();
    k.run(mend).await.ok();
    let (code, out, _) = check(kubeconfig, &["-n", "default", "--skip", "probe,toleration"]).await;
    assert_eq!((code, out.starts_with("Nothing was found")), (Some(0), true), "{out}");

    // The whole cluster: one server, no node.
    let (code, out, _) = check(kubeconfig, &["--fail-on", "error"]).await;
    assert!(out.contains("There is one server"), "{out}");
    assert_eq!(code, Some(0), "{out}");
    // The entry is not in the certificate.
    let (code, out, _) = check(kubeconfig, &["--entry", "api.example", "--fail-on", "error"]).await;
    assert!(out.contains("does not name the entry api.example") && code == Some(3), "{code:?} {out}");

    // The same on one page.
    let status = Command::new(seawall()).args(["status", "--kubeconfig"]).arg(kubeconfig).output().await.unwrap();
    let shown = String::from_utf8(status.stdout).unwrap();
    assert!(status.status.success() && shown.starts_with("SERVER") && shown.contains("There is one server"), "{shown}");
    let first = shown.lines().nth(1).unwrap();
    // It says of itself an address at which it does not listen.
    assert!(first.contains("no: ") && first.ends_with("controllers, scheduler"), "{shown}");
    let nobody = Command::new(seawall()).args(["status", "--kubeconfig", "/nowhere"]).output().await.unwrap();
    assert!(!nobody.status.success() && String::from_utf8_lossy(&nobody.stderr).contains("/nowhere"));

    let (code, _, error) = check(kubeconfig, &["--skip", "nothing"]).await;
    assert!(
        code == Some(1) && error.contains("--skip nothing: there is no such rule; there are servers, times, entry"),
        "{error}"
    );
    let (code, _, error) = check(Path::new("/nowhere"), &[]).await;
    assert!(code == Some(1) && error.contains("--kubeconfig /nowhere"), "{error}");
}
