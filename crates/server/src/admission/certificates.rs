//! CertificateSigningRequests: who asks is written into them, and who may approve and sign is asked of the authorizer
//! (<https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/#authorization>).

use jiff::Timestamp;
use seawall_api::certificate_request::{CLIENT, CertificateRequest};
use serde_json::{Value, json};

use crate::{
    Context, Server,
    auth::{MASTERS, authorize::Attributes},
    error::{ApiError, Result},
    write::timestamp,
};

impl Server {
    /// Admits a request, its approval, or its signing.
    pub(super) async fn admit_signing_request(
        &self,
        context: &Context<'_>,
        new: &mut Value,
        old: Option<&Value>,
    ) -> Result<()> {
        let Some(old) = old else { return create(context, new) };
        let signer = old["spec"]["signerName"].as_str().unwrap_or_default();
        let may = async |verb: &str, what: &str| {
            let asked = async |name: &str| {
                let group = "certificates.k8s.io";
                let attributes = Attributes { verb, group, resource: "signers", name, ..Default::default() };
                self.authorize(&context.user, &attributes).await.is_ok()
            };
            // All signers of a domain can be allowed at once.
            let domain = format!("{}/*", signer.split('/').next().unwrap_or_default());
            if asked(signer).await || asked(&domain).await {
                return Ok(());
            }
            let name = old["metadata"]["name"].as_str().unwrap_or_default();
            let why = format!("user not permitted to {what} requests with signerName {signer:?}");
            Err(ApiError::forbidden(&context.row, name, why))
        };
        match context.path.subresource.as_deref() {
            Some("approval") => {
                may("approve", "approve").await?;
                complete(&mut new["status"], &old["status"], Timestamp::now());
            }
            Some("status") => {
                keep_decisions(&mut new["status"], &old["status"]);
                complete(&mut new["status"], &old["status"], Timestamp::now());
                let part = |key: &str| new["status"][key] != old["status"][key];
                if part("certificate") || part("conditions") {
                    may("sign", "sign").await?;
                }
            }
            _ => {}
        }
        if let Some(status) = new.get_mut("status").and_then(Value::as_object_mut) {
            status.retain(|_, value| !value.is_null());
        }
        Ok(())
    }
}

fn create(context: &Context<'_>, new: &mut Value) -> Result<()> {
    let user = &context.user;
    let spec = &mut new["spec"];
    if !spec.is_object() {
        return Ok(());
    }
    // Certificates of administrators are for administrators to make, not to approve in passing.
    if spec["signerName"] == CLIENT
        && let Ok(request) = CertificateRequest::from_base64(spec["request"].as_str().unwrap_or_default())
        && request.organizations.iter().any(|o| o == MASTERS)
    {
        let why = format!("use of {CLIENT} signer with {MASTERS} group is not allowed");
        return Err(ApiError::forbidden(&context.row, new["metadata"]["name"].as_str().unwrap_or_default(), why));
    }
    spec["username"] = user.username.as_str().into();
    spec["groups"] = json!(user.groups);
    for (key, value) in [("uid", json!(user.uid)), ("extra", json!(user.extra))] {
        if value == "" || value == json!({}) {
            if let Some(spec) = spec.as_object_mut() {
                spec.remove(key);
            }
        } else {
            spec[key] = value;
        }
    }
    Ok(())
}

/// Who signs does not decide: the decisions stay as they are. To add or remove one is left for validation to refuse.
fn keep_decisions(new: &mut Value, old: &Value) {
    for ty in ["Approved", "Denied"] {
        let of = |conditions: &Value| -> Vec<usize> {
            let list = conditions.as_array().map(Vec::as_slice).unwrap_or_default();
            list.iter().enumerate().filter(|(_, c)| c["type"] == ty).map(|(index, _)| index).collect()
        };
        let (before, after) = (of(&old["conditions"]), of(&new["conditions"]));
        if before.len() == after.len() {
            for (from, to) in before.into_iter().zip(after) {
                new["conditions"][to] = old["conditions"][from].clone();
            }
        }
    }
}

/// Fills in the times of conditions.
fn complete(new: &mut Value, old: &Value, now: Timestamp) {
    let now = timestamp(now);
    for condition in new.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten() {
        if !condition.is_object() {
            continue;
        }
        if condition["lastUpdateTime"].is_null() {
            condition["lastUpdateTime"] = now.clone();
        }
        if condition["lastTransitionTime"].is_null() {
            let list = old["conditions"].as_array().into_iter().flatten();
            let mut same = list.filter(|c| c["type"] == condition["type"] && c["status"] == condition["status"]);
            let since = same.find_map(|c| Some(c["lastTransitionTime"].clone()).filter(|t| !t.is_null()));
            condition["lastTransitionTime"] = since.unwrap_or_else(|| now.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_completed_and_decisions_kept() {
        let (then, now) = ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z");
        let approved = json!({"type": "Approved", "status": "True", "reason": "R", "lastUpdateTime": then, "lastTransitionTime": then});
        let old = json!({"conditions": [approved]});
        let mut new = json!({"conditions": [
            {"type": "Failed", "status": "True"}, {"type": "Approved", "status": "True", "reason": "another"}]});
        keep_decisions(&mut new, &old);
        complete(&mut new, &old, now.parse().unwrap());
        assert_eq!(new["conditions"][1], approved);
        assert_eq!(
            new["conditions"][0],
            json!({"type": "Failed", "status": "True", "lastUpdateTime": now, "lastTransitionTime": now})
        );
        // One that is missing stays missing, for validation to see.
        let mut new = json!({"conditions": []});
        keep_decisions(&mut new, &old);
        assert_eq!(new, json!({"conditions": []}));
        // The same state since then.
        let mut again = json!({"conditions": [{"type": "Approved", "status": "True"}]});
        complete(&mut again, &old, now.parse().unwrap());
        assert_eq!(again["conditions"][0]["lastTransitionTime"], then);
        assert_eq!(again["conditions"][0]["lastUpdateTime"], now);
    }
}
