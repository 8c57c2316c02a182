"""Runs OpenAI's own src/model.py, src/sample.py and src/encoder.py, as they are, under TensorFlow 2.

compare.py starts this file in a process of its own, where `encoder` is their module and nothing of ours is imported.
Standard input takes one JSON object (the arguments of answer_all), standard output gives one JSON object a prompt.
"""

import json
import os
import sys
import types

import numpy as np


class HParams:
    """As much of tensorflow.contrib.training.HParams, which TensorFlow 2 no longer has, as OpenAI's code uses."""

    def __init__(self, **values):
        vars(self).update(values)

    def override_from_dict(self, values):
        """Sets hyperparameters that are there already; raises KeyError for one that is not."""
        for name, value in values.items():
            if name not in vars(self):
                raise KeyError(f"unknown hyperparameter {name}")
            setattr(self, name, value)
        return self


def import_tensorflow_1():
    """Makes `import tensorflow` give the TensorFlow 1 that TensorFlow 2 carries along, with HParams; returns it."""
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    training = types.ModuleType("tensorflow.contrib.training")
    training.HParams = HParams
    sys.modules["tensorflow"] = tf
    sys.modules["tensorflow.contrib"] = types.ModuleType("tensorflow.contrib")
    sys.modules["tensorflow.contrib.training"] = training
    return tf


def answer_all(official_repo, models_dir, model_name, prompts, n_tokens_to_generate, logits_dir):
    """Yields for each prompt a dict of its token ids and the ids that greedy sampling adds to them.

    Saves the logits of one pass over both, [n_prompt + n_new - 1, n_vocab], as logits_dir/0.npy, 1.npy, ...
    """
    tf = import_tensorflow_1()
    sys.path.insert(0, os.path.join(official_repo, "src"))
    import model
    import sample

    import encoder  # theirs

    codec = encoder.get_encoder(model_name, models_dir)
    hparams = model.default_hparams()
    with open(os.path.join(models_dir, model_name, "hparams.json"), encoding="utf-8") as f:
        hparams.override_from_dict(json.load(f))
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)  # among tokens of exactly equal logits, top_k=1 draws
        context = tf.placeholder(tf.int32, [1, None])
        output = sample.sample_sequence(
            hparams=hparams, length=n_tokens_to_generate, context=context, batch_size=1, temperature=1, top_k=1
        )
        logits = model.model(hparams=hparams, X=context, reuse=tf.AUTO_REUSE)["logits"]
        tf.train.Saver().restore(session, tf.train.latest_checkpoint(os.path.join(models_dir, model_name)))
        for i, prompt in enumerate(prompts):
            ids = codec.encode(prompt)
            all_ids = session.run(output, {context: [ids]})[0].tolist()
            np.save(os.path.join(logits_dir, f"{i}.npy"), session.run(logits, {context: [all_ids[:-1]]})[0])
            yield {"ids": ids, "new_ids": all_ids[len(ids) :], "tensorflow": tf.__version__}


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # leaves the checkout as it is
    for answer in answer_all(**json.load(sys.stdin)):
        print(json.dumps(answer), flush=True)
