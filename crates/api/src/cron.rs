//! Schedules of CronJobs: five fields of cron, or a word for one of them
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/#schedule-syntax>). What is wrong is said in the
//! words of the parser that upstream uses.

use std::sync::LazyLock;

use jiff::tz::{TimeZone, TimeZoneDatabase};

/// When something happens: the bit `n` of a field is set if it happens at the number `n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// At what all fields say.
    Fields(Fields),
    /// Every so many seconds.
    Every(u64),
}

/// The fields of a schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// 0 to 59.
    pub minutes: u64,
    /// 0 to 23.
    pub hours: u64,
    /// 1 to 31.
    pub days: u64,
    /// 1 to 12.
    pub months: u64,
    /// 0 (Sunday) to 6.
    pub weekdays: u64,
    /// Whether the day of the month was left open (`*`): then the day of the week alone decides.
    pub any_day: bool,
    /// Whether the day of the week was left open.
    pub any_weekday: bool,
}

struct Bounds {
    low: u64,
    high: u64,
    names: &'static [&'static str],
}

const MINUTES: Bounds = Bounds { low: 0, high: 59, names: &[] };
const HOURS: Bounds = Bounds { low: 0, high: 23, names: &[] };
const DAYS: Bounds = Bounds { low: 1, high: 31, names: &[] };
const MONTHS: Bounds = Bounds {
    low: 1,
    high: 12,
    names: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
};
const WEEKDAYS: Bounds = Bounds { low: 0, high: 6, names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"] };

impl Schedule {
    /// Reads a schedule.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        if text.is_empty() {
            return Err("empty spec string".into());
        }
        // A time zone in front is refused elsewhere, but old objects may have one.
        let text = match text.strip_prefix("CRON_TZ=").or_else(|| text.strip_prefix("TZ=")) {
            Some(rest) => {
                let (zone, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                known_zone(zone).map_err(|why| format!("provided bad location {zone}: {why}"))?;
                rest.trim()
            }
            None => text,
        };
        if text.starts_with('@') {
            return descriptor(text);
        }
        let fields: Vec<&str> = text.split_whitespace().collect();
        let [minutes, hours, days, months, weekdays] = fields[..] else {
            return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
        };
        let ((minutes, _), (hours, _)) = (field(minutes, &MINUTES)?, field(hours, &HOURS)?);
        let ((days, any_day), (months, _)) = (field(days, &DAYS)?, field(months, &MONTHS)?);
        let (weekdays, any_weekday) = field(weekdays, &WEEKDAYS)?;
        Ok(Schedule::Fields(Fields { minutes, hours, days, months, weekdays, any_day, any_weekday }))
    }
}

/// The time zone of this name; UTC if it is empty. The zones are those in the binary, so that all servers know the same.
pub fn zone(name: &str) -> Result<TimeZone, String> {
    static ZONES: LazyLock<TimeZoneDatabase> = LazyLock::new(TimeZoneDatabase::bundled);
    match name {
        "" => Ok(TimeZone::UTC),
        name => ZONES.get(name).map_err(|_| format!("unknown time zone {name}")),
    }
}

/// Whether there is a time zone of this name.
pub fn known_zone(name: &str) -> Result<(), String> {
    zone(name).map(drop)
}

fn descriptor(text: &str) -> Result<Schedule, String> {
    let same = match text {
        "@yearly" | "@annually" => "0 0 1 1 *",
        "@monthly" => "0 0 1 * *",
        "@weekly" => "0 0 * * 0",
        "@daily" | "@midnight" => "0 0 * * *",
        "@hourly" => "0 * * * *",
        _ => {
            let Some(length) = text.strip_prefix("@every ") else {
                return Err(format!("unrecognized descriptor: {text}"));
            };
            let seconds = duration(length)
                .ok_or_else(|| format!("failed to parse duration {text}: time: invalid duration {length:?}"))?;
            return Ok(Schedule::Every(seconds.max(1)));
        }
    };
    Schedule::parse(same)
}

/// Whole seconds of a duration as Go writes it: `1h30m`, `1.5s`.
fn duration(text: &str) -> Option<u64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let (mut rest, mut nanos) = (text.strip_prefix('-').unwrap_or(text), 0f64);
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(end);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let unit = match unit {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        nanos += number.parse::<f64>().ok()? * unit;
        rest = tail;
    }
    // What is negative is rounded up to the least there is, as everything below a second.
    if text.starts_with('-') {
        return Some(0);
    }
    (nanos <= i64::MAX as f64).then_some((nanos / 1e9) as u64)
}

/// The bits of a field, and whether it was left open.
fn field(text: &str, bounds: &Bounds) -> Result<(u64, bool), String> {
    let (mut bits, mut open) = (0, false);
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (more, star) = range(part, bounds)?;
        bits |= more;
        open |= star;
    }
    Ok((bits, open))
}

fn range(text: &str, bounds: &Bounds) -> Result<(u64, bool), String> {
    let parts: Vec<&str> = text.split('/').collect();
    let ends: Vec<&str> = parts[0].split('-').collect();
    let mut open = false;
    let (low, mut high) = if ends[0] == "*" || ends[0] == "?" {
        open = true;
        (bounds.low, bounds.high)
    } else {
        let low = number_or_name(ends[0], bounds)?;
        match ends[..] {
            [_] => (low, low),
            [_, high] => (low, number_or_name(high, bounds)?),
            _ => return Err(format!("too many hyphens: {text}")),
        }
    };
    let step = match parts[..] {
        [_] => 1,
        [_, step] => {
            let step = number(step)?;
            // `5/10` begins at 5 and goes on to the end.
            if ends.len() == 1 {
                high = bounds.high;
            }
            open &= step <= 1;
            step
        }
        _ => return Err(format!("too many slashes: {text}")),
    };
    if low < bounds.low {
        return Err(format!("beginning of range ({low}) below minimum ({}): {text}", bounds.low));
    }
    if high > bounds.high {
        return Err(format!("end of range ({high}) above maximum ({}): {text}", bounds.high));
    }
    if low > high {
        return Err(format!("beginning of range ({low}) beyond end of range ({high}): {text}"));
    }
    if step == 0 {
        return Err(format!("step of range should be a positive number: {text}"));
    }
    let mut bits = 0;
    let mut at = low;
    while at <= high {
        bits |= 1 << at;
        at = at.saturating_add(step);
    }
    Ok((bits, open))
}

fn number_or_name(text: &str, bounds: &Bounds) -> Result<u64, String> {
    match bounds.names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
        Some(index) => Ok(bounds.low + index as u64),
        None => number(text),
    }
}

fn number(text: &str) -> Result<u64, String> {
    match text.parse::<i64>() {
        Ok(number) => u64::try_from(number).map_err(|_| format!("negative number ({number}) not allowed: {text}")),
        Err(_) => Err(format!("failed to parse int from {text}: strconv.Atoi: parsing {text:?}: invalid syntax")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read() {
        let fields = |text: &str| match Schedule::parse(text) {
            Ok(Schedule::Fields(fields)) => fields,
            other => panic!("{text}: {other:?}"),
        };
        let all = fields("* * * * *");
        assert_eq!(all.minutes, (1 << 60) - 1);
        assert_eq!((all.hours, all.months, all.weekdays), ((1 << 24) - 1, (1 << 13) - 2, 127));
        assert!(all.any_day && all.any_weekday);
        let some = fields("*/15 9-17/4 1,15 jan-Mar MON");
        assert_eq!(some.minutes, 1 | 1 << 15 | 1 << 30 | 1 << 45);
        assert_eq!(some.hours, 1 << 9 | 1 << 13 | 1 << 17);
        assert_eq!((some.days, some.months, some.weekdays), (1 << 1 | 1 << 15, 0b1110, 1 << 1));
        assert!(!some.any_day && !some.any_weekday);
        assert_eq!(fields("50/3 * * * *").minutes, 1 << 50 | 1 << 53 | 1 << 56 | 1 << 59);
        assert_eq!(fields("@weekly"), fields("0 0 * * 0"));
        assert_eq!(fields("TZ=UTC 0 0 * * *"), fields("@daily"));
        for (text, seconds) in [("@every 1h30m", 5400), ("@every 1.5s", 1), ("@every 10ms", 1)] {
            assert_eq!(Schedule::parse(text), Ok(Schedule::Every(seconds)), "{text}");
        }
    }

    #[test]
    fn what_is_wrong() {
        for (text, why) in [
            ("", "empty spec string"),
            ("error", "expected exactly 5 fields, found 1: [error]"),
            ("* * * *", "expected exactly 5 fields, found 4: [* * * *]"),
            ("60 * * * *", "end of range (60) above maximum (59): 60"),
            ("* * 0 * *", "beginning of range (0) below minimum (1): 0"),
            ("5-1 * * * *", "beginning of range (5) beyond end of range (1): 5-1"),
            ("*/0 * * * *", "step of range should be a positive number: */0"),
            ("1-2-3 * * * *", "too many hyphens: 1-2-3"),
            ("1/2/3 * * * *", "too many slashes: 1/2/3"),
            ("* * * foo *", "failed to parse int from foo: strconv.Atoi: parsing \"foo\": invalid syntax"),
            ("@often", "unrecognized descriptor: @often"),
            ("@every 5x", "failed to parse duration @every 5x: time: invalid duration \"5x\""),
            ("TZ=Mars/Base 0 0 * * *", "provided bad location Mars/Base: unknown time zone Mars/Base"),
        ] {
            assert_eq!(Schedule::parse(text), Err(why.to_owned()), "{text}");
        }
    }
}
