"""What the command lines share: --version, completion in a shell, and the commands that `pip install .` gives."""

import os
import platform
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from cli.options import COMMANDS
from cli.version import VERSION, version_of
from tests.conftest import ROOT
from tests.programs import SECONDS, assert_mistake, run
from tests.test_layout import FOLDERS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = ["gpt2.py", "train.py", "evaluate.py", "baby_gpt.py"]
SHAKESPEARE = ["--model_size", "shakespeare", "--models_dir", ROOT / "models", "--n_tokens_to_generate", "8"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_versions_without_importing_numba_jax_or_argcomplete(script, tmp_path):
    for package in ("numba", "jax", "argcomplete"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')", encoding="utf-8")
        (tmp_path / f"{package}-1.2.3.dist-info").mkdir()
        metadata = tmp_path / f"{package}-1.2.3.dist-info" / "METADATA"
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2.3\n", encoding="utf-8")
    code, out, err = run("--version", script=script, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (code, err) == (0, b"")
    project, python, numpy, *others = out.decode("utf-8").splitlines()
    assert (project, python) == (f"gpt2-numpy {VERSION}", f"Python {platform.python_version()}")
    assert numpy.startswith(f"NumPy {np.__version__}, BLAS ") and "None" not in numpy
    assert others == ["numba 1.2.3", "JAX 1.2.3"]
    assert version_of("no-such-package") == "not installed"


@pytest.mark.parametrize(
    ("script", "typed", "offered"),
    [
        ("gpt2.py", "--engine c", ["compiled "]),
        ("gpt2.py", "--list", ["--list_models "]),
        ("gpt2.py", "a --engine numpy --dtype int", ["int8", "int4"]),
        ("train.py", "--preset f", ["finetune "]),
        ("evaluate.py", "--split ", ["all", "train", "val"]),
    ],
)
def test_completion(tmp_path, script, typed, offered):
    """The environment is the one in which the function that argcomplete registers with bash runs a command."""
    pytest.importorskip("argcomplete")
    line = f"{script} {typed}"
    variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    variables |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"), "_ARGCOMPLETE_IFS": "\n"}
    assert run(script=script, env=os.environ | variables) == (0, b"", b"")
    assert (tmp_path / "offered").read_text(encoding="utf-8").split("\n") == offered


# pip install .


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder like site-packages into which pip has installed a copy of the repository."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.txt"),
        ROOT / "pyproject.toml",
        ROOT / "LICENSE",
    ]:
        shutil.copy(path, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, source], check=False, capture_output=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr.decode()
    return target


@pytest.fixture
def installed(site, tmp_path):
    """Run an installed command in another folder; returns what tests.programs.run returns."""

    def run_installed(name, *arguments):
        options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}, "timeout": SECONDS}
        done = subprocess.run([site / "bin" / name, *arguments], check=False, capture_output=True, input=b"", **options)
        return done.returncode, done.stdout, done.stderr

    return run_installed


def test_pip_installs_one_package_with_all_that_the_commands_need(site):
    assert {path.name for path in site.iterdir()} == {"bin", "gpt2_numpy", f"gpt2_numpy-{VERSION}.dist-info"}
    assert {path.name for path in (site / "bin").iterdir()} == set(PROJECT["project"]["scripts"])
    packaged = {path.name for path in (site / "gpt2_numpy").iterdir() if path.is_dir()} - {"__pycache__"}
    assert packaged == set(FOLDERS) - {"official"}
    assert (site / "gpt2_numpy" / "explain" / "page.html").exists()


def test_installed_commands_run_in_any_folder(installed, tmp_path):
    assert installed("gpt2", "--version") == run("--version")
    assert installed("gpt2", "ROMEO:", *SHAKESPEARE) == run("ROMEO:", *SHAKESPEARE)
    assert installed("gpt2", "ROMEO:", *SHAKESPEARE[:4], "--explain", "page.html")[:2] == (0, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_installed_commands_say_their_names(installed):
    assert [*COMMANDS.values()] == [*PROJECT["project"]["scripts"]]
    for script, name in COMMANDS.items():
        code, out, _ = installed(name, "--help")
        assert code == 0 and out.decode("utf-8").startswith(f"usage: {name} [-h] [--version]")
        assert_mistake(installed(name, "--none"), f"see {name} --help", script=name)
        assert_mistake(run("--none", script=script), f"see python {script} --help", script=script)
