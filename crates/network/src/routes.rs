//! Routes to other nodes' pods.

use kube::Client;
use tokio_util::sync::CancellationToken;

/// How it is run.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// This node.
    pub node_name: String,
}

/// Runs it.
pub async fn run(_client: Client, _config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    stop.cancelled().await;
    Ok(())
}
