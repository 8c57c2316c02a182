"""Downloads from good and bad mirrors, all of them served by the tests themselves on 127.0.0.1."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.server
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import types

import filelock
import numpy as np
import pytest

import utils
from tests.conftest import DATA, PROMPTS, ROOT, TINY, need
from utils import DATA_FILE, RELEASED, SMALL_FILES, download_gpt2_files, load_encoder_hparams_and_params
from weights import download
from weights.download import ATTEMPTS, download_file
from weights.errors import CorruptFile, UserError

MIB = 2**20
BODY = np.random.default_rng(0).bytes(3 * MIB + 12_345)
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = bytes(len(BODY))  # as long, with other bytes
ERROR_PAGE = b'<?xml version="1.0" encoding="utf-8"?>\n<Error><Code>BlobNotFound</Code></Error>\n'


# The mirror


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files`, bytes by path. The first requests get one of `answers` each, the others the `usual` one."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.requests, self.answers, self.usual = {}, [], [], serve
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """A client that goes away in the middle is no error here."""

    def paths(self):
        return [request.path for request in self.requests]

    def ranges(self):
        return [request.range for request in self.requests]


@dataclasses.dataclass
class Request:
    path: str
    range: str | None
    sent: int = 0  # bytes of the body


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        with self.server.lock:
            self.record = Request(self.path, self.headers["Range"])
            self.server.requests.append(self.record)
            answer = self.server.answers.pop(0) if self.server.answers else self.server.usual
        answer(self)

    def reply(self, status, body=b"", length=None, **headers):
        """length: the Content-Length where it is not the body's own; "" for none."""
        self.send_response(status)
        headers |= {"Content_Length": len(body) if length is None else length, "Connection": "close"}
        for name, value in headers.items():
            if value != "":
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.record.sent = len(body)
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def serve(handler, limit=None, ranges=True, length=None):
    """The file, or what its Range asks for. limit: break the connection off after so many bytes of the body."""
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


def status(code, body=ERROR_PAGE):
    return lambda handler: handler.reply(code, body)


def cut_after(n_bytes, **options):
    return functools.partial(serve, limit=n_bytes, **options)


def stall_after(n_bytes):
    """The rest comes too late, after two seconds."""

    def answer(handler):
        serve(handler, limit=n_bytes)
        handler.connection.settimeout(2)
        try:
            handler.connection.recv(1)  # returns when the client has had enough
        except TimeoutError:
            handler.wfile.write(handler.server.files[handler.path][n_bytes:])

    return answer


def chunked(handler, n_chunks=None):
    """The whole file in chunks that carry their length, no Content-Length before; n_chunks: break off after so many."""
    handler.reply(200, length="", Transfer_Encoding="chunked")
    data, size = handler.server.files[handler.path], 100_000
    for i in range(0, len(data), size)[:n_chunks]:
        piece = data[i : i + size]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    if n_chunks is None:
        handler.wfile.write(b"0\r\n\r\n")


def flipped(data, position=-100, bit=1):
    """The same bytes with one bit of one of them turned."""
    data = bytearray(data)
    data[position] ^= bit
    return bytes(data)


@pytest.fixture
def mirror(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Mirror()
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    server.files["/file"] = BODY
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds that download.py wanted to wait, one entry a pause; nobody waits for them."""
    waited = []
    monkeypatch.setattr(download, "time", types.SimpleNamespace(**vars(time) | {"sleep": waited.append}))
    return waited


@pytest.fixture
def fetch(mirror, tmp_path):
    """Downloads the mirror's file to tmp_path/file."""
    return lambda **options: download_file(f"{mirror.url}/file", str(tmp_path / "file"), **options)


def write_part(tmp_path, data):
    (tmp_path / "file.part").write_bytes(data)


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@contextlib.contextmanager
def one_line_error(*parts, kind=UserError):
    """The block raises UserError, in one line that has these parts."""
    with pytest.raises(kind) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


# One file from a good server


def test_a_whole_file(mirror, fetch, tmp_path):
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.requests == [Request("/file", None, len(BODY))]


def test_size_and_hash_may_be_known(mirror, fetch, tmp_path):
    fetch(size=len(BODY), sha256=SHA256)
    assert contents(tmp_path) == {"file": BODY}
    assert len(mirror.requests) == 1


def test_an_empty_file(mirror, fetch, tmp_path):
    mirror.files["/file"] = b""
    fetch()
    assert contents(tmp_path) == {"file": b""}


def test_a_file_in_chunks_of_unannounced_length(mirror, fetch, tmp_path):
    mirror.usual = chunked
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert len(mirror.requests) == 1


def test_a_server_that_sends_elsewhere(mirror, fetch, tmp_path):
    mirror.answers = [lambda handler: handler.reply(302, Location="/moved")]
    mirror.files = {"/moved": BODY}
    fetch()
    assert contents(tmp_path) == {"file": BODY}


# Taken up where it broke off


def test_what_an_earlier_run_left_is_not_fetched_again(mirror, fetch, tmp_path):
    write_part(tmp_path, BODY[:MIB])
    fetch(size=len(BODY), sha256=SHA256)
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.requests == [Request("/file", f"bytes={MIB}-", len(BODY) - MIB)]


def test_a_server_without_range_sends_the_whole_file(mirror, fetch, tmp_path):
    write_part(tmp_path, OTHER[:MIB])
    mirror.usual = functools.partial(serve, ranges=False)
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.requests == [Request("/file", f"bytes={MIB}-", len(BODY))]


def test_a_connection_that_breaks_twice(mirror, fetch, tmp_path, pauses):
    mirror.answers = [cut_after(MIB), cut_after(MIB)]
    fetch(size=len(BODY), sha256=SHA256)
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges() == [None, f"bytes={MIB}-", f"bytes={2 * MIB}-"]
    assert len(pauses) == 2


def test_a_connection_that_breaks_twice_without_range(mirror, fetch, tmp_path):
    mirror.answers = [cut_after(MIB, ranges=False), cut_after(MIB, ranges=False)]
    mirror.usual = functools.partial(serve, ranges=False)
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert len(mirror.requests) == 3


def test_a_file_of_known_size_without_announced_length_that_breaks_off(mirror, fetch, tmp_path):
    """Nothing but the size shows that the end of the connection is not the end of the file."""
    mirror.answers = [cut_after(MIB, length="")]
    fetch(size=len(BODY))
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges() == [None, f"bytes={MIB}-"]


@pytest.mark.parametrize("start", [0, 10, 2 * MIB])
def test_another_range_than_was_asked_for_is_not_appended(mirror, fetch, tmp_path, start):
    def serve_from_start(handler):
        content_range = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        handler.reply(206, BODY[start:], Content_Range=content_range)

    write_part(tmp_path, BODY[:MIB])
    mirror.answers = [serve_from_start]
    fetch()
    assert contents(tmp_path) == {"file": BODY}


def test_chunks_of_unannounced_length_that_break_off(mirror, fetch, tmp_path):
    mirror.answers = [functools.partial(chunked, n_chunks=15)]
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert len(mirror.requests) == 2


@pytest.mark.parametrize("n_bytes", [2**18, 100_000])
def test_what_came_before_a_break_is_kept(mirror, fetch, tmp_path, n_bytes):
    """All but the end of a chunk; else a line that breaks often enough never gets to the end."""
    mirror.files["/file"] = BODY[:MIB]
    mirror.usual = cut_after(n_bytes)
    fetch()
    assert contents(tmp_path) == {"file": BODY[:MIB]}
    starts = [0, *(int(asked[len("bytes=") : -1]) for asked in mirror.ranges()[1:])]
    assert all(n_bytes - download.CHUNK < b - a <= n_bytes for a, b in itertools.pairwise(starts))


def test_a_connection_that_stalls_is_left(mirror, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.2))
    mirror.answers = [stall_after(0), stall_after(MIB)]
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges() == [None, None, f"bytes={MIB}-"]


def test_a_part_that_is_whole_already(mirror, fetch, tmp_path):
    write_part(tmp_path, BODY)
    fetch(size=len(BODY), sha256=SHA256)
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.requests == [Request("/file", f"bytes={len(BODY)}-", 0)]


def test_a_part_longer_than_the_file_is_dropped(mirror, fetch, tmp_path):
    write_part(tmp_path, BODY + b"of another file")
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges() == [f"bytes={len(BODY) + 15}-", None]


def test_a_refused_range_without_the_length_starts_anew(mirror, fetch, tmp_path):
    write_part(tmp_path, BODY)
    mirror.answers = [status(416)]
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges() == [f"bytes={len(BODY)}-", None]


def test_a_server_that_announces_too_much_at_first(mirror, fetch, tmp_path):
    mirror.answers = [functools.partial(serve, length=len(BODY) + 100)]
    fetch()
    assert contents(tmp_path) == {"file": BODY}


# Given up


def test_a_connection_that_always_breaks(mirror, fetch, tmp_path):
    mirror.answers, mirror.usual = [cut_after(MIB)], cut_after(0)
    with one_line_error(f"{mirror.url}/file", "run the same command again", "GPT2_BASE_URL"):
        fetch()
    assert contents(tmp_path) == {"file.part": BODY[:MIB]}
    assert ATTEMPTS <= len(mirror.requests) <= ATTEMPTS + 1

    mirror.usual = serve
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.requests[-1] == Request("/file", f"bytes={MIB}-", len(BODY) - MIB)


def test_a_file_shorter_than_its_announced_length(mirror, fetch, tmp_path):
    mirror.usual = functools.partial(serve, ranges=False, length=len(BODY) + 100)
    with one_line_error("run the same command again"):
        fetch()
    assert "file" not in contents(tmp_path)
    assert len(mirror.requests) == ATTEMPTS


def test_a_server_without_range_that_breaks_anywhere_does_not_keep_us_for_ever(mirror, fetch, tmp_path):
    """Each time it starts from nothing, so more than last time is nothing new."""
    lengths = itertools.cycle([2 * MIB, MIB])
    mirror.answers = [cut_after(next(lengths), ranges=False) for _ in range(4 * ATTEMPTS)]
    mirror.usual = status(404)  # ends the test if nothing else does
    with one_line_error("run the same command again"):
        fetch()
    assert len(mirror.requests) <= 2 * ATTEMPTS


def test_pauses_double_and_start_small_again_after_new_bytes(mirror, fetch, pauses):
    mirror.usual = status(503)
    with one_line_error("503"):
        fetch()
    once = [download.BACK_OFF * 2**i for i in range(ATTEMPTS - 1)]
    assert pauses == once
    assert len(mirror.requests) == ATTEMPTS

    pauses.clear()
    mirror.answers = [status(503), status(503), cut_after(MIB)]
    with one_line_error("503"):
        fetch()
    assert pauses == [*once[:2], *once]


def test_the_real_pause_is_a_second_at_first():
    assert download.BACK_OFF == 1.0
    assert download.BACK_OFF * (2 ** (ATTEMPTS - 1) - 1) < 60  # all pauses until the message


def test_nothing_listens(tmp_path, pauses, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, so that no other program listens there
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
        with one_line_error(url, "refused", "check the network", "run the same command again", "GPT2_BASE_URL"):
            download_file(url, str(tmp_path / "file"))
    assert contents(tmp_path) == {}
    assert len(pauses) == ATTEMPTS - 1


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9/file", "mirror.example/file", "file:///etc/hostname", "http://", "http:///x"]
)
def test_what_is_no_url_is_not_tried_again(tmp_path, pauses, url):
    with one_line_error(url, "GPT2_BASE_URL"):
        download_file(url, str(tmp_path / "file"))
    assert contents(tmp_path) == {}
    assert pauses == []


# Refused and failing servers


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_server_that_refuses_is_asked_once(mirror, fetch, tmp_path, code):
    mirror.usual = status(code)
    with one_line_error(f"{mirror.url}/file", str(code), "GPT2_BASE_URL"):
        fetch()
    assert contents(tmp_path) == {}
    assert len(mirror.requests) == 1


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503])
def test_a_server_in_trouble_is_asked_again(mirror, fetch, tmp_path, code):
    mirror.answers = [status(code), status(code)]
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert len(mirror.requests) == 3


@pytest.mark.parametrize("code", [204, 300, 304])
def test_an_answer_without_the_file_is_not_taken_for_it(mirror, fetch, tmp_path, code):
    mirror.usual = lambda handler: handler.reply(code, ERROR_PAGE if code == 300 else b"", length="")
    with one_line_error(f"{mirror.url}/file"):
        fetch()
    assert "file" not in contents(tmp_path)


def test_a_server_in_trouble_does_not_spoil_what_is_there(mirror, fetch, tmp_path):
    write_part(tmp_path, BODY[:MIB])
    mirror.answers = [status(500), status(503), status(429)]
    fetch()
    assert contents(tmp_path) == {"file": BODY}
    assert mirror.ranges() == [f"bytes={MIB}-"] * 4


# Other contents than were asked for


@pytest.mark.parametrize("served", [BODY[:-1], BODY + b"\n", ERROR_PAGE, b""], ids=["short", "long", "page", "empty"])
def test_a_file_of_another_size_is_not_fetched(mirror, fetch, tmp_path, served):
    mirror.files["/file"] = served
    with one_line_error(f"{len(served)} bytes", f"{len(BODY)}", "GPT2_BASE_URL"):
        fetch(size=len(BODY), sha256=SHA256)
    assert contents(tmp_path) == {}
    assert len(mirror.requests) == 1


def test_a_file_of_another_size_in_chunks(mirror, fetch, tmp_path):
    mirror.files["/file"], mirror.usual = BODY[:-1], chunked
    with one_line_error("/file"):
        fetch(size=len(BODY))
    assert "file" not in contents(tmp_path)


@pytest.mark.parametrize("served", [flipped(BODY), OTHER, ERROR_PAGE], ids=["flipped", "other", "page"])
def test_a_file_of_another_hash_is_set_aside(mirror, fetch, tmp_path, served):
    mirror.files["/file"] = served
    with one_line_error("corrupt", SHA256, "run the same command"):
        fetch(sha256=SHA256)
    assert contents(tmp_path) == {"file.corrupt": served}
    assert len(mirror.requests) == 1

    mirror.files["/file"] = BODY
    fetch(sha256=SHA256)
    assert contents(tmp_path)["file"] == BODY
    assert mirror.ranges() == [None, None]
    assert "file.part" not in contents(tmp_path)


def test_a_part_of_another_file_is_found_by_the_hash(mirror, fetch, tmp_path):
    write_part(tmp_path, OTHER[:MIB])
    with one_line_error("corrupt"):
        fetch(size=len(BODY), sha256=SHA256)
    assert contents(tmp_path) == {"file.corrupt": OTHER[:MIB] + BODY[MIB:]}
    fetch(size=len(BODY), sha256=SHA256)
    assert contents(tmp_path)["file"] == BODY


def test_a_length_that_is_no_number(mirror, fetch, tmp_path):
    mirror.usual = functools.partial(serve, length="abc")
    with contextlib.suppress(UserError):  # it may be taken for unannounced, or refused
        fetch()
    assert contents(tmp_path).get("file", BODY) == BODY


# The disk


def set_free_space(monkeypatch, n_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=n_bytes))


def test_a_disk_that_is_too_small(mirror, fetch, tmp_path, monkeypatch):
    set_free_space(monkeypatch, len(BODY) - 1)
    with one_line_error(str(tmp_path / "file"), "GB", "--models_dir"):
        fetch()
    assert contents(tmp_path) == {}
    assert len(mirror.requests) == 1


def test_a_disk_that_is_just_large_enough(fetch, tmp_path, monkeypatch):
    set_free_space(monkeypatch, len(BODY))
    fetch()
    assert contents(tmp_path) == {"file": BODY}


def test_a_disk_that_is_large_enough_for_the_rest(fetch, tmp_path, monkeypatch):
    write_part(tmp_path, BODY[:MIB])
    set_free_space(monkeypatch, len(BODY) - MIB)
    fetch()
    assert contents(tmp_path) == {"file": BODY}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_a_disk_that_is_full_in_the_middle(mirror, fetch, tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with one_line_error(str(tmp_path / "file.part"), os.strerror(errno.ENOSPC), "--models_dir"):
        fetch()
    assert not (tmp_path / "file").exists()
    assert len(mirror.requests) == 1


def test_a_folder_that_is_not_there(fetch, tmp_path, mirror):
    with one_line_error(os.strerror(errno.ENOENT)):
        download_file(f"{mirror.url}/file", str(tmp_path / "nowhere" / "file"))


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
    """Loads a model of the models_dir tmp_path."""
    return lambda model_size="tiny": load_encoder_hparams_and_params(model_size, str(tmp_path))


def assert_is_tiny(loaded, tensors):
    encoder, hparams, params = loaded
    assert hparams == TINY
    assert all(encoder.decode(encoder.encode(text)) == text for text in PROMPTS)
    block = params["blocks"][1]
    found = [params["wte"], params["wpe"], block["mlp"]["c_fc"]["w"], block["ln_2"]["g"], params["ln_f"]["b"]]
    names = ["wte", "wpe", "h1/mlp/c_fc/w", "h1/ln_2/g", "ln_f/b"]
    for tensor, name in zip(found, names, strict=True):
        np.testing.assert_array_equal(tensor, tensors[name])


def test_a_model_is_downloaded_and_imported_once(mirror, release, load, tmp_path, tiny_tensors):
    assert_is_tiny(load(), tiny_tensors)
    assert sorted(mirror.paths()) == sorted(f"/tiny/{name}" for name in (*SMALL_FILES, DATA_FILE))
    there = contents(tmp_path / "tiny")
    assert {name: there[name] for name in release} == release
    assert set(there) - set(release) == {"model.safetensors", "config.json"}

    mirror.requests.clear()
    assert_is_tiny(load(), tiny_tensors)
    (tmp_path / "tiny" / DATA_FILE).unlink()
    assert_is_tiny(load(), tiny_tensors)
    assert mirror.requests == []


def test_a_release_that_is_there_needs_no_server(mirror, tiny_release, load, tmp_path, tiny_tensors):
    shutil.copytree(tiny_release, tmp_path / "tiny")
    assert_is_tiny(load(), tiny_tensors)
    assert mirror.requests == []


def test_a_checkpoint_of_another_name_is_imported(mirror, tiny_release, load, tmp_path, tiny_tensors):
    """As TensorFlow names those of a training run; nothing reads its .meta file."""
    path = shutil.copytree(tiny_release, tmp_path / "tiny")
    (path / "model.ckpt.meta").unlink()
    for name in ("model.ckpt.index", DATA_FILE):
        (path / name).rename(path / name.replace("model.ckpt", "model-500"))
    (path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model-500"\n', encoding="utf-8")
    assert_is_tiny(load(), tiny_tensors)
    assert mirror.requests == []


def test_only_what_is_missing_is_fetched(mirror, release, tiny_release, tmp_path):
    path = shutil.copytree(tiny_release, tmp_path / "tiny")
    for name in ("vocab.bpe", "model.ckpt.index"):
        (path / name).unlink()
    download_gpt2_files("tiny", str(path))
    assert sorted(mirror.paths()) == ["/tiny/model.ckpt.index", "/tiny/vocab.bpe"]
    assert contents(path) == release


def test_an_interrupted_download_goes_on_with_the_next_run(mirror, release, load, tmp_path, tiny_tensors):
    del mirror.files[f"/tiny/{DATA_FILE}"]
    with one_line_error("404", DATA_FILE):
        load()
    assert contents(tmp_path / "tiny") == {name: data for name, data in release.items() if name != DATA_FILE}

    (tmp_path / "tiny" / f"{DATA_FILE}.part").write_bytes(release[DATA_FILE][:100_000])
    mirror.files[f"/tiny/{DATA_FILE}"] = release[DATA_FILE]
    mirror.requests.clear()
    assert_is_tiny(load(), tiny_tensors)
    rest = len(release[DATA_FILE]) - 100_000
    assert mirror.requests == [Request(f"/tiny/{DATA_FILE}", "bytes=100000-", rest)]


@pytest.mark.parametrize("model_size", ["unknown", "124M"])
def test_a_model_that_the_mirror_lacks_leaves_no_folder(mirror, load, tmp_path, model_size):
    with one_line_error(f"{mirror.url}/{model_size}/", "404"):
        load(model_size)
    assert not (tmp_path / model_size).exists()
    assert len(mirror.requests) == 1


NO_NAMES = ["../x", "/abs", "", ".", "..", "a/../b", "a//b", "a/", "..\\x", "a\\..\\b", "C:\\x", "C:x", "a\0b"]


@pytest.mark.parametrize("model_size", NO_NAMES)
def test_names_that_lead_out_of_the_models_folder_are_refused(mirror, tmp_path, model_size):
    models_dir = tmp_path / "models"
    with one_line_error("model_size"):
        load_encoder_hparams_and_params(model_size, str(models_dir))
    assert contents(tmp_path) == {}
    assert mirror.requests == []


def test_without_a_mirror_only_official_names_are_asked_for(mirror, load, monkeypatch, tmp_path):
    monkeypatch.delenv("GPT2_BASE_URL")
    (tmp_path / "mine").mkdir()
    with one_line_error("'125M'", "124M, 355M, 774M, 1558M, mine"):
        load("125M")
    with one_line_error("hparams.json", "mine"):
        load("mine")


def test_a_models_dir_that_is_a_file(mirror, release, tmp_path):
    (tmp_path / "models").write_bytes(b"")
    with one_line_error(str(tmp_path / "models"), "--models_dir"):
        load_encoder_hparams_and_params("tiny", str(tmp_path / "models"))
    assert mirror.requests == []


# Corrupt models


DAMAGES = {
    "data flipped": (DATA_FILE, flipped),
    "data cut": (DATA_FILE, lambda data: data[:-1000]),
    "data empty": (DATA_FILE, lambda data: b""),
    "index flipped": ("model.ckpt.index", flipped),
    "index flipped in its footer": ("model.ckpt.index", lambda data: flipped(data, -44, 128)),
    "index a page": ("model.ckpt.index", lambda data: ERROR_PAGE),
    "index cut": ("model.ckpt.index", lambda data: data[:-20]),
    "checkpoint a page": ("checkpoint", lambda data: ERROR_PAGE),
    "checkpoint of another name": ("checkpoint", lambda data: b'model_checkpoint_path: "other"\n'),
    "vocabulary cut": ("encoder.json", lambda data: data[:-20]),
    "merges not UTF-8": ("vocab.bpe", lambda data: data + b"\xff \xfe\n"),
    "merges a page": ("vocab.bpe", lambda data: ERROR_PAGE),
    "hparams a page": ("hparams.json", lambda data: ERROR_PAGE),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_corrupt_file_is_set_aside_and_fetched_again(mirror, release, load, tmp_path, tiny_tensors, name, damage):
    mirror.files[f"/tiny/{name}"] = damage(release[name])
    with one_line_error(str(tmp_path / "tiny" / name), "corrupt", "run the same command again"):
        load()
    there = contents(tmp_path / "tiny")
    assert there[f"{name}.corrupt"] == damage(release[name])
    assert name not in there
    assert "model.safetensors" not in there

    mirror.files[f"/tiny/{name}"] = release[name]
    mirror.requests.clear()
    assert_is_tiny(load(), tiny_tensors)
    assert mirror.paths() == [f"/tiny/{name}"]


def test_a_corrupt_import_is_made_again(mirror, tiny_release, load, tmp_path, tiny_tensors):
    path = shutil.copytree(tiny_release, tmp_path / "tiny")
    load()
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])
    with one_line_error("model.safetensors", "corrupt", "run the same command again"):
        load()
    assert_is_tiny(load(), tiny_tensors)
    assert (path / "model.safetensors").read_bytes() == whole
    assert mirror.requests == []


def test_a_corrupt_file_of_ones_own_stays_where_it_is(mirror, tiny_release, load, tmp_path, monkeypatch):
    """Nobody could fetch it again."""
    monkeypatch.delenv("GPT2_BASE_URL")
    path = shutil.copytree(tiny_release, tmp_path / "mine")
    (path / "encoder.json").write_bytes(b"{")
    with one_line_error(str(path / "encoder.json"), kind=CorruptFile):
        load("mine")
    assert contents(path)["encoder.json"] == b"{"


# OpenAI's own names


def test_an_official_name_with_another_model_behind_it_is_refused(mirror, tiny_release, load, tmp_path, monkeypatch):
    set_free_space(monkeypatch, 10**12)
    put(mirror, "124M", contents(tiny_release))
    with one_line_error("/124M/", "the original has"):
        load("124M")
    assert not (tmp_path / "124M").exists()
    assert len(mirror.requests) == 1


def test_an_official_name_with_other_bytes_behind_it_is_refused(mirror, load, tmp_path, monkeypatch):
    set_free_space(monkeypatch, 10**12)
    hparams = b'{"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}'.ljust(90)
    put(mirror, "124M", {"hparams.json": hparams})
    with one_line_error("/124M/hparams.json", "corrupt"):
        load("124M")
    assert contents(tmp_path / "124M") == {"hparams.json.corrupt": hparams}


def test_openai_files_are_taken_and_another_data_file_is_not(mirror, load, tmp_path, monkeypatch):
    """The six small files of 124M as OpenAI serves them; hparams.json may lack the newline that it had not as 117M."""
    set_free_space(monkeypatch, 10**12)
    files = {name: need(DATA / "gpt2" / name).read_bytes() for name in SMALL_FILES}
    files["hparams.json"] = files["hparams.json"].rstrip(b"\n") + b"\n"
    assert {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()} == {
        name: RELEASED["124M"][name] for name in SMALL_FILES
    }
    put(mirror, "124M", files | {DATA_FILE: OTHER})
    with one_line_error(DATA_FILE, str(len(OTHER)), "497759232"):
        load("124M")
    assert contents(tmp_path / "124M") == files


def test_a_disk_too_small_for_the_model_is_found_before_anything_is_fetched(mirror, load, tmp_path, monkeypatch):
    """497,759,232 bytes to download and 497,759,232 to import."""
    set_free_space(monkeypatch, 900_000_000)
    with one_line_error("1.00 GB", "0.90 GB", "--models_dir"):
        load("124M")
    assert mirror.requests == []
    assert not (tmp_path / "124M").exists()


# Several at once


PRINT_MODEL = """
import hashlib, sys
from utils import load_encoder_hparams_and_params
encoder, hparams, params = load_encoder_hparams_and_params("tiny", sys.argv[1])
print(hparams["n_embd"], hashlib.sha256(params["wte"].tobytes()).hexdigest(), encoder.decode(encoder.encode("as one")))
"""
DEADLINE = 60  # seconds until a test that waits for something gives up


def wait_until(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def start_process(models_dir, stderr):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PRINT_MODEL, str(models_dir)]
    with open(stderr, "wb") as f:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=f, text=True)


def test_two_processes_at_once_share_the_work(mirror, release, tmp_path, tiny_tensors):
    messages = [tmp_path / "one", tmp_path / "other"]

    def serve_when_both_are_there(handler):
        wait_until(lambda: any("waiting for another process" in path.read_text() for path in messages))
        serve(handler)

    mirror.answers = [serve_when_both_are_there]
    processes = [start_process(tmp_path / "models", path) for path in messages]
    outputs = [process.communicate(timeout=2 * DEADLINE)[0] for process in processes]
    expected = f"{TINY['n_embd']} {hashlib.sha256(tiny_tensors['wte'].tobytes()).hexdigest()} as one\n"
    assert outputs == [expected] * 2, [path.read_text() for path in messages]
    assert sorted(mirror.paths()) == sorted(f"/tiny/{name}" for name in release)
    said = "".join(path.read_text() for path in messages)
    assert [said.count(word) for word in ("downloading", "importing", "waiting for another")] == [1, 1, 1]


def test_the_folder_may_go_while_one_waits(mirror, release, load, tmp_path, tiny_tensors, monkeypatch):
    """As when the process before fails with its first file, and leaves no folder behind."""
    messages = []
    monkeypatch.setattr(utils, "say", messages.append)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with filelock.FileLock(tmp_path / ".lock"):
            loaded = pool.submit(load)
            wait_until(lambda: any("waiting for another process" in message for message in messages))
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / "tiny").rmdir()
        assert_is_tiny(loaded.result(DEADLINE), tiny_tensors)
