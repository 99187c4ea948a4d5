//! Ends connections to the peer port of a machine that is gone.
//!
//! etcd waits for a write on such a connection until its own limit of 5 s; and when the member is removed meanwhile, etcd's
//! leader waits with it, sends no heartbeats, and nothing can be written. The kernel knows earlier: it sends the same
//! again and again, and nobody acknowledges it.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use tokio::process::Command;

/// A connection whose data has been sent again so often, the first time after 0.2 s and then after twice as long each time,
/// goes to a machine that is not there: its kernel would answer even if etcd did not.
const REPEATS: u32 = 3;

/// Ends what is open between this machine's etcd and the member at `ip`, if the kernel there does not answer. Gives how many
/// connections that were.
///
/// # Errors
/// If the kernel cannot be asked.
pub async fn cut(ip: IpAddr, port: u16) -> anyhow::Result<usize> {
    let place = format!("dst {} and ( sport = :{port} or dport = :{port} )", bracketed(ip));
    let listed = ss(&["-tnoH", "state", "established", &place]).await?;
    let silent = silent(&listed);
    for (own, other) in &silent {
        let one = format!(
            "src {} and sport = :{} and dst {} and dport = :{}",
            bracketed(own.ip()),
            own.port(),
            bracketed(other.ip()),
            other.port()
        );
        ss(&["-tnKH", "state", "established", &one]).await?;
    }
    Ok(silent.len())
}

async fn ss(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("ss").args(arguments).output().await.context("ss cannot be run")?;
    ensure!(output.status.success(), "ss: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn bracketed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

/// The connections of such a list that have been sent to in vain: this end, and the other.
fn silent(listed: &str) -> Vec<(SocketAddr, SocketAddr)> {
    let one = |line: &str| {
        let mut fields = line.split_whitespace().skip(2);
        let (own, other) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let timer = fields.find_map(|field| field.strip_prefix("timer:(on,"))?;
        let repeats: u32 = timer.trim_end_matches(')').rsplit(',').next()?.parse().ok()?;
        (repeats >= REPEATS).then_some((own, other))
    };
    listed.lines().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_nobody_answers() {
        let listed = "\
0      1464       10.77.0.11:2380    10.77.0.13:40712 timer:(on,1.640sec,4)
0      0          10.77.0.11:54824   10.77.0.13:2380  timer:(keepalive,12sec,0)
0      99         10.77.0.11:2380    10.77.0.13:40714 timer:(on,204ms,0)
0      0          10.77.0.11:2380    10.77.0.13:40716
0      7      [fd00::11]:2380       [fd00::13]:40712  timer:(on,3.1sec,7)
nonsense
";
        let found: Vec<String> = silent(listed).iter().map(|(own, other)| format!("{own} {other}")).collect();
        assert_eq!(found, ["10.77.0.11:2380 10.77.0.13:40712", "[fd00::11]:2380 [fd00::13]:40712"]);
    }
}
