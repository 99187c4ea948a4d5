//! What the runtime is told about a container, and how one is started: image, configuration, create, start.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use k8s_cri::v1 as cri;
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Container, Pod, PodSpec, Secret},
};

use tokio_util::sync::CancellationToken;

use crate::{
    Agent,
    cri::{annotation, label},
    devices::api as devices,
    env::{self, Sources},
    events::Kind,
    handler::Target,
    huge_pages,
    pod::{
        self, Class,
        machine::Waiting,
        observed::{Observed, SandboxObs},
        qos,
    },
    sandbox, security, volume,
};

/// Why a container did not start; `reason` is what the status shows.
pub type Failure = Waiting;

fn failure(reason: &str, message: impl Into<String>) -> Failure {
    Waiting { reason: reason.to_owned(), message: message.into() }
}

/// Everything that starting a container needs.
pub struct Start {
    /// The agent.
    pub agent: Arc<Agent>,
    /// The pod.
    pub pod: Arc<Pod>,
    /// What is in the runtime.
    pub observed: Arc<Observed>,
    /// Where the volumes are.
    pub volumes: HashMap<String, PathBuf>,
    /// The container's name in the pod.
    pub name: String,
    /// Restarts so far.
    pub restart_count: u32,
}

impl Start {
    /// Pulls, makes and starts it. Returns its id.
    pub async fn run(self, cancel: &CancellationToken) -> Result<String, Failure> {
        let spec =
            self.pod.spec.as_ref().ok_or_else(|| failure("CreateContainerConfigError", "the pod has no spec"))?;
        let Some((class, container)) = pod::find_container(spec, &self.name) else {
            return Err(failure("CreateContainerConfigError", "the pod has no such container"));
        };
        let Some(current) = self.observed.sandbox().filter(|s| s.ready) else {
            return Err(failure("CreateContainerError", "the sandbox is not ready"));
        };
        let attempt = current.attempt;
        let sandbox_config = sandbox::config(&self.pod, spec, &self.agent.config, attempt);
        // A pull may take long; a pod that is being deleted does not wait for it.
        let image = cancel.run_until_cancelled(Box::pin(self.image(spec, &container, &sandbox_config))).await;
        let image = image.unwrap_or_else(|| Err(failure("ErrImagePull", "the pod is being stopped")))?;
        let admitted = cancel.run_until_cancelled(self.admitted(spec, current)).await;
        admitted.unwrap_or(Ok(())).map_err(|why| failure("CreateContainerError", why))?;
        if cancel.is_cancelled() {
            return Err(failure("CreateContainerError", "the pod is being stopped"));
        }
        let config = self.config(spec, class, &container, &image, &current.ips).await?;
        let events = &self.agent.events;
        let create = Box::pin(self.agent.cri.create_container(&current.id, config, sandbox_config));
        let id = create.await.map_err(|status| {
            events.container(&self.pod, &self.name, Kind::Warning, "Failed", format!("Error: {}", status.message()));
            failure("CreateContainerError", status.message())
        })?;
        events.container(&self.pod, &self.name, Kind::Normal, "Created", format!("Created container: {}", self.name));
        self.agent.cri.start_container(&id).await.map_err(|status| {
            events.container(&self.pod, &self.name, Kind::Warning, "Failed", format!("Error: {}", status.message()));
            failure("RunContainerError", status.message())
        })?;
        events.container(&self.pod, &self.name, Kind::Normal, "Started", format!("Started container {}", self.name));
        Ok(id)
    }

    /// Returns when the pod's network is open to it. Where a container has run already, it is.
    async fn admitted(&self, spec: &PodSpec, sandbox: &SandboxObs) -> Result<(), String> {
        let Some(gate) = self.agent.config.gate.as_ref().filter(|_| spec.host_network != Some(true)) else {
            return Ok(());
        };
        if self.observed.containers.iter().any(|c| c.sandbox == sandbox.id) {
            return Ok(());
        }
        let ips = sandbox.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
        (gate.admit)(Arc::clone(&self.pod), ips).await
    }

    async fn image(
        &self,
        spec: &PodSpec,
        container: &Container,
        sandbox: &cri::PodSandboxConfig,
    ) -> Result<cri::Image, Failure> {
        let (agent, events) = (&self.agent, &self.agent.events);
        let name = container.image.as_deref().unwrap_or_default();
        let note = |kind, reason, message: String| events.container(&self.pod, &self.name, kind, reason, message);
        if name.is_empty()
            || name.contains(char::is_whitespace)
            || name.contains(char::is_uppercase) && !name.contains('/') && !name.contains(':')
        {
            let message = format!(
                "Failed to apply default image tag {name:?}: couldn't parse image name {name:?}: invalid reference format"
            );
            note(Kind::Warning, "InspectFailed", message.clone());
            return Err(failure("InvalidImageName", message));
        }
        let policy = container.image_pull_policy.as_deref().unwrap_or(default_pull_policy(name));
        let inspect = |status: tonic::Status| {
            failure("ImageInspectError", format!("Failed to inspect image {name:?}: {}", status.message()))
        };
        let mut present = agent.cri.image(name).await.map_err(inspect)?;
        if present.is_none() && agent.config.own_image.as_deref() == Some(name) {
            let _permit = agent.pulls.acquire().await.map_err(|e| failure("ErrImagePull", e.to_string()))?;
            let made = crate::own::provide(&agent.cri, &agent.config.cri_socket(), name).await;
            made.map_err(|e| failure("ErrImagePull", format!("the image {name:?} was not made: {e:#}")))?;
            present = agent.cri.image(name).await.map_err(inspect)?;
        }
        match (policy, present) {
            ("IfNotPresent" | "Never", Some(image)) => {
                note(Kind::Normal, "Pulled", format!("Container image {name:?} already present on machine"));
                return Ok(image);
            }
            ("Never", None) => {
                let message = format!("Container image {name:?} is not present with pull policy of Never");
                note(Kind::Warning, "ErrImageNeverPull", message.clone());
                return Err(failure("ErrImageNeverPull", message));
            }
            _ => {}
        }
        note(Kind::Normal, "Pulling", format!("Pulling image {name:?}"));
        let asked = tokio::time::Instant::now();
        let _permit = agent.pulls.acquire().await.map_err(|e| failure("ErrImagePull", e.to_string()))?;
        let began = tokio::time::Instant::now();
        let mut last = None;
        let mut auths: Vec<Option<cri::AuthConfig>> = self.auths(spec, name).await.into_iter().map(Some).collect();
        if auths.is_empty() {
            auths.push(None);
        }
        for auth in auths {
            match agent.cri.pull(name, auth, sandbox.clone()).await {
                Ok(_) => {
                    let image = agent.cri.image(name).await.map_err(inspect)?;
                    let image = image.ok_or_else(|| {
                        failure("ErrImagePull", format!("image {name:?} vanished after it was pulled"))
                    })?;
                    let (took, waited) = (began.elapsed(), asked.elapsed());
                    note(
                        Kind::Normal,
                        "Pulled",
                        format!(
                            "Successfully pulled image {name:?} in {took:.3?} ({waited:.3?} including waiting). Image size: {} bytes.",
                            image.size
                        ),
                    );
                    return Ok(image);
                }
                Err(status) => last = Some(status),
            }
        }
        let message = last.map(|s| s.message().to_owned()).unwrap_or_default();
        note(Kind::Warning, "Failed", format!("Failed to pull image {name:?}: {message}"));
        note(Kind::Warning, "Failed", "Error: ErrImagePull".into());
        Err(failure("ErrImagePull", message))
    }

    /// The credentials that the pod's imagePullSecrets hold for the image's registry.
    async fn auths(&self, spec: &PodSpec, image: &str) -> Vec<cri::AuthConfig> {
        let mut found = Vec::new();
        for reference in spec.image_pull_secrets.iter().flatten().filter(|r| !r.name.is_empty()) {
            match volume::get::<Secret>(&self.agent.client, pod::namespace(&self.pod), &reference.name, "secret", false).await {
                Ok(Some(secret)) => found.extend(auths_for(&secret, image)),
                Ok(None) => {}
                Err(message) => self.agent.events.pod(&self.pod, Kind::Warning, "FailedToRetrieveImagePullSecret", format!(
                    "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed: {message}", reference.name
                )),
            }
        }
        found
    }

    async fn sources(&self, container: &Container) -> Result<Sources, String> {
        let (maps, secrets) = env::references(container);
        let (namespace, client) = (pod::namespace(&self.pod), &self.agent.client);
        let mut sources = Sources::default();
        for name in maps {
            let map = volume::get::<ConfigMap>(client, namespace, &name, "configmap", true).await?;
            sources.config_maps.insert(name, map);
        }
        for name in secrets {
            let secret = volume::get::<Secret>(client, namespace, &name, "secret", true).await?;
            sources.secrets.insert(name, secret);
        }
        Ok(sources)
    }

    async fn config(
        &self,
        spec: &PodSpec,
        class: Class,
        container: &Container,
        image: &cri::Image,
        ips: &[String],
    ) -> Result<cri::ContainerConfig, Failure> {
        let refuse = |message: String| {
            self.agent.events.container(&self.pod, &self.name, Kind::Warning, "Failed", format!("Error: {message}"));
            failure("CreateContainerConfigError", message)
        };
        security::check_non_root(&self.pod, spec, container, image).map_err(refuse)?;
        let sources = self.sources(container).await.map_err(refuse)?;
        let with_ips = with_addresses(&self.pod, spec, ips, &self.agent.config.node_ips);
        let links = spec.enable_service_links != Some(false);
        let context = env::Context {
            pod: &with_ips,
            services: self.agent.services.variables(pod::namespace(&self.pod), links),
            sources: &sources,
            allocatable: &self.agent.allocatable,
        };
        let with = self.agent.devices.before_start(&self.pod, container).await.map_err(refuse)?;
        let own = env::environment(container, &context).map_err(refuse)?;
        // What the pod says itself counts more.
        let of_devices = with.envs.into_iter().filter(|(name, _)| own.iter().all(|(known, _)| known != name));
        let environment: Vec<(String, String)> = of_devices.chain(own.iter().cloned()).collect();
        let known: BTreeMap<&str, &str> = environment.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let expand = |text: &String| env::expand(text, |name| known.get(name).map(|v| (*v).to_owned()));

        let directory = volume::pod_directory(&self.agent.config.data_dir, pod::uid(&self.pod));
        let mut mounts: Vec<cri::Mount> = with.mounts.into_iter().map(device_mount).collect();
        mounts.extend(self.mounts(spec, container, &directory, ips, &known).await.map_err(refuse)?);
        let logs = sandbox::log_directory(
            &self.agent.config,
            pod::namespace(&self.pod),
            pod::name(&self.pod),
            pod::uid(&self.pod),
        );
        fs::create_dir_all(logs.join(&container.name)).map_err(|e| refuse(format!("make the log directory: {e}")))?;

        let mut labels = sandbox::labels(&self.pod);
        labels.insert(label::CONTAINER_NAME.into(), container.name.clone());
        let policy = container.termination_message_policy.clone().unwrap_or_else(|| "File".into());
        let grace = spec.termination_grace_period_seconds.unwrap_or(30);
        let mut annotations: HashMap<String, String> = with.annotations.into_iter().collect();
        annotations.extend([
            (annotation::HASH.to_owned(), pod::container_hash(container)),
            (annotation::RESTART_COUNT.to_owned(), self.restart_count.to_string()),
            (annotation::TERMINATION_MESSAGE.to_owned(), self.message_file(&directory).display().to_string()),
            (annotation::TERMINATION_POLICY.to_owned(), policy),
            (annotation::GRACE_PERIOD.to_owned(), grace.to_string()),
        ]);
        Ok(cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: container.name.clone(), attempt: self.restart_count }),
            image: Some(cri::ImageSpec {
                image: image.id.clone(),
                user_specified_image: container.image.clone().unwrap_or_default(),
                ..Default::default()
            }),
            command: container.command.iter().flatten().map(expand).collect(),
            args: container.args.iter().flatten().map(expand).collect(),
            working_dir: container.working_dir.clone().unwrap_or_default(),
            envs: environment
                .iter()
                .map(|(key, value)| cri::KeyValue { key: key.clone(), value: value.clone() })
                .collect(),
            mounts,
            devices: with.devices.into_iter().map(device_node).collect(),
            cdi_devices: with.cdi_devices.into_iter().map(|device| cri::CdiDevice { name: device.name }).collect(),
            labels,
            annotations,
            log_path: format!("{}/{}.log", container.name, self.restart_count),
            stdin: container.stdin.unwrap_or(false),
            stdin_once: container.stdin_once.unwrap_or(false),
            tty: container.tty.unwrap_or(false),
            linux: Some(self.linux(spec, class, container)),
            ..Default::default()
        })
    }

    fn linux(&self, spec: &PodSpec, class: Class, container: &Container) -> cri::LinuxContainerConfig {
        let mut limits = qos::container_limits(container);
        if self.agent.cpus.has_own(pod::uid(&self.pod), Some(&container.name)) {
            limits.cpu_quota = -1;
        }
        let score = qos::oom_score_adj(qos::class(&self.pod), spec, container, self.agent.memory);
        let mut unified = HashMap::new();
        if self.agent.cgroups.is_v2() && limits.memory > 0 {
            unified.insert("memory.oom.group".to_owned(), "1".to_owned());
        }
        let target = (class == Class::Ephemeral)
            .then(|| {
                spec.ephemeral_containers
                    .iter()
                    .flatten()
                    .find(|c| c.name == container.name)?
                    .target_container_name
                    .clone()
            })
            .flatten()
            .and_then(|name| self.observed.active(&name))
            .map(|c| c.id.clone());
        let cpus = self.agent.cpus.of_container(pod::uid(&self.pod), &container.name);
        cri::LinuxContainerConfig {
            resources: Some(cri::LinuxContainerResources {
                oom_score_adj: score,
                unified,
                cpuset_cpus: cpus.map(|cpus| cpus.to_string()).unwrap_or_default(),
                hugepage_limits: huge_pages::limits(container, self.agent.huge_pages.iter().copied()),
                ..resources(limits)
            }),
            security_context: Some(security::context(spec, container, target, &self.agent.config.data_dir)),
        }
    }

    fn message_file(&self, directory: &Path) -> PathBuf {
        directory.join("containers").join(&self.name).join(self.restart_count.to_string())
    }

    async fn mounts(
        &self,
        spec: &PodSpec,
        container: &Container,
        directory: &Path,
        ips: &[String],
        known: &BTreeMap<&str, &str>,
    ) -> Result<Vec<cri::Mount>, String> {
        let mut mounts = Vec::new();
        for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
            let Some(volume) = self.volumes.get(&mount.name) else {
                return Err(format!(
                    "cannot find volume {:?} to mount into container {:?}",
                    mount.name, container.name
                ));
            };
            let sub = match (&mount.sub_path_expr, &mount.sub_path) {
                (Some(expression), _) if !expression.is_empty() => {
                    env::expand(expression, |name| known.get(name).map(|v| (*v).to_owned()))
                }
                (_, sub) => sub.clone().unwrap_or_default(),
            };
            let host_path = if sub.is_empty() {
                volume.clone()
            } else {
                let target =
                    directory.join("volume-subpaths").join(&mount.name).join(&container.name).join(index.to_string());
                let (volume, to) = (volume.clone(), target.clone());
                let bound = tokio::task::spawn_blocking(move || volume::mount::bind_sub_path(&volume, &sub, &to)).await;
                bound.map_err(|e| e.to_string())?.map_err(|e| {
                    format!(
                        "failed to prepare subPath for volumeMount {:?} of container {:?}: {e}",
                        mount.name, container.name
                    )
                })?;
                target
            };
            let propagation = match mount.mount_propagation.as_deref() {
                Some("HostToContainer") => cri::MountPropagation::PropagationHostToContainer,
                Some("Bidirectional") => cri::MountPropagation::PropagationBidirectional,
                _ => cri::MountPropagation::PropagationPrivate,
            };
            mounts.push(cri::Mount {
                container_path: absolute(&mount.mount_path),
                host_path: host_path.display().to_string(),
                readonly: mount.read_only == Some(true),
                propagation: propagation as i32,
                ..Default::default()
            });
        }
        let taken = |path: &str| container.volume_mounts.iter().flatten().any(|m| m.mount_path == path);
        if !taken("/etc/hosts") {
            let file = directory.join("etc-hosts");
            let text = sandbox::hosts_file(&self.pod, spec, ips, &self.agent.config);
            fs::create_dir_all(directory)
                .and_then(|()| fs::write(&file, text))
                .map_err(|e| format!("write /etc/hosts: {e}"))?;
            mounts.push(cri::Mount {
                container_path: "/etc/hosts".into(),
                host_path: file.display().to_string(),
                ..Default::default()
            });
        }
        let path = container.termination_message_path.as_deref().unwrap_or("/dev/termination-log");
        if !path.is_empty() {
            let file = self.message_file(directory);
            let make = || -> std::io::Result<()> {
                if let Some(parent) = file.parent() {
                    fs::create_dir_all(parent)?;
                }
                fs::write(&file, b"")?;
                // Whoever the container runs as may write it.
                fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            };
            make().map_err(|e| format!("make the termination message file: {e}"))?;
            mounts.push(cri::Mount {
                container_path: path.into(),
                host_path: file.display().to_string(),
                ..Default::default()
            });
        }
        Ok(mounts)
    }
}

fn device_mount(mount: devices::Mount) -> cri::Mount {
    cri::Mount {
        container_path: mount.container_path,
        host_path: mount.host_path,
        readonly: mount.read_only,
        ..Default::default()
    }
}

fn device_node(node: devices::DeviceSpec) -> cri::Device {
    cri::Device { container_path: node.container_path, host_path: node.host_path, permissions: node.permissions }
}

/// Limits as the runtime wants them.
pub fn resources(limits: qos::Limits) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: qos::CPU_PERIOD,
        cpu_quota: limits.cpu_quota,
        cpu_shares: limits.cpu_shares,
        memory_limit_in_bytes: limits.memory,
        ..Default::default()
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// The pod as the downward API sees it: with the addresses that the runtime has given and the API may not know yet.
pub fn with_addresses(pod: &Pod, spec: &PodSpec, ips: &[String], node_ips: &[IpAddr]) -> Pod {
    let mut pod = pod.clone();
    let status = pod.status.get_or_insert_default();
    let hosts: Vec<String> = node_ips.iter().map(ToString::to_string).collect();
    let ips = if spec.host_network == Some(true) { hosts.clone() } else { ips.to_vec() };
    status.pod_ip = ips.first().cloned();
    status.pod_ips = Some(ips.into_iter().map(|ip| k8s_openapi::api::core::v1::PodIP { ip }).collect());
    status.host_ip = hosts.first().cloned();
    status.host_ips = Some(hosts.into_iter().map(|ip| k8s_openapi::api::core::v1::HostIP { ip }).collect());
    pod
}

/// `Always` for a moving tag, as the API server defaults it too.
fn default_pull_policy(image: &str) -> &'static str {
    let name = image.rsplit('/').next().unwrap_or(image);
    match name.split_once('@').map_or_else(|| name.rsplit_once(':'), |_| Some(("", "digest"))) {
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

/// The registry that an image name means; Docker Hub if it names none.
fn registry(image: &str) -> &str {
    match image.split_once('/') {
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => first,
        _ => "docker.io",
    }
}

fn auths_for(secret: &Secret, image: &str) -> Vec<cri::AuthConfig> {
    let data = secret.data.as_ref();
    let parse = |key: &str| {
        let ByteString(bytes) = data?.get(key)?;
        serde_json::from_slice::<serde_json::Value>(bytes).ok()
    };
    let auths = parse(".dockerconfigjson").map(|c| c["auths"].clone()).or_else(|| parse(".dockercfg"));
    let wanted = registry(image);
    let mut found: Vec<(usize, cri::AuthConfig)> = Vec::new();
    for (server, entry) in auths.as_ref().and_then(|a| a.as_object()).into_iter().flatten() {
        let bare = server.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
        let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
        let hub = wanted == "docker.io" && matches!(host, "index.docker.io" | "registry-1.docker.io" | "docker.io");
        let below = path.is_empty()
            || hub
            || image.strip_prefix(host).is_some_and(|rest| rest.trim_start_matches('/').starts_with(path));
        if !(host == wanted || hub) || !below {
            continue;
        }
        let text = |key: &str| entry[key].as_str().unwrap_or_default().to_owned();
        let config = cri::AuthConfig {
            username: text("username"),
            password: text("password"),
            auth: text("auth"),
            identity_token: text("identitytoken"),
            ..Default::default()
        };
        found.push((path.len(), config));
    }
    // The most specific first.
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    found.into_iter().map(|(_, config)| config).collect()
}

/// Where probes and hooks of a container go.
pub fn target(agent: &Agent, container: &Container, id: &str, observed: &Observed, spec: &PodSpec) -> Target {
    let address = if spec.host_network == Some(true) {
        Some(agent.config.node_ip)
    } else {
        observed.sandbox().and_then(|s| s.ips.first()).and_then(|ip| ip.parse().ok())
    };
    Target { cri: agent.cri.clone(), container: id.to_owned(), address, ports: Target::ports(container) }
}

/// Stops a container: preStop, SIGTERM, SIGKILL, all within the deadline, which may move closer meanwhile.
pub async fn stop(
    agent: &Agent,
    id: &str,
    hook: Option<(Target, k8s_openapi::api::core::v1::LifecycleHandler)>,
    mut deadline: tokio::sync::watch::Receiver<tokio::time::Instant>,
) -> Result<(), tonic::Status> {
    use tokio::time::{Instant, sleep_until};
    if let Some((target, hook)) = hook {
        let mut run = std::pin::pin!(async move {
            // The hook is bounded by the deadline below.
            if let Err(error) = crate::hooks::run(&target, &hook, Duration::from_secs(86_400)).await {
                tracing::info!(container = target.container, "preStop hook failed: {error:#}");
            }
        });
        loop {
            let end = *deadline.borrow_and_update();
            tokio::select! {
                () = &mut run => break,
                () = sleep_until(end) => break,
                Ok(()) = deadline.changed() => {}
            }
        }
    }
    loop {
        let end = *deadline.borrow_and_update();
        // As upstream: a hook that used up the time leaves two seconds for SIGTERM.
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_secs(if end > Instant::now() {
            1
        } else {
            2
        }));
        let grace = Duration::from_secs(left.as_secs() + u64::from(left.subsec_millis() > 100));
        tokio::select! {
            result = agent.cri.stop_container(id, grace) => return result,
            Ok(()) = deadline.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pull_policies() {
        for (image, expect) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1.2", "IfNotPresent"),
            ("localhost:5000/nginx", "Always"),
            ("a.b/c/d:1", "IfNotPresent"),
            ("nginx@sha256:00", "IfNotPresent"),
        ] {
            assert_eq!(default_pull_policy(image), expect, "{image}");
        }
    }

    #[test]
    fn credentials_match_the_registry() {
        let config = json!({"auths": {"https://index.docker.io/v1/": {"auth": "hub"}, "a.b": {"username": "u", "password": "p"},
            "a.b/team": {"auth": "team"}}});
        let encoded = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, config.to_string());
        let secret: Secret = serde_json::from_value(json!({"data": {".dockerconfigjson": encoded}})).unwrap();
        let of = |image| auths_for(&secret, image).into_iter().map(|a| a.auth + &a.username).collect::<Vec<_>>();
        assert_eq!(of("nginx"), ["hub"]);
        assert_eq!(of("a.b/x:1"), ["u"]);
        assert_eq!(of("a.b/team/x:1"), ["team", "u"]);
        assert!(of("c.d/x").is_empty());
    }
}
