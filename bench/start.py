"""The time of a warm start: python bench/start.py [ROUNDS]

Runs whole processes that print 1 and 40 tokens after a 32-token prompt, in turns with a process that only imports
NumPy, and measures the peak of their private memory (anonymous pages, without the memory-mapped weights). Linux only.
"""

import pathlib
import subprocess
import sys
import time

from common import MODELS_DIR, NAME, ROOT, in_turn, machine, median, model_124m, table


def wall(command):
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def peak_private_mb(command):
    """Return the largest RssAnon, polled about every millisecond."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, peak = pathlib.Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.0005)
    return peak * 1024 / 1e6


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    encoder, *_ = model_124m()
    prompt = " a"  # one token of OpenAI's vocabulary, two of bytes
    while len(encoder.encode(prompt)) < 32:
        prompt += " a"
    n_prompt, python = len(encoder.encode(prompt)), sys.executable
    script = [python, str(ROOT / "gpt2.py"), prompt, "--model_size", NAME, "--models_dir", str(MODELS_DIR)]
    commands = {("import numpy", ""): [python, "-c", "import numpy"]}
    for n in (1, 40):
        for engine in ("auto", "numpy", "compiled"):
            commands[engine, n] = [*script, "--engine", engine, "--n_tokens_to_generate", str(n)]
    for command in commands.values():
        wall(command)
    spent = {key: [] for key in commands}
    for turn in range(rounds):
        for key in in_turn(list(commands), turn):
            spent[key].append(wall(commands[key]))
    print(f"{machine()}; {n_prompt}-token prompt, medians of {rounds} rounds in turns")
    imported, *keys = spent
    rows = [[*imported, f"{median(spent[imported]):.3f}", "", "", ""]]
    for key in keys:
        ratios = [
            f"{median(a / b for a, b in zip(spent[key], spent[other], strict=True)):.2f}"
            for other in (imported, ("numpy", key[1]))
        ]
        rows.append([*key, f"{median(spent[key]):.3f}", *ratios, f"{peak_private_mb(commands[key]):.0f}"])
    table(["engine", "tokens", "warm start s", "times import numpy", "times numpy", "peak private MB"], rows)


if __name__ == "__main__":
    main()
