//! Pods by the node that they are on: what every node's agent lists and watches, out of all pods that there are.

use std::{ops::Bound, sync::Arc};

use imbl::OrdMap;
use seawall_api::Row;

use super::Objects;
use crate::object::Object;

/// The selectable field that is indexed.
pub const FIELD: &str = "spec.nodeName";

/// Pods by node and key. Those on no node are here as well, under the empty name.
#[derive(Clone, Default)]
pub struct ByNode(OrdMap<(Arc<str>, Arc<str>), Arc<Object>>);

impl ByNode {
    /// Of these pods.
    pub fn new(row: &Row, pods: &Objects) -> ByNode {
        let of = |(key, pod): (&Arc<str>, &Arc<Object>)| ((pod.field(row, FIELD).into(), key.clone()), pod.clone());
        ByNode(pods.iter().map(of).collect())
    }

    /// Takes in that a pod came, changed, or went.
    pub fn change(&mut self, row: &Row, old: Option<&Arc<Object>>, new: Option<&Arc<Object>>) {
        let at = |pod: &Object| (Arc::from(pod.field(row, FIELD)), pod.key.clone());
        if let Some(old) = old
            && new.is_none_or(|new| new.field(row, FIELD) != old.field(row, FIELD))
        {
            self.0.remove(&at(old));
        }
        if let Some(new) = new {
            self.0.insert(at(new), new.clone());
        }
    }

    /// The pods on a node whose key starts with `prefix` and comes after `after`, in order.
    pub fn on<'a>(
        &'a self,
        node: &'a str,
        prefix: &'a str,
        after: Option<&str>,
    ) -> impl Iterator<Item = &'a Arc<Object>> {
        let start = match after {
            Some(key) => Bound::Excluded((node.into(), key.into())),
            None => Bound::Included((node.into(), prefix.into())),
        };
        let pods = self.0.range((start, Bound::Unbounded));
        pods.take_while(move |((n, key), _)| **n == *node && key.starts_with(prefix)).map(|(_, pod)| pod)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use seawall_api::resources;
    use seawall_store::{Entry, Revision};
    use serde_json::json;

    use super::*;

    fn row() -> Row {
        resources::all().into_iter().find(|row| row.plural == "pods").unwrap()
    }

    fn pod(row: &Row, name: u8, node: u8) -> Arc<Object> {
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.to_string()},
            "spec": {"nodeName": if node == 0 { String::new() } else { format!("n{node}") }}});
        let key: Arc<str> = format!("/registry/pods/{}/{name}", ["a", "b"][usize::from(name % 2)]).into();
        let value = crate::object::encode(&object);
        Arc::new(Object::read(row, &Entry { key, value, revision: Revision(1), created: Revision(1) }).unwrap())
    }

    proptest! {
        /// Whatever happens to pods, the index says what a look through all of them says.
        #[test]
        fn it_agrees_with_a_scan(changes in prop::collection::vec((0u8..12, 0u8..4, any::<bool>()), 0..60)) {
            let row = row();
            let mut pods = Objects::new();
            let mut index = ByNode::default();
            for (name, node, there) in changes {
                let pod = pod(&row, name, node);
                let old = match there {
                    true => pods.insert(pod.key.clone(), pod.clone()),
                    false => pods.remove(&pod.key),
                };
                index.change(&row, old.as_ref(), there.then_some(&pod));
            }
            let names = |pods: Vec<&Arc<Object>>| pods.iter().map(|pod| pod.key.to_string()).collect::<Vec<_>>();
            for node in ["", "n1", "n2", "n3", "n"] {
                for prefix in ["/registry/pods/", "/registry/pods/a/", "/registry/pods/b/"] {
                    for after in [None, Some("/registry/pods/a/4"), Some("/registry/pods/b/3")] {
                        if after.is_some_and(|after| !after.starts_with(prefix)) {
                            continue;
                        }
                        let scan = super::super::range(&pods, prefix, after).filter(|pod| pod.field(&row, FIELD) == node);
                        prop_assert_eq!(names(index.on(node, prefix, after).collect()), names(scan.collect()));
                    }
                }
            }
            let fresh = ByNode::new(&row, &pods);
            prop_assert!(fresh.0.keys().eq(index.0.keys()));
        }
    }
}
