//! The cluster's certificate authorities: which one signs, which are trusted, and how one takes over from another.
//!
//! While a new authority takes over, all that is to be known stands in one Secret, `kube-system/seawall-ca`, which every
//! server follows and mirrors on its own disk (`tls/authorities.json`), so that it starts again in whatever phase it was
//! left. Nodes learn the authorities from the servers ([`node`]). `seawall certs rotate-ca` leads from phase to phase
//! ([`rotate`]).
//!
//! In the second phase servers show, after their certificate, one in which the old authority vouches for the new one. So
//! a client that knows only the old one still gets in, until the old one is dropped.

pub mod node;
pub mod rotate;

use std::{collections::BTreeSet, fmt, str::FromStr};

use anyhow::Context as _;
use base64::Engine as _;
use seawall_server::{
    pki::Authority,
    tls::{is_issued_by, split_bundle},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::join::hash;

/// The Secret's namespace.
pub const NAMESPACE: &str = "kube-system";
/// The Secret's name.
pub const SECRET: &str = "seawall-ca";
/// The Secret's type.
pub const TYPE: &str = "seawall.dev/ca";
/// What a machine reports: an annotation on its server's Lease or on its Node. See [`Report`].
pub const REPORT: &str = "seawall.dev/authorities";

/// A certificate and its key, in PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    /// The certificate.
    pub certificate: String,
    /// The key.
    pub key: String,
}

/// How far the takeover is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Everybody learns to trust the new authority beside the old one.
    Trust,
    /// The new one signs, and every certificate is issued again.
    Sign,
    /// The old one is trusted no more.
    Drop,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Trust => "trust",
            Phase::Sign => "sign",
            Phase::Drop => "drop",
        })
    }
}

/// The authority that takes over.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Next {
    /// Itself.
    pub keys: Keys,
    /// The certificate in which the old one vouches for it, in PEM.
    pub cross: String,
    /// How far it is.
    pub phase: Phase,
}

/// The cluster's authorities.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorities {
    /// The revision of the Secret that this was in; 0 if there never was one. What has a smaller one is older.
    pub revision: u64,
    /// The one that there is; while another takes over, the old one.
    pub current: Keys,
    /// The one that takes over.
    #[serde(default)]
    pub next: Option<Next>,
}

impl Authorities {
    /// One that nobody takes over from.
    pub fn one(authority: &Authority) -> Authorities {
        let current = Keys { certificate: authority.pem.clone(), key: authority.key_pem() };
        Authorities { revision: 0, current, next: None }
    }

    /// Begins a takeover by a new authority.
    ///
    /// # Errors
    /// If a key cannot be made or read.
    pub fn begin(&self) -> anyhow::Result<Authorities> {
        let old = Authority::from_pem(&self.current.certificate, &self.current.key)?;
        // Certificates say by whom they are signed with a name, so no two authorities have the same.
        let name = format!("seawall-ca-{:08x}", rand::random::<u32>());
        let new = Authority::generate(&name)?;
        let cross = old.vouch_for(&new, &name)?;
        let keys = Keys { certificate: new.pem.clone(), key: new.key_pem() };
        let next = Some(Next { keys, cross, phase: Phase::Trust });
        Ok(Authorities { revision: self.revision, current: self.current.clone(), next })
    }

    /// What follows this: the next phase, and in the end the new authority alone.
    pub fn advanced(&self) -> Authorities {
        let mut after = self.clone();
        match &mut after.next {
            Some(next) if next.phase == Phase::Trust => next.phase = Phase::Sign,
            Some(next) if next.phase == Phase::Sign => next.phase = Phase::Drop,
            Some(next) => {
                after.current = next.keys.clone();
                after.next = None;
            }
            None => {}
        }
        after
    }

    /// Who signs.
    pub fn signer(&self) -> &Keys {
        match &self.next {
            Some(next) if next.phase >= Phase::Sign => &next.keys,
            _ => &self.current,
        }
    }

    /// The signer, with what follows the certificates that it issues.
    ///
    /// # Errors
    /// If its key cannot be read.
    pub fn authority(&self) -> anyhow::Result<Authority> {
        let keys = self.signer();
        let authority = Authority::from_pem(&keys.certificate, &keys.key)?;
        Ok(match &self.next {
            Some(next) if next.phase == Phase::Sign => authority.with_chain(&next.cross),
            _ => authority,
        })
    }

    /// Those who are trusted, in PEM, the signer first.
    pub fn bundle(&self) -> String {
        let line = |pem: &str| format!("{}\n", pem.trim_end());
        let own = line(&self.signer().certificate);
        match &self.next {
            Some(next) if next.phase == Phase::Trust => own + &line(&next.keys.certificate),
            Some(next) if next.phase == Phase::Sign => own + &line(&self.current.certificate),
            _ => own,
        }
    }

    /// Whether the signer is the only one who is trusted.
    pub fn is_settled(&self) -> bool {
        self.next.as_ref().is_none_or(|next| next.phase == Phase::Drop)
    }

    /// Reads the Secret, as JSON.
    ///
    /// # Errors
    /// If it has been changed into something that cannot be read.
    pub fn of_secret(secret: &Value) -> anyhow::Result<Authorities> {
        let field = |key: &str| -> anyhow::Result<Option<String>> {
            let Some(text) = secret["data"][key].as_str() else { return Ok(None) };
            let bytes = base64::engine::general_purpose::STANDARD.decode(text);
            let text = bytes.ok().and_then(|bytes| String::from_utf8(bytes).ok());
            text.map(Some).with_context(|| format!("data[{key}] is not what rotate-ca wrote"))
        };
        let needed = |key: &str| field(key)?.with_context(|| format!("data[{key}] is missing"));
        let keys = |name: &str| -> anyhow::Result<Keys> {
            let keys = Keys { certificate: needed(&format!("{name}.crt"))?, key: needed(&format!("{name}.key"))? };
            Authority::from_pem(&keys.certificate, &keys.key)?
                .client("check", "")
                .context(format!("data[{name}.crt]"))?;
            Ok(keys)
        };
        let revision = secret["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse().ok());
        let next = match field("phase")?.as_deref() {
            None | Some("done") => None,
            Some(text) => {
                let phase = serde_json::from_value(text.into())
                    .with_context(|| format!("data[phase]: {text:?} is none of trust, sign, drop and done"))?;
                Some(Next { keys: keys("next")?, cross: needed("cross.crt")?, phase })
            }
        };
        Ok(Authorities { revision: revision.context("metadata.resourceVersion")?, current: keys("ca")?, next })
    }

    /// What stands in the Secret.
    pub fn data(&self) -> std::collections::BTreeMap<String, String> {
        let mut data = vec![("ca.crt", self.current.certificate.clone()), ("ca.key", self.current.key.clone())];
        match &self.next {
            Some(next) => data.extend([
                ("next.crt", next.keys.certificate.clone()),
                ("next.key", next.keys.key.clone()),
                ("cross.crt", next.cross.clone()),
                ("phase", next.phase.to_string()),
            ]),
            None => data.push(("phase", "done".into())),
        }
        data.into_iter().map(|(key, text)| (key.to_owned(), text)).collect()
    }

    /// What a machine reports that has taken all of this in.
    ///
    /// # Errors
    /// If a certificate cannot be read.
    pub fn report(&self) -> anyhow::Result<Report> {
        Ok(Report { trusts: short_hashes(&self.bundle())?, shows: short_hashes(&self.signer().certificate)? })
    }
}

/// The hashes of the authorities in a bundle, shortened.
///
/// # Errors
/// If it cannot be read.
pub fn short_hashes(bundle: &str) -> anyhow::Result<BTreeSet<String>> {
    split_bundle(bundle)?.iter().map(|pem| Ok(hash(pem)?[..16].to_owned())).collect()
}

/// Which authority of a bundle issued a certificate; none if none of them did.
///
/// # Errors
/// If something cannot be read.
pub fn issuer_of(certificate: &str, bundle: &str) -> anyhow::Result<Option<String>> {
    for authority in split_bundle(bundle)? {
        if is_issued_by(certificate, &authority)? {
            return Ok(Some(authority));
        }
    }
    Ok(None)
}

/// What a machine does at the moment, by the authorities' shortened hashes. It is a report of facts, not of phases: who
/// decides what has to come first need not ask what a machine understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Whom it trusts.
    pub trusts: BTreeSet<String>,
    /// Who issued the certificates that it shows.
    pub shows: BTreeSet<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(",");
        write!(f, "trusts={} shows={}", list(&self.trusts), list(&self.shows))
    }
}

impl FromStr for Report {
    type Err = std::convert::Infallible;

    /// What cannot be read is no report of anything.
    fn from_str(text: &str) -> Result<Report, Self::Err> {
        let field = |name: &str| {
            let found = text.split_whitespace().find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            found.into_iter().flat_map(|list| list.split(',')).filter(|h| !h.is_empty()).map(str::to_owned).collect()
        };
        Ok(Report { trusts: field("trusts"), shows: field("shows") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_takes_over_from_another() {
        let first = Authorities::one(&Authority::generate("seawall-ca").unwrap());
        let old = short_hashes(&first.current.certificate).unwrap();
        let trust = first.begin().unwrap();
        let new = short_hashes(&trust.next.as_ref().unwrap().keys.certificate).unwrap();
        let both: BTreeSet<String> = old.union(&new).cloned().collect();
        let check = |state: &Authorities, trusts: &BTreeSet<String>, shows: &BTreeSet<String>| {
            let report = state.report().unwrap();
            assert_eq!((&report.trusts, &report.shows), (trusts, shows));
            assert_eq!(report.to_string().parse::<Report>().unwrap(), report);
            // The signer stands first, and what it issues can be traced to it.
            let issued = state.authority().unwrap().client("x", "").unwrap();
            let signer = split_bundle(&state.bundle()).unwrap().remove(0);
            assert_eq!(short_hashes(&signer).unwrap(), *shows);
            assert_eq!(issuer_of(&issued.certificate, &state.bundle()).unwrap().unwrap(), signer);
            // It comes back from the Secret as it went in.
            let encoded: serde_json::Map<String, Value> = state
                .data()
                .into_iter()
                .map(|(k, v)| (k, base64::engine::general_purpose::STANDARD.encode(v).into()))
                .collect();
            let secret = serde_json::json!({"metadata": {"resourceVersion": "0"}, "data": encoded});
            assert!(Authorities::of_secret(&secret).unwrap() == *state);
        };
        check(&first, &old, &old);
        check(&trust, &both, &old);
        let sign = trust.advanced();
        check(&sign, &both, &new);
        assert_eq!(sign.authority().unwrap().client("x", "").unwrap().certificate.matches("BEGIN").count(), 2);
        let dropped = sign.advanced();
        check(&dropped, &new, &new);
        assert!(dropped.is_settled() && !sign.is_settled() && !trust.is_settled());
        assert_eq!(dropped.authority().unwrap().client("x", "").unwrap().certificate.matches("BEGIN").count(), 1);
        let done = dropped.advanced();
        check(&done, &new, &new);
        assert!(done.next.is_none() && done.advanced() == done);
        assert_eq!(
            issuer_of(&first.authority().unwrap().client("x", "").unwrap().certificate, &done.bundle()).unwrap(),
            None
        );
    }

    #[test]
    fn a_secret_that_somebody_changed() {
        let mut secret = serde_json::json!({"metadata": {"resourceVersion": "7"}, "data": {"phase": "c2lnbg=="}});
        let error = |secret: &Value| format!("{:#}", Authorities::of_secret(secret).err().unwrap());
        assert_eq!(error(&secret), "data[next.crt] is missing");
        secret["data"]["phase"] = "eA==".into();
        assert!(error(&secret).starts_with("data[phase]: \"x\" is none of"), "{}", error(&secret));
        secret["data"]["phase"] = "!".into();
        assert_eq!(error(&secret), "data[phase] is not what rotate-ca wrote");
    }
}
