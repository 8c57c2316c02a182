"""official/: what it says of a wrong checkout or model, and, with OpenAI's code at hand, the comparison itself.

The comparison needs a checkout of OpenAI's repository at the commit compare.py names: OFFICIAL_GPT2=PATH pytest ...
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from encoder import get_encoder
from official import compare, theirs
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


def run_script(*arguments, cwd, **env):
    """Runs official/compare.py in a process of its own and in another folder."""
    return subprocess.run(
        [sys.executable, compare.__file__, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=os.environ | env,
        check=False,
    )


def is_mistake(done):
    """Exit code 2, one line on standard error, nothing on standard output."""
    one_line = done.stderr.count("\n") == 1 and done.stderr.startswith("official/compare.py: error: ")
    return done.returncode == 2 and one_line and not done.stdout


# OpenAI's checkout


def git(*command):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *map(str, command)], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A repository of two commits in the place of OpenAI's; compare.py wants the first."""
    path = tmp_path / "upstream"
    (path / "src").mkdir(parents=True)
    git("init", "--quiet", path)
    for version in ("first", "second"):
        (path / "src" / "model.py").write_text(f"{version}\n", encoding="utf-8")
        git("-C", path, "add", ".")
        git("-C", path, "commit", "--quiet", "-m", version)
        if version == "first":
            monkeypatch.setattr(compare, "COMMIT", git("-C", path, "rev-parse", "HEAD"))
    monkeypatch.setattr(compare, "URL", str(path))
    return path


def test_missing_checkout_names_the_commands(tmp_path):
    done = run_script("--official_repo", "not here", cwd=tmp_path)
    assert is_mistake(done)
    assert f"git clone {compare.URL} 'not here' && git -C 'not here' checkout {compare.COMMIT}" in done.stderr


def test_wrong_commit_names_the_command(tmp_path, upstream):
    done = run_script("--official_repo", upstream, cwd=tmp_path)
    assert is_mistake(done)
    assert f"git -C {upstream} checkout 9b63575ef42771a015060c964af2c3da4cf7c8ab" in done.stderr


def test_commit_that_is_not_there(tmp_path, upstream):
    done = run_script("--official_repo", upstream, "--clone", cwd=tmp_path)
    assert is_mistake(done)
    assert "checkout 9b63575" in done.stderr and "run it by hand" in done.stderr


def test_folder_that_is_no_checkout_stays_as_it_is(tmp_path, upstream):
    git("-C", upstream, "checkout", "--quiet", compare.COMMIT)
    for path in (upstream / "src", upstream / "src" / "model.py"):  # a part of a checkout is none
        with pytest.raises(UserError, match=f"is not a git checkout; name a new folder: git clone .* {path}-"):
            compare.check_checkout(str(path), clone=True)


def test_clone_makes_the_checkout(tmp_path, upstream):
    path = tmp_path / "new" / "checkout"
    compare.check_checkout(str(path), clone=True)
    assert git("-C", path, "rev-parse", "HEAD") == compare.COMMIT
    assert (path / "src" / "model.py").read_text(encoding="utf-8") == "first\n"
    compare.check_checkout(str(path), clone=False)


def test_clone_fills_an_empty_folder(tmp_path, upstream):
    (tmp_path / "empty").mkdir()
    compare.check_checkout(str(tmp_path / "empty"), clone=True)
    compare.check_checkout(str(tmp_path / "empty"), clone=False)


def test_clone_moves_a_checkout_to_the_commit(upstream):
    with pytest.raises(UserError, match="is at commit"):
        compare.check_checkout(str(upstream), clone=False)
    compare.check_checkout(str(upstream), clone=True)
    compare.check_checkout(str(upstream), clone=False)


def test_changed_source_is_refused_and_kept(upstream):
    git("-C", upstream, "checkout", "--quiet", compare.COMMIT)
    changed = upstream / "src" / "model.py"
    changed.write_text("changed\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"src/model\.py is not OpenAI's any more; run: git -C .* checkout .* -- src"):
        compare.check_checkout(str(upstream), clone=True)
    assert changed.read_text(encoding="utf-8") == "changed\n"


def test_git_that_is_not_installed(tmp_path):
    done = run_script("--official_repo", "new", "--clone", cwd=tmp_path, PATH=str(tmp_path))
    assert is_mistake(done)
    assert "git is needed" in done.stderr


def test_wrong_options(tmp_path):
    for options in ([], ["--official_repo", "x", "--n_tokens_to_generate", "0"], ["--official_repo", "x", "prompt"]):
        done = run_script(*options, cwd=tmp_path)
        assert is_mistake(done)
        assert "--help" in done.stderr


# The stand-in for tensorflow.contrib


def test_hparams():
    hparams = theirs.HParams(n_ctx=1024, n_head=12)
    assert hparams.n_ctx == 1024 and hparams.n_head == 12
    assert hparams.override_from_dict({"n_head": 16}) is hparams
    assert hparams.n_ctx == 1024 and hparams.n_head == 16
    with pytest.raises(KeyError, match="n_haed"):
        hparams.override_from_dict({"n_haed": 1})


# The prompts, the files, the verdict


@pytest.fixture
def byte_encoder(tmp_path):
    write_byte_vocabulary(tmp_path, 257)
    return get_encoder(tmp_path.name, tmp_path.parent)


def test_prompts_fit_the_context(byte_encoder):
    for n_ctx, n_new in ((4096, 40), (100, 40), (41, 40)):
        prompts = compare.choose_prompts("x", byte_encoder, n_ctx, n_new)
        assert all(0 < len(byte_encoder.encode(prompt)) <= n_ctx - n_new for prompt in prompts.values())
        assert prompts["--prompt"] == "x"
    assert compare.choose_prompts(None, byte_encoder, 4096, 40) == compare.PROMPTS


def test_prompts_that_do_not_fit(byte_encoder):
    with pytest.raises(UserError, match="--prompt has 11 tokens, and 40 to generate leave 10 of the model's 50"):
        compare.choose_prompts("x" * 11, byte_encoder, 50, 40)
    with pytest.raises(UserError, match="leaves no room"):
        compare.choose_prompts(None, byte_encoder, 40, 40)
    with pytest.raises(UserError, match="empty"):
        compare.choose_prompts("", byte_encoder, 50, 40)


def test_model_without_openais_files(tmp_path, monkeypatch, capsys):
    write_safetensors(tmp_path / ".", HPARAMS, random_tensors(HPARAMS))
    write_byte_vocabulary(tmp_path, HPARAMS["n_vocab"])
    monkeypatch.setattr(compare, "check_checkout", lambda path, clone: None)
    monkeypatch.delenv("GPT2_BASE_URL", raising=False)
    options = ["--official_repo", "x", "--model_size", tmp_path.name, "--models_dir", str(tmp_path.parent)]
    assert compare.main(options) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert (
        "lacks the TensorFlow checkpoint (checkpoint, model.ckpt.*), which OpenAI's code reads; put them back\n" in err
    )
    with pytest.raises(UserError, match="or give --models_dir a new folder"):
        compare.check_release_files("124M", str(tmp_path))


def test_verdict(byte_encoder):
    logits = np.zeros((4, 257), np.float32)
    logits[:, 65], logits[:, 66] = 3, 2
    answer = {"ids": [1, 2], "new_ids": [65, 65, 65]}
    assert compare.compare(answer, logits, answer, logits)[1:4] == ("identical", "3 of 3", "0.00e+00")
    assert compare.explain("x", answer, logits, answer, logits, byte_encoder) == []

    our_logits = logits.copy()
    our_logits[2, 66] = 3.5
    ours = {"ids": [1, 2], "new_ids": [65, 66, 65]}
    assert compare.compare(answer, logits, ours, our_logits)[2] == "1 of 3"
    text = "\n".join(compare.explain("x", answer, logits, ours, our_logits, byte_encoder))
    a, b = (f"{i} {byte_encoder.decode([i])!a}" for i in (65, 66))
    assert "different: x: generated token 2 of 3" in text
    assert f"OpenAI's took {a}; largest logits: {a} 3.000000, {b} 2.000000; gap 1.00e+00" in text
    assert f"ours     took {b}; largest logits: {b} 3.500000, {a} 3.000000; gap 5.00e-01" in text

    ours = {"ids": [1], "new_ids": [65, 66, 65]}
    assert compare.compare(answer, logits, ours, our_logits)[1:3] == ("different", "-")
    text = "\n".join(compare.explain("x", answer, logits, ours, our_logits, byte_encoder))
    assert "token 2 of the prompt is 2 " in text and text.endswith("nothing in ours")


# The comparison itself


@pytest.fixture
def official_repo():
    if "OFFICIAL_GPT2" not in os.environ:
        pytest.skip("OFFICIAL_GPT2 does not name a checkout of OpenAI's code")
    pytest.importorskip("tensorflow")
    return os.path.abspath(os.environ["OFFICIAL_GPT2"])


@pytest.fixture
def tiny(tmp_path):
    """A model in OpenAI's layout whose greedy text does not repeat one token; gives the folder and the tensors."""
    model_dir = tmp_path / "models" / "tiny"
    model_dir.mkdir(parents=True)
    write_vocabulary(model_dir, compare.PROMPTS["long"] + compare.PROMPTS["Turing"], HPARAMS["n_vocab"])
    write_hparams(model_dir, HPARAMS)
    tensors = random_tensors(HPARAMS)
    write_tf_checkpoint(model_dir, tensors)
    return model_dir, tensors


def test_same_weights_are_identical(tmp_path, official_repo, tiny):
    redirect = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{official_repo}.insteadOf"}
    redirect["GIT_CONFIG_VALUE_0"] = compare.URL
    options = ["--official_repo", "new", "--clone", "--model_size", "tiny", "--prompt", "wind\u2028"]
    done = run_script(*options, cwd=tmp_path, **redirect)
    assert done.returncode == 0, done.stderr
    *table, verdict = done.stdout.rstrip("\n").split("\n")
    assert verdict == "identical"
    rows = [line.split() for line in table if "of 40" in line]
    assert len(rows) == len(compare.PROMPTS) + 1
    assert all(row[-5:-2] == ["40", "of", "40"] and float(row[-1]) < 1e-4 for row in rows)
    assert git("-C", tmp_path / "new", "status", "--porcelain", "--ignored") == ""


def test_other_weights_are_different(tmp_path, official_repo, tiny):
    model_dir, tensors = tiny
    write_safetensors(model_dir, HPARAMS, tensors | {"h1/mlp/c_proj/w": -tensors["h1/mlp/c_proj/w"]})
    options = ["--official_repo", official_repo, "--model_size", "tiny", "--n_tokens_to_generate", "20"]
    done = run_script(*options, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "identical" not in done.stdout.rstrip("\n").rpartition("\n")[2]
    assert "different: Turing: generated token" in done.stdout
    assert "gap" in done.stdout


def test_damaged_checkpoint_is_one_line(tmp_path, official_repo, tiny):
    model_dir, tensors = tiny
    write_safetensors(model_dir, HPARAMS, tensors)
    data = model_dir / "model.ckpt.data-00000-of-00001"
    data.write_bytes(bytes(data.stat().st_size))
    done = run_script("--official_repo", official_repo, "--model_size", "tiny", cwd=tmp_path)
    assert is_mistake(done)
    assert "OpenAI's code failed" in done.stderr
