"""Greedy generation over a key/value cache, many prompts at once.

Prompts of any lengths are read as one flat stream; then every sequence grows by its most likely
token, and leaves the batch once it stops. Logits are formed for the last token of each alone.
"""

from collections.abc import Sequence
from itertools import chain

import torch

from ftcore.errors import ModelError
from ftcore.model.cache import Cache
from ftcore.model.heads import Model
from kernels.docs import Docs

@torch.inference_mode()
def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: frozenset[int]
) -> list[list[int]]:
    """Continue each prompt by its most likely tokens, `max_new_tokens` at most.

    returns     the new ids of each prompt; a stop id, where one came, is the last
    raises      ModelError: no LM head, an empty prompt, one that outgrows the positions
    memory      that of the cache (cache.py), for all prompts at once
    """
    if model.task != "lm":
        raise ModelError("the model has no language-model head: load it with the task 'lm'")
    most = model.spec.max_positions - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= most:
            must = f"with {max_new_tokens} new ones it must have 1 to {most}"
            raise ModelError(f"prompt {index} has {len(prompt)} tokens: {must}")
    device = model.trunk.embed_tokens.weight.device
    cache = Cache(model.spec.num_layers)
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the cache belongs to
    new_tokens, was_training = list(prompts), model.training
    model.eval()
    try:
        for _ in range(max_new_tokens if prompts else 0):
            docs = Docs.from_lengths([len(tokens) for tokens in new_tokens], device)
            tokens_N = torch.tensor(list(chain.from_iterable(new_tokens)), device=device)
            types_N = torch.zeros_like(tokens_N)
            inputs = (tokens_N, cache.extend(docs), types_N, docs, cache.layers)
            best = model.head(model.trunk(*inputs, docs.last_B())).argmax(-1).tolist()
            for prompt, token in zip(running, best, strict=True):
                answers[prompt].append(token)
            rows = [row for row, token in enumerate(best) if token not in stop_ids]
            if not rows:
                break
            if len(rows) < len(running):
                cache.keep(rows)
                running = [running[row] for row in rows]
            new_tokens = [[best[row]] for row in rows]
    finally:
        model.train(was_training)
    return answers
