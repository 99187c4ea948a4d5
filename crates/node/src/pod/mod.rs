//! Pods, decided purely: what was observed of a pod and what it should be go in, actions and a status come out. No
//! clock, no socket, no async here.

pub mod backoff;
pub mod machine;
pub mod observed;
pub mod qos;
pub mod quantity;
pub mod resize;
pub mod status;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// Which list of the pod's spec a container is from, as far as it changes its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Runs to completion before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`: starts in order, then runs beside the others (KEP-753).
    Sidecar,
    /// A container proper.
    Main,
    /// Added to a running pod for debugging; never restarted.
    Ephemeral,
}

/// A container of a pod, with its class.
#[derive(Clone, Copy, Debug)]
pub struct ContainerRef<'a> {
    /// Its place in the pod's life.
    pub class: Class,
    /// Its spec.
    pub spec: &'a Container,
}

/// The class of an entry of `initContainers`.
pub fn init_class(container: &Container) -> Class {
    if container.restart_policy.as_deref() == Some("Always") { Class::Sidecar } else { Class::Init }
}

/// Init containers first, in order, then the main ones.
pub fn containers(spec: &PodSpec) -> impl Iterator<Item = ContainerRef<'_>> {
    let init = spec.init_containers.iter().flatten().map(|c| ContainerRef { class: init_class(c), spec: c });
    init.chain(spec.containers.iter().map(|c| ContainerRef { class: Class::Main, spec: c }))
}

/// The container of this name, ephemeral ones included (they are turned into plain ones, which they nearly are).
pub fn find_container(spec: &PodSpec, name: &str) -> Option<(Class, Container)> {
    if let Some(found) = containers(spec).find(|c| c.spec.name == name) {
        return Some((found.class, found.spec.clone()));
    }
    let ephemeral = spec.ephemeral_containers.iter().flatten().find(|c| c.name == name)?;
    Some((Class::Ephemeral, ephemeral_as_container(ephemeral)))
}

/// The common part of an ephemeral container.
pub fn ephemeral_as_container(e: &k8s_openapi::api::core::v1::EphemeralContainer) -> Container {
    Container {
        name: e.name.clone(),
        image: e.image.clone(),
        args: e.args.clone(),
        command: e.command.clone(),
        env: e.env.clone(),
        env_from: e.env_from.clone(),
        image_pull_policy: e.image_pull_policy.clone(),
        security_context: e.security_context.clone(),
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path.clone(),
        termination_message_policy: e.termination_message_policy.clone(),
        tty: e.tty,
        volume_mounts: e.volume_mounts.clone(),
        working_dir: e.working_dir.clone(),
        ..Default::default()
    }
}

/// A pod as it is kept here: without who manages its fields, which is half of it in memory and which nobody here asks.
pub fn lean(mut pod: Pod) -> Pod {
    pod.metadata.managed_fields = None;
    pod
}

/// A pod's uid, empty if it has none (which the API never serves).
pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// A pod's namespace.
pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

/// A pod's name.
pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// `name_namespace(uid)`, as upstream's messages name a pod.
pub fn full_name(pod: &Pod) -> String {
    format!("{}_{}({})", name(pod), namespace(pod), uid(pod))
}

/// The part of a container's spec that only a new container can follow, as a short hash. Upstream hashes name and image.
pub fn container_hash(container: &Container) -> String {
    // FNV-1a, 32 bits: it only has to differ when the input does, on this node, over this pod's life.
    let text = format!("{}\0{}", container.name, container.image.as_deref().unwrap_or_default());
    let hash = text.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    format!("{hash:x}")
}
