//! How the binary is linked.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // A program that can be loaded anywhere has a list of all its addresses, which is read at start and stays in memory. As a
    // bitmap (DT_RELR) it is hardly there; the C library reads that since 2.36.
    if libc().is_some_and(|version| version >= (2, 36)) {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    // The same code made for several types is kept once. Only LLD can do that, which is Rust's linker on this target.
    if is("PROFILE", "release") && is("CARGO_CFG_TARGET_ARCH", "x86_64") && is("CARGO_CFG_TARGET_ENV", "gnu") {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    }
}

fn is(variable: &str, value: &str) -> bool {
    std::env::var(variable).is_ok_and(|found| found == value)
}

/// The version of the C library, if it is GNU's.
fn libc() -> Option<(u32, u32)> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
