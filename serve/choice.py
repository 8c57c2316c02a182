"""The text of one continuation, in pieces that may be sent: whole characters, and no part of a stop string."""

import codecs

import regex

from explain.trace import log_probabilities
from sampling import make_sampler


class Choice:
    """A continuation, the i-th of a request."""

    def __init__(self, index, encoder, seed, request):
        self.index, self.encoder, self.n_top = index, encoder, request.logprobs
        self.sample = make_sampler(request.temperature, request.top_k, request.top_p, seed)
        self.stop = regex.compile("|".join(map(regex.escape, request.stop))) if request.stop else None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.n_sent, self.n_safe = "", 0, 0  # characters that are sent, and that may be sent
        self.tokens, self.scores, self.n_generated = [], (None, None), 0

    def choose(self, logits):  # [n_vocab] -> one id
        """Sample a token: the sampler of the row."""
        token_id = self.sample(logits)
        if self.n_top is not None:
            self.scores = log_probabilities(logits, token_id, self.n_top)
        return token_id

    def add(self, token_id, scores):
        """Append a token. scores: what log_probabilities returns, (None, None) for the first token of a prompt."""
        self.tokens.append((len(self.text), token_id, *scores))
        self.text += self.decoder.decode(self.encoder.token_bytes(token_id))

    def add_prompt(self, ids, scores):
        """Append the prompt, in which no stop string is looked for."""
        for token in zip(ids, scores, strict=True):
            self.add(*token)
        self.n_safe = len(self.text)

    def update(self, row):
        """Append the row's newest token; end the row at a stop string."""
        if len(row.ids) > self.n_generated:
            self.add(row.new_id, self.scores)
        self.n_generated = len(row.ids)
        if row.stop_reason:
            self.text += self.decoder.decode(b"", final=True)
        found = self.stop and self.stop.search(self.text, self.n_safe, partial=not row.stop_reason)
        self.n_safe = found.start() if found else len(self.text)
        if found and not found.partial:
            row.stop_reason = "stop"

    def take(self, stop_reason):
        """Return what may be sent since the last call, as an element of OpenAI's `choices`."""
        text, self.n_sent = self.text[self.n_sent : self.n_safe], self.n_safe
        tokens = [token for token in self.tokens if token[0] < self.n_safe]  # of those in a stop string, none
        self.tokens = self.tokens[len(tokens) :]
        logprobs = None if self.n_top is None else self.logprobs(tokens)
        reason = stop_reason and ("length" if stop_reason == "length" else "stop")
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens):
        """Return the log-probabilities in OpenAI's shape; token_ids is an addition."""
        offsets, ids, logprobs, tops = map(list, zip(*tokens, strict=True)) if tokens else ([], [], [], [])
        tops = [top and {self.name(i): logprob for i, logprob in top} for top in tops]
        found = {"tokens": list(map(self.name, ids)), "token_ids": ids, "token_logprobs": logprobs}
        return found | {"top_logprobs": tops, "text_offset": offsets}

    def name(self, token_id):
        r"""Return the text of a token, or OpenAI's name of bytes that are not UTF-8: bytes:\xe4."""
        data = self.encoder.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
