"""Training with JAX: one compiled step for all batches of an update, on a mesh of devices. Imports jax and optax.

The mesh is that of engines/jax_model.py. Along `data` a batch is sharded by windows, so that XLA adds up the gradients
of all devices; along `model` the parameters are sharded, and AdamW's moments are sharded like them.
"""

import contextlib
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec

from engines.jax_model import by_part, make_mesh, sharded, shardings, token_losses
from training.dataset import even_starts, inputs_and_targets, random_starts, windows
from training.jax_model import takes_flash_attention, training_model
from training.loss import lm_loss
from training.trainer import Trainer
from weights.errors import UserError
from weights.names import flatten, nest


class JaxTrainer(Trainer):
    """Training with JAX, on all processes of a run. The arrays of the Plan are copies, which fetch() updates.

    shape: that of the mesh, (data, model); None: all devices along `data`.
    """

    def __init__(self, plan, shape=None):
        super().__init__(plan)
        options, self.n_head = self.options, self.hparams["n_head"]
        self.mesh = make_mesh(self.params, self.n_head, shape or (jax.device_count(), 1))
        check_batch(options, self.mesh.shape["data"])
        check_processes(plan, self.mesh)
        self.writes_files, self.n_layer = jax.process_index() == 0, self.hparams["n_layer"]
        flash = takes_flash_attention(self.mesh.devices.flat[0], self.hparams["n_embd"] // self.n_head)
        self.model = training_model(self.n_head, options.dropout, options.dtype, options.remat, flash)
        self.eval_model = training_model(self.n_head, dtype=options.dtype, flash=flash)
        self.batch_sharding = NamedSharding(self.mesh, PartitionSpec(None, "data"))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.moment_shardings = shardings(self.params, self.mesh, options.shard_optimizer)
        self.put_on_devices()
        layout = jax.tree.map(lambda array: array.sharding, self.on_devices)
        results = *layout, self.replicated, self.replicated
        self.compiled_step = jax.jit(self.compute_step, donate_argnums=(0, 1), out_shardings=results)
        self.compiled_losses = jax.jit(self.compute_losses, out_shardings=self.replicated)

    def put_on_devices(self):
        """Copy the parameters and the optimizer's state of the Plan to the devices, as self.on_devices."""
        put = functools.partial(sharded, n_head=self.n_head, mesh=self.mesh)
        params, moments, over_data = (
            put(self.params),
            (self.optimizer.m, self.optimizer.v),
            self.options.shard_optimizer,
        )
        mu, nu = (put(nest(tensors, self.n_layer), over_data=over_data) for tensors in moments)
        state = jax.eval_shape(self.adamw(0.0).init, params)  # its only arrays are count, mu and nu
        count = jax.device_put(np.int32(self.optimizer.step), self.replicated)
        self.on_devices = params, optax.tree.set(state, count=count, mu=mu, nu=nu)
        self.fetched_step, self.next_batches = self.state.step, None

    @contextlib.contextmanager
    def running(self):
        yield self
        if jax.process_count() > 1:
            sync_global_devices("end")  # waits for the process that writes the files

    # One step

    def adamw(self, learning_rate):
        """Return the optimizer: clipping and AdamW, whose weight decay applies to matrices."""
        options = self.options
        is_matrix = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
        adamw = optax.adamw(
            learning_rate, options.beta1, options.beta2, weight_decay=options.weight_decay, mask=is_matrix
        )
        return optax.chain(optax.clip_by_global_norm(options.grad_clip), adamw) if options.grad_clip else adamw

    def compute_step(self, params, state, batches, seed, learning_rate):
        """Return the updated params and state, the loss, and the global norm of the gradients.

        batches: [n_batches, batch, n], the windows whose gradients are averaged. seed: of dropout, [2]. Each
        group of devices along `data` adds up gradients of its own; they are exchanged once, after the last batch.
        """
        n_batches, n_groups = len(batches), self.mesh.shape["data"]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), (n_batches, n_groups))
        by_group = batches.reshape(n_batches, n_groups, -1, batches.shape[-1])  # -> [n_batches, n_groups, b, n]

        def add_batch(total, batch):
            found = jax.vmap(jax.value_and_grad(self.loss), (None, 0, 0))(params, *batch)
            return jax.tree.map(jnp.add, total, found), None

        zeros = jax.tree.map(lambda p: jnp.zeros((n_groups, *p.shape)), (np.float32(0), params))
        totals, _ = jax.lax.scan(add_batch, zeros, (by_group, keys))
        loss, gradients = jax.tree.map(lambda total: jnp.sum(total, axis=0) / (n_batches * n_groups), totals)
        gradients = jax.lax.with_sharding_constraint(gradients, self.moment_shardings)
        updates, state = self.adamw(learning_rate).update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(gradients)

    def loss(self, params, batch, key):  # dict, [batch, n] -> scalar
        self.model.drop.seed(key)
        with self.precision():
            return lm_loss(params, *inputs_and_targets(batch), self.n_head, self.model)

    def precision(self):
        return jax.default_matmul_precision("highest" if self.options.dtype == "float32" else "default")

    def update(self, learning_rate):
        """Update every parameter once; return the loss before the update, and the global norm of the gradients.

        The batches of the next step are loaded while the devices compute.
        """
        step, next_batches = self.state.step, self.next_batches
        batches = self.random_batches(step) if next_batches is None else next_batches
        seed = np.array([self.options.seed % 2**32, step % 2**32], np.uint32)
        params, state, loss, norm = self.compiled_step(*self.on_devices, batches, seed, np.float32(learning_rate))
        self.on_devices, self.next_batches = (params, state), self.random_batches(step + 1)
        loss, norm = float(loss), float(norm)
        self.check_finite({"loss": loss, "norm of the gradients": norm})
        return loss, norm

    def random_batches(self, step):  # -> [n_batches, batch, n]
        """Return the batches of a step, the same as NumpyTrainer's."""
        options, data = self.options, self.plan.data["train"]
        seeds = [self.batch_seed(step, i) for i in range(options.gradient_accumulation_steps)]
        rngs = map(np.random.default_rng, seeds)
        return self.load("train", [random_starts(data, rng, options.batch_size, options.block_size) for rng in rngs])

    def load(self, split, starts):  # [n_batches, batch] -> [n_batches, batch, n]
        """Return the windows that start there, on the devices. Each process reads those of its own devices."""
        starts, block_size = np.array(starts), self.options.block_size

        def read(index):
            chosen = starts[index[:2]]  # -> [n_batches, n_windows]
            found = windows(self.plan.data[split], chosen.reshape(-1), block_size)  # -> [n_batches*n_windows, n]
            return found.reshape(*chosen.shape, -1).astype(np.int32)

        return jax.make_array_from_callback((*starts.shape, block_size + 1), self.batch_sharding, read)

    def dry_run(self):
        """Make a step, and undo it."""
        self.update(learning_rate=0.0)
        self.on_devices = None  # makes room
        self.put_on_devices()

    # Evaluation and saving

    def estimate_loss(self, split):
        """Return the mean loss over eval_iters batches of evenly spaced windows, the same in every evaluation."""
        size = self.options.batch_size
        starts = even_starts(self.plan.data[split], self.options.eval_iters * size, self.options.block_size)
        batches = np.resize(starts, (-(-len(starts) // size), size))  # repeats windows to fill the last batch
        losses = [
            self.compiled_losses(self.on_devices[0], self.load(split, [batch])) for batch in batches
        ]  # [batch] each
        return float(np.mean(np.concatenate(losses)[: len(starts)], dtype=np.float64))

    def compute_losses(self, params, batches):  # dict, [1, batch, n] -> [batch]
        """Return the mean loss of each window."""
        inputs, targets = inputs_and_targets(batches[0])
        with self.precision():
            logits = self.eval_model.gpt2(inputs, **params, n_head=self.n_head)
        return jnp.mean(token_losses(logits, targets), axis=-1)

    def any_process(self, condition):
        """Return whether the condition holds in a process of this run."""
        return condition if jax.process_count() == 1 else bool(np.any(process_allgather(np.array(condition))))

    def fetch(self):
        """Copy the parameters and the optimizer's state to the arrays of the Plan."""
        if self.fetched_step == self.state.step:
            return
        params, state = self.on_devices
        mu, nu = (optax.tree.get(state, name) for name in ("mu", "nu"))
        for copies, tensors in ((self.tensors, params), (self.optimizer.m, mu), (self.optimizer.v, nu)):
            for name, tensor in flatten(tensors, self.hparams).items():
                found = to_host(tensor)
                copies[name][...] = by_part(found, self.n_head) if "/c_attn/" in name else found
        self.fetched_step = self.optimizer.step = self.state.step


def to_host(array):
    """Return an array of the devices, of all processes, as NumPy's."""
    is_here = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array) if is_here else process_allgather(array, tiled=True)


def check_batch(options, n_data):
    """Raise UserError unless the windows of a batch divide by the devices along `data`."""
    if options.batch_size % n_data:
        larger = n_data * -(-options.batch_size // n_data)
        raise UserError(
            f"--batch_size {options.batch_size} does not divide by {n_data} groups of devices; set --batch_size "
            f"{larger}, or other --devices"
        )


def check_processes(plan, mesh):
    """Raise UserError, in every process, unless all have the same options, progress, sizes of data, weights and mesh.

    Otherwise they would wait for each other for ever, or each would train a part of another model.
    """
    if jax.process_count() == 1:
        return
    run = dataclasses.asdict(plan.options) | dataclasses.asdict(plan.state) | {"devices": mesh.devices.shape}
    run["weights"] = [zlib.crc32(tensor) for tensor in plan.optimizer.tensors.values()]
    del run["threads"]  # the numbers of cores may differ
    sums = np.array([zlib.crc32(repr(value).encode("utf-8")) for value in run.values()], np.uint32)
    is_other = np.any(process_allgather(sums) != sums, axis=0)
    if any(is_other):
        names = ", ".join(name for name, other in zip(run, is_other, strict=True) if other)
        raise UserError(
            f"the processes do not agree on {names}; start the same command on every host, with the same files and "
            "versions, and only another --process_id"
        )
