"""The command line of gpt2.py: flags and their checks, where the prompt comes from, how text is shown, what errors say.

Standard output carries the generated text and a newline (and a line before each of several samples); everything else
goes to standard error. Exit codes: 0 done, 2 a mistake that one line on standard error explains, 130 stopped with
Ctrl-C, 141 the reader of our output has gone.
"""

import argparse
import codecs
import contextlib
import os
import sys
import time

from cli.options import Parser, exit_code, parse_count, parse_positive, parse_probability, parse_rate
from encoder import END_OF_TEXT
from engines.batching import generate_batch, in_order
from engines.instance import recording
from gpt2 import check_context, generate_tokens
from sampling import make_sampler
from utils import N_PARAMS, load_encoder_hparams_and_params
from weights.errors import UserError
from weights.files import decode_utf8
from weights.names import n_params, tensor_shapes


def page_or_picture(text):
    if not text.lower().endswith((".html", ".png")):
        raise argparse.ArgumentTypeError(
            f"{text[:100]!r} ends neither in .html nor in .png; for the explanation as text, --explain goes last"
        )
    return text


def make_parser():
    parser = Parser(
        prog="gpt2.py",
        description="Continue a text with GPT-2.",
        epilog='A prompt that starts with a dash goes after two of them: python gpt2.py -- "--dashes"',
        hint=" (a prompt of several words goes in quotes, one that starts with a dash after --)",
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="the text to continue, taken as it is; - reads standard input; none starts afresh")
    add("--prompt_file", metavar="FILE", help="read the prompt from a file (its last line break is dropped, as for -)")
    add("--n_tokens_to_generate", type=parse_count, default=40, metavar="N", help="tokens to add (default 40)")
    add("--model_size", default="124M", help=f"{', '.join(N_PARAMS)} or a folder under models_dir (default 124M)")
    parser.add_models_dir()
    add(
        "--temperature",
        type=parse_rate,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time (default); 1 draws as the model believes, more is wilder",
    )
    add("--top_k", type=parse_count, default=0, metavar="K", help="draw from the K likeliest tokens only (0: from all)")
    add(
        "--top_p",
        type=parse_probability,
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens whose probabilities reach P (1: from all)",
    )
    add("--seed", type=parse_count, metavar="N", help="the same seed draws the same text; sample i takes N + i - 1")
    add("--n_samples", type=parse_positive, default=1, metavar="N", help="how many continuations (default 1)")
    add("--stop_at_end_of_text", action="store_true", help=f"stop when the model draws {END_OF_TEXT}")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show tokens as they are made (default: one sample on a terminal; several are made at once)",
    )
    add(
        "--prompts_file",
        metavar="FILE",
        help="a prompt a line (an empty one: text from nothing), - for standard input; prints a line of JSON for each",
    )
    add("--output", metavar="FILE", help="append those lines to a file, but for what is in it already")
    add(
        "--batch_size",
        type=parse_positive,
        default=8,
        metavar="N",
        help="how many of the --prompts_file, or of --n_samples, are continued at once (default 8)",
    )
    add(
        "--speculate",
        choices=("off", "lookup", "auto"),
        default="off",
        help="guess tokens and check several a pass, for the same text: lookup guesses what followed the same words "
        "before, auto does so where the text repeats itself (default off)",
    )
    add("--draft_model", metavar="NAME", help="guess with a smaller model of the same vocabulary")
    add(
        "--explain",
        type=page_or_picture,
        nargs="?",
        const=True,
        metavar="OUT",
        help="show what the model makes of the prompt, and continue nothing: its tokens, and the likeliest next ones "
        "after every layer; OUT.html: a page, with every head's attention too; OUT.png: the attention drawn (at most "
        "128 tokens each). Goes behind the prompt",
    )
    add("--interactive", action="store_true", help="ask for one prompt after another; Ctrl-D leaves")
    return parser


def run(argv=None):
    """Runs the command line argv (default sys.argv[1:]) and returns its exit code."""
    return exit_code("gpt2.py", lambda: answer(make_parser().parse_args(argv)))


def answer(options):
    if options.explain is not None:
        from cli.explain import run_explain

        run_explain(options)
        return
    check_options(options)
    if options.prompts_file is None:
        Session(options).run()
    else:
        from cli.prompts_file import run_batch

        run_batch(options)


def check_options(options):
    given = {
        "a prompt": options.prompt is not None,
        "--prompt_file": options.prompt_file is not None,
        "--prompts_file": options.prompts_file is not None,
        "--interactive": options.interactive,
    }
    if sum(given.values()) > 1:
        raise UserError("give one of a prompt, --prompt_file, --prompts_file and --interactive, not several")
    if options.prompts_file is None and options.output is not None:
        raise UserError("--output is where the lines of --prompts_file go; for one prompt, redirect: > FILE")
    if options.prompts_file is not None and options.stream is not None:
        raise UserError("--prompts_file gives a line for each continuation when it is complete; leave --stream out")
    guessing = "--draft_model" if options.draft_model else f"--speculate {options.speculate}"
    if options.prompts_file is not None and guessing != "--speculate off":
        raise UserError(f"{guessing} is for one text at a time; --prompts_file is fast by --batch_size: leave one out")
    if options.draft_model and options.speculate == "lookup":
        raise UserError("--draft_model and --speculate lookup are two sources of guesses; leave one out")
    if options.temperature == 0 and (options.top_k or options.top_p < 1 or options.seed is not None):
        note = (
            "--top_k, --top_p and --seed choose among draws, and at temperature 0 nothing is drawn; set --temperature 1"
        )
        print(f"note: {note}", file=sys.stderr)


class Generator:
    """A model, loaded, and what the options say about continuing texts with it."""

    def __init__(self, options):
        self.options = options
        loaded = load_encoder_hparams_and_params(options.model_size, options.models_dir)
        self.encoder, self.hparams, self.params = loaded
        self.n_head, self.model = self.hparams["n_head"], None
        self.stop_id = self.encoder.encoder.get(END_OF_TEXT) if options.stop_at_end_of_text else None
        self.speculation = self.make_speculation()

    def make_speculation(self):
        """What --speculate and --draft_model ask for, None if nothing."""
        name, options = self.options.draft_model, self.options
        if not name and options.speculate == "off":
            return None
        from engines.parallel import small_batch_model
        from engines.speculative import Draft, Lookup, Speculation

        if not name:
            return Speculation(self.params, self.n_head, Lookup, eager=options.speculate == "lookup")
        encoder, hparams, params = load_encoder_hparams_and_params(name, options.models_dir)
        if encoder.encoder != self.encoder.encoder or hparams["n_vocab"] != self.hparams["n_vocab"]:
            raise UserError(
                f"--draft_model {name} ({hparams['n_vocab']} tokens) has another vocabulary than {options.model_size} "
                f"({self.hparams['n_vocab']} tokens); its guesses would mean something else: take one with the same"
            )
        cost = n_params(tensor_shapes(**hparams)) / n_params(tensor_shapes(**self.hparams))
        model, params = small_batch_model(params, hparams["n_head"])
        return Speculation(self.params, self.n_head, lambda: Draft(params, hparams["n_head"], cost, model))

    def start_ids(self, prompt):
        """The ids of a prompt; raises UserError where they leave too little room in the model's context."""
        ids = self.encoder.encode(prompt) or self.encoder.start_ids()
        n_ctx, n_new = self.hparams["n_ctx"], self.options.n_tokens_to_generate
        try:
            check_context(len(ids), n_new, n_ctx)
        except ValueError:
            fewer = f" or set --n_tokens_to_generate to {n_ctx - len(ids)}" if len(ids) < n_ctx else ""
            raise UserError(
                f"{len(ids)} prompt tokens + {n_new} to generate = {len(ids) + n_new}, more than the {n_ctx} of the "
                f"model's context; shorten the prompt{fewer}"
            ) from None
        return ids

    def sampler(self, i):
        """What chooses the tokens of sample i, counted from 1."""
        options = self.options
        seed = None if options.seed is None else options.seed + i - 1
        return make_sampler(options.temperature, options.top_k, options.top_p, seed)

    def generate_tokens(self, ids, i):
        """Yields the ids of sample i one by one."""
        n = self.options.n_tokens_to_generate
        if self.speculation:
            return self.speculation.generate_tokens(ids, n, self.sampler(i), self.stop_id)
        return generate_tokens(ids, self.params, self.n_head, n, self.sampler(i), self.stop_id)

    def generate_batch(self, requests):
        """batch.generate_batch, with the model laid out for few tokens a pass; the params as they were are let go."""
        from engines.parallel import small_batch_model

        if self.model is None:
            self.model, self.params = small_batch_model(self.params, self.n_head)
        n, batch_size = self.options.n_tokens_to_generate, self.options.batch_size
        return generate_batch(requests, self.params, self.n_head, n, batch_size, self.stop_id, self.model)


def with_bar(items, total, unit, printed):
    """The same items, with a bar on standard error where a person would otherwise watch nothing happen.

    printed: whether each is printed when it has come; the bar makes room for it.
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


class Session:
    """Continues the prompts of one run and prints the texts."""

    def __init__(self, options):
        self.options = options
        self.stream = sys.stdout.isatty() and options.n_samples == 1 if options.stream is None else options.stream
        self.first_prompt = None if options.interactive else read_prompt(options)
        self.generator = Generator(options)

    def run(self):
        if self.options.interactive:
            self.ask_for_prompts()
        else:
            self.answer(self.first_prompt)

    def ask_for_prompts(self):
        """Answers one line after another, until Ctrl-D; Ctrl-C ends an answer, or at the prompt the program."""
        while (line := read_line()) is not None:
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    prompt = decode_text(line, "the prompt")
                    if prompt:
                        self.answer(prompt)
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)

    def answer(self, prompt):
        """Prints --n_samples continuations of a prompt; if nobody watches them come, all are made at once."""
        if prompt.endswith(" "):
            print("note: the prompt ends with a space, which GPT-2 expects before the next word", file=sys.stderr)
        ids, n_samples = self.generator.start_ids(prompt), self.options.n_samples
        speculation = self.generator.speculation
        started = time.perf_counter()
        if speculation:
            speculation.count_anew()
        if n_samples == 1:
            self.show(self.generator.generate_tokens(ids, 1))
        elif self.stream or speculation:
            for i in range(1, n_samples + 1):
                print(f"=== sample {i} ===", flush=True)
                self.show(self.generator.generate_tokens(ids, i))
        else:
            self.answer_at_once(ids, n_samples)
        if speculation:
            print(f"note: {speculation.report(time.perf_counter() - started)}", file=sys.stderr)

    def answer_at_once(self, ids, n_samples):
        """Prints each sample when it is complete; when Ctrl-C comes, what there is of the others."""
        numbers, drawn = range(1, n_samples + 1), {i: [] for i in range(1, n_samples + 1)}
        request = (None, ids, [recording(self.generator.sampler(i), drawn[i]) for i in numbers])
        results = ((i, new_ids) for (_, i), new_ids, _ in self.generator.generate_batch([request]))
        try:
            for new_ids in with_bar(in_order(results, numbers), n_samples, "sample", printed=True):
                i = n_samples - len(drawn) + 1
                self.show_sample(i, new_ids)
                del drawn[i]
        except KeyboardInterrupt:
            for i, new_ids in drawn.items():
                self.show_sample(i, [token for token in new_ids if token != self.generator.stop_id])
            raise

    def show_sample(self, i, new_ids):
        print(f"=== sample {i} ===\n{self.generator.encoder.decode(new_ids)}", flush=True)

    def show(self, tokens):
        """Prints tokens as text, as they come or all at once; what there is when Ctrl-C comes is printed too."""
        text = ""
        if not self.stream:
            tokens = with_bar(tokens, self.options.n_tokens_to_generate, "token", printed=False)
        try:
            for piece in self.generator.encoder.decode_stream(tokens):
                if self.stream:
                    print(piece, end="", flush=True)
                else:
                    text += piece
        except KeyboardInterrupt:
            print(text, flush=True)
            raise
        print(text, flush=True)


def read_line():
    """One line of standard input as bytes, None at its end. A terminal gets a prompt and can edit the line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return sys.stdin.buffer.readline() or None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (its import gives input() history and editing keys)
    try:
        return os.fsencode(input("prompt> "))
    except EOFError:
        print()
        return None


def read_prompt(options):
    """The prompt as the options give it, "" for none."""
    if options.prompt_file is not None:
        with open(options.prompt_file, "rb") as f:
            return decode_text(f.read(), options.prompt_file)
    if options.prompt == "-":
        return decode_text(sys.stdin.buffer.read(), "standard input")
    return decode_utf8(os.fsencode(options.prompt or ""), "the prompt")


def decode_text(data, source):
    """What a file or a pipe holds, less a byte order mark and the last line break, as text."""
    data = data.removeprefix(codecs.BOM_UTF8)
    return decode_utf8(data[:-1].removesuffix(b"\r") if data.endswith(b"\n") else data, source)
