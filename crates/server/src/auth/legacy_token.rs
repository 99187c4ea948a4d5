//! Tokens of service accounts that are kept in Secrets and never end
//! (<https://kubernetes.io/docs/concepts/configuration/secret/#serviceaccount-token-secrets>).
//!
//! They are made for whoever asks for one by such a Secret, and for nobody else. As upstream has it in its controller
//! manager; here every server looks after them, since servers have the key. A write that another was faster with is
//! decided anew.
//!
//! When one was last used stands on its Secret, and one that the cleaner (`controllers/legacy_token.rs`) has marked is
//! refused (KEP-2799).

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::{Timestamp, tz::TimeZone};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::UserInfo;
use crate::{
    Context, Server,
    cache::Interest,
    delete::DeleteOptions,
    error::{ApiError, Result},
    object::Object,
    request::ResourcePath,
};

/// The type of such Secrets.
const TYPE: &str = "kubernetes.io/service-account-token";
/// Whose token it is.
const NAME: &str = "kubernetes.io/service-account.name";
const UID: &str = "kubernetes.io/service-account.uid";
/// The day, in UTC, on which the token was last used.
const LAST_USED: &str = "kubernetes.io/legacy-token-last-used";
/// The day from which on the token is refused.
const INVALID_SINCE: &str = "kubernetes.io/legacy-token-invalid-since";
/// Where it stands since when uses are written down: what has no [`LAST_USED`] may have been used before.
const TRACKING: &str = "kube-apiserver-legacy-service-account-token-tracking";
/// Who issues these tokens, whatever the cluster's own issuer is called.
pub const ISSUER: &str = "kubernetes/serviceaccount";

/// How long a Secret may wait for its service account, since both are often written together.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often all are looked at, also if nothing has changed: the authority may have another certificate.
const EVERY: Duration = Duration::from_secs(60);
/// How soon to look again if a write failed, or something is waited for.
const AGAIN: Duration = Duration::from_secs(1);

/// Secrets whose tokens were used, by namespace and name, and where that is not written down yet.
#[derive(Default)]
pub(crate) struct Uses {
    secrets: Mutex<BTreeSet<(String, String)>>,
    new: Notify,
}

/// A write of a Secret.
enum Change {
    Put(Value),
    Delete(DeleteOptions),
}

fn day(time: Timestamp) -> String {
    time.to_zoned(TimeZone::UTC).date().to_string()
}

/// What such a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LegacyClaims {
    /// [`ISSUER`].
    pub iss: String,
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub sub: String,
    /// The namespace of account and Secret.
    #[serde(rename = "kubernetes.io/serviceaccount/namespace")]
    pub namespace: String,
    /// The Secret.
    #[serde(rename = "kubernetes.io/serviceaccount/secret.name")]
    pub secret: String,
    /// The service account.
    #[serde(rename = "kubernetes.io/serviceaccount/service-account.name")]
    pub account: String,
    /// Its uid.
    #[serde(rename = "kubernetes.io/serviceaccount/service-account.uid")]
    pub uid: String,
}

impl LegacyClaims {
    fn new(namespace: &str, secret: &str, account: &str, uid: &str) -> LegacyClaims {
        LegacyClaims {
            iss: ISSUER.into(),
            sub: format!("system:serviceaccount:{namespace}:{account}"),
            namespace: namespace.into(),
            secret: secret.into(),
            account: account.into(),
            uid: uid.into(),
        }
    }

    /// The user that the token speaks for.
    fn user(&self) -> UserInfo {
        let mut user = UserInfo::new(
            format!("system:serviceaccount:{}:{}", self.namespace, self.account),
            &["system:serviceaccounts", &format!("system:serviceaccounts:{}", self.namespace)],
        );
        user.uid = self.uid.clone();
        user
    }
}

/// What has to be done with a Secret.
#[derive(Debug, PartialEq)]
enum Verdict {
    Nothing,
    /// Its account may still come.
    Wait,
    Delete,
    /// Its account's uid.
    Fill(String),
}

/// Looks at a Secret of the type, with its service account if there is one.
fn judge(secret: &Value, account: Option<&Value>, authority: &str, now: Timestamp) -> Verdict {
    let meta = &secret["metadata"];
    if meta["deletionTimestamp"].is_string() {
        return Verdict::Nothing;
    }
    let wanted = &meta["annotations"][UID];
    let uid = account.and_then(|account| account["metadata"]["uid"].as_str());
    let Some(uid) = uid.filter(|uid| wanted.as_str().is_none_or(|wanted| wanted.is_empty() || wanted == *uid)) else {
        let made = meta["creationTimestamp"].as_str().and_then(|text| text.parse::<Timestamp>().ok());
        let age = made.map_or(i64::MAX, |made| now.as_second() - made.as_second());
        // One that names its account by uid has had it before.
        let young = age < PATIENCE.as_secs() as i64 && wanted.as_str().unwrap_or_default().is_empty();
        return if young { Verdict::Wait } else { Verdict::Delete };
    };
    let data = &secret["data"];
    let full = data["token"].as_str().is_some_and(|token| !token.is_empty())
        && data["namespace"] == STANDARD.encode(meta["namespace"].as_str().unwrap_or_default())
        && data["ca.crt"] == STANDARD.encode(authority)
        && wanted == uid;
    if full { Verdict::Nothing } else { Verdict::Fill(uid.to_owned()) }
}

/// The Secret with its token. A token that is there stays.
fn filled(mut secret: Value, uid: &str, token: &str, authority: &str) -> Value {
    let namespace = secret["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
    secret["metadata"]["annotations"][UID] = uid.into();
    if !secret["data"].is_object() {
        secret["data"] = json!({});
    }
    let data = &mut secret["data"];
    if data["token"].as_str().unwrap_or_default().is_empty() {
        data["token"] = STANDARD.encode(token).into();
    }
    data["namespace"] = STANDARD.encode(namespace).into();
    data["ca.crt"] = STANDARD.encode(authority).into();
    secret
}

/// Looks after all such Secrets until the server stops.
pub(crate) async fn keep(server: Arc<Server>) {
    let stop = server.stop.clone();
    stop.run_until_cancelled(async {
        let settle = Box::pin(async {
            loop {
                // Starts over only if it has fallen off the end of a log.
                follow(&server).await;
            }
        });
        tokio::join!(settle, Box::pin(server.write_down_uses()))
    })
    .await;
}

async fn follow(server: &Arc<Server>) {
    let (secrets, accounts) =
        match (server.registry.by_name("", "secrets"), server.registry.by_name("", "serviceaccounts")) {
            (Some(secrets), Some(accounts)) => (secrets, accounts),
            _ => return std::future::pending().await,
        };
    let revision = server.cache.snapshot().revision;
    let mut of_secrets = server.cache.subscribe(secrets.0, revision, Interest::Everything);
    let mut of_accounts = server.cache.subscribe(accounts.0, revision, Interest::Everything);
    let ours = |object: &Object| object.field(secrets.1, "type") == TYPE;
    let mut look = true;
    loop {
        let again = look && server.look_at_tokens(secrets.0, ours).await;
        look = tokio::select! {
            () = of_secrets.changed() => {
                let mut found = false;
                loop {
                    let Ok(changes) = of_secrets.take(256) else { return };
                    found |= changes.iter().any(|change| change.new.as_deref().is_some_and(ours));
                    if changes.is_empty() {
                        break found;
                    }
                }
            }
            () = of_accounts.changed() => {
                loop {
                    match of_accounts.take(256) {
                        Ok(changes) if changes.is_empty() => break true,
                        Ok(_) => {}
                        Err(_) => return,
                    }
                }
            }
            () = tokio::time::sleep(if again { AGAIN } else { EVERY }) => true,
        };
        look |= again;
    }
}

impl Server {
    /// Does what has to be done with all of them. Says whether to look again soon.
    async fn look_at_tokens(self: &Arc<Self>, id: crate::registry::ResourceId, ours: impl Fn(&Object) -> bool) -> bool {
        let found: Vec<Arc<Object>> =
            self.cache.snapshot().of(id).values().filter(|object| ours(object)).cloned().collect();
        let mut again = false;
        for object in found {
            match self.settle_token(&object).await {
                Ok(done) => again |= !done,
                Err(error) => {
                    tracing::debug!(error = error.message, key = &*object.key, "a token's Secret is looked at again");
                    again = true;
                }
            }
        }
        again
    }

    /// Writes down when tokens are used, by the day.
    async fn write_down_uses(self: &Arc<Self>) {
        while let Err(error) = self.track().await {
            tracing::debug!(error = error.message, "since when uses of tokens are written down is not written yet");
            tokio::time::sleep(AGAIN).await;
        }
        loop {
            self.legacy_uses.new.notified().await;
            let uses = std::mem::take(&mut *self.legacy_uses.secrets.lock());
            for (namespace, name) in uses {
                // The next use tries again.
                if let Err(error) = self.write_down_use(&namespace, &name).await {
                    tracing::debug!(error = error.message, namespace, name, "the use of a token is not written down");
                }
            }
        }
    }

    async fn track(self: &Arc<Self>) -> Result<()> {
        let tracking = self.find("", "configmaps", "kube-system", TRACKING).await?.map(|map| map.value());
        let since = tracking.as_ref().and_then(|map| map["data"]["since"].as_str()?.parse::<jiff::civil::Date>().ok());
        let map = json!({"metadata": {"name": TRACKING, "namespace": "kube-system"},
            "data": {"since": day(Timestamp::now())}});
        self.ensure("", "configmaps", map, since.is_none()).await
    }

    async fn write_down_use(self: &Arc<Self>, namespace: &str, name: &str) -> Result<()> {
        let Some(object) = self.find("", "secrets", namespace, name).await? else { return Ok(()) };
        let mut secret = object.value();
        let today = day(Timestamp::now());
        if secret["metadata"]["labels"][LAST_USED] == today.as_str() {
            return Ok(());
        }
        secret["metadata"]["labels"][LAST_USED] = today.into();
        self.write_secret(namespace, name, Change::Put(secret)).await
    }

    async fn write_secret(self: &Arc<Self>, namespace: &str, name: &str, change: Change) -> Result<()> {
        let (_, row) = self.registry.by_name("", "secrets").ok_or_else(ApiError::no_route)?;
        let served = self.registry.find(row.group, row.version, row.plural).ok_or_else(ApiError::no_route)?;
        let path = ResourcePath {
            version: row.version.into(),
            resource: row.plural.into(),
            namespace: Some(namespace.into()),
            name: Some(name.into()),
            ..Default::default()
        };
        let mut context = Context::own(&self.registry, path, &served);
        match change {
            Change::Delete(options) => self.delete_object(&context, name, &options).await.map(drop),
            Change::Put(secret) => {
                context.body = secret.to_string().into();
                self.update(&context).await.map(drop)
            }
        }
    }

    async fn settle_token(self: &Arc<Self>, object: &Object) -> Result<bool> {
        let secret = object.value();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (namespace, name) = (text(&secret["metadata"]["namespace"]), text(&secret["metadata"]["name"]));
        let account_name = text(&secret["metadata"]["annotations"][NAME]);
        let snapshot = self.cache.snapshot();
        let mut account = self.lookup(&snapshot, "", "serviceaccounts", &namespace, &account_name);
        let authority = self.authority_of(&namespace);
        let now = Timestamp::now();
        let mut verdict = judge(&secret, account.as_ref().map(|a| a.value()).as_ref(), &authority, now);
        if verdict == Verdict::Delete {
            // Not by a cache that may be behind.
            account = self.find("", "serviceaccounts", &namespace, &account_name).await?;
            verdict = judge(&secret, account.as_ref().map(|a| a.value()).as_ref(), &authority, now);
        }
        let done = match verdict {
            Verdict::Nothing => return Ok(true),
            Verdict::Wait => return Ok(false),
            Verdict::Delete => {
                let options = DeleteOptions { uid: Some(text(&secret["metadata"]["uid"])), ..Default::default() };
                self.write_secret(&namespace, &name, Change::Delete(options)).await
            }
            Verdict::Fill(uid) => {
                let claims = LegacyClaims::new(&namespace, &name, &account_name, &uid);
                let token = self.tokens.sign_legacy(&claims).map_err(|e| ApiError::internal("the token", e))?;
                let secret = filled(secret, &uid, &token, &authority);
                self.write_secret(&namespace, &name, Change::Put(secret)).await
            }
        };
        match done {
            // Somebody was faster: what they made of it comes by the watch.
            Err(error) if matches!(error.code, http::StatusCode::CONFLICT | http::StatusCode::NOT_FOUND) => Ok(true),
            Err(error) => Err(error),
            Ok(()) => Ok(true),
        }
    }

    /// The certificates to believe, as pods of the namespace are told.
    fn authority_of(&self, namespace: &str) -> String {
        let snapshot = self.cache.snapshot();
        let map = self.lookup(&snapshot, "", "configmaps", namespace, "kube-root-ca.crt");
        let text = map.and_then(|map| map.value()["data"]["ca.crt"].as_str().map(str::to_owned));
        text.unwrap_or_else(|| self.config.ca_pem.clone())
    }

    /// The user of such a token, if its Secret has it and its account is there. `None` if it is none.
    pub(super) fn user_of_legacy_token(&self, token: &str) -> Option<Result<UserInfo, String>> {
        let claims = self.tokens.verify_legacy(token).ok()?;
        Some(self.holds(&claims, token).map(|()| claims.user()))
    }

    fn holds(&self, claims: &LegacyClaims, token: &str) -> Result<(), String> {
        let snapshot = self.cache.snapshot();
        let find = |plural: &str, name: &str| {
            let object = self.lookup(&snapshot, "", plural, &claims.namespace, name).map(|object| object.value());
            let object = object.filter(|object| !object["metadata"]["deletionTimestamp"].is_string());
            object.ok_or_else(|| format!("the token is bound to {plural} {name:?}, which is gone"))
        };
        let account = find("serviceaccounts", &claims.account)?;
        if account["metadata"]["uid"] != claims.uid.as_str() {
            return Err(format!("the token is bound to another service account {:?}", claims.account));
        }
        let secret = find("secrets", &claims.secret)?;
        if secret["data"]["token"] != STANDARD.encode(token) {
            return Err(format!("the token is not that of the Secret {:?} any more", claims.secret));
        }
        let label = |name: &str| secret["metadata"]["labels"][name].as_str().unwrap_or_default();
        if label(LAST_USED) != day(Timestamp::now()) {
            self.legacy_uses.secrets.lock().insert((claims.namespace.clone(), claims.secret.clone()));
            self.legacy_uses.new.notify_one();
        }
        match label(INVALID_SINCE) {
            "" => Ok(()),
            since => Err(format!(
                "the token in Secret {}/{} is invalid since {since}, for it was not used for long: ask for a token by the \
                 TokenRequest API, or remove the label {INVALID_SINCE} from the Secret to use it for the time being",
                claims.namespace, claims.secret
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(change: impl FnOnce(&mut Value)) -> Value {
        let mut secret = json!({"type": TYPE, "metadata": {"name": "s", "namespace": "n",
            "creationTimestamp": "2026-01-01T00:00:00Z", "annotations": {NAME: "a"}}});
        change(&mut secret);
        secret
    }

    #[test]
    fn what_is_done_with_secrets() {
        let account = json!({"metadata": {"name": "a", "uid": "u1"}});
        let now: Timestamp = "2026-01-01T00:00:05Z".parse().unwrap();
        let later: Timestamp = "2026-01-01T00:00:11Z".parse().unwrap();
        let with_uid = |uid: &str| secret(|s| s["metadata"]["annotations"][UID] = uid.into());
        let fill = Verdict::Fill("u1".into());
        assert_eq!(judge(&secret(|_| ()), Some(&account), "CA", now), fill);
        assert_eq!(judge(&with_uid("u1"), Some(&account), "CA", now), fill);
        assert_eq!(judge(&secret(|_| ()), None, "CA", now), Verdict::Wait);
        assert_eq!(judge(&secret(|_| ()), None, "CA", later), Verdict::Delete);
        // An account of the same name that was made anew.
        assert_eq!(judge(&with_uid("u0"), Some(&account), "CA", now), Verdict::Delete);
        assert_eq!(judge(&with_uid("u0"), None, "CA", now), Verdict::Delete);
        let going = secret(|s| s["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z".into());
        assert_eq!(judge(&going, None, "CA", later), Verdict::Nothing);

        let full = filled(secret(|_| ()), "u1", "TOKEN", "CA");
        assert_eq!(full["data"], json!({"token": "VE9LRU4=", "ca.crt": "Q0E=", "namespace": "bg=="}));
        assert_eq!(judge(&full, Some(&account), "CA", now), Verdict::Nothing);
        // Another authority; the token stays.
        assert_eq!(judge(&full, Some(&account), "CB", now), fill);
        let again = filled(full, "u1", "OTHER", "CB");
        assert_eq!(again["data"], json!({"token": "VE9LRU4=", "ca.crt": "Q0I=", "namespace": "bg=="}));
    }
}
