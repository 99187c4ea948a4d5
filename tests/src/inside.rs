//! In a pod's network, from this process.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use seawall_drill::lab::Machine;
use tokio::time::Instant;

use crate::{PATIENCE, within};

/// A pod whose network a test connects from.
#[derive(Clone)]
pub struct Inside {
    pod: String,
    namespace: String,
}

impl Inside {
    /// That of a pod on a machine.
    ///
    /// # Panics
    /// If the pod has no process there.
    pub fn of(machine: &Machine, pod: &str) -> Inside {
        let named = |pid: &i32| {
            let variable = format!("HOSTNAME={pod}");
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|b| *b == 0).any(|v| v == variable.as_bytes())
        };
        let pid = machine.processes().unwrap().into_iter().find(named).expect("the pod's process");
        Inside { pod: pod.to_owned(), namespace: format!("/proc/{pid}/ns/net") }
    }

    /// Does something there. It blocks.
    ///
    /// # Panics
    /// If `work` does.
    pub fn on<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = self.namespace.clone();
        // A thread of its own: its network is never anybody else's.
        let thread = std::thread::spawn(move || {
            setns(File::open(namespace).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    /// Whether a connection is made within a moment.
    ///
    /// # Panics
    /// If the pod is gone.
    pub async fn reaches(&self, to: SocketAddr) -> bool {
        let inside = self.clone();
        let connect = move || inside.on(move || TcpStream::connect_timeout(&to, Duration::from_millis(150)).is_ok());
        tokio::task::spawn_blocking(connect).await.unwrap()
    }

    /// Waits until it is so, and tells how long that took.
    ///
    /// # Panics
    /// If it does not become so.
    pub async fn becomes(&self, open: bool, to: SocketAddr, since: Instant, why: &str) -> Duration {
        let what = format!("{} {} {to}: {why}", self.pod, if open { "reaches" } else { "does not reach" });
        // The beginning of the attempt counts: a packet that gets nowhere is waited for.
        let took = within(PATIENCE, &what, async || {
            let began = since.elapsed();
            (self.reaches(to).await == open).then_some(began)
        })
        .await;
        eprintln!("{what}: after {took:?}");
        took
    }
}
