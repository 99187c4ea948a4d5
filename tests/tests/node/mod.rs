//! The node agent in depth: what it measures, pods from files, debugging, pressure, resizing. Each is a machine with a
//! server, driven by kubectl.

mod access;
mod cpus;
mod debug;
mod devices;
mod events;
mod eviction;
mod huge_pages;
mod metrics;
mod proxy;
mod resize;
mod runtime_class;
mod static_pods;
mod topology;

/// The image that pods here run.
const IMAGE: &str = "example.test/web:v1";
