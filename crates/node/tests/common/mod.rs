//! A real API server on the embedded store, and a node agent with a containerd of its own, all in one temporary
//! directory and taken away at the end.
#![allow(dead_code, missing_docs)]

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http_body_util::{BodyExt, Full};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, ServiceAccount};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use seawall_node::{NodeConfig, image, remove_all};
use seawall_server::{
    Config, Server,
    auth::{MASTERS, NODES, UserInfo},
    pki::{Authority, service_account_key},
    serve,
};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

pub const IMAGE: &str = "seawall.test/busybox:1";
const NODE: &str = "node-under-test";

pub struct Cluster {
    pub config: NodeConfig,
    pub client: Client,
    /// The node's requests are not answered any more.
    pub cut: Arc<AtomicBool>,
    node_client: Client,
    agent: Option<(CancellationToken, JoinHandle<anyhow::Result<()>>)>,
    stop: CancellationToken,
    kubeconfig: PathBuf,
    directory: tempfile::TempDir,
    ended: bool,
}

/// A test that fails leaves nothing behind either.
impl Drop for Cluster {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.stop.cancel();
        if let Some((stop, task)) = self.agent.take() {
            stop.cancel();
            task.abort();
        }
        let config = self.config.clone();
        let clean = std::thread::spawn(move || tokio::runtime::Runtime::new().unwrap().block_on(remove_all(&config)));
        if !matches!(clean.join(), Ok(Ok(()))) {
            eprintln!("the node under test was not cleaned up");
        }
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Cluster {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With a node that is run differently.
    pub async fn start_with(change: impl FnOnce(&mut NodeConfig)) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test runs containers: run it as root");
        for program in ["containerd", "ctr", "runc", "iptables"] {
            let found = std::process::Command::new("which").arg(program).output().is_ok_and(|o| o.status.success());
            assert!(found, "{program} is not installed: `make test` installs it");
        }
        let filter =
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn,seawall_node=debug".into());
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let directory = tempfile::Builder::new().prefix("seawall-node-").tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let ip: IpAddr = Ipv4Addr::LOCALHOST.into();
        let authority = Authority::open(&at("tls")).unwrap();
        let kubelet_client = authority.client("kube-apiserver-kubelet-client", "").unwrap();
        let serving = authority.server("kube-apiserver", "", &["localhost".into()], &[ip]).unwrap();
        let user = format!("system:node:{NODE}");
        let agent = authority.server(&user, NODES, &[NODE.into()], &[ip]).unwrap();
        let admin = authority.client("admin", MASTERS).unwrap();
        std::fs::create_dir_all(at("store")).unwrap();
        let store = Arc::new(seawall_store::embedded::Embedded::open(&at("store"), Default::default()).unwrap());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = CancellationToken::new();
        let server_config = Config {
            service_cidr: "10.196.0.0/16".parse().unwrap(),
            node_ports: 30000..=32767,
            advertise: ("192.0.2.1".parse().unwrap(), port),
            service_account_key: service_account_key(&at("tls")).unwrap(),
            issuer: "https://kubernetes.default.svc".into(),
            ca_pem: authority.pem.clone(),
            kubelet_client: (kubelet_client.certificate, kubelet_client.key),
            version: "v1.37.0".into(),
            name: "test".into(),
            presence: Default::default(),
            paths: None,
            shared_store: false,
            tolerations: Default::default(),
            inflight: Default::default(),
            goaway_chance: 0.0,
            event_ttl: Duration::from_secs(3600),
            access: Default::default(),
        };
        let tls = serve::tls(&serving, &authority.pem).unwrap();
        let server = Server::start(server_config, store, stop.child_token()).await.unwrap();
        tokio::spawn(serve::serve(Arc::clone(&server), listener, tls, stop.clone()));
        let client = |name: &str, groups: &[&str], cut: Arc<AtomicBool>| {
            let (server, user) = (Arc::clone(&server), UserInfo::new(name, groups));
            seawall_client::in_process(move |request| {
                let (server, user, cut) = (Arc::clone(&server), user.clone(), Arc::clone(&cut));
                async move {
                    if cut.load(Ordering::SeqCst) {
                        // As long as a connection takes to be given up.
                        tokio::time::sleep(Duration::from_secs(4)).await;
                        let text = r#"{"kind":"Status","status":"Failure","code":503,"reason":"cut off"}"#;
                        let body = Full::new(text.into()).map_err(|never| match never {}).boxed_unsync();
                        return http::Response::builder().status(503).body(body).unwrap();
                    }
                    server.handle(request, Some(user)).await
                }
            })
        };
        let cut = Arc::new(AtomicBool::new(false));
        let write = |name: &str, text: &str| {
            std::fs::write(at(name), text).unwrap();
            at(name).display().to_string()
        };
        let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("https://127.0.0.1:{port}"), "certificate-authority": write("ca.pem", &authority.pem)}}],
            "users": [{"name": "u", "user": {"client-certificate": write("admin.pem", &admin.certificate), "client-key": write("admin.key", &admin.key)}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "default"}}]});
        let kubeconfig = PathBuf::from(write("kubeconfig", &kubeconfig.to_string()));
        let mut config = NodeConfig::new(NODE, ip);
        config.data_dir = at("data");
        config.run_dir = at("run");
        config.log_dir = at("logs");
        config.device_plugins = at("device-plugins");
        config.cgroup_root = format!("/seawall-test-{}", std::process::id());
        config.port = free_port();
        config.serving_cert_pem = agent.certificate;
        config.serving_key_pem = agent.key;
        config.client_ca_pem = authority.pem;
        config.api_users = vec!["kube-apiserver-kubelet-client".into()];
        // Tests run where they are built, and what that leaves of the disk says nothing about the pods of a test.
        config.eviction.hard = "memory.available<100Mi,nodefs.available<256Mi".parse().unwrap();
        config.images.high = 100;
        change(&mut config);
        let mut cluster = Self {
            config,
            client: client("admin", &[MASTERS], Arc::default()),
            node_client: client(&user, &[NODES], Arc::clone(&cut)),
            cut,
            agent: None,
            stop,
            kubeconfig,
            directory,
            ended: false,
        };
        cluster.start_agent();
        let nodes: Api<Node> = Api::all(cluster.client.clone());
        until("the node registers", async || nodes.get_opt(NODE).await.unwrap().is_some()).await;
        // What the controller does that hands out pod ranges. The range is this process's own.
        let pid = std::process::id();
        let range = format!("10.{}.{}.0/24", 200 + pid / 256 % 50, pid % 256);
        let patch = json!({"spec": {"podCIDR": range, "podCIDRs": [range]}});
        nodes.patch(NODE, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        // And what other controllers put into each namespace.
        let account = json!({"metadata": {"name": "default"}});
        let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), "default");
        let _ = accounts.create(&PostParams::default(), &serde_json::from_value(account).unwrap()).await;
        let root = json!({"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": cluster.config.client_ca_pem}});
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "default");
        let _ = maps.create(&PostParams::default(), &serde_json::from_value(root).unwrap()).await;
        image::import(&cluster.config.cri_socket(), image::busybox(IMAGE).unwrap()).await.unwrap();
        cluster
    }

    pub fn start_agent(&mut self) {
        let stop = CancellationToken::new();
        let run = seawall_node::run(self.node_client.clone(), self.config.clone(), stop.clone());
        self.agent = Some((stop, tokio::spawn(run)));
    }

    pub async fn stop_agent(&mut self) {
        if let Some((stop, task)) = self.agent.take() {
            stop.cancel();
            task.await.unwrap().unwrap();
        }
    }

    pub async fn end(mut self) {
        self.stop_agent().await;
        self.stop.cancel();
        self.ended = true;
        remove_all(&self.config).await.unwrap();
    }

    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), "default")
    }

    /// Creates a pod on the node, as the scheduler would have it.
    pub async fn create(&self, name: &str, spec: Value) -> Pod {
        self.create_owned(name, spec, json!([])).await
    }

    /// The same, with owners.
    pub async fn create_owned(&self, name: &str, mut spec: Value, owners: Value) -> Pod {
        spec["nodeName"] = json!(NODE);
        for list in ["containers", "initContainers"] {
            for container in spec[list].as_array_mut().into_iter().flatten() {
                container["image"] = json!(IMAGE);
            }
        }
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}, "ownerReferences": owners}, "spec": spec});
        self.pods().create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap()
    }

    pub async fn pod(&self, name: &str) -> Pod {
        self.pods().get(name).await.unwrap()
    }

    /// The pod as JSON, which is easier to look into.
    pub async fn json(&self, name: &str) -> Value {
        serde_json::to_value(self.pod(name).await).unwrap()
    }

    /// Waits until the pod is as it should be, and shows what it was instead if it never is.
    pub async fn wait(&self, name: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            let pod = self.pods().get_opt(name).await.unwrap();
            let pod = pod.map_or(Value::Null, |p| serde_json::to_value(p).unwrap());
            if holds(&pod) {
                return pod;
            }
            if Instant::now() > deadline {
                let (_, events, _) = self.kubectl(&["get", "events"], None).await;
                panic!("{name}: not in time: {what}\n{:#}\n{events}", pod["status"]);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn ready(&self, name: &str) -> Value {
        self.wait(name, "Ready", |p| condition(p, "Ready") == "True").await
    }

    /// Runs kubectl: its exit code, stdout, stderr.
    pub async fn kubectl(&self, args: &[&str], stdin: Option<&str>) -> (i32, String, String) {
        use tokio::io::AsyncWriteExt;
        let program = std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".into());
        let mut command = tokio::process::Command::new(&program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(args).env("HOME", self.directory.path());
        command
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        let mut child = command
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|e| panic!("{program}: {e}: `make test` installs kubectl and sets KUBECTL"));
        let mut input = child.stdin.take().unwrap();
        input.write_all(stdin.unwrap_or_default().as_bytes()).await.unwrap();
        drop(input);
        let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await;
        let output = output.unwrap_or_else(|_| panic!("kubectl {args:?} does not end")).unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    pub fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }
}

pub fn condition<'a>(pod: &'a Value, kind: &str) -> &'a str {
    let list = pod["status"]["conditions"].as_array().into_iter().flatten();
    list.into_iter().find(|c| c["type"] == kind).and_then(|c| c["status"].as_str()).unwrap_or_default()
}

pub async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
