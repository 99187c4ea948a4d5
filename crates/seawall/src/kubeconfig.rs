//! Kubeconfig files.

use std::path::PathBuf;

use anyhow::Context as _;
use base64::Engine as _;
use serde_json::json;

/// Options of `seawall kubeconfig`.
#[derive(clap::Args)]
pub struct Args {
    /// Where the server keeps its state.
    #[arg(long, default_value = "/var/lib/seawall")]
    data_dir: PathBuf,
}

/// Where a server leaves the administrator's kubeconfig.
pub fn path(data_dir: &std::path::Path) -> PathBuf {
    data_dir.join("admin.kubeconfig")
}

/// A kubeconfig for a user with a certificate.
pub fn text(server: &str, ca_pem: &str, certificate: &str, key: &str) -> anyhow::Result<String> {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "seawall",
        "clusters": [{"name": "seawall", "cluster": {"server": server, "certificate-authority-data": encode(ca_pem)}}],
        "users": [{"name": "admin", "user": {"client-certificate-data": encode(certificate), "client-key-data": encode(key)}}],
        "contexts": [{"name": "seawall", "context": {"cluster": "seawall", "user": "admin"}}],
    });
    Ok(serde_yaml_ng::to_string(&config)?)
}

/// Prints the administrator's kubeconfig.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let path = path(&args.data_dir);
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!("{}: no server has been started with --data-dir {}", path.display(), args.data_dir.display())
    })?;
    print!("{text}");
    Ok(())
}
