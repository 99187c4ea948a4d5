//! Pods' volumes: made before the first container, kept up to date while the pod lives, taken away after the last.
//!
//! <https://kubernetes.io/docs/concepts/storage/volumes/>

pub mod atomic;
pub mod mount;
pub mod payload;

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        core::v1::{
            ConfigMap, HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, ProjectedVolumeSource,
            Secret, ServiceAccount, ServiceAccountTokenProjection, Volume,
        },
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Api, Client, api::PostParams};

use self::atomic::Payload;
use crate::{downward::Allocatable, env, huge_pages, objects::Key, pod};

/// Why a volume is not there; the pod waits and it is tried again.
#[derive(Clone, Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume {volume:?} : {message}")]
pub struct Error {
    /// The volume's name in the pod.
    pub volume: String,
    /// What is wrong.
    pub message: String,
}

#[derive(Clone)]
struct Token {
    value: String,
    renew: Timestamp,
}

/// Makes and keeps the volumes of one pod.
pub struct Volumes {
    client: Client,
    directory: PathBuf,
    tokens: HashMap<String, Token>,
}

/// Where the pod's own files are.
pub fn pod_directory(data: &Path, uid: &str) -> PathBuf {
    data.join("pods").join(uid)
}

/// What was made.
#[derive(Clone, Debug, Default)]
pub struct Made {
    /// The directory or file on the host, by volume name.
    pub paths: HashMap<String, PathBuf>,
    /// When a token has to be renewed.
    pub renew: Option<Timestamp>,
}

impl Volumes {
    /// For the pod whose files are in `directory`.
    pub fn new(client: Client, directory: PathBuf) -> Self {
        Self { client, directory, tokens: HashMap::new() }
    }

    /// Makes every volume, or brings it up to date. Doing so again is cheap and changes nothing that is right already.
    pub async fn make(&mut self, pod: &Pod, node: &Allocatable) -> Result<Made, Error> {
        let mut made = Made::default();
        let volumes = pod.spec.as_ref().and_then(|s| s.volumes.clone()).unwrap_or_default();
        for volume in &volumes {
            let result = self.one(pod, volume, node, &mut made.renew).await;
            let path = result.map_err(|message| Error { volume: volume.name.clone(), message })?;
            made.paths.insert(volume.name.clone(), path);
        }
        Ok(made)
    }

    fn path(&self, kind: &str, name: &str) -> PathBuf {
        self.directory.join("volumes").join(format!("kubernetes.io~{kind}")).join(name)
    }

    async fn one(
        &mut self,
        pod: &Pod,
        volume: &Volume,
        node: &Allocatable,
        renew: &mut Option<Timestamp>,
    ) -> Result<PathBuf, String> {
        let name = &volume.name;
        let group = fs_group(pod);
        if let Some(source) = &volume.host_path {
            return host_path(source);
        }
        if let Some(source) = &volume.empty_dir {
            let path = self.path("empty-dir", name);
            let medium = match source.medium.as_deref().unwrap_or_default() {
                "" => Medium::Disk,
                "Memory" => Medium::Memory,
                other => {
                    let spec = pod.spec.as_ref().ok_or("the pod has no spec")?;
                    Medium::HugePages(huge_pages::of_medium(other, spec)?.ok_or_else(|| {
                        format!("unknown storage medium {other:?}: use Memory, HugePages or HugePages-SIZE")
                    })?)
                }
            };
            let size =
                source.size_limit.as_ref().and_then(|q| pod::quantity::units(&q.0)).and_then(|s| u64::try_from(s).ok());
            let mode = source.mode.map_or(0o777, |m| m as u32 & 0o7777);
            return blocking(move || empty_dir(&path, medium, size.filter(|s| *s > 0), mode, group).map(|()| path))
                .await;
        }
        if let Some(source) = &volume.persistent_volume_claim {
            return self.claim(pod, &source.claim_name).await;
        }
        let mut payload = Payload::new();
        let (path, in_memory) = if let Some(source) = &volume.config_map {
            let optional = source.optional == Some(true);
            if let Some(map) = self.config_map(pod, &source.name, optional).await? {
                payload::config_map(
                    &mut payload,
                    &map,
                    source.items.as_ref(),
                    source.default_mode.unwrap_or(0o644),
                    optional,
                )?;
            }
            (self.path("configmap", name), false)
        } else if let Some(source) = &volume.secret {
            let optional = source.optional == Some(true);
            let secret_name = source.secret_name.as_deref().unwrap_or_default();
            if let Some(secret) = self.secret(pod, secret_name, optional).await? {
                payload::secret(
                    &mut payload,
                    &secret,
                    source.items.as_ref(),
                    source.default_mode.unwrap_or(0o644),
                    optional,
                )?;
            }
            (self.path("secret", name), true)
        } else if let Some(source) = &volume.downward_api {
            payload::downward_api(
                &mut payload,
                pod,
                source.items.as_ref(),
                source.default_mode.unwrap_or(0o644),
                node,
            )?;
            (self.path("downward-api", name), true)
        } else if let Some(source) = &volume.projected {
            self.projected(pod, name, source, node, &mut payload, renew).await?;
            (self.path("projected", name), true)
        } else {
            return Err("this volume type is not supported; use emptyDir, hostPath, configMap, secret, downwardAPI, projected or a persistentVolumeClaim on a local volume".into());
        };
        blocking(move || {
            if in_memory {
                mount::tmpfs(&path, None)?;
            }
            fs::create_dir_all(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(if group.is_some() { 0o2775 } else { 0o755 }))?;
            std::os::unix::fs::chown(&path, None, group)?;
            atomic::write(&path, &payload, group, Timestamp::now())?;
            Ok(path)
        })
        .await
    }

    async fn projected(
        &mut self,
        pod: &Pod,
        volume: &str,
        source: &ProjectedVolumeSource,
        node: &Allocatable,
        payload: &mut Payload,
        renew: &mut Option<Timestamp>,
    ) -> Result<(), String> {
        let mode = source.default_mode.unwrap_or(0o644);
        for projection in source.sources.iter().flatten() {
            if let Some(source) = &projection.config_map {
                let optional = source.optional == Some(true);
                if let Some(map) = self.config_map(pod, &source.name, optional).await? {
                    payload::config_map(payload, &map, source.items.as_ref(), mode, optional)?;
                }
            } else if let Some(source) = &projection.secret {
                let optional = source.optional == Some(true);
                if let Some(secret) = self.secret(pod, &source.name, optional).await? {
                    payload::secret(payload, &secret, source.items.as_ref(), mode, optional)?;
                }
            } else if let Some(source) = &projection.downward_api {
                payload::downward_api(payload, pod, source.items.as_ref(), mode, node)?;
            } else if let Some(source) = &projection.service_account_token {
                let token = self.token(pod, volume, source).await?;
                *renew = Some(renew.map_or(token.renew, |r| r.min(token.renew)));
                let user = source.user.or(source_user(pod));
                // As upstream: readable by its user alone, unless the pod says nothing about users.
                let mode = if user.is_some() || fs_group(pod).is_some() { 0o600 } else { mode as u32 & 0o777 };
                let file = atomic::File {
                    content: token.value.into_bytes(),
                    mode,
                    owner: user.and_then(|u| u32::try_from(u).ok()),
                };
                payload.insert(source.path.clone(), file);
            } else {
                return Err("a projected volume holds configMap, secret, downwardAPI or serviceAccountToken sources; this one is of another kind".into());
            }
        }
        Ok(())
    }

    async fn config_map(&self, pod: &Pod, name: &str, optional: bool) -> Result<Option<ConfigMap>, String> {
        get(&self.client, pod::namespace(pod), name, "configmap", optional).await
    }

    async fn secret(&self, pod: &Pod, name: &str, optional: bool) -> Result<Option<Secret>, String> {
        get(&self.client, pod::namespace(pod), name, "secret", optional).await
    }

    /// A token for the pod's service account, bound to the pod, renewed after 80% of its life or a day.
    /// <https://kubernetes.io/docs/concepts/storage/projected-volumes/#serviceaccounttoken>
    async fn token(
        &mut self,
        pod: &Pod,
        volume: &str,
        source: &ServiceAccountTokenProjection,
    ) -> Result<Token, String> {
        let key = format!("{volume}/{}", source.path);
        let now = Timestamp::now();
        if let Some(token) = self.tokens.get(&key)
            && token.renew > now
        {
            return Ok(token.clone());
        }
        let spec = pod.spec.as_ref();
        let account = spec.and_then(|s| s.service_account_name.as_deref()).unwrap_or("default");
        let request = TokenRequest {
            metadata: ObjectMeta::default(),
            spec: Some(TokenRequestSpec {
                audiences: Some(source.audience.iter().filter(|a| !a.is_empty()).cloned().collect()),
                expiration_seconds: Some(source.expiration_seconds.unwrap_or(3600)),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
                ..Default::default()
            }),
            status: None,
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), pod::namespace(pod));
        let reply: Result<TokenRequest, _> =
            api.create_subresource("token", account, &PostParams::default(), &request).await;
        let status =
            reply.map_err(|e| format!("failed to fetch token: {}", api_message(&e)))?.status.unwrap_or_default();
        let value = status.token.filter(|t| !t.is_empty()).ok_or("the API server returned an empty token")?;
        let life = status.expiration_timestamp.map(|e| e.0.duration_since(now)).unwrap_or_default().as_secs().max(10);
        let token =
            Token { value, renew: now + std::time::Duration::from_secs((life * 8 / 10).min(86_400).unsigned_abs()) };
        self.tokens.insert(key, token.clone());
        Ok(token)
    }

    /// A claim on a volume that is a directory of this node.
    async fn claim(&self, pod: &Pod, name: &str) -> Result<PathBuf, String> {
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), pod::namespace(pod));
        let claim =
            claims.get(name).await.map_err(|e| format!("persistentvolumeclaim {name:?}: {}", api_message(&e)))?;
        let Some(volume) = claim.spec.and_then(|s| s.volume_name).filter(|v| !v.is_empty()) else {
            return Err(format!("persistentvolumeclaim {name:?} is not bound"));
        };
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let spec =
            volumes.get(&volume).await.map_err(|e| format!("persistentvolume {volume:?}: {}", api_message(&e)))?.spec;
        match spec.map(|s| (s.host_path, s.local)) {
            Some((Some(source), _)) => host_path(&source),
            Some((_, Some(local))) => {
                host_path(&HostPathVolumeSource { path: local.path, type_: Some("Directory".into()) })
            }
            _ => Err(format!(
                "persistentvolume {volume:?} is neither hostPath nor local, which are the kinds supported so far"
            )),
        }
    }
}

/// Unmounts and removes everything of a pod.
pub async fn remove(data: &Path, uid: &str) -> std::io::Result<()> {
    let directory = pod_directory(data, uid);
    tokio::task::spawn_blocking(move || mount::remove_tree(&directory)).await.map_err(std::io::Error::other)?
}

/// The config maps and secrets whose changes concern a pod.
pub fn watched(pod: &Pod) -> BTreeSet<Key> {
    let namespace = pod::namespace(pod).to_owned();
    let map = |name: &str| Key::ConfigMap(namespace.clone(), name.to_owned());
    let secret = |name: &str| Key::Secret(namespace.clone(), name.to_owned());
    let mut keys = BTreeSet::new();
    let Some(spec) = &pod.spec else { return keys };
    for volume in spec.volumes.iter().flatten() {
        keys.extend(volume.config_map.iter().map(|s| map(&s.name)));
        keys.extend(volume.secret.iter().filter_map(|s| s.secret_name.as_deref()).map(secret));
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            keys.extend(source.config_map.iter().map(|s| map(&s.name)));
            keys.extend(source.secret.iter().map(|s| secret(&s.name)));
        }
    }
    for container in pod::containers(spec) {
        let (maps, secrets) = env::references(container.spec);
        keys.extend(maps.iter().map(|n| map(n)));
        keys.extend(secrets.iter().map(|n| secret(n)));
    }
    keys
}

/// Gets an object; one that does not exist is an error unless it is optional.
pub async fn get<K>(
    client: &Client,
    namespace: &str,
    name: &str,
    kind: &str,
    optional: bool,
) -> Result<Option<K>, String>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + serde::de::DeserializeOwned
        + std::fmt::Debug,
{
    match Api::<K>::namespaced(client.clone(), namespace).get_opt(name).await {
        Ok(Some(object)) => Ok(Some(object)),
        Ok(None) if optional => Ok(None),
        Ok(None) => Err(format!("{kind} {name:?} not found")),
        Err(error) => Err(format!("{kind} {name:?}: {}", api_message(&error))),
    }
}

/// The message of an API error, without the client's decoration.
pub fn api_message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

/// The user that all of the pod's containers run as, if it is one and known.
fn source_user(pod: &Pod) -> Option<i64> {
    let spec = pod.spec.as_ref()?;
    let default = spec.security_context.as_ref().and_then(|c| c.run_as_user);
    let mut users =
        pod::containers(spec).map(|c| c.spec.security_context.as_ref().and_then(|s| s.run_as_user).or(default));
    let first = users.next()??;
    users.all(|u| u == Some(first)).then_some(first)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// What an emptyDir is kept in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Medium {
    Disk,
    Memory,
    /// Of this size, in bytes.
    HugePages(u64),
}

fn empty_dir(path: &Path, medium: Medium, size: Option<u64>, mode: u32, group: Option<u32>) -> std::io::Result<()> {
    // Made once: what containers do to it afterwards is theirs.
    if path.exists() && (medium == Medium::Disk || mount::is_mount_point(path)?) {
        return Ok(());
    }
    match medium {
        Medium::Disk => {}
        Medium::Memory => mount::tmpfs(path, size)?,
        Medium::HugePages(page) => mount::huge_pages(path, page, size)?,
    }
    fs::create_dir_all(path)?;
    let mode = if group.is_some() { mode | 0o2070 } else { mode };
    std::os::unix::fs::chown(path, None, group)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Checks a hostPath's type, making what it says to make.
/// <https://kubernetes.io/docs/concepts/storage/volumes/#hostpath-volume-types>
fn host_path(source: &HostPathVolumeSource) -> Result<PathBuf, String> {
    let path = PathBuf::from(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let text = |e: std::io::Error| format!("hostPath {}: {e}", source.path);
    let meta = fs::metadata(&path);
    match kind {
        "" => {
            // The runtime makes a missing directory by itself in this case; we do, so that a subPath can be bound.
            if meta.is_err() {
                fs::create_dir_all(&path).map_err(text)?;
            }
            return Ok(path);
        }
        "DirectoryOrCreate" if meta.is_err() => fs::create_dir_all(&path).map_err(text)?,
        "FileOrCreate" if meta.is_err() => {
            fs::File::create(&path).map_err(text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(text)?;
        }
        _ => {}
    }
    let kind_of = fs::metadata(&path).map(|m| (m.file_type(), m.uid()));
    let wrong = |what: &str| Err(format!("hostPath type check failed: {} is not {what}", source.path));
    let Ok((file_type, _)) = kind_of else {
        return match kind {
            "Directory" | "DirectoryOrCreate" => wrong("a directory"),
            "File" | "FileOrCreate" => wrong("a file"),
            "Socket" => wrong("a socket file"),
            "CharDevice" => wrong("a character device"),
            _ => wrong("a block device"),
        };
    };
    match kind {
        "Directory" | "DirectoryOrCreate" if !file_type.is_dir() => wrong("a directory"),
        "File" | "FileOrCreate" if !file_type.is_file() => wrong("a file"),
        "Socket" if !file_type.is_socket() => wrong("a socket file"),
        "CharDevice" if !file_type.is_char_device() => wrong("a character device"),
        "BlockDevice" if !file_type.is_block_device() => wrong("a block device"),
        _ => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_path_types() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        fs::write(at("file"), b"").unwrap();
        let check =
            |name: &str, kind: &str| host_path(&HostPathVolumeSource { path: at(name), type_: Some(kind.into()) });
        assert!(check("file", "File").is_ok());
        let error = check("file", "Directory").unwrap_err();
        assert!(error.contains("hostPath type check failed") && error.contains("is not a directory"), "{error}");
        assert!(check("none", "Directory").is_err());
        assert!(check("made", "DirectoryOrCreate").is_ok() && Path::new(&at("made")).is_dir());
        assert!(check("made-file", "FileOrCreate").is_ok() && Path::new(&at("made-file")).is_file());
        assert!(check("file", "Socket").is_err());
    }
}
