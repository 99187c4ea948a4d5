//! The gossip of a real cluster: what it counts can be read, and its key is replaced while everything runs.

use std::{collections::BTreeMap, fs, process::Stdio, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_drill::lab::Machine;
use seawall_tests::{
    cluster::{Cluster, fails, works},
    http::Api,
    kubectl::{Kubectl, has},
    within,
};

const LONG: Duration = Duration::from_secs(60);
const ACCEPTED: &str = "{.metadata.annotations.seawall\\.dev/gossip-cluster-keys}";
/// The whole first part of a packet and of what is sealed in it, and the tag after it.
const SHORTEST: usize = 33 + 12 + 16;

/// The metrics of a machine's agent, or of its server.
async fn metrics(cluster: &Cluster, machine: &Machine, port: u16) -> Option<BTreeMap<String, f64>> {
    let kubeconfig = cluster.kubeconfig("s1");
    let file = tempfile::NamedTempFile::new().unwrap();
    let address = format!("{}:{port}", machine.address());
    fs::write(file.path(), kubeconfig.replace("127.0.0.1:6443", &address)).unwrap();
    let answer = Api::new(file.path()).unwrap().get("/metrics").await.ok()?;
    if answer.status != 200 {
        return None;
    }
    let text = answer.text();
    let values = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
    let all: BTreeMap<String, f64> =
        values.filter_map(|(name, value)| Some((name.into(), value.parse().ok()?))).collect();
    for name in all.keys() {
        let name = name.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        let family = if text.ends_with("# EOF\n") { family.trim_end_matches("_total") } else { family };
        let named = |what: &str| text.contains(&format!("# {what} {family} "));
        assert!(named("HELP") && named("TYPE"), "{name} has no HELP or TYPE in\n{text}");
    }
    Some(all)
}

fn dropped(reason: &str) -> String {
    format!("seawall_gossip_dropped_total{{reason=\"{reason}\"}}")
}

/// Sends something to a member's port that says of itself that it is sealed with this key.
async fn forge(from: &Machine, to: &Machine, key: &str) {
    let bytes: Vec<u8> = (0..4).map(|n| u8::from_str_radix(&key[n * 2..n * 2 + 2], 16).unwrap()).collect();
    let packet: Vec<u8> = [vec![2], bytes, vec![7; SHORTEST]].concat();
    let text: String = packet.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let script = format!("printf '{text}' > /dev/udp/{}/7946", to.address());
    let mut command = from.command("bash");
    assert!(command.args(["-c", &script]).stdin(Stdio::null()).status().await.unwrap().success());
}

async fn key(kubectl: &Kubectl, which: &str) -> Vec<u8> {
    STANDARD.decode(kubectl.path("secret/seawall-gossip -n kube-system", &format!("{{.data.{which}}}")).await).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gossips_key_is_replaced_and_its_metrics_are_shown() {
    let cluster = Cluster::up("gossip", 1, 2, Cluster::fast()).await;
    let kubectl = cluster.kubectl("s1");
    let machines = ["s1", "a1", "a2"].map(|name| cluster.machine(name));
    let [s1, a1, a2] = &machines;

    // What is counted is shown by every agent and by the server, and it moves.
    let mut before = BTreeMap::new();
    for machine in &machines {
        let first = within(LONG, "all know each other", async || {
            let all = metrics(&cluster, machine, 10250).await?;
            (all.get("seawall_gossip_members{verdict=\"alive\"}") == Some(&2.0)).then_some(all)
        })
        .await;
        for name in [
            "seawall_gossip_probes_total{result=\"failed\"}",
            "seawall_gossip_round_trip_seconds_bucket{le=\"+Inf\"}",
            "seawall_relay_connections_total",
            "seawall_proxy_rules_failed_total",
        ] {
            assert!(first.contains_key(name), "{}: {name} is not in {first:?}", machine.name());
        }
        within(LONG, "probes are counted", async || {
            let now = metrics(&cluster, machine, 10250).await?;
            let name = "seawall_gossip_probes_total{result=\"answered\"}";
            (now[name] > first[name] && now["seawall_proxy_rules_applied_total"] > 0.0).then_some(())
        })
        .await;
        before.insert(machine.name().to_owned(), first);
    }
    let of_server = metrics(&cluster, s1, 6443).await.unwrap();
    assert!(of_server.keys().any(|name| name.starts_with("apiserver_request_total")), "{of_server:?}");
    assert!(of_server["seawall_gossip_probes_total{result=\"answered\"}"] > 0.0);
    assert!(of_server["seawall_proxy_services"] >= 1.0);

    // Who cannot is told why.
    let rotate = "--log error gossip rotate-key";
    fails(a1, rotate, &["/var/lib/seawall/admin.kubeconfig", "no server has been started with --data-dir"]).await;
    fails(s1, &format!("{rotate} --even-without a9"), &["--even-without a9: there is no such node", "a1, a2, s1"])
        .await;
    // A node may read the key, and not replace it.
    let config: serde_json::Value = serde_yaml_ng::from_str(&cluster.kubeconfig("s1")).unwrap();
    let pair = fs::read_to_string(a1.on_disk("/var/lib/seawall/agent/pki/client.pem")).unwrap();
    let cluster_part = &config["clusters"][0]["cluster"];
    let mut narrow = config.clone();
    narrow["users"][0]["user"] = serde_json::json!({"client-certificate-data": STANDARD.encode(&pair), "client-key-data": STANDARD.encode(&pair)});
    assert!(cluster_part["server"].is_string());
    let place = s1.on_disk("/var/lib/seawall/narrow");
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("admin.kubeconfig"), serde_json::to_string(&narrow).unwrap()).unwrap();
    let told = ["the key in Secret kube-system/seawall-gossip was not replaced", "system:node:a1"];
    fails(s1, &format!("{rotate} --data-dir /var/lib/seawall/narrow"), &told).await;
    fs::write(place.join("admin.kubeconfig"), cluster.kubeconfig("s1").replace(":6443", ":6999")).unwrap();
    let told = ["cannot be read: does the server of this machine run"];
    fails(s1, &format!("{rotate} --data-dir /var/lib/seawall/narrow"), &told).await;

    // The old key is known to all: what says that it is sealed with it is looked at.
    let old = key(&kubectl, "current").await;
    let old_name = kubectl.path("node/a1", ACCEPTED).await;
    let unknown = dropped("unknown-key");
    let count = async |machine: &Machine, name: &str| metrics(&cluster, machine, 10250).await.map(|all| all[name]);
    forge(a1, a2, &old_name).await;
    within(LONG, "the packet is looked at", async || {
        let all = metrics(&cluster, a2, 10250).await?;
        (all[&dropped("unknown-sender")] + all[&dropped("forged")] >= 1.0).then_some(())
    })
    .await;
    let refused = count(a2, &unknown).await.unwrap();

    let said = works(s1, rotate).await;
    has(&said, &["is to be accepted by all", "is used from now on", "is the only key"]);
    let new = key(&kubectl, "current").await;
    assert_ne!(new, old);
    for which in ["next", "previous"] {
        assert_eq!(key(&kubectl, which).await, b"", "{which}");
    }
    for machine in &machines {
        let node = format!("node/{}", machine.name());
        within(LONG, "the new key alone is accepted", async || {
            let names = kubectl.path(&node, ACCEPTED).await;
            (!names.contains(',') && said.contains(&names) && names != old_name).then_some(())
        })
        .await;
    }
    // It goes on: nothing was refused, and nobody thought anything of anybody.
    for machine in &machines {
        let was = &before[machine.name()];
        let answered = "seawall_gossip_probes_total{result=\"answered\"}";
        let since = count(machine, answered).await.unwrap();
        let now = within(LONG, "probes are answered with the new key", async || {
            let now = metrics(&cluster, machine, 10250).await?;
            (now[answered] > since + 20.0).then_some(now)
        })
        .await;
        for name in [&unknown, &dropped("malformed"), "seawall_gossip_deaths_total"] {
            let name: &str = name;
            assert_eq!(now[name], was[name], "{}: {name}", machine.name());
        }
        let log = fs::read_to_string(machine.log()).unwrap();
        for verdict in ["a machine is dead", "a machine does not answer"] {
            assert!(!log.contains(verdict), "{}: {verdict}\n{log}", machine.name());
        }
    }
    // The old one is not known any more.
    forge(a1, a2, &old_name).await;
    within(LONG, "the old key is refused", async || (count(a2, &unknown).await? == refused + 1.0).then_some(())).await;
}
