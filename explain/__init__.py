"""What a model computes inside, and a page that shows it. Imports gpt2, sampling, engines, training and weights."""
