"""OpenAI's own code run beside ours. Imports gpt2, utils and weights."""
