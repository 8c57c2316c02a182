"""The shape comments are true: each is checked against the arrays while the code runs.

A comment `# [a, b] -> [c, d]` behind `def` states the array arguments in their order and the result; behind an
assignment, what is assigned; behind a return, what is returned. `# [a, b] -> y: [c, d]` behind the `def` of a compiled
function states its array arguments, the last of which it writes to. Names are bound where they first appear in a call
(n_seq, d) or are its integer variables (n_head); `...` is any number of leading axes, `each` a tuple of such arrays.
"""

import ast
import importlib
import inspect
import re
import sys

import numpy as np
import pytest

import gpt2
import sampling
from engines import batching, compiled, scoring, speculative
from tests import gradients
from tests.conftest import TINY
from tests.random_model import random_tensors
from training import dataset, fused, loss
from weights.names import nest

COMMENT = re.compile(r"#\s*(?P<inputs>\[[^#]*\])?\s*->\s*(?:(?P<written>\w+: .*)|(?P<result>\[[^\]]*\]))")


def shape_comments(module):
    """{first line of a statement: (statement, shapes of the inputs, shape of the result or "")}

    Without functions that only compiled code calls (@njit), which cannot be traced.
    """
    lines = inspect.getsource(module).splitlines()
    comments = {}
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.Assign | ast.Return):
            last = node.body[0].lineno - 1 if isinstance(node, ast.FunctionDef) else node.end_lineno
            found = next(filter(None, (COMMENT.search(line) for line in lines[node.lineno - 1 : last])), None)
            if found and "njit" not in map(ast.unparse, getattr(node, "decorator_list", [])):
                inputs = re.findall(r"\[([^\]]*)\]", (found["inputs"] or "") + (found["written"] or ""))
                comments[node.lineno] = (node, inputs, (found["result"] or "")[1:-1])
    return comments


def is_array(values):
    """Whether a list holds numbers, as token ids, and not caches."""
    return not any(hasattr(value, "n_past") for value in values)


def is_of_jax(value):
    """Whether it is an array of JAX, or stands for one in a traced function."""
    return "jax" in sys.modules and isinstance(value, sys.modules["jax"].Array)


class Checker:
    """A trace function that checks the comments of one module in every call, and keeps those it has checked."""

    def __init__(self, module):
        self.file, self.comments, self.checked = module.__file__, shape_comments(module), set()

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename != self.file or frame.f_code.co_name.startswith("<"):
            return None
        sizes, pending = {}, []
        node, inputs, result = self.comments.get(frame.f_code.co_firstlineno, (None, None, None))
        if is_definition := isinstance(node, ast.FunctionDef):
            values = [frame.f_locals[arg.arg] for arg in node.args.args]
            arrays = [
                a
                for a in values
                if isinstance(a, np.ndarray | tuple) or is_of_jax(a) or (isinstance(a, list) and is_array(a))
            ]
            for shape, array in zip(inputs, arrays, strict=False):
                if not isinstance(array, tuple):  # quantized weights
                    self.match(np.shape(array), shape, frame, sizes)
            if result == "":
                self.checked.add(node.lineno)

        def local(frame, event, value):
            for line in list(pending):  # an assignment is complete when another line begins
                assignment = self.comments[line][0]
                if event == "line" and line <= frame.f_lineno <= assignment.end_lineno:
                    continue
                names = [name.id for name in ast.walk(assignment.targets[0]) if isinstance(name, ast.Name)]
                self.check(line, [frame.f_locals[name] for name in names], frame, sizes)
                pending.remove(line)
            statement = self.comments.get(frame.f_lineno, (None,))[0]
            if event == "line" and isinstance(statement, ast.Assign) and frame.f_lineno not in pending:
                pending.append(frame.f_lineno)
            if event == "return" and value is not None:
                if isinstance(statement, ast.Return):
                    self.check(frame.f_lineno, [value], frame, sizes)
                if is_definition and not frame.f_locals.get("last_only"):  # its docstring says what comes then
                    self.check(node.lineno, value if isinstance(value, tuple) else [value], frame, sizes)
            return local

        return local

    def check(self, line, arrays, frame, sizes):
        for array in arrays:
            self.match(np.shape(array), self.comments[line][2], frame, sizes)
        self.checked.add(line)

    def match(self, shape, stated, frame, sizes):
        names = [name.strip() for name in stated.split(",")]
        lead = names[0] == "..."
        names = names[lead:]
        if len(shape) != len(names) and not (lead and len(shape) > len(names)):
            raise AssertionError(f"{frame.f_code.co_name}, line {frame.f_lineno}: [{stated}] is {shape}")
        integers = {name: value for name, value in frame.f_locals.items() if type(value) is int}
        for name, size in zip(names, shape[len(shape) - len(names) :], strict=True):
            if name.isidentifier() and name not in integers:
                expected = sizes.setdefault(name, size)
            else:
                expected = eval(name, frame.f_globals, integers | sizes)
            if expected != size:
                message = f"line {frame.f_lineno}: [{stated}] is {shape}, and {name} should be {expected}"
                raise AssertionError(f"{frame.f_code.co_name}, {message}")


def traced(checker, run):
    before = sys.gettrace()
    sys.settrace(checker)
    try:
        run()
    finally:
        sys.settrace(before)


def run_model(tiny):
    """One plain pass, a batch, and a prompt with tokens after it through a cache."""
    _, hparams, params = tiny
    ids = np.random.default_rng(0).integers(0, TINY["n_vocab"], (2, 7))
    gpt2.gpt2(ids[0], **params, n_head=hparams["n_head"])
    gpt2.gpt2(ids, **params, n_head=hparams["n_head"])
    gpt2.generate(ids[0].tolist(), params, hparams["n_head"], 3)


def assert_comments_are_true(module, run, n_least=1):
    """Every shape comment of the module is checked while run() runs, and none is wrong."""
    checker = Checker(module)
    traced(checker, run)
    assert checker.checked == set(checker.comments), module
    assert len(checker.checked) >= n_least


def test_the_shape_comments_of_the_model_are_true(tiny):
    assert_comments_are_true(gpt2, lambda: run_model(tiny), n_least=25)


def test_the_shape_comments_of_sampling_are_true():
    logits = np.arange(10, dtype=np.float32)
    assert_comments_are_true(sampling, lambda: sampling.distribution(logits, top_k=5, top_p=0.9))


@pytest.mark.parametrize("module", [batching, scoring, speculative])
def test_the_shape_comments_of_engines_are_true(tiny, module):
    _, hparams, params = tiny
    n_head, requests = hparams["n_head"], [(0, [1, 2, 3], [np.argmax]), (1, [4], [np.argmax])]

    def run():
        list(batching.generate_batch(requests, params, n_head, 3))
        scoring.score([([1, 2], [3, 4])], params, n_head)
        draft = speculative.Draft(params, n_head, cost=0.1)
        drafters = lambda cache, sample: [draft]  # noqa: E731
        list(speculative.Speculation(params, n_head, drafters).generate_tokens([1, 2, 3], 5))

    assert_comments_are_true(module, run)


def traceable(module, monkeypatch):
    """Replace kernels by Python functions on the same line that call them: compiled code is not traced."""
    for node in ast.parse(inspect.getsource(module)).body:
        decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
        if any(decorator.startswith("kernel(") for decorator in decorators):
            names = ", ".join(arg.arg for arg in node.args.args)
            source = "\n" * (node.lineno - 1) + f"def {node.name}({names}): compiled({names})"
            namespace = vars(module) | {"compiled": getattr(module, node.name)}
            exec(compile(source, module.__file__, "exec"), namespace)
            monkeypatch.setattr(module, node.name, namespace[node.name])


@pytest.mark.parametrize("name", ["functions", "attention", "panels", "program"])
def test_the_shape_comments_of_compiled_functions_are_true(monkeypatch, name):
    pytest.importorskip("numba")
    module = importlib.import_module(f"engines.{name}")
    hparams = TINY | {"n_embd": 64, "n_head": 4}
    params, ids = nest(random_tensors(hparams), hparams["n_layer"]), np.zeros((3, hparams["n_ctx"]), dtype=int)
    compiled.compiled_model(params)  # else numba compiles while it is traced
    traceable(module, monkeypatch)

    def run():
        for dtype in ("float32", "int8", "int4"):
            model, laid_out = compiled.compiled_model(params, dtype)
            model.gpt2(ids, **laid_out, n_head=4)
            list(batching.generate_batch([(0, [1, 2, 3], [np.argmax] * 2)], laid_out, 4, 3, model=model))

    run()
    assert_comments_are_true(module, run)


@pytest.mark.parametrize("name", ["jax_model", "jax_sampling", "jax_engine"])
def test_the_shape_comments_of_jax_are_true(name):
    pytest.importorskip("jax").clear_caches()  # else functions that have been traced do not run
    module, jax_engine = (importlib.import_module(f"engines.{name}") for name in (name, "jax_engine"))
    params, n_head = nest(random_tensors(TINY), TINY["n_layer"]), TINY["n_head"]

    def run():
        for dtype, options in (("float32", (1.0, 5, 0.9, 1)), ("bfloat16", ())):
            engine, on_device = jax_engine.jax_engine(params, n_head, dtype)
            engine.generate([1, 2, 3], on_device, n_head, 3, sample=engine.make_sampler(*options))
            engine.score([([1, 2], [3, 4])], on_device, n_head)
        importlib.import_module("engines.jax_model").by_part(params["blocks"][0]["attn"]["c_attn"]["w"], n_head)

    assert_comments_are_true(module, run)


@pytest.mark.parametrize("name", ["jax_model", "jax_trainer"])
def test_the_shape_comments_of_training_with_jax_are_true(name):
    pytest.importorskip("jax").clear_caches()
    pytest.importorskip("optax")
    module, new_trainer = (
        importlib.import_module(f"training.{name}"),
        importlib.import_module("tests.test_jax_training").new_trainer,
    )

    def run():
        for dtype in ("float32", "bfloat16"):
            trainer = new_trainer(dtype=dtype, dropout=0.1, gradient_accumulation_steps=2)
            trainer.update(0.1)
            trainer.estimate_loss("val")
        if name == "jax_model":
            q = np.zeros((2, 3, 10, 8), np.float32)
            with pytest.MonkeyPatch.context() as m:
                attention = module.jax.nn.dot_product_attention
                m.setattr(
                    module.jax.nn, "dot_product_attention", lambda *a, **o: attention(*a, is_causal=o["is_causal"])
                )
                module.flash_attention(q, q, q)

    assert_comments_are_true(module, run)


@pytest.mark.parametrize("module", [fused, dataset])
def test_the_shape_comments_of_training_are_true(module):
    hparams, (inputs, targets) = gradients.HPARAMS, gradients.batch()
    tensors = random_tensors(hparams)

    def run():
        loss.loss_and_gradients(tensors, hparams, inputs, targets, fused.training_model(0.1))
        logits = gpt2.gpt2(inputs, **nest(tensors, hparams["n_layer"]), n_head=hparams["n_head"])
        fused.token_losses(logits, targets)
        dataset.random_windows(np.arange(50), np.random.default_rng(0), 3, 10)
        dataset.even_windows(np.arange(50), 3, 10)

    assert_comments_are_true(module, run)


@pytest.mark.parametrize(
    ("true", "false"),
    [
        ("[..., n_seq, 3*n_embd]", "[..., n_seq, 2*n_embd]"),
        ("[..., n_q, n_k]", "[..., n_k, n_q]"),
        ("[..., 1]", "[..., n]"),
    ],
)
def test_a_false_comment_is_found(tiny, true, false):
    checker = Checker(gpt2)
    line = next(line for line, (node, _, result) in checker.comments.items() if f"[{result}]" == true)
    node, inputs, _ = checker.comments[line]
    checker.comments[line] = (node, inputs, false[1:-1])
    with pytest.raises((AssertionError, NameError)):
        traced(checker, lambda: run_model(tiny))
