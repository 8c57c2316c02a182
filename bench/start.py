"""The time of a warm start: python bench/start.py [ROUNDS]

Runs the whole process that prints one token after a 32-token prompt, in turns with a process that only imports NumPy,
and measures the peak of its private memory (anonymous pages, without the memory-mapped weights). Linux only.
"""

import pathlib
import subprocess
import sys
import time

from common import MODELS_DIR, NAME, ROOT, machine, median, model_124m, table


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
    n_prompt = len(encoder.encode(prompt))
    python = sys.executable
    script = [python, str(ROOT / "gpt2.py"), prompt, "--model_size", NAME, "--models_dir", str(MODELS_DIR)]
    ours, theirs = [*script, "--n_tokens_to_generate", "1"], [python, "-c", "import numpy"]
    for command in (ours, theirs):
        wall(command)
    pairs = [(wall(ours), wall(theirs)) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    ratio = median(x / y for x, y in pairs)
    print(f"{machine()}; {n_prompt}-token prompt, 1 token, medians of {rounds} rounds in turns")
    head = ["warm start s", "import numpy s", "times import numpy", "peak private MB"]
    table(head, [[f"{median(a):.3f}", f"{median(b):.3f}", f"{ratio:.2f}", f"{peak_private_mb(ours):.0f}"]])


if __name__ == "__main__":
    main()
