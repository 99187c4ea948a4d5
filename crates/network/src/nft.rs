//! Giving scripts to the kernel by `nft`, whole or not at all, and looking at what it holds.

use std::{collections::BTreeMap, io, os::fd::AsRawFd as _, process::Stdio};

use anyhow::{Context as _, bail};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};
use tokio::{io::AsyncWriteExt, process::Command};

/// Gives a script to the kernel as one transaction. `words` start the program: another network namespace can be put in
/// front.
///
/// # Errors
/// With what `nft` said.
pub async fn apply(words: &[String], script: &str) -> anyhow::Result<()> {
    let [program, rest @ ..] = words else { bail!("no command for nft is configured") };
    let mut child = Command::new(program)
        .args(rest)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{program} cannot be run: is nftables installed?"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).await.context("writing to nft")?;
    }
    let output = child.wait_with_output().await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("nft: {}", said.lines().take(6).collect::<Vec<_>>().join("; "));
    }
    Ok(())
}

/// Whether the kernel has a table. Where that cannot be told, it is believed.
pub async fn is_there(words: &[String], table: &str) -> bool {
    let [program, rest @ ..] = words else { return true };
    let mut command = Command::new(program);
    command.args(rest).args(["list", "table"]).args(table.split(' ')).stdin(Stdio::null());
    match command.kill_on_drop(true).output().await {
        Ok(output) => output.status.success() || !is_missing(&output.stderr),
        Err(_) => true,
    }
}

fn is_missing(said: &[u8]) -> bool {
    String::from_utf8_lossy(said).contains("No such file or directory")
}

/// The number of the kernel's rules in this network namespace: every transaction, of whomever, makes it another one. What was
/// as it should be is so still while the number is the same, which is much cheaper to ask for than all the rules. `None` if it
/// cannot be had, or `words` are about another namespace.
pub fn generation(words: &[String]) -> Option<u32> {
    if words != ["nft"] {
        return None;
    }
    ask_generation().inspect_err(|error| tracing::debug!("the number of nftables' rules: {error}")).ok().flatten()
}

/// `NFT_MSG_GETGEN` of `linux/netfilter/nf_tables.h`, in a message as netlink(7) describes it.
fn ask_generation() -> io::Result<Option<u32>> {
    const TABLES: u16 = 10 << 8;
    let (ask, length, is_request) = (TABLES | 16, 20_u32, 1_u16);
    let mut message = Vec::with_capacity(20);
    message.extend(length.to_ne_bytes());
    message.extend(ask.to_ne_bytes());
    message.extend(is_request.to_ne_bytes());
    // No number, no port, and of no family.
    message.extend([0; 12]);
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    // The kernel answers while it is asked: nobody waits.
    sendto(socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 256];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    Ok(read_generation(answer.get(..length).unwrap_or_default()))
}

/// The number in an answer, if it is one.
fn read_generation(answer: &[u8]) -> Option<u32> {
    const TOLD: u16 = 10 << 8 | 15;
    const NUMBER: u16 = 1;
    let half = |at: usize| answer.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
    if half(4)? != TOLD {
        return None;
    }
    let mut at = 20;
    loop {
        let (length, kind) = (usize::from(half(at)?), half(at + 2)?);
        if kind == NUMBER {
            return answer.get(at + 4..at + 8)?.try_into().ok().map(u32::from_be_bytes);
        }
        // Each begins at a multiple of four.
        at += length.max(4).next_multiple_of(4);
    }
}

/// How much there is of a table: chains with how many rules each has, sets and maps with how many elements. Enough to
/// tell that somebody took something away (or put something in), without comparing how the kernel words it.
pub type Outline = BTreeMap<(Kind, String), usize>;

/// What a table is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A chain, which has rules.
    Chain,
    /// A set or a map, which has elements.
    Set,
}

/// The outline of what `nft -j list table` says.
///
/// # Errors
/// If that is not understood.
pub fn outline(json: &[u8]) -> Result<Outline, serde_json::Error> {
    #[derive(serde::Deserialize)]
    struct Listing {
        nftables: Vec<serde_json::Value>,
    }
    let mut outline = Outline::new();
    let listing: Listing = serde_json::from_slice(json)?;
    for object in &listing.nftables {
        let name = |kind: &str, field: &str| object[kind][field].as_str().map(str::to_owned);
        if let Some(chain) = name("chain", "name") {
            outline.entry((Kind::Chain, chain)).or_default();
        } else if let Some(chain) = name("rule", "chain") {
            *outline.entry((Kind::Chain, chain)).or_default() += 1;
        } else {
            for kind in ["set", "map"] {
                if let Some(set) = name(kind, "name") {
                    outline.insert((Kind::Set, set), object[kind]["elem"].as_array().map_or(0, Vec::len));
                }
            }
        }
    }
    Ok(outline)
}

/// Whether the kernel's table (`inet NAME`) looks like this. Where that cannot be told, it is believed.
pub async fn is_intact(words: &[String], table: &str, expected: &Outline) -> bool {
    let [program, rest @ ..] = words else { return true };
    let mut command = Command::new(program);
    command.args(rest).args(["-j", "list", "table"]).args(table.split(' ')).stdin(Stdio::null());
    match command.kill_on_drop(true).output().await {
        Ok(output) if output.status.success() => match outline(&output.stdout) {
            Ok(found) => found == *expected,
            Err(error) => {
                tracing::debug!("what nft lists is not understood: {error}");
                true
            }
        },
        Ok(output) => !is_missing(&output.stderr),
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer with these attributes.
    fn answer(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 20];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        for (kind, value) in attributes {
            bytes.extend(u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(*value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn the_number_in_an_answer() {
        let told = 10 << 8 | 15;
        let number = 258_u32.to_be_bytes();
        assert_eq!(read_generation(&answer(told, &[(1, &number)])), Some(258));
        assert_eq!(read_generation(&answer(told, &[(3, b"nft\0\0"), (1, &number)])), Some(258));
        assert_eq!(read_generation(&answer(told, &[(3, b"nft")])), None);
        assert_eq!(read_generation(&answer(2, &[(1, &number)])), None, "an error");
        let whole = answer(told, &[(3, b"nft"), (1, &number)]);
        for length in 0..whole.len() {
            assert_eq!(read_generation(&whole[..length]), None, "{length}");
        }
    }

    #[test]
    fn of_another_namespace_nothing_is_known() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(generation(&words(&["ip", "netns", "exec", "x", "nft"])), None);
    }
}
