"""Download a file over HTTP: resume and retry, check size, hash and format, and rename the complete file at the end.

path.part has the bytes that have arrived, path.etag the ETag that names the version of the file they belong to.
"""

import contextlib
import os
import re
import stat
import sys
import time

from weights.errors import CorruptFile, UserError, printable
from weights.files import atomic_write, cannot_write, read_text, set_aside
from weights.resources import check_space

TIMEOUT = (10, 30)  # seconds to connect, seconds between two reads
ATTEMPTS = 5  # consecutive attempts that bring no new byte
BACK_OFF = 1.0  # seconds before the second attempt; doubles before each further one
ANOTHER_FOLDER = "choose a folder on another disk"
REDIRECTS = 10  # at most
LARGEST = 2**33  # bytes of a file of unknown size; the data of 1558M have 6.2 * 10**9
CHUNK = 2**14  # bytes; an incomplete chunk is lost when the connection breaks


class Refused(Exception):
    """An answer that another attempt would not change."""


def download_file(url, path, size=None, sha256=None, check=None, *, remedy):
    """Download url to path, unless the server's file is not the expected one.

    After a broken connection the download resumes at the same byte (HTTP Range) if the server's file is still the same
    (HTTP If-Range), also in the next run; otherwise it starts again. The file must have the server's Content-Length,
    size (in bytes) and sha256 if given, and check(path.part) must not raise CorruptFile. A file that path already has
    is renamed to path.corrupt. Raises UserError if the server cannot be reached, refuses, or sends another file, and if
    the disk is too small; remedy ends the message.
    """
    part = path + ".part"
    if os.path.lexists(part) and not stat.S_ISREG(os.lstat(part).st_mode):
        raise UserError(f"{part} is not a regular file; remove it and run the same command again")
    resumes, _ = resumable(path)
    try:
        fetch(url, path, size, remedy)
        fault = find_fault(part, size, sha256, check)
        if fault and resumes:  # the fault may be in the bytes of the earlier run
            discard(path)
            fetch(url, path, size, remedy)
            fault = find_fault(part, size, sha256, check)
        if fault:
            discard(path)
            raise UserError(f"{url} arrived corrupt ({fault}); run the same command again, or {remedy}")
        if os.path.exists(path):
            set_aside(path)
        os.replace(part, path)
        discard(path)
    except OSError as error:
        if error.errno is None:  # of requests: its certificates are missing, for example
            raise UserError(f"cannot download {url} ({error}); {remedy}") from None
        raise cannot_write(part, error, ANOTHER_FOLDER) from None


def fetch(url, path, size, remedy):
    """Download url to path.part; give up when ATTEMPTS attempts in a row have brought no new byte."""
    import requests
    from urllib3.exceptions import HTTPError, NewConnectionError

    failures, reached = 0, size_of(path + ".part")
    while True:
        try:
            return fetch_rest(url, path, size)
        except UserError:
            raise
        except (Refused, requests.RequestException, HTTPError, ValueError) as error:
            is_final, cause = isinstance(error, (Refused, ValueError)), innermost(error)
        unreachable = isinstance(cause, NewConnectionError) and not failures  # at the first attempt
        failures = failures + 1 if size_of(path + ".part") <= reached else 1
        reached = max(reached, size_of(path + ".part"))
        what = " ".join(printable(f"{url} ({str(cause) or type(cause).__name__})").split())
        if is_final or unreachable or failures == ATTEMPTS:
            again = "" if is_final else "check the network and run the same command again, or "
            raise UserError(f"cannot download {what}; {again}{remedy}")
        pause = BACK_OFF * 2 ** (failures - 1)
        print(f"cannot download {what}; next attempt in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def fetch_rest(url, path, size):
    """Append the missing bytes to path.part, in one request; size is the size of the whole file, if known.

    Raises Refused, or an exception of requests if another attempt may help.
    """
    import logging

    import requests
    from tqdm import tqdm

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of malformed headers, with a traceback
    part, (have, etag) = path + ".part", resumable(path)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-", "If-Range": etag} if have else {})
    with follow(url, headers) as response:
        begin = first_byte(response, path, have, etag)
        if begin is None:
            return
        length = response.headers.get("Content-Length", "")
        total = begin + int(length) if length.isdecimal() else size
        if size is not None and total != size:
            raise Refused(f"it has {total} bytes, the original has {size}")
        check_space(path, (total or 0) - begin, ANOTHER_FOLDER)
        bar = tqdm(desc=os.path.basename(path), total=total, initial=begin, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if begin else "wb") as f:
            if not begin:
                save_etag(path, response.headers.get("ETag", ""))
            for chunk in response.iter_content(CHUNK):
                if f.tell() + len(chunk) > (LARGEST if total is None else total):
                    discard(path)
                    raise Refused("it has more bytes than expected")
                f.write(chunk)
                bar.update(len(chunk))
    if total is not None and size_of(part) != total:
        raise requests.ConnectionError(f"{size_of(part)} of {total} bytes received")


def follow(url, headers):
    """Return the response of url, after up to REDIRECTS redirects, whose bodies are not read.

    Raises Refused for more, and for one from https to another protocol.
    """
    import requests

    session = requests.Session()
    session.get_redirect_target = lambda response: None  # requests would read the body of a redirect
    for _ in range(REDIRECTS + 1):
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        if not response.is_redirect:
            return response
        response.close()
        from urllib.parse import urljoin

        target = urljoin(url, response.headers["Location"])
        if url.startswith("https:") and not target.lower().startswith("https:"):
            raise Refused(f"it redirects from https to {target}")
        url = target
    raise Refused(f"it redirects more than {REDIRECTS} times")


def first_byte(response, path, have, etag):
    """Return the position in the file of the response's first byte, or None if `have` bytes are the whole file.

    The position is `have`, as requested, or 0 if the server sends the whole file.
    """
    import requests

    status, headers = response.status_code, response.headers
    answer = f"the server answers {status} {response.reason}"
    if status in (408, 429) or status >= 500:
        raise requests.ConnectionError(answer)
    if status not in (200, 206, 416):
        raise Refused(answer)
    if (encoding := headers.get("Content-Encoding") or "identity").lower() != "identity":
        raise Refused(f"the server sends it encoded as {encoding}")
    if status == 200:
        return 0
    content_range = headers.get("Content-Range", "")
    if headers.get("ETag", etag if status == 416 else None) == etag:
        if status == 206 and content_range.startswith(f"bytes {have}-"):
            return have
        if status == 416 and content_range == f"bytes */{have}":
            return None
    discard(path)
    raise requests.ConnectionError(f"{answer} and Content-Range {content_range!r} for the bytes from {have} on")


def find_fault(part, size, sha256, check):
    """Return why the downloaded file cannot be the expected one, None if it can."""
    if size not in (None, size_of(part)):
        return f"it has {size_of(part)} bytes, the original has {size}"
    if sha256 and (found := sha256_of(part)) != sha256:
        return f"its SHA-256 is {found}, the original's is {sha256}"
    try:
        if check:
            check(part)
    except CorruptFile as error:
        return error.reason
    return None


def resumable(path):
    """Return the size of path.part and the ETag for If-Range; 0 and "" if the download has to start again."""
    try:
        etag = read_text(path + ".etag")
    except (OSError, UserError):
        etag = ""
    if re.fullmatch(r'"[!#-~]+"', etag):  # not W/"...", a weak one: RFC 9110, section 13.1.5
        return size_of(path + ".part"), etag
    return 0, ""


def save_etag(path, etag):
    with atomic_write(path + ".etag", ANOTHER_FOLDER) as f:
        f.write(etag.encode("utf-8", "replace"))


def discard(path):
    """Remove path.part and path.etag."""
    for end in (".part", ".etag"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + end)


def sha256_of(path):
    """Return the SHA-256 of a file, in hexadecimal."""
    import hashlib

    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def size_of(path):
    """Return the size of a file in bytes, 0 if it does not exist."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def innermost(error):
    """Return the innermost exception that an exception of requests wraps."""
    while True:
        inner = getattr(error, "reason", None)
        if not isinstance(inner, Exception):
            inner = next((a for a in error.args if isinstance(a, Exception)), None)
        if inner is None:
            return error
        error = inner
