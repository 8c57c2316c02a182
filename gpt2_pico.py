"""GPT-2, after Jay Mody's picoGPT and "GPT in 60 Lines of NumPy" (2023): python gpt2_pico.py "A prompt"."""
import sys

import numpy as np
from fire import Fire, decorators

from utils import load_encoder_hparams_and_params


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))

def softmax(x):
    powers = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return powers / np.sum(powers, axis=-1, keepdims=True)

def layer_norm(x, g, b, eps=1e-5):
    x = x - np.mean(x, axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * g + b

def linear(x, w, b):
    return x @ w + b

def attention(q, k, v):
    later = 1 - np.tri(q.shape[-2], dtype=q.dtype)
    return softmax(q @ np.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5 - 1e10 * later) @ v

def mha(x, c_attn, c_proj, n_head):
    qkv = np.swapaxes(linear(x, **c_attn).reshape(len(x), 3 * n_head, -1), 0, 1)
    return linear(np.swapaxes(attention(*np.split(qkv, 3)), 0, 1).reshape(x.shape), **c_proj)

def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
    x = wte[np.asarray(inputs)] + wpe[: len(inputs)]
    for block in blocks:
        ln_1, attn, ln_2, mlp = (block[name] for name in ("ln_1", "attn", "ln_2", "mlp"))
        x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
        x = x + linear(gelu(linear(layer_norm(x, **ln_2), **mlp["c_fc"])), **mlp["c_proj"])
    return layer_norm(x, **ln_f) @ wte.T

def generate(inputs, params, n_head, n_tokens_to_generate):
    for _ in range(n_tokens_to_generate):
        logits = gpt2(inputs, **params, n_head=n_head)[-1]
        if not np.all(np.isfinite(logits)):
            raise ValueError("the weights are damaged; download or train the model again")
        inputs = [*inputs, int(np.argmax(logits))]
    return inputs[len(inputs) - n_tokens_to_generate :]

def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models", *unexpected, **unknown):
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir, *unexpected, **unknown)
    if not ((ids := encoder.encode(prompt)) and 0 <= n_tokens_to_generate <= hparams["n_ctx"] - len(ids)):
        raise ValueError(f"{len(ids)} prompt tokens (at least 1) + {n_tokens_to_generate} new > {hparams['n_ctx']}")
    return encoder.decode(generate(ids, params, hparams["n_head"], n_tokens_to_generate))

if __name__ == "__main__":
    try:
        with np.errstate(all="ignore"):
            Fire(decorators.SetParseFns(prompt=str, n_tokens_to_generate=int, model_size=str, models_dir=str)(main))
    except (KeyboardInterrupt, MemoryError, OSError, TypeError, ValueError) as error:
        print(f"gpt2_pico.py: error: {str(error) or type(error).__name__}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
