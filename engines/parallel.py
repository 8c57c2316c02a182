"""gpt2.py for a few tokens a pass: weights in column blocks, and on each core a process with a share of every layer.

The heads of mha are independent until c_proj adds them up, and so are the hidden units of ffn. A share of either is
again an mha or an ffn, with some columns of the first weight and some rows of the second, and the shares' results sum
to the whole (Shoeybi et al. 2019, "Megatron-LM", section 3). So all processes of a team run gpt2.py, each with its
share of the weights and of the keys and values, and twice a layer they exchange what there is to sum.
"""

import functools
import itertools
import multiprocessing

import numpy as np
from threadpoolctl import ThreadpoolController

import gpt2
from engines.columns import WIDTH, Columns, Room, Table, in_columns, n_parts
from engines.instance import new_instance
from engines.team import Team
from weights.names import count_params
from weights.resources import check_memory

SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # the names of OpenBLAS's AVX-512 kernels: columns.py
SHARE_FROM = 512  # n_embd from which a share of a layer is worth a process


def small_batch_model(params, n_head):
    """(model, params) for passes of few tokens: what stands for the module gpt2, and what its functions take.

    All weights are copied: the params given may go. Without small kernels, or where processes cannot fork, it is gpt2
    itself with the params given. One pass at a time. A pass raises UserError when a helper process has ended.
    """
    if not has_small_kernels() or "fork" not in multiprocessing.get_all_start_methods():
        return gpt2, params
    n_vocab, n_embd = params["wte"].shape
    n_copied = count_params(n_vocab, len(params["wpe"]), n_embd, n_head, len(params["blocks"]))
    check_memory("a copy of the parameters for batches or draft tokens", 4 * n_copied, "choose a smaller model")
    alone = params["wpe"].shape[1] < SHARE_FROM or multiprocessing.current_process().daemon  # which may have no helpers
    return shared(params, n_head, 1 if alone else max(library["num_threads"] for library in blas().info()))


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


def shared(params, n_head, n_processes):
    """small_batch_model's (model, params) for so many processes, or as many as have something to share out."""
    n_units, n_vocab = params["blocks"][0]["mlp"]["c_fc"]["w"].shape[1], len(params["wte"])
    team = Team(min(n_processes, n_head, n_blocks(n_units), n_blocks(n_vocab)))

    def in_a_helper():
        blas().limit(limits=1)
        CACHES.clear()
        model, own_params = shared_model(team), share_of_params(params, n_head, team)
        return helper_actions(model, own_params, n_head)

    team.start(in_a_helper)
    own_params = share_of_params(params, n_head, team)
    team.end_with(own_params["wpe"])
    return shared_model(team), own_params


def shared_model(team):
    """The module gpt2 once more, from its own source, with mha and ffn as sums over the shares of a team."""
    model = new_instance()
    mha_of_share, ffn_of_share, gpt2_of_share, one_thread = model.mha, model.ffn, model.gpt2, OneThread()

    def mha(x, c_attn, c_proj, n_head, cache=None):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
        part = share(n_head, team)
        return team.sum(mha_of_share(x, c_attn, c_proj, part.stop - part.start, cache))

    def ffn(x, c_fc, c_proj):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
        return team.sum(ffn_of_share(x, c_fc, c_proj))

    def gpt2_together(inputs, cache=None, last_only=False, **params):  # [..., n_seq] -> [..., n_seq, n_vocab]
        with one_thread, team.together("gpt2", inputs, cache, last_only):  # of BLAS, in each process
            return gpt2_of_share(inputs, cache=cache, last_only=last_only, **params)

    model.mha, model.ffn, model.gpt2 = mha, ffn, gpt2_together
    model.KVCache = lambda n_max: SharedCache(n_max, team)
    return model


def helper_actions(model, params, n_head):
    """What a helper does when the first process begins a thing of that name with team.together."""

    def gpt2(inputs, cache, last_only):
        model.gpt2(inputs, **params, n_head=n_head, cache=cache, last_only=last_only)

    def forget(numbers):
        for number in numbers:
            CACHES.pop(number, None)

    return {"gpt2": gpt2, "copy_cache": copy_cache, "forget": forget}


CACHES = {}  # in a helper: its shares of the first process's caches, by their numbers


class SharedCache(gpt2.KVCache):
    """The KVCache of one layer, of which each process has the share of its heads; this one belongs to the first."""

    numbers = itertools.count()

    def __init__(self, n_max, team):
        super().__init__(n_max)
        self.team, self.number = team, next(self.numbers)

    def __reduce__(self):  # to a helper it is sent as its share
        return share_of_cache, (self.number, self.n_max, self.n_past)

    def __deepcopy__(self, _):
        twin = SharedCache(self.n_max, self.team)
        with self.team.together("copy_cache", self, twin):
            copy_cache(self, twin)
        return twin

    def __del__(self):
        self.team.dropped.append(self.number)


def share_of_cache(number, n_max, n_past):
    cache = CACHES.setdefault(number, gpt2.KVCache(n_max))
    cache.n_past = n_past
    return cache


def copy_cache(cache, twin):
    if cache.n_past:
        twin.append(cache.k[..., : cache.n_past, :], cache.v[..., : cache.n_past, :])


class SharedColumns:
    """Columns shared out among a team, those of the logits: the product is there in the first process only."""

    __array_ufunc__ = None  # so that NumPy leaves `x @ columns` to __rmatmul__

    def __init__(self, w, team):  # [n_in, n_out]
        n_in, n_out = w.shape
        columns = parts_of_columns(n_out, team)
        self.team, self.part, self.widths = team, columns[team.i], [part.stop - part.start for part in columns]
        self.columns, self.shape = Columns(w[:, self.part]), (n_in, n_out if team.i == 0 else 0)

    def __rmatmul__(self, x):  # [rows, n_in] -> [rows, n_out]
        return self.team.join(x @ self.columns, self.widths)

    def take(self, ids):  # [...] -> [..., n_in]
        """The columns of these numbers, in every process."""
        if np.any((ids < 0) | (ids >= sum(self.widths))):
            raise IndexError(f"ids from {np.min(ids)} to {np.max(ids)}, of {sum(self.widths)}")
        here = (ids >= self.part.start) & (ids < self.part.stop)  # [...] -> [...]
        rows = self.columns.take(np.where(here, ids - self.part.start, 0))  # [...] -> [..., n_in]
        rows[~here] = 0
        return self.team.sum(rows)


def share_of_params(params, n_head, team):
    """params as shared_model takes them: this process's share, in memory of its own."""
    fits = n_parts(params["wpe"].shape[1]) > 0
    return {
        "wte": Table(SharedColumns(params["wte"].T, team)) if fits else params["wte"].copy(),
        "wpe": params["wpe"].copy(),
        "blocks": [share_of_block(block, n_head, team) for block in params["blocks"]],
        "ln_f": copied(params["ln_f"]),
    }


def share_of_block(block, n_head, team):
    units = parts_of_columns(block["mlp"]["c_fc"]["w"].shape[1], team)[team.i]
    attn = share_of_heads(block["attn"], n_head, share(n_head, team))
    mlp = share_of_units(block["mlp"], units)
    sizes = [layer["w"].shape for part in (attn, mlp) for layer in part.values()]
    room = Room(4 * sum(n_in * (n_out + WIDTH) for n_in, n_out in sizes))  # the last columns may not fill a block
    for layer in (*attn.values(), *mlp.values()):
        layer["w"] = in_columns(layer["w"], room.empty)
    return {"ln_1": copied(block["ln_1"]), "attn": attn, "ln_2": copied(block["ln_2"]), "mlp": mlp}


def share_of_heads(attn, n_head, part):
    """c_attn's columns and c_proj's rows of some heads: an mha that has these heads only."""
    n_embd = attn["c_proj"]["w"].shape[0]
    w = attn["c_attn"]["w"].reshape(n_embd, 3, n_head, -1)[:, :, part]  # -> [n_embd, 3, n_heads, n_embd/n_head]
    b = attn["c_attn"]["b"].reshape(3, n_head, -1)[:, part]  # -> [3, n_heads, n_embd/n_head]
    rows = attn["c_proj"]["w"].reshape(n_head, -1, n_embd)[part]  # -> [n_heads, n_embd/n_head, n_embd]
    return {
        "c_attn": {"w": w.reshape(n_embd, -1), "b": b.flatten()},
        "c_proj": {"w": rows.reshape(-1, n_embd), "b": once(attn["c_proj"]["b"], part)},
    }


def share_of_units(mlp, part):
    """c_fc's columns and c_proj's rows of some hidden units: an ffn that has these units only."""
    return {
        "c_fc": {"w": mlp["c_fc"]["w"][:, part], "b": mlp["c_fc"]["b"][part].copy()},
        "c_proj": {"w": mlp["c_proj"]["w"][part], "b": once(mlp["c_proj"]["b"], part)},
    }


def once(b, part):
    """The offset of a sum over shares: the first share adds it, the others add nothing."""
    return b.copy() if part.start == 0 else 0


def n_blocks(n_columns):
    return -(-n_columns // WIDTH)


def shares(n, n_processes):
    """Where the shares of n things end, [n_processes] numbers."""
    return [round(n * (i + 1) / n_processes) for i in range(n_processes)]


def parts_of_columns(n, team):
    """The slices of n columns that the processes take, in whole blocks but for the last."""
    return parts([min(WIDTH * end, n) for end in shares(n_blocks(n), team.n)])


def share(n, team):
    """This process's part of n things."""
    return parts(shares(n, team.n))[team.i]


def parts(ends):
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def copied(arrays):
    return {name: array.copy() for name, array in arrays.items()}
