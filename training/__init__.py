"""Gradients, the optimizer, data sets and the trainer. Imports gpt2, encoder, sampling, engines and weights."""
