//! The table of resources. What a resource needs beyond a schema stands in its own file.

use crate::row::{Row, Subresource, row};

mod admission;
mod api_service;
mod autoscaling;
mod autoscaling_rules;
mod certificate_signing_request;
mod claim;
mod cluster_trust_bundle;
mod config;
mod container;
mod coordination;
mod cron_job;
mod csi;
mod custom_resource_definition;
mod daemonset;
mod deployment;
mod discovery;
mod dra;
mod event;
mod flow;
mod ingress;
mod ip;
mod job;
mod job_policy;
mod job_status;
mod meta;
mod namespace;
mod networking;
mod node;
mod pod;
mod pod_certificate_request;
mod pod_claims;
pub mod pod_resize;
mod pod_resources;
pub mod pod_spec;
mod policy;
mod priority_class;
mod quota;
mod rbac;
mod reference;
mod replicaset;
mod revision;
mod runtime_class;
mod security_context;
mod service;
mod service_ips;
mod statefulset;
mod storage;
mod storage_class;
mod storage_version_migration;
mod template;
#[cfg(test)]
mod testing;
mod volume;
mod windows_options;

pub use meta::validate_metadata;
pub use service::needs_health_check;
pub use service_ips::{cluster_ips, settle_families};

/// Sets `object[key]` if it is not set.
pub(crate) fn default(object: &mut serde_json::Value, key: &str, value: impl Into<serde_json::Value>) {
    if let Some(object) = object.as_object_mut()
        && !object.contains_key(key)
    {
        object.insert(key.to_owned(), value.into());
    }
}

/// The items of the list `object[key]`.
pub(crate) fn items<'a>(object: &'a serde_json::Value, key: &str) -> impl Iterator<Item = &'a serde_json::Value> {
    object[key].as_array().into_iter().flatten()
}

/// The items of the list `object[key]`, to change them. Does not create the list.
pub(crate) fn items_mut<'a>(
    object: &'a mut serde_json::Value,
    key: &str,
) -> impl Iterator<Item = &'a mut serde_json::Value> {
    object.get_mut(key).and_then(serde_json::Value::as_array_mut).into_iter().flatten()
}

fn drop_status(object: &mut serde_json::Value) {
    if let Some(object) = object.as_object_mut() {
        object.remove("status");
    }
}

const STATUS: &[Subresource] = &[Subresource::Status];

/// A row with a status that only `/status` writes.
fn with_status(row: Row) -> Row {
    Row { subresources: STATUS, prepare_create: drop_status, generation: true, ..row }
}

/// All built-in resources, in the order in which discovery lists them.
pub fn all() -> Vec<Row> {
    use k8s_openapi::api::{authentication::v1 as authentication, authorization::v1 as authorization};
    let review = |row: Row| Row { stored: false, ..row };
    let [
        mutating_webhooks,
        validating_webhooks,
        validating_policy,
        validating_binding,
        mutating_policy,
        mutating_binding,
    ] = admission::rows();
    let [resource_claim, resource_claim_template, resource_slice, device_class, device_taint_rule] = dra::rows();
    let [cluster_role_binding, cluster_role, role, role_binding] = rbac::rows();
    vec![
        pod::row(),
        service::row(),
        discovery::endpoints(),
        node::row(),
        namespace::row(),
        config::config_map(),
        config::secret(),
        config::service_account(),
        event::row(),
        quota::limit_range(),
        quota::resource_quota(),
        storage::row(),
        claim::row(),
        template::pod_template(),
        replicaset::replication_controller(),
        deployment::row(),
        replicaset::row(),
        statefulset::row(),
        daemonset::row(),
        revision::row(),
        job::row(),
        cron_job::row(),
        autoscaling::row(),
        discovery::endpoint_slice(),
        coordination::row(),
        policy::row(),
        networking::policy(),
        ingress::row(),
        networking::class(),
        networking::address(),
        networking::cidr(),
        cluster_role_binding,
        cluster_role,
        role,
        role_binding,
        storage_class::row(),
        csi::driver(),
        csi::node(),
        csi::capacity(),
        csi::attachment(),
        storage_class::attributes(),
        priority_class::row(),
        runtime_class::row(),
        certificate_signing_request::row(),
        pod_certificate_request::row(),
        cluster_trust_bundle::row(),
        mutating_webhooks,
        validating_webhooks,
        validating_policy,
        validating_binding,
        mutating_policy,
        mutating_binding,
        flow::schema(),
        flow::level(),
        resource_claim,
        resource_claim_template,
        resource_slice,
        device_class,
        device_taint_rule,
        storage_version_migration::row(),
        custom_resource_definition::row(),
        api_service::row(),
        review(row::<authentication::SelfSubjectReview>()),
        review(row::<authentication::TokenReview>()),
        review(row::<authorization::LocalSubjectAccessReview>()),
        review(row::<authorization::SelfSubjectAccessReview>()),
        review(row::<authorization::SelfSubjectRulesReview>()),
        review(row::<authorization::SubjectAccessReview>()),
    ]
}
