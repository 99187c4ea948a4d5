//! Webhooks that decide who somebody is
//! (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/#webhook-token-authentication>) and what they may
//! (<https://kubernetes.io/docs/reference/access-authn-authz/webhook/>).
//!
//! What they say is remembered for a while. One that cannot be asked has said nothing: nobody comes in by that.

use std::{collections::HashMap, fmt::Debug, time::Duration};

use parking_lot::Mutex;
use ring::digest::{SHA256, digest};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    AUTHENTICATED, UserInfo,
    authorize::{self, Attributes},
    bearer::{Known, common},
};
use crate::{
    Server,
    outside::{Client, kubeconfig::Target},
};

/// How many answers are remembered.
const REMEMBERED: usize = 4096;
/// How large a question may be whose answer is remembered, in bytes; upstream's limit.
const LARGEST: usize = 10_000;
/// How long a webhook has for an answer; upstream's limit.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often a webhook is asked that does not answer, and how long is waited before the second time.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);

/// Answers by what was asked. The questions themselves, which may be secret, are not kept.
struct Answers<V>(Mutex<HashMap<[u8; 32], (Instant, V)>>);

impl<V: Clone> Answers<V> {
    fn new() -> Answers<V> {
        Answers(Mutex::default())
    }

    fn key(question: &[u8]) -> [u8; 32] {
        let mut key = [0; 32];
        key.copy_from_slice(digest(&SHA256, question).as_ref());
        key
    }

    fn get(&self, question: &[u8]) -> Option<V> {
        let answers = self.0.lock();
        let (until, answer) = answers.get(&Self::key(question))?;
        (*until > Instant::now()).then(|| answer.clone())
    }

    fn put(&self, question: &[u8], answer: V, ttl: Duration) {
        if ttl.is_zero() || question.len() > LARGEST {
            return;
        }
        let (mut answers, now) = (self.0.lock(), Instant::now());
        if answers.len() >= REMEMBERED {
            answers.retain(|_, (until, _)| *until > now);
        }
        // Then it is somebody who asks for ever new things; what is asked often is soon there again.
        if answers.len() >= REMEMBERED {
            answers.clear();
        }
        answers.insert(Self::key(question), (now + ttl, answer));
    }
}

/// Somebody who answers reviews.
struct Reviewer {
    url: String,
    client: Client,
}

impl Reviewer {
    fn new(target: &Target) -> Result<Reviewer, String> {
        Ok(Reviewer { url: target.url.clone(), client: Client::new(&target.credentials)? })
    }

    /// The status of a review.
    async fn ask(&self, review: &Value) -> Result<Value, String> {
        let (body, mut pause) = (review.to_string(), PAUSE);
        for attempt in 1.. {
            let why = match self.client.post(&self.url, body.clone(), TIMEOUT).await {
                Ok(mut answer) if answer["kind"] == review["kind"] => return Ok(answer["status"].take()),
                Ok(answer) => format!("the answer of {:?} is a {}, not a {}", self.url, answer["kind"], review["kind"]),
                Err(why) => why,
            };
            if attempt == ATTEMPTS {
                tracing::warn!(why, "a webhook that decides about access does not answer");
                return Err(why);
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Err(String::new())
    }
}

/// Knows whose tokens are.
pub struct TokenWebhook {
    reviewer: Reviewer,
    ttl: Duration,
    answers: Answers<Result<Known, String>>,
}

impl TokenWebhook {
    /// Answers are remembered for so long.
    ///
    /// # Errors
    /// If the credentials cannot be used.
    pub fn new(target: &Target, ttl: Duration) -> Result<TokenWebhook, String> {
        Ok(TokenWebhook { reviewer: Reviewer::new(target)?, ttl, answers: Answers::new() })
    }

    /// The user of a token. `own` is the audience of the API, for which a token is if nothing is said.
    pub(crate) async fn user(&self, token: &str, audiences: &[&str], own: &str) -> Result<Known, String> {
        let spec = json!({"token": token, "audiences": audiences});
        let question = spec.to_string().into_bytes();
        if let Some(known) = self.answers.get(&question) {
            return known;
        }
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "metadata": {"creationTimestamp": null}, "spec": spec});
        let status = self.reviewer.ask(&review).await?;
        let answer = read_user(&status, audiences, own);
        self.answers.put(&question, answer.clone(), self.ttl);
        answer
    }
}

fn read_user(status: &Value, audiences: &[&str], own: &str) -> Result<Known, String> {
    if status["authenticated"] != true {
        return Err(status["error"].as_str().unwrap_or("the webhook does not know the token").to_owned());
    }
    let said: Vec<&str> = status["audiences"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let meant = common(audiences, if said.is_empty() { std::slice::from_ref(&own) } else { &said });
    if meant.is_empty() {
        return Err("the token is for another audience".to_owned());
    }
    let user: UserInfo = serde_json::from_value(status["user"].clone()).map_err(|e| format!("status.user: {e}"))?;
    if user.username.is_empty() {
        return Err("status.user.username is empty".to_owned());
    }
    let mut user = user;
    if !user.is_in(AUTHENTICATED) {
        user.groups.push(AUTHENTICATED.to_owned());
    }
    Ok((user, meant))
}

/// When a webhook is asked whether somebody may do something: as `--authorization-mode` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Before roles.
    First,
    /// After roles, about what they do not allow.
    Last,
}

/// For how long is remembered what was allowed, and what was not.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// `--authorization-webhook-cache-authorized-ttl`.
    pub allowed: Duration,
    /// `--authorization-webhook-cache-unauthorized-ttl`.
    pub refused: Duration,
}

/// Knows what users may.
pub struct AccessWebhook {
    reviewer: Reviewer,
    turn: Turn,
    memory: Memory,
    answers: Answers<Decision>,
}

/// What a webhook says. Only the first two decide.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    Allow(String),
    Deny(String),
    NoOpinion(String),
}

#[derive(Serialize)]
struct Spec<'a> {
    #[serde(rename = "resourceAttributes", skip_serializing_if = "Value::is_null")]
    resource: Value,
    #[serde(rename = "nonResourceAttributes", skip_serializing_if = "Value::is_null")]
    path: Value,
    user: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    uid: &'a str,
    groups: &'a [String],
    extra: &'a std::collections::BTreeMap<String, Vec<String>>,
}

fn spec<'a>(user: &'a UserInfo, a: &Attributes<'_>) -> Spec<'a> {
    let (mut resource, mut path) = (Value::Null, Value::Null);
    if a.resource.is_empty() {
        path = json!({"path": a.path, "verb": a.verb});
    } else {
        let texts = [
            ("namespace", a.namespace),
            ("verb", a.verb),
            ("group", a.group),
            ("resource", a.resource),
            ("subresource", a.subresource),
            ("name", a.name),
        ];
        resource = texts
            .into_iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(k, v)| (k.to_owned(), Value::from(v)))
            .collect();
        let requirement = |f: &seawall_api::selector::FieldRequirement| json!({"key": f.field, "operator": if f.equal { "In" } else { "NotIn" }, "values": [f.value]});
        if !a.fields.is_empty() {
            resource["fieldSelector"] = json!({"requirements": a.fields.iter().map(requirement).collect::<Vec<_>>()});
        }
    }
    Spec { resource, path, user: &user.username, uid: &user.uid, groups: &user.groups, extra: &user.extra }
}

impl AccessWebhook {
    /// Asked when it is its turn; answers are remembered.
    ///
    /// # Errors
    /// If the credentials cannot be used.
    pub fn new(target: &Target, turn: Turn, memory: Memory) -> Result<AccessWebhook, String> {
        Ok(AccessWebhook { reviewer: Reviewer::new(target)?, turn, memory, answers: Answers::new() })
    }

    async fn decide(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Decision {
        let spec = json!(spec(user, attributes));
        let question = spec.to_string().into_bytes();
        if let Some(known) = self.answers.get(&question) {
            return known;
        }
        let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "metadata": {"creationTimestamp": null}, "spec": spec});
        let status = match self.reviewer.ask(&review).await {
            Ok(status) => status,
            // It allows nothing, and what others allow holds.
            Err(_) => return Decision::NoOpinion("the authorization webhook does not answer".to_owned()),
        };
        let decision = read_decision(&status);
        let ttl = match decision {
            Decision::Allow(_) => self.memory.allowed,
            _ => self.memory.refused,
        };
        self.answers.put(&question, decision.clone(), ttl);
        decision
    }
}

fn read_decision(status: &Value) -> Decision {
    let reason = status["reason"].as_str().unwrap_or_default().to_owned();
    match (status["allowed"] == true, status["denied"] == true) {
        (true, true) => Decision::Deny("the authorization webhook both allows and denies".to_owned()),
        (true, false) => Decision::Allow(reason),
        (false, true) => Decision::Deny(reason),
        (false, false) => Decision::NoOpinion(reason),
    }
}

/// What is said if nobody allows something.
fn together(one: String, other: String) -> String {
    match (&*one, &*other) {
        ("", _) | (_, "") => one + &other,
        _ => format!("{one}, {other}"),
    }
}

impl Server {
    /// Whether a user may do something: by roles, and by the webhook, if there is one.
    pub(crate) async fn authorize(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Result<String, String> {
        let Some(webhook) = &self.config.access.authorizer else {
            return self.authorizer.authorize(user, attributes);
        };
        // What the cluster itself cannot do without is nobody else's to decide.
        if authorize::is_built_in(user, attributes) {
            return Ok(String::new());
        }
        let mut said = String::new();
        if webhook.turn == Turn::First {
            match webhook.decide(user, attributes).await {
                Decision::Allow(reason) => return Ok(reason),
                Decision::Deny(reason) => return Err(reason),
                Decision::NoOpinion(reason) => said = reason,
            }
        }
        let why = match self.authorizer.authorize(user, attributes) {
            Ok(reason) => return Ok(reason),
            Err(why) => together(said, why),
        };
        match webhook.turn {
            Turn::First => Err(why),
            Turn::Last => match webhook.decide(user, attributes).await {
                Decision::Allow(reason) => Ok(reason),
                Decision::Deny(reason) | Decision::NoOpinion(reason) => Err(together(why, reason)),
            },
        }
    }
}

impl Debug for TokenWebhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenWebhook").field("url", &self.reviewer.url).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_review_says_of_a_token() {
        let check = |status: Value, asked: &[&str], expect: Result<&[&str], &str>| {
            let found = read_user(&status, asked, "api");
            match expect {
                Ok(audiences) => {
                    let (user, meant) = found.unwrap();
                    assert_eq!(meant, audiences, "{status}");
                    assert!(user.is_in(AUTHENTICATED));
                }
                Err(part) => assert!(found.as_ref().unwrap_err().contains(part), "{status}: {found:?}"),
            }
        };
        let jane = json!({"username": "jane", "groups": ["devs"], "extra": {"a": ["b"]}});
        check(json!({"authenticated": true, "user": jane}), &["api"], Ok(&["api"]));
        check(json!({"authenticated": true, "user": jane, "audiences": ["x", "y"]}), &["y", "z"], Ok(&["y"]));
        check(json!({"authenticated": true, "user": jane, "audiences": ["x"]}), &["y"], Err("another audience"));
        check(json!({"authenticated": true, "user": jane}), &["y"], Err("another audience"));
        check(json!({"authenticated": false, "error": "too old"}), &["api"], Err("too old"));
        check(json!({"authenticated": "true", "user": jane}), &["api"], Err("does not know"));
        check(json!({"authenticated": true, "user": {}}), &["api"], Err("status.user"));
        check(json!({"authenticated": true, "user": {"username": ""}}), &["api"], Err("is empty"));
        check(Value::Null, &["api"], Err("does not know"));
    }

    #[test]
    fn what_a_review_says_of_access() {
        let check = |status: Value, expect: Decision| assert_eq!(read_decision(&status), expect, "{status}");
        check(json!({"allowed": true, "reason": "x"}), Decision::Allow("x".into()));
        check(json!({"allowed": false, "denied": true, "reason": "x"}), Decision::Deny("x".into()));
        check(json!({"allowed": false, "reason": "x"}), Decision::NoOpinion("x".into()));
        check(json!({"allowed": "yes"}), Decision::NoOpinion(String::new()));
        check(Value::Null, Decision::NoOpinion(String::new()));
        assert!(matches!(read_decision(&json!({"allowed": true, "denied": true})), Decision::Deny(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_forgotten() {
        let answers = Answers::new();
        answers.put(b"a", 1, Duration::from_secs(10));
        answers.put(b"b", 2, Duration::ZERO);
        answers.put(&[0; LARGEST + 1], 3, Duration::from_secs(10));
        assert_eq!((answers.get(b"a"), answers.get(b"b"), answers.get(&[0; LARGEST + 1])), (Some(1), None, None));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(answers.get(b"a"), None);
        for index in 0..=REMEMBERED {
            answers.put(&index.to_le_bytes(), index, Duration::from_secs(10));
        }
        assert!(answers.0.lock().len() <= REMEMBERED);
    }
}
