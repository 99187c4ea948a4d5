//! What the parts of a machine count, in one place: the agent's `/metrics` shows it, and the server's.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Who says what was counted, as Prometheus reads it.
type Source = Box<dyn Fn() -> String + Send + Sync>;

/// All of them, by name. Clones are the same.
#[derive(Clone, Default)]
pub struct Sources {
    all: Arc<Mutex<BTreeMap<&'static str, Source>>>,
}

impl Sources {
    /// Adds a part; one of the same name is replaced.
    pub fn add(&self, name: &'static str, source: impl Fn() -> String + Send + Sync + 'static) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).insert(name, Box::new(source));
    }

    /// What all have counted.
    pub fn render(&self) -> String {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).values().map(|source| source()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_shown_once() {
        let sources = Sources::default();
        sources.add("b", || "b 1\n".into());
        sources.clone().add("a", || "a 1\n".into());
        sources.add("b", || "b 2\n".into());
        assert_eq!(sources.render(), "a 1\nb 2\n");
    }
}
