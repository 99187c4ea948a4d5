//! Components of one process: each restarts alone when it fails or panics.

use std::{future::Future, time::Duration};

use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

/// The first pause before a restart.
const FIRST: Duration = Duration::from_millis(200);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(10);
/// A component that ran this long starts again with the first pause.
const STABLE: Duration = Duration::from_secs(60);

/// Runs a component until `stop`.
pub fn component<F, Fut>(name: &'static str, stop: CancellationToken, run: F) -> JoinHandle<()>
where
    F: Fn(CancellationToken) -> Fut + Send + 'static,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    tokio::spawn(async move {
        let mut pause = FIRST;
        loop {
            let started = Instant::now();
            // A token of its own: what a failed component left behind ends before it starts again.
            let child = stop.child_token();
            match tokio::spawn(run(child.clone())).await {
                _ if stop.is_cancelled() => return,
                Ok(Ok(())) => tracing::error!(component = name, "ended by itself and is started again"),
                Ok(Err(error)) => tracing::error!(component = name, "failed and is started again: {error:#}"),
                Err(error) => tracing::error!(component = name, %error, "panicked and is started again"),
            }
            child.cancel();
            if started.elapsed() > STABLE {
                pause = FIRST;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
            pause = (pause * 2).min(LONGEST);
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_component_that_panics_starts_again() {
        let runs = Arc::new(AtomicUsize::new(0));
        let stop = CancellationToken::new();
        let (count, end) = (runs.clone(), stop.clone());
        let handle = component("test", stop.clone(), move |_| {
            let (count, end) = (count.clone(), end.clone());
            async move {
                match count.fetch_add(1, Ordering::SeqCst) {
                    0 => panic!("on purpose"),
                    1 => anyhow::bail!("on purpose"),
                    _ => end.cancel(),
                }
                Ok(())
            }
        });
        handle.await.unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), 3);
    }
}
