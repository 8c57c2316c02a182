"""Faster ways to run gpt2.py's own functions. Imports gpt2 and weights."""
