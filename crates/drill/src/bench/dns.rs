//! How many names a second a DNS server finds, and how long each takes. Any server will do, so that they can be compared.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{task::JoinSet, time::Instant};

use super::{Report, Samples};
use crate::process::usage;

/// How long an answer is waited for, as resolvers of programs may do.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct Args {
    /// The server to ask.
    #[arg(long, value_name = "ADDRESS:PORT")]
    server: SocketAddr,
    /// A name to look up. May be repeated; they are asked for in turn.
    #[arg(long, default_value = "kubernetes.default.svc.cluster.local")]
    name: Vec<String>,
    /// The number of the type of record: 1 is A, 28 is AAAA, 33 is SRV.
    #[arg(long, default_value_t = 1)]
    record_type: u16,
    /// Clients that ask at the same time, each the next question when the last one is answered.
    #[arg(long, default_value_t = 8)]
    clients: usize,
    /// For how long, in seconds.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// A process of the server, for CPU time and memory. May be repeated.
    #[arg(long)]
    pid: Vec<i32>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// What a client saw.
#[derive(Default)]
struct Seen {
    samples: Samples,
    /// Without an answer in time.
    late: u64,
    /// Answered by something else than NOERROR.
    failed: u64,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let questions: Vec<Vec<u8>> =
        args.name.iter().map(|name| question(name, args.record_type)).collect::<anyhow::Result<_>>()?;
    let before = usage(&args.pid)?;
    let (began, until) = (Instant::now(), Instant::now() + Duration::from_secs(args.seconds.max(1)));
    let mut clients = JoinSet::new();
    for number in 0..args.clients.max(1) {
        let (questions, server) = (questions.clone(), args.server);
        clients.spawn_blocking(move || client(server, &questions, number, until));
    }
    let mut all = Seen::default();
    while let Some(seen) = clients.join_next().await {
        let seen = seen??;
        all.samples.0.extend(seen.samples.0);
        all.late += seen.late;
        all.failed += seen.failed;
    }
    let took = began.elapsed().as_secs_f64();
    let count = all.samples.0.len();
    let mut report = Report::new(args.json);
    report.add("look-ups", count as f64 / took, "1/s");
    for (what, part) in [("50", 0.5), ("99", 0.99), ("99.9", 0.999), ("100", 1.0)] {
        report.add(format!("time of {what} % at most"), all.samples.quantile(part) * 1e3, "us");
    }
    report.add("without an answer within a second", all.late as f64, "");
    report.add("answered by a failure", all.failed as f64, "");
    if !args.pid.is_empty() {
        let after = usage(&args.pid)?;
        report.add("CPU time of the server for each", (after.cpu - before.cpu) * 1e6 / count.max(1) as f64, "us");
        report.add("memory of the server", after.rss, "MiB");
    }
    report.finish();
    Ok(())
}

/// Asks one question after the other.
fn client(server: SocketAddr, questions: &[Vec<u8>], number: usize, until: Instant) -> anyhow::Result<Seen> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).context("a socket for the client")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut seen = Seen::default();
    let mut answer = [0; 4096];
    for turn in number.. {
        let began = Instant::now();
        if began >= until {
            break;
        }
        let mut asked = questions[turn % questions.len()].clone();
        let id = (turn as u16).to_be_bytes();
        asked[..2].copy_from_slice(&id);
        // Refused, if nobody is there: that is no answer.
        if socket.send(&asked).is_err() {
            seen.late += 1;
            continue;
        }
        loop {
            match socket.recv(&mut answer) {
                // A late answer to an earlier question.
                Ok(len) if len < 12 || answer[..2] != id => continue,
                Ok(_) if answer[3] & 0xf == 0 => seen.samples.0.push(began.elapsed()),
                Ok(_) => {
                    seen.samples.0.push(began.elapsed());
                    seen.failed += 1;
                }
                Err(_) => seen.late += 1,
            }
            break;
        }
    }
    Ok(seen)
}

/// A question as it is sent, with the number 0.
pub(crate) fn question(name: &str, kind: u16) -> anyhow::Result<Vec<u8>> {
    // Recursion is desired; one question.
    let mut out = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        if label.is_empty() || label.len() > 63 {
            bail!("--name {name:?}: {label:?} is no label of a name");
        }
        out.push(label.len() as u8);
        out.extend(label.as_bytes());
    }
    if out.len() > 12 + 254 {
        bail!("--name {name:?} is too long");
    }
    out.push(0);
    out.extend(kind.to_be_bytes());
    out.extend([0, 1]);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question() {
        assert_eq!(question("a.bc.", 28).unwrap()[12..], *b"\x01a\x02bc\0\0\x1c\0\x01");
        assert!(question("a..b", 1).is_err() && question(&"a.".repeat(200), 1).is_err());
    }
}
