//! OpenAPI documents of other servers: asked for every now and then, and kept as they were said last.
//!
//! A server that does not answer keeps what it said; what goes with its APIService only. Upstream's aggregator does so.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{StatusCode, header};
use parking_lot::Mutex;
use serde_json::Value;
use sha2::Digest as _;
use tokio::time::Instant;

use super::{Remote, join};
use crate::{Server, auth::UserInfo};

/// How often it is looked through who has to be asked.
const LOOK: Duration = Duration::from_secs(1);
/// How often documents are asked for again, and the longest wait after a failure.
const AGAIN: Duration = Duration::from_secs(60);
/// How long a server has for a document: upstream's time.
const ANSWER: Duration = Duration::from_secs(60);
/// The most that a document may have, in bytes.
const MOST: usize = 32 << 20;

/// What is known of all other servers' documents.
#[derive(Default)]
pub(crate) struct Specs {
    entries: Mutex<HashMap<String, Entry>>,
    /// Rises when what they said of version 2 is not what it was.
    generation: AtomicU64,
}

struct Entry {
    remote: Arc<Remote>,
    /// When to ask; nothing while it is being asked.
    due: Option<Instant>,
    failures: u32,
    said: Said,
}

/// What a server said.
#[derive(Clone, Default)]
struct Said {
    two: Option<Two>,
    three: Three,
}

/// A document of version 2.
#[derive(Clone)]
struct Two {
    /// What the server called it (`ETag`).
    tag: Option<String>,
    hash: String,
    /// Of it, what is about the group and version of the APIService.
    document: Arc<Value>,
}

/// Where version 3 is.
#[derive(Clone, Default)]
pub(crate) enum Three {
    /// Nobody said.
    #[default]
    Unknown,
    /// The server itself has it, at this address.
    There(String),
    /// It has none: this was made of its version 2.
    Made {
        /// The document.
        document: Bytes,
        /// Changes with it.
        hash: String,
    },
}

impl Specs {
    /// Rises with every change of what is in [`Specs::of_version_2`].
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// What a server said in version 2.
    pub(crate) fn of_version_2(&self, remote: &Remote) -> Option<Arc<Value>> {
        Some(self.entries.lock().get(&remote.name)?.said.two.as_ref()?.document.clone())
    }

    /// Where a server's version 3 is.
    pub(crate) fn of_version_3(&self, remote: &Remote) -> Three {
        self.entries.lock().get(&remote.name).map(|entry| entry.said.three.clone()).unwrap_or_default()
    }

    /// A server answers (again): what failed before is tried at once.
    pub(super) fn answers(&self, name: &str) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get_mut(name).filter(|entry| entry.failures > 0) {
            entry.due = entry.due.map(|due| due.min(Instant::now()));
        }
    }

    /// Whom to ask now, and what they said before. They count as being asked until [`Specs::take`].
    fn due(&self, remotes: &[Arc<Remote>], now: Instant) -> Vec<(Arc<Remote>, Said)> {
        let mut entries = self.entries.lock();
        let before = entries.len();
        entries.retain(|name, _| remotes.iter().any(|remote| remote.name == *name));
        if entries.len() != before {
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        let mut due = Vec::new();
        for remote in remotes {
            let new = || Entry { remote: remote.clone(), due: Some(now), failures: 0, said: Said::default() };
            let entry = entries.entry(remote.name.clone()).or_insert_with(new);
            if entry.remote != *remote {
                // Another server, perhaps. What the old one said stays until this one has answered.
                (entry.remote, entry.due) = (remote.clone(), Some(now));
            }
            if entry.due.is_some_and(|at| at <= now) {
                entry.due = None;
                due.push((remote.clone(), entry.said.clone()));
            }
        }
        due
    }

    /// What a server said now.
    fn take(&self, remote: &Arc<Remote>, said: Said, well: bool) {
        let mut entries = self.entries.lock();
        // Who was asked for an APIService that has changed since is asked again, or is already.
        let Some(entry) = entries.get_mut(&remote.name).filter(|entry| Arc::ptr_eq(&entry.remote, remote)) else {
            return;
        };
        entry.failures = if well { 0 } else { entry.failures.saturating_add(1) };
        let wait = if well { AGAIN } else { LOOK.saturating_mul(1 << entry.failures.min(6)).min(AGAIN) };
        entry.due = Some(Instant::now() + wait);
        let hash = |said: &Said| said.two.as_ref().map(|two| two.hash.clone());
        if hash(&entry.said) != hash(&said) {
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        entry.said = said;
    }
}

/// Asks all servers for their documents, until this server stops.
pub(crate) async fn keep(server: Arc<Server>) {
    let stop = server.stop.clone();
    stop.run_until_cancelled(async {
        loop {
            for (remote, said) in server.aggregation.specs.due(&server.remotes(), Instant::now()) {
                let asking = server.clone();
                tokio::spawn(server.stop.clone().run_until_cancelled_owned(async move {
                    let (said, failure) = asking.ask_for_documents(&remote, said).await;
                    if let Some(why) = &failure {
                        tracing::debug!(service = remote.name, why, "another server's OpenAPI was not read");
                    }
                    asking.aggregation.specs.take(&remote, said, failure.is_none());
                }));
            }
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
}

impl Server {
    /// What a server says of its API now, beginning with what it said before, and what went wrong.
    async fn ask_for_documents(&self, remote: &Remote, mut said: Said) -> (Said, Option<String>) {
        let mut failure = match self.ask_for_version_2(remote, said.two.as_ref()).await {
            Ok(two) => {
                said.two = two;
                None
            }
            Err(why) => Some(why),
        };
        match self.ask_for_document(remote, "/openapi/v3", None).await {
            Ok((StatusCode::OK, _, body)) => {
                let list: Value = serde_json::from_slice(&body).unwrap_or_default();
                let url = &list["paths"][format!("apis/{}/{}", remote.group, remote.version)]["serverRelativeURL"];
                said.three = url.as_str().map_or(Three::Unknown, |url| Three::There(url.to_owned()));
            }
            Ok((StatusCode::NOT_FOUND, ..)) => {
                said.three = match (said.three, &said.two) {
                    (_, None) => Three::Unknown,
                    (Three::Made { document, hash }, Some(two)) if hash == two.hash => Three::Made { document, hash },
                    (_, Some(two)) => Three::Made {
                        document: join::version_3(&two.document).to_string().into(),
                        hash: two.hash.clone(),
                    },
                };
            }
            Ok((status, ..)) => failure = Some(format!("/openapi/v3: bad status {status}")),
            Err(why) => failure = Some(format!("/openapi/v3: {why}")),
        }
        (said, failure)
    }

    async fn ask_for_version_2(&self, remote: &Remote, before: Option<&Two>) -> Result<Option<Two>, String> {
        let failed = |why: String| format!("/openapi/v2: {why}");
        let tag = before.and_then(|two| two.tag.as_deref());
        let (status, tag, body) = self.ask_for_document(remote, "/openapi/v2", tag).await.map_err(failed)?;
        match status {
            StatusCode::NOT_MODIFIED => Ok(before.cloned()),
            StatusCode::OK => {
                let digest = sha2::Sha256::digest(&body);
                let hash: String = digest.iter().map(|byte| format!("{byte:02X}")).collect();
                if let Some(before) = before.filter(|two| two.hash == hash) {
                    return Ok(Some(Two { tag, ..before.clone() }));
                }
                let document: Value = serde_json::from_slice(&body).map_err(|e| failed(e.to_string()))?;
                let prefix = format!("/apis/{}/{}/", remote.group, remote.version);
                let document = join::only_paths(document, |path| path.starts_with(&prefix));
                Ok(Some(Two { tag, hash, document: Arc::new(document) }))
            }
            status => Err(failed(format!("bad status {status}"))),
        }
    }

    /// A document, and its tag.
    async fn ask_for_document(
        &self,
        remote: &Remote,
        path: &str,
        tag: Option<&str>,
    ) -> Result<(StatusCode, Option<String>, Bytes), String> {
        let user = UserInfo::new("system:aggregator", &[]);
        let answer = tokio::time::timeout(ANSWER, self.ask_remote_as(remote, &user, path, tag, MOST)).await;
        let (parts, body) = answer.map_err(|_| "context deadline exceeded".to_owned())??;
        let tag = parts.headers.get(header::ETAG).and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        Ok((parts.status, tag, body))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn remote(priority: i64) -> Arc<Remote> {
        let object = json!({"metadata": {"name": "v1.a.example"}, "spec": {"group": "a.example", "version": "v1",
            "versionPriority": priority, "service": {"namespace": "n", "name": "s"}}});
        Arc::new(Remote::read(&object).unwrap())
    }

    fn said(hash: &str) -> Said {
        let two = Two { tag: None, hash: hash.into(), document: Arc::new(json!({"is": hash})) };
        Said { two: Some(two), three: Three::Unknown }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_asked_when() {
        let specs = Specs::default();
        let first = remote(1);
        let asked = |remote: &Arc<Remote>| specs.due(std::slice::from_ref(remote), Instant::now()).len();
        let is = |remote: &Remote| specs.of_version_2(remote).map(|document| document["is"].clone());
        assert_eq!((asked(&first), asked(&first)), (1, 0), "one that is being asked is not asked again");
        // Failures are tried again after a while that grows.
        for wait in [2, 4, 8] {
            specs.take(&first, Said::default(), false);
            tokio::time::advance(Duration::from_secs(wait - 1)).await;
            assert_eq!(asked(&first), 0);
            tokio::time::advance(Duration::from_secs(1)).await;
            assert_eq!(asked(&first), 1);
        }
        specs.take(&first, Said::default(), false);
        specs.answers(&first.name);
        assert_eq!((asked(&first), specs.generation()), (1, 0), "or when the server is known to answer");
        specs.take(&first, said("a"), true);
        assert_eq!((is(&first), specs.generation()), (Some(json!("a")), 1));
        tokio::time::advance(AGAIN).await;
        assert_eq!(asked(&first), 1);
        // What fails keeps what was said, and what is the same is no change.
        specs.take(&first, said("a"), false);
        assert_eq!((is(&first), specs.generation()), (Some(json!("a")), 1));
        // Another registration is asked at once; answers to the old one are nobody's.
        let second = remote(2);
        assert_eq!(asked(&second), 1);
        specs.take(&first, said("old"), true);
        assert_eq!((is(&second), asked(&second)), (Some(json!("a")), 0));
        specs.take(&second, said("b"), true);
        assert_eq!((is(&second), specs.generation()), (Some(json!("b")), 2));
        assert!(specs.due(&[], Instant::now()).is_empty());
        assert_eq!((is(&second), specs.generation()), (None, 3), "what is not registered any more is forgotten");
    }
}
