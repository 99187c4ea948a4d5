//! The image of this very program, for pods that run a part of it. It is made where such a pod is to start, without a
//! registry.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use anyhow::Context as _;

use crate::{
    cri::Cri,
    image::{Archive, ImageConfig, Layer, import},
};

/// The image's name for this version of the program.
pub fn name(version: &str) -> String {
    format!("seawall.local/seawall:{}", version.replace('+', "-"))
}

/// What has to be in memory of the program to see how long it is, in bytes.
const HEAD: u64 = 64 << 10;

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
    import(socket, archive).await
}

fn archive(name: &str) -> anyhow::Result<Archive> {
    // The file that runs, even if another has its name by now.
    let program = format!("/proc/{}/exe", std::process::id());
    let program = Path::new(&program);
    let (size, content) = File::open(program).and_then(loaded).context("read this program")?;
    let mut layer = Layer::new()?;
    layer.stream("seawall", 0o755, size, content)?;
    layer.libraries(program)?;
    let config = ImageConfig { entrypoint: vec!["/seawall".into()], ..Default::default() };
    Ok(Archive::new(name).layer(layer)?.config(config))
}

/// The part of a program that the kernel loads, and how many bytes that are: what follows (symbols, and what debuggers want) can
/// be most of it.
fn loaded(program: File) -> io::Result<(u64, impl Read)> {
    let length = program.metadata()?.len();
    let mut head = Vec::new();
    // The table of segments is at the beginning.
    (&program).take(HEAD).read_to_end(&mut head)?;
    let end = match end_of_segments(&head, length) {
        Some(end) if end < length => {
            // There is no table of sections any more: where it was, how many there were, and where their names were.
            for place in [40..48, 60..62, 62..64] {
                head[place].fill(0);
            }
            end
        }
        _ => length,
    };
    Ok((end, io::Cursor::new(head).chain(program).take(end)))
}

/// Where the last segment of a 64-bit little-endian ELF file of `length` bytes ends, by its beginning; `None` if it is none.
fn end_of_segments(head: &[u8], length: u64) -> Option<u64> {
    let number = |at: u64, size: u64| -> Option<u64> {
        let range = usize::try_from(at).ok()?..usize::try_from(at.checked_add(size)?).ok()?;
        Some(head.get(range)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    };
    if head.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let mut end = table.checked_add(size.checked_mul(count)?)?.max(64);
    for index in 0..count {
        let at = table.checked_add(index.checked_mul(size)?)?;
        end = end.max(number(at.checked_add(8)?, 8)?.checked_add(number(at.checked_add(32)?, 8)?)?);
    }
    (end <= length).then_some(end)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Seek as _, Write as _},
        os::unix::fs::PermissionsExt as _,
    };

    use super::*;

    #[test]
    fn a_program_runs_without_what_is_not_loaded() {
        let whole = File::open("/proc/self/exe").unwrap();
        let length = whole.metadata().unwrap().len();
        let (size, mut content) = loaded(whole).unwrap();
        assert!(size < length, "{size} of {length} bytes");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cut");
        assert_eq!(io::copy(&mut content, &mut File::create(&path).unwrap()).unwrap(), size);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let output = std::process::Command::new(&path).arg("--list").output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("a_program_runs_without"), "{output:?}");
    }

    #[test]
    fn what_is_no_program_stays() {
        for bytes in
            [&b""[..], b"#!/bin/sh\n", b"\x7fELF\x02\x01", &[b"\x7fELF\x02\x01".as_slice(), &[0xff; 90]].concat()]
        {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            file.rewind().unwrap();
            let (size, mut content) = loaded(file).unwrap();
            let mut read = Vec::new();
            content.read_to_end(&mut read).unwrap();
            assert_eq!((size, &*read), (bytes.len() as u64, bytes));
        }
    }

    #[test]
    fn a_name() {
        assert_eq!(name("v1.37.0+seawall0.1.0"), "seawall.local/seawall:v1.37.0-seawall0.1.0");
    }
}
