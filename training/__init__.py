"""Gradients, the optimizer, data sets and training runs. Imports gpt2, encoder, sampling, utils, engines, weights."""
