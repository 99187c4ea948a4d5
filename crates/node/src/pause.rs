//! The sandbox image: our own pause program, embedded and imported where it is absent.

use crate::image::{Archive, ImageConfig, Layer};

/// The name under which the sandbox image is imported; containerd's `sandbox_image`.
pub const IMAGE: &str = "seawall.local/pause:1";

const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

/// The sandbox image as a docker-archive.
pub fn archive() -> anyhow::Result<Archive> {
    let mut layer = Layer::new()?;
    layer.file("pause", 0o755, PROGRAM)?;
    let config = ImageConfig { entrypoint: vec!["/pause".into()], ..Default::default() };
    Ok(Archive::new(IMAGE).layer(layer)?.config(config))
}
