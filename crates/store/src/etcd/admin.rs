//! The administration of etcd: members, alarms, maintenance.

use std::sync::Arc;

use super::pool::Pool;

/// The administration of one etcd.
#[derive(Clone)]
pub struct Admin {
    #[allow(dead_code, reason = "grows in the next change")]
    pool: Arc<Pool>,
}

impl Admin {
    pub(super) fn new(pool: Arc<Pool>) -> Admin {
        Admin { pool }
    }
}
