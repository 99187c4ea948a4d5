//! Devices of a plugin: the Node shows them, containers are made with them, nobody gets another's, and all of that holds
//! when the agent is started again.

use std::{fs, path::PathBuf, process::Stdio};

use seawall_tests::{
    Server,
    kubectl::{Kubectl, has},
    on_a_machine, until,
};
use tokio::process::{Child, Command};

use super::IMAGE;

pub(super) const RESOURCE: &str = "example.test/null";

/// A plugin that runs, and the directory where it keeps things.
pub(super) struct Plugin {
    child: Child,
    state: PathBuf,
}

impl Plugin {
    pub(super) fn start(server: &Server, devices: &[&str]) -> Plugin {
        let state = server.directory().join("plugin");
        fs::create_dir_all(&state).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_device-plugin"));
        command.arg(server.directory().join("device-plugins")).arg(&state).arg(RESOURCE).args(devices);
        let child = command.stdin(Stdio::null()).kill_on_drop(true).spawn().unwrap();
        Plugin { child, state }
    }

    /// What it was asked.
    pub(super) fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.state.join("calls")).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// A pod whose container wants so many, behind init containers that want as many as these.
fn pod(name: &str, node: &str, init: &[usize], main: usize) -> String {
    let container = |name: &str, count: usize, command: &str| {
        format!(
            "
  - name: {name}
    image: {IMAGE}
    command: [sh, -c, \"{command}\"]
    env: [{{name: OWN, value: of the pod}}]
    resources: {{limits: {{{RESOURCE}: {count}}}}}"
        )
    };
    let init: String =
        init.iter().enumerate().map(|(n, count)| container(&format!("init{n}"), *count, "echo $DEVICES")).collect();
    let main = container("main", main, "trap exit TERM; sleep 10000 & wait $!");
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  initContainers: {init}
  containers: {main}
---"
    )
}

/// What the Node says: how many there are, and how many can be used.
pub(super) async fn shows(k: &Kubectl, capacity: usize, allocatable: usize) {
    let key = RESOURCE.replace('.', "\\.");
    let path = format!("{{.items[0].status.capacity.{key}}}/{{.items[0].status.allocatable.{key}}}");
    k.reaches("nodes", &path, &format!("{capacity}/{allocatable}")).await;
}

async fn ready(k: &Kubectl, pod: &str) {
    k.run(&format!("wait pod/{pod} --for=condition=Ready --timeout=60s")).await.ok();
}

/// Which devices a pod has.
async fn has_devices(k: &Kubectl, pod: &str, expect: &str) {
    let said = k.args(&["exec", pod, "--", "sh", "-c", "echo $DEVICES $OWN; ls /dev | grep test-"]).await.ok();
    let nodes: String = expect.split(',').map(|device| format!("test-{device}\n")).collect();
    assert_eq!(said, format!("{expect} of the pod\n{nodes}"));
}

#[test]
fn pods_have_devices_of_a_plugin() {
    on_a_machine(async |machine| {
        let mut server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = server.kubectl.clone();
        let node = k.path("nodes", "{.items[0].metadata.name}").await;
        let plugin = Plugin::start(&server, &["a", "b", "c"]);
        shows(&k, 3, 3).await;

        // The plugin would rather give the last one, and is told before the container starts.
        k.apply(&pod("one", "", &[], 1)).await;
        ready(&k, "one").await;
        has_devices(&k, "one", "c").await;
        assert_eq!(plugin.calls(), ["allocate c", "start c"]);
        let write = "echo gone >/dev/test-c && cat /dev/test-c && ls /plugin && ! touch /plugin/x 2>/dev/null";
        has(k.args(&["exec", "one", "--", "sh", "-c", write]).await.ok(), &["calls"]);

        // Nobody gets more than there are: the scheduler says so, and where nobody asked it, the node.
        k.apply(&pod("many", "", &[], 3)).await;
        k.reaches("pod/many", "{.status.conditions[?(@.type=='PodScheduled')].reason}", "Unschedulable").await;
        let events = k.run("get events --field-selector involvedObject.name=many").await.ok();
        has(events, &[&format!("Insufficient {RESOURCE}")]);
        k.apply(&pod("bound", &node, &[], 3)).await;
        k.reaches("pod/bound", "{.status.phase}/{.status.reason}", "Failed/UnexpectedAdmissionError").await;
        let said = k.path("pod/bound", "{.status.message}").await;
        let short = format!("requested number of devices unavailable for {RESOURCE}. Requested: 3, Available: 2");
        assert_eq!(said, format!("Pod was rejected: Allocate failed due to {short}, which is unexpected"));

        // One that is sick is not given out.
        fs::write(plugin.state.join("b.sick"), "").unwrap();
        shows(&k, 3, 2).await;
        // What an init container had goes to the one after it: there is only one left.
        k.apply(&pod("two", "", &[1, 1], 1)).await;
        ready(&k, "two").await;
        has_devices(&k, "two", "a").await;
        assert_eq!(k.run("logs two -c init0").await.ok(), "a\n");

        // The agent knows after a restart who has what, and plugins come again.
        let containers = "{.items[*].status.containerStatuses[*].containerID}";
        let before = k.path("pods", containers).await;
        server.crash().await;
        server.launch().await;
        shows(&k, 3, 2).await;
        fs::remove_file(plugin.state.join("b.sick")).unwrap();
        shows(&k, 3, 3).await;
        assert_eq!(k.path("pods", containers).await, before);
        k.apply(&pod("three", "", &[], 1)).await;
        ready(&k, "three").await;
        has_devices(&k, "three", "b").await;
        // A container that is started anew has what it had.
        let asked = plugin.calls().len();
        k.run("exec one -- kill 1").await.ok();
        k.reaches("pod/one", "{.status.containerStatuses[0].restartCount}", "1").await;
        ready(&k, "one").await;
        has_devices(&k, "one", "c").await;
        assert_eq!(plugin.calls()[asked..], ["start c"]);

        // Without a plugin nothing is given out, and what was given stays. The plugin comes back, and so do its devices.
        let state = plugin.state.clone();
        plugin.kill().await;
        shows(&k, 3, 0).await;
        has_devices(&k, "one", "c").await;
        let plugin = Plugin::start(&server, &["a", "b", "c"]);
        shows(&k, 3, 3).await;
        k.run("delete pod one two --wait=true").await.ok();
        until("the pod that waited has not room yet", async || {
            let reason = k.path("pod/many", "{.status.conditions[?(@.type=='PodScheduled')].reason}").await;
            (reason == "Unschedulable").then_some(())
        })
        .await;
        k.run("delete pod three --wait=true").await.ok();
        ready(&k, "many").await;
        has_devices(&k, "many", "a,b,c").await;
        assert_eq!(plugin.state, state);
    });
}
