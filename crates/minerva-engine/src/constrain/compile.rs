//! From a constraint's text to a grammar that is ready to run, within limits.

use llguidance::api::{GrammarInit, GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::{Logger, ParserFactory, regex_to_lark};
use serde_json::{Value as Json, json};

use super::matcher::{Next, compute_next};
use super::{Constraint, ConstraintError, expansion, gbnf, schema};

/// The longest text of a constraint, in bytes; a schema is counted as compact JSON.
pub(super) const MAX_SOURCE_BYTES: usize = 1 << 20;

/// The deepest nesting of parentheses in a grammar or regular expression: parsers recurse on them.
const MAX_GROUPS: usize = 200;

/// The most texts of a choice.
const MAX_CHOICES: usize = 10_000;

/// What may stand between two tokens of JSON: a blank, or a line break and its indentation. llguidance's own default has no
/// bound, and a model that likes blanks writes them until `max_tokens`.
const WHITESPACE: &str = r" |\r?\n( {0,32}|\t{0,16})";

/// A grammar at its beginning, and what it can begin with.
pub(super) struct Compiled {
    pub(super) grammar: llguidance::Matcher,
    pub(super) next: Next,
}

/// Compiles `constraint` for the vocabulary of `factory`. Bounded by the limits of this module, and meant for a thread with a
/// large stack.
///
/// # Errors
/// [`ConstraintError`]: it breaks a limit, is wrong, asks for what is not supported, or allows nothing.
pub(super) fn compile(factory: &ParserFactory, constraint: &Constraint) -> Result<Compiled, ConstraintError> {
    match constraint {
        Constraint::JsonObject => build(factory, json_grammar(json!({"type": "object"}))),
        Constraint::JsonSchema(schema) => json_schema(factory, schema),
        Constraint::Regex(regex) => {
            check_source(regex, "the regular expression")?;
            build(factory, regex_grammar(&regex_to_lark(regex, "dws")))
        }
        Constraint::Lark(lark) => {
            check_source(lark, "the grammar")?;
            expansion::check(lark)?;
            build(factory, GrammarWithLexer::from_lark(lark.clone()))
        }
        Constraint::Gbnf(gbnf) => {
            check_source(gbnf, "the grammar")?;
            let lark = gbnf::to_lark(gbnf)?;
            expansion::check(&lark).map_err(|error| ConstraintError::whole(error.problem))?;
            build(factory, GrammarWithLexer::from_lark(lark))
        }
        Constraint::Choice(texts) => build(factory, regex_grammar(&choice_regex(texts)?)),
    }
}

fn json_schema(factory: &ParserFactory, schema: &Json) -> Result<Compiled, ConstraintError> {
    let schema = schema::check(schema)?;
    let compiled = build(factory, json_grammar(schema.clone()));
    // llguidance says what is wrong, but not where: the deepest part that fails by itself is it.
    compiled.map_err(|error| match schema::locate(&schema, |part| build(factory, json_grammar(part)).err()) {
        Some((location, inner)) => ConstraintError::at(location, inner.problem),
        None => ConstraintError::at("", error.problem),
    })
}

fn json_grammar(mut schema: Json) -> GrammarWithLexer {
    // `true` and `{}` are the same schema, and options can only stand in an object.
    if schema == Json::Bool(true) {
        schema = json!({});
    }
    if let Json::Object(root) = &mut schema {
        root.insert("x-guidance".into(), json!({"whitespace_flexible": true, "whitespace_pattern": WHITESPACE}));
    }
    GrammarWithLexer::from_json_schema(schema)
}

fn regex_grammar(lark_regex: &str) -> GrammarWithLexer {
    GrammarWithLexer::from_lark(format!("start: /{lark_regex}/"))
}

fn choice_regex(texts: &[String]) -> Result<String, ConstraintError> {
    let n_bytes = texts.iter().map(String::len).sum::<usize>();
    if texts.is_empty() || texts.len() > MAX_CHOICES || n_bytes > MAX_SOURCE_BYTES {
        let problem = format!(
            "a choice has 1 to {MAX_CHOICES} texts of {MAX_SOURCE_BYTES} bytes together, got {} of {n_bytes}",
            texts.len()
        );
        return Err(ConstraintError::whole(problem));
    }
    if let Some(i) = texts.iter().position(String::is_empty) {
        return Err(ConstraintError::at(format!("/{i}"), "a text of a choice cannot be empty"));
    }
    let escaped = |text: &String| text.chars().map(escape).collect::<String>();
    Ok(texts.iter().map(escaped).collect::<Vec<_>>().join("|"))
}

/// A character as itself in any place of a regular expression.
pub(super) fn escape(c: char) -> String {
    if c.is_ascii_alphanumeric() || !c.is_ascii() { c.to_string() } else { format!("\\x{:02x}", u32::from(c)) }
}

/// Refuses what is too long or nested too deeply.
fn check_source(source: &str, what: &str) -> Result<(), ConstraintError> {
    if source.len() > MAX_SOURCE_BYTES {
        let problem = format!("{what} has {} bytes, the limit is {MAX_SOURCE_BYTES}", source.len());
        return Err(ConstraintError::whole(problem));
    }
    match deepest_group(source) {
        deepest if deepest > MAX_GROUPS => {
            let problem = format!("{what} nests {deepest} groups, the limit is {MAX_GROUPS}");
            Err(ConstraintError::whole(problem))
        }
        _ => Ok(()),
    }
}

/// Refuses a pattern of a schema that is nested too deeply.
pub(super) fn check_groups(pattern: &str, at: &str) -> Result<(), ConstraintError> {
    match deepest_group(pattern) {
        deepest if deepest > MAX_GROUPS => {
            let problem = format!("the pattern nests {deepest} groups, the limit is {MAX_GROUPS}");
            Err(ConstraintError::at(at, problem))
        }
        _ => Ok(()),
    }
}

/// At least as deep as a parser sees it: parentheses in strings and classes count too.
fn deepest_group(source: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in source.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

fn limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 1_000_000, // about 20 ms
        max_grammar_size: 200_000,
        max_lexer_states: 50_000, // 1 to 2 kB each
        verbose_errors: false,    // what they add is the request's text
        ..ParserLimits::default()
    }
}

fn build(factory: &ParserFactory, grammar: GrammarWithLexer) -> Result<Compiled, ConstraintError> {
    let init = GrammarInit::Serialized(TopLevelGrammar::from_grammar(grammar));
    let capabilities = llguidance::toktrie::InferenceCapabilities::default();
    let parser = factory
        .create_parser_from_init_ext(init, Logger::new(0, 0), capabilities, limits())
        .map_err(|error| ConstraintError::whole(message(&error)))?;
    let mut grammar = llguidance::Matcher::new(Ok(parser));
    let next = compute_next(&mut grammar)
        .map_err(|problem| ConstraintError::whole(format!("no answer can follow it: {problem}")))?;
    if next.is_nothing() {
        return Err(ConstraintError::whole("it allows nothing but an empty answer"));
    }
    Ok(Compiled { grammar, next })
}

/// What llguidance says, without a panic's place in its source.
fn message(error: &impl std::fmt::Debug) -> String {
    let text = format!("{error:?}");
    let text = text.split("<backtrace>").next().unwrap_or_default();
    let text = text.split("\n\nStack backtrace").next().unwrap_or_default();
    let mut lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.truncate(6);
    let mut text = lines.join(" ");
    if text.len() > 500 {
        text.truncate(text.floor_char_boundary(500));
        text.push_str(" ...");
    }
    text
}
