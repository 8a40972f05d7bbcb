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

/// CPU time of all children of this process that have ended and were waited for, in milliseconds.
fn ended_children_ms() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    parse_times(&stat).map(|[_, _, user, system]| (user + system) * ms_per_tick())
}

fn parse_process(stat: &str) -> Option<f64> {
    parse_times(stat).map(|[user, system, ..]| user + system)
}

/// `utime`, `stime`, `cutime` and `cstime`, fields 14 to 17; the name in field 2 may hold spaces and brackets.
fn parse_times(stat: &str) -> Option<[f64; 4]> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut times = after_name.split_whitespace().skip(11).map_while(|field| field.parse::<f64>().ok());
    Some([times.next()?, times.next()?, times.next()?, times.next()?])
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

/// Whom a watch is not for, beside this process.
#[derive(Debug, Clone, Copy)]
enum Measured {
    Process(u32),
    Children,
}

/// A watch on what everybody but the measured process and this one takes.
#[derive(Debug)]
pub(crate) struct OthersWatch {
    measured: Measured,
    began: Instant,
    /// Of others, so far.
    used_ms: f64,
}

impl OthersWatch {
    /// Begins to watch; `None` where the system does not tell, or the measured process is not known.
    pub(crate) fn start(pid: Option<u32>) -> Option<Self> {
        Self::watch(Measured::Process(pid?))
    }

    /// The same where the measured ones are children of this process that begin and end during the watch.
    pub(crate) fn start_with_children() -> Option<Self> {
        Self::watch(Measured::Children)
    }

    fn watch(measured: Measured) -> Option<Self> {
        Some(Self { measured, began: Instant::now(), used_ms: others_ms(measured)? })
    }

    /// How many cores others have kept busy since the start.
    pub(crate) fn cores(&self) -> Option<f64> {
        let used_ms = others_ms(self.measured)? - self.used_ms;
        Some((used_ms / (self.began.elapsed().as_secs_f64() * 1e3)).max(0.0))
    }
}

fn others_ms(measured: Measured) -> Option<f64> {
    let measured_ms = match measured {
        Measured::Process(pid) => process_ms(pid)?,
        Measured::Children => ended_children_ms()?,
    };
    Some(machine_ms()? - measured_ms - own_ms()?)
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
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 5 0 0 0 30 12 5 6 20 0 3 0 100 1 1\n";
        assert_eq!(parse_process(stat), Some(42.0));
        assert_eq!(parse_times(stat), Some([30.0, 12.0, 5.0, 6.0]));
        assert_eq!(parse_process("7 (a) S 1"), None);
    }
}
