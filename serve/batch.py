"""The thread that owns the model: it generates for all requests in one batch, which their rows join at any token."""

import asyncio
import collections
import contextlib
import logging
import threading
import time

import gpt2
from engines.batching import Batch, new_rows, score_prompt
from explain.trace import log_probabilities
from serve.choice import Choice
from serve.protocol import ApiError


class Job:
    """A request in the batch. Pieces of its choices arrive in the event loop that created it."""

    def __init__(self, request, encoder, seconds):
        self.request, self.is_cancelled, self.deadline = request, False, time.monotonic() + seconds
        self.choices = [Choice(i, encoder, request) for i in range(len(request.prompts) * request.n)]
        self.loop, self.pieces = asyncio.get_running_loop(), asyncio.Queue()

    def send(self, piece):
        """Send a piece, or an exception in its place; called by the thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def arriving(self):
        """Yield lists of the pieces that have arrived, until all choices are complete. Raises ApiError."""
        n_open = len(self.choices)
        while n_open:
            try:
                async with asyncio.timeout(self.deadline - time.monotonic()):
                    pieces = [await self.pieces.get()]
            except TimeoutError:
                message, headers = "this takes longer than --timeout allows", {"x-should-retry": "false"}  # OpenAI's
                raise ApiError(504, message, headers=headers) from None
            pieces += [self.pieces.get_nowait() for _ in range(self.pieces.qsize())]
            for error in (piece for piece in pieces if isinstance(piece, Exception)):
                raise error
            n_open -= sum(piece["finish_reason"] is not None for piece in pieces)
            yield pieces

    def usage(self):
        """Return the numbers of tokens."""
        n_prompt, n_new = sum(map(len, self.request.prompts)), sum(choice.n_generated for choice in self.choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


class BatchThread(threading.Thread):
    """A batch of up to max_rows rows, and a queue of up to max_queue requests whose rows wait to join it."""

    def __init__(self, model, params, n_head, stop_id, max_rows, max_queue):
        super().__init__(daemon=True)
        self.batch, self.stop_id, self.max_queue = Batch(params, n_head, max_rows, model), stop_id, max_queue
        self.waiting, self.wake, self.is_stopped = collections.deque(), threading.Event(), False
        self.pending, self.joining = iter(()), []  # rows that are to join, and the request that they belong to

    def submit(self, job):
        """Append a request to the queue. Raises ApiError if the queue is full."""
        if len(self.waiting) >= self.max_queue + self.batch.max_rows - len(self.batch.rows):
            raise ApiError(429, "the server is busy; try again", code="queue_full", headers={"Retry-After": "1"})
        self.waiting.append(job)
        self.wake.set()

    def cancel(self, job):
        """Free the rows of a request, or its place in the queue."""
        job.is_cancelled = True
        with contextlib.suppress(ValueError):
            self.waiting.remove(job)

    def stop(self):
        """End the thread after the pass that is running; requests that are not complete fail."""
        self.is_stopped = True
        self.wake.set()

    def run(self):
        while not self.is_stopped:
            try:
                for row in self.batch.step(self.joining_rows()):
                    self.update(row, *row.key)
            except Exception:  # damaged weights, or no memory: these requests fail, and the server goes on
                logging.exception("a pass failed")
                self.fail([], ApiError(500, "the server cannot compute this"))
        self.fail(self.waiting, ApiError(503, "the server is shutting down"))

    @staticmethod
    def update(row, job, choice):
        """Send what a row has to send: of a stream after each token, of others at the end."""
        choice.update(row)
        if job.is_cancelled:
            row.stop_reason = "cancelled"
        elif row.stop_reason or (job.request.stream and choice.n_safe > choice.n_sent):
            job.send(choice.take(row.stop_reason))

    def fail(self, waiting, error):
        for job in {row.key[0] for row in self.batch.rows}.union(self.joining, waiting):
            job.send(error)
        self.batch.rows, self.pending, self.joining = [], iter(()), []

    def joining_rows(self):
        """Yield rows to join the batch, with about PREFILL_CHUNK prompt tokens. Waits while the batch is empty."""
        n_tokens = 0
        while n_tokens < gpt2.PREFILL_CHUNK:
            if row := next(self.pending, None):
                n_tokens += len(row.prompt.ids)
                yield row
                continue
            while not (n_tokens or self.batch.rows or self.waiting or self.is_stopped):
                self.wake.wait()
                self.wake.clear()
            try:
                self.pending = self.rows_of(self.waiting.popleft())
            except IndexError:  # nothing waits, or what did was just cancelled
                return

    def rows_of(self, job):
        """Yield the rows of a request until it is cancelled. The key of a row is its job and its choice."""
        batch, request, self.joining = self.batch, job.request, [job]
        for i, ids in enumerate(request.prompts):
            choices = job.choices[i * request.n : (i + 1) * request.n]
            prompt = None, ids, [choice.choose for choice in choices]
            rows = new_rows([prompt], batch.params, request.max_tokens, self.stop_id, batch.model)
            for row, choice in zip(rows, choices, strict=True):
                if job.is_cancelled:
                    return
                row.key = job, choice
                if request.echo and choice is choices[0]:
                    self.echo(row.prompt, request.logprobs, choices)
                yield row

    def echo(self, prompt, n_top, choices):
        """Give a prompt to its choices. With log-probabilities, this computes the prompt."""
        scores = [(None, None)] * len(prompt.ids)
        if n_top is not None:
            logits = score_prompt(prompt, self.batch.params, self.batch.n_head, self.batch.model)
            scores[1:] = [log_probabilities(*pair, n_top) for pair in zip(logits, prompt.ids[1:], strict=True)]
        for choice in choices:
            choice.add(prompt.ids, scores)
            choice.n_safe = len(choice.text)  # stop strings are looked for after the prompt
