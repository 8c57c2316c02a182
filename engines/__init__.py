"""Faster ways to run gpt2.py's own functions. Imports gpt2, sampling and weights."""
