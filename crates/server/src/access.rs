//! What whoever runs the server says of access to it, beyond what is in the cluster itself.

use std::sync::Arc;

use crate::audit::Auditor;

/// What was read from flags and files at start. By default, nothing.
#[derive(Clone, Default)]
pub struct Access {
    /// Who writes down what happens.
    pub audit: Option<Arc<Auditor>>,
}
