//! Server-side apply as people use it: with kubectl.

use seawall_tests::{Options, Server, kubectl::has};

fn web(replicas: &str, image: &str) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, labels: {{app: web}}}}
spec:
  {replicas}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      containers:
      - name: web
        image: {image}
        ports: [{{containerPort: 80}}]
"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_applies_on_the_server() {
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler,controllers".into()] }).await;
    let k = &server.kubectl;
    k.reaches("namespace/default", "{.metadata.name}", "default").await;
    has(k.pipe("apply --server-side -f -", &web("replicas: 2", "web:1")).await.ok(), &["serverside-applied"]);
    let managers = "{.metadata.managedFields[*].manager}/{.metadata.managedFields[*].operation}";
    k.reaches("deployment/web", managers, "kubectl/Apply").await;
    assert!(!k.run("get deployment/web -o yaml").await.ok().contains("managedFields"));
    has(k.run("get deployment/web -o yaml --show-managed-fields").await.ok(), &["f:replicas", "k:{\"name\":\"web\"}"]);

    // What would change is shown; nothing is changed.
    let diff = k.pipe("diff --server-side -f -", &web("replicas: 2", "web:2")).await;
    assert_eq!(diff.status.code(), Some(1), "{}{}", diff.stdout, diff.stderr);
    has(&diff.stdout, &["-      - image: web:1", "+      - image: web:2"]);
    assert_eq!(k.path("deployment/web", "{.spec.template.spec.containers[0].image}").await, "web:1");
    let same = k.pipe("diff --server-side -f -", &web("replicas: 2", "web:1")).await;
    assert_eq!((same.status.code(), &*same.stdout), (Some(0), ""), "{}", same.stderr);

    // Somebody scales. Who applies is told who, and how to go on.
    k.run("scale deployment/web --replicas=5").await.ok();
    let refused = k.pipe("apply --server-side -f -", &web("replicas: 2", "web:1")).await;
    assert!(!refused.status.success());
    has(
        &refused.stderr,
        &[
            "Apply failed with 1 conflict: conflict with \"kubectl\" with subresource \"scale\"",
            ".spec.replicas",
            "--force-conflicts",
        ],
    );
    k.pipe("apply --server-side -f - --force-conflicts", &web("replicas: 3", "web:1")).await.ok();
    k.reaches("deployment/web", "{.spec.replicas}", "3").await;
    // Another manager shares what both say, and owns what only it says.
    let label = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, labels: {app: web, team: a}}";
    k.pipe("apply --server-side --field-manager=team -f -", label).await.ok();
    let gone = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}";
    k.pipe("apply --server-side --field-manager=team -f -", gone).await.ok();
    k.reaches("deployment/web", "{.metadata.labels}", "{\"app\":\"web\"}").await;

    // From the client's apply to the server's, and what was removed meanwhile goes.
    let map = |data: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m}}\ndata: {{{data}}}");
    k.apply(&map("a: '1', b: '1'")).await;
    k.pipe("apply --server-side -f -", &map("a: '2'")).await.ok();
    k.reaches("configmap/m", "{.data}", "{\"a\":\"2\"}").await;
    // And back.
    k.apply(&map("a: '3'")).await;
    k.reaches("configmap/m", "{.data}", "{\"a\":\"3\"}").await;

    // Mistakes are told by name.
    let wrong = k.pipe("apply --server-side --validate=false -f -", &web("replica: 2", "web:1")).await;
    assert!(!wrong.status.success());
    has(&wrong.stderr, &[".spec.replica: field not declared in schema"]);
}
