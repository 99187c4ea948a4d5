//! Bootstrap tokens whose time is over are deleted (upstream's tokencleaner,
//! <https://kubernetes.io/docs/reference/access-authn-authz/bootstrap-tokens/#bootstrap-token-secret-format>).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::DeleteParams;

use crate::{
    context::{Context, delay},
    runtime::{
        Controller, Key, Queue, is_not_found,
        objects::{name, namespace},
    },
};

/// The type of their Secrets.
pub(crate) const TYPE: &str = "bootstrap.kubernetes.io/token";
const NAMESPACE: &str = "kube-system";

/// What to do with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// It is not one, or has no end.
    Keep,
    /// Its time is over, or cannot be read.
    Delete,
    /// It has this long to live.
    Wait(Duration),
}

/// Decides.
pub fn plan(secret: &Secret, now: Timestamp) -> Plan {
    if secret.type_.as_deref() != Some(TYPE) || namespace(secret) != NAMESPACE {
        return Plan::Keep;
    }
    let Some(text) = secret.data.as_ref().and_then(|d| d.get("expiration")).filter(|t| !t.0.is_empty()) else {
        return Plan::Keep;
    };
    match std::str::from_utf8(&text.0).ok().and_then(|t| t.parse::<Timestamp>().ok()) {
        Some(end) if end > now => Plan::Wait(delay(end.duration_since(now))),
        _ => Plan::Delete,
    }
}

pub(crate) struct Tokens {
    context: Arc<Context>,
}

impl Tokens {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.bootstrap_tokens.on_change(move |_, new| {
            if let Some(secret) = new {
                q.add(Key::of(&**secret));
            }
        });
        (Arc::new(Tokens { context }), queue)
    }
}

#[async_trait]
impl Controller for Tokens {
    fn name(&self) -> &'static str {
        "bootstraptoken"
    }

    async fn ready(&self) {
        self.context.caches.bootstrap_tokens.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = &self.context.caches.bootstrap_tokens;
        let Some(secret) = cache.get(key) else { return Ok(None) };
        match plan(&secret, Timestamp::now()) {
            Plan::Keep => Ok(None),
            Plan::Wait(left) => Ok(Some(left)),
            Plan::Delete => {
                tracing::info!(secret = name(&*secret), "an expired bootstrap token is deleted");
                match self.context.delete(cache, &*secret, DeleteParams::default()).await {
                    Err(error) if is_not_found(&error) => Ok(None),
                    other => Ok(other.map(|()| None)?),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_token_goes_when_its_time_is_over() {
        let check = |ty: &str, namespace: &str, expiration: &str, expect: Plan| {
            let secret = json!({"metadata": {"name": "bootstrap-token-abcdef", "namespace": namespace}, "type": ty,
                "data": {"expiration": STANDARD.encode(expiration)}});
            let now = "2026-03-01T12:00:00Z".parse().unwrap();
            assert_eq!(plan(&serde_json::from_value(secret).unwrap(), now), expect, "{ty} {namespace} {expiration}");
        };
        check(TYPE, NAMESPACE, "2026-03-01T12:00:30Z", Plan::Wait(Duration::from_secs(30)));
        check(TYPE, NAMESPACE, "2026-03-01T12:00:00Z", Plan::Delete);
        check(TYPE, NAMESPACE, "2026-03-01T13:00:00+02:00", Plan::Delete);
        check(TYPE, NAMESPACE, "tomorrow", Plan::Delete);
        check(TYPE, NAMESPACE, "", Plan::Keep);
        check("Opaque", NAMESPACE, "2020-01-01T00:00:00Z", Plan::Keep);
        check(TYPE, "default", "2020-01-01T00:00:00Z", Plan::Keep);
    }
}
