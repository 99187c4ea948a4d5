//! A lab's LAN: a bridge in a network namespace of its own, a cable to each machine, and one to the host. A lab of
//! several networks has a bridge for each, and the namespace is the router between them.
//!
//! Whatever is cut or lost is cut or lost on the bridges, by rules in nftables' bridge family.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use ipnet::Ipv4Net;
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;

use super::{
    error::{Cause, Step},
    layout::{HOST, LINK_PREFIX, Place, Spec},
    state::{State, hand_on},
};

/// Where named network namespaces are (`ip-netns(8)`).
const NAMESPACES: &str = "/run/netns";
/// The bridge that the host is on; each further network has the next number.
const BRIDGE: &str = "lan0";
const TABLE: &str = "bridge seawall_lab";

/// A direction in which nothing passes any more: from one port of the bridge to another.
pub type Cut = (String, String);

/// The file of a network namespace.
pub fn namespace(name: &str) -> PathBuf {
    Path::new(NAMESPACES).join(name)
}

/// Runs a program to its end; what it says in an error is what it wrote on stderr.
pub fn run(program: &str, args: &[&str], input: &str) -> Step<String> {
    let shown = || format!("{program} {}", args.join(" "));
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    hand_on(&mut command);
    let mut child = command.spawn().map_err(Cause::io(shown()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends before it has read everything says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(Cause::io(shown()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let said = if said.is_empty() { output.status.to_string() } else { said };
    Err(Cause::Program { program: shown(), said })
}

/// Runs `work` on a thread of its own, whose namespaces it may change.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> Step<T> + Send + 'static) -> Step<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("lab".into()).spawn(move || {
        // The receiver is gone only if nobody wants to know any more.
        let _ = sender.send(work());
    });
    thread.map_err(Cause::io("start a thread"))?;
    receiver.await.map_err(|_| Cause::Other("a step panicked".into()))?
}

/// Runs `work` inside a named network namespace.
async fn inside<T: Send + 'static>(name: &str, work: impl FnOnce() -> Step<T> + Send + 'static) -> Step<T> {
    let path = namespace(name);
    aside(move || {
        let file = File::open(&path).map_err(Cause::io(path.display().to_string()))?;
        setns(file, CloneFlags::CLONE_NEWNET).map_err(Cause::errno(format!("enter {}", path.display())))?;
        work()
    })
    .await
}

async fn batch(name: &str, lines: String) -> Step {
    inside(name, move || run("ip", &["-batch", "-"], &lines).map(|_| ())).await
}

async fn nft(place: &Place, script: String) -> Step {
    inside(&place.lan(), move || run("nft", &["-f", "-"], &script).map(|_| ())).await
}

/// The table that cuts and loses: nothing, at first. What is sent to a machine on another network goes through the router,
/// where only its address tells to whom. Neighbours' addresses are still told across a cut that has only one
/// direction: without them nothing would go in the other one either.
fn rules() -> String {
    format!(
        "table {TABLE} {{
            set cut {{ type ifname . ifname; }}
            set cut4 {{ type ifname . ipv4_addr; }}
            set cut6 {{ type ifname . ipv6_addr; }}
            chain loss {{ }}
            chain routed {{
                type filter hook input priority 0;
                iifname . ip daddr @cut4 drop
                iifname . ip6 daddr @cut6 drop
                jump loss
            }}
            chain forward {{
                type filter hook forward priority 0;
                iifname . oifname @cut ether type != arp drop
                iifname . oifname @cut oifname . iifname @cut drop
                jump loss
            }}
        }}\n"
    )
}

fn loss_rule(hundredths: u32) -> String {
    format!("add rule {TABLE} loss numgen random mod 10000 <= {} drop\n", hundredths.saturating_sub(1))
}

/// Runs `ip` on the host.
async fn ip(args: &[&str]) -> Step<String> {
    let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    aside(move || run("ip", &args.iter().map(String::as_str).collect::<Vec<_>>(), "")).await
}

/// Makes the LAN and the host's cable into it.
pub async fn create_lan(place: &Place, state: &State) -> Step {
    let (lan, link, subnet) = (place.lan(), place.host_link(), state.subnet);
    ip(&["netns", "add", &lan]).await?;
    let mut lines = "link set lo up\n".to_owned();
    for (number, net) in state.subnets().into_iter().enumerate() {
        let gateway = net.gateway();
        lines += &format!(
            "link add lan{number} type bridge forward_delay 0 stp_state 0 mcast_snooping 0\n\
             addr add {} dev lan{number}\n\
             link set lan{number} up\n",
            net.with_prefix(gateway)
        );
        if state.dual_stack {
            lines += &format!("addr add {}/64 dev lan{number} nodad\n", net.six(gateway));
        }
    }
    batch(&lan, lines).await?;
    let dual_stack = state.dual_stack;
    inside(&lan, move || {
        // A router without routes refuses at once what has nowhere to go, where a missing one would let it time out.
        let files = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];
        let wanted = files.iter().take(if dual_stack { 2 } else { 1 });
        wanted.into_iter().try_for_each(|path| fs::write(path, "1").map_err(Cause::io(*path)))
    })
    .await?;
    nft(place, rules()).await?;
    ip(&["link", "add", &link, "type", "veth", "peer", "name", HOST, "netns", &lan]).await?;
    batch(&lan, format!("link set {HOST} master {BRIDGE} up\n")).await?;
    ip(&["addr", "add", &subnet.with_prefix(subnet.host()), "dev", &link]).await?;
    ip(&["link", "set", &link, "up"]).await?;
    if dual_stack {
        ip(&["addr", "add", &format!("{}/64", subnet.six(subnet.host())), "dev", &link, "nodad"]).await?;
    }
    for net in &state.further {
        ip(&["route", "add", &net.net().to_string(), "via", &subnet.gateway().to_string(), "dev", &link]).await?;
        if dual_stack {
            let gateway = subnet.six(subnet.gateway()).to_string();
            ip(&["route", "add", &net.net6().to_string(), "via", &gateway, "dev", &link]).await?;
        }
    }
    Ok(())
}

/// Makes a machine's network namespace, plugged in.
pub async fn plug(place: &Place, state: &State, machine: &Spec) -> Step {
    let (lan, name) = (place.lan(), &machine.name);
    let inner = place.of_machine(name);
    let mut subnets = state.subnets().into_iter().enumerate();
    let (number, subnet) = subnets.find(|(_, s)| s.net().contains(&machine.address)).unwrap_or((0, state.subnet));
    ip(&["netns", "add", &inner]).await?;
    // The other end of a cable cannot be named by a namespace's name from within another.
    ip(&[
        "-n",
        &lan,
        "link",
        "add",
        name,
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "address",
        &machine.mac(),
        "netns",
        &inner,
    ])
    .await?;
    let mut lines = format!(
        "link set lo up\naddr add {} dev eth0\nlink set eth0 up\nroute add default via {}\n",
        subnet.with_prefix(machine.address),
        subnet.gateway()
    );
    if let Some(address) = machine.address6 {
        let gateway = subnet.six(subnet.gateway());
        lines += &format!("addr add {address}/64 dev eth0 nodad\nroute add default via {gateway} dev eth0\n");
    }
    batch(&inner, lines).await?;
    batch(&lan, format!("link set {name} master lan{number} up\n")).await
}

/// Takes the cable out on the LAN's side, so that nothing that the machine says from now on is heard.
pub async fn pull_cable(place: &Place, machine: &str) -> Step {
    if !namespace(&place.lan()).exists() || !ports(place).await?.contains(machine) {
        return Ok(());
    }
    batch(&place.lan(), format!("link set {machine} down\n")).await
}

/// Takes the machine's cable and namespace away.
pub async fn unplug(place: &Place, machine: &str) -> Step {
    if namespace(&place.lan()).exists() && ports(place).await?.contains(machine) {
        batch(&place.lan(), format!("link del {machine}\n")).await?;
    }
    delete_namespace(&place.of_machine(machine)).await
}

async fn ports(place: &Place) -> Step<BTreeSet<String>> {
    let text = ip(&["-n", &place.lan(), "-j", "link", "show", "type", "bridge_slave"]).await?;
    Ok(list(&text)?.iter().filter_map(|l| l["ifname"].as_str().map(str::to_owned)).collect())
}

fn list(json: &str) -> Step<Vec<Value>> {
    // Nothing to show is nothing at all for some versions of `ip`.
    let text = if json.trim().is_empty() { "[]" } else { json };
    serde_json::from_str(text).map_err(|e| Cause::Other(format!("`ip` said what is not JSON: {e}")))
}

/// Deletes a named namespace. What is left of one whose making was interrupted is deleted as well.
pub async fn delete_namespace(name: &str) -> Step {
    let path = namespace(name);
    if !path.exists() {
        return Ok(());
    }
    let deleted = ip(&["netns", "delete", name]).await;
    if path.exists() {
        // An interrupted `ip netns add` leaves a file with nothing mounted on it.
        let _ = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
        fs::remove_file(&path).map_err(Cause::io(format!("remove {}", path.display())))?;
        return Ok(());
    }
    deleted.map(|_| ())
}

/// Takes the LAN away.
pub async fn delete_lan(place: &Place) -> Step {
    if host_links()?.contains(&place.host_link()) {
        let deleted = ip(&["link", "delete", &place.host_link()]).await;
        if host_links()?.contains(&place.host_link()) {
            deleted?;
        }
    }
    delete_namespace(&place.lan()).await
}

/// Whether the LAN is there.
pub fn lan_exists(place: &Place) -> bool {
    namespace(&place.lan()).exists()
}

/// The named namespaces that begin with `prefix`.
pub fn namespaces(prefix: &str) -> BTreeSet<String> {
    names_in(NAMESPACES, prefix)
}

/// The host's links that are labs'.
pub fn host_links() -> Step<BTreeSet<String>> {
    Ok(names_in("/sys/class/net", LINK_PREFIX))
}

fn names_in(directory: &str, prefix: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(prefix)).collect()
}

/// Every network that the host has a route or an address for.
pub async fn used() -> Step<Vec<Ipv4Net>> {
    let routes = ip(&["-4", "-j", "route", "show", "table", "all"]).await?;
    Ok(list(&routes)?.iter().filter_map(|r| parse_route(r["dst"].as_str()?)).collect())
}

fn parse_route(destination: &str) -> Option<Ipv4Net> {
    // The default route collides with nothing.
    if destination == "default" {
        return None;
    }
    destination.parse().ok().or_else(|| Ipv4Net::new(destination.parse().ok()?, 32).ok())
}

/// What is cut at the moment.
pub async fn cuts(place: &Place) -> Step<BTreeSet<Cut>> {
    let arguments: Vec<String> = format!("-j list set {TABLE} cut").split(' ').map(str::to_owned).collect();
    let text =
        inside(&place.lan(), move || run("nft", &arguments.iter().map(String::as_str).collect::<Vec<_>>(), "")).await?;
    let value: Value =
        serde_json::from_str(&text).map_err(|e| Cause::Other(format!("nft said what is not JSON: {e}")))?;
    Ok(parse_cuts(&value))
}

fn parse_cuts(value: &Value) -> BTreeSet<Cut> {
    let sets = value["nftables"].as_array().into_iter().flatten().filter_map(|e| e["set"]["elem"].as_array());
    let pairs = sets.flatten().filter_map(|e| {
        let pair = e["concat"].as_array()?;
        Some((pair.first()?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned()))
    });
    pairs.collect()
}

/// Replaces what is cut, in one transaction.
pub async fn set_cuts(place: &Place, state: &State, cuts: &BTreeSet<Cut>) -> Step {
    let mut script = String::new();
    let pair = |(from, to): &Cut| format!("\"{from}\" . \"{to}\"");
    let to = |cut: &Cut| state.machines.iter().find(|m| m.name == cut.1).cloned();
    let four = |cut: &Cut| match cut.1 == HOST {
        true => Some(state.subnet.host()),
        false => to(cut).map(|m| m.address),
    };
    let six = |cut: &Cut| match cut.1 == HOST {
        true => state.dual_stack.then(|| state.subnet.six(state.subnet.host())),
        false => to(cut)?.address6,
    };
    let routed4 = |cut: &Cut| four(cut).map(|ip| format!("\"{}\" . {ip}", cut.0));
    let routed6 = |cut: &Cut| six(cut).map(|ip| format!("\"{}\" . {ip}", cut.0));
    let elements: [(&str, Vec<String>); 3] = [
        ("cut", cuts.iter().map(pair).collect()),
        ("cut4", cuts.iter().filter_map(routed4).collect()),
        ("cut6", cuts.iter().filter_map(routed6).collect()),
    ];
    for (set, elements) in elements {
        script += &format!("flush set {TABLE} {set}\n");
        if !elements.is_empty() {
            script += &format!("add element {TABLE} {set} {{ {} }}\n", elements.join(", "));
        }
    }
    nft(place, script).await
}

/// Lets this share of all frames between ports of the LAN get lost.
pub async fn set_loss(place: &Place, percent: f64) -> Step {
    let mut script = format!("flush chain {TABLE} loss\n");
    let share = (percent * 100.0).round() as u32;
    if share > 0 {
        script += &loss_rule(share);
    }
    nft(place, script).await
}

/// The share of frames that get lost, in percent.
pub async fn loss(place: &Place) -> Step<f64> {
    let arguments: Vec<String> = format!("list chain {TABLE} loss").split(' ').map(str::to_owned).collect();
    let text =
        inside(&place.lan(), move || run("nft", &arguments.iter().map(String::as_str).collect::<Vec<_>>(), "")).await?;
    Ok(f64::from(parse_loss(&text)) / 100.0)
}

fn parse_loss(text: &str) -> u32 {
    let last = text.split("mod 10000 <= ").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse::<u32>().ok());
    last.map_or(0, |last| last + 1)
}

/// Which directions are cut by keeping `these` from `those`.
pub fn cuts_between(these: &BTreeSet<String>, those: &BTreeSet<String>, way: Way) -> BTreeSet<Cut> {
    let pairs = these.iter().flat_map(|a| those.iter().filter(move |b| *b != a).map(move |b| (a, b)));
    let both = pairs.flat_map(|(a, b)| {
        let out = (way != Way::In).then(|| (a.clone(), b.clone()));
        let into = (way != Way::Out).then(|| (b.clone(), a.clone()));
        out.into_iter().chain(into)
    });
    both.collect()
}

/// In which directions a partition cuts, seen from the machines that are named first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// Both.
    #[default]
    Both,
    /// Nothing reaches them; what they send arrives.
    In,
    /// Nothing of what they send arrives; they hear everything.
    Out,
}

/// Tries what a LAN needs in a namespace that vanishes with the attempt. Gives what the kernel refused.
pub async fn probe() -> Vec<String> {
    let attempt = aside(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(Cause::errno("make a network namespace"))?;
        let mut refused = Vec::new();
        let mut expect = |what: &str, result: Step<String>| {
            if let Err(cause) = result {
                refused.push(format!("{what}: {cause}"));
            }
        };
        expect("veth", run("ip", &["link", "add", "probe0", "type", "veth", "peer", "name", "probe1"], ""));
        expect("bridge", run("ip", &["link", "add", "probe2", "type", "bridge"], ""));
        expect("nftables' bridge family", run("nft", &["-f", "-"], &(rules() + &loss_rule(1))));
        Ok(refused)
    });
    attempt.await.unwrap_or_else(|cause| vec![cause.to_string()])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn partitions() {
        let check = |these: &[&str], those: &[&str], way, expect: &[&str]| {
            let cuts = cuts_between(&set(these), &set(those), way);
            let text: Vec<String> = cuts.iter().map(|(a, b)| format!("{a}>{b}")).collect();
            assert_eq!(text, expect, "{these:?} from {those:?} {way:?}");
        };
        check(&["s1"], &["s2", "a1"], Way::Both, &["a1>s1", "s1>a1", "s1>s2", "s2>s1"]);
        check(&["s1"], &["s2", "a1"], Way::In, &["a1>s1", "s2>s1"]);
        check(&["s1"], &["s2", "a1"], Way::Out, &["s1>a1", "s1>s2"]);
        check(&["s1", "s2"], &["s3"], Way::Both, &["s1>s3", "s2>s3", "s3>s1", "s3>s2"]);
        check(&["s1"], &["s1"], Way::Both, &[]);
        check(&["s1"], &[], Way::Both, &[]);
    }

    #[test]
    fn what_the_kernel_holds() {
        let value =
            json!({"nftables": [{"metainfo": {}}, {"set": {"name": "cut", "elem": [{"concat": ["s1", "s2"]}]}}]});
        assert_eq!(parse_cuts(&value), BTreeSet::from([("s1".to_owned(), "s2".to_owned())]));
        assert_eq!(parse_cuts(&json!({"nftables": [{"set": {"name": "cut"}}]})), BTreeSet::new());
    }

    #[test]
    fn what_gets_lost() {
        for share in [1, 500, 10_000] {
            assert_eq!(parse_loss(&loss_rule(share)), share);
        }
        assert_eq!(parse_loss("table bridge seawall_lab { chain loss { } }"), 0);
    }

    #[test]
    fn routes() {
        let check = |text, expect: Option<&str>| {
            assert_eq!(parse_route(text).map(|n| n.to_string()).as_deref(), expect, "{text}");
        };
        check("10.0.0.0/8", Some("10.0.0.0/8"));
        check("10.1.2.3", Some("10.1.2.3/32"));
        check("default", None);
        check("local", None);
    }
}
