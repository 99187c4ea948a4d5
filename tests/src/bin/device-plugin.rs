//! A device plugin: `device-plugin DIRECTORY STATE RESOURCE DEVICE...` has devices that are all `/dev/null`. One may be named
//! with the NUMA node that it is near to: `a:1`. In the directory STATE it keeps their nodes and a file `calls` of what it
//! was asked; a device is sick while there is a file of its name with `.sick`. It prefers the last of the free ones, wants to
//! be told before containers start, and comes again when its socket is gone, as plugins do.
#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use hyper_util::rt::TokioIo;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use seawall_node::devices::{
    api::{
        AllocateRequest, AllocateResponse, ContainerAllocateResponse, Device, DeviceIds, DevicePluginOptions,
        DeviceSpec, Empty, ListAndWatchResponse, Mount, NumaNode, PreferredAllocationRequest,
        PreferredAllocationResponse, RegisterRequest, TopologyInfo, VERSION, path,
    },
    registration::SOCKET,
};
use tokio::{
    net::{UnixListener, UnixStream},
    time::sleep,
};
use tonic::{
    Request, Response, Status,
    body::Body,
    server::{Grpc, NamedService},
    transport::{Endpoint, Uri},
};
use tonic_prost::ProstCodec;

const ENDPOINT: &str = "test.sock";
const LOOK: Duration = Duration::from_millis(50);

struct Plugin {
    state: PathBuf,
    resource: String,
    /// With what each says that it is near to.
    devices: Vec<(String, Option<TopologyInfo>)>,
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let (directory, state) = (PathBuf::from(args.next().unwrap()), PathBuf::from(args.next().unwrap()));
    let device = |word: String| match word.split_once(':') {
        Some((id, node)) => (id.to_owned(), Some(TopologyInfo { nodes: vec![NumaNode { id: node.parse().unwrap() }] })),
        None => (word, None),
    };
    let resource = args.next().unwrap();
    let plugin = Plugin { state, resource, devices: args.map(device).collect() };
    for (device, _) in &plugin.devices {
        let node = plugin.state.join(device);
        if !node.exists() {
            mknod(&node, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3)).unwrap();
        }
    }
    let plugin = Service(Arc::new(plugin));
    loop {
        let socket = directory.join(ENDPOINT);
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let incoming = stream::unfold(listener, |listener| async {
            Some((listener.accept().await.map(|(stream, _)| stream), listener))
        });
        let server = tonic::transport::Server::builder().add_service(plugin.clone()).serve_with_incoming(incoming);
        let gone = async {
            register(&directory, &plugin.0.resource).await;
            while socket.exists() {
                sleep(LOOK).await;
            }
        };
        tokio::select! {
            ended = server => ended.unwrap(),
            () = gone => {}
        }
    }
}

/// Makes itself known, as soon as the agent listens.
async fn register(directory: &Path, resource: &str) {
    let socket = directory.join(SOCKET);
    loop {
        let to = socket.clone();
        let connect = tower::service_fn(move |_: Uri| {
            let to = to.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(to).await?)) }
        });
        let request = RegisterRequest {
            version: VERSION.into(),
            endpoint: ENDPOINT.into(),
            resource_name: resource.to_owned(),
            options: None,
        };
        if let Ok(channel) = Endpoint::from_static("http://agent").connect_with_connector(connect).await {
            let mut grpc = tonic::client::Grpc::new(channel);
            grpc.ready().await.unwrap();
            let codec = ProstCodec::<RegisterRequest, Empty>::default();
            let path = http::uri::PathAndQuery::from_static(path::REGISTER);
            match grpc.unary(Request::new(request), path, codec).await {
                Ok(_) => return,
                Err(status) => eprintln!("the agent refuses: {status:?}"),
            }
        }
        sleep(LOOK).await;
    }
}

impl Plugin {
    fn note(&self, call: &str, ids: &[String]) {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(self.state.join("calls")).unwrap();
        writeln!(file, "{call} {}", ids.join(",")).unwrap();
    }

    fn list(&self) -> ListAndWatchResponse {
        let health = |id: &String| if self.state.join(format!("{id}.sick")).exists() { "Unhealthy" } else { "Healthy" };
        let device = |(id, topology): &(String, Option<TopologyInfo>)| Device {
            id: id.clone(),
            health: health(id).into(),
            topology: topology.clone(),
        };
        ListAndWatchResponse { devices: self.devices.iter().map(device).collect() }
    }

    fn allocate(&self, ids: &[String]) -> ContainerAllocateResponse {
        self.note("allocate", ids);
        let node = |id: &String| DeviceSpec {
            container_path: format!("/dev/test-{id}"),
            host_path: self.state.join(id).display().to_string(),
            permissions: "rw".into(),
        };
        ContainerAllocateResponse {
            envs: [("DEVICES".to_owned(), ids.join(",")), ("OWN".to_owned(), "of the plugin".to_owned())].into(),
            mounts: vec![Mount {
                container_path: "/plugin".into(),
                host_path: self.state.display().to_string(),
                read_only: true,
            }],
            devices: ids.iter().map(node).collect(),
            annotations: [("example.test/devices".to_owned(), ids.join(","))].into(),
            ..Default::default()
        }
    }
}

#[derive(Clone)]
struct Service(Arc<Plugin>);

impl NamedService for Service {
    const NAME: &'static str = "v1beta1.DevicePlugin";
}

/// Answers a call of one message with one message.
async fn answer<Q, A>(request: http::Request<Body>, answer: impl Fn(Q) -> A + Clone) -> http::Response<Body>
where
    Q: prost::Message + Default + 'static,
    A: prost::Message + Default + 'static,
{
    let service = tower::service_fn(move |request: Request<Q>| {
        std::future::ready(Ok::<_, Status>(Response::new(answer(request.into_inner()))))
    });
    Grpc::new(ProstCodec::<A, Q>::default()).unary(service, request).await
}

impl tower::Service<http::Request<Body>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let plugin = Arc::clone(&self.0);
        let path = request.uri().path().to_owned();
        let answered = async move {
            match path.as_str() {
                path::OPTIONS => {
                    let options =
                        DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true };
                    answer(request, move |_: Empty| options).await
                }
                path::LIST_AND_WATCH => {
                    let service = tower::service_fn(move |_: Request<Empty>| {
                        let plugin = Arc::clone(&plugin);
                        // It says the same over and over again; that changes nothing.
                        let lists = stream::unfold(plugin, |plugin| async {
                            sleep(LOOK).await;
                            Some((Ok::<_, Status>(plugin.list()), plugin))
                        });
                        std::future::ready(Ok::<_, Status>(Response::new(lists.boxed())))
                    });
                    let codec = ProstCodec::<ListAndWatchResponse, Empty>::default();
                    Grpc::new(codec).server_streaming(service, request).await
                }
                path::PREFERRED => {
                    let prefers = |asked: PreferredAllocationRequest| {
                        let responses = asked.container_requests.into_iter().map(|asked| {
                            let count = asked.allocation_size as usize - asked.must_include.len();
                            let free = asked.available.into_iter().filter(|id| !asked.must_include.contains(id));
                            let mut free: Vec<String> = free.collect();
                            free.sort();
                            let last = free.split_off(free.len().saturating_sub(count));
                            DeviceIds { ids: [asked.must_include, last].concat() }
                        });
                        PreferredAllocationResponse { container_responses: responses.collect() }
                    };
                    answer(request, prefers).await
                }
                path::ALLOCATE => {
                    let gives = move |asked: AllocateRequest| AllocateResponse {
                        container_responses: asked.container_requests.iter().map(|c| plugin.allocate(&c.ids)).collect(),
                    };
                    answer(request, gives).await
                }
                path::PRE_START => {
                    let notes = move |asked: DeviceIds| {
                        plugin.note("start", &asked.ids);
                        Empty {}
                    };
                    answer(request, notes).await
                }
                _ => Status::unimplemented(path).into_http(),
            }
        };
        answered.map(Ok).boxed()
    }
}
