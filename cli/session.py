"""One run of gpt2.py: load a model, read the prompts, generate and print the continuations.

Standard output carries the generated text and a newline (and a header line before each of several samples); everything
else goes to standard error.
"""

import codecs
import contextlib
import functools
import os
import sys
import time

import gpt2
from cli.engine import model_and_params, pays_off
from encoder import END_OF_TEXT
from engines.batching import generate_batch, in_order
from engines.instance import recording
from engines.sliding import slide
from sampling import make_sampler
from utils import load_encoder_hparams_and_params
from weights.errors import UserError, printable
from weights.files import decode_utf8
from weights.names import count_params
from weights.resources import check_memory, format_bytes

MAX_PROMPT = 10**7  # bytes; more than any context holds
N_ANSWERS = 10  # of an interactive session, for the choice of the engine


class Generator:
    """A loaded model and the options of generation. start() is called before anything is generated."""

    def __init__(self, options):
        self.options = options
        self.encoder, self.hparams, self.params = load_encoder_hparams_and_params(
            options.model_size, options.models_dir
        )
        self.n_head, self.speculation = self.hparams["n_head"], None
        self.drafts = options.draft_model is not None or options.speculate != "off"
        self.stop_id = self.encoder.encoder.get(END_OF_TEXT) if options.stop_at_end_of_text else None
        if options.stop_at_end_of_text and self.stop_id is None:
            raise UserError(
                f"the vocabulary of {options.model_size} has no {END_OF_TEXT}; leave out --stop_at_end_of_text"
            )

    def start(self, n_prompt_tokens, n_continuations, n_rows=1):
        """Choose the engine for this work (see cli.engine.pays_off) and prepare speculative decoding."""
        n_passes = n_continuations * self.options.n_tokens_to_generate / n_rows
        worth_it = pays_off(count_params(**self.hparams), n_prompt_tokens, n_passes, n_rows)
        self.model, self.params = model_and_params(self.options, self.params, self.n_head, worth_it)
        if self.drafts:
            self.speculation = self.make_speculation()

    def prompt_ids(self, prompt):
        """Return the token ids of a prompt, with an empty one replaced by the start of unconditional generation.

        Raises UserError if they and the tokens to generate exceed the model's context, unless it slides.
        """
        ids = self.encoder.encode(prompt) or self.encoder.start_ids()
        n_new = self.options.n_tokens_to_generate
        sizes = (1, min(1, n_new)) if self.options.slide else (len(ids), n_new)
        check_prompt_fits(*sizes, self.hparams["n_ctx"])
        return ids

    def sampler(self, i):
        """Return the function that chooses the tokens of sample i, counted from 1."""
        options = self.options
        seed = None if options.seed is None else options.seed + i - 1
        make = getattr(self.model, "make_sampler", make_sampler)  # JAX samples on its devices
        return make(options.temperature, options.top_k, options.top_p, seed)

    def generate_tokens(self, ids, i):
        """Yield the token ids of sample i one by one."""
        n, options = self.options.n_tokens_to_generate, {"sample": self.sampler(i), "stop_id": self.stop_id}
        if self.speculation:
            generate_tokens = functools.partial(self.speculation.generate_tokens, **options)
        else:
            bound = {"params": self.params, "n_head": self.n_head} | options
            generate_tokens = functools.partial(self.model.generate_tokens, **bound)
        if self.options.slide:
            return slide(generate_tokens, ids, self.hparams["n_ctx"], n)
        return generate_tokens(ids, n_tokens_to_generate=n)

    def generate_batch(self, requests, n_continuations):
        """Yield the continuations of a list of requests; see engines.batching.generate_batch.

        Raises UserError if the batch does not fit into memory.
        """
        n, batch_size = self.options.n_tokens_to_generate, self.options.batch_size
        if self.options.engine == "jax":
            return self.model.generate_batch(requests, self.params, self.n_head, n, batch_size, self.stop_id)
        longest = max((len(ids) for _, ids, _ in requests), default=0)
        check_batch(self.hparams, min(batch_size, n_continuations), longest + n)
        return generate_batch(requests, self.params, self.n_head, n, batch_size, self.stop_id, self.model)

    def make_speculation(self):
        """Return the speculative decoder selected by --speculate or --draft_model."""
        from engines.speculative import Speculation, self_drafter

        options = {}
        if self.options.draft_model is not None:
            options["make_drafters"] = self.load_draft_model()
        elif self.options.speculate == "self":
            options["make_drafters"] = self_drafter(self.model, self.params, self.n_head)
        return Speculation(self.params, self.n_head, model=self.model, **options)

    def load_draft_model(self):
        """Load --draft_model; return a function that makes the list of its Draft."""
        from engines.speculative import Draft

        name, model_size = self.options.draft_model, self.options.model_size
        encoder, hparams, params = load_encoder_hparams_and_params(name, self.options.models_dir)
        if encoder.encoder != self.encoder.encoder or hparams["n_vocab"] != self.hparams["n_vocab"]:
            raise UserError(
                f"the vocabulary of --draft_model {name} ({hparams['n_vocab']} tokens) is not that of {model_size} "
                f"({self.hparams['n_vocab']} tokens); choose a draft model with the same vocabulary"
            )
        cost = count_params(**hparams) / count_params(**self.hparams)
        model, params = model_and_params(self.options, params, hparams["n_head"], self.model is not gpt2)
        return lambda cache, sample: [Draft(params, hparams["n_head"], cost, model)]


def check_batch(hparams, n_rows, n_positions):
    """Raise UserError if there is not enough memory for the keys, values and logits of n_rows rows."""
    per_row = hparams["n_layer"] * 2 * hparams["n_embd"] * n_positions + hparams["n_vocab"]
    check_memory(f"a batch of {n_rows} continuations", 4 * n_rows * per_row, "set a smaller --batch_size")


def check_prompt_fits(n_prompt, n_new, n_ctx):
    """Raise UserError if the tokens of the prompt and those to generate exceed the context."""
    if n_prompt + n_new <= n_ctx:
        return
    total = f" + {n_new} to generate = {n_prompt + n_new}" if n_new else ""
    remedy = f", set --n_tokens_to_generate to {n_ctx - n_prompt}" if n_prompt < n_ctx else ""
    remedy += ", or see --slide" if n_new else ""
    raise UserError(
        f"{n_prompt} prompt tokens{total}, more than the {n_ctx} of the model's context; shorten the prompt{remedy}"
    )


class Session:
    """The prompts of one run and the output of their continuations."""

    def __init__(self, options):
        self.options = options
        self.shown = printable if sys.stdout.isatty() else str  # what is printed of a text
        self.stream = sys.stdout.isatty() and options.n_samples == 1 if options.stream is None else options.stream
        self.prompt = None if options.interactive else read_prompt(options)
        self.generator = Generator(options)
        self.one_by_one = options.n_samples == 1 or self.stream or self.generator.drafts or options.slide

    def run(self):
        if self.options.interactive:
            self.start(n_prompt_tokens=0, n_answers=N_ANSWERS)
            self.interact()
        else:
            self.answer(self.prompt)

    def start(self, n_prompt_tokens, n_answers=1):
        """Start the generator for n_answers answers, to prompts of n_prompt_tokens tokens each."""
        n_samples = self.options.n_samples
        if self.one_by_one:
            self.generator.start(n_answers * n_samples * n_prompt_tokens, n_answers * n_samples)
        else:
            n_rows = min(n_samples, self.options.batch_size)
            self.generator.start(n_answers * n_prompt_tokens, n_answers * n_samples, n_rows)

    def interact(self):
        """Answer one line after another until Ctrl-D. Ctrl-C ends the answer or, while reading a line, the program."""
        while (line := read_line()) is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self.answer_line(line)

    def answer_line(self, line):
        """Answer a line of bytes unless it is empty; print an error instead of ending the session."""
        try:
            if prompt := decode_text(line, "the prompt"):
                self.answer(prompt)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)

    def answer(self, prompt):
        """Print the continuations of a prompt, and what speculative decoding did."""
        if prompt.endswith(" "):
            print("note: the prompt ends with a space; remove it: GPT-2's tokens begin with one", file=sys.stderr)
        ids, started = self.generator.prompt_ids(prompt), time.perf_counter()
        if not self.options.interactive:
            self.start(len(ids))
        if speculation := self.generator.speculation:
            speculation.reset_counts()
        self.show_samples(ids)
        if speculation:
            print(f"note: {speculation.report(time.perf_counter() - started)}", file=sys.stderr)

    def show_samples(self, ids):
        """Print n_samples continuations of a prompt; unless they are streamed or drafted, generate them in a batch."""
        n_samples = self.options.n_samples
        if n_samples == 1:
            self.show(self.generator.generate_tokens(ids, 1))
        elif self.one_by_one:
            for i in range(1, n_samples + 1):
                print(f"=== sample {i} ===", flush=True)
                self.show(self.generator.generate_tokens(ids, i))
        else:
            self.show_batch(ids)

    def show(self, tokens):
        """Print tokens as text, each when it is generated or all at the end. Ctrl-C prints the tokens so far."""
        if not self.stream:
            tokens = with_bar(tokens, self.options.n_tokens_to_generate, "token", printed=False)
        kept = []
        try:
            for piece in map(self.shown, self.generator.encoder.decode_stream(tokens)):
                if self.stream:
                    print(piece, end="", flush=True)
                else:
                    kept.append(piece)
        except KeyboardInterrupt:
            print("".join(kept), flush=True)
            raise
        print("".join(kept), flush=True)

    def show_batch(self, ids):
        """Generate all samples in a batch and print each in turn. Ctrl-C prints the incomplete ones."""
        n_samples, sampled = self.options.n_samples, {}  # ids of the samples that are started and not printed yet
        samplers = (recording(self.generator.sampler(i), sampled.setdefault(i, [])) for i in range(1, n_samples + 1))
        continuations = self.generator.generate_batch([(None, ids, samplers)], n_samples)
        ordered = in_order(((i, new_ids) for (_, i), new_ids, _ in continuations), range(1, n_samples + 1))
        try:
            for i, new_ids in enumerate(with_bar(ordered, n_samples, "sample", printed=True), 1):
                self.show_sample(i, new_ids)
                del sampled[i]
        except KeyboardInterrupt:
            for i, new_ids in sampled.items():
                if new_ids:
                    self.show_sample(i, [token_id for token_id in new_ids if token_id != self.generator.stop_id])
            raise

    def show_sample(self, i, new_ids):
        print(f"=== sample {i} ===\n{self.shown(self.generator.encoder.decode(new_ids))}", flush=True)


def with_bar(items, total, unit, printed):
    """Yield the items, with a progress bar if standard error is a terminal.

    printed: whether the caller prints each item; the bar is then cleared before it.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="generating", unit=unit, leave=False) as bar:
        for item in items:
            if printed:
                bar.clear()
            yield item
            bar.update()


def read_line():
    """Return a line of standard input as bytes, None at the end. At a terminal, show a prompt and allow editing."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return read_at_most(MAX_PROMPT, "a line of standard input", sys.stdin.buffer.readline) or None
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are an error of the prompt
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and editing keys)
    try:
        return os.fsencode(input("prompt> "))
    except EOFError:
        print()
        return None


def read_prompt(options):
    """Return the prompt of the command line, "" if there is none."""
    if options.prompt == "-":
        return decode_text(read_at_most(MAX_PROMPT, "standard input", sys.stdin.buffer.read), "standard input")
    return decode_utf8(os.fsencode(options.prompt or ""), "the prompt")


def read_at_most(n_bytes, source, read):
    """Return what a file's method read() returns; raise UserError if that is more than n_bytes."""
    data = read(n_bytes + 1)
    if len(data) > n_bytes:
        raise UserError(f"{source} has more than {format_bytes(n_bytes)}; shorten it")
    return data


def decode_text(data, source):
    """Decode the UTF-8 bytes of a file or a pipe, without a byte order mark and without the last line break."""
    data = data.removeprefix(codecs.BOM_UTF8)
    return decode_utf8(data[:-1].removesuffix(b"\r") if data.endswith(b"\n") else data, source)
