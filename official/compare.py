"""Compare this GPT-2 with OpenAI's own code on the same weights: token ids, logits, greedy continuations.

official/README.md describes the comparison, its output and its exit codes. OpenAI's code runs in a separate process
(theirs.py), on the CPU and from the TensorFlow checkpoint; ours runs from the imported weights.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from tqdm import tqdm

from gpt2 import generate_tokens, gpt2
from utils import find_model_dir, load_encoder_hparams_and_params
from weights.errors import UserError
from weights.files import open_regular
from weights.releases import is_downloadable
from weights.tf_checkpoint import checkpoint_prefix

EXIT_DIFFERENT = 1
# The tolerance of a logit, as a fraction of the spread at its own position: an average over the positions would let one
# with a large spread hide the differences at the others.
TOLERANCE = 2e-4
URL, COMMIT = "https://github.com/openai/gpt-2", "9b63575ef42771a015060c964af2c3da4cf7c8ab"
THEIRS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "theirs.py")

CODE = """def mean(numbers):
    if not numbers:\treturn None  # nothing to divide by
    return sum(n * 1.0 for n in numbers) / len(numbers)

print(f"{mean([1, 2, 3.5]):.2f}")
"""
SENTENCE = "On day {} the ship's log says that the wind blew from the west, and that nobody aboard slept before dawn.\n"
PROMPTS = {
    "Turing": "Alan Turing theorized that computers would one day become",
    "one letter": "A",
    "non-ASCII": "Das Mädchen aß früh — “naïve” Привет, мир; 人工知能 ｶﾅ e\u0301 ½ 🙂👩\u200d🚀\u00a0fin",
    "spacing": "  I'LL  say they'll, don't\t\n\n \r\n 1234567 ...?!  x²  <|endoftext|>   ",
    "code": CODE,
    "long": "".join(SENTENCE.format(day) for day in range(1, 46)),  # cut to fill the context
}


def run(options):
    """Run the comparison, print its results and return the exit code."""
    official_repo, models_dir = os.path.abspath(os.path.expanduser(options.official_repo)), options.models_dir
    check_checkout(official_repo, options.clone)
    check_tensorflow()
    encoder, hparams, params = load_encoder_hparams_and_params(options.model_size, models_dir)
    model_dir = find_model_dir(options.model_size, models_dir)
    check_release_files(options.model_size, model_dir)
    prompts = choose_prompts(options.prompt, encoder, hparams["n_ctx"], options.n_tokens_to_generate)
    with tempfile.TemporaryDirectory() as folder:
        theirs = run_theirs(official_repo, model_dir, prompts, options.n_tokens_to_generate, folder)
        print_heading(options, theirs[0]["tensorflow"])
        differences = []
        bar = tqdm(prompts.items(), desc="ours", unit="prompt", leave=False, disable=None)
        for (name, prompt), their_answer in zip(bar, theirs, strict=True):
            our_answer = answer(prompt, their_answer, encoder, params, hparams["n_head"])
            row, lines = compare(name, their_answer, our_answer, encoder)
            tqdm.write(ROW.format(*row))
            differences += lines
    print("\nspread: standard deviation of OpenAI's logits over the vocabulary, at the position of the difference\n")
    print("\n".join(differences) or f"identical token ids; all logits are within {TOLERANCE:.0e} of the spread")
    return EXIT_DIFFERENT if differences else 0


# Prerequisites: OpenAI's code, TensorFlow, and the files of the model


def check_checkout(path, clone):
    """Raise UserError, naming the git commands to run, unless path is an unmodified checkout of COMMIT.

    clone: run these commands if they only clone the repository or check out the commit.
    """
    checkout = ["git", "-C", path, "checkout", COMMIT]
    if not os.path.exists(path) or (os.path.isdir(path) and not os.listdir(path)):
        run_or_name(f"no checkout at {path}", [["git", "clone", URL, path], checkout], clone)
    elif not (os.path.exists(os.path.join(path, ".git")) and has_commit(path)):
        new = f"{path}-{COMMIT[:7]}"
        commands = [["git", "clone", URL, new], ["git", "-C", new, "checkout", COMMIT]]
        raise UserError(f"{path} is not a git checkout of {URL}; name a new folder: {join_commands(commands)}")
    head = git(["git", "-C", path, "rev-parse", "HEAD"])
    if head != COMMIT:
        run_or_name(f"{path} is at commit {head[:7]}, not {COMMIT[:7]}", [checkout], clone)
    check_sources(path)


def has_commit(path):
    """Return whether the repository has COMMIT; another one, which has other files, does not."""
    command = ["git", "-C", path, "cat-file", "-e", f"{COMMIT}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def check_sources(path):
    """Raise UserError unless path/src has the files of COMMIT, and no other that Python could import.

    The bytes are compared with the hashes in the commit, because git status trusts its index and omits ignored files.
    """
    listing = git(["git", "-C", path, "ls-tree", "-r", COMMIT, "src/"])  # lines of "mode blob hash<tab>name"
    expected = {name: line.split()[2] for line, _, name in (row.partition("\t") for row in listing.splitlines())}
    src = pathlib.Path(path, "src")
    found = {
        file.relative_to(path).as_posix()
        for file in src.rglob("*")
        if (file.is_symlink() or not file.is_dir()) and "__pycache__" not in file.relative_to(src).parts
    }
    for name in sorted(found | expected.keys()):
        if name not in expected:
            raise UserError(f"{path}: {name!r} is not OpenAI's and could be imported in place of a module; remove it")
        if name not in found or blob_hash(os.path.join(path, name)) != expected[name]:
            command = ["git", "-C", path, "checkout", "--ignore-skip-worktree-bits", COMMIT, "--", "src"]
            raise UserError(f"{path}: {name} differs from OpenAI's; run: {join_commands([command])}")


def blob_hash(path):
    """Return git's hash of a text file; git may have converted its line ends on checkout."""
    with open_regular(path) as f:
        data = f.read().replace(b"\r\n", b"\n")
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def run_or_name(problem, commands, clone):
    """Run the git commands that solve a problem or, without --clone, raise UserError that names both."""
    if not clone:
        raise UserError(f"{problem}; run (or add --clone): {join_commands(commands)}")
    for command in commands:
        git(command)


def join_commands(commands):
    return " && ".join(map(shlex.join, commands))


def git(command):
    """Return the output of a git command; raise UserError with the last line of its error message if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except FileNotFoundError:
        raise UserError("git is needed and not installed; install it, then run the same command again") from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed ({last_line(done.stderr)}); run it by hand")
    return done.stdout.strip()


def last_line(text):
    return text.strip().rpartition("\n")[2].strip()


def check_tensorflow():
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError("OpenAI's code needs TensorFlow, which is not installed: pip install -r requirements-dev.txt")


def check_release_files(model_size, model_dir):
    """Raise UserError unless the folder has the files that OpenAI's code reads; ours needs only the imported ones."""
    missing = [
        name
        for name in ("hparams.json", "encoder.json", "vocab.bpe")
        if not os.path.exists(os.path.join(model_dir, name))
    ]
    if not checkpoint_prefix(model_dir):
        missing.append("the TensorFlow checkpoint (checkpoint, model.ckpt.*)")
    if missing:
        remedy = ", or give --models_dir a new folder to download them into" if is_downloadable(model_size) else ""
        raise UserError(f"{model_dir} lacks {', '.join(missing)}, which OpenAI's code reads; put them back{remedy}")


# The prompts and the results of both programs


def choose_prompts(extra, encoder, n_ctx, n_new):
    """Return the fixed prompts, cut to fit into the context with n_new more tokens, and the extra one, by name."""
    n_max = n_ctx - n_new
    if n_max < 1:
        raise UserError(f"--n_tokens_to_generate {n_new} leaves no room for a prompt in the context of {n_ctx} tokens")
    prompts = {name: truncate(prompt, encoder, n_max) for name, prompt in PROMPTS.items()}
    if extra is not None:
        if not extra:
            raise UserError("--prompt is empty, which OpenAI's code does not accept; give some text")
        n_extra = len(encoder.encode(extra))
        if n_extra > n_max:
            raise UserError(
                f"--prompt has {n_extra} tokens, more than the {n_max} that {n_new} tokens to generate leave of the "
                f"context of {n_ctx}; shorten it"
            )
        prompts["--prompt"] = extra
    return {name: prompt for name, prompt in prompts.items() if prompt}


def truncate(text, encoder, n_max):
    """Return the beginning of a text, at most n_max tokens."""
    while (n_tokens := len(encoder.encode(text))) > n_max:
        text = text[: len(text) * n_max // n_tokens]
    return text


def run_theirs(official_repo, model_dir, prompts, n_new, folder):
    """Run theirs.py; return one dict per prompt: "ids", "new_ids", "logits" (mapped from a file in folder)."""
    models_dir, model_name = os.path.split(os.path.abspath(model_dir))
    request = {
        "official_repo": os.path.abspath(official_repo),
        "models_dir": models_dir,
        "model_name": model_name,
        "prompts": list(prompts.values()),
        "n_tokens_to_generate": n_new,
        "logits_dir": folder,
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stdin, tempfile.TemporaryFile() as stderr:
        json.dump(request, stdin)
        stdin.seek(0)
        # a GPU would multiply matrices in TF32; their encoder.py opens encoder.json in the default encoding
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONUTF8": "1"}
        command = [sys.executable, THEIRS]
        with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=env) as child:
            lines = tqdm(child.stdout, "OpenAI's", total=len(prompts), unit="prompt", leave=False, disable=None)
            answers = [json.loads(line) for line in lines]
        if child.returncode:
            stderr.seek(0)
            message = last_line(stderr.read().decode("utf-8", "replace")) or f"exit status {child.returncode}"
            raise UserError(f"OpenAI's code failed on {model_dir}: {message}")
    logits = (np.load(os.path.join(folder, f"{i}.npy"), mmap_mode="r") for i in range(len(answers)))
    return [result | {"logits": array} for result, array in zip(answers, logits, strict=True)]


def answer(prompt, theirs, encoder, params, n_head):
    """Return our results in the form of OpenAI's: the ids of the prompt; new ids and logits, both from OpenAI's ids."""
    new_ids = []
    with contextlib.suppress(FloatingPointError):  # logits that are not finite, which compare() reports
        for new_id in generate_tokens(theirs["ids"], params, n_head, len(theirs["new_ids"])):
            new_ids.append(new_id)
    logits = gpt2(theirs["ids"] + theirs["new_ids"], **params, n_head=n_head)
    return {"ids": encoder.encode(prompt), "new_ids": new_ids, "logits": logits}


# The output

ROW = "{:<12} {:>6}  {:<10} {:>12}  {:>18} {:>10}"


def print_heading(options, tensorflow):
    versions = f"OpenAI's {COMMIT[:7]} on TensorFlow {tensorflow}, ours on NumPy {np.__version__}"
    print(f"{options.model_size}, {options.n_tokens_to_generate} greedy tokens; {versions}\n")
    print(ROW.format("prompt", "tokens", "tokenizer", "greedy ids", "largest difference", "of spread"))


def compare(name, theirs, ours, encoder):
    """Return a prompt's row of the table, and the lines that describe what differs; no lines if nothing does."""
    n_prompt, n_new = len(theirs["ids"]), len(theirs["new_ids"])
    in_prompt, in_new = (first_difference(theirs[key], ours[key]) for key in ("ids", "new_ids"))
    position, token, largest, spread = largest_difference(theirs["logits"], ours["logits"])
    lines = []
    if in_prompt is not None:
        their_id, our_id = (format_token(found["ids"][in_prompt:], encoder) for found in (theirs, ours))
        lines.append(f"token {in_prompt + 1} of the prompt is {their_id} in OpenAI's code, {our_id} in ours")
    if not largest <= TOLERANCE * spread:  # also if one of them is NaN
        there = format_token((theirs["ids"] + theirs["new_ids"])[position:], encoder)
        their_logit, our_logit = (found["logits"][position, token] for found in (theirs, ours))
        lines.append(
            f"position {position + 1} of {n_prompt + n_new} (token {there}): the logit of "
            f"{format_token([token], encoder)} is {their_logit:.6f} in OpenAI's code, {our_logit:.6f} in ours; "
            f"difference {largest:.2e}, tolerance {TOLERANCE * spread:.2e}"
        )
    if in_new is not None:
        their_choice, our_choice = (format_choice(found, n_prompt, in_new, encoder) for found in (theirs, ours))
        lines.append(f"generated token {in_new + 1} of {n_new}\n  OpenAI's {their_choice}\n  ours     {our_choice}")
    tokenizer = "identical" if in_prompt is None else "different"
    same = f"{n_new if in_new is None else in_new} of {n_new}"
    row = (name, n_prompt, tokenizer, same, f"{largest:.2e}", f"{largest / spread:.1e}")
    return row, [f"different: {name}: {line}" for line in lines]


def largest_difference(theirs, ours):  # [n_seq, n_vocab], [n_seq, n_vocab] -> one number each
    """Return where two arrays of logits differ most: the position, the token, the difference and the spread there.

    The spread is the standard deviation of OpenAI's logits over the vocabulary, and the position is the one whose
    largest difference is the largest multiple of its spread. A logit of either program that is NaN or infinite makes
    the difference infinite, or the difference or the spread NaN; the first position with NaN is returned.
    """
    found = []
    with np.errstate(invalid="ignore"):  # inf - inf
        for their_logits, our_logits in zip(theirs, ours, strict=True):  # [n_vocab] each
            exact = their_logits.astype(np.float64)  # squares of large float32 numbers overflow
            difference = np.abs(our_logits - exact)
            token = int(np.argmax(difference))  # the first NaN, if there is one
            spread = np.maximum(np.std(exact), np.finfo(np.float64).tiny)  # a divisor, so never 0
            found.append((token, float(difference[token]), float(spread)))
    position = int(np.argmax([largest / spread for _, largest, spread in found]))
    return position, *found[position]


def first_difference(a, b):
    """Return the first index at which two lists differ, None if they are equal."""
    pairs = enumerate(itertools.zip_longest(a, b))
    return next((i for i, (x, y) in pairs if x != y), None)


def format_choice(found, n_prompt, i, encoder):
    """Return which token a program generated as new token i, and the two largest logits from which it chose."""
    logits = found["logits"][n_prompt - 1 + i]
    first, second = np.argsort(-logits, kind="stable")[:2].tolist()
    top = ", ".join(f"{format_token([token], encoder)} {logits[token]:.6f}" for token in (first, second))
    chosen = format_token(found["new_ids"][i:], encoder)
    return f"chose {chosen}; largest logits: {top}; gap {logits[first] - logits[second]:.2e}"


def format_token(ids, encoder):
    """Return the id and the text, in ASCII, of the first token of a list; "nothing" for an empty list."""
    return f"{ids[0]} {encoder.decode(ids[:1])!a}" if ids else "nothing"


if __name__ == "__main__":
    from cli.compare import run as run_command_line

    raise SystemExit(run_command_line())
