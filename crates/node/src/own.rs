//! The image of this very program, for pods that run a part of it. It is made where such a pod is to start, without a
//! registry.

use std::{borrow::Cow, path::Path};

use anyhow::Context as _;

use crate::{
    cri::Cri,
    image::{Archive, ImageConfig, Layer, import},
};

/// The image's name for this version of the program.
pub fn name(version: &str) -> String {
    format!("seawall.local/seawall:{}", version.replace('+', "-"))
}

/// Two pods that want it at the same time wait for one.
static MAKING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Makes the image, unless it is there, and imports it into the containerd at `socket`.
///
/// # Errors
/// If the program or one of its libraries cannot be read, or containerd does not take it.
pub async fn provide(cri: &Cri, socket: &Path, name: &str) -> anyhow::Result<()> {
    let _one = MAKING.lock().await;
    if cri.image(name).await?.is_some() {
        return Ok(());
    }
    let name = name.to_owned();
    let archive = tokio::task::spawn_blocking(move || archive(&name)).await??;
    import(socket, &archive).await
}

fn archive(name: &str) -> anyhow::Result<Vec<u8>> {
    // The file that runs, even if another has its name by now.
    let program = format!("/proc/{}/exe", std::process::id());
    let program = Path::new(&program);
    let content = std::fs::read(program).context("read this program")?;
    let mut layer = Layer::new();
    layer.file("seawall", 0o755, &loaded(&content))?;
    drop(content);
    layer.libraries(program)?;
    let config = ImageConfig { entrypoint: vec!["/seawall".into()], ..Default::default() };
    Archive::new(name).layer(layer)?.config(config).finish()
}

/// The part of a program that the kernel loads: what follows (symbols, and what debuggers want) can be most of it.
fn loaded(program: &[u8]) -> Cow<'_, [u8]> {
    match end_of_segments(program) {
        Some(end) if end < program.len() => {
            let mut cut = program[..end].to_vec();
            // There is no table of sections any more: where it was, how many there were, and where their names were.
            for place in [40..48, 60..62, 62..64] {
                cut[place].fill(0);
            }
            Cow::Owned(cut)
        }
        _ => Cow::Borrowed(program),
    }
}

/// Where the last segment of a 64-bit little-endian ELF file ends; `None` if it is none.
fn end_of_segments(program: &[u8]) -> Option<usize> {
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = program.get(at..at.checked_add(size)?)?;
        bytes.iter().rev().try_fold(0usize, |n, b| n.checked_mul(256)?.checked_add(usize::from(*b)))
    };
    if program.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let mut end = table.checked_add(size.checked_mul(count)?)?.max(64);
    for index in 0..count {
        let at = table.checked_add(index.checked_mul(size)?)?;
        end = end.max(number(at.checked_add(8)?, 8)?.checked_add(number(at.checked_add(32)?, 8)?)?);
    }
    (end <= program.len()).then_some(end)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_program_runs_without_what_is_not_loaded() {
        let whole = std::fs::read("/proc/self/exe").unwrap();
        let cut = loaded(&whole);
        assert!(cut.len() < whole.len(), "{} of {} bytes", cut.len(), whole.len());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cut");
        std::fs::write(&path, &cut).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let output = std::process::Command::new(&path).arg("--list").output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("a_program_runs_without"), "{output:?}");
    }

    #[test]
    fn what_is_no_program_stays() {
        for bytes in
            [&b""[..], b"#!/bin/sh\n", b"\x7fELF\x02\x01", &[b"\x7fELF\x02\x01".as_slice(), &[0xff; 90]].concat()]
        {
            assert_eq!(&*loaded(bytes), bytes);
        }
    }

    #[test]
    fn a_name() {
        assert_eq!(name("v1.37.0+seawall0.1.0"), "seawall.local/seawall:v1.37.0-seawall0.1.0");
    }
}
