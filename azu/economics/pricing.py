"""What a job costs: lamports per token and layer, before it runs and after."""


def charge(prompt_tokens: int, completion_tokens: int, num_layers: int, lamports_per_token_layer: int) -> int:
    """Return the lamports for what was delivered: (prompt + completion tokens) x layers x price.

    EOS counts as a token; the prompt counts once, however many completions share it; nothing is charged
    before the first token.
    """
    assert min(prompt_tokens, completion_tokens, num_layers, lamports_per_token_layer) >= 0
    if completion_tokens == 0:
        return 0
    return (prompt_tokens + completion_tokens) * num_layers * lamports_per_token_layer


def max_charge(
    prompt_tokens: int, max_completion_tokens: int, num_layers: int, lamports_per_token_layer: int
) -> int:
    """Return the most that a job can be charged: what is reserved before it runs, in lamports."""
    return charge(prompt_tokens, max_completion_tokens, num_layers, lamports_per_token_layer)
