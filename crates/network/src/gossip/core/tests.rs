use super::*;
use crate::gossip::{
    id::LEFT,
    wire::Packet,
    word::{SIZE, Said, Word},
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
    core.apply(now, &[suspicion], true);
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
    core.apply(START + ms(20), &[alive], true);
    let suspicion = Member::new(life(OTHER, 1000), 1, foca::State::Suspect);
    core.apply(START + ms(30), &[suspicion], true);
    core.refresh(START + ms(30), OTHER);
    core.testify(START + ms(30), life(OTHER, 1000), 1);
    assert_eq!(chains(&core), 1);
    // While it is suspected the chain goes on, and then it ends.
    core.due(START + ms(400), START + ms(400), What::Feel(OTHER));
    assert!(core.feeling.contains(&OTHER));
    core.records = Records::default();
    core.due(START + ms(800), START + ms(800), What::Feel(OTHER));
    assert!(core.feeling.is_empty());
}

#[test]
fn some_accusers_are_enough() {
    let mut core = core(1000);
    suspect(&mut core, START, OTHER);
    let accusers = |core: &mut Core, count: u64| {
        core.records.get_mut(OTHER).unwrap().accusers = (10..10 + count).map(Key).collect();
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
    hear(&mut core, START + ms(5000), &word(Said::Absent, 1000, Key(4), 1002));
    assert!(!core.absent.contains_key(&OTHER), "it was told when we last told it");
    hear(&mut core, START + ms(5000), &word(Said::Absent, 1000, Key(4), 1003));
    assert!(core.absent.contains_key(&OTHER));
    check(&mut core, 5100, 2);
    // One who has left has said so itself.
    let left = Member::new(life(OTHER, 1000), LEFT, foca::State::Down);
    core.absent.clear();
    core.apply(START + ms(5200), &[left], true);
    core.settle(START + ms(5200));
    check(&mut core, 5300, 2);
    hear(&mut core, START + ms(5400), &word(Said::Absent, 1000, Key(4), 1004));
    assert!(!core.absent.contains_key(&OTHER));
}

#[test]
fn one_that_was_dead_and_is_absent_stays_so_until_it_is_asked_again() {
    let mut core = core(1000);
    let down = Member::new(life(OTHER, 1000), 0, foca::State::Down);
    core.apply(START, &[down], true);
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
        core.records.get_mut(OTHER).unwrap().accusers = (4..7).map(Key).collect();
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

/// One that knows this many others, who live, and has been there for a while.
fn core_of(members: u64) -> Core {
    let roster: BTreeSet<Key> = (1..=members).map(Key).collect();
    let mut core = Core::new(OWN, 1000, Times::of(&Timing::of(Profile::Fast)), 7);
    core.step(START, Event::Roster(&roster));
    core.assume(START, roster.iter().map(|key| life(*key, 1000)));
    core.step(START, Event::Tick);
    core
}

/// Somebody sends us something.
fn send(core: &mut Core, now: Duration, from: Id, message: foca::Message<Id>, updates: Vec<Member<Id>>) -> Effects {
    let header = foca::Header { src: from, src_incarnation: 0, dst: *core.swim.identity(), message };
    let data = Packet { header, updates, tail: &[] }.write();
    core.step(now, Event::Packet { from: from.key, data: &data })
}

/// How many of these packets are such messages.
fn count(effects: &Effects, such: impl Fn(&foca::Message<Id>) -> bool) -> usize {
    let headers = effects.packets.iter().filter_map(|(_, data)| Packet::header(data).ok());
    headers.filter(|header| such(&header.message)).count()
}

#[test]
fn however_much_happens_at_once_it_is_told_in_few_packets() {
    let mut core = core_of(400);
    let mut packets = 0;
    for key in 100..300 {
        suspect(&mut core, START, Key(key));
        core.accuse(START, life(Key(key), 1000), 0);
        let effects = core.step(START, Event::Pulse(Key(key)));
        packets += count(&effects, |message| *message == foca::Message::Gossip);
        assert!(effects.packets.iter().all(|(_, data)| data.len() <= MOST_BYTES));
    }
    // Each of the 200 is told of it itself.
    let most = 200 + (HASTE as usize + 1) * HELPERS;
    assert!((200..=most).contains(&packets), "{packets}");
}

#[test]
fn what_is_said_of_many_dead_fits_into_a_packet() {
    // Keys lie as far from each other as hashes do.
    let dead: BTreeSet<Key> = (10..50u64).map(|n| Key(n.reverse_bits())).collect();
    let mut core = core_of(6);
    core.step(START, Event::Roster(&dead.iter().copied().chain((1..7).map(Key)).collect()));
    for key in &dead {
        core.apply(START, &[Member::new(life(*key, 1000), 0, foca::State::Down)], false);
        core.refresh(START, *key);
        core.records.get_mut(*key).unwrap().accusers = [Key(3), Key(4), Key(5)].into();
    }
    let mut told = BTreeSet::new();
    for _ in 0..100 {
        core.tell_of_the_dead(life(OTHER, 1000));
        let (to, data) = core.effects.packets.pop().unwrap();
        assert!(to == OTHER && data.len() <= MOST_BYTES, "{}", data.len());
        told.extend(Packet::read(&data).unwrap().updates.iter().map(|update| update.id().key));
    }
    // Not always of the same.
    assert_eq!(told, dead);
}

#[test]
fn a_suspicion_that_was_refuted_long_ago_is_answered_once() {
    let mut core = core(1000);
    let own = *core.swim.identity();
    let suspicion = |incarnation| vec![Member::new(own, incarnation, foca::State::Suspect)];
    let effects = send(&mut core, START, life(OTHER, 1000), foca::Message::Gossip, suspicion(0));
    assert_eq!((core.incarnation, effects.packets.len()), (1, 4));
    let effects = send(&mut core, START, life(OTHER, 1000), foca::Message::Gossip, suspicion(0));
    let [(to, data)] = effects.packets.as_slice() else { panic!("{:?}", effects.packets) };
    assert_eq!((*to, Packet::header(data).unwrap().src_incarnation), (OTHER, 1));
}

#[test]
fn when_all_look_for_one_it_answers_some_and_hears_all() {
    let mut core = core_of(60);
    let announce = |core: &mut Core, now, key| {
        let effects = send(core, now, life(Key(key), 2000), foca::Message::Announce, Vec::new());
        count(&effects, |message| *message == foca::Message::Feed)
    };
    assert_eq!((2..60).map(|key| announce(&mut core, START, key)).sum::<usize>(), ANSWERS);
    assert!((2..60).all(|key| core.find(Key(key)).is_some_and(|member| member.id().born == 2000)));
    let later = START + core.times.probe_interval;
    assert_eq!(announce(&mut core, later, 2), 1);
}

#[test]
fn who_is_missing_does_not_wait_behind_those_who_are_there() {
    let mut core = core_of(2000);
    core.apply(START, &[Member::new(life(OTHER, 1000), 0, foca::State::Down)], false);
    let effects = core.step(START + core.times.probe_interval * 2, Event::Tick);
    assert!(
        effects
            .packets
            .iter()
            .any(|(to, data)| { *to == OTHER && Packet::header(data).unwrap().message == foca::Message::Announce })
    );
}

#[test]
fn one_whose_kernel_answers_is_told_itself_before_it_is_buried() {
    // It has objected, or it has not, and we have heard of nothing.
    let run = |objects: bool, busy: u64| {
        let mut core = core(1000);
        suspect(&mut core, START, OTHER);
        core.records.get_mut(OTHER).unwrap().accusers = (4..7).map(Key).collect();
        let (mut told, mut dead, mut lives) = (0, None, false);
        for at in (0..8000).step_by(10) {
            let now = START + ms(at);
            for key in 3..7 {
                core.heard(now, Key(key), true);
                core.vouch(now, Key(key));
            }
            core.health = Health::default();
            core.felt(now, OTHER);
            // Until then it is not its turn: there are too many.
            if let Some(record) = core.records.get_mut(OTHER).filter(|_| at < busy) {
                record.reminded = (0, now);
            }
            core.step(now, Event::Tick);
            told = core.records.get(OTHER).map_or(told, |record| record.reminded.0);
            if objects && told > 0 {
                let alive = Member::new(life(OTHER, 1000), 1, foca::State::Alive);
                core.apply(now, &[alive], true);
                core.touched.insert(OTHER);
            }
            if core.contacts[&OTHER].shown == Some(Verdict::Dead) {
                dead = dead.or(Some(at));
            }
            lives |= told > 0 && core.contacts[&OTHER].shown == Some(Verdict::Alive);
        }
        (told, dead, lives)
    };
    let (told, dead, _) = run(false, 0);
    assert!(told >= 2 && dead.is_some_and(|at| (4000..4500).contains(&at)), "{told} {dead:?}");
    let (told, dead, _) = run(false, 4200);
    assert!(told >= 2 && dead.is_some_and(|at| at > 4200 + 2000), "{told} {dead:?}");
    let (_, dead, lives) = run(true, 0);
    assert_eq!((dead, lives), (None, true));
}

#[test]
fn a_member_without_news_wakes_for_its_probes_only() {
    let keys = [OWN, OTHER];
    let times = Times::of(&Timing::of(Profile::Fast));
    let mut cores = keys.map(|key| Core::new(key, 1000, times, key.0));
    let mut due = [START; 2];
    // When it arrives, at whom, and what.
    let mut packets: Vec<(Duration, usize, Vec<u8>)> = Vec::new();
    let (settled, end) = (START + ms(5000), START + ms(15_000));
    let mut wakes = 0;
    for (core, due) in cores.iter_mut().zip(&mut due) {
        *due = core.step(START, Event::Roster(&keys.into())).due;
    }
    loop {
        let now = due.iter().chain(packets.iter().map(|(at, ..)| at)).min().copied().unwrap();
        if now > end {
            break;
        }
        let arrives = packets.iter().position(|(at, ..)| *at == now).map(|number| packets.swap_remove(number));
        let (who, effects) = match &arrives {
            Some((_, who, data)) => (*who, cores[*who].step(now, Event::Packet { from: keys[1 - who], data })),
            None => {
                let who = usize::from(due[1] < due[0]);
                wakes += usize::from(now > settled);
                (who, cores[who].step(now, Event::Tick))
            }
        };
        due[who] = effects.due;
        packets.extend(effects.packets.into_iter().map(|(_, data)| (now + ms(1), 1 - who, data)));
    }
    for core in &cores {
        assert_eq!((core.members(), core.counters().gaps), ((1, 0), 0));
    }
    // Each has ten probes a second, and seldom something else.
    assert!((190..230).contains(&wakes), "{wakes}");
}
