//! `seawall lab`: the command line.

use std::{
    io::{IsTerminal as _, Read as _, Write as _},
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use ipnet::Ipv4Net;
use tokio::time::Instant;

use super::{
    Cluster, LABS, Lab, Machine, Options, Power, Program, Result, Say, Status, Way, boot, cluster, enter, init,
    layout::MachinePlace,
};

/// Options of `seawall lab`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

/// Which lab.
#[derive(clap::Args)]
struct Which {
    /// The lab's name.
    #[arg(long, env = "SEAWALL_LAB", default_value = "seawall")]
    name: String,
    /// Where labs are kept.
    #[arg(long, env = "SEAWALL_LAB_DIR", default_value = LABS)]
    dir: PathBuf,
}

impl Which {
    fn open(&self) -> Result<Lab> {
        Lab::open(&self.name, &self.dir)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OneWay {
    /// Nothing reaches the machines named first; what they send arrives.
    In,
    /// Nothing of what they send arrives; they hear everything.
    Out,
}

#[derive(clap::Args)]
struct Machines {
    /// The machines.
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
    #[command(flatten)]
    which: Which,
}

impl Machines {
    fn open(&self) -> Result<(Lab, Vec<Machine>)> {
        let lab = self.which.open()?;
        let machines = self.machines.iter().map(|name| lab.machine(name)).collect::<Result<_>>()?;
        Ok((lab, machines))
    }
}

#[derive(clap::Args)]
struct Up {
    #[command(flatten)]
    which: Which,
    /// How many servers: s1, s2, ...
    #[arg(long, default_value_t = 3)]
    servers: u8,
    /// How many agents: a1, a2, ...
    #[arg(long, default_value_t = 2)]
    agents: u8,
    /// The LAN [default: a free part of 10.0.0.0/8].
    #[arg(long, value_name = "NETWORK")]
    subnet: Option<Ipv4Net>,
    /// Spread the machines over this many networks, joined by a router: s1 and a1 are on the first, s2 and a2 on the next.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=9))]
    networks: u8,
    /// Give the machines addresses of IPv6 as well.
    #[arg(long)]
    dual_stack: bool,
    /// Only boot the machines: no cluster.
    #[arg(long)]
    bare: bool,
    /// How fast failures are noticed: fast, kubernetes or wan.
    #[arg(long, default_value = "fast")]
    timing: String,
    /// CPUs that each machine may use, e.g. 0.5 [default: all].
    #[arg(long)]
    cpus: Option<f64>,
    /// A further argument of every server. May be repeated.
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    server_arg: Vec<String>,
    /// A further argument of every agent. May be repeated.
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    agent_arg: Vec<String>,
    /// What servers and agents log.
    #[arg(long, default_value = "info", value_name = "FILTER")]
    service_log: String,
}

#[derive(Subcommand)]
enum Command {
    /// Make the machines and bring up a cluster on them.
    Up(Up),
    /// Take a lab away, with all that belongs to it, whatever state it is in.
    Down(Which),
    /// List the labs.
    Ls {
        /// Where labs are kept.
        #[arg(long, env = "SEAWALL_LAB_DIR", default_value = LABS)]
        dir: PathBuf,
    },
    /// Say what the machines are doing.
    Status {
        #[command(flatten)]
        which: Which,
        /// How to say it.
        #[arg(long, short, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Run a command on a machine, or a shell; ends with its exit code.
    Shell {
        /// The machine.
        machine: String,
        #[command(flatten)]
        which: Which,
        /// The command and its arguments.
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Print a kubeconfig with a context for every server.
    Kubeconfig(Which),
    /// Cut the power: no process and no connection says goodbye. The disk stays.
    PowerOff {
        #[command(flatten)]
        machines: Machines,
        /// The disk goes as well.
        #[arg(long)]
        wipe: bool,
    },
    /// Boot from the disk; with an empty one, join the cluster anew.
    PowerOn(Machines),
    /// Shut down in order, and boot.
    Reboot(Machines),
    /// Stop everything on a machine, as one hangs whose network card still answers.
    Freeze(Machines),
    /// Let it go on.
    Thaw(Machines),
    /// Cut machines off from others, or from everyone.
    Partition {
        #[command(flatten)]
        machines: Machines,
        /// From whom [default: everyone else, and the host]. `host` is the host. May be repeated.
        #[arg(long, value_name = "MACHINE", num_args = 1..)]
        from: Vec<String>,
        /// Only in one direction.
        #[arg(long, value_enum)]
        one_way: Option<OneWay>,
    },
    /// Mend what was cut: for some machines, or everything, loss included.
    Heal {
        /// The machines [default: everything].
        #[arg(value_name = "MACHINE")]
        machines: Vec<String>,
        #[command(flatten)]
        which: Which,
    },
    /// Lose this share of all frames between machines.
    Loss {
        /// From 0 to 100.
        percent: f64,
        #[command(flatten)]
        which: Which,
    },
    /// Kill one program of a machine; it is started again by whoever keeps it running.
    Kill {
        /// The machine.
        machine: String,
        /// The program.
        process: Program,
        #[command(flatten)]
        which: Which,
    },
    /// Print what a machine's service has logged.
    Logs {
        /// The machine.
        machine: String,
        #[command(flatten)]
        which: Which,
        /// The log of the machine's first process instead.
        #[arg(long)]
        console: bool,
        /// Go on as more is logged.
        #[arg(long, short)]
        follow: bool,
    },
    /// Import an image into the machines' containerds.
    Import {
        /// A tar archive, as `docker save` or `seawall image build` make it.
        image: PathBuf,
        /// The machines [default: all that run].
        #[arg(value_name = "MACHINE")]
        machines: Vec<String>,
        #[command(flatten)]
        which: Which,
    },
    #[command(hide = true)]
    Start {
        #[arg(long)]
        machine: PathBuf,
    },
    #[command(hide = true)]
    Init {
        #[arg(long)]
        machine: PathBuf,
    },
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        machine: PathBuf,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

/// Runs `seawall lab`.
pub fn run(args: Args) -> futures::future::LocalBoxFuture<'static, anyhow::Result<()>> {
    Box::pin(work(args))
}

async fn work(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Up(args) => return up(args).await,
        Command::Down(which) => {
            let started = Instant::now();
            let there = Lab::down(&which.name, &which.dir).await?;
            match there {
                true => eprintln!("lab {} is gone ({:.2} s)", which.name, started.elapsed().as_secs_f64()),
                false => eprintln!("there is no lab {} in {}: nothing to take away", which.name, which.dir.display()),
            }
        }
        Command::Ls { dir } => {
            for name in Lab::names(&dir) {
                println!("{name}");
            }
        }
        Command::Status { which, output } => {
            let status = which.open()?.status().await?;
            match output {
                Format::Json => print(&(serde_json::to_string_pretty(&status)? + "\n")),
                Format::Table => print(&table(&status)),
            }
        }
        Command::Shell { machine, which, command } => return shell(&which, &machine, command).await,
        Command::Kubeconfig(which) => print(&cluster::write_kubeconfig(&which.open()?)?),
        Command::PowerOff { machines, wipe } => {
            let (lab, machines) = machines.open()?;
            lab.settle_disk().await?;
            lab.each(machines, |m| async move { m.power_off(wipe).await }).await?;
        }
        Command::PowerOn(machines) => {
            let (lab, machines) = machines.open()?;
            let same = lab.clone();
            lab.each(machines, move |m| {
                let lab = same.clone();
                async move { lab.power_on(&m).await }
            })
            .await?;
        }
        Command::Reboot(machines) => {
            let (lab, machines) = machines.open()?;
            lab.settle_disk().await?;
            lab.each(machines, |m| async move { m.reboot().await }).await?;
        }
        Command::Freeze(machines) => {
            let (lab, machines) = machines.open()?;
            lab.each(machines, |m| async move { m.freeze().await }).await?;
        }
        Command::Thaw(machines) => {
            let (lab, machines) = machines.open()?;
            lab.each(machines, |m| async move { m.thaw().await }).await?;
        }
        Command::Partition { machines, from, one_way } => {
            let way = match one_way {
                None => Way::Both,
                Some(OneWay::In) => Way::In,
                Some(OneWay::Out) => Way::Out,
            };
            machines.which.open()?.partition(&machines.machines, &from, way).await?;
        }
        Command::Heal { machines, which } => which.open()?.heal(&machines).await?,
        Command::Loss { percent, which } => which.open()?.loss(percent).await?,
        Command::Kill { machine, process, which } => {
            let pid = which.open()?.machine(&machine)?.kill(process).await?;
            eprintln!("{} on {machine}, process {pid}, was killed", process.word());
        }
        Command::Logs { machine, which, console, follow } => {
            let machine = which.open()?.machine(&machine)?;
            let path = if console { machine.console() } else { machine.log() };
            logs(&path, follow).await?;
        }
        Command::Import { image, machines, which } => import(&which, image, &machines).await?,
        Command::Start { machine } => {
            let started = boot::start(&MachinePlace { dir: machine });
            if let Err(cause) = &started {
                println!("error {}", cause.to_string().replace('\n', " "));
            }
            started?;
        }
        Command::Init { machine } => init::run(&MachinePlace { dir: machine }).await?,
        Command::Enter { machine, command } => {
            let code = enter::run(&MachinePlace { dir: machine }, &command).await?;
            // What the program says with its code is not an error of ours.
            std::process::exit(code);
        }
    }
    Ok(())
}

/// Writes to stdout; a reader that has gone, as `head` does, is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

async fn up(args: Up) -> anyhow::Result<()> {
    let started = Instant::now();
    let bar = ProgressBar::new_spinner();
    if std::io::stderr().is_terminal() {
        bar.set_style(ProgressStyle::with_template("{spinner} {elapsed} {msg}")?);
        bar.set_message("bringing the lab up");
        bar.enable_steady_tick(Duration::from_millis(100));
    } else {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let say: Say = {
        let bar = bar.clone();
        Arc::new(move |what: &str| bar.suspend(|| eprintln!("{:7.2} s  {what}", started.elapsed().as_secs_f64())))
    };
    let cluster = Cluster {
        timing: args.timing,
        server_args: args.server_arg,
        agent_args: args.agent_arg,
        log: args.service_log,
    };
    let options = Options {
        name: args.which.name.clone(),
        dir: args.which.dir.clone(),
        servers: args.servers,
        agents: args.agents,
        subnet: args.subnet,
        networks: args.networks,
        dual_stack: args.dual_stack,
        cpus: args.cpus,
        binary: std::env::current_exe().context("find this program")?,
        cluster: (!args.bare).then_some(cluster),
    };
    let lab = Lab::up(options, say.clone()).await;
    bar.finish_and_clear();
    let lab = match lab {
        Ok(lab) => lab,
        Err(error) => {
            let there = Lab::open(&args.which.name, &args.which.dir);
            if there.is_ok_and(|lab| !lab.inner.state.finished) {
                eprintln!(
                    "the machines are left for a look; `seawall lab down --name {}` takes them away",
                    args.which.name
                );
            }
            return Err(error.into());
        }
    };
    say(&format!("lab {} is up", lab.name()));
    if !args.bare {
        println!("export KUBECONFIG={}", lab.kubeconfig().display());
    }
    Ok(())
}

fn table(status: &Status) -> String {
    let nets: Vec<String> = std::iter::once(&status.subnet).chain(&status.further).map(ToString::to_string).collect();
    let mut text = format!("lab {}, LAN {}, host {}", status.name, nets.join(" and "), status.host);
    if !status.finished {
        text += ", not finished";
    }
    if status.loss > 0.0 {
        text += &format!(", {} % of frames get lost", status.loss);
    }
    text += "\n";
    let mut rows = vec![["MACHINE", "ROLE", "ADDRESS", "POWER", "PROCESSES", "RUNS", "ENDED"].map(str::to_owned)];
    for machine in &status.machines {
        let runs = machine.programs.iter().map(|(name, p)| format!("{name} ({:.0} MiB)", p.memory)).collect::<Vec<_>>();
        rows.push([
            machine.spec.name.clone(),
            machine.spec.role.word().into(),
            machine.spec.address.to_string(),
            machine.power.word().into(),
            machine.processes.to_string(),
            if runs.is_empty() { "-".into() } else { runs.join(", ") },
            machine.service.ended.to_string(),
        ]);
    }
    text += &columns(&rows);
    for (from, to) in &status.cuts {
        text += &format!("cut: nothing from {from} reaches {to}\n");
    }
    text
}

/// Rows as text, each column as wide as its widest cell.
pub(crate) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += cells.join("   ").trim_end();
        text += "\n";
    }
    text
}

async fn shell(which: &Which, machine: &str, command: Vec<String>) -> anyhow::Result<()> {
    let machine = which.open()?.machine(machine)?;
    let power = machine.power()?;
    if !matches!(power, Power::On) {
        anyhow::bail!("machine {} is {}: nothing can be run there", machine.name(), power.word());
    }
    // From here on this process is the one that enters; there is no second one between a terminal and the shell.
    let command = if command.is_empty() {
        let shells = ["/bin/bash", "/bin/sh"].iter().filter(|s| std::path::Path::new(s).exists());
        vec![shells.map(|s| (*s).to_owned()).next().context("this host has no shell")?]
    } else {
        command
    };
    std::process::exit(enter::run(&machine.place(), &command).await?);
}

async fn logs(path: &std::path::Path, follow: bool) -> anyhow::Result<()> {
    let mut file = std::fs::File::open(path).with_context(|| format!("{}: nothing was logged", path.display()))?;
    let mut buffer = vec![0; 1 << 16];
    let mut out = std::io::stdout();
    loop {
        match file.read(&mut buffer)? {
            0 if !follow => return Ok(()),
            0 => tokio::time::sleep(Duration::from_millis(200)).await,
            some => {
                if out.write_all(&buffer[..some]).and_then(|()| out.flush()).is_err() {
                    return Ok(());
                }
            }
        }
    }
}

async fn import(which: &Which, image: PathBuf, machines: &[String]) -> anyhow::Result<()> {
    let lab = which.open()?;
    let machines = match machines {
        [] => lab.machines().into_iter().filter(|m| m.power().is_ok_and(|p| p == Power::On)).collect(),
        some => some.iter().map(|name| lab.machine(name)).collect::<Result<Vec<_>>>()?,
    };
    std::fs::metadata(&image).with_context(|| image.display().to_string())?;
    let started = Instant::now();
    let count = machines.len();
    let image = Arc::new(image);
    lab.each(machines, move |machine| {
        let image = image.clone();
        async move { machine.import(&image).await }
    })
    .await?;
    eprintln!("imported into {count} machines ({:.2} s)", started.elapsed().as_secs_f64());
    Ok(())
}

impl Machine {
    /// Imports an image (a tar archive) into its containerd.
    pub async fn import(&self, image: &std::path::Path) -> Result<()> {
        use super::error::{Cause, Of as _};
        let step = || format!("import {}", image.display());
        cluster::containerd(self).await?;
        let file = std::fs::File::open(image).map_err(Cause::io("open it")).of(self.name(), step())?;
        let mut command = self.command("ctr");
        command.args(["--address", "/run/seawall/containerd/containerd.sock", "--namespace", "k8s.io"]);
        command.args(["images", "import", "-"]).stdin(Stdio::from(file)).kill_on_drop(true);
        let output = command.output().await.map_err(Cause::io("ctr")).of(self.name(), step())?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Cause::Program { program: "ctr images import".into(), said }).of(self.name(), step())
    }
}
