//! Flags that say who may come in, beyond what is in the cluster, and what is written down of it: upstream's, with their
//! names (<https://kubernetes.io/docs/reference/command-line-tools-reference/kube-apiserver/>).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use seawall_server::{
    access::{Access, Anonymous, Authentication},
    audit::{Auditor, log, policy::Policy},
    auth::oidc::{
        ALGORITHMS,
        config::{AuthenticationConfiguration, ClaimRule, IssuerText, JwtAuthenticator, Mapping, Mappings},
    },
};
use tokio_util::sync::CancellationToken;

/// How often the file of `--authentication-config` is looked at.
const LOOK: Duration = Duration::from_secs(10);

/// Options of access to the API.
#[derive(clap::Args, Clone)]
pub struct AccessOptions {
    #[command(flatten)]
    audit: AuditOptions,
    /// Whom tokens of other issuers speak for, and who may be anonymous, as this file says (upstream's
    /// AuthenticationConfiguration). It is read again when it changes.
    #[arg(long, value_name = "FILE")]
    authentication_config: Option<PathBuf>,
    /// Whether requests may be made without saying who one is. What such requests may do is said by roles.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    anonymous_auth: Option<bool>,
    #[command(flatten)]
    oidc: OidcOptions,
}

/// One issuer of tokens (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/#using-flags>).
#[derive(clap::Args, Clone)]
struct OidcOptions {
    /// Believe the tokens of this OpenID Connect issuer.
    #[arg(long, value_name = "URL", requires = "oidc_client_id", conflicts_with = "authentication_config")]
    oidc_issuer_url: Option<String>,
    /// The audience that its tokens must be for.
    #[arg(long, value_name = "ID", requires = "oidc_issuer_url")]
    oidc_client_id: Option<String>,
    /// The claim that has the user's name.
    #[arg(long, value_name = "CLAIM", default_value = "sub")]
    oidc_username_claim: String,
    /// What is put before it; - for nothing [default: the URL of the issuer and #, but for the claim email].
    #[arg(long, value_name = "TEXT", requires = "oidc_issuer_url", allow_hyphen_values = true)]
    oidc_username_prefix: Option<String>,
    /// The claim that has the user's groups.
    #[arg(long, value_name = "CLAIM", requires = "oidc_issuer_url")]
    oidc_groups_claim: Option<String>,
    /// What is put before each of them.
    #[arg(long, value_name = "TEXT", requires = "oidc_groups_claim")]
    oidc_groups_prefix: Option<String>,
    /// A claim that must have this value. May be repeated.
    #[arg(long, value_name = "CLAIM=VALUE", value_delimiter = ',', requires = "oidc_issuer_url")]
    oidc_required_claim: Vec<String>,
    /// The algorithms by which its tokens may be signed.
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "RS256")]
    oidc_signing_algs: Vec<String>,
    /// Who signs its certificate [default: those whom the system trusts].
    #[arg(long, value_name = "FILE", requires = "oidc_issuer_url")]
    oidc_ca_file: Option<PathBuf>,
}

/// What is written down of requests (<https://kubernetes.io/docs/tasks/debug/debug-cluster/audit/>).
#[derive(clap::Args, Clone)]
struct AuditOptions {
    /// Write down what is asked of the API, as this file says (upstream's Policy of audit.k8s.io/v1).
    #[arg(long, value_name = "FILE", requires = "audit_log_path")]
    audit_policy_file: Option<PathBuf>,
    /// The file into which it is written, one line of JSON for each event; - for the output of this process.
    #[arg(long, value_name = "FILE", requires = "audit_policy_file")]
    audit_log_path: Option<PathBuf>,
    /// How many megabytes it may have before it is put aside.
    #[arg(long, value_name = "MEGABYTES", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    audit_log_maxsize: u64,
    /// How many files that were put aside are kept; with 0, all.
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    audit_log_maxbackup: usize,
    /// How many days they are kept; with 0, for ever.
    #[arg(long, value_name = "DAYS", default_value_t = 366)]
    audit_log_maxage: u32,
}

impl AccessOptions {
    /// Reads the files. `own` is the issuer of service accounts.
    ///
    /// # Errors
    /// What is wrong with them; the message names the flag, the field and the value.
    pub fn resolve(&self, own: &str) -> anyhow::Result<Access> {
        let authentication = Arc::new(ArcSwap::from_pointee(self.authentication(own)?));
        Ok(Access { audit: self.audit.resolve()?.map(Arc::new), authentication })
    }

    fn authentication(&self, own: &str) -> anyhow::Result<Authentication> {
        let mut made = match &self.authentication_config {
            Some(file) => read(file, own)?,
            None => self.oidc.resolve(own)?,
        };
        match (self.anonymous_auth, &made.anonymous) {
            (None, _) => {}
            (Some(flag), Anonymous::Everywhere) => {
                made.anonymous = if flag { Anonymous::Everywhere } else { Anonymous::On(Vec::new()) };
            }
            (Some(flag), _) => bail!(
                "--anonymous-auth={flag}: the file of --authentication-config says already who may be anonymous: leave the flag out"
            ),
        }
        Ok(made)
    }

    /// Reads the file of `--authentication-config` again when it has changed. One with mistakes is not taken.
    pub async fn keep(self, own: String, access: Access, stop: CancellationToken) -> anyhow::Result<()> {
        let Some(file) = &self.authentication_config else {
            stop.cancelled().await;
            return Ok(());
        };
        let mut last = std::fs::read(file).unwrap_or_default();
        while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
            let text = std::fs::read(file).unwrap_or_default();
            // An editor may have just emptied it.
            if text == last || text.is_empty() {
                continue;
            }
            last = text;
            match self.authentication(&own) {
                Ok(made) => {
                    access.authentication.store(Arc::new(made));
                    tracing::info!(file = %file.display(), "--authentication-config was read again");
                }
                Err(error) => tracing::error!(error = format!("{error:#}"), "what was read before stays in force"),
            }
        }
        Ok(())
    }
}

fn read(file: &Path, own: &str) -> anyhow::Result<Authentication> {
    let about = || format!("--authentication-config {}", file.display());
    let text = std::fs::read_to_string(file).with_context(about)?;
    let configuration = AuthenticationConfiguration::parse(&text).with_context(about)?;
    Authentication::new(&configuration, &ALGORITHMS.map(str::to_owned), own).with_context(about)
}

impl OidcOptions {
    fn resolve(&self, own: &str) -> anyhow::Result<Authentication> {
        let (Some(url), Some(client)) = (&self.oidc_issuer_url, &self.oidc_client_id) else {
            return Ok(Authentication::default());
        };
        if url == own {
            bail!(
                "--oidc-issuer-url {url}: it must not be the issuer of the cluster's service accounts: name another one"
            );
        }
        let certificate_authority = match &self.oidc_ca_file {
            None => String::new(),
            Some(file) => {
                std::fs::read_to_string(file).with_context(|| format!("--oidc-ca-file {}", file.display()))?
            }
        };
        let claim = &self.oidc_username_claim;
        let prefix = match self.oidc_username_prefix.as_deref() {
            Some("-") => String::new(),
            Some(prefix) => prefix.to_owned(),
            None if claim == "email" => String::new(),
            None => format!("{url}#"),
        };
        let rule = |text: &String| match text.split_once('=') {
            Some((claim, value)) if !claim.is_empty() => {
                Ok(ClaimRule { claim: claim.to_owned(), required_value: value.to_owned(), ..Default::default() })
            }
            _ => bail!("--oidc-required-claim {text:?}: write CLAIM=VALUE"),
        };
        let mapping = |claim: &str, prefix: String| Mapping {
            claim: claim.to_owned(),
            prefix: Some(prefix),
            ..Default::default()
        };
        let groups = self.oidc_groups_claim.as_deref();
        let jwt = JwtAuthenticator {
            issuer: IssuerText {
                url: url.clone(),
                certificate_authority,
                audiences: vec![client.clone()],
                ..Default::default()
            },
            claim_validation_rules: self.oidc_required_claim.iter().map(rule).collect::<anyhow::Result<_>>()?,
            claim_mappings: Mappings {
                username: mapping(claim, prefix),
                groups: groups
                    .map(|claim| mapping(claim, self.oidc_groups_prefix.clone().unwrap_or_default()))
                    .unwrap_or_default(),
                ..Default::default()
            },
            ..Default::default()
        };
        let configuration = AuthenticationConfiguration { jwt: vec![jwt], ..Default::default() };
        Authentication::new(&configuration, &self.oidc_signing_algs, own)
            .with_context(|| format!("--oidc-issuer-url {url}, --oidc-client-id {client}"))
    }
}

impl AuditOptions {
    fn resolve(&self) -> anyhow::Result<Option<Auditor>> {
        let (Some(file), Some(path)) = (&self.audit_policy_file, &self.audit_log_path) else { return Ok(None) };
        let about = || format!("--audit-policy-file {}", file.display());
        let text = std::fs::read_to_string(file).with_context(about)?;
        let policy = Policy::parse(&text).with_context(about)?;
        let options = log::Options {
            path: path.clone(),
            max_megabytes: self.audit_log_maxsize,
            max_backups: self.audit_log_maxbackup,
            max_days: self.audit_log_maxage,
        };
        let auditor = Auditor::open(policy, &options);
        auditor.map(Some).with_context(|| format!("--audit-log-path {}: it cannot be written to", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        access: AccessOptions,
    }

    /// What is said about these arguments; `DIR` stands for a directory with these files.
    fn complaint(files: &[(&str, &str)], arguments: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let arguments = arguments.replace("DIR", &dir.path().display().to_string());
        let words = std::iter::once("seawall").chain(arguments.split(' ').filter(|word| !word.is_empty()));
        match Command::try_parse_from(words) {
            Err(error) => error.to_string(),
            Ok(command) => command.access.resolve(OWN).err().map(|error| format!("{error:#}")).unwrap_or_default(),
        }
    }

    const OWN: &str = "https://kubernetes.default.svc.cluster.local";
    const POLICY: &str = "{apiVersion: audit.k8s.io/v1, kind: Policy, rules: [{level: Metadata}]}";

    #[test]
    fn mistakes_of_the_audit_log() {
        let check = |policy: &str, arguments: &str, expect: &[&str]| {
            let said = complaint(&[("policy", policy)], arguments);
            assert!(expect.iter().all(|part| said.contains(part)) && said.is_empty() == expect.is_empty(), "{said}");
        };
        let all = "--audit-policy-file DIR/policy --audit-log-path DIR/log";
        check(POLICY, "", &[]);
        check(POLICY, all, &[]);
        check(POLICY, "--audit-log-path -", &["--audit-policy-file <FILE>"]);
        check(POLICY, "--audit-policy-file DIR/policy", &["--audit-log-path <FILE>"]);
        check(POLICY, &format!("{all} --audit-log-maxsize 0"), &["'0' for '--audit-log-maxsize <MEGABYTES>'"]);
        check(
            POLICY,
            "--audit-policy-file DIR/none --audit-log-path -",
            &["--audit-policy-file /", "none: No such file"],
        );
        check(
            POLICY,
            "--audit-policy-file DIR/policy --audit-log-path DIR",
            &["--audit-log-path /", "cannot be written to"],
        );
        let wrong = "{apiVersion: audit.k8s.io/v1, kind: Policy, rules: [{level: Everything}]}";
        check(wrong, all, &["--audit-policy-file /", "rules[0].level: \"Everything\": no such level: write None"]);
    }

    #[test]
    fn mistakes_of_issuers() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let check = |arguments: &str, expect: &[&str]| {
            let file = "{apiVersion: apiserver.config.k8s.io/v1, kind: AuthenticationConfiguration, anonymous: {enabled: false}}";
            let wrong = "{apiVersion: v1, kind: Pod}";
            let said = complaint(&[("file", file), ("wrong", wrong), ("ca", "nothing")], arguments);
            assert!(expect.iter().all(|part| said.contains(part)) && said.is_empty() == expect.is_empty(), "{said}");
        };
        let both = "--oidc-issuer-url https://a.example --oidc-client-id seawall";
        check(both, &[]);
        check(&format!("{both} --oidc-username-prefix - --oidc-groups-claim groups --oidc-groups-prefix g:"), &[]);
        check(&format!("{both} --oidc-required-claim a=b,c=d --oidc-signing-algs ES256,RS256"), &[]);
        check("--oidc-issuer-url https://a.example", &["--oidc-client-id <ID>"]);
        check("--oidc-client-id seawall", &["--oidc-issuer-url <URL>"]);
        check(
            "--oidc-issuer-url http://a.example --oidc-client-id b",
            &["--oidc-issuer-url http://a.example", "must be https"],
        );
        let own = format!("--oidc-issuer-url {OWN} --oidc-client-id b");
        check(&own, &["--oidc-issuer-url https://kubernetes.default", "issuer of the cluster's service accounts"]);
        check(&format!("{both} --oidc-required-claim a"), &["--oidc-required-claim \"a\": write CLAIM=VALUE"]);
        check(&format!("{both} --oidc-signing-algs HS256"), &["--oidc-signing-algs: \"HS256\": no such algorithm"]);
        check(&format!("{both} --oidc-ca-file DIR/none"), &["--oidc-ca-file /", "No such file"]);
        check(&format!("{both} --oidc-ca-file DIR/ca"), &["certificateAuthority", "must be certificates in PEM"]);
        check(
            &format!("{both} --authentication-config DIR/file"),
            &["--authentication-config <FILE>", "cannot be used with"],
        );
        check("--authentication-config DIR/file", &[]);
        check("--authentication-config DIR/none", &["--authentication-config /", "No such file"]);
        check("--authentication-config DIR/wrong", &["\"v1, Pod\": write apiserver.config.k8s.io/v1"]);
        check(
            "--authentication-config DIR/file --anonymous-auth=true",
            &["--anonymous-auth=true", "leave the flag out"],
        );
        check("--anonymous-auth=false", &[]);
        check("--anonymous-auth", &[]);
    }
}
