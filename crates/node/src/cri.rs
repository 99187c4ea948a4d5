//! A client of the container runtime interface, reduced to what the agent asks for.
//!
//! <https://kubernetes.io/docs/concepts/architecture/cri/>

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    self as cri, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tokio::net::UnixStream;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::pleg::{Envelope, SubscribeRequest};

/// Labels by which the agent finds its own containers again; upstream's names.
pub mod label {
    /// The pod's name.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// The pod's namespace.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// The pod's uid.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    /// The container's name in the pod.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
}

/// Annotations that carry what must be known of a container when its pod is gone from the API.
pub mod annotation {
    /// Identifies the part of the container's spec that a running container cannot follow.
    pub const HASH: &str = "io.kubernetes.container.hash";
    /// How often the container was restarted before.
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    /// Where the container leaves its termination message, on the host.
    pub const TERMINATION_MESSAGE: &str = "io.seawall.container.terminationMessageFile";
    /// `File` or `FallbackToLogsOnError`.
    pub const TERMINATION_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// The pod's grace period.
    pub const GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";
}

/// Every call of CRI but pulls, stops and execs answers within this.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// A connection to the runtime. Cheap to clone; reconnects by itself when containerd comes back.
#[derive(Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    channel: Channel,
}

fn request<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

/// Treats "no such thing" as done: what had to go is gone.
fn gone_is_fine(result: Result<(), Status>) -> Result<(), Status> {
    match result {
        Err(status) if status.code() == Code::NotFound => Ok(()),
        other => other,
    }
}

impl Cri {
    /// A client of the runtime at this Unix socket. Connects at the first call.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let path: PathBuf = socket.to_path_buf();
        let channel =
            Endpoint::from_static("http://cri").connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
            }));
        const LIMIT: usize = 64 << 20;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(LIMIT),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(LIMIT),
            channel,
        })
    }

    /// Whether a CRI runtime answers at this socket.
    pub async fn probe(socket: &Path, timeout: Duration) -> anyhow::Result<()> {
        let cri = Self::connect(socket)?;
        tokio::time::timeout(timeout, cri.version()).await.context("no answer in time")?.context("CRI version")?;
        Ok(())
    }

    /// Name and version of the runtime, e.g. `containerd://1.6.20`.
    pub async fn version(&self) -> Result<String, Status> {
        let reply =
            self.runtime.clone().version(request(cri::VersionRequest::default(), CALL_TIMEOUT)).await?.into_inner();
        Ok(format!("{}://{}", reply.runtime_name, reply.runtime_version.trim_start_matches('v')))
    }

    /// The runtime's own conditions (RuntimeReady, NetworkReady).
    pub async fn status(&self) -> Result<Vec<cri::RuntimeCondition>, Status> {
        let message = cri::StatusRequest { verbose: false };
        let reply = self.runtime.clone().status(request(message, Duration::from_secs(10))).await?.into_inner();
        Ok(reply.status.map(|s| s.conditions).unwrap_or_default())
    }

    /// Makes and starts a sandbox.
    pub async fn run_sandbox(&self, config: cri::PodSandboxConfig, handler: &str) -> Result<String, Status> {
        let message = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.into() };
        Ok(self
            .runtime
            .clone()
            .run_pod_sandbox(request(message, Duration::from_secs(240)))
            .await?
            .into_inner()
            .pod_sandbox_id)
    }

    /// Stops a sandbox: kills its containers, takes its network away.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), Status> {
        let message = cri::StopPodSandboxRequest { pod_sandbox_id: id.into() };
        gone_is_fine(self.runtime.clone().stop_pod_sandbox(request(message, CALL_TIMEOUT)).await.map(drop))
    }

    /// Removes a sandbox and its containers.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), Status> {
        let message = cri::RemovePodSandboxRequest { pod_sandbox_id: id.into() };
        gone_is_fine(self.runtime.clone().remove_pod_sandbox(request(message, CALL_TIMEOUT)).await.map(drop))
    }

    /// A sandbox's status, `None` if it does not exist.
    pub async fn sandbox_status(
        &self,
        id: &str,
        verbose: bool,
    ) -> Result<Option<cri::PodSandboxStatusResponse>, Status> {
        let message = cri::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose };
        match self.runtime.clone().pod_sandbox_status(request(message, CALL_TIMEOUT)).await {
            Ok(reply) => Ok(Some(reply.into_inner())),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status),
        }
    }

    /// The sandboxes, of one pod or of all.
    pub async fn sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<cri::PodSandbox>, Status> {
        let filter = cri::PodSandboxFilter { label_selector: uid_selector(pod_uid), ..Default::default() };
        let message = cri::ListPodSandboxRequest { filter: Some(filter) };
        Ok(self.runtime.clone().list_pod_sandbox(request(message, CALL_TIMEOUT)).await?.into_inner().items)
    }

    /// The containers, of one pod or of all.
    pub async fn containers(&self, pod_uid: Option<&str>) -> Result<Vec<cri::Container>, Status> {
        let filter = cri::ContainerFilter { label_selector: uid_selector(pod_uid), ..Default::default() };
        let message = cri::ListContainersRequest { filter: Some(filter) };
        Ok(self.runtime.clone().list_containers(request(message, CALL_TIMEOUT)).await?.into_inner().containers)
    }

    /// A container's status, `None` if it does not exist.
    pub async fn container_status(&self, id: &str) -> Result<Option<cri::ContainerStatus>, Status> {
        let message = cri::ContainerStatusRequest { container_id: id.into(), verbose: false };
        match self.runtime.clone().container_status(request(message, CALL_TIMEOUT)).await {
            Ok(reply) => Ok(reply.into_inner().status),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status),
        }
    }

    /// Makes a container in a sandbox.
    pub async fn create_container(
        &self,
        sandbox: &str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String, Status> {
        let message = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        Ok(self.runtime.clone().create_container(request(message, CALL_TIMEOUT)).await?.into_inner().container_id)
    }

    /// Starts a container that was made.
    pub async fn start_container(&self, id: &str) -> Result<(), Status> {
        let message = cri::StartContainerRequest { container_id: id.into() };
        self.runtime.clone().start_container(request(message, CALL_TIMEOUT)).await.map(drop)
    }

    /// Asks a container to stop, and kills it after `grace`.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), Status> {
        let message = cri::StopContainerRequest { container_id: id.into(), timeout: grace.as_secs() as i64 };
        gone_is_fine(self.runtime.clone().stop_container(request(message, grace + CALL_TIMEOUT)).await.map(drop))
    }

    /// Tells a container that runs other limits.
    pub async fn update_container(&self, id: &str, resources: cri::LinuxContainerResources) -> Result<(), Status> {
        let message = cri::UpdateContainerResourcesRequest {
            container_id: id.into(),
            linux: Some(resources),
            ..Default::default()
        };
        self.runtime.clone().update_container_resources(request(message, CALL_TIMEOUT)).await.map(drop)
    }

    /// Removes a container.
    pub async fn remove_container(&self, id: &str) -> Result<(), Status> {
        let message = cri::RemoveContainerRequest { container_id: id.into() };
        gone_is_fine(self.runtime.clone().remove_container(request(message, CALL_TIMEOUT)).await.map(drop))
    }

    /// Has the runtime open a container's log file anew, after it was moved away.
    pub async fn reopen_log(&self, id: &str) -> Result<(), Status> {
        let message = cri::ReopenContainerLogRequest { container_id: id.into() };
        self.runtime.clone().reopen_container_log(request(message, CALL_TIMEOUT)).await.map(drop)
    }

    /// Runs a command in a container and returns what it wrote and its exit code.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<cri::ExecSyncResponse, Status> {
        let message =
            cri::ExecSyncRequest { container_id: id.into(), cmd: command, timeout: timeout.as_secs().max(1) as i64 };
        Ok(self.runtime.clone().exec_sync(request(message, timeout + Duration::from_secs(10))).await?.into_inner())
    }

    /// The address at which the runtime streams an exec.
    pub async fn exec(&self, message: cri::ExecRequest) -> Result<String, Status> {
        Ok(self.runtime.clone().exec(request(message, CALL_TIMEOUT)).await?.into_inner().url)
    }

    /// The address at which the runtime streams an attachment.
    pub async fn attach(&self, message: cri::AttachRequest) -> Result<String, Status> {
        Ok(self.runtime.clone().attach(request(message, CALL_TIMEOUT)).await?.into_inner().url)
    }

    /// Container events as they happen; `Unimplemented` before containerd 1.7.
    pub async fn events(&self) -> Result<tonic::Streaming<cri::ContainerEventResponse>, Status> {
        Ok(self.runtime.clone().get_container_events(cri::GetEventsRequest {}).await?.into_inner())
    }

    /// containerd's own events as they happen, those that one of the filters lets through
    /// (<https://pkg.go.dev/github.com/containerd/containerd/v2/pkg/filters>); `Unimplemented` with another runtime.
    pub async fn containerd_events(&self, filters: Vec<String>) -> Result<tonic::Streaming<Envelope>, Status> {
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = http::uri::PathAndQuery::from_static("/containerd.services.events.v1.Events/Subscribe");
        let request = Request::new(SubscribeRequest { filters });
        Ok(client.server_streaming(request, path, tonic_prost::ProstCodec::default()).await?.into_inner())
    }

    /// An image that is on the node, `None` if it is not.
    pub async fn image(&self, name: &str) -> Result<Option<cri::Image>, Status> {
        let image = Some(cri::ImageSpec { image: name.into(), ..Default::default() });
        let message = cri::ImageStatusRequest { image, verbose: false };
        Ok(self.images.clone().image_status(request(message, CALL_TIMEOUT)).await?.into_inner().image)
    }

    /// What containers use; the agent wants to know only what they have written beside their images.
    pub async fn container_stats(&self) -> Result<Vec<cri::ContainerStats>, Status> {
        let message = cri::ListContainerStatsRequest { filter: None };
        Ok(self.runtime.clone().list_container_stats(request(message, CALL_TIMEOUT)).await?.into_inner().stats)
    }

    /// What images take of the disk.
    pub async fn image_fs(&self) -> Result<Vec<cri::FilesystemUsage>, Status> {
        let message = cri::ImageFsInfoRequest {};
        Ok(self.images.clone().image_fs_info(request(message, CALL_TIMEOUT)).await?.into_inner().image_filesystems)
    }

    /// Deletes an image.
    pub async fn remove_image(&self, id: &str) -> Result<(), Status> {
        let image = Some(cri::ImageSpec { image: id.into(), ..Default::default() });
        let message = cri::RemoveImageRequest { image };
        gone_is_fine(self.images.clone().remove_image(request(message, CALL_TIMEOUT)).await.map(drop))
    }

    /// All images on the node.
    pub async fn images(&self) -> Result<Vec<cri::Image>, Status> {
        let message = cri::ListImagesRequest { filter: None };
        Ok(self.images.clone().list_images(request(message, CALL_TIMEOUT)).await?.into_inner().images)
    }

    /// Pulls an image. Bounded by the caller: a large image takes as long as it takes.
    pub async fn pull(
        &self,
        name: &str,
        auth: Option<cri::AuthConfig>,
        sandbox: cri::PodSandboxConfig,
    ) -> Result<String, Status> {
        let image = Some(cri::ImageSpec { image: name.into(), ..Default::default() });
        let message = cri::PullImageRequest { image, auth, sandbox_config: Some(sandbox) };
        Ok(self.images.clone().pull_image(request(message, Duration::from_secs(3600))).await?.into_inner().image_ref)
    }
}

fn uid_selector(pod_uid: Option<&str>) -> HashMap<String, String> {
    pod_uid.map(|uid| (label::POD_UID.to_owned(), uid.to_owned())).into_iter().collect()
}
