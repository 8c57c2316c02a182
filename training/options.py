"""The options of a training run, and presets of them."""

import shlex
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a training run, under nanoGPT's names. Presets have values for most of them."""

    # Files
    name: str  # the model's folder under models_dir
    models_dir: str = "models"
    dataset: str  # path of a text file, or "tinyshakespeare"
    data_dir: str = "data"  # where tinyshakespeare is downloaded to
    init_from: str = "scratch"  # or the name of the pretrained model to fine-tune

    # The model; None if it is fine-tuned, because the pretrained model determines them
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    tokenizer: str | None = None  # "bpe", "bytes" or "gpt2"
    vocab_size: int | None = None  # of a "bpe" tokenizer

    # Data
    layout: str = "plain"  # or "sections"
    block_size: int  # tokens per window
    batch_size: int  # windows per batch
    gradient_accumulation_steps: int = 1  # batches per step

    # Optimization
    max_iters: int  # steps
    learning_rate: float  # the largest, after the warm-up
    warmup_iters: int  # steps of linear warm-up to learning_rate
    lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
    min_lr: float | None = None  # None: learning_rate / 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # the largest global norm of the gradients; 0: unlimited
    dropout: float  # probability of zeroing an element
    seed: int = 1337

    # Evaluation
    eval_interval: int = 250  # steps
    eval_iters: int = 20  # batches per split

    threads: int = 1

    @property
    def schedule(self):
        """The arguments of learning_rate_at that follow the step."""
        min_lr = self.learning_rate / 20 if self.min_lr is None else self.min_lr
        return self.learning_rate, min_lr, self.warmup_iters, self.lr_decay_iters or self.max_iters

    @property
    def tokens_per_step(self):
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    def model_arguments(self, flag="--model_size"):
        """Return the arguments that select this model on a command line, for messages."""
        models_dir = "" if self.models_dir == "models" else f" --models_dir {shlex.quote(self.models_dir)}"
        return f"{flag} {self.name}{models_dir}"


def known_fields(cls, values):
    """Return the items of a dict that are fields of a dataclass: files of other versions may have more."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


MODEL_OPTIONS = ("n_layer", "n_head", "n_embd", "tokenizer", "vocab_size")  # None if the model is fine-tuned
FIXED_OPTIONS = (*MODEL_OPTIONS, "init_from", "dataset", "layout", "block_size", "seed")  # cannot change on --resume

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
