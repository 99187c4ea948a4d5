//! Running kubectl and looking at what it says.

use std::{
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

/// How kubectl reaches a cluster.
#[derive(Clone, Debug)]
pub struct Kubectl {
    /// The kubeconfig.
    pub kubeconfig: PathBuf,
    /// Where it keeps its cache.
    pub home: PathBuf,
}

/// What a command left.
#[derive(Debug)]
pub struct Output {
    /// The command, to be named when something is wrong.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of a command that must have succeeded.
    ///
    /// # Panics
    /// If it failed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{} failed:\n{}{}", self.command, self.stdout, self.stderr);
        self.stdout
    }

    /// The standard error of a command that must have failed.
    ///
    /// # Panics
    /// If it succeeded.
    #[track_caller]
    pub fn fails(self) -> String {
        assert!(!self.status.success(), "{} should have failed, and said:\n{}", self.command, self.stdout);
        self.stderr
    }
}

/// Asserts that a text has all these parts.
///
/// # Panics
/// If one is missing.
#[track_caller]
pub fn has(text: impl AsRef<str>, parts: &[&str]) {
    for part in parts {
        assert!(text.as_ref().contains(part), "{part:?} is missing in:\n{}", text.as_ref());
    }
}

impl Kubectl {
    /// The program.
    pub fn program() -> PathBuf {
        if let Some(program) = std::env::var_os("KUBECTL") {
            return program.into();
        }
        let installed = crate::workspace().join(".venv/bin/kubectl");
        if installed.exists() { installed } else { "kubectl".into() }
    }

    /// A command that is not started yet.
    pub fn command(&self) -> Command {
        let mut command = Command::new(Self::program());
        command.env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.home).current_dir(&self.home);
        command.env_remove("EDITOR").env_remove("KUBE_EDITOR").kill_on_drop(true).stdin(Stdio::null());
        command
    }

    /// Runs kubectl with words that contain no blanks.
    pub async fn run(&self, words: &str) -> Output {
        self.args(&words.split_whitespace().collect::<Vec<_>>()).await
    }

    /// Runs kubectl with these arguments.
    pub async fn args(&self, args: &[&str]) -> Output {
        self.input(args, "").await
    }

    /// Runs kubectl with these words, and the text as its standard input.
    pub async fn pipe(&self, words: &str, input: &str) -> Output {
        self.input(&words.split_whitespace().collect::<Vec<_>>(), input).await
    }

    /// Runs kubectl with these arguments and standard input.
    pub async fn input(&self, args: &[&str], input: &str) -> Output {
        let mut command = self.command();
        command.args(args);
        run(command, &format!("kubectl {}", args.join(" ")), input).await
    }

    /// `kubectl apply -f -` of this YAML.
    pub async fn apply(&self, yaml: &str) -> String {
        self.pipe("apply -f -", yaml).await.ok()
    }

    /// An object as JSON; `what` is what follows `kubectl get`.
    pub async fn json(&self, what: &str) -> Value {
        let text = self.run(&format!("get {what} -o json")).await.ok();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("get {what}: {e}: {text}"))
    }

    /// What a JSONPath gives; empty if the object is not there.
    pub async fn path(&self, what: &str, path: &str) -> String {
        self.run(&format!("get {what} --ignore-not-found -o jsonpath={path}")).await.ok()
    }

    /// Prints what a cluster looks like after a test has failed: where pods are, why they wait, what was seen last.
    pub fn post_mortem(&self) {
        let looks = [
            "get nodes,pods,deployments,statefulsets -A -o wide --request-timeout=5s",
            "describe nodes --request-timeout=5s",
            "get events -A --sort-by=.metadata.creationTimestamp --request-timeout=5s",
        ];
        for words in looks {
            let mut command = std::process::Command::new(Self::program());
            command.args(words.split(' ')).env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.home);
            let said = match command.stdin(Stdio::null()).output() {
                Ok(output) => String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
                Err(error) => error.to_string(),
            };
            let lines: Vec<&str> = said.lines().collect();
            eprintln!("--- kubectl {words}\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }

    /// Waits until a JSONPath gives this.
    ///
    /// # Panics
    /// If it never does; what it gave last is said then.
    pub async fn reaches(&self, what: &str, path: &str, wanted: &str) {
        let deadline = tokio::time::Instant::now() + crate::PATIENCE;
        loop {
            let found = self.path(what, path).await;
            if found == wanted {
                return;
            }
            if tokio::time::Instant::now() > deadline {
                let state = self.run(&format!("get {what} -o yaml")).await.stdout;
                let events = self.run("get events --sort-by=.lastTimestamp").await.stdout;
                panic!("{what}: {path} is {found:?}, never {wanted:?}\n{state}\n{events}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Starts a command that does not end by itself, to be read line by line.
    pub fn follow(&self, words: &str) -> Following {
        let mut command = self.command();
        command.args(words.split_whitespace());
        Following::start(command, &format!("kubectl {words}"))
    }

    /// Starts a command that is typed to at a terminal of so many rows and columns. Its first line names the terminal.
    pub fn at_terminal(&self, rows: u16, columns: u16, words: &str) -> Following {
        let mut command = Command::new("script");
        let line = format!("tty; stty rows {rows} cols {columns} -echo; exec {} {words}", Self::program().display());
        command.env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.home).env("TERM", "dumb").current_dir(&self.home);
        // -e: the command's exit code is script's; -f: what it says comes at once.
        command.args(["-qefc", &line, "/dev/null"]).kill_on_drop(true);
        Following::start(command, &format!("kubectl {words}"))
    }
}

/// A command that goes on. It is killed when dropped.
pub struct Following {
    command: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Following {
    fn start(mut command: Command, name: &str) -> Following {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Following { command: name.to_owned(), stdin: child.stdin.take(), child, lines }
    }

    /// The next line with this part.
    ///
    /// # Panics
    /// If the command ends or stays silent.
    pub async fn line(&mut self, part: &str) -> String {
        let mut seen = String::new();
        let found = tokio::time::timeout(crate::PATIENCE, async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                if line.contains(part) {
                    return Some(line);
                }
                seen += &format!("{line}\n");
            }
            None
        });
        match found.await {
            Ok(Some(line)) => line,
            Ok(None) => panic!("{} ended without {part:?}:\n{seen}", self.command),
            Err(_) => panic!("{} never said {part:?}:\n{seen}", self.command),
        }
    }

    /// Types a line.
    ///
    /// # Panics
    /// If the command no longer reads.
    pub async fn say(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("not hung up yet");
        stdin.write_all(format!("{line}\n").as_bytes()).await.unwrap_or_else(|e| panic!("{}: {e}", self.command));
    }

    /// Ends its standard input.
    pub fn hang_up(&mut self) {
        self.stdin = None;
    }

    /// Waits until the command ends by itself, and tells its exit code.
    ///
    /// # Panics
    /// If it does not end.
    pub async fn ends(mut self) -> i32 {
        let ended = tokio::time::timeout(crate::PATIENCE, async {
            while self.lines.next_line().await.is_ok_and(|line| line.is_some()) {}
            self.child.wait().await.unwrap()
        });
        let status = ended.await.unwrap_or_else(|_| panic!("{} does not end", self.command));
        status.code().unwrap_or(-1)
    }

    /// Ends the command.
    pub async fn stop(mut self) {
        let _ = self.child.kill().await;
    }
}

/// Runs a command to its end.
///
/// # Panics
/// If it cannot be started, or does not end.
pub async fn run(mut command: Command, name: &str, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let started = tokio::time::Instant::now();
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{name}: {e}: `make test` installs what is needed"));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    // Beside the reading: a command that answers before it has read all would wait for us for ever.
    let feeding = tokio::spawn(async move {
        let _ = stdin.write_all(input.as_bytes()).await;
    });
    let ended = tokio::time::timeout(crate::PATIENCE + Duration::from_secs(30), child.wait_with_output()).await;
    feeding.abort();
    let output = ended.unwrap_or_else(|_| panic!("{name} does not end")).unwrap();
    eprintln!("{:7.3} s  {name}  ({})", started.elapsed().as_secs_f64(), output.status.code().unwrap_or(-1));
    Output {
        command: name.to_owned(),
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Writes a text to a file below a directory and names it.
pub fn file(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}
