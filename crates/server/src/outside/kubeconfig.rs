//! Where a webhook is, and what it is shown: a kubeconfig file, as upstream has it for its own webhooks
//! (<https://kubernetes.io/docs/reference/access-authn-authz/webhook/#configuration-file-format>).

use std::path::Path;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, de::IgnoredAny};

use super::{Credentials, check_url};

/// A server, and how to speak to it.
pub struct Target {
    /// Where it is.
    pub url: String,
    /// Whom to believe, and what to show.
    pub credentials: Credentials,
}

/// A field of a kubeconfig that cannot be as it is.
#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    /// It, or a file that it names, cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// It is not of its form.
    #[error(transparent)]
    Form(#[from] serde_yaml_ng::Error),
    /// A field has a value that it cannot have.
    #[error("{field}: {value:?}: {why}")]
    Field {
        /// The field.
        field: &'static str,
        /// What stands there.
        value: String,
        /// What is wrong with it.
        why: String,
    },
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Config {
    current_context: String,
    contexts: Vec<NamedContext>,
    clusters: Vec<NamedCluster>,
    users: Vec<NamedUser>,
}

#[derive(Default, Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Context {
    cluster: String,
    user: String,
}

#[derive(Default, Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Cluster {
    server: String,
    certificate_authority: String,
    certificate_authority_data: String,
    tls_server_name: Option<String>,
    insecure_skip_tls_verify: bool,
}

#[derive(Default, Deserialize)]
struct NamedUser {
    name: String,
    #[serde(default)]
    user: User,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct User {
    client_certificate: String,
    client_certificate_data: String,
    client_key: String,
    client_key_data: String,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<String>,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
    username: Option<IgnoredAny>,
}

fn wrong(field: &'static str, value: &str, why: impl Into<String>) -> KubeconfigError {
    KubeconfigError::Field { field, value: value.to_owned(), why: why.into() }
}

/// Reads a file. Paths in it are relative to where it is.
///
/// # Errors
/// If it cannot be read, or does not say where the server is.
pub fn read(file: &Path) -> Result<Target, KubeconfigError> {
    let directory = file.parent().unwrap_or(Path::new("."));
    let load = |path: &Path| {
        std::fs::read_to_string(path).map_err(|source| KubeconfigError::Io { path: path.display().to_string(), source })
    };
    let config: Config = serde_yaml_ng::from_str(&load(file)?)?;
    let current = &config.current_context;
    let context = match config.contexts.iter().find(|context| context.name == *current) {
        Some(found) => &found.context,
        None => return Err(wrong("current-context", current, "no such context: name one of contexts")),
    };
    let cluster = match config.clusters.iter().find(|cluster| cluster.name == context.cluster) {
        Some(found) => &found.cluster,
        None => return Err(wrong("context.cluster", &context.cluster, "no such cluster: name one of clusters")),
    };
    check_url(&cluster.server).map_err(|why| wrong("cluster.server", &cluster.server, why))?;
    if cluster.insecure_skip_tls_verify {
        let why = "what decides about access must be known: give certificate-authority instead";
        return Err(wrong("cluster.insecure-skip-tls-verify", "true", why));
    }
    let text = |field: &'static str, data: &str, path: &str| -> Result<Option<String>, KubeconfigError> {
        match (data, path) {
            ("", "") => Ok(None),
            ("", path) => load(&directory.join(path)).map(Some),
            (data, _) => {
                let decoded = STANDARD.decode(data.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
                // The data may be a key, so it is not repeated.
                decoded.map(Some).ok_or_else(|| wrong(field, "", "must be PEM in base64"))
            }
        }
    };
    let nobody = User::default();
    let user = match (&*context.user, config.users.iter().find(|user| user.name == context.user)) {
        (_, Some(found)) => &found.user,
        ("", None) => &nobody,
        (name, None) => return Err(wrong("context.user", name, "no such user: name one of users")),
    };
    let others =
        [("user.exec", &user.exec), ("user.auth-provider", &user.auth_provider), ("user.username", &user.username)];
    if let Some((field, _)) = others.into_iter().find(|(_, value)| value.is_some()) {
        return Err(wrong(field, "", "not supported: give a token, or a certificate and its key"));
    }
    let certificate = text("user.client-certificate-data", &user.client_certificate_data, &user.client_certificate)?;
    let key = text("user.client-key-data", &user.client_key_data, &user.client_key)?;
    let pair = match (certificate, key) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => return Err(wrong("user.client-certificate", "", "a certificate and its key are given together")),
    };
    let token = match (&user.token, &user.token_file) {
        (Some(token), _) => Some(token.clone()),
        (None, Some(path)) => Some(load(&directory.join(path))?.trim().to_owned()),
        (None, None) => None,
    };
    let authorities = text(
        "cluster.certificate-authority-data",
        &cluster.certificate_authority_data,
        &cluster.certificate_authority,
    )?;
    let server_name = cluster.tls_server_name.clone();
    Ok(Target { url: cluster.server.clone(), credentials: Credentials { authorities, pair, token, server_name } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(cluster: &str, user: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: k, user: u}}}}],
             clusters: [{{name: k, cluster: {{{cluster}}}}}], users: [{{name: u, user: {{{user}}}}}]}}"
        )
    }

    fn made(text: &str) -> Result<Target, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config"), text).unwrap();
        std::fs::write(dir.path().join("ca"), "authorities").unwrap();
        std::fs::write(dir.path().join("token"), "sesame\n").unwrap();
        read(&dir.path().join("config")).map_err(|e| e.to_string())
    }

    #[test]
    fn what_a_file_says() {
        let data = STANDARD.encode("PEM");
        let found = made(&config(
            "server: 'https://a.example/authorize', certificate-authority: ca, tls-server-name: b.example",
            &format!("tokenFile: token, client-certificate-data: {data}, client-key-data: {data}"),
        ))
        .unwrap();
        assert_eq!(found.url, "https://a.example/authorize");
        let shown = found.credentials;
        assert_eq!(shown.authorities.as_deref(), Some("authorities"));
        assert_eq!((shown.token.as_deref(), shown.server_name.as_deref()), (Some("sesame"), Some("b.example")));
        assert_eq!(shown.pair, Some(("PEM".to_owned(), "PEM".to_owned())));
    }

    #[test]
    fn what_is_wrong_with_a_file() {
        let check = |text: &str, expect: &str| {
            let error = made(text).err().unwrap_or_default();
            assert!(error.contains(expect), "{error}");
        };
        let at = "server: 'https://a.example'";
        check("{}", "current-context: \"\": no such context");
        check(&config(at, "").replace("cluster: k,", "cluster: x,"), "context.cluster: \"x\": no such cluster");
        check(&config(at, "").replace("user: u}", "user: x}"), "context.user: \"x\": no such user");
        check(
            &config("server: 'http://a.example'", ""),
            "cluster.server: \"http://a.example\": URL scheme must be https",
        );
        check(&config("", ""), "cluster.server: \"\"");
        check(&config(&format!("{at}, insecure-skip-tls-verify: true"), ""), "give certificate-authority instead");
        check(&config(&format!("{at}, certificate-authority: none"), ""), "none: No such file");
        check(
            &config(&format!("{at}, certificate-authority-data: '%'"), ""),
            "certificate-authority-data: \"\": must be PEM",
        );
        check(&config(at, "client-certificate: ca"), "given together");
        check(&config(at, "exec: {command: a}"), "user.exec: \"\": not supported");
    }
}
