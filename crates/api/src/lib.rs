//! Every Kubernetes resource as a row: schema, defaults, validation, columns, patch keys. No I/O.

pub mod cel;
pub mod cell;
pub mod certificate_request;
pub mod cron;
pub mod custom;
pub mod field;
pub mod limit_range;
pub mod managed;
pub mod names;
pub mod node_selector;
pub mod patch;
pub mod pod_security;
pub mod proto;
pub mod quantity;
pub mod quota;
pub mod ranges;
pub mod resources;
pub mod row;
pub mod schema;
pub mod selector;
pub mod semver;

pub use row::{Row, Scope, Subresource};
