"""The layout: what lies at the top level, and which module may import which."""

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.programs import SECONDS

FOLDERS = ("cli", "engines", "explain", "official", "serve", "training", "weights")
PROGRAMS = ("gpt2", "gpt2_pico", "train", "evaluate", "microgpt", "baby_gpt", "serve.py")
PROGRAMS += ("official.compare", "training.scaling")
# What each module, or each module of a folder, may import of this project. cli may import everything.
ALLOWED = {
    "gpt2": (),
    "microgpt": (),
    "sampling": ("gpt2",),
    "gpt2_pico": ("utils",),
    "encoder": ("weights.errors", "weights.files"),
    "utils": ("encoder", "engines.allocator", "weights"),
    "weights": ("weights",),
    "engines": ("gpt2", "engines", "weights"),
    "training": ("gpt2", "encoder", "sampling", "utils", "engines", "training", "weights"),
    "explain": ("gpt2", "sampling", "engines", "training", "explain", "weights"),
    "serve": ("gpt2", "sampling", "engines", "explain", "serve", "weights"),
    "serve.py": (),
    "official": ("gpt2", "utils", "official", "weights"),
    "official.theirs": ("encoder",),  # OpenAI's, not ours: it runs in a process of its own
    "train": ("training",),
    "evaluate": ("training",),
    "baby_gpt": ("sampling", "training", "weights"),
}


def modules():
    """The path of every module of this project by its dotted name; tests and benchmarks are not part of it."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    # import serve finds the folder, not the program
    names = ["serve.py" if path == ROOT / "serve.py" else name for name, path in zip(names, paths, strict=True)]
    return dict(zip(names, paths, strict=True))


MODULES = modules()


def imports(tree):
    """The project's modules that a syntax tree imports, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full_names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= full_names & MODULES.keys() or {node.module}
    return found & MODULES.keys()


def parse(name):
    """A module's syntax tree without, and the imports of, its `if __name__ == "__main__"` block."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    is_main = [isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body]
    main = [node for node, found in zip(tree.body, is_main, strict=True) if found]
    tree.body = [node for node, found in zip(tree.body, is_main, strict=True) if not found]
    return tree, imports(ast.Module(main, []))


def is_inside(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_ten_files_at_the_top_level():
    names = "gpt2 gpt2_pico encoder sampling utils train evaluate serve microgpt baby_gpt"
    assert {path.stem for path in ROOT.glob("*.py")} == set(names.split())


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_says_what_it_holds_and_may_import(folder):
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
    assert len(docstring.split()) > 5 and "mport" in docstring


def test_there_is_no_import_cycle():
    order = graphlib.TopologicalSorter({name: imports(parse(name)[0]) - {name} for name in MODULES})
    assert len(list(order.static_order())) == len(MODULES) > 30


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_what_it_may(name):
    tree, in_main_block = parse(name)
    assert not in_main_block or (name in PROGRAMS and is_inside(name=max(in_main_block), places=["cli"]))
    if is_inside(name, ["cli"]):
        return
    allowed = ALLOWED.get(name, ALLOWED.get(name.partition(".")[0]))
    assert {found for found in imports(tree) if not is_inside(found, allowed)} == set()


IMPORTS = """
import sys
import gpt2, utils, sampling, engines.batching, engines.compiled, engines.speculative, cli.generate, cli.evaluate, train
sys.argv = sys.argv[1:]
code = cli.generate.run(sys.argv)
heavy = "numba", "llvmlite", "jax", "jaxlib"
print(code, [name for name in sys.modules if name.partition(".")[0] in heavy], file=sys.stderr)
"""


@pytest.mark.parametrize("options", ["--engine numpy", "--n_tokens_to_generate 1", "--engine numpy --speculate lookup"])
def test_numba_and_jax_are_imported_only_for_their_engines(options):
    """auto does without for a short text of a small model."""
    arguments = ["--model_size", "shakespeare", "--models_dir", ROOT / "models", "--n_tokens_to_generate", "8"]
    command = [sys.executable, "-c", IMPORTS, *arguments, *options.split(), "--", "ROMEO:"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr
