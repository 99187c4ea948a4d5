//! What a pod's worker has done: the steps of a pod's life that are not a container's.

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        core::v1::{PersistentVolumeClaim, Pod},
        node::v1::RuntimeClass,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use seawall_quorum::fence::Epoch;
use tokio::sync::Mutex;

use crate::{
    Agent, container, fence,
    pod::{
        self,
        qos::{self, Limits},
        resize::Step,
    },
    sandbox, stats,
    volume::{self, Made, Volumes},
};

/// Makes the pod's volumes, or brings them up to date.
pub async fn make_volumes(
    agent: &Agent,
    pod: &Pod,
    ips: &[String],
    volumes: &Mutex<Volumes>,
) -> Result<Made, volume::Error> {
    let spec = pod.spec.clone().unwrap_or_default();
    let pod = container::with_addresses(pod, &spec, ips, &agent.config.node_ips);
    volumes.lock().await.make(&pod, &agent.allocatable).await
}

/// Makes the pod's directories, cgroup and volumes.
pub async fn prepare(
    agent: &Agent,
    pod: &Pod,
    ips: &[String],
    volumes: &Mutex<Volumes>,
) -> Result<Made, volume::Error> {
    let failed = |what: &str, e: std::io::Error| volume::Error { volume: what.to_owned(), message: e.to_string() };
    let directory = volume::pod_directory(&agent.config.data_dir, pod::uid(pod));
    tokio::fs::create_dir_all(&directory).await.map_err(|e| failed("pod directory", e))?;
    let path = agent.cgroups.pod_path(qos::class(pod), pod::uid(pod));
    let mut limits = qos::pod_limits(pod);
    if agent.cpus.has_own(pod::uid(pod), None) {
        limits.cpu_quota = 0;
    }
    agent.cgroups.create(&path, limits).map_err(|e| failed("pod cgroup", e))?;
    make_volumes(agent, pod, ips, volumes).await
}

/// Gives the pod's cgroup and its containers the limits that they should have. What uses more memory than it may have then
/// is left as it is, and so is everything after that; `applied` is then what the pod's cgroup was given last.
pub async fn resize(agent: &Agent, pod: &Pod, steps: Vec<Step>, applied: &mut Option<Limits>) -> Result<(), String> {
    let path = agent.cgroups.pod_path(qos::class(pod), pod::uid(pod));
    for step in steps {
        let (group, limits) = match &step {
            Step::Pod(limits) => (path.clone(), *limits),
            Step::Container(id, limits) => (format!("{path}/{id}"), *limits),
        };
        // Without what the kernel can do without.
        let used = stats::read::usage(&agent.cgroups, &group).map_or(0, |usage| usage.working_set);
        if limits.memory > 0 && used > limits.memory.unsigned_abs() {
            let what = if matches!(step, Step::Pod(_)) { "pod" } else { "container" };
            return Err(format!(
                "attempting to set {what} memory limit ({}) below current usage ({used})",
                limits.memory
            ));
        }
        match step {
            Step::Pod(limits) => {
                let cgroups = agent.cgroups.clone();
                // The kernel may have to write to the disk what a group may not have any more.
                let done = tokio::task::spawn_blocking(move || cgroups.apply(&group, limits)).await;
                done.map_err(|e| e.to_string())?.map_err(|e| format!("the pod's cgroup: {e}"))?;
                *applied = Some(limits);
            }
            Step::Container(id, limits) => {
                let resources = container::resources(limits);
                agent.cri.update_container(&id, resources).await.map_err(|s| s.message().to_owned())?;
            }
        }
    }
    Ok(())
}

/// Writes to the pod, so that a deletion that was decided on before fails, and so that we know that it still exists.
pub async fn permit(client: Client, pod: &Pod, uid: &str, epoch: Epoch) -> Result<Pod, kube::Error> {
    let api: Api<Pod> = Api::namespaced(client, pod::namespace(pod));
    let now = Timestamp::now();
    // Each one differs from all before it: a write that changes nothing would change no resourceVersion.
    let message = format!("The node's Lease is renewed (epoch {epoch}, {now})");
    let condition = serde_json::json!({
        "type": fence::PERMIT, "status": "True", "reason": "LeaseRenewed", "message": message,
        "lastTransitionTime": Time(now),
    });
    let patch = serde_json::json!({"metadata": {"uid": uid}, "status": {"conditions": [condition]}});
    api.patch_status(pod::name(pod), &PatchParams::default(), &Patch::Strategic(patch)).await
}

/// Whether all of these claims are for several nodes at once.
pub async fn are_shared(client: Client, pod: &Pod, claims: &[String]) -> Result<bool, kube::Error> {
    let api: Api<PersistentVolumeClaim> = Api::namespaced(client, pod::namespace(pod));
    for name in claims {
        let modes = api.get(name).await?.spec.and_then(|spec| spec.access_modes).unwrap_or_default();
        if modes.is_empty() || modes.iter().any(|mode| mode == "ReadWriteOnce" || mode == "ReadWriteOncePod") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Stops the previous sandbox, if any, and makes a new one.
pub async fn create_sandbox(agent: &Agent, pod: &Pod, previous: Option<String>, attempt: u32) -> Result<(), String> {
    if let Some(id) = previous {
        agent.cri.stop_sandbox(&id).await.map_err(|s| s.message().to_owned())?;
    }
    let spec = pod.spec.as_ref().ok_or("the pod has no spec")?;
    let config = sandbox::config(pod, spec, &agent.config, attempt);
    std::fs::create_dir_all(&config.log_directory).map_err(|e| format!("make the log directory: {e}"))?;
    let handler = match spec.runtime_class_name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => handler(agent.client.clone(), name).await?,
        None => String::new(),
    };
    agent.cri.run_sandbox(config, &handler).await.map(drop).map_err(|s| s.message().to_owned())
}

/// The runtime's own name for a runtime class (<https://kubernetes.io/docs/concepts/containers/runtime-class/>).
async fn handler(client: Client, name: &str) -> Result<String, String> {
    match Api::<RuntimeClass>::all(client).get_opt(name).await {
        Ok(Some(class)) => Ok(class.handler),
        Ok(None) => Err(format!("RuntimeClass {name:?} not found")),
        Err(error) => Err(format!("RuntimeClass {name:?} cannot be read: {error}")),
    }
}

/// Takes the pod's volumes and cgroup away.
pub async fn teardown(agent: &Agent, uid: &str) -> Result<(), String> {
    volume::remove(&agent.config.data_dir, uid).await.map_err(|e| format!("volumes: {e}"))?;
    // An orphan's class is not known; there is at most one.
    for qos in [qos::Qos::Guaranteed, qos::Qos::Burstable, qos::Qos::BestEffort] {
        agent.cgroups.remove(&agent.cgroups.pod_path(qos, uid)).map_err(|e| format!("cgroup: {e}"))?;
    }
    Ok(())
}

/// The last status, then the deletion: of this very pod, not of a successor with its name.
pub async fn finalize(agent: &Agent, pod: &Pod, patch: Option<serde_json::Value>) -> Result<(), kube::Error> {
    let api: Api<Pod> = Api::namespaced(agent.client.clone(), pod::namespace(pod));
    let name = pod::name(pod);
    let gone = |error: &kube::Error| matches!(error, kube::Error::Api(s) if s.code == 404 || s.code == 409);
    if let Some(patch) = patch {
        match api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Err(error) if gone(&error) => return Ok(()),
            other => drop(other?),
        }
    }
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None }),
        ..Default::default()
    };
    match api.delete(name, &params).await {
        Err(error) if gone(&error) => Ok(()),
        other => other.map(drop),
    }
}
