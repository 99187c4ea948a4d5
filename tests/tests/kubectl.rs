//! Every kubectl command that a user of a cluster knows, by the real kubectl.

use std::time::Duration;

use seawall_tests::{
    Server,
    kubectl::{Kubectl, file, has},
    on_a_machine, traffic, until,
};

const WEB: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}, annotations: {kubernetes.io/change-cause: first}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: web
        image: example.test/web:v1
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}
";

#[test]
fn every_command() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image("example.test/web:v1", "one").await;
        server.web_image("example.test/web:v2", "two").await;
        let k = &server.kubectl;
        discovery(k).await;
        objects(&server).await;
        k.apply(WEB).await;
        k.run("rollout status deployment/web --timeout=60s").await.ok();
        looking(k).await;
        watching(k).await;
        in_pods(&server).await;
        services(k).await;
        rollouts(k).await;
        nodes(k).await;
        k.run("delete deployment,service,pod --all --timeout=60s").await.ok();
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

/// api-resources, api-versions, explain, version, cluster-info, auth, top.
async fn discovery(k: &Kubectl) {
    let resources = k.run("api-resources").await.ok();
    for line in ["pods po v1 true Pod", "deployments deploy apps/v1 true Deployment", "nodes no v1 false Node"] {
        let words: Vec<_> = line.split(' ').collect();
        let found = resources.lines().any(|l| l.split_whitespace().collect::<Vec<_>>() == words);
        assert!(found, "{line} is not among\n{resources}");
    }
    has(k.run("api-resources --namespaced=false -o name").await.ok(), &["namespaces", "persistentvolumes"]);
    has(
        k.run("api-resources --api-group=batch --verbs=list -o wide").await.ok(),
        &["cronjobs", "jobs", "deletecollection"],
    );
    has(k.run("api-versions").await.ok(), &["\nv1", "apps/v1", "batch/v1", "discovery.k8s.io/v1"]);
    has(
        k.run("explain deployment.spec.strategy.rollingUpdate").await.ok(),
        &["GROUP:      apps", "KIND:       Deployment", "maxSurge", "maxUnavailable"],
    );
    has(k.run("explain pod --recursive").await.ok(), &["terminationGracePeriodSeconds", "readinessProbe"]);
    has(k.run("explain pods.spec.nonsense").await.fails(), &["field \"nonsense\" does not exist"]);
    has(k.run("version").await.ok(), &["Server Version: v1.37.0"]);
    has(k.run("cluster-info").await.ok(), &["Kubernetes control plane", "is running at"]);
    has(k.run("auth whoami").await.ok(), &["Username", "admin", "system:masters"]);
    assert_eq!(k.run("auth can-i create pods").await.ok().trim(), "yes");
    has(k.run("explain nodemetrics.usage").await.ok(), &["GROUP:      metrics.k8s.io", "What the node uses"]);
    let measured = async || k.run("top nodes").await.stdout.contains("CPU(cores)").then_some(());
    until("the node is measured", measured).await;
    k.run("top pods").await.ok();
    assert_eq!(k.run("get --raw /readyz").await.ok(), "ok");
    has(k.run("get --raw /readyz?verbose").await.ok(), &["readyz check passed"]);
}

/// create, get, apply, diff, edit, patch, replace, label, annotate, dry run, wait, delete.
async fn objects(server: &Server) {
    let k = &server.kubectl;
    k.run("create namespace things").await.ok();
    k.run("create configmap settings --from-literal=color=blue -n things").await.ok();
    k.run("create secret generic key --from-literal=word=hush -n things").await.ok();
    k.run("create serviceaccount robot -n things").await.ok();
    k.run("create quota few --hard=pods=3 -n things").await.ok();
    k.run("create deployment idle --image=example.test/web:v1 --replicas=0 -n things").await.ok();
    k.run("create job once --image=example.test/web:v1 --dry-run=server -o name -n things").await.ok();
    k.args(&["create", "cronjob", "often", "--image=example.test/web:v1", "--schedule=0 0 1 1 *", "-n", "things"])
        .await
        .ok();
    let token = k.run("create token robot -n things").await.ok();
    assert_eq!(token.trim().split('.').count(), 3, "{token}");
    has(k.run("create configmap settings -n things").await.fails(), &["configmaps \"settings\" already exists"]);
    assert_eq!(k.path("secret/key -n things", "{.data.word}").await, "aHVzaA==");

    // Dry run changes nothing.
    has(
        k.run("create configmap ghost -n things --dry-run=server").await.ok(),
        &["configmap/ghost created (server dry run)"],
    );
    has(k.run("get configmap ghost -n things").await.fails(), &["configmaps \"ghost\" not found"]);
    has(k.run("delete configmap settings -n things --dry-run=server").await.ok(), &["(server dry run)"]);

    // apply: created, unchanged, configured, and what is dropped from the file goes.
    let map = |data: &str| {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: applied, namespace: things}}\ndata: {data}")
    };
    has(k.apply(&map("{a: '1', b: '2'}")).await, &["configmap/applied created"]);
    has(k.apply(&map("{a: '1', b: '2'}")).await, &["configmap/applied unchanged"]);
    has(k.pipe("diff -f -", &map("{a: '3'}")).await.stdout, &["-  a: \"1\"", "+  a: \"3\"", "-  b: \"2\""]);
    assert_eq!(k.path("cm/applied -n things", "{.data}").await, r#"{"a":"1","b":"2"}"#, "diff changes nothing");
    has(k.apply(&map("{a: '3'}")).await, &["configmap/applied configured"]);
    assert_eq!(k.path("cm/applied -n things", "{.data}").await, r#"{"a":"3"}"#);
    assert_eq!(k.pipe("diff -f -", &map("{a: '3'}")).await.ok(), "");
    has(k.pipe("apply -f - --dry-run=server", &map("{a: '4'}")).await.ok(), &["configured (server dry run)"]);

    // edit, with an editor that is a script.
    let editor = file(server.directory(), "editor", "#!/bin/sh\nsed -i 's/color: blue/color: red/' \"$1\"\n");
    std::fs::set_permissions(&editor, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut edit = k.command();
    edit.args(["edit", "configmap", "settings", "-n", "things"]).env("EDITOR", &editor);
    has(seawall_tests::kubectl::run(edit, "kubectl edit", "").await.ok(), &["configmap/settings edited"]);
    assert_eq!(k.path("cm/settings -n things", "{.data.color}").await, "red");

    // patch in its three forms, and of a subresource.
    let patch = async |object: &str, kind: &str, patch: &str| {
        k.args(&["patch", "-n", "things", object, "--type", kind, "-p", patch]).await.ok()
    };
    has(
        patch("cm/settings", "merge", r#"{"data": {"color": null, "size": "9"}}"#).await,
        &["configmap/settings patched"],
    );
    patch("cm/settings", "json", r#"[{"op": "add", "path": "/data/shape", "value": "round"}]"#).await;
    assert_eq!(k.path("cm/settings -n things", "{.data}").await, r#"{"shape":"round","size":"9"}"#);
    let strategic =
        r#"{"spec": {"template": {"spec": {"containers": [{"name": "side", "image": "example.test/side:v1"}]}}}}"#;
    patch("deployment/idle", "strategic", strategic).await;
    let images = k.path("deployment/idle -n things", "{.spec.template.spec.containers[*].name}").await;
    assert!(images.contains("side") && images.contains("web"), "a strategic merge adds to the list: {images}");
    has(patch("cm/settings", "merge", "{}").await, &["patched (no change)"]);
    let scale = r#"{"spec": {"replicas": 0}}"#;
    k.args(&["patch", "-n", "things", "deployment/idle", "--subresource=scale", "--type=merge", "-p", scale])
        .await
        .ok();

    // replace, with the version that was read and with one that is old.
    let read = k.run("get cm settings -n things -o yaml").await.ok();
    has(k.pipe("replace -f -", &read.replace("round", "square")).await.ok(), &["configmap/settings replaced"]);
    has(k.pipe("replace -f -", &read).await.fails(), &["the object has been modified"]);

    // label, annotate.
    has(k.run("label cm settings applied tier=low -n things").await.ok(), &["configmap/settings labeled"]);
    has(k.run("label cm settings tier=high -n things").await.fails(), &["already has a value (low)"]);
    k.run("label cm settings tier=high --overwrite -n things").await.ok();
    assert_eq!(k.path("cm -n things -l tier=high", "{.items[*].metadata.name}").await, "settings");
    assert_eq!(k.run("get cm -n things -l tier!=high,tier -o name").await.ok().trim(), "configmap/applied");
    k.run("annotate cm settings note=seen -n things").await.ok();
    k.run("annotate cm settings note- -n things").await.ok();
    k.run("label cm settings tier- -n things").await.ok();
    assert_eq!(k.path("cm/settings -n things", "{.metadata.annotations}{.metadata.labels}").await, "");

    // set, autoscale, create from a generator's output.
    k.run("set env deployment/idle COLOR=green -n things").await.ok();
    k.run("set resources deployment/idle --limits=cpu=100m,memory=32Mi -n things").await.ok();
    k.run("set serviceaccount deployment/idle robot -n things").await.ok();
    has(k.run("set env deployment/idle --list -n things").await.ok(), &["COLOR=green"]);

    // wait for a value and for a deletion; delete by selector and with everything in a namespace.
    k.run("wait cm/settings --for=jsonpath={.data.size}=9 --timeout=10s -n things").await.ok();
    has(k.run("wait cm/settings --for=jsonpath={.data.size}=8 --timeout=1s -n things").await.fails(), &["timed out"]);
    let waiting = k.run("wait cm/settings --for=delete --timeout=60s -n things");
    let deleting = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        k.run("delete cm settings -n things").await.ok();
    };
    let (waited, ()) = tokio::join!(waiting, deleting);
    waited.ok();
    has(k.run("delete cm settings -n things").await.fails(), &["configmaps \"settings\" not found"]);
    k.run("delete cm settings -n things --ignore-not-found").await.ok();
    has(k.run("delete cm -l tier=low -n things").await.ok(), &["\"applied\" deleted"]);
    k.run("delete namespace things --timeout=60s").await.ok();
    has(k.run("get namespace things").await.fails(), &["namespaces \"things\" not found"]);
}

/// get in its forms, and describe.
async fn looking(k: &Kubectl) {
    let wide = k.run("get pods -o wide").await.ok();
    has(&wide, &["READY", "RESTARTS", "NOMINATED NODE", "1/1", "Running", "10.244.", "seawall-test-"]);
    has(k.run("get deployments -o wide").await.ok(), &["UP-TO-DATE", "2/2", "example.test/web:v1", "app=web"]);
    has(k.run("get rs").await.ok(), &["DESIRED", "CURRENT"]);
    has(
        k.run("get all").await.ok(),
        &["pod/web-", "deployment.apps/web", "replicaset.apps/web-", "service/kubernetes"],
    );
    has(k.run("get nodes -o wide").await.ok(), &["Ready", "192.0.2.10", "containerd://"]);
    has(k.run("get deployment web -o yaml").await.ok(), &["kind: Deployment", "availableReplicas: 2", "  name: web\n"]);
    let json = k.json("deployment web").await;
    assert_eq!((json["kind"].as_str(), json["status"]["readyReplicas"].as_i64()), (Some("Deployment"), Some(2)));
    assert_eq!(k.path("pods -l app=web", "{.items[*].status.phase}").await, "Running Running");
    let columns = "NAME:.metadata.name,IP:.status.podIP";
    has(k.run(&format!("get pods -o custom-columns={columns}")).await.ok(), &["NAME", "10.244."]);
    assert_eq!(k.run("get pods -l app=web -o name --no-headers").await.ok().lines().count(), 2);
    assert_eq!(k.run("get pods --field-selector status.phase=Failed -o name").await.ok(), "");
    has(k.run("get pods --show-labels -A --sort-by=.metadata.name").await.ok(), &["app=web", "NAMESPACE"]);
    has(k.run("get pods -l app=other").await.stderr, &["No resources found in default namespace."]);
    has(k.run("get pods,services").await.ok(), &["pod/web-", "service/kubernetes"]);
    assert_eq!(k.run("get pods --chunk-size=1 -o name").await.ok().lines().count(), 2);

    let pod = k.path("pods -l app=web", "{.items[0].metadata.name}").await;
    has(
        k.run(&format!("describe pod {pod}")).await.ok(),
        &[
            "Status:",
            "Running",
            "Image:          example.test/web:v1",
            "Readiness:",
            "Successfully assigned",
            "Started",
            "QoS Class:",
        ],
    );
    has(
        k.run("describe deployment web").await.ok(),
        &["2 desired | 2 updated | 2 total | 2 available | 0 unavailable", "RollingUpdate", "ScalingReplicaSet"],
    );
    has(k.run("describe node").await.ok(), &["Capacity:", "Allocatable:", "Non-terminated Pods:", "KubeletReady"]);
    has(k.run("describe service kubernetes").await.ok(), &["Endpoints:", "192.0.2.10:6443"]);
    k.run("describe namespace default").await.ok();
    has(k.run("get events --sort-by=.lastTimestamp").await.ok(), &["Scheduled", "Pulled", "Created", "Started"]);
    has(k.run("events --for deployment/web").await.ok(), &["Scaled up replica set"]);
}

/// get -w and wait, while something changes.
async fn watching(k: &Kubectl) {
    let mut watch = k.follow("get configmaps -w --output-watch-events");
    // The list comes first; the watch goes on where it ends.
    watch.line("kube-root-ca.crt").await;
    k.run("create configmap seen").await.ok();
    has(watch.line("seen").await, &["ADDED"]);
    k.args(&["patch", "configmap", "seen", "--type=merge", "-p", r#"{"data": {"a": "b"}}"#]).await.ok();
    has(watch.line("seen").await, &["MODIFIED", " 1 "]);
    k.run("delete configmap seen").await.ok();
    has(watch.line("seen").await, &["DELETED"]);
    watch.stop().await;
}

/// run, logs, exec, attach, cp, port-forward, debug.
async fn in_pods(server: &Server) {
    let k = &server.kubectl;
    let say = ["run", "talker", "--image=example.test/web:v1", "--restart=Never", "--", "sh", "-c"];
    let words = "for i in 1 2 3; do echo word $i; done; trap 'exit 0' TERM; while :; do sleep 0.2; echo on; done";
    k.args(&[&say[..], &[words]].concat()).await.ok();
    k.run("wait pod/talker --for=condition=Ready --timeout=60s").await.ok();
    until("the log has its first lines", async || {
        k.run("logs talker").await.ok().starts_with("word 1\nword 2\nword 3\n").then_some(())
    })
    .await;
    assert_eq!(k.run("logs talker --tail=1 --since=1h").await.ok().lines().count(), 1);
    has(k.run("logs talker --timestamps").await.ok(), &["T", "Z word 1\n"]);
    assert_eq!(k.run("logs talker --limit-bytes=6").await.ok(), "word 1");
    let mut following = k.follow("logs -f talker --tail=0");
    following.line("on").await;
    following.line("on").await;
    following.stop().await;
    has(k.run("logs talker -c other").await.fails(), &["container other is not valid for pod talker"]);
    has(k.run("logs talker --previous").await.fails(), &["previous terminated container \"talker\""]);
    has(k.run("logs nobody").await.fails(), &["pods \"nobody\" not found"]);
    has(k.run("logs deployment/web").await.ok(), &["serving"]);
    has(k.run("logs -l app=web --prefix --tail=-1").await.ok(), &["[pod/web-", "serving"]);

    let sh = |script: &'static str| async move { k.args(&["exec", "talker", "--", "sh", "-c", script]).await };
    assert_eq!(sh("hostname").await.ok(), "talker\n");
    let failed = sh("echo bad >&2; exit 3").await;
    assert_eq!((failed.status.code(), failed.stderr.contains("bad")), (Some(3), true), "{failed:?}");
    assert_eq!(k.pipe("exec -i talker -- cat", "through\n").await.ok(), "through\n");
    has(k.run("exec talker -- /no/such/program").await.fails(), &["/no/such/program"]);
    has(k.run("exec talker -c other -- true").await.fails(), &["container other"]);
    let mut attached = k.follow("attach talker");
    attached.line("on").await;
    attached.stop().await;

    let (there, back) =
        (file(server.directory(), "there", &"a line\n".repeat(30_000)), server.directory().join("back"));
    k.run(&format!("cp {there} talker:/tmp/file")).await.ok();
    k.run(&format!("cp talker:/tmp/file {}", back.display())).await.ok();
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&there).unwrap());

    // A pod that runs to its end, and one whose image is not to be had.
    let once = [
        "run",
        "once",
        "--image=example.test/web:v1",
        "--restart=Never",
        "--attach",
        "--rm",
        "--quiet",
        "--",
        "echo",
        "done",
    ];
    assert_eq!(k.args(&once).await.ok().lines().next(), Some("done"));
    k.args(&["run", "broken", "--image=example.invalid/none:v1", "--image-pull-policy=Never"]).await.ok();
    let reason = "{.status.containerStatuses[0].state.waiting.reason}";
    k.reaches("pod/broken", reason, "ErrImageNeverPull").await;
    has(k.run("get pod broken").await.ok(), &["0/1", "ErrImageNeverPull"]);
    has(k.run("logs broken").await.fails(), &["is waiting to start"]);

    forward(k, "deployment/web :8080").await;
    forward(k, &format!("{} :http", k.run("get pod -l app=web -o name").await.ok().lines().next().unwrap())).await;
    has(k.run("port-forward pod/nobody :80").await.fails(), &["pods \"nobody\" not found"]);
    k.run("delete pod talker broken --now --timeout=60s").await.ok();
}

/// Forwards a port and fetches the page through it, more than once.
async fn forward(k: &Kubectl, what: &str) {
    let mut forward = k.follow(&format!("port-forward {what}"));
    let line = forward.line("Forwarding from 127.0.0.1:").await;
    let port = line.split([':', ' ']).nth(3).unwrap();
    let address = format!("127.0.0.1:{port}").parse().unwrap();
    for _ in 0..3 {
        assert_eq!(traffic::get(address).await.unwrap(), "one", "{what}");
    }
    forward.stop().await;
}

/// expose, and what get says of it.
async fn services(k: &Kubectl) {
    has(k.run("expose deployment web --port=80 --target-port=http").await.ok(), &["service/web exposed"]);
    k.run("expose deployment web --name=door --type=NodePort --port=80 --target-port=8080").await.ok();
    has(k.run("get services").await.ok(), &["ClusterIP", "NodePort", "80:3"]);
    let address = format!("{}:80", k.path("service/web", "{.spec.clusterIP}").await).parse().unwrap();
    until("the exposed Service answers", async || traffic::get(address).await.ok()).await;
    let port = k.path("service/door", "{.spec.ports[0].nodePort}").await;
    let address = format!("192.0.2.10:{port}").parse().unwrap();
    until("the exposed node port answers", async || traffic::get(address).await.ok()).await;
    has(k.run("describe service web").await.ok(), &["Selector:", "app=web", "Endpoints:", ":8080"]);
    forward(k, "service/web :80").await;
    k.run("delete service web door").await.ok();
}

/// scale, set image, rollout in all its forms.
async fn rollouts(k: &Kubectl) {
    has(k.run("scale deployment/web --replicas=3").await.ok(), &["deployment.apps/web scaled"]);
    has(k.run("scale deployment/web --current-replicas=9 --replicas=1").await.fails(), &["9", "3"]);
    k.run("rollout status deployment/web --timeout=60s").await.ok();
    has(k.run("set image deployment/web web=example.test/web:v2").await.ok(), &["image updated"]);
    k.run("annotate deployment/web kubernetes.io/change-cause=second --overwrite").await.ok();
    has(k.run("rollout status deployment/web --timeout=90s").await.ok(), &["successfully rolled out"]);
    let history = k.run("rollout history deployment/web").await.ok();
    has(&history, &["REVISION", "1 ", "first", "2 ", "second"]);
    has(k.run("rollout history deployment/web --revision=2").await.ok(), &["example.test/web:v2"]);

    has(k.run("rollout undo deployment/web").await.ok(), &["rolled back"]);
    k.run("rollout status deployment/web --timeout=90s").await.ok();
    assert_eq!(k.path("deployment/web", "{.spec.template.spec.containers[0].image}").await, "example.test/web:v1");
    k.run("rollout undo deployment/web --to-revision=2").await.ok();
    k.run("rollout status deployment/web --timeout=90s").await.ok();
    assert_eq!(k.path("deployment/web", "{.spec.template.spec.containers[0].image}").await, "example.test/web:v2");
    has(k.run("rollout undo deployment/web --to-revision=77").await.fails(), &["unable to find specified revision 77"]);

    // What is changed while it is paused waits.
    k.run("rollout pause deployment/web").await.ok();
    k.run("set image deployment/web web=example.test/web:v1").await.ok();
    k.reaches("deployment/web", "{.status.conditions[?(@.type==\"Progressing\")].reason}", "DeploymentPaused").await;
    let images = "{.items[*].spec.containers[0].image}";
    let old = ["example.test/web:v2"; 3].join(" ");
    assert_eq!(k.path("pods -l app=web --field-selector=status.phase=Running", images).await, old);
    has(k.run("rollout restart deployment/web").await.fails(), &["paused"]);
    k.run("rollout resume deployment/web").await.ok();
    k.run("rollout status deployment/web --timeout=90s").await.ok();

    let before = k.path("deployment/web", "{.metadata.annotations.deployment\\.kubernetes\\.io/revision}").await;
    has(k.run("rollout restart deployment/web").await.ok(), &["restarted"]);
    k.run("rollout status deployment/web --timeout=90s").await.ok();
    let after = k.path("deployment/web", "{.metadata.annotations.deployment\\.kubernetes\\.io/revision}").await;
    assert!(after.parse::<u32>().unwrap() > before.parse::<u32>().unwrap(), "{before} -> {after}");
    let image = ["set", "image", "deployment/web", "web=example.invalid/none:v1"];
    k.args(&image).await.ok();
    has(k.run("rollout status deployment/web --timeout=2s").await.fails(), &["timed out"]);
    k.run("rollout undo deployment/web").await.ok();
    k.run("rollout status deployment/web --timeout=90s").await.ok();
    assert_eq!(k.path("deployment/web", "{.status.availableReplicas}").await, "3");
}

/// taint, cordon, drain, uncordon.
async fn nodes(k: &Kubectl) {
    let node = k.path("nodes", "{.items[0].metadata.name}").await;
    k.run(&format!("label node {node} disk=fast")).await.ok();
    k.run(&format!("taint node {node} busy=yes:PreferNoSchedule")).await.ok();
    k.run(&format!("taint node {node} busy-")).await.ok();
    k.args(&["run", "alone", "--image=example.test/web:v1"]).await.ok();
    k.run("wait pod/alone --for=condition=Ready --timeout=60s").await.ok();
    has(k.run(&format!("cordon {node}")).await.ok(), &["cordoned"]);
    has(k.run("get nodes").await.ok(), &["Ready,SchedulingDisabled"]);
    k.run("scale deployment/web --replicas=4").await.ok();
    until("a pod that finds no node", async || {
        let why = k.path("events --field-selector=reason=FailedScheduling", "{.items[*].message}").await;
        why.contains("0/1 nodes are available: 1 node(s) were unschedulable").then_some(())
    })
    .await;
    // A pod that nobody would replace is only taken away by force.
    let refused = k.run(&format!("drain {node} --timeout=30s")).await.fails();
    has(refused, &["cannot delete Pods that declare no controller"]);
    let drained =
        k.run(&format!("drain {node} --force --ignore-daemonsets --delete-emptydir-data --timeout=60s")).await;
    has(drained.ok(), &["evicting pod default/web-", "drained"]);
    assert_eq!(k.path("pods --field-selector=status.phase=Running", "{.items[*].metadata.name}").await, "");
    has(k.run(&format!("uncordon {node}")).await.ok(), &["uncordoned"]);
    k.run("rollout status deployment/web --timeout=90s").await.ok();
}
