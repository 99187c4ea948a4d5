//! Containers' logs stay bounded: a file above 10 MiB is moved away and opened anew, the newest five are kept.
//!
//! <https://kubernetes.io/docs/concepts/cluster-administration/logging/#log-rotation>

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::{Agent, pod::observed::State};

const MAX_SIZE: u64 = 10 << 20;
const MAX_FILES: usize = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Rotates until shutdown.
pub async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
        for pod in agent.pleg.pods().values() {
            for c in pod.containers.iter().filter(|c| c.state == State::Running && !c.log_path.is_empty()) {
                let path = Path::new(&c.log_path);
                if !fs::metadata(path).is_ok_and(|m| m.len() > MAX_SIZE) {
                    continue;
                }
                let rotated = rotate(path, Timestamp::now());
                // Without the reopening the runtime would go on writing into the file that was moved.
                let reopened = agent.cri.reopen_log(&c.id).await;
                if let (Err(error), _) = (&rotated, &reopened) {
                    tracing::warn!(path = c.log_path, "cannot rotate a log: {error}");
                }
                if let Err(status) = reopened {
                    tracing::warn!(path = c.log_path, "cannot reopen a log: {}", status.message());
                }
            }
        }
    }
}

fn rotate(path: &Path, now: Timestamp) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(now.strftime(".%Y%m%d-%H%M%S").to_string());
    fs::rename(path, PathBuf::from(name))?;
    let mut old = rotated(path)?;
    let excess = old.len().saturating_sub(MAX_FILES - 1);
    old.drain(..excess).try_for_each(fs::remove_file)
}

/// The files that were moved away, oldest first.
pub fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Vec::new()) };
    let prefix = format!("{}.", name.to_string_lossy());
    let mut files: Vec<PathBuf> = fs::read_dir(directory)?
        .filter_map(Result::ok)
        .filter(|e| e.file_name().to_string_lossy().starts_with(&prefix))
        .map(|e| e.path())
        .collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_five() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        for second in 0..8 {
            fs::write(&path, second.to_string()).unwrap();
            rotate(&path, Timestamp::from_second(1_000_000 + second).unwrap()).unwrap();
        }
        fs::write(&path, "now").unwrap();
        let old = rotated(&path).unwrap();
        assert_eq!(old.len(), MAX_FILES - 1);
        assert_eq!(fs::read_to_string(old.last().unwrap()).unwrap(), "7");
    }
}
