//! The seawall binary: command line, configuration, component lifecycle.

mod access;
mod agent;
mod authorities;
mod certs;
mod csr;
mod dns;
mod encryption;
mod entry;
mod etcd;
mod files;
mod gossip;
mod install;
mod join;
mod kubeconfig;
mod leave;
mod machine;
mod memory;
mod metrics;
mod migrate;
mod node;
mod options;
mod paths;
mod server;
mod snapshot;
mod supervise;
mod token;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use seawall_server::pki;
use tracing_subscriber::EnvFilter;

/// Objects come and go all the time; this allocator gives their memory back where glibc's keeps it in fragments.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The version of the Kubernetes API that is served, and ours.
pub const VERSION: &str = concat!("v1.37.0+seawall", env!("CARGO_PKG_VERSION"));

/// The exit code of `seawall check` when it found something; 1 is for whoever could not look.
const FOUND: u8 = 3;

/// A highly available, Kubernetes-compatible cluster in one binary.
#[derive(Parser)]
#[command(name = "seawall", version = VERSION, max_term_width = 120, args_override_self = true)]
struct Cli {
    /// What to log: a level, or a filter such as `info,seawall_node=debug`.
    #[arg(long, global = true, env = "SEAWALL_LOG", default_value = "info")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a server: API, scheduler, controllers, and a node agent.
    Server(Box<server::Args>),
    /// Run a node: pods, Services, and the way to the servers.
    Agent(Box<agent::Args>),
    /// Run the cluster's DNS alone, as its replicas do.
    Dns(Box<dns::Args>),
    /// Tokens with which machines join.
    #[command(subcommand)]
    Token(token::Command),
    /// The members of etcd.
    #[command(subcommand)]
    Member(etcd::members::Command),
    /// The gossip, by which machines find out which of them live.
    #[command(subcommand)]
    Gossip(gossip::Command),
    /// The certificates on this machine.
    #[command(subcommand)]
    Certs(certs::Command),
    /// Take the objects of a server that stands alone to an etcd, so that others can join it.
    Migrate(migrate::Args),
    /// All objects of the cluster in a file, and back.
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Write a systemd unit, so that this machine is a server or an agent after every boot.
    Install(install::Args),
    /// Print a kubeconfig for a running server.
    Kubeconfig(kubeconfig::Args),
    /// What stands in front of the servers and is not ours.
    #[command(subcommand)]
    Entry(entry::Command),
    /// Say where the loss of one machine would be felt in a cluster, why, and what to do about it.
    Check(seawall_drill::lint::Args),
    /// Say what there is of a cluster, who leads, how it is, and where the loss of one machine would be felt.
    Status(seawall_drill::lint::status::Args),
    /// Build container images from files of this machine and import them, without a registry.
    #[command(subcommand)]
    Image(machine::Image),
    /// Stop everything that a server left running on this machine, and take away what it made.
    Clean(machine::Clean),
    /// Stop the pods that must not run twice when the node's time is over. Agents start this; nobody else has to.
    #[command(hide = true)]
    FenceWatchdog {
        /// What the agent says.
        file: PathBuf,
        /// The cgroup that all pods are below.
        cgroup: String,
        /// The hardware watchdog to serve.
        #[arg(long)]
        hardware: Option<PathBuf>,
    },
    /// Several machines out of this one: boot them, switch them off, cut them off.
    Lab(seawall_drill::lab::Args),
    /// Switch machines of a lab off while clients are at work, and say what they felt.
    Drill(seawall_drill::scenario::Args),
    /// What runs in the pods of drills.
    #[command(hide = true)]
    DrillWorkload(seawall_drill::serve::Args),
    /// Measure a running API server.
    Bench(seawall_drill::bench::Args),
}

fn main() -> ExitCode {
    let arguments = match options::with_config_file(std::env::args().collect()) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("seawall: {error:#}");
            return ExitCode::from(2);
        }
    };
    let cli = Cli::parse_from(arguments);
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("seawall: --log {:?} is not a filter: {error}; try info or debug", cli.log);
            return ExitCode::from(2);
        }
    };
    // Colours are for terminals, not for files.
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(colours).with_target(true).init();
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        eprintln!("seawall: the cryptography provider was already installed");
    }
    if let Command::FenceWatchdog { file, cgroup, hardware } = &cli.command {
        // It needs neither a runtime nor anything else that could hang.
        return match seawall_node::fence::run_watchdog(file, cgroup, hardware.as_deref()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("seawall: the watchdog of {}: {error}", file.display());
                ExitCode::FAILURE
            }
        };
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().on_thread_park(memory::idle).build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("seawall: no threads could be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut code = ExitCode::SUCCESS;
    runtime.spawn(memory::wake());
    let result = runtime.block_on(async {
        match cli.command {
            Command::Server(args) => server::run(*args).await,
            Command::Agent(args) => agent::run(*args).await,
            Command::Dns(args) => dns::run(*args).await,
            Command::Token(command) => token::run(command).await,
            Command::Member(command) => etcd::members::run(command).await,
            Command::Gossip(command) => gossip::run(command).await,
            Command::Certs(command) => certs::run(command).await,
            Command::Migrate(args) => migrate::run(args).await,
            Command::Snapshot(command) => snapshot::run(command).await,
            Command::Install(args) => install::run(&args),
            Command::Kubeconfig(args) => kubeconfig::run(&args).await,
            Command::Entry(command) => entry::run(command).await,
            Command::Check(args) => seawall_drill::lint::run(args).await.map(|good| {
                if !good {
                    code = ExitCode::from(FOUND);
                }
            }),
            Command::Status(args) => seawall_drill::lint::status::run(args).await,
            Command::Image(args) => machine::image(args).await,
            Command::Clean(args) => machine::clean(args).await,
            Command::FenceWatchdog { .. } => Ok(()),
            Command::Lab(args) => seawall_drill::lab::run(args).await,
            Command::Drill(args) => seawall_drill::scenario::run(args).await,
            Command::DrillWorkload(args) => seawall_drill::serve::run(args).await,
            Command::Bench(args) => seawall_drill::bench::run(args).await,
        }
    });
    // What still runs in the background is not waited for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match result {
        Ok(()) => code,
        Err(error) => {
            eprintln!("seawall: {error:#}");
            ExitCode::FAILURE
        }
    }
}
