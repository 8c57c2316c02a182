"""Downloads from correct and faulty servers, which the tests run on 127.0.0.1."""

import concurrent.futures
import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import resource
import select
import shutil
import socket
import threading
import types
from functools import partial
from unittest.mock import Mock

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
from weights.errors import CorruptFile
from weights.names import n_params, tensor_shapes
from weights.releases import DATA_FILE, HPARAMS, RELEASED, VOCABULARY

MIB = 2**20
BODY = np.random.default_rng(0).bytes(3 * MIB + 12_345)
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = bytes(len(BODY))  # of the same length
SMALL_FILES = [name for name in RELEASED["124M"] if name != DATA_FILE]
ETAG = '"0x8D7"'
REMEDY = "set GPT2_BASE_URL to a mirror"
ERROR_PAGE = b'<?xml version="1.0" encoding="utf-8"?>\n<Error><Code>BlobNotFound</Code></Error>\n'


# The mirror


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        self.server.paths.append(self.path)
        self.server.ranges.append(self.headers["Range"])
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


def serve(handler, limit=None, ranges=True, length=None, etag=ETAG):
    """Send the file, or the requested range of it; close the connection after `limit` bytes."""
    if (data := handler.server.files.get(handler.path)) is None:
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


def stall(handler, n_bytes=0):
    """Send n_bytes bytes, and the rest after two seconds, or when the client has disconnected."""
    serve(handler, limit=n_bytes)
    select.select([handler.connection], [], [], 2)
    handler.wfile.write(handler.server.files[handler.path][n_bytes:])


def raw(reply):
    """Answer with these bytes."""
    return lambda handler: handler.wfile.write(reply)


def raw_with(*headers):
    return raw(b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"Connection: close", b"", BODY]))


def redirected(target):
    return lambda handler: handler.reply(302, Location=target)


def endless(code, **headers):
    """Answer with a body that ends when the client disconnects."""

    def answer(handler):
        handler.reply(code, length="", **headers)
        while True:
            handler.wfile.write(BODY)

    return answer


@pytest.fixture
def mirror(monkeypatch):
    """A server of `files`, bytes by path. It answers the first requests by one of `answers` each, the rest by `usual`.

    paths and ranges are the paths and the Range headers of the requests.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # of clients that disconnect early
    server.files, server.paths, server.ranges, server.answers, server.usual = {"/file": BODY}, [], [], [], serve
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
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
WITHOUT_RANGE = partial(serve, ranges=False)
CUT = partial(serve, limit=FEW)
CUT_WITHOUT_RANGE, CUT_WITHOUT_ETAG = partial(CUT, ranges=False), partial(CUT, etag="")
NEW_VERSION = partial(serve, etag='"new"')
SUCCESSES = {
    "whole": case(),
    "length is unknown": case(usual=partial(serve, length="")),
    "length is no number": case(usual=partial(serve, length="abc"), **KNOWN),
    "redirected": case(redirected("/file"), starts=[0, 0]),
    "redirected with an endless body": case(endless(302, Location="/file"), starts=[0, 0]),
    "part of an earlier run": case(part=BODY[:MIB], starts=[MIB], **KNOWN),
    "part, server without Range": case(usual=WITHOUT_RANGE, part=OTHER[:MIB], starts=[MIB]),
    "part without ETag": case(part=OTHER[:MIB], etag="", starts=[0]),
    "part with a weak ETag": case(usual=partial(serve, etag='W/"1"'), part=OTHER, etag='W/"1"', starts=[0]),
    "part with an invalid ETag": case(part=OTHER[:MIB], etag='"a"\r\nb: "c"', starts=[0]),
    "part of an older version": case(usual=NEW_VERSION, part=OTHER[:MIB], starts=[MIB]),
    "part complete, of an older version": case(usual=NEW_VERSION, part=OTHER, starts=[len(BODY)]),
    "server ignores If-Range": case(serve_range(MIB), usual=NEW_VERSION, part=BODY[:MIB], etag='"old"', starts=None),
    "part corrupt": case(part=OTHER[:MIB], starts=[MIB, 0], **KNOWN),
    "part complete": case(part=BODY, starts=[len(BODY)], **KNOWN),
    "malformed header": case(usual=raw_with(b"X-Bad\x1b[31m", b"Content-Length: %d" % len(BODY))),
    "part too long": case(part=BODY + b"x", starts=[len(BODY) + 1, 0]),
    "Range refused without a length": case(status(416), part=BODY, starts=[len(BODY), 0]),
    "breaks twice": case(CUT, CUT, starts=[0, FEW, 2 * FEW], **KNOWN),
    "breaks twice without Range": case(CUT_WITHOUT_RANGE, CUT_WITHOUT_RANGE, usual=WITHOUT_RANGE, starts=[0, FEW, FEW]),
    "breaks twice without ETag": case(CUT_WITHOUT_ETAG, CUT_WITHOUT_ETAG, starts=[0, 0, 0]),
    "breaks, shown by the size only": case(partial(serve, limit=MIB, length=""), starts=[0, MIB], size=len(BODY)),
    "announces too much at first": case(partial(serve, length=len(BODY) + 100), starts=None),
    "fails and keeps the part": case(*map(status, (500, 503, 429, 408)), part=BODY[:MIB], starts=[MIB] * 5),
    **{f"sends from {n}": case(serve_range(n), part=BODY[:MIB], starts=None) for n in (0, 10, 2 * MIB)},
}


@pytest.mark.parametrize("how", SUCCESSES)
def test_file_is_downloaded_whole(mirror, fetch, tmp_path, how, caplog):
    """urllib3's warnings, which Python prints with a traceback where no logging is set up, are turned off."""
    answers, mirror.usual, starts, options = SUCCESSES[how]
    mirror.answers = list(answers)
    fetch(**options)
    assert contents(tmp_path) == {"file": BODY}
    assert caplog.records == []
    if starts is None:
        assert len(mirror.ranges) == 2
    else:
        assert mirror.ranges == [f"bytes={n}-" if n else None for n in starts]


def test_stalled_connection_is_closed(mirror, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.2))
    mirror.answers = [stall, partial(stall, n_bytes=MIB)]
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges == [None, None, f"bytes={MIB}-"]


# Downloads that fail


def test_pauses_between_attempts_double_until_new_bytes_arrive(mirror, fetch, tmp_path, pauses, capsys):
    mirror.answers, mirror.usual = [status(503), status(503), partial(serve, limit=MIB)], partial(serve, limit=0)
    with one_line_error(f"{mirror.url}/file", "run the same command again", REMEDY):
        fetch()
    assert contents(tmp_path) == {"file.part": BODY[:MIB], "file.etag": ETAG.encode()}
    assert pauses == [1, 2, 1, 2, 4, 8]
    assert len(mirror.paths) == 2 + ATTEMPTS
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition("; ")[2] for line in said] == [f"next attempt in {pause:.0f} s" for pause in pauses]
    assert f"{mirror.url}/file (the server answers 503 Service Unavailable)" in said[0]

    mirror.usual = serve
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges[-1] == f"bytes={MIB}-"


LONG_HOST = f"http://{'x' * 300}/x"
URLS = ["127.0.0.1:9/x", "example/x", "http://", "http://a..b/x", LONG_HOST, "http://[::1/x", "ftp://127.0.0.1/x"]
UNREACHABLE = {"http://127.0.0.1:9/x": "refused", "http://nothing.invalid/x": "not known"}


@pytest.mark.parametrize("url", [*URLS, *UNREACHABLE])
def test_server_that_cannot_be_reached_is_reported_at_once(tmp_path, pauses, url, monkeypatch):
    if "nothing.invalid" in url:
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=unknown))
    words = [UNREACHABLE[url], "check the network", "run the same command again"] if url in UNREACHABLE else []
    with one_line_error(url, REMEDY, *words):
        download_file(url, str(tmp_path / "file"), remedy=REMEDY)
    assert contents(tmp_path) == {}
    assert pauses == []


def break_at_two_bytes(handler):
    """Send 1 and 2 MiB in turns, without Range, and nothing after 20 requests."""
    n = len(handler.server.paths)
    serve(handler, MIB * (1 + n % 2) * (n <= 20), ranges=False)


SHORT = partial(serve, ranges=False, length=len(BODY) + 100)
OTHERS = [BODY[:-1], BODY + b"\n", b""]
ENCODED = partial(status, 200, gzip.compress(BODY))
BAD_RANGE = raw(b"HTTP/1.1 206 x\r\nContent-Range: bytes 5-\x1b[31m\r\nContent-Length: 0\r\n\r\n")
FAILURES = {  # the usual answer, the number of requests (0: any), words of the message
    "shorter than announced": (SHORT, ATTEMPTS, "run the same command again"),
    "breaks at two bytes": (break_at_two_bytes, ATTEMPTS, "run the same command again"),
    "more than its size, without a length": (endless(200), 1, "more bytes"),
    "too short, without a length": (status(200, BODY[:-1], length=""), ATTEMPTS, "run the same command again"),
    **{f"status {code}": (status(code), 1, f" {code} ") for code in (400, 403, 404)},
    **{f"status {code}": (status(code, b"", length=""), 0) for code in (204, 300, 304)},
    **{f"size {len(other)}": (status(200, other), 1, len(other), len(BODY)) for other in OTHERS},
    "not HTTP": (raw(b"SSH-2.0-OpenSSH\x1b[31m\r\n"), 0, "SSH-2.0"),
    "nothing": (raw(b""), 0, "closed connection"),
    "escape codes in the reason": (raw(b"HTTP/1.1 404 \x1b[31mNot\x07 Found\r\n\r\n"), 1, "Not"),
    "escape codes in the reason of an error": (raw(b"HTTP/1.1 503 \x1b[31mBusy\r\n\r\n"), ATTEMPTS, "Busy"),
    "escape codes in Content-Range": (BAD_RANGE, 0, "Content-Range"),
    "gzip": (ENCODED(Content_Encoding="gzip"), 1, "encoded as gzip"),
    "unknown encoding": (ENCODED(Content_Encoding="\x1b[31m"), 1, "encoded as"),
    "invalid chunks": (raw_with(b"Transfer-Encoding: chunked"), 0, "run the same command again"),
    "two lengths": (raw_with(b"Content-Length: 5, 6"), 0, "Content-Length"),
    "too many redirects": (redirected("/file"), 0, "redirects"),
    **{f"redirected to {url[:20]}": (redirected(url), 0) for url in (*URLS[2:], "http://\x1b[31m/", "file:///x")},
}


def test_missing_certificates_are_no_fault_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none"))
    with one_line_error("cannot download https://127.0.0.1:9/x", str(tmp_path / "none"), REMEDY):
        download_file("https://127.0.0.1:9/x", str(tmp_path / "x"), remedy=REMEDY)


@pytest.mark.parametrize("how", FAILURES)
def test_wrong_answer_is_an_error_in_one_printable_line_and_the_next_run_succeeds(mirror, fetch, tmp_path, how, capsys):
    mirror.usual, n_requests, *words = FAILURES[how]
    with one_line_error(f"{mirror.url}/file", REMEDY, *words) as error:
        fetch(size=len(BODY) if "size" in how or "too short" in how else None)
    assert str(error.value).isprintable()
    assert capsys.readouterr().err.replace("\n", "").isprintable()
    assert "file" not in contents(tmp_path)
    assert n_requests in (0, len(mirror.paths))

    mirror.usual = serve
    fetch()
    assert contents(tmp_path)["file"] == BODY


def test_redirect_from_https_to_http_is_not_followed(tmp_path, monkeypatch):
    import requests

    response = requests.Response()
    response.request = requests.Request("GET", "https://127.0.0.1/file").prepare()
    response.status_code, response.url, response.raw = 302, response.request.url, io.BytesIO()
    response.headers["Location"] = "http://127.0.0.1/file"
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send := Mock(return_value=response))
    with one_line_error("https://127.0.0.1/file", "redirects from https to http://127.0.0.1/file"):
        download_file("https://127.0.0.1/file", str(tmp_path / "file"), remedy=REMEDY)
    assert send.call_count == 1


REFUSE = Mock(side_effect=CorruptFile("file.part", "no version line"))


@pytest.mark.parametrize(("wrong", "word"), [({"sha256": SHA256}, SHA256), ({"check": REFUSE}, "no version line")])
def test_file_that_is_rejected_is_discarded(mirror, fetch, tmp_path, wrong, word):
    (tmp_path / "file").write_bytes(b"old")
    mirror.files["/file"] = flipped(BODY)
    with one_line_error("arrived corrupt", word, "run the same command", REMEDY) as error:
        fetch(**wrong)
    assert "part" not in str(error.value)
    assert contents(tmp_path) == {"file": b"old"}
    assert len(mirror.paths) == 1

    mirror.files["/file"] = BODY
    fetch(sha256=SHA256)
    assert contents(tmp_path) == {"file": BODY, "file.corrupt": b"old"}
    assert mirror.ranges[1] is None


@pytest.mark.parametrize("part", [b"", BODY[:MIB]], ids=["new", "resumed"])
def test_free_space_is_checked_before_the_download(mirror, fetch, tmp_path, monkeypatch, part):
    set_free_space(monkeypatch, len(BODY) - len(part) - 1)
    with one_line_error(str(tmp_path / "file"), "MB", "another disk"):
        fetch(part or None)
    assert contents(tmp_path).get("file.part", b"") == part
    assert len(mirror.paths) == 1
    set_free_space(monkeypatch, len(BODY) - len(part))
    fetch()
    assert contents(tmp_path) == {"file": BODY}


def test_disk_that_fills_up(mirror, fetch, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with one_line_error(str(tmp_path / "file.part"), os.strerror(errno.EFBIG), "make room", "another disk"):
            fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "file").exists()
    assert len(mirror.paths) == 1


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_part_that_is_no_regular_file_is_refused(mirror, fetch, tmp_path, kind):
    part, other = tmp_path / "file.part", tmp_path / "other"
    other.write_bytes(b"the user's")
    {"link": lambda: part.symlink_to(other), "FIFO": lambda: os.mkfifo(part), "folder": part.mkdir}[kind]()
    with one_line_error(part, "not a regular file", "remove it"):
        fetch()
    assert other.read_bytes() == b"the user's"
    assert mirror.paths == []


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
    """Nothing is left of an import that was killed."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / f".{'0' * 16}.tmp").write_bytes(b"part of model.safetensors")
    assert_same_params(load()[2], tiny_tensors)
    assert sorted(mirror.paths) == sorted(f"/tiny/{name}" for name in (*SMALL_FILES, DATA_FILE))
    found = contents(tmp_path / "tiny")
    assert {name: found[name] for name in release} == release
    assert set(found) - set(release) == {"model.safetensors", "config.json"}

    mirror.paths.clear()
    assert_same_params(load()[2], tiny_tensors)
    (tmp_path / "tiny" / DATA_FILE).unlink()
    assert_same_params(load()[2], tiny_tensors)
    assert mirror.paths == []


def test_failed_download_leaves_no_empty_folder(mirror, tmp_path, monkeypatch):
    with one_line_error(f"{mirror.url}/unknown/", "404", "check GPT2_BASE_URL"):
        load_encoder_hparams_and_params("unknown", str(tmp_path / "new" / "models"))
    monkeypatch.setattr(dataset, "TINYSHAKESPEARE", (f"{mirror.url}/text", 1, ""))
    with one_line_error(f"{mirror.url}/text", "404", "give the path of a copy"):
        dataset.read_dataset("tinyshakespeare", str(tmp_path / "data"))
    assert list(tmp_path.rglob("*")) == [tmp_path / name for name in ("new", "new/models", "new/models/.lock")]
    assert len(mirror.paths) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="Linux has folders that cannot be written")
@pytest.mark.parametrize("models_dir", ["/proc", "/proc/self", __file__])
def test_lock_that_cannot_be_created_is_an_error(models_dir):
    assert_mistake(run("Hello", f"--models_dir={models_dir}"), "cannot write", ".lock", "--models_dir")


# Faults of the mirror, each of which one run without faults repairs


def sent(change, limit=None):
    """Send change(the file's bytes), up to `limit` of them."""

    def answer(handler):
        data = change(handler.server.files[handler.path])
        handler.reply(200, data[:limit], len(data), ETag=ETAG)

    return answer


def half(data):
    return data[: len(data) // 2]


def replaced(old, new):
    return lambda data: data.replace(old, new, 1)


def hparam(name, value):
    return {"hparams.json": sent(lambda data: json.dumps(json.loads(data) | {name: value}).encode())}


CHANGES = {
    "a page": lambda data: b"<html>\n<body>Not Found</body>\n</html>\n",
    "two words": lambda data: b"Not Found",
    "an error in JSON": lambda data: b'{"error": "no such file"}',
    "an empty object": lambda data: b"{}",
    "empty": lambda data: b"",
    "half": half,
    "half of the lines": lambda data: b"".join(half(data.splitlines(keepends=True))),
    "flipped": lambda data: flipped(data, len(data) // 2),
}
READ = [name for name in (*SMALL_FILES, DATA_FILE) if name != "model.ckpt.meta"]
FAULTS = {  # the answer by name of the file, None for any other file
    **{f"{name} {how}": {name: sent(change)} for name in READ for how, change in CHANGES.items()},
    **{f"all {how}": {None: sent(change)} for how, change in CHANGES.items()},
    **{f"all but hparams.json {how}": {"hparams.json": serve, None: sent(change)} for how, change in CHANGES.items()},
    "all gzip": {None: lambda handler: handler.reply(200, gzip.compress(b"{}"), Content_Encoding="gzip")},
    "all fail": {None: status(503)},
    "hparams of more layers": hparam("n_layer", 3),
    "hparams of a longer context": hparam("n_ctx", 256),
    "hparams of a smaller vocabulary": hparam("n_vocab", 300),
    "hparams of many layers": hparam("n_layer", 10**9),
    "hparams of a longer context, the rest fails": hparam("n_ctx", 256) | {None: status(503)},
    "merges cut, the rest fails": {"vocab.bpe": sent(CHANGES["half of the lines"]), DATA_FILE: status(503)},
    "token renamed, the rest fails": {"encoder.json": sent(replaced(b'"the"', b'"xyz"')), "vocab.bpe": status(503)},
    "two ids equal": {"encoder.json": sent(replaced(b": 300,", b": 301,"))},
    "data flipped, then cut": {DATA_FILE: sent(lambda data: flipped(data, 99), limit=2**15)},
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
    mirror.paths.clear()
    for name in ("model.safetensors", "encoder.json", "vocab.bpe"):
        whole = (tmp_path / "tiny" / name).read_bytes()
        (tmp_path / "tiny" / name).write_bytes(half(whole))
        assert_same_params(load()[2], tiny_tensors)
        assert (tmp_path / "tiny" / name).read_bytes() == whole
        assert (tmp_path / "tiny" / f"{name}.corrupt").read_bytes() == half(whole)
        assert re.search(rf"/{re.escape(name)}.*; replacing .*{re.escape(name)}\n", capsys.readouterr().err)
    assert set(mirror.paths) <= {f"/tiny/{name}" for name in ("encoder.json", "vocab.bpe")}


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe", "model.safetensors"])
@pytest.mark.parametrize("layout", ["OpenAI's", "Hugging Face's"])
def test_files_of_the_users_own_stay_where_they_are(mirror, tiny_models_dir, load, tmp_path, name, layout):
    """The mirror has no model of this name."""
    own = shutil.copytree(tiny_models_dir / "tiny", tmp_path / "own")
    if layout == "Hugging Face's":
        (own / "encoder.json").rename(own / "vocab.json")
        (own / "vocab.bpe").rename(own / "merges.txt")
        name = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.get(name, name)
    (own / name).write_bytes(half((own / name).read_bytes()))
    before = contents(own)
    with one_line_error("own/", name if layout == "Hugging Face's" else ""):
        load("own")
    assert contents(own) == before
    assert mirror.paths == [] or layout == "OpenAI's"


def test_gpt2_vocabulary_is_downloaded_under_the_lock_and_repaired(mirror, tmp_path, monkeypatch):
    write_byte_vocabulary(tmp_path, TINY["n_vocab"])
    whole, locked, folder = contents(tmp_path), [], tmp_path / "models" / "124M"
    monkeypatch.setitem(RELEASED, "124M", {})
    put(mirror, "124M", whole)
    mirror.usual = lambda handler: locked.append((folder.parent / ".lock").exists()) or serve(handler)
    assert len(load_gpt2_encoder(str(folder.parent)).encoder) == TINY["n_vocab"]
    assert contents(folder) == whole
    (folder / "encoder.json").write_bytes(damaged := half(whole["encoder.json"]))
    assert len(load_gpt2_encoder(str(folder.parent)).encoder) == TINY["n_vocab"]
    assert contents(folder) == whole | {"encoder.json.corrupt": damaged}
    assert locked == [True] * 3


OTHER_HPARAMS = [  # the model, its hparams.json, words of the message
    ("124M", b"{}", "the original has 90"),
    ("124M", json.dumps(HPARAMS["124M"]).encode().ljust(90), "SHA-256"),
    ("774M", json.dumps(HPARAMS["1558M"]).encode(), "hyperparameters of 774M"),
]


@pytest.mark.parametrize("how", OTHER_HPARAMS, ids=lambda how: how[2])
def test_other_hparams_under_openais_name_are_refused(mirror, load, tmp_path, monkeypatch, how):
    model_size, hparams, words = how
    set_free_space(monkeypatch, 10**12)
    put(mirror, model_size, {"hparams.json": hparams})
    with one_line_error(f"/{model_size}/hparams.json", words):
        load(model_size)
    assert len(mirror.paths) == 1
    assert not (tmp_path / model_size).exists()


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
    assert mirror.paths == []
    assert not (tmp_path / "124M").exists()


def test_sizes_of_the_four_releases():
    for name, hparams in HPARAMS.items():
        assert RELEASED[name][DATA_FILE][0] == 4 * n_params(tensor_shapes(**hparams))
        assert VOCABULARY.items() <= RELEASED[name].items()
    sizes = [RELEASED[name][DATA_FILE][0] for name in HPARAMS]
    assert sizes == [497_759_232, 1_419_292_672, 3_096_120_320, 6_230_444_800]


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
    assert sorted(mirror.paths) == sorted(f"/tiny/{name}" for name in release)
    assert sorted(said) == ["downloading", "importing", "waiting"]
