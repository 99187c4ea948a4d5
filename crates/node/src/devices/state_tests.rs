use serde_json::json;

use super::*;
use crate::devices::api::{DeviceSpec, Mount, NumaNode, TopologyInfo};

const GPU: &str = "example.com/gpu";

fn ids(text: &str) -> Ids {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Devices by name; those with a `-` before them are not well. Some name the NUMA nodes that they are near to: `a:0+1`.
fn devices(text: &str) -> Vec<Device> {
    let health = |id: &str| if id.starts_with('-') { "Unhealthy" } else { HEALTHY };
    let device = |word: &str| {
        let (id, nodes) = word.split_once(':').unwrap_or((word, ""));
        let nodes = nodes.split('+').filter_map(|node| node.parse().ok()).map(|id| NumaNode { id }).collect();
        let topology = word.contains(':').then_some(TopologyInfo { nodes });
        Device { id: id.trim_start_matches('-').to_owned(), health: health(id).to_owned(), topology }
    };
    text.split_whitespace().map(device).collect()
}

/// A node with these devices.
fn state(text: &str) -> State {
    let mut state = State::default();
    state.registered(GPU, 1);
    assert!(state.listed(GPU, 1, &devices(text)));
    state
}

/// Gives a container so many devices, without a plugin's wish.
fn give(state: &mut State, pod: &str, container: &str, count: usize, reusable: &Reusable) -> Result<Ids, String> {
    let choice = state.choose(pod, container, (GPU, count), reusable, None)?;
    let Some(devices) = choice.settle(&[]) else { return Ok(Ids::new()) };
    state.give(pod, container, GPU, Given { devices: devices.clone(), ..Default::default() });
    Ok(devices)
}

#[test]
fn what_containers_want() {
    let container: Container = serde_json::from_value(json!({"name": "c", "resources": {
        "limits": {"cpu": "2", "hugepages-2Mi": "4Mi", "example.com/gpu": "2", "example.com/none": "0", "a.b/c": "1k"}}}))
    .unwrap();
    assert_eq!(wanted(&container).collect::<Vec<_>>(), [("a.b/c", 1000), (GPU, 2)]);
}

#[test]
fn how_many_there_are() {
    let second = Duration::from_secs;
    let mut state = state("a b -c");
    let amounts = |state: &State, now: u64| state.amounts(second(now))[GPU];
    assert_eq!(amounts(&state, 0), (3, 2));
    assert!(!state.listed(GPU, 1, &devices("b -c a")), "the same in another order");
    assert!(state.listed(GPU, 1, &devices("a")));
    assert_eq!(amounts(&state, 0), (1, 1));
    // Another one takes its place; that the first one ends, or says something, does not matter any more.
    state.registered(GPU, 2);
    assert!(!state.left(GPU, 1, second(1)) && !state.listed(GPU, 1, &[]));
    assert_eq!(amounts(&state, 1), (1, 1));
    assert!(state.left(GPU, 2, second(10)));
    assert_eq!(amounts(&state, 11), (1, 0));
    assert_eq!(amounts(&state, 310), (0, 0));
    state.registered(GPU, 3);
    assert!(state.listed(GPU, 3, &devices("a b")));
    assert_eq!(amounts(&state, 400), (2, 2));
    assert!(state.manages(GPU) && !state.manages("example.com/other"));
}

#[test]
fn no_device_is_given_twice() {
    let none = Reusable::default();
    let mut state = state("a b c -d");
    assert_eq!(give(&mut state, "one", "x", 2, &none), Ok(ids("a b")));
    let short = |requested: usize, available: usize| {
        format!("requested number of devices unavailable for {GPU}. Requested: {requested}, Available: {available}")
    };
    assert_eq!(give(&mut state, "two", "x", 2, &none), Err(short(2, 1)));
    assert_eq!(give(&mut state, "two", "x", 1, &none), Ok(ids("c")));
    assert_eq!(give(&mut state, "three", "x", 1, &none), Err(short(1, 0)));
    // Who has what it wants is not asked for again, however its devices are by now.
    assert!(state.listed(GPU, 1, &devices("-a -b c")));
    assert_eq!(state.choose("one", "x", (GPU, 2), &none, None), Ok(Choice::Had));
    let changed = format!("pod \"one\" container \"x\" changed request for resource {GPU:?} from 2 to 3");
    assert_eq!(give(&mut state, "one", "x", 3, &none), Err(changed));
    assert!(state.retain(|uid| uid != "two") && !state.retain(|uid| uid != "two"));
    assert_eq!(give(&mut state, "three", "x", 1, &none), Ok(ids("c")));
    state.take_back("three", "x", GPU);
    assert_eq!(state.pods().keys().collect::<Vec<_>>(), ["one"]);
    assert!(state.left(GPU, 1, Duration::ZERO));
    let gone = format!("no healthy devices present; cannot allocate unhealthy devices {GPU}");
    assert_eq!(give(&mut state, "three", "x", 1, &none), Err(gone));
}

#[test]
fn what_was_given_is_known_after_a_restart() {
    let mut before = state("a b");
    give(&mut before, "one", "x", 1, &Reusable::default()).unwrap();
    let pods = serde_json::from_slice(&serde_json::to_vec(before.pods()).unwrap()).unwrap();
    let mut after = State::new(before.resources().cloned(), pods);
    assert_eq!(after.amounts(Duration::ZERO)[GPU], (0, 0));
    assert_eq!(after.choose("one", "x", (GPU, 1), &Reusable::default(), None), Ok(Choice::Had));
    after.registered(GPU, 1);
    assert!(after.listed(GPU, 1, &devices("a b")));
    assert_eq!(give(&mut after, "two", "x", 1, &Reusable::default()), Ok(ids("b")));
}

#[test]
fn what_init_containers_had_goes_to_those_after_them() {
    let mut state = state("a b c d");
    let mut reusable = Reusable::default();
    let mut turn = |state: &mut State, name: &str, class: Class, count: usize| {
        let has = give(state, "p", name, count, &reusable).unwrap();
        reusable.after(class, GPU, &has);
        has
    };
    assert_eq!(turn(&mut state, "init", Class::Init, 2), ids("a b"));
    // One that runs beside the others keeps what it has.
    assert_eq!(turn(&mut state, "sidecar", Class::Sidecar, 1), ids("a"));
    assert_eq!(turn(&mut state, "init2", Class::Init, 2), ids("b c"));
    assert_eq!(turn(&mut state, "main", Class::Main, 1), ids("b"));
    assert_eq!(turn(&mut state, "main2", Class::Main, 2), ids("c d"));
    assert_eq!(give(&mut state, "q", "x", 1, &Reusable::default()).unwrap_err().rsplit(' ').next(), Some("0"));
}

#[test]
fn plugins_have_a_say() {
    let settle = |sure: &str, free: &str, more: usize, preferred: &[&str]| {
        let (free, last) = free.split_once('|').unwrap_or((free, ""));
        let choice = Choice::Some { sure: ids(sure), free: ids(free), last: ids(last), more };
        choice.settle(&preferred.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>()).unwrap()
    };
    assert_eq!(settle("", "a b c", 2, &["c", "b"]), ids("b c"));
    assert_eq!(settle("", "a b c", 2, &["c"]), ids("a c"), "the rest is chosen for it");
    assert_eq!(settle("r", "a b c", 1, &["r", "c"]), ids("c r"));
    assert_eq!(settle("", "a b", 1, &["x"]), ids("a"), "it cannot give what is not free");
    assert_eq!(settle("", "c d | a b", 1, &["b"]), ids("b"));
    assert_eq!(settle("", "c | a b", 2, &[]), ids("a c"), "those near to nothing are the last");
    assert_eq!(Choice::These(ids("a")).settle(&[]), Some(ids("a")));
    assert_eq!(Choice::Had.settle(&[]), None);
}

#[test]
fn plugins_together_make_a_container() {
    let mut state = State::default();
    let with = |name: &str| ContainerAllocateResponse {
        envs: [("WHO".to_owned(), name.to_owned()), (name.to_owned(), "1".to_owned())].into(),
        mounts: vec![Mount { container_path: "/lib".into(), host_path: format!("/{name}"), read_only: true }],
        devices: vec![DeviceSpec { container_path: format!("/dev/{name}"), ..Default::default() }],
        ..Default::default()
    };
    for name in ["b", "a"] {
        state.give("p", "c", &format!("{name}/x"), Given { with: with(name), ..Default::default() });
    }
    let made = state.made_with("p", "c");
    let envs: Vec<_> = made.envs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(envs, [("WHO", "a"), ("a", "1"), ("b", "1")]);
    assert_eq!(made.mounts, with("a").mounts);
    assert_eq!(made.devices.len(), 2);
    assert_eq!(state.made_with("p", "other"), ContainerAllocateResponse::default());
}

#[test]
fn from_where_devices_can_be_had() {
    let nodes = Mask(0b11);
    let pod = |init: usize, main: usize| -> PodSpec {
        let container =
            |name: &str, count: usize| json!({"name": name, "resources": {"limits": {GPU: count.to_string()}}});
        let (init, main) = (container("i", init), container("x", main));
        serde_json::from_value(json!({"initContainers": [init], "containers": [main]})).unwrap()
    };
    let shown = |lists: Vec<Vec<Hint>>| {
        let hint = |hint: &Hint| {
            let mask = hint.affinity.map_or("none".to_owned(), |mask| mask.to_string());
            format!("{mask}{}", if hint.preferred { "!" } else { "" })
        };
        let list = |hints: &Vec<Hint>| hints.iter().map(hint).collect::<Vec<_>>().join(" ");
        lists.iter().map(list).collect::<Vec<_>>().join("; ")
    };
    let of = |state: &State, spec: &PodSpec| {
        let one = containers(spec).last().unwrap();
        (shown(state.hints(nodes, "p", spec, one)), shown(state.pod_hints(nodes, "p", spec)))
    };
    let both = |text: &str| (text.to_owned(), text.to_owned());
    let none = Reusable::default();

    // Where no device says what it is near to, that does not matter.
    assert_eq!(of(&state("a b:"), &pod(0, 1)), both(""));
    let mut state = state("a:0 b:0 c:1 d e:7 -f:1");
    assert_eq!(of(&state, &pod(0, 1)), both("0! 1! 0-1"));
    assert_eq!(of(&state, &pod(0, 2)), both("0! 0-1"));
    assert_eq!(of(&state, &pod(0, 3)), both("0-1!"));
    assert_eq!(of(&state, &pod(0, 4)), both("none"), "d is near to nothing, and e to what is not there");
    assert_eq!(of(&state, &pod(0, 9)), both("none"));
    // What an init container wants counts for the pod.
    assert_eq!(of(&state, &pod(3, 1)), ("0! 1! 0-1".to_owned(), "0-1!".to_owned()));

    // What others have is not free, and what an init container has comes first.
    give(&mut state, "other", "x", 1, &none).unwrap();
    assert_eq!(of(&state, &pod(0, 2)), both("0-1"));
    let given = |devices: &str| Given { devices: ids(devices), ..Default::default() };
    state.give("p", "i", GPU, given("c"));
    assert_eq!(of(&state, &pod(1, 1)).0, "1! 0-1");
    assert_eq!(of(&state, &pod(1, 1)).1, "1! 0-1");
    // Who has something is not given anything else.
    state.give("p", "x", GPU, given("c"));
    assert_eq!(of(&state, &pod(1, 1)), both("1! 0-1"));
    assert_eq!(of(&state, &pod(1, 2)), both("none"));
}

#[test]
fn devices_are_given_from_where_they_are_wanted() {
    let state = state("a:0 b:0 c:1 d:1 e f:0+1");
    let choose = |count: usize, affinity: Option<u64>| {
        let choice = state.choose("p", "x", (GPU, count), &Reusable::default(), affinity.map(Mask)).unwrap();
        let shown = |ids: &Ids| ids.iter().cloned().collect::<String>();
        match choice {
            Choice::Had => "had".to_owned(),
            Choice::These(these) => shown(&these),
            Choice::Some { sure, free, last, more } => {
                format!("{}+{more} of {}|{}", shown(&sure), shown(&free), shown(&last))
            }
        }
    };
    assert_eq!(choose(2, None), "+2 of abcdef|");
    // The plugin may choose where there is a choice.
    assert_eq!(choose(2, Some(0b01)), "+2 of abf|");
    assert_eq!(choose(3, Some(0b01)), "abf");
    assert_eq!(choose(2, Some(0b10)), "+2 of cdf|");
    assert_eq!(choose(4, Some(0b10)), "cdf+1 of ab|e");
    assert_eq!(choose(6, Some(0b10)), "cdf+3 of ab|e");
    assert_eq!(choose(1, Some(0b11)), "+1 of abcdf|");
    // What is reused has to be among it, and is not asked where it is.
    let mut reusable = Reusable::default();
    reusable.after(Class::Init, GPU, &ids("z"));
    let choice = state.choose("p", "x", (GPU, 2), &reusable, Some(Mask(0b10)));
    assert_eq!(choice, Ok(Choice::Some { sure: ids("z"), free: ids("c d f"), last: Ids::new(), more: 1 }));
}
