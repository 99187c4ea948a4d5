//! Who may come in and what they may do, through the whole pipeline.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod audit;
mod certificates;
mod harness;
mod nodes;
mod oidc;
mod remote;
#[path = "../common/site.rs"]
mod site;
mod tls;
mod tokens;
