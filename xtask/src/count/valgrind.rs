//! Valgrind, wherever it is.

use std::path::PathBuf;

use anyhow::Context as _;

use crate::workspace;

pub(super) struct Valgrind {
    program: PathBuf,
    /// Where its tools lie, if not where it was built for.
    lib: Option<PathBuf>,
}

/// The system's valgrind, or the distribution's package unpacked under target/, which needs no root.
pub(super) fn valgrind() -> Option<Valgrind> {
    if let Some(program) = workspace::which("valgrind") {
        return Some(Valgrind { program, lib: None });
    }
    let folder = workspace::tools().join("valgrind");
    if !folder.join("usr").exists() {
        std::fs::create_dir_all(&folder).ok()?;
        workspace::check(workspace::command("apt-get").args(["download", "valgrind"]).current_dir(&folder)).ok()?;
        let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
        let package = std::fs::read_dir(&folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).find(is_package)?;
        workspace::check(workspace::command("dpkg-deb").arg("--extract").arg(package).arg(&folder)).ok()?;
    }
    let usr = folder.join("usr");
    let lib = ["libexec/valgrind", "lib/x86_64-linux-gnu/valgrind", "lib/valgrind"].map(|lib| usr.join(lib));
    let lib = lib.into_iter().find(|lib| lib.exists())?;
    // `bin/valgrind` is a script with fixed paths; `valgrind.bin` behind it is the program.
    let program = ["bin/valgrind.bin", "bin/valgrind"].map(|program| usr.join(program));
    Some(Valgrind { program: program.into_iter().find(|program| program.exists())?, lib: Some(lib) })
}

impl Valgrind {
    /// The instructions of `program` for `n` repetitions with a setting.
    pub(super) fn count(&self, program: &PathBuf, setting: &str, n: u64) -> anyhow::Result<u64> {
        let mut command = workspace::command(&self.program);
        command
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(program)
            .args([setting, &n.to_string()]);
        if let Some(lib) = &self.lib {
            command.env("VALGRIND_LIB", lib);
        }
        let output = command.output().with_context(|| format!("cannot run {}", self.program.display()))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let collected = collected(&text).filter(|_| output.status.success());
        collected.with_context(|| format!("callgrind counted nothing for `{setting}`: {text}"))
    }
}

/// The number in callgrind's line `==PID== Collected : N`.
fn collected(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callgrinds_total_is_found() {
        assert_eq!(collected("==7== Events    : Ir\n==7== Collected : 83190\n==7==\n"), Some(83_190));
        assert_eq!(collected("==7== valgrind: failed"), None);
    }
}
