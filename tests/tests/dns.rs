//! Cluster DNS on a real cluster: what pods find, and that they go on finding it whatever is switched off.

use std::{fs, path::PathBuf, process::Stdio, time::Duration};

use seawall_drill::lab::{Machine, Program, Service};
use seawall_tests::{
    cluster::{Cluster, works},
    http::Api,
    kubectl::{Kubectl, has},
    within,
};

const LONG: Duration = Duration::from_secs(120);
const IMAGE: &str = "example.test/client:v1";

fn pod(name: &str, node: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: client}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  # It stays where it is, whatever is thought of its node.
  tolerations: [{{operator: Exists}}]
  dnsConfig: {{options: [{{name: timeout, value: '1'}}, {{name: attempts, value: '2'}}]}}
  containers: [{{name: c, image: {IMAGE}, command: [sleep, '1000000']}}]
"
    )
}

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: client}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: sql, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere}
spec: {type: ExternalName, externalName: web.default.svc.other.example}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: c, image: example.test/client:v1, command: [sleep, '1000000']}]
";

/// Looks names up in a pod, one after the other, until it is told to stop.
struct Client {
    pod: String,
    /// Its directory for files, as this machine sees it.
    files: PathBuf,
}

/// One line for each look-up: whether something was found, and the seconds it took.
const LOOP: &str = "rm -f /tmp/stop /tmp/seen; (while [ ! -e /tmp/stop ]; do
    a=$(date +%s); if getent ahostsv4 web >/dev/null; then r=found; else r=missing; fi; b=$(date +%s)
    echo $r $((b - a)) >>/tmp/seen; done; echo end >>/tmp/seen) >/dev/null 2>&1 &";

impl Client {
    async fn start(kubectl: &Kubectl, machine: &Machine, pod: &str) -> Client {
        kubectl.args(&["exec", pod, "--", "sh", "-c", LOOP]).await.ok();
        let named = |pid: &i32| {
            let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let variable = format!("HOSTNAME={pod}");
            read("comm").starts_with(b"sleep") && read("environ").split(|b| *b == 0).any(|v| v == variable.as_bytes())
        };
        let pid = machine.processes().unwrap().into_iter().find(named).expect("the pod's process");
        let client = Client { pod: pod.to_owned(), files: format!("/proc/{pid}/root/tmp").into() };
        client.more().await;
        client
    }

    /// What it saw. No API and no agent is needed for that.
    fn seen(&self) -> String {
        fs::read_to_string(self.files.join("seen")).unwrap_or_default()
    }

    /// Waits until a good deal more was looked up.
    async fn more(&self) {
        let before = self.seen().lines().count();
        let what = format!("{} looks names up", self.pod);
        within(LONG, &what, async || (self.seen().lines().count() >= before + 100).then_some(())).await;
    }

    /// Ends it. Nothing was missing, and nothing took longer than one more question.
    async fn stop(self, what: &str) {
        fs::write(self.files.join("stop"), "").unwrap();
        within(LONG, "the last look-up ends", async || self.seen().ends_with("end\n").then_some(())).await;
        let seen = self.seen();
        let all = seen.lines().filter(|line| *line != "end").count();
        let missing = seen.lines().filter(|line| line.starts_with("missing")).count();
        let slow = seen.lines().filter_map(|line| line.split(' ').nth(1)?.parse::<u32>().ok()).max().unwrap();
        eprintln!(
            "{}: {what}: {all} look-ups, {missing} without an answer, the slowest within {} s",
            self.pod,
            slow + 1
        );
        assert_eq!(missing, 0, "{what}");
        // Seconds are counted from one to the next, so one and a bit looks like two.
        assert!(slow <= 2, "{what}: {slow} s");
    }
}

async fn finds(kubectl: &Kubectl, pod: &str, name: &str, parts: &[&str]) {
    let what = format!("{pod} finds {name}");
    let found = within(LONG, &what, async || {
        let output = kubectl.args(&["exec", pod, "--", "getent", "ahostsv4", name]).await;
        output.status.success().then_some(output.stdout)
    })
    .await;
    has(found, parts);
}

/// What a machine's agent counts.
async fn metrics(cluster: &Cluster, machine: &Machine) -> Option<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let address = format!("{}:10250", machine.address());
    fs::write(file.path(), cluster.kubeconfig("s1").replace("127.0.0.1:6443", &address)).unwrap();
    let answer = Api::new(file.path()).unwrap().get("/metrics").await.ok()?;
    (answer.status == 200).then(|| answer.text())
}

/// How many questions the DNS of a node has been asked.
async fn asked(cluster: &Cluster, machine: &Machine) -> Option<u64> {
    let text = metrics(cluster, machine).await?;
    let name = "seawall_dns_questions_total{transport=\"udp\"} ";
    text.lines().find_map(|line| line.strip_prefix(name))?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_find_names_whatever_is_switched_off() {
    let cluster = Cluster::up("dns", 1, 2, Cluster::with_dns()).await;
    let (s1, a1, a2) = (cluster.machine("s1"), cluster.machine("a1"), cluster.machine("a2"));
    let k = cluster.kubectl("s1");

    // The replicas are two, apart, and disturbed one at a time.
    // They were made when there was one node, maybe, which had both.
    let rule =
        "{.spec.template.spec.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey}";
    k.reaches("deployment/seawall-dns -n kube-system", rule, "kubernetes.io/hostname").await;
    k.run("rollout status -n kube-system deployment/seawall-dns --timeout=240s").await.ok();
    within(LONG, "two replicas on two nodes", async || {
        let nodes = k.path("pods -n kube-system -l k8s-app=kube-dns", "{.items[*].spec.nodeName}").await;
        let nodes: Vec<&str> = nodes.split_whitespace().collect();
        matches!(nodes[..], [one, other] if one != other).then_some(())
    })
    .await;
    assert_eq!(k.path("service/kube-dns -n kube-system", "{.spec.clusterIP}").await, "10.96.0.10");
    k.reaches("pdb/seawall-dns -n kube-system", "{.status.disruptionsAllowed}", "1").await;

    for machine in [&a1, &a2] {
        let socket = "/run/seawall/containerd/containerd.sock";
        let build = format!(
            "image build --busybox --program /usr/bin/getent:/usr/bin/getent -t {IMAGE} --socket {socket} -- sleep 1000000"
        );
        works(machine, &build).await;
    }
    k.reaches("serviceaccount/default", "{.metadata.name}", "default").await;
    k.apply(&(OBJECTS.to_owned() + "---" + &pod("c1", "a1") + "---" + &pod("c2", "a2"))).await;
    k.run("wait pod/c1 pod/c2 --for=condition=Ready --timeout=120s").await.ok();
    k.run("rollout status statefulset/db --timeout=120s").await.ok();

    // What pods find, by short names and long ones.
    let conf = k.run("exec c1 -- cat /etc/resolv.conf").await.ok();
    has(
        conf,
        &["nameserver 10.96.0.10", "search default.svc.cluster.local svc.cluster.local cluster.local", "ndots:5"],
    );
    let web = k.path("service/web", "{.spec.clusterIP}").await;
    let db0 = k.path("pod/db-0", "{.status.podIP}").await;
    let db1 = k.path("pod/db-1", "{.status.podIP}").await;
    for pod in ["c1", "c2"] {
        finds(&k, pod, "web", &[&web]).await;
        finds(&k, pod, "web.default", &[&web]).await;
        finds(&k, pod, "kubernetes.default.svc.cluster.local.", &["10.96.0.1"]).await;
        finds(&k, pod, "db", &[&db0, &db1]).await;
        finds(&k, pod, "db-1.db", &[&db1]).await;
    }
    let ask = async |kind: &str, name: &str| k.run(&format!("exec c1 -- nslookup -type={kind} {name}")).await.stdout;
    has(ask("srv", "_sql._tcp.db.default.svc.cluster.local").await, &["5432 db-0.db.default.svc.cluster.local"]);
    let reversed: Vec<&str> = web.rsplit('.').collect();
    let reversed = format!("{}.in-addr.arpa", reversed.join("."));
    has(ask("ptr", &reversed).await, &["web.default.svc.cluster.local"]);
    has(ask("txt", "dns-version.cluster.local").await, &["1.1.0"]);
    has(ask("a", "nothing.default.svc.cluster.local").await, &["NXDOMAIN"]);

    // Other names: another DNS, here one of ours with another domain, is told of in a ConfigMap.
    let mut command = s1.command("seawall");
    let listen = format!("{}:5300", s1.address());
    command.args(["dns", "--kubeconfig", "/var/lib/seawall/admin.kubeconfig", "--listen", &listen]);
    command.args(["--http", "127.0.0.1:5301", "--cluster-domain", "other.example", "--linger", "0"]);
    let _other = command.stdin(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    let stub = format!("--from-literal=stubDomains={{\"other.example\":[\"{listen}\"]}}");
    k.run(&format!("create configmap seawall-dns -n kube-system {stub}")).await.ok();
    finds(&k, "c1", "web.default.svc.other.example.", &[&web]).await;
    finds(&k, "c1", "elsewhere", &[&web]).await;
    has(ask("cname", "elsewhere.default.svc.cluster.local").await, &["web.default.svc.other.example"]);

    // The node's own answers, where it is there; where it is left out, the replicas do.
    let before = asked(&cluster, &a1).await.unwrap();
    finds(&k, "c1", "web", &[&web]).await;
    assert!(asked(&cluster, &a1).await.unwrap() > before);
    let service = a2.service();
    let without = Service { args: [&service.args[..], &["--disable=dns".to_owned()]].concat(), ..service };
    a2.set_running(false).await.unwrap();
    a2.set_service(&without).unwrap();
    a2.set_running(true).await.unwrap();
    within(LONG, "a2 has no DNS of its own", async || {
        (!metrics(&cluster, &a2).await?.contains("seawall_dns_")).then_some(())
    })
    .await;
    finds(&k, "c2", "db-0.db", &[&db0]).await;

    // From here on, c1 asks its node, and c2 the replicas.
    let both = async || (Client::start(&k, &a1, "c1").await, Client::start(&k, &a2, "c2").await);
    let (one, two) = both().await;
    k.run("rollout restart -n kube-system deployment/seawall-dns").await.ok();
    k.run("rollout status -n kube-system deployment/seawall-dns --timeout=240s").await.ok();
    one.more().await;
    two.more().await;
    one.stop("a rolling update").await;
    two.stop("a rolling update").await;

    // The node's process is killed again and again: the very next question goes to the replicas.
    let one = Client::start(&k, &a1, "c1").await;
    for _ in 0..3 {
        let ended = a1.told().ended;
        a1.kill(Program::Seawall).await.unwrap();
        one.more().await;
        let again = async || (a1.told().ended > ended && a1.pid_of(Program::Seawall).unwrap().is_some()).then_some(());
        within(LONG, "it is started again", again).await;
    }
    one.stop("the node's process is killed").await;
    within(LONG, "its agent answers", async || asked(&cluster, &a1).await).await;

    // It stops in order and stays away; then it comes back.
    let one = Client::start(&k, &a1, "c1").await;
    a1.set_running(false).await.unwrap();
    one.more().await;
    a1.set_running(true).await.unwrap();
    within(LONG, "its agent answers", async || asked(&cluster, &a1).await).await;
    one.more().await;
    one.stop("the node's process is away").await;

    // The machine of the only server loses its power, with a replica, maybe. Both know what they knew, even who starts
    // meanwhile.
    let (one, two) = both().await;
    s1.power_off(false).await.unwrap();
    one.more().await;
    two.more().await;
    a1.kill(Program::Seawall).await.unwrap();
    one.more().await;
    one.stop("without a control plane").await;
    two.stop("without a control plane").await;
    cluster.lab.power_on(&s1).await.unwrap();
    within(LONG, "the server serves again", async || {
        cluster.kubectl("s1").run("get --raw /readyz").await.status.success().then_some(())
    })
    .await;
    within(LONG, "its agent answers", async || asked(&cluster, &a1).await).await;

    // And the other node.
    let one = Client::start(&k, &a1, "c1").await;
    a2.power_off(false).await.unwrap();
    one.more().await;
    one.stop("another node loses its power").await;
}
