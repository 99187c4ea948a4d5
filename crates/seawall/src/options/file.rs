//! Flags that stand in a file.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};

/// The arguments of a configuration file (`--config FILE`): YAML with the same words as the flags. What is given on the
/// command line comes later and wins.
///
/// # Errors
/// A file that cannot be read, or has something else than words and values.
pub fn with_config_file(arguments: Vec<String>) -> anyhow::Result<Vec<String>> {
    let mut out = Vec::new();
    let mut rest = Vec::new();
    let mut arguments = arguments.into_iter().peekable();
    // The program and the command come before what the file says.
    out.extend(arguments.next());
    if let Some(command) = arguments.next_if(|a| !a.starts_with('-')) {
        out.push(command);
    }
    while let Some(argument) = arguments.next() {
        let file = match argument.strip_prefix("--config=") {
            Some(file) => file.to_owned(),
            None if argument == "--config" => arguments.next().context("--config: a file is missing")?,
            None => {
                rest.push(argument);
                continue;
            }
        };
        let text = std::fs::read_to_string(&file).with_context(|| format!("--config {file}"))?;
        let entries: BTreeMap<String, serde_json::Value> = serde_yaml_ng::from_str(&text)
            .with_context(|| format!("--config {file}: write one `flag: value` a line"))?;
        for (key, value) in entries {
            out.extend(flag(&key, &value).with_context(|| format!("--config {file}: {key}"))?);
        }
    }
    out.extend(rest);
    Ok(out)
}

fn flag(key: &str, value: &serde_json::Value) -> anyhow::Result<Vec<String>> {
    use serde_json::Value;
    Ok(match value {
        Value::Bool(true) => vec![format!("--{key}")],
        Value::Bool(false) | Value::Null => Vec::new(),
        Value::Number(n) => vec![format!("--{key}={n}")],
        Value::String(text) => vec![format!("--{key}={text}")],
        Value::Array(items) => {
            let mut all = Vec::new();
            for item in items {
                all.extend(flag(key, item)?);
            }
            all
        }
        Value::Object(entries) if entries.values().all(Value::is_string) => {
            // As labels are written in YAML.
            let pair = |(k, v): (&String, &Value)| format!("--{key}={k}={}", v.as_str().unwrap_or_default());
            entries.iter().map(pair).collect()
        }
        Value::Object(_) => bail!("a value, a list of values or a map of texts is expected"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_says_what_the_flags_say() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(
            &file,
            "cluster-init: true\nport: 7443\ntls-san: [a.example, b.example]\nnode-label: {tier: web}\ndisable: null\n",
        )
        .unwrap();
        let arguments = |list: &[&str]| list.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        let config = file.display().to_string();
        let all = with_config_file(arguments(&["seawall", "server", "--config", &config, "--port=8443"])).unwrap();
        let expect = [
            "seawall",
            "server",
            "--cluster-init",
            "--node-label=tier=web",
            "--port=7443",
            "--tls-san=a.example",
            "--tls-san=b.example",
            "--port=8443",
        ];
        assert_eq!(all, expect);
        std::fs::write(&file, "cluster-init: {a: [1]}\n").unwrap();
        let error = with_config_file(arguments(&["seawall", "server", "--config", &config])).unwrap_err();
        assert!(format!("{error:#}").contains("cluster-init: a value, a list of values"), "{error:#}");
        let error = with_config_file(arguments(&["seawall", "server", "--config", "/nowhere"])).unwrap_err();
        assert!(format!("{error:#}").contains("--config /nowhere: No such file"), "{error:#}");
    }
}
