"""gpt2.py for a few tokens a pass: weights in column blocks, and each core a share of every layer's heads and units.

The heads of mha are independent until c_proj adds them up, and so are the hidden units of ffn. A share of either is
again an mha or an ffn, with some columns of the first weight and some rows of the second, and the shares' results sum
to the whole (Shoeybi et al. 2019, "Megatron-LM", section 3). So each core runs the functions of gpt2.py on its share,
and the cores wait for each other twice a layer; sharing out every product would make it four times.
"""

import functools
import queue
import threading

import numpy as np
from threadpoolctl import ThreadpoolController

import gpt2
from columns import WIDTH, Columns, Room, Table, in_columns, n_parts
from instance import new_instance

SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # the names of OpenBLAS's AVX-512 kernels: columns.py
HEAD_START = 0.25  # what the calling thread has more than a helper, in shares: helpers take some 40 us to wake up
SHARE_FROM = 512  # n_embd from which a share of a layer is worth waking a thread for


class Team:
    """The calling thread and helpers, asleep between calls."""

    def __init__(self, n_threads):
        self.n_threads, self.jobs = n_threads, queue.SimpleQueue()
        for _ in range(n_threads - 1):
            threading.Thread(target=self.help, daemon=True).start()

    def help(self):
        while True:
            self.jobs.get().work()

    def map(self, function):
        """[function(0), ..., function(n_threads - 1)], each in a thread of its own; what one raises is raised.

        A caller that is interrupted meanwhile leaves nothing behind that a later call meets.
        """
        jobs = [Job(function, i) for i in range(1, self.n_threads)]
        for job in jobs:
            self.jobs.put(job)
        return [function(0), *(job.result() for job in jobs)]

    def in_pieces(self, work, n):
        """Calls work with slices that make up range(n), a slice in each thread."""
        pieces = parts(shares(n, self.n_threads))
        self.map(lambda i: work(pieces[i]))

    def collect(self, function, items):
        """[function(item) for item in items], each by whichever thread is free."""
        waiting, results = iter(list(enumerate(items))), [None] * len(items)

        def work(_):
            for i, item in waiting:  # each thread takes from the same iterator
                results[i] = function(item)

        self.map(work)
        return results


make_team = functools.cache(Team)  # its helpers wait until the program ends


class Job:
    def __init__(self, function, i):
        self.function, self.i, self.value, self.error = function, i, None, None
        self.done = threading.Lock()
        self.done.acquire()

    def work(self):
        try:
            self.value = self.function(self.i)
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()

    def result(self):
        self.done.acquire()
        if self.error:
            raise self.error
        return self.value


def shares(n, n_threads):
    """Where the shares of n things end, [n_threads] numbers; the first thread gets some more."""
    return [round(n * (i + HEAD_START) / (n_threads + HEAD_START)) for i in range(1, n_threads)] + [n]


class SharedCache:
    """The KVCache of one layer, a part for each share of its heads."""

    def __init__(self, n_max, n_shares):
        self.shares = [gpt2.KVCache(n_max) for _ in range(n_shares)]

    @property
    def n_past(self):
        return self.shares[0].n_past

    @n_past.setter
    def n_past(self, n_past):
        for share in self.shares:
            share.n_past = n_past


def share_caches(caches, params):
    """The KVCaches of plain layers, as those of few_token_model's; params are the latter's."""
    first = params["blocks"][0]["attn"]
    if "shares" not in first:
        return caches
    ends = np.cumsum([share["n_head"] for share in first["shares"]])
    return [share_cache(cache, parts(ends.tolist())) for cache in caches]


def share_cache(cache, heads):
    shared = SharedCache(cache.n_max, len(heads))
    for share, part in zip(shared.shares, heads, strict=True):
        share.append(cache.k[part, : cache.n_past], cache.v[part, : cache.n_past])
    return shared


def whole_caches(caches):
    """The reverse of share_caches."""
    return [whole_cache(cache) if isinstance(cache, SharedCache) else cache for cache in caches]


def whole_cache(cache):
    k, v = zip(*((share.k[:, : cache.n_past], share.v[:, : cache.n_past]) for share in cache.shares), strict=True)
    whole = gpt2.KVCache(cache.shares[0].n_max)
    whole.append(np.concatenate(k), np.concatenate(v))
    return whole


class SharedColumns(Columns):
    """Columns whose product all threads of a team share: that of the logits, which is no part of any share."""

    def __init__(self, w, team):
        super().__init__(w)
        self.team = team

    def __rmatmul__(self, x):  # [rows, n_in] -> [rows, n_out]
        return self.product(x, self.team.in_pieces)


def blas():
    """Every BLAS in this process, NumPy's among them: its kernels, its threads."""
    return ThreadpoolController().select(user_api="blas")


class OneThread:
    """`with` it BLAS has one thread, after it as many as when it was made."""

    def __init__(self):
        self.libraries = [(library, library.num_threads) for library in blas().lib_controllers]

    def __enter__(self):
        for library, _ in self.libraries:
            library.set_num_threads(1)

    def __exit__(self, *_):
        for library, n_threads in self.libraries:
            library.set_num_threads(n_threads)


@functools.cache
def has_small_kernels():
    """Whether NumPy's BLAS multiplies small matrices as columns.py needs it."""
    return any(library.get("architecture") in SMALL_KERNELS for library in blas().info())


def few_token_model(params, n_head):
    """(model, params) for passes of few tokens: what stands for the module gpt2, and what its functions take.

    All weights are copied: the params given may go. Without small kernels it is gpt2 itself with the params given.
    One pass at a time, and in the process that made it: its threads do not survive a fork.
    """
    if not has_small_kernels():
        return gpt2, params
    n_threads = max(library["num_threads"] for library in blas().info())
    return shared(params, n_head, n_threads if params["wpe"].shape[1] >= SHARE_FROM else 1)


def shared(params, n_head, n_threads):
    """few_token_model's (model, params) for so many threads, or as many as there are heads and blocks of units."""
    n_units = params["blocks"][0]["mlp"]["c_fc"]["w"].shape[1]
    team = make_team(min(n_threads, n_head, -(-n_units // WIDTH)))
    return shared_model(team), shared_params(params, n_head, team)


def shared_model(team):
    """The module gpt2 once more, from its own source, with mha and ffn as sums over shares, each in a thread."""
    model = new_instance()
    mha_of_share, ffn_of_share, gpt2_of_shares, one_thread = model.mha, model.ffn, model.gpt2, OneThread()

    def mha(x, shares, n_head, cache=None):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
        caches = [None] * len(shares) if cache is None else cache.shares
        return total(team.map(lambda i: mha_of_share(x, **shares[i], cache=caches[i])))

    def ffn(x, shares):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
        return total(team.map(lambda i: ffn_of_share(x, **shares[i])))

    def gpt2_in_threads(*args, **kwargs):
        with one_thread:  # of BLAS, for each of ours
            return gpt2_of_shares(*args, **kwargs)

    model.mha, model.ffn, model.gpt2 = mha, ffn, gpt2_in_threads
    model.KVCache = lambda n_max: SharedCache(n_max, team.n_threads)
    return model


def total(parts):
    return sum(parts[1:], parts[0])


def shared_params(params, n_head, team):
    """params as shared_model takes them, in memory of their own."""
    fits = n_parts(params["wpe"].shape[1]) > 0
    return {
        "wte": Table(SharedColumns(params["wte"].T, team)) if fits else params["wte"].copy(),
        "wpe": params["wpe"].copy(),
        "blocks": team.collect(lambda block: shared_block(block, n_head, team.n_threads), params["blocks"]),
        "ln_f": copied(params["ln_f"]),
    }


def shared_block(block, n_head, n_threads):
    attn, mlp = block["attn"], block["mlp"]
    weights = [layer["w"] for part in (attn, mlp) for layer in part.values()]
    # the weights, and for each share of each a block that its last columns do not fill
    room = Room(4 * sum(w.size + n_threads * WIDTH * w.shape[0] for w in weights))
    n_units = mlp["c_fc"]["w"].shape[1]
    units = [min(WIDTH * end, n_units) for end in shares(-(-n_units // WIDTH), n_threads)]
    return {
        "ln_1": copied(block["ln_1"]),
        "attn": {"shares": [share_of_heads(attn, n_head, part, room) for part in parts(shares(n_head, n_threads))]},
        "ln_2": copied(block["ln_2"]),
        "mlp": {"shares": [share_of_units(mlp, part, room) for part in parts(units)]},
    }


def share_of_heads(attn, n_head, part, room):
    """c_attn's columns and c_proj's rows of some heads: an mha that has these heads only."""
    n_embd, n_heads = attn["c_proj"]["w"].shape[0], part.stop - part.start
    w = attn["c_attn"]["w"].reshape(n_embd, 3, n_head, -1)[:, :, part]  # -> [n_embd, 3, n_heads, n_embd/n_head]
    b = attn["c_attn"]["b"].reshape(3, n_head, -1)[:, part]  # -> [3, n_heads, n_embd/n_head]
    rows = attn["c_proj"]["w"].reshape(n_head, -1, n_embd)[part]  # -> [n_heads, n_embd/n_head, n_embd]
    return {
        "c_attn": {"w": in_columns(w.reshape(n_embd, -1), room.empty), "b": b.flatten()},
        "c_proj": {"w": in_columns(rows.reshape(-1, n_embd), room.empty), "b": once(attn["c_proj"]["b"], part)},
        "n_head": n_heads,
    }


def share_of_units(mlp, part, room):
    """c_fc's columns and c_proj's rows of some hidden units: an ffn that has these units only."""
    return {
        "c_fc": {"w": in_columns(mlp["c_fc"]["w"][:, part], room.empty), "b": mlp["c_fc"]["b"][part].copy()},
        "c_proj": {"w": in_columns(mlp["c_proj"]["w"][part], room.empty), "b": once(mlp["c_proj"]["b"], part)},
    }


def once(b, part):
    """The offset of a sum over shares: the first share adds it, the others add nothing."""
    return b.copy() if part.start == 0 else 0


def parts(ends):
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def copied(arrays):
    return {name: array.copy() for name, array in arrays.items()}
