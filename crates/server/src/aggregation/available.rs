//! Which groups are there, and whether those of others answer: the conditions of APIServices.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use http::StatusCode;
use jiff::Timestamp;
use seawall_api::custom::names;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{GROUP, PLURAL, Remote};
use crate::{
    Context, Server,
    delete::DeleteOptions,
    error::{ApiError, Result},
    request::ResourcePath,
    write::timestamp,
};

/// How often APIServices are looked through.
const LOOK: Duration = Duration::from_secs(1);
/// How often a server that answers is asked again: upstream's time.
const AGAIN: Duration = Duration::from_secs(30);
/// How long it has to answer: upstream's time.
const ANSWER: Duration = Duration::from_secs(5);
/// Says that an APIService is looked after here.
const MANAGED: &str = "kube-aggregator.kubernetes.io/automanaged";

/// Keeps all APIServices as they have to be, until the server stops.
pub(crate) async fn keep(server: Arc<Server>) {
    let stop = server.stop.clone();
    stop.run_until_cancelled(async {
        let mut seen = Seen::default();
        loop {
            if let Err(error) = server.look_after_services(&mut seen).await {
                tracing::debug!(error = error.message, "APIServices were not looked through");
            }
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
}

/// What is remembered from one look to the next.
#[derive(Default)]
struct Seen {
    /// The groups and versions that were registered.
    own: Vec<(&'static str, &'static str)>,
    /// When a server was asked, and whether it answered.
    asked: BTreeMap<String, (Instant, bool, Arc<Remote>)>,
    identified: Option<Instant>,
}

/// How an APIService is.
struct Verdict {
    available: bool,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn no(reason: &'static str, message: impl Into<String>) -> Verdict {
        Verdict { available: false, reason, message: message.into() }
    }
}

impl Server {
    async fn look_after_services(self: &Arc<Self>, seen: &mut Seen) -> Result<()> {
        if seen.identified.is_none_or(|at| at.elapsed() > AGAIN) {
            self.identify().await?;
            seen.identified = Some(Instant::now());
        }
        let own = self.registry.group_versions();
        if seen.own != own {
            self.register(&own).await?;
            seen.own = own;
        }
        let remotes = self.remotes();
        let names: BTreeSet<&String> = remotes.iter().map(|remote| &remote.name).collect();
        seen.asked.retain(|name, _| names.contains(name));
        self.aggregation.discovered.lock().retain(|name, _| names.contains(name));
        for remote in remotes.iter() {
            let again = seen
                .asked
                .get(&remote.name)
                .is_none_or(|(at, well, known)| !well || at.elapsed() > AGAIN || known != remote);
            if again {
                let verdict = self.judge(remote).await;
                seen.asked.insert(remote.name.clone(), (Instant::now(), verdict.available, remote.clone()));
                self.say(&remote.name, &verdict).await?;
            }
        }
        Ok(())
    }

    /// Registers what is served here, and takes away what is not any more.
    async fn register(self: &Arc<Self>, own: &[(&'static str, &'static str)]) -> Result<()> {
        let built_in: BTreeSet<&str> = self.registry.rows().map(|(_, row)| row.group).collect();
        let local =
            Verdict { available: true, reason: "Local", message: "Local APIServices are always available".into() };
        for (place, (group, version)) in own.iter().enumerate() {
            let name = format!("{version}.{group}");
            let there = self.find(GROUP, PLURAL, "", &name).await?;
            if there.is_none() {
                let (managed, priority) = match built_in.contains(group) {
                    true => ("onstart", 18_000 - 10 * i64::try_from(place).unwrap_or_default()),
                    false => ("true", 1000),
                };
                let rank =
                    own.iter().filter(|(g, v)| g == group && names::priority(v) < names::priority(version)).count();
                let service = json!({"metadata": {"name": name, "labels": {MANAGED: managed}},
                    "spec": {"group": group, "version": version, "groupPriorityMinimum": priority.max(1),
                        "versionPriority": 100 + rank}});
                self.ensure(GROUP, PLURAL, service, false).await?;
            }
            self.say(&name, &local).await?;
        }
        let (id, row) = self.registry.by_name(GROUP, PLURAL).ok_or_else(ApiError::no_route)?;
        let served = self.registry.find(row.group, row.version, row.plural).ok_or_else(ApiError::no_route)?;
        let snapshot = self.cache.snapshot();
        let gone: Vec<String> = snapshot
            .of(id)
            .values()
            .map(|object| object.value())
            .filter(|service| {
                let is = |(group, version): &(&str, &str)| {
                    service["spec"]["group"] == *group && service["spec"]["version"] == *version
                };
                service["metadata"]["labels"][MANAGED] == "true" && !own.iter().any(is)
            })
            .filter_map(|service| service["metadata"]["name"].as_str().map(str::to_owned))
            .collect();
        drop(snapshot);
        let path = ResourcePath {
            group: row.group.into(),
            version: row.version.into(),
            resource: row.plural.into(),
            ..Default::default()
        };
        let context = Context::own(&self.registry, path, &served);
        for name in gone {
            match self.delete_object(&context, &name, &DeleteOptions::default()).await {
                Err(error) if error.code != StatusCode::NOT_FOUND => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether another server is there and serves what it is registered for.
    async fn judge(self: &Arc<Self>, remote: &Remote) -> Verdict {
        let (namespace, name, port) = &remote.service;
        let snapshot = self.cache.snapshot();
        let Some(service) = self.lookup(&snapshot, "", "services", namespace, name) else {
            let message = format!("service/{name} in {namespace:?} is not present");
            return self.lost(remote, Verdict::no("ServiceNotFound", message));
        };
        let service = service.value();
        drop(snapshot);
        let mut ports = service["spec"]["ports"].as_array().into_iter().flatten();
        if !ports.any(|p| p["port"].as_u64() == Some(u64::from(*port))) {
            let message = format!("service/{name} in {namespace:?} is not listening on port {port}");
            return self.lost(remote, Verdict::no("ServicePortError", message));
        }
        let path = format!("/apis/{}/{}", remote.group, remote.version);
        let url = format!("https://{}:{port}{path}", remote.host());
        let failed =
            |why: String| Verdict::no("FailedDiscoveryCheck", format!("failing or missing response from {url}: {why}"));
        match tokio::time::timeout(ANSWER, self.ask_remote(remote, &path)).await {
            Err(_) => self.lost(remote, failed("context deadline exceeded".into())),
            Ok(Err(why)) => self.lost(remote, failed(why)),
            Ok(Ok((StatusCode::OK, list))) => {
                self.aggregation.discovered.lock().insert(remote.name.clone(), (list, true));
                self.aggregation.specs.answers(&remote.name);
                Verdict { available: true, reason: "Passed", message: "all checks passed".into() }
            }
            Ok(Ok((status, _))) => self.lost(remote, failed(format!("bad status {status}"))),
        }
    }

    /// What a server said is remembered, and that it does not say so any more.
    fn lost(&self, remote: &Remote, verdict: Verdict) -> Verdict {
        if let Some((_, current)) = self.aggregation.discovered.lock().get_mut(&remote.name) {
            *current = false;
        }
        verdict
    }

    /// Writes the condition of an APIService, if it is another than before.
    async fn say(self: &Arc<Self>, name: &str, verdict: &Verdict) -> Result<()> {
        let Some(service) = self.find(GROUP, PLURAL, "", name).await?.map(|service| service.value()) else {
            return Ok(());
        };
        let status = if verdict.available { "True" } else { "False" };
        let conditions = service["status"]["conditions"].as_array();
        let known = conditions.into_iter().flatten().find(|c| c["type"] == "Available");
        let same =
            |c: &Value| c["status"] == status && c["reason"] == verdict.reason && c["message"] == *verdict.message;
        if known.is_some_and(same) {
            return Ok(());
        }
        let since = match known {
            Some(known) if known["status"] == status => known["lastTransitionTime"].clone(),
            _ => timestamp(Timestamp::now()),
        };
        let condition = json!({"type": "Available", "status": status, "reason": verdict.reason,
            "message": verdict.message, "lastTransitionTime": since});
        let mut next = service;
        next["status"] = json!({"conditions": [condition]});
        self.put_status(GROUP, PLURAL, next).await
    }
}
