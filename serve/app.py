"""The URLs of the server: OpenAI's models and completions, and the page."""

import asyncio
import json
import os
import re
import secrets
import time

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from explain.page import as_json
from serve.batch import Job
from serve.protocol import ApiError, parse_request

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
MAX_BODY = 2**20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class App(Starlette):
    """name, encoder, hparams: of the model. thread: a BatchThread. page: HTML. options: those of cli/serve.py.

    explain: function from token ids to what the page shows about them, JSON as bytes.
    """

    def __init__(self, name, encoder, hparams, thread, page, explain, options):
        self.name, self.encoder, self.thread = name, encoder, thread
        self.limits = hparams | {"n_bytes": max(map(len, encoder.encoder))}  # of the longest token
        self.page, self.explain, self.options, self.explaining = page, explain, options, asyncio.Lock()
        post = {"/v1/completions": self.complete, "/v1/chat/completions": self.chat, "/explain": self.post_explain}
        get = {"/": self.get_page, "/v1/models": self.get_models}
        routes = [Route(path, self.checked(endpoint), methods=["POST"]) for path, endpoint in post.items()]
        routes += [Route(path, self.checked(endpoint), methods=["GET"]) for path, endpoint in get.items()]
        cors = {"allow_origins": [options.allow_origin], "allow_methods": ["*"], "allow_headers": ["*"]}
        middleware = [Middleware(CORSMiddleware, **cors)] if options.allow_origin else []
        handlers = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), respond)
        super().__init__(routes=routes, middleware=middleware, exception_handlers=handlers)

    def checked(self, function):
        """Return an endpoint that first raises ApiError if a foreign website, or a client without the key, asks."""

        async def endpoint(request):
            host, origin = request.headers.get("host", "").lower(), request.headers.get("origin")
            if self.options.is_loopback and re.sub(r":\d+$", "", host) not in (*LOOPBACK, self.options.host):
                raise ApiError(403, "the Host header does not name this server")
            if origin not in (None, self.options.allow_origin) and origin.partition("://")[2].lower() != host:
                raise ApiError(403, "the Origin header names another website; see --allow_origin")
            expected, given = f"Bearer {self.options.api_key}", request.headers.get("authorization", "")
            is_right = secrets.compare_digest(given.encode("latin-1"), os.fsencode(expected))
            if self.options.api_key and function != self.get_page and not is_right:
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            return await function(request)

        return endpoint

    async def get_page(self, _):
        return HTMLResponse(self.page, headers={"Content-Security-Policy": "frame-ancestors 'none'"})

    async def get_models(self, _):
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "user"}
        model["max_model_len"] = self.limits["n_ctx"]  # not OpenAI's, but other servers' too
        return as_response({"object": "list", "data": [model]})

    async def chat(self, _):
        raise ApiError(404, "GPT-2 is not a chat model: it continues texts; use /v1/completions", code="not_found")

    async def post_explain(self, request):
        """Answer what the model computes for the prompt of a completion, one request at a time."""
        asked = await asyncio.to_thread(parse_request, await read_body(request), self.encoder, self.limits)
        if self.explaining.locked():
            raise ApiError(429, "another explanation is being computed", headers={"Retry-After": "1"})
        async with self.explaining:
            return Response(await asyncio.to_thread(self.explain, asked.prompts[0]), media_type="application/json")

    async def complete(self, request):
        asked = await asyncio.to_thread(parse_request, await read_body(request), self.encoder, self.limits)
        if asked.model not in (None, self.name):
            raise ApiError(404, f"the only model here is {self.name}", "model", "model_not_found")
        job = Job(asked, self.encoder, self.options.timeout)
        self.thread.submit(job)
        answer = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        answer |= {"created": int(time.time()), "model": self.name}
        if asked.stream:
            leave = BackgroundTask(self.thread.cancel, job)  # runs at the end, and when the client leaves
            return StreamingResponse(events(job, answer), media_type="text/event-stream", background=leave)
        watch = asyncio.create_task(put_disconnect(request, job))
        try:
            choices = [piece async for pieces in job.arriving() for piece in pieces]
        finally:
            watch.cancel()
            self.thread.cancel(job)
        choices.sort(key=lambda choice: choice["index"])
        return as_response(answer | {"choices": choices, "usage": job.usage()})


async def events(job, answer):
    """Yield the pieces of a request as server-sent events; several in one string if the client is slower."""
    has_usage = job.request.stream_options.get("include_usage")
    answer |= {"usage": None} if has_usage else {}
    try:
        async for pieces in job.arriving():
            yield "".join(event(answer | {"choices": [piece]}) for piece in pieces)
        if has_usage:
            yield event(answer | {"choices": [], "usage": job.usage()})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body)


def event(data):
    return f"data: {json.dumps(data)}\n\n"


async def read_body(request):
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body has more than {MAX_BODY} bytes", headers={"Connection": "close"})
    return body


async def put_disconnect(request, job):
    """Put an error into the pieces of a request when its client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.pieces.put_nowait(ClientDisconnect())


def respond(_, error):
    """Return the response for an exception of an endpoint."""
    if not isinstance(error, ApiError):
        status, message = getattr(error, "status_code", 500), getattr(error, "detail", "the server failed")
        error = ApiError(status, message, headers=getattr(error, "headers", None))
    return as_response(error.body, error.status, error.headers)


def as_response(data, status=200, headers=None):
    """Return JSON. The name of a field or of a folder may contain what UTF-8 cannot encode; it becomes "?"."""
    return Response(as_json(data).encode("utf-8", "replace"), status, headers, "application/json")
