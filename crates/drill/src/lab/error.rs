//! What can go wrong with a lab, in words for whoever typed the command.

use std::{fmt, io, path::PathBuf, time::Duration};

/// An error of a lab. It names the lab or the machine, and the step that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host lacks something.
    #[error("this host cannot run a lab:{}", Lines(.0))]
    Unmet(Vec<String>),
    /// A value that was asked for makes no sense.
    #[error("{what}: {why}")]
    Invalid {
        /// The option and its value.
        what: String,
        /// What is wrong with it, and the way out.
        why: String,
    },
    /// There is no such lab.
    #[error("there is no lab {lab:?} in {}{}; make it with: seawall lab up --name {lab}", dir.display(), Known("labs there: ", .known))]
    NoLab {
        /// The name that was asked for.
        lab: String,
        /// Where labs are kept.
        dir: PathBuf,
        /// The labs that exist.
        known: Vec<String>,
    },
    /// The lab was not finished, or only parts of it are left.
    #[error(
        "lab {lab} was not finished: `seawall lab up --name {lab}` starts over, `seawall lab down --name {lab}` takes it away"
    )]
    Unfinished {
        /// The lab.
        lab: String,
    },
    /// The lab is there already.
    #[error(
        "lab {lab} is up already: see `seawall lab status --name {lab}`, or take it away first: seawall lab down --name {lab}"
    )]
    Exists {
        /// The lab.
        lab: String,
    },
    /// The lab has no such machine.
    #[error("lab {lab} has no machine {machine:?}{}", Known("it has ", .known))]
    NoMachine {
        /// The lab.
        lab: String,
        /// The name that was asked for.
        machine: String,
        /// The machines that it has.
        known: Vec<String>,
    },
    /// The machine is not in the state that this needs.
    #[error("machine {machine} is {state}: {hint}")]
    State {
        /// The machine.
        machine: String,
        /// The state it is in.
        state: &'static str,
        /// What to do.
        hint: String,
    },
    /// Another command works on the lab.
    #[error("lab {lab} is in use by process {holder}, for {} s now: wait for it, or end it", waited.as_secs())]
    Busy {
        /// The lab.
        lab: String,
        /// The process that holds the lock.
        holder: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A step on a machine failed.
    #[error("machine {machine}: {step}: {source}")]
    Machine {
        /// The machine.
        machine: String,
        /// What was being done.
        step: String,
        /// Why it failed.
        source: Cause,
    },
    /// A step that concerns the whole lab failed.
    #[error("lab {lab}: {step}: {source}")]
    Lab {
        /// The lab.
        lab: String,
        /// What was being done.
        step: String,
        /// Why it failed.
        source: Cause,
    },
}

/// The reason under an [`Error`].
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The kernel refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{program}` failed: {said}")]
    Program {
        /// The program and its arguments.
        program: String,
        /// Its last words.
        said: String,
    },
    /// Something did not happen in time.
    #[error("not within {} s: {what}", limit.as_secs_f64())]
    Late {
        /// What was waited for.
        what: String,
        /// For how long.
        limit: Duration,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

/// A result with the reason alone; the caller knows whose step it was.
pub type Step<T = ()> = Result<T, Cause>;
/// A result of the lab.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Cause {
    /// Wraps what the kernel said.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Cause {
        let what = what.into();
        move |source| Cause::Io { what, source }
    }

    /// Wraps an errno.
    pub fn errno(what: impl Into<String>) -> impl FnOnce(nix::errno::Errno) -> Cause {
        let what = what.into();
        move |errno| Cause::Io { what, source: errno.into() }
    }
}

/// Adds whose step it was.
pub trait Of<T> {
    /// A step of a machine.
    fn of(self, machine: &str, step: impl Into<String>) -> Result<T>;
    /// A step of a lab.
    fn of_lab(self, lab: &str, step: impl Into<String>) -> Result<T>;
}

impl<T> Of<T> for Step<T> {
    fn of(self, machine: &str, step: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Machine { machine: machine.into(), step: step.into(), source })
    }

    fn of_lab(self, lab: &str, step: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Lab { lab: lab.into(), step: step.into(), source })
    }
}

struct Lines<'a>(&'a [String]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| write!(f, "\n  - {line}"))
    }
}

struct Known<'a>(&'static str, &'a [String]);

impl fmt::Display for Known<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.1.is_empty() { Ok(()) } else { write!(f, " ({}{})", self.0, self.1.join(", ")) }
    }
}
