//! What a drill has to say: how long each thing was felt, what failed when, and whether what must hold held. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use serde::Serialize;

use crate::{
    check::Verdict,
    history::{At, Class, Fate, History, Request},
    plot::Series,
};

/// The width of a column of the timeline.
const SLOT: Duration = Duration::from_millis(100);
/// Columns of a line of the timeline.
const COLUMNS: u32 = 100;
/// So many columns from one answer to the next are a silence.
const SILENT: u32 = 3;
/// What is quoted of many.
const QUOTED: usize = 10;

/// Something that was done to the cluster.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Mark {
    /// When, in seconds after the first fault.
    pub at: f64,
    /// What.
    pub what: String,
}

/// Requests of one kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Requests {
    /// All.
    pub total: usize,
    /// Those that failed.
    pub failed: usize,
    /// The longest time, in seconds, in which some client had no success.
    pub longest_gap: f64,
}

/// A column of the timeline in which something failed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Slot {
    /// Its beginning, in seconds after the first fault.
    pub at: f64,
    /// Whose requests.
    pub who: String,
    /// How many were answered well in it.
    pub answered: usize,
    /// How many failed.
    pub failed: usize,
    /// What was said, each once.
    pub errors: Vec<String>,
}

/// The report of a drill.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The scenario.
    pub scenario: String,
    /// What was done, and when.
    pub marks: Vec<Mark>,
    /// How long, in seconds, something was not to be had.
    pub windows: BTreeMap<String, f64>,
    /// What they should be, where that is said.
    pub targets: BTreeMap<String, f64>,
    /// All requests together.
    pub requests: Requests,
    /// By kind.
    pub by_kind: BTreeMap<String, Requests>,
    /// What must hold.
    pub invariants: BTreeMap<String, bool>,
    /// What broke it.
    pub violations: BTreeMap<String, Vec<String>>,
    /// What failed when.
    pub timeline: Vec<Slot>,
    /// Whether every invariant holds.
    pub pass: bool,
    #[serde(skip)]
    drawing: String,
    /// New connections, for a picture.
    #[serde(skip)]
    pub series: Vec<Series>,
}

/// When what happened, on the recording's clock.
#[derive(Clone, Debug)]
pub struct Times {
    /// The first fault.
    pub fault: At,
    /// The end of the recording.
    pub end: At,
    /// What was done.
    pub marks: Vec<(At, String)>,
}

impl Report {
    /// Makes the report of a history.
    pub fn new(
        scenario: &str,
        history: &History,
        times: &Times,
        verdicts: &[Verdict],
        targets: &[(&str, f64)],
    ) -> Report {
        let rows = Rows::new(&history.requests);
        let all: Vec<&Request> = history.requests.iter().collect();
        let kind = |class: Class| -> Vec<&Request> { all.iter().copied().filter(|r| r.class == class).collect() };
        let by_kind = Class::ALL.into_iter().map(|c| (c.word().to_owned(), requests(&kind(c), times)));
        let limit = |found: &[String]| found.iter().take(QUOTED).cloned().collect::<Vec<_>>();
        Report {
            scenario: scenario.into(),
            marks: times
                .marks
                .iter()
                .map(|(at, what)| Mark { at: since(*at, times.fault), what: what.clone() })
                .collect(),
            windows: windows(history, times),
            targets: targets.iter().map(|(name, limit)| ((*name).to_owned(), *limit)).collect(),
            requests: requests(&all, times),
            by_kind: by_kind.filter(|(_, r)| r.total > 0).collect(),
            invariants: verdicts.iter().map(|v| (v.name.to_owned(), v.holds())).collect(),
            violations: verdicts
                .iter()
                .filter(|v| !v.holds())
                .map(|v| (format!("{} ({} of them)", v.name, v.violations.len()), limit(&v.violations)))
                .collect(),
            timeline: rows.failures(times),
            pass: verdicts.iter().all(Verdict::holds),
            drawing: rows.draw(times),
            series: series(&history.requests, times),
        }
    }

    /// Adds a figure of its own, in seconds, with what it should be at most.
    pub fn window(&mut self, name: &str, took: Duration, target: Option<f64>) {
        self.windows.insert(name.to_owned(), round(took.as_secs_f64()));
        if let Some(target) = target {
            self.targets.insert(name.to_owned(), target);
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}: {}", self.scenario, if self.pass { "passed" } else { "FAILED" });
        for mark in &self.marks {
            let _ = writeln!(text, "  {:>8.2} s  {}", mark.at, mark.what);
        }
        let _ = writeln!(text, "\n  not to be had for at most");
        let width = self.windows.keys().map(String::len).max().unwrap_or(0);
        for (name, seconds) in &self.windows {
            let target = match self.targets.get(name) {
                Some(target) if seconds <= target => format!("  (at most {target} s: met)"),
                Some(target) => format!("  (at most {target} s: MISSED)"),
                None => String::new(),
            };
            let _ = writeln!(text, "    {name:width$}  {seconds:>7.3} s{target}");
        }
        let _ = writeln!(text, "\n  {:<15} {:>8} {:>8} {:>12}", "requests", "total", "failed", "longest gap");
        let all = ("all".to_owned(), self.requests.clone());
        for (name, r) in self.by_kind.iter().map(|(n, r)| (n.clone(), r.clone())).chain([all]) {
            let _ = writeln!(text, "  {name:<15} {:>8} {:>8} {:>10.3} s", r.total, r.failed, r.longest_gap);
        }
        let _ = writeln!(text, "\n{}", self.drawing);
        for (name, holds) in &self.invariants {
            let _ = writeln!(text, "  {} {name}", if *holds { "holds " } else { "BROKEN" });
        }
        for (name, found) in &self.violations {
            let _ = writeln!(text, "\n  {name}:");
            for one in found {
                let _ = writeln!(text, "    {one}");
            }
        }
        text
    }
}

/// How long before the fault a picture begins.
pub const BEFORE: Duration = Duration::from_secs(1);

/// New connections of each client, by when they were made.
fn series(requests: &[Request], times: &Times) -> Vec<Series> {
    let begin = times.fault.saturating_sub(BEFORE);
    let count = column(times.end.saturating_sub(begin)) as usize;
    let mut clients: BTreeMap<&str, Vec<(u32, u32)>> = BTreeMap::new();
    for request in requests.iter().filter(|r| r.class == Class::Connect && r.start >= begin) {
        let slots = clients.entry(&request.client).or_insert_with(|| vec![(0, 0); count]);
        if let Some(slot) = slots.get_mut(column(request.start - begin) as usize) {
            *(if request.error.is_none() { &mut slot.0 } else { &mut slot.1 }) += 1;
        }
    }
    clients.into_iter().map(|(client, slots)| Series { title: client.to_owned(), slots }).collect()
}

fn since(at: At, fault: At) -> f64 {
    round(at.as_secs_f64() - fault.as_secs_f64())
}

fn round(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

fn requests(some: &[&Request], times: &Times) -> Requests {
    Requests {
        total: some.len(),
        failed: some.iter().filter(|r| r.error.is_some()).count(),
        longest_gap: round(gaps(some, times).into_values().max().unwrap_or_default().as_secs_f64()),
    }
}

/// The longest time without a success from the first fault on, of each client and kind.
fn gaps(some: &[&Request], times: &Times) -> BTreeMap<(Class, Arc<str>), Duration> {
    let mut successes: BTreeMap<(Class, Arc<str>), Vec<At>> = BTreeMap::new();
    for request in some {
        let of = successes.entry((request.class, request.client.clone())).or_default();
        of.extend(request.error.is_none().then_some(request.end));
    }
    successes.into_iter().map(|(who, of)| (who, gap(of, times))).collect()
}

/// The longest time between two successes, from the first fault on.
fn gap(mut successes: Vec<At>, times: &Times) -> Duration {
    successes.sort_unstable();
    let (mut before, mut longest) = (times.fault, Duration::ZERO);
    for success in successes.into_iter().chain([times.end]) {
        if success > times.fault {
            longest = longest.max(success.min(times.end).saturating_sub(before));
        }
        before = before.max(success);
    }
    longest
}

/// How long each thing was not to be had.
fn windows(history: &History, times: &Times) -> BTreeMap<String, f64> {
    let mut windows = BTreeMap::new();
    let all: Vec<&Request> = history.requests.iter().collect();
    for ((class, client), gap) in gaps(&all, times) {
        windows.insert(format!("{}, {client}", class.word()), round(gap.as_secs_f64()));
    }
    let probes: BTreeSet<&str> = history.probes.iter().map(|p| p.who).collect();
    for who in probes {
        let done = history.probes.iter().filter(|p| p.who == who).map(|p| p.end).collect();
        windows.insert(who.to_owned(), round(gap(done, times).as_secs_f64()));
    }
    for watch in &history.watches {
        let seen: BTreeMap<u64, At> = watch.events.iter().map(|e| (e.revision, e.at)).collect();
        let late = history.writes.iter().filter_map(|write| match write.fate {
            Fate::Acknowledged(revision) if revision > watch.from && write.end >= times.fault => {
                Some(seen.get(&revision).copied().unwrap_or(times.end).saturating_sub(write.end))
            }
            _ => None,
        });
        let lag = late.max().unwrap_or_default();
        windows.insert(format!("watch, {}", watch.client), round(lag.as_secs_f64()));
    }
    windows
}

/// Requests by who made them and by column.
struct Rows {
    rows: BTreeMap<String, BTreeMap<u32, Cell>>,
}

#[derive(Default)]
struct Cell {
    answered: usize,
    failed: usize,
    errors: BTreeSet<String>,
}

impl Rows {
    fn new(requests: &[Request]) -> Rows {
        let mut rows: BTreeMap<String, BTreeMap<u32, Cell>> = BTreeMap::new();
        for request in requests {
            let row = rows.entry(format!("{}, {}", request.class.word(), request.client)).or_default();
            let cell = row.entry(column(request.end)).or_default();
            match &request.error {
                None => cell.answered += 1,
                Some(error) => {
                    cell.failed += 1;
                    cell.errors.insert(error.clone());
                }
            }
        }
        Rows { rows }
    }

    fn failures(&self, times: &Times) -> Vec<Slot> {
        let slots = self.rows.iter().flat_map(|(who, row)| {
            row.iter().filter(|(_, cell)| cell.failed > 0).map(|(column, cell)| Slot {
                at: since(SLOT * *column, times.fault),
                who: who.clone(),
                answered: cell.answered,
                failed: cell.failed,
                errors: cell.errors.iter().take(3).cloned().collect(),
            })
        });
        let mut slots: Vec<Slot> = slots.collect();
        slots.sort_by(|a, b| a.at.total_cmp(&b.at));
        slots
    }

    /// A line for each client, a column for each tenth of a second: `.` all well, `x` some failed, `X` all failed,
    /// `-` nothing was answered for some while. Stretches in which all is well are left out.
    fn draw(&self, times: &Times) -> String {
        let mut text =
            String::from("  what failed when: . well, x some failed, X all failed, - no answer; a column is 0.1 s\n");
        let (first, last) = (column(times.fault), column(times.end));
        let width = self.rows.keys().map(|w| w.chars().count()).max().unwrap_or(0);
        let mut begin = first.saturating_sub(10);
        let mut well = true;
        while begin < last {
            let end = (begin + COLUMNS).min(last);
            let lines: Vec<(&String, String)> = self
                .rows
                .iter()
                .map(|(who, row)| (who, (begin..end).map(|column| symbol(row, column)).collect()))
                .collect();
            if lines.iter().all(|(_, line)| line.chars().all(|c| c == '.')) {
                if well && begin > first {
                    begin = end;
                    continue;
                }
                well = true;
            } else {
                well = false;
            }
            let at = since(SLOT * begin, times.fault);
            let _ = writeln!(text, "  {:width$}  {}", format!("{at:+.1} s"), ruler(begin, end, first));
            for (who, line) in lines {
                let _ = writeln!(text, "  {who:width$}  {line}");
            }
            begin = end;
        }
        text
    }
}

fn column(at: At) -> u32 {
    u32::try_from(at.as_millis() / SLOT.as_millis()).unwrap_or(u32::MAX)
}

fn symbol(row: &BTreeMap<u32, Cell>, column: u32) -> char {
    match row.get(&column) {
        // A client that is slow has a column without an answer now and then.
        None => {
            let before = row.range(..column).next_back().map_or(0, |(c, _)| *c);
            let after = row.range(column..).next().map_or(u32::MAX, |(c, _)| *c);
            if after - before > SILENT { '-' } else { '.' }
        }
        Some(cell) if cell.failed == 0 => '.',
        Some(cell) if cell.answered == 0 => 'X',
        Some(_) => 'x',
    }
}

/// A mark at the fault and at each second after it.
fn ruler(begin: u32, end: u32, fault: u32) -> String {
    let mark = |column: u32| match column.checked_sub(fault) {
        Some(0) => '!',
        Some(n) if n % 10 == 0 => '|',
        _ => ' ',
    };
    (begin..end).map(mark).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::sample::{acknowledged, event, ms},
        history::{Probe, Watch, WatchEvent},
    };

    fn request(class: Class, end: u64, error: Option<&str>) -> Request {
        Request { client: "a".into(), class, start: ms(end - 5), end: ms(end), error: error.map(str::to_owned) }
    }

    fn times(fault: u64, end: u64) -> Times {
        Times { fault: ms(fault), end: ms(end), marks: vec![(ms(fault), "power off s1".into())] }
    }

    #[test]
    fn the_longest_time_without_a_success() {
        let check = |successes: &[u64], expect: u64| {
            let successes = successes.iter().map(|t| ms(*t)).collect();
            assert_eq!(gap(successes, &times(1000, 3000)), ms(expect));
        };
        check(&[], 2000);
        check(&[900, 1100, 1200, 3000], 1800);
        check(&[1010, 2500, 2600, 2990], 1490);
        // What was felt before the fault is not its doing.
        check(&[100, 1001, 1900, 2900], 1000);
        check(&[1500, 2000, 2500, 3500], 500);
    }

    #[test]
    fn a_report() {
        let mut history = History {
            requests: (1..100).map(|n| request(Class::Read, n * 30, None)).collect(),
            probes: vec![
                Probe { who: "scheduler", start: ms(900), end: ms(1000) },
                Probe { who: "scheduler", start: ms(1100), end: ms(2400) },
            ],
            writes: vec![acknowledged("k", 1, (1200, 1300), 10)],
            watches: vec![Watch {
                client: "a".into(),
                from: 1,
                events: vec![WatchEvent { at: ms(1550), ..event("k", 1, 10) }],
                until: 10,
                began_again: vec![],
            }],
            ..History::default()
        };
        history.requests.push(request(Class::Write, 1200, Some("reset")));
        history.requests.push(request(Class::Write, 1250, None));
        let verdicts = [
            Verdict { name: "fine", violations: vec![], looked_at: 1 },
            Verdict { name: "broken", violations: vec!["it is so".into()], looked_at: 1 },
        ];
        let report =
            Report::new("power-off", &history, &times(1000, 3000), &verdicts, &[("read, a", 0.1), ("scheduler", 1.0)]);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["scenario"], "power-off");
        assert_eq!(json["windows"]["scheduler"], 1.4);
        assert_eq!(json["windows"]["watch, a"], 0.25);
        assert_eq!(json["windows"]["write, a"], 1.75);
        assert_eq!((&json["requests"]["total"], &json["requests"]["failed"]), (&101.into(), &1.into()));
        assert_eq!(json["requests"]["longest_gap"], 1.75);
        assert_eq!((&json["invariants"]["fine"], &json["invariants"]["broken"]), (&true.into(), &false.into()));
        assert_eq!(json["pass"], false);
        assert_eq!(json["timeline"][0]["who"], "write, a");
        assert_eq!(json["timeline"][0]["at"], 0.2);
        assert_eq!(json["timeline"][0]["errors"][0], "reset");
        assert_eq!(json["marks"][0]["what"], "power off s1");
        let text = report.text();
        for part in ["power-off: FAILED", "(at most 0.1 s: met)", "(at most 1 s: MISSED)", "BROKEN broken", "it is so"]
        {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        let line = text.lines().find(|l| l.starts_with("  write, a  -")).unwrap();
        assert_eq!(line, format!("  write, a  {}x{}", "-".repeat(12), "-".repeat(17)));
        assert!(text.lines().any(|l| l.ends_with("          !         |")), "{text}");
    }

    #[test]
    fn what_is_well_is_not_drawn_for_ever() {
        let requests: Vec<Request> = (1..3000).map(|n| request(Class::Read, n * 30, None)).collect();
        let drawing = Rows::new(&requests).draw(&times(1000, 89_000));
        assert_eq!(drawing.lines().count(), 3, "{drawing}");
    }
}
