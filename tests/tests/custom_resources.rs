//! Custom resources as people use them: with kubectl.

use seawall_tests::{Options, Server, kubectl::has};

const DEFINITION: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: crontabs.stable.example.com}
spec:
  group: stable.example.com
  scope: Namespaced
  names: {plural: crontabs, singular: crontab, kind: CronTab, shortNames: [ct], categories: [all]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources:
      status: {}
      scale: {specReplicasPath: .spec.replicas, statusReplicasPath: .status.replicas, labelSelectorPath: .status.labelSelector}
    additionalPrinterColumns:
    - {name: Spec, type: string, description: The cron spec, jsonPath: .spec.cronSpec}
    - {name: Replicas, type: integer, jsonPath: .spec.replicas}
    - {name: Age, type: date, jsonPath: .metadata.creationTimestamp}
    selectableFields:
    - jsonPath: .spec.image
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [cronSpec]
            properties:
              cronSpec: {type: string, description: When it runs., minLength: 9}
              image: {type: string, default: busybox}
              replicas: {type: integer, minimum: 1, maximum: 10, default: 1}
              steps:
                type: array
                x-kubernetes-list-type: map
                x-kubernetes-list-map-keys: [name]
                items:
                  type: object
                  required: [name]
                  properties: {name: {type: string}, run: {type: string}}
          status:
            type: object
            properties:
              replicas: {type: integer}
              labelSelector: {type: string}
"#;

fn tab(name: &str, spec: &str) -> String {
    format!("apiVersion: stable.example.com/v1\nkind: CronTab\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_custom_resource_and_its_life() {
    let options = || Options { machine: None, args: vec!["--disable=scheduler".into()] };
    let server = Server::start(options()).await;
    let k = &server.kubectl;
    k.reaches("namespace/default", "{.metadata.name}", "default").await;
    k.apply(DEFINITION).await;
    k.run("wait --for condition=Established --timeout=10s crd/crontabs.stable.example.com").await.ok();
    has(k.run("get crd").await.ok(), &["NAME", "CREATED AT", "crontabs.stable.example.com"]);

    k.apply(&tab("one", "cronSpec: '* * * * */5'")).await;
    let table = k.run("get ct").await.ok();
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["NAME", "SPEC", "REPLICAS", "AGE"]);
    assert_eq!(words[1][..7], ["one", "*", "*", "*", "*", "*/5", "1"]);
    has(k.run("get all").await.ok(), &["crontab.stable.example.com/one"]);
    has(
        k.run("api-resources --api-group=stable.example.com").await.ok(),
        &["crontabs", "ct", "stable.example.com/v1", "CronTab"],
    );
    has(
        k.run("explain crontab.spec").await.ok(),
        &["GROUP:      stable.example.com", "cronSpec", "When it runs.", "-required-"],
    );
    has(k.run("explain ct.spec.steps.run").await.ok(), &["FIELD: run <string>"]);
    has(k.run("describe ct one").await.ok(), &["Cron Spec:  * * * * */5", "Image:      busybox"]);

    // What is wrong is told by its field, on the client by the schema and on the server by its value.
    let unknown = k.pipe("apply -f -", &tab("two", "cronSpec: '* * * * */5', colour: red")).await.fails();
    has(unknown, &["unknown field \"spec.colour\""]);
    let wrong = k.pipe("create -f -", &tab("two", "cronSpec: '*', replicas: 11")).await.fails();
    has(
        wrong,
        &[
            "spec.cronSpec: Invalid value: \"*\": spec.cronSpec in body should be at least 9 chars long",
            "spec.replicas: Invalid value: 11: spec.replicas in body should be less than or equal to 10",
        ],
    );

    // Patches, the server's apply, scale and status.
    k.args(&["patch", "ct", "one", "--type=merge", "-p", r#"{"spec":{"image":"nginx"}}"#]).await.ok();
    k.reaches("ct/one", "{.spec.image}/{.metadata.generation}", "nginx/2").await;
    k.pipe("apply -f -", &tab("one", "cronSpec: '1 * * * *'")).await.ok();
    k.reaches("ct/one", "{.spec.cronSpec}/{.spec.image}", "1 * * * */nginx").await;
    let strategic = k.args(&["patch", "ct", "one", "--type=strategic", "-p", "{}"]).await.fails();
    has(strategic, &["application/strategic-merge-patch+json is not supported by stable.example.com/v1, Kind=CronTab"]);
    k.pipe(
        "apply --server-side --field-manager=a -f -",
        &tab("two", "cronSpec: '* * * * *', steps: [{name: x, run: a}]"),
    )
    .await
    .ok();
    k.pipe(
        "apply --server-side --field-manager=b -f -",
        &tab("two", "cronSpec: '* * * * *', steps: [{name: z, run: b}]"),
    )
    .await
    .ok();
    k.reaches("ct/two", "{.spec.steps[*].name}", "x z").await;
    let conflict =
        k.pipe("apply --server-side --field-manager=b -f -", &tab("two", "cronSpec: '9 * * * *'")).await.fails();
    has(conflict, &["conflict with \"a\": .spec.cronSpec"]);
    k.run("scale ct/one --replicas=3").await.ok();
    k.reaches("ct/one", "{.spec.replicas}", "3").await;
    k.args(&[
        "patch",
        "ct",
        "one",
        "--subresource=status",
        "--type=merge",
        "-p",
        r#"{"status":{"replicas":2},"spec":{"replicas":9}}"#,
    ])
    .await
    .ok();
    k.reaches("ct/one", "{.status.replicas}/{.spec.replicas}", "2/3").await;
    has(k.run("get ct --field-selector spec.image=nginx -o name").await.ok(), &["crontab.stable.example.com/one"]);
    assert!(!k.run("get ct --field-selector spec.image=nginx -o name").await.ok().contains("two"));

    // An owner of a custom kind takes what it owns along.
    let uid = k.path("ct/two", "{.metadata.uid}").await;
    k.apply(&format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: owned\n  ownerReferences: [{{apiVersion: stable.example.com/v1, kind: CronTab, name: two, uid: {uid}}}]\n"
    ))
    .await;
    k.run("delete ct two").await.ok();
    let gone = async |what: &str| {
        seawall_tests::until(&format!("{what} is gone"), async || {
            (!k.run(&format!("get {what}")).await.status.success()).then_some(())
        })
        .await;
    };
    gone("configmap/owned").await;
    // A namespace takes them along.
    k.run("create namespace team").await.ok();
    k.pipe("apply -n team -f -", &tab("three", "cronSpec: '* * * * *'")).await.ok();
    k.run("delete namespace team --timeout=30s").await.ok();
    assert!(!k.run("get ct -A -o name").await.ok().contains("three"));

    // The server is cut off and comes back: all is there at once.
    let directory = server.cut_off().await;
    let server = Server::start_in(directory, options()).await;
    let k = &server.kubectl;
    has(k.run("get ct").await.ok(), &["one", "1 * * * *"]);
    k.run("scale ct/one --replicas=4").await.ok();
    k.reaches("ct/one", "{.spec.replicas}", "4").await;

    // The definition goes, and takes everything along.
    k.run("delete crd crontabs.stable.example.com --timeout=30s").await.ok();
    let none = k.run("get crontabs.stable.example.com").await.fails();
    has(none, &["the server doesn't have a resource type"]);
    k.apply(DEFINITION).await;
    k.run("wait --for condition=Established --timeout=10s crd/crontabs.stable.example.com").await.ok();
    assert_eq!(k.run("get ct -o name").await.ok().trim(), "");
}
