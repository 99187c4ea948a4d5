//! The sandbox image: our own pause program, embedded and imported where it is absent.

use crate::image::{Archive, ImageConfig};

/// The name under which the sandbox image is imported; containerd's `sandbox_image`.
pub const IMAGE: &str = "seawall.local/pause:1";

const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

/// The sandbox image as a docker-archive.
pub fn archive() -> anyhow::Result<Vec<u8>> {
    let mut layer = crate::image::Layer::new();
    layer.file("pause", 0o755, PROGRAM)?;
    Archive::new(IMAGE)
        .layer(layer)?
        .config(ImageConfig { entrypoint: vec!["/pause".into()], ..Default::default() })
        .finish()
}
