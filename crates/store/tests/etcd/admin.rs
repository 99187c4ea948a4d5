//! Members come, go and are looked after.

use std::time::Duration;

use bytes::Bytes;
use seawall_store::{
    Expect, ListOptions, Store,
    etcd::{
        Etcd,
        admin::{Admin, AdminError, Alarm, AlarmKind, MemberId},
    },
};

use crate::cluster::EtcdCluster;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_one_member_to_two_and_back() {
    let mut cluster = EtcdCluster::start(1, true).await;
    let etcd = cluster.connect(Some(0)).await;
    let admin = etcd.admin();
    let members = admin.members().await.unwrap();
    assert_eq!(members.len(), 1);
    let first = &members[0];
    assert_eq!((first.name.as_str(), first.learner), ("m0", false));
    assert_eq!((&first.peer_urls, &first.client_urls), (&vec![cluster.peer_url(0)], &vec![cluster.url(0)]));
    for index in 0..500 {
        etcd.put(&format!("/{index}"), Bytes::from(vec![b'x'; 1000]), Expect::Any, None).await.unwrap();
    }

    let index = cluster.add();
    let (learner, all) = admin.add_learner(vec![cluster.peer_url(index)]).await.unwrap();
    assert!(learner.learner && learner.name.is_empty() && all.len() == 2, "{learner:?} of {all:?}");
    let error = admin.add_learner(vec![cluster.peer_url(index)]).await.unwrap_err();
    assert!(matches!(&error, AdminError::PeerUrlTaken { urls } if urls == &[cluster.peer_url(index)]), "{error}");
    let error = admin.add_learner(vec!["https://127.0.0.1:1".into()]).await.unwrap_err();
    assert!(matches!(error, AdminError::TooManyLearners), "{error}");
    let error = admin.promote(learner.id).await.unwrap_err();
    assert!(matches!(error, AdminError::NotInSync(id) if id == learner.id), "{error}");
    let error = admin.promote(first.id).await.unwrap_err();
    assert!(matches!(error, AdminError::NotALearner(_)), "{error}");
    let nobody = MemberId(7);
    for error in [
        admin.promote(nobody).await.unwrap_err(),
        admin.remove(nobody).await.unwrap_err(),
        admin.update(nobody, vec!["https://127.0.0.1:1".into()]).await.unwrap_err(),
    ] {
        assert!(matches!(error, AdminError::NoSuchMember(id) if id == nobody), "{error}");
        assert!(error.to_string().contains("member 7 "), "{error}");
    }

    cluster.run(index);
    let url = cluster.url(index);
    let promoted = async {
        loop {
            match admin.promote(learner.id).await {
                Ok(()) => break,
                Err(AdminError::NotInSync(_)) => {
                    if let Ok(status) = admin.status(&url).await {
                        assert!(status.learner && status.member == learner.id);
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), promoted).await.expect("a learner catches up");
    let members = admin.members().await.unwrap();
    assert!(members.len() == 2 && members.iter().all(|m| !m.learner && !m.name.is_empty()), "{members:?}");

    // The store learns of it and can use it alone.
    etcd.set_endpoints(cluster.options(Some(1)).endpoints).unwrap();
    assert_eq!(etcd.list("/", ListOptions::default()).await.unwrap().entries.len(), 500);

    let status = admin.status(&url).await.unwrap();
    assert!(status.version.starts_with("3."), "{status:?}");
    assert!(status.db_size > 0 && status.db_in_use > 0 && status.db_in_use <= status.db_size, "{status:?}");
    assert!(!status.learner && status.leader == Some(first.id) && status.errors.is_empty(), "{status:?}");
    assert!(status.raft_index > 500 && status.applied_index > 500 && status.revision > 500, "{status:?}");

    admin.move_leader(learner.id).await.unwrap();
    admin.move_leader(learner.id).await.unwrap();
    assert_eq!(admin.status(&cluster.url(0)).await.unwrap().leader, Some(learner.id));
    let error = admin.move_leader(nobody).await.unwrap_err();
    assert!(matches!(error, AdminError::NoSuchMember(_)), "{error}");
    admin.move_leader(first.id).await.unwrap();

    let revision = etcd.revision().await.unwrap().0.cast_signed();
    let hashes =
        [admin.hash(&cluster.url(0), revision).await.unwrap(), admin.hash(&cluster.url(1), revision).await.unwrap()];
    assert_eq!(hashes[0], hashes[1]);

    admin.update(learner.id, vec!["https://127.0.0.9:1".into()]).await.unwrap();
    let moved = admin.members().await.unwrap();
    assert!(moved.iter().any(|m| m.peer_urls == ["https://127.0.0.9:1"]), "{moved:?}");
    admin.update(learner.id, vec![cluster.peer_url(index)]).await.unwrap();
    admin.remove(learner.id).await.unwrap();
    assert_eq!(admin.members().await.unwrap().len(), 1);
    assert_eq!(etcd.list("/", ListOptions::default()).await.unwrap().entries.len(), 500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_is_looked_after() {
    let cluster = EtcdCluster::start(1, false).await;
    let etcd = cluster.connect(Some(0)).await;
    let (admin, url) = (etcd.admin(), cluster.url(0));
    for index in 0..300 {
        etcd.put(&format!("/{}", index % 5), Bytes::from(vec![b'x'; 50_000]), Expect::Any, None).await.unwrap();
    }
    let newest = etcd.revision().await.unwrap();
    etcd.compact(newest).await.unwrap();
    // etcd frees what was compacted in the background.
    let freed = async {
        loop {
            // What is in use is counted when something is committed.
            etcd.put("/tick", Bytes::new(), Expect::Any, None).await.unwrap();
            let status = admin.status(&url).await.unwrap();
            if status.db_in_use < status.db_size / 2 {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let before = tokio::time::timeout(Duration::from_secs(60), freed).await.expect("compaction frees");
    admin.defragment(&url).await.unwrap();
    let after = admin.status(&url).await.unwrap();
    assert!(after.db_size < before.db_size / 2, "{before:?} -> {after:?}");

    let file = cluster.dir().join("snapshot.db");
    let bytes = admin.snapshot(&url, &file).await.unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().len(), bytes);
    let restored = cluster.dir().join("restored");
    let output = std::process::Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args(["snapshot", "restore"])
        .arg(&file)
        .arg("--data-dir")
        .arg(&restored)
        .output()
        .expect("etcdctl is installed (Debian: apt-get install etcd-client)");
    assert!(output.status.success(), "etcd's own tool does not take it: {output:?}");
    let nowhere = cluster.dir().join("no/such/directory/snapshot.db");
    let error = admin.snapshot(&url, &nowhere).await.unwrap_err();
    assert!(matches!(error, AdminError::Io { .. }), "{error}");

    assert_eq!(admin.alarms().await.unwrap(), []);
    let error = admin.disarm(Alarm { member: after.member, kind: AlarmKind::NoSpace }).await;
    assert!(error.is_ok(), "taking back what is not raised changes nothing: {error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_anybody_there() {
    let cluster = EtcdCluster::start(1, true).await;
    let url = cluster.url(0);
    let options = cluster.options(None);
    let admin = Admin::open(&options).unwrap();
    assert_eq!(admin.members_known_to(&url).await.unwrap().len(), 1);
    let error = admin.status("https://127.0.0.1:1").await.unwrap_err();
    assert!(error.to_string().starts_with("https://127.0.0.1:1 does not answer: "), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
    let error = admin.status("127.0.0.1").await.unwrap_err();
    assert!(error.to_string().contains("https://10.0.0.1:2379"), "{error:?}");

    // Certificates of someone else.
    let stranger = EtcdCluster::start(1, true).await;
    let wrong = seawall_store::etcd::Options {
        tls: stranger.options(None).tls,
        budget: Duration::from_millis(500),
        ..options.clone()
    };
    let Err(error) = Etcd::connect(wrong.clone()).await else { panic!("it is not our etcd") };
    assert!(error.to_string().contains("certificate"), "{error}");
    // Mended while it runs.
    let etcd = cluster.connect(None).await;
    etcd.set_tls(&cluster.certificate("another client")).unwrap();
    etcd.put("/a", Bytes::new(), Expect::Any, None).await.unwrap();
    etcd.set_tls(wrong.tls.as_ref().unwrap()).unwrap();
    etcd.put("/a", Bytes::new(), Expect::Any, None).await.expect_err("with certificates of someone else");
    etcd.set_tls(&cluster.certificate("a third client")).unwrap();
    etcd.put("/a", Bytes::new(), Expect::Any, None).await.unwrap();
}
