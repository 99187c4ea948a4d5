//! Images for the pods of drills, made on the spot and put on machines: there need not be a registry.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, ensure};

use crate::lab::{Lab, Machine};

const PATIENCE: Duration = Duration::from_secs(90);

/// Puts an image on those of the machines that do not have it. `words` are further ones for `seawall image build`.
pub async fn put(lab: &Lab, machines: &[Machine], tag: &str, words: &[&str]) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    for machine in machines {
        let args = ["--address", "/run/seawall/containerd/containerd.sock", "--namespace", "k8s.io"];
        let listed = machine.run("ctr", &[&args[..], &["images", "ls", "-q"]].concat(), PATIENCE).await;
        // One that cannot say is asked again by the import, whose error says more.
        if !listed.is_ok_and(|l| l.lines().any(|image| image == tag)) {
            missing.push(machine);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let archive = lab.directory().join("drill-image.tar");
    let mut command = tokio::process::Command::new(lab.binary());
    command.args(["--log", "warn", "image", "build", "-t", tag, "--output"]).arg(&archive).args(words);
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = output.with_context(|| lab.binary().display().to_string())?;
    ensure!(output.status.success(), "seawall image build: {}", String::from_utf8_lossy(&output.stderr).trim());
    for machine in missing {
        machine.import(&archive).await?;
    }
    std::fs::remove_file(&archive).with_context(|| archive.display().to_string())
}
