//! A schedule for people: a line per admission, step and request that yields.

use std::fmt::Write as _;

use super::super::{Admission, Yielded};
use super::Call;

impl Call {
    pub(super) fn print(&self, text: &mut String) {
        let _ = match self {
            Self::Admit { admission: Some(admission), .. } => {
                let Admission { id, seqs, n_cached, resumes, preempted, miss, .. } = admission;
                let why = miss.map_or_else(String::new, |miss| format!(" ({})", miss.name()));
                let verb = if resumes.is_some() { "resumes" } else { "starts" };
                write!(text, "request {id} {verb} in {seqs:?}").and_then(|()| match (n_cached, preempted.is_empty()) {
                    (0, true) => writeln!(text, "{why}"),
                    (_, true) => writeln!(text, " with {n_cached} tokens{why}"),
                    _ => writeln!(text, " with {n_cached} tokens{why}, taken from {preempted:?}"),
                })
            }
            Self::MakeRoom { yielded: Some(Yielded { seqs, .. }) } if !seqs.is_empty() => {
                writeln!(text, "sequences {seqs:?} yield: answers are longer than was expected")
            }
            Self::Step { rows } => {
                let runs = rows.iter().map(|run| match (run.n, run.n_outputs) {
                    (1, 1) => format!("{}@{}", run.seq, run.from),
                    (n, outputs) => format!("{}@{}+{n}/{outputs}", run.seq, run.from),
                });
                writeln!(text, "  {}", runs.collect::<Vec<_>>().join(" "))
            }
            _ => Ok(()),
        };
    }
}
