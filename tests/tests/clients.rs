//! The clients that others wrote, as their users use them: Python's, JavaScript's, and an operator made with kopf.

use std::{ffi::OsStr, process::Stdio};

use seawall_tests::{Options, Server, kubectl, workspace};
use tokio::process::Command;

/// A server without nodes: what pods do is no part of this.
async fn server() -> Server {
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler".into()] }).await;
    server.kubectl.reaches("serviceaccount/default", "{.metadata.name}", "default").await;
    server
}

/// A program that finds the server by `KUBECONFIG`.
fn program(server: &Server, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("KUBECONFIG", &server.kubectl.kubeconfig).env("HOME", &server.kubectl.home);
    command.current_dir(&server.kubectl.home).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// A program of the virtual environment that `scripts/setup.sh --tests` makes.
fn python(server: &Server, name: &str) -> Command {
    let mut command = program(server, workspace().join(".venv/bin").join(name));
    command.env("PYTHONUNBUFFERED", "1");
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn pythons_client() {
    let server = server().await;
    let mut command = python(&server, "python");
    command.arg(workspace().join("tests/clients/client.py"));
    assert_eq!(kubectl::run(command, "client.py", "").await.ok(), "ok\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn javascripts_client() {
    let server = server().await;
    let mut command = program(&server, "node");
    command.arg(workspace().join("tests/clients/js/client.mjs"));
    assert_eq!(kubectl::run(command, "client.mjs", "").await.ok(), "ok\n");
}

const VAULTS: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: vaults.example.org}
spec:
  group: example.org
  scope: Namespaced
  names: {plural: vaults, singular: vault, kind: Vault}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns: [{name: Count, type: integer, jsonPath: .status.count}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, properties: {keys: {type: array, x-kubernetes-list-type: set, items: {type: string}}}}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
";

fn vault(keys: &str) -> String {
    format!("apiVersion: example.org/v1\nkind: Vault\nmetadata: {{name: v}}\nspec: {{keys: [{keys}]}}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_made_with_kopf() {
    let server = server().await;
    let k = &server.kubectl;
    k.apply(VAULTS).await;
    k.run("wait crd/vaults.example.org --for=condition=Established --timeout=30s").await.ok();
    let log = std::fs::File::create(server.directory().join("operator.log")).unwrap();
    let mut command = python(&server, "kopf");
    command.args(["run", "--standalone", "--all-namespaces"]).arg(workspace().join("tests/clients/vaults.py"));
    let mut operator = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();

    k.apply(&vault("a, b")).await;
    k.reaches("vault/v", "{.status.count}", "2").await;
    k.reaches("vault/v", "{.metadata.finalizers[0]}", "example.org/vault").await;
    let kept = "{.items[*].metadata.name}";
    assert_eq!(k.path("configmaps -l vault=v", kept).await, "v-a v-b");
    k.apply(&vault("b, c, d")).await;
    k.reaches("vault/v", "{.status.count}", "3").await;
    assert_eq!(k.path("configmaps -l vault=v", kept).await, "v-b v-c v-d");
    kubectl::has(k.run("get vaults").await.ok(), &["NAME   COUNT", "v      3"]);
    // What it says of what it does.
    k.reaches("events --field-selector involvedObject.kind=Vault,reason=Kept", "{.items[0].type}", "Normal").await;

    // Its last handler runs before the object goes, and what the object owned goes with it.
    k.run("delete vault/v --timeout=60s").await.ok();
    assert_eq!(k.path("configmap/v-emptied", "{.metadata.name}").await, "v-emptied");
    k.reaches("configmaps -l vault=v", kept, "").await;
    assert!(operator.try_wait().unwrap().is_none(), "the operator still runs");
    operator.kill().await.unwrap();
    let said = std::fs::read_to_string(server.directory().join("operator.log")).unwrap();
    assert!(!said.contains("Traceback"), "{said}");
}
