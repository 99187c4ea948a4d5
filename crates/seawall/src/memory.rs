//! Memory that is free goes back to the machine.
//!
//! Each thread keeps what it freed for itself, and what others freed of its own until it next has to do with it. After many pods
//! came at once, an agent held a quarter of its memory that way, for good, and a server most of what objects had been in that
//! are long gone. So threads look at what they have when they have nothing to do.

use std::{cell::Cell, time::Duration};

use tokio::time::Instant;

/// How often a thread looks.
const EVERY: Duration = Duration::from_secs(20);

thread_local! {
    static LOOKED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// A thread has nothing to do.
pub fn idle() {
    let now = Instant::now();
    if LOOKED.get().is_some_and(|looked| now.duration_since(looked) < EVERY) {
        return;
    }
    LOOKED.set(Some(now));
    collect();
}

/// Wakes the threads of this runtime now and then, so that those look too that had nothing to do for long.
pub async fn wake() {
    loop {
        tokio::time::sleep(EVERY).await;
        // Whoever looks is busy for a moment, so that others take the rest.
        for _ in 0..tokio::runtime::Handle::current().metrics().num_workers() {
            tokio::spawn(async { idle() });
        }
    }
}

#[expect(unsafe_code, reason = "the allocator has no safe interface for it")]
fn collect() {
    // SAFETY: it may be called by any thread at any time, and concerns the heap of the one that calls.
    unsafe { libmimalloc_sys::mi_collect(true) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_looks_once_in_a_while() {
        idle();
        let looked = LOOKED.get();
        assert!(looked.is_some());
        idle();
        assert_eq!(LOOKED.get(), looked, "it has just looked");
    }
}
