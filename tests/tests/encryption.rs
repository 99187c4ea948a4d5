//! Objects that are encrypted in the store, while keys come and go.

use std::path::Path;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use seawall_tests::{Options, Server, kubectl, until};

/// What nobody may find on the disk.
const WORD: &str = "correct-horse-battery-staple";

/// Whether a text stands in any file of a directory.
fn found(directory: &Path, text: &str) -> bool {
    std::fs::read_dir(directory).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return found(&path, text);
        }
        let bytes = std::fs::read(&path).unwrap_or_default();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    })
}

fn options(directory: &Path, providers: &str) -> Options {
    let text = format!(
        "{{apiVersion: apiserver.config.k8s.io/v1, kind: EncryptionConfiguration, resources: [{{resources: [secrets], providers: [{providers}]}}]}}"
    );
    let file = kubectl::file(directory, "encryption.yaml", &text);
    let args = vec!["--disable=scheduler,controllers".into(), format!("--encryption-provider-config={file}")];
    Options { machine: None, args }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_not_found_on_the_disk() {
    let files = tempfile::tempdir().unwrap();
    let key = |name: &str, byte: u8| {
        format!("{{aesgcm: {{keys: [{{name: {name}, secret: {}}}]}}}}", STANDARD.encode([byte; 32]))
    };
    let (one, two) = (key("one", 1), key("two", 2));
    // Without a key it is there to be found: the search works.
    let server = Server::start(Options { machine: None, args: vec!["--disable=scheduler,controllers".into()] }).await;
    let create = async |server: &Server, name: &str, word: &str| {
        server.kubectl.reaches("namespace/default", "{.metadata.name}", "default").await;
        // Data stand in the store as base64.
        server.kubectl.run(&format!("create secret generic {name} --from-literal=word={word}")).await.ok();
    };
    let plain = STANDARD.encode("in-the-clear-for-all");
    create(&server, "open", "in-the-clear-for-all").await;
    assert!(found(server.directory(), &plain));

    let directory = server.cut_off().await;
    let server = Server::start_in(directory, options(files.path(), &format!("{one}, {{identity: {{}}}}"))).await;
    create(&server, "closed", WORD).await;
    assert!(!found(server.directory(), &STANDARD.encode(WORD)));
    // What was there before is read, and written anew.
    assert_eq!(server.kubectl.path("secret/open", "{.data.word}").await, plain);
    // The gossip's key is a Secret as well, and so is the authority that other API servers believe.
    until("what was in the clear is written anew", async || server.logged("says count=3").then_some(())).await;

    // Another key: the old one still reads, and is not needed any more once everything has been written anew.
    let directory = server.cut_off().await;
    let server = Server::start_in(directory, options(files.path(), &format!("{two}, {one}"))).await;
    assert_eq!(server.kubectl.path("secret/closed", "{.data.word}").await, STANDARD.encode(WORD));
    until("they are written anew", async || server.logged("says count=4").then_some(())).await;
    let directory = server.cut_off().await;
    let server = Server::start_in(directory, options(files.path(), &two)).await;
    for (name, word) in [("open", plain), ("closed", STANDARD.encode(WORD))] {
        assert_eq!(server.kubectl.path(&format!("secret/{name}"), "{.data.word}").await, word);
    }
}
