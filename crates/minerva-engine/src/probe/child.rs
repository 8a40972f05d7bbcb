//! The child: tries one thing after another and says so before each. Whatever it tries may end it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use minerva_gpu::{DriverState, Machine};
use minerva_llama::{DeviceKind, ModuleGroup, TrialError, TrialStep};

use super::protocol::{Line, SKIP};
use super::report::{CPU, Failure, ProbedDevice, Step, Subject};

/// Tries the backends of this program and exits. `args` are what the parent appended to
/// [`ProbeConfig::args`](super::ProbeConfig::args). Modules, if the build has any, must not be loaded yet.
pub fn run_probe_child(args: impl IntoIterator<Item = String>) -> ExitCode {
    let mut skip = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        match args.next().filter(|_| arg == SKIP).and_then(|json| serde_json::from_str(&json).ok()) {
            Some(subject) => skip.push(subject),
            None => return ExitCode::from(2),
        }
    }
    minerva_llama::prepare_trial_process();
    minerva_llama::use_modules(Vec::new());
    let mut child = Child { skip, n_tried: 0 };
    child.try_all();
    say(&Line::End);
    ExitCode::SUCCESS
}

fn say(line: &Line) {
    let Ok(mut text) = serde_json::to_string(line) else { return };
    text.push('\n');
    let mut out = std::io::stdout().lock();
    // Nobody listens any more: nothing to try for.
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

fn begin(subject: &Subject, step: Step) {
    say(&Line::Begin { subject: subject.clone(), step });
}

fn failed(subject: &Subject, step: Step, detail: String) {
    say(&Line::Failed { subject: subject.clone(), step, failure: Failure::Refused { detail } });
}

struct Child {
    skip: Vec<Subject>,
    /// Devices before this one were tried.
    n_tried: usize,
}

impl Child {
    /// The CPU comes first, the driver last: what hangs must not take the time of what works.
    fn try_all(&mut self) {
        let mut groups = minerva_llama::module_groups();
        groups.sort_by_key(|group| group.backend != "cpu");
        begin(&Subject::Backends, Step::Load);
        minerva_llama::init();
        for group in &groups {
            let module = self.load_best(group);
            self.try_new_devices(module.as_deref());
        }
        self.try_new_devices(None);
        let has_driver = !cfg!(target_os = "macos");
        if has_driver && !self.skip.contains(&Subject::Driver) {
            begin(&Subject::Driver, Step::List);
            if let DriverState::NoAnswer { waited_ms } = Machine::probe().driver {
                let failure = Failure::Hung { waited_ms };
                say(&Line::Failed { subject: Subject::Driver, step: Step::List, failure });
            }
        }
    }

    /// Loads the variant with the best score that loads, or the file without variants.
    fn load_best(&self, group: &ModuleGroup) -> Option<PathBuf> {
        let is_wanted = |path: &&PathBuf| !self.skip.contains(&Subject::Module((*path).clone()));
        let mut scored = Vec::new();
        for path in group.variants.iter().filter(is_wanted) {
            let subject = Subject::Module(path.clone());
            begin(&subject, Step::Load);
            match minerva_llama::module_score(path) {
                Ok(Some(score)) if score > 0 => scored.push((score, path)),
                Ok(_) => {}
                Err(problem) => failed(&subject, Step::Load, problem.to_string()),
            }
        }
        scored.sort_by_key(|(score, _)| std::cmp::Reverse(*score));
        let candidates = scored.into_iter().map(|(_, path)| path).chain(group.plain.iter().filter(is_wanted));
        candidates.into_iter().find(|path| load(path)).cloned()
    }

    fn try_new_devices(&mut self, module: Option<&Path>) {
        let names = minerva_llama::device_names();
        let mut indices: Vec<usize> = (self.n_tried..names.len()).collect();
        indices.sort_by_key(|&index| names[index] != CPU);
        self.n_tried = names.len();
        for index in indices {
            let subject = Subject::Device(names[index].clone());
            if self.skip.contains(&subject) {
                continue;
            }
            begin(&subject, Step::List);
            let Some(device) = minerva_llama::device_at(index) else { continue };
            let is_gpu = matches!(device.kind, DeviceKind::Gpu | DeviceKind::IntegratedGpu);
            let repacks = device.kind == DeviceKind::Cpu;
            say(&Line::Device(ProbedDevice {
                name: device.name.clone(),
                description: device.description,
                pci_bus_id: device.pci_bus_id,
                is_gpu,
                module: module.map(Path::to_owned),
                works: false,
            }));
            if try_device(&subject, index, false) {
                say(&Line::Passed { subject });
            }
            let repacked = Subject::Repacked(device.name);
            if repacks && !self.skip.contains(&repacked) {
                try_device(&repacked, index, true);
            }
        }
    }
}

fn load(path: &Path) -> bool {
    let subject = Subject::Module(path.to_owned());
    begin(&subject, Step::Load);
    match minerva_llama::load_module(path) {
        Ok(()) => say(&Line::Loaded { module: path.to_owned() }),
        Err(problem) => {
            failed(&subject, Step::Load, problem.to_string());
            return false;
        }
    }
    true
}

fn try_device(subject: &Subject, index: usize, repacked: bool) -> bool {
    let mut now = Step::Allocate;
    let result = minerva_llama::try_device(index, repacked, &mut |step| {
        now = match step {
            TrialStep::Allocate => Step::Allocate,
            TrialStep::Compute => Step::Compute,
        };
        begin(subject, now);
    });
    match result {
        Ok(()) => true,
        Err(TrialError::Refused(problem)) => {
            failed(subject, now, problem.to_string());
            false
        }
        Err(problem) => {
            let failure = Failure::Wrong { detail: problem.to_string() };
            say(&Line::Failed { subject: subject.clone(), step: now, failure });
            false
        }
    }
}
