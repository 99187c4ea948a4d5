//! What came of that which a worker began.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{Done, Worker, revision};
use crate::{
    container,
    events::Kind,
    hooks,
    pod::{
        self,
        machine::{Facts, Health, Op, Waiting},
    },
};

impl Worker {
    pub(super) fn finish(&mut self, op: Option<Op>, done: Done, now: Timestamp) {
        if let Some(op) = &op {
            self.facts.busy.remove(op);
            self.facts.retry.remove(op);
        }
        self.observed = Arc::clone(&self.runtime.borrow_and_update());
        let retry = |facts: &mut Facts, seconds: u64| {
            if let Some(op) = op {
                facts.retry.insert(op, now + Duration::from_secs(seconds));
            }
        };
        let (events, pod) = (&self.agent.events, Arc::clone(&self.pod));
        match done {
            Done::Prepared(Ok(made), limits) => {
                self.facts.prepared = true;
                self.facts.resize.cgroup = Some(limits);
                self.mount_failures = 0;
                (self.paths, self.renew) = (made.paths, made.renew);
            }
            Done::Prepared(Err(error), _) => {
                tracing::info!(pod = pod::name(&pod), "{error}");
                events.pod(&pod, Kind::Warning, "FailedMount", error.to_string());
                self.mount_failures += 1;
                retry(&mut self.facts, (1 << self.mount_failures.min(7)) - 1);
            }
            Done::Refreshed(result) => {
                self.refreshing = false;
                match result {
                    Ok(made) => self.renew = made.renew,
                    Err(error) => {
                        events.pod(&pod, Kind::Warning, "FailedMount", error.to_string());
                        self.renew = Some(now + Duration::from_secs(30));
                    }
                }
            }
            Done::Sandbox(Ok(())) => {}
            Done::Sandbox(Err(message)) => {
                events.pod(
                    &pod,
                    Kind::Warning,
                    "FailedCreatePodSandBox",
                    format!("Failed to create pod sandbox: {message}"),
                );
                retry(&mut self.facts, 2);
            }
            Done::Started(name, Ok(id), resources) => {
                self.facts.resize.actuated.insert(id.clone(), resources);
                self.started(&name, id);
            }
            Done::Started(name, Err(why), _) => {
                tracing::info!(
                    pod = pod::name(&pod),
                    name,
                    reason = why.reason,
                    message = why.message,
                    "a container did not start"
                );
                if why.reason == "ErrImagePull" {
                    let key = format!("image/{name}");
                    self.facts.backoffs.next(&key, now, now);
                    let wait = self.facts.backoffs.wait(&key).as_secs();
                    retry(&mut self.facts, wait);
                    let image = pod
                        .spec
                        .as_ref()
                        .and_then(|s| pod::find_container(s, &name))
                        .and_then(|(_, c)| c.image)
                        .unwrap_or_default();
                    let message = format!("Back-off pulling image {image:?}: ErrImagePull: {}", why.message);
                    let next = Waiting { reason: "ImagePullBackOff".into(), message };
                    self.later.insert(name.clone(), (now + Duration::from_secs(2), next));
                } else {
                    retry(&mut self.facts, 10);
                }
                self.facts.waiting.insert(name, why);
            }
            Done::Hook(name, id, result) => {
                if let Err(message) = result {
                    events.container(
                        &pod,
                        &name,
                        Kind::Warning,
                        "FailedPostStartHook",
                        format!("PostStartHook failed: {message}"),
                    );
                    self.facts.health.entry(id).or_default().hook_failed = true;
                } else if let Some(health) = self.facts.health.get_mut(&id) {
                    health.post_start = true;
                }
            }
            Done::Stopped(id, result) => {
                self.deadlines.remove(&id);
                self.facts.killing.remove(&id);
                if let Err(message) = result {
                    tracing::warn!(pod = pod::name(&pod), id, message, "cannot stop a container");
                    retry(&mut self.facts, 1);
                }
            }
            Done::Removed(Ok(())) => {}
            Done::Removed(Err(message)) => {
                tracing::warn!(pod = pod::name(&pod), message, "cannot stop or remove in the runtime");
                retry(&mut self.facts, 1);
            }
            Done::Resized(Ok(after), limits) => self.resized(after, limits),
            Done::Resized(Err(message), limits) => {
                self.not_resized(message, limits);
                retry(&mut self.facts, 10);
            }
            Done::Node(node) => self.took_node(*node),
            Done::Given(kept, result) => self.was_given(*kept, result, now),
            Done::TornDown(Ok(())) => self.facts.torn_down = true,
            Done::TornDown(Err(message)) => {
                tracing::warn!(pod = pod::name(&pod), message, "cannot take the pod's volumes away");
                retry(&mut self.facts, 1);
            }
            Done::Finalized(Ok(())) => self.facts.finalized = true,
            Done::Finalized(Err(error)) => {
                tracing::warn!(pod = pod::name(&pod), "cannot delete the pod from the API: {error}");
                retry(&mut self.facts, 1);
            }
            Done::Claims(result) => self.took_claims(result, now),
            Done::Permit(epoch, result) => self.took_permit(epoch, *result, now),
            Done::Written(result) => {
                self.writing = false;
                match *result {
                    Ok(written) if self.is_static => {
                        // The watch may be ahead of the answer.
                        if let Some(mirror) = &self.mirror
                            && pod::uid(mirror) == pod::uid(&written)
                            && revision(mirror) < revision(&written)
                        {
                            self.mirror = Some(Arc::new(written));
                        }
                    }
                    Ok(written) => {
                        let newer = revision(&written).zip(revision(&self.pod)).is_none_or(|(new, old)| new >= old);
                        if newer && pod::uid(&written) == self.uid {
                            self.take_pod(Arc::new(pod::lean(written)));
                        }
                    }
                    // It is gone or another one by now; the watch will say so.
                    Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {
                        self.write_after = Some(now + Duration::from_secs(2));
                    }
                    Err(error) => {
                        tracing::debug!(pod = pod::name(&pod), "cannot write the status: {error}");
                        self.write_after = Some(now + Duration::from_secs(1));
                    }
                }
            }
        }
    }

    fn started(&mut self, name: &str, id: String) {
        self.facts.waiting.remove(name);
        self.later.remove(name);
        self.facts.backoffs.forget(&format!("image/{name}"));
        self.started_here.insert(id.clone());
        let Some(spec) = &self.pod.spec else { return };
        let hook =
            pod::find_container(spec, name).and_then(|(_, c)| Some((c.lifecycle.as_ref()?.post_start.clone()?, c)));
        self.facts.health.insert(id.clone(), Health { post_start: hook.is_none(), ..Default::default() });
        if let Some((hook, container)) = hook {
            let target = container::target(&self.agent, &container, &id, &self.observed, spec);
            let name = name.to_owned();
            self.spawn(None, async move {
                let result = hooks::run(&target, &hook, Duration::from_secs(3600)).await;
                Done::Hook(name, id, result.map_err(|e| format!("{e:#}")))
            });
        }
    }
}
