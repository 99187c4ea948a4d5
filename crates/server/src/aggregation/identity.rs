//! How other servers know that this one speaks for its clients: a certificate of an authority that is for nothing else, and
//! what they are told of it (<https://kubernetes.io/docs/tasks/extend-kubernetes/configure-aggregation-layer/>).

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};

use crate::{
    Server,
    auth::rbac,
    error::{ApiError, Result},
    pki::Authority,
};

/// The Secret with the authority. All servers of a cluster use the same one.
const SECRET: &str = "seawall-front-proxy";
/// The name in the certificate.
const NAME: &str = "front-proxy-client";
/// Where other servers look for what they have to believe.
const CONFIG: &str = "extension-apiserver-authentication";
/// The role of who may look there.
const READER: &str = "extension-apiserver-authentication-reader";

/// A certificate with its key.
pub struct Identity {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    /// Which authority it is of, in PEM.
    authority: String,
}

fn failed(what: &str) -> impl Fn(String) -> ApiError + '_ {
    move |why| ApiError::internal(what, why)
}

fn decoded(secret: &Value, key: &str) -> Option<String> {
    String::from_utf8(STANDARD.decode(secret["data"][key].as_str()?).ok()?).ok()
}

impl Server {
    /// Makes sure that there is an authority, that this server has a certificate of it, and that other servers are told.
    pub(crate) async fn identify(self: &Arc<Self>) -> Result<()> {
        let what = failed("the certificate for other API servers");
        if self.find("", "secrets", "kube-system", SECRET).await?.is_none() {
            let authority = Authority::generate("seawall-front-proxy-ca").map_err(|e| what(e.to_string()))?;
            let data =
                json!({"tls.crt": STANDARD.encode(&authority.pem), "tls.key": STANDARD.encode(authority.key_pem())});
            let secret = json!({"metadata": {"name": SECRET, "namespace": "kube-system"}, "type": "kubernetes.io/tls",
                "data": data});
            self.ensure("", "secrets", secret, false).await?;
        }
        // Whichever server was first.
        let secret = self.find("", "secrets", "kube-system", SECRET).await?.map(|secret| secret.value());
        let secret = secret.ok_or_else(|| what("it was deleted".into()))?;
        let (Some(pem), Some(key)) = (decoded(&secret, "tls.crt"), decoded(&secret, "tls.key")) else {
            return Err(what(format!(
                "secret kube-system/{SECRET} has no tls.crt and tls.key: delete it, and it is made anew"
            )));
        };
        let known = self.aggregation.identity.load_full();
        if known.is_none_or(|known| known.authority != pem) {
            let authority = Authority::from_pem(&pem, &key).map_err(|e| what(e.to_string()))?;
            let pair = authority.client(NAME, "").map_err(|e| what(e.to_string()))?;
            let chain =
                CertificateDer::pem_slice_iter(pair.certificate.as_bytes()).collect::<std::result::Result<_, _>>();
            let identity = Identity {
                chain: chain.map_err(|e| what(e.to_string()))?,
                key: PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).map_err(|e| what(e.to_string()))?,
                authority: pem.clone(),
            };
            self.aggregation.identity.store(Some(Arc::new(identity)));
            self.aggregation.tls.lock().clear();
        }
        let data = json!({
            "client-ca-file": &**self.client_ca.load(), "requestheader-client-ca-file": pem,
            "requestheader-allowed-names": json!([NAME]).to_string(),
            "requestheader-username-headers": json!(["X-Remote-User"]).to_string(),
            "requestheader-uid-headers": json!(["X-Remote-Uid"]).to_string(),
            "requestheader-group-headers": json!(["X-Remote-Group"]).to_string(),
            "requestheader-extra-headers-prefix": json!(["X-Remote-Extra-"]).to_string(),
        });
        let there = self.find("", "configmaps", "kube-system", CONFIG).await?.map(|map| map.value());
        if there.as_ref().is_none_or(|map| map["data"] != data) {
            let map = json!({"metadata": {"name": CONFIG, "namespace": "kube-system"}, "data": data});
            self.ensure("", "configmaps", map, there.is_some()).await?;
        }
        let labels = json!({"kubernetes.io/bootstrapping": "rbac-defaults"});
        let role = json!({"metadata": {"name": READER, "namespace": "kube-system", "labels": labels}, "rules": [
            {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [CONFIG], "verbs": ["get", "list", "watch"]}]});
        self.ensure(rbac::GROUP, "roles", role, false).await
    }
}
