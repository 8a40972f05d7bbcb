//! The system's package managers: the line to type for a missing tool, and typing it under `--system`.

use anyhow::bail;

use crate::workspace;

/// Something that a package manager can bring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Package {
    CxxCompiler,
    Cmake,
    Ninja,
    Libclang,
    Ccache,
    Python,
    PythonVenv,
}

/// A package manager: the program to look for, and the start of its install line.
struct Manager {
    program: &'static str,
    install: &'static [&'static str],
    needs_root: bool,
}

const MANAGERS: [Manager; 5] = [
    Manager { program: "apt-get", install: &["apt-get", "install", "-y"], needs_root: true },
    Manager { program: "dnf", install: &["dnf", "install", "-y"], needs_root: true },
    Manager { program: "pacman", install: &["pacman", "-S", "--noconfirm", "--needed"], needs_root: true },
    Manager { program: "brew", install: &["brew", "install"], needs_root: false },
    Manager { program: "winget", install: &["winget", "install", "--exact"], needs_root: false },
];

impl Package {
    /// The package's name for each of [`MANAGERS`], in that order. Several names are separated by spaces.
    fn names(self) -> [&'static str; 5] {
        match self {
            Self::CxxCompiler => ["g++ libc6-dev", "gcc-c++", "gcc", "llvm", "Microsoft.VisualStudio.2022.BuildTools"],
            Self::Cmake => ["cmake", "cmake", "cmake", "cmake", "Kitware.CMake"],
            Self::Ninja => ["ninja-build", "ninja-build", "ninja", "ninja", "Ninja-build.Ninja"],
            Self::Libclang => ["libclang-dev", "clang-devel", "clang", "llvm", "LLVM.LLVM"],
            Self::Ccache => ["ccache", "ccache", "ccache", "ccache", "Ccache.Ccache"],
            Self::Python => ["python3 python3-venv", "python3", "python", "python", "Python.Python.3.12"],
            Self::PythonVenv => ["python3-venv", "python3", "python", "python", "Python.Python.3.12"],
        }
    }
}

/// The install line of `manager` for `packages`, as words.
fn words(manager: usize, packages: &[Package]) -> Vec<&'static str> {
    let names = packages.iter().flat_map(|package| package.names()[manager].split(' '));
    MANAGERS[manager].install.iter().copied().chain(names).collect()
}

/// What to type for `package`: this system's line when its manager is known, else all of them.
pub(super) fn advice(package: Package) -> String {
    let line = |manager: usize| {
        let sudo = if MANAGERS[manager].needs_root { "sudo " } else { "" };
        format!("  {sudo}{}", words(manager, &[package]).join(" "))
    };
    let here = MANAGERS.iter().position(|manager| workspace::which(manager.program).is_some());
    match here {
        Some(manager) => line(manager),
        None => (0..MANAGERS.len()).map(line).collect::<Vec<_>>().join("\n"),
    }
}

/// Installs `packages` with the system's manager, through `sudo` where root is needed and there is one.
pub(super) fn install(packages: &[Package]) -> anyhow::Result<()> {
    let Some(manager) = MANAGERS.iter().position(|m| workspace::which(m.program).is_some()) else {
        bail!("`--system` knows apt-get, dnf, pacman, brew and winget, and none is on PATH");
    };
    let mut words = words(manager, packages);
    if MANAGERS[manager].needs_root && !is_root() && workspace::which("sudo").is_some() {
        words.insert(0, "sudo");
    }
    println!("  running       {}", words.join(" "));
    workspace::check(workspace::command(words[0]).args(&words[1..]))
}

/// Whether we are root, asked of `id` because std does not say.
fn is_root() -> bool {
    workspace::capture(workspace::command("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_manager_has_a_line_for_several_packages_at_once() {
        let wanted = [Package::Cmake, Package::Ninja, Package::Libclang];
        assert_eq!(words(0, &wanted).join(" "), "apt-get install -y cmake ninja-build libclang-dev");
        assert_eq!(words(2, &wanted).join(" "), "pacman -S --noconfirm --needed cmake ninja clang");
        assert_eq!(words(0, &[Package::CxxCompiler]).join(" "), "apt-get install -y g++ libc6-dev");
    }
}
