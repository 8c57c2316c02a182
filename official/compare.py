"""Compare this GPT-2 with OpenAI's own code on the same weights: token ids, greedy continuations, logits.

official/README.md describes the comparison, its output and its exit codes. OpenAI's code runs in a separate process
(theirs.py), on the CPU and from the TensorFlow checkpoint; ours runs from the imported weights.
"""

import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from tqdm import tqdm

from gpt2 import generate, gpt2
from utils import find_model_dir, load_encoder_hparams_and_params
from weights.errors import UserError
from weights.releases import is_downloadable
from weights.tf_checkpoint import checkpoint_prefix

EXIT_DIFFERENT = 1
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
    "long": "".join(SENTENCE.format(day) for day in range(1, 26)),
}


def run(options):
    """Run the comparison, print its results and return the exit code."""
    official_repo, models_dir = os.path.expanduser(options.official_repo), options.models_dir
    check_checkout(os.path.normpath(official_repo), options.clone)
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
        for i, (name, prompt) in enumerate(bar):
            their_logits = np.load(os.path.join(folder, f"{i}.npy"), mmap_mode="r")
            ours, our_logits = answer(prompt, encoder, hparams, params, options.n_tokens_to_generate)
            row = (name, *compare(theirs[i], their_logits, ours, our_logits))
            tqdm.write(ROW.format(*row))
            differences += describe_difference(name, theirs[i], their_logits, ours, our_logits, encoder)
    print("\nspread: standard deviation of OpenAI's logits over the vocabulary, averaged over the prompt's positions\n")
    print("\n".join(differences) or "identical")
    return EXIT_DIFFERENT if differences else 0


# Prerequisites: OpenAI's code, TensorFlow, and the files of the model


def check_checkout(path, clone):
    """Raise UserError, naming the git commands to run, unless path is an unmodified checkout of COMMIT.

    clone: run these commands if they only clone the repository or check out the commit.
    """
    checkout = ["git", "-C", path, "checkout", COMMIT]
    if not os.path.exists(path) or (os.path.isdir(path) and not os.listdir(path)):
        run_or_name(f"no checkout at {path}", [["git", "clone", URL, path], checkout], clone)
    elif not os.path.exists(os.path.join(path, ".git")):
        new = f"{path}-{COMMIT[:7]}"
        commands = [["git", "clone", URL, new], ["git", "-C", new, "checkout", COMMIT]]
        raise UserError(f"{path} is not a git checkout; name a new folder: {join_commands(commands)}")
    head = git(["git", "-C", path, "rev-parse", "HEAD"])
    if head != COMMIT:
        run_or_name(f"{path} is at commit {head[:7]}, not {COMMIT[:7]}", [checkout], clone)
    changed = git(["git", "-C", path, "diff", "--name-only", COMMIT, "--", "src"]).split("\n")[0]
    if changed:
        raise UserError(f"{path}: {changed} differs from OpenAI's; run: {join_commands([[*checkout, '--', 'src']])}")


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
    """Run theirs.py; return its results, one dict per prompt. It saves the logits as folder/0.npy, 1.npy, ..."""
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
    return answers


def answer(prompt, encoder, hparams, params, n_new):
    """Return our result in the form of theirs.py, and the logits of one pass over all ids but the last."""
    ids = encoder.encode(prompt)
    new_ids = generate(ids, params, hparams["n_head"], n_new)
    return {"ids": ids, "new_ids": new_ids}, gpt2(ids + new_ids[:-1], **params, n_head=hparams["n_head"])


# The output

ROW = "{:<12} {:>6}  {:<10} {:>12}  {:>18} {:>10}"


def print_heading(options, tensorflow):
    versions = f"OpenAI's {COMMIT[:7]} on TensorFlow {tensorflow}, ours on NumPy {np.__version__}"
    print(f"{options.model_size}, {options.n_tokens_to_generate} greedy tokens; {versions}\n")
    print(ROW.format("prompt", "tokens", "tokenizer", "greedy ids", "largest difference", "of spread"))


def compare(theirs, their_logits, ours, our_logits):
    """Return the columns after the prompt's name: how many ids agree, and how much the prompt's logits differ."""
    n_prompt, n_new = len(theirs["ids"]), len(theirs["new_ids"])
    if theirs["ids"] != ours["ids"]:
        return n_prompt, "different", "-", "-", "-"
    n_same = first_difference(theirs["new_ids"], ours["new_ids"])
    largest = np.max(np.abs(our_logits[:n_prompt] - their_logits[:n_prompt]))
    spread = np.mean(np.std(their_logits[:n_prompt], axis=-1))
    same = f"{n_new if n_same is None else n_same} of {n_new}"
    return n_prompt, "identical", same, f"{largest:.2e}", f"{largest / spread:.1e}"


def first_difference(a, b):
    """Return the first index at which two lists differ, None if they are equal."""
    pairs = enumerate(itertools.zip_longest(a, b))
    return next((i for i, (x, y) in pairs if x != y), None)


def describe_difference(name, theirs, their_logits, ours, our_logits, encoder):
    """Return lines about the first token that differs, with the two largest logits of each; none if all are equal."""
    i = first_difference(theirs["ids"], ours["ids"])
    if i is not None:
        their_id, our_id = (format_token(ids[i : i + 1], encoder) for ids in (theirs["ids"], ours["ids"]))
        return [f"different: {name}: token {i + 1} of the prompt is {their_id} in OpenAI's code, {our_id} in ours"]
    i = first_difference(theirs["new_ids"], ours["new_ids"])
    if i is None:
        return []
    row = len(ours["ids"]) - 1 + i  # of the logits from which new id i was chosen
    return [
        f"different: {name}: generated token {i + 1} of {len(theirs['new_ids'])}",
        f"  OpenAI's {format_choice(theirs['new_ids'][i], their_logits[row], encoder)}",
        f"  ours     {format_choice(ours['new_ids'][i], our_logits[row], encoder)}",
    ]


def format_choice(chosen, logits, encoder):
    first, second = np.argsort(-logits, kind="stable")[:2].tolist()
    top = ", ".join(f"{format_token([i], encoder)} {logits[i]:.6f}" for i in (first, second))
    return f"chose {format_token([chosen], encoder)}; largest logits: {top}; gap {logits[first] - logits[second]:.2e}"


def format_token(ids, encoder):
    """Return the id and the text, in ASCII, of the token in a list of one; "nothing" for an empty list."""
    return f"{ids[0]} {encoder.decode(ids)!a}" if ids else "nothing"


if __name__ == "__main__":
    from cli.compare import run as run_command_line

    raise SystemExit(run_command_line())
