"""gpt2.py --prompts_file: a file of prompts in, a line of JSON for each continuation out, in the prompts' order."""

import collections
import itertools
import json
import os
import sys

from cli.generate import Generator, decode_text, with_bar
from engines.batching import in_order
from weights.errors import UserError
from weights.files import same_file

BEGIN = b'{"prompt": '  # of every line that is written


def run_batch(options):
    prompts = read_prompts(options.prompts_file)
    with Output(options.output, options.prompts_file) as output:
        todo = output.unfinished(prompts, options.n_samples)
        if todo:
            continue_all(options, todo, output)
        else:
            print(f"note: {options.output} has all of it; for other options, name another --output", file=sys.stderr)


def read_prompts(path):
    """A prompt a line, an empty line being a prompt too: text from nothing."""
    if path == "-":
        path, data = "standard input", sys.stdin.buffer.read()
    else:
        with open(path, "rb") as f:
            data = f.read()
    if not data:
        raise UserError(f"{path} is empty; it takes a prompt a line")
    return decode_text(data, path).replace("\r\n", "\n").split("\n")


def continue_all(options, todo, output):
    """todo: pairs of a prompt and the numbers of its samples."""
    generator, encoded, refused = Generator(options), [], []
    for number, (prompt, samples) in enumerate(todo):
        try:
            encoded.append((number, generator.start_ids(prompt), samples))
        except UserError as error:
            failed = [record(prompt, sample, "", [], "error") | {"error": str(error)} for sample in samples]
            refused += [((number, i), line) for i, line in enumerate(failed, 1)]

    def finished():
        requests = ((number, ids, [generator.sampler(i) for i in samples]) for number, ids, samples in encoded)
        for (number, i), ids, stop_reason in generator.generate_batch(requests):
            prompt, samples = todo[number]
            yield (number, i), record(prompt, samples[i - 1], generator.encoder.decode(ids), ids, stop_reason)

    keys = [(number, i) for number, (_, samples) in enumerate(todo) for i in range(1, len(samples) + 1)]
    records = in_order(itertools.chain(refused, finished()), keys)
    for line in with_bar(records, len(keys), "continuation", printed=options.output is None):
        output.write(line)
    if refused:
        print(f"note: {len(refused)} of {len(keys)} lines hold an error and no text", file=sys.stderr)


def record(prompt, sample, text, ids, stop_reason):
    return {"prompt": prompt, "sample": sample, "text": text, "ids": ids, "stop_reason": stop_reason}


class Output:
    """Where the lines go: standard output, or a file that is appended to, and that says what is done already."""

    def __init__(self, path, prompts_path):
        self.path, self.finished, self.file = path, collections.Counter(), sys.stdout.buffer
        if path is None:
            return
        self.is_new = not os.path.exists(path)
        if same_file(path, prompts_path):
            raise UserError(f"--output {path} is the prompts' own file; name another")
        if not (self.is_new or os.path.isfile(path) or os.path.isdir(path)):
            raise UserError(f"--output {path} is not a file; leave it out to get the lines on standard output")
        self.keep, self.glue = 0, b""  # bytes that stay, and what comes between them and the first new line
        if not self.is_new:
            with open(path, "rb") as f:
                self.read_finished(f)
        self.file = open(path, "ab")  # noqa: SIM115 (closed in __exit__)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.path is None:
            return
        size = self.file.tell()
        self.file.close()
        if self.is_new and size == 0:  # nothing came of it
            os.remove(self.path)

    def read_finished(self, lines):
        """Counts the lines there are, by prompt and sample. A last one without its end is kept if it is complete."""
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line) if line.strip() else {"stop_reason": "error"}
                if found["stop_reason"] != "error":
                    self.finished[found["prompt"], found["sample"]] += 1
            except (ValueError, LookupError, TypeError, RecursionError):
                if line.endswith(b"\n") or not (line.startswith(BEGIN) or BEGIN.startswith(line)):
                    raise UserError(f"{self.path}, line {number}, is not one of ours; name another --output") from None
                return  # cut off while it was written: it is made again
            self.keep += len(line)
            self.glue = b"" if line.endswith(b"\n") else b"\n"

    def unfinished(self, prompts, n_samples):
        """[(prompt, numbers of its samples)] of what is still to do, in order."""
        left, todo = self.finished.copy(), []
        for prompt in prompts:
            samples = []
            for sample in range(1, n_samples + 1):
                if left[prompt, sample]:
                    left[prompt, sample] -= 1
                else:
                    samples.append(sample)
            if samples:
                todo.append((prompt, samples))
        return todo

    def write(self, line):
        if self.path is not None and self.keep is not None:  # the first new line
            self.file.truncate(self.keep)
            self.file.write(self.glue)
            self.keep = None
        self.file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))
        self.file.flush()
