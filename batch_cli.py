"""gpt2.py --prompts_file: a file of prompts in, a line of JSON for each continuation out, in the prompts' order."""

import collections
import json
import os
import sys

from batch import in_order
from cli import Continuer, decode_text
from errors import UserError


def run_batch(options):
    prompts = read_prompts(options.prompts_file)
    with Output(options.output, options.prompts_file) as output:
        todo = output.without_finished(prompts, options.n_samples)
        if todo:
            Batch(options, todo).run(output)


def read_prompts(path):
    """A prompt a line, an empty line being a prompt too: text from nothing."""
    with open(path, "rb") as f:
        data = f.read()
    if not data:
        raise UserError(f"{path} is empty; it takes a prompt a line")
    return decode_text(data, path).replace("\r\n", "\n").split("\n")


class Output:
    """Where the lines go: standard output, or a file that is appended to, and that says what is done already."""

    def __init__(self, path, prompts_path):
        self.path, self.finished = path, collections.Counter()
        if path is None:
            self.file = sys.stdout.buffer
            return
        if os.path.exists(path) and os.path.samefile(path, prompts_path):
            raise UserError(f"--output {path} is the prompts' own file; name another")
        self.file = open(path, "a+b")  # noqa: SIM115 (closed in __exit__)
        self.read_finished()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.path is not None:
            self.file.close()

    def read_finished(self):
        """Counts the lines there are, by prompt and sample; drops a last one that was not written to its end."""
        self.file.seek(0)
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                self.file.truncate(self.file.tell() - len(line))
                return
            try:
                record = json.loads(line)
                self.finished[record["prompt"], record["sample"]] += 1
            except (ValueError, LookupError, TypeError, RecursionError):
                raise UserError(f"{self.path}, line {number} is not one of ours; name another --output") from None

    def without_finished(self, prompts, n_samples):
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

    def write(self, record):
        self.file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
        self.file.flush()


class Batch:
    """The continuations of a run, in the order in which they are to come out."""

    def __init__(self, options, todo):
        self.todo, self.continuer = todo, Continuer(options)
        self.keys = [(number, i) for number, (_, samples) in enumerate(todo) for i, _ in enumerate(samples, 1)]
        self.refused, self.n_refused = [], 0  # records of prompts that do not fit, until they are handed on

    def run(self, output):
        for record in self.continuer.with_bar(in_order(self.records(), self.keys), len(self.keys), "continuation"):
            output.write(record)
        if self.n_refused:
            print(f"note: {self.n_refused} of {len(self.keys)} lines hold an error and no text", file=sys.stderr)

    def records(self):
        """(key, record) of each continuation as it ends, the key saying where in todo it stands."""
        for key, ids, stop_reason in self.continuer.generate_batch(self.requests()):
            yield from self.hand_on()
            yield key, self.record(key, ids, stop_reason)
        yield from self.hand_on()

    def requests(self):
        for number, (prompt, samples) in enumerate(self.todo):
            try:
                ids = self.continuer.start_ids(prompt)
            except UserError as error:
                for i, _ in enumerate(samples, 1):
                    self.refused.append(((number, i), self.record((number, i), [], "error") | {"error": str(error)}))
            else:
                yield number, ids, [self.continuer.sampler(sample) for sample in samples]

    def hand_on(self):
        self.n_refused += len(self.refused)
        yield from self.refused
        self.refused.clear()

    def record(self, key, ids, stop_reason):
        prompt, samples = self.todo[key[0]]
        text = self.continuer.encoder.decode(ids)
        return {"prompt": prompt, "sample": samples[key[1] - 1], "text": text, "ids": ids, "stop_reason": stop_reason}
