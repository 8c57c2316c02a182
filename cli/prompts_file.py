"""gpt2.py --prompts_file: one prompt per line in, one line of JSON per continuation out, in the order of the prompts.

With --output, an interrupted run continues where it stopped: continuations in the file are not generated again.
"""

import collections
import contextlib
import itertools
import json
import operator
import os
import sys

from cli.session import Generator, decode_text, read_at_most, with_bar
from engines.batching import in_order
from weights.errors import UserError, printable
from weights.files import same_file

MAX_PROMPTS = 10**8  # bytes
LINE_START = b'{"prompt": '  # of every line of JSON


def run_prompts_file(options):
    prompts = read_prompts(options.prompts_file)
    with Output(options.output, options.prompts_file) as output:
        todo = incomplete(prompts, options.n_samples, output.finished)
        if todo:
            write_continuations(options, todo, output)
        else:
            print(
                f"note: {options.output} is complete; for other options, name another --output",
                file=sys.stderr,
            )


def read_prompts(path):
    """Return the lines of a file, or of standard input for "-"; an empty line is an empty prompt."""
    if path == "-":
        path, data = "standard input", read_at_most(MAX_PROMPTS, "standard input", sys.stdin.buffer.read)
    else:
        with open(path, "rb") as f:
            data = read_at_most(MAX_PROMPTS, path, f.read)
    if not data:
        raise UserError(f"{path} is empty; write one prompt per line")
    return decode_text(data, path).replace("\r\n", "\n").split("\n")


def incomplete(prompts, n_samples, finished):
    """Return [(prompt, set of the numbers of its finished samples)], without the prompts that are complete.

    finished: for each prompt a Counter of its finished samples, as the same prompt may occur several times.
    """
    todo = []
    for prompt in prompts:
        counts = finished.get(prompt, {})
        done = {i for i, count in counts.items() if count and 1 <= i <= n_samples}
        for i in done:
            counts[i] -= 1
        if len(done) < n_samples:
            todo.append((prompt, done))
    return todo


def missing(done, n_samples):
    """Yield the numbers of the samples that are not done."""
    return itertools.filterfalse(done.__contains__, range(1, n_samples + 1))


def write_continuations(options, todo, output):
    """Generate and write the missing samples; prompts that cannot be continued give records of their error."""
    generator, n_samples, requests, errors = Generator(options), options.n_samples, [], {}
    for number, (prompt, done) in enumerate(todo):
        try:
            ids = generator.prompt_ids(prompt)
        except UserError as error:
            errors[number] = error
        else:
            requests.append((number, ids, map(generator.sampler, missing(done, n_samples))))
    n_missing = [n_samples - len(done) for _, done in todo]
    n_lines, n_errors = sum(n_missing), sum(n_missing[number] for number in errors)
    continuations = generated(generator, requests, n_missing)
    records = records_in_order(todo, n_samples, errors, continuations)
    for line in with_bar(records, n_lines, "continuation", printed=options.output is None):
        output.write(line)
    message = f"{n_errors} of {n_lines} lines contain an error and no text"
    if n_errors == n_lines:
        raise UserError(f"{message}; correct the prompts")
    if n_errors:
        print(f"note: {message}", file=sys.stderr)


def generated(generator, requests, n_missing):
    """Yield (text, ids, stop reason) of each continuation, in order. n_missing: continuations per request, by key."""
    n_continuations = sum(n_missing[number] for number, _, _ in requests)
    n_rows = max(1, min(n_continuations, generator.options.batch_size))
    generator.start(sum(len(ids) for _, ids, _ in requests), n_continuations, n_rows)
    results = generator.generate_batch(requests, n_continuations)
    keys = ((number, i) for number, _, _ in requests for i in range(1, n_missing[number] + 1))
    for ids, stop_reason in in_order(((key, value) for key, *value in results), keys):
        yield generator.encoder.decode(ids), ids, stop_reason


def records_in_order(todo, n_samples, errors, continuations):
    """Yield the record of each missing sample. errors: by index in todo; continuations: an iterator over the others."""
    for number, (prompt, done) in enumerate(todo):
        for sample in missing(done, n_samples):
            if number in errors:
                yield record(prompt, sample, "", [], "error") | {"error": str(errors[number])}
            else:
                yield record(prompt, sample, *next(continuations))


def record(prompt, sample, text, ids, stop_reason):
    return {"prompt": prompt, "sample": sample, "text": text, "ids": ids, "stop_reason": stop_reason}


class Output:
    """The destination of the lines of JSON: standard output, or a file that is appended to.

    finished: a Counter of the samples in the file for each prompt.
    """

    def __init__(self, path, prompts_path):
        self.path, self.finished, self.file = path, collections.defaultdict(collections.Counter), sys.stdout.buffer
        if path is None:
            return
        check_output(path, prompts_path)
        self.is_new, self.n_kept, self.separator = not os.path.exists(path), 0, b""
        self.file = open(path, "ab")  # noqa: SIM115 (closed in __exit__)
        self.lock()
        with open(path, "rb") as f:
            self.read_finished(f)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.path is None:
            return
        is_empty = self.file.tell() == 0
        self.file.close()
        if self.is_new and is_empty:
            os.remove(self.path)

    def lock(self):
        """Keep other processes from writing to the file, where the operating system can."""
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process writes to --output {self.path}; wait for it, or name another"
                ) from None

    def read_finished(self, lines):
        """Count the finished samples in the file, and the bytes to keep, n_kept: all but an incomplete last line."""
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    found = json.loads(line)
                    self.finished[found["prompt"]][operator.index(found["sample"])] += 1
            except (ValueError, LookupError, TypeError, RecursionError):
                if line.endswith(b"\n") or not (line.startswith(LINE_START) or LINE_START.startswith(line)):
                    raise UserError(
                        f"{self.path}, line {number}, is not a line that --prompts_file writes; name another --output"
                    ) from None
                return
            self.n_kept += len(line)
            self.separator = b"" if line.endswith(b"\n") else b"\n"

    def write(self, line):
        if self.path is not None and self.n_kept is not None:  # the first new line
            self.file.truncate(self.n_kept)
            self.file.write(self.separator)
            self.n_kept = None
        text = json.dumps(line, ensure_ascii=False)
        text = printable(text) if self.path is None and sys.stdout.isatty() else text
        self.file.write(text.encode("utf-8") + b"\n")
        self.file.flush()


def check_output(path, prompts_path):
    if same_file(path, prompts_path):
        raise UserError(f"--output {path} is the file of the prompts; name another")
    is_device = os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))  # open() refuses folders
    if is_device or path == "-":
        raise UserError(f"--output {path} is not a file; leave it out to print the lines on standard output")
