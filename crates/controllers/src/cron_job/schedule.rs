//! When a schedule comes round, in its time zone, as the parser that upstream uses has it: an hour that a clock change leaves out
//! is skipped, and one that comes twice counts twice.

use jiff::{SignedDuration, Timestamp, ToSpan, Zoned, tz::TimeZone};
use seawall_api::cron::{self, Fields, Schedule};

/// A schedule that never comes within so many years never comes.
const YEARS: i16 = 5;

/// A schedule, and where its hours are counted.
#[derive(Clone, Debug)]
pub struct Calendar {
    schedule: Schedule,
    /// The time zone.
    pub zone: TimeZone,
}

impl Calendar {
    /// Reads a schedule. A zone in front of it counts where none is given beside it.
    pub fn read(schedule: &str, zone: TimeZone) -> Result<Calendar, String> {
        let inner = schedule.strip_prefix("CRON_TZ=").or_else(|| schedule.strip_prefix("TZ="));
        let inner = inner.and_then(|rest| rest.split_whitespace().next());
        let zone = inner.map_or(Ok(zone), cron::zone)?;
        Ok(Calendar { schedule: Schedule::parse(schedule)?, zone })
    }

    /// The first time after `after`.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        match &self.schedule {
            Schedule::Every(seconds) => {
                let length = SignedDuration::from_secs(i64::try_from(*seconds).ok()?);
                Timestamp::from_second(after.as_second()).ok()?.checked_add(length).ok()
            }
            Schedule::Fields(fields) => next(fields, after, &self.zone),
        }
    }
}

fn next(fields: &Fields, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    let first = after.to_zoned(zone.clone());
    let mut at = later(&first, 60 - i64::from(first.second()))?;
    while at.year() <= first.year() + YEARS {
        let in_field = |bits: u64, number: i8| bits & (1 << number) != 0;
        at = if !in_field(fields.months, at.month()) {
            at.first_of_month().ok()?.checked_add(1.month()).ok()?.start_of_day().ok()?
        } else if !is_day(fields, &at) {
            at.tomorrow().ok()?.start_of_day().ok()?
        } else if !in_field(fields.hours, at.hour()) {
            later(&at, 60 * (60 - i64::from(at.minute())))?
        } else if !in_field(fields.minutes, at.minute()) {
            later(&at, 60)?
        } else {
            return Some(at.timestamp());
        };
    }
    None
}

/// So many seconds later, whatever the clock on the wall does meanwhile.
fn later(at: &Zoned, seconds: i64) -> Option<Zoned> {
    let whole = Timestamp::from_second(at.timestamp().as_second()).ok()?;
    Some(whole.checked_add(SignedDuration::from_secs(seconds)).ok()?.to_zoned(at.time_zone().clone()))
}

/// A day has to fit both ways if one of them is left open, and one of both otherwise, as cron has always had it.
fn is_day(fields: &Fields, at: &Zoned) -> bool {
    let day = fields.days & (1 << at.day()) != 0;
    let weekday = fields.weekdays & (1 << at.weekday().to_sunday_zero_offset()) != 0;
    if fields.any_day || fields.any_weekday { day && weekday } else { day || weekday }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calendar(schedule: &str, zone: &str) -> Calendar {
        Calendar::read(schedule, cron::zone(zone).unwrap()).unwrap()
    }

    #[test]
    fn the_next_time() {
        let check = |schedule: &str, zone: &str, after: &str, expect: &[&str]| {
            let calendar = calendar(schedule, zone);
            let mut at: Timestamp = after.parse().unwrap();
            for expect in expect {
                at = calendar.next(at).unwrap();
                assert_eq!(at, expect.parse().unwrap(), "{schedule} in {zone} after {after}");
            }
        };
        check("* * * * *", "", "2026-01-01T00:00:00Z", &["2026-01-01T00:01:00Z", "2026-01-01T00:02:00Z"]);
        check("* * * * *", "", "2026-01-01T00:00:59.9Z", &["2026-01-01T00:01:00Z"]);
        check("*/15 * * * *", "", "2026-01-01T00:46:00Z", &["2026-01-01T01:00:00Z"]);
        check("0 0 * * 0", "", "2026-01-01T00:00:00Z", &["2026-01-04T00:00:00Z", "2026-01-11T00:00:00Z"]);
        check(
            "0 12 13 * 5",
            "",
            "2026-01-01T00:00:00Z",
            &["2026-01-02T12:00:00Z", "2026-01-09T12:00:00Z", "2026-01-13T12:00:00Z"],
        );
        check("0 0 29 2 *", "", "2026-01-01T00:00:00Z", &["2028-02-29T00:00:00Z"]);
        check("@every 90s", "", "2026-01-01T00:00:00.5Z", &["2026-01-01T00:01:30Z", "2026-01-01T00:03:00Z"]);
        check("30 8 * * *", "Asia/Kolkata", "2026-01-01T00:00:00Z", &["2026-01-01T03:00:00Z"]);
        check("TZ=Asia/Kolkata 30 8 * * *", "", "2026-01-01T00:00:00Z", &["2026-01-01T03:00:00Z"]);
        // The clock goes from 2 to 3: there is no half past two on that day.
        check("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", &["2026-03-30T00:30:00Z"]);
        // It goes from 3 back to 2: half past two comes twice.
        check(
            "30 2 * * *",
            "Europe/Berlin",
            "2026-10-24T12:00:00Z",
            &["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-26T01:30:00Z"],
        );
        assert_eq!(calendar("0 0 31 2 *", "").next("2026-01-01T00:00:00Z".parse().unwrap()), None);
    }
}
