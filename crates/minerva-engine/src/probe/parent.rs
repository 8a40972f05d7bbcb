//! The parent: runs the child until nothing ends it any more, each time without what ended it before.
//!
//! The child is not trusted with anything: its time, the length of its lines and the amount of its output are bounded, and
//! what is no line of the protocol is ignored. Nothing here waits for a process that cannot die.

use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::ProbeConfig;
use super::protocol::{Line, SKIP};
use super::report::{CPU, Failure, ProbeReport, Problem, Step, Subject};

/// What is left for the rest when one thing has used up its time.
const REST_TIME: Duration = Duration::from_secs(1);
/// Each run of the child loses one thing; a machine with more broken ones has other worries.
const MOST_RUNS: usize = 32;
/// A line of the protocol holds two names and a path.
const MOST_LINE_BYTES: u64 = 64 << 10;
/// The child says a few lines per device.
const MOST_LINES: usize = 4096;
/// As much of stderr as a message can use.
const MOST_DETAIL_BYTES: usize = 300;

/// Variables that hide the GPUs from backends that are part of the program.
const HIDE_GPUS: [(&str, &str); 3] =
    [("CUDA_VISIBLE_DEVICES", "-1"), ("HIP_VISIBLE_DEVICES", "-1"), ("GGML_DISABLE_VULKAN", "1")];

/// Tries everything. Takes at most the time limit and [`REST_TIME`].
pub(super) fn probe(config: &ProbeConfig) -> ProbeReport {
    let started = Instant::now();
    let mut report = ProbeReport { problems: config.known.clone(), ..ProbeReport::default() };
    run_until_nothing_ends_it(config, started, &mut report);
    report.took_ms = millis(started.elapsed());
    report
}

fn run_until_nothing_ends_it(config: &ProbeConfig, started: Instant, report: &mut ProbeReport) {
    let step_limit = Duration::from_millis(config.time_limit_ms);
    let last = started + step_limit + REST_TIME;
    let mut earlier: Option<Run> = None;
    for _ in 0..MOST_RUNS {
        let run = match Run::start(config, report, step_limit, last) {
            Ok(run) => run,
            Err(problem) => {
                report.gave_up = Some(format!("{} cannot be started: {problem}", config.program.display()));
                return;
            }
        };
        let failure = match &run.end {
            End::Finished => {
                if let Some(problem) = run.replaceable().filter(|_| Instant::now() < last) {
                    report.problems.push(problem);
                    earlier = Some(run);
                    continue;
                }
                run.take_into(report);
                return;
            }
            End::Crashed(cause) => Failure::Crashed { cause: cause.clone(), detail: run.last_words.clone() },
            End::Hung => Failure::Hung { waited_ms: millis(run.last_step_took) },
            End::Flooded => Failure::Crashed { cause: "endless output".to_owned(), detail: String::new() },
        };
        let Some((subject, step)) = run.under_way() else {
            if let Some(earlier) = earlier {
                earlier.take_into(report);
                return;
            }
            report.gave_up = Some(format!("the process that was to try the devices {failure} before it began"));
            return;
        };
        let culprit = run.culprit(subject.clone());
        let is_new = report.problems.iter().all(|problem| problem.subject != culprit);
        let is_whole_build = culprit == Subject::Backends;
        if is_new {
            report.problems.push(Problem { subject: culprit, step, failure });
        }
        if is_new && is_whole_build {
            report.hide_gpus = HIDE_GPUS.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        }
        // When leaving it out did not help, or the time is up, what has worked so far is what there is.
        if !is_new || Instant::now() >= last {
            let best = earlier.filter(|_| !run.has_cpu()).unwrap_or(run);
            best.take_into(report);
            return;
        }
        earlier = Some(run);
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// How a child ended.
enum End {
    Finished,
    Crashed(String),
    Hung,
    Flooded,
}

/// One run of the child.
struct Run {
    lines: Vec<Line>,
    end: End,
    last_step_took: Duration,
    last_words: String,
}

impl Run {
    fn start(config: &ProbeConfig, report: &ProbeReport, step_limit: Duration, last: Instant) -> std::io::Result<Self> {
        let mut command = Command::new(&config.program);
        command.args(&config.args).env("GGML_NO_BACKTRACE", "1").envs(report.hide_gpus.iter().cloned());
        for problem in &report.problems {
            if let Ok(subject) = serde_json::to_string(&problem.subject) {
                command.args([SKIP, &subject]);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let lines = child.stdout.take().map(lines_of);
        let last_words = child.stderr.take().map(end_of).unwrap_or_default();
        let mut run =
            Self { lines: Vec::new(), end: End::Flooded, last_step_took: Duration::ZERO, last_words: String::new() };
        let mut step_began = Instant::now();
        if let Some(lines) = lines {
            run.end = loop {
                let until = (step_began + step_limit).min(last);
                match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(Some(Line::End)) => break End::Finished,
                    Ok(Some(line)) if run.lines.len() < MOST_LINES => {
                        run.lines.push(line);
                        step_began = Instant::now();
                    }
                    Ok(_) => break End::Flooded,
                    Err(RecvTimeoutError::Timeout) => break End::Hung,
                    Err(RecvTimeoutError::Disconnected) => break End::Crashed(String::new()),
                }
            };
        }
        run.last_step_took = step_began.elapsed();
        // A child that closed its stdout is about to end; one that did not will not by itself.
        let patience = if matches!(run.end, End::Crashed(_)) { Duration::from_millis(500) } else { Duration::ZERO };
        let status = end(child, patience);
        if let End::Crashed(cause) = &mut run.end {
            *cause = status.map_or_else(|| "it closed its output".to_owned(), in_words);
            thread::sleep(Duration::from_millis(5)); // its stderr is read by another thread
        }
        let text = last_words.lock().unwrap_or_else(PoisonError::into_inner);
        run.last_words = last_line(&text);
        Ok(run)
    }

    /// What was begun last and neither failed nor passed.
    fn under_way(&self) -> Option<(&Subject, Step)> {
        self.lines.iter().rev().find_map(|line| match line {
            Line::Begin { subject, step } => Some((subject, *step)),
            _ => None,
        })
    }

    /// The thing to leave out: a module goes with its only device, so that another one can take its place.
    fn culprit(&self, subject: Subject) -> Subject {
        let Subject::Device(name) = &subject else { return subject };
        let module_of = |line: &Line| match line {
            Line::Device(device) if device.name == *name && !device.is_gpu => device.module.clone(),
            _ => None,
        };
        self.lines.iter().find_map(module_of).map_or(subject, Subject::Module)
    }

    /// Whether it came as far as the device without which nothing runs.
    fn has_cpu(&self) -> bool {
        self.lines.contains(&Line::Passed { subject: Subject::Device(CPU.to_owned()) })
    }

    /// A device that failed without ending the child, and whose module another one can take the place of.
    fn replaceable(&self) -> Option<Problem> {
        self.lines.iter().find_map(|line| match line {
            Line::Failed { subject: subject @ Subject::Device(_), step, failure } => {
                let module = Some(self.culprit(subject.clone())).filter(|culprit| culprit != subject)?;
                Some(Problem { subject: module, step: *step, failure: failure.clone() })
            }
            _ => None,
        })
    }

    /// What worked, and what failed without ending the child.
    fn take_into(self, report: &mut ProbeReport) {
        for line in &self.lines {
            match line {
                Line::Loaded { module } => report.modules.push(module.clone()),
                Line::Device(device) => report.devices.push(device.clone()),
                Line::Passed { subject: Subject::Device(name) } => {
                    report
                        .devices
                        .iter_mut()
                        .filter(|device| device.name == *name)
                        .for_each(|device| device.works = true);
                }
                Line::Failed { subject, step, failure } => {
                    let problem = Problem { subject: subject.clone(), step: *step, failure: failure.clone() };
                    report.problems.push(problem);
                }
                Line::Begin { .. } | Line::Passed { .. } | Line::End => {}
            }
        }
        let failed = |module: &PathBuf| report.problems.iter().any(|p| p.subject == Subject::Module(module.clone()));
        report.modules = report.modules.iter().filter(|module| !failed(module)).cloned().collect();
        // Whatever came before it in the list of steps was left out by name; the rest had no time.
        for device in report.devices.clone() {
            if !device.works && report.problem_of(&device).is_none() {
                let subject = Subject::Device(device.name);
                report.problems.push(Problem { subject, step: Step::Allocate, failure: Failure::NotTried });
            }
        }
    }
}

/// The lines of the protocol in what comes from `pipe`; `None` when it is too much. Ends with the pipe.
fn lines_of(pipe: impl Read + Send + 'static) -> Receiver<Option<Line>> {
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        for _ in 0..MOST_LINES * 4 {
            let mut text = Vec::new();
            match pipe.by_ref().take(MOST_LINE_BYTES).read_until(b'\n', &mut text) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            // A library may print to stdout as well; half a line is a child that died while it wrote.
            if let Ok(line) = serde_json::from_slice(&text)
                && send.send(Some(line)).is_err()
            {
                return;
            }
        }
        let _ = send.send(None);
    });
    lines
}

/// The end of what comes from `pipe`, which is read to its own end.
fn end_of(mut pipe: impl Read + Send + 'static) -> Arc<Mutex<Vec<u8>>> {
    let text = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&text);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            let mut text = shared.lock().unwrap_or_else(PoisonError::into_inner);
            text.extend_from_slice(&buffer[..n]);
            let surplus = text.len().saturating_sub(2 * buffer.len());
            text.drain(..surplus);
        }
    });
    text
}

/// The most telling line: llama.cpp says what went wrong first and where it gave up last.
fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let telling = lines.iter().rev().find(|line| line.to_ascii_lowercase().contains("error"));
    let line = telling.or(lines.last()).copied().unwrap_or_default();
    let clean: String = line.chars().filter(|c| !c.is_control()).take(MOST_DETAIL_BYTES).collect();
    clean
}

/// Waits for the child to end by itself, then ends it. `None` when even that takes too long: it is left to the system.
fn end(mut child: Child, patience: Duration) -> Option<ExitStatus> {
    let started = Instant::now();
    let mut was_killed = false;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return if was_killed { None } else { Some(status) },
            Ok(None) => {}
            Err(_) => return None,
        }
        if !was_killed && started.elapsed() >= patience {
            let _ = child.kill(); // it may have ended just now
            was_killed = true;
        }
        if started.elapsed() >= patience + Duration::from_millis(200) {
            // Inside a driver that does not return: it becomes a zombie when it does, and this thread takes it away.
            thread::spawn(move || drop(child.wait()));
            return None;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(unix)]
fn in_words(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    const SIGNALS: [(i32, &str); 8] = [
        (4, "illegal instruction"),
        (6, "aborted"),
        (7, "bus error"),
        (8, "arithmetic error"),
        (9, "killed"),
        (10, "bus error"),
        (11, "segmentation fault"),
        (31, "forbidden system call"),
    ];
    match status.signal() {
        Some(signal) => match SIGNALS.iter().find(|(number, _)| *number == signal) {
            Some((_, words)) => (*words).to_owned(),
            None => format!("signal {signal}"),
        },
        None => exit_code(status),
    }
}

#[cfg(not(unix))]
fn in_words(status: ExitStatus) -> String {
    match status.code().map(i32::cast_unsigned) {
        Some(0xC000_001D) => "illegal instruction".to_owned(),
        Some(0xC000_0005) => "segmentation fault".to_owned(),
        _ => exit_code(status),
    }
}

fn exit_code(status: ExitStatus) -> String {
    status.code().map_or_else(|| "no exit code".to_owned(), |code| format!("exit code {code}"))
}

#[cfg(all(test, unix))]
#[allow(clippy::needless_raw_string_hashes)] // as expect-test writes them
mod tests {
    use super::*;
    use expect_test::expect;
    use std::fmt::Write as _;

    /// A child that is a shell script; `skips` in it is true for what it is told to leave alone.
    fn probe_script(script: &str, time_limit_ms: u64) -> ProbeReport {
        let prelude = r#"
            all="$*"
            skips() { case "$all" in *"$1"*) return 0;; esac; return 1; }
            begin() { echo "{\"begin\":{\"subject\":$1,\"step\":\"$2\"}}"; }
            device() { echo "{\"device\":{\"name\":\"$1\",\"description\":\"\",\"pci_bus_id\":null,\"is_gpu\":$2,\"module\":$3,\"works\":false}}"; }
            passed() { echo "{\"passed\":{\"subject\":{\"device\":\"$1\"}}}"; }
            loaded() { echo "{\"loaded\":{\"module\":\"$1\"}}"; }
            the_end() { echo '"end"'; }
        "#;
        probe(&ProbeConfig {
            program: "/bin/sh".into(),
            args: vec!["-c".to_owned(), format!("{prelude}\n{script}"), "child".to_owned()],
            time_limit_ms,
            cache_file: None,
            known: vec![],
        })
    }

    /// Everything but the times.
    fn show(report: &ProbeReport) -> String {
        let mut text = String::new();
        for module in &report.modules {
            let _ = writeln!(text, "module {}", module.display());
        }
        for device in &report.devices {
            let _ = writeln!(text, "{} {}", device.name, if device.works { "works" } else { "does not work" });
        }
        for problem in &report.problems {
            let line = problem.to_string();
            let _ = writeln!(text, "{}", line.split(": ").next().unwrap_or_default());
        }
        if let Some(problem) = &report.gave_up {
            let _ = writeln!(text, "gave up: {problem}");
        }
        text
    }

    const CPU: &str =
        r#"begin '{"device":"CPU"}' list; device CPU false null; begin '{"device":"CPU"}' compute; passed CPU"#;

    #[test]
    fn a_sound_machine_is_tried_once() {
        let report = probe_script(&format!(r#"begin '"backends"' load; {CPU}; begin '"driver"' list; the_end"#), 5_000);
        expect![[r#"
            CPU works
        "#]]
        .assert_eq(&show(&report));
        assert!(report.took_ms < 2_000, "{} ms", report.took_ms);
    }

    #[test]
    fn a_device_that_crashes_on_its_product_is_left_out_and_the_rest_is_tried_again() {
        let script = format!(
            r#"{CPU}
            for gpu in CUDA0 CUDA1; do
                skips $gpu && continue
                begin "{{\"device\":\"$gpu\"}}" list; device $gpu true null
                begin "{{\"device\":\"$gpu\"}}" compute
                [ $gpu = CUDA0 ] && {{ echo "CUDA error: no kernel image is available" >&2; kill -ABRT $$; }}
                passed $gpu
            done
            the_end"#
        );
        let report = probe_script(&script, 5_000);
        expect![[r#"
            CPU works
            CUDA1 works
            the device CUDA0 crashed (aborted
        "#]]
        .assert_eq(&show(&report));
        let text = report.problems[0].to_string();
        assert!(text.contains("aborted: CUDA error: no kernel image is available) on its first product"), "{text}");
        assert!(text.ends_with("with `--features cuda`)"), "{text}");
    }

    #[test]
    fn a_cpu_module_that_crashes_gives_way_to_the_next_best() {
        let script = r#"
            try() { begin "{\"module\":\"/m/$1.so\"}" load; loaded /m/$1.so; device CPU false "\"/m/$1.so\""; begin '{"device":"CPU"}' compute; }
            if ! skips best; then try best; kill -ILL $$; fi
            try second; passed CPU; the_end"#;
        let report = probe_script(script, 5_000);
        expect![[r#"
            module /m/second.so
            CPU works
            the module best.so crashed (illegal instruction) on its first product and is left out
        "#]]
        .assert_eq(&show(&report));
        assert_eq!(report.nothing_works(), None);
    }

    #[test]
    fn a_cpu_module_that_computes_wrong_numbers_gives_way_too() {
        let script = r#"
            try() { loaded /m/$1.so; device CPU false "\"/m/$1.so\""; }
            if ! skips best; then
                try best
                echo '{"failed":{"subject":{"device":"CPU"},"step":"compute","failure":{"how":"wrong","detail":"1e0"}}}'
            else
                try second; passed CPU
            fi
            the_end"#;
        expect![[r#"
            module /m/second.so
            CPU works
            the module best.so computed wrong numbers (1e0) on its first product and is left out
        "#]]
        .assert_eq(&show(&probe_script(script, 5_000)));
    }

    #[test]
    fn a_module_that_crashes_while_it_is_loaded_is_left_out() {
        let script =
            format!(r#"{CPU}; skips bad.so || {{ begin '{{"module":"/m/bad.so"}}' load; kill -SEGV $$; }}; the_end"#);
        expect![[r#"
            CPU works
            the module bad.so crashed (segmentation fault) while it was loaded and is left out
        "#]]
        .assert_eq(&show(&probe_script(&script, 5_000)));
    }

    #[test]
    fn a_device_that_hangs_costs_the_time_limit_and_is_left_out() {
        let script = format!(
            r#"{CPU}; skips CUDA0 || {{ begin '{{"device":"CUDA0"}}' list; device CUDA0 true null; exec sleep 60; }}; the_end"#
        );
        let report = probe_script(&script, 300);
        expect![[r#"
            CPU works
            the device CUDA0 did not answer for 0.3 s when it was asked what it is and is left out
        "#]]
        .assert_eq(&show(&report));
        assert!(report.took_ms < 1_400, "{} ms", report.took_ms);
    }

    #[test]
    fn when_everything_hangs_the_time_is_still_bounded_and_what_worked_is_kept() {
        let script = format!(
            r#"{CPU}
            for gpu in A B C D; do skips $gpu || {{ begin "{{\"device\":\"$gpu\"}}" list; device $gpu true null; exec sleep 60; }}; done
            the_end"#
        );
        let report = probe_script(&script, 500);
        let text = show(&report);
        assert!(text.starts_with("CPU works\n") && text.contains("the device A did not answer for 0.5 s"), "{text}");
        assert!(
            text.lines().all(|line| !line.contains("works") || line == "CPU works" || line.contains("not")),
            "{text}"
        );
        assert!(report.took_ms < 2_500, "{} ms", report.took_ms);
    }

    #[test]
    fn what_worked_before_the_time_was_up_is_kept_even_if_the_last_run_came_to_nothing() {
        let script = format!(
            r#"skips CUDA0 && exec sleep 60
            loaded /m/cpu.so; {CPU}; begin '{{"device":"CUDA0"}}' list; device CUDA0 true null; exec sleep 60"#
        );
        expect![[r#"
            module /m/cpu.so
            CPU works
            CUDA0 does not work
            the device CUDA0 did not answer for 0.3 s when it was asked what it is and is left out
        "#]]
        .assert_eq(&show(&probe_script(&script, 300)));
    }

    #[test]
    fn errors_and_wrong_numbers_are_problems_that_end_nothing() {
        let script = format!(
            r#"{CPU}
            begin '{{"device":"CUDA0"}}' compute; device CUDA0 true null
            echo '{{"failed":{{"subject":{{"device":"CUDA0"}},"step":"compute","failure":{{"how":"wrong","detail":"1e0"}}}}}}'
            begin '{{"module":"/m/old.so"}}' load
            echo '{{"failed":{{"subject":{{"module":"/m/old.so"}},"step":"load","failure":{{"how":"refused","detail":"incompatible API version (backend: 1, current: 3)"}}}}}}'
            the_end"#
        );
        let report = probe_script(&script, 5_000);
        expect![[r#"
            CPU works
            CUDA0 does not work
            the device CUDA0 computed wrong numbers (1e0) on its first product and is left out
            the module old.so failed (incompatible API version (backend
        "#]]
        .assert_eq(&show(&report));
        assert!(report.problems[1].advice().contains("another version of llama.cpp"));
    }

    #[test]
    fn backends_of_the_program_that_crash_are_tried_again_without_gpus() {
        let script =
            format!(r#"begin '"backends"' load; [ "$CUDA_VISIBLE_DEVICES" = -1 ] || kill -SEGV $$; {CPU}; the_end"#);
        let report = probe_script(&script, 5_000);
        expect![[r#"
            CPU works
            this program's set of backends crashed (segmentation fault) while it was loaded and is left out
        "#]]
        .assert_eq(&show(&report));
        assert!(report.hide_gpus.contains(&("CUDA_VISIBLE_DEVICES".to_owned(), "-1".to_owned())));
        let report = probe_script(r#"begin '"backends"' load; kill -ILL $$"#, 5_000);
        assert!(report.nothing_works().is_some_and(|reason| reason.contains("illegal instruction")), "{report:?}");
    }

    #[test]
    fn what_is_known_is_not_tried_and_stays_in_the_report() {
        let known = Problem { subject: Subject::Backends, step: Step::Load, failure: Failure::NotTried };
        let script =
            r#"echo '{"begin":{"subject":"backends","step":"load"}}'; case "$*" in *backends*) echo '"end"';; esac"#;
        let report = probe(&ProbeConfig {
            known: vec![known.clone()],
            ..ProbeConfig::new("/bin/sh", ["-c", script, "child"].map(str::to_owned))
        });
        assert_eq!((&report.problems, report.hide_gpus.len(), &report.gave_up), (&vec![known], 0, &None));
    }

    #[test]
    fn garbage_half_lines_and_floods_do_no_harm() {
        let report = probe_script(&format!(r#"echo hello; printf '\000\377{{\n'; {CPU}; the_end"#), 5_000);
        assert_eq!(show(&report), "CPU works\n");
        let report = probe_script(&format!(r#"{CPU}; printf '{{"begin":{{"sub'; exit 3"#), 5_000);
        assert!(show(&report).contains("crashed (exit code 3) on its first product"), "{}", show(&report));
        for flood in ["exec yes", "exec tr '\\0' x < /dev/zero", "exec yes '{\"passed\":{\"subject\":\"driver\"}}'"] {
            let report = probe_script(
                &format!(r#"{CPU}; skips driver || {{ begin '"driver"' list; {flood}; }}; the_end"#),
                2_000,
            );
            let text = show(&report);
            assert!(text.contains("CPU works") && text.contains("the NVIDIA driver library"), "{flood}: {text}");
            assert!(report.took_ms < 3_500, "{flood}: {} ms", report.took_ms);
        }
        let report = probe_script(&format!("{CPU}; yes >&2 & sleep 0.2; kill $!; the_end"), 5_000);
        assert_eq!(show(&report), "CPU works\n");
    }

    #[test]
    fn a_child_that_says_nothing_changes_nothing() {
        for (script, words) in [("exit 7", "exit code 7"), ("exec sleep 60", "did not answer")] {
            let report = probe_script(script, 300);
            assert!(report.gave_up.as_ref().is_some_and(|reason| reason.contains(words)), "{report:?}");
            assert!(report.problems.is_empty() && report.nothing_works().is_none());
        }
        let config = ProbeConfig {
            program: "/nowhere/at/all".into(),
            args: vec![],
            time_limit_ms: 300,
            cache_file: None,
            known: vec![],
        };
        assert!(probe(&config).gave_up.is_some_and(|reason| reason.contains("/nowhere/at/all cannot be started")));
    }
}
