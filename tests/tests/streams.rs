//! attach and exec with standard input and terminals: `kubectl` connected with processes in containers.

use seawall_tests::{
    Server,
    kubectl::{Following, Kubectl, has, run},
    on_a_machine, until,
};

const ECHO: &str = "while read line; do echo heard $line; done; echo silence";

fn pod(name: &str, settings: &str, command: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: c, image: example.test/web:v1, {settings}, command: [sh, -c, '{command}']}}
"
    )
}

#[test]
fn terminals_and_standard_input() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image("example.test/web:v1", "unused").await;
        let k = &server.kubectl;
        k.apply(&pod("shared", "stdin: true", ECHO)).await;
        k.apply(&pod("once", "stdin: true, stdinOnce: true", ECHO)).await;
        k.apply(&pod("deaf", "tty: false", "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.1; done")).await;
        k.apply(&pod("shell", "stdin: true, tty: true", "exec sh")).await;
        for pod in ["shared", "once", "deaf", "shell"] {
            k.run(&format!("wait pod/{pod} --for=condition=Ready --timeout=60s")).await.ok();
        }
        attaching(k).await;
        running(k).await;
        resizing(k).await;
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

async fn attaching(k: &Kubectl) {
    // Without -i only what the process says: two listeners hear the same, and their end is not the process's.
    let (mut one, mut two) = (k.follow("attach deaf"), k.follow("attach deaf"));
    let line = one.line("line").await;
    let number: u32 = line.trim_start_matches("line ").parse().unwrap();
    one.line(&format!("line {}", number + 2)).await;
    two.line("line").await;
    one.stop().await;
    two.line("line").await;
    two.stop().await;
    // One without a standard input cannot hear; kubectl says so, and goes on.
    let mut unheard = k.follow("attach -i deaf");
    unheard.say("anybody").await;
    unheard.line("line").await;
    unheard.stop().await;
    has(k.run("attach nobody").await.fails(), &["pods \"nobody\" not found"]);
    has(k.run("attach deaf -c other").await.fails(), &["container other"]);

    // With -i it hears us, across several connections: the end of ours is not the end of its standard input.
    let mut first = k.follow("attach -i shared");
    first.say("first").await;
    first.line("heard first").await;
    first.hang_up();
    assert_eq!(first.ends().await, 0);
    let mut second = k.follow("attach -i shared");
    second.say("second").await;
    second.line("heard second").await;
    second.stop().await;
    assert_eq!(k.run("logs shared").await.ok(), "heard first\nheard second\n");
    assert_eq!(k.path("pod/shared", "{.status.phase}").await, "Running");

    // stdinOnce: the first connection's end is that of the standard input, and the process comes to its own.
    let mut only = k.follow("attach -i once");
    only.say("word").await;
    only.line("heard word").await;
    only.hang_up();
    only.line("silence").await;
    assert_eq!(only.ends().await, 0);
    k.reaches("pod/once", "{.status.phase}", "Succeeded").await;
    has(k.run("attach once").await.fails(), &["cannot attach", "completed"]);

    // A container with a terminal.
    let mut shell = k.at_terminal(30, 90, "attach -it shell");
    shell.say("echo $((40+2))").await;
    shell.line("42").await;
    shell.say("stty size").await;
    shell.line("30 90").await;
    shell.stop().await;
    assert_eq!(k.path("pod/shell", "{.status.phase}").await, "Running");
    let mut shell = k.at_terminal(30, 90, "attach -it shell");
    shell.say("exit 3").await;
    shell.ends().await;
    k.reaches("pod/shell", "{.status.containerStatuses[0].state.terminated.exitCode}", "3").await;
}

/// `kubectl run -i` is create, wait, attach, and the container's exit code.
async fn running(k: &Kubectl) {
    let words = ["run", "brief", "-i", "--rm", "--quiet", "--restart=Never", "--image=example.test/web:v1", "--"];
    let answer = k.input(&[&words[..], &["sh", "-c", "read a; echo got $a; exit 5"]].concat(), "input\n").await;
    assert_eq!((answer.status.code(), answer.stdout.contains("got input")), (Some(5), true), "{answer:?}");
    until("it is removed", async || {
        k.path("pods", "{.items[*].metadata.name}").await.find("brief").is_none().then_some(())
    })
    .await;
}

async fn resizing(k: &Kubectl) {
    let mut shell = k.at_terminal(40, 100, "exec -it deaf -- sh");
    let terminal = shell.line("/dev/").await;
    shell.say("stty size").await;
    shell.line("40 100").await;
    // The window changes while the command runs.
    resize(&terminal, "50", "120").await;
    size(&mut shell, "50 120").await;
    resize(&terminal, "24", "80").await;
    size(&mut shell, "24 80").await;
    shell.say("exit 7").await;
    assert_eq!(shell.ends().await, 7);
}

async fn resize(terminal: &str, rows: &str, columns: &str) {
    let mut stty = tokio::process::Command::new("stty");
    stty.args(["-F", terminal.trim(), "rows", rows, "cols", columns]);
    run(stty, "stty", "").await.ok();
}

/// Asks until the new size has arrived.
async fn size(shell: &mut Following, wanted: &str) {
    shell
        .say(&format!("until [ \"$(stty size)\" = \"{wanted}\" ]; do sleep 0.05; done; echo size is \"$(stty size)\""))
        .await;
    shell.line(&format!("size is {wanted}")).await;
}
