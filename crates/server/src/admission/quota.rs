//! ResourceQuotas (<https://kubernetes.io/docs/concepts/policy/resource-quotas/>).
//!
//! What a write takes is reserved first, by a conditional write of the quota's status, so that however many write at the
//! same time, on however many servers, no more is taken than there is. What a failed write reserved, and what a
//! deletion frees, is given back at once; what a crash in between leaves behind is found by the controller
//! (`controllers/resource_quota.rs`).

use std::hash::{DefaultHasher, Hash, Hasher};

use seawall_api::{
    Row, Scope,
    quota::{self, Amounts},
};
use seawall_store::{self as store, Expect};
use serde_json::{Value, json};

use crate::{
    Context, Server,
    error::{ApiError, Result},
    object::encode,
};

/// How often a reservation is tried against writers on other servers.
const ATTEMPTS: usize = 32;
/// Reservations in one namespace go one after the other, instead of failing each other's writes.
const TURNS: usize = 16;

/// Whose turn it is to write a quota.
#[derive(Default)]
pub(crate) struct Turns([tokio::sync::Mutex<()>; TURNS]);

impl Turns {
    async fn of(&self, namespace: &str) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        namespace.hash(&mut hasher);
        self.0[hasher.finish() as usize % TURNS].lock().await
    }
}

/// What was taken of which quota (its key).
pub(crate) type Reserved = Vec<(String, Amounts)>;

impl Server {
    /// The keys of the quotas of a namespace that are about an object, each with what it would take.
    fn quotas_about(&self, row: &Row, namespace: &str, object: &Value) -> Vec<(String, Value)> {
        let Some((id, quotas)) = self.registry.by_name("", "resourcequotas") else { return Vec::new() };
        if row.scope != Scope::Namespaced || !row.stored {
            return Vec::new();
        }
        let prefix = format!("{}{namespace}/", quotas.prefix());
        let snapshot = self.cache.snapshot();
        let all = snapshot.range(id, &prefix, None).map(|found| (found.key.to_string(), found.value()));
        all.filter(|(_, quota)| quota::is_about(quota, row.group, row.plural, object)).collect()
    }

    /// Takes what a write needs from the quotas of its namespace. A dry run only asks.
    pub(crate) async fn reserve(
        &self,
        context: &Context<'_>,
        object: &Value,
        old: Option<&Value>,
        dry: bool,
    ) -> Result<Reserved> {
        let row = &context.row;
        let part = context.path.subresource.as_deref().unwrap_or_default();
        // A status takes nothing that was not taken before: what it frees is given back after the write.
        if !matches!(part, "" | "resize") {
            return Ok(Vec::new());
        }
        let quotas = self.quotas_about(row, context.namespace(), object);
        if quotas.is_empty() {
            return Ok(Vec::new());
        }
        let usage = quota::usage(row.group, row.plural, object);
        let mut reserved = Vec::new();
        for (key, known) in quotas {
            let hard = quota::amounts(&known["spec"]["hard"]);
            let before = match old {
                Some(old) if quota::is_about(&known, row.group, row.plural, old) => {
                    quota::usage(row.group, row.plural, old)
                }
                _ => Amounts::new(),
            };
            let (more, _) = quota::difference(&quota::limited(&usage, &hard), &quota::limited(&before, &hard));
            let done = match self.refuse_unsaid(row, &known, &hard, object, old) {
                Err(error) => Err(error),
                Ok(()) if more.is_empty() => continue,
                Ok(()) => self.take_from(context, &key, object, &more, dry).await,
            };
            match done {
                Ok(true) if !dry => reserved.push((key, more)),
                Ok(_) => {}
                Err(error) => {
                    self.give_back(context.namespace(), reserved).await;
                    return Err(error);
                }
            }
        }
        Ok(reserved)
    }

    fn refuse_unsaid(
        &self,
        row: &Row,
        quota: &Value,
        hard: &Amounts,
        object: &Value,
        old: Option<&Value>,
    ) -> Result<()> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let of_pod = row.group.is_empty() && row.plural == "pods" && old.is_none();
        match of_pod.then(|| quota::unsaid(hard, object)).flatten() {
            None => Ok(()),
            Some(why) => {
                let quota = quota["metadata"]["name"].as_str().unwrap_or_default();
                Err(ApiError::forbidden(row, name, format!("failed quota: {quota}: {why}")))
            }
        }
    }

    /// Takes from one quota. Says whether there still is one to take from.
    async fn take_from(
        &self,
        context: &Context<'_>,
        key: &str,
        object: &Value,
        wanted: &Amounts,
        dry: bool,
    ) -> Result<bool> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let _turn = self.turns.of(context.namespace()).await;
        for _ in 0..ATTEMPTS {
            let (entry, _) = self.store.get(key).await.map_err(ApiError::store)?;
            let Some(entry) = entry else { return Ok(false) };
            let mut quota: Value =
                serde_json::from_slice(&entry.value).map_err(|e| ApiError::internal("a quota cannot be read", e))?;
            let (hard, used) = self.usage_of(context.namespace(), &quota).await?;
            let quota_name = quota["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            let after = quota::take(&quota_name, &hard, &used, wanted)
                .map_err(|why| ApiError::forbidden(&context.row, name, why))?;
            if dry {
                return Ok(true);
            }
            quota["status"] =
                json!({"hard": quota["spec"]["hard"], "used": quota::write(&quota::limited(&after, &hard))});
            match self.store.put(key, encode(&quota), Expect::At(entry.revision), context.fence.as_ref()).await {
                Ok(_) => return Ok(true),
                Err(store::Error::Conflict { .. }) => {}
                Err(error) => return Err(ApiError::store(error)),
            }
        }
        Err(ApiError::conflict(&context.row, name, "the quota of its namespace is written all the time; try again"))
    }

    /// What a quota allows and what is used of it. What its status does not say yet is counted.
    async fn usage_of(&self, namespace: &str, quota: &Value) -> Result<(Amounts, Amounts)> {
        let hard = quota::amounts(&quota["spec"]["hard"]);
        let mut used = quota::amounts(&quota["status"]["used"]);
        used.retain(|name, _| hard.contains_key(name));
        let unknown: Vec<&String> = hard.keys().filter(|name| !used.contains_key(*name)).collect();
        if unknown.is_empty() {
            return Ok((hard, used));
        }
        let snapshot = self.consistent().await?;
        let mut kinds: Vec<(&str, &str)> = unknown.iter().map(|name| quota::resource_of(name)).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let mut counted = Amounts::new();
        for (group, plural) in kinds {
            let Some((id, row)) = self.registry.by_name(group, plural) else { continue };
            let prefix = format!("{}{namespace}/", row.prefix());
            for object in snapshot.range(id, &prefix, None).map(|object| object.value()) {
                if quota::is_about(quota, group, plural, &object) {
                    counted = quota::sum(counted, &quota::usage(group, plural, &object));
                }
            }
        }
        for name in unknown {
            let zero = seawall_api::quantity::Quantity::new(0);
            used.insert(name.clone(), counted.get(name).copied().unwrap_or(zero));
        }
        Ok((hard, used))
    }

    /// Gives back what was reserved for a write that did not happen.
    pub(crate) async fn give_back(&self, namespace: &str, reserved: Reserved) {
        for (key, less) in reserved {
            if let Err(error) = self.give_back_to(namespace, &key, &less).await {
                // The controller finds it.
                tracing::warn!(key, %error, "a reservation is not given back");
            }
        }
    }

    async fn give_back_to(&self, namespace: &str, key: &str, less: &Amounts) -> Result<(), store::Error> {
        let _turn = self.turns.of(namespace).await;
        for _ in 0..ATTEMPTS {
            let (entry, _) = self.store.get(key).await?;
            let Some(entry) = entry else { return Ok(()) };
            let Ok(mut quota) = serde_json::from_slice::<Value>(&entry.value) else { return Ok(()) };
            let used = quota::amounts(&quota["status"]["used"]);
            let after = quota::give_back(&used, less);
            if after == used {
                return Ok(());
            }
            quota["status"]["used"] = quota::write(&after);
            match self.store.put(key, encode(&quota), Expect::At(entry.revision), None).await {
                Ok(_) => return Ok(()),
                Err(store::Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Gives back what a write has freed: a deletion, a pod that is over, a claim that got smaller.
    pub(crate) async fn free(&self, row: &Row, old: &Value, new: Option<&Value>) {
        let namespace = old["metadata"]["namespace"].as_str().unwrap_or_default();
        if namespace.is_empty() {
            return;
        }
        let quotas = self.quotas_about(row, namespace, old);
        if quotas.is_empty() {
            return;
        }
        let before = quota::usage(row.group, row.plural, old);
        let mut freed = Vec::new();
        for (key, quota) in quotas {
            let after = match new {
                Some(new) if quota::is_about(&quota, row.group, row.plural, new) => {
                    quota::usage(row.group, row.plural, new)
                }
                _ => Amounts::new(),
            };
            let (_, less) = quota::difference(&after, &before);
            let less = quota::limited(&less, &quota::amounts(&quota["spec"]["hard"]));
            if !less.is_empty() {
                freed.push((key, less));
            }
        }
        self.give_back(namespace, freed).await;
    }
}
