//! Certificates: requests are approved, signed, and forgotten when they are old
//! (<https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/>).
//!
//! Upstream's csrapproving, csrsigning and csrcleaner in one. Beside the certificates with which nodes are clients, it
//! approves those with which they serve, if their names are those of the Node: a person who would approve them could
//! not look at more than that.

mod authority;
mod plan;
#[cfg(test)]
mod plan_tests;

use std::{net::IpAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use seawall_api::certificate_request::{CertificateRequest, KUBELET_SERVING};
use serde_json::{Value, json};

pub use authority::{Authority, AuthorityError, IssueError};
pub use plan::{Facts, Plan, Step, plan};

use crate::{
    context::Context,
    runtime::{
        Controller, Key, Queue,
        events::Severity,
        is_not_found,
        objects::{name, uid},
    },
};

/// How long a request that nobody can sign now is left alone.
const UNSIGNED: Duration = Duration::from_secs(30);

pub(crate) struct Certificates {
    context: Arc<Context>,
}

impl Certificates {
    pub(crate) fn start(context: Arc<Context>) -> (Arc<dyn Controller>, Arc<Queue>) {
        let queue = Arc::new(Queue::new());
        let q = queue.clone();
        context.caches.signing_requests.on_change(move |_, new| {
            if let Some(csr) = new {
                q.add(Key::of(&**csr));
            }
        });
        // A node asks for a serving certificate while its addresses are still on their way.
        let (q, requests) = (queue.clone(), context.caches.signing_requests.clone());
        context.caches.nodes.on_change(move |old, new| {
            let addresses = |node: &Arc<k8s_openapi::api::core::v1::Node>| {
                (node.status.as_ref().and_then(|s| s.addresses.clone()), node.metadata.labels.clone())
            };
            if old.map(addresses) == new.map(addresses) {
                return;
            }
            for csr in requests.all() {
                let undecided = csr.status.as_ref().is_none_or(|s| s.conditions.as_ref().is_none_or(Vec::is_empty));
                if csr.spec.signer_name == KUBELET_SERVING && undecided {
                    q.add(Key::of(&*csr));
                }
            }
        });
        (Arc::new(Certificates { context }), queue)
    }

    fn api(&self) -> Api<CertificateSigningRequest> {
        Api::all(self.context.client.clone())
    }

    /// Adds a condition, unless the request has changed since it was looked at.
    async fn conclude(
        &self,
        csr: &CertificateSigningRequest,
        ty: &str,
        reason: &str,
        message: &str,
    ) -> kube::Result<()> {
        let mut conditions: Vec<Value> =
            csr.status.iter().flat_map(|s| s.conditions.iter().flatten()).map(|c| json!(c)).collect();
        conditions.push(json!({"type": ty, "status": "True", "reason": reason, "message": message,
            "lastUpdateTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()}));
        let patch = self.patch(csr, json!({"conditions": conditions}));
        let params = PatchParams::default();
        let written = match ty {
            "Approved" => self.api().patch_approval(name(csr), &params, &patch).await?,
            _ => self.api().patch_status(name(csr), &params, &patch).await?,
        };
        self.context.caches.signing_requests.note(written);
        Ok(())
    }

    fn patch(&self, csr: &CertificateSigningRequest, status: Value) -> Patch<Value> {
        Patch::Merge(json!({"metadata": {"resourceVersion": csr.metadata.resource_version}, "status": status}))
    }

    async fn sign(&self, csr: &CertificateSigningRequest) -> anyhow::Result<Option<Duration>> {
        let config = &self.context.config;
        let Some(authority) = &config.authority else {
            tracing::debug!(request = name(csr), "approved, but the cluster's authority signs nothing here");
            return Ok(Some(UNSIGNED));
        };
        let request = CertificateRequest::from_pem(&csr.spec.request.0)?;
        let usages = csr.spec.usages.clone().unwrap_or_default();
        let seconds = csr.spec.expiration_seconds;
        match authority.issue(&request, &usages, seconds, config.certificate_duration, Timestamp::now()) {
            Ok(pem) => {
                let patch = self.patch(csr, json!({"certificate": STANDARD.encode(pem)}));
                let signed = self.api().patch_status(name(csr), &PatchParams::default(), &patch).await?;
                self.context.caches.signing_requests.note(signed);
                tracing::info!(request = name(csr), subject = request.common_name, "a certificate was signed");
                Ok(None)
            }
            Err(IssueError::Request(why)) => {
                self.conclude(csr, "Failed", "SignerValidationFailure", &why).await?;
                Ok(None)
            }
            Err(IssueError::Authority(why)) => {
                tracing::error!(request = name(csr), why, "a certificate cannot be signed");
                Ok(Some(UNSIGNED))
            }
        }
    }
}

/// The addresses of API servers: the endpoints of the Service `kubernetes`.
fn servers(context: &Context) -> Vec<IpAddr> {
    let slices = context.caches.endpoint_slices.in_namespace("default");
    let of_api = slices.iter().filter(|slice| {
        let labels = slice.metadata.labels.as_ref();
        labels.and_then(|l| l.get("kubernetes.io/service-name")).is_some_and(|s| s == "kubernetes")
    });
    of_api
        .flat_map(|slice| slice.endpoints.iter().flatten())
        .flat_map(|e| &e.addresses)
        .filter_map(|a| a.parse().ok())
        .collect()
}

/// When the certificate of a request ends.
fn issued_until(csr: &CertificateSigningRequest) -> Option<Timestamp> {
    use x509_cert::der::DecodePem as _;
    let pem = &csr.status.as_ref()?.certificate.as_ref()?.0;
    let certificate = x509_cert::Certificate::from_pem(pem).ok()?;
    let end = certificate.tbs_certificate.validity.not_after.to_unix_duration();
    Timestamp::from_second(i64::try_from(end.as_secs()).ok()?).ok()
}

#[async_trait]
impl Controller for Certificates {
    fn name(&self) -> &'static str {
        "certificates"
    }

    async fn ready(&self) {
        self.context.caches.signing_requests.synced().await;
        self.context.caches.nodes.synced().await;
        self.context.caches.endpoint_slices.synced().await;
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Option<Duration>> {
        let cache = &self.context.caches.signing_requests;
        let Some(csr) = cache.get(key) else { return Ok(None) };
        let config = &self.context.config;
        let ranges = [Some(config.cluster_cidr), config.service_cidr].into_iter().flatten();
        let ranges: Vec<_> = ranges.flat_map(|ranges| ranges.iter()).collect();
        let (nodes, servers) = (self.context.caches.nodes.all(), servers(&self.context));
        let facts = Facts { nodes: &nodes, servers: &servers, ranges: &ranges, now: Timestamp::now() };
        let plan = plan(&csr, issued_until(&csr), &facts);
        match plan.step {
            Step::Nothing => {}
            Step::Leave(why) => {
                let text = format!(
                    "Not approved without a person: {why}. Approve with: kubectl certificate approve {}",
                    key.name
                );
                self.context.recorder.record(&*csr, Severity::Warning, "NotApproved", text);
            }
            Step::Approve(message) => self.conclude(&csr, "Approved", "AutoApproved", message).await?,
            Step::Fail(why) => self.conclude(&csr, "Failed", "SignerValidationFailure", &why).await?,
            Step::Sign => {
                let again = self.sign(&csr).await?;
                return Ok(crate::context::sooner(plan.again, again));
            }
            Step::Delete(why) => {
                tracing::info!(request = key.name, why, "a certificate signing request is deleted");
                let preconditions = Preconditions { uid: Some(uid(&*csr).to_owned()), resource_version: None };
                let params = DeleteParams { preconditions: Some(preconditions), ..Default::default() };
                match self.api().delete(&key.name, &params).await {
                    Ok(_) => cache.note_gone(&csr),
                    Err(error) if is_not_found(&error) => cache.note_gone(&csr),
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(plan.again)
    }
}
