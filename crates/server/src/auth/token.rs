//! Tokens of service accounts
//! (<https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#bound-service-account-tokens>).

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, errors::ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use x509_parser::{prelude::FromDer, x509::SubjectPublicKeyInfo};

use super::{UserInfo, legacy_token};

/// The claims of a token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Claims {
    /// The issuer.
    pub iss: String,
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub sub: String,
    /// Whom it is for.
    pub aud: Vec<String>,
    /// When it ends, in seconds since 1970.
    pub exp: i64,
    /// When it was made.
    pub iat: i64,
    /// When it begins to be valid.
    pub nbf: i64,
    /// The number of this token.
    pub jti: String,
    /// The objects it is bound to.
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: Bound,
}

/// The objects that a token is bound to: when one of them is gone, so is the token.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Bound {
    /// The namespace of all of them.
    pub namespace: String,
    /// The service account.
    pub serviceaccount: Reference,
    /// The pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Reference>,
    /// The node that the pod runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Reference>,
    /// The secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Reference>,
}

/// An object by name and identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// The name.
    pub name: String,
    /// The uid.
    pub uid: String,
}

/// Signs and verifies tokens with the cluster's key.
pub struct Tokens {
    issuer: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
    /// The public key as others check tokens by (RFC 7517).
    jwk: Value,
}

/// A key that is not an EC P-256 key in PEM, or a token that does not verify.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct TokenError {
    what: &'static str,
    #[source]
    source: jsonwebtoken::errors::Error,
}

impl Tokens {
    /// Reads the key pair.
    pub fn new(issuer: &str, private_pem: &str, public_pem: &str) -> Result<Tokens, TokenError> {
        let bad = |source| TokenError { what: "the service account key is not an EC P-256 key in PEM", source };
        let jwk = jwk(public_pem).ok_or_else(|| bad(ErrorKind::InvalidEcdsaKey.into()))?;
        Ok(Tokens {
            jwk,
            issuer: issuer.to_owned(),
            encoding: EncodingKey::from_ec_pem(private_pem.as_bytes()).map_err(bad)?,
            decoding: DecodingKey::from_ec_pem(public_pem.as_bytes()).map_err(bad)?,
        })
    }

    /// The issuer, which is also the audience that the API itself asks for.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The keys by which others check tokens.
    pub fn jwks(&self) -> Value {
        json!({"keys": [self.jwk]})
    }

    /// Makes a token.
    pub fn sign(&self, claims: &Claims) -> Result<String, TokenError> {
        self.sign_claims(claims)
    }

    /// Makes a token that has no end.
    pub fn sign_legacy(&self, claims: &legacy_token::LegacyClaims) -> Result<String, TokenError> {
        self.sign_claims(claims)
    }

    fn sign_claims(&self, claims: &impl Serialize) -> Result<String, TokenError> {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = self.jwk["kid"].as_str().map(str::to_owned);
        jsonwebtoken::encode(&header, claims, &self.encoding)
            .map_err(|source| TokenError { what: "the token cannot be signed", source })
    }

    /// Verifies signature and issuer of a token that has no end. Whether it still holds is for the caller.
    pub fn verify_legacy(&self, token: &str) -> Result<legacy_token::LegacyClaims, TokenError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[legacy_token::ISSUER]);
        validation.set_required_spec_claims(&["iss", "sub"]);
        validation.validate_exp = false;
        validation.validate_aud = false;
        jsonwebtoken::decode(token, &self.decoding, &validation)
            .map(|data| data.claims)
            .map_err(|source| TokenError { what: "the token is not valid", source })
    }

    /// Verifies signature, issuer, time and audience. Whether the bound objects are still there is for the caller.
    pub fn verify(&self, token: &str, audiences: &[&str]) -> Result<Claims, TokenError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(audiences);
        validation.validate_nbf = true;
        validation.leeway = 10;
        jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation)
            .map(|data| data.claims)
            .map_err(|source| TokenError { what: "the token is not valid", source })
    }
}

/// An EC P-256 key in PEM as a JSON Web Key. Its id is the hash of the key in DER, as upstream's.
fn jwk(public_pem: &str) -> Option<Value> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(public_pem.as_bytes()).ok()?;
    let (_, key) = SubjectPublicKeyInfo::from_der(&pem.contents).ok()?;
    // An uncompressed point: 4, then the two coordinates.
    let [4, point @ ..] = &*key.subject_public_key.data else { return None };
    let (x, y) = point.split_at_checked(32).filter(|(_, y)| y.len() == 32)?;
    let id = ring::digest::digest(&ring::digest::SHA256, &pem.contents);
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    Some(
        json!({"use": "sig", "kty": "EC", "kid": text(id.as_ref()), "crv": "P-256", "alg": "ES256", "x": text(x), "y": text(y)}),
    )
}

impl Claims {
    /// The user that the token speaks for.
    pub fn user(&self) -> UserInfo {
        let bound = &self.kubernetes;
        let (namespace, account) = (&bound.namespace, &bound.serviceaccount);
        let mut user = UserInfo::new(
            format!("system:serviceaccount:{namespace}:{}", account.name),
            &["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")],
        );
        user.uid = account.uid.clone();
        let prefix = "authentication.kubernetes.io";
        user.extra.insert(format!("{prefix}/credential-id"), vec![format!("JTI={}", self.jti)]);
        for (kind, reference) in [("pod", &bound.pod), ("node", &bound.node)] {
            if let Some(reference) = reference {
                user.extra.insert(format!("{prefix}/{kind}-name"), vec![reference.name.clone()]);
                user.extra.insert(format!("{prefix}/{kind}-uid"), vec![reference.uid.clone()]);
            }
        }
        user
    }
}
