"""Download a file over HTTP: resume and retry, check size and hash, and rename the complete file at the end."""

import contextlib
import hashlib
import os
import time

from weights.errors import UserError
from weights.resources import check_space

TIMEOUT = (10, 30)  # seconds to connect, seconds between two reads
ATTEMPTS = 5  # consecutive attempts that bring no new byte
BACK_OFF = 1.0  # seconds before the second attempt; doubles before each further one
CHUNK = 2**14  # bytes; an incomplete chunk is lost when the connection breaks


def download_file(url, path, size=None, sha256=None, remedy="set GPT2_BASE_URL to a mirror"):
    """Download url to path.

    The bytes are collected in path.part. After a broken connection the download resumes at the same byte (HTTP Range),
    also in the next run; from a server without Range it starts again. The server's Content-Length is checked, as are
    size (in bytes) and sha256 if given; a file that differs is renamed to path.corrupt. Raises UserError if the server
    cannot be reached, refuses, or sends another file, and if the disk is too small; remedy ends the message.
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
            if isinstance(error, ValueError):  # not a URL
                break
        except OSError as error:
            raise UserError(
                f"cannot write {path}.part ({error.strerror}); make room, or set --models_dir or --data_dir"
            ) from None
        failures = failures + 1 if size_of(path + ".part") <= reached else 1
        reached = max(reached, size_of(path + ".part"))
    raise UserError(f"cannot fetch {url} ({reason}); check the network and run the same command again, or {remedy}")


def fetch_rest(url, path, size, remedy):
    """Append the missing bytes to path.part, in one request; size is the size of the whole file, if known."""
    import requests
    from tqdm import tqdm

    part = path + ".part"
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        begin = first_byte(response, part, have, remedy)
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
        raise requests.ConnectionError(f"{size_of(part)} of {total} bytes received")


def first_byte(response, part, have, remedy):
    """Return the position in the file of the response's first byte, or None if `have` bytes are the whole file.

    The position is `have`, as requested, or 0 from a server without Range. Raises ConnectionError if another attempt
    may help and UserError if not.
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
    raise UserError(f"{response.url} cannot be downloaded ({what}); check its name, or {remedy}")


def finish(url, path, size, sha256):
    """Rename the complete path.part to path, or to path.corrupt if its size or hash is not the expected one."""
    found, expected = size_of(path + ".part"), size
    if expected in (None, found) and sha256 is not None:
        found, expected = sha256_of(path + ".part"), sha256
    if expected not in (None, found):
        os.replace(path + ".part", path + ".corrupt")
        raise UserError(f"{url} arrived corrupt ({found}, not {expected}); run the same command to download it again")
    os.replace(path + ".part", path)


def sha256_of(path):
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def size_of(path):
    """Return the size of a file in bytes, 0 if it does not exist."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def explain(error):
    """Return the message of the innermost exception that a requests exception wraps."""
    while True:
        inner = getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, Exception)), None)
        if not isinstance(inner, Exception):
            return str(error) or type(error).__name__
        error = inner
