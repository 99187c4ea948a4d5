//! The life of a request for a certificate, in the shapes in which kubectl and client-go send it.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{CertificateParams, DnType, KeyPair};
use seawall_server::auth::{MASTERS, UserInfo, bootstrap_token};
use serde_json::{Value, json};

use super::harness::{Api, message, node};

const CSRS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const CLIENT: &str = "kubernetes.io/kube-apiserver-client";

fn request(name: &str, organization: &str) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = Default::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, organization);
    STANDARD.encode(params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap())
}

fn csr(name: &str, request: &str) -> Value {
    json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": {"name": name},
        "spec": {"request": request, "signerName": CLIENT, "usages": ["client auth"]}})
}

fn certificate(api: &Api) -> String {
    STANDARD.encode(&api.authority.pem)
}

/// What `kubectl certificate approve` (or `deny`) puts.
fn decided(mut csr: Value, ty: &str) -> Value {
    let condition = json!({"type": ty, "status": "True", "reason": "KubectlApprove", "message": "This CSR was approved by kubectl certificate approve.",
        "lastUpdateTime": "2026-03-01T12:00:00Z", "lastTransitionTime": null});
    csr["status"]["conditions"] = json!([condition]);
    csr
}

#[tokio::test]
async fn a_request_is_made_approved_and_signed() {
    let api = Api::new().await;
    let newcomer = UserInfo {
        uid: "u1".into(),
        extra: [("example.com/x".to_owned(), vec!["y".to_owned()])].into(),
        ..UserInfo::new("system:bootstrap:abcdef", &[bootstrap_token::GROUP])
    };
    let mut asked = csr("r", &request("jane", "dev"));
    // Nobody can ask in another's name, or approve in advance.
    asked["spec"]["username"] = "admin".into();
    asked["spec"]["groups"] = json!([MASTERS]);
    asked["status"] = decided(json!({}), "Approved")["status"].clone();
    let (code, made) = api.call(&newcomer, "POST", CSRS, asked).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["spec"]["username"], "system:bootstrap:abcdef");
    assert_eq!(made["spec"]["uid"], "u1");
    assert_eq!(made["spec"]["groups"], json!(["system:bootstrappers", "system:authenticated"]));
    assert_eq!(made["spec"]["extra"], json!({"example.com/x": ["y"]}));
    assert!(made["status"].is_null() || made["status"] == json!({}), "{made}");

    // The spec stays, whoever writes it.
    let mut changed = made.clone();
    changed["spec"]["signerName"] = "example.com/own".into();
    changed["metadata"]["labels"] = json!({"a": "b"});
    changed["status"] = decided(json!({}), "Approved")["status"].clone();
    let (_, updated) = api.admin("PUT", &format!("{CSRS}/r"), changed).await;
    assert_eq!((&updated["spec"], &updated["metadata"]["labels"]), (&made["spec"], &json!({"a": "b"})));
    assert!(updated["status"]["conditions"].is_null(), "{updated}");

    // Only who may sign or approve does.
    for sub in ["approval", "status"] {
        for user in [&newcomer, &node("a")] {
            let answer = api.call(user, "PUT", &format!("{CSRS}/r/{sub}"), decided(updated.clone(), "Approved")).await;
            assert_eq!(answer.0, 403, "{sub} {}", answer.1);
        }
    }
    let sneaky = api.admin("PUT", &format!("{CSRS}/r/status"), decided(updated.clone(), "Approved")).await;
    assert_eq!(sneaky.0, 422);
    assert!(
        message(&sneaky).ends_with(
            "is invalid: status.conditions: Forbidden: updates may not add a condition of type \"Approved\""
        ),
        "{}",
        message(&sneaky)
    );
    let mut early = decided(updated.clone(), "Approved");
    early["status"]["certificate"] = certificate(&api).into();
    let (code, approved) = api.admin("PUT", &format!("{CSRS}/r/approval"), early).await;
    assert_eq!(code, 200, "{approved}");
    assert!(approved["status"]["certificate"].is_null(), "an approval is no certificate");
    let condition = &approved["status"]["conditions"][0];
    assert_eq!(condition["lastUpdateTime"], "2026-03-01T12:00:00Z");
    assert!(condition["lastTransitionTime"].is_string(), "{condition}");

    let denied = api.admin("PUT", &format!("{CSRS}/r/approval"), decided(approved.clone(), "Denied")).await;
    assert!(
        message(&denied).contains("updates may not remove a condition of type \"Approved\""),
        "{}",
        message(&denied)
    );

    // As a controller signs.
    let controller = UserInfo::new("system:kube-controller-manager", &[]);
    let patch = json!({"metadata": {"resourceVersion": approved["metadata"]["resourceVersion"]}, "status": {"certificate": certificate(&api)}});
    let (code, signed) = api.patch(&controller, &format!("{CSRS}/r/status"), patch).await;
    assert_eq!(code, 200, "{signed}");
    assert_eq!(signed["status"]["conditions"], approved["status"]["conditions"]);
    assert_eq!(signed["status"]["certificate"], certificate(&api));
    let (code, table) = api.admin("GET", CSRS, Value::Null).await;
    assert_eq!((code, table["items"].as_array().unwrap().len()), (200, 1));
}

#[tokio::test]
async fn what_is_not_let_in() {
    let api = Api::new().await;
    let jane = request("jane", "dev");
    let check = async |change: &dyn Fn(&mut Value), code: u16, expect: &str| {
        let mut csr = csr("r", &jane);
        change(&mut csr);
        let answer = api.admin("POST", CSRS, csr).await;
        assert_eq!(answer.0, code, "{}", answer.1);
        assert!(message(&answer).contains(expect), "{} does not say {expect}", message(&answer));
    };
    check(
        &|c| c["spec"]["request"] = "eA==".into(),
        422,
        "spec.request: Invalid value: \"<certificate request data>\": PEM block type must be CERTIFICATE REQUEST",
    )
    .await;
    check(&|c| c["spec"]["usages"] = json!([]), 422, "spec.usages: Required value: usages must be provided").await;
    check(
        &|c| c["spec"]["signerName"] = "kubernetes.io/legacy-unknown".into(),
        422,
        "the legacy signerName is not allowed via this API version",
    )
    .await;
    check(
        &|c| c["spec"]["expirationSeconds"] = 10.into(),
        422,
        "may not specify a duration less than 600 seconds (10 minutes)",
    )
    .await;
    let masters = request("root", MASTERS);
    check(
        &|c| c["spec"]["request"] = masters.as_str().into(),
        403,
        "certificatesigningrequests.certificates.k8s.io \"r\" is forbidden: use of kubernetes.io/kube-apiserver-client signer with system:masters group is not allowed",
    )
    .await;
    api.create(CSRS, csr("r", &jane)).await;
    let both = json!({"status": {"conditions": [{"type": "Approved", "status": "True"}, {"type": "Denied", "status": "True"}]}});
    let answer = api.patch(&UserInfo::new("admin", &[MASTERS]), &format!("{CSRS}/r/approval"), both).await;
    assert!(message(&answer).contains("Approved and Denied conditions are mutually exclusive"), "{}", message(&answer));
}
