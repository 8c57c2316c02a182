"""The command line of serve.py."""

import argparse
import contextlib
import ipaddress
import logging
import os
import re
import signal
import socket
import sys

from cli.engine import add_engine_options, check_engine_options, model_and_params
from cli.options import Parser, exit_code, parse_count, parse_positive_rate, parse_up_to
from encoder import END_OF_TEXT
from utils import load_encoder_hparams_and_params
from weights.errors import UserError
from weights.resources import check_memory

GRACE = 5  # seconds for running requests to finish after Ctrl-C


def parse_origin(text):
    """Return an origin as browsers send it: in lower case, and without the default port."""
    origin = re.sub(r"^(https://.+):443$|^(http://.+):80$", r"\1\2", text.lower())
    if not re.fullmatch(r"[a-z-]+://([a-z0-9.-]+|\[[0-9a-f:]+\])(:\d{1,5})?", origin):
        example = "https://example.com or http://localhost:3000"
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not an origin such as {example}")
    return origin


def make_parser():
    parser = Parser(prog="serve.py", description="Serve a model to clients of OpenAI's API, and a page to a browser.")
    add = parser.add_argument
    parser.add_model_size()
    parser.add_models_dir()
    add_engine_options(add)
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=parse_count, default=8000, metavar="N", help="port to listen on; 0: a free one (default: 8000)")
    add(
        "--api_key",
        default=os.environ.get("GPT2_API_KEY"),
        metavar="KEY",
        help="key that clients must send (default: the environment variable GPT2_API_KEY; if that is not set, none)",
    )
    add("--max_rows", type=parse_up_to(64), default=8, metavar="N", help="continuations at once (default: 8)")
    add(
        "--max_queue",
        type=parse_count,
        default=64,
        metavar="N",
        help="requests that may wait for a row; more get the status 429 (default: 64)",
    )
    add(
        "--timeout",
        type=parse_positive_rate,
        default=300.0,
        metavar="SECONDS",
        help="longest time from a request to the end of its answer (default: 300)",
    )
    add(
        "--allow_origin",
        type=parse_origin,
        metavar="ORIGIN",
        help="a website whose scripts may use this server, such as https://example.com (default: none)",
    )
    parser.set_defaults(devices=None, coordinator=None, process_id=None, n_processes=None)  # of JAX
    return parser


def run(argv=None):
    """Run the command line argv (default: sys.argv[1:]); return the exit code."""
    return exit_code("serve.py", lambda: serve(make_parser().parse_args(argv)), argv)


def serve(options):
    """Load the model and serve it until Ctrl-C or SIGTERM."""
    check_options(options)
    with listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        options.is_loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        if not (options.is_loopback or options.api_key):
            print("note: everyone who reaches this machine can use the server; set GPT2_API_KEY", file=sys.stderr)
        app, thread = make_app(options)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        thread.start()
        try:
            run_server(app, thread, listener, f"serving {options.model_size} on {url} (Ctrl-C stops)")
        finally:
            thread.stop()
            thread.join()


def check_options(options):
    """Raise UserError for options that cannot be served, and for a package that is missing."""
    if options.engine == "jax" or options.dtype == "bfloat16":
        wrong = "--engine jax" if options.engine == "jax" else "--dtype bfloat16"
        raise UserError(f"{wrong}: JAX generates several tokens at a time, so requests cannot join; leave it out")
    if options.port > 65535:
        raise UserError(f"--port {options.port} is too large; the maximum is 65535")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install -r requirements-serve.txt") from None
    check_engine_options(options)


def listen(host, port):
    """Return a listening socket. Raises UserError if the address cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from None


def make_app(options):
    """Load the model; return the application and the thread that generates."""
    from explain.page import explain_ids, read_template
    from serve.app import PAGE, App
    from serve.batch import BatchThread

    name = options.model_size
    encoder, hparams, params = load_encoder_hparams_and_params(name, options.models_dir)
    per_row = 4 * (hparams["n_layer"] * 2 * hparams["n_embd"] * hparams["n_ctx"] + hparams["n_vocab"])
    check_memory(f"a batch of {options.max_rows} rows", per_row * options.max_rows, "set a smaller --max_rows")
    model, prepared = model_and_params(options, params, hparams["n_head"], worth_it=True)
    stop_id = encoder.encoder.get(END_OF_TEXT)
    thread = BatchThread(model, prepared, hparams["n_head"], stop_id, options.max_rows, options.max_queue)

    def explain(ids):
        return explain_ids(name, encoder, ids, params, hparams["n_head"])

    return App(name, encoder, hparams, thread, read_template(PAGE), explain, options), thread


class Traces(logging.Formatter):
    """Log records without the messages of exceptions, which may contain a part of a prompt."""

    def formatException(self, info):
        import traceback

        return "".join([*traceback.format_tb(info[2]), info[0].__name__])


def run_server(app, thread, listener, message):
    """Run uvicorn until Ctrl-C or SIGTERM. The running requests then have GRACE seconds, or until the next signal.

    message: printed when the server answers.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):  # uvicorn's own raises the signal again at the end: another exit code than 0
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handle_exit)
            yield

        def handle_exit(self, number, frame):
            if self.should_exit:  # the second signal
                thread.stop()
            self.should_exit = True

        async def startup(self, sockets=None):
            await super().startup(sockets)
            print(message, file=sys.stderr, flush=True)

        async def shutdown(self, sockets=None):
            import asyncio

            asyncio.get_running_loop().call_later(GRACE, thread.stop)
            await super().shutdown(sockets)

    handler = logging.StreamHandler()
    handler.setFormatter(Traces())
    logging.basicConfig(handlers=[handler])
    Server(make_config(app)).run([listener])


def make_config(app):
    """Return uvicorn's settings: its limits, and no log of requests."""
    import uvicorn

    from serve.connection import BACKLOG, Connection

    options = {"lifespan": "off", "ws": "none", "log_config": None, "access_log": False, "server_header": False}
    options["log_level"] = "error"  # no warnings, which clients can cause
    limits = {"backlog": BACKLOG, "timeout_graceful_shutdown": GRACE + 5}
    return uvicorn.Config(app, http=Connection, **options, **limits)
