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
    audit::{Auditor, log, policy::Policy, webhook},
    auth::{
        oidc::{
            ALGORITHMS,
            config::{AuthenticationConfiguration, ClaimRule, IssuerText, JwtAuthenticator, Mapping, Mappings},
        },
        remote::{AccessWebhook, Memory, TokenWebhook, Turn},
    },
    outside::kubeconfig::{self, Target},
};
use tokio_util::sync::CancellationToken;

use crate::options::duration;

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
    #[command(flatten)]
    webhooks: WebhookOptions,
}

/// Who is asked about tokens, and about what users may.
#[derive(clap::Args, Clone)]
struct WebhookOptions {
    /// Ask the webhook of this kubeconfig whose a token is that nobody else knows.
    #[arg(long, value_name = "FILE")]
    authentication_token_webhook_config_file: Option<PathBuf>,
    /// How long its answers are remembered.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = duration)]
    authentication_token_webhook_cache_ttl: Duration,
    /// The version of TokenReview that it is sent; only v1 is spoken.
    #[arg(long, value_name = "VERSION", default_value = "v1", value_parser = ["v1"])]
    authentication_token_webhook_version: String,
    /// Who decides what users may, in this order; Node and RBAC are together and always there.
    #[arg(long, value_name = "MODE,...", value_delimiter = ',', default_value = "Node,RBAC")]
    authorization_mode: Vec<String>,
    /// The kubeconfig of the webhook of --authorization-mode.
    #[arg(long, value_name = "FILE")]
    authorization_webhook_config_file: Option<PathBuf>,
    /// How long is remembered what it allowed.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    authorization_webhook_cache_authorized_ttl: Duration,
    /// How long is remembered what it did not allow.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    authorization_webhook_cache_unauthorized_ttl: Duration,
    /// The version of SubjectAccessReview that it is sent; only v1 is spoken.
    #[arg(long, value_name = "VERSION", default_value = "v1", value_parser = ["v1"])]
    authorization_webhook_version: String,
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
    #[arg(long, value_name = "FILE")]
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
    /// Send it to the webhook of this kubeconfig, in lists of events.
    #[arg(long, value_name = "FILE", requires = "audit_policy_file")]
    audit_webhook_config_file: Option<PathBuf>,
    /// How many events a list has at most.
    #[arg(long, value_name = "NUMBER", default_value_t = 400, value_parser = clap::value_parser!(u16).range(1..))]
    audit_webhook_batch_max_size: u16,
    /// How long an event waits for others at most.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    audit_webhook_batch_max_wait: Duration,
    /// How long is waited before a list is sent again that was not taken.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    audit_webhook_initial_backoff: Duration,
}

impl AccessOptions {
    /// Reads the files. `own` is the issuer of service accounts.
    ///
    /// # Errors
    /// What is wrong with them; the message names the flag, the field and the value.
    pub fn resolve(&self, own: &str) -> anyhow::Result<Access> {
        let authentication = Arc::new(ArcSwap::from_pointee(self.authentication(own)?));
        let (tokens, authorizer) = (self.webhooks.tokens()?.map(Arc::new), self.webhooks.authorizer()?.map(Arc::new));
        Ok(Access { audit: self.audit.resolve()?.map(Arc::new), authentication, tokens, authorizer })
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

impl WebhookOptions {
    fn tokens(&self) -> anyhow::Result<Option<TokenWebhook>> {
        let Some(file) = &self.authentication_token_webhook_config_file else { return Ok(None) };
        let flag = "--authentication-token-webhook-config-file";
        let made = TokenWebhook::new(&target(flag, file)?, self.authentication_token_webhook_cache_ttl);
        made.map(Some).map_err(|why| unusable(flag, file, &why))
    }

    fn authorizer(&self) -> anyhow::Result<Option<AccessWebhook>> {
        let modes: Vec<&str> = self.authorization_mode.iter().map(String::as_str).collect();
        let flag = "--authorization-webhook-config-file";
        let turn = match modes[..] {
            ["Node", "RBAC"] | ["RBAC", "Node"] => None,
            ["Node", "RBAC", "Webhook"] | ["RBAC", "Node", "Webhook"] => Some(Turn::Last),
            ["Webhook", "Node", "RBAC"] | ["Webhook", "RBAC", "Node"] => Some(Turn::First),
            _ => bail!(
                "--authorization-mode {}: write Node,RBAC, with Webhook before or after both if it is to be asked",
                modes.join(",")
            ),
        };
        match (turn, &self.authorization_webhook_config_file) {
            (None, None) => Ok(None),
            (Some(_), None) => bail!("--authorization-mode {}: say with {flag} where the webhook is", modes.join(",")),
            (None, Some(file)) => {
                bail!("{flag} {}: it is not asked: write --authorization-mode Node,RBAC,Webhook", file.display())
            }
            (Some(turn), Some(file)) => {
                let memory = Memory {
                    allowed: self.authorization_webhook_cache_authorized_ttl,
                    refused: self.authorization_webhook_cache_unauthorized_ttl,
                };
                let made = AccessWebhook::new(&target(flag, file)?, turn, memory);
                made.map(Some).map_err(|why| unusable(flag, file, &why))
            }
        }
    }
}

fn target(flag: &str, file: &Path) -> anyhow::Result<Target> {
    kubeconfig::read(file).with_context(|| format!("{flag} {}", file.display()))
}

fn unusable(flag: &str, file: &Path, why: &str) -> anyhow::Error {
    anyhow::anyhow!("{flag} {}: {why}: give certificates and keys in PEM", file.display())
}

impl AuditOptions {
    fn resolve(&self) -> anyhow::Result<Option<Auditor>> {
        let Some(file) = &self.audit_policy_file else { return Ok(None) };
        let about = || format!("--audit-policy-file {}", file.display());
        if self.audit_log_path.is_none() && self.audit_webhook_config_file.is_none() {
            bail!("{}: give --audit-log-path or --audit-webhook-config-file as well, or nothing is written", about());
        }
        let text = std::fs::read_to_string(file).with_context(about)?;
        let mut auditor = Auditor::new(Policy::parse(&text).with_context(about)?);
        if let Some(path) = &self.audit_log_path {
            let options = log::Options {
                path: path.clone(),
                max_megabytes: self.audit_log_maxsize,
                max_backups: self.audit_log_maxbackup,
                max_days: self.audit_log_maxage,
            };
            auditor = auditor
                .with_log(&options)
                .with_context(|| format!("--audit-log-path {}: it cannot be written to", path.display()))?;
        }
        if let Some(file) = &self.audit_webhook_config_file {
            let flag = "--audit-webhook-config-file";
            let options = webhook::Options {
                batch_max_size: self.audit_webhook_batch_max_size.into(),
                batch_max_wait: self.audit_webhook_batch_max_wait,
                initial_backoff: self.audit_webhook_initial_backoff,
            };
            auditor = auditor.with_webhook(&target(flag, file)?, options).map_err(|why| unusable(flag, file, &why))?;
        }
        Ok(Some(auditor))
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
        check(POLICY, "--audit-policy-file DIR/policy", &["--audit-policy-file /", "give --audit-log-path or"]);
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

    #[tokio::test]
    async fn mistakes_of_webhooks() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let check = |arguments: &str, expect: &[&str]| {
            let of = |server: &str| {
                format!(
                    "{{current-context: c, contexts: [{{name: c, context: {{cluster: k}}}}],
                       clusters: [{{name: k, cluster: {{server: '{server}'}}}}]}}"
                )
            };
            let files =
                [("good", &*of("https://a.example/review")), ("plain", &*of("http://a.example")), ("policy", POLICY)];
            let said = complaint(&files, arguments);
            assert!(expect.iter().all(|part| said.contains(part)) && said.is_empty() == expect.is_empty(), "{said}");
        };
        check("--authentication-token-webhook-config-file DIR/good --authentication-token-webhook-cache-ttl 1m", &[]);
        let flag = "--authentication-token-webhook-config-file";
        check(&format!("{flag} DIR/none"), &[flag, "No such file"]);
        check(&format!("{flag} DIR/plain"), &[flag, "cluster.server: \"http://a.example\": URL scheme must be https"]);
        check(
            "--authentication-token-webhook-cache-ttl soon",
            &["'soon' for '--authentication-token-webhook-cache-ttl"],
        );
        check(
            "--authentication-token-webhook-version v1beta1",
            &["'v1beta1' for '--authentication-token-webhook-version"],
        );
        for mode in ["Node,RBAC,Webhook", "Webhook,Node,RBAC"] {
            check(&format!("--authorization-mode {mode} --authorization-webhook-config-file DIR/good"), &[]);
        }
        check("--authorization-mode RBAC,Node", &[]);
        check("--authorization-mode AlwaysAllow", &["--authorization-mode AlwaysAllow: write Node,RBAC"]);
        check("--authorization-mode Node,Webhook,RBAC", &["--authorization-mode Node,Webhook,RBAC: write"]);
        check("--authorization-mode Node,RBAC,Webhook", &["say with --authorization-webhook-config-file where"]);
        check("--authorization-webhook-config-file DIR/good", &["it is not asked: write --authorization-mode"]);
        check(
            "--authorization-mode Node,RBAC,Webhook --authorization-webhook-config-file DIR/plain",
            &["must be https"],
        );
        check("--audit-policy-file DIR/policy --audit-webhook-config-file DIR/good", &[]);
        check("--audit-webhook-config-file DIR/good", &["--audit-policy-file <FILE>"]);
        check(
            "--audit-policy-file DIR/policy --audit-webhook-config-file DIR/plain",
            &["--audit-webhook-config-file /"],
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_configuration_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let write = |enabled: &str| {
            let text = format!(
                "{{apiVersion: apiserver.config.k8s.io/v1, kind: AuthenticationConfiguration, anonymous: {{enabled: {enabled}}}}}"
            );
            std::fs::write(&file, text).unwrap();
        };
        write("true");
        let flag = format!("--authentication-config={}", file.display());
        let options = Command::try_parse_from(["seawall", &flag]).unwrap().access;
        let access = options.resolve(OWN).unwrap();
        let stop = CancellationToken::new();
        let keeping = tokio::spawn(options.keep(OWN.to_owned(), access.clone(), stop.clone()));
        let settle = async || {
            tokio::time::sleep(LOOK + Duration::from_secs(1)).await;
            access.authentication.load().anonymous.clone()
        };
        assert_eq!(settle().await, Anonymous::Everywhere);
        write("false");
        assert_eq!(settle().await, Anonymous::On(Vec::new()));
        write("maybe");
        assert_eq!(settle().await, Anonymous::On(Vec::new()), "one with mistakes is not taken");
        write("true");
        assert_eq!(settle().await, Anonymous::Everywhere);
        stop.cancel();
        keeping.await.unwrap().unwrap();
    }
}
