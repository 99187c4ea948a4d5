use super::*;
use crate::gossip::{
    id::LEFT,
    word::{SIZE, Said},
};
use seawall_quorum::timing::{Profile, Timing};

const OWN: Key = Key(1);
const OTHER: Key = Key(2);
const START: Duration = Duration::from_secs(100);

fn life(key: Key, born: u64) -> Id {
    Id { key, born }
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// One that knows five others, who live.
fn core(born: u64) -> Core {
    let roster: BTreeSet<Key> = (1..7).map(Key).collect();
    let mut core = Core::new(OWN, born, Times::of(&Timing::of(Profile::Fast)), 7);
    core.step(START, Event::Roster(&roster));
    core.assume(START, roster.iter().map(|key| life(*key, 1000)));
    core.step(START, Event::Tick);
    core
}

fn suspect(core: &mut Core, now: Duration, key: Key) {
    let suspicion = Member::new(life(key, 1000), 0, foca::State::Suspect);
    core.swim(now, |swim, wishes| swim.apply_many(std::iter::once(suspicion), true, wishes));
    core.refresh(now, key);
}

/// Somebody's word reaches us, in a packet.
fn hear(core: &mut Core, now: Duration, word: &Word) -> Effects {
    let mut tail = (SIZE as u16).to_be_bytes().to_vec();
    tail.extend(word.write());
    let header = foca::Header {
        src: life(Key(3), 1000),
        src_incarnation: 0,
        dst: *core.swim.identity(),
        message: foca::Message::Gossip,
    };
    let data = super::super::wire::Packet { header, updates: Vec::new(), tail: &tail }.write();
    core.step(now, Event::Packet { from: Key(3), data: &data })
}

fn word(said: Said, born: u64, by: Key, count: u64) -> Word {
    Word { said, about: life(OTHER, born), incarnation: 0, by, count }
}

#[test]
fn a_suspects_kernel_is_asked_in_one_chain() {
    let chains = |core: &Core| {
        let feels = core.timers.iter().filter(|timer| matches!(timer.0.what, What::Feel(OTHER)));
        feels.count()
    };
    let mut core = core(1000);
    suspect(&mut core, START, OTHER);
    for n in 0..5 {
        core.testify(START + ms(n), life(OTHER, 1000), 0);
    }
    assert_eq!(chains(&core), 1);
    // It objects, and is suspected again before the chain has noticed.
    let alive = Member::new(life(OTHER, 1000), 1, foca::State::Alive);
    core.swim(START + ms(20), |swim, wishes| swim.apply_many(std::iter::once(alive), true, wishes));
    let suspicion = Member::new(life(OTHER, 1000), 1, foca::State::Suspect);
    core.swim(START + ms(30), |swim, wishes| swim.apply_many(std::iter::once(suspicion), true, wishes));
    core.refresh(START + ms(30), OTHER);
    core.testify(START + ms(30), life(OTHER, 1000), 1);
    assert_eq!(chains(&core), 1);
    // While it is suspected the chain goes on, and then it ends.
    core.due(START + ms(400), START + ms(400), What::Feel(OTHER));
    assert!(core.feeling.contains(&OTHER));
    core.records.clear();
    core.due(START + ms(800), START + ms(800), What::Feel(OTHER));
    assert!(core.feeling.is_empty());
}

#[test]
fn some_accusers_are_enough() {
    let mut core = core(1000);
    suspect(&mut core, START, OTHER);
    let accusers = |core: &mut Core, count: u64| {
        core.records.get_mut(&OTHER).unwrap().accusers = (10..10 + count).map(Key).collect();
    };
    accusers(&mut core, 3);
    core.testify(START, life(OTHER, 1000), 0);
    assert_eq!((core.counters.accusations, core.spoken), (0, 1000));
    // Another incarnation is another matter.
    core.testify(START, life(OTHER, 1000), 1);
    assert_eq!(core.counters.accusations, 1);
    accusers(&mut core, 2);
    core.testify(START, life(OTHER, 1000), 0);
    assert_eq!(core.counters.accusations, 2);
}

#[test]
fn an_absence_is_told_once_while_it_holds() {
    let mut core = core(1000);
    let check = |core: &mut Core, at: u64, words: u64| {
        let effects = core.step(START + ms(at), Event::Refused(OTHER));
        assert_eq!(core.spoken - 1000, words, "after {at} ms");
        effects.changed
    };
    // It holds for three seconds, and is told anew in the second half of them.
    assert_eq!(check(&mut core, 0, 1), [(OTHER, None)]);
    check(&mut core, 100, 1);
    check(&mut core, 1400, 1);
    check(&mut core, 1600, 2);
    check(&mut core, 3000, 2);
    // Another member says it: that is enough.
    core.heard(START + ms(3100), OTHER, true);
    hear(&mut core, START + ms(5000), &word(Said::Absent, 1000, Key(4), 7));
    assert!(core.absent.contains_key(&OTHER));
    check(&mut core, 5100, 2);
    // One who has left has said so itself.
    let left = Member::new(life(OTHER, 1000), LEFT, foca::State::Down);
    core.absent.clear();
    core.swim(START + ms(5200), |swim, wishes| swim.apply_many(std::iter::once(left), true, wishes));
    core.settle(START + ms(5200));
    check(&mut core, 5300, 2);
    hear(&mut core, START + ms(5400), &word(Said::Absent, 1000, Key(4), 8));
    assert!(!core.absent.contains_key(&OTHER));
}

#[test]
fn one_that_was_dead_and_is_absent_stays_so_until_it_is_asked_again() {
    let mut core = core(1000);
    let down = Member::new(life(OTHER, 1000), 0, foca::State::Down);
    core.swim(START, |swim, wishes| swim.apply_many(std::iter::once(down), true, wishes));
    core.settle(START);
    assert_eq!(core.contacts[&OTHER].shown, Some(Verdict::Dead));
    core.step(START + ms(10), Event::Refused(OTHER));
    assert_eq!(core.contacts[&OTHER].shown, None);
    let longest = core.times.probe_interval * SEARCH_SELDOM * 5 / 4;
    assert!(core.absent[&OTHER] > START + longest * 2, "it is looked for every {longest:?}");
}

#[test]
fn a_new_life_begins_without_what_was_found_out_about_the_former() {
    let mut core = core(1000);
    core.step(START, Event::Pulse(OTHER));
    core.step(START, Event::Refused(OTHER));
    assert!(core.absent.contains_key(&OTHER) && core.pulses.contains_key(&OTHER) && core.felt.contains_key(&OTHER));
    core.assume(START, std::iter::once(life(OTHER, 2000)));
    core.settle(START);
    assert!(!core.absent.contains_key(&OTHER) && !core.pulses.contains_key(&OTHER) && !core.felt.contains_key(&OTHER));
    assert_eq!(core.contacts[&OTHER].shown, Some(Verdict::Alive));
    // Nor does it matter what is said of the former one later.
    hear(&mut core, START + ms(2000), &word(Said::Absent, 1000, Key(4), 1));
    hear(&mut core, START + ms(2000), &word(Said::Pulse, 1000, Key(4), 1));
    assert!(!core.absent.contains_key(&OTHER) && !core.pulses.contains_key(&OTHER));
    hear(&mut core, START + ms(2000), &word(Said::Absent, 2000, Key(4), 2));
    assert!(core.absent.contains_key(&OTHER));
}

#[test]
fn who_was_restarted_is_heard_again() {
    let mut core = core(1000);
    let times = [1007, 5000, 1008, 5001].map(|count| {
        core.pulses.clear();
        hear(&mut core, START, &word(Said::Pulse, 1000, Key(4), count));
        core.pulses.contains_key(&OTHER)
    });
    assert_eq!(times, [true, true, false, true]);
    assert!(Core::new(OWN, 5000, core.times, 1).spoken > 1008);
}

#[test]
fn whoever_was_away_objects_before_it_hears_of_a_suspicion() {
    let mut core = core(1000);
    let incarnation = |effects: &Effects| {
        let headers = effects.packets.iter().filter_map(|(_, data)| super::super::wire::Packet::header(data).ok());
        headers.map(|header| header.src_incarnation).max()
    };
    core.step(START + ms(50), Event::Tick);
    let effects = core.step(START + ms(1050), Event::Tick);
    assert_eq!(incarnation(&effects), Some(1));
    // Who was away for no longer than any machine is says nothing.
    let effects = core.step(START + ms(1210), Event::Tick);
    assert_eq!(incarnation(&effects), Some(1));
}

#[test]
fn nobody_is_buried_before_its_kernel_was_asked_by_us() {
    // Three say that it is silent, and no word of its kernel reaches us.
    let run = |answers: bool| {
        let mut core = core(1000);
        core.health = Health::default();
        suspect(&mut core, START, OTHER);
        core.records.get_mut(&OTHER).unwrap().accusers = (4..7).map(Key).collect();
        let (mut asked, mut last) = (0, None);
        for at in (0..1000).step_by(10) {
            let now = START + ms(at);
            // The others are there.
            for key in 3..7 {
                core.heard(now, Key(key), false);
            }
            core.touched.insert(OTHER);
            let effects = core.step(now, Event::Refused(Key(99)));
            asked += effects.pulses.iter().filter(|key| **key == OTHER).count();
            if answers && !effects.pulses.is_empty() {
                core.step(now + ms(1), Event::Pulse(OTHER));
            }
            last = core.contacts[&OTHER].shown;
        }
        (asked, last)
    };
    let (asked, last) = run(false);
    assert!(asked >= 3 && last == Some(Verdict::Dead), "{asked} {last:?}");
    let (asked, last) = run(true);
    assert!((1..6).contains(&asked) && last == Some(Verdict::Suspect), "{asked} {last:?}");
}
