//! Huge pages: the node has them, a pod is given them as a volume, and no pod gets more than there are.

use seawall_tests::{Server, kubectl::has, on_a_machine, until};

use super::IMAGE;

/// All machines share this host's.
const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Sets some aside, and puts back what was.
struct Reserved(String);

impl Reserved {
    fn new(pages: u64) -> Reserved {
        let before = std::fs::read_to_string(PAGES).expect("a kernel with huge pages of 2 MiB");
        std::fs::write(PAGES, pages.to_string()).unwrap();
        let now: u64 = std::fs::read_to_string(PAGES).unwrap().trim().parse().unwrap();
        assert!(now >= pages, "the host has no memory in one piece for {pages} huge pages, only for {now}");
        Reserved(before)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(PAGES, &self.0);
    }
}

fn pod(name: &str, amount: &str, medium: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 0
  volumes: [{{name: huge, emptyDir: {{medium: {medium}}}}}]
  containers:
  - name: main
    image: {IMAGE}
    command: [sleep, '10000']
    volumeMounts: [{{name: huge, mountPath: /huge}}]
    resources: {{limits: {{hugepages-2Mi: {amount}, memory: 32Mi}}}}
---"
    )
}

#[test]
fn pods_have_huge_pages() {
    let _reserved = Reserved::new(4);
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        assert_eq!(k.path("nodes", "{.items[0].status.capacity.hugepages-2Mi}").await, "8Mi");
        assert_eq!(k.path("nodes", "{.items[0].status.allocatable.hugepages-2Mi}").await, "8Mi");
        k.apply(&format!(
            "{}{}{}",
            pod("some", "4Mi", "HugePages"),
            pod("most", "6Mi", "HugePages-2Mi"),
            pod("odd", "2Mi", "Stone")
        ))
        .await;
        k.run("wait pod/some --for=condition=Ready --timeout=60s").await.ok();
        has(k.run("exec some -- grep /huge /proc/mounts").await.ok(), &["hugetlbfs", "pagesize=2M"]);
        k.run("exec some -- fallocate -l 4194304 /huge/file").await.ok();
        // What is taken is taken; whoever wants more than is left waits.
        k.reaches("pod/most", "{.status.conditions[?(@.type=='PodScheduled')].reason}", "Unschedulable").await;
        has(k.run("get events --field-selector involvedObject.name=most").await.ok(), &["Insufficient hugepages-2Mi"]);
        until("the node says what it does not know", async || {
            let events = k.run("get events --field-selector involvedObject.name=odd").await.ok();
            events.contains("unknown storage medium \"Stone\"").then_some(())
        })
        .await;
        k.run("delete pod some --wait=true").await.ok();
        k.run("wait pod/most --for=condition=Ready --timeout=60s").await.ok();
    });
}
