//! Users of an issuer: a real one over HTTPS, whose keys come and go.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use arc_swap::ArcSwap;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::StatusCode;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PublicKeyData};
use seawall_server::{
    access::{Access, Authentication},
    auth::oidc::{ALGORITHMS, config::AuthenticationConfiguration},
};
use serde_json::{Value, json};

use super::{
    harness::{Api, ISSUER},
    site::{Asked, Site},
};

const REVIEWS: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
/// A key for tests and nothing else, in the only form in which keys of this kind can be had here.
const RSA: &[u8] = include_bytes!("rsa.pem");
const RSA_MODULUS: &str = include_str!("rsa.modulus");

/// What signs, and what others know of it.
#[derive(Clone)]
struct Key {
    header: Header,
    private: EncodingKey,
    jwk: Value,
}

fn elliptic(id: &str) -> Key {
    let pair = KeyPair::generate().unwrap();
    let (x, y) = pair.der_bytes()[1..].split_at(32);
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let mut header = Header::new(Algorithm::ES256);
    header.kid = Some(id.to_owned());
    let jwk = json!({"kty": "EC", "crv": "P-256", "kid": id, "alg": "ES256", "use": "sig", "x": text(x), "y": text(y)});
    Key { header, private: EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes()).unwrap(), jwk }
}

fn rsa(id: &str) -> Key {
    let mut header = Header::new(Algorithm::RS256);
    header.kid = Some(id.to_owned());
    let jwk = json!({"kty": "RSA", "kid": id, "use": "sig", "n": RSA_MODULUS.trim(), "e": "AQAB"});
    Key { header, private: EncodingKey::from_rsa_pem(RSA).unwrap(), jwk }
}

#[derive(Default)]
struct Shown {
    issuer: String,
    keys: Vec<Value>,
    /// The paths that were asked for.
    asked: Vec<String>,
    /// Whether it takes its time.
    slow: bool,
}

struct Issuer {
    site: Site,
    shown: Arc<Mutex<Shown>>,
}

impl Issuer {
    async fn new(keys: &[&Key]) -> Issuer {
        let shown = Arc::new(Mutex::new(Shown::default()));
        let state = shown.clone();
        let site = Site::new(&["localhost"], move |asked: Asked| {
            let mut shown = state.lock().unwrap();
            let answer = match &*asked.path {
                "/.well-known/openid-configuration" => {
                    json!({"issuer": shown.issuer, "jwks_uri": format!("{}/keys", shown.issuer)})
                }
                "/keys" => json!({"keys": shown.keys}),
                _ => Value::Null,
            };
            shown.asked.push(asked.path);
            let pause = Duration::from_secs(if shown.slow { 3600 } else { 0 });
            Box::pin(async move {
                tokio::time::sleep(pause).await;
                (StatusCode::OK, answer)
            })
        })
        .await;
        let issuer = Issuer { shown, site };
        issuer.shown.lock().unwrap().issuer = issuer.url();
        issuer.show(keys);
        issuer
    }

    fn url(&self) -> String {
        format!("https://localhost:{}", self.site.port)
    }

    fn show(&self, keys: &[&Key]) {
        self.shown.lock().unwrap().keys = keys.iter().map(|key| key.jwk.clone()).collect();
    }

    /// How often it was asked since the last call.
    fn asked(&self) -> usize {
        std::mem::take(&mut self.shown.lock().unwrap().asked).len()
    }

    fn configuration(&self, more: &str) -> Authentication {
        let mut text = json!({"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration", "jwt": [{
            "issuer": {"url": self.url(), "certificateAuthority": self.site.ca, "audiences": ["seawall"]},
            "claimMappings": {"username": {"claim": "sub", "prefix": "oidc:"}, "groups": {"claim": "groups", "prefix": ""}}}]});
        let more: Value = serde_yaml_ng::from_str(more).unwrap();
        for (key, value) in more.as_object().into_iter().flatten() {
            text[key] = value.clone();
        }
        let algorithms = ALGORITHMS.map(str::to_owned);
        let parsed = AuthenticationConfiguration::parse(&text.to_string()).unwrap();
        Authentication::new(&parsed, &algorithms, ISSUER).unwrap()
    }

    fn claims(&self) -> Value {
        let now = Timestamp::now().as_second();
        json!({"iss": self.url(), "sub": "jane", "aud": "seawall", "exp": now + 60, "iat": now, "groups": ["devs"]})
    }

    fn token(&self, key: &Key, more: Value) -> String {
        let mut claims = self.claims();
        for (name, value) in more.as_object().into_iter().flatten() {
            claims[name] = value.clone();
        }
        jsonwebtoken::encode(&key.header, &claims, &key.private).unwrap()
    }
}

async fn server(authentication: Authentication) -> (Api, Arc<ArcSwap<Authentication>>) {
    let current = Arc::new(ArcSwap::from_pointee(authentication));
    (Api::with(Access { authentication: current.clone(), ..Default::default() }).await, current)
}

/// Whom the API takes the bearer of a token for, or the code of the refusal.
async fn who(api: &Api, token: &str) -> Result<Value, u16> {
    match api.bearer(token, "POST", REVIEWS, json!({})).await {
        (201, review) => Ok(review["status"]["userInfo"].clone()),
        (code, _) => Err(code),
    }
}

#[tokio::test]
async fn a_token_of_an_issuer_is_a_user() {
    let (one, two) = (elliptic("one"), rsa("two"));
    let issuer = Issuer::new(&[&one, &two]).await;
    let (api, _) = server(issuer.configuration("{}")).await;
    let jane = json!({"username": "oidc:jane", "groups": ["devs", "system:authenticated"]});
    for key in [&one, &two] {
        assert_eq!(who(&api, &issuer.token(key, json!({}))).await, Ok(jane.clone()));
    }
    assert_eq!(issuer.asked(), 2, "the document and the keys, once");
    assert_eq!(who(&api, &issuer.token(&one, json!({"aud": ["other", "seawall"]}))).await, Ok(jane.clone()));

    // What she may is said by roles, as for everyone.
    let token = issuer.token(&one, json!({}));
    let maps = "/api/v1/namespaces/default/configmaps";
    assert_eq!(api.bearer(&token, "GET", maps, Value::Null).await.0, 403);
    let roles = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings";
    api.create(
        roles,
        json!({"metadata": {"name": "devs"}, "subjects": [{"kind": "Group", "name": "devs", "apiGroup": "rbac.authorization.k8s.io"}],
            "roleRef": {"kind": "ClusterRole", "name": "view", "apiGroup": "rbac.authorization.k8s.io"}}),
    )
    .await;
    let role = json!({"metadata": {"name": "maps"}, "rules": [{"verbs": ["list"], "apiGroups": [""], "resources": ["configmaps"]}]});
    api.create("/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles", role).await;
    let binding = json!({"metadata": {"name": "maps"}, "subjects": [{"kind": "User", "name": "oidc:jane", "apiGroup": "rbac.authorization.k8s.io"}],
        "roleRef": {"kind": "Role", "name": "maps", "apiGroup": "rbac.authorization.k8s.io"}});
    api.create(roles, binding).await;
    assert_eq!(api.bearer(&token, "GET", maps, Value::Null).await.0, 200);

    // Others may ask whose a token is, for the audience of the API alone.
    let review = async |audiences: Value| {
        let body = json!({"spec": {"token": token, "audiences": audiences}});
        api.create("/apis/authentication.k8s.io/v1/tokenreviews", body).await["status"].clone()
    };
    let status = review(json!([])).await;
    assert_eq!(status, json!({"authenticated": true, "user": jane, "audiences": [ISSUER]}));
    assert_eq!(review(json!(["other", ISSUER])).await["audiences"], json!([ISSUER]));
    assert_eq!(review(json!(["other"])).await["authenticated"], false);
}

#[tokio::test]
async fn what_is_wrong_with_a_token() {
    let (key, other) = (elliptic("one"), elliptic("one"));
    let issuer = Issuer::new(&[&key]).await;
    let (api, _) = server(issuer.configuration("{}")).await;
    assert!(who(&api, &issuer.token(&key, json!({}))).await.is_ok());
    let now = Timestamp::now().as_second();
    let check = async |what: &str, token: String, why: &str| {
        assert_eq!(who(&api, &token).await, Err(401), "{what}");
        let body = json!({"spec": {"token": token}});
        let status = api.create("/apis/authentication.k8s.io/v1/tokenreviews", body).await["status"].clone();
        assert!(status["error"].as_str().unwrap().contains(why), "{what}: {status}");
    };
    check("another audience", issuer.token(&key, json!({"aud": "other"})), "expected audience").await;
    check("no audience", issuer.token(&key, json!({"aud": null})), "expected audience").await;
    check("its time is over", issuer.token(&key, json!({"exp": now - 1})), "token is expired").await;
    check("it has no end", issuer.token(&key, json!({"exp": null})), "no end").await;
    check("it begins later", issuer.token(&key, json!({"nbf": now + 120})), "not valid yet").await;
    check("nobody in it", issuer.token(&key, json!({"sub": null})), "claim not present").await;
    check("another key of this name", issuer.token(&other, json!({})), "failed to verify signature").await;
    check("somebody else's", issuer.token(&key, json!({"iss": "https://other.example"})), "not valid").await;
    let token = issuer.token(&key, json!({}));
    let (head, signature) = token.rsplit_once('.').unwrap();
    let (header, _) = head.split_once('.').unwrap();
    let admin = URL_SAFE_NO_PAD.encode(issuer.claims().to_string().replace("jane", "root"));
    check("other claims under this signature", format!("{header}.{admin}.{signature}"), "failed to verify").await;
    let none = URL_SAFE_NO_PAD.encode("{\"alg\":\"none\"}");
    check("no signature", format!("{none}.{admin}."), "malformed jwt").await;
    // The public key as the secret of a signature that both sides can make.
    let secret = EncodingKey::from_secret(key.jwk.to_string().as_bytes());
    let header = Header { kid: Some("one".into()), ..Header::new(Algorithm::HS256) };
    let forged = jsonwebtoken::encode(&header, &issuer.claims(), &secret).unwrap();
    check("an algorithm of equals", forged, "unsupported algorithm").await;
    let (code, refusal) = api.bearer(&issuer.token(&other, json!({})), "GET", "/version", Value::Null).await;
    assert_eq!((code, &refusal["message"]), (401, &json!("Unauthorized")), "what is wrong is not told");
}

#[tokio::test]
async fn keys_come_and_go() {
    let (old, new, unknown) = (elliptic("old"), elliptic("new"), elliptic("unknown"));
    let issuer = Issuer::new(&[&old]).await;
    let (api, _) = server(issuer.configuration("{}")).await;
    assert!(who(&api, &issuer.token(&old, json!({}))).await.is_ok());
    issuer.asked();
    issuer.show(&[&new]);
    assert!(who(&api, &issuer.token(&new, json!({}))).await.is_ok(), "a key that is not known is asked for");
    assert_eq!(issuer.asked(), 2);
    assert_eq!(who(&api, &issuer.token(&old, json!({}))).await, Err(401), "the old one is not believed any more");
    // Whoever makes up keys cannot make the server ask without end, and others do not notice it.
    for _ in 0..20 {
        assert_eq!(who(&api, &issuer.token(&unknown, json!({}))).await, Err(401));
    }
    assert!(issuer.asked() <= 12, "the issuer is left in peace");
    assert!(who(&api, &issuer.token(&new, json!({}))).await.is_ok());

    // Another server, whose issuer does not answer any more.
    let (api, current) = server(issuer.configuration("{}")).await;
    assert!(who(&api, &issuer.token(&new, json!({}))).await.is_ok());
    issuer.shown.lock().unwrap().slow = true;
    let token = issuer.token(&unknown, json!({}));
    let waits = async { tokio::time::timeout(Duration::from_secs(2), who(&api, &token)).await };
    let others = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        tokio::time::timeout(Duration::from_secs(1), who(&api, &issuer.token(&new, json!({})))).await
    };
    let (waited, others) = tokio::join!(waits, others);
    assert!(waited.is_err(), "it waits for the issuer");
    assert!(others.expect("who has a known key does not wait").is_ok());
    issuer.shown.lock().unwrap().slow = false;

    // Another configuration counts at once.
    let mapped = "{anonymous: {enabled: false}, jwt: []}";
    current.store(Arc::new(issuer.configuration(mapped)));
    assert_eq!(who(&api, &issuer.token(&new, json!({}))).await, Err(401));
    let anonymous = async |path: &str| api.raw(http::Request::get(path), Value::Null).await.status().as_u16();
    assert_eq!(anonymous("/version").await, 401);
    assert_eq!(anonymous("/readyz").await, 200, "the balancers ask it");
    current.store(Arc::new(issuer.configuration("{anonymous: {enabled: true, conditions: [{path: /version}]}}")));
    assert_eq!((anonymous("/version").await, anonymous("/livez").await), (200, 401));
    current.store(Arc::new(issuer.configuration("{}")));
    assert_eq!(anonymous("/livez").await, 200);
}

#[tokio::test]
async fn an_issuer_that_cannot_be_believed() {
    let key = elliptic("one");
    let issuer = Issuer::new(&[&key]).await;
    let (api, _) = server(issuer.configuration("{}")).await;
    issuer.shown.lock().unwrap().issuer = "https://other.example".into();
    assert_eq!(who(&api, &issuer.token(&key, json!({}))).await, Err(401), "it says that it is somebody else");
    // It has come to its senses, and its certificate is of another authority.
    issuer.shown.lock().unwrap().issuer = issuer.url();
    assert!(who(&api, &issuer.token(&key, json!({}))).await.is_ok());
    let stranger = Issuer::new(&[&key]).await;
    let parsed = json!({"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration", "jwt": [{
        "issuer": {"url": issuer.url(), "certificateAuthority": stranger.site.ca, "audiences": ["seawall"]},
        "claimMappings": {"username": {"claim": "sub", "prefix": ""}}}]});
    let parsed = AuthenticationConfiguration::parse(&parsed.to_string()).unwrap();
    let (api, _) = server(Authentication::new(&parsed, &ALGORITHMS.map(str::to_owned), ISSUER).unwrap()).await;
    assert_eq!(who(&api, &issuer.token(&key, json!({}))).await, Err(401));
}
