"""Ours and Hugging Face transformers in turns, same weights, ids and 2 threads: python bench/peers.py [ROUNDS]

Needs torch and transformers (requirements-dev.txt).
"""

import sys
import time

from common import MODELS_DIR, NAME, bandwidth, machine, median, model_124m, random_ids, read_seconds, table

from gpt2 import generate_tokens

N_TOKENS = 16


class Ours:
    def __init__(self):
        _, hparams, self.params = model_124m()
        self.n_head = hparams["n_head"]

    def run(self, ids, n_tokens):
        """Yields the ids one by one."""
        yield from generate_tokens(ids, self.params, self.n_head, n_tokens)


class Transformers:
    def __init__(self):
        import torch
        from transformers import GPT2LMHeadModel

        torch.set_num_threads(2)
        self.torch = torch
        self.model = GPT2LMHeadModel.from_pretrained(MODELS_DIR / NAME).eval()

    def run(self, ids, n_tokens):
        """Greedy, with its key/value cache and only the last position's logits, as its generate() does."""
        torch = self.torch
        with torch.inference_mode():
            new, past = torch.tensor([ids]), None
            for _ in range(n_tokens):
                out = self.model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = out.past_key_values
                new = out.logits[:, -1:].argmax(-1)
                yield int(new)


def measure(peer, context, n_tokens):
    """(ids, seconds to the first token, seconds a token after it)"""
    start, marks, ids = time.perf_counter(), [], []
    for token in peer.run(random_ids(context), n_tokens):
        ids.append(token)
        marks.append(time.perf_counter() - start)
    return ids, marks[0], (marks[-1] - marks[0]) / max(n_tokens - 1, 1)


def row(context, ours, theirs, rounds):
    first, each, speeds, same = [], [], [], True
    for turn in range(rounds):
        speeds.append(bandwidth([read_seconds() for _ in range(3)]))
        peers = (ours, theirs) if turn % 2 else (theirs, ours)
        results = {peer: measure(peer, context, N_TOKENS) for peer in peers}
        same = same and results[ours][0] == results[theirs][0]
        first.append((results[ours][1], results[theirs][1]))
        each.append((results[ours][2], results[theirs][2]))

    def column(pairs):
        a, b = (1000 * median(side) for side in zip(*pairs, strict=True))
        return [f"{a:.1f}", f"{b:.1f}", f"{median(x / y for x, y in pairs):.2f}"]

    return [context, *column(first), *column(each), f"{median(speeds) / 1e9:.1f}", "yes" if same else "NO"]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    ours, theirs = Ours(), Transformers()
    print(f"{machine()}; torch {theirs.torch.__version__}, 2 threads, medians of {rounds} rounds in turns")
    for peer in (ours, theirs):
        measure(peer, 64, 4)
    head = ["context", "first token ms: ours", "theirs", "ratio", "ms a token: ours", "theirs", "ratio", "read GB/s"]
    table([*head, "same ids"], [row(context, ours, theirs, rounds) for context in (32, 512, 900, 1000)])


if __name__ == "__main__":
    main()
