"""What a model computes inside, as text and as pages. Imports gpt2, sampling, engines, training and weights."""
