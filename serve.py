"""Serve a model to clients of OpenAI's API, and a page to a browser: python serve.py --model_size shakespeare

serve/app.py has the URLs, serve/protocol.py the requests and answers, serve/batch.py the thread that generates,
serve/choice.py the text of one continuation, serve/connection.py the limits of a connection. docs/server.md has the
manual.
"""

if __name__ == "__main__":
    from cli.serve import run

    raise SystemExit(run())
