"""Downloads from correct and faulty servers, which the tests run on 127.0.0.1."""

import concurrent.futures
import errno
import functools
import hashlib
import http.server
import os
import select
import threading
import types

import numpy as np
import pytest

import utils
from tests.conftest import DATA, assert_same_params, contents, flipped, need, one_line_error, set_free_space
from utils import load_encoder_hparams_and_params
from weights import download
from weights.download import ATTEMPTS, download_file
from weights.releases import DATA_FILE, RELEASED

MIB = 2**20
BODY = np.random.default_rng(0).bytes(3 * MIB + 12_345)
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = bytes(len(BODY))  # of the same length
SMALL_FILES = [name for name in RELEASED["124M"] if name != DATA_FILE]
ERROR_PAGE = b'<?xml version="1.0" encoding="utf-8"?>\n<Error><Code>BlobNotFound</Code></Error>\n'


# The mirror


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files`, bytes by path. The first requests are answered by one of `answers` each, the rest by `usual`.

    requests has the path and the Range header of each request.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.requests, self.answers, self.usual = {}, [], [], serve

    def handle_error(self, request, client_address):
        """Ignore clients that disconnect early."""

    def paths(self):
        return [path for path, _ in self.requests]

    def ranges(self):
        return [asked for _, asked in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        self.server.requests.append((self.path, self.headers["Range"]))
        answer = self.server.answers.pop(0) if self.server.answers else self.server.usual
        answer(self)

    def reply(self, status, body=b"", length=None, **headers):
        """length is the Content-Length if it is not the body's; "" sends none."""
        self.send_response(status)
        headers |= {"Content_Length": len(body) if length is None else length, "Connection": "close"}
        for name, value in headers.items():
            if value != "":
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def serve(handler, limit=None, ranges=True, length=None):
    """Send the file, or the requested range of it; close the connection after `limit` bytes."""
    data = handler.server.files.get(handler.path)
    if data is None:
        return handler.reply(404, ERROR_PAGE)
    asked = handler.headers["Range"] if ranges else None
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if asked and start >= len(data):
        return handler.reply(416, Content_Range=f"bytes */{len(data)}")
    length = len(data) - start if length is None else length
    content_range = f"bytes {start}-{len(data) - 1}/{len(data)}" if asked else ""
    return handler.reply(206 if asked else 200, data[start:][:limit], length, Content_Range=content_range)


def status(code, body=ERROR_PAGE, **options):
    return lambda handler: handler.reply(code, body, **options)


def cut_after(n_bytes, **options):
    return functools.partial(serve, limit=n_bytes, **options)


def stall_after(n_bytes):
    """Send the rest after two seconds, or when the client has disconnected."""

    def answer(handler):
        serve(handler, limit=n_bytes)
        select.select([handler.connection], [], [], 2)
        handler.wfile.write(handler.server.files[handler.path][n_bytes:])

    return answer


@pytest.fixture
def mirror(monkeypatch):
    server = Mirror()
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    server.files["/file"] = BODY
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses in seconds that download.py asked for; none of them is made. No proxy stands in the way."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    waited = []
    monkeypatch.setattr(download, "time", types.SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def fetch(mirror, tmp_path):
    """Download the mirror's file to tmp_path/file; part is what an earlier run left."""

    def download_with(part=None, **options):
        if part is not None:
            (tmp_path / "file.part").write_bytes(part)
        download_file(f"{mirror.url}/file", str(tmp_path / "file"), **options)

    return download_with


def serve_range(start):
    """Send the bytes from start on, whatever the request was."""
    return lambda handler: handler.reply(206, BODY[start:], Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")


# Downloads that succeed


def case(*answers, usual=serve, starts=(0,), **options):
    """starts are the first bytes of the ranges that must be requested, None for any two requests."""
    return answers, usual, starts, options


KNOWN = {"size": len(BODY), "sha256": SHA256}
FEW = 5 * 2**14  # bytes: whole chunks, since an incomplete one is lost when the connection breaks
WITHOUT_RANGE = functools.partial(serve, ranges=False)
CUT, CUT_WITHOUT_RANGE = cut_after(FEW), cut_after(FEW, ranges=False)
SUCCESSES = {
    "whole": case(),
    "length is unknown": case(usual=functools.partial(serve, length="")),
    "length is no number": case(usual=functools.partial(serve, length="abc"), **KNOWN),
    "redirected": case(lambda handler: handler.reply(302, Location="/file"), starts=[0, 0]),
    "part of an earlier run": case(part=BODY[:MIB], starts=[MIB], **KNOWN),
    "part, server without Range": case(usual=WITHOUT_RANGE, part=OTHER[:MIB], starts=[MIB]),
    "part complete": case(part=BODY, starts=[len(BODY)], **KNOWN),
    "part too long": case(part=BODY + b"x", starts=[len(BODY) + 1, 0]),
    "Range refused without a length": case(status(416), part=BODY, starts=[len(BODY), 0]),
    "breaks twice": case(CUT, CUT, starts=[0, FEW, 2 * FEW], **KNOWN),
    "breaks twice without Range": case(CUT_WITHOUT_RANGE, CUT_WITHOUT_RANGE, usual=WITHOUT_RANGE, starts=[0, FEW, FEW]),
    "breaks, shown by the size only": case(cut_after(MIB, length=""), starts=[0, MIB], size=len(BODY)),
    "announces too much at first": case(functools.partial(serve, length=len(BODY) + 100), starts=None),
    "fails and keeps the part": case(status(500), status(503), status(429), part=BODY[:MIB], starts=[MIB] * 4),
    **{f"sends from {n}": case(serve_range(n), part=BODY[:MIB], starts=None) for n in (0, 10, 2 * MIB)},
    **{f"status {code}": case(status(code), status(code), starts=[0] * 3) for code in (408, 429, 500, 502, 503)},
}


@pytest.mark.parametrize("how", SUCCESSES)
def test_file_is_downloaded_whole(mirror, fetch, tmp_path, how):
    answers, mirror.usual, starts, options = SUCCESSES[how]
    mirror.answers = list(answers)
    fetch(**options)
    assert contents(tmp_path) == {"file": BODY}
    if starts is None:
        assert len(mirror.requests) == 2
    else:
        assert mirror.ranges() == [f"bytes={n}-" if n else None for n in starts]


def test_stalled_connection_is_closed(mirror, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.2))
    mirror.answers = [stall_after(0), stall_after(MIB)]
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges() == [None, None, f"bytes={MIB}-"]


# Downloads that fail


def test_pauses_between_attempts_double_until_new_bytes_arrive(mirror, fetch, tmp_path, pauses):
    mirror.answers, mirror.usual = [status(503), status(503), cut_after(MIB)], cut_after(0)
    with one_line_error(f"{mirror.url}/file", "run the same command again", "GPT2_BASE_URL"):
        fetch()
    assert contents(tmp_path) == {"file.part": BODY[:MIB]}
    assert pauses == [1, 2, 1, 2, 4, 8]
    assert len(mirror.requests) == 2 + ATTEMPTS

    mirror.usual = serve
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges()[-1] == f"bytes={MIB}-"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "127.0.0.1:9/x", "example/x", "http://"])
def test_only_a_valid_url_is_tried_again(tmp_path, pauses, url):
    is_valid = url == "http://127.0.0.1:9/x"  # where nothing listens
    words = ["refused", "check the network", "run the same command again"] if is_valid else []
    with one_line_error(url, "GPT2_BASE_URL", *words):
        download_file(url, str(tmp_path / "file"))
    assert contents(tmp_path) == {}
    assert len(pauses) == (ATTEMPTS - 1 if is_valid else 0)


def break_at_two_bytes(handler):
    """Send 1 and 2 MiB in turns, without Range, and nothing after 20 requests."""
    n = len(handler.server.requests)
    serve(handler, MIB * (1 + n % 2) * (n <= 20), ranges=False)


SHORT = functools.partial(serve, ranges=False, length=len(BODY) + 100)
OTHERS = [BODY[:-1], BODY + b"\n", ERROR_PAGE, b""]
FAILURES = {  # the usual answer, size, words of the message, number of requests
    "shorter than announced": (SHORT, None, ["run the same command again"], ATTEMPTS),
    "breaks at two bytes": (break_at_two_bytes, None, ["run the same command again"], ATTEMPTS),
    "without a length": (status(200, BODY[:-1], length=""), len(BODY), ["run the same command again"], ATTEMPTS),
    **{f"status {code}": (status(code), None, [f" {code} "], 1) for code in (400, 401, 403, 404, 410)},
    **{f"status {code}": (status(code, b"", length=""), None, [], None) for code in (204, 300, 304)},
    **{
        f"{len(data)} bytes": (status(200, data), len(BODY), [f"{len(data)} bytes", f"{len(BODY)}"], 1)
        for data in OTHERS
    },
}


@pytest.mark.parametrize("how", FAILURES)
def test_wrong_answer_is_not_taken_for_the_file(mirror, fetch, tmp_path, how):
    mirror.usual, size, words, n_requests = FAILURES[how]
    with one_line_error(f"{mirror.url}/file", "GPT2_BASE_URL", *words):
        fetch(size=size)
    assert "file" not in contents(tmp_path)
    assert n_requests in (None, len(mirror.requests))


@pytest.mark.parametrize(("served", "part"), [(flipped(BODY), b""), (BODY, OTHER[:MIB])], ids=["flipped", "part"])
def test_file_of_another_hash_is_set_aside(mirror, fetch, tmp_path, served, part):
    mirror.files["/file"] = served
    with one_line_error("corrupt", SHA256, "run the same command"):
        fetch(part or None, sha256=SHA256)
    assert contents(tmp_path) == {"file.corrupt": part + served[len(part) :]}
    assert len(mirror.requests) == 1

    mirror.files["/file"] = BODY
    fetch(sha256=SHA256)
    assert contents(tmp_path) == {"file": BODY, "file.corrupt": part + served[len(part) :]}
    assert mirror.ranges()[1] is None


# The disk


@pytest.mark.parametrize("part", [b"", BODY[:MIB]], ids=["new", "resumed"])
def test_free_space_is_checked_before_the_download(mirror, fetch, tmp_path, monkeypatch, part):
    set_free_space(monkeypatch, len(BODY) - len(part) - 1)
    with one_line_error(str(tmp_path / "file"), "GB", "--models_dir"):
        fetch(part or None)
    assert contents(tmp_path) == ({"file.part": part} if part else {})
    assert len(mirror.requests) == 1
    set_free_space(monkeypatch, len(BODY) - len(part))
    fetch()
    assert contents(tmp_path) == {"file": BODY}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_disk_that_fills_up(mirror, fetch, tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with one_line_error(str(tmp_path / "file.part"), os.strerror(errno.ENOSPC), "--models_dir"):
        fetch()
    assert not (tmp_path / "file").exists()
    assert len(mirror.requests) == 1


# Whole models


@pytest.fixture
def release(mirror, tiny_release):
    """The mirror has the tiny model; returns its files by name."""
    files = contents(tiny_release)
    put(mirror, "tiny", files)
    return files


def put(mirror, model_size, files):
    mirror.files |= {f"/{model_size}/{name}": data for name, data in files.items()}


@pytest.fixture
def load(tmp_path):
    """Load a model of the models_dir tmp_path."""
    return lambda model_size="tiny": load_encoder_hparams_and_params(model_size, str(tmp_path))


def test_model_is_downloaded_and_imported_once(mirror, release, load, tmp_path, tiny_tensors):
    assert_same_params(load()[2], tiny_tensors)
    assert sorted(mirror.paths()) == sorted(f"/tiny/{name}" for name in (*SMALL_FILES, DATA_FILE))
    found = contents(tmp_path / "tiny")
    assert {name: found[name] for name in release} == release
    assert set(found) - set(release) == {"model.safetensors", "config.json"}

    mirror.requests.clear()
    assert_same_params(load()[2], tiny_tensors)
    (tmp_path / "tiny" / DATA_FILE).unlink()
    assert_same_params(load()[2], tiny_tensors)
    assert mirror.requests == []


def test_model_that_the_mirror_lacks_leaves_no_folder(mirror, load, tmp_path):
    with one_line_error(f"{mirror.url}/unknown/", "404"):
        load("unknown")
    assert not (tmp_path / "unknown").exists()
    assert len(mirror.requests) == 1


# Corrupt models


DAMAGES = {
    "data flipped": (DATA_FILE, flipped),
    "index a page": ("model.ckpt.index", lambda data: ERROR_PAGE),
    "checkpoint of another name": ("checkpoint", lambda data: b'model_checkpoint_path: "other"\n'),
    "vocabulary cut": ("encoder.json", lambda data: data[:-20]),
    "merges a page": ("vocab.bpe", lambda data: ERROR_PAGE),
    "hparams a page": ("hparams.json", lambda data: ERROR_PAGE),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_corrupt_file_is_set_aside_and_downloaded_again(mirror, release, load, tmp_path, tiny_tensors, name, damage):
    mirror.files[f"/tiny/{name}"] = damage(release[name])
    with one_line_error(str(tmp_path / "tiny" / name), "corrupt", "run the same command again"):
        load()
    found = contents(tmp_path / "tiny")
    assert found[f"{name}.corrupt"] == damage(release[name])
    assert not {name, "model.safetensors"} & set(found)

    mirror.files[f"/tiny/{name}"] = release[name]
    mirror.requests.clear()
    assert_same_params(load()[2], tiny_tensors)
    assert mirror.paths() == [f"/tiny/{name}"]


# OpenAI's names


SAME_VALUES = b'{"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}'.ljust(90)


@pytest.mark.parametrize(
    ("hparams", "words", "left"),
    [(b"{}", "the original has 90", []), (SAME_VALUES, "corrupt", ["hparams.json.corrupt"])],
)
def test_other_bytes_under_openais_name_are_refused(mirror, load, tmp_path, monkeypatch, hparams, words, left):
    set_free_space(monkeypatch, 10**12)
    put(mirror, "124M", {"hparams.json": hparams})
    with one_line_error("/124M/hparams.json", words):
        load("124M")
    assert len(mirror.requests) == 1
    assert [path.name for path in (tmp_path / "124M").glob("*")] == left


def test_openais_files_are_accepted_and_another_data_file_is_not(mirror, load, tmp_path, monkeypatch):
    """The six small files of 124M as OpenAI serves them; the copy of hparams.json may lack the newline, as in 117M."""
    set_free_space(monkeypatch, 10**12)
    files = {name: need(DATA / "gpt2" / name).read_bytes() for name in SMALL_FILES}
    files["hparams.json"] = files["hparams.json"].rstrip(b"\n") + b"\n"
    put(mirror, "124M", files | {DATA_FILE: OTHER})
    with one_line_error(DATA_FILE, str(len(OTHER)), "497759232"):
        load("124M")
    assert contents(tmp_path / "124M") == files


def test_free_space_for_the_model_is_checked_before_any_download(mirror, load, tmp_path, monkeypatch):
    """497,759,232 bytes to download and 497,759,232 to import."""
    set_free_space(monkeypatch, 900_000_000)
    with one_line_error("1.00 GB", "0.90 GB", "--models_dir"):
        load("124M")
    assert mirror.requests == []
    assert not (tmp_path / "124M").exists()


# Two loads at once


def test_second_load_waits_for_the_first(mirror, release, load, tiny_tensors, monkeypatch):
    said, waiting = [], threading.Event()

    def say(message):
        said.append(message.split()[0])
        if said[-1] == "waiting":
            waiting.set()

    monkeypatch.setattr(utils, "say", say)
    mirror.answers = [lambda handler: waiting.wait(60) and serve(handler)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for loaded in [pool.submit(load), pool.submit(load)]:
            assert_same_params(loaded.result()[2], tiny_tensors)
    assert sorted(mirror.paths()) == sorted(f"/tiny/{name}" for name in release)
    assert sorted(said) == ["downloading", "importing", "waiting"]
