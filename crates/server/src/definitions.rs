//! What a CustomResourceDefinition needs beyond being stored: names, conditions, and an end
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/>).
//!
//! As upstream has it in its API server, this runs in every one: each pass decides from the definitions as they are, and
//! a write that somebody else was faster with is decided anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use seawall_api::{
    Row,
    custom::names::{self, Taken},
};
use seawall_store::{self as store, Expect};
use serde_json::{Value, json};

use crate::{
    Context, Server,
    cache::Interest,
    delete::DeleteOptions,
    error::{ApiError, Result},
    object::{Object, encode},
    registry::ResourceId,
    request::ResourcePath,
    write::{meta, timestamp},
};

/// Holds a definition until its objects are gone.
const FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";
/// How soon to look again while objects wait for their own finalizers, or a write failed.
const AGAIN: Duration = Duration::from_millis(300);
/// How many objects are deleted before other definitions get their turn.
const AT_ONCE: usize = 500;

/// Marks a definition whose deletion begins.
pub(crate) fn begin_deletion(definition: &mut Value, now: Timestamp) {
    let meta = meta(definition);
    let finalizers = meta.entry("finalizers").or_insert_with(|| json!([]));
    if let Some(list) = finalizers.as_array_mut()
        && !list.iter().any(|f| f == FINALIZER)
    {
        list.push(FINALIZER.into());
    }
    let message = "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon";
    terminating(definition, "True", "InstanceDeletionPending", message, now);
}

fn terminating(definition: &mut Value, status: &str, reason: &str, message: &str, now: Timestamp) {
    let now = timestamp(now);
    let condition = ("Terminating", status, reason, message.to_owned());
    names::set_condition(&mut definition["status"]["conditions"], condition, now.as_str().unwrap_or_default());
}

/// What is remembered of a definition.
struct Known {
    group: String,
    accepted: Value,
    settled: bool,
}

impl Known {
    fn of(definition: &Value) -> Known {
        Known {
            group: definition["spec"]["group"].as_str().unwrap_or_default().to_owned(),
            accepted: definition["status"]["acceptedNames"].clone(),
            settled: seawall_api::custom::condition(definition, "NamesAccepted"),
        }
    }
}

/// Keeps all definitions as they have to be, until the server stops.
pub(crate) async fn keep(server: Arc<Server>) {
    let Some((id, row)) = server.registry.by_name("apiextensions.k8s.io", "customresourcedefinitions") else { return };
    let row = row.clone();
    let stop = server.stop.clone();
    stop.run_until_cancelled(async {
        let mut known = BTreeMap::new();
        loop {
            // Starts over only if it has fallen off the end of the log.
            follow(&server, id, &row, &mut known).await;
        }
    })
    .await;
}

async fn follow(server: &Arc<Server>, id: ResourceId, row: &Row, known: &mut BTreeMap<String, Known>) {
    let snapshot = server.cache.snapshot();
    let mut subscription = server.cache.subscribe(id, snapshot.revision, Interest::Everything);
    known.clear();
    let mut due: BTreeSet<String> = BTreeSet::new();
    for object in snapshot.of(id).values() {
        known.insert(object.name().to_owned(), Known::of(&object.value()));
        due.insert(object.name().to_owned());
    }
    drop(snapshot);
    loop {
        loop {
            let Ok(changes) = subscription.take(64) else { return };
            if changes.is_empty() {
                break;
            }
            for change in changes {
                let Some(object) = change.new.as_ref().or(change.old.as_ref()) else { continue };
                let (name, now) = (object.name().to_owned(), Known::of(&object.value()));
                let before = known.remove(&name);
                if change.new.is_none() {
                    due.extend(waiting(known, &now.group));
                    continue;
                }
                if before.is_some_and(|before| before.accepted != now.accepted) {
                    due.extend(waiting(known, &now.group));
                }
                known.insert(name.clone(), now);
                due.insert(name);
            }
        }
        let mut again = false;
        for name in std::mem::take(&mut due) {
            let before = known.get(&name).map(|k| k.accepted.clone());
            match server.settle(id, row, &name, known).await {
                Ok(true) => {}
                Ok(false) => again = due.insert(name.clone()) || again,
                Err(error) => {
                    tracing::debug!(error = error.message, name, "a definition is tried again");
                    again = due.insert(name.clone()) || again;
                }
            }
            // It has been given other names, so that those from before are free.
            if let Some(now) = known.get(&name).filter(|now| Some(&now.accepted) != before.as_ref()) {
                let freed = waiting(known, &now.group);
                due.extend(freed.into_iter().filter(|other| *other != name));
            }
        }
        tokio::select! {
            () = subscription.changed() => {}
            () = tokio::time::sleep(AGAIN), if again => {}
        }
    }
}

/// The definitions of a group that have not been given all their names.
fn waiting(known: &BTreeMap<String, Known>, group: &str) -> Vec<String> {
    known.iter().filter(|(_, k)| k.group == group && !k.settled).map(|(name, _)| name.clone()).collect()
}

impl Server {
    /// Brings one definition where it has to be. Says whether there is nothing left to do.
    async fn settle(
        self: &Arc<Self>,
        id: ResourceId,
        row: &Row,
        name: &str,
        known: &mut BTreeMap<String, Known>,
    ) -> Result<bool> {
        let Some(object) = self.cache.snapshot().get(id, &row.key("", name)).cloned() else { return Ok(true) };
        let definition = object.value();
        let mut next = definition.clone();
        let now = Timestamp::now();
        let time = timestamp(now);
        let mut taken = Taken::default();
        let group = definition["spec"]["group"].as_str().unwrap_or_default();
        for (_, other) in known.iter().filter(|(other, k)| *other != name && k.group == group) {
            taken.add(&other.accepted);
        }
        next["status"] = names::judge(&definition, &taken, time.as_str().unwrap_or_default());
        let mut done = true;
        let held = definition["metadata"]["finalizers"].as_array().into_iter().flatten().any(|f| f == FINALIZER);
        if definition["metadata"]["deletionTimestamp"].is_string() && held {
            let left = self.delete_instances(name).await?;
            done = left == 0;
            if left > 0 {
                terminating(
                    &mut next,
                    "True",
                    "InstanceDeletionInProgress",
                    "CustomResource deletion is in progress",
                    now,
                );
            } else {
                terminating(&mut next, "False", "InstanceDeletionCompleted", "removed all instances", now);
                if let Some(list) = next["metadata"]["finalizers"].as_array_mut() {
                    list.retain(|f| f != FINALIZER);
                    if list.is_empty() {
                        meta(&mut next).remove("finalizers");
                    }
                }
            }
        }
        if next == definition {
            return Ok(done);
        }
        self.write_definition(row, &object, next.clone()).await?;
        known.insert(name.to_owned(), Known::of(&next));
        Ok(done)
    }

    async fn write_definition(&self, row: &Row, before: &Object, mut next: Value) -> Result<()> {
        meta(&mut next).remove("resourceVersion");
        let expect = Expect::At(before.revision);
        let written = match crate::delete::is_finished(row, &next) {
            true => self.store.delete(&before.key, expect, None).await,
            false => self.store.put(&before.key, encode(&next), expect, None).await,
        };
        match written {
            Ok(revision) => self.cache.at_least(revision).await.map(|_| ()),
            // Most often another server, which decided the same.
            Err(store::Error::Conflict { .. }) => Err(ApiError::modified(row, before.name())),
            Err(error) => Err(ApiError::store(error)),
        }
    }

    /// Deletes all objects of a definition; says how many are left.
    async fn delete_instances(self: &Arc<Self>, name: &str) -> Result<usize> {
        let rows = self.registry.all_rows();
        let own = rows.iter().find(|(_, row)| row.custom.as_ref().is_some_and(|v| *v.definition.name == *name));
        let Some((id, row)) = own else { return Ok(0) };
        let served = self.registry.custom().served_of(row);
        let snapshot = self.consistent().await?;
        let objects: Vec<Arc<Object>> = snapshot.of(*id).values().cloned().collect();
        drop(snapshot);
        let Some(served) = served else {
            // Nothing is served any more, so that nobody could wait for finalizers.
            for object in &objects {
                match self.store.delete(&object.key, Expect::At(object.revision), None).await {
                    Ok(_) => {}
                    Err(store::Error::Conflict { .. }) => return Ok(objects.len()),
                    Err(error) => return Err(ApiError::store(error)),
                }
            }
            return Ok(0);
        };
        // Those that wait for finalizers of others are only counted.
        let going = |object: &Object| object.value()["metadata"]["deletionTimestamp"].is_string();
        let mut left = objects.len();
        for object in objects.iter().filter(|object| !going(object)).take(AT_ONCE) {
            let namespace = Some(object.namespace(row).to_owned()).filter(|n| !n.is_empty());
            let path = ResourcePath {
                group: row.group.into(),
                version: served.version.into(),
                resource: row.plural.into(),
                namespace,
                ..Default::default()
            };
            let context = Context::own(&self.registry, path, &served);
            match self.delete_object(&context, object.name(), &DeleteOptions::default()).await {
                Ok((_, _, true)) => left -= 1,
                Ok(_) => {}
                Err(error) if error.code == http::StatusCode::NOT_FOUND => left -= 1,
                Err(error) => return Err(error),
            }
        }
        Ok(left)
    }
}
