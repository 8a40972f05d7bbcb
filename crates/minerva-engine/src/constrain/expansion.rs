//! How large the lexemes of a Lark grammar become when the terminals in them are written out: before the compiler tries.
//!
//! `A: B B`, `B: C C` and so on doubles with each line, and a compiler that writes it out is busy for hours.

use std::collections::HashMap;

use super::ConstraintError;

/// The most terminals, written out, in one terminal. Far beyond any grammar that people write.
const MAX_TERMINALS: u64 = 100_000;

/// Refuses a grammar whose terminals expand too far.
///
/// It does not parse: every word in capitals is taken for a terminal, and belongs to the definition that began last.
pub(super) fn check(lark: &str) -> Result<(), ConstraintError> {
    let mut terminals: HashMap<&str, Terminal<'_>> = HashMap::new();
    let mut current = None;
    for (number, line) in lark.lines().enumerate() {
        if let Some(name) = defined(line) {
            current = Some(name);
            terminals.entry(name).or_insert_with(|| Terminal { line: number + 1, ..Terminal::default() });
        } else if line.starts_with(|c: char| c.is_ascii_lowercase() || "!?_%".contains(c)) {
            current = None; // a rule, or a directive
        }
        if let Some(terminal) = current.and_then(|name| terminals.get_mut(name)) {
            let body = line.split_once(':').filter(|_| defined(line).is_some()).map_or(line, |(_, body)| body);
            terminal.mentions.extend(body.split(|c| !is_part(c)).filter(|word| is_name(word)));
        }
    }
    match sizes(&terminals).into_iter().find(|(_, size)| *size > MAX_TERMINALS) {
        Some((name, _)) => {
            let line = terminals.get(name).map_or(0, |terminal| terminal.line);
            let problem = format!("`{name}` becomes more than {MAX_TERMINALS} terminals when it is written out");
            Err(ConstraintError::at(format!("line {line}"), problem))
        }
        None => Ok(()),
    }
}

#[derive(Debug, Default)]
struct Terminal<'a> {
    line: usize,
    mentions: Vec<&'a str>,
}

/// How many terminals each one becomes; those that recurse are left to the compiler, which refuses them.
fn sizes<'a>(terminals: &HashMap<&'a str, Terminal<'a>>) -> HashMap<&'a str, u64> {
    let mut mentioned_by: HashMap<&str, Vec<&'a str>> = HashMap::new();
    let mut n_open: HashMap<&'a str, usize> = HashMap::new();
    for (&name, terminal) in terminals {
        let known = terminal.mentions.iter().filter(|mention| terminals.contains_key(*mention));
        let mut n = 0;
        for &mention in known {
            mentioned_by.entry(mention).or_default().push(name);
            n += 1;
        }
        n_open.insert(name, n);
    }
    let mut sizes: HashMap<&'a str, u64> = HashMap::new();
    let mut ready: Vec<&'a str> = n_open.iter().filter(|(_, n)| **n == 0).map(|(name, _)| *name).collect();
    while let Some(name) = ready.pop() {
        let size = *sizes.entry(name).or_insert(1);
        for by in mentioned_by.get(name).into_iter().flatten() {
            let total = sizes.entry(by).or_insert(1);
            *total = total.saturating_add(size);
            if let Some(n) = n_open.get_mut(by) {
                *n -= 1;
                if *n == 0 {
                    ready.push(by);
                }
            }
        }
    }
    sizes
}

/// The terminal that a line defines.
fn defined(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let name = &line[..line.find(|c| !is_part(c)).unwrap_or(line.len())];
    (is_name(name) && line[name.len()..].contains(':')).then_some(name)
}

fn is_name(word: &str) -> bool {
    word.trim_start_matches('_').starts_with(|c: char| c.is_ascii_uppercase())
}

fn is_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubling(n: u32) -> String {
        let line = |i: u32| format!("T{i}: T{next}\n | \"x\" T{next}\n", next = i + 1);
        format!("start: T0\n{}T{n}: \"a\"\n", (0..n).map(line).collect::<Vec<_>>().concat())
    }

    #[test]
    fn terminals_that_double_are_refused_and_long_chains_are_not() {
        assert_eq!(check(&doubling(10)), Ok(()));
        for n in [40, 2_000] {
            let error = check(&doubling(n)).expect_err("too large");
            assert!(error.problem.contains("written out"), "{error}");
        }
        let chain: Vec<String> = (0..5_000).map(|i| format!("T{i}: T{}", i + 1)).collect();
        assert_eq!(check(&chain.join("\n")), Ok(()));
        assert_eq!(
            check("A: B\nB: A A\nnot a grammar : \u{fffd}é: :"),
            Ok(()),
            "recursion is the compiler's to refuse"
        );
    }
}
