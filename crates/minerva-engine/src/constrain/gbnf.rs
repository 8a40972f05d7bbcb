//! From llama.cpp's GBNF to llguidance's Lark.
//!
//! GBNF is a grammar over characters; Lark is one over lexemes, and a lexeme takes all the characters that it can. So that
//! both mean the same, whatever does not recurse becomes one lexeme, a regular expression, as large as it can be: a grammar
//! without recursion is a single one. Where rules do recurse and two neighbours compete for the same characters, the first
//! takes them: what comes out always follows the GBNF, but not all that does can come out.
//! Start with [`to_lark`].

use std::collections::HashMap;
use std::fmt::Write as _;

use super::ConstraintError;
use super::compile::escape;

/// The most rules of a grammar.
const MAX_RULES: usize = 2_000;

/// The largest count of a repetition; llama.cpp's own limit.
const MAX_REPEAT: u32 = 2_000;

/// The Lark grammar for `gbnf`, whose groups are known not to nest too deeply.
///
/// # Errors
/// [`ConstraintError`] with line and column: it is no GBNF, or uses what only llama.cpp has (tokens by id).
pub(super) fn to_lark(gbnf: &str) -> Result<String, ConstraintError> {
    let parser = Parser { text: gbnf, at: 0, rules: Vec::new(), by_name: HashMap::new() };
    let rules = parser.grammar()?;
    Ok(Writer::new(&rules).write())
}

#[derive(Debug)]
struct Rule {
    /// `None` until its definition is read.
    body: Option<Expr>,
    /// Where it is first mentioned.
    at: usize,
}

#[derive(Debug, Clone)]
enum Expr {
    /// A regular expression for one character or a fixed text.
    Chars(String),
    Rule(usize),
    Sequence(Vec<Expr>),
    Either(Vec<Expr>),
    Repeat(Box<Expr>, u32, Option<u32>),
}

struct Parser<'a> {
    text: &'a str,
    /// In bytes.
    at: usize,
    rules: Vec<Rule>,
    by_name: HashMap<&'a str, usize>,
}

impl<'a> Parser<'a> {
    /// The rules, `root` first.
    fn grammar(mut self) -> Result<Vec<Rule>, ConstraintError> {
        self.rule_named("root", 0)?;
        self.skip(true);
        while !self.rest().is_empty() {
            let at = self.at;
            let name = self.name().ok_or_else(|| self.error(at, "a rule's name is missing"))?;
            let index = self.rule_named(name, at)?;
            self.skip(false);
            if !self.eat("::=") {
                return Err(self.error(self.at, "`::=` is missing"));
            }
            self.skip(true);
            let body = self.either(false)?;
            if self.rules[index].body.replace(body).is_some() {
                return Err(self.error(at, &format!("the rule `{name}` is defined twice")));
            }
            if !(self.rest().is_empty() || self.rest().starts_with(['\n', '\r'])) {
                return Err(self.error(self.at, "a rule has to end here"));
            }
            self.skip(true);
        }
        let undefined = self.by_name.iter().filter(|(_, index)| self.rules[**index].body.is_none());
        match undefined.min_by_key(|(_, index)| self.rules[**index].at) {
            Some((name, index)) => Err(self.error(self.rules[*index].at, &format!("the rule `{name}` is not defined"))),
            None => Ok(self.rules),
        }
    }

    fn rule_named(&mut self, name: &'a str, at: usize) -> Result<usize, ConstraintError> {
        if let Some(&index) = self.by_name.get(name) {
            return Ok(index);
        }
        if self.rules.len() >= MAX_RULES {
            return Err(self.error(at, &format!("there are more than {MAX_RULES} rules")));
        }
        self.rules.push(Rule { body: None, at });
        self.by_name.insert(name, self.rules.len() - 1);
        Ok(self.rules.len() - 1)
    }

    fn either(&mut self, is_nested: bool) -> Result<Expr, ConstraintError> {
        let mut options = vec![self.sequence(is_nested)?];
        loop {
            // A line may begin with `|`: nothing else can.
            let before = self.at;
            self.skip(true);
            if !self.eat("|") {
                self.at = if is_nested { self.at } else { before };
                break;
            }
            self.skip(true);
            options.push(self.sequence(is_nested)?);
        }
        Ok(if options.len() == 1 { options.swap_remove(0) } else { Expr::Either(options) })
    }

    fn sequence(&mut self, is_nested: bool) -> Result<Expr, ConstraintError> {
        let mut items: Vec<Expr> = Vec::new();
        loop {
            let at = self.at;
            let item = match self.rest().chars().next() {
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.at += 1;
                    Expr::Chars("(?s:.)".into())
                }
                Some('(') => {
                    self.at += 1;
                    self.skip(true);
                    let inside = self.either(true)?;
                    self.skip(true);
                    if !self.eat(")") {
                        return Err(self.error(at, "this group is not closed"));
                    }
                    inside
                }
                Some('<' | '!') => return Err(self.error(at, "tokens in a grammar are not supported")),
                Some('*' | '+' | '?' | '{') => {
                    let (least, most) = self.repeats()?;
                    let Some(item) = items.pop() else {
                        return Err(self.error(at, "there is nothing to repeat"));
                    };
                    if most == Some(0) { Expr::Sequence(Vec::new()) } else { Expr::Repeat(Box::new(item), least, most) }
                }
                _ => match self.name() {
                    Some(name) => Expr::Rule(self.rule_named(name, at)?),
                    None => break,
                },
            };
            items.push(item);
            self.skip(is_nested);
        }
        Ok(if items.len() == 1 { items.swap_remove(0) } else { Expr::Sequence(items) })
    }

    fn repeats(&mut self) -> Result<(u32, Option<u32>), ConstraintError> {
        let at = self.at;
        match self.next() {
            Some('*') => return Ok((0, None)),
            Some('+') => return Ok((1, None)),
            Some('?') => return Ok((0, Some(1))),
            _ => {}
        }
        self.skip(true);
        let least = self.count(at)?;
        self.skip(true);
        let most = if self.eat(",") {
            self.skip(true);
            if self.rest().starts_with('}') { None } else { Some(self.count(at)?) }
        } else {
            Some(least)
        };
        self.skip(true);
        if !self.eat("}") || most.is_some_and(|most| most < least) {
            return Err(self.error(at, "a repetition is `{m}`, `{m,}` or `{m,n}` with m up to n"));
        }
        Ok((least, most))
    }

    fn count(&mut self, at: usize) -> Result<u32, ConstraintError> {
        let digits: &str = self.rest().split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        let count = digits.parse::<u32>().ok().filter(|&count| count <= MAX_REPEAT);
        let count = count.ok_or_else(|| self.error(at, &format!("a count is a number up to {MAX_REPEAT}")))?;
        self.at += digits.len();
        Ok(count)
    }

    fn literal(&mut self) -> Result<Expr, ConstraintError> {
        let at = self.at;
        self.at += 1;
        let mut regex = String::new();
        while !self.eat("\"") {
            let c = self.char().ok_or_else(|| self.error(at, "this text is not closed, or has a wrong escape"))?;
            regex.push_str(&escape(c));
        }
        Ok(if regex.is_empty() { Expr::Sequence(Vec::new()) } else { Expr::Chars(regex) })
    }

    fn class(&mut self) -> Result<Expr, ConstraintError> {
        let at = self.at;
        let fail = |parser: &Self| parser.error(at, "this class is empty, not closed, or has a wrong escape or range");
        self.at += 1;
        let is_negated = self.eat("^");
        let mut ranges: Vec<(char, char)> = Vec::new();
        while !self.eat("]") {
            let first = self.char().ok_or_else(|| fail(self))?;
            // A `-` at the end stands for itself.
            let is_range = self.rest().starts_with('-') && !self.rest().starts_with("-]");
            let last = if is_range && self.eat("-") { self.char().ok_or_else(|| fail(self))? } else { first };
            if last < first {
                return Err(fail(self));
            }
            ranges.push((first, last));
        }
        if ranges.is_empty() {
            return if is_negated { Ok(Expr::Chars("(?s:.)".into())) } else { Err(fail(self)) };
        }
        let mut regex = String::from(if is_negated { "[^" } else { "[" });
        for (first, last) in ranges {
            let _ = write!(regex, "\\x{{{:x}}}-\\x{{{:x}}}", u32::from(first), u32::from(last));
        }
        Ok(Expr::Chars(regex + "]"))
    }

    /// A character of a text or class, with escapes.
    fn char(&mut self) -> Option<char> {
        match self.next()? {
            '\\' => match self.next()? {
                'x' => self.hex(2),
                'u' => self.hex(4),
                'U' => self.hex(8),
                't' => Some('\t'),
                'r' => Some('\r'),
                'n' => Some('\n'),
                c @ ('\\' | '"' | '[' | ']' | '-' | '^') => Some(c),
                _ => None,
            },
            c => Some(c),
        }
    }

    fn hex(&mut self, n_digits: usize) -> Option<char> {
        let digits =
            self.rest().get(..n_digits).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        self.at += n_digits;
        char::from_u32(u32::from_str_radix(digits, 16).ok()?)
    }

    fn name(&mut self) -> Option<&'a str> {
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let rest = self.rest();
        let name = &rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())];
        self.at += name.len();
        Some(name).filter(|name| !name.is_empty())
    }

    /// Skips blanks and comments, and line breaks if they mean nothing here.
    fn skip(&mut self, with_breaks: bool) {
        loop {
            let rest = self.rest();
            let is_blank = |c: char| c == ' ' || c == '\t' || (with_breaks && (c == '\n' || c == '\r'));
            self.at += rest.len() - rest.trim_start_matches(is_blank).len();
            if !self.rest().starts_with('#') {
                return;
            }
            self.at += self.rest().find(['\n', '\r']).unwrap_or(self.rest().len());
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest().chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, text: &str) -> bool {
        let is_there = self.rest().starts_with(text);
        self.at += if is_there { text.len() } else { 0 };
        is_there
    }

    fn error(&self, at: usize, problem: &str) -> ConstraintError {
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        ConstraintError::at(format!("line {line}, column {column}"), problem)
    }
}

/// Writes rules as Lark: `t7` for rule 7 where it recurses, `T7` where it does not and is a lexeme.
struct Writer<'a> {
    rules: &'a [Rule],
    is_regular: Vec<bool>,
    lark: String,
    /// Lexemes for parts of rules that recurse, after those of whole rules.
    n_lexemes: usize,
    lexemes: String,
}

impl<'a> Writer<'a> {
    fn new(rules: &'a [Rule]) -> Self {
        let is_regular = regular_rules(rules);
        Self { rules, is_regular, lark: String::new(), n_lexemes: rules.len(), lexemes: String::new() }
    }

    fn write(mut self) -> String {
        self.lark.push_str(if self.is_regular[0] { "start: T0\n" } else { "start: t0\n" });
        for (i, rule) in self.rules.iter().enumerate() {
            let Some(body) = &rule.body else { continue };
            let text = if self.is_regular[i] {
                format!("T{i}: {}\n", lexeme(body))
            } else {
                let body = self.rule(body);
                format!("t{i}: {body}\n")
            };
            self.lark.push_str(&text);
        }
        self.lark + &self.lexemes
    }

    fn regular(&self, expr: &Expr) -> bool {
        match expr {
            Expr::Chars(_) => true,
            Expr::Rule(i) => self.is_regular[*i],
            Expr::Sequence(items) | Expr::Either(items) => items.iter().all(|item| self.regular(item)),
            Expr::Repeat(item, ..) => self.regular(item),
        }
    }

    /// Part of a rule that recurses; parts that do not become lexemes.
    fn rule(&mut self, expr: &Expr) -> String {
        if self.regular(expr) {
            return self.new_lexeme(std::slice::from_ref(expr));
        }
        match expr {
            Expr::Chars(_) => String::new(), // is regular
            Expr::Rule(i) => format!("t{i}"),
            Expr::Sequence(items) => {
                let mut parts = Vec::new();
                let runs: Vec<&[Expr]> = items.chunk_by(|a, b| self.regular(a) && self.regular(b)).collect();
                for run in runs {
                    match run {
                        [item] => parts.push(self.rule(item)),
                        run => parts.push(self.new_lexeme(run)),
                    }
                }
                format!("({})", parts.join(" "))
            }
            Expr::Either(items) => {
                let parts: Vec<String> = items.iter().map(|item| self.rule(item)).collect();
                format!("({})", parts.join(" | "))
            }
            Expr::Repeat(item, least, most) => format!("({}){}", self.rule(item), count(*least, *most)),
        }
    }

    fn new_lexeme(&mut self, run: &[Expr]) -> String {
        if let [Expr::Rule(i)] = run {
            return format!("T{i}");
        }
        if run.iter().all(|item| matches!(item, Expr::Sequence(items) if items.is_empty())) {
            return "\"\"".into();
        }
        let name = format!("T{}", self.n_lexemes);
        self.n_lexemes += 1;
        let body: Vec<String> = run.iter().map(lexeme).collect();
        let _ = writeln!(self.lexemes, "{name}: {}", body.join(" "));
        name
    }
}

/// An expression over characters alone.
fn lexeme(expr: &Expr) -> String {
    match expr {
        Expr::Chars(regex) => format!("/{regex}/"),
        Expr::Rule(i) => format!("T{i}"),
        Expr::Sequence(items) if items.is_empty() => "/(?:)/".into(),
        Expr::Sequence(items) => format!("({})", items.iter().map(lexeme).collect::<Vec<_>>().join(" ")),
        Expr::Either(items) => format!("({})", items.iter().map(lexeme).collect::<Vec<_>>().join(" | ")),
        Expr::Repeat(item, least, most) => format!("({}){}", lexeme(item), count(*least, *most)),
    }
}

fn count(least: u32, most: Option<u32>) -> String {
    match (least, most) {
        (0, None) => "*".into(),
        (1, None) => "+".into(),
        (0, Some(1)) => "?".into(),
        (least, None) => format!("{{{least},}}"),
        (least, Some(most)) => format!("{{{least},{most}}}"),
    }
}

/// Which rules lead to no recursion: those that mention only such rules.
fn regular_rules(rules: &[Rule]) -> Vec<bool> {
    let mut mentioned_by = vec![Vec::new(); rules.len()];
    let mut n_open = vec![0_usize; rules.len()];
    for (i, rule) in rules.iter().enumerate() {
        let mut mentions = Vec::new();
        if let Some(body) = &rule.body {
            collect_mentions(body, &mut mentions);
        }
        n_open[i] = mentions.len();
        for mention in mentions {
            mentioned_by[mention].push(i);
        }
    }
    let mut ready: Vec<usize> = (0..rules.len()).filter(|&i| n_open[i] == 0).collect();
    let mut is_regular = vec![false; rules.len()];
    while let Some(i) = ready.pop() {
        is_regular[i] = true;
        for &by in &mentioned_by[i] {
            n_open[by] -= 1;
            if n_open[by] == 0 {
                ready.push(by);
            }
        }
    }
    is_regular
}

fn collect_mentions(expr: &Expr, mentions: &mut Vec<usize>) {
    match expr {
        Expr::Chars(_) => {}
        Expr::Rule(i) => mentions.push(*i),
        Expr::Sequence(items) | Expr::Either(items) => {
            for item in items {
                collect_mentions(item, mentions);
            }
        }
        Expr::Repeat(item, ..) => collect_mentions(item, mentions),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::backend::Tokenizer;
    use crate::constrain::Constraint;
    use crate::constrain::compile::compile;
    use crate::constrain::vocabulary;
    use crate::sim::{self, END, SimConfig};

    /// A grammar as the test writes it, with a recogniser of its own.
    #[derive(Debug, Clone)]
    enum Piece {
        Text(&'static str),
        Class(&'static str, fn(char) -> bool),
        Any,
        /// A later rule, or any rule within brackets that need not come.
        Later(usize),
        Bracketed(usize),
        All(Vec<Piece>),
        One(Vec<Piece>),
        Repeat(Box<Piece>, u32, Option<u32>),
    }

    const N_RULES: usize = 4;

    fn any_piece() -> impl Strategy<Value = Piece> {
        let leaf = prop_oneof![
            prop::sample::select(vec!["a", "ab", "\"", "\\", "\n", "é🦀", "", "/x/", "::="]).prop_map(Piece::Text),
            Just(Piece::Class("[a-c]", |c| ('a'..='c').contains(&c))),
            Just(Piece::Class("[^a\\n]", |c| c != 'a' && c != '\n')),
            Just(Piece::Class("[\\x30-\\x39é\\]-]", |c| c.is_ascii_digit() || "é]-".contains(c))),
            Just(Piece::Any),
            (1..N_RULES).prop_map(Piece::Later),
            (0..N_RULES).prop_map(Piece::Bracketed),
        ];
        leaf.prop_recursive(3, 12, 3, |inside| {
            prop_oneof![
                prop::collection::vec(inside.clone(), 1..4).prop_map(Piece::All),
                prop::collection::vec(inside.clone(), 1..4).prop_map(Piece::One),
                (inside, 0..3_u32, prop::option::of(0..3_u32)).prop_map(|(piece, least, more)| Piece::Repeat(
                    piece.into(),
                    least,
                    more.map(|more| least + more)
                )),
            ]
        })
    }

    impl Piece {
        /// In GBNF, within rule `rule`.
        fn write(&self, rule: usize) -> String {
            let joined = |pieces: &[Self], with: &str| {
                pieces.iter().map(|piece| piece.write(rule)).collect::<Vec<_>>().join(with)
            };
            match self {
                Self::Text(text) => {
                    let text =
                        text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").replace('é', "\\u00e9");
                    format!("\"{text}\"")
                }
                Self::Class(class, _) => (*class).to_owned(),
                Self::Any => ".".into(),
                Self::Later(later) if *later > rule => format!("rule-{later}"),
                Self::Later(_) => "\"\"".into(),
                Self::Bracketed(other) => format!("(\"<\" rule-{other} \">\")?"),
                Self::All(pieces) => format!("({}) # a comment\n", joined(pieces, "  ")),
                Self::One(pieces) => format!("( {} )", joined(pieces, "\n\t| ")),
                Self::Repeat(piece, 0, None) => format!("({})*", piece.write(rule)),
                Self::Repeat(piece, 1, None) => format!("({})+", piece.write(rule)),
                Self::Repeat(piece, 0, Some(1)) => format!("({})?", piece.write(rule)),
                Self::Repeat(piece, least, None) => format!("({}){{{least},}}", piece.write(rule)),
                Self::Repeat(piece, least, Some(most)) => format!("({}){{ {least} , {most} }}", piece.write(rule)),
            }
        }

        /// Where a match that begins at `from` can end.
        fn ends(&self, text: &mut Text<'_>, rule: usize, from: usize) -> BTreeSet<usize> {
            let key = (std::ptr::from_ref(self), from);
            if let Some(known) = text.known.get(&key) {
                return known.clone();
            }
            let ends = self.find_ends(text, rule, from);
            text.known.insert(key, ends.clone());
            ends
        }

        fn find_ends(&self, text: &mut Text<'_>, rule: usize, from: usize) -> BTreeSet<usize> {
            let one = |matches: bool| if matches { BTreeSet::from([from + 1]) } else { BTreeSet::new() };
            match self {
                Self::Text(wanted) => {
                    let wanted: Vec<char> = wanted.chars().collect();
                    if text.chars[from..].starts_with(&wanted) {
                        BTreeSet::from([from + wanted.len()])
                    } else {
                        BTreeSet::new()
                    }
                }
                Self::Class(_, holds) => one(text.chars.get(from).is_some_and(|c| holds(*c))),
                Self::Any => one(from < text.chars.len()),
                Self::Later(later) if *later > rule => text.rules[*later].ends(text, *later, from),
                Self::Later(_) => BTreeSet::from([from]),
                Self::Bracketed(other) => {
                    let mut ends = BTreeSet::from([from]);
                    if text.chars.get(from) == Some(&'<') {
                        let inside = text.rules[*other].ends(text, *other, from + 1);
                        ends.extend(
                            inside.into_iter().filter(|end| text.chars.get(*end) == Some(&'>')).map(|end| end + 1),
                        );
                    }
                    ends
                }
                Self::All(pieces) => {
                    pieces.iter().fold(BTreeSet::from([from]), |ends, piece| piece.ends_after(text, rule, ends))
                }
                Self::One(pieces) => pieces.iter().flat_map(|piece| piece.ends(text, rule, from)).collect(),
                Self::Repeat(piece, least, most) => {
                    let mut ends = BTreeSet::from([from]);
                    let mut found = if *least == 0 { ends.clone() } else { BTreeSet::new() };
                    for n in 1..=most.unwrap_or(text.chars.len() as u32 + least) {
                        ends = piece.ends_after(text, rule, ends);
                        if n >= *least {
                            found.extend(&ends);
                        }
                    }
                    found
                }
            }
        }

        /// Where a match that begins at one of `starts` can end.
        fn ends_after(&self, text: &mut Text<'_>, rule: usize, starts: BTreeSet<usize>) -> BTreeSet<usize> {
            starts.into_iter().flat_map(|start| self.ends(text, rule, start)).collect()
        }
    }

    /// What is recognised, and what is known of it: without that, repetitions within repetitions take for ever.
    struct Text<'a> {
        rules: &'a [Piece],
        chars: Vec<char>,
        known: HashMap<(*const Piece, usize), BTreeSet<usize>>,
    }

    thread_local! {
        static FACTORY: llguidance::ParserFactory = {
            let tokenizer: Arc<dyn Tokenizer> = sim::load(SimConfig::default()).0.tokenizer;
            vocabulary::factory(&tokenizer, END as usize + 3).expect("a vocabulary of bytes")
        };
    }

    /// A random answer, if it ends within some tokens. Bytes of one character are likely to be finished.
    fn answer(gbnf: &str, mut seed: u64) -> Option<String> {
        let compiled = FACTORY.with(|factory| compile(factory, &Constraint::Gbnf(gbnf.to_owned())));
        let mut grammar = match compiled {
            Ok(compiled) => compiled.grammar,
            Err(error) if error.problem.contains("empty answer") => return None,
            Err(error) => panic!("{error}\n{gbnf}"),
        };
        grammar.reset().expect("goes back to the beginning");
        let mut bytes = Vec::new();
        while !grammar.is_stopped() && bytes.len() < 80 {
            let mask = grammar.compute_mask().unwrap_or_else(|error| panic!("{error}\n{gbnf}\n{bytes:?}"));
            let likely = |token: &&u32| {
                token.is_multiple_of(256) || b"<>a\"\\/0:-".iter().any(|byte| **token == u32::from(*byte))
            };
            let all = mask.to_list();
            let some: Vec<u32> = all.iter().filter(likely).copied().collect();
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let from = if some.is_empty() || (seed >> 60) < 4 { &all } else { &some };
            let token = from[(seed >> 33) as usize % from.len()];
            if token == END.cast_unsigned() {
                return Some(String::from_utf8(bytes).expect("whole characters"));
            }
            bytes.push(token as u8);
            grammar.consume_token(token).expect("allowed");
        }
        grammar.is_stopped().then(|| String::from_utf8(bytes).expect("whole characters"))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_answer_follows_the_gbnf(pieces in prop::collection::vec(any_piece(), N_RULES), seed in any::<u64>()) {
            let rule = |(i, piece): (usize, &Piece)| format!("rule-{i} ::= {}\n", piece.write(i));
            let gbnf = format!("root ::= rule-0\n{}", pieces.iter().enumerate().map(rule).collect::<String>());
            if let Some(text) = answer(&gbnf, seed) {
                let chars: Vec<char> = text.chars().collect();
                let n_chars = chars.len();
                let ends = pieces[0].ends(&mut Text { rules: &pieces, chars, known: HashMap::new() }, 0, 0);
                prop_assert!(ends.contains(&n_chars), "{:?} does not follow\n{}", text, gbnf);
            }
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "([a-b:=|*+?{}()\\[\\]^\"\\\\<>0-9,.# \n-]|::=|\\\\x|root|é){0,60}") {
            let _ = to_lark(&text);
            let _ = to_lark(&format!("root ::= {text}"));
        }
    }

    #[test]
    fn what_does_not_recurse_is_one_lexeme() {
        let lark =
            to_lark("root ::= ws \"a\" [0-9]+ other?\nws ::= \" \"*\nother ::= (\"b\" | ws){2,3}").expect("valid");
        assert_eq!(
            lark,
            "start: T0\nT0: (T1 /a/ (/[\\x{30}-\\x{39}]/)+ (T2)?)\nT1: (/\\x20/)*\nT2: ((/b/ | T1)){2,3}\n"
        );
        let lark = to_lark("root ::= \"(\" \" \"? root? \")\"").expect("valid");
        assert_eq!(lark, "start: t0\nt0: (T1 (t0)? T2)\nT1: /\\x28/ (/\\x20/)?\nT2: /\\x29/\n");
    }
}
