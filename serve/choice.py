"""The text of one continuation, in pieces that may be sent: whole characters, and no part of a stop string."""

import codecs

import regex

from explain.trace import log_probabilities
from sampling import make_sampler


class Choice:
    """A continuation, OpenAI's "choice": the tokens of a row, as text and with log-probabilities."""

    def __init__(self, index, encoder, request):
        seed = None if request.seed is None else (request.seed + index % request.n) % 2**64
        self.sample = make_sampler(request.temperature, request.top_k, request.top_p, seed)
        self.stop = regex.compile("|".join(map(regex.escape, request.stop))) if request.stop else None
        self.index, self.encoder, self.n_top = index, encoder, request.logprobs
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.n_sent, self.n_safe = "", 0, 0  # characters that are sent, and that may be sent
        self.tokens, self.scores, self.n_generated = [], (None, None), 0

    def choose(self, logits):  # [n_vocab] -> one id
        """Sample a token: the sampler of the row."""
        token_id = int(self.sample(logits))
        if self.n_top is not None:
            self.scores = log_probabilities(logits, token_id, self.n_top)
        return token_id

    def add(self, ids, scores):
        """Append tokens. scores: what log_probabilities returns of each; (None, None) for the first of a prompt."""
        for token_id, of_token in zip(ids, scores, strict=True):
            self.tokens.append((len(self.text), token_id, *of_token))
            self.text += self.decoder.decode(self.encoder.token_bytes(token_id))

    def update(self, row):
        """Append the row's new token, if it has one; end the row at a stop string."""
        self.add(row.ids[self.n_generated :], [self.scores] * (len(row.ids) - self.n_generated))
        self.n_generated = len(row.ids)
        if row.stop_reason:
            self.text += self.decoder.decode(b"", final=True)
        found = self.stop and self.stop.search(self.text, self.n_safe, partial=not row.stop_reason)
        self.n_safe = found.start() if found else len(self.text)
        if found and not found.partial:
            row.stop_reason = "stop"

    def take(self, stop_reason):
        """Return what may be sent since the last call, as an element of OpenAI's `choices`."""
        tokens = [token for token in self.tokens if token[0] < self.n_safe]
        piece = {"index": self.index, "text": self.text[self.n_sent : self.n_safe], "logprobs": None}
        self.n_sent, self.tokens = self.n_safe, self.tokens[len(tokens) :]
        if self.n_top is not None:
            offsets, ids, logprobs, tops = map(list, zip(*tokens, strict=True)) if tokens else ([], [], [], [])
            names, tops = [self.name(i) for i in ids], [top and {self.name(i): p for i, p in top} for top in tops]
            piece["logprobs"] = {"tokens": names, "token_ids": ids, "token_logprobs": logprobs}  # token_ids: ours
            piece["logprobs"] |= {"top_logprobs": tops, "text_offset": offsets}
        return piece | {"finish_reason": stop_reason and ("length" if stop_reason == "length" else "stop")}

    def name(self, token_id):
        r"""Return the text of a token, or OpenAI's name of bytes that are not UTF-8: bytes:\xe4."""
        data = self.encoder.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
