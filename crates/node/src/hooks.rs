//! Lifecycle hooks.
//!
//! <https://kubernetes.io/docs/concepts/containers/container-lifecycle-hooks/>

use std::time::Duration;

use k8s_openapi::api::core::v1::LifecycleHandler;

use crate::handler::{self, Target};

/// Runs a hook to its end, bounded by `limit`.
pub async fn run(target: &Target, hook: &LifecycleHandler, limit: Duration) -> anyhow::Result<()> {
    let work = async {
        if let Some(action) = &hook.exec {
            handler::exec(target, action, limit).await.map(drop)
        } else if let Some(action) = &hook.http_get {
            handler::http_get(target, action, "kube-lifecycle/1.37", limit).await.map(drop)
        } else if let Some(action) = &hook.sleep {
            tokio::time::sleep(Duration::from_secs(action.seconds.max(0).unsigned_abs())).await;
            Ok(())
        } else {
            // tcpSocket is kept in the API for compatibility only; upstream does nothing either.
            Ok(())
        }
    };
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(anyhow::anyhow!("the hook did not end within {limit:?}")),
    }
}
