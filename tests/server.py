"""A server in a thread of the tests, and a client that is nothing but sockets."""

import contextlib
import http.client
import json
import threading
import time
import types

import numpy as np

from cli.serve import listen, make_config
from engines.instance import new_instance
from tests.programs import SECONDS

OPTIONS = {"engine": "numpy", "dtype": "float32", "api_key": None, "max_rows": 4, "max_queue": 64, "timeout": 60.0}
OPTIONS |= {"host": "127.0.0.1", "is_loopback": True, "allow_origin": None}


class Gate:
    """A model whose passes wait until the test lets them through."""

    def __init__(self):
        self.model, self.passes = new_instance(), threading.Semaphore(0)
        self.KVCache, self.is_broken = self.model.KVCache, False

    def gpt2(self, *arguments, **options):
        assert self.passes.acquire(timeout=SECONDS)
        logits = self.model.gpt2(*arguments, **options)
        return logits * np.nan if self.is_broken else logits


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def serving(models_dir, model_size="tiny", model=None, **options):
    """Yield the port of a server. model: replaces the model that generates."""
    import uvicorn

    from cli.serve import make_app

    options = types.SimpleNamespace(**OPTIONS | {"models_dir": str(models_dir), "model_size": model_size} | options)
    app, batch = make_app(options)
    batch.batch.model = model or batch.batch.model
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(make_config(app))
        thread = threading.Thread(target=server.run, args=[[listener]])
        batch.start()
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield types.SimpleNamespace(port=listener.getsockname()[1], app=app, batch=batch)
        finally:
            server.should_exit = server.force_exit = True
            batch.stop()
            thread.join()
            batch.join()


def ask(server, path="/v1/completions", body=None, method=None, headers=None):
    """Send a request; return the status, the headers and the body, parsed if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method or ("POST" if data is not None else "GET"), path, data, headers or {})
        answer = connection.getresponse()
        content = answer.read()
    is_json = answer.headers.get_content_type() == "application/json"
    return answer.status, answer.headers, json.loads(content) if is_json else content.decode()


def complete(server, prompt, **options):
    """Return the choices of a completion."""
    status, _, answer = ask(server, body={"prompt": prompt} | options)
    assert status == 200, answer
    return answer["choices"]


def events(text):
    """The data of server-sent events: objects, then "[DONE]"."""
    *lines, last = text.split("\n\n")
    assert last == "" and all(line.startswith("data: ") for line in lines), text
    return [line if line == "[DONE]" else json.loads(line) for line in (line.removeprefix("data: ") for line in lines)]


def stream(server, prompt, **options):
    """Return the texts of a stream's events, by the index of the choice, after checking their shape."""
    status, headers, text = ask(server, body={"prompt": prompt, "stream": True} | options)
    assert (status, headers.get_content_type()) == (200, "text/event-stream"), text
    *chunks, done = events(text)
    assert done == "[DONE]"
    pieces, ended = {}, set()
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert choice["index"] not in ended
        pieces.setdefault(choice["index"], []).append(choice["text"])
        ended |= {choice["index"]} if choice["finish_reason"] else set()
    assert ended == pieces.keys()
    return pieces
