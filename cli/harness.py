"""A model for EleutherAI's lm-evaluation-harness, computed by the engines. Imports lm_eval.

Requests are encoded and cut as by the harness's own class for transformers' models (`--model hf`), so the results are
the same up to rounding. Both read a context, and score or generate the tokens after it.
"""

import functools
from collections import defaultdict
from itertools import chain, islice

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import gpt2
from cli.session import check_batch
from encoder import END_OF_TEXT
from engines import scoring
from engines.batching import generate_batch
from sampling import make_sampler
from weights.errors import UserError

STOP = -1  # not a token: what a StopAt returns at the end


class StopAt:
    """A sampler that returns STOP when its tokens contain a stop string or the end of text. ids: the tokens so far."""

    def __init__(self, sample, encoder, stops):
        self.sample, self.encoder, self.stops, self.ids = sample, encoder, stops, []

    def __call__(self, logits):  # [n_vocab] -> one id
        new_id = int(self.sample(logits))
        if new_id == self.encoder.encoder.get(END_OF_TEXT):
            return STOP
        self.ids.append(new_id)
        text = self.encoder.decode(self.ids)
        return STOP if any(stop in text for stop in self.stops) else new_id


class HarnessModel(TemplateLM):
    """GPT-2 as a model of the harness, for the argument `model` of lm_eval.simple_evaluate().

    encoder, hparams, params: what load_encoder_hparams_and_params() returns. model: the module gpt2, or the one that
    model_and_params() in cli/engine.py returns with its params.
    batch_size: continuations generated at a time. Raises UserError for requests that the model cannot process.
    """

    def __init__(self, encoder, hparams, params, model=gpt2, batch_size=8):
        super().__init__()
        self.encoder, self.hparams, self.params, self.model = encoder, hparams, params, model
        self.batch_size, self.max_length = batch_size, hparams["n_ctx"]
        self.special = [token for token in (END_OF_TEXT,) if token in encoder.encoder]

    @property
    def eot_token_id(self):
        """The token before a text that has no context."""
        return self.encoder.start_ids()[0]

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.encoder.encode(string, self.special)

    def score(self, pairs, what, disable_tqdm):
        """Return what scoring.score() returns, as lists, for pairs of (context, continuation)."""
        progress = functools.partial(tqdm, desc=f"Running {what} requests", unit="pass", disable=disable_tqdm)
        score = getattr(self.model, "score", functools.partial(scoring.score, model=self.model))  # JAX has its own
        log_probs, is_greedy = score(pairs, self.params, self.hparams["n_head"], progress=progress)
        if not np.all(np.isfinite(log_probs)):
            raise FloatingPointError("the log-probabilities are not finite")
        return log_probs.tolist(), is_greedy.tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        pairs = [(context or [self.eot_token_id], continuation) for _, context, continuation in requests]
        return list(zip(*self.score(pairs, "loglikelihood", disable_tqdm), strict=True))

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Return the log-probability of each text. Windows as long as the context score each token once."""
        windows = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            windows.append([make_disjoint_window(window) for window in found])
        log_probs, _ = self.score(list(chain(*windows)), "loglikelihood_rolling", disable_tqdm)
        remaining = iter(log_probs)
        return [sum(islice(remaining, len(found))) for found in windows]

    def generate_until(self, requests, disable_tqdm=False):
        """Return the text that follows each context, up to the first of its stop strings."""
        texts, groups = [None] * len(requests), defaultdict(list)
        for i, (context, gen_kwargs) in enumerate(request.args for request in requests):
            n_tokens, stops, sampling = generation_options(gen_kwargs)
            groups[n_tokens, sampling].append((i, context, stops))
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for (n_tokens, sampling), members in groups.items():
                for i, text in self.generate(members, n_tokens, dict(sampling)):
                    texts[i] = text
                    bar.update()
        return texts

    def generate(self, members, n_tokens, sampling):
        """Yield (i, text) for each (i, context, stops). Sample i uses the seed i."""
        n_context = self.hparams["n_ctx"] - n_tokens
        if n_context < 1:
            raise UserError(
                f"max_gen_toks {n_tokens} leaves no room for a prompt in the model's context of {self.max_length}; "
                "set a smaller one in the task's generation_kwargs"
            )
        contexts = {i: self.tok_encode(context)[-n_context:] or [self.eot_token_id] for i, context, _ in members}
        check_batch(self.hparams, min(self.batch_size, len(members)), max(map(len, contexts.values())) + n_tokens)
        stops, end_of_text = {i: found for i, _, found in members}, self.encoder.encoder.get(END_OF_TEXT)
        if hasattr(self.model, "generate_batch"):  # JAX: it samples on its devices, and cannot stop at strings
            samplers = {i: self.model.make_sampler(**sampling, seed=i) for i in contexts}
            generate, stop_id = self.model.generate_batch, end_of_text
        else:
            samplers = {i: StopAt(make_sampler(**sampling, seed=i), self.encoder, stops[i]) for i in contexts}
            generate, stop_id = functools.partial(generate_batch, model=self.model), STOP
        requests = [(i, ids, [samplers[i]]) for i, ids in contexts.items()]
        for (i, _), ids, _ in generate(
            requests, self.params, self.hparams["n_head"], n_tokens, self.batch_size, stop_id
        ):
            text = self.encoder.decode(getattr(samplers[i], "ids", ids))
            yield i, postprocess_generated_text(text, stops[i], None)


def generation_options(gen_kwargs):
    """Return the number of tokens, the stop strings, and the options of make_sampler() as pairs."""
    options = normalize_gen_kwargs(gen_kwargs)
    n_tokens, stops = options.pop("max_gen_toks"), [stop for stop in options.pop("until") if stop]
    given = {name: options.pop(name) for name in ("temperature", "top_k", "top_p") if name in options}
    sampling = {"temperature": 1.0} | given if options.pop("do_sample") else {"temperature": 0.0}
    if options:
        raise UserError(f"generation_kwargs of a task have {', '.join(options)}, which is not supported; leave it out")
    counts = n_tokens, sampling["temperature"], sampling.get("top_k", 0)
    if not (all(count >= 0 for count in counts) and 0 < sampling.get("top_p", 1) <= 1):
        raise UserError(
            f"generation_kwargs of a task have max_gen_toks {n_tokens} and {sampling}; set numbers of at least 0, and "
            "top_p above 0 and at most 1"
        )
    return n_tokens, stops, tuple(sampling.items())
