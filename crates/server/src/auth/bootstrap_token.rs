//! Bootstrap tokens: what a machine proves that it may join, before it has a certificate
//! (<https://kubernetes.io/docs/reference/access-authn-authz/bootstrap-tokens/>).
//!
//! A token is a Secret in `kube-system`. It is looked up in the snapshot cache, so that machines can still say who they
//! are when there is no quorum.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use rand::Rng;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;

use super::UserInfo;

/// The namespace of the Secrets.
pub const NAMESPACE: &str = "kube-system";
/// Their type.
pub const TYPE: &str = "bootstrap.kubernetes.io/token";
/// What their names start with; the token's id follows.
pub const NAME_PREFIX: &str = "bootstrap-token-";
/// The group of everyone who has a token; further groups start with it and a colon.
pub const GROUP: &str = "system:bootstrappers";
/// The group of machines that join as servers.
pub const GROUP_SERVERS: &str = "system:bootstrappers:seawall:server";
/// The group of machines that join as agents.
pub const GROUP_AGENTS: &str = "system:bootstrappers:seawall:agent";

const ID: usize = 6;
const SECRET: usize = 16;

/// A token: a public part that names it, and a secret one that proves it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
}

/// A text that is not a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a bootstrap token: expected six lower-case letters or digits, a dot, and sixteen more of them")]
pub struct NotAToken;

/// Why a Secret does not vouch for a token. For the log and for tests: whoever shows the token only hears that it is
/// not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The Secret is on its way out.
    #[error("the Secret is being deleted")]
    Deleted,
    /// The Secret is something else.
    #[error("the Secret is not of type {TYPE}")]
    Type,
    /// The secret part is another.
    #[error("token-secret does not match")]
    Secret,
    /// The Secret is that of another token.
    #[error("token-id does not match")]
    Id,
    /// Its time is over, or cannot be read.
    #[error("the token expired at {0:?}")]
    Expired(String),
    /// It is not meant for this.
    #[error("usage-bootstrap-authentication is not \"true\"")]
    Usage,
    /// It claims groups that a token cannot give.
    #[error(
        "auth-extra-groups: {0:?} does not start with {GROUP}: or has other than lower-case letters, digits, colons and dashes"
    )]
    Group(String),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.****", self.id)
    }
}

/// With the secret part: for the one who is to have it.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.id, self.secret)
    }
}

impl FromStr for Token {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Token, NotAToken> {
        let plain = |part: &str, length: usize| {
            part.len() == length && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        match text.split_once('.') {
            Some((id, secret)) if plain(id, ID) && plain(secret, SECRET) => {
                Ok(Token { id: id.to_owned(), secret: secret.to_owned() })
            }
            _ => Err(NotAToken),
        }
    }
}

impl Token {
    /// A new one.
    pub fn generate() -> Token {
        const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        // `rand::rng` is a cryptographically secure generator, seeded by the operating system.
        let mut random = rand::rng();
        let mut text = |length: usize| -> String {
            (0..length).map(|_| ALPHABET[random.random_range(0..ALPHABET.len())] as char).collect()
        };
        Token { id: text(ID), secret: text(SECRET) }
    }

    /// The public part.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The name of its Secret.
    pub fn name(&self) -> String {
        format!("{NAME_PREFIX}{}", self.id)
    }

    /// The Secret that makes it valid until `expiration` (for good, if there is none), with these groups beside
    /// [`GROUP`].
    pub fn manifest(&self, groups: &[&str], expiration: Option<Timestamp>, description: &str) -> Value {
        let mut data = json!({
            "token-id": self.id, "token-secret": self.secret, "usage-bootstrap-authentication": "true",
        });
        if !groups.is_empty() {
            data["auth-extra-groups"] = groups.join(",").into();
        }
        if let Some(at) = expiration {
            data["expiration"] = at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
        }
        if !description.is_empty() {
            data["description"] = description.into();
        }
        json!({"apiVersion": "v1", "kind": "Secret", "type": TYPE,
            "metadata": {"name": self.name(), "namespace": NAMESPACE}, "stringData": data})
    }

    /// The user that a Secret makes of the one who shows this token.
    pub fn user(&self, secret: &Value, now: Timestamp) -> Result<UserInfo, Refusal> {
        if secret["metadata"]["deletionTimestamp"].is_string() {
            return Err(Refusal::Deleted);
        }
        if secret["type"] != TYPE {
            return Err(Refusal::Type);
        }
        let field = |key: &str| {
            let text = secret["data"][key].as_str().unwrap_or_default();
            STANDARD.decode(text).ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default()
        };
        // How long this takes must not say how much of a guess was right.
        if !bool::from(field("token-secret").as_bytes().ct_eq(self.secret.as_bytes())) {
            return Err(Refusal::Secret);
        }
        if field("token-id") != self.id {
            return Err(Refusal::Id);
        }
        if has_expired(&field("expiration"), now) {
            return Err(Refusal::Expired(field("expiration")));
        }
        if field("usage-bootstrap-authentication") != "true" {
            return Err(Refusal::Usage);
        }
        let extra = field("auth-extra-groups");
        let mut groups = vec![GROUP];
        for group in extra.split(',').filter(|g| !g.is_empty()) {
            if !is_extra_group(group) {
                return Err(Refusal::Group(group.to_owned()));
            }
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
        Ok(UserInfo::new(format!("system:bootstrap:{}", self.id), &groups))
    }
}

/// Whether the time in a Secret has come. One that cannot be read has: better no token than one without an end.
fn has_expired(text: &str, now: Timestamp) -> bool {
    !text.is_empty() && text.parse::<Timestamp>().map_or(true, |end| end <= now)
}

/// Groups that a token may give all start alike, so that none of them can be one of the cluster's own.
fn is_extra_group(group: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    group.strip_prefix(GROUP).and_then(|rest| rest.strip_prefix(':')).is_some_and(|rest| {
        rest.len() <= 256
            && rest.bytes().all(|b| plain(b) || b == b':' || b == b'-')
            && rest.bytes().next_back().is_some_and(plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-03-01T12:00:00Z";

    /// A Secret as the API stores it.
    fn stored(change: impl FnOnce(&mut Value)) -> Value {
        let token: Token = "abcdef.0123456789abcdef".parse().unwrap();
        let mut data =
            token.manifest(&[GROUP_SERVERS], Some("2026-03-01T12:00:01Z".parse().unwrap()), "a test")["stringData"]
                .take();
        change(&mut data);
        let data: serde_json::Map<String, Value> = data
            .as_object()
            .unwrap()
            .iter()
            .map(|(k, v)| (k.clone(), STANDARD.encode(v.as_str().unwrap()).into()))
            .collect();
        json!({"metadata": {"name": token.name()}, "type": TYPE, "data": data})
    }

    #[test]
    fn what_a_token_looks_like() {
        for bad in [
            "",
            "abcdef",
            "abcdef.",
            "abcdef.0123456789abcde",
            "abcdef.0123456789abcdefg",
            "abcdeF.0123456789abcdef",
            "abcdef.0123456789abcde-",
            "abcdef.0123456789abcdef.x",
            " abcdef.0123456789abcdef",
        ] {
            assert_eq!(bad.parse::<Token>(), Err(NotAToken), "{bad:?}");
        }
        let token = Token::generate();
        assert_eq!(token.to_string().parse::<Token>(), Ok(token.clone()));
        assert_ne!(token, Token::generate());
        assert_eq!(format!("{token:?}"), format!("{}.****", token.id()));
    }

    #[test]
    fn who_a_token_is() {
        let token: Token = "abcdef.0123456789abcdef".parse().unwrap();
        let now = NOW.parse().unwrap();
        let user = token.user(&stored(|_| {}), now).unwrap();
        assert_eq!(user.username, "system:bootstrap:abcdef");
        assert_eq!(user.groups, [GROUP, GROUP_SERVERS, "system:authenticated"]);
        let plain = token.user(&stored(|d| drop(d.as_object_mut().unwrap().remove("auth-extra-groups"))), now).unwrap();
        assert_eq!(plain.groups, [GROUP, "system:authenticated"]);
        // Without an end.
        assert!(token.user(&stored(|d| d["expiration"] = "".into()), now).is_ok());
    }

    #[test]
    fn who_it_is_not() {
        let token: Token = "abcdef.0123456789abcdef".parse().unwrap();
        let check = |secret: &Value, expect: Refusal| {
            assert_eq!(token.user(secret, NOW.parse().unwrap()), Err(expect.clone()), "{secret}");
            assert!(!expect.to_string().is_empty());
        };
        let mut deleted = stored(|_| {});
        deleted["metadata"]["deletionTimestamp"] = NOW.into();
        check(&deleted, Refusal::Deleted);
        let mut opaque = stored(|_| {});
        opaque["type"] = "Opaque".into();
        check(&opaque, Refusal::Type);
        check(&json!({"type": TYPE}), Refusal::Secret);
        check(&stored(|d| d["token-secret"] = "0123456789abcdeX".into()), Refusal::Secret);
        check(&stored(|d| d["token-secret"] = "0123456789abcdef0".into()), Refusal::Secret);
        check(&stored(|d| d["token-id"] = "ghijkl".into()), Refusal::Id);
        check(&stored(|d| d["expiration"] = NOW.into()), Refusal::Expired(NOW.into()));
        check(&stored(|d| d["expiration"] = "soon".into()), Refusal::Expired("soon".into()));
        check(&stored(|d| d["usage-bootstrap-authentication"] = "yes".into()), Refusal::Usage);
        for group in [
            "system:masters",
            "system:bootstrappers",
            "system:bootstrappers:",
            "system:bootstrappers:A",
            "system:bootstrappers:a-",
        ] {
            let groups = format!("{GROUP_AGENTS},{group}");
            check(&stored(|d| d["auth-extra-groups"] = groups.into()), Refusal::Group(group.into()));
        }
    }
}
