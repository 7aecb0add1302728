"""Generation over a key/value cache, many prompts at once: greedy, or drawn.

Prompts of any lengths are read as one flat stream; then every sequence grows by a token, and leaves
the batch once it stops. Logits are formed for the last token of each alone.
Letters: B sequences, N new tokens, T those of one sequence at most, V vocabulary, C model width."""

from collections.abc import Sequence
from itertools import accumulate
import numpy as np
import torch
from torch import Tensor
from ftcore.errors import ModelError
from ftcore.model.heads import Model
from kernels.attention_cache import Cache
from kernels.sampling import drawn

def advanced(model: Model, cache: Cache, rows: Sequence[int], parts: list[Sequence[int]]) -> Tensor:
    """h_BC of the last token of each part, which rows of the cache then have read."""
    tokens_N, docs = cache.extend(rows, parts)
    last_B = docs.last_B() if docs.num_tokens > len(docs.lengths) else None
    h_BC = cache.passed(lambda: model.trunk(tokens_N, cache.slots_N, torch.zeros_like(tokens_N),
                                            docs, cache.attends, last_B))
    return h_BC[: len(rows)]

@torch.inference_mode()
def generate(model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
             stop_ids: frozenset[int], temperature: float = 1.0,
             chance_BT: np.ndarray | None = None) -> list[list[int]]:
    """Continue each prompt by its most likely tokens, or, where there are numbers that decide, by
    tokens drawn at a temperature. Returns the new ids of each; a stop id, where one came, is the
    last. Raises ModelError: no LM head, an empty prompt, one that outgrows the positions."""
    if model.task != "lm":
        raise ModelError("the model has no language-model head: load it with the task 'lm'")
    most = model.spec.max_positions - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= most:
            must = f"with {max_new_tokens} new ones it must have 1 to {most}"
            raise ModelError(f"prompt {index} has {len(prompt)} tokens: {must}")
    assert not model.training, "dropout would decide: model.eval() before generating"
    cache = Cache(model.spec.num_layers, model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    is_new_B = [i == 0 or prompt is not prompts[i - 1] for i, prompt in enumerate(prompts)]
    read_B = [number - 1 for number in accumulate(is_new_B)]  # cost: each once, of equal ones
    running = sorted(range(len(prompts)), key=lambda i: not is_new_B[i])  # prompt of each row
    new_tokens = [prompts[i] for i in running if is_new_B[i]]
    for _ in new_tokens:
        cache.join()
    for place in range(max_new_tokens if prompts else 0):
        logits_BV = model.head(advanced(model, cache, range(len(new_tokens)), new_tokens))
        if len(new_tokens) < len(running):
            for row, i in [(cache.join(), i) for i in running[len(new_tokens) :]]:  # grows once
                cache.write(row, cache.read(read_B[i], len(prompts[i])))
            logits_BV = logits_BV[[read_B[i] for i in running]]
        top = logits_BV.max(-1)
        if not top.values.isfinite().all():
            raise ModelError("the model's logits are not finite: it is damaged, or fp32 is needed")
        ids_B = top.indices
        if chance_BT is not None:
            ids_B, _ = drawn(logits_BV, temperature, chance_BT[running, place])
        best = ids_B.tolist()
        for row, token in reversed([*enumerate(best)]):
            answers[running[row]].append(token)
            if token in stop_ids:
                cache.leave(row)
                for column in (running, best):
                    column[row] = column[-1]
                    column.pop()
        if not running:
            break
        new_tokens = [[token] for token in best]
    return answers
