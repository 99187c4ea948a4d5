//! What nobody needs: images that no container uses, and dead containers.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use tokio::time::Instant;

use super::{
    images::{Image, Records},
    used_images,
};
use crate::{
    Agent,
    events::Kind,
    pause,
    pod::observed::State,
    pressure::{Levels, Signal},
};

/// How often images are looked at.
const PERIOD: std::time::Duration = std::time::Duration::from_secs(60);
/// How often all that nobody needs is given back, while the disk is short.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(10);

/// Deletes images and dead containers.
pub struct Collector {
    agent: Arc<Agent>,
    records: Records,
    next: Option<Instant>,
    freed: Option<Instant>,
}

impl Collector {
    /// Nothing is known yet.
    pub fn new(agent: Arc<Agent>) -> Collector {
        Collector { agent, records: Records::default(), next: None, freed: None }
    }

    /// Looks at images from time to time, and deletes some where the disk is too full.
    pub async fn look(&mut self, levels: &Levels, now: Instant) {
        if self.next.is_some_and(|next| now < next) {
            return;
        }
        self.next = Some(now + PERIOD);
        let Some(images) = self.images(now).await else { return };
        let Some(bytes) = levels.get(&Signal::Disk).and_then(|disk| self.agent.config.images.to_free(*disk)) else {
            return;
        };
        let freed = self.free(&images, bytes, now).await;
        if freed < bytes {
            let text = format!(
                "Failed to garbage collect required amount of images. Attempted to free {bytes} bytes, but only found \
                 {freed} bytes eligible to free."
            );
            tracing::warn!("{text}");
            let mut node = Node::default();
            let name = self.agent.config.node_name.clone();
            (node.metadata.uid, node.metadata.name) = (Some(name.clone()), Some(name));
            self.agent.events.node(&node, Kind::Warning, "FreeDiskSpaceFailed", text);
        }
    }

    /// Deletes all dead containers of pods that have ended, and all images that may be deleted.
    pub async fn free_all(&mut self, now: Instant) {
        if self.freed.is_some_and(|at| now.saturating_duration_since(at) < AGAIN) {
            return;
        }
        self.freed = Some(now);
        self.dead_containers().await;
        if let Some(images) = self.images(now).await {
            self.free(&images, u64::MAX, now).await;
        }
    }

    async fn images(&mut self, now: Instant) -> Option<Vec<Image>> {
        let listed = match self.agent.cri.images().await {
            Ok(listed) => listed,
            Err(status) => {
                tracing::debug!("cannot list images: {}", status.message());
                return None;
            }
        };
        let images: Vec<Image> = listed
            .into_iter()
            .map(|image| Image {
                // Every pod needs this one, and there is no registry that has it.
                pinned: image.pinned || image.repo_tags.iter().any(|tag| tag == pause::IMAGE),
                id: image.id,
                size: image.size,
            })
            .collect();
        self.records.detect(&images, &used_images(&self.agent), now);
        Some(images)
    }

    /// Deletes images until so many bytes are free. Returns how many are.
    async fn free(&self, images: &[Image], bytes: u64, now: Instant) -> u64 {
        let min_age = self.agent.config.images.min_age;
        let mut freed: u64 = 0;
        for image in self.records.deletable(images, &used_images(&self.agent), min_age, now) {
            if freed >= bytes {
                break;
            }
            // A pull that has just ended belongs to a container that is about to be made.
            if self.agent.pulls.available_permits() < crate::PULLS || used_images(&self.agent).contains(&image.id) {
                continue;
            }
            match self.agent.cri.remove_image(&image.id).await {
                Ok(()) => {
                    tracing::info!(image = image.id, bytes = image.size, "deleted an image that nobody uses");
                    freed = freed.saturating_add(image.size);
                }
                Err(status) => tracing::warn!(image = image.id, "cannot delete an image: {}", status.message()),
            }
        }
        freed
    }

    async fn dead_containers(&self) {
        let ended: Vec<String> = {
            let pods = self.agent.pods.read();
            let is_over = |phase: Option<&str>| matches!(phase, Some("Succeeded" | "Failed"));
            let over = pods.iter().filter(|(_, view)| is_over(view.read().1.phase.as_deref()));
            over.map(|(uid, _)| uid.clone()).collect()
        };
        let observed = self.agent.pleg.pods();
        for uid in ended {
            let Some(seen) = observed.get(&uid) else { continue };
            for c in seen.containers.iter().filter(|c| c.state == State::Exited) {
                match self.agent.cri.remove_container(&c.id).await {
                    Ok(()) => tracing::info!(container = c.id, "deleted a dead container of a pod that has ended"),
                    Err(status) => {
                        tracing::warn!(container = c.id, "cannot delete a dead container: {}", status.message());
                    }
                }
            }
        }
    }
}
