//! A worker begins what the state machine wants.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::LifecycleHandler;
use tokio::{sync::watch, time::Instant};

use super::{Done, Worker};
use crate::{
    container::{self, Start},
    events::Kind,
    handler::Target,
    operations,
    pod::{
        self, Class,
        machine::{Action, Op},
        qos, status,
    },
    volume,
};

impl Worker {
    pub(super) fn begin(&mut self, action: Action, now: Timestamp) {
        let agent = Arc::clone(&self.agent);
        let (pod, uid) = (Arc::clone(&self.given), self.uid.clone());
        match action {
            Action::Prepare => {
                self.agent.watches.subscribe(&self.uid, &self.changed, &volume::watched(&self.pod));
                let volumes = Arc::clone(&self.volumes);
                let ips = self.observed.sandbox().map(|s| s.ips.clone()).unwrap_or_default();
                let limits = qos::pod_limits(&pod);
                self.spawn(Some(Op::Prepare), async move {
                    Done::Prepared(operations::prepare(&agent, &pod, &ips, &volumes).await, limits)
                });
            }
            Action::CreateSandbox { previous, attempt } => {
                if previous.is_some() {
                    let message = "Pod sandbox changed, it will be killed and re-created.";
                    agent.events.pod(&pod, Kind::Normal, "SandboxChanged", message);
                }
                self.spawn(Some(Op::Sandbox), async move {
                    Done::Sandbox(operations::create_sandbox(&agent, &pod, previous, attempt).await)
                });
            }
            Action::Start { name, restart_count, restart_of } => {
                if let Some(failed) = restart_of {
                    self.facts.backoffs.next(&name, failed, now);
                }
                let remembered = self.pod.status.as_ref().and_then(|s| {
                    let all = s.container_statuses.iter().chain(&s.init_container_statuses).flatten();
                    all.into_iter()
                        .find(|c| c.name == name && c.container_id.is_some())
                        .map(|c| c.restart_count as u32 + 1)
                });
                let known = self.observed.newest(&name).is_some();
                let restart_count = if known { restart_count } else { remembered.unwrap_or(restart_count) };
                let start = Start {
                    agent,
                    pod,
                    observed: Arc::clone(&self.observed),
                    volumes: self.paths.clone(),
                    name: name.clone(),
                    restart_count,
                };
                let made = start.pod.spec.as_ref().and_then(|s| pod::find_container(s, &name));
                let resources = made.and_then(|(_, made)| made.resources).unwrap_or_default();
                let cancel = self.stopping.clone();
                self.spawn(Some(Op::Container(name.clone())), async move {
                    let result = Box::pin(start.run(&cancel)).await;
                    Done::Started(name, result, resources)
                });
            }
            Action::Resize => self.spawn_resize(pod),
            Action::Kill { name, id, grace, message, anew } => {
                if anew {
                    self.facts.anew.insert(id.clone());
                }
                let text = if message.is_empty() { format!("Stopping container {name}") } else { message };
                agent.events.container(&pod, &name, Kind::Normal, "Killing", text);
                let (sender, deadline) = watch::channel(Instant::now() + grace);
                self.deadlines.insert(id.clone(), sender);
                self.facts.killing.insert(id.clone(), now + grace);
                let hook = self.pre_stop(&name, &id);
                self.spawn(Some(Op::Container(name)), async move {
                    let result = container::stop(&agent, &id, hook, deadline).await;
                    Done::Stopped(id, result.map_err(|s| s.message().to_owned()))
                });
            }
            Action::Hasten { id, grace } => {
                self.facts.killing.insert(id.clone(), now + grace);
                if let Some(deadline) = self.deadlines.get(&id) {
                    deadline.send_replace(Instant::now() + grace);
                }
            }
            Action::StopSandbox { id } => self.spawn(Some(Op::Sandbox), async move {
                Done::Removed(agent.cri.stop_sandbox(&id).await.map_err(|s| s.message().to_owned()))
            }),
            Action::RemoveSandbox { id } => self.spawn(Some(Op::Remove(id.clone())), async move {
                Done::Removed(agent.cri.remove_sandbox(&id).await.map_err(|s| s.message().to_owned()))
            }),
            Action::RemoveContainer { id } => self.spawn(Some(Op::Remove(id.clone())), async move {
                Done::Removed(agent.cri.remove_container(&id).await.map_err(|s| s.message().to_owned()))
            }),
            Action::Fail { reason, message } => {
                agent.events.pod(&pod, Kind::Normal, reason, message.clone());
                self.facts.rejected = Some((reason.to_owned(), message));
                self.facts.stop_began.get_or_insert(now);
                self.stopping.cancel();
                self.changed.notify_one();
            }
            Action::Teardown => {
                // Nothing of it runs any more. It may not be in the API for long now, and who is bound here in its place wants
                // what it had.
                if !self.admission.is_given {
                    self.agent.release_for_good(&uid);
                }
                self.spawn(Some(Op::Teardown), async move { Done::TornDown(operations::teardown(&agent, &uid).await) })
            }
            Action::Finalize => {
                let last = status::status(&self.given, &self.observed, &self.facts, &self.node_facts(), now);
                let patch = status::patch(&self.uid, self.pod.status.as_ref(), &last);
                self.spawn(Some(Op::Finalize), async move {
                    Done::Finalized(operations::finalize(&agent, &pod, patch).await)
                });
            }
            Action::Exit => {}
        }
    }

    fn pre_stop(&self, name: &str, id: &str) -> Option<(Target, LifecycleHandler)> {
        let spec = self.pod.spec.as_ref()?;
        let (class, container) = pod::find_container(spec, name)?;
        let hook = container.lifecycle.as_ref()?.pre_stop.clone().filter(|_| class != Class::Ephemeral)?;
        Some((container::target(&self.agent, &container, id, &self.observed, spec), hook))
    }
}
