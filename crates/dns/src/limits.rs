//! How much a client may have of something at a time, and all of them together.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use parking_lot::Mutex;

/// A limit of things that are held.
#[derive(Clone, Debug)]
pub struct Limit {
    each: usize,
    all: usize,
    held: Arc<Mutex<(HashMap<IpAddr, usize>, usize)>>,
}

impl Limit {
    /// So many of each client, and of all.
    pub fn new(each: usize, all: usize) -> Limit {
        Limit { each, all, held: Arc::default() }
    }

    /// One more for this client, until what is given is dropped; `None` if that would be too many.
    pub fn take(&self, client: IpAddr) -> Option<Held> {
        // The same client whichever way it is written.
        let client = client.to_canonical();
        let mut held = self.held.lock();
        let (clients, all) = &mut *held;
        if *all >= self.all {
            return None;
        }
        let own = clients.entry(client).or_default();
        if *own >= self.each {
            return None;
        }
        *own += 1;
        *all += 1;
        Some(Held { of: self.clone(), client })
    }
}

/// One of what is limited.
#[derive(Debug)]
pub struct Held {
    of: Limit,
    client: IpAddr,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.of.held.lock();
        let (clients, all) = &mut *held;
        *all -= 1;
        if let Some(own) = clients.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_and_all() {
        let limit = Limit::new(2, 3);
        let (a, b): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let first = limit.take(a).unwrap();
        let _second = limit.take("::ffff:10.0.0.1".parse().unwrap()).unwrap();
        assert!(limit.take(a).is_none(), "it has two");
        let third = limit.take(b).unwrap();
        assert!(limit.take(b).is_none(), "there are three");
        drop(first);
        assert!(limit.take(a).is_some());
        drop(third);
        assert_eq!(limit.held.lock().0.len(), 1, "who holds nothing takes no room");
    }
}
