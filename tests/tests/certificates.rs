//! Certificates as an administrator gives them out, by the real kubectl and openssl; and tokens by the real command.

use std::{path::Path, process::Stdio};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_tests::{Options, Server, kubectl::has, seawall};
use tokio::process::Command;

async fn openssl(directory: &Path, words: &str) {
    let mut command = Command::new("openssl");
    command.args(words.split(' ')).current_dir(directory).stdin(Stdio::null());
    let output = command.output().await.expect("openssl is installed");
    assert!(output.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn people_get_certificates() {
    let server = Server::start(Options::default()).await;
    let (k, directory) = (&server.kubectl, tempfile::tempdir().unwrap());
    let at = |name: &str| directory.path().join(name).display().to_string();
    // Keys of every sort, and more than one group.
    for (user, kind, groups) in [
        ("jane", "rsa:2048", "/O=dev/O=ops/O=qa"),
        ("joe", "ec -pkeyopt ec_paramgen_curve:P-384", "/O=dev"),
        ("eve", "ed25519", ""),
    ] {
        let words =
            format!("req -new -newkey {kind} -nodes -keyout {user}.key -subj /CN={user}{groups} -out {user}.csr");
        openssl(directory.path(), &words).await;
        let request = STANDARD.encode(std::fs::read(at(&format!("{user}.csr"))).unwrap());
        let csr = format!(
            "apiVersion: certificates.k8s.io/v1\nkind: CertificateSigningRequest\nmetadata: {{name: {user}}}\nspec:\n  \
             request: {request}\n  signerName: kubernetes.io/kube-apiserver-client\n  expirationSeconds: 86400\n  \
             usages: [client auth]\n"
        );
        k.apply(&csr).await;
    }
    let table = k.run("get csr").await.ok();
    has(&table, &["SIGNERNAME", "REQUESTOR", "kubernetes-admin", "24h", "Pending"]);
    has(k.run("certificate approve jane joe").await.ok(), &["jane approved", "joe approved"]);
    has(k.run("certificate deny eve").await.ok(), &["eve denied"]);
    has(k.run("certificate approve eve").await.fails(), &["already Denied"]);
    let server_url = k.run("config view -o jsonpath={.clusters[0].cluster.server}").await.ok();
    let ca = k.run("config view --raw -o jsonpath={.clusters[0].cluster.certificate-authority-data}").await.ok();
    std::fs::write(at("ca.crt"), STANDARD.decode(ca).unwrap()).unwrap();
    for (user, groups) in [("jane", "[dev ops qa system:authenticated]"), ("joe", "[dev system:authenticated]")] {
        k.reaches(&format!("csr/{user}"), "{.status.conditions[0].type}", "Approved").await;
        let certificate = seawall_tests::until("a certificate", async || {
            Some(k.path(&format!("csr/{user}"), "{.status.certificate}").await).filter(|text| !text.is_empty())
        })
        .await;
        std::fs::write(at(&format!("{user}.crt")), STANDARD.decode(certificate).unwrap()).unwrap();
        openssl(directory.path(), &format!("verify -CAfile ca.crt {user}.crt")).await;
        let who = format!(
            "auth whoami --kubeconfig=/dev/null --server={server_url} --certificate-authority={} --client-certificate={} \
             --client-key={}",
            at("ca.crt"),
            at(&format!("{user}.crt")),
            at(&format!("{user}.key"))
        );
        has(k.run(&who).await.ok(), &[user, groups]);
    }
    let table = k.run("get csr").await.ok();
    has(&table, &["Approved,Issued", "Denied"]);

    // A machine's token, before it has a certificate.
    let mut command = Command::new(seawall());
    command.args(["token", "create", "--data-dir"]).arg(server.directory().join("data"));
    let output = command.output().await.unwrap();
    let token = String::from_utf8(output.stdout).unwrap();
    let bearer = token.trim().rsplit_once('.').expect("a token").0;
    let ask = |words: &str| {
        let ca = at("ca.crt");
        format!("{words} --kubeconfig=/dev/null --server={server_url} --certificate-authority={ca} --token={bearer}")
    };
    has(k.run(&ask("auth whoami")).await.ok(), &["system:bootstrap:", "system:bootstrappers:seawall:agent"]);
    has(k.run(&ask("get csr")).await.ok(), &["jane", "joe"]);
    has(k.run(&ask("get secrets -A")).await.fails(), &["Forbidden", "cannot list resource \"secrets\""]);
    assert!(!server.logged("panicked"), "a task of the server panicked");
}
