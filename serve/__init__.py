"""The server of serve.py: OpenAI's protocol, a batch that requests join, a page. Imports gpt2, engines and explain."""
