//! `--encryption-provider-config`: which objects are encrypted in the store, and with which keys. The file is upstream's
//! (<https://kubernetes.io/docs/tasks/administer-cluster/encrypt-data/#understanding-the-encryption-at-rest-configuration>).

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_api::Row;
use seawall_store::{
    Store,
    sealed::{Provider, Rule, Sealed},
};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Configuration {
    api_version: String,
    kind: String,
    resources: Vec<Resources>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resources {
    resources: Vec<String>,
    providers: Vec<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    keys: Vec<Key>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    name: String,
    secret: String,
}

/// Reads the file.
///
/// # Errors
/// If it is not what it should be; the message names the field.
pub fn read(path: &Path) -> anyhow::Result<Vec<Rule>> {
    let about = || format!("--encryption-provider-config: {}", path.display());
    let text = std::fs::read_to_string(path).with_context(about)?;
    parse(&text).with_context(about)
}

/// Puts the rules before a store, if there are any.
pub fn wrap(store: &Arc<dyn Store>, rules: Option<Vec<Rule>>) -> (Arc<dyn Store>, Option<Sealed>) {
    match rules {
        None => (store.clone(), None),
        Some(rules) => {
            let sealed = Sealed::new(store.clone(), rules);
            (Arc::new(sealed.clone()), Some(sealed))
        }
    }
}

/// Writes anew what was not written with the first provider, so that keys can be exchanged without touching the objects.
pub async fn reseal(sealed: Sealed) {
    match sealed.reseal().await {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "objects were written anew, as --encryption-provider-config says"),
        Err(error) => tracing::warn!(%error, "not all objects were written anew: the next start tries again"),
    }
}

fn parse(text: &str) -> anyhow::Result<Vec<Rule>> {
    let configuration: Configuration = serde_yaml_ng::from_str(text)?;
    let (version, kind) = (&*configuration.api_version, &*configuration.kind);
    ensure!(
        kind == "EncryptionConfiguration" && version == "apiserver.config.k8s.io/v1",
        "apiVersion and kind: {version}, {kind}: write apiserver.config.k8s.io/v1, EncryptionConfiguration"
    );
    let rows = seawall_api::resources::all();
    let mut rules: Vec<Rule> = Vec::new();
    for (index, of) in configuration.resources.iter().enumerate() {
        let at = format!("resources[{index}]");
        ensure!(!of.resources.is_empty(), "{at}.resources: required: for example [secrets]");
        ensure!(!of.providers.is_empty(), "{at}.providers: required: for example [{{aesgcm: …}}, {{identity: {{}}}}]");
        let mut providers = Vec::new();
        for (index, provider) in of.providers.iter().enumerate() {
            providers.extend(self::providers(provider).with_context(|| format!("{at}.providers[{index}]"))?);
        }
        let providers: Arc<[Provider]> = providers.into();
        for name in &of.resources {
            let found: Vec<&Row> = rows.iter().filter(|row| row.stored && matches(name, row)).collect();
            if let Some(prefix) = custom(name, &rows) {
                rules.push(Rule { prefix, providers: providers.clone() });
                continue;
            }
            ensure!(
                !found.is_empty(),
                "{at}.resources: {name:?}: no such resource: write secrets, deployments.apps, *.apps or *.*"
            );
            for row in found {
                // Where a resource is named twice, the first one holds.
                if !rules.iter().any(|rule| rule.prefix == row.prefix()) {
                    rules.push(Rule { prefix: row.prefix(), providers: providers.clone() });
                }
            }
        }
    }
    Ok(rules)
}

/// Where custom resources are stored: whether there will be such a resource is not known when the file is read. Their
/// groups have a dot and are nobody else's.
fn custom(name: &str, rows: &[Row]) -> Option<String> {
    let (plural, group) = name.split_once('.')?;
    let own = group.contains('.') && !rows.iter().any(|row| row.group == group);
    own.then(|| match plural {
        "*" => format!("/registry/{group}/"),
        plural => format!("/registry/{group}/{plural}/"),
    })
}

fn matches(name: &str, row: &Row) -> bool {
    let (plural, group) = name.split_once('.').unwrap_or((name, ""));
    (plural == "*" || plural == row.plural)
        && (group == "*" || group == row.group)
        && (name.contains('.') || plural != "*")
}

fn providers(provider: &serde_json::Map<String, serde_json::Value>) -> anyhow::Result<Vec<Provider>> {
    let [(name, value)] = provider.iter().collect::<Vec<_>>()[..] else {
        bail!("must have exactly one of aesgcm, identity")
    };
    match &**name {
        "identity" => Ok(vec![Provider::Identity]),
        "aesgcm" => {
            let keys: Keys = serde_json::from_value(value.clone()).context("aesgcm")?;
            ensure!(!keys.keys.is_empty(), "aesgcm.keys: required: at least one key");
            let of = |(index, key): (usize, &Key)| {
                let at = format!("aesgcm.keys[{index}]");
                ensure!(
                    !key.name.is_empty() && !key.name.contains(':'),
                    "{at}.name: {:?}: must be a name without a colon",
                    key.name
                );
                // The key itself is not repeated in what is printed.
                let secret =
                    STANDARD.decode(key.secret.trim()).with_context(|| format!("{at}.secret: must be base64"))?;
                Provider::aes(&key.name, &secret)
                    .with_context(|| format!("{at}.secret: make one with `head -c 32 /dev/urandom | base64`"))
            };
            keys.keys.iter().enumerate().map(of).collect()
        }
        "aescbc" | "secretbox" | "kms" => {
            bail!("{name}: not supported: use aesgcm; existing values are migrated by an upstream server first")
        }
        other => bail!("{other}: no such provider: write aesgcm or identity"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

    fn file(resources: &str, providers: &str) -> String {
        format!(
            "{{apiVersion: apiserver.config.k8s.io/v1, kind: EncryptionConfiguration, resources: [{{resources: {resources}, providers: {providers}}}]}}"
        )
    }

    #[test]
    fn what_a_file_says() {
        let check = |resources: &str, expect: &[&str]| {
            let rules = parse(&file(
                resources,
                &format!("[{{aesgcm: {{keys: [{{name: a, secret: {KEY}}}]}}}}, {{identity: {{}}}}]"),
            ))
            .unwrap();
            let prefixes: Vec<&str> = rules.iter().map(|rule| &*rule.prefix).collect();
            expect.iter().for_each(|prefix| assert!(prefixes.contains(prefix), "{resources}: {prefixes:?}"));
            assert!(expect.len() > 1 || prefixes.len() == expect.len(), "{resources}: {prefixes:?}");
            assert!(rules.iter().all(|rule| rule.providers.len() == 2));
        };
        check("[secrets]", &["/registry/secrets/"]);
        check("[deployments.apps]", &["/registry/deployments/"]);
        check("['*.apps']", &["/registry/deployments/", "/registry/statefulsets/"]);
        check("['*.*']", &["/registry/pods/", "/registry/secrets/", "/registry/deployments/"]);
        check("['*.']", &["/registry/pods/", "/registry/secrets/"]);
        check("[crontabs.stable.example.com]", &["/registry/stable.example.com/crontabs/"]);
        check("['*.stable.example.com']", &["/registry/stable.example.com/"]);
    }

    #[test]
    fn what_is_wrong_with_a_file() {
        let check = |text: &str, expect: &str| {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expect), "{error}");
            assert!(!error.contains("c2hvcnQ="), "keys are not printed: {error}");
        };
        check("{}", "missing field");
        check("{apiVersion: v1, kind: Pod, resources: []}", "write apiserver.config.k8s.io/v1");
        check(&file("[gadgets]", "[{identity: {}}]"), "\"gadgets\": no such resource");
        check(&file("['*']", "[{identity: {}}]"), "\"*\": no such resource");
        check(&file("[rols.rbac.authorization.k8s.io]", "[{identity: {}}]"), "no such resource");
        check(&file("[]", "[{identity: {}}]"), "resources[0].resources: required");
        check(&file("[secrets]", "[]"), "resources[0].providers: required");
        check(&file("[secrets]", "[{identity: {}, aesgcm: {}}]"), "exactly one of");
        check(&file("[secrets]", "[{kms: {}}]"), "providers[0]: kms: not supported");
        check(&file("[secrets]", "[{magic: {}}]"), "magic: no such provider");
        let key = |name: &str, secret: &str| {
            file("[secrets]", &format!("[{{aesgcm: {{keys: [{{name: '{name}', secret: '{secret}'}}]}}}}]"))
        };
        check(&key("a", "c2hvcnQ="), "aesgcm.keys[0].secret: make one with");
        check(&key("a", "%%"), "aesgcm.keys[0].secret: must be base64");
        check(&key("a:b", KEY), "aesgcm.keys[0].name: \"a:b\"");
    }
}
