//! A container's environment: `$(VAR)` expansion, values from the pod, config maps and secrets, and the variables that
//! describe services. Pure: what has to be fetched is in [`Sources`].
//!
//! <https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/>

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret, Service};

use crate::{downward, pod};

/// Replaces `$(NAME)` by its value; `$$` is a literal `$`, and a reference to an unknown name stays as it is.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// The objects that a pod's containers take values from, by name, in the pod's namespace. `None`: it does not exist.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Config maps.
    pub config_maps: HashMap<String, Option<ConfigMap>>,
    /// Secrets.
    pub secrets: HashMap<String, Option<Secret>>,
}

/// The config maps and secrets that a container's environment refers to.
pub fn references(container: &Container) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut maps, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    for from in container.env_from.iter().flatten() {
        maps.extend(from.config_map_ref.iter().map(|r| r.name.clone()));
        secrets.extend(from.secret_ref.iter().map(|r| r.name.clone()));
    }
    for source in container.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
        maps.extend(source.config_map_key_ref.iter().map(|r| r.name.clone()));
        secrets.extend(source.secret_key_ref.iter().map(|r| r.name.clone()));
    }
    (maps, secrets)
}

/// What the environment depends on beside the container.
pub struct Context<'a> {
    /// The pod, with its current address in `status.podIP`.
    pub pod: &'a Pod,
    /// Variables that describe services.
    pub services: BTreeMap<String, String>,
    /// Fetched objects.
    pub sources: &'a Sources,
    /// For `resourceFieldRef` without a limit.
    pub allocatable: &'a downward::Allocatable,
}

/// The environment, or why it cannot be made (upstream's words; the status shows them as CreateContainerConfigError).
pub fn environment(container: &Container, context: &Context<'_>) -> Result<Vec<(String, String)>, String> {
    let namespace = pod::namespace(context.pod);
    let mut names: Vec<String> = Vec::new();
    let mut values: HashMap<String, String> = HashMap::new();
    let mut set = |values: &mut HashMap<String, String>, name: String, value: String| {
        if values.insert(name.clone(), value).is_none() {
            names.push(name);
        }
    };
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &from.config_map_ref {
            match context.sources.config_maps.get(&reference.name).and_then(Option::as_ref) {
                Some(map) => {
                    for (key, value) in map.data.iter().flatten() {
                        set(&mut values, format!("{prefix}{key}"), value.clone());
                    }
                }
                None if reference.optional == Some(true) => {}
                None => return Err(format!("configmap {:?} not found", reference.name)),
            }
        }
        if let Some(reference) = &from.secret_ref {
            match context.sources.secrets.get(&reference.name).and_then(Option::as_ref) {
                Some(secret) => {
                    for (key, value) in secret.data.iter().flatten() {
                        set(&mut values, format!("{prefix}{key}"), String::from_utf8_lossy(&value.0).into_owned());
                    }
                }
                None if reference.optional == Some(true) => {}
                None => return Err(format!("secret {:?} not found", reference.name)),
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(value), _) if !value.is_empty() => {
                Some(expand(value, |n| values.get(n).or_else(|| context.services.get(n)).cloned()))
            }
            (_, Some(source)) => value_from(source, container, context, namespace)?,
            (value, None) => Some(value.clone().unwrap_or_default()),
        };
        if let Some(value) = value {
            set(&mut values, variable.name.clone(), value);
        }
    }
    for (name, value) in &context.services {
        if !values.contains_key(name) {
            set(&mut values, name.clone(), value.clone());
        }
    }
    Ok(names.into_iter().filter_map(|n| values.get(&n).cloned().map(|v| (n, v))).collect())
}

/// `None`: the value is optional and absent, the variable is not set.
fn value_from(
    source: &k8s_openapi::api::core::v1::EnvVarSource,
    container: &Container,
    context: &Context<'_>,
    namespace: &str,
) -> Result<Option<String>, String> {
    if let Some(field) = &source.field_ref {
        return downward::field(context.pod, &field.field_path).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        let named = resource.container_name.as_deref().filter(|n| !n.is_empty());
        let found = named.and_then(|n| pod::find_container(context.pod.spec.as_ref()?, n)).map(|(_, c)| c);
        return downward::resource(found.as_ref().unwrap_or(container), resource, context.allocatable).map(Some);
    }
    if let Some(key) = &source.config_map_key_ref {
        let optional = key.optional == Some(true);
        return match context.sources.config_maps.get(&key.name).and_then(Option::as_ref) {
            None if optional => Ok(None),
            None => Err(format!("configmap {:?} not found", key.name)),
            Some(map) => match map.data.as_ref().and_then(|d| d.get(&key.key)) {
                Some(value) => Ok(Some(value.clone())),
                None if optional => Ok(None),
                None => Err(format!("couldn't find key {} in ConfigMap {namespace}/{}", key.key, key.name)),
            },
        };
    }
    if let Some(key) = &source.secret_key_ref {
        let optional = key.optional == Some(true);
        return match context.sources.secrets.get(&key.name).and_then(Option::as_ref) {
            None if optional => Ok(None),
            None => Err(format!("secret {:?} not found", key.name)),
            Some(secret) => match secret.data.as_ref().and_then(|d| d.get(&key.key)) {
                Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
                None if optional => Ok(None),
                None => Err(format!("couldn't find key {} in Secret {namespace}/{}", key.key, key.name)),
            },
        };
    }
    Err("valueFrom names a source that this version does not know; use fieldRef, resourceFieldRef, configMapKeyRef or secretKeyRef".into())
}

/// The variables that describe services: those of the pod's namespace if `links`, and always the API server's.
/// <https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables>
pub fn service_variables<'a>(
    services: impl Iterator<Item = &'a Service>,
    namespace: &str,
    links: bool,
) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut chosen: BTreeMap<&str, &Service> = BTreeMap::new();
    for service in services {
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let its = service.metadata.namespace.as_deref().unwrap_or_default();
        let api = its == "default" && name == "kubernetes";
        if its == namespace && links {
            chosen.insert(name, service);
        } else if api {
            chosen.entry(name).or_insert(service);
        }
    }
    for (name, service) in chosen {
        let Some(spec) = &service.spec else { continue };
        let ip = spec.cluster_ip.as_deref().unwrap_or_default();
        let ports = spec.ports.as_deref().unwrap_or_default();
        let Some(first) = ports.first().filter(|_| !ip.is_empty() && ip != "None") else { continue };
        let prefix = name.to_uppercase().replace('-', "_");
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        out.insert(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
        out.insert(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
        for (index, port) in ports.iter().enumerate() {
            if let Some(port_name) = port.name.as_deref().filter(|n| !n.is_empty()) {
                let key = format!("{prefix}_SERVICE_PORT_{}", port_name.to_uppercase().replace('-', "_"));
                out.insert(key, port.port.to_string());
            }
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
            if index == 0 {
                out.insert(format!("{prefix}_PORT"), url.clone());
            }
            let base = format!("{prefix}_PORT_{}_{protocol}", port.port);
            out.insert(base.clone(), url);
            out.insert(format!("{base}_PROTO"), protocol.to_lowercase());
            out.insert(format!("{base}_PORT"), port.port.to_string());
            out.insert(format!("{base}_ADDR"), ip.to_owned());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn expansion() {
        let lookup = |n: &str| (n == "A").then(|| "1".to_owned());
        for (text, expect) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(B)", "$(B)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$", "$"),
            ("$(A", "$(A"),
            ("a$b", "a$b"),
            ("$()", "$()"),
            ("é$(A)", "é1"),
        ] {
            assert_eq!(expand(text, lookup), expect, "{text}");
        }
    }

    fn run(container: serde_json::Value, sources: &Sources) -> Result<Vec<(String, String)>, String> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "d", "labels": {"app": "x"}},
            "spec": {"containers": [], "nodeName": "n"}, "status": {"podIP": "10.0.0.2"}}))
            .unwrap();
        let services = BTreeMap::from([("S".to_owned(), "svc".to_owned()), ("T".to_owned(), "t".to_owned())]);
        let context = Context { pod: &pod, services, sources, allocatable: &downward::Allocatable::default() };
        environment(&serde_json::from_value(container).unwrap(), &context)
    }

    #[test]
    fn order_precedence_and_references() {
        let mut sources = Sources::default();
        let map = serde_json::from_value(json!({"data": {"K": "v", "X": "from"}})).unwrap();
        sources.config_maps.insert("m".into(), Some(map));
        let secret = serde_json::from_value(json!({"data": {"P": "cHc="}})).unwrap();
        sources.secrets.insert("s".into(), Some(secret));
        let container = json!({"name": "c", "envFrom": [{"prefix": "PRE_", "configMapRef": {"name": "m"}}],
            "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)-$(S)-$(PRE_K)"}, {"name": "S", "value": "mine"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "L", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                {"name": "P", "valueFrom": {"secretKeyRef": {"name": "s", "key": "P"}}},
                {"name": "O", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "no", "optional": true}}},
                {"name": "E"}]});
        let got: BTreeMap<_, _> = run(container, &sources).unwrap().into_iter().collect();
        let expect = [
            ("A", "1"),
            ("B", "1-svc-v"),
            ("E", ""),
            ("IP", "10.0.0.2"),
            ("L", "x"),
            ("P", "pw"),
            ("PRE_K", "v"),
            ("PRE_X", "from"),
            ("S", "mine"),
            ("T", "t"),
        ];
        assert_eq!(got.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut sources = Sources::default();
        sources.config_maps.insert("m".into(), None);
        let reference = |key| json!({"name": "c", "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": key}}}]});
        assert_eq!(run(reference("k"), &sources).unwrap_err(), "configmap \"m\" not found");
        sources.config_maps.insert("m".into(), Some(ConfigMap::default()));
        assert_eq!(run(reference("k"), &sources).unwrap_err(), "couldn't find key k in ConfigMap d/m");
    }

    #[test]
    fn services() {
        let service = |ns: &str, name: &str, ip: &str| -> Service {
            serde_json::from_value(json!({"metadata": {"name": name, "namespace": ns},
                "spec": {"clusterIP": ip, "ports": [{"name": "https", "port": 443, "protocol": "TCP"}]}}))
            .unwrap()
        };
        let all = [
            service("default", "kubernetes", "10.96.0.1"),
            service("a", "my-db", "10.96.0.2"),
            service("a", "headless", "None"),
        ];
        let got = service_variables(all.iter(), "a", true);
        assert_eq!(got["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        assert_eq!(got["KUBERNETES_SERVICE_PORT_HTTPS"], "443");
        assert_eq!(got["MY_DB_PORT"], "tcp://10.96.0.2:443");
        assert_eq!(got["MY_DB_PORT_443_TCP_ADDR"], "10.96.0.2");
        assert!(!got.contains_key("HEADLESS_SERVICE_HOST"));
        assert!(!service_variables(all.iter(), "a", false).contains_key("MY_DB_PORT"));
    }
}
