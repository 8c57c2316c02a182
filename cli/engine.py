"""The engine of a run: gpt2.py's NumPy functions, their compiled counterparts, or JAX (--engine, --dtype)."""

import contextlib
import sys

import gpt2
from cli.devices import check_jax_options, mesh_shape, start_jax
from engines.compiled import KernelError, compiled_model, import_kernels, is_installed
from weights.errors import UserError

# In seconds, on two cores of Zen 5 with a model of 124M's shape: medians of runs in turns with NumPy
START = 0.45  # importing numba and loading the kernels
COPY = 4e-9  # copying the weights into panels, per parameter
SAVED_PER_TOKEN = 0.03e-9  # by a compiled pass over one token, per parameter, where memory is slow
SAVED_PER_BATCH = 0.16e-9  # by a compiled pass over several rows, per parameter
SAVED_PER_PROMPT_TOKEN = 0.0025e-9  # by a compiled prefill, per parameter and token


def add_engine_options(add):
    """Add --engine and --dtype to a parser. add: its method add_argument."""
    add(
        "--engine",
        choices=("auto", "numpy", "compiled", "jax"),
        default="auto",
        help="numpy, compiled kernels, which need numba, or jax, which needs JAX; auto takes the compiled kernels if "
        "they pay back their start, and else numpy (default)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "int8", "int4"),
        default="float32",
        help="type of the weights (default: float32); bfloat16, with --engine jax, int8 and int4 are faster and lossy: "
        "the results differ",
    )


def check_engine_options(options, speculate="off"):
    """Raise UserError for options that do not suit the engine; note a lossy type of the weights; start JAX."""
    check_jax_options(options)
    lossy, needs_compiled = options.dtype != "float32", None
    if options.engine != "jax":
        needs_compiled = f"--dtype {options.dtype}" if lossy else "--speculate self" if speculate == "self" else None
    if needs_compiled and options.engine == "numpy":
        raise UserError(f"{needs_compiled} needs the compiled engine; leave out --engine numpy")
    if lossy and speculate == "self":
        raise UserError(f"--speculate self checks its draft tokens with float32 weights; leave out {needs_compiled}")
    if lossy:
        print(f"note: --dtype {options.dtype} is lossy: results differ from those of float32", file=sys.stderr)
    if needs_compiled:
        options.engine = "compiled"
    if options.engine == "jax":
        start_jax(options)
    if options.engine == "compiled":
        options.needs_compiled = needs_compiled
        with without(options):
            import_kernels()  # an error appears before the model is loaded


@contextlib.contextmanager
def without(options):
    """Let the error messages of the compiled engine name the option that needs it."""
    try:
        yield
    except UserError as error:
        remedy = f"leave out {options.needs_compiled}" if options.needs_compiled else "set --engine numpy"
        raise UserError(str(error).replace("set --engine numpy", remedy)) from None


def pays_off(n_params, n_prompt_tokens, n_passes=0, n_rows=1):
    """Return whether the compiled engine saves more time than its start takes.

    n_passes: forward passes after the prompts, each over n_rows rows.
    """
    per_pass = SAVED_PER_TOKEN if n_rows == 1 else SAVED_PER_BATCH
    saved = SAVED_PER_PROMPT_TOKEN * n_prompt_tokens + per_pass * n_passes
    return n_params * (saved - COPY) > START


def model_and_params(options, params, n_head, worth_it):
    """Return the model of --engine and --dtype, and the parameters in its layout.

    worth_it: whether auto may take the compiled engine (see pays_off).
    """
    if options.engine == "jax":
        from engines.jax_engine import jax_engine

        return jax_engine(params, n_head, options.dtype, mesh_shape(options.devices, "model"))
    if options.engine == "compiled":
        with without(options):
            return compiled_model(params, options.dtype)
    if options.engine == "auto" and worth_it and is_installed():
        try:
            return compiled_model(params)
        except KernelError as error:
            print(f"note: {error}".replace("\n", " "), file=sys.stderr)
        except UserError:  # numba cannot be imported, or memory is short
            pass
    return gpt2, params


def set_threads(n_threads):
    """Use up to n_threads threads in compiled kernels; NUMBA_NUM_THREADS limits them."""
    import numba

    numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
