//! Rules about snapshots of the objects: what a majority of servers cannot bring back, they can.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::{Finding, Severity, facts::Facts};

pub(super) const SNAPSHOTS: &str = "snapshots";
pub(super) const VERIFIED: &str = "snapshots-verified";
pub(super) const SPREAD: &str = "snapshots-spread";

/// The newest may be so old where it is not known how often there is to be one.
const OLD: SignedDuration = SignedDuration::from_hours(24);

fn finding(rule: &'static str, object: String, why: String, mend: &str) -> Finding {
    Finding { severity: Severity::Warning, rule, object, why, mend: mend.into() }
}

/// What the servers that there are say of their snapshots. What one that is gone once said is worth nothing.
fn reports(facts: &Facts) -> impl Iterator<Item = (&str, &Value)> {
    let there = |name: &str| facts.names.iter().any(|known| known == name);
    facts.snapshots.iter().filter(move |(name, _)| there(name)).map(|(name, report)| (name.as_str(), report))
}

/// The snapshots in a report that are good for something.
fn whole(report: &Value) -> impl Iterator<Item = &Value> {
    report["snapshots"].as_array().into_iter().flatten().filter(|snapshot| snapshot["fault"].is_null())
}

fn time(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

/// Whether the servers can be seen, and so what they would say.
fn is_seen(facts: &Facts) -> bool {
    facts.whole && !facts.names.is_empty()
}

/// Whether there are snapshots, of late, and whether the last one failed.
pub fn snapshots(facts: &Facts) -> Vec<Finding> {
    if !is_seen(facts) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (name, report) in reports(facts) {
        if let Some(message) = report["error"]["message"].as_str() {
            let at = report["error"]["time"].as_str().unwrap_or("some time");
            let why = format!("What it last tried with its snapshots failed, at {at}: {message}");
            found.push(finding(SNAPSHOTS, format!("Server {name}"), why, "mend that, then: seawall snapshot save"));
        }
    }
    let newest =
        reports(facts).flat_map(|(_, report)| whole(report)).filter_map(|snapshot| time(&snapshot["time"])).max();
    let period = reports(facts).filter_map(|(_, report)| report["periodSeconds"].as_i64()).max();
    let Some(newest) = newest else {
        let why = "There is no snapshot of the objects: what is deleted by mistake, or lost with the servers' disks, is lost for \
                   good.";
        let mend = match period {
            Some(_) => "seawall snapshot save, on a server; the next one comes by the clock",
            None => "seawall snapshot save, on a server, and start the servers without --disable-snapshots",
        };
        found.push(finding(SNAPSHOTS, "Cluster".into(), why.into(), mend));
        return found;
    };
    let limit = period.map_or(OLD, |seconds| SignedDuration::from_secs(seconds.saturating_mul(2)));
    if facts.now.duration_since(newest) > limit {
        let hours = limit.as_secs() / 3600;
        let limit = if hours > 0 { format!("{hours} h") } else { format!("{} s", limit.as_secs()) };
        let why = match period {
            Some(_) => {
                format!("The newest snapshot is of {newest}: more than twice the time ({limit}) between two of them.")
            }
            None => format!("The newest snapshot is of {newest}, more than {limit} ago, and the clock makes none."),
        };
        let mend = match period {
            Some(_) => "seawall snapshot save, on a server, says what keeps it from there being another",
            None => "seawall snapshot save, on a server, and start the servers without --disable-snapshots",
        };
        found.push(finding(SNAPSHOTS, "Cluster".into(), why, mend));
    }
    found
}

/// Whether one was ever read back.
pub fn verified(facts: &Facts) -> Vec<Finding> {
    let newest = reports(facts).find_map(|(name, report)| Some((name, whole(report).next()?["name"].as_str()?)));
    let Some((server, name)) = newest.filter(|_| is_seen(facts)) else { return Vec::new() };
    let proven = |report: &Value| {
        report["restored"].is_object() || whole(report).any(|snapshot| time(&snapshot["verified"]).is_some())
    };
    if reports(facts).any(|(_, report)| proven(report)) {
        return Vec::new();
    }
    let why = "No snapshot was ever read back or restored: that they are good for anything is hope.";
    vec![finding(VERIFIED, "Cluster".into(), why.into(), &format!("seawall snapshot verify {name}, on {server}"))]
}

/// Whether they outlive the loss of a machine.
pub fn spread(facts: &Facts) -> Vec<Finding> {
    let having: Vec<&str> =
        reports(facts).filter(|(_, report)| whole(report).next().is_some()).map(|(name, _)| name).collect();
    let [only] = having[..] else { return Vec::new() };
    if !is_seen(facts) || facts.names.len() < 2 {
        return Vec::new();
    }
    let why = format!("All snapshots are on {only}: they are lost with its machine.");
    let mend = "seawall snapshot save on another server too, and start none with --disable-snapshots";
    vec![finding(SPREAD, "Cluster".into(), why, mend)]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: &str = "2026-01-02T00:00:00Z";

    fn facts(reports: &[(&str, Value)]) -> Facts {
        Facts {
            names: vec!["s1".into(), "s2".into(), "s3".into()],
            snapshots: reports.iter().map(|(name, report)| ((*name).to_owned(), report.clone())).collect(),
            now: NOW.parse().unwrap(),
            whole: true,
            ..Facts::default()
        }
    }

    fn snapshot(time: &str, verified: Option<&str>) -> Value {
        json!({"name": "n", "time": time, "verified": verified})
    }

    fn report(period: Option<i64>, snapshots: &[Value]) -> Value {
        json!({"periodSeconds": period, "snapshots": snapshots})
    }

    fn all(facts: &Facts) -> Vec<String> {
        let found = [snapshots(facts), verified(facts), spread(facts)].concat();
        found.into_iter().map(|finding| format!("{}: {} -> {}", finding.object, finding.why, finding.mend)).collect()
    }

    fn check(reports: &[(&str, Value)], expect: &[&str]) {
        let found = all(&facts(reports));
        assert_eq!(found.len(), expect.len(), "{found:?}");
        for (found, expect) in found.iter().zip(expect) {
            assert!(found.contains(expect), "{found} {expect}");
        }
    }

    #[test]
    fn what_snapshots_lack() {
        let day = Some(12 * 3600);
        let good = snapshot("2026-01-01T20:00:00Z", Some("2026-01-01T20:00:05Z"));
        let old = snapshot("2025-12-31T23:00:00Z", Some("2026-01-01T20:00:05Z"));
        let broken = json!({"name": "n", "time": "2026-01-01T20:00:00Z", "fault": "it is damaged"});
        let of = |one: &Value| report(day, std::slice::from_ref(one));
        check(&[("s1", of(&good)), ("s2", of(&good))], &[]);
        check(&[("s1", of(&good)), ("s2", of(&old))], &[]);
        check(&[], &["no snapshot of the objects"]);
        check(&[("s1", report(None, &[]))], &["without --disable-snapshots"]);
        check(&[("s1", report(day, &[]))], &["the next one comes by the clock"]);
        check(&[("s1", of(&broken))], &["no snapshot of the objects"]);
        check(&[("s1", of(&old)), ("s2", of(&old))], &["more than twice the time (24 h)"]);
        check(&[("s1", report(Some(48 * 3600), std::slice::from_ref(&old))), ("s2", of(&old))], &[]);
        check(
            &[("s1", report(None, std::slice::from_ref(&old))), ("s2", report(None, std::slice::from_ref(&old)))],
            &["24 h ago, and the clock"],
        );
        let unread = snapshot("2026-01-01T20:00:00Z", None);
        check(&[("s1", of(&unread)), ("s2", of(&unread))], &["is hope. -> seawall snapshot verify n, on s1"]);
        let mut restored = of(&unread);
        restored["restored"] = json!({"name": "n", "time": NOW});
        check(&[("s1", restored), ("s2", of(&unread))], &[]);
        check(&[("s1", of(&good))], &["All snapshots are on s1"]);
        check(&[("s1", of(&good)), ("s2", of(&broken))], &["All snapshots are on s1"]);
        // What a machine that is gone had is gone.
        check(&[("s1", of(&good)), ("gone", of(&good))], &["All snapshots are on s1"]);
        let mut failing = of(&good);
        failing["error"] = json!({"time": NOW, "message": "No space left on device"});
        check(&[("s1", failing), ("s2", of(&good))], &["Server s1: What it last tried"]);
        // Where it is not ours to see, nothing is said.
        assert!(all(&Facts { names: Vec::new(), ..facts(&[]) }).is_empty());
        assert!(all(&Facts { whole: false, ..facts(&[]) }).is_empty());
        let alone = Facts { names: vec!["s1".into()], ..facts(&[("s1", of(&good))]) };
        assert!(all(&alone).is_empty(), "one server has nowhere else to put them");
    }
}
