use proptest::prelude::*;

use super::{super::settings::Options, *};

/// Nodes at these distances; without any all are as far from each other as the next.
fn machine(rows: &[&[u64]]) -> Nodes {
    Nodes::of(&(0..).zip(rows.iter().copied()).collect::<Vec<_>>())
}

/// Hints in words: masks in binary with `!` if they are preferred, `any` for none; resources apart by a semicolon.
fn hints(text: &str) -> Vec<Vec<Hint>> {
    let hint = |word: &str| {
        let mask = word.trim_end_matches('!');
        let affinity = (mask != "any").then(|| Mask(u64::from_str_radix(mask, 2).unwrap()));
        Hint { affinity, preferred: word.ends_with('!') }
    };
    let resources = text.split(';').map(str::trim).filter(|resource| !resource.is_empty());
    resources.map(|resource| resource.split_whitespace().map(hint).collect()).collect()
}

fn settings(policy: Policy, prefer_closest: bool) -> Settings {
    Settings { policy, options: Options { prefer_closest, ..Default::default() }, ..Default::default() }
}

/// What each policy says: the mask, `any`, or `-` if it refuses.
fn said(nodes: &Nodes, closest: bool, text: &str) -> [String; 3] {
    [Policy::BestEffort, Policy::Restricted, Policy::SingleNumaNode].map(|policy| {
        match decide(&settings(policy, closest), nodes, &hints(text)) {
            Ok(Some(mask)) => format!("{:b}", mask.0),
            Ok(None) => "any".to_owned(),
            Err(Unaligned) => "-".to_owned(),
        }
    })
}

#[test]
fn what_policies_say() {
    let two = machine(&[&[10, 20], &[20, 10]]);
    let check = |text: &str, expect: [&str; 3]| assert_eq!(said(&two, false, text), expect, "{text}");
    // Nobody wants anything of it, or nobody knows where it is.
    check("", ["11", "11", "any"]);
    check("any!", ["11", "11", "any"]);
    check("any! ; any!", ["11", "11", "any"]);
    // It cannot be had from anywhere.
    check("any", ["11", "-", "-"]);
    check("any ; 01! 10! 11", ["1", "-", "-"]);
    // One resource.
    check("01!", ["1", "1", "1"]);
    check("01! 10! 11", ["1", "1", "1"]);
    check("10! 11", ["10", "10", "10"]);
    check("11", ["11", "-", "-"]);
    check("11!", ["11", "11", "-"]);
    // Several: they have to agree.
    check("01! 10! 11 ; 10! 11", ["10", "10", "10"]);
    check("any! ; 10! 11", ["10", "10", "10"]);
    check("01! 10! 11 ; 01! 10! 11 ; 10! 11", ["10", "10", "10"]);
    check("01! 11 ; 10! 11", ["1", "-", "-"]);
    check("01! ; 10!", ["11", "-", "-"]);
    // One of them would need both nodes even if it were alone.
    check("01! 10! 11 ; 11!", ["11", "-", "-"]);
    check("01! 10! 11 ; 11", ["11", "-", "-"]);
    check("11! ; 11!", ["11", "11", "-"]);
}

#[test]
fn one_node() {
    let one = machine(&[&[10]]);
    assert_eq!(said(&one, false, "1!"), ["1", "1", "any"]);
    assert_eq!(said(&one, false, "1! ; any"), ["1", "-", "-"]);
}

#[test]
fn how_many_nodes_if_nobody_agrees() {
    let four = machine(&[&[10, 11, 20, 20], &[11, 10, 20, 20], &[20, 20, 10, 11], &[20, 20, 11, 10]]);
    let check = |text: &str, narrow: &str, close: &str| {
        assert_eq!(
            (said(&four, false, text)[0].as_str(), said(&four, true, text)[0].as_str()),
            (narrow, close),
            "{text}"
        );
    };
    // As many as the resource wants that wants the most.
    check("1111 0011 ; 1110 0110 1010 1100", "110", "1100");
    check("1111 0001 ; 1110 0110 1010 1100", "110", "1100");
    check("1111 ; 1111", "1111", "1111");
    // There are none of that size: fewer, and as many as there are.
    check("0111 ; 1011", "11", "11");
    check("0111 0100 ; 1011 1100", "11", "11");
    check("0001 ; 0011 1111", "1", "1");
    // Or more, if there are no fewer.
    check("1111! 0001 ; 1110 0110", "110", "110");
    // Fewer are better than more also where more would be nearer to what is wanted.
    let nine = Nodes { all: (0..9).collect(), ..Default::default() };
    assert_eq!(said(&nine, false, "000000111 000111100 ; 111000000 000111100")[0], "100");
    // Preferred ones of as many nodes: those that are close to each other.
    check("0110! 1100!", "110", "1100");
    check("0110! 1010! 0101!", "101", "101");
}

#[test]
fn sixteen_nodes_come_to_an_end() {
    let nodes = Nodes { all: (0..16).collect(), ..Default::default() };
    let all: Vec<Hint> =
        nodes.all.parts().map(|mask| Hint { affinity: Some(mask), preferred: mask.count() == 8 }).collect();
    let odd: Vec<Hint> = all.iter().map(|hint| Hint { preferred: false, ..*hint }).collect();
    let best = decide(&settings(Policy::BestEffort, true), &nodes, &[all.clone(), odd, all]);
    assert_eq!(best, Ok(Some(Mask(1))));
}

/// The better of two combinations, in the words of upstream's documentation of its merging.
fn better(nodes: &Nodes, closest: bool, wanted: u32, best: Hint, next: Hint) -> Hint {
    let (old, new) = (best.affinity.unwrap(), next.affinity.unwrap());
    let fitter = {
        let far = |mask: Mask| nodes.spread(mask) as f64 / f64::from(mask.count().pow(2));
        let closer = far(new).total_cmp(&far(old));
        let lower = if closest && closer.is_ne() { closer.is_lt() } else { new < old };
        if new.count() == old.count() { lower } else { new.count() < old.count() }
    };
    let takes = match (best.preferred, next.preferred) {
        (false, true) => true,
        (true, false) => false,
        (true, true) => fitter,
        (false, false) if old.count() > wanted => fitter,
        (false, false) if old.count() == wanted => new.count() == wanted && fitter,
        (false, false) if new.count() > wanted => false,
        (false, false) if new.count() == old.count() => fitter,
        (false, false) => new.count() > old.count(),
    };
    if takes { next } else { best }
}

/// All combinations, one after the other.
fn brute_force(nodes: &Nodes, closest: bool, hints: &[Vec<Hint>]) -> Hint {
    let narrowest = |hints: &Vec<Hint>| hints.iter().filter_map(|hint| hint.affinity).map(Mask::count).min();
    let wanted = hints.iter().filter_map(narrowest).max().unwrap_or(0);
    let mut combinations: Vec<Vec<Hint>> = vec![Vec::new()];
    for hints in hints {
        let longer = |one: &Vec<Hint>| hints.iter().map(|hint| [one.clone(), vec![*hint]].concat()).collect::<Vec<_>>();
        combinations = combinations.iter().flat_map(longer).collect();
    }
    let merged = combinations.iter().map(|one| {
        let named: Vec<Mask> = one.iter().filter_map(|hint| hint.affinity).collect();
        let mask = named.iter().fold(nodes.all, |mask, other| mask.and(*other));
        let same = named.windows(2).all(|pair| pair[0] == pair[1]);
        Hint { affinity: Some(mask), preferred: same && one.iter().all(|hint| hint.preferred) }
    });
    let merged = merged.filter(|hint| hint.affinity.is_some_and(|mask| !mask.is_empty()));
    let best = merged.reduce(|best, next| better(nodes, closest, wanted, best, next));
    best.unwrap_or(Hint { affinity: Some(nodes.all), preferred: false })
}

fn any_hints() -> impl Strategy<Value = Vec<Vec<Hint>>> {
    let hint = (proptest::option::weighted(0.9, 1..16_u64), any::<bool>());
    let hint = hint.prop_map(|(mask, preferred)| Hint { affinity: mask.map(Mask), preferred });
    proptest::collection::vec(proptest::collection::vec(hint, 0..7), 0..4)
}

proptest! {
    #[test]
    fn merging_finds_what_a_search_finds(
        hints in any_hints(),
        closest: bool,
        far in proptest::collection::vec(proptest::collection::vec(10..13_u64, 4), 4),
    ) {
        let nodes = machine(&far.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let found = merge(&nodes, closest, &hints);
        prop_assert_eq!(found, brute_force(&nodes, closest, &hints));
        let reversed: Vec<Vec<Hint>> = hints.iter().rev().cloned().collect();
        prop_assert_eq!(found, merge(&nodes, closest, &reversed));
    }
}
