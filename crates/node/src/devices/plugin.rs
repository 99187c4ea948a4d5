//! A connection to a device plugin.

use std::{io, path::Path, time::Duration};

use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::{
    net::UnixStream,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Status, Streaming,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint, Uri},
};
use tonic_prost::ProstCodec;

use super::{
    api::{
        AllocateRequest, AllocateResponse, ContainerAllocateResponse, ContainerPreferredAllocationRequest, DeviceIds,
        DevicePluginOptions, Empty, ListAndWatchResponse, PreferredAllocationRequest, PreferredAllocationResponse,
        path,
    },
    state::Ids,
};

/// How long a plugin's socket is waited for: it has made itself known, so it is there or about to be.
const CONNECT: Duration = Duration::from_secs(10);
/// Between the attempts.
const AGAIN: Duration = Duration::from_millis(50);
/// How long a plugin may take to give devices out. Upstream waits for ever, and lets no other pod in meanwhile.
const ALLOCATE: Duration = Duration::from_secs(60);
/// How long it may take before a container starts: as upstream.
const PRE_START: Duration = Duration::from_secs(30);
/// Everything else is answered from memory.
const ASK: Duration = Duration::from_secs(10);

/// A plugin that has made itself known.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// Which one it is of all that there were.
    pub number: u64,
    /// What it has.
    pub resource: String,
    /// What it wants to be asked.
    pub options: DevicePluginOptions,
    /// Done when another one has taken its place.
    pub replaced: CancellationToken,
    channel: Channel,
}

/// A plugin's refusal, as upstream shows one.
fn said(status: &Status) -> String {
    format!("rpc error: code = {:?} desc = {}", status.code(), status.message())
}

fn names(ids: &Ids) -> Vec<String> {
    ids.iter().cloned().collect()
}

impl Plugin {
    /// Connects to a plugin's socket and asks for its options.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn connect(number: u64, resource: &str, socket: &Path) -> Result<Plugin, Status> {
        let deadline = Instant::now() + CONNECT;
        let channel = loop {
            let socket = socket.to_owned();
            let connect = tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
            });
            match Endpoint::from_static("http://plugin").connect_with_connector(connect).await {
                Ok(channel) => break channel,
                Err(_) if Instant::now() < deadline => sleep(AGAIN).await,
                Err(error) => return Err(Status::unavailable(format!("connect to the plugin: {error}"))),
            }
        };
        let (resource, replaced) = (resource.to_owned(), CancellationToken::new());
        let mut plugin = Plugin { number, resource, options: DevicePluginOptions::default(), replaced, channel };
        plugin.options = plugin.call(path::OPTIONS, Empty {}, ASK).await?;
        Ok(plugin)
    }

    async fn call<Q, A>(&self, path: &'static str, message: Q, limit: Duration) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut request = Request::new(message);
        request.set_timeout(limit);
        let asked = async {
            let mut grpc = self.grpc().await?;
            grpc.unary(request, PathAndQuery::from_static(path), ProstCodec::default()).await
        };
        let answer = tokio::time::timeout(limit, asked).await;
        let late = || Status::deadline_exceeded(format!("the plugin did not answer within {limit:?}"));
        Ok(answer.map_err(|_| late())??.into_inner())
    }

    async fn grpc(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(grpc)
    }

    /// Follows which devices there are. It ends with the plugin.
    ///
    /// # Errors
    /// If the plugin does not do that.
    pub async fn watch(&self) -> Result<Streaming<ListAndWatchResponse>, Status> {
        let path = PathAndQuery::from_static(path::LIST_AND_WATCH);
        let mut grpc = self.grpc().await?;
        Ok(grpc.server_streaming(Request::new(Empty {}), path, ProstCodec::default()).await?.into_inner())
    }

    /// Which of the free devices it would give, beside those that have to be among them.
    ///
    /// # Errors
    /// What it said.
    pub async fn preferred(&self, sure: &Ids, free: &Ids, count: usize) -> Result<Vec<String>, String> {
        let asked = ContainerPreferredAllocationRequest {
            available: names(&free.union(sure).cloned().collect()),
            must_include: names(sure),
            allocation_size: i32::try_from(count).unwrap_or(i32::MAX),
        };
        let request = PreferredAllocationRequest { container_requests: vec![asked] };
        let answer: PreferredAllocationResponse =
            self.call(path::PREFERRED, request, ASK).await.map_err(|status| said(&status))?;
        Ok(answer.container_responses.into_iter().next().unwrap_or_default().ids)
    }

    /// Gives devices to a container, and says what it is to be made with.
    ///
    /// # Errors
    /// What it said.
    pub async fn allocate(&self, ids: &Ids) -> Result<ContainerAllocateResponse, String> {
        let request = AllocateRequest { container_requests: vec![DeviceIds { ids: names(ids) }] };
        let answer: AllocateResponse =
            self.call(path::ALLOCATE, request, ALLOCATE).await.map_err(|status| said(&status))?;
        let first = answer.container_responses.into_iter().next();
        first.ok_or_else(|| "No containers return in allocation response".to_owned())
    }

    /// Tells that a container with these devices is about to start.
    ///
    /// # Errors
    /// What it said.
    pub async fn pre_start(&self, ids: &Ids) -> Result<(), String> {
        let request = DeviceIds { ids: names(ids) };
        self.call::<_, Empty>(path::PRE_START, request, PRE_START).await.map(drop).map_err(|status| said(&status))
    }
}
