"""Several tokens of one text in a pass: something cheap guesses them, and one pass of the model checks the guesses.

(Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".) The guesses are a smaller model's,
or what followed the same words earlier in the text (Saxena 2023, "Prompt Lookup Decoding").

Guesses change how many tokens a pass gives, never which. Every token is chosen from the model's logits by the sampler
that would have chosen it without: the logits behind a guess count only if that guess was chosen too. For draws this is
the paper's rejection sampling (its algorithm 1), for the guesses here are certain (q = 1): to keep a guess x with
probability p(x), and else to draw from p without x, is to draw from p and see whether it is x. So a seed, too, gives
the tokens it gives without guesses.

The logits of a pass over several tokens are rounded differently from those of one token, by some 1e-5. Where the two
largest are closer than that the other one may be chosen; of equal ones, as always, the lower id.
"""

import numpy as np

import gpt2
from engines.columns import LEAST_ROWS
from engines.parallel import has_small_kernels, share_caches, small_batch_model, whole_caches

MOST_GUESSES = 15  # with the token before them 16 rows, what columns.py takes at once
LONGEST_MATCH = 4  # tokens; a longer match says little more about what comes next
LAYOUT_COST = 30  # passes that small_batch_model takes the time of


class Lookup:
    """Guesses that the text goes on as it did where its last tokens stood before, the latest such place."""

    cost = 0  # of a guess, in passes of the model

    def __init__(self):
        self.places, self.n_read = {}, 0  # by some tokens: where the token after them stands

    def guess(self, text, n):
        """Up to n token ids to follow the text (ids too), which each time begins with the text of the time before."""
        for place in range(self.n_read, len(text)):
            for length in range(1, min(LONGEST_MATCH, place) + 1):
                self.places[tuple(text[place - length : place])] = place
        self.n_read = len(text)
        lengths = range(min(LONGEST_MATCH, len(text)), 0, -1)
        place = next(filter(None, (self.places.get(tuple(text[-length:])) for length in lengths)), None)
        if place is None:
            return []
        guessed = text[place : place + n]
        while len(guessed) < n:  # the place is near the end: the text repeats itself, and so does the guess
            guessed.append(guessed[place - len(text)])
        return guessed


class Draft:
    """Guesses what a smaller model would choose greedily. It keeps a cache of its own.

    model: gpt2, or small_batch_model's with its params. The latter is better beside a model of that kind: BLAS's own
    threads go on looking for work for a tenth of a second after a product, in the way of a helper process.
    """

    def __init__(self, params, n_head, cost, model=gpt2):
        self.params, self.n_head, self.cost, self.model = params, n_head, cost, model
        self.n_ctx = params["wpe"].shape[0]
        self.text, self.cache = [], [model.KVCache(self.n_ctx) for _ in params["blocks"]]

    def guess(self, text, n):
        """Up to n token ids to follow the text, fewer where the context of the model ends."""
        guessed = []
        while len(guessed) < min(n, self.n_ctx - len(text)):
            logits = self.read(text + guessed)
            guessed.append(int(logits.argmax()))
        return guessed

    def read(self, text):
        """The logits after a text; what it has in common with the text before comes out of the cache."""
        pairs = enumerate(zip(self.text, text[:-1], strict=False))
        n_past = next((i for i, (a, b) in pairs if a != b), min(len(self.text), len(text) - 1))
        for layer in self.cache:
            layer.n_past = n_past
        self.text = text
        return self.model.prefill(text[n_past:], self.params, self.n_head, self.cache)


def cheap_pass(n_tokens):
    """What a pass of small_batch_model costs, in plain passes of one token (bench/speculate.py)."""
    return 1 + 0.03 * max(n_tokens, LEAST_ROWS)


def packed_pass(n_tokens):
    """The same where there is no such model."""
    return 2.4 + 0.06 * n_tokens if n_tokens > 1 else 1


class Odds:
    """How guesses fared lately, and what follows from it. Costs are in plain passes of one token."""

    def __init__(self, guess_cost):
        self.pass_cost = cheap_pass if has_small_kernels() else packed_pass
        self.guess_cost = guess_cost
        self.right, self.tried = 1.0, 2.0  # guesses: those behind a wrong one were not tried
        self.trust()

    def trust(self):
        """As if guessing had paid so far: some passes without a right guess use that up."""
        self.memory, self.tokens, self.cost = 0.9, 22.0, 16.0

    def doubt(self):
        """As if guesses had been wrong for long: it takes some twenty right ones until best() is fast."""
        self.memory, self.right, self.tried = 0.97, 0.0, 33.0

    def saw(self, n_right, n_guesses):
        """One pass: the first n_right of its guesses were right. To have none to make counts as a wrong one."""
        self.right = self.memory * self.right + n_right
        self.tried = self.memory * self.tried + max(1, min(n_right + 1, n_guesses))
        self.tokens = 0.97 * self.tokens + n_right + 1
        self.cost = 0.97 * self.cost + self.pass_cost(n_guesses + 1) + n_guesses * self.guess_cost

    def speed(self, n):
        """Tokens in the time of a plain pass if n are guessed each time (Leviathan et al. 2023, theorem 3.8)."""
        rate = self.right / self.tried
        return sum(rate**i for i in range(n + 1)) / (self.pass_cost(n + 1) + n * self.guess_cost)

    def best(self):
        """How many to guess."""
        return max(range(1, MOST_GUESSES + 1), key=self.speed)

    def pay(self):
        """Whether guessing was faster, lately, than going token by token."""
        return self.tokens > self.cost


class Speculation:
    """Continues texts with one model and the help of guesses.

    make_guesser: makes what guesses for one text: Lookup, or a function that returns a Draft.
    eager: the weights are copied into the layout for guessing (small_batch_model) at the start of a text; else as soon as
    guesses would have been right often enough to pay for that. Where guesses no longer pay, the copy goes, and the text
    goes on token by token with the params given. One text at a time.

    Counted: passes, tokens, guessed (tokens that a pass checked), right (those of them that the text has).
    """

    def __init__(self, params, n_head, make_guesser=Lookup, eager=True):
        self.plain_params, self.n_head, self.make_guesser = params, n_head, make_guesser
        self.model, self.params, self.guessing, self.eager = gpt2, params, False, eager
        if eager:
            self.start_guessing([])
        self.count_anew()

    def count_anew(self):
        self.passes = self.tokens = self.guessed = self.right = 0

    def report(self, seconds):
        """One line about what was done since count_anew."""
        each = self.tokens / max(self.passes, 1)
        return (
            f"tokens: {self.tokens}, passes: {self.passes} ({each:.2f} tokens each), guesses: {self.guessed}, "
            f"right: {self.right}, {self.tokens / seconds:.1f} tokens/s"
        )

    def start_guessing(self, cache):
        self.model, self.params = small_batch_model(self.plain_params, self.n_head)
        self.guessing = True
        return share_caches(cache, self.params)

    def stop_guessing(self, cache):
        cache = whole_caches(cache, self.n_head)
        self.model, self.params, self.guessing = gpt2, self.plain_params, False
        return cache

    def generate_tokens(self, inputs, n_tokens_to_generate, sample=np.argmax, stop_id=None):
        """Yields the ids that gpt2.generate_tokens yields; raises what it raises."""
        gpt2.check_request(inputs, n_tokens_to_generate, self.plain_params["wpe"].shape[0])
        if self.eager and not self.guessing:
            self.start_guessing([])
        text, end = list(inputs), len(inputs) + n_tokens_to_generate
        cache = [self.model.KVCache(end) for _ in self.plain_params["blocks"]]
        guesser = self.make_guesser()
        odds = Odds(guesser.cost)
        if not self.guessing:
            odds.doubt()
        new_ids, guesses = text[:], []  # what the cache has not seen yet, and what may follow
        while len(text) < end:
            n_right = 0
            for logits in self.check(new_ids, guesses, cache):
                next_id = int(sample(logits))
                if next_id == stop_id:
                    return
                text.append(next_id)
                self.tokens += 1
                yield next_id
                if guesses[n_right : n_right + 1] != [next_id]:
                    break
                n_right += 1
                self.right += self.guessing
            for layer in cache:
                layer.n_past = len(text) - 1  # what followed a wrong guess is forgotten
            odds.saw(n_right, len(guesses))
            cache = self.adapt(cache, odds, end - len(text))
            n_guesses = odds.best() if self.guessing else not guesser.cost  # free ones show whether they would be right
            new_ids, guesses = text[-1:], guesser.guess(text, max(0, min(n_guesses, end - len(text) - 1)))

    def check(self, new_ids, guesses, cache):
        """The logits after new_ids and after each guess, [n_guesses+1, n_vocab]; only the first if not guessing."""
        self.passes += 1
        if not (self.guessing and guesses):
            return [self.model.prefill(new_ids, self.params, self.n_head, cache)]
        self.guessed += len(guesses)
        return self.model.gpt2([*new_ids, *guesses], **self.params, n_head=self.n_head, cache=cache)

    def adapt(self, cache, odds, n_left):
        """Takes guessing up or leaves it, as the odds say; returns the cache to go on with."""
        if self.guessing:
            if odds.pay():
                return cache
            odds.doubt()
            return self.stop_guessing(cache)
        speed = 1 if odds.guess_cost else odds.speed(odds.best())
        if speed > 1.5 and n_left * (1 - 1 / speed) > LAYOUT_COST:
            odds.trust()
            return self.start_guessing(cache)
        return cache
