//! Compiles the sandbox's pause program, so that a node needs no registry for it: a static binary, embedded into the
//! agent and imported into containerd as an image of its own.

use std::{env, path::PathBuf, process::Command};

fn main() {
    println!("cargo:rerun-if-changed=pause/pause.rs");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("pause");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command.arg("--edition=2024").arg("--crate-name=pause");
    if let Ok(target) = env::var("TARGET") {
        command.arg("--target").arg(target);
    }
    for option in ["target-feature=+crt-static", "panic=abort", "opt-level=s", "strip=symbols"] {
        command.arg("-C").arg(option);
    }
    let status = command.arg("-o").arg(&out).arg("pause/pause.rs").status().expect("rustc starts");
    assert!(
        status.success(),
        "pause/pause.rs does not compile statically (is the C library's static archive installed?)"
    );
}
