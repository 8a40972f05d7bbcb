//! The engine over llama.cpp and the default model, SmolLM2-135M. `cargo xtask setup` fetches it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;

use minerva_engine::{
    ChatMessage, Constraint, Engine, EngineConfig, Event, FinishReason, LoadError, Prompt, Request, RequestError,
    SamplingParams,
};

use crate::support::{ask, read, submit, wait_until_idle};

pub(crate) fn config() -> EngineConfig {
    let model: PathBuf = std::env::var_os("MINERVA_TEST_MODEL")
        .expect("MINERVA_TEST_MODEL names no model: run `cargo xtask setup`, which fetches it, and test through cargo")
        .into();
    EngineConfig {
        device: minerva_gpu::DeviceChoice::Cpu,
        n_seq_max: Some(4),
        context_length_tokens: Some(1024),
        n_threads: Some(1), // two that spin while they wait for each other crawl where other tests take a core away
        ..EngineConfig::new(model)
    }
}

pub(crate) fn load() -> Engine {
    Engine::load(config(), |_| ControlFlow::Continue(())).expect("the test model loads")
}

/// One engine for all tests, one test at a time: they look at its counters.
fn engine() -> MutexGuard<'static, Engine> {
    static ENGINE: LazyLock<Mutex<Engine>> = LazyLock::new(|| Mutex::new(load()));
    let engine = ENGINE.lock().unwrap_or_else(PoisonError::into_inner);
    wait_until_idle(&engine);
    engine
}

fn question(text: &str) -> Request {
    Request::chat([ChatMessage::system("You are a helpful assistant."), ChatMessage::user(text)])
        .greedy()
        .max_tokens(32)
}

#[test]
fn it_knows_the_capital_of_france_and_says_so_twice() {
    let engine = engine();
    let first = ask(&engine, question("What is the capital of France?"));
    assert!(first.text().contains("Paris"), "{}", first.text());
    assert_eq!(first.choices[0].reason(), FinishReason::Stop, "the template's end of turn ends the answer");
    let second = ask(&engine, question("What is the capital of France?"));
    assert_eq!(second.choices, first.choices);
    let summary = second.summary();
    assert_eq!(summary.cached_tokens, summary.prompt_tokens - 1, "the prompt was in the cache");
    let cold = ask(&engine, Request { cache_prompt: false, ..question("What is the capital of France?") });
    assert_eq!(cold.summary().cached_tokens, 0);
    assert_eq!(cold.choices, first.choices);
}

#[test]
fn a_conversation_reuses_its_last_turn() {
    let engine = engine();
    let mut messages = vec![ChatMessage::user("Name a colour of the rainbow.")];
    let first = ask(&engine, Request::chat(messages.clone()).greedy().max_tokens(16));
    messages.push(ChatMessage::new("assistant", first.text()));
    messages.push(ChatMessage::user("Name one more."));
    let second = ask(&engine, Request::chat(messages).greedy().max_tokens(8));
    assert!(second.summary().cached_tokens >= first.summary().prompt_tokens, "{:?}", second.summary());
}

#[test]
fn two_requests_share_their_steps() {
    let engine = engine();
    let before = engine.stats();
    let request = |word: &str| Request {
        ignore_eos: true,
        ..Request::text(format!("A story about a {word}:")).greedy().max_tokens(32)
    };
    let both = [submit(&engine, request("dragon")), submit(&engine, request("lighthouse"))];
    let answers = both.map(read);
    assert!(answers.iter().all(|answer| answer.summary().completion_tokens == 32));
    let after = engine.stats();
    assert_eq!(after.generated_tokens_total - before.generated_tokens_total, 64);
    let n_steps = after.steps_total - before.steps_total;
    assert!(n_steps <= 40, "{n_steps} steps for 64 tokens of two requests");
}

#[test]
fn leaving_frees_the_cells() {
    let engine = engine();
    let mut events =
        submit(&engine, Request { ignore_eos: true, ..Request::text("Once upon a time").greedy().max_tokens(900) });
    for _ in 0..3 {
        assert!(matches!(events.blocking_next(), Some(Event::Delta(_))));
    }
    assert!(engine.stats().kv_cells_used > 0);
    let cancelled = engine.stats().cancelled_total;
    drop(events);
    wait_until_idle(&engine);
    assert_eq!(engine.stats().cancelled_total, cancelled + 1);
}

#[test]
fn secrets_of_one_client_never_reach_another() {
    let engine = engine();
    let secrets = ["7319", "8426", "5934", "6182", "2957", "4713"];
    let prompt = |secret: &str| {
        let system = "You are a helpful assistant. Repeat the code that the user gives you.";
        Request::chat([
            ChatMessage::system(system),
            ChatMessage::user(format!("The code is {secret}. What is the code?")),
        ])
    };
    thread::scope(|scope| {
        for (i, secret) in secrets.iter().enumerate() {
            let engine = engine.clone();
            scope.spawn(move || {
                for round in 0..3 {
                    let sampling = SamplingParams { seed: Some(round), ..SamplingParams::default() };
                    let request = Request { sampling, cache_prompt: round != 1, ..prompt(secret).max_tokens(12) };
                    let mut events = submit(&engine, request);
                    if (i + round as usize).is_multiple_of(4) {
                        events.blocking_next();
                        continue; // leaves in the middle
                    }
                    let answer = read(events);
                    let others = secrets.iter().filter(|other| *other != secret);
                    for other in others {
                        assert!(!answer.text().contains(other), "{secret} was told {other}: {}", answer.text());
                    }
                }
            });
        }
    });
    wait_until_idle(&engine);
}

#[test]
fn two_choices_have_seeds_of_their_own() {
    let engine = engine();
    let sampling = SamplingParams { temperature: 1.5, min_p: 0.0, seed: Some(1), ..SamplingParams::default() };
    let request = Request { n: 2, sampling, ..Request::text("My favourite animal is") }.max_tokens(12);
    let before = engine.stats();
    let answer = ask(&engine, request.clone());
    let summary = answer.summary();
    assert_eq!(
        engine.stats().prompt_tokens_total - before.prompt_tokens_total,
        u64::from(summary.prompt_tokens - summary.cached_tokens)
    );
    assert_ne!(answer.choices[0].ids(), answer.choices[1].ids());
    assert_eq!(ask(&engine, request).choices[0].ids().first(), answer.choices[0].ids().first());
}

#[test]
fn log_probabilities_are_those_of_the_chosen_tokens() {
    let engine = engine();
    let answer =
        ask(&engine, Request { logprobs: Some(5), ..Request::text("The capital of France is").greedy().max_tokens(8) });
    assert_eq!(answer.choices[0].tokens.len(), 8);
    for token in &answer.choices[0].tokens {
        assert_eq!(token.top.len(), 5);
        assert_eq!(token.top[0].id, token.id, "greedy takes the likeliest");
        assert_eq!(token.logprob, Some(token.top[0].logprob));
        assert!(token.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        let sum: f32 = token.top.iter().map(|top| top.logprob.exp()).sum();
        assert!((0.0..=1.0 + 1e-4).contains(&sum), "five of the tokens hold {sum}");
        assert!(token.top[0].logprob.exp() > 1e-3);
    }
    let bytes: Vec<u8> = answer.choices[0].tokens.iter().flat_map(|token| token.bytes.clone()).collect();
    assert_eq!(bytes, answer.text().as_bytes());
}

#[test]
fn a_stop_text_ends_the_answer_before_it() {
    let engine = engine();
    let request = Request {
        ignore_eos: true,
        ..Request::text("One, two, three, four, five, six, seven,").greedy().max_tokens(24)
    };
    let whole = ask(&engine, request.clone());
    let comma = whole.text()[6..].find(", ").expect("it goes on counting") + 6;
    let stop = whole.text()[comma - 2..comma + 2].to_owned(); // begins and ends inside of tokens
    let at = whole.text().find(&stop).expect("it is in there");
    let answer = ask(&engine, Request { stop: vec![stop.clone()], ..request });
    assert_eq!(answer.choices[0].finished, Some((FinishReason::Stop, Some(stop))));
    assert_eq!(answer.text(), &whole.text()[..at]);
}

#[test]
fn prompts_that_are_too_long_are_refused_and_the_engine_lives() {
    let engine = engine();
    for (text, n_at_most) in
        [("A".repeat(100_000), 100_000), (" \u{4e00}".repeat(50_000), 200_000), ("word ".repeat(2_000), 10_000)]
    {
        let n_bytes = text.len();
        match engine.generate_blocking(Request::text(text)) {
            Err(RequestError::ContextLength { n_prompt_tokens, n_ctx: 1024 }) => {
                assert!((1024..=n_at_most).contains(&n_prompt_tokens), "{n_prompt_tokens} tokens of {n_bytes} bytes");
            }
            other => panic!("{other:?}"),
        }
    }
    // Long enough to be refused by its bytes: the number is the fewest that it can have, and it was not tokenized.
    let error = engine.generate_blocking(Request::text("A".repeat(20_000_000))).expect_err("far too long");
    let RequestError::ContextLength { n_prompt_tokens, .. } = error else { panic!("{error}") };
    assert!(n_prompt_tokens < 2_000_000, "{n_prompt_tokens}");
    assert!(matches!(
        engine.generate_blocking(Request { prompt: Prompt::Tokens(vec![1 << 20]), ..Request::default() }),
        Err(RequestError::UnknownToken { .. })
    ));
    assert_eq!(ask(&engine, question("Hello!").max_tokens(2)).summary().completion_tokens, 2);
}

#[tokio::test]
async fn a_long_run_of_one_letter_is_tokenized_and_comes_back() {
    let engine = engine().clone();
    for text in ["A".repeat(300_000), "\u{1f600}".repeat(20_000), "1".repeat(100_000)] {
        let tokens = engine.tokenize(text.clone(), false).await.expect("tokenizes");
        assert_eq!(engine.detokenize(&tokens), text.as_bytes());
    }
}

#[test]
fn control_tokens_in_a_text_are_text() {
    let engine = engine();
    let plain = ask(&engine, Request::text("<|im_end|>").greedy().max_tokens(1));
    assert!(plain.summary().prompt_tokens > 3, "{:?}", plain.summary());
}

#[test]
fn the_engine_says_where_the_model_runs_and_what_it_takes() {
    let engine = engine();
    let info = engine.info();
    assert_eq!((info.n_layers, info.n_vocab, info.context_train_tokens), (30, 49152, 8192));
    assert_eq!((info.context_length_tokens, info.n_seq_max, info.n_cells), (1024, 4, 4096));
    assert_eq!(u64::from(info.n_cells), engine.stats().kv_cells_total);
    assert!(info.has_chat_template && info.n_params > 130_000_000 && info.size_bytes > 80 << 20, "{info:?}");
    let placement = &info.placement;
    assert_eq!((&*placement.device, placement.n_gpu_layers, placement.n_layers_total), ("Cpu", 0, 31));
    assert_eq!((placement.n_threads, placement.n_threads_batch), (1, 1));
    let host = placement.memory.last().expect("the host is always there");
    assert_eq!(host.device, "Host");
    // K and V of 30 layers, 3 heads of 64, f16, 4096 cells.
    assert_eq!(host.kv_bytes, 2 * 30 * 3 * 64 * 2 * 4096);
    assert!(host.weights_bytes >= info.size_bytes && host.weights_bytes < 2 * info.size_bytes, "{host:?}");
    assert!(host.compute_bytes > 0 && host.total_bytes >= host.free_bytes && host.free_bytes > 0, "{host:?}");
    let build = Engine::build_info();
    assert!(build.backends.contains(&"cpu".to_owned()) && !build.cpu_features.is_empty(), "{build:?}");
}

#[test]
fn a_load_reports_its_progress_and_can_be_stopped() {
    let mut seen = Vec::new();
    let result = Engine::load(config(), |progress| {
        seen.push(progress.fraction);
        if progress.fraction > 0.5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(LoadError::Cancelled)), "{result:?}");
    assert!(seen.is_sorted() && seen.len() > 2, "{seen:?}");
}

fn person() -> Constraint {
    Constraint::JsonSchema(serde_json::json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"type": "string", "maxLength": 20},
            "occupation": {"enum": ["teacher", "doctor", "sailor", "astronaut"]},
            "likes": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 4},
        },
        "required": ["name", "age", "city", "occupation", "likes"],
        "additionalProperties": false,
    }))
}

#[test]
fn a_schema_makes_the_model_answer_in_json_that_is_valid() {
    let engine = engine();
    let Constraint::JsonSchema(schema) = person() else { unreachable!() };
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let ask_for = |sampling: SamplingParams, n| Request {
        n,
        sampling,
        constraint: Some(person()),
        ..question("Invent a person and describe them in JSON.").max_tokens(200)
    };
    let mut texts = Vec::new();
    let greedy = ask(&engine, ask_for(SamplingParams::greedy(), 1));
    let drawn = ask(&engine, ask_for(SamplingParams { seed: Some(3), ..SamplingParams::default() }, 4));
    for choice in greedy.choices.iter().chain(&drawn.choices) {
        assert_eq!(choice.reason(), FinishReason::Stop, "{}", choice.text);
        let value = serde_json::from_str(&choice.text).expect("JSON");
        assert!(validator.is_valid(&value), "{}", choice.text);
        texts.push(choice.text.clone());
    }
    texts.dedup();
    assert_eq!(texts.len(), 5, "{texts:?}");
    let bytes: Vec<u8> = greedy.choices[0].tokens.iter().flat_map(|token| token.bytes.clone()).collect();
    assert_eq!(String::from_utf8(bytes).expect("text"), greedy.text());
}

#[test]
fn a_grammar_decides_between_the_answers_that_the_model_knows() {
    let engine = engine();
    let is = |city| format!("The capital of France is {city}.");
    let choice = Constraint::Choice(["London", "Paris", "Parma", "Rome"].map(is).to_vec());
    let answer = ask(&engine, Request { constraint: Some(choice), ..question("What is the capital of France?") });
    assert_eq!((answer.text(), answer.choices[0].reason()), (&*is("Paris"), FinishReason::Stop));
    let regex = Constraint::Regex(r"The capital of France is [A-Z][a-z]{1,10}\.".into());
    let answer = ask(&engine, Request { constraint: Some(regex), ..question("What is the capital of France?") });
    assert_eq!(answer.text(), "The capital of France is Paris.");
}

/// `cargo test -p minerva-engine --release --test it -- --ignored speed_of_a_schema --nocapture`
#[test]
#[ignore = "a measurement: it wants the machine for itself"]
fn speed_of_a_schema_against_plain_text() {
    const CLIENTS: u64 = 8;
    const N_TOKENS: u32 = 64;
    let config = EngineConfig { n_seq_max: Some(8), n_threads: None, ..config() };
    let engine = Engine::load(config, |_| ControlFlow::Continue(())).expect("the test model loads");
    let Constraint::JsonSchema(person) = person() else { unreachable!() };
    // Enough of them to fill all tokens.
    let people = Constraint::JsonSchema(serde_json::json!({"type": "array", "items": person, "minItems": 9}));
    let answer = &|client: u64, round: u64, constraint: Option<Constraint>, sampling: SamplingParams| {
        let question = format!("Invent people and describe them in JSON, number {client} and {round}.");
        let sampling = SamplingParams { seed: Some(client * 1000 + round), ..sampling };
        let request = Request::chat([ChatMessage::user(question)]).max_tokens(N_TOKENS);
        let answer = ask(&engine, Request { constraint, sampling, ignore_eos: true, ..request });
        assert_eq!(answer.summary().completion_tokens, N_TOKENS);
    };
    // Tokens a second, and microseconds of a step in the backend and beside it.
    let run = |round: u64, constraint: Option<&Constraint>, sampling: &SamplingParams| {
        let (before, began) = (engine.stats(), std::time::Instant::now());
        thread::scope(|scope| {
            for client in 0..CLIENTS {
                scope.spawn(move || answer(client, round, constraint.cloned(), sampling.clone()));
            }
        });
        let (after, seconds) = (engine.stats(), began.elapsed().as_secs_f64());
        let n_steps = (after.steps_total - before.steps_total) as f64;
        let step = |before: u64, after: u64| (after - before) as f64 / n_steps;
        (
            (CLIENTS * u64::from(N_TOKENS)) as f64 / seconds,
            step(before.backend_us_total, after.backend_us_total),
            step(before.overhead_us_total, after.overhead_us_total),
        )
    };
    for (name, sampling) in [("drawn", SamplingParams::default()), ("greedy", SamplingParams::greedy())] {
        let mut ratios = Vec::new();
        for round in 0..9 {
            let (plain, plain_backend, plain_beside) = run(round, None, &sampling);
            let (schema, backend, beside) = run(round, Some(&people), &sampling);
            println!(
                "{name}: {plain:.0} tokens/s plain ({plain_backend:.0} + {plain_beside:.0} us a step), {schema:.0} with a \
                 schema ({backend:.0} + {beside:.0} us)"
            );
            ratios.push(schema / plain);
        }
        ratios.sort_by(f64::total_cmp);
        println!("{name}: with a schema {:.2} of the plain speed ({ratios:.2?})", ratios[ratios.len() / 2]);
    }
}
