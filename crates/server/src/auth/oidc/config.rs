//! `AuthenticationConfiguration`: which issuers of tokens are believed, and what their claims mean
//! (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/#using-authentication-configuration>).

use serde::Deserialize;

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthenticationConfiguration {
    /// `apiserver.config.k8s.io/v1`.
    pub api_version: String,
    /// `AuthenticationConfiguration`.
    pub kind: String,
    /// Issuers of JSON Web Tokens.
    #[serde(default)]
    pub jwt: Vec<JwtAuthenticator>,
    /// Who need not say who they are.
    #[serde(default)]
    pub anonymous: Option<AnonymousText>,
}

/// An issuer, and how a user is made of its tokens.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JwtAuthenticator {
    /// The issuer.
    pub issuer: IssuerText,
    /// What claims have to be.
    #[serde(default)]
    pub claim_validation_rules: Vec<ClaimRule>,
    /// What claims become.
    #[serde(default)]
    pub claim_mappings: Mappings,
    /// What the user has to be.
    #[serde(default)]
    pub user_validation_rules: Vec<UserRule>,
}

/// Where an issuer is, and for whom its tokens have to be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IssuerText {
    /// The `iss` of its tokens.
    #[serde(default)]
    pub url: String,
    /// Where its discovery document is, if that is not below `url`.
    #[serde(rename = "discoveryURL", default)]
    pub discovery_url: String,
    /// Who signs its certificate, in PEM; else those whom the system trusts.
    #[serde(default)]
    pub certificate_authority: String,
    /// One of these has to be in the token's `aud`.
    #[serde(default)]
    pub audiences: Vec<String>,
    /// `MatchAny`, if there are several audiences.
    #[serde(default)]
    pub audience_match_policy: String,
    /// Only what means the network of the control plane is understood.
    #[serde(default)]
    pub egress_selector_type: String,
}

/// A condition on claims.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClaimRule {
    /// A claim by name…
    #[serde(default)]
    pub claim: String,
    /// …and the value that it must have.
    #[serde(default)]
    pub required_value: String,
    /// Or an expression over `claims`.
    #[serde(default)]
    pub expression: String,
    /// What is said if it does not hold.
    #[serde(default)]
    pub message: String,
}

/// A condition on the user.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UserRule {
    /// An expression over `user`.
    #[serde(default)]
    pub expression: String,
    /// What is said if it does not hold.
    #[serde(default)]
    pub message: String,
}

/// Of which claims a user is made.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mappings {
    /// The name.
    #[serde(default)]
    pub username: Mapping,
    /// The groups.
    #[serde(default)]
    pub groups: Mapping,
    /// The uid.
    #[serde(default)]
    pub uid: Mapping,
    /// More.
    #[serde(default)]
    pub extra: Vec<Extra>,
}

/// A claim, with something before it; or an expression.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mapping {
    /// The claim.
    #[serde(default)]
    pub claim: String,
    /// What is put before its value.
    #[serde(default)]
    pub prefix: Option<String>,
    /// An expression over `claims`.
    #[serde(default)]
    pub expression: String,
}

/// Something more about a user.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Extra {
    /// Its name, with a domain before it.
    #[serde(default)]
    pub key: String,
    /// An expression over `claims`.
    #[serde(default)]
    pub value_expression: String,
}

/// Whether requests may be anonymous.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AnonymousText {
    /// Whether they may.
    pub enabled: bool,
    /// On these paths alone.
    #[serde(default)]
    pub conditions: Vec<AnonymousCondition>,
}

/// A path that anonymous requests may ask for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AnonymousCondition {
    /// The path.
    pub path: String,
}

/// A field that cannot be as it is.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not of its form.
    #[error(transparent)]
    Form(#[from] serde_yaml_ng::Error),
    /// A field has a value that it cannot have.
    #[error("{field}: {value:?}: {why}")]
    Field {
        /// The field.
        field: String,
        /// What stands there.
        value: String,
        /// What is wrong with it.
        why: String,
    },
}

/// A [`ConfigError`] about one field.
pub(crate) fn wrong(field: impl Into<String>, value: impl Into<String>, why: impl Into<String>) -> ConfigError {
    ConfigError::Field { field: field.into(), value: value.into(), why: why.into() }
}

impl AuthenticationConfiguration {
    /// Reads a file, in YAML or JSON.
    ///
    /// # Errors
    /// If it is not of the form that it should have.
    pub fn parse(text: &str) -> Result<AuthenticationConfiguration, ConfigError> {
        let found: AuthenticationConfiguration = serde_yaml_ng::from_str(text)?;
        match (&*found.api_version, &*found.kind) {
            ("apiserver.config.k8s.io/v1", "AuthenticationConfiguration") => Ok(found),
            (version, kind) => Err(wrong(
                "apiVersion and kind",
                format!("{version}, {kind}"),
                "write apiserver.config.k8s.io/v1 and AuthenticationConfiguration",
            )),
        }
    }
}
