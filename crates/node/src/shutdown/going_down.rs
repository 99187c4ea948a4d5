//! Whether the machine goes down, when somebody tells us to end: an agent that is only started again leaves its pods alone.

use std::{path::Path, time::Duration};

use tokio::{process::Command, time::timeout};

use super::{Config, logind};

/// How long a program may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// Where the machine's run level is noted (utmp(5)).
const UTMP: &str = "/run/utmp";

/// Asks whoever may know: logind, systemd, and init by its run level.
pub async fn is_going_down(config: &Config) -> bool {
    if logind::is_going_down(config).await == Some(true) || systemd().await {
        return true;
    }
    std::fs::read(UTMP).is_ok_and(|records| matches!(run_level(&records), Some('0' | '6')))
}

/// systemd's own word; with nobody logged in there may be no logind.
async fn systemd() -> bool {
    if !Path::new("/run/systemd/system").exists() {
        return false;
    }
    let output = Command::new("systemctl").arg("is-system-running").kill_on_drop(true).output();
    matches!(timeout(ANSWER, output).await, Ok(Ok(output)) if output.stdout.trim_ascii() == b"stopping")
}

/// The size of a record of utmp, which is the same on all of glibc's 64-bit machines.
const RECORD: usize = 384;
/// The type of a record that notes a run level.
const RUN_LVL: i16 = 1;

/// The last run level in utmp: 0 halts the machine, 6 reboots it. Upper half of its pid: the level before.
fn run_level(records: &[u8]) -> Option<char> {
    let mut levels = records.chunks_exact(RECORD).filter_map(|record| {
        let (kind, rest) = record.split_first_chunk::<2>()?;
        // The pid is aligned to four bytes.
        let pid = rest.get(2..6).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok())?;
        (i16::from_ne_bytes(*kind) == RUN_LVL).then(|| char::from(u32::from_ne_bytes(pid).to_le_bytes()[0]))
    });
    levels.next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_level_record(level: char) -> Vec<u8> {
        let mut record = vec![0; RECORD];
        record[..2].copy_from_slice(&RUN_LVL.to_ne_bytes());
        record[4..8].copy_from_slice(&u32::from(level).to_ne_bytes());
        record
    }

    #[test]
    fn run_levels() {
        assert_eq!(run_level(&[]), None);
        assert_eq!(run_level(&[1; 100]), None, "a torn record says nothing");
        let mut records = run_level_record('5');
        // A boot, and a user.
        records.extend([2_i16, 7].iter().flat_map(|kind| {
            let mut record = vec![0_u8; RECORD];
            record[..2].copy_from_slice(&kind.to_ne_bytes());
            record
        }));
        assert_eq!(run_level(&records), Some('5'));
        records.extend(run_level_record('6'));
        assert_eq!(run_level(&records), Some('6'));
        // From level 5 to level 0, as init notes it.
        let mut record = run_level_record('0');
        record[5] = b'5';
        assert_eq!(run_level(&record), Some('0'));
    }
}
