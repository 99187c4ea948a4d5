//! What has to be done about flows when a machine died, beyond the rules.

use std::{collections::BTreeSet, io, sync::Arc, time::Duration};

use tokio::{sync::watch, time::sleep};

use super::{
    conntrack::{Conntrack, Flow, TcpState, Way},
    dead::Target,
    rouse::Rouser,
    stale::Stale,
};

/// At most so many idle clients are spoken to in one round.
const MOST: usize = 100_000;
/// After how long they are looked at, and spoken to, again. Soon after the first time they have answered and were reset; and a
/// kernel answers what does not fit its window twice a second at most.
const AGAIN: [Duration; 4] =
    [Duration::from_millis(100), Duration::from_millis(550), Duration::from_millis(550), Duration::from_millis(550)];

/// What to do with a flow to or from the dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nobody has answered: forgotten, it finds another endpoint with its next packet. Or it is over, and who uses the
    /// port again would be led the same way: what the kernel itself has reset, it keeps.
    Forget,
    /// It is open: whoever waits is spoken to in the other end's name.
    Rouse(Way),
    /// Nothing.
    Leave,
}

/// Decides, for `targets` that are dead. Pure.
pub fn fate(flow: &Flow, targets: &BTreeSet<Target>) -> Fate {
    const UDP: u8 = 17;
    let (to, from) = (targets.iter().any(|t| t.is_to(flow)), targets.iter().any(|t| t.is_from(flow)));
    match (to, from, flow.protocol, flow.state) {
        (false, false, ..) => Fate::Leave,
        (.., UDP, _) => Fate::Forget,
        (.., Some(TcpState::Unanswered | TcpState::Opening | TcpState::Over)) => Fate::Forget,
        // As its client knows the other end, and as the answering end does.
        (true, _, _, Some(TcpState::Open)) => Fate::Rouse(Way { from: flow.original.to, to: flow.original.from }),
        (_, true, _, Some(TcpState::Open)) => Fate::Rouse(Way { from: flow.reply.to, to: flow.reply.from }),
        _ => Fate::Leave,
    }
}

/// Forgets flows that the rules would not lead where they are.
pub async fn forget(stale: BTreeSet<Stale>) {
    let done = blocking(move || {
        let mut table = Conntrack::connect()?;
        let families = stale.iter().map(Stale::family).collect();
        let flows = table.flows(&families, |flow| stale.iter().any(|s| s.is(flow)))?;
        let mut count = 0;
        for flow in &flows {
            count += usize::from(table.forget(flow)?);
        }
        Ok(count)
    });
    match done.await {
        Ok(count) => tracing::debug!(count, "flows were forgotten"),
        Err(error) => tracing::warn!("flows may go on to endpoints that are gone: {error}"),
    }
}

/// Ends what is open to `fresh`, as long as they are among those that are dead now.
pub async fn end(mut fresh: BTreeSet<Target>, dead: watch::Receiver<Arc<BTreeSet<Target>>>) {
    for round in 0..=AGAIN.len() {
        fresh.retain(|target| dead.borrow().contains(target));
        if fresh.is_empty() {
            return;
        }
        let targets = fresh.clone();
        // In the end nothing is left of them: a client that uses the same port again must not find the way to the dead.
        let again = AGAIN.get(round).copied();
        let last = again.is_none();
        match blocking(move || pass(&targets, last)).await {
            Ok((forgotten, roused)) => tracing::info!(round, forgotten, roused, "flows to dead machines"),
            Err(error) => tracing::warn!("flows to dead machines were not looked after: {error}"),
        }
        sleep(again.unwrap_or_default()).await;
    }
}

fn pass(targets: &BTreeSet<Target>, last: bool) -> io::Result<(usize, usize)> {
    let mut table = Conntrack::connect()?;
    let families = targets.iter().map(Target::family).collect();
    let flows = table.flows(&families, |flow| fate(flow, targets) != Fate::Leave)?;
    let rouser = Rouser::new()?;
    let (mut forgotten, mut roused) = (0, 0);
    for (number, flow) in flows.iter().enumerate() {
        match fate(flow, targets) {
            Fate::Forget => forgotten += usize::from(table.forget(flow)?),
            Fate::Rouse(_) if last => forgotten += usize::from(table.forget(flow)?),
            Fate::Rouse(way) if roused < MOST => {
                // A full queue of the device: the next round is soon.
                roused += usize::from(rouser.rouse(way, chance(number)).is_ok());
            }
            _ => {}
        }
    }
    Ok((forgotten, roused))
}

/// Some number: a segment must not fit a window by chance each time.
fn chance(seed: usize) -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(seed) as u32
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fates() {
        let targets = BTreeSet::from([
            Target::Pods("10.244.2.0/24".parse().unwrap()),
            Target::Port("10.9.0.2:8080".parse().unwrap()),
        ]);
        let way = |from: &str, to: &str| Way { from: from.parse().unwrap(), to: to.parse().unwrap() };
        let check = |protocol: u8, original: Way, reply: Way, state: Option<TcpState>, expect: Fate| {
            assert_eq!(fate(&Flow { protocol, original, reply, state }, &targets), expect, "{original:?} {reply:?}");
        };
        let (open, opening, over) = (Some(TcpState::Open), Some(TcpState::Opening), Some(TcpState::Over));
        // A pod through a Service to a dead pod.
        let through = way("10.244.1.2:5000", "10.96.0.9:80");
        let dead = way("10.244.2.7:8080", "10.244.1.2:5000");
        check(6, through, dead, open, Fate::Rouse(way("10.96.0.9:80", "10.244.1.2:5000")));
        check(6, through, dead, opening, Fate::Forget);
        check(6, through, dead, over, Fate::Forget);
        check(17, through, dead, None, Fate::Forget);
        // To another one that lives.
        let alive = way("10.244.3.7:8080", "10.244.1.2:5000");
        check(6, through, alive, open, Fate::Leave);
        check(6, through, alive, over, Fate::Leave);
        check(17, through, alive, None, Fate::Leave);
        // A dead pod that had connected to one here.
        let here = way("10.244.2.7:5000", "10.96.0.9:80");
        let answers = way("10.244.1.2:8080", "10.244.2.7:5000");
        check(6, here, answers, open, Fate::Rouse(way("10.244.2.7:5000", "10.244.1.2:8080")));
        // The machine itself: only the port that stood behind a Service.
        let host = way("10.9.0.2:8080", "10.244.1.2:5000");
        check(6, through, host, open, Fate::Rouse(way("10.96.0.9:80", "10.244.1.2:5000")));
        let ssh = way("10.9.0.1:5000", "10.9.0.2:22");
        check(6, ssh, way("10.9.0.2:22", "10.9.0.1:5000"), open, Fate::Leave);
    }
}
