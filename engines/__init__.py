"""Other ways to run gpt2.py's own functions: faster ones, and beyond the context. Imports gpt2 and weights."""
