//! Kubeconfig files.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use base64::Engine as _;
use k8s_openapi::api::coordination::v1::Lease;
use serde_json::{Value, json};

/// Options of `seawall kubeconfig`.
#[derive(clap::Args)]
pub struct Args {
    /// Where the server keeps its state.
    #[arg(long, default_value = "/var/lib/seawall")]
    data_dir: PathBuf,
    /// An entry in front of the servers, e.g. https://api.example:6443, instead of the servers themselves. Its name has to
    /// stand in their certificates (--tls-san, or seawall certs add-name).
    #[arg(long, value_name = "URL")]
    server: Vec<String>,
}

/// Where a server leaves the administrator's kubeconfig.
pub fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("admin.kubeconfig")
}

/// A kubeconfig for a user with a certificate: a context for each server, the first of which is current.
pub fn text(servers: &[(String, String)], ca_pem: &str, certificate: &str, key: &str) -> anyhow::Result<String> {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let clusters: Vec<Value> = servers
        .iter()
        .map(|(name, url)| json!({"name": name, "cluster": {"server": url, "certificate-authority-data": encode(ca_pem)}}))
        .collect();
    let contexts: Vec<Value> =
        servers.iter().map(|(name, _)| json!({"name": name, "context": {"cluster": name, "user": "admin"}})).collect();
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": servers.first().map(|(name, _)| name),
        "clusters": clusters,
        "users": [{"name": "admin", "user": {"client-certificate-data": encode(certificate), "client-key-data": encode(key)}}],
        "contexts": contexts,
    });
    Ok(serde_yaml_ng::to_string(&config)?)
}

/// Prints the administrator's kubeconfig for use from outside.
///
/// # Errors
/// If no server has been started here.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    let config = read(&args.data_dir)?;
    let named = |(i, url): (usize, &String)| match i {
        0 => ("seawall".to_owned(), url.clone()),
        i => (format!("seawall-{}", i + 1), url.clone()),
    };
    let mut servers: Vec<(String, String)> = args.server.iter().enumerate().map(named).collect();
    for url in &args.server {
        crate::join::address_of(url).await.map_err(|_| {
            anyhow::anyhow!("--server {url:?}: write https://NAME:6443, with a name or address that can be found")
        })?;
    }
    if servers.is_empty() {
        servers = match others(&args.data_dir).await {
            Ok(found) if found.len() > 1 => found,
            // A lone server, or one that does not run: what it wrote when it last did.
            Ok(_) | Err(_) => vec![("seawall".to_owned(), config.server.clone())],
        };
        if servers.len() > 1 {
            println!("# A context for each server: when the first one is down, use --context with another one's name,");
            println!("# or give an entry in front of all of them with seawall kubeconfig --server https://ENTRY:6443.");
        }
    }
    print!("{}", text(&servers, &config.ca, &config.certificate, &config.key)?);
    Ok(())
}

/// The servers by name, with their URLs, this machine's first.
///
/// # Errors
/// If the server of this machine does not answer.
pub async fn others(data_dir: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let admin = admin(data_dir).await?;
    let leases = kube::Api::<Lease>::namespaced(admin.client, "kube-system");
    let of_servers = kube::api::ListParams::default().labels("apiserver.kubernetes.io/identity=kube-apiserver");
    let leases = tokio::time::timeout(std::time::Duration::from_secs(3), leases.list(&of_servers)).await??;
    let own = crate::files::Files::new(data_dir).read_server()?.and_then(|state| match state.store {
        crate::files::StoreKind::Stacked(local) => Some(local.name),
        _ => None,
    });
    let mut found = Vec::new();
    for lease in leases {
        let name = lease.metadata.name.unwrap_or_default().trim_start_matches("apiserver-").to_owned();
        let address = lease.metadata.annotations.unwrap_or_default().remove(seawall_server::presence::ADDRESS);
        if let Some(address) = address {
            found.push((name, format!("https://{address}")));
        }
    }
    found.sort_by_key(|(name, _)| (Some(name) != own.as_ref(), name.clone()));
    Ok(found)
}

/// What stands in the administrator's kubeconfig.
struct Parts {
    ca: String,
    certificate: String,
    key: String,
    server: String,
}

fn read(data_dir: &Path) -> anyhow::Result<Parts> {
    read_file(&path(data_dir))
        .with_context(|| format!("no server has been started with --data-dir {}", data_dir.display()))
}

fn read_file(path: &Path) -> anyhow::Result<Parts> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let config: Value = serde_yaml_ng::from_str(&text).with_context(|| path.display().to_string())?;
    let decode = |value: &Value| -> Option<String> {
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
    Ok(Parts { ca, certificate, key, server: server.to_owned() })
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
pub async fn admin(data_dir: &Path) -> anyhow::Result<Admin> {
    connect(read(data_dir)?).await
}

/// A client of whom such a file names.
///
/// # Errors
/// If it is none that we wrote, or its server has no address.
pub async fn client(path: &Path) -> anyhow::Result<kube::Client> {
    Ok(connect(read_file(path)?).await?.client)
}

async fn connect(parts: Parts) -> anyhow::Result<Admin> {
    let Parts { ca, certificate, key, server } = parts;
    let credentials =
        seawall_client::tls::Credentials { ca_pem: ca.clone(), certificate: Some((certificate, key)), token: None };
    let address = crate::join::address_of(&server).await?;
    let client = seawall_client::tls::connect(address, &seawall_client::tls::Tls::new(&credentials)?);
    Ok(Admin { client, ca })
}
