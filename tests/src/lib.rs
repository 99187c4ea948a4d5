//! Helpers of the end-to-end tests: the real binary, real kubectl, and a machine to run them on.
//!
//! `make test` builds the binary first and names it in `SEAWALL_BIN`; kubectl is that of `KUBECTL`.
#![allow(clippy::unwrap_used)]

pub mod cluster;
pub mod failure;
pub mod http;
pub mod inside;
pub mod kubectl;
pub mod machine;
pub mod pods;
pub mod server;
pub mod traffic;
pub mod workload;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

pub use machine::Machine;
pub use server::{Options, Server};
use tokio::time::Instant;

/// The longest that anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The top of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The binary under test.
///
/// # Panics
/// If it was not built.
pub fn seawall() -> PathBuf {
    let path = std::env::var_os("SEAWALL_BIN").map_or_else(|| workspace().join("target/debug/seawall"), PathBuf::from);
    assert!(path.exists(), "{} is missing: cargo build -p seawall, or set SEAWALL_BIN", path.display());
    path
}

/// Waits until `holds` gives a value.
///
/// # Panics
/// If it does not in time; `what` is said then.
pub async fn until<T>(what: &str, holds: impl AsyncFnMut() -> Option<T>) -> T {
    within(PATIENCE, what, holds).await
}

/// Waits at most `limit` until `holds` gives a value.
///
/// # Panics
/// If it does not in time.
pub async fn within<T>(limit: Duration, what: &str, mut holds: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = holds().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Runs a test on a machine of its own: the test, kubectl and all that it starts are in the machine's network. The
/// machine is switched off at the end, without a warning.
///
/// # Panics
/// If the test does.
pub fn on_a_machine<F, Fut, T>(test: F) -> T
where
    F: FnOnce(std::sync::Arc<Machine>) -> Fut,
    Fut: Future<Output = T>,
{
    let machine = std::sync::Arc::new(Machine::boot());
    // Tests run on threads of their own, which end with them; the runtime's threads inherit the network.
    machine.enter_network();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let result = runtime.block_on(test(machine));
    runtime.shutdown_timeout(Duration::from_secs(5));
    result
}
