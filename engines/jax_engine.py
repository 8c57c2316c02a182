"""Generation with JAX: a prefill of the prompts, then a loop over tokens that stays on the devices. Imports jax.

The devices return the tokens of a batch in chunks, and complete rows are replaced between chunks. Each shape of arrays
is compiled once, so there are few: the lengths of prompts and caches are rounded up to powers of two, and attention
masks the positions that a row does not use.
"""

import contextlib
import functools
import os
import sys
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from engines.batching import new_rows
from engines.jax_model import KVCache, jax_model, make_mesh, sharded, token_losses
from engines.jax_sampling import Sampler, choose
from engines.scoring import fitted
from weights.resources import check_memory

CHUNK = 32  # tokens that the devices generate before the host sees them
SHORTEST = 32  # the fewest positions of a prefill and of a cache
PREFILL_TOKENS = 2**13  # per prefill pass of several prompts, padding included: limits its memory
SCORE_TOKENS = 2**11  # per pass whose logits are all computed, padding included


def jax_engine(params, n_head, dtype="float32", shape=None):
    """Return (engine, params): an Engine, and the parameters on its devices.

    dtype: "float32" or "bfloat16", which is lossy. shape: that of the mesh (see make_mesh).
    Raises UserError if there are too few devices, or if their number or their memory is unsuitable.
    """
    mesh = make_mesh(params, n_head, shape)
    return Engine(jax_model(n_head, dtype), mesh, dtype), sharded(params, n_head, mesh, dtype)


def power_of_two(n):
    """Return the smallest power of two that is at least n, for n > 0."""
    return 1 << (n - 1).bit_length()


class Engine:
    """A model on a mesh, with gpt2.py's functions for generation. The samplers are those of jax_sampling.py."""

    KVCache = int  # new_rows of batching.py reserves positions; their number is enough here
    make_sampler = Sampler

    def __init__(self, model, mesh, dtype):
        self.model, self.mesh, self.dtype = model, mesh, dtype
        self.by_row_and_head = NamedSharding(mesh, PartitionSpec("data", "model"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self.gpt2 = jax.jit(self.forward, static_argnames=("n_head", "last_only"))
        self.token_losses = jax.jit(token_losses, out_shardings=everywhere)
        self.are_largest = jax.jit(are_largest, out_shardings=everywhere)
        self.enlarge = jax.jit(enlarge, static_argnames="n_max", out_shardings=self.by_row_and_head)
        jit = functools.partial(jax.jit, donate_argnames="kv")
        self.prefill = jit(self.prefill_rows, static_argnames="n_head", out_shardings=self.by_row_and_head)
        results = self.by_row_and_head, everywhere, everywhere
        self.decode = jit(self.decode_chunk, static_argnames=("n_head", "top_k"), out_shardings=results)

    def forward(self, inputs, n_head, last_only=False, **params):  # [b, n_seq] -> [b, n_seq, n_vocab]
        """gpt2.gpt2 of a batch, which is sharded over the axis `data` if its rows divide by it."""
        if inputs.shape[0] % self.mesh.shape["data"] == 0:
            inputs = jax.lax.with_sharding_constraint(inputs, NamedSharding(self.mesh, PartitionSpec("data")))
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
            return self.model.gpt2(inputs, **params, n_head=n_head, last_only=last_only)

    def score(self, pairs, params, n_head, progress=iter):
        """scoring.score, except that every pair is a row of its own."""
        n_ctx, n_data = params["wpe"].shape[0], self.mesh.shape["data"]
        log_probs, is_greedy, batches = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool), []
        waiting = sorted(((fitted(*pair, n_ctx), i) for i, pair in enumerate(pairs)), key=lambda row: -len(row[0]))
        while waiting:
            n_seq = min(n_ctx, max(SHORTEST, power_of_two(len(waiting[0][0]) - 1)))
            n_rows = n_data * max(1, SCORE_TOKENS // n_seq // n_data)
            batches.append((np.zeros((n_rows, n_seq + 1), np.int32), waiting[:n_rows]))
            waiting = waiting[n_rows:]
        for ids, rows in progress(batches):
            for row, (sequence, _) in zip(ids, rows, strict=False):
                row[: len(sequence)] = sequence
            logits = self.gpt2(ids[:, :-1], n_head=n_head, **params)  # -> [b, n_seq, n_vocab]
            losses, largest = (np.asarray(f(logits, ids[:, 1:])) for f in (self.token_losses, self.are_largest))
            for row, (sequence, i) in enumerate(rows):
                scored = slice(len(sequence) - len(pairs[i][1]) - 1, len(sequence) - 1)
                log_probs[i], is_greedy[i] = -np.sum(losses[row, scored], dtype=float), np.all(largest[row, scored])
        return log_probs, is_greedy

    def prefill_rows(self, params, kv, ids, rows, sources, n_head):
        """Compute the keys and values of prompts; copy those of prompt sources[i] into row rows[i] of kv.

        kv: (keys, values) of each block, [b, h, n_max, d] each. ids: [n_prompts, n_seq]. rows, sources: [n].
        """
        (n_prompts, n_seq), n_embd = ids.shape, params["wpe"].shape[1]
        empty = jnp.zeros((n_prompts, n_head, n_seq, n_embd // n_head), self.dtype)
        caches = [KVCache(empty, empty, jnp.zeros((n_prompts, 1), int)) for _ in kv]
        self.forward(ids, n_head, **params, cache=caches, last_only=True)  # unused logits, which XLA does not compute
        new = [(cache.k, cache.v) for cache in caches]
        return jax.tree.map(lambda old, computed: old.at[rows, :, :n_seq].set(computed[sources]), kv, new)

    def decode_chunk(self, params, kv, n_past, newest, keys, n_steps, n_head, **sampling):
        """Append up to CHUNK tokens to each row; return kv, the tokens, and whether their logits were finite.

        n_past: positions in kv, newest: the token after them, [b, 1] each. keys: [b, 2]. sampling: a Sampler's options.
        A row without room writes to its last position again: it is complete, and nothing uses its further tokens.
        """
        n_max = kv[0][0].shape[2]

        def step(i, state):
            kv, newest, ids, is_finite = state
            caches = [KVCache(k, v, jnp.minimum(n_past + i, n_max - 1)) for k, v in kv]
            logits = self.forward(newest, n_head, **params, cache=caches)[:, -1]  # -> [b, n_vocab]
            chosen = choose(logits, keys, n_past[:, 0] + i + 1, **sampling)  # [b, n_vocab] -> [b]
            is_finite = is_finite.at[:, i].set(jnp.all(jnp.isfinite(logits), axis=-1))  # -> [b, CHUNK]
            return [(cache.k, cache.v) for cache in caches], chosen[:, None], ids.at[:, i].set(chosen), is_finite

        ids, is_finite = (jnp.zeros((len(newest), CHUNK), dtype) for dtype in (int, bool))  # -> [b, CHUNK] each
        kv, _, ids, is_finite = jax.lax.fori_loop(0, n_steps, step, (kv, newest, ids, is_finite))
        return kv, ids, is_finite

    def new_kv(self, params, n_head, n_rows, n_max):
        """Return the keys and values of n_rows rows of n_max positions, not yet computed."""
        shape = n_rows, n_head, n_max, params["wpe"].shape[1] // n_head
        if self.mesh.devices.flat[0].platform == "cpu":
            n_bytes = 2 * len(params["blocks"]) * np.prod(shape) * jnp.dtype(self.dtype).itemsize
            check_memory(f"a batch of {n_rows} continuations", n_bytes, "set a smaller --batch_size")
        zeros = functools.partial(jnp.zeros, shape, self.dtype, device=self.by_row_and_head)
        return [(zeros(), zeros()) for _ in params["blocks"]]

    def chunks(self, requests, params, n_head, n_tokens_to_generate, batch_size, stop_id, n_steps):
        """Yield the rows, {index: batching.Row}, after each chunk. n_steps: tokens of the first; the next has twice."""
        waiting = new_rows(requests, params, n_tokens_to_generate, stop_id, self)
        batch, rows, free = None, {}, range(batch_size)
        while True:
            rows |= (started := dict(zip(free, waiting, strict=False)))
            if not rows:
                return
            if n_tokens_to_generate:
                batch = batch or Batch(self, params, n_head, len(rows))
                batch.start(started)
                batch.advance(rows, n_steps)
            yield rows
            free = [i for i, row in rows.items() if row.stop_reason]
            rows = {i: row for i, row in rows.items() if not row.stop_reason}
            n_steps = min(2 * n_steps, CHUNK)

    def generate_tokens(self, inputs, params, n_head, n_tokens_to_generate, sample=None, stop_id=None):
        """gpt2.generate_tokens; the tokens arrive in chunks of 1, 2, 4, ..., CHUNK."""
        requests, n_sent = [(None, inputs, [sample or Sampler()])], 0
        for rows in self.chunks(requests, params, n_head, n_tokens_to_generate, 1, stop_id, n_steps=1):
            yield from rows[0].ids[n_sent:]
            n_sent = len(rows[0].ids)

    def generate(self, *inputs, **options):
        """gpt2.generate."""
        return list(self.generate_tokens(*inputs, **options))

    def generate_batch(self, requests, params, n_head, n_tokens_to_generate, batch_size=8, stop_id=None):
        """batching.generate_batch; the samplers may differ only in their seeds."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        for rows in self.chunks(requests, params, n_head, n_tokens_to_generate, batch_size, stop_id, CHUNK):
            yield from ((row.key, row.ids, row.stop_reason) for row in rows.values() if row.stop_reason)


class Batch:
    """The rows on the devices: their keys and values. The rest of their state is NumPy's, one line per row.

    n_past: positions computed. newest: the token after them. keys: of the samples.
    """

    def __init__(self, engine, params, n_head, n_rows):
        self.engine, self.params, self.n_head, self.n_data = engine, params, n_head, engine.mesh.shape["data"]
        self.n_rows = self.multiple(n_rows)
        self.n_ctx, self.n_max, self.kv = params["wpe"].shape[0], 0, None
        self.n_past, self.newest = (np.zeros((self.n_rows, 1), np.int32) for _ in range(2))
        self.keys = np.zeros((self.n_rows, 2), np.uint32)

    def multiple(self, n):
        """Round n up to rows that divide by the axis `data`."""
        return -(-n // self.n_data) * self.n_data

    def bucket(self, n):
        """Round n up to a number of positions for which programs are compiled."""
        return min(self.n_ctx, max(SHORTEST, power_of_two(max(1, n))))

    def start(self, rows):
        """Prefill the prompts of new rows, {index: batching.Row}; the rows of one prompt share its prefill."""
        by_prompt = {}
        for i, row in rows.items():
            by_prompt.setdefault(row.prompt, []).append(i)
            ids, self.keys[i], self.sampling = row.prompt.ids, row.sample.key, row.sample.options
            self.n_past[i], self.newest[i] = len(ids) - 1, ids[-1]
        if rows:
            self.reserve(max(prompt.cache[0] for prompt in by_prompt))
        waiting = iter(sorted(by_prompt.items(), key=lambda item: len(item[0].ids), reverse=True))
        for longest in waiting:
            n_seq = self.bucket(len(longest[0].ids) - 1)
            self.prefill([longest, *islice(waiting, max(0, PREFILL_TOKENS // n_seq - 1))], n_seq)

    def reserve(self, n_positions):
        """Make room for n_positions positions."""
        n_max = max(self.n_max, self.bucket(n_positions))
        if self.kv is None:
            announce_compilation()
            self.kv = self.engine.new_kv(self.params, self.n_head, self.n_rows, n_max)
        elif n_max > self.n_max:
            self.kv = self.engine.enlarge(self.kv, n_max=n_max)
        self.n_max = n_max

    def prefill(self, prompts, n_seq):
        """Compute all tokens but the last of each prompt, padded to n_seq. prompts: [(batching.Prompt, its rows)]"""
        ids = np.zeros((self.multiple(power_of_two(len(prompts))), n_seq), np.int32)  # -> [n_prompts, n_seq]
        for i, (prompt, _) in enumerate(prompts):
            ids[i, : len(prompt.ids) - 1] = prompt.ids[:-1]
        targets = [(row, i) for i, (_, rows) in enumerate(prompts) for row in rows]
        targets += targets[-1:] * (power_of_two(len(targets)) - len(targets))  # the last is written again
        rows, sources = np.array(targets, np.int32).T
        self.kv = self.engine.prefill(self.params, self.kv, ids, rows, sources, n_head=self.n_head)

    def advance(self, rows, n_steps):
        """Generate up to n_steps tokens for each of the rows, {index: batching.Row}."""
        n_steps = min(n_steps, max(row.n_tokens_to_generate - len(row.ids) for row in rows.values()))
        state = self.kv, self.n_past, self.newest, self.keys
        self.kv, *results = self.engine.decode(self.params, *state, n_steps, n_head=self.n_head, **self.sampling)
        ids, is_finite = (np.asarray(result)[:, :n_steps] for result in results)  # -> [b, n_steps] each
        for i, row in rows.items():
            for token_id, was_finite in zip(ids[i].tolist(), is_finite[i].tolist(), strict=True):
                if row.stop_reason:
                    break
                if not was_finite:
                    raise FloatingPointError("the logits are not finite")
                row.append_id(token_id)
        self.n_past, self.newest = self.n_past + n_steps, ids[:, -1:].copy()
        self.n_past[[i for i in range(self.n_rows) if i not in rows or rows[i].stop_reason]] = 0


def enlarge(kv, n_max):
    """Return the keys and values with room for n_max positions."""
    return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, n_max - a.shape[2]), (0, 0))), kv)


def are_largest(logits, targets):  # [b, n_seq, n_vocab], [b, n_seq] -> [b, n_seq]
    """Return whether the target of every position is its most likely token."""
    return jnp.argmax(logits, axis=-1) == targets


def use_compilation_cache():
    """Keep compiled programs for later runs in JAX_COMPILATION_CACHE_DIR, by default in the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:
        parent = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(parent, "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    folder = jax.config.jax_compilation_cache_dir
    if "://" not in folder:  # else in a cloud
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", None)
            print("note: no folder to keep compiled programs in: set JAX_COMPILATION_CACHE_DIR to one", file=sys.stderr)


@functools.cache
def announce_compilation():
    """Print a line, once, if the compilation cache has no program of this engine yet."""
    folder = jax.config.jax_compilation_cache_dir
    names = os.listdir(folder) if folder and os.path.isdir(folder) else ()
    if jax.process_index() == 0 and not any(name.startswith("jit_decode_chunk") for name in names):
        message = "JAX compiles the model, which takes some seconds once for each size of prompt and batch"
        print(f"note: {message}", file=sys.stderr)
