"""OpenAI's checkpoint format (TensorFlow's) read."""

import contextlib
import os

from weights.errors import CorruptFile, UserError
from weights.names import check_names, check_tensor, nest, tensor_shapes


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The nested params of a TensorFlow checkpoint, in memory, every tensor's CRC verified by TensorFlow.

    Raises CorruptFile for a damaged file, UserError (with its name) for a tensor that is not as hparams say.
    """
    try:
        with silenced_stderr():
            import tensorflow as tf
    except ImportError as error:
        raise UserError(f"importing {tf_ckpt_path} takes TensorFlow ({error}); pip install tensorflow") from None

    damage = (tf.errors.OpError, ValueError, RuntimeError, IndexError)  # the last for a file cut short
    try:
        reader = tf.train.load_checkpoint(tf_ckpt_path)
        dtypes, shapes = reader.get_variable_to_dtype_map(), reader.get_variable_to_shape_map()
    except damage as error:
        raise CorruptFile(tf_ckpt_path + ".index", first_line(error)) from None
    expected = {f"model/{name}": shape for name, shape in tensor_shapes(**hparams).items()}
    check_names(tf_ckpt_path, expected, shapes)
    tensors = {}
    for name, shape in expected.items():
        found = shapes[name][1:] if name.endswith("/w") else shapes[name]  # [1, n_in, n_out]: they were convolutions
        check_tensor(tf_ckpt_path, name, found, dtypes[name].name, shape, "float32")
        try:
            tensors[name.removeprefix("model/")] = reader.get_tensor(name).reshape(shape)
        except damage as error:
            raise CorruptFile(tf_ckpt_path + ".data-00000-of-00001", f"{name}: {first_line(error)}") from None
    return nest(tensors, hparams["n_layer"])


@contextlib.contextmanager
def silenced_stderr():
    """Drops what TensorFlow's libraries write about GPUs and the like while they load; no setting stops it."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def first_line(error):
    return str(error).partition("\n")[0]
