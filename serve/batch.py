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
    """A request in the batch. choices: those of each prompt. Their pieces arrive in the event loop that created it."""

    def __init__(self, request, encoder, seconds):
        self.request, self.is_cancelled, self.deadline = request, False, time.monotonic() + seconds
        self.loop, self.pieces = asyncio.get_running_loop(), asyncio.Queue()
        seeds = [None if request.seed is None else (request.seed + i) % 2**64 for i in range(request.n)]
        self.choices = [
            [Choice(p * request.n + i, encoder, seed, request) for i, seed in enumerate(seeds)]
            for p in range(len(request.prompts))
        ]

    async def arrived(self):
        """Yield lists of the pieces that have arrived until all choices are complete. Raises ApiError."""
        n_open = len(self.request.prompts) * self.request.n
        while n_open:
            try:
                async with asyncio.timeout(self.deadline - time.monotonic()):
                    pieces = [await self.pieces.get()]
            except TimeoutError:  # the header tells OpenAI's client not to ask again
                headers = {"x-should-retry": "false"}
                raise ApiError(504, "this takes longer than --timeout allows", headers=headers) from None
            pieces += [self.pieces.get_nowait() for _ in range(self.pieces.qsize())]
            for error in (piece for piece in pieces if isinstance(piece, Exception)):
                raise error
            n_open -= sum(piece["finish_reason"] is not None for piece in pieces)
            yield pieces

    def usage(self):
        """Return the numbers of tokens of the prompts and of the complete choices."""
        n_prompt = sum(map(len, self.request.prompts))
        n_new = sum(choice.n_generated for choices in self.choices for choice in choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


class BatchThread(threading.Thread):
    """A batch, and a queue of up to max_queue requests whose rows wait to join it."""

    def __init__(self, model, params, n_head, stop_id, max_rows, max_queue):
        super().__init__(daemon=True)
        self.batch, self.stop_id, self.max_queue = Batch(params, n_head, max_rows, model), stop_id, max_queue
        self.waiting, self.pending, self.wake, self.is_stopped = collections.deque(), iter(()), threading.Event(), False

    # Called by the event loop

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

    # Called by the thread

    def run(self):
        while not self.is_stopped:
            try:
                send(list(self.pieces(self.batch.step(self.joining_rows()))))
            except Exception:  # damaged weights, or no memory: these requests fail, and the server goes on
                logging.exception("a pass failed")
                self.fail(ApiError(500, "the server cannot compute this"))
        self.fail(ApiError(503, "the server is shutting down"))
        send([(job, ApiError(503, "the server is shutting down")) for job in self.waiting])

    def fail(self, error):
        send([(row.key[0], error) for row in self.batch.rows])
        self.batch.rows, self.pending = [], iter(())

    def joining_rows(self):
        """Yield rows to join the batch, with about PREFILL_CHUNK prompt tokens. Waits while the batch is empty."""
        n_tokens = 0
        while n_tokens < gpt2.PREFILL_CHUNK:
            if row := next(self.pending, None):
                n_tokens += len(row.prompt.ids)
                yield row
            elif job := self.next_job(may_wait=not (n_tokens or self.batch.rows)):
                self.pending = self.rows_of(job)
            else:
                return

    def next_job(self, may_wait):
        """Return the oldest request in the queue, None if there is none."""
        while may_wait and not (self.waiting or self.is_stopped):
            self.wake.wait()
            self.wake.clear()
        with contextlib.suppress(IndexError):
            return self.waiting.popleft()

    def rows_of(self, job):
        """Yield the rows of a request until it is cancelled. The key of a row is its job and its choice."""
        batch, request = self.batch, job.request
        for ids, choices in zip(request.prompts, job.choices, strict=True):
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
        """Give a prompt that is not computed yet to its choices."""
        scores = [(None, None)] * len(prompt.ids)
        if n_top is not None:
            logits = score_prompt(prompt, self.batch.params, self.batch.n_head, self.batch.model)
            scores[1:] = [log_probabilities(*pair, n_top) for pair in zip(logits, prompt.ids[1:], strict=True)]
        for choice in choices:
            choice.add_prompt(prompt.ids, scores)

    @staticmethod
    def pieces(rows):
        """Yield (job, piece) of each row: of a stream after each token, of others at the end."""
        for row in rows:
            job, choice = row.key
            choice.update(row)
            if row.stop_reason or (job.request.stream and choice.n_safe > choice.n_sent):
                yield job, choice.take(row.stop_reason)
            row.stop_reason = row.stop_reason or ("cancelled" if job.is_cancelled else None)


def send(pieces):
    """Put pieces into the queues of their jobs, in one call of the event loop."""
    def deliver():
        for job, piece in pieces:
            job.pieces.put_nowait(piece)

    if pieces:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            pieces[0][0].loop.call_soon_threadsafe(deliver)
