//! API priority and fairness: who waits for whom.

use std::time::Duration;

use http::{Method, StatusCode};
use http_body_util::BodyExt;
use seawall_server::{
    Inflight,
    auth::{NODES, UserInfo},
};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::harness::Api;

const LEVELS: &str = "/apis/flowcontrol.apiserver.k8s.io/v1/prioritylevelconfigurations";
const SCHEMAS: &str = "/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const SOON: Duration = Duration::from_secs(10);

/// A server with few seats, and more objects than go into one piece of a body, but not more than make one seat.
async fn narrow(fair: bool) -> Api {
    let api = Api::configured(|config| config.inflight = Inflight { most: 60, fair }).await;
    for i in 0..90 {
        let map = json!({"metadata": {"name": format!("m{i}")}, "data": {"k": "x".repeat(4000)}});
        api.create(MAPS, map).await;
    }
    let role =
        json!({"metadata": {"name": "reads"}, "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]});
    api.create("/apis/rbac.authorization.k8s.io/v1/clusterroles", role).await;
    let binding = json!({"metadata": {"name": "reads"}, "subjects": [{"kind": "Group", "name": "system:authenticated",
        "apiGroup": "rbac.authorization.k8s.io"}], "roleRef": {"kind": "ClusterRole", "name": "reads",
        "apiGroup": "rbac.authorization.k8s.io"}});
    api.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding).await;
    api
}

fn as_user(api: &Api, name: &str, groups: &[&str]) -> Api {
    api.with_user(Some(UserInfo::new(name, groups)))
}

/// The value of a line of the metrics; nothing if it is not there.
async fn figure(api: &Api, line: &str) -> Option<f64> {
    let text = api.raw(Method::GET, "/metrics", &[], "").await.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok())
}

async fn reaches(api: &Api, line: &str, wanted: f64) {
    let reached = timeout(SOON, async {
        while figure(api, line).await != Some(wanted) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(reached.await.is_ok(), "{line} is {:?}, never {wanted}", figure(api, line).await);
}

#[tokio::test]
async fn levels_and_schemas_are_there_and_are_put_back() {
    let api = Api::new().await;
    let names = |list: &Value| {
        let names = list["items"].as_array().unwrap().iter();
        names.map(|o| o["metadata"]["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let levels = names(&api.get(LEVELS).await);
    assert_eq!(
        levels,
        [
            "catch-all",
            "exempt",
            "global-default",
            "leader-election",
            "node-high",
            "system",
            "workload-high",
            "workload-low"
        ]
    );
    assert_eq!(names(&api.get(SCHEMAS).await).len(), 14);
    // One is deleted, one is changed, and one is changed by somebody who wants it so.
    let one = |name: &str| format!("{LEVELS}/{name}");
    api.call(Method::DELETE, &one("workload-low"), "", Value::Null).await;
    for (name, annotations) in
        [("system", json!({})), ("node-high", json!({"apf.kubernetes.io/autoupdate-spec": "false"}))]
    {
        let mut level = api.get(&one(name)).await;
        level["spec"]["limited"]["nominalConcurrencyShares"] = 7.into();
        if annotations != json!({}) {
            level["metadata"]["annotations"] = annotations;
        }
        let (status, said) = api.call(Method::PUT, &one(name), "application/json", level).await;
        assert_eq!(status, StatusCode::OK, "{said}");
    }
    let other = api.another().await;
    assert_eq!(names(&other.get(LEVELS).await), levels);
    let shares = async |name: &str| other.get(&one(name)).await["spec"]["limited"]["nominalConcurrencyShares"].clone();
    assert_eq!((shares("system").await, shares("node-high").await), (30.into(), 7.into()));
}

#[tokio::test]
async fn a_schema_says_whether_it_leads_anywhere() {
    let api = Api::new().await;
    let schema = json!({"metadata": {"name": "mine"}, "spec": {"matchingPrecedence": 5, "rules": [],
        "priorityLevelConfiguration": {"name": "later"}}});
    api.create(SCHEMAS, schema).await;
    let says = async |name: &str, status: &str, reason: &str| {
        let path = format!("{SCHEMAS}/{name}");
        let said = timeout(SOON, async {
            loop {
                let condition = api.get(&path).await["status"]["conditions"][0].clone();
                if condition["type"] == "Dangling" && condition["status"] == status && condition["reason"] == reason {
                    return condition;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        said.await.unwrap_or_else(|_| panic!("{name} never says {status} {reason}"))
    };
    let condition = says("mine", "True", "NotFound").await;
    let message =
        "This FlowSchema references the PriorityLevelConfiguration object named \"later\" but there is no such object";
    assert_eq!(condition["message"], message);
    says("catch-all", "False", "Found").await;
    let level = json!({"metadata": {"name": "later"}, "spec": {"type": "Limited", "limited": {"limitResponse": {"type": "Reject"}}}});
    api.create(LEVELS, level).await;
    says("mine", "False", "Found").await;
}

#[tokio::test]
async fn wrong_levels_and_schemas_are_refused() {
    let api = Api::new().await;
    let level = |spec: Value| json!({"metadata": {"name": "x"}, "spec": spec});
    let limited = |response: Value| level(json!({"type": "Limited", "limited": {"limitResponse": response}}));
    for (object, told) in [
        (level(json!({"type": "Exempt"})), "spec.type: Invalid value: \"Exempt\": must be 'Exempt' if and only if"),
        (level(json!({"type": "Limited"})), "spec.limited: Required value: must not be empty when type is Limited"),
        (limited(json!({"type": "Wait"})), "spec.limited.limitResponse.type: Unsupported value: \"Wait\""),
        (limited(json!({"type": "Queue"})), "spec.limited.limitResponse.queuing: Required value"),
        (
            limited(json!({"type": "Queue", "queuing": {"queues": 4, "handSize": 5, "queueLengthLimit": 1}})),
            "handSize: Invalid value: 5: should not be greater than queues (4)",
        ),
    ] {
        let (code, reason, message) = api.fails(Method::POST, LEVELS, object).await;
        assert_eq!((code, &*reason), (422, "Invalid"), "{message}");
        assert!(message.contains(told), "{message}");
    }
    let schema = |precedence: i32, rules: Value| {
        json!({"metadata": {"name": "x"}, "spec": {"matchingPrecedence": precedence, "rules": rules,
            "priorityLevelConfiguration": {"name": "system"}}})
    };
    for (object, told) in [
        (schema(0, json!([])), "spec.matchingPrecedence: Invalid value: 0: must be a positive value"),
        (schema(1, json!([])), "only the schema named 'exempt' may have matchingPrecedence 1"),
        (schema(5, json!([{"subjects": []}])), "spec.rules[0].subjects: Required value"),
    ] {
        let (code, _, message) = api.fails(Method::POST, SCHEMAS, object).await;
        assert!(code == 422 && message.contains(told), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_noisy_client_waits_for_itself() {
    let api = narrow(true).await;
    // It asks for much, and does not read what it gets.
    let mut crowd = Vec::new();
    for _ in 0..400 {
        let noisy = as_user(&api, "system:serviceaccount:a:noisy", &["system:serviceaccounts"]);
        crowd.push(tokio::spawn(async move { noisy.raw(Method::GET, MAPS, &[], "").await }));
    }
    let of = |what: &str| format!("apiserver_flowcontrol_{what}{{priority_level=\"workload-low\"");
    let rejected = of("rejected_requests_total") + ",flow_schema=\"service-accounts\",reason=\"queue-full\"}";
    let executing = of("current_executing_seats") + "}";
    let waiting = of("current_inqueue_requests") + "}";
    // Six queues of fifty, and what is carried out: its own seats and all that others lend.
    reaches(&api, &waiting, 300.0).await;
    let carried_out = figure(&api, &executing).await.unwrap();
    assert!((25.0..60.0).contains(&carried_out), "{carried_out}");
    let node = as_user(&api, "system:node:n1", &[NODES]);
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    let leader = as_user(&api, "system:kube-scheduler", &[]);
    let controllers = as_user(&api, "system:kube-controller-manager", &[]);
    let others = async {
        node.create(leases, json!({"metadata": {"name": "n1"}, "spec": {"holderIdentity": "n1"}})).await;
        for (who, name) in [(&leader, "kube-scheduler"), (&controllers, "kube-controller-manager")] {
            let lease = json!({"metadata": {"name": name}, "spec": {"holderIdentity": "s1"}});
            who.create("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases", lease).await;
        }
        controllers.get("/api/v1/namespaces/default/configmaps/m1").await;
        as_user(&api, "anna", &[]).get("/api/v1/namespaces/default/configmaps/m1").await;
    };
    timeout(SOON, others).await.expect("nobody else waits");
    // Another one of the same level waits no longer than for the next few.
    let quiet = as_user(&api, "system:serviceaccount:b:quiet", &["system:serviceaccounts"]);
    let quiet = tokio::spawn(async move { quiet.get("/api/v1/namespaces/default/configmaps/m2").await });
    reaches(&api, &waiting, 301.0).await;
    let mut answers = Vec::new();
    let mut refused = 0;
    let mut rest = Vec::new();
    for request in crowd {
        if !request.is_finished() {
            rest.push(request);
            continue;
        }
        let response = request.await.unwrap();
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            assert_eq!(response.headers()["retry-after"], "1");
            let said = response.into_body().collect().await.unwrap().to_bytes();
            let said: Value = serde_json::from_slice(&said).unwrap();
            assert_eq!(said["reason"], "TooManyRequests");
            assert_eq!(said["message"], "too many requests, please try again later");
            refused += 1;
        } else {
            assert_eq!(response.status(), StatusCode::OK);
            let uid = api.get(&format!("{LEVELS}/workload-low")).await["metadata"]["uid"].clone();
            assert_eq!(response.headers()["x-kubernetes-pf-prioritylevel-uid"], uid.as_str().unwrap());
            assert!(response.headers().contains_key("x-kubernetes-pf-flowschema-uid"));
            answers.push(response);
        }
    }
    assert_eq!(figure(&api, &rejected).await, Some(f64::from(refused)));
    assert_eq!(answers.len() + rest.len() + refused as usize, 400);
    // A few bodies end, and its turn has come, long before that of the three hundred.
    let mut ended = 0;
    while !quiet.is_finished() {
        assert!(ended < answers.len(), "{ended} ended, and the other one still waits");
        answers.pop().unwrap().into_body().collect().await.unwrap();
        ended += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    quiet.await.unwrap();
    // Who gives up while it waits, or while it is answered, leaves nothing behind.
    rest.iter().for_each(tokio::task::JoinHandle::abort);
    for request in rest {
        drop(request.await);
    }
    drop(answers);
    reaches(&api, &waiting, 0.0).await;
    reaches(&api, &executing, 0.0).await;
}

#[tokio::test]
async fn without_fairness_too_much_is_refused_at_once() {
    let api = narrow(false).await;
    let anna = as_user(&api, "anna", &[]);
    let mut open = Vec::new();
    let refused = loop {
        let response = anna.raw(Method::GET, MAPS, &[], "").await;
        if response.status() != StatusCode::OK {
            break response;
        }
        open.push(response);
        assert!(open.len() <= 60, "nothing is limited");
    };
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(open.len(), 60);
    // Administrators get through.
    api.get(MAPS).await;
    drop(open);
    anna.get(MAPS).await;
}

#[tokio::test]
async fn a_watch_holds_no_seat() {
    let api = narrow(false).await;
    let anna = as_user(&api, "anna", &[]);
    let mut open = Vec::new();
    for _ in 0..70 {
        let response = anna.raw(Method::GET, &format!("{MAPS}?watch=1"), &[], "").await;
        assert_eq!(response.status(), StatusCode::OK);
        open.push(response);
    }
}
