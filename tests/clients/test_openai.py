"""The official `openai` client against a running server: what its users rely on."""

import concurrent.futures
import json
import math

import openai
import pytest

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def chat(client, **fields):
    return client.chat.completions.create(**{"model": "default", "messages": CAPITAL, "max_tokens": 24, "temperature": 0, **fields})


def test_the_model_list_has_one_model_with_its_context(client):
    (model,) = client.models.list().data
    assert model.object == "model" and model.max_model_len >= 256
    assert client.models.retrieve(model.id).id == model.id
    assert chat(client, model=model.id, max_tokens=1).model == model.id


def test_a_chat_is_answered_with_usage(client):
    answer = chat(client)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.system_fingerprint
    usage = answer.usage
    assert usage.prompt_tokens > 5 and 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [whole.choices[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_in_a_last_chunk_when_asked_for(client):
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens > 0 and last.usage.prompt_tokens > 5
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_a_repeated_prompt_is_served_from_the_cache(client):
    messages = [{"role": "user", "content": "Here is a list of words: " + "apple pear plum " * 30}]
    first = chat(client, messages=messages, max_tokens=2).usage
    again = chat(client, messages=messages, max_tokens=2).usage
    assert again.prompt_tokens == first.prompt_tokens
    assert again.prompt_tokens_details.cached_tokens > first.prompt_tokens // 2


def test_hints_about_the_cache_are_understood(client):
    part = {"type": "text", "text": "Words to remember: " + "cherry fig date " * 30, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    hints = {"messages": [{"role": "user", "content": [part]}], "extra_body": {"prompt_cache_key": "words"}}
    first = chat(client, max_tokens=2, **hints).usage
    again = chat(client, max_tokens=2, **hints).usage
    assert again.prompt_tokens_details.cached_tokens == first.prompt_tokens - 1, "all but the last token, which has to be computed"
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, messages=[{"role": "user", "content": [{**part, "cache_control": {"type": "ephemeral", "ttl": "2h"}}]}])
    assert error.value.param == "messages[0].content[0].cache_control.ttl"


def test_comments_about_the_queue_do_not_disturb_streams(client):
    def words(i):
        messages = [{"role": "user", "content": f"Say something about the number {i}."}]
        chunks = list(chat(client, messages=messages, stream=True, max_tokens=24, extra_body={"queue_updates": True}))
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert all(pool.map(words, range(24)))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_log_probabilities(client, stream):
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=6, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert 1 <= len(tokens) <= 6
    for token in tokens:
        assert token.logprob <= 0 and bytes(token.bytes).decode(errors="replace") == token.token
        top = [alternative.logprob for alternative in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert sum(map(math.exp, top)) <= 1.001
        assert math.isclose(token.logprob, top[0], abs_tol=1e-4), "greedy takes the likeliest"


def test_a_stop_text_ends_the_answer(client):
    answer = chat(client, stop=["Paris"])
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in answer.choices[0].message.content
    assert chat(client, stop="Paris").choices[0].message.content == answer.choices[0].message.content


def test_stop_token_ids_end_the_answer_but_not_before_min_tokens(client):
    # A bias of 100 makes this token the next one wherever it is not banned.
    terms = {"logit_bias": {"504": 100}, "extra_body": {"stop_token_ids": [504]}}
    answer = chat(client, **terms)
    assert answer.choices[0].message.content == "" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 1
    terms["extra_body"]["min_tokens"] = 6
    answer = chat(client, **terms)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == 7
    chunks = list(chat(client, stream=True, **terms))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content != ""
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, extra_body={"stop_token_ids": [10**6]})
    assert error.value.param == "stop_token_ids"


def test_n_makes_two_choices_of_one_prompt(client):
    one, two = chat(client, n=1, max_tokens=8), chat(client, n=2, max_tokens=8, temperature=1.0)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    indexes = {choice.index for chunk in chat(client, n=2, max_tokens=8, stream=True) for choice in chunk.choices}
    assert indexes == {0, 1}


def test_a_seed_gives_the_same_answer_again(client):
    def story(seed):
        messages = [{"role": "user", "content": "Invent a name for a star ship and describe it."}]
        # Reuse of cached cells changes the shape of the first batch, and with it the last bits of the scores.
        answer = chat(client, messages=messages, seed=seed, temperature=1.5, max_tokens=40, extra_body={"cache_prompt": False})
        return answer.choices[0].message.content

    assert story(11) == story(11)
    assert story(11) != story(12)


def test_max_tokens_is_a_bound_and_says_length(client):
    answer = chat(client, max_completion_tokens=3, max_tokens=None, messages=[{"role": "user", "content": "Count to one hundred."}])
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def test_parts_and_the_developer_role_are_understood(client):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {"role": "user", "content": [{"type": "text", "text": CAPITAL[0]["content"]}]},
    ]
    assert "Paris" in chat(client, messages=messages).choices[0].message.content


def test_completions_continue_text_and_tokens(client):
    answer = client.completions.create(model="default", prompt="The capital of France is", max_tokens=8, temperature=0, logprobs=2)
    (choice,) = answer.choices
    assert "Paris" in choice.text and answer.object == "text_completion"
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.top_logprobs[0]) == 2
    streamed = client.completions.create(model="default", prompt="The capital of France is", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
    several = client.completions.create(model="default", prompt=["One, two,", "The sun is"], max_tokens=2, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]
    tokens = client.completions.create(model="default", prompt=[504, 2364], max_tokens=2)
    assert tokens.usage.prompt_tokens == 2


def test_an_answer_follows_its_schema(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "population": {"type": "integer", "minimum": 0, "maximum": 10**9}},
        "required": ["city", "population"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    (choice,) = chat(client, response_format=form, max_tokens=100).choices
    answer = json.loads(choice.message.content)
    assert choice.finish_reason == "stop" and sorted(answer) == ["city", "population"] and isinstance(answer["population"], int)
    streamed = chat(client, response_format={"type": "json_object"}, max_tokens=60, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed).startswith("{")


def test_an_unknown_model_is_a_not_found_error(client):
    with pytest.raises(openai.NotFoundError) as error:
        chat(client, model="gpt-4o")
    assert error.value.code == "model_not_found" and error.value.param == "model"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": "hello"}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"stop": 5}, "stop"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages[0].content[0].type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_a_wrong_field_is_a_bad_request_error_that_names_it(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **fields)
    assert error.value.param == param and error.value.code
    with pytest.raises(openai.BadRequestError):
        chat(client, stream=True, **fields)


def test_a_prompt_that_is_too_long_is_a_bad_request_error_with_its_numbers(client):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, messages=[{"role": "user", "content": "word " * 50_000}])
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    assert error.value.body["n_prompt_tokens"] >= error.value.body["n_ctx"]


def test_leaving_a_stream_does_not_disturb_the_next_request(client):
    stream = chat(client, stream=True, max_tokens=200, messages=[{"role": "user", "content": "Tell me a long story."}])
    next(iter(stream))
    stream.close()
    assert "Paris" in chat(client).choices[0].message.content
