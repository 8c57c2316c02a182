"""Fetch a file over HTTP so that it is either whole or not there: resumed, retried, checked, renamed at the end."""

import contextlib
import hashlib
import os
import shutil
import time

from weights.errors import UserError

TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
ATTEMPTS = 5  # in a row without a new byte
BACK_OFF = 1.0  # seconds before the second attempt, doubled before each one after it
CHUNK = 2**14  # bytes; what a broken connection has brought of one is lost


def download_file(url, path, size=None, sha256=None, remedy="set GPT2_BASE_URL to a mirror"):
    """Fetches url into path.

    The bytes gather in path.part. A connection that breaks is taken up where it broke (HTTP Range), also by the next
    run; a server without Range is read from the start again. size (bytes) and sha256 are checked where given, the
    server's Content-Length always; a file that fails is set aside as path.corrupt. remedy: what else a person can do.
    Raises UserError when the server refuses, cannot be reached, sends something else, or the disk is too small.
    """
    import requests

    failures, reason, reached = 0, "", size_of(path + ".part")
    while failures < ATTEMPTS:
        if failures:
            time.sleep(BACK_OFF * 2 ** (failures - 1))
        try:
            fetch_rest(url, path, size, remedy)
            return finish(url, path, size, sha256)
        except requests.RequestException as error:
            reason = explain(error)
            if isinstance(error, ValueError):  # not a URL: no use in trying again
                break
        except OSError as error:
            raise UserError(
                f"cannot write {path}.part ({error.strerror}); make room, or set --models_dir or --data_dir"
            ) from None
        failures = failures + 1 if size_of(path + ".part") <= reached else 1
        reached = max(reached, size_of(path + ".part"))
    raise UserError(f"cannot fetch {url} ({reason}); check the network and run the same command again, or {remedy}")


def fetch_rest(url, path, size, remedy):
    """One attempt: appends to path.part what it lacks of `size` bytes, or of as many as the server says there are."""
    import requests
    from tqdm import tqdm

    part = path + ".part"
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        begin = offset(response, part, have, remedy)
        if begin is None:
            return
        length = response.headers.get("Content-Length", "")
        total = begin + int(length) if length.isdecimal() else size
        if size is not None and total != size:
            raise UserError(f"{url} has {total} bytes, the original has {size}; {remedy}, then try again")
        check_space(path, (total or 0) - begin)
        bar = tqdm(desc=os.path.basename(path), total=total, initial=begin, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if begin else "wb") as f:
            for chunk in response.iter_content(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
    if total is not None and size_of(part) != total:
        raise requests.ConnectionError(f"{size_of(part)} of {total} bytes came")


def offset(response, part, have, remedy):
    """Where in the file the response begins: at `have`, as was asked, or at 0 from a server without Range; None when
    the `have` bytes are all there are.

    Raises ConnectionError where another attempt may help, UserError where it will not.
    """
    import requests

    status, content_range = response.status_code, response.headers.get("Content-Range", "")
    if status == 200:
        return 0
    if status == 206 and content_range.startswith(f"bytes {have}-"):
        return have
    if status == 416 and content_range == f"bytes */{have}":
        return None
    if status in (206, 416):
        with contextlib.suppress(OSError):
            os.remove(part)
        raise requests.ConnectionError(f"the server has {content_range or 'no'} bytes, not those from {have} on")
    if status in (408, 429) or status >= 500:
        response.raise_for_status()
    what = f"the server answers {status} {response.reason}"
    raise UserError(f"{response.url} cannot be had ({what}); check its name, or {remedy}")


def finish(url, path, size, sha256):
    """Renames the whole path.part to path, or to path.corrupt when it is not the file that was asked for."""
    found, expected = size_of(path + ".part"), size
    if expected in (None, found) and sha256 is not None:
        found, expected = sha256_of(path + ".part"), sha256
    if expected not in (None, found):
        os.replace(path + ".part", path + ".corrupt")
        raise UserError(f"{url} came corrupt ({found}, not {expected}); run the same command to fetch it again")
    os.replace(path + ".part", path)


def check_space(path, n_bytes):
    """Raises UserError unless the disk that path is on has room for n_bytes more."""
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if n_bytes > free:
        raise UserError(
            f"{path} needs {n_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "make room, or choose another --models_dir or --data_dir"
        )


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def explain(error):
    """The innermost reason of a requests exception, in its own words, without the layers around it."""
    while True:
        inner = getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, Exception)), None)
        if not isinstance(inner, Exception):
            return str(error) or type(error).__name__
        error = inner
