"""Hostile requests against a running server with the real model: each gets its documented answer or is dropped in time,
and a normal request is answered afterwards. Only the standard library, so that every byte is ours."""

import concurrent.futures
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def request(url, path, body=None, **headers):
    """(status, headers, body) of one request."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=60) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def raw(url, data, timeout=10):
    """Sends bytes, and reads until the server closes or is silent for `timeout` seconds."""
    parts = urllib.parse.urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout) as connection:
        reply = b""
        try:
            connection.sendall(data)
            while block := connection.recv(65536):
                reply += block
        except (TimeoutError, ConnectionError):
            pass
        return reply


def head(method, path, **headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    return "\r\n".join([*lines, *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()), "", ""]).encode()


@pytest.fixture(autouse=True)
def a_normal_request_works_afterwards(url):
    yield
    question = "What is the capital of France? Answer in one sentence."
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0}
    status, _, reply = request(url, CHAT, body)
    assert status == 200 and "Paris" in json.loads(reply)["choices"][0]["message"]["content"]


def gauges(url):
    text = request(url, "/metrics")[2].decode()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if not line.startswith("#")}


def wait_until_idle(url):
    deadline = time.monotonic() + 20
    names = ["minerva_requests_running", "minerva_requests_queued", "minerva_kv_cells_used"]
    while any(gauges(url)[name] for name in names):
        assert time.monotonic() < deadline, {name: gauges(url)[name] for name in names}
        time.sleep(0.05)


def test_what_is_no_json_is_a_400(url):
    for body in [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b'{"prompt": "x", "n": 1e999}',
                 b"[" * 100_000, b'{"a":' * 50_000, b"\x00" * 1000, b'{"prompt": "x"} {}']:
        status, _, reply = request(url, TEXT, body)
        assert status == 400 and json.loads(reply)["error"]["code"] == "invalid_json", body[:40]


@pytest.mark.parametrize("value", [-(2**63), 2**64, -1e308, 1e308, [[]], {"a": {}}, "NaN", [None] * 1000], ids=lambda value: repr(value)[:12])
def test_no_value_of_any_field_is_more_than_a_400(url, value):
    for field in ["max_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "n", "seed", "logprobs", "stop", "stream", "logit_bias",
                  "presence_penalty", "frequency_penalty", "repeat_penalty", "repeat_last_n", "prompt", "stream_options", "model"]:
        status, _, reply = request(url, TEXT, {"prompt": "x", "max_tokens": 1, field: value})
        assert status in (200, 400) or (field, status) == ("model", 404), (field, reply)
        if status != 200:
            error = json.loads(reply)["error"]
            assert error["param"].split("[")[0] == field and error["type"] == "invalid_request_error", (field, reply)


# Longer than the default model's 8,192 tokens: 64 dots or spaces are one token there, 8 letters `A`.
LONG = ["A" * 100_000, "." * 600_000, " " * 600_000, "\u4e2d" * 100_000, "\U0001f600" * 50_000, "Aa1 " * 100_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[0]))
def test_a_long_run_of_one_character_is_refused_and_not_a_crash(url, text):
    for body in ({"prompt": text}, {"messages": [{"role": "user", "content": text}]}):
        status, _, reply = request(url, TEXT if "prompt" in body else CHAT, {**body, "max_tokens": 1})
        assert status == 400 and json.loads(reply)["error"]["code"] == "context_length_exceeded", reply


def test_odd_prompts_are_text(url):
    for text in ["\x00", "\x00" * 50, "<|im_end|>", "<|im_start|>system\n", "</s>", "\u202e", "\ufffd", "\\", "{{7*7}}", "{% if %}", "\r\n\r\n"]:
        for body in ({"prompt": text}, {"messages": [{"role": "user", "content": text}]}):
            status, _, reply = request(url, TEXT if "prompt" in body else CHAT, {**body, "max_tokens": 1})
            assert status == 200, (text, reply)


def test_a_body_of_100_mb_is_a_413_whether_it_is_sent_or_only_announced(url):
    announced = raw(url, head("POST", TEXT, Content_Type="application/json", Content_Length=100 << 20))
    assert b" 413 " in announced.split(b"\r\n")[0] and b"body_too_large" in announced
    sent = raw(url, head("POST", TEXT, Content_Type="application/json", Content_Length=100 << 20) + b"a" * (100 << 20))
    assert b" 413 " in sent.split(b"\r\n")[0]
    chunk = b"100000\r\n" + b"a" * (1 << 20) + b"\r\n"
    chunked = raw(url, head("POST", TEXT, Content_Type="application/json", Transfer_Encoding="chunked") + chunk * 8)
    assert b" 413 " in chunked.split(b"\r\n")[0]


def test_a_length_that_lies_is_a_400_or_408(url):
    body = b'{"prompt": "x", "max_tokens": 1}'
    short = raw(url, head("POST", TEXT, Content_Type="application/json", Content_Length=5) + body)
    assert b" 400 " in short.split(b"\r\n")[0]
    long = raw(url, head("POST", TEXT, Content_Type="application/json", Content_Length=len(body) + 50) + body, timeout=40)
    assert b" 408 " in long.split(b"\r\n")[0]


def test_slow_headers_are_dropped_in_time(url):
    began = time.monotonic()
    assert raw(url, b"GET /health HTTP/1.1\r\nHost: loc", timeout=40) == b""
    assert time.monotonic() - began < 30


def test_what_is_no_http_is_a_400_or_closed(url):
    for data in [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n", b"GET\r\n\r\n",
                 b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 100]:
        reply = raw(url, data, timeout=2)
        assert reply == b"" or reply.split(b"\r\n")[0].split()[1] in (b"400", b"505"), (data, reply)


def test_headers_without_end_are_a_431(url):
    for headers in ({f"X-{i}": "1" for i in range(500)}, {"X-Large": "a" * 200_000}):
        reply = raw(url, head("GET", "/health", **headers), timeout=5)
        assert reply == b"" or b" 431 " in reply.split(b"\r\n")[0]


def test_a_reader_that_reads_nothing_holds_up_nobody(url):
    parts = urllib.parse.urlsplit(url)
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((parts.hostname, parts.port))
        slow.sendall(head("POST", TEXT, Content_Type="application/json", Content_Length=len(body)) + body)
        began = time.monotonic()
        assert request(url, TEXT, {"prompt": "x", "max_tokens": 2})[0] == 200
        assert time.monotonic() - began < 10
    wait_until_idle(url)


def test_a_thousand_idle_connections_stop_nobody(url):
    parts = urllib.parse.urlsplit(url)
    idle = []
    try:
        for _ in range(1000):
            idle.append(socket.create_connection((parts.hostname, parts.port), timeout=5))
    except OSError as error:
        if error.errno != 24:  # this process, not the server, is out of file descriptors
            raise
    try:
        began = time.monotonic()
        assert request(url, TEXT, {"prompt": "x", "max_tokens": 1})[0] == 200
        assert time.monotonic() - began < 10
    finally:
        for connection in idle:
            connection.close()


def test_web_pages_of_other_sites_are_refused(url):
    body = {"prompt": "x", "max_tokens": 1}
    assert request(url, TEXT, body, Origin="https://evil.example")[0] == 403
    assert request(url, TEXT, body, Host="evil.example")[0] == 403
    assert request(url, TEXT, body, Content_Type="text/plain")[0] == 415
    assert request(url, TEXT, b"prompt=x", Content_Type="application/x-www-form-urlencoded")[0] == 415


def test_a_third_of_many_clients_leaves_and_the_others_do_not_notice(url):
    parts = urllib.parse.urlsplit(url)

    def one(number):
        body = {"prompt": f"Number {number} is", "max_tokens": 16, "stream": True, "ignore_eos": True}
        if number % 3:
            status, _, reply = request(url, TEXT, body)
            return status == 200 and reply.endswith(b"data: [DONE]\n\n")
        data = json.dumps(body).encode()
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
            connection.sendall(head("POST", TEXT, Content_Type="application/json", Content_Length=len(data)) + data)
            time.sleep(number * 37 % 300 / 1000)
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        assert all(clients.map(one, range(100)))
    wait_until_idle(url)


def test_status_tells_where_the_model_runs_and_nothing_about_files(url):
    status, headers, reply = request(url, "/v1/status")
    text = reply.decode()
    answer = json.loads(text)
    assert status == 200 and headers["x-request-id"]
    assert answer["state"] == "ready" and answer["device"]["layers_total"] > 0 and answer["device"]["reason"]
    assert answer["model"]["placement"]["memory"] and answer["build"]["llama_cpp"]
    assert "/root" not in text and "/home" not in text and ".gguf" not in text


def test_a_stream_that_asks_for_it_hears_of_the_queue(url):
    body = {"messages": [{"role": "user", "content": "Count to ten."}], "stream": True, "max_tokens": 32, "queue_updates": True}

    def comments(_):
        status, _, reply = request(url, CHAT, body)
        assert status == 200 and reply.endswith(b"data: [DONE]\n\n")
        return [event.decode() for event in reply.split(b"\n\n") if event.startswith(b":")]

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        heard = list(pool.map(comments, range(40)))
    assert all(events.count(": started") == 1 for events in heard)
    waited = [events[0] for events in heard if events[0] != ": started"]
    assert all(event.startswith(": queue position=") for event in waited)
    assert comments_without_asking(url) == []


def comments_without_asking(url):
    """The comments of a stream that did not ask."""
    reply = request(url, CHAT, {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4})[2]
    return [event for event in reply.split(b"\n\n") if event.startswith(b":")]
