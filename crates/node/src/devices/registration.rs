//! The socket at which plugins make themselves known: `v1beta1.Registration`.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Component, Path, PathBuf},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures::{future::BoxFuture, stream};
use seawall_api::names::qualified_name;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, body::Body, server::NamedService};
use tonic_prost::ProstCodec;

use super::{
    Devices,
    api::{Empty, RegisterRequest, VERSION, path},
};

/// The name of the socket: upstream's, since plugins look for it and watch it.
pub const SOCKET: &str = "kubelet.sock";

/// How long those that are connected have to hang up when the agent ends.
const LEAVE: Duration = Duration::from_secs(1);

/// Takes the plugins' directory over: plugins of before know by the loss of their sockets that they have to come again.
///
/// # Errors
/// If somebody else listens there, or the directory cannot be written.
pub fn listen(directory: &Path) -> anyhow::Result<UnixListener> {
    let at = || format!("the directory of device plugins, {}", directory.display());
    fs::create_dir_all(directory).with_context(at)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o750)).with_context(at)?;
    let socket = directory.join(SOCKET);
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        bail!(
            "somebody listens at {} already, such as a kubelet: stop it, or name another directory (--device-plugin-dir)",
            socket.display()
        );
    }
    for entry in fs::read_dir(directory).with_context(at)? {
        let entry = entry.with_context(at)?;
        if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            fs::remove_file(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    UnixListener::bind(&socket).with_context(|| format!("listen at {}", socket.display()))
}

/// Takes the socket away, if nobody listens there.
pub fn remove(directory: &Path) {
    let socket = directory.join(SOCKET);
    let stale = std::os::unix::net::UnixStream::connect(&socket).is_err_and(|error| {
        // What is no socket of ours, or cannot be seen, is left alone.
        error.kind() == io::ErrorKind::ConnectionRefused
    });
    if stale {
        let _ = fs::remove_file(socket);
    }
}

/// Answers plugins until it is told to stop.
///
/// # Errors
/// If it cannot listen any more.
pub async fn serve(devices: Arc<Devices>, listener: UnixListener, stop: CancellationToken) -> anyhow::Result<()> {
    let incoming = stream::unfold(listener, |listener| async {
        let accepted: io::Result<UnixStream> = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    });
    let server = tonic::transport::Server::builder().add_service(Registration(devices));
    let serving = server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    tokio::select! {
        ended = serving => ended.context("the registration of device plugins"),
        () = async {
            stop.cancelled().await;
            tokio::time::sleep(LEAVE).await;
        } => Ok(()),
    }
}

#[derive(Clone)]
struct Registration(Arc<Devices>);

impl NamedService for Registration {
    const NAME: &'static str = "v1beta1.Registration";
}

impl tower::Service<http::Request<Body>> for Registration {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let devices = Arc::clone(&self.0);
        Box::pin(async move {
            if request.uri().path() != path::REGISTER {
                return Ok(Status::unimplemented("the agent answers Register only").into_http());
            }
            let register = tower::service_fn(move |request: Request<RegisterRequest>| {
                let devices = Arc::clone(&devices);
                async move {
                    let request = request.into_inner();
                    let refused = |status: &Status| {
                        tracing::warn!(
                            resource = request.resource_name,
                            "a device plugin is refused: {}",
                            status.message()
                        );
                    };
                    devices.register(&request).await.inspect_err(refused)?;
                    Ok::<_, Status>(Response::new(Empty {}))
                }
            });
            let codec = ProstCodec::<Empty, RegisterRequest>::default();
            Ok(tonic::server::Grpc::new(codec).unary(register, request).await)
        })
    }
}

/// Checks what a plugin says of itself: upstream's rules and words. Gives the path of its socket.
///
/// # Errors
/// What is wrong.
pub fn check(request: &RegisterRequest, directory: &Path) -> Result<PathBuf, Status> {
    let RegisterRequest { version, endpoint, resource_name: name, .. } = request;
    if version != VERSION {
        return Err(Status::invalid_argument(format!(
            "requested API version {version:?} is not supported by kubelet. Supported version is [\"{VERSION}\"]"
        )));
    }
    let extended = name.contains('/')
        && !name.contains("kubernetes.io/")
        && !name.starts_with("requests.")
        && qualified_name(&format!("requests.{name}")).is_ok();
    if !extended {
        return Err(Status::invalid_argument(format!(
            "the ResourceName {name:?} is invalid: write DOMAIN/NAME, e.g. example.com/gpu"
        )));
    }
    let endpoint = Path::new(endpoint);
    let plain = endpoint.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || endpoint.as_os_str().is_empty() || endpoint == Path::new(SOCKET) {
        return Err(Status::invalid_argument(format!(
            "the endpoint {endpoint:?} is invalid: it is the name of the plugin's socket in {}",
            directory.display()
        )));
    }
    Ok(directory.join(endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_plugins_say() {
        let check = |version: &str, name: &str, endpoint: &str| {
            let [version, resource_name, endpoint] = [version, name, endpoint].map(str::to_owned);
            let request = RegisterRequest { version, endpoint, resource_name, options: None };
            check(&request, Path::new("/p")).map_err(|status| status.message().to_owned())
        };
        assert_eq!(check("v1beta1", "example.com/gpu", "gpu.sock"), Ok("/p/gpu.sock".into()));
        assert_eq!(check("v1beta1", "example.com/gpu", "vendor/gpu.sock"), Ok("/p/vendor/gpu.sock".into()));
        for (version, name, endpoint, said) in [
            ("v1alpha", "a.b/c", "s", "requested API version \"v1alpha\" is not supported by kubelet"),
            ("v1beta1", "gpu", "s", "the ResourceName \"gpu\" is invalid"),
            ("v1beta1", "x.kubernetes.io/gpu", "s", "the ResourceName \"x.kubernetes.io/gpu\" is invalid"),
            ("v1beta1", "requests.a/gpu", "s", "is invalid"),
            ("v1beta1", "a.b/c/d", "s", "is invalid"),
            ("v1beta1", "a.b/c", "", "the endpoint \"\" is invalid"),
            ("v1beta1", "a.b/c", "../s", "the endpoint \"../s\" is invalid"),
            ("v1beta1", "a.b/c", "/s", "the endpoint \"/s\" is invalid"),
            ("v1beta1", "a.b/c", "kubelet.sock", "the endpoint \"kubelet.sock\" is invalid"),
        ] {
            let found = check(version, name, endpoint).unwrap_err();
            assert!(found.contains(said), "{found}");
        }
    }
}
