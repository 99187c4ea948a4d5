//! What the runtime says about a pod.

use jiff::Timestamp;
use k8s_cri::v1 as cri;

use crate::cri::{annotation, label};

/// A pod's sandboxes and containers, newest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The namespace and name that the sandbox is labelled with.
    pub owner: (String, String),
    /// The grace period that the containers were made with, for when the API no longer knows it.
    pub grace: Option<i64>,
    /// Newest first.
    pub sandboxes: Vec<SandboxObs>,
    /// Newest first.
    pub containers: Vec<ContainerObs>,
}

/// A sandbox.
#[derive(Clone, Debug, PartialEq)]
pub struct SandboxObs {
    /// Its id.
    pub id: String,
    /// Whether its pause process and network live.
    pub ready: bool,
    /// Counts the sandboxes of this pod.
    pub attempt: u32,
    /// When it was made.
    pub created: Timestamp,
    /// Its addresses; none on the host's network.
    pub ips: Vec<String>,
}

/// A container's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Made, not started.
    Created,
    /// Running.
    Running,
    /// Over.
    Exited,
    /// The runtime lost track.
    Unknown,
}

/// A container.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerObs {
    /// Its id.
    pub id: String,
    /// Its name in the pod.
    pub name: String,
    /// The sandbox it is in.
    pub sandbox: String,
    /// Its state.
    pub state: State,
    /// How many of this name came before.
    pub restart_count: u32,
    /// See [`super::container_hash`].
    pub hash: String,
    /// When it was made.
    pub created: Timestamp,
    /// When it started.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub finished: Option<Timestamp>,
    /// Its exit code, once it ended.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, ...
    pub reason: String,
    /// The termination message, or the runtime's word on why it did not run.
    pub message: String,
    /// The image as the user named it.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// The log file.
    pub log_path: String,
    /// The pod's grace period when it was made.
    pub grace: Option<i64>,
}

impl Observed {
    /// The sandbox that counts.
    pub fn sandbox(&self) -> Option<&SandboxObs> {
        self.sandboxes.first()
    }

    /// The newest container of this name, whatever its sandbox.
    pub fn newest(&self, name: &str) -> Option<&ContainerObs> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// The newest container of this name in the current sandbox.
    pub fn active(&self, name: &str) -> Option<&ContainerObs> {
        let sandbox = &self.sandbox()?.id;
        self.containers.iter().find(|c| c.name == name && c.sandbox == *sandbox)
    }

    /// Containers that have a process, or may have one.
    pub fn alive(&self) -> impl Iterator<Item = &ContainerObs> {
        self.containers.iter().filter(|c| matches!(c.state, State::Running | State::Unknown))
    }
}

/// A timestamp of CRI, in nanoseconds; 0 stands for "not yet".
pub fn timestamp(nanoseconds: i64) -> Option<Timestamp> {
    (nanoseconds > 0).then(|| Timestamp::from_nanosecond(i128::from(nanoseconds)).ok()).flatten()
}

impl ContainerObs {
    /// From a full status; `message` is the termination message.
    pub fn from_cri(status: &cri::ContainerStatus, sandbox: &str, message: String) -> Self {
        use cri::ContainerState as S;
        let state = match S::try_from(status.state) {
            Ok(S::ContainerCreated) => State::Created,
            Ok(S::ContainerRunning) => State::Running,
            Ok(S::ContainerExited) => State::Exited,
            _ => State::Unknown,
        };
        let annotation = |key: &str| status.annotations.get(key).cloned().unwrap_or_default();
        Self {
            id: status.id.clone(),
            name: status.labels.get(label::CONTAINER_NAME).cloned().unwrap_or_default(),
            sandbox: sandbox.into(),
            state,
            restart_count: annotation(annotation::RESTART_COUNT).parse().unwrap_or(0),
            hash: annotation(annotation::HASH),
            created: timestamp(status.created_at).unwrap_or(Timestamp::UNIX_EPOCH),
            started: timestamp(status.started_at),
            finished: timestamp(status.finished_at),
            exit_code: status.exit_code,
            reason: status.reason.clone(),
            message: if message.is_empty() { status.message.clone() } else { message },
            image: status.image.as_ref().map(|i| i.image.clone()).unwrap_or_default(),
            image_id: status.image_ref.clone(),
            log_path: status.log_path.clone(),
            grace: annotation(annotation::GRACE_PERIOD).parse().ok(),
        }
    }
}
