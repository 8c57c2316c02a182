"""Downloads from correct and faulty servers, which the tests run on 127.0.0.1."""

import concurrent.futures
import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import json
import os
import resource
import select
import shutil
import socket
import threading
import types

import numpy as np
import pytest

import utils
from tests.conftest import DATA, TINY, assert_same_params, contents, flipped, need, one_line_error, set_free_space
from tests.programs import assert_mistake, run
from tests.random_model import write_byte_vocabulary
from training import dataset
from utils import load_encoder_hparams_and_params, load_gpt2_encoder
from weights import download
from weights.download import ATTEMPTS, download_file
from weights.errors import CorruptFile, UserError
from weights.names import n_params, tensor_shapes
from weights.releases import DATA_FILE, HPARAMS, RELEASED

MIB = 2**20
BODY = np.random.default_rng(0).bytes(3 * MIB + 12_345)
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = bytes(len(BODY))  # of the same length
SMALL_FILES = [name for name in RELEASED["124M"] if name != DATA_FILE]
ETAG = '"0x8D7"'
REMEDY = "set GPT2_BASE_URL to a mirror"
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


def serve(handler, limit=None, ranges=True, length=None, etag=ETAG, data=None):
    """Send the file, or the requested range of it; close the connection after `limit` bytes."""
    data = handler.server.files.get(handler.path) if data is None else data
    if data is None:
        return handler.reply(404, ERROR_PAGE)
    asked = handler.headers["Range"] if ranges and handler.headers["If-Range"] == etag else None
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if asked and start >= len(data):
        return handler.reply(416, Content_Range=f"bytes */{len(data)}", ETag=etag)
    length = len(data) - start if length is None else length
    content_range = f"bytes {start}-{len(data) - 1}/{len(data)}" if asked else ""
    return handler.reply(206 if asked else 200, data[start:][:limit], length, Content_Range=content_range, ETag=etag)


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
    """Download the mirror's file to tmp_path/file; part and etag are what an earlier run left."""

    def download_with(part=None, etag=ETAG, **options):
        if part is not None:
            (tmp_path / "file.part").write_bytes(part)
            (tmp_path / "file.etag").write_text(etag)
        download_file(f"{mirror.url}/file", str(tmp_path / "file"), **{"remedy": REMEDY} | options)

    return download_with


def serve_range(start):
    """Send the bytes from start on, whatever the request was."""
    return lambda handler: handler.reply(
        206, BODY[start:], Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}", ETag=ETAG
    )


# Downloads that succeed


def case(*answers, usual=serve, starts=(0,), **options):
    """starts are the first bytes of the ranges that must be requested, None for any two requests."""
    return answers, usual, starts, options


KNOWN = {"size": len(BODY), "sha256": SHA256}
FEW = 5 * 2**14  # bytes: whole chunks, since an incomplete one is lost when the connection breaks
WITHOUT_RANGE = functools.partial(serve, ranges=False)
CUT, CUT_WITHOUT_RANGE, CUT_WITHOUT_ETAG = (cut_after(FEW, **how) for how in ({}, {"ranges": False}, {"etag": ""}))
NEW_VERSION = functools.partial(serve, etag='"new"')
SUCCESSES = {
    "whole": case(),
    "length is unknown": case(usual=functools.partial(serve, length="")),
    "length is no number": case(usual=functools.partial(serve, length="abc"), **KNOWN),
    "redirected": case(lambda handler: handler.reply(302, Location="/file"), starts=[0, 0]),
    "part of an earlier run": case(part=BODY[:MIB], starts=[MIB], **KNOWN),
    "part, server without Range": case(usual=WITHOUT_RANGE, part=OTHER[:MIB], starts=[MIB]),
    "part without ETag": case(part=OTHER[:MIB], etag="", starts=[0]),
    "part with a weak ETag": case(usual=functools.partial(serve, etag='W/"1"'), part=OTHER, etag='W/"1"', starts=[0]),
    "part with an invalid ETag": case(part=OTHER[:MIB], etag='"a"\r\nb: "c"', starts=[0]),
    "part of an older version": case(usual=NEW_VERSION, part=OTHER[:MIB], starts=[MIB]),
    "part complete, of an older version": case(usual=NEW_VERSION, part=OTHER, starts=[len(BODY)]),
    "server ignores If-Range": case(serve_range(MIB), usual=NEW_VERSION, part=BODY[:MIB], etag='"old"', starts=None),
    "part corrupt": case(part=OTHER[:MIB], starts=[MIB, 0], **KNOWN),
    "part complete": case(part=BODY, starts=[len(BODY)], **KNOWN),
    "part too long": case(part=BODY + b"x", starts=[len(BODY) + 1, 0]),
    "Range refused without a length": case(status(416), part=BODY, starts=[len(BODY), 0]),
    "breaks twice": case(CUT, CUT, starts=[0, FEW, 2 * FEW], **KNOWN),
    "breaks twice without Range": case(CUT_WITHOUT_RANGE, CUT_WITHOUT_RANGE, usual=WITHOUT_RANGE, starts=[0, FEW, FEW]),
    "breaks twice without ETag": case(CUT_WITHOUT_ETAG, CUT_WITHOUT_ETAG, starts=[0, 0, 0]),
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


def test_pauses_between_attempts_double_until_new_bytes_arrive(mirror, fetch, tmp_path, pauses, capsys):
    mirror.answers, mirror.usual = [status(503), status(503), cut_after(MIB)], cut_after(0)
    with one_line_error(f"{mirror.url}/file", "run the same command again", REMEDY):
        fetch()
    assert contents(tmp_path) == {"file.part": BODY[:MIB], "file.etag": ETAG.encode()}
    assert pauses == [1, 2, 1, 2, 4, 8]
    assert len(mirror.requests) == 2 + ATTEMPTS
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition("; ")[2] for line in said] == [f"next attempt in {pause:.0f} s" for pause in pauses]
    assert f"{mirror.url}/file (the server answers 503 Service Unavailable)" in said[0]

    mirror.usual = serve
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges()[-1] == f"bytes={MIB}-"


LONG_HOST = f"http://{'x' * 300}/x"
URLS = ["127.0.0.1:9/x", "example/x", "http://", "http://a..b/x", LONG_HOST, "http://[::1/x", "ftp://127.0.0.1/x"]
UNREACHABLE = {"http://127.0.0.1:9/x": "refused", "http://nothing.invalid/x": "not known"}


@pytest.mark.parametrize("url", [*URLS, *UNREACHABLE])
def test_server_that_cannot_be_reached_is_reported_at_once(tmp_path, pauses, url, monkeypatch):
    def lookup(host, *args, **options):
        if host == "nothing.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found(host, *args, **options)

    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    words = [UNREACHABLE[url], "check the network", "run the same command again"] if url in UNREACHABLE else []
    with one_line_error(url, REMEDY, *words):
        download_file(url, str(tmp_path / "file"), remedy=REMEDY)
    assert contents(tmp_path) == {}
    assert pauses == []


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


def raw(reply):
    """Answer with these bytes."""
    return lambda handler: handler.wfile.write(reply)


def redirected(target):
    return lambda handler: handler.reply(302, Location=target)


def raw_with(*headers):
    return raw(b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"Connection: close", b"", BODY]))


ENCODED = functools.partial(status, 200, gzip.compress(BODY))
MALFORMED = {  # the answer to each request, words of the message
    "not HTTP": (raw(b"SSH-2.0-OpenSSH\x1b[31m\r\n"), "SSH-2.0"),
    "nothing": (raw(b""), "closed connection"),
    "escape codes in the reason": (raw(b"HTTP/1.1 404 \x1b[31mNot\x07 Found\r\n\r\n"), "Not"),
    "escape codes in the reason of an error": (raw(b"HTTP/1.1 503 \x1b[31mBusy\r\n\r\n"), "Busy"),
    "escape codes in Content-Range": (
        raw(b"HTTP/1.1 206 x\r\nContent-Range: bytes 5-\x1b[31m\r\nContent-Length: 0\r\n\r\n"),
        "Content-Range",
    ),
    "gzip": (ENCODED(Content_Encoding="gzip"), "encoded as gzip"),
    "unknown encoding": (ENCODED(Content_Encoding="\x1b[31m"), "encoded as"),
    "invalid chunks": (raw_with(b"Transfer-Encoding: chunked"), "run the same command again"),
    "two lengths": (raw_with(b"Content-Length: 5, 6"), "Content-Length"),
    "too many redirects": (redirected("/file"), "redirects"),
    **{f"redirected to {url[:20]}": (redirected(url), REMEDY) for url in (*URLS[2:], "http://\x1b[31m/", "file:///x")},
}


@pytest.mark.parametrize("how", MALFORMED)
def test_malformed_answer_is_reported_in_one_printable_line(mirror, fetch, tmp_path, how, capsys):
    mirror.usual, *words = MALFORMED[how]
    with one_line_error(f"{mirror.url}/file", *words) as error:
        fetch()
    assert str(error.value).isprintable()
    assert capsys.readouterr().err.replace("\n", "").isprintable()
    assert not any(contents(tmp_path).get(name) for name in ("file", "file.part"))

    mirror.usual = serve
    fetch()
    assert contents(tmp_path)["file"] == BODY


def test_malformed_headers_print_no_traceback(mirror, fetch, tmp_path, caplog):
    """urllib3 logs a warning with one, which Python prints where no logging is set up."""
    mirror.usual = raw_with(b"X-Bad\x1b[31m header without a colon", b"Content-Length: %d" % len(BODY))
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert caplog.records == []


def test_redirect_from_https_to_http_is_not_followed(tmp_path, monkeypatch):
    import requests

    sent = []

    def send(adapter, request, **options):
        sent.append(request.url)
        response = requests.Response()
        response.status_code, response.url, response.request = 302, request.url, request
        response.raw, response.headers["Location"] = types.SimpleNamespace(close=lambda: None), "http://127.0.0.1/file"
        response._content = b""
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with one_line_error("https://127.0.0.1/file", "redirects from https to http://127.0.0.1/file"):
        download_file("https://127.0.0.1/file", str(tmp_path / "file"), remedy=REMEDY)
    assert sent == ["https://127.0.0.1/file"]


def refuse(path):
    """A check that rejects the file by its content."""
    raise CorruptFile(path, "no version line")


@pytest.mark.parametrize(
    ("wrong", "word"), [({"sha256": SHA256}, SHA256), ({"check": refuse}, "no version line")], ids=["hash", "check"]
)
def test_file_that_is_rejected_is_set_aside(mirror, fetch, tmp_path, wrong, word):
    mirror.files["/file"] = flipped(BODY)
    with one_line_error("arrived corrupt", word, "file.corrupt", "run the same command", REMEDY) as error:
        fetch(**wrong)
    assert "part" not in str(error.value)
    assert contents(tmp_path) == {"file.corrupt": flipped(BODY)}
    assert len(mirror.requests) == 1

    mirror.files["/file"] = BODY
    fetch(sha256=SHA256)
    assert contents(tmp_path) == {"file": BODY, "file.corrupt": flipped(BODY)}
    assert mirror.ranges()[1] is None


# The disk


@pytest.mark.parametrize("part", [b"", BODY[:MIB]], ids=["new", "resumed"])
def test_free_space_is_checked_before_the_download(mirror, fetch, tmp_path, monkeypatch, part):
    set_free_space(monkeypatch, len(BODY) - len(part) - 1)
    with one_line_error(str(tmp_path / "file"), "MB", "--models_dir"):
        fetch(part or None)
    assert contents(tmp_path).get("file.part", b"") == part
    assert len(mirror.requests) == 1
    set_free_space(monkeypatch, len(BODY) - len(part))
    fetch()
    assert contents(tmp_path) == {"file": BODY}


def test_disk_that_fills_up(mirror, fetch, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with one_line_error(str(tmp_path / "file.part"), os.strerror(errno.EFBIG), "another --data_dir"):
            fetch(disk_remedy="choose another --data_dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "file").exists()
    assert len(mirror.requests) == 1


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_part_that_is_no_regular_file_is_refused(mirror, fetch, tmp_path, kind):
    part, other = tmp_path / "file.part", tmp_path / "other"
    other.write_bytes(b"the user's")
    {"link": lambda: part.symlink_to(other), "FIFO": lambda: os.mkfifo(part), "folder": part.mkdir}[kind]()
    with one_line_error(part, "not a regular file", "remove it"):
        fetch()
    assert other.read_bytes() == b"the user's"
    assert mirror.requests == []


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


def test_failed_download_leaves_no_folder(mirror, tmp_path, monkeypatch):
    with one_line_error(f"{mirror.url}/unknown/", "404", "check GPT2_BASE_URL"):
        load_encoder_hparams_and_params("unknown", str(tmp_path / "new" / "models"))
    monkeypatch.setattr(dataset, "TINYSHAKESPEARE", (f"{mirror.url}/text", 1, ""))
    with one_line_error(f"{mirror.url}/text", "404", "give the path of a copy"):
        dataset.read_dataset("tinyshakespeare", str(tmp_path / "data"))
    assert list(tmp_path.iterdir()) == []
    assert len(mirror.requests) == 2


def test_temporary_files_of_a_killed_import_are_removed(release, load, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / f".{'0' * 16}.tmp").write_bytes(b"part of model.safetensors")
    load()
    assert set(contents(tmp_path / "tiny")) == {*release, "model.safetensors", "config.json"}


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="Linux has folders that cannot be written")
@pytest.mark.parametrize("models_dir", ["/proc", "/proc/self", __file__])
def test_lock_that_cannot_be_created_is_an_error(models_dir):
    assert_mistake(run("Hello", f"--models_dir={models_dir}"), f"cannot write to {models_dir}", "--models_dir")


# Faults of the mirror, each of which one run without faults repairs


def fails(handler):
    handler.reply(503)


def sent(change):
    """Send change(the file's bytes), complete as far as the headers tell."""
    return lambda handler: handler.reply(200, change(handler.server.files[handler.path]))


def half(data):
    return data[: len(data) // 2]


def half_lines(data):
    return b"".join(half(data.splitlines(keepends=True)))


def replaced(old, new):
    return lambda data: data.replace(old, new, 1)


def with_hparams(**changes):
    return lambda data: json.dumps(json.loads(data) | changes).encode()


CHANGES = {
    "a page": lambda data: b"<html>\n<body>Not Found</body>\n</html>\n",
    "two words": lambda data: b"Not Found",
    "an error in JSON": lambda data: b'{"error": "no such file"}',
    "an empty object": lambda data: b"{}",
    "empty": lambda data: b"",
    "half": half,
    "half of the lines": half_lines,
    "flipped": lambda data: flipped(data, len(data) // 2),
    "zeros": lambda data: bytes(len(data)),
}
READ = [name for name in (*SMALL_FILES, DATA_FILE) if name != "model.ckpt.meta"]
FAULTS = {  # the answer by name of the file, None for any other file
    **{f"{name} {how}": {name: sent(change)} for name in READ for how, change in CHANGES.items()},
    **{f"all {how}": {None: sent(change)} for how, change in CHANGES.items()},
    **{f"all but hparams.json {how}": {"hparams.json": serve, None: sent(change)} for how, change in CHANGES.items()},
    "all gzip": {None: lambda handler: handler.reply(200, gzip.compress(b"{}"), Content_Encoding="gzip")},
    "all fail": {None: fails},
    "hparams of another model": {"hparams.json": sent(with_hparams(n_layer=3))},
    "hparams of a longer context": {"hparams.json": sent(with_hparams(n_ctx=256))},
    "hparams of a smaller vocabulary": {"hparams.json": sent(with_hparams(n_vocab=300))},
    "hparams of many layers": {"hparams.json": sent(with_hparams(n_layer=10**9))},
    "hparams of another model, the rest fails": {"hparams.json": sent(with_hparams(n_ctx=256)), None: fails},
    "merges cut, the rest fails": {"vocab.bpe": sent(half_lines), DATA_FILE: fails},
    "token renamed, the rest fails": {"encoder.json": sent(replaced(b'"the"', b'"xyz"')), "vocab.bpe": fails},
    "two ids equal": {"encoder.json": sent(replaced(b": 300,", b": 301,"))},
    "data flipped, then cut": {
        DATA_FILE: lambda handler: serve(handler, limit=2**15, data=flipped(handler.server.files[handler.path], 99))
    },
}


HARMLESS = ["checkpoint half", "checkpoint half of the lines", "checkpoint flipped"]  # its second line is not read


@pytest.mark.parametrize("how", FAULTS)
def test_one_run_without_faults_repairs_those_of_the_run_before(mirror, release, load, tmp_path, tiny_tensors, how):
    def answer(handler):
        name = handler.path.rpartition("/")[2]
        answers.get(name, answers.get(None, serve))(handler)

    answers, mirror.usual = FAULTS[how], answer
    with contextlib.nullcontext() if how in HARMLESS else one_line_error() as error:
        load()
    assert error is None or ".part" not in str(error.value)

    mirror.usual = serve
    assert_same_params(load()[2], tiny_tensors)
    found = contents(tmp_path / "tiny")
    assert how in HARMLESS or {name: found[name] for name in READ} == {name: release[name] for name in READ}


def test_damaged_files_are_replaced_in_the_same_run(mirror, release, load, tmp_path, tiny_tensors, capsys):
    load()
    mirror.requests.clear()
    for name in ("model.safetensors", "encoder.json", "vocab.bpe"):
        whole = (tmp_path / "tiny" / name).read_bytes()
        (tmp_path / "tiny" / name).write_bytes(half(whole))
        assert_same_params(load()[2], tiny_tensors)
        assert (tmp_path / "tiny" / name).read_bytes() == whole
        assert (tmp_path / "tiny" / f"{name}.corrupt").read_bytes() == half(whole)
        assert f"{name} is corrupt" in capsys.readouterr().err
    assert set(mirror.paths()) <= {f"/tiny/{name}" for name in ("encoder.json", "vocab.bpe", "hparams.json")}


@pytest.mark.parametrize("name", ["hparams.json", "encoder.json", "vocab.bpe", "model.safetensors"])
@pytest.mark.parametrize("layout", ["OpenAI's", "Hugging Face's"])
def test_files_of_the_users_own_stay_where_they_are(mirror, tiny_models_dir, load, tmp_path, name, layout):
    """The mirror has no model of this name."""
    own = tmp_path / "own"
    shutil.copytree(tiny_models_dir / "tiny", own)
    if layout == "Hugging Face's":
        (own / "encoder.json").rename(own / "vocab.json")
        (own / "vocab.bpe").rename(own / "merges.txt")
        name = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.get(name, name)
    (own / name).write_bytes(half((own / name).read_bytes()))
    before = contents(own)
    with one_line_error(f"own/{name}") if layout == "Hugging Face's" else contextlib.suppress(UserError):
        load("own")
    assert {kept.removesuffix(".corrupt"): data for kept, data in contents(own).items()} == before
    assert layout == "OpenAI's" or (contents(own) == before and mirror.requests == [])


def test_gpt2_vocabulary_is_downloaded_under_the_lock_and_repaired(mirror, tmp_path, monkeypatch, capsys):
    write_byte_vocabulary(tmp_path, TINY["n_vocab"])
    whole = {name: (tmp_path / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
    monkeypatch.setitem(RELEASED, "124M", {})
    put(mirror, "124M", whole)
    locked = []
    mirror.usual = lambda handler: locked.append((tmp_path / "models" / ".lock").exists()) or serve(handler)
    for damage in (None, half):
        if damage:
            (tmp_path / "models" / "124M" / "encoder.json").write_bytes(damage(whole["encoder.json"]))
        assert len(load_gpt2_encoder(str(tmp_path / "models")).encoder) == TINY["n_vocab"]
        found = contents(tmp_path / "models" / "124M")
        assert {name: found[name] for name in whole} == whole
    assert locked == [True] * 3
    assert found["encoder.json.corrupt"] == half(whole["encoder.json"])


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
    with one_line_error("996 MB", "900 MB", "--models_dir"):
        load("124M")
    assert mirror.requests == []
    assert not (tmp_path / "124M").exists()


def test_sizes_of_the_four_releases():
    for name, hparams in HPARAMS.items():
        assert RELEASED[name][DATA_FILE][0] == 4 * n_params(tensor_shapes(**hparams))
        for file in ("encoder.json", "vocab.bpe"):
            assert RELEASED[name][file] == RELEASED["124M"][file]
    sizes = [RELEASED[name][DATA_FILE][0] for name in HPARAMS]
    assert sizes == [497_759_232, 1_419_292_672, 3_096_120_320, 6_230_444_800]


def test_hparams_of_another_release_are_refused(mirror, load):
    put(mirror, "774M", {"hparams.json": json.dumps(HPARAMS["1558M"]).encode()})
    with one_line_error("/774M/hparams.json", "not the hyperparameters of 774M"):
        load("774M")


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
