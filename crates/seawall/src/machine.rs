//! What happens on this machine outside a server: images, and cleaning up.

use std::{
    io::BufWriter,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use seawall_node::{NodeConfig, image, lock, traces::Traces};

/// Commands of `seawall image`.
#[derive(Subcommand)]
pub enum Image {
    /// Build an image from files, programs (with the libraries they need) and Debian packages, and import it.
    Build(Build),
    /// Import an archive that `docker save` or `seawall image build --output` wrote.
    Import(Import),
}

/// Options of `seawall image build`.
#[derive(clap::Args)]
pub struct Build {
    /// The name, e.g. `example.local/web:v1`.
    #[arg(short, long)]
    tag: String,
    /// Copy a file or directory, as SOURCE:PATH. May be repeated.
    #[arg(long, value_name = "SOURCE:PATH")]
    copy: Vec<String>,
    /// Copy a program and the shared libraries it needs, as SOURCE:PATH. May be repeated.
    #[arg(long, value_name = "SOURCE:PATH")]
    program: Vec<String>,
    /// Unpack a Debian package file. May be repeated.
    #[arg(long, value_name = "FILE")]
    deb: Vec<PathBuf>,
    /// Make a symbolic link, as PATH:TARGET. May be repeated.
    #[arg(long, value_name = "PATH:TARGET")]
    link: Vec<String>,
    /// Start from busybox (Debian's busybox-static) with all its commands.
    #[arg(long)]
    busybox: bool,
    /// A variable of the environment. May be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Write the archive here instead of importing it.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The socket of containerd.
    #[arg(long, default_value = "/run/seawall/containerd/containerd.sock")]
    socket: PathBuf,
    /// The command that the image runs.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Options of `seawall image import`.
#[derive(clap::Args)]
pub struct Import {
    /// The archive.
    file: PathBuf,
    /// The socket of containerd.
    #[arg(long, default_value = "/run/seawall/containerd/containerd.sock")]
    socket: PathBuf,
}

/// Options of `seawall clean`.
#[derive(clap::Args)]
pub struct Clean {
    /// Where the server keeps its state.
    #[arg(long, default_value = "/var/lib/seawall")]
    data_dir: PathBuf,
    /// Where the server keeps its sockets.
    #[arg(long, default_value = "/run/seawall")]
    run_dir: PathBuf,
    /// Where the logs of pods are.
    #[arg(long, default_value = "/var/log/pods")]
    pod_log_dir: PathBuf,
    /// The directory of device plugins.
    #[arg(long, default_value = seawall_node::devices::DIRECTORY)]
    device_plugin_dir: PathBuf,
    /// Take away the cluster's data too, for good.
    #[arg(long)]
    data: bool,
}

/// Runs `seawall image …`.
pub async fn image(args: Image) -> anyhow::Result<()> {
    match args {
        Image::Build(args) => build(args).await,
        Image::Import(args) => image::import_file(&args.socket, &args.file)
            .await
            .with_context(|| format!("{} was not imported", args.file.display())),
    }
}

fn pair<'a>(flag: &str, text: &'a str) -> anyhow::Result<(&'a str, &'a str)> {
    match text.split_once(':') {
        Some((a, b)) if !a.is_empty() && b.starts_with('/') => Ok((a, b)),
        _ => bail!("{flag} {text:?}: write SOURCE:/PATH/IN/THE/IMAGE"),
    }
}

async fn build(args: Build) -> anyhow::Result<()> {
    let mut layer = image::Layer::new()?;
    if args.busybox {
        layer.busybox().context("--busybox")?;
    }
    for deb in &args.deb {
        layer.debian_package(deb).with_context(|| format!("--deb {}", deb.display()))?;
    }
    for text in &args.copy {
        let (source, path) = pair("--copy", text)?;
        layer.tree(source.as_ref(), path.as_ref()).with_context(|| format!("--copy {text}"))?;
    }
    for text in &args.program {
        let (source, path) = pair("--program", text)?;
        layer.program(source.as_ref(), path.as_ref()).with_context(|| format!("--program {text}"))?;
    }
    for text in &args.link {
        let (path, target) = text.split_once(':').with_context(|| format!("--link {text:?}: write PATH:TARGET"))?;
        layer.symlink(path, target)?;
    }
    let mut env = vec![image::PATH.to_owned()];
    env.extend(args.env);
    let config = image::ImageConfig { cmd: args.command, env, ..Default::default() };
    let archive = image::Archive::new(&args.tag).layer(layer)?.config(config);
    match &args.output {
        Some(file) => {
            let written =
                std::fs::File::create(file).map_err(Into::into).and_then(|out| archive.write(BufWriter::new(out)));
            written.with_context(|| format!("--output {}", file.display()))
        }
        None => image::import(&args.socket, archive).await.with_context(|| format!("{} was not imported", args.tag)),
    }
}

/// Runs `seawall clean`: pods, containerd, mounts, cgroups, network.
pub async fn clean(args: Clean) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("cleaning up needs root");
    }
    let mut config = NodeConfig::new("", IpAddr::V4(Ipv4Addr::LOCALHOST));
    config.data_dir = args.data_dir.join("agent");
    config.run_dir = args.run_dir.clone();
    config.log_dir = args.pod_log_dir.clone();
    config.device_plugins = args.device_plugin_dir.clone();
    // A server without a node agent has no lock but its store's.
    let store = args.data_dir.join("store/lock");
    if let Some(server) = lock::user(&store).with_context(|| store.display().to_string())? {
        bail!("{} is in use by {server}; stop it first", args.data_dir.display());
    }
    let traces = Traces::read(&config);
    seawall_node::remove_all(&config).await?;
    seawall_network::proxy::remove().await?;
    seawall_network::policy::remove().await?;
    seawall_network::announce::remove().await?;
    seawall_dns::here::remove().await?;
    seawall_network::relay::kernel::remove().await?;
    seawall_network::routes::remove().await?;
    if args.data {
        match std::fs::remove_dir_all(&args.data_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("--data-dir {}", args.data_dir.display()));
            }
            _ => {}
        }
    }
    // Again, now that the data is gone from the directories above it.
    traces.remove();
    Ok(())
}
