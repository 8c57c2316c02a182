"""Initial values of the tensors of a new model."""

import math

import numpy as np


def initial_tensors(shapes, seed, deviation):
    """Return new float32 tensors by checkpoint name, the same for the same seed.

    Matrices and embeddings are normally distributed with mean 0, gains (names that end in "/g") are 1, biases are 0.

    shapes: dict of shapes by checkpoint name, as weights.names.tensor_shapes returns.
    deviation: function of a name and a shape that returns the standard deviation of that matrix.
    """
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            tensors[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation(name, shape))
        else:
            tensors[name] = np.full(shape, name.endswith("/g"), np.float32)
    return tensors


def gpt2_deviation(n_layer):
    """Return GPT-2's rule for initial_tensors: 0.02, and 0.01 for the position embedding wpe.

    The projections that add to the residual stream are scaled by 1/sqrt(2*n_layer) (Radford et al. 2019, section 2.3).
    """

    def deviation(name, shape):
        if name == "wpe":
            return 0.01
        return 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj/w") else 0.02

    return deviation
