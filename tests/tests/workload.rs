//! A workload from end to end: a Deployment serves through Services from real containers, is scaled, updated, broken
//! and healed, and goes without a trace.

use std::{collections::BTreeSet, net::SocketAddr};

use seawall_tests::{
    Server,
    kubectl::{Kubectl, has},
    on_a_machine,
    traffic::{self, Traffic},
    until,
};

const WEB: &str = include_str!("../../examples/web.yaml");

/// A Deployment whose pods answer with their own names.
fn named(name: &str, replicas: usize) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: web
        image: seawall.local/web:v1
        command: [sh, -c, 'mkdir /named; hostname >/named/index.html; exec httpd -f -p 8080 -h /named']
        readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1, failureThreshold: 1}}
"
    )
}

fn address(ip: &str, port: &str) -> SocketAddr {
    format!("{ip}:{port}").parse().unwrap_or_else(|e| panic!("{ip:?}:{port:?}: {e}"))
}

/// Which pods answer, of so many requests.
async fn answering(address: SocketAddr, requests: usize) -> BTreeSet<String> {
    let mut pods = BTreeSet::new();
    for _ in 0..requests {
        pods.insert(traffic::get(address).await.unwrap_or_else(|e| panic!("{address}: {e}")));
    }
    pods
}

#[test]
fn a_deployment_lives() {
    on_a_machine(async |machine| {
        let mut server = Server::with_node(&machine).await;
        server.web_image("seawall.local/web:v1", "v1").await;
        server.web_image("seawall.local/web:v2", "v2").await;
        rollout(&server.kubectl).await;
        healing(&server).await;
        restarts(&mut server).await;
        affinity(&server.kubectl).await;
        readiness(&server.kubectl).await;
        eviction(&server.kubectl).await;
        ownership(&server.kubectl).await;
        jobs(&server.kubectl).await;
        namespaces(&server.kubectl).await;
        assert!(!server.logged("panicked"), "a task of the server panicked");
        nothing_left(server).await;
    });
}

/// Comes up, is reached by every way, grows, and is updated under traffic.
async fn rollout(k: &Kubectl) {
    k.apply(WEB).await;
    k.run("rollout status deployment/web --timeout=60s").await.ok();
    let slices = "endpointslices -l kubernetes.io/service-name=web";
    let ready = "{.items[*].endpoints[*].conditions.ready}";
    k.reaches(slices, ready, "true true true").await;
    let cluster_ip = address(&k.path("service/web", "{.spec.clusterIP}").await, "80");
    until("the ClusterIP answers", async || traffic::get(cluster_ip).await.ok()).await;
    let node_port = address("192.0.2.10", &k.path("service/web", "{.spec.ports[0].nodePort}").await);
    assert_eq!(traffic::get(cluster_ip).await.unwrap(), "v1");
    assert_eq!(traffic::get(node_port).await.unwrap(), "v1");
    // From a pod as well, and back into the pod that asks.
    for _ in 0..10 {
        let ask = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc {} 80", cluster_ip.ip());
        let answer = k.args(&["exec", "deployment/web", "--", "sh", "-c", &ask]).await.ok();
        has(&answer, &["200 OK", "v1"]);
    }
    // The API by its Service, with the pod's own token and the authority that is published to it.
    let token = "cat /var/run/secrets/kubernetes.io/serviceaccount/token";
    let token = k.run(&format!("exec deployment/web -- {token}")).await.ok();
    let whoami =
        ["--token", token.trim(), "--kubeconfig=/dev/null", "--insecure-skip-tls-verify", "--server=https://10.96.0.1"];
    let said = k.args(&[&whoami[..], &["auth", "whoami"]].concat()).await.ok();
    has(said, &["system:serviceaccount:default:default", "system:serviceaccounts"]);

    k.run("scale deployment/web --replicas=5").await.ok();
    k.run("rollout status deployment/web --timeout=60s").await.ok();
    k.reaches(slices, ready, "true true true true true").await;

    let clients = [Traffic::start(&cluster_ip.to_string()), Traffic::start(&node_port.to_string())];
    k.run("set image deployment/web web=seawall.local/web:v2").await.ok();
    k.run("rollout status deployment/web --timeout=90s").await.ok();
    until("the old pods are gone", async || {
        (k.run("get pods -l app=web -o name").await.ok().lines().count() == 5).then_some(())
    })
    .await;
    for client in clients {
        let seen = client.stop();
        eprintln!("{:?}, slowest {:?}", seen.pages, seen.slowest);
        assert_eq!(seen.failures, Vec::<String>::new(), "{} requests failed", seen.failures.len());
        assert!(seen.pages.contains_key("v1") && seen.pages.contains_key("v2"), "{:?}", seen.pages);
    }
    assert_eq!(answering(cluster_ip, 50).await, BTreeSet::from(["v2".to_owned()]));
    k.run("scale deployment/web --replicas=2").await.ok();
    k.reaches("deployment/web", "{.status.replicas}", "2").await;
    k.reaches(slices, "{range.items[*].endpoints[?(@.conditions.ready==true)]}x{end}", "xx").await;
}

/// What dies is replaced.
async fn healing(server: &Server) {
    let k = &server.kubectl;
    k.run("wait pod -l app=web --for=condition=Ready --timeout=60s").await.ok();
    until("two pods are left", async || {
        (k.run("get pods -l app=web -o name").await.ok().lines().count() == 2).then_some(())
    })
    .await;
    let pod = k.path("pods -l app=web", "{.items[0].metadata.name}").await;
    let object = format!("pod/{pod}");
    let id = "{.status.containerStatuses[0].containerID}";
    let old = k.path(&object, id).await;
    let socket = server.containerd().display().to_string();
    let kill = ["--address", &socket, "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL"];
    let container = old.trim_start_matches("containerd://");
    server.on_machine("ctr", &[&kill[..], &[container]].concat()).await.ok();
    k.reaches(&object, "{.status.containerStatuses[0].restartCount}", "1").await;
    k.run(&format!("wait {object} --for=condition=Ready --timeout=60s")).await.ok();
    assert_ne!(k.path(&object, id).await, old);
    assert_eq!(k.path(&object, "{.status.containerStatuses[0].lastState.terminated.exitCode}").await, "137");

    let uids = k.path("pods -l app=web", "{.items[*].metadata.uid}").await;
    k.run(&format!("delete {object} --timeout=60s")).await.ok();
    k.run("rollout status deployment/web --timeout=60s").await.ok();
    let now = k.path("pods -l app=web", "{.items[*].metadata.uid}").await;
    let kept = now.split(' ').filter(|uid| uids.contains(uid)).count();
    assert_eq!((now.split(' ').count(), kept), (2, 1), "one pod is new: {uids} -> {now}");

    // A ReplicaSet that somebody deletes comes back, too.
    let set = k.path("rs -l app=web", "{.items[?(@.spec.replicas==2)].metadata.name}").await;
    k.run(&format!("delete rs {set} --timeout=60s")).await.ok();
    k.run("rollout status deployment/web --timeout=60s").await.ok();
}

/// The server stops and starts, and crashes: containers run on, requests are answered, and changes made meanwhile count.
async fn restarts(server: &mut Server) {
    let k = server.kubectl.clone();
    let ids = "{.items[*].status.containerStatuses[*].containerID}";
    until("two pods are left", async || {
        (k.run("get pods -l app=web -o name").await.ok().lines().count() == 2).then_some(())
    })
    .await;
    let before = k.path("pods -l app=web", ids).await;
    let cluster_ip = address(&k.path("service/web", "{.spec.clusterIP}").await, "80");
    let client = Traffic::start(&cluster_ip.to_string());
    for crash in [false, true] {
        match crash {
            true => server.crash().await,
            false => server.stop().await,
        }
        for _ in 0..5 {
            assert_eq!(traffic::get(cluster_ip).await.unwrap(), "v2", "without a server");
        }
        let started = server.launch().await;
        eprintln!("ready after {:?}", started.ready);
        server.node_ready().await;
        // The node is worked on again: a pod starts.
        k.args(&["run", "probe", "--image=seawall.local/web:v1"]).await.ok();
        k.run("wait pod/probe --for=condition=Ready --timeout=60s").await.ok();
        k.run("delete pod probe --now").await.ok();
        assert_eq!(k.path("pods -l app=web", ids).await, before, "containers live on");
    }
    let seen = client.stop();
    assert_eq!(seen.failures, Vec::<String>::new());
    k.run("delete deployment,service web").await.ok();
}

/// Clients are spread over all pods, or kept at one.
async fn affinity(k: &Kubectl) {
    k.apply(&named("named", 3)).await;
    k.run("expose deployment named --port=80 --target-port=8080").await.ok();
    k.run("expose deployment named --name=sticky --port=80 --target-port=8080 --session-affinity=ClientIP").await.ok();
    k.run("expose deployment named --name=headless --port=80 --target-port=8080 --cluster-ip=None").await.ok();
    k.run("rollout status deployment/named --timeout=60s").await.ok();
    for service in ["named", "sticky"] {
        let slices = format!("endpointslices -l kubernetes.io/service-name={service}");
        k.reaches(&slices, "{.items[*].endpoints[*].conditions.ready}", "true true true").await;
    }
    let spread = address(&k.path("service/named", "{.spec.clusterIP}").await, "80");
    let sticky = address(&k.path("service/sticky", "{.spec.clusterIP}").await, "80");
    until("all pods answer", async || {
        (traffic::get(spread).await.is_ok() && answering(spread, 60).await.len() == 3).then_some(())
    })
    .await;
    until("the sticky Service answers", async || traffic::get(sticky).await.ok()).await;
    assert_eq!(answering(sticky, 60).await.len(), 1, "one client stays with one pod");
    assert_eq!(k.path("service/headless", "{.spec.clusterIP}").await, "None");
}

/// A pod that is not ready gets no requests; one that is not alive is restarted.
async fn readiness(k: &Kubectl) {
    let spread = address(&k.path("service/named", "{.spec.clusterIP}").await, "80");
    let pod = k.path("pods -l app=named", "{.items[0].metadata.name}").await;
    k.run(&format!("exec {pod} -- mv /named/index.html /named/away")).await.ok();
    k.run(&format!("wait pod/{pod} --for=condition=Ready=false --timeout=60s")).await.ok();
    until("the unready pod gets no requests", async || {
        let (mut others, mut failed) = (0, 0);
        for _ in 0..40 {
            match traffic::get(spread).await {
                Ok(name) if name != pod => others += 1,
                _ => failed += 1,
            }
        }
        (others == 40 && failed == 0).then_some(())
    })
    .await;
    k.run(&format!("exec {pod} -- mv /named/away /named/index.html")).await.ok();
    until("the pod is back", async || answering(spread, 60).await.contains(&pod).then_some(())).await;
    k.run("delete deployment named").await.ok();
    k.run("delete service named sticky headless").await.ok();

    k.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: mortal}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
  - {name: first, image: seawall.local/web:v1, command: [sh, -c, 'echo ready >/data/state'], volumeMounts: [{name: data, mountPath: /data}]}
  containers:
  - name: web
    image: seawall.local/web:v1
    command: [sh, -c, 'cat /data/state; exec sleep 1000']
    livenessProbe: {exec: {command: [cat, /data/state]}, periodSeconds: 1, failureThreshold: 1}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
",
    )
    .await;
    k.run("wait pod/mortal --for=condition=Ready --timeout=60s").await.ok();
    k.run("exec mortal -- rm /data/state").await.ok();
    until("the liveness probe has the container restarted", async || {
        (k.path("pod/mortal", "{.status.containerStatuses[0].restartCount}").await != "0").then_some(())
    })
    .await;
    has(k.run("describe pod mortal").await.ok(), &["Liveness probe failed", "will be restarted"]);
    k.run("delete pod mortal --timeout=60s").await.ok();
}

/// A disruption budget holds evictions up, and lets them through when it can.
async fn eviction(k: &Kubectl) {
    k.apply(&named("held", 2)).await;
    k.run("create pdb held --selector=app=held --min-available=2").await.ok();
    k.run("rollout status deployment/held --timeout=60s").await.ok();
    k.reaches("pdb/held", "{.status.currentHealthy}/{.status.disruptionsAllowed}", "2/0").await;
    let node = k.path("nodes", "{.items[0].metadata.name}").await;
    let drain = format!("drain {node} --ignore-daemonsets --pod-selector=app=held");
    has(
        k.run(&format!("{drain} --timeout=3s")).await.fails(),
        &["Cannot evict pod as it would violate the pod's disruption budget"],
    );
    assert_eq!(
        k.run("get pods -l app=held --field-selector=status.phase=Running -o name").await.ok().lines().count(),
        2
    );
    k.args(&["patch", "pdb", "held", "--type=merge", "-p", r#"{"spec": {"minAvailable": 0}}"#]).await.ok();
    k.reaches("pdb/held", "{.status.disruptionsAllowed}", "2").await;
    k.run(&format!("{drain} --timeout=60s")).await.ok();
    k.run(&format!("uncordon {node}")).await.ok();
    k.run("rollout status deployment/held --timeout=60s").await.ok();
    k.run("delete pdb held").await.ok();
    k.run("delete deployment held").await.ok();
}

/// What belongs to a deleted object goes with it, before it, or not at all.
async fn ownership(k: &Kubectl) {
    let none = async |what: &str| {
        let names = k.path(what, "{.items[*].metadata.name}").await;
        names.is_empty().then_some(())
    };
    k.apply(&named("owned", 2)).await;
    k.run("rollout status deployment/owned --timeout=60s").await.ok();
    k.run("delete deployment owned --cascade=orphan").await.ok();
    assert_eq!(k.path("rs -l app=owned", "{.items[*].metadata.ownerReferences}").await, "", "orphans have no owner");
    assert_eq!(k.run("get pods -l app=owned -o name").await.ok().lines().count(), 2);
    // The Deployment takes its orphans back.
    let pods = k.path("pods -l app=owned", "{.items[*].metadata.uid}").await;
    k.apply(&named("owned", 2)).await;
    k.run("rollout status deployment/owned --timeout=60s").await.ok();
    assert_eq!(k.path("pods -l app=owned", "{.items[*].metadata.uid}").await, pods);
    k.run("delete deployment owned --cascade=foreground --timeout=60s").await.ok();
    assert!(none("rs -l app=owned").await.is_some() && none("pods -l app=owned").await.is_some(), "they went first");
    k.apply(&named("owned", 2)).await;
    k.run("rollout status deployment/owned --timeout=60s").await.ok();
    k.run("delete deployment owned").await.ok();
    until("pods go after their owner", async || none("rs,pods -l app=owned").await).await;
}

/// Work that ends: done as often as asked, tried again, given up, cleaned up.
async fn jobs(k: &Kubectl) {
    let job = |name: &str, spec: &str, command: &str| {
        format!(
            "
apiVersion: batch/v1
kind: Job
metadata: {{name: {name}}}
spec:
  {spec}
  template:
    spec:
      restartPolicy: Never
      containers: [{{name: work, image: seawall.local/web:v1, command: [sh, -c, '{command}']}}]
"
        )
    };
    let work = "echo part $JOB_COMPLETION_INDEX";
    k.apply(&job("parts", "completions: 3\n  parallelism: 2\n  completionMode: Indexed", work)).await;
    k.run("wait job/parts --for=condition=Complete --timeout=60s").await.ok();
    assert_eq!(k.path("job/parts", "{.status.succeeded}/{.status.completedIndexes}").await, "3/0-2");
    let mut logs: Vec<_> = k.run("logs -l job-name=parts").await.ok().lines().map(str::to_owned).collect();
    logs.sort();
    assert_eq!(logs, ["part 0", "part 1", "part 2"]);
    has(k.run("get job parts").await.ok(), &["Complete", "3/3"]);

    k.apply(&job("hopeless", "backoffLimit: 1", "exit 7")).await;
    k.run("wait job/hopeless --for=condition=Failed --timeout=60s").await.ok();
    assert_eq!(k.path("job/hopeless", "{.status.failed}").await, "2", "the first try and one more");
    has(k.run("describe job hopeless").await.ok(), &["BackoffLimitExceeded"]);
    k.apply(&job("brief", "ttlSecondsAfterFinished: 1", "true")).await;
    k.run("wait job/brief --for=delete --timeout=60s").await.ok();

    k.run("delete job parts hopeless --timeout=60s").await.ok();
    until("their pods go with them", async || {
        k.path("pods -l batch.kubernetes.io/job-name", "{.items[*].metadata.name}").await.is_empty().then_some(())
    })
    .await;
}

/// A namespace takes everything in it along.
async fn namespaces(k: &Kubectl) {
    k.run("create namespace short").await.ok();
    until("its service account is there", async || {
        (k.path("sa/default -n short", "{.metadata.name}").await == "default").then_some(())
    })
    .await;
    k.pipe("apply -n short -f -", &named("web", 2)).await.ok();
    k.run("create configmap settings -n short").await.ok();
    k.run("expose deployment web --port=80 --target-port=8080 -n short").await.ok();
    k.run("rollout status deployment/web --timeout=60s -n short").await.ok();
    k.run("delete namespace short --wait=false").await.ok();
    has(k.run("create configmap late -n short").await.fails(), &["because it is being terminated"]);
    k.run("wait namespace/short --for=delete --timeout=60s").await.ok();
    for kind in ["pods", "rs", "deployments", "configmaps", "services", "endpointslices", "serviceaccounts"] {
        assert_eq!(k.run(&format!("get {kind} -n short -o name")).await.ok(), "", "{kind} are left");
    }
}

/// `seawall clean` leaves the machine as it was.
async fn nothing_left(mut server: Server) {
    let k = server.kubectl.clone();
    k.apply(&named("last", 2)).await;
    k.run("expose deployment last --port=80 --target-port=8080").await.ok();
    k.run("rollout status deployment/last --timeout=60s").await.ok();
    let look = |script: &'static str| {
        let server = &server;
        async move { server.on_machine("sh", &["-c", script]).await.ok() }
    };
    assert!(look("ps -eo args").await.contains("containerd-shim"));
    assert!(look("nft list tables").await.contains("seawall"));
    let directory = server.directory().display().to_string();
    server.stop().await;
    server.clean().await.ok();
    let look = |script: String| {
        let server = &server;
        async move { server.on_machine("sh", &["-c", &script]).await.ok() }
    };
    let processes = look("ps -eo args".into()).await;
    for program in ["containerd", "httpd", "pause", "seawall server"] {
        assert!(!processes.contains(program), "{program} still runs:\n{processes}");
    }
    assert_eq!(look("nft list tables".into()).await, "", "neither ours nor those that iptables made for us");
    assert_eq!(look("ls -d /run/netns /run/containerd 2>/dev/null || true".into()).await, "");
    assert_eq!(look("find /sys/fs/cgroup -name 'kubepods*'".into()).await, "");
    let links = look("ip -o link".into()).await;
    assert!(links.lines().all(|l| l.contains("lo:") || l.contains("eth0")), "{links}");
    let mounts = look("cat /proc/mounts".into()).await;
    assert!(!mounts.contains(&directory), "{mounts}");
    for name in ["data", "run", "pods"] {
        assert!(!server.directory().join(name).exists(), "{name} is left");
    }
}
