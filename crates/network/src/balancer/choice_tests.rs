use proptest::prelude::*;

use super::choice::*;
use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 6443))
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn settings(local: Option<u8>) -> Settings {
    Settings { node: "node-1".into(), local: local.map(at), misses: 2, settle: ms(1000), interval: ms(100) }
}

fn choice(local: Option<u8>, servers: &[u8]) -> Choice {
    let mut choice = Choice::new(settings(local));
    choice.step(ms(0), Event::Listed(servers.iter().copied().map(at).collect()));
    choice
}

fn tell(choice: &mut Choice, now: u64, server: u8, answer: Answer) -> Vec<Effect> {
    choice.step(ms(now), Event::Answered { server: at(server), asked: ms(now), answer })
}

/// A transcript: at a time, a server gives an answer (or a list comes); then the first choice.
#[track_caller]
fn check(local: Option<u8>, transcript: &[(u64, u8, Answer, u8)]) {
    let mut choice = choice(local, &[1, 2, 3]);
    for (line, (now, server, answer, first)) in transcript.iter().enumerate() {
        tell(&mut choice, *now, *server, *answer);
        assert_eq!(choice.order(ms(*now))[0], at(*first), "line {line}: {:?}", choice.order(ms(*now)));
    }
}

use Answer::{Ready, Refused, Silent, Unready};

#[test]
fn the_near_one_first() {
    check(
        Some(2),
        &[
            // Unknown ones are tried by preference; one that is known to serve comes before them.
            (0, 3, Ready, 3),
            (1, 1, Ready, 1),
            (2, 2, Ready, 2),
            // One miss sends new connections elsewhere, the next answer brings them back.
            (100, 2, Silent, 1),
            (200, 2, Ready, 2),
            // It shuts down: others from now on.
            (300, 2, Unready, 1),
            (400, 1, Unready, 3),
            // It is back, but others are used until it has proved itself.
            (500, 2, Ready, 3),
            (1499, 3, Ready, 3),
            (1500, 3, Ready, 2),
            // Nobody listens there.
            (1600, 2, Refused, 3),
            // None is ready: one that lives is better than one that does not.
            (1700, 3, Refused, 1),
            (1800, 2, Silent, 1),
            // One that has just come back is better than any that is not ready.
            (1900, 2, Ready, 2),
        ],
    );
}

#[test]
fn death_closes_once() {
    let mut choice = choice(None, &[1, 2]);
    assert_eq!(tell(&mut choice, 0, 1, Ready).len(), 1);
    assert_eq!(tell(&mut choice, 100, 1, Silent), []);
    let dead = tell(&mut choice, 200, 1, Silent);
    assert_eq!(dead[0], Effect::Turned { server: at(1), from: Health::Ready, to: Health::Dead });
    assert_eq!(dead[1..], [Effect::Close(at(1))]);
    assert_eq!(tell(&mut choice, 300, 1, Silent), []);
    assert_eq!(tell(&mut choice, 400, 1, Refused), []);
    // Unready is not dead: what is open stays.
    tell(&mut choice, 500, 1, Ready);
    assert!(!tell(&mut choice, 600, 1, Unready).contains(&Effect::Close(at(1))));
    assert_eq!(tell(&mut choice, 700, 1, Refused).last(), Some(&Effect::Close(at(1))));
}

#[test]
fn the_only_server_is_given_time() {
    let close = Effect::Close(at(1));
    let mut choice = choice(None, &[1]);
    tell(&mut choice, 0, 1, Ready);
    let hiccup = |choice: &mut Choice, from: u64, to: u64| -> Vec<u64> {
        (from..to).step_by(100).filter(|now| tell(choice, *now, 1, Silent).contains(&close)).collect()
    };
    assert!(hiccup(&mut choice, 100, 2000).is_empty(), "busy");
    assert_eq!(tell(&mut choice, 2000, 1, Ready).len(), 1, "nothing was closed, and nothing is");
    assert_eq!(hiccup(&mut choice, 2100, 9000), [4200u64], "it was silent for two seconds, and that is said once");
    // Nobody listens there: what is open leads nowhere.
    tell(&mut choice, 9000, 1, Ready);
    assert_eq!(tell(&mut choice, 9100, 1, Refused).last(), Some(&close));
    // Busy, and then it has ended.
    tell(&mut choice, 9200, 1, Ready);
    assert!(hiccup(&mut choice, 9300, 9700).is_empty());
    assert_eq!(tell(&mut choice, 9700, 1, Refused), [close]);
}

#[test]
fn answers_overtake_each_other() {
    let mut choice = choice(None, &[1]);
    let mut say =
        |now, asked, answer| choice.step(ms(now), Event::Answered { server: at(1), asked: ms(asked), answer }).len();
    assert_eq!(say(120, 100, Ready), 1);
    assert_eq!(say(150, 50, Refused), 0, "it was asked before");
    assert_eq!(say(250, 0, Silent), 0);
    assert_eq!(say(400, 200, Silent), 0);
    assert_eq!(say(410, 300, Ready), 0, "the next one was answered");
    assert_eq!(say(500, 250, Silent), 0, "and this one had been asked before");
    assert_eq!(say(600, 400, Silent), 0);
    assert_eq!(say(700, 500, Silent), 1);
}

#[test]
fn nodes_share_the_servers() {
    let mut count = [0; 3];
    for node in 0..300 {
        let mut choice = Choice::new(Settings { node: format!("node-{node}"), ..settings(None) });
        choice.step(ms(0), Event::Listed(vec![at(1), at(2), at(3)]));
        let order = choice.order(ms(0));
        let first = [at(1), at(2), at(3)].iter().position(|s| *s == order[0]).unwrap();
        count[first] += 1;
        // The loss of the first leaves the order of the others.
        tell(&mut choice, 1, 3, Ready);
        tell(&mut choice, 1, 2, Ready);
        tell(&mut choice, 1, 1, Ready);
        for (server, _, _) in choice.clone().servers() {
            let mut without = choice.clone();
            without.step(ms(2), Event::Answered { server, asked: ms(2), answer: Refused });
            let rest: Vec<_> = order.iter().filter(|s| **s != server).collect();
            assert_eq!(without.order(ms(2)).iter().filter(|s| **s != server).collect::<Vec<_>>(), rest);
        }
    }
    assert!(count.iter().all(|n| *n > 70), "{count:?}");
}

#[test]
fn who_left_the_list_is_a_last_resort() {
    let mut choice = choice(None, &[1, 2, 3]);
    for server in [1, 2, 3] {
        tell(&mut choice, 0, server, Ready);
    }
    let first = choice.order(ms(1))[0];
    let rest: Vec<_> = [at(1), at(2), at(3)].into_iter().filter(|s| *s != first).collect();
    choice.step(ms(10), Event::Listed(rest.clone()));
    assert_eq!(choice.order(ms(11))[2], first, "it is ready, but no server of the cluster");
    for server in &rest {
        choice.step(ms(20), Event::Answered { server: *server, asked: ms(20), answer: Refused });
    }
    assert_eq!(choice.order(ms(21))[0], first, "better than none");
    choice.step(ms(30), Event::Listed(vec![]));
    assert_eq!(choice.servers().count(), 3, "an empty list says nothing");
    // Only so many are remembered, the ones that left last.
    for n in 10..40 {
        choice.step(ms(40), Event::Listed(vec![at(n)]));
    }
    assert_eq!(choice.servers().count(), FORMER + 1);
    assert!(choice.servers().any(|(s, ..)| s == at(38)) && choice.servers().all(|(s, ..)| s != at(1)));
}

#[test]
fn dead_ones_are_asked_less() {
    let mut choice = choice(None, &[1, 2]);
    tell(&mut choice, 0, 1, Refused);
    assert_eq!(choice.interval(ms(5000), at(1)), Some(ms(100)));
    assert_eq!(choice.interval(ms(20_000), at(1)), Some(ms(300)));
    choice.step(ms(20_000), Event::Listed(vec![at(2)]));
    assert_eq!(choice.interval(ms(20_000), at(1)), Some(ms(3000)));
    assert_eq!(choice.interval(ms(20_000), at(9)), None);
    // And forgotten after a day.
    choice.step(ms(90_000_000), Event::Listed(vec![at(2)]));
    assert_eq!(choice.interval(ms(90_000_000), at(1)), None);
}

#[derive(Clone, Debug)]
enum Input {
    List(Vec<u8>),
    Answer(u8, u64, Answer),
}

fn inputs() -> impl Strategy<Value = Vec<(u64, Input)>> {
    let answer = prop_oneof![Just(Ready), Just(Unready), Just(Refused), Just(Silent)];
    let input = prop_oneof![
        1 => proptest::collection::vec(1..8u8, 0..5).prop_map(Input::List),
        8 => (1..8u8, 0..300u64, answer).prop_map(|(server, late, answer)| Input::Answer(server, late, answer)),
    ];
    proptest::collection::vec((0..400u64, input), 1..80)
}

proptest! {
    #[test]
    fn whatever_happens(inputs in inputs(), local in proptest::option::of(1..8u8)) {
        let mut choice = choice(local, &[1, 2, 3]);
        let mut now = 0;
        for (pause, input) in inputs {
            now += pause;
            let before: Vec<_> = choice.servers().collect();
            let order = choice.order(ms(now));
            let event = match &input {
                Input::List(list) => Event::Listed(list.iter().copied().map(at).collect()),
                Input::Answer(server, late, answer) => {
                    Event::Answered { server: at(*server), asked: ms(now.saturating_sub(*late)), answer: *answer }
                }
            };
            let effects = choice.step(ms(now), event);
            let after: Vec<_> = choice.servers().collect();
            // Nobody is lost or doubled, and there is always somebody to try.
            let known: BTreeSet<_> = after.iter().map(|(s, ..)| *s).collect();
            let next = choice.order(ms(now));
            prop_assert_eq!(next.iter().copied().collect::<BTreeSet<_>>(), known);
            prop_assert_eq!(next.len(), after.len());
            prop_assert!(!next.is_empty() && after.len() <= FORMER + 7);
            // One that is ready goes before one that is not.
            let health = |s: &SocketAddr| after.iter().find(|(a, ..)| a == s).unwrap().1;
            let ready = next.iter().take_while(|s| health(s) == Health::Ready).count();
            prop_assert!(next[ready..].iter().all(|s| health(s) != Health::Ready));
            // Connections are closed when their server dies.
            for (server, was, _) in &before {
                let died = *was != Health::Dead && after.iter().any(|(s, is, _)| s == server && *is == Health::Dead);
                let closed = effects.contains(&Effect::Close(*server));
                // The only one is perhaps just busy.
                let alone = after.iter().all(|(s, is, _)| s == server || *is == Health::Dead);
                prop_assert!(closed || !died || alone);
                // Else only if it lives and does not serve, and another one does.
                let ready = choice.servers().any(|(a, health, _)| a == *server && health == Health::Ready);
                let dead = after.iter().any(|(s, is, _)| s == server && *is == Health::Dead);
                prop_assert!(!closed || died || dead || (!ready && choice.any_ready()));
            }
            // Where nothing changes, nothing moves.
            if effects.is_empty() && before == after && !matches!(input, Input::Answer(..)) {
                prop_assert_eq!(order, next);
            }
        }
    }
}

#[test]
fn who_is_stuck_on_a_server_without_a_store_is_freed_once() {
    let close = |effects: Vec<Effect>| effects.contains(&Effect::Close(at(2)));
    let mut choice = choice(Some(2), &[1, 2, 3]);
    for server in [1, 2, 3] {
        tell(&mut choice, 0, server, Ready);
    }
    assert!(!close(tell(&mut choice, 1000, 2, Unready)));
    assert!(!close(tell(&mut choice, 2900, 2, Unready)), "too early: it may be shutting down in order");
    assert!(close(tell(&mut choice, 3000, 2, Unready)));
    assert!(!close(tell(&mut choice, 3100, 2, Unready)), "what came since knows what it does");
    tell(&mut choice, 4000, 2, Ready);
    tell(&mut choice, 5000, 2, Unready);
    assert!(close(tell(&mut choice, 7000, 2, Unready)), "every time anew");
}

#[test]
fn without_another_server_nobody_is_sent_away() {
    let mut choice = choice(None, &[1, 2]);
    for now in (0..60).map(|n| n * 100) {
        for server in [1, 2] {
            let effects = tell(&mut choice, now, server, Unready);
            assert!(!effects.contains(&Effect::Close(at(server))), "at {now}");
        }
    }
}

#[test]
fn who_went_to_a_frozen_server_for_want_of_a_better_one_is_freed() {
    let mut choice = choice(None, &[1, 2]);
    for (server, answer) in [(1, Silent), (1, Silent), (2, Unready)] {
        tell(&mut choice, 100, server, answer);
    }
    let effects = tell(&mut choice, 900, 2, Ready);
    assert!(effects.contains(&Effect::Close(at(1))), "{effects:?}");
    assert!(!effects.contains(&Effect::Close(at(2))), "{effects:?}");
}
