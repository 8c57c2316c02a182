"""Reports of a training run: progress bar, evaluations and samples on standard error, log.jsonl and loss.png."""

import contextlib
import json
import math
import os
import sys

from tqdm import tqdm

import gpt2
from sampling import make_sampler
from training.fields import Count, Number, has_type
from training.figure import new_figure, save_figure
from training.progress import Lines
from weights.errors import printable
from weights.files import atomic_write, open_regular

LOG, PICTURE = "log.jsonl", "loss.png"
LOG_INTERVAL = 10  # steps
SAMPLE_TOKENS = 100


class Report:
    """Show and log the progress of a Trainer. Use it as a context manager, which shows the progress bar."""

    def __init__(self, trainer):
        self.trainer, self.model_dir, self.step_seconds = trainer, trainer.plan.model_dir, []
        self.lines = Lines()

    def __enter__(self):
        total, step = self.trainer.options.max_iters, self.trainer.state.step
        self.bar = tqdm(total=total, initial=step, unit="step", disable=None, dynamic_ncols=True)
        if self.trainer.state.saved_step >= 0:  # a resumed run, which may have been killed before it drew
            self.plot_losses()
        return self

    def __exit__(self, *_):
        self.bar.close()

    def say(self, text):
        self.bar.write(text, file=sys.stderr)

    def show_step(self, metrics, seconds):
        """Advance the progress bar; every LOG_INTERVAL steps, log the metrics, a dict. seconds: the step's duration."""
        self.step_seconds.append(seconds)
        tokens = self.trainer.options.tokens_per_step * len(self.step_seconds)
        speed = round(tokens / sum(self.step_seconds))
        progress = f"loss {metrics['loss']:.3f}, {speed} tokens/s"
        self.bar.set_postfix_str(progress, refresh=False)
        self.bar.update()
        self.lines.show(f"step {self.trainer.state.step} of {self.trainer.options.max_iters}: {progress}")
        if self.trainer.state.step % LOG_INTERVAL == 0:
            self.log(metrics | {"tokens_per_second": speed})
            self.step_seconds.clear()

    def log(self, metrics):
        """Append one line of JSON to log.jsonl."""
        line = {"step": self.trainer.state.step, "seconds": round(self.trainer.seconds, 2)} | metrics
        with open(os.path.join(self.model_dir, LOG), "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")

    def show_evaluation(self, losses):
        """Print the losses and a sample, and plot all losses so far."""
        self.plot_losses()
        is_best = self.trainer.state.best_step == self.trainer.state.step
        self.say(
            f"step {self.trainer.state.step}: train loss {losses['train_loss']:.4f}, "
            f"validation loss {losses['val_loss']:.4f} ({losses['val_nats_per_char']:.4f} nats per character"
            f"{', the best so far' if is_best else ''}), {self.trainer.seconds:.0f} s"
        )
        self.say(self.sample())

    def sample(self):
        """Return a text generated from the current parameters, each line behind a vertical bar."""
        plan = self.trainer.plan
        start = plan.encoder.start_ids()
        n_tokens = min(SAMPLE_TOKENS, plan.hparams["n_ctx"] - len(start))
        sample = make_sampler(temperature=0.8, top_k=40, top_p=1.0, seed=plan.options.seed)
        ids = gpt2.generate(start, self.trainer.params, plan.hparams["n_head"], n_tokens, sample=sample)
        return "\n".join("    | " + line for line in printable(plan.encoder.decode(ids)).split("\n"))

    def plot_losses(self):
        """Write loss.png if matplotlib is installed."""
        try:
            figure = new_figure(8, 5)
        except ImportError:
            return
        lines, title = read_log(self.model_dir), self.trainer.options.name
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=title)
        for key, label in (("loss", "batch"), ("train_loss", "training text"), ("val_loss", "validation text")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            style = {"alpha": 0.3, "linewidth": 1} if key == "loss" else {"marker": "."}
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, **style)
        axes.legend()
        save_figure(figure, os.path.join(self.model_dir, PICTURE), "choose another --models_dir")


class NoReport(contextlib.nullcontext):
    """The Report of the processes that write no files."""

    def say(self, *_):
        pass

    log = show_step = show_evaluation = say


def read_log(model_dir, last_step=math.inf):
    """Return the lines of log.jsonl up to last_step, as dicts. Lines that a crash cut off or damaged are skipped."""
    path, lines = os.path.join(model_dir, LOG), []
    if os.path.exists(path):
        with open_regular(path) as f:
            for line in f:
                with contextlib.suppress(ValueError, RecursionError):
                    lines.append(json.loads(line))
    return [line for line in lines if is_log_line(line) and line["step"] <= last_step]


def is_log_line(line):
    """Return whether a value from JSON is a dict of finite numbers with a whole number of steps."""
    return has_type(line, dict[str, Number]) and has_type(line.get("step"), Count)


def truncate_log(model_dir, last_step):
    """Drop the lines of later steps, which a resumed run repeats."""
    lines = read_log(model_dir, last_step)
    with atomic_write(os.path.join(model_dir, LOG)) as f:
        f.write("".join(json.dumps(line) + "\n" for line in lines).encode("utf-8"))
