"""Serve a model to clients of OpenAI's API, and a page to a browser: python serve.py --model_size shakespeare"""

if __name__ == "__main__":
    from cli.serve import run

    raise SystemExit(run())
