//! What the controllers are given: the caches, the client, and the few ways in which they write.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        admissionregistration::v1::ValidatingAdmissionPolicy,
        apps::v1::{ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet},
        autoscaling::v2::HorizontalPodAutoscaler,
        batch::v1::{CronJob, Job},
        certificates::v1::CertificateSigningRequest,
        coordination::v1::Lease,
        core::v1::{
            ConfigMap, Endpoints, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController,
            ResourceQuota, Secret, Service, ServiceAccount,
        },
        discovery::v1::EndpointSlice,
        policy::v1::PodDisruptionBudget,
        rbac::v1::ClusterRole,
    },
};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    runtime::watcher,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    runtime::{Informer, Object, Recorder, is_not_found, objects},
};

macro_rules! caches {
    ($($(#[$doc:meta])* $field:ident: $kind:ty = $config:expr,)*) => {
        /// One cache per kind that any controller looks at.
        #[derive(Default)]
        pub struct Caches {
            $($(#[$doc])* pub $field: Arc<Informer<$kind>>,)*
        }

        impl Caches {
            /// Begins to watch. The controllers must have subscribed before.
            pub(crate) fn start(&self, tasks: &mut JoinSet<()>, client: &Client, shutdown: &CancellationToken) {
                $(tasks.spawn(self.$field.clone().run(Api::all(client.clone()), $config, shutdown.clone()));)*
            }
        }
    };
}

/// One stream that begins with what is there (KEP-3157), instead of a list and then a watch.
fn streaming() -> watcher::Config {
    watcher::Config::default().streaming_lists()
}

caches! {
    /// Pods.
    pods: Pod = streaming(),
    /// Nodes.
    nodes: Node = streaming(),
    /// The Leases of nodes.
    leases: Lease = streaming().fields("metadata.namespace=kube-node-lease"),
    /// Namespaces.
    namespaces: Namespace = streaming(),
    /// Services.
    services: Service = streaming(),
    /// Endpoint slices.
    endpoint_slices: EndpointSlice = streaming(),
    /// Endpoints.
    endpoints: Endpoints = streaming(),
    /// Service accounts.
    service_accounts: ServiceAccount = streaming().fields("metadata.name=default"),
    /// The copies of the cluster's CA.
    root_certificates: ConfigMap = streaming().fields("metadata.name=kube-root-ca.crt"),
    /// Deployments.
    deployments: Deployment = streaming(),
    /// Replica sets.
    replica_sets: ReplicaSet = streaming(),
    /// Replication controllers.
    replication_controllers: ReplicationController = streaming(),
    /// Jobs.
    jobs: Job = streaming(),
    /// Cron jobs.
    cron_jobs: CronJob = streaming(),
    /// Autoscalers.
    autoscalers: HorizontalPodAutoscaler = streaming(),
    /// Stateful sets.
    stateful_sets: StatefulSet = streaming(),
    /// Daemon sets.
    daemon_sets: DaemonSet = streaming(),
    /// Revisions of stateful and daemon sets.
    revisions: ControllerRevision = streaming(),
    /// Volumes.
    volumes: PersistentVolume = streaming(),
    /// Volume claims.
    claims: PersistentVolumeClaim = streaming(),
    /// Disruption budgets.
    budgets: PodDisruptionBudget = streaming(),
    /// Quotas.
    quotas: ResourceQuota = streaming(),
    /// Requests for certificates.
    signing_requests: CertificateSigningRequest = streaming(),
    /// Roles of the cluster.
    cluster_roles: ClusterRole = streaming(),
    /// Policies that allow or refuse.
    validating_policies: ValidatingAdmissionPolicy = streaming(),
    /// Secrets that are bootstrap tokens.
    bootstrap_tokens: Secret = streaming().fields("type=bootstrap.kubernetes.io/token"),
    /// Secrets that are tokens of service accounts.
    legacy_tokens: Secret = streaming().fields("type=kubernetes.io/service-account-token"),
}

/// What tells the time.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// Shared by all controllers.
pub struct Context {
    /// The API.
    pub client: Client,
    /// What the cluster's operator chose.
    pub config: Config,
    /// Where events go.
    pub recorder: Recorder,
    /// What is known.
    pub caches: Caches,
    /// The time that is written into objects.
    pub clock: Clock,
}

impl Context {
    /// The time.
    pub fn now(&self) -> Timestamp {
        (self.clock)()
    }

    /// The objects of one namespace.
    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Creates an object, and sees it in the cache at once.
    pub async fn create<K>(&self, cache: &Informer<K>, namespace: &str, object: &K) -> kube::Result<K>
    where
        K: Object + Serialize + Resource<Scope = NamespaceResourceScope>,
    {
        let created = self.api::<K>(namespace).create(&PostParams::default(), object).await?;
        cache.note(created.clone());
        Ok(created)
    }

    /// Deletes exactly this object. That it is gone already is fine.
    pub async fn delete<K>(&self, cache: &Informer<K>, object: &K, mut params: DeleteParams) -> kube::Result<()>
    where
        K: Object + Resource<Scope = NamespaceResourceScope>,
    {
        params.preconditions = Some(Preconditions { uid: object.meta().uid.clone(), resource_version: None });
        let api = self.api::<K>(objects::namespace(object));
        match api.delete(objects::name(object), &params).await {
            // The object while it is on its way out, or what it was when it went.
            Ok(answer) => match answer.left() {
                Some(left) if objects::is_deleting(&left) && objects::uid(&left) == objects::uid(object) => {
                    cache.note(left);
                }
                _ => cache.note_gone(object),
            },
            Err(error) if is_not_found(&error) => cache.note_gone(object),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Notes on a pod that is about to be deleted that this is by no fault of its own: reason and message (KEP-3329). `fail`
    /// is for one of which nobody else will say that it has ended.
    pub async fn disrupt(&self, pod: &Pod, fail: bool, why: Option<(&str, &str)>) -> kube::Result<()> {
        let mut status = serde_json::json!({});
        if let Some((reason, message)) = why {
            status["conditions"] = serde_json::json!([{
                "type": "DisruptionTarget", "status": "True", "reason": reason, "message": message,
                "lastTransitionTime": self.now().to_string(),
            }]);
        }
        if fail {
            status["phase"] = "Failed".into();
        }
        let patch = serde_json::json!({"metadata": {"uid": objects::uid(pod)}, "status": status});
        let api = self.api::<Pod>(objects::namespace(pod));
        match api.patch_status(objects::name(pod), &PatchParams::default(), &Patch::Strategic(patch)).await {
            Ok(patched) => self.caches.pods.note(patched),
            // It is gone, or another one has its name: there is nothing to note.
            Err(error) if is_not_found(&error) => {}
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Changes an object by a merge patch.
    pub async fn patch<K>(&self, cache: &Informer<K>, object: &K, patch: Value) -> kube::Result<K>
    where
        K: Object + Resource<Scope = NamespaceResourceScope>,
    {
        let api = self.api::<K>(objects::namespace(object));
        let patched = api.patch(objects::name(object), &PatchParams::default(), &Patch::Merge(patch)).await?;
        cache.note(patched.clone());
        Ok(patched)
    }

    /// Replaces an object's status, if the object is still the one that was looked at.
    pub async fn replace_status<K>(&self, cache: &Informer<K>, object: &K) -> kube::Result<K>
    where
        K: Object + Serialize + DeserializeOwned + Resource<Scope = NamespaceResourceScope>,
    {
        let api = self.api::<K>(objects::namespace(object));
        let updated = api.replace_status(objects::name(object), &PostParams::default(), object).await?;
        cache.note(updated.clone());
        Ok(updated)
    }
}

/// The sooner of two appointments.
pub(crate) fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// A span of `jiff` as a delay; what lies in the past is now.
pub(crate) fn delay(span: jiff::SignedDuration) -> Duration {
    Duration::try_from(span).unwrap_or(Duration::ZERO)
}
