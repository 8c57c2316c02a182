"""The options of a training run, and presets of them."""

import shlex
from dataclasses import dataclass
from typing import Annotated

from training.fields import Count, Fraction, Positive, PositiveRate, Rate

SHARD_TOKENS = 256  # minimum per shard; below it, adding up gradients costs more time than another thread saves
MAX_THREADS = 1024
ENGINES, DTYPES = ("auto", "numpy", "compiled", "jax"), ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a training run, under nanoGPT's names. Presets have values for most of them."""

    # Files
    name: str  # the model's folder under models_dir
    models_dir: str = "models"
    dataset: str | None = None  # path of a text file, or "tinyshakespeare"
    data_dir: str = "data"  # where tinyshakespeare is downloaded to
    train_bin: str | None = None  # in place of a dataset: token files, such as data/train_*.bin
    val_bin: str | None = None
    init_from: str = "scratch"  # or the name of the pretrained model to fine-tune

    # The model; None if it is fine-tuned, because the pretrained model determines them
    n_layer: Positive | None = None
    n_head: Positive | None = None
    n_embd: Positive | None = None
    tokenizer: str | None = None  # "bpe", "bytes" or "gpt2"
    vocab_size: Positive | None = None  # of a "bpe" tokenizer

    # Data
    layout: str = "plain"  # or "sections"
    block_size: Positive  # tokens per window
    batch_size: Positive  # windows per batch
    gradient_accumulation_steps: Positive = 1  # batches per step

    # Optimization
    max_iters: Count  # steps
    learning_rate: PositiveRate  # the largest, after the warm-up
    warmup_iters: Count  # steps of linear warm-up to learning_rate
    lr_decay_iters: Positive | None = None  # the step at which min_lr is reached; None: max_iters
    min_lr: Rate | None = None  # None: learning_rate / 20
    weight_decay: Rate = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    grad_clip: Rate = 1.0  # the largest global norm of the gradients; 0: unlimited
    dropout: Fraction  # probability of zeroing an element
    seed: Count = 1337

    # Evaluation
    eval_interval: Positive = 250  # steps
    eval_iters: Positive = 20  # batches per split

    # The engine. What follows threads is for "jax"
    engine: Annotated[str, lambda name: name in ENGINES] = "auto"
    threads: Annotated[int, lambda n: 1 <= n <= MAX_THREADS] = 1
    dtype: Annotated[str, lambda name: name in DTYPES] = "float32"  # of products; the parameters are float32
    remat: bool = False  # whether to compute each block again in the backward pass, which saves memory
    shard_optimizer: bool = False  # whether to shard AdamW's moments over the data-parallel devices

    @property
    def schedule(self):
        """The arguments of learning_rate_at that follow the step."""
        min_lr = self.learning_rate / 20 if self.min_lr is None else self.min_lr
        return self.learning_rate, min_lr, self.warmup_iters, self.lr_decay_iters or self.max_iters

    @property
    def tokens_per_step(self):
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    @property
    def n_shards(self):
        """The number of equal parts of a batch that are processed at the same time, in a thread each."""
        return max(1, min(self.threads, self.batch_size, self.batch_size * self.block_size // SHARD_TOKENS))

    def model_arguments(self, flag="--model_size"):
        """Return the arguments that select this model on a command line, for messages."""
        models_dir = "" if self.models_dir == "models" else f" --models_dir {shlex.quote(self.models_dir)}"
        return f"{flag} {self.name}{models_dir}"


MODEL_OPTIONS = ("n_layer", "n_head", "n_embd", "tokenizer", "vocab_size")  # None if the model is fine-tuned
FIXED_OPTIONS = (  # cannot change on --resume
    *MODEL_OPTIONS,
    *("init_from", "dataset", "train_bin", "val_bin", "layout", "block_size", "seed"),
)

SCRATCH = {
    "tokenizer": "bpe",
    "vocab_size": 512,
    "block_size": 128,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warmup_iters": 100,
}
PRESETS = {
    "3min": SCRATCH
    | {"n_layer": 4, "n_head": 4, "n_embd": 128, "learning_rate": 4e-3, "dropout": 0.0, "max_iters": 1000},
    "1h": SCRATCH | {"n_layer": 6, "n_head": 6, "n_embd": 192, "dropout": 0.2, "max_iters": 7000},
    "gpu": SCRATCH
    | {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "learning_rate": 1e-3}
    | {"dropout": 0.2, "max_iters": 3000, "engine": "jax", "dtype": "bfloat16"},
    "124M": {  # llm.c's scripts/run_gpt2_124M.sh: 18,865 steps of 2**19 tokens
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "tokenizer": "gpt2",
        "block_size": 1024,
        "batch_size": 32,
        "gradient_accumulation_steps": 16,
        "learning_rate": 6e-4,
        "min_lr": 0.0,
        "warmup_iters": 700,
        "beta2": 0.95,
        "dropout": 0.0,
        "max_iters": 18_865,
        "eval_interval": 1000,
        "engine": "jax",
        "dtype": "bfloat16",
    },
    "finetune": {
        "block_size": 256,
        "batch_size": 4,
        "learning_rate": 5e-5,
        "warmup_iters": 10,
        "dropout": 0.1,
        "max_iters": 200,
        "eval_interval": 50,
    },
}
