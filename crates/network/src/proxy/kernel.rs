//! Giving rules to the kernel, and looking at what it holds: by `nft`.

use std::process::Stdio;

use anyhow::{Context as _, bail};
use tokio::{io::AsyncWriteExt, process::Command};

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
    let [program, words @ ..] = &config.nft[..] else { bail!("no command for nft is configured") };
    let mut child = Command::new(program)
        .args(words)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{program} cannot be run: is nftables installed?"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).await.context("writing to nft")?;
    }
    let output = child.wait_with_output().await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("nft: {}", said.lines().take(6).collect::<Vec<_>>().join("; "));
    }
    Ok(())
}

/// Takes everything of the proxy out of the kernel.
///
/// # Errors
/// With what `nft` said.
pub async fn remove() -> anyhow::Result<()> {
    let table = rules::TABLE;
    nft(&ProxyConfig::default(), &format!("add table {table}\ndelete table {table}\n")).await
}
