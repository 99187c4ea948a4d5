//! Reaching one of several endpoints: the next one is tried when one does not answer soon, while the first may still
//! answer (as RFC 8305 does with addresses), and at once when one refuses.

use std::{io, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until};

/// What came of it.
#[derive(Debug)]
pub struct Reached<T> {
    /// The connection and the number of its endpoint.
    pub found: Option<(usize, T)>,
    /// How many were tried.
    pub tried: usize,
    /// The last reason why one was not reached.
    pub error: Option<io::Error>,
}

/// Tries the endpoints `0..count` until one is reached or `budget` is over; the next one is begun `delay` after the last.
pub async fn reach<T, F: Future<Output = io::Result<T>>>(
    count: usize,
    delay: Duration,
    budget: Duration,
    connect: impl Fn(usize) -> F,
) -> Reached<T> {
    let end = Instant::now() + budget;
    let mut reached = Reached { found: None, tried: 0, error: None };
    let mut attempts = FuturesUnordered::new();
    let mut next = Instant::now();
    loop {
        if reached.tried < count && (next <= Instant::now() || attempts.is_empty()) {
            let (number, attempt) = (reached.tried, connect(reached.tried));
            attempts.push(async move { (number, attempt.await) });
            reached.tried += 1;
            next = Instant::now() + delay;
            continue;
        }
        if attempts.is_empty() {
            return reached;
        }
        let wake = if reached.tried < count { next.min(end) } else { end };
        tokio::select! {
            Some((number, result)) = attempts.next() => match result {
                Ok(connection) => {
                    reached.found = Some((number, connection));
                    return reached;
                }
                Err(error) => {
                    reached.error = Some(error);
                    next = Instant::now();
                }
            },
            () = sleep_until(wake) => if Instant::now() >= end {
                reached.error.get_or_insert_with(|| io::ErrorKind::TimedOut.into());
                return reached;
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an endpoint does: answers or refuses after so many milliseconds.
    #[derive(Clone, Copy)]
    enum Does {
        Answers(u64),
        Refuses(u64),
        Hangs,
    }
    use Does::{Answers, Hangs, Refuses};

    #[track_caller]
    fn check(all: &[Does], found: Option<usize>, tried: usize, took: u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let (reached, elapsed) = runtime.block_on(async {
            let began = Instant::now();
            let reached = reach(all.len(), Duration::from_millis(150), Duration::from_secs(2), |number| async move {
                let does = all[number];
                let pause = |ms: u64| tokio::time::sleep(Duration::from_millis(ms));
                match does {
                    Answers(ms) => pause(ms).await,
                    Refuses(ms) => {
                        pause(ms).await;
                        return Err(io::ErrorKind::ConnectionRefused.into());
                    }
                    Hangs => std::future::pending().await,
                }
                Ok(())
            })
            .await;
            (reached, began.elapsed())
        });
        assert_eq!(reached.found.map(|(n, ())| n), found);
        assert_eq!((reached.tried, elapsed.as_millis() as u64), (tried, took));
        assert_eq!(reached.error.is_some() || reached.found.is_some(), !all.is_empty());
    }

    #[test]
    fn who_is_reached_and_when() {
        check(&[], None, 0, 0);
        check(&[Answers(1)], Some(0), 1, 1);
        check(&[Answers(1), Answers(1)], Some(0), 1, 1);
        check(&[Hangs, Answers(1)], Some(1), 2, 151);
        check(&[Hangs, Hangs, Answers(1)], Some(2), 3, 301);
        // Refused: at once.
        check(&[Refuses(1), Answers(1)], Some(1), 2, 2);
        check(&[Refuses(1), Refuses(1), Refuses(1)], None, 3, 3);
        // The first one answers after all.
        check(&[Answers(160), Hangs], Some(0), 2, 160);
        check(&[Answers(160), Answers(100)], Some(0), 2, 160);
        check(&[Answers(400), Answers(100)], Some(1), 2, 250);
        // One that is refused late starts the next, not the one that was begun already.
        check(&[Refuses(200), Hangs, Answers(1)], Some(2), 3, 201);
        check(&[Hangs], None, 1, 2000);
        check(&[Refuses(5), Hangs], None, 2, 2000);
    }
}
