//! What is refused, with which error, before anything of it is computed; and a full queue.

use minerva_engine::{ChatMessage, Engine, InvalidParam, Prompt, Request, RequestError, SamplingParams, SimConfig};

use crate::support::{ask, greedy, read, submit, tokens, wait_until, wait_until_idle};

fn hello() -> Request {
    Request::text("hello").greedy().max_tokens(4)
}

fn sampling(change: impl FnOnce(&mut SamplingParams)) -> Request {
    let mut request = hello();
    change(&mut request.sampling);
    request
}

#[test]
fn every_parameter_out_of_range_is_named() {
    let engine = Engine::simulate(SimConfig::default());
    let bad = [
        ("n", Request { n: 0, ..hello() }),
        ("n", Request { n: 5, ..hello() }),
        ("n", Request { n: u32::MAX, ..hello() }),
        ("max_tokens", hello().max_tokens(0)),
        ("top_logprobs", Request { logprobs: Some(101), ..hello() }),
        ("stop", Request { stop: vec![String::new()], ..hello() }),
        ("stop", Request { stop: vec!["x".repeat(1025)], ..hello() }),
        ("stop", Request { stop: vec!["x".into(); 65], ..hello() }),
        ("temperature", sampling(|s| s.temperature = f32::NAN)),
        ("temperature", sampling(|s| s.temperature = f32::INFINITY)),
        ("temperature", sampling(|s| s.temperature = -0.1)),
        ("top_k", sampling(|s| s.top_k = -2)),
        ("top_p", sampling(|s| s.top_p = 1.5)),
        ("min_p", sampling(|s| s.min_p = f32::NAN)),
        ("typical_p", sampling(|s| s.typical_p = -1.0)),
        ("repeat_penalty", sampling(|s| s.repeat_penalty = 0.0)),
        ("repeat_last_n", sampling(|s| s.repeat_last_n = i32::MIN)),
        ("frequency_penalty", sampling(|s| s.frequency_penalty = 1e30)),
        ("presence_penalty", sampling(|s| s.presence_penalty = f32::NEG_INFINITY)),
        ("logit_bias", sampling(|s| s.logit_bias = vec![(259, 1.0)])),
        ("logit_bias", sampling(|s| s.logit_bias = vec![(-1, 1.0)])),
        ("logit_bias", sampling(|s| s.logit_bias = vec![(0, f32::NAN)])),
        ("logit_bias", sampling(|s| s.logit_bias = vec![(0, 1.0); 1000])),
    ];
    for (param, request) in bad {
        match engine.generate_blocking(request.clone()) {
            Err(RequestError::InvalidParam(error)) => assert_eq!(error.param, param, "{error}"),
            other => panic!("{request:?} gave {other:?}"),
        }
    }
    let error = engine.generate_blocking(Request { n: 5, ..hello() }).expect_err("four sequences");
    assert_eq!(
        error,
        RequestError::InvalidParam(InvalidParam { param: "n", given: "5".into(), allowed: "between 1 and 4".into() })
    );
    assert_eq!(error.to_string(), "`n` must be between 1 and 4, got 5");
    nothing_was_computed(&engine);
}

fn nothing_was_computed(engine: &Engine) {
    let stats = engine.stats();
    assert_eq!((stats.steps_total, stats.requests_queued, stats.requests_running), (0, 0, 0));
    assert_eq!(ask(engine, hello()).summary().completion_tokens, 4, "the engine works on");
}

#[test]
fn prompts_that_cannot_be_run_are_refused() {
    let engine = Engine::simulate(SimConfig::default());
    let refused = |prompt| engine.generate_blocking(Request { prompt, ..hello() }).expect_err("refused");
    assert_eq!(refused(Prompt::Text(String::new())), RequestError::EmptyPrompt);
    assert_eq!(refused(Prompt::Tokens(vec![])), RequestError::EmptyPrompt);
    for token in [-1, 259, i32::MIN, i32::MAX] {
        assert_eq!(refused(Prompt::Tokens(vec![1, token, 2])), RequestError::UnknownToken { token, n_vocab: 259 });
    }
    let too_long = |n_prompt_tokens| RequestError::ContextLength { n_prompt_tokens, n_ctx: 1024 };
    assert_eq!(refused(Prompt::Tokens(vec![1; 1024])), too_long(1024), "no room for an answer");
    assert_eq!(refused(Prompt::Tokens(vec![1; 5_000_000])), too_long(5_000_000));
    assert_eq!(refused(Prompt::Text("x".repeat(1024))), too_long(1024));
    assert_eq!(refused(Prompt::Text("x".repeat(200 << 20))), too_long(200 << 20));
    assert_eq!(refused(Prompt::Chat(vec![ChatMessage::user("x".repeat(2000))])), too_long(2004), "role and text");
    assert_eq!(
        refused(Prompt::Chat(vec![ChatMessage::new("x".repeat(3000), "")])),
        too_long(3000),
        "before it is rendered"
    );
    assert!(matches!(
        refused(Prompt::Chat(vec![ChatMessage::user("x".repeat(1020))])),
        RequestError::ContextLength { .. }
    ));
    nothing_was_computed(&engine);
}

#[test]
fn choices_that_cannot_share_the_pool_of_cells_are_refused() {
    let engine = Engine::simulate(SimConfig {
        unified: true,
        n_cells: Some(96),
        context_length_tokens: 64,
        ..SimConfig::default()
    });
    let fits = |n, max_tokens| engine.generate_blocking(Request { n, ..greedy(tokens(1, 4), max_tokens) });
    let error = fits(2, 45).expect_err("98 cells");
    assert_eq!(error.to_string(), "`n` must be small enough for 96 cells: each choice may need 49, got 2");
    assert_eq!(read(fits(2, 44).expect("96 cells")).summary().completion_tokens, 88);
    assert!(fits(4, 21).is_err());
    assert!(fits(4, 20).is_ok());
}

#[test]
fn a_queue_full_of_requests_refuses_one_more_and_says_when_to_come_back() {
    let config = SimConfig { n_seq_max: 1, step_us: 1000, max_queued_requests: 2, ..SimConfig::default() };
    let engine = Engine::simulate(config);
    let running = submit(&engine, greedy(tokens(1, 5), 200));
    wait_until("it runs", || engine.stats().requests_running == 1);
    let queued = [submit(&engine, hello()), submit(&engine, hello())];
    let error = engine.generate_blocking(hello()).expect_err("two wait already");
    let RequestError::QueueFull { unit, queued: n_queued, limit, retry_after_s } = error else { panic!("{error}") };
    assert_eq!((unit, n_queued, limit), ("requests", 2, 2));
    assert!((1..=60).contains(&retry_after_s));
    assert_eq!(engine.stats().requests_queued, 2);
    drop(running); // a place gets free
    let mut texts = queued.map(read);
    assert_eq!(texts[0].text(), texts[1].text());
    texts[0] = ask(&engine, hello());
    assert_eq!(texts[0].choices, texts[1].choices);
    wait_until_idle(&engine);
}

#[test]
fn a_queue_full_of_prompt_tokens_refuses_a_long_prompt_and_takes_a_short_one() {
    let config = SimConfig { n_seq_max: 1, step_us: 1000, max_queued_tokens: 300, ..SimConfig::default() };
    let engine = Engine::simulate(config);
    let running = submit(&engine, greedy(tokens(1, 5), 200));
    wait_until("it runs", || engine.stats().requests_running == 1);
    let large = submit(&engine, greedy(tokens(2, 250), 1)); // may be larger than the limit when it is alone, too
    let error = engine.generate_blocking(greedy(tokens(3, 51), 1)).expect_err("301 tokens would wait");
    let RequestError::QueueFull { unit, queued, limit, .. } = error else { panic!("{error}") };
    assert_eq!((unit, queued, limit), ("prompt tokens", 250, 300));
    let small = submit(&engine, greedy(tokens(4, 50), 1));
    drop((running, large, small));
    wait_until_idle(&engine);
    let running = submit(&engine, greedy(tokens(1, 5), 200));
    wait_until("it runs", || engine.stats().requests_running == 1);
    let larger = submit(&engine, greedy(tokens(2, 900), 1));
    assert!(matches!(engine.generate_blocking(hello()), Err(RequestError::QueueFull { .. })));
    drop(running);
    assert_eq!(read(larger).summary().prompt_tokens, 900);
    assert_eq!(ask(&engine, hello()).summary().completion_tokens, 4);
}
