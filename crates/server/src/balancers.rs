//! The balancers in front of the servers. Each of them, whether it carries requests or stands by, asks every server
//! whether it is well; one that says its name in doing so is remembered for as long as it goes on asking. So a server knows
//! how many there are, which nobody else in the cluster could tell.

use std::{collections::BTreeMap, fmt::Write as _, net::IpAddr, time::Duration};

use http::{header, request::Parts};
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::audit::Peer;

/// What a balancer's `User-Agent` begins with; its name follows.
pub const USER_AGENT: &str = "seawall-entry-balancer/";

/// One that has been silent for this long is forgotten.
const FORGET: Duration = Duration::from_secs(60);
/// How many are remembered. Anybody may ask whether a server is well, so there has to be an end to it.
const MOST: usize = 16;
/// How long a name may be: that of a machine.
const LONGEST: usize = 63;

/// Those that were seen, by their names and addresses.
#[derive(Default)]
pub(crate) struct Balancers(Mutex<BTreeMap<(String, IpAddr), (Instant, Timestamp)>>);

impl Balancers {
    /// Looks at a request, and remembers whom it comes from if that is a balancer.
    pub fn note(&self, parts: &Parts) {
        if !matches!(parts.uri.path(), "/readyz" | "/livez" | "/healthz") {
            return;
        }
        let agent = parts.headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
        let Some(name) = agent.and_then(|agent| agent.strip_prefix(USER_AGENT)) else { return };
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if let Some(Peer(address)) = parts.extensions.get::<Peer>()
            && (1..=LONGEST).contains(&name.len())
            && name.bytes().all(fits)
        {
            self.saw(name, *address, Timestamp::now());
        }
    }

    fn saw(&self, name: &str, address: IpAddr, time: Timestamp) {
        let mut seen = self.0.lock();
        let (now, key) = (Instant::now(), (name.to_owned(), address));
        seen.retain(|_, (at, _)| now.duration_since(*at) < FORGET);
        if seen.len() < MOST || seen.contains_key(&key) {
            seen.insert(key, (now, time));
        }
    }

    /// As Prometheus reads it.
    pub fn metrics(&self) -> String {
        const NAME: &str = "seawall_entry_balancer_last_seen_timestamp_seconds";
        let mut text =
            format!("# HELP {NAME} When a balancer last asked whether this server is well.\n# TYPE {NAME} gauge\n");
        let now = Instant::now();
        for ((name, address), (at, time)) in &*self.0.lock() {
            if now.duration_since(*at) < FORGET {
                let _ = writeln!(text, "{NAME}{{balancer=\"{name}\",address=\"{address}\"}} {}", time.as_second());
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn ask(balancers: &Balancers, path: &str, agent: &str, from: &str) {
        let request = Request::get(path).header(header::USER_AGENT, agent).extension(Peer(from.parse().unwrap()));
        balancers.note(&request.body(()).unwrap().into_parts().0);
    }

    fn seen(balancers: &Balancers) -> Vec<String> {
        let text = balancers.metrics();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.split_once('{').unwrap().1.split_once('}').unwrap().0.to_owned()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_by_name_is_remembered_for_a_minute() {
        let balancers = Balancers::default();
        for (path, agent) in [
            ("/readyz", "kube-probe/1.37"),
            ("/readyz", "seawall-entry-balancer/"),
            ("/readyz", "seawall-entry-balancer/a b"),
            ("/readyz", "seawall-entry-balancer/a\"} 1"),
            ("/api", "seawall-entry-balancer/lb1"),
            ("/readyz", &format!("{USER_AGENT}{}", "x".repeat(64))),
        ] {
            ask(&balancers, path, agent, "192.0.2.1");
            assert!(seen(&balancers).is_empty(), "{path} {agent}");
        }
        ask(&balancers, "/readyz", "seawall-entry-balancer/lb1", "192.0.2.1");
        tokio::time::advance(Duration::from_secs(40)).await;
        ask(&balancers, "/readyz", "seawall-entry-balancer/lb2", "2001:db8::2");
        let (one, two) = ("balancer=\"lb1\",address=\"192.0.2.1\"", "balancer=\"lb2\",address=\"2001:db8::2\"");
        assert_eq!(seen(&balancers), [one, two]);
        tokio::time::advance(Duration::from_secs(40)).await;
        assert_eq!(seen(&balancers), [two]);
        // More than there is room for: those that are there stay.
        for number in 0..100 {
            ask(&balancers, "/livez", &format!("{USER_AGENT}n{number}"), "192.0.2.1");
        }
        assert_eq!(seen(&balancers).len(), MOST);
        assert!(seen(&balancers).contains(&two.to_owned()));
    }
}
