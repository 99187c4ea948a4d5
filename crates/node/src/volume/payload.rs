//! What the files of a volume contain. Pure.

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret},
};

use super::atomic::{File, Payload};
use crate::{downward, pod};

fn add(payload: &mut Payload, path: &str, content: &[u8], mode: i32, owner: Option<i64>) {
    let owner = owner.and_then(|o| u32::try_from(o).ok());
    payload.insert(path.to_owned(), File { content: content.to_vec(), mode: mode as u32 & 0o777, owner });
}

/// Puts the chosen keys (all of them, if none is named) into the payload.
fn choose<'a>(
    payload: &mut Payload,
    data: &[(&'a str, &'a [u8])],
    items: Option<&Vec<KeyToPath>>,
    default_mode: i32,
    optional: bool,
    kind: &str,
) -> Result<(), String> {
    match items.filter(|i| !i.is_empty()) {
        None => data.iter().for_each(|(key, value)| add(payload, key, value, default_mode, None)),
        Some(items) => {
            for item in items {
                match data.iter().find(|(key, _)| *key == item.key) {
                    Some((_, value)) => add(payload, &item.path, value, item.mode.unwrap_or(default_mode), item.user),
                    None if optional => {}
                    None => return Err(format!("references non-existent {kind} key: {}", item.key)),
                }
            }
        }
    }
    Ok(())
}

/// A config map's keys as files.
pub fn config_map(
    payload: &mut Payload,
    map: &ConfigMap,
    items: Option<&Vec<KeyToPath>>,
    mode: i32,
    optional: bool,
) -> Result<(), String> {
    let text = map.data.iter().flatten().map(|(k, v)| (k.as_str(), v.as_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(k, ByteString(v))| (k.as_str(), v.as_slice()));
    choose(payload, &text.chain(binary).collect::<Vec<_>>(), items, mode, optional, "config")
}

/// A secret's keys as files.
pub fn secret(
    payload: &mut Payload,
    secret: &Secret,
    items: Option<&Vec<KeyToPath>>,
    mode: i32,
    optional: bool,
) -> Result<(), String> {
    let data: Vec<_> = secret.data.iter().flatten().map(|(k, ByteString(v))| (k.as_str(), v.as_slice())).collect();
    choose(payload, &data, items, mode, optional, "secret")
}

/// Fields of the pod as files.
pub fn downward_api(
    payload: &mut Payload,
    of: &Pod,
    items: Option<&Vec<DownwardAPIVolumeFile>>,
    default_mode: i32,
    node: &downward::Allocatable,
) -> Result<(), String> {
    for item in items.into_iter().flatten() {
        let value = if let Some(field) = &item.field_ref {
            downward::field(of, &field.field_path)?
        } else if let Some(resource) = &item.resource_field_ref {
            let name = resource.container_name.as_deref().unwrap_or_default();
            let Some((_, container)) = of.spec.as_ref().and_then(|s| pod::find_container(s, name)) else {
                return Err(format!("resourceFieldRef names container {name:?}, which the pod does not have"));
            };
            downward::resource(&container, resource, node)?
        } else {
            continue;
        };
        add(payload, &item.path, value.as_bytes(), item.mode.unwrap_or(default_mode), item.user);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_and_items() {
        let map: ConfigMap =
            serde_json::from_value(json!({"data": {"a": "1", "b": "2"}, "binaryData": {"c": "AAE="}})).unwrap();
        let mut all = Payload::new();
        config_map(&mut all, &map, None, 0o644, false).unwrap();
        assert_eq!(all.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(all["c"].content, [0, 1]);
        let items: Vec<KeyToPath> =
            serde_json::from_value(json!([{"key": "a", "path": "x/y", "mode": 0o400}])).unwrap();
        let mut some = Payload::new();
        config_map(&mut some, &map, Some(&items), 0o644, false).unwrap();
        assert_eq!((some.len(), some["x/y"].mode), (1, 0o400));
        let items: Vec<KeyToPath> = serde_json::from_value(json!([{"key": "no", "path": "n"}])).unwrap();
        let error = config_map(&mut Payload::new(), &map, Some(&items), 0o644, false).unwrap_err();
        assert_eq!(error, "references non-existent config key: no");
        assert!(config_map(&mut Payload::new(), &map, Some(&items), 0o644, true).is_ok());
    }
}
