"""Peak memory of gpt2.py in a full context, for OpenAI's four shapes and each engine: python bench/memory.py [SIZE ...]

For each shape, a model with random weights is written to a temporary folder (1558M takes 6.2 GB of disk; TMPDIR says
where), and gpt2.py generates one token after a prompt that fills the rest of the context. Private memory is that of
NumPy's arrays, of which the key/value cache and copied weights are parts, and of Python; mapped memory is the file of
the weights, which the system may drop from memory and read again. Linux only.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

from common import ROOT, machine, some_tensors, table, write_byte_vocabulary, write_safetensors

from weights.releases import HPARAMS


def peaks(command):
    """Return the largest (RssAnon, RssFile, VmRSS) of a process in bytes, polled about every millisecond."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, names = pathlib.Path(f"/proc/{process.pid}/status"), ("RssAnon:", "RssFile:", "VmRSS:")
    largest = dict.fromkeys(names, 0)
    while process.poll() is None:
        for line in status.read_text(encoding="utf-8").splitlines():
            name, *fields = line.split()
            if name in largest:
                largest[name] = max(largest[name], 1024 * int(fields[0]))
        time.sleep(0.001)
    if process.returncode:
        sys.exit(f"gpt2.py ended with exit code {process.returncode}")
    return list(largest.values())


def rows(size):
    """The table's rows for a shape, one per engine."""
    hparams = HPARAMS[size]
    cache = 2 * 4 * hparams["n_layer"] * hparams["n_ctx"] * hparams["n_embd"]
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        model_dir = pathlib.Path(folder) / size
        model_dir.mkdir()
        write_byte_vocabulary(model_dir, hparams["n_vocab"])
        write_safetensors(model_dir, hparams, some_tensors(hparams))
        prompt = "a" * (hparams["n_ctx"] - 1)
        command = [sys.executable, str(ROOT / "gpt2.py"), prompt, "--model_size", size, "--models_dir", folder]
        for option in ("--engine numpy", "--engine compiled", "--dtype int8", "--dtype int4"):
            private, mapped, both = peaks([*command, "--n_tokens_to_generate", "1", *option.split()])
            yield [size, option, *(f"{n / 1e9:.2f}" for n in (mapped, private, cache, both))]


def main():
    print(machine())
    head = ["model", "engine", "mapped GB", "private GB", "of which key/value cache GB", "peak GB"]
    table(head, [row for size in sys.argv[1:] or HPARAMS for row in rows(size)])


if __name__ == "__main__":
    main()
