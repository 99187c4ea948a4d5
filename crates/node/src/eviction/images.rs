//! Which images are deleted when the disk fills up. Pure
//! (<https://kubernetes.io/docs/concepts/architecture/garbage-collection/#container-image-lifecycle>).

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tokio::time::Instant;

use crate::pressure::Level;

/// What was said about images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// From this part of the disk on, in hundredths, images are deleted.
    pub high: u8,
    /// Until no more than this is used.
    pub low: u8,
    /// An image that has not been here for so long stays.
    pub min_age: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { high: 85, low: 80, min_age: Duration::from_secs(120) }
    }
}

/// Thresholds that make no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "--image-gc-low-threshold {low} and --image-gc-high-threshold {high}: both are percentages, and the low one must be less than the high one"
)]
pub struct Senseless {
    high: u8,
    low: u8,
}

impl Settings {
    /// # Errors
    /// If the thresholds are no percentages in this order.
    pub fn check(&self) -> Result<(), Senseless> {
        match self.high <= 100 && self.low < self.high {
            true => Ok(()),
            false => Err(Senseless { high: self.high, low: self.low }),
        }
    }

    /// How many bytes have to be freed. With a high threshold of 100 there is never a need.
    pub fn to_free(&self, disk: Level) -> Option<u64> {
        let used = disk.capacity.saturating_sub(disk.available);
        let part =
            |percent: u8| u64::try_from(u128::from(disk.capacity) * u128::from(percent) / 100).unwrap_or(u64::MAX);
        (self.high < 100 && disk.capacity > 0 && used >= part(self.high)).then(|| used.saturating_sub(part(self.low)))
    }
}

/// An image, as the runtime lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its id.
    pub id: String,
    /// Its bytes on the disk.
    pub size: u64,
    /// It must stay.
    pub pinned: bool,
}

#[derive(Clone, Copy)]
struct Record {
    detected: Instant,
    used: Option<Instant>,
}

/// When images came and were used last, as far as we have seen.
#[derive(Default)]
pub struct Records(HashMap<String, Record>);

impl Records {
    /// Takes in which images there are, and which of them containers use.
    pub fn detect(&mut self, images: &[Image], used: &HashSet<String>, now: Instant) {
        self.0.retain(|id, _| images.iter().any(|image| image.id == *id));
        for image in images {
            let record = self.0.entry(image.id.clone()).or_insert(Record { detected: now, used: None });
            if used.contains(&image.id) {
                record.used = Some(now);
            }
        }
    }

    /// Those that may be deleted, in the order in which they should be: those that were not used for longest, and of these
    /// those that have been here for longest.
    pub fn deletable<'a>(
        &self,
        images: &'a [Image],
        used: &HashSet<String>,
        min_age: Duration,
        now: Instant,
    ) -> Vec<&'a Image> {
        let free = |image: &&Image| !image.pinned && !used.contains(&image.id);
        let mut found: Vec<(Record, &Image)> = images
            .iter()
            .filter(free)
            .filter_map(|image| Some((*self.0.get(&image.id)?, image)))
            // One that was used until now may be wanted again in a moment.
            .filter(|(record, _)| record.used.is_none_or(|at| at < now))
            .filter(|(record, _)| now.saturating_duration_since(record.detected) >= min_age)
            .collect();
        found.sort_by_key(|(record, image)| (record.used, record.detected, image.id.clone()));
        found.into_iter().map(|(_, image)| image).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_much() {
        let settings = Settings::default();
        let check = |settings: Settings, used: u64, expect: Option<u64>| {
            let disk = Level { available: 1000 - used, capacity: 1000 };
            assert_eq!(settings.to_free(disk), expect, "{used}");
        };
        check(settings, 849, None);
        check(settings, 850, Some(50));
        check(settings, 1000, Some(200));
        check(Settings { high: 100, ..settings }, 1000, None);
        assert_eq!(settings.to_free(Level { available: 0, capacity: 0 }), None);
        assert_eq!(settings.check(), Ok(()));
        for (high, low) in [(80, 80), (101, 80), (50, 60)] {
            let said = Settings { high, low, ..settings }.check().unwrap_err().to_string();
            assert!(said.starts_with(&format!("--image-gc-low-threshold {low}")), "{said}");
        }
    }

    #[tokio::test]
    async fn which() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let image = |id: &str, pinned| Image { id: id.to_owned(), size: 10, pinned };
        let used = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<HashSet<_>>();
        let mut records = Records::default();
        let mut images = vec![image("old", false), image("busy", false), image("once", false), image("pinned", true)];
        records.detect(&images, &used(&["busy", "once"]), at(0));
        images.push(image("young", false));
        records.detect(&images, &used(&["busy"]), at(100));
        let ids = |used: &HashSet<String>, now| {
            let found = records.deletable(&images, used, Duration::from_secs(60), now);
            found.iter().map(|image| image.id.clone()).collect::<Vec<_>>()
        };
        // Never used before once used; the young one, the one in use and the pinned one stay.
        assert_eq!(ids(&used(&["busy"]), at(120)), ["old", "once"]);
        assert_eq!(ids(&used(&["busy"]), at(200)), ["old", "young", "once"]);
        assert_eq!(ids(&used(&[]), at(200)), ["old", "young", "once", "busy"]);
        images.remove(0);
        records.detect(&images, &used(&[]), at(210));
        assert_eq!(records.0.len(), 4, "what is gone is forgotten");
    }
}
