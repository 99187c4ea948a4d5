//! Giving rules to the kernel, and looking at what it holds: by `nft`.

use std::process::Stdio;

use tokio::process::Command;

use super::{ProxyConfig, rules};
use rules::Ruleset;

/// Whether the kernel still holds the rules. Where that cannot be told, it is believed.
pub async fn intact(config: &ProxyConfig, rules: &Ruleset) -> bool {
    let [program, words @ ..] = &config.nft[..] else { return true };
    let mut command = Command::new(program);
    command.args(words).args(["-j", "list", "table"]).args(rules::TABLE.split(' ')).stdin(Stdio::null());
    match command.kill_on_drop(true).output().await {
        Ok(output) if output.status.success() => match rules::Outline::listed(&output.stdout) {
            Ok(outline) => outline == rules.outline(),
            Err(error) => {
                tracing::debug!("what nft lists is not understood: {error}");
                true
            }
        },
        Ok(output) => !String::from_utf8_lossy(&output.stderr).contains("No such file or directory"),
        Err(_) => true,
    }
}

/// Gives a script to the kernel, whole or not at all.
///
/// # Errors
/// With what `nft` said.
pub async fn nft(config: &ProxyConfig, script: &str) -> anyhow::Result<()> {
    crate::nft::apply(&config.nft, script).await
}

/// Takes everything of the proxy out of the kernel.
///
/// # Errors
/// With what `nft` said.
pub async fn remove() -> anyhow::Result<()> {
    let table = rules::TABLE;
    nft(&ProxyConfig::default(), &format!("add table {table}\ndelete table {table}\n")).await
}
