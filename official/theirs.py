"""Run OpenAI's src/model.py, src/sample.py and src/encoder.py, unmodified, on TensorFlow 2.

compare.py starts this file as a separate process, which imports nothing of ours: `encoder` is OpenAI's module.
Standard input: one JSON object, the arguments of answer_all. Standard output: one line of JSON per prompt.
"""

import json
import os
import sys
import types

import numpy as np


class HParams:
    """The part of tensorflow.contrib.training.HParams, removed in TensorFlow 2, that OpenAI's code uses."""

    def __init__(self, **values):
        vars(self).update(values)

    def override_from_dict(self, values):
        """Set existing hyperparameters; raise KeyError for an unknown one."""
        for name, value in values.items():
            if name not in vars(self):
                raise KeyError(f"unknown hyperparameter {name}")
            setattr(self, name, value)
        return self


def import_tensorflow_1():
    """Return tensorflow.compat.v1, with HParams added, and make `import tensorflow` import it."""
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    training = types.ModuleType("tensorflow.contrib.training")
    training.HParams = HParams
    sys.modules["tensorflow"] = tf
    sys.modules["tensorflow.contrib"] = types.ModuleType("tensorflow.contrib")
    sys.modules["tensorflow.contrib.training"] = training
    return tf


def answer_all(official_repo, models_dir, model_name, prompts, n_tokens_to_generate, logits_dir):
    """Yield for each prompt a dict of its token ids ("ids") and those of its greedy continuation ("new_ids").

    Save the logits of one pass over both, [n_prompt + n_new, n_vocab], as logits_dir/0.npy, 1.npy, ...
    """
    tf = import_tensorflow_1()
    sys.path.insert(0, os.path.join(official_repo, "src"))
    sys.pycache_prefix = logits_dir  # compile OpenAI's sources, whatever is in their __pycache__
    import model
    import sample

    import encoder  # OpenAI's

    codec = encoder.get_encoder(model_name, models_dir)
    hparams = model.default_hparams()
    with open(os.path.join(models_dir, model_name, "hparams.json"), encoding="utf-8") as f:
        hparams.override_from_dict(json.load(f))
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)  # top_k=1 samples among tokens with exactly equal logits
        context = tf.placeholder(tf.int32, [1, None])
        output = sample.sample_sequence(
            hparams=hparams, length=n_tokens_to_generate, context=context, batch_size=1, temperature=1, top_k=1
        )
        logits = model.model(hparams=hparams, X=context, reuse=tf.AUTO_REUSE)["logits"]
        tf.train.Saver().restore(session, tf.train.latest_checkpoint(os.path.join(models_dir, model_name)))
        for i, prompt in enumerate(prompts):
            ids = codec.encode(prompt)
            all_ids = session.run(output, {context: [ids]})[0].tolist()
            np.save(os.path.join(logits_dir, f"{i}.npy"), session.run(logits, {context: [all_ids]})[0])
            yield {"ids": ids, "new_ids": all_ids[len(ids) :], "tensorflow": tf.__version__}


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # keep the checkout unmodified
    for answer in answer_all(**json.load(sys.stdin)):
        print(json.dumps(answer), flush=True)
