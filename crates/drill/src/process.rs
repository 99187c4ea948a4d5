//! What a process uses, as the kernel accounts for it (`proc(5)`).

use anyhow::Context as _;

/// CPU time and memory of some processes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Seconds of CPU, in user and kernel mode, since they started.
    pub cpu: f64,
    /// Resident memory in MiB.
    pub rss: f64,
}

/// Adds up what `pids` use.
pub fn usage(pids: &[i32]) -> anyhow::Result<Usage> {
    // The kernel reports in this unit on every architecture that Linux has.
    const TICKS: f64 = 100.0;
    let mut total = Usage::default();
    for pid in pids {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("--pid {pid}: no such process"))?;
        // The command may hold spaces; it ends at the last parenthesis. Fields 14 and 15 are user and system time.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or_default();
        total.cpu += (ticks(11) + ticks(12)) / TICKS;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
        total.rss += line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap_or_default() / 1024.0;
    }
    Ok(total)
}
