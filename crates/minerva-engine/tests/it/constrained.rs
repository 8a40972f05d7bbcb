//! Constraints of every kind over the simulator, whose vocabulary is the bytes: what comes out, how it ends, what is refused,
//! and that nobody else waits.

use std::time::{Duration, Instant};

use minerva_engine::{
    Constraint, Engine, Event, FinishReason, Request, RequestError, SamplingParams, SimConfig, TokenId,
};
use serde_json::{Value as Json, json};

use crate::support::{Answer, ask, read, submit};

fn sim() -> SimConfig {
    SimConfig { spread: 3.0, ..SimConfig::default() }
}

fn constrained(constraint: Constraint, seed: u64) -> Request {
    let sampling = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: Some(seed),
        logit_bias: [b'"', b'}', b']'].map(|byte| (TokenId::from(byte), 5.0)).to_vec(),
        ..SamplingParams::default()
    };
    Request { constraint: Some(constraint), sampling, ..Request::text("x") }.max_tokens(500)
}

fn refusal(engine: &Engine, constraint: &Constraint) -> (Option<String>, String) {
    match engine.generate_blocking(constrained(constraint.clone(), 0)) {
        Err(RequestError::Constraint(error)) => (error.location, error.problem),
        other => panic!("not refused: {constraint:?} {other:?}"),
    }
}

fn object() -> Json {
    json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
        "required": ["name", "n"], "additionalProperties": false})
}

/// Texts of answers that ended by themselves.
fn texts(engine: &Engine, constraint: &Constraint, seeds: u64) -> Vec<String> {
    let streams: Vec<_> = (0..seeds).map(|seed| submit(engine, constrained(constraint.clone(), seed))).collect();
    let ended = |answer: &Answer| answer.choices[0].reason() == FinishReason::Stop;
    streams.into_iter().map(read).filter(ended).map(|answer| answer.text().to_owned()).collect()
}

#[test]
fn a_regular_expression_matches_the_whole_answer() {
    let engine = Engine::simulate(sim());
    let texts = texts(&engine, &Constraint::Regex(r"\d{3}-[a-c]+/(x|yy)".into()), 20);
    assert!(texts.len() > 15);
    for text in texts {
        let (number, rest) = text.split_once('-').expect("a dash");
        let (letters, end) = rest.split_once('/').expect("a slash");
        assert!(number.len() == 3 && number.bytes().all(|byte| byte.is_ascii_digit()), "{text}");
        assert!(!letters.is_empty() && letters.bytes().all(|byte| b"abc".contains(&byte)), "{text}");
        assert!(["x", "yy"].contains(&end), "{text}");
    }
}

#[test]
fn a_choice_is_one_of_its_texts_even_where_one_begins_with_another() {
    let engine = Engine::simulate(sim());
    let choice = ["yes", "yes!", "no (really)", "süß\n"].map(str::to_owned).to_vec();
    let mut texts = texts(&engine, &Constraint::Choice(choice.clone()), 60);
    assert_eq!(texts.len(), 60);
    texts.sort();
    texts.dedup();
    let mut expected = choice;
    expected.sort();
    assert_eq!(texts, expected);
}

#[test]
fn an_answer_in_gbnf_or_lark_follows_its_grammar() {
    let engine = Engine::simulate(sim());
    let gbnf = r#"
        # sums in brackets
        root  ::= "[" sum "]"
        sum   ::= term (("+" | "-") term){0,2}
        term  ::= number | "(" sum ")"
        number ::= [1-9] [0-9]{0,2}
    "#;
    let lark = "start: \"[\" sum \"]\"\nsum: term ((\"+\" | \"-\") term){0,2}\nterm: NUMBER | \"(\" sum \")\"\n\
        NUMBER: /[1-9][0-9]{0,2}/";
    for constraint in [Constraint::Gbnf(gbnf.into()), Constraint::Lark(lark.into())] {
        let texts = texts(&engine, &constraint, 30);
        assert!(texts.len() > 20, "{texts:?}");
        for text in texts {
            let inside = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).expect("brackets");
            let mut depth = 0;
            for c in inside.chars() {
                depth += i32::from(c == '(') - i32::from(c == ')');
                assert!(depth >= 0 && "0123456789+-()".contains(c), "{text}");
            }
            assert!(depth == 0 && !inside.contains("()") && !inside.contains("(+") && !inside.ends_with('+'), "{text}");
        }
    }
}

#[test]
fn a_json_object_ends_with_its_brace_although_the_model_would_go_on() {
    let engine = Engine::simulate(sim());
    let mut n_ended = 0;
    for seed in 0..20 {
        for ignore_eos in [false, true] {
            let request = Request { ignore_eos, ..constrained(Constraint::JsonSchema(object()), seed) };
            let answer = ask(&engine, request);
            let choice = &answer.choices[0];
            if choice.reason() == FinishReason::Length {
                continue;
            }
            n_ended += 1;
            let value: Json = serde_json::from_str(&choice.text).expect("JSON");
            assert!(choice.text.ends_with('}') && value["n"].is_number() && value["name"].is_string());
            assert_eq!(answer.summary().completion_tokens as usize, choice.text.len(), "no token for an end");
        }
    }
    assert!(n_ended > 30, "{n_ended}");
    let answer = ask(&engine, constrained(Constraint::JsonObject, 3));
    assert!(answer.text().starts_with('{'));
}

#[test]
fn a_model_that_likes_blanks_still_gets_to_the_end() {
    let engine = Engine::simulate(sim());
    for constraint in [Constraint::JsonObject, Constraint::JsonSchema(object())] {
        let mut request = constrained(constraint, 1);
        let likes =
            [(b' ', 50.0), (b'\n', 60.0), (b'\t', 40.0), (b'\r', 30.0), (b'}', 20.0), (b'"', 55.0), (b'0', 25.0)];
        request.sampling.logit_bias = likes.map(|(byte, bias)| (TokenId::from(byte), bias)).to_vec();
        let answer = ask(&engine, request.greedy_with_bias());
        let text = answer.text();
        assert_eq!(answer.choices[0].reason(), FinishReason::Stop, "{text:?}");
        assert!(text.ends_with('}') && text.len() < 400, "{text:?}");
        serde_json::from_str::<Json>(text).expect("JSON");
    }
}

trait GreedyWithBias {
    fn greedy_with_bias(self) -> Self;
}

impl GreedyWithBias for Request {
    /// Greedy, but with the bias that is set.
    fn greedy_with_bias(mut self) -> Self {
        self.sampling.temperature = 0.0;
        self
    }
}

#[test]
fn max_tokens_stop_texts_logprobs_seeds_and_choices_work_under_a_constraint() {
    let engine = Engine::simulate(sim());
    let schema = Constraint::JsonSchema(object());
    let whole = ask(&engine, constrained(schema.clone(), 5));
    assert_eq!(ask(&engine, constrained(schema.clone(), 5)).choices, whole.choices, "the same seed");
    let cut = ask(&engine, constrained(schema.clone(), 5).max_tokens(7));
    assert_eq!((cut.text(), cut.choices[0].reason()), (&whole.text()[..7], FinishReason::Length));
    let exact = ask(&engine, constrained(schema.clone(), 5).max_tokens(whole.text().len() as u32));
    assert_eq!(exact.choices, whole.choices, "the last token that fits ends the grammar");

    let stop = vec!["\"n\"".to_owned()];
    let stopped = ask(&engine, Request { stop: stop.clone(), ..constrained(schema.clone(), 5) });
    assert_eq!(stopped.choices[0].finished, Some((FinishReason::Stop, Some(stop[0].clone()))));
    assert_eq!(whole.text().split("\"n\"").next(), Some(stopped.text()));

    let scored = ask(&engine, Request { logprobs: Some(3), ..constrained(schema.clone(), 5) });
    assert_eq!(scored.text(), whole.text());
    assert!(
        scored.choices[0].tokens.iter().all(|token| token.logprob.is_some_and(f32::is_finite) && token.top.len() == 3)
    );

    let several = ask(&engine, Request { n: 3, ..constrained(schema, 5) });
    assert_eq!(several.choices[0], whole.choices[0]);
    assert_ne!(several.choices[1].text, several.choices[2].text);
    for choice in several.choices.iter().filter(|choice| choice.reason() == FinishReason::Stop) {
        serde_json::from_str::<Json>(&choice.text).expect("JSON");
    }
}

#[test]
fn min_tokens_makes_a_constrained_answer_longer_but_not_wrong() {
    let engine = Engine::simulate(sim());
    for seed in 0..10 {
        let long = Request { min_tokens: 20, ..constrained(Constraint::Regex("[ab]*c?".into()), seed) };
        let answer = ask(&engine, Request { logprobs: Some(1), ..long.max_tokens(200) });
        let text = &answer.choices[0].text;
        assert!(text.trim_end_matches('c').bytes().all(|byte| b"ab".contains(&byte)), "{text}");
        // After a `c` nothing can follow, so the answer is complete there whatever was asked for.
        assert!(text.len() >= 20 || text.ends_with('c'), "{text}");
        let short =
            Request { min_tokens: 20, ..constrained(Constraint::Choice(vec!["yes".into(), "yesno".into()]), seed) };
        let answer = ask(&engine, short);
        assert_eq!((answer.text(), answer.choices[0].reason()), ("yesno", FinishReason::Stop));
        let stop = TokenId::from(b'o');
        let cut = Request { stop_token_ids: vec![stop], ..constrained(Constraint::Choice(vec!["yesno".into()]), seed) };
        assert_eq!(ask(&engine, cut).text(), "yesn", "a stop token cuts what is forced too");
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_with_its_place() {
    let engine = Engine::simulate(sim());
    let x = |schema: Json| json!({"type": "object", "properties": {"a/b": {"type": "array", "items": schema}}});
    for (schema, location, words) in [
        (x(json!({"not": {}})), "/properties/a~1b/items/not", "not supported"),
        (x(json!({"type": "array", "uniqueItems": true})), "/properties/a~1b/items/uniqueItems", "not supported"),
        (x(json!({"type": "strin"})), "/properties/a~1b/items/type", "JSON type"),
        (x(json!({"type": "string", "format": "color"})), "/properties/a~1b/items/format", "one of"),
        (x(json!({"type": "string", "pattern": "(a"})), "/properties/a~1b/items", "(a"),
        (x(json!({"type": "string", "pattern": "a(?=b)"})), "/properties/a~1b/items", "look-around"),
        (x(json!({"type": "string", "maxLength": -1})), "/properties/a~1b/items/maxLength", "whole number"),
        (x(json!({"type": "array", "minItems": 1_000_000_000})), "/properties/a~1b/items/minItems", "at most"),
        (x(json!({"$ref": "#/$defs/none"})), "/properties/a~1b/items/$ref", "nothing"),
        (x(json!({"$ref": "https://example.org/schema"})), "/properties/a~1b/items/$ref", "into this schema"),
        (x(json!({"const": 9_007_199_254_740_993_u64})), "/properties/a~1b/items/const", "2^53"),
        (x(json!({"enum": []})), "/properties/a~1b/items/enum", "at least one"),
        (x(json!(5)), "/properties/a~1b/items", "an object or a boolean"),
        (x(json!({"type": "object", "minProperties": 2})), "/properties/a~1b/items/minProperties", "at most one"),
        (json!({"type": "integer", "minimum": 5, "maximum": 4}), "", "minimum"),
        (json!(false), "", "false"),
        (json!([]), "", "an object or a boolean"),
    ] {
        let (at, problem) = refusal(&engine, &Constraint::JsonSchema(schema.clone()));
        assert_eq!(at.as_deref(), Some(location), "{schema}: {problem}");
        assert!(problem.contains(words), "{schema}: {problem}");
    }
    for (constraint, location, words) in [
        (Constraint::Regex("a{2".into()), None, ""),
        (Constraint::Lark("start: other".into()), None, "other"),
        (Constraint::Lark("start: <|im_end|>".into()), None, ""),
        (Constraint::Gbnf("root ::= \"a\" other".into()), Some("line 1, column 14"), "not defined"),
        (Constraint::Gbnf("root ::= \"a\"\nroot ::= \"b\"".into()), Some("line 2, column 1"), "twice"),
        (Constraint::Gbnf("root ::= (\"a\"".into()), Some("line 1, column 10"), "not closed"),
        (Constraint::Gbnf("root ::= \"a".into()), Some("line 1, column 10"), "not closed"),
        (Constraint::Gbnf("root ::= [z-a]".into()), Some("line 1, column 10"), "range"),
        (Constraint::Gbnf("root ::= <[7]>".into()), Some("line 1, column 10"), "tokens"),
        (Constraint::Gbnf("x ::= \"a\"".into()), Some("line 1, column 1"), "root"),
        (Constraint::Gbnf("root ::= \"a\"{1,1000000000}".into()), Some("line 1, column 13"), "2000"),
        (Constraint::Choice(Vec::new()), None, "1 to"),
        (Constraint::Choice(vec!["a".into(), String::new()]), Some("/1"), "empty"),
    ] {
        let (at, problem) = refusal(&engine, &constraint);
        assert_eq!(at.as_deref(), location, "{constraint:?}: {problem}");
        assert!(problem.contains(words), "{constraint:?}: {problem}");
    }
    assert_eq!(texts(&engine, &Constraint::Choice(vec!["ok".into()]), 1), ["ok"]);
}

/// Constraints that are made to cost time, stack or memory.
fn bombs() -> Vec<(&'static str, Constraint)> {
    let mut deep = json!({"type": "null"});
    for _ in 0..100 {
        deep = json!({"type": "array", "items": deep});
    }
    let chain = |n: u32| {
        let link = |i: u32| (format!("d{i}"), json!({"anyOf": [{"$ref": format!("#/$defs/d{}", i + 1)}]}));
        let mut defs: serde_json::Map<String, Json> = (0..n).map(link).collect();
        defs.insert(format!("d{n}"), json!({"type": "null"}));
        json!({"$ref": "#/$defs/d0", "$defs": defs})
    };
    let doubling = (0..40).map(|i| {
        (format!("d{i}"), {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            json!({"allOf": [{"anyOf": [next, next]}, {"anyOf": [next, next]}]})
        })
    });
    let mut doubling: serde_json::Map<String, Json> = doubling.collect();
    doubling.insert("d40".into(), json!({"type": "object"}));
    let props =
        |n: u32| (0..n).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect::<serde_json::Map<_, _>>();
    let doubling_terminals = |n: u32| {
        let terminal = |i: u32| format!("T{i}: T{} T{} \"x\"\n", i + 1, i + 1);
        (0..n).map(terminal).collect::<String>() + &format!("T{n}: \"a\"\n")
    };
    let rules = |n: u32| -> String {
        let rule = |i: u32| format!("r{i} ::= r{} r{} \"x\"\n", i + 1, i + 1);
        format!("root ::= r0\n{}r{n} ::= \"y\"\n", (0..n).map(rule).collect::<String>())
    };
    let schema = Constraint::JsonSchema;
    let regex = |text: &str| Constraint::Regex(text.to_owned());
    vec![
        ("a 10 MB enum", schema(json!({"enum": vec!["x".repeat(1000); 10_000]}))),
        ("10,000 values", schema(json!({"enum": (0..10_000).map(|i| format!("v{i}")).collect::<Vec<_>>()}))),
        ("9,000 numbers", schema(json!({"enum": (0..9_000).collect::<Vec<_>>()}))),
        (
            "9,000 exclusive options",
            schema(json!({"oneOf": (0..9_000).map(|i| json!({"const": format!("{i}")})).collect::<Vec<_>>()})),
        ),
        ("a 10 MB description", schema(json!({"description": "x".repeat(10 << 20)}))),
        ("100 arrays deep", schema(deep)),
        (
            "a loop of references",
            schema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})),
        ),
        ("a reference to itself", schema(json!({"$ref": "#"}))),
        (
            "only itself inside",
            schema(json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})),
        ),
        ("a chain of 4,000 references", schema(chain(4_000))),
        ("doubling alternatives", schema(json!({"$ref": "#/$defs/d0", "$defs": doubling}))),
        ("5,000 properties", schema(json!({"type": "object", "properties": props(5_000)}))),
        ("a bomb in a pattern", schema(json!({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}))),
        (
            "10,000 items of 10,000",
            schema(
                json!({"type": "array", "minItems": 10_000, "maxItems": 10_000, "items": {"type": "array", "minItems": 10_000, "items": {"type": "string", "minLength": 10_000}}}),
            ),
        ),
        ("(a{1000}){1000}", regex("(a{1000}){1000}")),
        ("((a{100}){100}){100}", regex("((a{100}){100}){100}")),
        ("(.*a){30}", regex("(.*a.{20}){20}")),
        ("(a|aa)+$", regex("(x+x+)+y(a|aa)+(b*)*")),
        ("nested groups", regex(&format!("{}a{}", "(".repeat(10_000), ")".repeat(10_000)))),
        ("many alternatives", regex(&(0..100_000).map(|i| i.to_string()).collect::<Vec<_>>().join("|"))),
        ("unicode classes", regex(r"(\p{L}{50}\p{N}{50}){50}")),
        ("1,500 rules", Constraint::Gbnf(rules(1_500))),
        ("60,000 groups", Constraint::Gbnf(format!("root ::= {}\"a\"{}", "(".repeat(60_000), ")".repeat(60_000)))),
        ("left recursion", Constraint::Gbnf("root ::= root root | root \"a\" | \"a\" | \"\"".into())),
        ("an empty language", Constraint::Gbnf("root ::= \"a\" root".into())),
        (
            "5,000 Lark rules",
            Constraint::Lark(format!(
                "start: r0\n{}r5000: \"a\"\n",
                (0..5_000)
                    .map(|i| ["r", &i.to_string(), ": r", &(i + 1).to_string(), "\n"].concat())
                    .collect::<String>()
            )),
        ),
        ("60 Lark terminals that double", Constraint::Lark(format!("start: T0\n{}", doubling_terminals(60)))),
        ("1,500 Lark terminals that double", Constraint::Lark(format!("start: T0\n{}", doubling_terminals(1_500)))),
        ("nested Lark", Constraint::Lark(format!("start: {}\"a\"{}", "(".repeat(60_000), ")".repeat(60_000)))),
        ("NUL and friends", Constraint::Lark("start: \"\0\u{7f}\u{202e}\"\0".into())),
        ("10,000 choices", Constraint::Choice((0..10_000).map(|i| format!("choice {i}")).collect())),
    ]
}

#[test]
fn constraints_made_to_hurt_end_in_bounded_time_and_no_stream_has_a_gap() {
    let engine = Engine::simulate(SimConfig { step_us: 1_000, context_length_tokens: 65_536, ..sim() });
    let mut steady = submit(&engine, Request { ignore_eos: true, ..Request::text("steady") }.max_tokens(60_000));
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    // The longest time without a token of the stream that runs beside.
    let watcher = std::thread::spawn(move || {
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            let Some(Event::Delta(_)) = steady.blocking_next() else { panic!("the stream has ended") };
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        longest
    });
    for (name, constraint) in bombs() {
        let began = Instant::now();
        let answer = engine.generate_blocking(constrained(constraint, 1).max_tokens(20));
        let compiled = began.elapsed();
        assert!(compiled < Duration::from_secs(12), "{name} took {compiled:?}");
        let what = match answer {
            Ok(events) => format!("{:?}", read(events).end.map(|_| ())),
            Err(RequestError::Constraint(error)) => format!("refused: {error}"),
            Err(other) => panic!("{name}: {other}"),
        };
        #[cfg(target_os = "linux")]
        let peak = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        #[cfg(target_os = "linux")]
        let peak = peak.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default().to_owned();
        println!("{peak} {name}: {compiled:.1?}, with its answer {:.1?}: {:.150}", began.elapsed(), what);
    }
    stop.send(()).expect("the watcher listens");
    let longest = watcher.join().expect("no panic");
    println!("the longest gap beside them: {longest:?}");
    assert!(longest < Duration::from_millis(700), "{longest:?}");
}

#[test]
fn a_slow_schema_holds_up_neither_plain_requests_nor_other_schemas() {
    let engine = Engine::simulate(sim());
    let slow: Vec<String> = (0..9_000).map(|i| format!("value {i}")).collect();
    let slow =
        Constraint::JsonSchema(json!({"oneOf": slow.iter().map(|value| json!({"const": value})).collect::<Vec<_>>()}));
    let pending = {
        let engine = engine.clone();
        std::thread::spawn(move || engine.generate_blocking(constrained(slow, 1)).map(drop))
    };
    let began = Instant::now();
    ask(&engine, Request::text("plain").max_tokens(3));
    ask(&engine, constrained(Constraint::Choice(vec!["a".into(), "b".into()]), 1));
    println!(
        "beside it: {:?}; it: {:?} after {:?}",
        began.elapsed(),
        pending.join().expect("no panic"),
        began.elapsed()
    );
}
