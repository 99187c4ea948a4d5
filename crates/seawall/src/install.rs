//! `seawall install`: a systemd unit, so that a machine is what it is after every boot.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

/// What is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// `seawall server`.
    Server,
    /// `seawall agent`.
    Agent,
}

/// Options of `seawall install`.
#[derive(clap::Args)]
pub struct Args {
    /// What is installed.
    #[arg(value_enum)]
    role: Role,
    /// A token with which the machine joins at its first start. It is kept in a file that only root can read.
    #[arg(long, env = "SEAWALL_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Print the unit and change nothing.
    #[arg(long)]
    print: bool,
    /// Start it now.
    #[arg(long)]
    now: bool,
    /// Where units are kept.
    #[arg(long, default_value = "/etc/systemd/system")]
    unit_dir: PathBuf,
    /// Where the token is kept.
    #[arg(long, default_value = "/etc/seawall")]
    config_dir: PathBuf,
    /// What follows the command, e.g. `-- --join https://192.0.2.1:6443` or `-- --config /etc/seawall/server.yaml`.
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Installs.
///
/// # Errors
/// What cannot be written, or what systemd refused.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let role = match args.role {
        Role::Server => "server",
        Role::Agent => "agent",
    };
    if args.arguments.iter().any(|a| a == "--token" || a.starts_with("--token=")) {
        bail!("--token among the arguments would be readable by everyone: give it before `--`, to `seawall install`");
    }
    let program = std::env::current_exe().context("the path of this program cannot be found")?;
    let environment = args.config_dir.join(format!("{role}.env"));
    let unit = unit(role, &program, &environment, &args.arguments);
    if args.print {
        print!("{unit}");
        return Ok(());
    }
    if let Some(token) = &args.token {
        token.parse::<crate::join::Token>().map_err(|e| anyhow::anyhow!("--token: {e}"))?;
        crate::pki::write(&environment, &format!("SEAWALL_TOKEN={token}\n"), 0o600)?;
    }
    let path = args.unit_dir.join(format!("seawall-{role}.service"));
    crate::pki::write(&path, &unit, 0o644)?;
    println!("{} is written", path.display());
    // Elsewhere than systemd looks, there is nothing to tell it.
    if args.unit_dir == Path::new("/etc/systemd/system") && Path::new("/run/systemd/system").exists() {
        systemctl(&["daemon-reload"])?;
        let name = format!("seawall-{role}.service");
        match args.now {
            true => systemctl(&["enable", "--now", &name])?,
            false => systemctl(&["enable", &name])?,
        }
        println!("{name} starts at every boot{}", if args.now { ", and has been started" } else { "" });
    } else {
        println!("systemd does not run here: enable the unit where it does (systemctl enable --now seawall-{role})");
    }
    Ok(())
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("systemctl").args(arguments).output().context("systemctl cannot be run")?;
    if !output.status.success() {
        bail!("systemctl {} said: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn unit(role: &str, program: &Path, environment: &Path, arguments: &[String]) -> String {
    let mut command = format!("{} {role}", program.display());
    for argument in arguments {
        let _ = write!(command, " {}", quote(argument));
    }
    format!(
        "[Unit]\n\
         Description=Seawall {role}\n\
         Wants=network-online.target\n\
         After=network-online.target dbus.service systemd-logind.service\n\
         \n\
         [Service]\n\
         Type=exec\n\
         EnvironmentFile=-{}\n\
         ExecStart={command}\n\
         Restart=always\n\
         RestartSec=100ms\n\
         # Pods outlive the process: only it is told to stop.\n\
         KillMode=process\n\
         Delegate=yes\n\
         LimitNOFILE=1048576\n\
         TasksMax=infinity\n\
         OOMScoreAdjust=-900\n\
         # At a shutdown that nobody held back, pods leave first: longer than they have for it.\n\
         TimeoutStopSec=120\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        environment.display()
    )
}

/// As systemd reads command lines (systemd.service(5)).
fn quote(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,@+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_owned();
    }
    let escaped = argument.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_has_the_command() {
        let arguments = ["--join".to_owned(), "https://192.0.2.1:6443".to_owned(), "--node-label=a=b c".to_owned()];
        let unit = unit("agent", Path::new("/usr/local/bin/seawall"), Path::new("/etc/seawall/agent.env"), &arguments);
        let line = unit.lines().find(|l| l.starts_with("ExecStart=")).unwrap();
        assert_eq!(line, "ExecStart=/usr/local/bin/seawall agent --join https://192.0.2.1:6443 \"--node-label=a=b c\"");
        assert!(unit.contains("KillMode=process\n") && unit.contains("EnvironmentFile=-/etc/seawall/agent.env\n"));
    }

    #[test]
    fn quoting() {
        assert_eq!(quote("a%b$c\"d\\"), "\"a%%b$$c\\\"d\\\\\"");
        assert_eq!(quote(""), "\"\"");
        assert_eq!(quote("--port=1"), "--port=1");
    }
}
