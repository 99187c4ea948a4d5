//! The agent's certificates.

use std::{net::IpAddr, path::Path};

use kube::Client;
use seawall_server::pki::Pair;
use tokio_util::sync::CancellationToken;

/// Reads a pair.
pub fn read(_path: &Path) -> anyhow::Result<Option<Pair>> {
    anyhow::bail!("not here yet")
}

/// Writes a pair.
pub fn write(_path: &Path, _pair: &Pair) -> anyhow::Result<()> {
    anyhow::bail!("not here yet")
}

/// Whether it is time for another.
pub fn is_due(_pair: &Pair) -> bool {
    true
}

/// Asks for a client certificate.
pub async fn request_client(_client: &Client, _node: &str) -> anyhow::Result<Pair> {
    anyhow::bail!("not here yet")
}

/// Asks for a serving certificate.
pub async fn request_serving(_client: &Client, _node: &str, _ips: &[IpAddr]) -> anyhow::Result<Pair> {
    anyhow::bail!("not here yet")
}

/// Renews.
pub fn keep_client(
    _node: &str,
    _path: &Path,
    _client: Client,
    stop: CancellationToken,
    _use_it: impl Fn(&Pair) -> anyhow::Result<()> + Send + Sync + 'static,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move { stop.cancelled().await })
}
