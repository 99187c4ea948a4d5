//! The server is killed in the middle of its work: what it acknowledged is there when it is back, soon, and the
//! workload has noticed nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Method;
use seawall_tests::{
    Server,
    http::{Api, Connection},
    on_a_machine,
    traffic::Traffic,
    within,
};
use serde_json::{Value, json};

const ROUNDS: usize = 5;
const WRITERS: usize = 12;
/// What a start may take; it is 2 s for the optimised build on an idle machine.
const START: Duration = Duration::from_secs(5);

/// What the server has said of each object, by its path: the revision that it was written at, or none for deleted.
type Acknowledged = Arc<Mutex<BTreeMap<String, Option<u64>>>>;

#[test]
fn nothing_acknowledged_is_lost_and_nobody_notices() {
    on_a_machine(async |machine| {
        let mut server = Server::with_node(&machine).await;
        let by_service = server.serve_web().await;
        let k = server.kubectl.clone();
        let pod_ip = k.path("pods -l app=web", "{.items[0].status.podIP}").await;
        let containers = k.path("pods -l app=web", "{.items[*].status.containerStatuses[*].containerID}").await;
        let traffic = [Traffic::start(&by_service.to_string()), Traffic::start(&format!("{pod_ip}:8080"))];

        let acknowledged = Acknowledged::default();
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> =
            (0..WRITERS).map(|n| tokio::spawn(write(server.api(), n, acknowledged.clone(), stop.clone()))).collect();
        for round in 1..=ROUNDS {
            let before = acknowledged.lock().unwrap().len();
            within(Duration::from_secs(60), "the server acknowledges writes", async || {
                (acknowledged.lock().unwrap().len() > before + 400).then_some(())
            })
            .await;
            server.crash().await;
            let promised = acknowledged.lock().unwrap().clone();
            let started = server.launch().await;
            eprintln!("round {round}: {} objects, ready after {:?}", promised.len(), started.ready);
            assert!(started.ready < START, "round {round}: {:?} until /readyz", started.ready);
            check(&server.api(), &promised, &acknowledged).await;
        }
        stop.store(true, Ordering::Relaxed);
        let errors: usize = futures::future::join_all(writers).await.into_iter().map(|w| w.unwrap()).sum();
        assert!(errors > 0, "no writer was interrupted, so nothing was tested");
        let all = acknowledged.lock().unwrap().clone();
        check(&server.api(), &all, &acknowledged).await;

        // Once the agent has looked at its pods again, they are the same ones.
        k.run("rollout status deployment/web --timeout=60s").await.ok();
        assert_eq!(k.path("pods -l app=web", "{.items[*].status.containerStatuses[*].containerID}").await, containers);
        assert_eq!(k.path("pods -l app=web", "{.items[*].status.containerStatuses[*].restartCount}").await, "0 0");
        for traffic in traffic {
            let seen = traffic.stop();
            eprintln!("{} answers, slowest {:?}", seen.answered(), seen.slowest);
            assert!(seen.answered() > 100, "{seen:?}");
            assert!(seen.failures.is_empty(), "requests failed: {:?}", seen.failures);
        }
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

/// Creates config maps and pods and deletes every fourth, until told to stop. Counts the requests without an answer.
async fn write(api: Api, writer: usize, acknowledged: Acknowledged, stop: Arc<AtomicBool>) -> usize {
    let mut errors = 0;
    let mut connection = None;
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("w{writer}-{n}");
        let (collection, object) = if writer.is_multiple_of(4) {
            // Pods that no node takes: the scheduler looks at each of them.
            let spec = json!({"containers": [{"name": "c", "image": "none"}], "nodeSelector": {"no": "where"}});
            ("/api/v1/namespaces/default/pods", json!({"metadata": {"name": name}, "spec": spec}))
        } else {
            let data = json!({"text": format!("{name} ").repeat(50)});
            ("/api/v1/namespaces/default/configmaps", json!({"metadata": {"name": name}, "data": data}))
        };
        let path = format!("{collection}/{name}");
        // From here until the answer, either outcome is right.
        match send(&api, &mut connection, Method::POST, collection, &object).await {
            Ok((201, answer)) => {
                let revision = answer["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
                acknowledged.lock().unwrap().insert(path.clone(), Some(revision));
            }
            Ok((status, answer)) => panic!("{path}: {status}: {answer}"),
            Err(_) => {
                errors += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        }
        if n % 4 == 3 {
            acknowledged.lock().unwrap().remove(&path);
            let now = json!({"gracePeriodSeconds": 0});
            match send(&api, &mut connection, Method::DELETE, &path, &now).await {
                Ok((200, _)) => drop(acknowledged.lock().unwrap().insert(path, None)),
                Ok((status, answer)) => panic!("{path}: {status}: {answer}"),
                Err(_) => errors += 1,
            }
        }
    }
    errors
}

async fn send(
    api: &Api,
    connection: &mut Option<Connection>,
    method: Method,
    path: &str,
    body: &Value,
) -> anyhow::Result<(u16, Value)> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => api.connect().await?,
    };
    let answer = open.send(method, path, "application/json", Bytes::from(serde_json::to_vec(body)?)).await?;
    *connection = Some(open);
    Ok((answer.status, answer.json()))
}

/// All that was created is there, at the revision that was told or a later one; what was deleted is not. Writers go on
/// meanwhile: what they are about to delete is no longer in `latest`.
async fn check(api: &Api, promised: &BTreeMap<String, Option<u64>>, latest: &Acknowledged) {
    for collection in ["/api/v1/namespaces/default/configmaps", "/api/v1/namespaces/default/pods"] {
        let answer = api.get(collection).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        let list = answer.json();
        let at: u64 = list["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
        let found: BTreeMap<String, u64> = list["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| {
                let metadata = &item["metadata"];
                let revision = metadata["resourceVersion"].as_str().unwrap().parse().unwrap();
                (format!("{collection}/{}", metadata["name"].as_str().unwrap()), revision)
            })
            .collect();
        let latest = latest.lock().unwrap().clone();
        let mut lost = BTreeSet::new();
        for (path, revision) in promised.iter().filter(|(path, _)| path.starts_with(collection)) {
            match (revision, found.get(path)) {
                (None, None) => {}
                (None, Some(_)) => drop(lost.insert(format!("{path} is back, though it was deleted"))),
                (Some(_), None) if latest.get(path) != Some(revision) => {}
                (Some(_), None) => drop(lost.insert(format!("{path} is lost"))),
                (Some(told), Some(now)) => {
                    if now < told || *now > at {
                        lost.insert(format!("{path} was written at {told}, is at {now}, in a list of {at}"));
                    }
                }
            }
        }
        assert!(lost.is_empty(), "{} of {}: {lost:#?}", lost.len(), promised.len());
    }
}
