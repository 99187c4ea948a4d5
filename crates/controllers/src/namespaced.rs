//! What every namespace has: the service account `default`, and the certificate of the cluster's authority, which
//! pods need to trust the API (`kube-root-ca.crt`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use k8s_openapi::{
    api::core::v1::{ConfigMap, Namespace, ServiceAccount},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue, namespace_is_terminating,
        objects::{is_deleting, namespace},
    },
};

const ACCOUNT: &str = "default";
const CERTIFICATE: &str = "kube-root-ca.crt";
const KEY: &str = "ca.crt";

/// What to do for a namespace.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Create the service account.
    pub account: bool,
    /// Create the config map, or write the certificate into the one that is there.
    pub certificate: Option<Write>,
}

/// How to write the certificate.
#[derive(Debug, PartialEq)]
pub enum Write {
    /// There is none.
    Create,
    /// Somebody has changed it.
    Update,
}

/// Decides.
pub fn plan(
    namespace: &Namespace,
    account: Option<&ServiceAccount>,
    certificate: Option<&ConfigMap>,
    ca: &str,
) -> Plan {
    if is_deleting(namespace) {
        return Plan::default();
    }
    let written = certificate.map(|c| c.data.as_ref().and_then(|d| d.get(KEY)).map(String::as_str));
    Plan {
        account: account.is_none(),
        certificate: match written {
            _ if ca.is_empty() => None,
            None => Some(Write::Create),
            Some(found) if found != Some(ca) => Some(Write::Update),
            Some(_) => None,
        },
    }
}

pub(crate) struct Namespaced {
    context: Arc<Context>,
}

impl Namespaced {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let caches = &context.caches;
        let q = queue.clone();
        caches.namespaces.on_change(move |_, new| {
            if let Some(namespace) = new {
                q.add(Key::of(&**namespace));
            }
        });
        let q = queue.clone();
        caches.service_accounts.on_change(move |old, _| {
            if let Some(account) = old {
                q.add(Key::new("", namespace(&**account)));
            }
        });
        let q = queue.clone();
        caches.root_certificates.on_change(move |old, _| {
            if let Some(map) = old {
                q.add(Key::new("", namespace(&**map)));
            }
        });
        (Arc::new(Namespaced { context }), queue)
    }
}

/// Looks at all namespaces again when the authorities have changed.
pub(crate) async fn follow(context: Arc<Context>, queue: Arc<Queue>, stop: CancellationToken) {
    let mut authorities = context.config.root_ca.clone();
    while let Some(Ok(())) = stop.run_until_cancelled(authorities.changed()).await {
        for namespace in context.caches.namespaces.all() {
            queue.add(Key::of(&*namespace));
        }
    }
}

#[async_trait]
impl Controller for Namespaced {
    fn name(&self) -> &'static str {
        "namespaced"
    }

    async fn ready(&self) {
        self.context.caches.namespaces.synced().await;
        self.context.caches.service_accounts.synced().await;
        self.context.caches.root_certificates.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let caches = &self.context.caches;
        let Some(namespace) = caches.namespaces.get(key) else { return Ok(None) };
        let account = caches.service_accounts.get(&Key::new(&key.name, ACCOUNT));
        let certificate = caches.root_certificates.get(&Key::new(&key.name, CERTIFICATE));
        let ca = &self.context.config.root_ca.borrow().clone();
        let plan = plan(&namespace, account.as_deref(), certificate.as_deref(), ca);
        let meta = |name: &str| ObjectMeta { name: Some(name.into()), ..Default::default() };
        if plan.account {
            let account = ServiceAccount { metadata: meta(ACCOUNT), ..Default::default() };
            settled(self.context.create(&caches.service_accounts, &key.name, &account).await)?;
        }
        match (plan.certificate, certificate) {
            (Some(Write::Create), _) => {
                let data = BTreeMap::from([(KEY.to_owned(), ca.clone())]);
                let map = ConfigMap { metadata: meta(CERTIFICATE), data: Some(data), ..Default::default() };
                settled(self.context.create(&caches.root_certificates, &key.name, &map).await)?;
            }
            (Some(Write::Update), Some(map)) => {
                self.context.patch(&caches.root_certificates, &map, json!({"data": {KEY: ca}})).await?;
            }
            _ => {}
        }
        Ok(None)
    }
}

/// That the object is there already, or its namespace is going, is fine.
fn settled<T>(result: kube::Result<T>) -> kube::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        Err(error) if namespace_is_terminating(&error) => Ok(()),
        other => other.map(|_| ()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_namespace_lacks() {
        let namespace = Namespace::default();
        let account = ServiceAccount::default();
        let map =
            |text: &str| ConfigMap { data: Some(BTreeMap::from([(KEY.into(), text.into())])), ..Default::default() };
        let check = |a: Option<&ServiceAccount>, c: Option<&ConfigMap>, expect: (bool, Option<Write>)| {
            let found = plan(&namespace, a, c, "ca");
            assert_eq!((found.account, found.certificate), expect);
        };
        check(None, None, (true, Some(Write::Create)));
        check(Some(&account), Some(&map("ca")), (false, None));
        check(Some(&account), Some(&map("old")), (false, Some(Write::Update)));
        let going: Namespace =
            serde_json::from_value(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})).unwrap();
        assert_eq!(plan(&going, None, None, "ca"), Plan::default());
        assert_eq!(plan(&namespace, Some(&account), None, ""), Plan::default());
    }
}
