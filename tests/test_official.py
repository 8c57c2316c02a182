"""official/: errors about the checkout, the model and the options, and, given OpenAI's code, the comparison itself.

The comparison needs a checkout of OpenAI's repository (official/README.md): OFFICIAL_GPT2=PATH pytest ...
"""

import importlib.util
import os
import subprocess

import numpy as np
import pytest

from cli.compare import run
from encoder import get_encoder
from official import compare, theirs
from tests import programs
from tests.programs import assert_mistake
from tests.random_model import (
    random_tensors,
    write_byte_vocabulary,
    write_hparams,
    write_safetensors,
    write_tf_checkpoint,
    write_vocabulary,
)
from weights.errors import UserError

HPARAMS = {"n_vocab": 320, "n_ctx": 96, "n_embd": 24, "n_head": 3, "n_layer": 2}


@pytest.fixture
def mistake(capsysbinary):
    """Run the command line, which must fail with one line on standard error that contains the words."""

    def run_mistake(arguments, *words):
        code = run([str(argument) for argument in arguments])
        assert_mistake((code, *capsysbinary.readouterr()), *words, script="official/compare.py")

    return run_mistake


def run_script(*arguments, cwd, **env):
    """Run official/compare.py in a process, in another folder; return its exit code, output and errors."""
    options = {"cwd": cwd, "env": os.environ | env, "timeout": 300}
    return programs.run("--model_size", "tiny", *arguments, script="official/compare.py", **options)


# OpenAI's checkout


def git(*command):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *map(str, command)], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A repository with two commits in place of OpenAI's; compare.py wants the first."""
    path = tmp_path / "upstream"
    (path / "src").mkdir(parents=True)
    git("init", "--quiet", path)
    for version in ("first", "second"):
        (path / "src" / "model.py").write_text(f"{version}\n", encoding="utf-8")
        git("-C", path, "add", ".")
        git("-C", path, "commit", "--quiet", "-m", version)
    monkeypatch.setattr(compare, "COMMIT", git("-C", path, "rev-parse", "HEAD~"))
    monkeypatch.setattr(compare, "URL", str(path))
    return path


def test_errors_of_git_name_its_commands(tmp_path, upstream, mistake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clone = f"git clone {compare.URL} 'not here' && git -C 'not here' checkout {compare.COMMIT}"
    mistake(["--official_repo", "not here"], clone, "or add --clone")
    mistake(["--official_repo", upstream], f"git -C {upstream} checkout {compare.COMMIT}")
    assert not os.path.exists("not here")
    monkeypatch.setattr(compare, "COMMIT", "9b63575ef42771a015060c964af2c3da4cf7c8ab")  # which does not exist
    mistake(["--official_repo", upstream, "--clone"], "checkout 9b63575", "run it by hand")


def test_a_modified_source_or_another_folder_is_refused_and_kept(upstream):
    git("-C", upstream, "checkout", "--quiet", compare.COMMIT)
    source = upstream / "src" / "model.py"
    for path in (source.parent, source):  # parts of a checkout
        with pytest.raises(UserError, match=f"is not a git checkout; name a new folder: git clone .* {path}-"):
            compare.check_checkout(str(path), clone=True)
    source.write_text("modified\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"src/model\.py differs from OpenAI's; run: git -C .* checkout .* -- src"):
        compare.check_checkout(str(upstream), clone=True)
    assert source.read_text(encoding="utf-8") == "modified\n"


@pytest.mark.parametrize("name", ["new/checkout", "empty", "upstream"])  # the latter is at another commit
def test_clone_makes_the_checkout(tmp_path, upstream, name):
    path = tmp_path / name
    (tmp_path / "empty").mkdir()
    compare.check_checkout(str(path), clone=True)
    assert git("-C", path, "rev-parse", "HEAD") == compare.COMMIT
    assert (path / "src" / "model.py").read_text(encoding="utf-8") == "first\n"
    compare.check_checkout(str(path), clone=False)


# What else is missing


def test_missing_programs_are_named(tmp_path, upstream, mistake, monkeypatch):
    git("-C", upstream, "checkout", "--quiet", compare.COMMIT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    mistake(["--official_repo", upstream], "TensorFlow", "pip install -r requirements-dev.txt")
    monkeypatch.setenv("PATH", str(tmp_path))
    mistake(["--official_repo", "new", "--clone"], "git is needed")


def test_wrong_options_in_another_folder(tmp_path):
    assert_mistake(run_script(cwd=tmp_path), "--official_repo", "--help", script="official/compare.py")


def test_a_model_without_openais_files(tmp_path, mistake, monkeypatch):
    write_safetensors(tmp_path, HPARAMS, random_tensors(HPARAMS))
    write_byte_vocabulary(tmp_path, HPARAMS["n_vocab"])
    monkeypatch.setattr(compare, "check_checkout", lambda path, clone: None)
    monkeypatch.setattr(compare, "check_tensorflow", lambda: None)
    arguments = ["--official_repo", "x", "--model_size", tmp_path.name, "--models_dir", tmp_path.parent]
    mistake(arguments, "lacks the TensorFlow checkpoint (checkpoint, model.ckpt.*), which OpenAI's code reads; put")
    with pytest.raises(UserError, match="or give --models_dir a new folder"):
        compare.check_release_files("124M", str(tmp_path))


# The stand-in for tensorflow.contrib, the prompts, the result


def test_hparams():
    hparams = theirs.HParams(n_ctx=1024, n_head=12)
    assert vars(hparams.override_from_dict({"n_head": 16})) == {"n_ctx": 1024, "n_head": 16}
    with pytest.raises(KeyError, match="n_haed"):
        hparams.override_from_dict({"n_haed": 1})


@pytest.fixture
def byte_encoder(tmp_path):
    write_byte_vocabulary(tmp_path, 257)
    return get_encoder(tmp_path.name, tmp_path.parent)


def test_prompts_fit_into_the_context(byte_encoder):
    for n_ctx in (4096, 100, 41):
        prompts = compare.choose_prompts("x", byte_encoder, n_ctx, 40)
        assert all(0 < len(byte_encoder.encode(prompt)) <= n_ctx - 40 for prompt in prompts.values())
        assert prompts["--prompt"] == "x"
    assert compare.choose_prompts(None, byte_encoder, 4096, 40) == compare.PROMPTS
    long = ("x" * 11, 50, "--prompt has 11 tokens, more than the 10 that 40 tokens to generate leave")
    for prompt, n_ctx, words in (long, (None, 40, "leaves no room"), ("", 50, "empty")):
        with pytest.raises(UserError, match=words):
            compare.choose_prompts(prompt, byte_encoder, n_ctx, 40)


def test_comparison_of_two_results(byte_encoder):
    logits = np.zeros((4, 257), np.float32)
    logits[:, 65], logits[:, 66] = 3, 2
    result = {"ids": [1, 2], "new_ids": [65, 65, 65]}
    assert compare.compare(result, logits, result, logits)[1:4] == ("identical", "3 of 3", "0.00e+00")
    assert compare.describe_difference("x", result, logits, result, logits, byte_encoder) == []

    our_logits = logits.copy()
    our_logits[2, 66] = 3.5
    ours = {"ids": [1, 2], "new_ids": [65, 66, 65]}
    assert compare.compare(result, logits, ours, our_logits)[2] == "1 of 3"
    a, b = (f"{i} {byte_encoder.decode([i])!a}" for i in (65, 66))
    assert compare.describe_difference("x", result, logits, ours, our_logits, byte_encoder) == [
        "different: x: generated token 2 of 3",
        f"  OpenAI's chose {a}; largest logits: {a} 3.000000, {b} 2.000000; gap 1.00e+00",
        f"  ours     chose {b}; largest logits: {b} 3.500000, {a} 3.000000; gap 5.00e-01",
    ]

    ours = {"ids": [1], "new_ids": [65, 66, 65]}
    assert compare.compare(result, logits, ours, our_logits)[1:3] == ("different", "-")
    [line] = compare.describe_difference("x", result, logits, ours, our_logits, byte_encoder)
    assert "token 2 of the prompt is 2 " in line and line.endswith("nothing in ours")


# The comparison itself


@pytest.fixture
def official_repo():
    if "OFFICIAL_GPT2" not in os.environ:
        pytest.skip("OFFICIAL_GPT2 does not name a checkout of OpenAI's code")
    pytest.importorskip("tensorflow")
    return os.path.abspath(os.environ["OFFICIAL_GPT2"])


@pytest.fixture
def tiny(tmp_path):
    """A model in OpenAI's layout whose greedy text does not repeat one token: its folder and tensors."""
    model_dir, tensors = tmp_path / "models" / "tiny", random_tensors(HPARAMS)
    model_dir.mkdir(parents=True)
    write_vocabulary(model_dir, compare.PROMPTS["long"] + compare.PROMPTS["Turing"], HPARAMS["n_vocab"])
    write_hparams(model_dir, HPARAMS)
    write_tf_checkpoint(model_dir, tensors)
    return model_dir, tensors


def test_the_same_weights_give_identical_ids(tmp_path, official_repo, tiny):
    redirect = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{official_repo}.insteadOf"}
    redirect["GIT_CONFIG_VALUE_0"] = compare.URL
    code, out, err = run_script("--official_repo", "new", "--clone", "--prompt", "wind\u2028", cwd=tmp_path, **redirect)
    assert code == 0, err
    *table, verdict = out.decode("utf-8").rstrip("\n").split("\n")
    assert verdict == "identical"
    rows = [line.split() for line in table if "of 40" in line]
    assert len(rows) == len(compare.PROMPTS) + 1
    assert all(row[-5:-2] == ["40", "of", "40"] and float(row[-1]) < 1e-4 for row in rows)
    assert git("-C", tmp_path / "new", "status", "--porcelain", "--ignored") == ""


def test_other_weights_give_different_ids_and_a_damaged_checkpoint_an_error(tmp_path, official_repo, tiny):
    model_dir, tensors = tiny
    write_safetensors(model_dir, HPARAMS, tensors | {"h1/mlp/c_proj/w": -tensors["h1/mlp/c_proj/w"]})
    arguments = ["--official_repo", official_repo, "--n_tokens_to_generate", "20"]
    code, out, err = run_script(*arguments, cwd=tmp_path)
    assert code == 1, err
    assert b"identical" not in out.splitlines()[-1]
    assert b"different: Turing: generated token" in out and b"gap" in out
    data = model_dir / "model.ckpt.data-00000-of-00001"
    data.write_bytes(bytes(data.stat().st_size))
    assert_mistake(run_script(*arguments, cwd=tmp_path), "OpenAI's code failed", script="official/compare.py")
