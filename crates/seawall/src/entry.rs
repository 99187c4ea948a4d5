//! `seawall entry`: what stands in front of the servers and is not ours.

use std::{fmt::Write as _, net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use seawall_server::balancers::USER_AGENT;

use crate::kubeconfig;

/// Commands of `seawall entry`.
#[derive(Subcommand)]
pub enum Command {
    /// Print the configuration of an HAProxy (2.2 or newer) in front of all servers.
    ///
    /// It passes connections on as they are, so it needs no keys, and asks each server every second whether it is well.
    Haproxy(Haproxy),
}

/// Options of `seawall entry haproxy`.
#[derive(clap::Args)]
pub struct Haproxy {
    /// The name by which the servers know this balancer, another one for each [default: the host name of its machine].
    #[arg(long)]
    name: Option<String>,
    /// Where it listens.
    #[arg(long, default_value = "0.0.0.0:6443", value_name = "ADDRESS:PORT")]
    bind: SocketAddr,
    /// A server [default: those that there are now]. May be repeated.
    #[arg(long, value_name = "ADDRESS:PORT", value_delimiter = ',')]
    server: Vec<SocketAddr>,
    /// Where the server of this machine keeps its state.
    #[arg(long, default_value = "/var/lib/seawall")]
    data_dir: PathBuf,
}

/// Runs a command.
///
/// # Errors
/// If the servers are not told and cannot be asked.
pub async fn run(command: Command) -> anyhow::Result<()> {
    let Command::Haproxy(args) = command;
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    let name = match args.name {
        Some(name) if (1..=63).contains(&name.len()) && name.bytes().all(fits) => name,
        Some(name) => bail!("--name {name:?}: use up to 63 letters, digits, -, . and _"),
        // HAProxy knows the name of its machine.
        None => "${HAPROXY_LOCALPEER}".to_owned(),
    };
    let mut servers: Vec<(String, String)> =
        args.server.iter().enumerate().map(|(i, address)| (format!("server-{}", i + 1), address.to_string())).collect();
    if servers.is_empty() {
        let found = kubeconfig::others(&args.data_dir).await.context("the servers cannot be asked; give --server")?;
        servers = found.into_iter().map(|(name, url)| (name, url.trim_start_matches("https://").to_owned())).collect();
    }
    print!("{}", haproxy(&name, args.bind, &servers));
    Ok(())
}

/// The configuration. The servers' certificates are for clients to verify; who only asks whether a server is well has nothing
/// to lose, and goes on when the authority changes.
fn haproxy(name: &str, bind: SocketAddr, servers: &[(String, String)]) -> String {
    let mut text = format!(
        "# /etc/haproxy/haproxy.cfg, printed by seawall entry haproxy. Print it anew when servers come or go.
# The entry's name or address has to stand in the servers' certificates: seawall certs add-name NAME.
# A balancer alone takes the entry down with its machine: run two, with keepalived between them.
global
    log stderr format raw local0 notice

defaults
    mode tcp
    log global
    timeout connect 2s
    timeout check 1s
    # Watches and logs are quiet for long; who is gone is noticed by the probes of TCP.
    timeout client 1h
    timeout server 1h
    option clitcpka
    option srvtcpka

listen seawall
    bind {bind}
    balance leastconn
    option httpchk
    http-check connect ssl
    http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host kubernetes hdr User-Agent \"{USER_AGENT}{name}\"
    http-check expect status 200
    # Connections to a server that is gone are ended, or clients would wait for its answers.
    default-server check verify none inter 1s fastinter 200ms fall 2 rise 1 on-marked-down shutdown-sessions
"
    );
    for (name, address) in servers {
        let _ = writeln!(text, "    server {name} {address}");
    }
    text
}
