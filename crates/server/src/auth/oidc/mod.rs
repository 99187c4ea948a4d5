//! Users of other issuers: OpenID Connect, and any issuer of JSON Web Tokens
//! (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/#openid-connect-tokens>).

mod claims;
pub mod config;
mod keys;

use std::{collections::BTreeSet, str::FromStr, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, Validation};
use serde_json::Value;

use self::{
    claims::Claims,
    config::{AuthenticationConfiguration, ConfigError, IssuerText, JwtAuthenticator, wrong},
    keys::Keys,
};
use super::UserInfo;
use crate::outside::{Client, Credentials, check_url};

/// The algorithms that are believed if nothing else is said. Those in which both sides have the same key are none.
pub const ALGORITHMS: [&str; 8] = ["RS256", "RS384", "RS512", "ES256", "ES384", "PS256", "PS384", "PS512"];
/// By how much the clock of an issuer may be ahead, in seconds.
const LEEWAY: i64 = 60;
/// How many issuers there may be.
const MOST: usize = 64;

/// The issuers that are believed.
#[derive(Default)]
pub struct Issuers(Vec<Issuer>);

struct Issuer {
    url: String,
    audiences: Vec<String>,
    algorithms: Vec<Algorithm>,
    claims: Claims,
    keys: Arc<Keys>,
}

impl Issuers {
    /// Makes ready what a configuration says. `own` is the issuer of service accounts, whose tokens are not theirs.
    ///
    /// # Errors
    /// The field that cannot be as it is.
    pub fn new(
        configuration: &AuthenticationConfiguration,
        algorithms: &[String],
        own: &str,
    ) -> Result<Issuers, ConfigError> {
        let list = &configuration.jwt;
        if list.len() > MOST {
            return Err(wrong("jwt", list.len().to_string(), format!("must have at most {MOST} items")));
        }
        let (mut urls, mut discovered, mut issuers) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        for (index, jwt) in list.iter().enumerate() {
            let at = format!("jwt[{index}]");
            let issuer = &jwt.issuer;
            if !urls.insert(&issuer.url) {
                return Err(wrong(format!("{at}.issuer.url"), &issuer.url, "must not stand there twice"));
            }
            if !issuer.discovery_url.is_empty() && !discovered.insert(&issuer.discovery_url) {
                let why = "must not stand there twice";
                return Err(wrong(format!("{at}.issuer.discoveryURL"), &issuer.discovery_url, why));
            }
            issuers.push(Issuer::new(jwt, algorithms, own, &at)?);
        }
        Ok(Issuers(issuers))
    }

    /// The user of a token; `None` if it is no token of these issuers.
    pub async fn user(&self, token: &str, now: Timestamp) -> Option<Result<UserInfo, String>> {
        let url = unverified_issuer(token)?;
        let issuer = self.0.iter().find(|issuer| issuer.url == url)?;
        Some(issuer.user(token, now).await.map_err(|why| format!("oidc: {why}")))
    }
}

/// Who a token says has made it. That decides whom to ask, and nothing else.
fn unverified_issuer(token: &str) -> Option<String> {
    let mut parts = token.split('.');
    let (_, payload, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else { return None };
    let payload: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()?;
    payload["iss"].as_str().map(str::to_owned)
}

impl Issuer {
    fn new(jwt: &JwtAuthenticator, algorithms: &[String], own: &str, at: &str) -> Result<Issuer, ConfigError> {
        let issuer = &jwt.issuer;
        check(issuer, own, &format!("{at}.issuer"))?;
        let authorities = Some(issuer.certificate_authority.clone()).filter(|pem| !pem.is_empty());
        let client = Client::new(&Credentials { authorities, ..Default::default() }).and_then(|client| {
            let none = issuer.certificate_authority.is_empty() || issuer.certificate_authority.contains("BEGIN CERT");
            none.then_some(client).ok_or_else(|| "must be certificates in PEM".to_owned())
        });
        let client = client.map_err(|why| wrong(format!("{at}.issuer.certificateAuthority"), "", why))?;
        let known = |text: &String| ALGORITHMS.contains(&&**text).then(|| Algorithm::from_str(text).ok()).flatten();
        let algorithms = algorithms.iter().map(|text| {
            let why = format!("no such algorithm: write one of {}", ALGORITHMS.join(", "));
            known(text).ok_or_else(|| wrong("--oidc-signing-algs", text, why))
        });
        Ok(Issuer {
            url: issuer.url.clone(),
            audiences: issuer.audiences.clone(),
            algorithms: algorithms.collect::<Result<_, _>>()?,
            claims: Claims::new(jwt, at)?,
            keys: Arc::new(Keys::new(&issuer.url, &issuer.discovery_url, client)),
        })
    }

    async fn user(&self, token: &str, now: Timestamp) -> Result<UserInfo, String> {
        let header = jsonwebtoken::decode_header(token).map_err(|e| format!("malformed jwt: {e}"))?;
        if !self.algorithms.contains(&header.alg) {
            return Err(format!("id token signed with unsupported algorithm: {:?}", header.alg));
        }
        let mut validation = Validation::new(header.alg);
        // Time, audience and issuer are looked at below, with the time that is passed in.
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_aud = false;
        let verify = |key: &jsonwebtoken::DecodingKey| {
            let found = jsonwebtoken::decode::<Value>(token, key, &validation);
            found.map(|data| data.claims).map_err(|e| format!("failed to verify signature: {e}"))
        };
        let claims = self.keys.find(&header, verify).await?;
        self.check(&claims, now)?;
        self.claims.user(&claims)
    }

    /// Issuer, audience and time of a token that is signed.
    fn check(&self, claims: &Value, now: Timestamp) -> Result<(), String> {
        if claims["iss"] != *self.url {
            return Err(format!("id token issued by a different provider, expected {:?}", self.url));
        }
        let ours = |value: &Value| value.as_str().is_some_and(|text| self.audiences.iter().any(|own| own == text));
        let audience = &claims["aud"];
        if !ours(audience) && !audience.as_array().is_some_and(|list| list.iter().any(ours)) {
            return Err(format!("expected audience in {:?} got {audience}", self.audiences));
        }
        // Numbers may have a fraction (RFC 7519).
        let seconds = |key: &str| claims[key].as_f64();
        let now = now.as_second() as f64;
        match seconds("exp") {
            Some(end) if end > now => {}
            Some(_) => return Err("token is expired".to_owned()),
            None => return Err("token has no end (exp)".to_owned()),
        }
        match seconds("nbf") {
            Some(begin) if begin > now + LEEWAY as f64 => Err("token is not valid yet (nbf)".to_owned()),
            _ => Ok(()),
        }
    }
}

fn check(issuer: &IssuerText, own: &str, at: &str) -> Result<(), ConfigError> {
    let url = |field: &str, text: &str| {
        let field = format!("{at}.{field}");
        if text.is_empty() {
            return Err(wrong(field, text, "Required value: URL is required"));
        }
        let uri = check_url(text).map_err(|why| wrong(&*field, text, why))?;
        if uri.query().is_some() {
            return Err(wrong(field, text, "URL must not contain a query"));
        }
        match text.contains('#') {
            true => Err(wrong(field, text, "URL must not contain a fragment")),
            false => Ok(()),
        }
    };
    url("url", &issuer.url)?;
    if issuer.url == own {
        let why = "must not be the issuer of the cluster's service accounts";
        return Err(wrong(format!("{at}.url"), &issuer.url, why));
    }
    if !issuer.discovery_url.is_empty() {
        url("discoveryURL", &issuer.discovery_url)?;
        if issuer.discovery_url.trim_end_matches('/') == issuer.url.trim_end_matches('/') {
            let why = "must be different from the URL of the issuer";
            return Err(wrong(format!("{at}.discoveryURL"), &issuer.discovery_url, why));
        }
    }
    let audiences = format!("{at}.audiences");
    if issuer.audiences.is_empty() {
        return Err(wrong(audiences, "", "Required value: at least one audience is required"));
    }
    for (index, audience) in issuer.audiences.iter().enumerate() {
        if audience.is_empty() {
            return Err(wrong(format!("{audiences}[{index}]"), "", "Required value: an audience cannot be empty"));
        }
        if issuer.audiences[..index].contains(audience) {
            return Err(wrong(format!("{audiences}[{index}]"), audience, "must not stand there twice"));
        }
    }
    let policy = &*issuer.audience_match_policy;
    match (issuer.audiences.len(), policy) {
        (1, "" | "MatchAny") | (_, "MatchAny") => {}
        (1, _) => return Err(wrong(format!("{at}.audienceMatchPolicy"), policy, "must be MatchAny or left out")),
        _ => {
            let why = "must be MatchAny where there are several audiences";
            return Err(wrong(format!("{at}.audienceMatchPolicy"), policy, why));
        }
    }
    match &*issuer.egress_selector_type {
        "" | "controlplane" | "cluster" => Ok(()),
        other => Err(wrong(format!("{at}.egressSelectorType"), other, "must be controlplane or cluster")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "https://kubernetes.default.svc";

    fn made(issuers: &str) -> Result<Issuers, ConfigError> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let list = issuers.replace("MAP", "claimMappings: {username: {claim: sub, prefix: ''}}");
        let text =
            format!("{{apiVersion: apiserver.config.k8s.io/v1, kind: AuthenticationConfiguration, jwt: [{list}]}}");
        Issuers::new(&AuthenticationConfiguration::parse(&text)?, &["RS256".to_owned()], OWN)
    }

    #[test]
    fn what_is_wrong_with_issuers() {
        let check = |issuers: &str, expect: &str| {
            let error = made(issuers).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(expect) && error.is_empty() == expect.is_empty(), "{issuers}: {error}");
        };
        let of = |issuer: &str| format!("{{issuer: {{{issuer}}}, MAP}}");
        check(&of("url: 'https://a.example', audiences: [b]"), "");
        check(&of("url: 'https://a.example', audiences: [b, c], audienceMatchPolicy: MatchAny"), "");
        check(&of("audiences: [b]"), "jwt[0].issuer.url: \"\": Required value");
        check(
            &of("url: 'http://a.example', audiences: [b]"),
            "issuer.url: \"http://a.example\": URL scheme must be https",
        );
        check(&of("url: 'https://a.example?b', audiences: [b]"), "must not contain a query");
        check(&of("url: 'https://a.example#b', audiences: [b]"), "must not contain a fragment");
        check(&of("url: 'https://u@a.example', audiences: [b]"), "must not contain a username");
        check(
            &of(&format!("url: '{OWN}', audiences: [b]")),
            "must not be the issuer of the cluster's service accounts",
        );
        check(
            &of("url: 'https://a.example', discoveryURL: 'https://a.example/', audiences: [b]"),
            "discoveryURL: \"https://a.example/\": must be different",
        );
        check(&of("url: 'https://a.example'"), "issuer.audiences: \"\": Required value");
        check(&of("url: 'https://a.example', audiences: ['']"), "audiences[0]: \"\": Required value");
        check(&of("url: 'https://a.example', audiences: [b, b]"), "audiences[1]: \"b\": must not stand there twice");
        check(&of("url: 'https://a.example', audiences: [b, c]"), "audienceMatchPolicy: \"\": must be MatchAny");
        check(
            &of("url: 'https://a.example', audiences: [b], audienceMatchPolicy: All"),
            "\"All\": must be MatchAny or",
        );
        check(&of("url: 'https://a.example', audiences: [b], certificateAuthority: x"), "must be certificates in PEM");
        check(
            &of("url: 'https://a.example', audiences: [b], egressSelectorType: etcd"),
            "\"etcd\": must be controlplane",
        );
        let one = of("url: 'https://a.example', audiences: [b]");
        check(&format!("{one}, {one}"), "jwt[1].issuer.url: \"https://a.example\": must not stand there twice");
        check(&of("url: 'https://a.example', audiences: [b], colour: red"), "unknown field `colour`");
    }

    #[test]
    fn whose_a_token_is() {
        let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let payload = encode("{\"iss\": \"https://a.example\"}");
        assert_eq!(unverified_issuer(&format!("x.{payload}.y")).as_deref(), Some("https://a.example"));
        for other in
            ["", "x", "x.y.z", &format!("x.{payload}"), &format!("x.{payload}.y.z"), &format!("x.{}.y", encode("5"))]
        {
            assert_eq!(unverified_issuer(other), None, "{other}");
        }
    }
}
