"""What the loop in train.py needs: batches, gradients computed in several threads, evaluation, saving."""

import contextlib
import functools
import math
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from encoder import END_OF_TEXT
from engines.allocator import keep_all_freed_memory
from engines.compiled import KernelError, import_kernels
from training import fused
from training.adamw import adamw, global_norm
from training.checkpoint import save_checkpoint
from training.dataset import even_windows, random_windows
from training.loss import estimate_loss, loss_and_gradients
from weights.errors import UserError
from weights.names import nest
from weights.safetensors_file import save_params


def functions_of(engine):
    """Return (training_model, adamw), the functions of an engine: "numpy", "compiled", or "auto".

    auto is compiled if numba is installed and compiles the kernels. Raises UserError for compiled without numba.
    """
    if engine == "numpy":
        return fused.training_model, adamw
    try:
        import_kernels()
    except UserError as error:
        if engine != "auto":
            raise
        if isinstance(error, KernelError):
            print(f"note: {error}".replace("\n", " "), file=sys.stderr)
        return fused.training_model, adamw
    from training import kernels

    return kernels.training_model, kernels.adamw


class Trainer:
    """The model, data and optimizer of a Plan in use; the subclasses compute with NumPy and with JAX.

    A subclass has running(), a context in which it can compute, and update(), estimate_loss() and dry_run().
    """

    writes_files = True  # of several processes, only the first does

    def __init__(self, plan):
        self.plan, self.options, self.state = plan, plan.options, plan.state
        self.hparams, self.tensors, self.optimizer = plan.hparams, plan.optimizer.tensors, plan.optimizer
        self.params = nest(self.tensors, self.hparams["n_layer"])  # the same arrays, as gpt2() takes them

    def start_clock(self):
        self.started = time.perf_counter() - self.state.seconds

    @property
    def seconds(self):
        """Seconds since the start of training, in all runs together: steps, evaluations and saves."""
        return time.perf_counter() - self.started

    def batch_seed(self, step, micro_step):
        """Return the seed of a batch of a step, resumed or not."""
        return self.options.seed, step, micro_step

    def check_finite(self, values):
        """Raise UserError, with a remedy, if a value is infinite or NaN. values: dict by description."""
        wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            return
        state, options = self.state, self.options
        if state.saved_step < 0:
            cause = f"the weights of {options.init_from} are damaged; download or train that model again"
            if options.init_from == "scratch":
                cause = "the new model overflows float32; choose a smaller one"
            raise UserError(f"{wrong[0]} before the first step: {cause}")
        raise UserError(
            f"training diverged: {wrong[0]} at step {state.step}. {self.plan.model_dir} keeps step {state.saved_step}; "
            f"resume from there with a lower learning rate: python train.py {options.model_arguments('--name')} "
            f"--resume --learning_rate {options.learning_rate / 3:.1g}"
        )

    def any_process(self, condition):
        """Return whether the condition holds in a process of this run: there is one."""
        return condition

    def fetch(self):
        """Copy the parameters and the optimizer's state to the arrays of the Plan, if they are elsewhere."""

    def evaluate(self):
        """Return the losses of both splits; write model.safetensors if the validation loss is the lowest so far."""
        train_loss, val_loss = self.estimate_loss("train"), self.estimate_loss("val")
        self.check_finite({"training loss": train_loss, "validation loss": val_loss})
        self.fetch()
        state = self.state
        state.evaluated_step = state.step
        if val_loss < state.best_loss:
            state.best_loss, state.best_step = val_loss, state.step
            if self.writes_files:
                end_of_text = self.plan.encoder.encoder.get(END_OF_TEXT)
                save_params(self.plan.model_dir, self.params, self.hparams, end_of_text)
        nats_per_char = val_loss / state.val_chars_per_token
        return {"train_loss": train_loss, "val_loss": val_loss, "val_nats_per_char": nats_per_char}

    def save(self):
        """Write training.safetensors, from which --resume continues, unless a parameter is infinite or NaN."""
        self.fetch()
        self.check_finite({f"sum of {name}": float(np.sum(tensor)) for name, tensor in self.tensors.items()})
        self.state.saved_step, self.state.seconds = self.state.step, self.seconds
        if self.writes_files:
            save_checkpoint(self.plan.model_dir, self.options, self.state, self.optimizer)


class NumpyTrainer(Trainer):
    """Training with NumPy or with compiled kernels.

    A batch is split into shards, each of which goes through the forward and the backward pass in a thread of its own:
    NumPy's operations, unlike its matrix products, use only one core.
    """

    def __init__(self, plan):
        super().__init__(plan)
        self.n_shards = self.options.n_shards
        training_model, self.optimizer.adamw = functions_of(self.options.engine)
        self.models = [training_model(self.options.dropout) for _ in range(self.n_shards)]
        self.eval_model = training_model()
        keep_all_freed_memory()

    @contextlib.contextmanager
    def running(self):
        """Start one thread per shard, and limit BLAS to threads // n_shards threads in each."""
        quiet = functools.partial(np.seterr, over="ignore", invalid="ignore", divide="ignore")  # see check_finite
        blas_threads = max(1, self.options.threads // self.n_shards)
        with ThreadPoolExecutor(self.n_shards, initializer=quiet) as self.pool, threadpool_limits(blas_threads):
            yield self

    def dry_run(self):
        """Raise an exception if a step cannot be computed; change nothing."""
        self.compute_gradients()

    def update(self, learning_rate):
        """Update every parameter once; return the loss before the update, and the global norm of the gradients."""
        loss, gradients, norm = self.compute_gradients()
        clip = min(1.0, self.options.grad_clip / norm) if self.options.grad_clip and norm else 1.0
        self.optimizer.update(gradients, learning_rate, clip, self.pool.map)
        return loss, norm

    def compute_gradients(self):
        """Return the mean loss over the batches of a step, its gradients by tensor name, and their global norm.

        Raises UserError if the loss or the norm is not finite.
        """
        loss, gradients = 0.0, {}
        for micro_step in range(self.options.gradient_accumulation_steps):
            seed = self.batch_seed(self.state.step, micro_step)  # of its dropout, too
            inputs, targets = self.get_batch(seed)  # [batch, n_seq] each
            loss += self.forward_backward(inputs, targets, gradients, seed)  # adds to gradients
        norm = global_norm(gradients, self.pool.map)
        self.check_finite({"loss": loss, "norm of the gradients": norm})
        return loss, gradients, norm

    def get_batch(self, seed):
        """Return random inputs and targets from the training text, [batch, n_seq] each. seed: tuple of integers."""
        rng = np.random.default_rng(seed)
        return random_windows(self.plan.data["train"], rng, self.options.batch_size, self.options.block_size)

    def forward_backward(self, inputs, targets, gradients, seed):
        """Compute the loss of a batch and add its gradients to `gradients`, a dict of arrays; return the loss.

        Both are divided by gradient_accumulation_steps, so that sums over the batches of a step are means. seed: tuple
        of integers; it and the number of shards determine the dropout masks.
        """

        def shard_loss_and_gradients(inputs, targets, model):
            weight = len(inputs) / self.options.batch_size / self.options.gradient_accumulation_steps
            return loss_and_gradients(self.tensors, self.hparams, inputs, targets, model, weight)

        for i, model in enumerate(self.models):
            model.drop.seed(*seed, i + 1)
        total, shards = 0.0, [np.array_split(a, self.n_shards) for a in (inputs, targets)]
        for loss, shard_gradients in self.pool.map(shard_loss_and_gradients, *shards, self.models):
            total += loss
            self.add_to(gradients, shard_gradients)
        return total

    def add_to(self, total, gradients):
        """Add gradients to total, both dicts of arrays by name; total may be empty."""
        if total:
            list(self.pool.map(lambda name: np.add(total[name], gradients[name], out=total[name]), total))
        else:
            total.update(gradients)

    def estimate_loss(self, split):
        """Return the mean loss over eval_iters batches of evenly spaced windows, the same in every evaluation."""
        shard_size = math.ceil(self.options.batch_size / self.n_shards)
        n_windows = self.options.eval_iters * self.options.batch_size
        inputs, targets = even_windows(self.plan.data[split], n_windows, self.options.block_size)
        starts = range(0, len(inputs), shard_size)
        batches = [(inputs[i : i + shard_size], targets[i : i + shard_size]) for i in starts]
        predict = functools.partial(self.eval_model.gpt2, **self.params, n_head=self.hparams["n_head"])
        return estimate_loss(predict, batches, self.pool.map)


@contextlib.contextmanager
def stop_on_ctrl_c(say):
    """Yield an Event that Ctrl-C sets, so that the current step can be completed; a second Ctrl-C interrupts."""
    stop = threading.Event()

    def handler(*_):
        stop.set()
        signal.signal(signal.SIGINT, before)
        say("stopping after this step; press Ctrl-C again to stop without saving")

    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield stop
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
