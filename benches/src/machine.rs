//! CPU time of the machine and of single processes, to tell what others took while we measured. Linux only: elsewhere
//! there is no figure.

use std::fs;
use std::time::{Duration, Instant};

/// How long one look at an idle machine takes.
const LOOK: Duration = Duration::from_secs(1);

/// How long to wait for others to finish before measuring all the same.
const PATIENCE: Duration = Duration::from_mins(5);

/// CPU time that everything on this machine has used so far, in milliseconds.
fn machine_ms() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    parse_machine(&stat).map(|ticks| ticks * ms_per_tick())
}

/// User, nice, system, irq, softirq and steal ticks of the first line; what remains is idle or counted twice.
fn parse_machine(stat: &str) -> Option<f64> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let ticks: Vec<f64> = fields.map_while(|field| field.parse().ok()).collect();
    (ticks.len() >= 8).then(|| [0, 1, 2, 5, 6, 7].map(|at: usize| ticks[at]).iter().sum())
}

/// CPU time of one process, in milliseconds.
fn process_ms(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_process(&stat).map(|ticks| ticks * ms_per_tick())
}

/// `utime` and `stime`, fields 14 and 15; the name in field 2 may hold spaces and brackets.
fn parse_process(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut times = after_name.split_whitespace().skip(11).map_while(|field| field.parse::<f64>().ok());
    Some(times.next()? + times.next()?)
}

fn ms_per_tick() -> f64 {
    #[cfg(unix)]
    let ticks = rustix::param::clock_ticks_per_second();
    #[cfg(not(unix))]
    let ticks = 100;
    1e3 / ticks as f64
}

/// CPU time of this process so far, in milliseconds.
#[cfg_attr(unix, expect(clippy::unnecessary_wraps, reason = "other systems do not tell"))]
pub(crate) fn own_ms() -> Option<f64> {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6)
    }
    #[cfg(not(unix))]
    None
}

/// A watch on what everybody but the measured process and this one takes.
#[derive(Debug)]
pub(crate) struct OthersWatch {
    /// The measured process, where it is not this one.
    pid: Option<u32>,
    began: Instant,
    /// Of others, so far.
    used_ms: f64,
}

impl OthersWatch {
    /// Begins to watch; `None` where the system does not tell, or the measured process is not known.
    pub(crate) fn start(pid: Option<u32>) -> Option<Self> {
        let pid = Some(pid?);
        Some(Self { pid, began: Instant::now(), used_ms: others_ms(pid)? })
    }

    /// The same where this process is the measured one.
    pub(crate) fn start_here() -> Option<Self> {
        Some(Self { pid: None, began: Instant::now(), used_ms: others_ms(None)? })
    }

    /// How many cores others have kept busy since the start.
    pub(crate) fn cores(&self) -> Option<f64> {
        let used_ms = others_ms(self.pid)? - self.used_ms;
        Some((used_ms / (self.began.elapsed().as_secs_f64() * 1e3)).max(0.0))
    }
}

fn others_ms(pid: Option<u32>) -> Option<f64> {
    let measured = pid.map_or(Some(0.0), process_ms)?;
    Some(machine_ms()? - measured - own_ms()?)
}

/// Waits until everybody together takes less than `cores`, but not for ever. Nothing may be under way on our side.
pub(crate) async fn wait_until_calm(cores: f64) {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let (Some(before), look) = (machine_ms(), Instant::now()) else { return };
        tokio::time::sleep(LOOK).await;
        let used = machine_ms().map_or(0.0, |after| after - before);
        if used / (look.elapsed().as_secs_f64() * 1e3) < cores {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_leaves_out_idle_waiting_and_guests() {
        let stat = "cpu  1 2 4 1000 2000 8 16 32 4000 8000\ncpu0 9 9 9 9 9 9 9 9 9 9\n";
        assert_eq!(parse_machine(stat), Some(63.0));
        assert_eq!(parse_machine("cpu  1 2\n"), None);
    }

    #[test]
    fn a_process_may_have_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 5 0 0 0 30 12 0 0 20 0 3 0 100 1 1\n";
        assert_eq!(parse_process(stat), Some(42.0));
        assert_eq!(parse_process("7 (a) S 1"), None);
    }
}
