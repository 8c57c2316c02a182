"""The server: OpenAI's own client, other clients, the texts against transformers, and what must not break it."""

import concurrent.futures
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt2
from sampling import make_sampler
from tests.conftest import PROMPTS as ALL_PROMPTS
from tests.conftest import ROOT, TINY, their_logits
from tests.programs import SECONDS, assert_mistake, command, started
from tests.server import Gate, ask, complete, events, serving, stream, wait_until

pytest.importorskip("starlette", reason="starlette (requirements-serve.txt) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (requirements-serve.txt) is not installed")

from cli.serve import Traces
from serve import connection
from serve.choice import Choice
from serve.protocol import FIELDS, MAX_CHOICES

PROMPTS = [prompt for prompt in ALL_PROMPTS if "<|" not in prompt]  # transformers take it as the special token
GREEDY = {"temperature": 0, "max_tokens": 8}
ROMEO, ROMEO_TEXT = {"prompt": "ROMEO:", "temperature": 0, "max_tokens": 12}, "\nIf it be so, sir, I s"  # docs/cli.md
ENDLESS = {"n": MAX_CHOICES, "max_tokens": 100}  # generates for seconds


@pytest.fixture(scope="module")
def server(tiny_models_dir):
    with serving(tiny_models_dir) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai", reason="openai (requirements-dev.txt) is not installed")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any")


@pytest.fixture(scope="module")
def program(tiny_models_dir, tmp_path_factory):
    """serve.py in a process, with its address and the file of its messages."""
    log = tmp_path_factory.mktemp("serve") / "log"
    arguments = command("--model_size", "tiny", "--models_dir", tiny_models_dir, "--port", "0", script="serve.py")
    with log.open("wb") as f, started(arguments, stderr=f) as process:
        wait_until(lambda: b"serving" in log.read_bytes() or process.poll() is not None)
        words = log.read_text(encoding="utf-8").split()
        url = words[words.index("on") + 1]
        yield types.SimpleNamespace(url=url, port=int(url.rpartition(":")[2]), process=process, log=log)


# The texts


@pytest.mark.parametrize("prompt", PROMPTS)
def test_openais_client_gets_the_text_of_transformers(client, truth, tiny, prompt):
    answer = client.completions.create(model="tiny", prompt=prompt, **GREEDY)
    ids = tiny[0].encode(prompt) or tiny[0].start_ids()
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (truth(prompt), "length")
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(ids),
        "completion_tokens": 8,
        "total_tokens": len(ids) + 8,
    }
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")


def test_prompts_may_be_strings_ids_or_lists_of_them(client, truth, tiny):
    texts = [truth(prompt) for prompt in PROMPTS]
    ids = [tiny[0].encode(prompt) or tiny[0].start_ids() for prompt in PROMPTS]
    for prompts in (PROMPTS, ids):
        choices = client.completions.create(model="tiny", prompt=prompts, **GREEDY).choices
        assert [(choice.index, choice.text) for choice in choices] == list(enumerate(texts))
    assert client.completions.create(model="tiny", prompt=ids[3], **GREEDY).choices[0].text == texts[3]


def test_a_stream_has_the_same_text_and_the_same_usage(client, truth):
    options = {"model": "tiny", "prompt": PROMPTS[0], "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(**options, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == truth(PROMPTS[0])
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] in ([None, "length"], ["length"])
    assert {chunk.usage for chunk in chunks} == {None} and last.choices == []
    assert last.usage == client.completions.create(model="tiny", prompt=PROMPTS[0], **GREEDY).usage


def test_samples_are_those_of_gpt2_with_the_seeds(server, tiny):
    encoder, hparams, params = tiny
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.8}
    prompts, n = PROMPTS[:1] + PROMPTS[3:5], 3
    choices = complete(server, prompts, seed=7, n=n, max_tokens=12, **options)
    expected = [
        gpt2.generate(encoder.encode(prompt), params, hparams["n_head"], 12, sample=make_sampler(**options, seed=7 + i))
        for prompt in prompts
        for i in range(n)
    ]
    assert [choice["text"] for choice in choices] == list(map(encoder.decode, expected))
    streamed = stream(server, prompts, seed=7, n=n, max_tokens=12, **options)
    assert ["".join(streamed[i]) for i in range(len(choices))] == [choice["text"] for choice in choices]


@pytest.mark.parametrize("fixture", ["server", "program"])
def test_a_greedy_text_is_the_same_alone_and_in_a_full_batch(request, truth, fixture):
    """64 clients at once, each with a connection of its own, half of them with streams; the program has kernels."""
    server = request.getfixturevalue(fixture)
    tasks = [(prompt, n, is_stream) for prompt in PROMPTS for n in (1, 5, 30) for is_stream in (False, True)][:64]

    def text(prompt, n, is_stream):
        if is_stream:
            return "".join(stream(server, prompt, temperature=0, max_tokens=n)[0])
        return complete(server, prompt, temperature=0, max_tokens=n)[0]["text"]

    with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
        texts = list(pool.map(lambda task: text(*task), tasks))
    assert texts == [truth(prompt, n) for prompt, n, _ in tasks]


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[8], "a"])
def test_log_probabilities_are_those_of_transformers(server, tiny, theirs, prompt):
    """Of the prompt, with echo, and of the new tokens; the pieces of a stream have them too."""
    encoder = tiny[0]
    options = {"logprobs": 3, "echo": True, "max_tokens": 5, "temperature": 0}
    (choice,) = complete(server, prompt, **options)
    found, ids = choice["logprobs"], choice["logprobs"]["token_ids"]
    assert choice["text"] == encoder.decode(ids) and ids[:-5] == encoder.encode(prompt)
    logits = their_logits(theirs, [ids])[0].astype(np.float64)
    expected = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))  # -> [n_seq, n_vocab]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    of_tokens = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found["token_logprobs"][1:], of_tokens, rtol=1e-4, atol=1e-5)
    tops = [list(top.values()) for top in found["top_logprobs"][1:]]
    np.testing.assert_allclose(tops, -np.sort(-expected[:-1])[:, :3], rtol=1e-4, atol=1e-5)
    assert [found["tokens"][i + 1] for i in range(len(ids) - 6, len(ids) - 1)] == [
        next(iter(top)) for top in found["top_logprobs"][-5:]
    ]
    decoded = [len(encoder.decode(ids[:i]).rstrip("\N{REPLACEMENT CHARACTER}")) for i in range(len(ids))]
    assert all(offset <= n for offset, n in zip(decoded, found["text_offset"], strict=True))
    *chunks, _ = events(ask(server, body={"prompt": prompt, "stream": True} | options)[2])
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {name: list(itertools.chain(*(piece[name] for piece in pieces))) for name in found} == found


def test_a_prompt_alone_can_be_scored(server):
    """What lm-evaluation-harness asks for: no new token, or one that it ignores."""
    (alone,) = complete(server, PROMPTS[0], logprobs=1, echo=True, max_tokens=0)
    (longer,) = complete(server, PROMPTS[0], logprobs=1, echo=True, max_tokens=1, temperature=0)
    assert alone["text"] == PROMPTS[0]
    for name, values in alone["logprobs"].items():
        assert longer["logprobs"][name][: len(values)] == values


# Pieces


def pieces_of(encoder, ids, stop):
    """The pieces of a choice whose row has generated ids, and the number of ids when it stopped."""
    request = types.SimpleNamespace(seed=0, n=1, temperature=0, top_k=0, top_p=1, stop=stop, logprobs=None)
    choice = Choice(0, encoder, request)
    pieces = []
    for i in range(1, len(ids) + 1):
        row = types.SimpleNamespace(ids=ids[:i], stop_reason="length" if i == len(ids) else None)
        choice.update(row)
        pieces.append(choice.take(row.stop_reason)["text"])
        if row.stop_reason:
            break
    return pieces, i


@settings(deadline=None)
@given(data=st.data())
def test_pieces_never_end_in_a_character_or_in_a_stop_string(tiny, data):
    """Together they are the text up to the first stop string; none is part of a stop string that the next completes."""
    encoder = tiny[0]
    texts = st.text(alphabet="ab é你🤗\n", max_size=12).map(encoder.encode)
    ids = data.draw(
        st.lists(texts | st.lists(st.integers(0, TINY["n_vocab"] - 1)), min_size=1).map(
            lambda parts: list(itertools.chain(*parts))
        )
    )
    if not ids:
        return
    whole = encoder.decode(ids)
    begins = st.integers(0, len(whole) - 1)
    stop = data.draw(
        st.lists(begins.flatmap(lambda i: st.integers(i + 1, i + 5).map(lambda j: whole[i:j])), max_size=4)
    )
    pieces, n = pieces_of(encoder, ids, stop)
    assert n == next(
        (n for n in range(1, len(ids)) if any(s in complete_part(encoder, ids[:n]) for s in stop)), len(ids)
    )
    seen = encoder.decode(ids[:n]) if n == len(ids) else complete_part(encoder, ids[:n])
    assert "".join(pieces) == seen[: min((seen.find(s) for s in stop if s in seen), default=len(seen))]


def complete_part(encoder, ids):
    """The text of ids without bytes at the end that may become a character."""
    *pieces, _ = encoder.decode_stream(ids)
    return "".join(pieces)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_ends_the_text(server, truth, is_stream):
    text = truth(PROMPTS[0], 24)
    for start in range(0, len(text) - 4, 3):
        stop = text[start : start + 4]
        options = {"temperature": 0, "max_tokens": 24, "stop": [stop, "never"]}
        if is_stream:
            assert "".join(stream(server, PROMPTS[0], **options)[0]) == text[: text.find(stop)]
        else:
            (choice,) = complete(server, PROMPTS[0], **options)
            assert (choice["text"], choice["finish_reason"]) == (text[: text.find(stop)], "stop")


# Errors


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, ["not a JSON object"]),
        (b"[1]", 400, ["not a JSON object"]),
        (b"[" * 100_000, 400, ["not a JSON object"]),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, ["not a JSON object"]),
        ({"best_of": 3, "logit_bias": {"50256": -100}, "n": 1}, 400, ["'best_of', 'logit_bias'"]),
        ({"temperature": -1}, 400, ["temperature is -1", "from 0 to 2"]),
        (b'{"temperature": NaN}', 400, ["temperature is nan"]),
        ({"n": True}, 400, ["n is True", "an integer from 1"]),
        ({"max_tokens": 1.5}, 400, ["max_tokens is 1.5"]),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, ["stop is", "up to 4"]),
        ({"stop": ""}, 400, ["stop is ''"]),
        ({"prompt": []}, 400, ["prompt is []"]),
        ({"prompt": [[1], [True]]}, 400, ["prompt is"]),
        ({"prompt": [TINY["n_vocab"]]}, 400, ["400 is not a token id", "399"]),
        ({"prompt": [-1]}, 400, ["-1 is not a token id"]),
        (b'{"prompt": "\\ud800"}', 400, ["lone surrogate", "U+D800"]),
        (b'{"\\ud800": 1}', 400, ["does not support", r"'\ud800'"]),
        ({"prompt": "a" * 127, "max_tokens": 2}, 400, ["128"]),
        ({"prompt": "a " * 100_000}, 400, ["the context of 128"]),
        ({"prompt": ["a"] * 65, "n": 2}, 400, ["65 prompts times n = 2", "128"]),
        ({"stream_options": {"include_obfuscation": True}}, 400, ["include_usage"]),
        ({"model": "gpt-4"}, 404, ["tiny"]),
        (b'{"prompt": "' + b"a" * 2**20 + b'"}', 413, ["1048576 bytes"]),
    ],
)
def test_a_mistake_is_an_error_of_openais_shape(server, body, status, words):
    found, _, answer = ask(server, body=body)
    assert found == status and answer.keys() == {"error"}
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert [word for word in words if word not in answer["error"]["message"]] == [], answer


def test_fields_that_ask_for_nothing_are_accepted(server, truth):
    """Clients send the defaults of fields that they do not use."""
    nothing = {"best_of": None, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "suffix": None}
    assert complete(server, PROMPTS[0], **GREEDY, **nothing, user="me")[0]["text"] == truth(PROMPTS[0])


def test_openais_client_raises_its_own_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="not a chat model"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="a", best_of=2)
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.completions.create(model="gpt-4", prompt="a")
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_unknown_urls_and_methods_have_openais_shape_too(server):
    for path, method, status in (("/v1/engines", "GET", 404), ("/v1/completions", "GET", 405), ("/", "POST", 405)):
        found, _, answer = ask(server, path, method=method)
        assert found == status and answer["error"]["message"], path


@pytest.fixture(scope="module")
def locked(tiny_models_dir):
    """A server with a key that other machines can reach, and that a website may use."""
    options = {"api_key": "right", "is_loopback": False, "allow_origin": "https://friend.example"}
    with serving(tiny_models_dir, **options) as found:
        yield found


def test_a_wrong_key_is_401(locked):
    for path, body in (("/v1/models", None), ("/v1/completions", GREEDY), ("/explain", GREEDY)):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "right"},
            {"Authorization": "Bearer é"},
        ):
            status, _, answer = ask(locked, path, body, headers={k: v.encode() for k, v in headers.items()})
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert ask(locked, path, body, headers={"Authorization": "Bearer right"})[0] == 200
    assert ask(locked, "/")[0] == 200  # the page asks for the key


def test_a_foreign_host_or_origin_is_refused(server, locked):
    """DNS rebinding: a website whose name resolves to this machine. Cross-site requests: a website that posts here."""
    for headers in (
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://friend.example"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ):
        for path, body in (("/", None), ("/v1/models", None), ("/v1/completions", GREEDY)):
            status, answer_headers, answer = ask(server, path, body, headers=headers)
            assert (status, answer["error"]["type"]) == (403, "invalid_request_error"), headers
            assert "Access-Control-Allow-Origin" not in answer_headers
    for host in (f"localhost:{server.port}", "LOCALHOST", "127.0.0.1", "[::1]:80"):
        assert ask(server, body=GREEDY, headers={"Host": host, "Origin": f"http://{host}"})[0] == 200
    friend = {"Origin": "https://friend.example", "Authorization": "Bearer right", "Host": "any.example"}
    status, headers, _ = ask(locked, body=GREEDY, headers=friend)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, "https://friend.example")
    assert ask(locked, body=GREEDY, headers=friend | {"Origin": "https://evil.example"})[0] == 403


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["tiny", 1, 2])
)
JSON = st.deferred(
    lambda: SCALARS | st.lists(JSON, max_size=4) | st.dictionaries(st.text(max_size=9), JSON, max_size=4)
)
BODIES = st.dictionaries(st.sampled_from(list(FIELDS)) | st.text(max_size=9), JSON, max_size=6)


@settings(
    max_examples=int(os.environ.get("BAD_BODIES", "100")), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(body=BODIES.map(lambda body: json.dumps(body).encode()) | st.binary() | JSON.map(json.dumps).map(str.encode))
def test_no_body_makes_the_server_fail(server, body):
    for path in ("/v1/completions", "/explain"):
        status, _, answer = ask(server, path, body)
        assert status in (200, 400, 404, 413), answer
        assert status == 200 or answer["error"]["message"]


# Clients that leave, wait, or never end


@pytest.fixture
def gated():
    """A server with one row and a queue of one request whose passes the test controls; its tokens are characters."""
    gate = Gate()
    with serving(ROOT / "models", "shakespeare", model=gate, max_rows=1, max_queue=1) as server:
        server.gate = gate
        yield server
        gate.passes.release(10**6)


def send(server, **body):
    """Send a request without waiting for the answer; return the socket."""
    data = json.dumps({"prompt": "ROMEO:", "temperature": 0} | body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_its_row_and_its_place(gated, is_stream):
    batch = gated.batch
    first = send(gated, stream=is_stream, max_tokens=100)
    wait_until(lambda: batch.batch.rows)
    second = send(gated, stream=is_stream)
    wait_until(lambda: batch.waiting)
    status, headers, answer = ask(gated, body=GREEDY)
    assert (status, headers["Retry-After"], answer["error"]["code"]) == (429, "1", "queue_full")
    job = batch.batch.rows[0].key[0]
    second.close()
    wait_until(lambda: not batch.waiting)
    gated.gate.passes.release(3)
    first.close()
    wait_until(lambda: job.is_cancelled)
    gated.gate.passes.release(1000)
    assert complete(gated, **ROMEO)[0]["text"] == ROMEO_TEXT
    assert job.choices[0].n_generated < 20


def test_openais_client_tries_again_when_the_queue_is_full(gated):
    openai = pytest.importorskip("openai", reason="openai (requirements-dev.txt) is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{gated.port}/v1", api_key="any", max_retries=5)
    sockets = [send(gated, max_tokens=1)]
    wait_until(lambda: gated.batch.batch.rows)
    sockets.append(send(gated, max_tokens=1))
    wait_until(lambda: gated.batch.waiting)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.completions.create, model="shakespeare", **ROMEO)
        assert ask(gated, body=GREEDY)[0] == 429
        gated.gate.passes.release(100)
        assert answer.result().choices[0].text == ROMEO_TEXT


def test_a_pass_that_fails_ends_its_requests_and_no_others(gated, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(gated.gate, "gpt2", fail)
        for options in ({}, {"echo": True, "logprobs": 1}):  # in the batch, and while the request joins
            assert ask(gated, body=ROMEO | options)[0] == 500
    gated.gate.is_broken = True
    gated.gate.passes.release(2)  # of the prompt, and of a token
    status, _, answer = ask(gated, body=ROMEO)
    assert (status, answer["error"]["type"]) == (500, "server_error")
    gated.gate.passes.release()  # of the prompt
    assert ask(gated, body=ROMEO | {"echo": True, "logprobs": 1, "max_tokens": 0})[0] == 500
    gated.gate.passes.release(2)  # of the prompt, and of a token
    *_, last = events(ask(gated, body=ROMEO | {"stream": True})[2])
    assert last["error"]["type"] == "server_error"
    gated.gate.is_broken = False
    gated.gate.passes.release(100)
    assert complete(gated, **ROMEO)[0]["text"] == ROMEO_TEXT


def test_a_failure_is_500_and_its_message_which_may_quote_a_prompt_is_not_logged(tiny_models_dir, caplog):
    def broken(ids):
        raise ValueError(ids)

    with serving(tiny_models_dir) as server:
        server.app.explain = broken
        status, _, answer = ask(server, "/explain", {"prompt": [123, 321]})
    assert (status, answer["error"]["type"]) == (500, "server_error") and "321" not in answer["error"]["message"]
    (record,) = caplog.records
    assert "ValueError: [123, 321]" in caplog.text
    record.exc_text = None  # pytest's format of it
    logged = Traces().format(record)
    assert "321" not in logged and "in broken" in logged and "ValueError" in logged


def test_generation_ends_at_the_timeout(tiny_models_dir):
    with serving(tiny_models_dir, max_rows=1, timeout=0.2) as server:
        status, headers, answer = ask(server, body=ENDLESS)
        assert (status, headers["x-should-retry"]) == (504, "false") and "--timeout" in answer["error"]["message"]
        *_, last = events(ask(server, body=ENDLESS | {"stream": True})[2])
        assert "--timeout" in last["error"]["message"]
        wait_until(lambda: not server.batch.batch.rows)


@pytest.fixture
def impatient(tiny_models_dir, monkeypatch):
    monkeypatch.setattr(connection, "SECONDS", 0.3)
    with serving(tiny_models_dir) as server:
        yield server


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HT",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
        b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"',
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1/mo",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
    ],
)
def test_half_a_request_is_closed(impatient, sent):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=SECONDS) as sock:
        sock.sendall(sent)
        try:
            while sock.recv(2**16):
                pass
        except ConnectionResetError:
            pass
    assert complete(impatient, "a", max_tokens=1)


def test_further_connections_are_closed(impatient, monkeypatch):
    monkeypatch.setattr(connection, "SECONDS", SECONDS)
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 1)
    address = "127.0.0.1", impatient.port
    with socket.create_connection(address), socket.create_connection(address, timeout=SECONDS) as refused:
        assert refused.recv(1) == b""
    wait_until(lambda: complete(impatient, "a", max_tokens=1))


def test_a_client_that_does_not_read_is_disconnected(impatient):
    with send(impatient, stream=True, logprobs=20, **ENDLESS) as sock:
        wait_until(lambda: impatient.batch.batch.rows)
        job = impatient.batch.batch.rows[0].key[0]
        wait_until(lambda: job.pieces.qsize() > 99 or job.is_cancelled)  # the server has stopped to write
        sock.sendall(b"G")  # gives no more time
        wait_until(lambda: job.is_cancelled)
    assert sum(choice.n_generated for choice in job.choices) < ENDLESS["n"] * ENDLESS["max_tokens"]


def test_an_answer_may_take_longer_than_a_request_may(impatient):
    assert sum(len(texts) for texts in stream(impatient, "a", **ENDLESS).values()) > MAX_CHOICES


# The program


def test_curl_gets_a_completion_and_a_stream(program, truth):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = {"prompt": PROMPTS[0]} | GREEDY
    for data in (body, body | {"stream": True}):
        words = ["curl", "-sSN", f"{program.url}/v1/completions", "-d", json.dumps(data)]
        out = subprocess.run(words, check=True, capture_output=True, encoding="utf-8", timeout=SECONDS).stdout
        chunks = events(out)[:-1] if "stream" in data else [json.loads(out)]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == truth(PROMPTS[0])


def test_llm_gets_a_completion(program, truth, tmp_path):
    pytest.importorskip("llm", reason="llm (requirements-dev.txt) is not installed")
    entry = f"- model_id: mine\n  model_name: tiny\n  api_base: {program.url}/v1\n  completion: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry, encoding="utf-8")
    words = [sys.executable, "-m", "llm", "-m", "mine", "-o", "temperature", "0", "-o", "max_tokens", "8", "--no-log"]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
    done = subprocess.run(
        [*words, PROMPTS[0]], check=False, capture_output=True, encoding="utf-8", timeout=SECONDS, env=environment
    )
    assert (done.stdout.rstrip("\n"), done.returncode) == (truth(PROMPTS[0]).rstrip("\n"), 0), done.stderr


CLIENT = """
import socket, sys
sockets = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(8)]
for sock in sockets:
    sock.sendall(sys.argv[2].encode())
    sock.recv(100)
print("receiving", flush=True)
sys.stdin.read()
"""


def test_killed_clients_leave_no_work_behind(program, truth):
    """24 streams that would take minutes, of clients that are killed with SIGKILL."""
    data = json.dumps(ENDLESS | {"prompt": "a", "stream": True})
    request = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n{data}"
    for _ in range(3):
        with started([sys.executable, "-c", CLIENT, str(program.port), request], stdin=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"receiving\n"
    assert complete(program, PROMPTS[0], **GREEDY)[0]["text"] == truth(PROMPTS[0])


def test_the_log_has_no_prompt_and_a_signal_ends_the_program(program):
    """The last test of the program: its running requests end with it, and it exits with 0."""
    complete(program, "SECRET", max_tokens=1)
    ask(program, body=b'{"prompt": "SECRET\\ud800"}')
    ask(program, "/v1/models?SECRET")
    running = [send(program, **ENDLESS | {"prompt": "SECRET", "stream": True}) for _ in range(40)]
    assert all(sock.recv(12) == b"HTTP/1.1 200" for sock in running[:1])
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(SECONDS) == 0
    assert program.log.read_text(encoding="utf-8") == f"serving tiny on {program.url} (Ctrl-C stops)\n"


@pytest.mark.parametrize("is_busy", [False, True])
def test_ctrl_c_ends_the_program_with_0(tiny_models_dir, is_busy):
    """The second Ctrl-C does not wait for running requests."""
    arguments = command("--model_size", "tiny", "--models_dir", tiny_models_dir, "--port", "0", script="serve.py")
    with started(arguments) as process:
        port = int(re.search(rb"http://127.0.0.1:(\d+) ", process.stderr.readline())[1])
        if is_busy:
            sock = send(types.SimpleNamespace(port=port), stream=True, **ENDLESS)
            assert sock.recv(12) == b"HTTP/1.1 200"
            process.send_signal(signal.SIGINT)
            wait_until(lambda: not is_listening(port))
        process.send_signal(signal.SIGINT)
        assert (process.wait(SECONDS), process.stderr.read()) == (0, b"")


def is_listening(port):
    """Whether a connection succeeds; one that waits while the server closes its port is reset, not refused."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    except (ConnectionRefusedError, ConnectionResetError):
        return False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "jax"], ["--engine jax", "leave it out"]),
        (["--dtype", "bfloat16"], ["--dtype bfloat16"]),
        (["--port", "65536"], ["--port 65536", "65535"]),
        (["--host", "192.0.2.1"], ["192.0.2.1", "--host or --port"]),
        (["--max_rows", "65"], ["--max_rows", "64"]),
        (["--timeout", "0"], ["--timeout"]),
        (["--allow_origin", "https://example.com/"], ["--allow_origin", "https://example.com"]),
        (["--allow_origin", "*"], ["--allow_origin", "https://example.com"]),
        (["--allow_origin", ""], ["--allow_origin", "https://example.com"]),
        (["--model_size", ".."], ["'..'", "does not name a folder"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tiny_models_dir, capsys, options, words):
    from cli.serve import run

    code = run(["--models_dir", str(tiny_models_dir), "--port", "0", *options])
    assert_mistake((code, *capsys.readouterr()), *words, script="serve.py")


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://Example.com", "https://example.com"),
        ("https://example.com:443", "https://example.com"),
        ("http://localhost:80", "http://localhost"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abc", "chrome-extension://abc"),
    ],
)
def test_an_allowed_origin_is_as_browsers_send_it(text, origin):
    from cli.serve import parse_origin

    assert parse_origin(text) == origin


def test_a_port_in_use_is_one_line(server, tiny_models_dir, capsys):
    from cli.serve import run

    code = run(["--models_dir", str(tiny_models_dir), "--model_size", "tiny", "--port", str(server.port)])
    assert_mistake((code, *capsys.readouterr()), str(server.port), "in use", "another", script="serve.py")


def test_without_starlette_one_line_names_the_requirements(tiny_models_dir, capsys, monkeypatch):
    from cli.serve import run

    monkeypatch.setitem(sys.modules, "starlette", None)
    code = run(["--models_dir", str(tiny_models_dir), "--model_size", "tiny"])
    assert_mistake((code, *capsys.readouterr()), "starlette", "requirements-serve.txt", script="serve.py")
