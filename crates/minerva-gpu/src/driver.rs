//! NVIDIA's driver library behind a deadline.
//!
//! A call into NVML can hang for good: a GPU that fell off the bus, a driver that deadlocked. So the library lives on a thread
//! of its own, which does nothing but ask it; a call that does not return in time costs that thread and nothing else. From
//! then on nobody in this process calls the library again: the hung call may hold its locks.

#[cfg(test)]
use std::path::Path;
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use crate::nvml::{DriverState, Library, MemoryReading, Snapshot};

/// How long one question may take. Waking a GPU without persistence mode takes one to two seconds.
const ANSWER_TIME: Duration = Duration::from_secs(3);

/// Set when a call of this process did not return.
static STUCK: OnceLock<DriverState> = OnceLock::new();

type Question = Box<dyn FnOnce(&Library) + Send>;

/// The open driver library. Kept open: closing the last one lets an idle GPU power down, and waking it takes seconds.
#[derive(Debug)]
pub(crate) struct Driver {
    questions: Sender<Question>,
    answer_time: Duration,
    stuck: &'static OnceLock<DriverState>,
}

impl Driver {
    /// Loads the library from its usual places, unless it is known to hang or to crash.
    pub(crate) fn open() -> Result<Self, DriverState> {
        if let Some(detail) = crate::findings::current().driver_fault {
            return Err(DriverState::NotTried { detail });
        }
        Self::start(Library::open, ANSWER_TIME, &STUCK)
    }

    /// Opens the library at `path`, with a deadline and a memory of hanging of its own.
    #[cfg(test)]
    fn open_at(path: &Path, answer_time: Duration, stuck: &'static OnceLock<DriverState>) -> Result<Self, DriverState> {
        let path = path.to_owned();
        Self::start(move || Library::open_at(&path), answer_time, stuck)
    }

    fn start(
        open: impl FnOnce() -> Result<Library, DriverState> + Send + 'static,
        answer_time: Duration,
        stuck: &'static OnceLock<DriverState>,
    ) -> Result<Self, DriverState> {
        if let Some(state) = stuck.get() {
            return Err(state.clone());
        }
        let (questions, asked) = mpsc::channel::<Question>();
        let (send, opened) = mpsc::channel();
        let body = move || match open() {
            Ok(library) => {
                let _ = send.send(Ok(()));
                for question in asked {
                    question(&library);
                }
            }
            Err(state) => drop(send.send(Err(state))),
        };
        let thread = std::thread::Builder::new().name("minerva-nvml".to_owned()).spawn(body);
        thread.map_err(|error| DriverState::Failed { detail: error.to_string() })?;
        let driver = Self { questions, answer_time, stuck };
        driver.wait(&opened)??;
        Ok(driver)
    }

    /// Everything that it says about its GPUs.
    pub(crate) fn snapshot(&self) -> Result<Snapshot, DriverState> {
        self.ask(Library::snapshot)
    }

    /// Reads a device's memory anew. MIG instances have UUIDs of their own.
    pub(crate) fn memory(&self, uuid: Option<&str>, nvml_index: u32) -> MemoryReading {
        let uuid = uuid.map(str::to_owned);
        self.ask(move |library| library.memory(uuid.as_deref(), nvml_index))
            .unwrap_or_else(|state| MemoryReading::Failed(state.to_string()))
    }

    fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Library) -> T + Send + 'static) -> Result<T, DriverState> {
        if let Some(state) = self.stuck.get() {
            return Err(state.clone());
        }
        let (send, answer) = mpsc::channel();
        let question: Question = Box::new(move |library| drop(send.send(question(library))));
        self.questions.send(question).map_err(|_| ended())?;
        self.wait(&answer)
    }

    fn wait<T>(&self, answer: &mpsc::Receiver<T>) -> Result<T, DriverState> {
        answer.recv_timeout(self.answer_time).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                let waited_ms = u64::try_from(self.answer_time.as_millis()).unwrap_or(u64::MAX);
                self.stuck.get_or_init(|| DriverState::NoAnswer { waited_ms }).clone()
            }
            RecvTimeoutError::Disconnected => ended(),
        })
    }
}

/// The thread panicked: a bug of ours or of nvml-wrapper, and no reason to end the process.
fn ended() -> DriverState {
    DriverState::Failed { detail: "its thread ended".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeLibrary;
    use std::time::Instant;

    const SOON: Duration = Duration::from_millis(200);

    /// Each test has a process's memory of its own.
    fn memory_of_hanging() -> &'static OnceLock<DriverState> {
        Box::leak(Box::default())
    }

    fn open(env: &[(&str, &str)]) -> (Result<Driver, DriverState>, &'static OnceLock<DriverState>, FakeLibrary) {
        let (library, stuck) = (FakeLibrary::build(&[], env), memory_of_hanging());
        (Driver::open_at(&library.path(), SOON, stuck), stuck, library)
    }

    #[test]
    fn a_driver_that_answers_is_as_good_as_its_library() {
        let (driver, stuck, _library) = open(&[]);
        let driver = driver.unwrap();
        assert_eq!(driver.snapshot().unwrap().gpus.len(), 4);
        let (total, free) = (10 << 30, 9 << 30);
        assert_eq!(driver.memory(Some("MIG-three"), 3), MemoryReading::Bytes { total, free });
        assert_eq!(stuck.get(), None);
    }

    #[test]
    fn a_driver_that_hangs_is_given_up_after_the_deadline_and_not_asked_again() {
        let started = Instant::now();
        let (driver, stuck, library) = open(&[("FAKE_HANG", "init")]);
        let state = driver.unwrap_err();
        assert!(matches!(state, DriverState::NoAnswer { .. }) && state.to_string().contains("within 0.2 s"), "{state}");
        let again = Instant::now();
        assert_eq!(Driver::open_at(&library.path(), SOON, stuck).unwrap_err(), state);
        assert!(again.elapsed() < SOON, "it was called again");
        assert!(started.elapsed() < Duration::from_secs(30)); // the fake is compiled within
    }

    #[test]
    fn a_driver_that_hangs_later_is_given_up_then() {
        let (driver, _, _library) = open(&[("FAKE_HANG", "memory")]);
        let driver = driver.unwrap();
        let state = driver.snapshot().unwrap_err();
        let again = Instant::now();
        match driver.memory(Some("GPU-h100"), 0) {
            MemoryReading::Failed(text) => assert_eq!(text, state.to_string()),
            reading => panic!("{reading:?}"),
        }
        assert!(again.elapsed() < SOON, "it was called again");
    }
}
