//! Readers: of the newest state, over a connection that is kept or over a new one each time, and of any state at hand.

use std::sync::Arc;

use bytes::Bytes;
use http::Method;
use tokio_util::sync::CancellationToken;

use super::{PACE, Recorder, Way, maps, writer};
use crate::history::Class;

/// How a reader reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The newest state, over one connection as long as it lasts.
    Kept,
    /// The newest state, over a new connection each time.
    Anew,
    /// Whatever the server has at hand, which needs no quorum.
    Cached,
}

/// Reads until `stop`.
pub async fn run(way: Way, recorder: Recorder, keys: Vec<Arc<str>>, kind: Kind, stop: CancellationToken) {
    let mut client = way.client();
    let name: Arc<str> = match kind {
        Kind::Kept | Kind::Cached => way.name.clone(),
        Kind::Anew => format!("{}, new connections", way.name).into(),
    };
    let (class, query) = match kind {
        Kind::Cached => (Class::Cached, "?resourceVersion=0"),
        Kind::Kept | Kind::Anew => (Class::Read, ""),
    };
    for key in keys.iter().cycle() {
        if stop.is_cancelled() {
            return;
        }
        if kind == Kind::Anew {
            client.hang_up();
        }
        let start = recorder.now();
        let answer = client.send(Method::GET, &format!("{}/{key}{query}", maps()), Bytes::new()).await;
        let read = writer::read(&name, key, start, &recorder, answer, kind != Kind::Cached);
        recorder.request(&name, class, start, read.err());
        tokio::time::sleep(PACE).await;
    }
}
