//! Workloads that are neither Deployments nor StatefulSets, from end to end: a pod on every node, work by the clock, work in
//! parts, an older form of replicas, and a number of replicas that is kept.

use seawall_tests::{
    Server,
    kubectl::{Kubectl, has},
    on_a_machine, traffic, until,
};

const IMAGE: &str = "seawall.local/web:v1";
const NEXT: &str = "seawall.local/web:v2";

#[test]
fn every_kind_of_workload_runs() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "v1").await;
        server.web_image(NEXT, "v2").await;
        let k = &server.kubectl;
        // It needs a whole minute to come round: others use the time.
        k.apply(&include_str!("../../examples/cron.yaml").replace("Etc/UTC", "Europe/Berlin")).await;
        a_pod_on_every_node(k).await;
        rolled_out_and_back(k).await;
        a_queue(k).await;
        indexes(k).await;
        policies(k).await;
        replication_controller(k).await;
        autoscaler(k).await;
        by_hand(k).await;
        by_the_clock(k).await;
        assert!(!server.logged("panicked"), "a task of the server panicked");
    });
}

fn daemon_set(strategy: &str, image: &str) -> String {
    format!(
        "
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: every}}
spec:
  selector: {{matchLabels: {{app: every}}}}
  updateStrategy: {{type: RollingUpdate, rollingUpdate: {{{strategy}}}}}
  template:
    metadata: {{labels: {{app: every}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: {image}
        readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}
"
    )
}

/// Whether there is nothing of this.
async fn none(k: &Kubectl, what: &str) -> Option<()> {
    k.path(what, "{.items[*].metadata.name}").await.is_empty().then_some(())
}

async fn rolled_out(k: &Kubectl) {
    has(k.run("rollout status ds/every --timeout=60s").await.ok(), &["successfully rolled out"]);
}

/// Made by the controller, put there by the scheduler, also where nothing else would go; and gone where it is not wanted.
async fn a_pod_on_every_node(k: &Kubectl) {
    let node = k.path("nodes", "{.items[0].metadata.name}").await;
    k.run(&format!("cordon {node}")).await.ok();
    k.apply(&daemon_set("maxUnavailable: 1", IMAGE)).await;
    rolled_out(k).await;
    let counts = "{.status.desiredNumberScheduled}/{.status.currentNumberScheduled}/{.status.numberAvailable}";
    k.reaches("ds/every", counts, "1/1/1").await;
    assert_eq!(k.path("pods -l app=every", "{.items[*].spec.nodeName}").await, node);
    // A drain leaves it alone, a pod that somebody deletes comes back.
    k.run(&format!("drain {node} --ignore-daemonsets --pod-selector=app=every --timeout=30s")).await.ok();
    let first = k.path("pods -l app=every", "{.items[*].metadata.name}").await;
    k.run("delete pods -l app=every --timeout=60s").await.ok();
    rolled_out(k).await;
    let second = k.path("pods -l app=every", "{.items[*].metadata.name}").await;
    assert!(first != second && !second.contains(' '), "{first} was followed by {second}");
    k.run(&format!("uncordon {node}")).await.ok();
    has(k.run("describe ds every").await.ok(), &["SuccessfulCreate", "daemonset-controller", &first]);

    k.run(&format!("taint node {node} only=mine:NoExecute")).await.ok();
    k.reaches("ds/every", counts, "0/0/").await;
    until("its pod leaves", async || none(k, "pods -l app=every").await).await;
    k.run(&format!("taint node {node} only-")).await.ok();
    rolled_out(k).await;
}

/// An update, its history, and the way back; first by taking away, then by adding.
async fn rolled_out_and_back(k: &Kubectl) {
    let image = "{.items[*].spec.containers[*].image}";
    k.run(&format!("set image ds/every web={NEXT}")).await.ok();
    rolled_out(k).await;
    assert_eq!(k.path("pods -l app=every", image).await, NEXT);
    has(k.run("rollout history ds/every").await.ok(), &["1 ", "2 "]);
    has(k.run("rollout history ds/every --revision=1").await.ok(), &[IMAGE]);
    k.run("rollout undo ds/every").await.ok();
    rolled_out(k).await;
    assert_eq!(k.path("pods -l app=every", image).await, IMAGE);
    let revisions = k.path("controllerrevisions -l app=every", "{.items[*].revision}").await;
    let mut revisions: Vec<_> = revisions.split(' ').collect();
    revisions.sort_unstable();
    assert_eq!(revisions, ["2", "3"], "the old revision is the newest again");

    // Both run for a while: there is always one that is ready.
    k.apply(&daemon_set("maxSurge: 1, maxUnavailable: 0", NEXT)).await;
    rolled_out(k).await;
    k.reaches("pods -l app=every", image, NEXT).await;
    k.run("delete ds every --timeout=60s").await.ok();
    until("its pods go with it", async || none(k, "pods -l app=every").await).await;
    until("its history as well", async || none(k, "controllerrevisions -l app=every").await).await;
}

fn job(name: &str, spec: &str, command: &str) -> String {
    format!(
        "
apiVersion: batch/v1
kind: Job
metadata: {{name: {name}}}
spec:
{spec}
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 1
      containers: [{{name: work, image: {IMAGE}, command: [sh, -c, '{command}']}}]
"
    )
}

/// The example: every piece is done once.
async fn a_queue(k: &Kubectl) {
    k.apply(include_str!("../../examples/queue.yaml")).await;
    k.run("wait job/queue --for=condition=Complete --timeout=120s").await.ok();
    assert_eq!(
        k.path("job/queue", "{.status.completedIndexes}/{.status.succeeded}/{.status.failed}").await,
        "0-11/12/"
    );
    let done = k.run("logs -l job-name=queue --tail=-1 --max-log-requests=12").await.ok();
    let mut lines: Vec<&str> = done.lines().collect();
    lines.sort_unstable_by_key(|line| line.split_once(':').and_then(|(index, _)| index.parse::<u32>().ok()));
    assert_eq!((lines.len(), lines[0], lines[11]), (12, "0: apple has 5 letters", "11: mango has 5 letters"));
    k.run("delete job/queue configmap/queue --timeout=60s").await.ok();
}

/// Each index has tries of its own, and one that cannot succeed fails at once.
async fn indexes(k: &Kubectl) {
    let spec = "
  completions: 4
  parallelism: 4
  completionMode: Indexed
  backoffLimitPerIndex: 1
  podFailurePolicy: {rules: [{action: FailIndex, onExitCodes: {containerName: work, operator: In, values: [42]}}]}";
    let command = "case $JOB_COMPLETION_INDEX in 1) exit 42;; 2) exit 3;; esac";
    k.apply(&job("parts", spec, command)).await;
    k.run("wait job/parts --for=condition=Failed --timeout=90s").await.ok();
    let status = "{.status.completedIndexes}/{.status.failedIndexes}/{.status.succeeded}/{.status.failed}";
    assert_eq!(k.path("job/parts", status).await, "0,3/1,2/2/3");
    let reason = "{.status.conditions[?(@.type==\"Failed\")].reason}";
    assert_eq!(k.path("job/parts", reason).await, "FailedIndexes");
    let failures = "{.items[*].metadata.annotations.batch\\.kubernetes\\.io/job-index-failure-count}";
    let selector = "pods -l job-name=parts,batch.kubernetes.io/job-completion-index=2";
    let mut failures: Vec<_> = k.path(selector, failures).await.split(' ').map(str::to_owned).collect();
    failures.sort();
    assert_eq!(failures, ["0", "1"], "the second pod knows of the first");
    assert_eq!(k.path("pods -l job-name=parts", "{.items[*].metadata.finalizers}").await, "", "all are counted");
    k.run("delete job parts --timeout=60s").await.ok();
}

/// One failure can be enough for all, and some successes as well.
async fn policies(k: &Kubectl) {
    let spec = "
  completions: 3
  parallelism: 3
  backoffLimit: 6
  podFailurePolicy: {rules: [{action: FailJob, onExitCodes: {operator: In, values: [42]}}]}";
    k.apply(&job("hopeless", spec, "exit 42")).await;
    k.run("wait job/hopeless --for=condition=Failed --timeout=60s").await.ok();
    let why = "{.status.conditions[?(@.type==\"Failed\")].reason}: {.status.conditions[?(@.type==\"Failed\")].message}";
    let why = k.args(&["get", "job/hopeless", "-o", &format!("jsonpath={why}")]).await.ok();
    has(
        why,
        &[
            "PodFailurePolicy: Container work for pod default/hopeless-",
            "exit code 42 matching FailJob rule at index 0",
        ],
    );

    let spec = "
  completions: 3
  parallelism: 3
  completionMode: Indexed
  successPolicy: {rules: [{succeededIndexes: \"0\"}]}";
    k.apply(&job("first", spec, "[ $JOB_COMPLETION_INDEX = 0 ] || sleep 3000")).await;
    k.run("wait job/first --for=condition=Complete --timeout=60s").await.ok();
    let reason = "{.status.conditions[?(@.type==\"Complete\")].reason}";
    assert_eq!(k.path("job/first", reason).await, "SuccessPolicy");
    assert_eq!(k.path("job/first", "{.status.active}").await, "", "nobody works on for nothing");

    // Nothing runs while it is suspended.
    k.apply(&job("later", "  suspend: true", "true")).await;
    k.reaches("job/later", "{.status.conditions[?(@.status==\"True\")].type}", "Suspended").await;
    assert!(none(k, "pods -l job-name=later").await.is_some());
    k.args(&["patch", "job", "later", "--type=merge", "-p", r#"{"spec": {"suspend": false}}"#]).await.ok();
    k.run("wait job/later --for=condition=Complete --timeout=60s").await.ok();
    has(k.run("describe job later").await.ok(), &["Suspended", "Resumed", "Completed"]);
    k.run("delete job hopeless first later --timeout=60s").await.ok();
}

async fn replication_controller(k: &Kubectl) {
    k.apply(&format!(
        "
apiVersion: v1
kind: ReplicationController
metadata: {{name: older}}
spec:
  replicas: 1
  template:
    metadata: {{labels: {{app: older}}}}
    spec: {{terminationGracePeriodSeconds: 1, containers: [{{name: web, image: {IMAGE}}}]}}
"
    ))
    .await;
    k.run("scale rc/older --replicas=2").await.ok();
    k.reaches("rc/older", "{.status.replicas}/{.status.readyReplicas}", "2/2").await;
    has(k.run("describe rc older").await.ok(), &["SuccessfulCreate", "replication-controller"]);
    k.run("delete rc older --timeout=60s").await.ok();
    until("its pods go with it", async || none(k, "pods -l app=older").await).await;
}

/// Endpoints that somebody writes are as good as those of a selector.
async fn by_hand(k: &Kubectl) {
    k.run(&format!("run lone --image={IMAGE} --labels=app=lone")).await.ok();
    k.run("wait pod/lone --for=condition=Ready --timeout=60s").await.ok();
    let ip = k.path("pod/lone", "{.status.podIP}").await;
    k.apply("{apiVersion: v1, kind: Service, metadata: {name: lone}, spec: {ports: [{port: 80, targetPort: 8080}]}}")
        .await;
    let endpoints = |ip: &str| {
        format!(
            "{{apiVersion: v1, kind: Endpoints, metadata: {{name: lone}}, subsets: [{{addresses: [{{ip: {ip}}}], \
             ports: [{{port: 8080}}]}}]}}"
        )
    };
    k.apply(&endpoints(&ip)).await;
    let slices = "endpointslices -l endpointslice.kubernetes.io/managed-by=endpointslicemirroring-controller.k8s.io";
    k.reaches(slices, "{.items[*].endpoints[*].addresses[*]}", &ip).await;
    let address = format!("{}:80", k.path("service/lone", "{.spec.clusterIP}").await).parse().unwrap();
    assert_eq!(until("the Service answers", async || traffic::get(address).await.ok()).await, "v1");
    k.apply(&endpoints("192.0.2.99")).await;
    k.reaches(slices, "{.items[*].endpoints[*].addresses[*]}", "192.0.2.99").await;
    k.run("delete service lone --timeout=60s").await.ok();
    until("its slices go with it", async || none(k, slices).await).await;
    k.run("delete pod lone --timeout=60s").await.ok();
}

/// A group of metrics whose objects are written by hand, instead of by a server of metrics.
const METRICS: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: pods.metrics.k8s.io
  annotations: {api-approved.kubernetes.io: 'unapproved, for a test'}
spec:
  group: metrics.k8s.io
  names: {plural: pods, kind: PodMetrics}
  scope: Namespaced
  versions:
  - name: v1beta1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
";

/// It keeps to its bounds whatever is measured, and follows the load that a group of somebody else's tells.
async fn autoscaler(k: &Kubectl) {
    k.run(&format!("create deployment scaled --image={IMAGE} --replicas=1")).await.ok();
    k.run("set resources deployment scaled --requests=cpu=10m").await.ok();
    let said = k.run("autoscale deployment scaled --min=2 --max=4 --cpu=50%").await;
    assert_eq!(said.stderr, "", "it has an effect");
    said.ok();
    k.reaches("deployment/scaled", "{.spec.replicas}", "2").await;
    k.run("rollout status deployment/scaled --timeout=60s").await.ok();
    has(k.run("describe hpa scaled").await.ok(), &["SuccessfulRescale", "New size: 2", "below Spec.MinReplicas"]);
    let active = "{.status.conditions[?(@.type==\"ScalingActive\")].reason}";
    assert_eq!(k.path("hpa/scaled", "{.status.conditions[?(@.type==\"AbleToScale\")].status}").await, "True");

    k.apply(METRICS).await;
    k.run("wait crd/pods.metrics.k8s.io --for=condition=Established --timeout=30s").await.ok();
    for pod in k.path("pods -l app=scaled", "{.items[*].metadata.name}").await.split(' ') {
        k.apply(&format!(
            "
apiVersion: metrics.k8s.io/v1beta1
kind: PodMetrics
metadata: {{name: {pod}, labels: {{app: scaled}}}}
timestamp: '2100-01-01T00:00:00Z'
window: 10s
containers: [{{name: web, usage: {{cpu: 100m, memory: 1Mi}}}}]
"
        ))
        .await;
    }
    k.reaches("deployment/scaled", "{.spec.replicas}", "4").await;
    k.reaches("hpa/scaled", active, "ValidMetricFound").await;
    let why = "New size: 4; reason: cpu resource utilization (percentage of request) above target";
    has(k.run("describe hpa scaled").await.ok(), &[why]);
    has(k.run("get hpa scaled").await.ok(), &["1000%/50%"]);
    k.run("delete hpa scaled").await.ok();
    k.run("delete deployment scaled").await.ok();
    k.run("delete crd pods.metrics.k8s.io --timeout=60s").await.ok();
}

/// A Job is made when its time comes, and one by hand looks the same.
async fn by_the_clock(k: &Kubectl) {
    k.run("create job --from=cronjob/cron by-hand").await.ok();
    k.run("wait job/by-hand --for=condition=Complete --timeout=60s").await.ok();
    until("its time comes", async || {
        (!k.path("cronjob/cron", "{.status.lastScheduleTime}").await.is_empty()).then_some(())
    })
    .await;
    k.args(&["patch", "cronjob", "cron", "--type=merge", "-p", r#"{"spec": {"suspend": true}}"#]).await.ok();
    until("it has succeeded", async || {
        (!k.path("cronjob/cron", "{.status.lastSuccessfulTime}").await.is_empty()).then_some(())
    })
    .await;
    k.reaches("cronjob/cron", "{.status.active}", "").await;
    let jobs = k.json("jobs").await;
    let items = jobs["items"].as_array().unwrap();
    let made: Vec<_> =
        items.iter().filter(|job| job["metadata"]["name"].as_str().unwrap().starts_with("cron-")).collect();
    assert!(!made.is_empty() && made.len() <= 3, "three that have succeeded are kept, there are {}", made.len());
    for job in made {
        let when = &job["metadata"]["annotations"]["batch.kubernetes.io/cronjob-scheduled-timestamp"];
        let when = when.as_str().unwrap();
        assert!(when.ends_with("+01:00") || when.ends_with("+02:00"), "{when} is in the CronJob's zone");
        assert_eq!(job["metadata"]["ownerReferences"][0]["kind"], "CronJob");
    }
    has(k.run("describe cronjob cron").await.ok(), &["SuccessfulCreate", "SawCompletedJob", "cronjob-controller"]);
    k.run("delete cronjob cron --timeout=60s").await.ok();
    until("its Jobs go with it", async || none(k, "jobs").await).await;
}
