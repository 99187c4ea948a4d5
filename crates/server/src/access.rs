//! What whoever runs the server says of access to it, beyond what is in the cluster itself.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::{
    audit::Auditor,
    auth::{
        oidc::{
            Issuers,
            config::{AnonymousText, AuthenticationConfiguration, ConfigError, wrong},
        },
        remote::{AccessWebhook, TokenWebhook},
    },
};

/// What was read from flags and files at start. By default, nothing.
#[derive(Clone, Default)]
pub struct Access {
    /// Who writes down what happens.
    pub audit: Option<Arc<Auditor>>,
    /// Who may come in; it can be exchanged at any time.
    pub authentication: Arc<ArcSwap<Authentication>>,
    /// Who is asked about tokens that nobody else knows.
    pub tokens: Option<Arc<TokenWebhook>>,
    /// Who is asked what users may, beside roles.
    pub authorizer: Option<Arc<AccessWebhook>>,
}

/// Who may come in, beside those whom the cluster itself knows
/// (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/#using-authentication-configuration>).
#[derive(Default)]
pub struct Authentication {
    /// The issuers of tokens that are believed.
    pub issuers: Issuers,
    /// What those may ask for who do not say who they are.
    pub anonymous: Anonymous,
}

/// What may be asked for without saying who one is. Whether it is answered is another question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Anonymous {
    /// Everything.
    #[default]
    Everywhere,
    /// These paths, and none if there are none.
    On(Vec<String>),
}

impl Anonymous {
    /// Whether this path may be asked for.
    pub fn allows(&self, path: &str) -> bool {
        match self {
            Anonymous::Everywhere => true,
            Anonymous::On(paths) => paths.iter().any(|allowed| allowed == path),
        }
    }

    fn read(text: &AnonymousText) -> Result<Anonymous, ConfigError> {
        for (index, condition) in text.conditions.iter().enumerate() {
            let field = format!("anonymous.conditions[{index}].path");
            if !condition.path.starts_with('/') {
                return Err(wrong(field, &condition.path, "must begin with a slash"));
            }
            if !text.enabled {
                return Err(wrong(field, &condition.path, "enabled should be set to true when conditions are defined"));
            }
        }
        Ok(match text.enabled && text.conditions.is_empty() {
            true => Anonymous::Everywhere,
            false => Anonymous::On(text.conditions.iter().map(|condition| condition.path.clone()).collect()),
        })
    }
}

impl Authentication {
    /// Makes ready what a configuration says. `own` is the issuer of service accounts; tokens of others are believed if
    /// they are signed by one of `algorithms`.
    ///
    /// # Errors
    /// The field that cannot be as it is.
    pub fn new(
        configuration: &AuthenticationConfiguration,
        algorithms: &[String],
        own: &str,
    ) -> Result<Authentication, ConfigError> {
        let anonymous = configuration.anonymous.as_ref().map(Anonymous::read).transpose()?.unwrap_or_default();
        Ok(Authentication { issuers: Issuers::new(configuration, algorithms, own)?, anonymous })
    }
}
