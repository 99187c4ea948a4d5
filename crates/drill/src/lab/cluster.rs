//! The cluster on a lab's machines: who starts as what, and when all of it is ready.

use std::{fs, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::Instant};

use super::{
    Lab, Say,
    error::{Cause, Of as _, Result, Step},
    init::Service,
    layout::Role,
    machine::{Machine, Power, Program, until},
    replace_file,
};
use crate::connection::Target;

/// How long a server may take to serve, or a node to be Ready.
const PATIENCE: Duration = Duration::from_secs(120);
/// A service that has ended this often on its way up will not come up.
const HOPELESS: u32 = 20;
/// The port of the API on every server.
const PORT: u16 = 6443;
const DATA: &str = "/var/lib/seawall";

/// Starts the first server, lets all others join, and waits until every node is Ready.
pub async fn bring_up(lab: &Lab, say: &Say) -> Result<()> {
    let servers = lab.servers();
    let Some(first) = servers.first() else {
        return Err(Cause::Other("a cluster has a server at least: give --servers 1, or --bare".into()))
            .of_lab(lab.name(), "start the cluster");
    };
    first.set_service(&service(lab, first, &["--cluster-init"]))?;
    serving(first, PATIENCE).await?;
    say(&format!("{} has begun a cluster", first.name()));
    let token = token(first, Role::Server).await?;
    let mut agents = None;
    for machine in lab.machines().iter().filter(|m| m.name() != first.name()) {
        let token = match machine.role() {
            Role::Server => token.clone(),
            Role::Agent => match &agents {
                Some(token) => String::clone(token),
                None => agents.insert(self::token(first, Role::Agent).await?).clone(),
            },
        };
        join(lab, machine, first, &token)?;
    }
    wait(lab, say).await
}

/// Waits until all servers serve and all nodes are Ready, and leaves a kubeconfig.
pub async fn wait(lab: &Lab, say: &Say) -> Result<()> {
    let servers = lab.servers();
    let mut tasks: JoinSet<Result<Machine>> = servers
        .iter()
        .cloned()
        .map(|machine| async move { serving(&machine, PATIENCE).await.map(|()| machine) })
        .collect();
    while let Some(done) = tasks.join_next().await {
        let done = done.unwrap_or_else(|e| Err(Cause::Other(e.to_string())).of_lab(lab.name(), "wait for the servers"));
        say(&format!("{} serves", done?.name()));
    }
    write_kubeconfig(lab)?;
    nodes_ready(lab, PATIENCE, say).await
}

fn service(lab: &Lab, machine: &Machine, how: &[&str]) -> Service {
    let cluster = lab.inner.state.cluster.clone().unwrap_or_default();
    let mut args = vec![machine.role().word().to_owned()];
    args.extend(how.iter().map(|a| (*a).to_owned()));
    args.extend(["--node-name".into(), machine.name().into(), "--node-ip".into(), machine.addresses()]);
    args.extend(["--timing".into(), cluster.timing.clone()]);
    // All machines share the host's disk, of which a tenth is no measure of what they need.
    args.push("--eviction-hard=memory.available<100Mi,nodefs.available<1Gi".into());
    args.push("--image-gc-high-threshold=100".into());
    // Where there are machines for pods, servers are left to themselves, as kubeadm's are.
    if machine.role() == Role::Server && lab.machines().iter().any(|m| m.role() == Role::Agent) {
        args.extend(["--node-taint".into(), "node-role.kubernetes.io/control-plane:NoSchedule".into()]);
    }
    args.extend(match machine.role() {
        Role::Server => cluster.server_args,
        Role::Agent => cluster.agent_args,
    });
    Service { args, env: [("SEAWALL_LOG".to_owned(), cluster.log)].into(), run: true }
}

fn join(lab: &Lab, machine: &Machine, by: &Machine, token: &str) -> Result<()> {
    let url = format!("https://{}", SocketAddr::new(by.address().into(), PORT));
    machine.set_service(&service(lab, machine, &["--join", &url, "--token", token]))
}

async fn token(server: &Machine, role: Role) -> Result<String> {
    let token = server.run("seawall", &["--log", "error", "token", "create", "--role", role.word()], PATIENCE).await?;
    let token = token.trim().to_owned();
    if token.is_empty() || token.contains(char::is_whitespace) {
        return Err(Cause::Other(format!("{token:?} is not a token"))).of(server.name(), "create a token");
    }
    Ok(token)
}

/// Before a boot: a machine whose disk is empty joins the cluster by a server that lives. Its old arguments would make
/// the first server found a second cluster, and the others show a token that may be over.
pub async fn prepare(lab: &Lab, machine: &Machine) -> Result<()> {
    let in_use = fs::read_dir(machine.on_disk(DATA)).is_ok_and(|mut d| d.next().is_some());
    if lab.inner.state.cluster.is_none() || !lab.inner.state.finished || in_use {
        return Ok(());
    }
    let mut reasons = Vec::new();
    for server in lab.servers().iter().filter(|s| s.name() != machine.name()) {
        if server.power()? != Power::On {
            reasons.push(format!("{} is {}", server.name(), server.power()?.word()));
            continue;
        }
        match token(server, machine.role()).await {
            Ok(token) => return join(lab, machine, server, &token),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    let reasons = reasons.join("; ");
    let why = format!("its disk is empty, and no other server gives it a token: {reasons}; power one on first");
    Err(Cause::Other(why)).of(machine.name(), "join the cluster")
}

/// Waits until a server says that it is ready.
async fn serving(server: &Machine, limit: Duration) -> Result<()> {
    let (deadline, before) = (Instant::now() + limit, server.told().ended);
    loop {
        let Err(last) = ask(server, "/readyz").await else { return Ok(()) };
        hopeless(server, before)?;
        if Instant::now() > deadline {
            let what = format!("/readyz says ok ({last}); see {}", server.log().display());
            return Err(Cause::Late { what, limit }).of(server.name(), "wait for its server");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until every server that has power serves, and the node of every machine that has power is Ready.
pub async fn well(lab: &Lab, limit: Duration) -> Result<()> {
    for server in lab.servers() {
        if server.power()? == Power::On {
            serving(&server, limit).await?;
        }
    }
    nodes_ready(lab, limit, &(Arc::new(|_: &str| {}) as Say)).await
}

/// Whether the service ends again and again, having ended `before` times when it began to be waited for.
fn hopeless(machine: &Machine, before: u32) -> Result<()> {
    let told = machine.told();
    // A boot counts anew.
    if told.ended.saturating_sub(if before > told.ended { 0 } else { before }) < HOPELESS {
        return Ok(());
    }
    let log = fs::read_to_string(machine.log()).unwrap_or_default();
    let tail: Vec<&str> = log.lines().rev().take(5).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    let words = format!("it ended {} times ({}); its log ends:\n{}", told.ended, told.last_end, tail.join("\n"));
    Err(Cause::Other(words)).of(machine.name(), "wait for its service")
}

/// Asks a server as the administrator.
async fn ask(server: &Machine, path: &str) -> Step<Bytes> {
    const LIMIT: Duration = Duration::from_secs(5);
    let kubeconfig = server.on_disk(&format!("{DATA}/admin.kubeconfig"));
    if !kubeconfig.exists() {
        return Err(Cause::Other("it has no kubeconfig yet".into()));
    }
    let answer = async {
        let target = Target::from_kubeconfig(&kubeconfig)?.at(&server.address().to_string(), PORT);
        target.connect().await?.expect(Method::GET, path, Bytes::new()).await
    };
    let late = |_| Cause::Late { what: format!("{path} is answered"), limit: LIMIT };
    tokio::time::timeout(LIMIT, answer).await.map_err(late)?.map_err(|e| Cause::Other(format!("{e:#}")))
}

async fn nodes_ready(lab: &Lab, limit: Duration, say: &Say) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut machines = Vec::new();
    for machine in lab.machines() {
        if machine.power()? == Power::On {
            machines.push((machine.told().ended, machine));
        }
    }
    let mut said = 0;
    loop {
        let mut waiting: Vec<String> = machines.iter().map(|(_, m)| m.name().to_owned()).collect();
        for (_, server) in machines.iter().filter(|(_, m)| m.role() == Role::Server) {
            let Ok(answer) = ask(server, "/api/v1/nodes").await else { continue };
            let list: Value = serde_json::from_slice(&answer).unwrap_or_default();
            let nodes = list["items"].as_array().into_iter().flatten();
            let ready: Vec<&str> =
                nodes.filter(|n| is_ready(n)).filter_map(|n| n["metadata"]["name"].as_str()).collect();
            waiting.retain(|name| !ready.contains(&name.as_str()));
            break;
        }
        let ready = machines.len() - waiting.len();
        if ready > said {
            said = ready;
            say(&format!("{ready} of {} nodes are Ready", machines.len()));
        }
        if waiting.is_empty() {
            return Ok(());
        }
        for (before, machine) in machines.iter().filter(|(_, m)| waiting.iter().any(|w| w == m.name())) {
            hopeless(machine, *before)?;
        }
        if Instant::now() > deadline {
            let what = format!("the nodes {} are Ready; see: seawall lab logs {}", waiting.join(", "), waiting[0]);
            return Err(Cause::Late { what, limit }).of_lab(lab.name(), "wait for the nodes");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn is_ready(node: &Value) -> bool {
    let mut conditions = node["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// A kubeconfig for the host: a context for every server, the first that has power being the current one.
pub fn write_kubeconfig(lab: &Lab) -> Result<String> {
    let step = "write its kubeconfig";
    let servers = lab.servers();
    let mut from =
        servers.iter().filter_map(|s| fs::read_to_string(s.on_disk(&format!("{DATA}/admin.kubeconfig"))).ok());
    let missing = || Cause::Other("no server has left one on its disk".into());
    let text = from.next().ok_or_else(missing).of_lab(lab.name(), step)?;
    let live = servers.iter().find(|s| s.power().is_ok_and(|p| p == Power::On)).or(servers.first());
    let current = live.map(Machine::name).unwrap_or_default();
    let addresses: Vec<(String, String)> =
        servers.iter().map(|s| (s.name().to_owned(), s.address().to_string())).collect();
    let text = kubeconfig(&text, lab.name(), &addresses, current).of_lab(lab.name(), step)?;
    let path = lab.kubeconfig();
    let written = replace_file(&path, &text).and_then(|()| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
    });
    written.map_err(Cause::io(path.display().to_string())).of_lab(lab.name(), step)?;
    Ok(text)
}

fn kubeconfig(admin: &str, lab: &str, servers: &[(String, String)], current: &str) -> Step<String> {
    let broken = |e: serde_yaml_ng::Error| Cause::Other(format!("the administrator's kubeconfig: {e}"));
    let config: Value = serde_yaml_ng::from_str(admin).map_err(broken)?;
    let (authority, user) =
        (&config["clusters"][0]["cluster"]["certificate-authority-data"], &config["users"][0]["user"]);
    if authority.is_null() || user.is_null() {
        return Err(Cause::Other("the administrator's kubeconfig has no cluster or no user".into()));
    }
    let name = |server: &str| format!("{lab}-{server}");
    let clusters = servers.iter().map(|(server, address)| {
        json!({"name": name(server), "cluster": {"server": format!("https://{address}:{PORT}"), "certificate-authority-data": authority}})
    });
    let admin = format!("{lab}-admin");
    let contexts = servers
        .iter()
        .map(|(server, _)| json!({"name": name(server), "context": {"cluster": name(server), "user": admin}}));
    let whole = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": name(current),
        "clusters": clusters.collect::<Vec<_>>(), "contexts": contexts.collect::<Vec<_>>(),
        "users": [{"name": admin, "user": user}],
    });
    serde_yaml_ng::to_string(&whole).map_err(broken)
}

/// Waits until a machine's containerd listens.
pub async fn containerd(machine: &Machine) -> Result<()> {
    // The service starts it, and a socket in the machine's /run is only seen from there.
    until(PATIENCE, "its containerd runs", || machine.pid_of(Program::Containerd).ok().flatten())
        .await
        .of(machine.name(), "wait for containerd")
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_for_every_server() {
        let admin =
            "{clusters: [{name: c, cluster: {server: 'https://127.0.0.1:6443', certificate-authority-data: QQ==}}],
                      users: [{name: u, user: {client-certificate-data: Qg==, client-key-data: Qw==}}]}";
        let servers = [("s1".to_owned(), "10.5.0.11".to_owned()), ("s2".to_owned(), "10.5.0.12".to_owned())];
        let text = kubeconfig(admin, "x", &servers, "s2").unwrap();
        let config: Value = serde_yaml_ng::from_str(&text).unwrap();
        assert_eq!(config["current-context"], "x-s2");
        assert_eq!(config["clusters"][0]["cluster"]["server"], "https://10.5.0.11:6443");
        assert_eq!(config["clusters"][1]["cluster"]["certificate-authority-data"], "QQ==");
        assert_eq!(config["contexts"][1]["context"]["user"], config["users"][0]["name"]);
        assert!(kubeconfig("{}", "x", &servers, "s1").unwrap_err().to_string().contains("no cluster"));
    }
}
