"""official/: errors about the checkout, the model and the options, and the comparison itself.

Its other side is transformers and, given a checkout of OpenAI's repository (official/README.md), OpenAI's code:
OFFICIAL_GPT2=PATH pytest ...
"""

import importlib.util
import os
import py_compile
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest

from cli.compare import run
from encoder import get_encoder
from gpt2 import gpt2
from official import compare, theirs
from tests import programs
from tests.conftest import TINY, their_greedy_ids, their_logits
from tests.programs import assert_mistake
from tests.random_model import copy_vocabulary, write_byte_vocabulary, write_safetensors
from weights.errors import UserError
from weights.names import nest, tensor_shapes


@pytest.fixture
def mistake(capsysbinary):
    """Run the command line, which must fail with one line on standard error that contains the words."""

    def run_mistake(arguments, *words):
        code = run([str(argument) for argument in arguments])
        assert_mistake((code, *capsysbinary.readouterr()), *words, script="official/compare.py")

    return run_mistake


def run_script(*arguments, **options):
    """Run official/compare.py in a process; return its exit code, output and errors."""
    return programs.run("--model_size", "tiny", *arguments, script="official/compare.py", timeout=300, **options)


# OpenAI's checkout


def git(*command):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *map(str, command)], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A repository with two commits in place of OpenAI's, at the second; compare.py wants the first."""
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
    path = shlex.quote(str(tmp_path / "not here"))
    clone = f"git clone {compare.URL} {path} && git -C {path} checkout {compare.COMMIT}"
    mistake(["--official_repo", "not here"], clone, "or add --clone")
    mistake(["--official_repo", upstream], f"git -C {upstream} checkout {compare.COMMIT}")
    assert not os.path.exists("not here")
    monkeypatch.setattr(compare, "COMMIT", "9b63575ef42771a015060c964af2c3da4cf7c8ab")  # which does not exist
    mistake(["--official_repo", upstream, "--clone"], f"is not a git checkout of {compare.URL}; name a new folder")


def test_another_folder_is_refused(upstream):
    for path in (upstream / "src", upstream / "src" / "model.py"):  # parts of a checkout
        with pytest.raises(UserError, match=f"is not a git checkout of .*; name a new folder: git clone .* {path}-"):
            compare.check_checkout(str(path), clone=True)


@pytest.fixture
def checkout(upstream):
    git("-C", upstream, "checkout", "--quiet", compare.COMMIT)
    return upstream


@pytest.mark.parametrize("flag", ["--refresh", "--skip-worktree"])  # git diff trusts the latter
def test_a_modified_source_is_refused_and_kept_and_the_command_restores_it(checkout, flag):
    git("-C", checkout, "update-index", flag, "src/model.py")
    source = checkout / "src" / "model.py"
    source.write_text("modified\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"src/model\.py differs from OpenAI's; run: git -C ") as error:
        compare.check_checkout(str(checkout), clone=True)
    assert source.read_text(encoding="utf-8") == "modified\n"
    git(*shlex.split(str(error.value).partition("run: git ")[2]))
    compare.check_checkout(str(checkout), clone=False)
    source.unlink()
    with pytest.raises(UserError, match=r"src/model\.py differs"):
        compare.check_checkout(str(checkout), clone=True)


@pytest.mark.parametrize("name", ["encoder/__init__.py", "model.abi3.so", "link", "new\n"])
def test_a_file_that_could_shadow_a_module_is_refused(checkout, tmp_path, name):
    src = checkout / "src"
    (src / "__pycache__").mkdir()
    (src / "__pycache__" / "model.cpython-313.pyc").touch()
    (src / "model.py").write_bytes(b"first\r\n")  # git's conversion of line ends
    compare.check_checkout(str(checkout), clone=False)
    (checkout / ".git" / "info" / "exclude").write_text("*\n", encoding="utf-8")
    if name == "link":
        (tmp_path / "package").mkdir()
        (src / name).symlink_to(tmp_path / "package")
    else:
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).touch()
    with pytest.raises(UserError, match=r"src/.* is not OpenAI's and could be imported") as error:
        compare.check_checkout(str(checkout), clone=True)
    assert repr(f"src/{name}") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["new/checkout", "empty", "upstream"])  # the latter is at another commit
def test_clone_makes_the_checkout(tmp_path, upstream, name):
    path = tmp_path / name
    (tmp_path / "empty").mkdir()
    compare.check_checkout(str(path), clone=True)
    assert git("-C", path, "rev-parse", "HEAD") == compare.COMMIT
    assert (path / "src" / "model.py").read_text(encoding="utf-8") == "first\n"
    compare.check_checkout(str(path), clone=False)


def test_missing_programs_are_named(tmp_path, checkout, mistake, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    mistake(["--official_repo", checkout], "TensorFlow", "pip install -r requirements-dev.txt")
    monkeypatch.setenv("PATH", str(tmp_path))
    mistake(["--official_repo", "new", "--clone"], "git is needed")


def test_wrong_options_in_another_folder(tmp_path):
    assert_mistake(run_script(cwd=tmp_path), "--official_repo", "--help", script="official/compare.py")


def test_a_model_without_openais_files(tiny_models_dir, mistake, monkeypatch):
    monkeypatch.setattr(compare, "check_checkout", lambda path, clone: None)
    monkeypatch.setattr(compare, "check_tensorflow", lambda: None)
    arguments = ["--official_repo", "x", "--model_size", "tiny", "--models_dir", tiny_models_dir]
    mistake(arguments, "lacks the TensorFlow checkpoint (checkpoint, model.ckpt.*), which OpenAI's code reads; put")
    with pytest.raises(UserError, match="or give --models_dir a new folder"):
        compare.check_release_files("124M", str(tiny_models_dir / "tiny"))


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
    for n_ctx in (8192, 100, 41):
        prompts = compare.choose_prompts("x", byte_encoder, n_ctx, 40)
        assert all(0 < len(byte_encoder.encode(prompt)) <= n_ctx - 40 for prompt in prompts.values())
        assert prompts["--prompt"] == "x"
    assert compare.choose_prompts(None, byte_encoder, 8192, 40) == compare.PROMPTS
    long = ("x" * 11, 50, "--prompt has 11 tokens, more than the 10 that 40 tokens to generate leave")
    for prompt, n_ctx, words in (long, (None, 40, "leaves no room"), ("", 50, "empty")):
        with pytest.raises(UserError, match=words):
            compare.choose_prompts(prompt, byte_encoder, n_ctx, 40)


@pytest.fixture
def pair():
    """Two equal results. The spread is the same at each of the five positions."""
    logits = np.zeros((5, 257), np.float32)
    logits[:, 65], logits[:, 66] = 3, 2
    return [{"ids": [1, 2], "new_ids": [65, 65, 65], "logits": logits.copy()} for _ in range(2)]


def test_comparison_of_two_results(byte_encoder, pair):
    assert compare.compare("x", *pair, byte_encoder) == (("x", 2, "identical", "3 of 3", "0.00e+00", "0.0e+00"), [])

    a, b, last = (f"{i} {byte_encoder.decode([i])!a}" for i in (65, 66, 2))
    pair[1]["ids"], pair[1]["new_ids"], pair[1]["logits"][2, 66] = [1], [65, 66, 65], 3.5
    pair[1]["logits"][1, 66] = 1
    spread = np.std(pair[0]["logits"][0])
    row, lines = compare.compare("x", *pair, byte_encoder)
    assert row == ("x", 2, "different", "1 of 3", "1.50e+00", f"{1.5 / spread:.1e}")
    assert lines == [
        f"different: x: token 2 of the prompt is {last} in OpenAI's code, nothing in ours",
        f"different: x: position 3 of 5 (token {a}): the logit of {b} is 2.000000 in OpenAI's code, 3.500000 in ours; "
        f"difference 1.50e+00, tolerance {2e-4 * spread:.2e}",
        "different: x: generated token 2 of 3\n"
        f"  OpenAI's chose {a}; largest logits: {a} 3.000000, {b} 2.000000; gap 1.00e+00\n"
        f"  ours     chose {b}; largest logits: {b} 3.500000, {a} 3.000000; gap 5.00e-01",
    ]


@pytest.mark.parametrize("position", [0, 1, 2, 4])  # in the prompt, its last, a generated token, after the last one
def test_the_tolerance_is_that_of_the_position(byte_encoder, pair, position):
    for found in pair:
        found["logits"][2] *= 1e30  # a large spread, whose square float32 cannot represent
        found["logits"][3] = 1  # no spread
    pair[1]["logits"][2, 8] = 1e25  # a small part of the spread there
    tolerance = 2e-4 * np.std(pair[0]["logits"][position], dtype=np.float64)
    for factor, n_lines in ((0.95, 0), (1.05, 1), (-1.05, 1)):
        pair[1]["logits"][position, 7] = factor * tolerance
        _, lines = compare.compare("x", *pair, byte_encoder)
        assert len(lines) == n_lines
        assert all(f"position {position + 1} of 5" in line and "the logit of 7 " in line for line in lines)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("sides", [[0], [1], [0, 1]])
def test_logits_that_are_not_finite_are_different(byte_encoder, pair, value, sides):
    for side in sides:
        pair[side]["logits"][3, 7] = value
    pair[1]["logits"][2, 8] = 1  # a finite difference does not come first
    _, [line] = compare.compare("x", *pair, byte_encoder)
    assert "position 4 of 5" in line and "the logit of 7 " in line and str(value) in line


# The comparison itself, of altered weights


@pytest.fixture(scope="module")
def official_repo():
    if "OFFICIAL_GPT2" not in os.environ:
        pytest.skip("OFFICIAL_GPT2 does not name a checkout of OpenAI's code")
    pytest.importorskip("tensorflow")
    return os.path.abspath(os.environ["OFFICIAL_GPT2"])


N_GENERATED = 8


@pytest.fixture(scope="module", params=["transformers", "OpenAI's"])
def their_answers(request, tiny, tmp_path_factory):
    """What run_theirs returns for the tiny model, computed by transformers or by OpenAI's code."""
    prompts = compare.choose_prompts(None, tiny[0], TINY["n_ctx"], N_GENERATED)
    if request.param == "OpenAI's":
        official_repo, model_dir = map(request.getfixturevalue, ("official_repo", "tiny_release"))
        folder = tmp_path_factory.mktemp("logits")
        return compare.run_theirs(official_repo, str(model_dir), prompts, N_GENERATED, str(folder))
    model, answers = request.getfixturevalue("theirs"), []
    for ids in map(tiny[0].encode, prompts.values()):
        new_ids = their_greedy_ids(model, ids, N_GENERATED)
        logits = their_logits(model, [ids + new_ids])[0]
        answers.append({"ids": ids, "new_ids": new_ids, "logits": logits, "tensorflow": "2"})
    return answers


@pytest.fixture
def compare_with(tmp_path, monkeypatch, capsys, vocabulary_dir, their_answers):
    """Run the command line with these imported tensors; return the exit code and the output."""
    for name in ("check_checkout", "check_tensorflow", "check_release_files"):
        monkeypatch.setattr(compare, name, lambda *arguments: None)
    monkeypatch.setattr(compare, "run_theirs", lambda *arguments: their_answers)
    (tmp_path / "tiny").mkdir()
    copy_vocabulary(tmp_path / "tiny", vocabulary_dir)

    def run_compare(tensors):
        write_safetensors(tmp_path / "tiny", TINY, tensors)
        arguments = ["--official_repo", "x", "--model_size", "tiny", "--models_dir", str(tmp_path)]
        code = run([*arguments, "--n_tokens_to_generate", str(N_GENERATED)])
        out, err = capsys.readouterr()
        assert err == ""
        return code, out

    return run_compare


IDENTICAL = "identical token ids; all logits are within 2e-04 of the spread\n"
ALL_GENERATED = f"{N_GENERATED} of {N_GENERATED}"
LINE = re.compile(
    r"^different: (.*): position (\d+) of .*: the logit of (\d+) .*; difference (\S+), tolerance (\S+)$", re.MULTILINE
)


def altered(tensors, name, size, part=slice(None)):
    """Return the tensors with normal noise of this standard deviation added to one, or to a part of its first axis."""
    noise = np.zeros_like(tensors[name])
    noise[part] = np.random.default_rng(0).normal(0, size, noise[part].shape)
    return tensors | {name: tensors[name] + noise}


def exact_logits(tensors, their_answers):
    """Return the logits of all prompts and their continuations in float64, one row per position."""
    params = nest({name: tensor.astype(np.float64) for name, tensor in tensors.items()}, TINY["n_layer"])
    logits = [gpt2(found["ids"] + found["new_ids"], **params, n_head=TINY["n_head"]) for found in their_answers]
    return np.concatenate(logits)


QUERY, KEY, VALUE = (slice(i * TINY["n_embd"], (i + 1) * TINY["n_embd"]) for i in range(3))
EACH_KIND = [name for name in tensor_shapes(**TINY) if not name.startswith("h1/") and name != "h0/attn/c_attn/b"]


@pytest.mark.parametrize(
    ("name", "part"),
    [*((name, slice(None)) for name in EACH_KIND), ("h0/attn/c_attn/b", QUERY), ("h0/attn/c_attn/b", VALUE)],
)
def test_an_altered_tensor_is_reported(compare_with, tiny_tensors, their_answers, name, part):
    """An effect of a third of the tolerance is accepted, three times the tolerance is not."""
    exact, other = (exact_logits(t, their_answers) for t in (tiny_tensors, altered(tiny_tensors, name, 1e-4, part)))
    size = 1e-4 * 2e-4 / np.max(np.abs(other - exact) / np.std(exact, axis=-1, keepdims=True))
    code, out = compare_with(altered(tiny_tensors, name, size / 3, part))
    assert (code, out.endswith(f"\n\n{IDENTICAL}")) == (0, True)
    code, out = compare_with(altered(tiny_tensors, name, size * 3, part))
    ratios = [float(difference) / float(tolerance) for *_, difference, tolerance in LINE.findall(out)]
    assert (code, IDENTICAL in out, max(ratios)) == (1, False, pytest.approx(3, rel=0.05))


def test_the_bias_of_the_keys_has_no_effect(compare_with, tiny_tensors):
    """It adds the same number to all scores of a query, and softmax(x + c) = softmax(x)."""
    code, out = compare_with(altered(tiny_tensors, "h0/attn/c_attn/b", 1, KEY))
    assert (code, out.endswith(f"\n\n{IDENTICAL}")) == (0, True)


def test_a_difference_in_the_generated_part_only(compare_with, tiny_tensors, their_answers):
    lengths = [len(found["ids"] + found["new_ids"]) for found in their_answers]
    position = max(lengths) - 1  # of the last generated token but one, in the longest prompt only
    code, out = compare_with(altered(tiny_tensors, "wpe", 1e-3, slice(position - 1, position)))
    longest = list(compare.PROMPTS)[np.argmax(lengths)]
    assert [line[:2] for line in LINE.findall(out)] == [(longest, str(position))]
    assert (code, out.count(ALL_GENERATED)) == (1, len(compare.PROMPTS))


def test_two_swapped_rows_of_wte_are_reported_though_no_prompt_has_these_tokens(
    compare_with, tiny_tensors, their_answers
):
    used = {i for found in their_answers for i in found["ids"] + found["new_ids"]}
    first, second = [i for i in range(len(tiny_tensors["wte"])) if i not in used][:2]
    wte = tiny_tensors["wte"].copy()
    wte[[first, second]] = wte[[second, first]]
    code, out = compare_with(tiny_tensors | {"wte": wte})
    assert code == 1 and len(LINE.findall(out)) == len(compare.PROMPTS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_different(compare_with, tiny_tensors, value):
    ln_f = tiny_tensors["ln_f/b"].copy()
    ln_f[0] = value
    code, out = compare_with(tiny_tensors | {"ln_f/b": ln_f})
    assert (code, out.count(f"0 of {N_GENERATED}")) == (1, len(compare.PROMPTS))
    assert [line[1] for line in LINE.findall(out)] == ["1"] * len(compare.PROMPTS)


# The program as a whole, with OpenAI's code


@pytest.fixture
def model_dir(tmp_path, tiny_release):
    return shutil.copytree(tiny_release, tmp_path / "models" / "tiny")


def test_the_same_weights_give_identical_ids(tmp_path, official_repo, model_dir):
    redirect = {"GIT_CONFIG_KEY_0": f"url.{official_repo}.insteadOf", "GIT_CONFIG_VALUE_0": compare.URL}
    options = {"cwd": tmp_path, "env": os.environ | redirect | {"GIT_CONFIG_COUNT": "1"}}
    code, out, err = run_script("--official_repo", "new", "--clone", "--prompt", "wind\u2028", **options)
    assert code == 0, err
    table, _, verdict = out.decode("utf-8").replace(os.linesep, "\n").rpartition("\n\n")
    assert verdict == IDENTICAL
    rows = [line.split() for line in table.split("\n") if "of 40" in line]
    assert len(rows) == len(compare.PROMPTS) + 1
    assert all(row[-5:-2] == ["40", "of", "40"] and float(row[-1]) < 2e-5 for row in rows)
    assert git("-C", tmp_path / "new", "status", "--porcelain", "--ignored") == ""


def test_other_weights_differ_and_a_damaged_checkpoint_is_an_error(tmp_path, official_repo, model_dir, tiny_tensors):
    checkout = shutil.copytree(official_repo, tmp_path / "checkout")
    (tmp_path / "other.py").write_text("raise RuntimeError", encoding="utf-8")
    cache = importlib.util.cache_from_source(str(checkout / "src" / "model.py"))  # which is not read
    py_compile.compile(tmp_path / "other.py", cache, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    write_safetensors(model_dir, TINY, tiny_tensors | {"h1/mlp/c_proj/w": -tiny_tensors["h1/mlp/c_proj/w"]})
    arguments = ["--official_repo", checkout, "--n_tokens_to_generate", "20"]
    code, out, err = run_script(*arguments, cwd=tmp_path)
    assert (code, b"identical token ids" in out) == (1, False), err
    assert b"different: Turing: position" in out and b"different: Turing: generated token" in out
    data = model_dir / "model.ckpt.data-00000-of-00001"
    data.write_bytes(bytes(data.stat().st_size))
    assert_mistake(run_script(*arguments, cwd=tmp_path), "OpenAI's code failed", script="official/compare.py")
