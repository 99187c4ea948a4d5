//! `seawall token`: tokens with which machines join.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use seawall_server::auth::bootstrap_token::{self, NAMESPACE, TYPE};

use crate::{join, kubeconfig};

/// What a machine that joins becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// A node.
    Agent,
    /// A server. Its token is as powerful as the cluster's keys.
    Server,
}

/// Commands of `seawall token`.
#[derive(Subcommand)]
pub enum Command {
    /// Make a token and print it.
    Create {
        /// How long it is valid, e.g. 24h; 0 means for ever.
        #[arg(long, default_value = "24h")]
        ttl: String,
        /// What a machine with it may become.
        #[arg(long, value_enum, default_value = "agent")]
        role: Role,
        #[command(flatten)]
        place: Place,
    },
    /// List the tokens that there are, without their secrets.
    List {
        #[command(flatten)]
        place: Place,
    },
    /// Delete a token by its first part.
    Delete {
        /// The first part.
        id: String,
        #[command(flatten)]
        place: Place,
    },
}

/// Where a server keeps its state.
#[derive(clap::Args)]
pub struct Place {
    /// Where the server keeps its state.
    #[arg(long, default_value = "/var/lib/seawall")]
    pub data_dir: PathBuf,
}

/// Runs a command.
///
/// # Errors
/// What went wrong, with the way out.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Create { ttl, role, place } => {
            let ttl = seconds(&ttl)?;
            let admin = kubeconfig::admin(&place.data_dir).await?;
            let token = bootstrap_token::Token::generate();
            let (group, description) = match role {
                Role::Agent => (bootstrap_token::GROUP_AGENTS, "seawall token create --role agent"),
                Role::Server => (bootstrap_token::GROUP_SERVERS, "seawall token create --role server"),
            };
            let end = match ttl {
                Some(ttl) => Some(Timestamp::now().checked_add(ttl).context("--ttl is too long")?),
                None => None,
            };
            let secret: Secret = serde_json::from_value(token.manifest(&[group], end, description))?;
            Api::<Secret>::namespaced(admin.client, NAMESPACE).create(&PostParams::default(), &secret).await?;
            let token = join::Token { bearer: token.to_string(), hash: join::hash(&admin.ca)? };
            println!("{token}");
        }
        Command::List { place } => {
            let admin = kubeconfig::admin(&place.data_dir).await?;
            let of_type = ListParams::default().fields(&format!("type={TYPE}"));
            let secrets = Api::<Secret>::namespaced(admin.client, NAMESPACE).list(&of_type).await?;
            println!("{:<8} {:<22} {:<40} DESCRIPTION", "TOKEN", "EXPIRES", "GROUPS");
            for secret in secrets {
                let data = secret.data.unwrap_or_default();
                let field =
                    |key: &str| data.get(key).map(|v| String::from_utf8_lossy(&v.0).into_owned()).unwrap_or_default();
                let expires = match field("expiration") {
                    text if text.is_empty() => "never".to_owned(),
                    text => text,
                };
                let groups = field("auth-extra-groups");
                println!("{:<8} {expires:<22} {groups:<40} {}", field("token-id"), field("description"));
            }
        }
        Command::Delete { id, place } => {
            let admin = kubeconfig::admin(&place.data_dir).await?;
            let api = Api::<Secret>::namespaced(admin.client, NAMESPACE);
            let deleted = api.delete(&format!("bootstrap-token-{id}"), &DeleteParams::default()).await;
            deleted.with_context(|| format!("there is no token {id}: `seawall token list` shows them"))?;
        }
    }
    Ok(())
}

fn seconds(text: &str) -> anyhow::Result<Option<Duration>> {
    let time = match text {
        "0" => return Ok(None),
        _ => crate::options::duration(text).map_err(|e| anyhow::anyhow!("--ttl: {e}"))?,
    };
    if time < Duration::from_secs(60) {
        bail!("--ttl {text}: a machine needs some time to join: use at least 1m, or 0 for ever");
    }
    Ok(Some(time))
}
