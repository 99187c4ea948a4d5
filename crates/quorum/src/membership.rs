//! Which changes of etcd's membership are safe.
//!
//! A cluster of `n` voters works while more than half of them do
//! (<https://etcd.io/docs/v3.4/faq/#what-is-failure-tolerance>). A change that would leave fewer than a majority of the
//! *new* voters working is refused, with the arithmetic. New members join as learners, which have no vote
//! (<https://etcd.io/docs/v3.4/learning/design-learner/>), and are promoted when they have what the others have.

use std::{fmt, time::Duration};

/// A member as the others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its number.
    pub id: u64,
    /// Its name; empty until it has started for the first time.
    pub name: String,
    /// Whether it is a learner.
    pub learner: bool,
    /// Whether it answers, and knows a leader.
    pub healthy: bool,
}

/// How many of `voters` must work.
pub fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}

/// Why a change is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too few members would be left working.
    #[error(
        "{change} would leave {voters} voting member{}, of which {healthy} work{}, and {} are needed: {way_out}",
        if *voters == 1 { "" } else { "s" },
        if *healthy == 1 { "s" } else { "" },
        quorum(*voters)
    )]
    Quorum {
        /// What was asked for.
        change: String,
        /// How many voters there would be.
        voters: usize,
        /// How many of them work.
        healthy: usize,
        /// What to do instead.
        way_out: &'static str,
    },
    /// There is no such member.
    #[error("there is no member {0}; the members are: {1}")]
    Unknown(String, String),
    /// It is the last one.
    #[error("{0} is the last voting member: without it there is no cluster")]
    Last(String),
    /// Another member is still joining.
    #[error("{0} is still joining: wait until it has been promoted, or remove it")]
    Busy(String),
    /// The name is taken.
    #[error("there is a member {0} already: remove it first if its machine is lost (seawall member remove {0})")]
    Taken(String),
}

fn voters(members: &[Member]) -> impl Iterator<Item = &Member> {
    members.iter().filter(|m| !m.learner)
}

fn find<'a>(members: &'a [Member], name: &str) -> Result<&'a Member, Refusal> {
    let named = |m: &&Member| m.name == name || format!("{:x}", m.id) == name;
    members.iter().find(named).ok_or_else(|| {
        let names: Vec<&str> = members.iter().map(|m| m.name.as_str()).collect();
        Refusal::Unknown(name.to_owned(), names.join(", "))
    })
}

/// Whether a member, by name or hexadecimal number, may be removed.
///
/// # Errors
/// [`Refusal`], if the rest could not go on.
pub fn may_remove<'a>(members: &'a [Member], name: &str) -> Result<&'a Member, Refusal> {
    let member = find(members, name)?;
    if member.learner {
        return Ok(member);
    }
    let left = voters(members).count() - 1;
    if left == 0 {
        return Err(Refusal::Last(name.to_owned()));
    }
    let healthy = voters(members).filter(|m| m.id != member.id && m.healthy).count();
    if healthy < quorum(left) {
        return Err(Refusal::Quorum {
            change: format!("removing {name}"),
            voters: left,
            healthy,
            way_out: "bring a stopped member back first",
        });
    }
    Ok(member)
}

/// Whether a member of this name may join. It returns the members that have to be removed first: an earlier self that
/// never started or that was wiped.
///
/// # Errors
/// [`Refusal`], if another one is joining, the name is in use, or what is there does not work.
pub fn may_join<'a>(members: &'a [Member], name: &str, peer_is_same: bool) -> Result<Vec<&'a Member>, Refusal> {
    if let Some(learner) = members.iter().find(|m| m.learner && m.name != name && !(peer_is_same && m.name.is_empty()))
    {
        let known = if learner.name.is_empty() { format!("{:x}", learner.id) } else { learner.name.clone() };
        return Err(Refusal::Busy(known));
    }
    let healthy = voters(members).filter(|m| m.healthy).count();
    let count = voters(members).count();
    if healthy < quorum(count) {
        return Err(Refusal::Quorum {
            change: format!("a join of {name} now"),
            voters: count,
            healthy,
            way_out: "a change of members needs a working majority",
        });
    }
    let mut stale = Vec::new();
    for member in members.iter().filter(|m| m.name == name || m.learner) {
        if member.healthy && !member.learner {
            return Err(Refusal::Taken(name.to_owned()));
        }
        if !member.learner {
            may_remove(members, name)?;
        }
        stale.push(member);
    }
    Ok(stale)
}

/// What a member that is catching up has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How many entries of the log it has applied.
    pub applied: u64,
    /// How many the leader has.
    pub leader: u64,
    /// How long it has been a learner.
    pub age: Duration,
    /// How long its `applied` has not moved.
    pub still: Duration,
}

/// What to do about a learner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may vote.
    Promote,
    /// It is catching up.
    Wait,
    /// It has stalled: remove it, so that others can join.
    Remove,
}

/// A learner may vote when it has nine tenths of the log, as etcd itself demands.
pub fn judge(progress: Progress, patience: Duration) -> Verdict {
    if progress.applied > 0 && progress.applied * 10 >= progress.leader * 9 {
        Verdict::Promote
    } else if progress.still >= patience {
        Verdict::Remove
    } else {
        Verdict::Wait
    }
}

/// A warning about a number of voters that helps nobody.
pub fn advice(voters: usize) -> Option<Advice> {
    (voters > 1 && voters.is_multiple_of(2)).then_some(Advice { voters })
}

/// An even number of voters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advice {
    voters: usize,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.voters;
        let lost = n - quorum(n);
        write!(
            f,
            "{n} voting members: {} must work, so {} may be lost, no more than with {}; use {}",
            quorum(n),
            match lost {
                0 => "none".to_owned(),
                lost => lost.to_string(),
            },
            n - 1,
            n + 1
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a+ b- c~`: healthy, dead, learner.
    fn members(text: &str) -> Vec<Member> {
        let member = |(i, word): (usize, &str)| Member {
            id: 10 + i as u64,
            name: word[..1].replace('_', ""),
            learner: word.contains('~'),
            healthy: word.contains('+'),
        };
        text.split_whitespace().enumerate().map(member).collect()
    }

    #[test]
    fn removing() {
        let check = |text: &str, name: &str, expect: &str| {
            let answer = may_remove(&members(text), name).map(|m| m.name.clone()).unwrap_or_else(|e| e.to_string());
            assert_eq!(answer, expect, "{text}, {name}");
        };
        check("a+ b+ c+", "a", "a");
        check("a+ b+ c-", "c", "c");
        check(
            "a+ b+ c-",
            "a",
            "removing a would leave 2 voting members, of which 1 works, and 2 are needed: \
             bring a stopped member back first",
        );
        check("a+ b-", "b", "b");
        check(
            "a+ b-",
            "a",
            "removing a would leave 1 voting member, of which 0 work, and 1 are needed: \
             bring a stopped member back first",
        );
        check("a+", "a", "a is the last voting member: without it there is no cluster");
        check("a+ b~", "b", "b");
        check("a+ b+", "x", "there is no member x; the members are: a, b");
        check("a+ b+ c+", "b", "b");
        check("a+ b+ c+", "c", "c");
    }

    #[test]
    fn joining() {
        let check = |text: &str, name: &str, same: bool, expect: &str| {
            let members = members(text);
            let answer = match may_join(&members, name, same) {
                Ok(stale) => stale.iter().map(|m| format!("{:x} ", m.id)).collect(),
                Err(error) => error.to_string(),
            };
            assert_eq!(answer, expect, "{text}, {name}");
        };
        check("a+", "b", false, "");
        check("a+ b~", "c", false, "b is still joining: wait until it has been promoted, or remove it");
        // Its own earlier attempt, before and after it had started once.
        check("a+ b~", "b", false, "b ");
        check("a+ _~", "b", true, "b ");
        check("a+ _~", "b", false, "b is still joining: wait until it has been promoted, or remove it");
        // A machine that lost its disk.
        check("a+ b+ c-", "c", false, "c ");
        check(
            "a+ b+ c+",
            "c",
            false,
            "there is a member c already: remove it first if its machine is lost (seawall member remove c)",
        );
        check(
            "a+ b- c-",
            "d",
            false,
            "a join of d now would leave 3 voting members, of which 1 works, and 2 are needed: \
             a change of members needs a working majority",
        );
    }

    #[test]
    fn learners() {
        let patience = Duration::from_secs(60);
        let judge = |applied, leader, still| {
            let still = Duration::from_secs(still);
            judge(Progress { applied, leader, age: still, still }, patience)
        };
        assert_eq!(judge(95, 100, 0), Verdict::Promote);
        assert_eq!(judge(50, 100, 0), Verdict::Wait);
        assert_eq!(judge(50, 100, 60), Verdict::Remove);
        assert_eq!(judge(0, 0, 10), Verdict::Wait);
        assert_eq!(judge(0, 100, 61), Verdict::Remove);
    }

    #[test]
    fn even_numbers_are_advised_against() {
        assert_eq!(advice(1), None);
        assert_eq!(advice(3), None);
        let text = advice(2).expect("two voters").to_string();
        assert_eq!(text, "2 voting members: 2 must work, so none may be lost, no more than with 1; use 3");
        assert!(advice(4).is_some());
    }

    proptest::proptest! {
        /// Whatever is allowed leaves a working majority.
        #[test]
        fn no_allowed_removal_loses_the_quorum(states in proptest::collection::vec(0..3u8, 1..8), pick in 0..8usize) {
            let members: Vec<Member> = states.iter().enumerate().map(|(i, s)| Member {
                id: i as u64, name: format!("m{i}"), learner: *s == 2, healthy: *s == 0,
            }).collect();
            let name = format!("m{}", pick % members.len());
            if let Ok(gone) = may_remove(&members, &name) {
                let left: Vec<_> = members.iter().filter(|m| m.id != gone.id && !m.learner).collect();
                let healthy = left.iter().filter(|m| m.healthy).count();
                proptest::prop_assert!(gone.learner || healthy * 2 > left.len());
            }
        }
    }
}
