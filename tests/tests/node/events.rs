//! The runtime's events: what happens to a container shows without anybody asking for it.

use std::time::Duration;

use jiff::Timestamp;
use seawall_tests::{Server, on_a_machine};

use super::IMAGE;

#[test]
fn the_end_of_a_container_shows_at_once() {
    on_a_machine(async |machine| {
        let server = Server::with_node(&machine).await;
        server.web_image(IMAGE, "unused").await;
        let k = &server.kubectl;
        // Everything is listed each ten seconds. These end two seconds apart, so one of them would show six later or more.
        let ends = [3, 5, 7, 9];
        let run = async |seconds: i32| {
            let name = format!("ends-after-{seconds}");
            k.apply(&format!(
                "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  containers: [{{name: c, image: {IMAGE}, command: [sh, -c, 'sleep {seconds}; exit 7']}}]
"
            ))
            .await;
            k.run(&format!("wait pod/{name} --for=jsonpath={{.status.phase}}=Failed --timeout=60s")).await.ok();
            let seen = Timestamp::now();
            let ended =
                k.path(&format!("pod/{name}"), "{.status.containerStatuses[0].state.terminated.finishedAt}").await;
            // Whole seconds are said.
            seen.duration_since(ended.parse().unwrap()).unsigned_abs().saturating_sub(Duration::from_secs(1))
        };
        // It is known with the first pod whether there are events.
        run(1).await;
        assert!(server.logged("the runtime tells what happens"), "{}", server.log_tail());
        let late = tokio::join!(run(ends[0]), run(ends[1]), run(ends[2]), run(ends[3]));
        let late = late.0.max(late.1).max(late.2).max(late.3);
        assert!(late < Duration::from_secs(4), "{late:?}");
    });
}
