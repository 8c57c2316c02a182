"""evaluate.py --tasks beside the harness's own `hf` model: python bench/harness.py [ROUNDS]

Both get the same requests, at 124M shape: questions with four answers, texts whose last word is scored, whole
documents, and prompts to continue. They are cut from a text, with lengths as in HellaSwag, LAMBADA and WikiText.
`hf` pads the sequences of a batch to equal length; its batch sizes are 1, its default, and 8. A speedup is the time of
another program divided by ours, in the same round; above 1, ours is faster.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import DATA, MODELS_DIR, NAME, in_turn, machine, median, model_124m, spread, table
from lm_eval import __version__
from lm_eval.api.instance import Instance

from cli.harness import HarnessModel
from engines.compiled import compiled_model, is_installed

IDLE = 0.3  # seconds between two runs, in which threads stop spinning
N_QUESTIONS, N_WORDS, N_DOCUMENTS, N_PROMPTS, N_TOKENS = 6, 12, 1, 8, 16
KINDS = ("four answers", "last word", "document", "continuation")
METHODS = dict(zip(KINDS, ("loglikelihood", "loglikelihood", "loglikelihood_rolling", "generate_until"), strict=True))


def texts(name, encoder):
    """Yield pieces of a text of a given number of tokens: send() the number."""
    ids, start, n = encoder.encode((DATA / name).read_text(encoding="utf-8")), 0, None
    while True:
        n = (yield encoder.decode(ids[start : start + (n or 0)])) or 0
        start += n


def make_requests(encoder):
    """Return {kind: list of the arguments of requests}."""
    rng, found = np.random.default_rng(0), texts("wikitext2-valid.txt", encoder)
    next(found)

    def piece(low, high):
        return found.send(int(rng.integers(low, high))).strip()

    questions = [(piece(30, 110), [piece(10, 40) for _ in range(4)]) for _ in range(N_QUESTIONS)]
    words = [piece(60, 110).rpartition(" ") for _ in range(N_WORDS)]
    options = {"until": ["\0"], "max_gen_toks": N_TOKENS}
    requests = {
        "four answers": [(context, " " + answer) for context, answers in questions for answer in answers],
        "last word": [(context, " " + word) for context, _, word in words],
        "document": [(piece(1200, 1900),) for _ in range(N_DOCUMENTS)],
        "continuation": [(piece(30, 110), options) for _ in range(N_PROMPTS)],
    }
    return {
        kind: [Instance(METHODS[kind], {}, arguments, i) for i, arguments in enumerate(found)]
        for kind, found in requests.items()
    }


def our_model(encoder, hparams, params):
    return HarnessModel(encoder, hparams, *reversed(compiled_model(params)))


def their_models():
    """Return the harness's model of the same folder, with the names of files that transformers know."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        names = {"config.json": 0, "model.safetensors": 0, "encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
        for name, other in names.items():
            (Path(folder) / (other or name)).symlink_to(MODELS_DIR / NAME / name)
        model = HFLM(folder, device="cpu", dtype="float32", batch_size=1)
    return model


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    loaded = model_124m()
    requests, theirs = make_requests(loaded[0]), their_models()
    ours = {"this program, --engine numpy": HarnessModel(*loaded)}
    if is_installed():
        ours = {"this program": our_model(*loaded)} | ours

    def run(name, kind):
        model = ours.get(name, theirs)
        if model is theirs:
            theirs.batch_size_per_gpu = int(name.rpartition(" ")[2])
        time.sleep(IDLE)
        start = time.perf_counter()
        results = getattr(model, METHODS[kind])(requests[kind], disable_tqdm=True)
        return time.perf_counter() - start, results

    names = [*ours, "hf, batch size 1", "hf, batch size 8"]
    spent, results = {}, {}
    for turn in range(rounds + 1):  # the first one warms up
        for kind in KINDS:
            for name in in_turn(names, turn):
                found, results[name, kind] = run(name, kind)
                spent.setdefault((name, kind), []).append(found)
    import transformers

    print(f"{machine()}; lm_eval {__version__}, transformers {transformers.__version__}; 2 threads, {rounds} rounds")
    rows = []
    for kind in KINDS:
        for name in names:
            mine, other = spent[names[0], kind][1:], spent[name, kind][1:]
            ratio = spread([a / b for a, b in zip(other, mine, strict=True)]) if name != names[0] else ""
            same = agreement(results[name, kind], results[names[0], kind]) if name != names[0] else ""
            rows.append([kind, len(requests[kind]), name, f"{median(other):.2f}", ratio, same])
    table(["requests", "number", "program", "s", "speedup", "largest difference"], rows)


def agreement(theirs, ours):
    """Return the largest difference of the log-probabilities, or how many texts are the same."""
    if isinstance(ours[0], str):
        return f"{sum(a == b for a, b in zip(theirs, ours, strict=True))} of {len(ours)} texts the same"
    theirs, ours = (np.array([a[0] if isinstance(a, tuple) else a for a in results]) for results in (theirs, ours))
    return f"{np.max(np.abs(theirs - ours)):.0e} of {np.max(np.abs(ours)):.0f}"


if __name__ == "__main__":
    main()
