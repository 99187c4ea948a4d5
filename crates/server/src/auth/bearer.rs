//! Whose a bearer token is: one of the cluster's own, one of an issuer that is believed, or one that a webhook knows
//! (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/>).

use jiff::Timestamp;

use super::{
    UserInfo,
    bootstrap_token::{self, Token},
    token::Reference,
};
use crate::Server;

/// A user, and for which of the audiences that were asked for the token is.
pub(crate) type Known = (UserInfo, Vec<String>);

/// Those of the audiences asked for that are also among these.
pub(crate) fn common(asked: &[&str], found: &[impl AsRef<str>]) -> Vec<String> {
    let both = asked.iter().filter(|audience| found.iter().any(|own| own.as_ref() == **audience));
    both.map(|audience| (*audience).to_owned()).collect()
}

impl Server {
    /// The user of a token, for one of these audiences. The first who knows it decides; if nobody does, all say why.
    pub(crate) async fn user_of_token(&self, token: &str, audiences: &[&str]) -> Result<Known, String> {
        if let Ok(token) = token.parse() {
            let user = self.user_of_bootstrap_token(&token, audiences).await?;
            return Ok((user, common(audiences, &[&self.config.issuer])));
        }
        let mut why = match self.user_of_account_token(token, audiences) {
            Ok(known) => return Ok(known),
            Err(why) => vec![why],
        };
        let access = &self.config.access;
        // What others say of a user is for the API; who asks for another audience asks the cluster itself, or a webhook.
        let ours = common(audiences, &[&self.config.issuer]);
        if !ours.is_empty() {
            match self.user_of_legacy_token(token) {
                Some(Ok(user)) => return Ok((user, ours)),
                Some(Err(failed)) => why = vec![failed],
                None => {}
            }
            let authentication = access.authentication.load_full();
            match authentication.issuers.user(token, Timestamp::now()).await {
                Some(Ok(user)) => return Ok((user, ours)),
                // Then it is no token of ours, and what is wrong with it as one is of no interest.
                Some(Err(failed)) => {
                    tracing::debug!(failed, "a token of another issuer was refused");
                    why = vec![failed];
                }
                None => {}
            }
        }
        if let Some(webhook) = &access.tokens {
            match webhook.user(token, audiences, &self.config.issuer).await {
                Ok(known) => return Ok(known),
                Err(failed) => why.push(failed),
            }
        }
        Err(why.join(", "))
    }

    /// The user of a service account's token, if it verifies and what it is bound to is still there.
    fn user_of_account_token(&self, token: &str, audiences: &[&str]) -> Result<Known, String> {
        let claims = self.tokens.verify(token, audiences).map_err(|e| e.to_string())?;
        let snapshot = self.cache.snapshot();
        let bound = &claims.kubernetes;
        let there = |plural: &str, reference: &Reference| match self.lookup(
            &snapshot,
            "",
            plural,
            &bound.namespace,
            &reference.name,
        ) {
            Some(object) if object.value()["metadata"]["uid"] == reference.uid.as_str() => Ok(()),
            _ => Err(format!("the token is bound to {plural} {:?}, which is gone", reference.name)),
        };
        there("serviceaccounts", &bound.serviceaccount)?;
        if let Some(pod) = &bound.pod {
            there("pods", pod)?;
        }
        if let Some(secret) = &bound.secret {
            there("secrets", secret)?;
        }
        Ok((claims.user(), common(audiences, &claims.aud)))
    }

    /// The user of a bootstrap token. What is wrong with it is for our log only.
    async fn user_of_bootstrap_token(&self, token: &Token, audiences: &[&str]) -> Result<UserInfo, String> {
        let refused = |why: &dyn std::fmt::Display| {
            tracing::info!(id = token.id(), %why, "a bootstrap token was refused");
            "the bootstrap token is not valid".to_owned()
        };
        // It speaks to the API and to nobody else.
        if !audiences.contains(&self.config.issuer.as_str()) {
            return Err(refused(&"it was shown to somebody else"));
        }
        // One that has just been made somewhere else is worth a second look; for the others no quorum is needed.
        let secret = self.find("", "secrets", bootstrap_token::NAMESPACE, &token.name()).await;
        let secret = secret.map_err(|e| refused(&e))?.ok_or_else(|| refused(&"there is no such Secret"))?;
        token.user(&secret.value(), Timestamp::now()).map_err(|why| refused(&why))
    }
}
