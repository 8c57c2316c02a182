"""Trains GPT-2 in NumPy, from scratch or from a model that is there: python train.py --help

The forward pass is gpt2.py's. A large batch is cut into as many shards as there are cores; each goes through the model
and back in a thread of its own, since NumPy's operations, unlike its matrix products, use one core each.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import gpt2
from encoder import END_OF_TEXT
from sampling import make_sampler
from training import fused
from training.adamw import AdamW, global_norm, learning_rate_at
from training.autograd import value_and_gradients
from training.dataset import even_windows, random_windows
from training.figure import new_figure, save_figure
from weights.errors import UserError
from weights.names import nest, tensor_shapes
from weights.safetensors_file import save_params, save_safetensors

LOG_INTERVAL, SAMPLE_TOKENS = 10, 100  # steps, tokens
SHARD_TOKENS = 256  # at least so many in a shard: below, adding up the gradients of two costs more than two save
# step: updates made so far; evaluated_step, saved_step: the last step after which that was done, -1 for none
NEW_STATE = {"step": 0, "evaluated_step": -1, "saved_step": -1, "seconds": 0.0, "best_loss": math.inf}
LOG, PICTURE, STATE = "log.jsonl", "loss.png", "training.safetensors"


def lm_loss(params, inputs, targets, n_head, model=gpt2):  # dict, [batch, n_seq], [batch, n_seq] -> one number
    """Mean cross-entropy in nats of the model's predictions; a Tensor where params holds Tensors.

    model: gpt2; gpt2_pico, for one sequence; or fused.training_model(), gpt2 with dropout and a faster way back.
    """
    return fused.cross_entropy(model.gpt2(inputs, **params, n_head=n_head), np.asarray(targets))


def loss_and_gradients(tensors, hparams, inputs, targets, model=gpt2, weight=1.0):
    """(weight * lm_loss, its gradients by tensor name) for tensors by checkpoint name."""

    def loss(leaves):
        return lm_loss(nest(leaves, hparams["n_layer"]), inputs, targets, hparams["n_head"], model) * weight

    return value_and_gradients(loss, tensors)


def initial_tensors(hparams, seed):
    """GPT-2's initialization: normal with deviation 0.02, 0.01 for wpe; the projections that add to the residual
    stream scaled by 1/sqrt(2*n_layer) (Radford et al. 2019, section 2.3); scales 1, offsets 0."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in tensor_shapes(**hparams).items():
        deviation = 0.01 if name == "wpe" else 0.02
        if name.endswith("c_proj/w"):
            deviation /= math.sqrt(2 * hparams["n_layer"])
        tensors[name] = np.full(shape, name.endswith("/g"), np.float32)
        if len(shape) > 1:
            tensors[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
    return tensors


class Trainer:
    """A model folder being trained. options: a dict, the command line's; state: a dict, how far it has come;
    data: arrays of ids by split."""

    def __init__(self, model_dir, options, encoder, hparams, tensors, data, state=None):
        self.model_dir, self.options, self.encoder, self.hparams = model_dir, options, encoder, hparams
        self.tensors, self.params, self.data = tensors, nest(tensors, hparams["n_layer"]), data
        self.state = NEW_STATE | (state or {})
        names = ("beta1", "beta2", "weight_decay")
        self.optimizer = AdamW(tensors, **{name: options[name] for name in names})
        batch_tokens = options["batch_size"] * options["block_size"]
        self.n_shards = max(1, min(options["threads"], options["batch_size"], batch_tokens // SHARD_TOKENS))
        self.blas_threads = max(1, options["threads"] // self.n_shards)
        self.models = [fused.training_model(options["dropout"]) for _ in range(self.n_shards)]
        self.eval_model = fused.training_model()
        quiet = {"over": "ignore", "invalid": "ignore", "divide": "ignore"}  # check_finite looks at what comes of it
        self.pool = ThreadPoolExecutor(self.n_shards, initializer=lambda: np.seterr(**quiet))
        self.bar, self.clock, self.step_seconds, self.interrupted = None, None, [], False

    def run(self):
        """Trains up to max_iters; returns whether it came that far, which it does not when Ctrl-C ends it."""
        options, state = self.options, self.state
        self.bar = tqdm(
            total=options["max_iters"], initial=state["step"], unit="step", disable=None, dynamic_ncols=True
        )
        self.clock = time.perf_counter()
        with self.bar, self.pool, threadpool_limits(self.blas_threads), self.sigint():
            while True:
                at_end = state["step"] >= options["max_iters"]
                due = at_end or state["step"] % options["eval_interval"] == 0
                if due and state["step"] != state["evaluated_step"]:
                    self.evaluate()
                if at_end or self.interrupted:
                    break
                started = time.perf_counter()
                self.log_step(self.train_step(), time.perf_counter() - started)
            if state["step"] != state["saved_step"]:
                self.save()
        return at_end

    @contextlib.contextmanager
    def sigint(self):
        """Ctrl-C lets the step end; a second one does not."""

        def handler(*_):
            self.interrupted = True
            signal.signal(signal.SIGINT, before)
            self.say("stopping when this step is done; Ctrl-C again stops without saving")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # One step

    def try_a_step(self):
        """The way through the model and back, without the update: raises what a first step would raise."""
        with threadpool_limits(self.blas_threads):
            self.finite_gradients(step=0)

    def train_step(self):
        """One update of every tensor; returns the loss before it, the learning rate and the norm of the gradients."""
        options, step = self.options, self.state["step"]
        loss, gradients, norm = self.finite_gradients(step)
        peak, last = options["learning_rate"], options["lr_decay_iters"] or options["max_iters"]
        lowest = peak / 20 if options["min_lr"] is None else options["min_lr"]
        learning_rate = learning_rate_at(step, peak, lowest, options["warmup_iters"], last)
        scale = min(1.0, options["grad_clip"] / norm) if options["grad_clip"] and norm else 1.0
        self.optimizer.update(gradients, learning_rate, scale, self.pool.map)
        self.state["step"] += 1
        return {"loss": loss, "learning_rate": learning_rate, "gradient_norm": norm}

    def finite_gradients(self, step):
        """The loss, the gradients and their norm; raises UserError where these are not finite."""
        loss, gradients = self.all_gradients(step)
        norm = global_norm(gradients, self.pool.map)
        self.check_finite({"loss": loss, "norm of the gradients": norm})
        return loss, gradients, norm

    def all_gradients(self, step):
        """The mean loss over all batches of a step and its gradients, summed over the batches and their shards."""
        options, total_loss, total = self.options, 0.0, {}
        n_batches = options["gradient_accumulation_steps"]

        def one_shard(inputs, targets, model):
            weight = len(inputs) / options["batch_size"] / n_batches
            return loss_and_gradients(self.tensors, self.hparams, inputs, targets, model, weight)

        for i in range(n_batches):
            rng = np.random.default_rng([options["seed"], step, i])  # the same draws, resumed or not
            for j, model in enumerate(self.models):
                model.drop.seed(options["seed"], step, i, j + 1)
            batch = random_windows(self.data["train"], rng, options["batch_size"], options["block_size"])
            shards = [np.array_split(a, self.n_shards) for a in batch]
            for loss, gradients in self.pool.map(one_shard, *shards, self.models):
                total_loss += loss
                self.add_to(total, gradients)
        return total_loss, total

    def add_to(self, total, gradients):
        if not total:
            total.update(gradients)
            return
        list(self.pool.map(lambda name: np.add(total[name], gradients[name], out=total[name]), total))

    def check_finite(self, figures):
        """Raises UserError, with a way on, where one of the figures, a dict, is not finite."""
        wrong = [f"the {name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
        if not wrong:
            return
        if self.state["saved_step"] < 0:
            raise UserError(
                f"{wrong[0]} before the first step; the weights of {self.options['init_from']} are not sound"
            )
        raise UserError(
            f"training diverged: {wrong[0]} at step {self.state['step']}. {self.model_dir} keeps step "
            f"{self.state['saved_step']}; go on from there with smaller steps: python train.py "
            f"{self.model_options('--name')} --resume --learning_rate {self.options['learning_rate'] / 3:.1g}"
        )

    def model_options(self, option="--model_size"):
        name, models_dir = self.options["name"], self.options["models_dir"]
        return f"{option} {name}" + ("" if models_dir == "models" else f" --models_dir {shlex.quote(models_dir)}")

    # What is seen of it

    def estimate_loss(self, split):
        """The mean loss, in nats a token, over eval_iters batches of evenly spaced windows, the same every time."""
        options = self.options
        n_windows = options["eval_iters"] * options["batch_size"]
        inputs, targets = even_windows(self.data[split], n_windows, options["block_size"])
        step = -(-options["batch_size"] // self.n_shards)
        starts = range(0, len(inputs), step)

        def total_loss(i):
            logits = self.eval_model.gpt2(inputs[i : i + step], **self.params, n_head=self.hparams["n_head"])
            return float(np.sum(fused.token_losses(logits, targets[i : i + step]), dtype=np.float64))

        return sum(self.pool.map(total_loss, starts)) / inputs.size

    def evaluate(self):
        """Both losses, a sample and what is saved; the weights of the lowest validation loss are the model."""
        state = self.state
        losses = {f"{split}_loss": self.estimate_loss(split) for split in ("train", "val")}
        self.check_finite(losses)
        nats = losses["val_loss"] / state["val_chars_per_token"]
        state["evaluated_step"] = state["step"]
        is_best = losses["val_loss"] < state["best_loss"]
        if is_best:
            state |= {"best_loss": losses["val_loss"], "best_step": state["step"]}
            save_params(self.model_dir, self.params, self.hparams, self.encoder.encoder.get(END_OF_TEXT))
        self.log(losses | {"val_nats_per_char": nats})
        self.save()
        self.draw_losses()
        self.say(
            f"step {state['step']}: train loss {losses['train_loss']:.4f}, validation loss {losses['val_loss']:.4f} "
            f"({nats:.4f} nats a character{', the best so far' if is_best else ''}), {state['seconds']:.0f} s"
        )
        self.say(self.sample())

    def sample(self):
        """Some text from the weights as they are, each line behind a bar."""
        start = self.encoder.start_ids()
        n = min(SAMPLE_TOKENS, self.hparams["n_ctx"] - len(start))
        choose = make_sampler(temperature=0.8, top_k=40, top_p=1.0, seed=self.options["seed"])
        ids = gpt2.generate(start, self.params, self.hparams["n_head"], n, sample=choose)
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in self.encoder.decode(ids))
        return "\n".join("    | " + line for line in text.split("\n"))

    def log_step(self, figures, seconds):
        """The bar at each step, a line of the log every LOG_INTERVAL steps."""
        options, state = self.options, self.state
        self.step_seconds.append(seconds)
        tokens = options["batch_size"] * options["gradient_accumulation_steps"] * options["block_size"]
        speed = round(tokens * len(self.step_seconds) / sum(self.step_seconds))
        self.bar.set_postfix_str(f"loss {figures['loss']:.3f}, {speed} tokens/s", refresh=False)
        self.bar.update()
        if state["step"] % LOG_INTERVAL == 0:
            self.log(figures | {"tokens_per_second": speed})
            self.step_seconds.clear()

    def log(self, figures):
        """Adds one line of JSON."""
        line = {"step": self.state["step"], "seconds": round(self.tick(), 2)} | figures
        with open(os.path.join(self.model_dir, LOG), "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")

    def tick(self):
        """The seconds of training so far, evaluations and saving included, those of earlier runs too."""
        now = time.perf_counter()
        self.state["seconds"] += now - self.clock
        self.clock = now
        return self.state["seconds"]

    def say(self, text):
        self.bar.write(text, file=sys.stderr)

    def draw_losses(self):
        """loss.png, both curves; nothing where matplotlib is not installed."""
        try:
            figure = new_figure(8, 5)
        except ImportError:
            return
        steps = read_log(self.model_dir)
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)", title=self.options["name"])
        for key, label in (("loss", "batch"), ("train_loss", "training text"), ("val_loss", "validation text")):
            points = [(line["step"], line[key]) for line in steps if key in line]
            style = {"alpha": 0.3, "linewidth": 1} if key == "loss" else {"marker": "."}
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, **style)
        axes.legend()
        save_figure(figure, os.path.join(self.model_dir, PICTURE), "choose another --models_dir")

    # What is kept of it

    def save(self):
        """Everything that a resumed run needs, in one file: weights, moments, figures, options.

        There is no state of a random generator to keep: what a step draws follows from the seed and its number.
        """
        self.check_finite({f"sum of {name}": float(np.sum(tensor)) for name, tensor in self.tensors.items()})
        self.tick()
        self.state["saved_step"] = self.state["step"]
        parts = {"w": self.tensors, "m": self.optimizer.m, "v": self.optimizer.v}
        tensors = {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}
        metadata = {"state": json.dumps(self.state), "options": json.dumps(self.options)}
        save_safetensors(os.path.join(self.model_dir, STATE), tensors, metadata)

    def load_moments(self, saved):
        """saved: the tensors of save()'s file."""
        for part, arrays in (("m", self.optimizer.m), ("v", self.optimizer.v)):
            for name in arrays:
                arrays[name][...] = saved[f"{part}/{name}"]
        self.optimizer.step = self.state["step"]


def read_log(model_dir, last_step=math.inf):
    """The lines of the log up to a step, as dicts, less those that a run which was killed did not finish writing."""
    path, lines = os.path.join(model_dir, LOG), []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and line.get("step", math.inf) <= last_step]
