//! Who asks, and whether they may.

pub mod authorize;
pub(crate) mod bearer;
pub mod bootstrap_token;
mod impersonate;
pub mod legacy_token;
pub mod node;
pub mod oidc;
pub mod rbac;
pub mod remote;
pub mod token;

pub(crate) use impersonate::impersonate;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Full power over the cluster.
pub const MASTERS: &str = "system:masters";
/// Everyone who proved who they are.
pub const AUTHENTICATED: &str = "system:authenticated";
/// Everyone who did not.
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
/// Node agents.
pub const NODES: &str = "system:nodes";

/// Who sends a request (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/>).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserInfo {
    /// The name.
    pub username: String,
    /// The identity behind the name, of service accounts.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The groups.
    #[serde(default)]
    pub groups: Vec<String>,
    /// More about how the user proved who they are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    /// A user in these groups and in `system:authenticated`.
    pub fn new(name: impl Into<String>, groups: &[&str]) -> UserInfo {
        let mut groups: Vec<String> = groups.iter().map(|g| (*g).to_owned()).collect();
        if !groups.iter().any(|g| g == AUTHENTICATED) {
            groups.push(AUTHENTICATED.into());
        }
        UserInfo { username: name.into(), groups, ..Default::default() }
    }

    /// Nobody in particular.
    pub fn anonymous() -> UserInfo {
        UserInfo { username: "system:anonymous".into(), groups: vec![UNAUTHENTICATED.into()], ..Default::default() }
    }

    /// Whether the user is in a group.
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// The user that a client certificate names: its common name, and a group for each organization.
    pub fn from_certificate(der: &[u8]) -> Option<UserInfo> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let groups: Vec<&str> = subject.iter_organization().filter_map(|o| o.as_str().ok()).collect();
        Some(UserInfo::new(name, &groups))
    }
}
