use std::os::unix::fs::PermissionsExt as _;

use kube::api::{Patch, PatchParams};
use seawall_server::{
    Config, Server,
    auth::{MASTERS, UserInfo, bootstrap_token},
    pki::{Authority, service_account_key},
};
use serde_json::json;

use super::*;

/// An API with the controllers behind it.
struct Cluster {
    server: Arc<Server>,
    stop: CancellationToken,
    _guard: tokio_util::sync::DropGuard,
    dir: tempfile::TempDir,
    ca: String,
    key: String,
}

impl Cluster {
    async fn new() -> Cluster {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        let store = seawall_store::embedded::Embedded::open(&dir.path().join("store"), Default::default()).unwrap();
        let authority = Authority::open(&tls).unwrap();
        let client = authority.client("kubelet-client", MASTERS).unwrap();
        let config = Config {
            service_cidr: "10.96.0.0/24".parse().unwrap(),
            node_ports: 30000..=30009,
            advertise: ("192.0.2.1".parse().unwrap(), 6443),
            service_account_key: service_account_key(&tls).unwrap(),
            issuer: "https://kubernetes.default.svc".into(),
            ca_pem: authority.pem.clone(),
            kubelet_client: (client.certificate, client.key),
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
        let stop = CancellationToken::new();
        let server = Server::start(config, Arc::new(store), stop.clone()).await.unwrap();
        let key = std::fs::read_to_string(tls.join("ca.key")).unwrap();
        Cluster { server, _guard: stop.clone().drop_guard(), stop, dir, ca: authority.pem, key }
    }

    fn client(&self, name: &str, groups: &[&str]) -> Client {
        let (server, user) = (self.server.clone(), UserInfo::new(name, groups));
        seawall_client::in_process(move |request| {
            let (server, user) = (server.clone(), user.clone());
            async move { server.handle(request, Some(user)).await }
        })
    }

    fn admin(&self) -> Client {
        self.client("admin", &[MASTERS])
    }

    fn newcomer(&self) -> Client {
        self.client("system:bootstrap:abcdef", &[bootstrap_token::GROUP, bootstrap_token::GROUP_AGENTS])
    }

    fn controllers(&self, life: Duration) {
        let config = seawall_controllers::Config {
            authority: Some(seawall_controllers::certificates::Authority::new(&self.ca, &self.key).unwrap()),
            certificate_duration: life,
            ..Default::default()
        };
        let client = self.client("system:kube-controller-manager", &[]);
        tokio::spawn(seawall_controllers::run(client, config, self.stop.clone()));
    }

    async fn node(&self, name: &str, ips: &[&str]) {
        let api: Api<k8s_openapi::api::core::v1::Node> =
            Api::all(self.client(&format!("system:node:{name}"), &[NODES]));
        let mut addresses = vec![json!({"type": "Hostname", "address": name})];
        addresses.extend(ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})));
        let node = json!({"metadata": {"name": name}, "status": {"addresses": addresses}});
        api.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
    }
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const DAY: Duration = Duration::from_secs(86_400);

/// No authority takes over.
fn nobody() -> watch::Receiver<String> {
    watch::channel(String::new()).1
}

#[tokio::test]
async fn a_newcomer_becomes_a_node_and_serves() {
    let cluster = Cluster::new().await;
    cluster.controllers(DAY);
    let pair = request_client(&cluster.newcomer(), "a").await.unwrap();
    let der = pem_of(&pair);
    let user = UserInfo::from_certificate(&der).unwrap();
    assert_eq!((user.username.as_str(), user.is_in(NODES)), ("system:node:a", true));

    // As that node it renews, and serves as soon as its Node says where it is.
    let client = cluster.client("system:node:a", &[NODES]);
    assert!(request(&client, &Wanted::client("a"), JOINING).await.is_ok());
    let path = cluster.dir.path().join("pki/serving.pem");
    let certificate = ServingCertificate::pending();
    let addresses = ["192.168.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
    let kept = keep_serving("a", &addresses, &path, client, nobody(), certificate.clone(), cluster.stop.clone());
    let requests: Api<CertificateSigningRequest> = Api::all(cluster.admin());
    until("a request for a serving certificate", async || {
        let all = requests.list(&Default::default()).await.unwrap().items;
        all.iter().any(|r| r.spec.signer_name == KUBELET_SERVING)
    })
    .await;
    assert!(!certificate.is_there());
    cluster.node("a", &["192.168.0.1", "fd00::1"]).await;
    until("a serving certificate", async || certificate.is_there()).await;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let stored = read(&path).unwrap().unwrap();
    assert_eq!(seawall_server::tls::names(&stored.certificate).unwrap(), ["a", "192.168.0.1", "fd00::1"]);
    assert!(has_names(&stored, &Wanted::serving("a", &addresses)));
    let other = [addresses[0], "fd00::2".parse().unwrap()];
    assert!(!has_names(&stored, &Wanted::serving("a", &other)), "one of them is another");
    assert!(!has_names(&stored, &Wanted::serving("a", &["192.168.0.2".parse().unwrap()])), "it has moved");
    kept.abort();
}

fn pem_of(pair: &Pair) -> Vec<u8> {
    use rustls_pki_types::pem::PemObject as _;
    rustls_pki_types::CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap().to_vec()
}

#[tokio::test]
async fn a_certificate_is_renewed_before_it_ends() {
    let cluster = Cluster::new().await;
    cluster.controllers(DAY);
    let path = cluster.dir.path().join("pki/client.pem");
    let first = request_client(&cluster.newcomer(), "a").await.unwrap();
    write(&path, &first).unwrap();
    // This one ends in a moment.
    let mut params = CertificateParams::default();
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let key = KeyPair::generate().unwrap();
    let old = Pair { certificate: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() };
    assert!(has_ended(&old) && !has_ended(&first));
    write(&path, &old).unwrap();
    let (given, mut got) = tokio::sync::mpsc::unbounded_channel();
    let client = cluster.client("system:node:a", &[NODES]);
    let kept = keep_client("a", &path, client, nobody(), cluster.stop.clone(), move |pair: &Pair| {
        given.send(pair.clone()).map_err(Into::into)
    });
    let mut next = async || tokio::time::timeout(Duration::from_secs(60), got.recv()).await.unwrap().unwrap();
    assert_eq!(next().await.certificate, old.certificate.trim_end().to_owned() + "\n", "the one that is there");
    let renewed = next().await;
    assert!(!has_ended(&renewed));
    assert_eq!(read(&path).unwrap().unwrap().key, renewed.key);
    kept.abort();
}

#[tokio::test]
async fn what_keeps_a_certificate_away_is_said() {
    let cluster = Cluster::new().await;
    let requests: Api<CertificateSigningRequest> = Api::all(cluster.admin());
    let nobody = cluster.client("nobody", &["dev"]);
    let error = request_client(&nobody, "a").await.unwrap_err().to_string();
    let expect = "the certificate request of system:node:a was not accepted: ";
    assert!(error.starts_with(expect) && error.contains("is forbidden: User \"nobody\" cannot create"), "{error}");

    // Without controllers nobody approves.
    let soon = Duration::from_millis(300);
    let error = request(&cluster.newcomer(), &Wanted::client("a"), soon).await.unwrap_err().to_string();
    let name = requests.list(&Default::default()).await.unwrap().items[0].metadata.name.clone().unwrap();
    assert_eq!(
        error,
        format!(
            "the certificate request {name} was not approved within 300ms: `kubectl describe csr {name}` says why, \
             `kubectl certificate approve {name}` approves it"
        )
    );

    // Whatever an administrator does to the next request.
    let decide = async |subresource: &str, ty: &str, patience: Duration| {
        for csr in requests.list(&Default::default()).await.unwrap() {
            requests.delete(csr.metadata.name.as_deref().unwrap(), &Default::default()).await.unwrap();
        }
        let act = async {
            let mut name = String::new();
            until("a request", async || {
                let all = requests.list(&Default::default()).await.unwrap().items;
                name = all.first().and_then(|r| r.metadata.name.clone()).unwrap_or_default();
                !name.is_empty()
            })
            .await;
            if subresource.is_empty() {
                requests.delete(&name, &Default::default()).await.unwrap();
            } else {
                let condition = json!({"type": ty, "status": "True", "reason": "Because", "message": "I say so"});
                let patch = Patch::Merge(json!({"status": {"conditions": [condition]}}));
                let params = PatchParams::default();
                match subresource {
                    "approval" => requests.patch_approval(&name, &params, &patch).await.unwrap(),
                    _ => requests.patch_status(&name, &params, &patch).await.unwrap(),
                };
            }
            name
        };
        let (client, wanted) = (cluster.newcomer(), Wanted::client("a"));
        let (result, name) = tokio::join!(request(&client, &wanted, patience), act);
        result.unwrap_err().to_string().replace(&name, "NAME")
    };
    let long = Duration::from_secs(60);
    assert_eq!(
        decide("approval", "Denied", long).await,
        "the certificate request NAME was denied (Because: I say so): ask who denied it; a request is made again after \
         a restart"
    );
    assert_eq!(
        decide("status", "Failed", long).await,
        "the certificate request NAME failed (Because: I say so): `kubectl describe csr NAME` says more"
    );
    assert_eq!(
        decide("approval", "Approved", Duration::from_secs(2)).await,
        "the certificate request NAME was approved, but not signed within 2s: are the controllers running on any server?"
    );
    assert_eq!(decide("", "", long).await, "the certificate request NAME was deleted while it was waited for");
}

#[test]
fn when_it_is_renewed() {
    let at = |text: &str| text.parse::<Timestamp>().unwrap();
    let check = |share: f64, expect: &str| {
        assert_eq!(renewal(at("2026-01-01T00:00:00Z"), at("2026-01-11T00:00:00Z"), share), at(expect), "{share}");
    };
    check(0.0, "2026-01-08T00:00:00Z");
    check(0.5, "2026-01-09T00:00:00Z");
    check(1.0, "2026-01-10T00:00:00Z");
}

#[test]
fn what_is_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent/pki/client.pem");
    assert!(read(&path).unwrap().is_none());
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::default().self_signed(&key).unwrap().pem();
    let pair = Pair { certificate: certificate.clone(), key: key.serialize_pem() };
    write(&path, &pair).unwrap();
    let found = read(&path).unwrap().unwrap();
    assert_eq!((found.certificate.trim(), found.key.trim()), (pair.certificate.trim(), pair.key.trim()));
    std::fs::write(&path, certificate).unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("client.pem: the serving key is not valid PEM") && error.contains("join again"), "{error}");
}
