//! What an answer holds: its length, its end, its counts, its log-probabilities, and the same draws for the same seed.

use minerva_engine::sim::END;
use minerva_engine::{ChatMessage, Engine, FinishReason, Prompt, Request, SamplingParams, SimConfig};

use crate::support::{Answer, ask, ask_alone, greedy, tokens, wait_until_idle};

fn sim() -> Engine {
    Engine::simulate(SimConfig::default())
}

fn hello() -> Request {
    Request::chat([ChatMessage::user("hello")]).greedy()
}

/// So hot that the simulator's clear favourite is one of many.
fn hot(prompt: &str, seed: Option<u64>) -> Request {
    let sampling = SamplingParams { temperature: 40.0, min_p: 0.0, top_p: 1.0, seed, ..SamplingParams::default() };
    Request { sampling, ..Request::text(prompt) }.max_tokens(24)
}

#[test]
fn max_tokens_ends_an_answer_with_length_and_the_end_token_with_stop() {
    let engine = sim();
    for max_tokens in [1, 2, 31, 32] {
        let answer = ask(&engine, hello().max_tokens(max_tokens));
        assert_eq!(answer.choices[0].finished, Some((FinishReason::Length, None)));
        assert_eq!(answer.text().len(), max_tokens as usize);
        assert_eq!(answer.summary().completion_tokens, max_tokens);
    }
    let answer = ask(&engine, hello());
    assert_eq!(answer.choices[0].finished, Some((FinishReason::Stop, None)));
    assert_eq!(answer.text().len(), 32);
    assert_eq!(answer.summary().completion_tokens, 33, "the end token was generated too");
    assert!(answer.choices[0].ids().iter().all(|&id| id != END), "it has no text and is not reported");
}

#[test]
fn an_answer_without_a_bound_fills_the_context_and_no_more() {
    let engine = sim();
    let answer = ask(&engine, Request::text("x".repeat(1000)).greedy());
    assert_eq!(answer.choices[0].reason(), FinishReason::Length);
    assert_eq!(answer.summary().completion_tokens, 24, "prompt and answer together are 1024 tokens");
    let answer = ask(&engine, Request::text("x".repeat(1023)).greedy().max_tokens(u32::MAX));
    assert_eq!(answer.summary().completion_tokens, 1);
}

#[test]
fn choices_without_a_bound_share_the_pool_of_cells() {
    let config = SimConfig { unified: true, n_cells: Some(96), context_length_tokens: 64, ..SimConfig::default() };
    let engine = Engine::simulate(config);
    let answer = ask(&engine, Request { n: 2, ..Request::text("1234").greedy() });
    assert_eq!(answer.summary().completion_tokens, 2 * 44, "each choice has half of 96 cells");
    let answer = ask(&engine, Request::text("1234").greedy());
    assert_eq!(answer.summary().completion_tokens, 60);
}

#[test]
fn ignore_eos_goes_on_to_max_tokens() {
    let answer = ask(&sim(), Request { ignore_eos: true, ..hello().max_tokens(50) });
    assert_eq!(answer.choices[0].finished, Some((FinishReason::Length, None)));
    assert_eq!(answer.summary().completion_tokens, 50);
    assert!(answer.choices[0].ids().iter().all(|&id| id != END));
}

#[test]
fn a_stop_token_ends_the_answer_and_is_not_shown() {
    let engine = sim();
    let whole = ask(&engine, hello());
    let at = whole.text().len() / 2;
    let token = whole.choices[0].ids()[at];
    let before = whole.choices[0].ids().iter().position(|&id| id == token).expect("it is in there");
    let answer = ask(&engine, Request { stop_token_ids: vec![END - 3, token], ..hello() });
    assert_eq!(answer.choices[0].finished, Some((FinishReason::Stop, None)));
    assert_eq!(answer.text(), &whole.text()[..before]);
    assert_eq!(answer.choices[0].tokens.len(), before);
    assert_eq!(answer.summary().completion_tokens as usize, before + 1, "it was generated");
    // The end of generation is ignored, what the request names is not.
    let ignoring = Request { stop_token_ids: vec![0], ignore_eos: true, ..hello().max_tokens(50) };
    let answer = ask(&engine, ignoring);
    // All tokens but the end are alike where the simulator wants to end, so the first of the vocabulary is next.
    assert_eq!((answer.text(), answer.choices[0].reason()), (whole.text(), FinishReason::Stop));
}

#[test]
fn nothing_ends_an_answer_before_min_tokens() {
    let engine = sim();
    let whole = ask(&engine, hello());
    let answer = ask(&engine, Request { min_tokens: 40, ..hello().max_tokens(45) });
    assert_eq!(&answer.choices[0].ids()[..32], &whole.choices[0].ids(), "what comes before is as it was");
    assert_eq!(answer.choices[0].finished, Some((FinishReason::Stop, None)), "the simulator still wants to end");
    assert_eq!(answer.summary().completion_tokens, 41, "forty, and the end behind them");
    let exact = ask(&engine, Request { min_tokens: 32, ..hello() });
    assert_eq!(exact.choices, whole.choices, "who ends late enough is not changed");

    let first = whole.choices[0].ids()[0];
    let banned = ask(&engine, Request { min_tokens: 9, stop_token_ids: vec![first], ..hello().max_tokens(9) });
    assert!(banned.choices[0].ids().iter().all(|&id| id != first), "a stop token is not sampled");
    assert_eq!(banned.choices[0].tokens.len(), 9);
}

#[test]
fn a_stop_text_counts_from_min_tokens_on_even_where_it_began_before() {
    let engine = sim();
    let whole = ask(&engine, hello());
    let text = whole.text();
    let stop = text[8..11].to_owned();
    assert_eq!(text.find(&stop), Some(8), "the simulator's text has it once");
    for (min_tokens, ends) in [(0, true), (10, true), (11, false)] {
        let answer = ask(&engine, Request { min_tokens, stop: vec![stop.clone()], ..hello() });
        assert_eq!(answer.text(), if ends { &text[..8] } else { text }, "min_tokens {min_tokens}");
    }
    let ids = ask(&engine, Request { min_tokens: 11, stop: vec![stop], ..hello() }).choices[0].ids();
    assert_eq!(ids, whole.choices[0].ids(), "no token is lost");
}

#[test]
fn min_tokens_holds_for_every_choice_on_every_path_of_sampling() {
    for (n_seq_max, period_tokens) in [(1, None), (4, Some(5))] {
        let engine = Engine::simulate(SimConfig { n_seq_max, period_tokens, ..SimConfig::default() });
        let request = Request { n: n_seq_max, min_tokens: 50, stop: vec!["e".into()], ..hello().max_tokens(60) };
        for choice in ask(&engine, request).choices {
            assert!(choice.tokens.len() >= 49, "{}", choice.tokens.len());
        }
    }
}

#[test]
fn a_stop_text_across_tokens_ends_the_answer_before_it() {
    let engine = sim();
    let whole = ask(&engine, hello());
    for (from, to) in [(0, 1), (0, 3), (5, 9), (29, 32)] {
        let stop = whole.text()[from..to].to_owned();
        let before = whole.text().find(&stop).expect("it is in there");
        let answer = ask(&engine, Request { stop: vec!["@@".into(), stop.clone()], ..hello() });
        assert_eq!(answer.choices[0].finished, Some((FinishReason::Stop, Some(stop.clone()))));
        assert_eq!(answer.text(), &whole.text()[..before], "stop {stop:?}");
        assert_eq!(answer.choices[0].tokens.len(), before, "tokens of the stop text are not reported");
        assert_eq!(answer.summary().completion_tokens as usize, before + stop.len());
    }
}

#[test]
fn a_stop_text_that_never_comes_changes_nothing() {
    let engine = sim();
    let whole = ask(&engine, hello());
    let near_miss = format!("{}@", &whole.text()[10..20]);
    let answer = ask(&engine, Request { stop: vec![near_miss], ..hello() });
    assert_eq!(answer.choices, whole.choices);
}

#[test]
fn logprobs_come_with_every_token_and_only_on_demand() {
    let engine = sim();
    let plain = ask(&engine, hello());
    assert!(plain.choices[0].tokens.iter().all(|token| token.logprob.is_none() && token.top.is_empty()));
    let answer = ask(&engine, Request { logprobs: Some(3), ..hello() });
    assert_eq!(answer.text(), plain.text());
    assert_eq!(answer.choices[0].tokens.len(), 32);
    let bytes: Vec<u8> = answer.choices[0].tokens.iter().flat_map(|token| token.bytes.clone()).collect();
    assert_eq!(bytes, answer.text().as_bytes());
    for token in &answer.choices[0].tokens {
        assert_eq!((token.top.len(), token.top[0].id), (3, token.id), "greedy takes the likeliest");
        assert_eq!(token.logprob, Some(token.top[0].logprob));
        assert!(token.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        // 258 tokens at 0 and one at 20.
        assert!((f64::from(token.top[0].logprob) + 258.0 * (-20.0_f64).exp()).abs() < 1e-6);
        assert!((token.top[1].logprob + 20.0).abs() < 1e-3);
    }
    let chosen_only = ask(&engine, Request { logprobs: Some(0), ..hello() });
    assert!(chosen_only.choices[0].tokens.iter().all(|token| token.logprob.is_some() && token.top.is_empty()));
}

#[test]
fn a_seed_gives_the_same_draws_alone_and_in_company_and_none_gives_others() {
    let engine = sim();
    let ids = |answer: &Answer| answer.choices[0].ids();
    let first = ask(&engine, hot("dice", Some(7)));
    assert_eq!(ids(&ask(&engine, hot("dice", Some(7)))), ids(&first));
    assert_ne!(ids(&ask(&engine, hot("dice", Some(8)))), ids(&first));
    assert_ne!(ids(&ask(&engine, hot("dice", None))), ids(&ask(&engine, hot("dice", None))));
    let company: Vec<_> =
        (0..3).map(|seed| engine.generate_blocking(hot("other dice", Some(seed))).expect("accepted")).collect();
    assert_eq!(ids(&ask(&engine, hot("dice", Some(7)))), ids(&first));
    drop(company);
}

#[test]
fn choices_have_seeds_of_their_own_and_the_first_has_the_request_s() {
    let engine = sim();
    let answer = ask(&engine, Request { n: 3, ..hot("dice", Some(7)) });
    let ids: Vec<_> = answer.choices.iter().map(super::support::Choice::ids).collect();
    assert_eq!(ids.len(), 3);
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
    assert_eq!(ids[0], ask(&engine, hot("dice", Some(7))).choices[0].ids());
    assert_eq!(answer.summary().completion_tokens, 3 * 24);
    let again = ask(&engine, Request { n: 3, ..hot("dice", Some(7)) });
    assert_eq!(again.choices, answer.choices);
}

#[test]
fn penalties_see_the_prompt_and_the_answer() {
    // Every letter that the answer has used, and every one of the prompt, is made far less likely than the rest.
    let sampling = SamplingParams { presence_penalty: 50.0, repeat_last_n: -1, ..SamplingParams::greedy() };
    let prompt = b"abcdefghijklmnopqrstuvwxyz ";
    let request = Request { sampling, ..Request::text(String::from_utf8_lossy(prompt)) }.max_tokens(40);
    let ids = ask(&sim(), request).choices[0].ids();
    let mut seen: Vec<_> = prompt.iter().map(|&byte| i32::from(byte)).collect();
    for id in ids {
        assert!(!seen.contains(&id), "{id} came again");
        seen.push(id);
    }
}

#[test]
fn usage_counts_the_prompt_what_was_cached_and_what_was_generated() {
    let engine = sim();
    let turn = greedy(tokens(1, 100), 10);
    let first = ask(&engine, turn.clone());
    let summary = first.summary();
    assert_eq!((summary.prompt_tokens, summary.cached_tokens, summary.completion_tokens), (100, 0, 10));

    let again = ask(&engine, turn.clone());
    assert_eq!(again.summary().cached_tokens, 99, "all but the token whose scores are needed");
    assert_eq!(again.choices, first.choices);

    let mut longer = tokens(1, 100);
    longer.extend(first.choices[0].ids());
    longer.extend(tokens(2, 20));
    let next = ask(&engine, greedy(longer, 5));
    assert_eq!(
        (next.summary().prompt_tokens, next.summary().cached_tokens),
        (130, 109),
        "the answer is cached as well"
    );

    let without = ask(&engine, Request { cache_prompt: false, ..turn });
    assert_eq!(without.summary().cached_tokens, 0);
    assert_eq!(without.choices, first.choices);

    wait_until_idle(&engine);
    let stats = engine.stats();
    assert_eq!(stats.prompt_tokens_total, 100 + 1 + 21 + 100);
    assert_eq!(stats.cached_tokens_total, 99 + 109);
    assert_eq!(stats.generated_tokens_total, 10 + 10 + 5 + 10);
}

#[test]
fn several_choices_compute_their_prompt_once() {
    for unified in [false, true] {
        for max_tokens in [1, 2, 10] {
            let engine = Engine::simulate(SimConfig { unified, ..SimConfig::default() });
            let answer = ask(&engine, Request { n: 4, ..greedy(tokens(5, 200), max_tokens) });
            assert_eq!(engine.stats().prompt_tokens_total, 200, "max_tokens {max_tokens}");
            assert_eq!(answer.summary().prompt_tokens, 200);
            assert_eq!(answer.summary().completion_tokens, 4 * max_tokens);
            assert!(answer.choices.iter().all(|choice| *choice == answer.choices[0]));
        }
    }
}

#[test]
fn a_cache_that_cannot_be_cut_reports_no_reuse_and_gives_the_same_text() {
    let config = SimConfig { cannot_cut: true, n_seq_max: 1, ..SimConfig::default() };
    let engine = Engine::simulate(config.clone());
    let mut prompt = tokens(1, 50);
    let first = ask(&engine, greedy(prompt.clone(), 10));
    prompt[40] += 1; // parts from the first one before its end
    let second = ask(&engine, greedy(prompt.clone(), 10));
    assert_eq!(second.summary().cached_tokens, 0);
    assert_eq!(second.choices, ask_alone(&config, greedy(prompt.clone(), 10)).choices);
    // Where nothing has to be cut, the sequence can go on.
    prompt.extend(second.choices[0].ids().iter().take(9));
    prompt.extend(tokens(9, 3));
    let third = ask(&engine, greedy(prompt.clone(), 10));
    assert_eq!(third.summary().cached_tokens, 59);
    assert_eq!(third.choices, ask_alone(&config, greedy(prompt, 10)).choices);
    assert_eq!(first.summary().cached_tokens, 0);
}

#[test]
fn a_chat_goes_through_the_template_and_a_text_does_not() {
    let engine = sim();
    let chat = ask(
        &engine,
        Request { prompt: Prompt::Chat(vec![ChatMessage::system("s"), ChatMessage::user("u")]), ..hello() },
    );
    assert_eq!(chat.summary().prompt_tokens as usize, "?system\ns".len() + "?user\nu".len() + 1);
    // The control characters of the template are text in a text: nobody ends up behind an answer marker.
    let text = ask(&engine, Request::text("\u{1e}user\nu\u{1f}").greedy().max_tokens(40));
    assert_eq!(text.choices[0].reason(), FinishReason::Length);
    assert_eq!(engine.detokenize(&[104, 105, END, -1, i32::MAX]), b"hi");
}

#[tokio::test]
async fn tokenize_gives_what_detokenize_takes() {
    let engine = sim();
    let tokens = engine.tokenize("gr\u{fc}n \u{1f600}".into(), true).await.expect("tokenizes");
    assert_eq!(engine.detokenize(&tokens), "gr\u{fc}n \u{1f600}".as_bytes());
}
