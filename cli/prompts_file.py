"""gpt2.py --prompts_file: one prompt per line in, one line of JSON per continuation out, in the order of the prompts.

With --output, an interrupted run continues where it stopped: continuations in the file are not generated again.
"""

import collections
import itertools
import json
import os
import sys

from cli.session import Generator, decode_text, with_bar
from engines.batching import in_order
from weights.errors import UserError
from weights.files import same_file

LINE_START = b'{"prompt": '  # of every line of JSON


def run_prompts_file(options):
    prompts = read_prompts(options.prompts_file)
    with Output(options.output, options.prompts_file) as output:
        todo = missing_samples(prompts, options.n_samples, output.finished)
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
        path, data = "standard input", sys.stdin.buffer.read()
    else:
        with open(path, "rb") as f:
            data = f.read()
    if not data:
        raise UserError(f"{path} is empty; write one prompt per line")
    return decode_text(data, path).replace("\r\n", "\n").split("\n")


def missing_samples(prompts, n_samples, finished):
    """Return [(prompt, numbers of its samples to generate)], without the prompts that are complete.

    finished: a Counter of the (prompt, sample) that are done; the same prompt may occur several times.
    """
    finished, todo = finished.copy(), []
    for prompt in prompts:
        missing = []
        for sample in range(1, n_samples + 1):
            if finished[prompt, sample]:
                finished[prompt, sample] -= 1
            else:
                missing.append(sample)
        if missing:
            todo.append((prompt, missing))
    return todo


def write_continuations(options, todo, output):
    """Generate and write the continuations in order; a prompt that is too long gets error records."""
    generator, requests, errors = Generator(options), [], []
    for number, (prompt, samples) in enumerate(todo):
        try:
            ids = generator.prompt_ids(prompt)
        except UserError as error:
            errors += [((number, i), error_record(prompt, sample, error)) for i, sample in enumerate(samples, 1)]
        else:
            requests.append((number, ids, [generator.sampler(sample) for sample in samples]))
    keys = [(number, i) for number, (_, samples) in enumerate(todo) for i in range(1, len(samples) + 1)]
    records = in_order(itertools.chain(errors, generated_records(generator, requests, todo)), keys)
    for line in with_bar(records, len(keys), "continuation", printed=options.output is None):
        output.write(line)
    if errors:
        print(f"note: {len(errors)} of {len(keys)} lines contain an error and no text", file=sys.stderr)


def generated_records(generator, requests, todo):
    """Yield ((index in todo, i), record) of each continuation when it is complete; i counts its samples from 1."""
    for (number, i), ids, stop_reason in generator.generate_batch(requests):
        prompt, samples = todo[number]
        yield (number, i), record(prompt, samples[i - 1], generator.encoder.decode(ids), ids, stop_reason)


def record(prompt, sample, text, ids, stop_reason):
    return {"prompt": prompt, "sample": sample, "text": text, "ids": ids, "stop_reason": stop_reason}


def error_record(prompt, sample, error):
    return record(prompt, sample, "", [], "error") | {"error": str(error)}


class Output:
    """The destination of the lines of JSON: standard output, or a file that is appended to.

    finished: a Counter of the continuations in the file, by (prompt, sample).
    """

    def __init__(self, path, prompts_path):
        self.path, self.finished, self.file = path, collections.Counter(), sys.stdout.buffer
        if path is None:
            return
        check_output(path, prompts_path)
        self.is_new, self.n_kept, self.separator = not os.path.exists(path), 0, b""
        if not self.is_new:
            with open(path, "rb") as f:
                self.read_finished(f)
        self.file = open(path, "ab")  # noqa: SIM115 (closed in __exit__)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.path is None:
            return
        is_empty = self.file.tell() == 0
        self.file.close()
        if self.is_new and is_empty:
            os.remove(self.path)

    def read_finished(self, lines):
        """Count the continuations in the file, and the bytes to keep, n_kept: all but an incomplete last line."""
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line) if line.strip() else {"stop_reason": "error"}
                if found["stop_reason"] != "error":
                    self.finished[found["prompt"], found["sample"]] += 1
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
        self.file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))
        self.file.flush()


def check_output(path, prompts_path):
    if same_file(path, prompts_path):
        raise UserError(f"--output {path} is the file of the prompts; name another")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # open() refuses folders
        raise UserError(f"--output {path} is not a file; leave it out to print the lines on standard output")
