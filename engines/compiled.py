"""gpt2.py with compiled kernels: an instance of the module whose linear, layer_norm, gelu and attention numba compiled.

The kernels run where the sizes are multiples of LANES, as in all of OpenAI's models; elsewhere gpt2.py's own functions
run. Logits have the same bits whether a token is computed alone, in a prompt, in a batch, or among draft tokens.
"""

import functools
import importlib.util
import math
import os
import sys

import numpy as np

from engines.instance import new_instance
from weights.errors import UserError
from weights.resources import available_cores, check_memory

BYTES = {"float32": 4, "int8": 1, "int4": 5 / 8}  # per weight, with the scales of int4; those of int8 are few


class KernelError(UserError):
    """numba is installed but cannot compile the kernels."""


def is_installed():
    """Return whether numba is installed, without importing it."""
    return importlib.util.find_spec("numba") is not None


def compiled_model(params, dtype="float32"):
    """Return (model, params): an instance of gpt2 with compiled functions, and the parameters in their layout.

    dtype: that of the weights, "float32", "int8" or "int4"; the latter two are lossy. The weights are copied
    (panels.py). Raises UserError if numba is missing or memory is short.
    """
    check_copy(params, dtype, "set --engine numpy")
    attention, functions, panels, program = import_kernels()
    model = new_instance()
    model.embed, model.linear = functions.embed, functions.linear
    model.layer_norm, model.gelu = functions.layer_norm, functions.gelu
    model.attention, model.KVCache, model.RowCaches = attention.attention, attention.KVCache, attention.RowCaches
    model.gpt2 = program.Replayed(model.gpt2)
    return model, panels.in_panels(params) if dtype == "float32" else panels.quantize(params, dtype)


def check_copy(params, dtype, remedy):
    """Raise UserError unless there is memory for a copy of the weights; remedy ends the message."""
    weights = [layer["w"] for block in params["blocks"] for part in ("attn", "mlp") for layer in block[part].values()]
    sizes = [math.prod(w.shape) for w in (*weights, params["wte"])]
    largest = 0 if dtype == "float32" else 4 * max(sizes)  # one weight at a time is copied before it is quantized
    check_memory(f"a copy of the weights in {dtype}", int(sum(sizes) * BYTES[dtype]) + largest, remedy)


@functools.cache
def import_kernels():
    """Return the modules of the kernels; print a line if what they compile cannot be kept for the next run."""
    set_environment()
    try:
        import numba

        from engines import attention, functions, panels, program, vectors

        if numba.config.DISABLE_JIT:
            raise RuntimeError("NUMBA_DISABLE_JIT is set")
        for w in np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32).T:
            panels.packed(w)  # compiled here, so that an error is one line
    except ImportError as error:
        raise UserError(
            f"the compiled engine needs numba ({error}); pip install numba, or set --engine numpy"
        ) from None
    except Exception as error:  # of numba: a setting in the environment, or a kernel that does not compile here
        reason = str(error) or type(error).__name__
        raise KernelError(f"numba cannot compile the kernels ({reason}); set --engine numpy") from None
    if vectors.UNCACHED:
        print("note: no folder to keep compiled kernels in: set NUMBA_CACHE_DIR to one", file=sys.stderr)
    return attention, functions, panels, program


def set_environment():
    """Set what numba and libgomp read when they are loaded, unless the user has set it."""
    if "numba" not in sys.modules:  # numba itself counts the cores of the process's affinity, not those of its cgroup
        wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        n_cores = available_cores()
        n_threads = min(int(wanted), n_cores) if wanted.isdecimal() and int(wanted) else n_cores
        os.environ.setdefault("NUMBA_NUM_THREADS", str(n_threads))
    # Waiting threads spin for about 0.1 ms, longer than between two passes, and then sleep. By default they spin for
    # several milliseconds, which takes the processor from other programs.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
