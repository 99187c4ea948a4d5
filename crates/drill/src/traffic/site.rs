//! Where clients run: on the host, or in a machine's network.
//!
//! A socket belongs to the network of the thread that made it, so a site is a thread in that network which runs all
//! its clients.

use std::{fs::File, path::PathBuf, thread::JoinHandle};

use anyhow::Context as _;
use nix::sched::{CloneFlags, setns};
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// A place to run clients at.
pub struct Site {
    handle: Handle,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Site {
    /// The host itself, or the network namespace of this file.
    pub fn new(network: Option<PathBuf>) -> anyhow::Result<Site> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("site".into()).spawn(move || {
            let runtime = || {
                if let Some(path) = &network {
                    let file = File::open(path).with_context(|| path.display().to_string())?;
                    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", path.display()))?;
                }
                Ok::<_, anyhow::Error>(Builder::new_current_thread().enable_all().build()?)
            };
            match runtime() {
                Ok(runtime) => {
                    let _ = sender.send(Ok(runtime.handle().clone()));
                    runtime.block_on(stopped.cancelled());
                }
                Err(error) => drop(sender.send(Err(error))),
            }
        })?;
        let handle = receiver.recv().context("a site's thread ended")??;
        Ok(Site { handle, stop, thread: Some(thread) })
    }

    /// Runs a client here.
    pub fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.handle.spawn(future)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop.cancel();
        // The last one to let go of it may be one of its own clients.
        let own = std::thread::current().id();
        if let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != own) {
            // It panics only if its runtime does, and that has been said where it happened.
            let _ = thread.join();
        }
    }
}
