"""Generation beyond the context: when it is full, go on with its newest half."""


def slide(generate_tokens, inputs, n_ctx, n_tokens_to_generate):
    """Yield new token ids one by one, of any number, after a prompt of any length.

    generate_tokens: gpt2.generate_tokens, or the like, with all other arguments bound; it yields n_tokens_to_generate
    ids after a prompt with which they fit into n_ctx tokens, or fewer if the model ends the text.
    The newest n_ctx // 2 tokens of a full context become the prompt of the next call, which computes their keys and
    values again. With learned absolute positions no cheaper way is exact: a token that moves to another position has
    another embedding there. Each token so has at least n_ctx // 2 tokens before it, if there are as many.
    Raises what generate_tokens raises; for n_ctx = 1, in which nothing can be generated, it gets an empty prompt.
    """
    window = list(inputs)
    while n_tokens_to_generate > 0:
        if len(window) >= n_ctx:
            window = window[len(window) - n_ctx // 2 :]
        n_new = min(n_tokens_to_generate, n_ctx - len(window))
        new_ids = []
        for next_id in generate_tokens(window, n_tokens_to_generate=n_new):
            new_ids.append(next_id)
            yield next_id
        if len(new_ids) < n_new:
            return
        window, n_tokens_to_generate = window + new_ids, n_tokens_to_generate - n_new
