//! One agent per machine: a second one fails before it touches anything, and nobody cleans up under a running server.

use std::{process::Stdio, time::Duration};

use seawall_tests::{
    Machine, Server,
    kubectl::{has, run},
    on_a_machine,
    traffic::Traffic,
    within,
};
use tempfile::TempDir;

/// A second server on the machine of the first.
struct Second {
    child: tokio::process::Child,
    directory: TempDir,
}

impl Second {
    fn start(machine: &Machine, first: &Server, shared: &str, args: &[&str]) -> Second {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| if name == shared { first.directory().join(name) } else { directory.path().join(name) };
        let mut command = machine.command(seawall_tests::seawall());
        command.arg("server").arg("--data-dir").arg(at("data")).arg("--run-dir").arg(at("run")).arg("--pod-log-dir");
        command.arg(at("pods")).args(["--node-name", "second", "--port", "7443"]).args(args);
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).kill_on_drop(true);
        Second { child: command.spawn().unwrap(), directory }
    }

    async fn says(&mut self, words: &[&str]) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap();
            if words.iter().all(|w| log.contains(w)) {
                return;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "the second server ended:\n{log}");
            assert!(tokio::time::Instant::now() < deadline, "the second server does not say {words:?}, but:\n{log}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn stop(mut self) {
        let pid = self.child.id().and_then(seawall_tests::machine::child_of).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
        self.child.wait().await.unwrap();
    }
}

#[test]
fn a_second_server_leaves_the_first_alone() {
    on_a_machine(async |machine| {
        let mut server = Server::with_node(&machine).await;
        let address = server.serve_web().await;
        let k = server.kubectl.clone();
        let state =
            "{.items[*].status.containerStatuses[*].containerID}/{.items[*].status.containerStatuses[*].restartCount}";
        let before = k.path("pods -l app=web", state).await;
        let traffic = Traffic::start(&address.to_string());
        let holder = format!("in use by process {} (", server.pid_on_machine());
        let processes =
            async || server.on_machine("sh", &["-c", "ps -eo args | grep -c [c]ontainerd.*config.toml"]).await.ok();
        let containerds = processes().await;

        // With the directories of the first, with the port of the first, and with nothing in common but the machine.
        let run_dir = server.directory().join("run").display().to_string();
        for (shared, args, words) in [
            ("run", &["--agent-port", "10251"][..], &[&run_dir, &holder, "stop it (kill "][..]),
            ("", &[][..], &["kubepods", &holder, "--disable agent,proxy"][..]),
            ("", &["--agent-port", "10251"][..], &["kubepods", &holder, "--disable agent,proxy"][..]),
        ] {
            let mut second = Second::start(&machine, &server, shared, args);
            second.says(words).await;
            second.says(&["the service proxy of this machine", &holder]).await;
            second.stop().await;
        }
        assert_eq!(processes().await, containerds, "a second containerd was started");

        // Nobody cleans up under it either, whichever directory is named.
        let at = |name: &str| server.directory().join(name).display().to_string();
        let elsewhere = tempfile::tempdir().unwrap();
        let none = |name: &str| elsewhere.path().join(name).display().to_string();
        for (data, run, words) in
            [(at("data"), at("run"), "data"), (none("data"), at("run"), "run"), (none("data"), none("run"), "kubepods")]
        {
            let clean = ["clean", "--data", "--data-dir", &data, "--run-dir", &run, "--pod-log-dir", &at("pods")];
            has(server.seawall(&clean).await.fails(), &[words, &holder, "stop it first"]);
        }
        assert_eq!(k.path("pods -l app=web", state).await, before);
        let seen = traffic.stop();
        assert!(seen.answered() > 100 && seen.failures.is_empty(), "{seen:?}");

        // The port is taken first of all.
        server.stop().await;
        let squatter = std::net::TcpListener::bind("192.0.2.10:10250").unwrap();
        server.launch().await;
        within(Duration::from_secs(30), "the port is missed", async || {
            server.logged("the node agent cannot listen on 192.0.2.10:10250").then_some(())
        })
        .await;
        drop(squatter);
        server.node_ready().await;
        assert_eq!(k.path("pods -l app=web", state).await, before);

        // A server without a node is not cleaned away either.
        server.stop().await;
        server.clean().await.ok();
        let lone = Server::start(Default::default()).await;
        let mut clean = tokio::process::Command::new(seawall_tests::seawall());
        clean.args(["clean", "--data", "--data-dir"]).arg(lone.directory().join("data"));
        clean
            .arg("--run-dir")
            .arg(lone.directory().join("run"))
            .arg("--pod-log-dir")
            .arg(lone.directory().join("pods"));
        has(run(clean, "seawall clean", "").await.fails(), &["is in use by process", "stop it first"]);
    });
}
