//! The process of a pod's sandbox: it holds the pod's namespaces, reaps what is reparented to it when the pod shares
//! one process namespace, and leaves on SIGTERM or SIGINT.
//!
//! The signals are blocked and taken with `sigwait`: the kernel ignores a signal that PID 1 has no handler for, but
//! never a blocked one.

use std::process::exit;

/// At least as large and as aligned as the C library's `sigset_t` (128 bytes on Linux).
#[repr(C)]
struct SignalSet([u64; 16]);

unsafe extern "C" {
    fn sigemptyset(set: *mut SignalSet) -> i32;
    fn sigaddset(set: *mut SignalSet, signal: i32) -> i32;
    fn sigprocmask(how: i32, set: *const SignalSet, old: *mut SignalSet) -> i32;
    fn sigwait(set: *const SignalSet, signal: *mut i32) -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
}

const SIG_BLOCK: i32 = 0;
const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
const SIGCHLD: i32 = 17;
const WNOHANG: i32 = 1;

fn main() {
    let mut set = SignalSet([0; 16]);
    // SAFETY: `set` is a valid signal set's worth of memory, and nothing else runs in this process.
    unsafe {
        sigemptyset(&mut set);
        for signal in [SIGINT, SIGTERM, SIGCHLD] {
            sigaddset(&mut set, signal);
        }
        if sigprocmask(SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            exit(1);
        }
    }
    loop {
        let mut signal = 0;
        // SAFETY: both pointers are to live locals.
        if unsafe { sigwait(&set, &mut signal) } != 0 {
            continue;
        }
        match signal {
            SIGINT | SIGTERM => exit(0),
            // SAFETY: a null status is allowed.
            SIGCHLD => while unsafe { waitpid(-1, std::ptr::null_mut(), WNOHANG) } > 0 {},
            _ => {}
        }
    }
}
