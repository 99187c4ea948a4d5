//! What is written down of requests, and users of an issuer outside of the cluster: with kubectl.

use std::{
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::StatusCode;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PublicKeyData};
use seawall_tests::{
    Options, Server,
    kubectl::{self, has},
    until,
};
use serde_json::{Value, json};

use crate::site::{Asked, Site};

const POLICY: &str = "
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  userGroups: ['system:nodes']
- level: Metadata
  resources: [{group: '', resources: [secrets]}]
- level: RequestResponse
  omitManagedFields: true
  resources: [{group: '', resources: [configmaps]}]
  verbs: [create, update, patch]
";

/// An issuer with one key, and a token of it.
struct Issuer {
    site: Site,
    key: KeyPair,
}

impl Issuer {
    async fn new() -> Issuer {
        let key = KeyPair::generate().unwrap();
        let (x, y) = key.der_bytes()[1..].split_at(32);
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let keys =
            json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": "k", "alg": "ES256", "x": text(x), "y": text(y)}]});
        let own: Arc<std::sync::OnceLock<String>> = Arc::default();
        let url = own.clone();
        let site = Site::new(&["localhost"], move |asked: Asked| {
            let url = url.get().cloned().unwrap_or_default();
            let answer = match &*asked.path {
                "/keys" => keys.clone(),
                _ => json!({"issuer": url, "jwks_uri": format!("{url}/keys")}),
            };
            Box::pin(async move { (StatusCode::OK, answer) })
        })
        .await;
        let issuer = Issuer { site, key };
        own.set(issuer.url()).unwrap();
        issuer
    }

    fn url(&self) -> String {
        format!("https://localhost:{}", self.site.port)
    }

    fn token(&self, audience: &str) -> String {
        #[allow(clippy::disallowed_methods, reason = "the server looks at the real clock")]
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let header = Header { kid: Some("k".into()), ..Header::new(Algorithm::ES256) };
        let claims =
            json!({"iss": self.url(), "sub": "jane", "aud": audience, "exp": now + 600, "roles": ["devs", "ops"]});
        let private = EncodingKey::from_ec_pem(self.key.serialize_pem().as_bytes()).unwrap();
        jsonwebtoken::encode(&header, &claims, &private).unwrap()
    }
}

fn events(log: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(log).unwrap();
    // The last line may still be on its way.
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_written_down_and_an_issuer_is_believed() {
    let issuer = Issuer::new().await;
    let files = tempfile::tempdir().unwrap();
    let log = files.path().join("logs/audit.log");
    let args = vec![
        "--disable=scheduler,controllers".into(),
        format!("--audit-policy-file={}", kubectl::file(files.path(), "policy.yaml", POLICY)),
        format!("--audit-log-path={}", log.display()),
        format!("--oidc-issuer-url={}", issuer.url()),
        "--oidc-client-id=seawall".into(),
        // Without it, RS256 alone, as upstream.
        "--oidc-signing-algs=ES256".into(),
        "--oidc-username-prefix=oidc:".into(),
        "--oidc-groups-claim=roles".into(),
        format!("--oidc-ca-file={}", kubectl::file(files.path(), "ca.pem", &issuer.site.ca)),
    ];
    let mut server = Server::start(Options { machine: None, args }).await;
    let k = &server.kubectl;
    k.reaches("namespace/default", "{.metadata.name}", "default").await;
    let token = issuer.token("seawall");
    let as_jane = async |token: &str, words: &str| {
        let url = server.url();
        let own = ["--token", token, "--kubeconfig=/dev/null", "--insecure-skip-tls-verify", "--server", &url];
        k.args(&[&own[..], &words.split(' ').collect::<Vec<_>>()].concat()).await
    };
    has(as_jane(&token, "auth whoami").await.ok(), &["oidc:jane", "devs", "ops", "system:authenticated"]);
    has(as_jane(&issuer.token("other"), "auth whoami").await.fails(), &["Unauthorized"]);
    has(as_jane(&token, "get configmaps").await.fails(), &["User \"oidc:jane\" cannot list resource \"configmaps\""]);
    k.run("create role maps --verb=get,list,create --resource=configmaps").await.ok();
    k.run("create rolebinding maps --role=maps --group=devs").await.ok();
    until("jane may create", async || {
        as_jane(&token, "create configmap hers --from-literal=word=seen").await.status.success().then_some(())
    })
    .await;
    k.run("create secret generic s --from-literal=word=unseen").await.ok();

    let found = until("the log has it", async || {
        let events = events(&log);
        let of = |resource: &str, name: &str| {
            events
                .iter()
                .find(|e| {
                    e["objectRef"]["resource"] == resource && e["objectRef"]["name"] == name && e["verb"] == "create"
                })
                .cloned()
        };
        of("configmaps", "hers").zip(of("secrets", "s"))
    })
    .await;
    let (hers, secret) = found;
    assert_eq!((&hers["stage"], &hers["level"]), (&json!("ResponseComplete"), &json!("RequestResponse")));
    assert_eq!(hers["user"]["username"], "oidc:jane");
    assert_eq!(hers["sourceIPs"], json!(["127.0.0.1"]));
    assert!(hers["userAgent"].as_str().unwrap().starts_with("kubectl"), "{hers}");
    assert_eq!(
        (&hers["requestObject"]["data"]["word"], &hers["responseStatus"]["code"]),
        (&json!("seen"), &json!(201))
    );
    assert!(hers["responseObject"]["metadata"]["uid"].is_string());
    assert_eq!(
        hers["annotations"]["authorization.k8s.io/reason"],
        "RBAC: allowed by RoleBinding \"maps/default\" of Role \"maps\" to Group \"devs\""
    );
    assert_eq!((&secret["level"], &secret["requestObject"]), (&json!("Metadata"), &Value::Null));
    let text = std::fs::read_to_string(&log).unwrap();
    for word in ["unseen", "dW5zZWVu"] {
        assert!(!text.contains(word), "what is secret is not written down");
    }
    let metrics = k.run("get --raw /metrics").await.ok();
    has(&metrics, &["apiserver_audit_event_total ", "apiserver_audit_error_total{plugin=\"log\"} 0"]);

    // What happened last is there when the server has ended.
    k.run("create configmap last").await.ok();
    server.stop().await;
    assert!(events(&log).iter().any(|e| e["objectRef"]["name"] == "last" && e["stage"] == "ResponseComplete"));
}
