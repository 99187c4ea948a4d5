//! What is kept at a number of replicas: ReplicaSets, and ReplicationControllers, which are an older form of the same
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/replicationcontroller/>).

use std::{borrow::Cow, sync::Arc};

use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ReplicaSet, ReplicaSetSpec, ReplicaSetStatus},
        core::v1::{ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus},
    },
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::Resource;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    context::Caches,
    runtime::{Informer, Object},
};

/// One of the two. Everything is decided of the ReplicaSet that it is, or would be.
pub(crate) trait Kind: Object + Serialize + DeserializeOwned + Resource<Scope = NamespaceResourceScope> {
    /// What the controller is called.
    const NAME: &'static str;
    /// The kind, as owner references have it.
    const KIND: &'static str;

    /// Where they are found.
    fn cache(caches: &Caches) -> &Arc<Informer<Self>>;
    /// The same as a ReplicaSet.
    fn as_set(&self) -> Cow<'_, ReplicaSet>;
    /// The same with this status, if it is another one.
    fn with_status(&self, status: ReplicaSetStatus) -> Option<Self>;
}

impl Kind for ReplicaSet {
    const NAME: &'static str = "replicaset";
    const KIND: &'static str = "ReplicaSet";

    fn cache(caches: &Caches) -> &Arc<Informer<Self>> {
        &caches.replica_sets
    }

    fn as_set(&self) -> Cow<'_, ReplicaSet> {
        Cow::Borrowed(self)
    }

    fn with_status(&self, status: ReplicaSetStatus) -> Option<Self> {
        (self.status.as_ref() != Some(&status)).then(|| ReplicaSet { status: Some(status), ..self.clone() })
    }
}

impl Kind for ReplicationController {
    const NAME: &'static str = "replicationcontroller";
    const KIND: &'static str = "ReplicationController";

    fn cache(caches: &Caches) -> &Arc<Informer<Self>> {
        &caches.replication_controllers
    }

    fn as_set(&self) -> Cow<'_, ReplicaSet> {
        let spec = self.spec.clone().unwrap_or_default();
        let status = self.status.clone().map(|status| ReplicaSetStatus {
            replicas: status.replicas,
            conditions: status.conditions.map(|list| list.into_iter().map(to_set).collect()),
            ..ReplicaSetStatus::default()
        });
        Cow::Owned(ReplicaSet {
            metadata: self.metadata.clone(),
            spec: ReplicaSetSpec {
                min_ready_seconds: spec.min_ready_seconds,
                replicas: spec.replicas,
                selector: LabelSelector { match_labels: spec.selector, match_expressions: None },
                template: spec.template,
            },
            status,
        })
    }

    fn with_status(&self, status: ReplicaSetStatus) -> Option<Self> {
        let status = ReplicationControllerStatus {
            available_replicas: status.available_replicas,
            conditions: status.conditions.map(|list| list.into_iter().map(from_set).collect()),
            fully_labeled_replicas: status.fully_labeled_replicas,
            observed_generation: status.observed_generation,
            ready_replicas: status.ready_replicas,
            replicas: status.replicas,
        };
        (self.status.as_ref() != Some(&status)).then(|| ReplicationController { status: Some(status), ..self.clone() })
    }
}

type SetCondition = k8s_openapi::api::apps::v1::ReplicaSetCondition;

fn to_set(condition: ReplicationControllerCondition) -> SetCondition {
    SetCondition {
        last_transition_time: condition.last_transition_time,
        message: condition.message,
        reason: condition.reason,
        status: Some(condition.status),
        type_: Some(condition.type_),
    }
}

fn from_set(condition: SetCondition) -> ReplicationControllerCondition {
    ReplicationControllerCondition {
        last_transition_time: condition.last_transition_time,
        message: condition.message,
        reason: condition.reason,
        status: condition.status.unwrap_or_default(),
        type_: condition.type_.unwrap_or_default(),
    }
}
