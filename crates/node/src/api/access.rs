//! Who may use the agent's own API. The API server's certificate may; whoever else comes with a certificate of the cluster
//! or a token is asked about at the API server: who that is (TokenReview), and whether they may (SubjectAccessReview).
//!
//! <https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/>, KEP-2862

use std::{collections::HashMap, hash::Hash, time::Duration};

use http::{HeaderMap, Method, StatusCode, header::AUTHORIZATION};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

/// How long an answer is believed: upstream's defaults for who somebody is, for what they may, and for what they may not.
const KNOWN: Duration = Duration::from_secs(120);
const ALLOWED: Duration = Duration::from_secs(300);
const REFUSED: Duration = Duration::from_secs(30);
/// How many answers are kept of each kind.
const KEPT: usize = 1024;
/// How long the API server has to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Somebody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct User {
    /// The name.
    pub name: String,
    uid: String,
    groups: Vec<String>,
    extra: Vec<(String, Vec<String>)>,
}

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Question {
    user: User,
    verb: &'static str,
    subresource: &'static str,
}

/// Answers that are believed for a while.
struct Remembered<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl<K: Hash + Eq, V: Clone> Remembered<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let known = self.0.lock();
        known.get(key).filter(|(_, until)| *until > Instant::now()).map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V, life: Duration) {
        let (mut known, now) = (self.0.lock(), Instant::now());
        if known.len() >= KEPT {
            known.retain(|_, (_, until)| *until > now);
        }
        // Whoever asks about ever new things gets no one else's answers thrown away.
        if known.len() < KEPT {
            known.insert(key, (value, now + life));
        }
    }
}

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

/// Asks, and remembers.
pub struct Access {
    client: Client,
    node: String,
    /// The common names that may do everything.
    trusted: Vec<String>,
    /// By the hash of a token; `None` for one that nobody knows.
    users: Remembered<[u8; 32], Option<User>>,
    verdicts: Remembered<Question, bool>,
}

/// Why a request is not answered.
pub type Refusal = (StatusCode, String);

/// What a request needs, the finer right first. Connections into pods need `create`, whatever the method of the request is:
/// a WebSocket begins with GET, and who may only read must not run commands.
pub fn needed(method: &Method, path: &str) -> (&'static str, &'static [&'static str]) {
    let below = |root: &str| path == root || path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/'));
    let verb = match *method {
        _ if ["/exec", "/attach", "/portForward"].into_iter().any(below) => "create",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "get",
    };
    let subresources: &[&str] = match () {
        () if below("/stats") => &["stats"],
        () if below("/metrics") => &["metrics"],
        () if below("/logs") => &["log"],
        () if below("/pods") || below("/runningpods") => &["pods", "proxy"],
        () if below("/healthz") => &["healthz", "proxy"],
        () if below("/configz") => &["configz", "proxy"],
        () => &["proxy"],
    };
    (verb, subresources)
}

impl Access {
    /// Asks with this client, about a node.
    pub fn new(client: Client, node: String, trusted: Vec<String>) -> Access {
        Access { client, node, trusted, users: Remembered::default(), verdicts: Remembered::default() }
    }

    /// Whether a request with this certificate or these headers may be answered.
    pub async fn check(
        &self,
        certificate: Option<&[u8]>,
        headers: &HeaderMap,
        method: &Method,
        path: &str,
    ) -> Result<(), Refusal> {
        let unknown = || (StatusCode::UNAUTHORIZED, "Unauthorized".to_owned());
        let user = match certificate.and_then(of_certificate) {
            Some(user) if self.trusted.contains(&user.name) || user.groups.iter().any(|g| g == "system:masters") => {
                return Ok(());
            }
            Some(user) => user,
            None => {
                let token = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
                let token = token
                    .and_then(|value| value.split_once(' '))
                    .filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer"));
                let (_, token) = token.ok_or_else(unknown)?;
                self.user(token.trim()).await?.ok_or_else(unknown)?
            }
        };
        let (verb, subresources) = needed(method, path);
        for subresource in subresources {
            if self.may(Question { user: user.clone(), verb, subresource }).await? {
                return Ok(());
            }
        }
        let message = format!(
            "Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{}])\n",
            user.name,
            subresources.join(" ")
        );
        Err((StatusCode::FORBIDDEN, message))
    }

    async fn user(&self, token: &str) -> Result<Option<User>, Refusal> {
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(known) = self.users.get(&key) {
            return Ok(known);
        }
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), ..Default::default() },
            ..Default::default()
        };
        let reviewed = self.ask(&review).await.map_err(|why| {
            tracing::warn!("cannot ask whose a token is: {why}");
            (StatusCode::UNAUTHORIZED, "Unauthorized".to_owned())
        })?;
        let status = reviewed.status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true)).map(|user| User {
            name: user.username.unwrap_or_default(),
            uid: user.uid.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default().into_iter().collect(),
        });
        self.users.put(key, user.clone(), KNOWN);
        Ok(user)
    }

    async fn may(&self, question: Question) -> Result<bool, Refusal> {
        if let Some(known) = self.verdicts.get(&question) {
            return Ok(known);
        }
        let Question { user, verb, subresource } = &question;
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: Some(user.uid.clone()).filter(|uid| !uid.is_empty()),
                groups: Some(user.groups.clone()),
                extra: Some(user.extra.iter().cloned().collect()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some((*verb).to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some((*subresource).to_owned()),
                    name: Some(self.node.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            },
            ..Default::default()
        };
        let reviewed = self.ask(&review).await.map_err(|why| {
            tracing::warn!("cannot ask whether somebody may: {why}");
            let message = format!(
                "Authorization error (user={}, verb={verb}, resource=nodes, subresource={subresource})",
                user.name
            );
            (StatusCode::INTERNAL_SERVER_ERROR, message)
        })?;
        let allowed = reviewed.status.is_some_and(|status| status.allowed && status.denied != Some(true));
        self.verdicts.put(question, allowed, if allowed { ALLOWED } else { REFUSED });
        Ok(allowed)
    }

    async fn ask<T>(&self, review: &T) -> Result<T, String>
    where
        T: kube::Resource<Scope = k8s_openapi::ClusterResourceScope, DynamicType = ()>,
        T: serde::Serialize + serde::de::DeserializeOwned + Clone + std::fmt::Debug,
    {
        let api: Api<T> = Api::all(self.client.clone());
        let params = PostParams::default();
        let asked = tokio::time::timeout(PATIENCE, api.create(&params, review)).await;
        asked.map_err(|_| format!("no answer within {PATIENCE:?}"))?.map_err(|error| error.to_string())
    }
}

/// Whom a certificate names: its common name, in groups that are its organizations.
fn of_certificate(der: &[u8]) -> Option<User> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let subject = certificate.subject();
    let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().ok().map(str::to_owned);
    let name = subject.iter_common_name().find_map(text)?;
    let mut groups: Vec<String> = subject.iter_organization().filter_map(text).collect();
    groups.push("system:authenticated".to_owned());
    Some(User { name, groups, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights() {
        let check = |method: Method, path: &str, verb: &str, subresources: &[&str]| {
            assert_eq!(needed(&method, path), (verb, subresources), "{method} {path}");
        };
        check(Method::GET, "/metrics", "get", &["metrics"]);
        check(Method::GET, "/metrics/resource", "get", &["metrics"]);
        check(Method::GET, "/metricsx", "get", &["proxy"]);
        check(Method::GET, "/stats/summary", "get", &["stats"]);
        check(Method::GET, "/logs/", "get", &["log"]);
        check(Method::GET, "/pods", "get", &["pods", "proxy"]);
        check(Method::GET, "/healthz", "get", &["healthz", "proxy"]);
        check(Method::GET, "/configz", "get", &["configz", "proxy"]);
        check(Method::GET, "/containerLogs/a/b/c", "get", &["proxy"]);
        check(Method::POST, "/exec/a/b/c", "create", &["proxy"]);
        check(Method::GET, "/exec/a/b/c", "create", &["proxy"]);
        check(Method::GET, "/portForward/a/b", "create", &["proxy"]);
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_believed_for_a_while() {
        let known: Remembered<usize, bool> = Remembered::default();
        known.put(0, true, REFUSED);
        assert_eq!(known.get(&0), Some(true));
        tokio::time::advance(REFUSED).await;
        assert_eq!(known.get(&0), None);
        // There is a limit, and what is over makes room.
        (0..KEPT).for_each(|key| known.put(key, true, REFUSED));
        known.put(KEPT, true, REFUSED);
        assert_eq!((known.get(&1), known.get(&KEPT)), (Some(true), None));
        tokio::time::advance(REFUSED).await;
        known.put(KEPT, true, REFUSED);
        assert_eq!(known.get(&KEPT), Some(true));
    }
}
