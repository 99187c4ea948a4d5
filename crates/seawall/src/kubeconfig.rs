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

/// The administrator's way to the API of the server on this machine.
pub struct Admin {
    /// The client.
    pub client: kube::Client,
    /// The cluster's certificate authorities, in PEM.
    pub ca: String,
}

/// Reads the administrator's kubeconfig.
///
/// # Errors
/// If no server has left one, or it has been changed into something that we did not write.
pub async fn admin(data_dir: &std::path::Path) -> anyhow::Result<Admin> {
    let path = path(data_dir);
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!("{}: no server has been started with --data-dir {}", path.display(), data_dir.display())
    })?;
    let config: serde_json::Value = serde_yaml_ng::from_str(&text).with_context(|| path.display().to_string())?;
    let decode = |value: &serde_json::Value| -> Option<String> {
        String::from_utf8(base64::engine::general_purpose::STANDARD.decode(value.as_str()?).ok()?).ok()
    };
    let (cluster, user) = (&config["clusters"][0]["cluster"], &config["users"][0]["user"]);
    let parts = (
        decode(&cluster["certificate-authority-data"]),
        decode(&user["client-certificate-data"]),
        decode(&user["client-key-data"]),
        cluster["server"].as_str(),
    );
    let (Some(ca), Some(certificate), Some(key), Some(server)) = parts else {
        anyhow::bail!("{} is damaged: start the server again, which writes it anew", path.display());
    };
    let credentials =
        seawall_client::tls::Credentials { ca_pem: ca.clone(), certificate: Some((certificate, key)), token: None };
    let address = crate::join::address_of(server).await?;
    let client = seawall_client::tls::connect(address, &seawall_client::tls::Tls::new(&credentials)?);
    Ok(Admin { client, ca })
}
