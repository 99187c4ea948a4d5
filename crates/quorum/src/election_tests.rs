use super::*;
use crate::timing::Profile;

const FAST: Timing = Timing::of(Profile::Fast);

fn ms(n: u64) -> Instant {
    Duration::from_millis(n)
}

fn record(holder: &str, version: u64) -> Option<Record> {
    Some(Record { holder: holder.into(), version, transitions: 3, duration: FAST.lease_duration })
}

/// Steps a candidate called `me` through a transcript.
#[track_caller]
fn check(elector: &mut Elector, script: &[(u64, Event, &[Effect])]) {
    for (at, event, effects) in script {
        assert_eq!(&elector.step(ms(*at), event.clone()), effects, "at {at} ms, {event:?}");
    }
}

fn leader() -> Elector {
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Tick, &[Effect::Read]),
            (5, Event::Read(None), &[Effect::Create { transitions: 0, duration: FAST.lease_duration }]),
            (10, Event::Created { version: 7 }, &[Effect::Lead(Term(7))]),
        ],
    );
    elector
}

#[test]
fn the_first_candidate_leads_at_once_and_renews() {
    let mut elector = leader();
    assert_eq!(elector.term(), Some(Term(7)));
    check(
        &mut elector,
        &[
            (200, Event::Tick, &[]),
            (260, Event::Tick, &[Effect::Renew { version: 7, duration: FAST.lease_duration }]),
            (270, Event::Tick, &[]),
            (280, Event::Renewed { version: 9 }, &[]),
            (500, Event::Tick, &[]),
            (510, Event::Tick, &[Effect::Renew { version: 9, duration: FAST.lease_duration }]),
        ],
    );
}

#[test]
fn a_leader_whose_machine_is_dead_is_deposed_as_soon_as_it_has_missed_a_renewal() {
    let gone = || Event::Gone("other".into());
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Seen(record("other", 5)), &[]),
            (200, gone(), &[]),
            // It renews: whoever says that it is dead is mistaken.
            (250, Event::Seen(record("other", 6)), &[]),
            (300, gone(), &[]),
            (600, gone(), &[]),
            (630, Event::Seen(record("other", 6)), &[Effect::Read]),
            (640, Event::Read(record("other", 6)), &[Effect::Delete { version: 6 }]),
            (650, Event::Deleted, &[Effect::Create { transitions: 4, duration: FAST.lease_duration }]),
            (660, Event::Created { version: 12 }, &[Effect::Lead(Term(12))]),
        ],
    );
    // The read shows a renewal that the cache had not seen.
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Seen(record("other", 5)), &[]),
            (400, gone(), &[Effect::Read]),
            (410, Event::Read(record("other", 8)), &[]),
            (500, gone(), &[]),
            // The word is about somebody else.
            (900, Event::Gone("third".into()), &[Effect::Read]),
        ],
    );
}

#[test]
fn a_silent_leader_is_deposed_after_its_duration_and_two_reads() {
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Seen(record("other", 5)), &[]),
            (700, Event::Seen(record("other", 5)), &[]),
            (750, Event::Seen(record("other", 5)), &[Effect::Read]),
            (760, Event::Read(record("other", 5)), &[]),
            (1000, Event::Tick, &[]),
            (1010, Event::Tick, &[Effect::Read]),
            (1020, Event::Read(record("other", 5)), &[Effect::Delete { version: 5 }]),
            (1030, Event::Deleted, &[Effect::Create { transitions: 4, duration: FAST.lease_duration }]),
            (1040, Event::Created { version: 12 }, &[Effect::Lead(Term(12))]),
        ],
    );
}

#[test]
fn a_leader_that_renewed_unseen_is_left_alone() {
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Seen(record("other", 5)), &[]),
            (760, Event::Tick, &[Effect::Read]),
            // Our cache was behind.
            (770, Event::Read(record("other", 8)), &[]),
            (1100, Event::Seen(record("other", 5)), &[]),
            (1769, Event::Tick, &[]),
            (1770, Event::Tick, &[Effect::Read]),
        ],
    );
}

#[test]
fn silence_does_not_count_while_the_store_does_not_answer() {
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Seen(record("other", 5)), &[]),
            (750, Event::Tick, &[Effect::Read]),
            (1500, Event::Failed, &[]),
            (1550, Event::Tick, &[Effect::Read]),
            // The store is back. Now the leader has its chance.
            (2000, Event::Read(record("other", 5)), &[]),
            (2249, Event::Tick, &[]),
            (2250, Event::Tick, &[Effect::Read]),
            (2260, Event::Read(record("other", 6)), &[]),
            (2300, Event::Tick, &[]),
        ],
    );
}

#[test]
fn a_released_lease_is_taken_at_once() {
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Seen(record("other", 5)), &[]),
            (50, Event::Seen(record("", 6)), &[Effect::Read]),
            (60, Event::Read(record("", 6)), &[Effect::Delete { version: 6 }]),
            (70, Event::Deleted, &[Effect::Create { transitions: 4, duration: FAST.lease_duration }]),
        ],
    );
}

#[test]
fn who_comes_second_follows() {
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Tick, &[Effect::Read]),
            (5, Event::Read(None), &[Effect::Create { transitions: 0, duration: FAST.lease_duration }]),
            (10, Event::Refused, &[]),
            (20, Event::Tick, &[]),
            (70, Event::Seen(record("other", 5)), &[]),
        ],
    );
    assert_eq!(elector.term(), None);
}

#[test]
fn a_leader_that_cannot_renew_stops_before_another_may_start() {
    let mut elector = leader();
    check(
        &mut elector,
        &[
            (260, Event::Tick, &[Effect::Renew { version: 7, duration: FAST.lease_duration }]),
            (400, Event::Failed, &[]),
            (450, Event::Tick, &[Effect::Renew { version: 7, duration: FAST.lease_duration }]),
            (759, Event::Tick, &[]),
            (760, Event::Tick, &[Effect::Follow]),
        ],
    );
    assert_eq!(elector.term(), None);
}

#[test]
fn a_leader_that_slept_follows_before_it_does_anything_else() {
    let mut elector = leader();
    check(&mut elector, &[(60_000, Event::Tick, &[Effect::Follow])]);
}

#[test]
fn a_renewal_whose_answer_was_lost_does_not_end_the_term() {
    let mut elector = leader();
    check(
        &mut elector,
        &[
            (260, Event::Tick, &[Effect::Renew { version: 7, duration: FAST.lease_duration }]),
            (400, Event::Failed, &[]),
            (450, Event::Tick, &[Effect::Renew { version: 7, duration: FAST.lease_duration }]),
            // It had succeeded.
            (460, Event::Refused, &[Effect::Read]),
            (470, Event::Read(record("me", 9)), &[Effect::Renew { version: 9, duration: FAST.lease_duration }]),
            (480, Event::Renewed { version: 10 }, &[]),
        ],
    );
    assert_eq!(elector.term(), Some(Term(7)));
}

#[test]
fn a_deposed_leader_follows() {
    let mut elector = leader();
    check(
        &mut elector,
        &[
            (260, Event::Tick, &[Effect::Renew { version: 7, duration: FAST.lease_duration }]),
            (270, Event::Refused, &[Effect::Follow]),
            (330, Event::Tick, &[Effect::Read]),
            (340, Event::Read(record("other", 20)), &[]),
        ],
    );
}

#[test]
fn a_lease_of_our_own_that_we_do_not_know_of_is_made_anew() {
    let mut elector = Elector::new("me", FAST);
    check(
        &mut elector,
        &[
            (0, Event::Tick, &[Effect::Read]),
            (5, Event::Read(None), &[Effect::Create { transitions: 0, duration: FAST.lease_duration }]),
            (700, Event::Failed, &[]),
            (800, Event::Tick, &[Effect::Read]),
            (810, Event::Read(record("me", 8)), &[Effect::Delete { version: 8 }]),
        ],
    );
}

#[test]
fn resigning_lets_go_of_the_lease_and_is_final() {
    let mut elector = leader();
    check(
        &mut elector,
        &[
            (100, Event::Resign, &[Effect::Follow, Effect::Release { version: 7 }]),
            (150, Event::Seen(record("", 8)), &[]),
            (5000, Event::Tick, &[]),
        ],
    );
}

#[test]
fn where_the_store_is_slow_leases_last_longer() {
    let mut elector = leader();
    let mut now = 260;
    elector.step(ms(now), Event::Tick);
    for version in 10..20 {
        now += 400;
        let effects = elector.step(ms(now), Event::Renewed { version });
        assert!(matches!(effects[..], [Effect::Renew { .. }]), "at {now} ms: {effects:?}");
    }
    assert_eq!(elector.duration(), ms(2000));
    // Nothing is lost yet after the time that would have been too long at first.
    assert_eq!(elector.term(), Some(Term(7)));
    assert_eq!(elector.step(ms(now + 900), Event::Tick), []);
    // It is faster again: after a while so are the Leases.
    elector.step(ms(now + 901), Event::Renewed { version: 20 });
    now += 901;
    for version in 21..40 {
        elector.step(ms(now + 5), Event::Renewed { version });
        now += 260;
        elector.step(ms(now), Event::Tick);
    }
    assert_eq!(elector.duration(), FAST.lease_duration);
}

#[test]
fn one_slow_answer_changes_nothing() {
    let mut elector = leader();
    for (i, took) in [5, 5, 5, 5, 700, 5].into_iter().enumerate() {
        let now = 300 + i as u64 * 1000;
        elector.step(ms(now), Event::Tick);
        elector.step(ms(now + took), Event::Renewed { version: 10 + i as u64 });
        if elector.term().is_none() {
            break;
        }
    }
    assert_eq!(elector.duration(), FAST.lease_duration);
}

#[test]
fn a_leader_that_asks_for_more_time_gets_it() {
    let mut elector = Elector::new("me", FAST);
    let slow = Some(Record { holder: "other".into(), version: 5, transitions: 3, duration: ms(4000) });
    check(
        &mut elector,
        &[
            (0, Event::Seen(slow.clone()), &[]),
            (2900, Event::Tick, &[]),
            (3000, Event::Tick, &[Effect::Read]),
            (3010, Event::Read(slow.clone()), &[]),
            (4010, Event::Tick, &[Effect::Read]),
            (4020, Event::Read(slow), &[Effect::Delete { version: 5 }]),
        ],
    );
}
