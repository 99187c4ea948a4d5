//! Who may do what, as people set it up: with kubectl.

use seawall_tests::{Options, Server, kubectl::has};

#[tokio::test(flavor = "multi_thread")]
async fn roles_bindings_and_acting_for_others() {
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler".into()] }).await;
    let k = &server.kubectl;
    k.reaches("serviceaccount/default", "{.metadata.name}", "default").await;
    // Those that collect the rules of others have been filled.
    for (role, resource) in [("view", "deployments"), ("edit", "deployments/scale"), ("admin", "rolebindings")] {
        seawall_tests::until(&format!("{role} has rules"), async || {
            k.path(&format!("clusterrole/{role}"), "{.rules[*].resources}").await.contains(resource).then_some(())
        })
        .await;
    }
    let can = async |words: &str, expect: bool| {
        let said = k.run(&format!("auth can-i {words}")).await;
        assert_eq!(said.stdout.trim(), if expect { "yes" } else { "no" }, "{words}: {}", said.stderr);
    };
    can("list pods --as jane", false).await;
    k.run("create rolebinding jane --clusterrole=view --user=jane").await.ok();
    can("list pods --as jane", true).await;
    can("list secrets --as jane", false).await;
    can("create deployments.apps --as jane", false).await;
    can("list pods --as jane -A", false).await;
    k.run("create rolebinding team --clusterrole=edit --group=team").await.ok();
    can("create deployments.apps --as jane --as-group team", true).await;
    can("create deployments.apps --subresource=scale --as jane --as-group team", true).await;
    can("create rolebindings.rbac.authorization.k8s.io --as jane --as-group team", false).await;
    let mine = k.run("auth can-i --list --as jane").await.ok();
    has(mine, &["pods/log", "selfsubjectaccessreviews.authorization.k8s.io", "[/openapi/*]"]);
    has(k.run("auth whoami --as jane --as-group team").await.ok(), &["jane", "team", "system:authenticated"]);

    // A service account with a role of its own, and its token.
    k.run("create serviceaccount robot").await.ok();
    k.run("create role maps --verb=get,list,create --resource=configmaps").await.ok();
    k.run("create rolebinding robot --role=maps --serviceaccount=default:robot").await.ok();
    let token = k.run("create token robot").await.ok();
    let as_robot = async |words: &str| {
        let own = [
            "--token",
            token.trim(),
            "--kubeconfig=/dev/null",
            "--insecure-skip-tls-verify",
            "--server",
            &server.url(),
        ];
        k.args(&[&own[..], &words.split(' ').collect::<Vec<_>>()].concat()).await
    };
    as_robot("create configmap mine --from-literal=a=b").await.ok();
    let refused = as_robot("get secrets").await;
    has(
        &refused.stderr,
        &[
            "secrets is forbidden: User \"system:serviceaccount:default:robot\" cannot list resource \"secrets\" in API group \"\" in the namespace \"default\"",
        ],
    );

    // Nobody gives what they do not have.
    k.run("create clusterrole binder --verb=create,get --resource=rolebindings.rbac.authorization.k8s.io").await.ok();
    k.run("create clusterrolebinding binder --clusterrole=binder --user=joe").await.ok();
    let refused = k.run("create rolebinding own --clusterrole=cluster-admin --user=joe --as joe").await;
    has(&refused.stderr, &["is attempting to grant RBAC permissions not currently held"]);
    let refused =
        k.run("get pods --as root --as-group system:masters --as-uid 1 --token wrong --kubeconfig=/dev/null").await;
    assert!(!refused.status.success());

    // What was taken from a role of the cluster comes back with a restart, unless that was forbidden.
    k.args(&["patch", "clusterrole/system:discovery", "--type=merge", "-p", "{\"rules\":[]}"]).await.ok();
    k.run("annotate clusterrole/system:basic-user rbac.authorization.kubernetes.io/autoupdate=false --overwrite")
        .await
        .ok();
    k.args(&["patch", "clusterrole/system:basic-user", "--type=merge", "-p", "{\"rules\":[]}"]).await.ok();
    let mut server = server;
    server.crash().await;
    server.launch().await;
    let k = &server.kubectl;
    k.reaches("clusterrole/system:discovery", "{.rules[0].verbs}", "[\"get\"]").await;
    assert_eq!(k.path("clusterrole/system:basic-user", "{.rules}").await, "[]");
}
