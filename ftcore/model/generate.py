"""Generation over a key/value cache, many prompts at once: greedy, or drawn.

Prompts of any lengths are read as one flat stream; then every sequence grows by a token, and leaves
the batch once it stops. Logits are formed for the last token of each alone. A token is drawn by a
number in [0, 1) of its own sequence and place, so it does not depend on who else is in the batch.
Letters: B sequences, S slots of a slab, G key/value heads, D head width, N new tokens, T those of
one sequence at most, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain, compress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftcore.errors import ModelError
from ftcore.model.heads import Model
from kernels.attention import attention
from kernels.attention_decode import attention_decode
from kernels.docs import Docs

FIRST_SLOTS = 64

class Cache:
    """Keys and values of B sequences, one contiguous slab per layer: filled by a flat stream of
    prompts, they grow by one token per sequence and step.

    attends             the attention of each layer over its slab, for `Transformer.forward`
    lengths, lengths_B  tokens of each sequence, the current call's too; on the device (int64)
    rows_N, slots_N     sequence and slot of each token of the current call (int64)
    memory              2 L B S G D values, S doubling with the longest sequence
    layout              2BGSD, whose products in decoding need no copy
    """

    def __init__(self, num_layers: int) -> None:
        self.slabs: list[Tensor | None] = [None] * num_layers
        self.attends = [partial(self._attend, layer) for layer in range(num_layers)]
        self.lengths: list[int] = []
        self.num_slots = FIRST_SLOTS
        self.is_prefill = True

    def extend(self, docs: Docs) -> Tensor:
        """Make room for a stream that adds to every sequence, in order: the prompts on the first
        call, one token each on every later one. Returns its positions_N."""
        self.is_prefill = not self.lengths
        before = self.lengths or [0] * docs.num_docs
        assert len(before) == docs.num_docs and (self.is_prefill or set(docs.lengths) == {1})
        self.lengths = [old + new for old, new in zip(before, docs.lengths, strict=True)]
        device = docs.cu_seqlens_B1.device
        self.lengths_B = torch.tensor(self.lengths, device=device)
        while self.num_slots < max(self.lengths):
            self.num_slots *= 2
        self.rows_N = docs.doc_of_N()
        self.slots_N = docs.positions_N() if self.is_prefill else self.lengths_B - 1
        return self.slots_N

    def keep(self, rows: Sequence[int]) -> None:
        """Forget every sequence but these, which are renumbered in the order given."""
        self.lengths = [self.lengths[row] for row in rows]
        rows_B = torch.tensor(rows, device=self.lengths_B.device)
        self.slabs = [slab_2BGSD.index_select(1, rows_B) for slab_2BGSD in self.slabs]

    def _attend(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs,
                **rule: float | None) -> Tensor:
        """Store the new keys and values, return o_NHD; `rule`: scale, window, softcap."""
        B, (G, D), slab_2BGSD = len(self.lengths), k_NGD.shape[1:], self.slabs[layer]
        if slab_2BGSD is None:
            slab_2BGSD = k_NGD.new_zeros(2, B, G, 0, D)
        if more := self.num_slots - slab_2BGSD.shape[3]:
            # Zeros, since an unused slot has weight 0 in the products but must be finite.
            slab_2BGSD = self.slabs[layer] = F.pad(slab_2BGSD, (0, 0, 0, more))
        slab_2BSGD = slab_2BGSD.transpose(2, 3)
        slab_2BSGD[:, self.rows_N, self.slots_N] = torch.stack((k_NGD, v_NGD))
        if self.is_prefill:
            return attention(q_NHD, k_NGD, v_NGD, docs, is_causal=True, **rule)
        k_BSGD, v_BSGD = slab_2BSGD[:, :, : max(self.lengths)]
        return attention_decode(q_NHD, k_BSGD, v_BSGD, self.lengths_B, **rule)

def drawn(logits_BV: Tensor, temperature: float, chance_B: np.ndarray) -> Tensor:
    """Ids (B,) from softmax(logits / temperature), by numbers in [0, 1): where these lie in the
    running sum of the probabilities."""
    sums_BV = (logits_BV.float() / temperature).softmax(-1).double().cumsum(-1)
    chance_B1 = torch.from_numpy(chance_B).to(sums_BV)[:, None] * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, chance_B1, right=True).squeeze(1)

@torch.inference_mode()
def generate(model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
             stop_ids: frozenset[int], temperature: float = 1.0,
             chance_BT: np.ndarray | None = None) -> list[list[int]]:
    """Continue each prompt by its most likely tokens, or, where there are numbers that decide, by
    tokens drawn at a temperature; `max_new_tokens` at most.

    returns     the new ids of each prompt; a stop id, where one came, is the last
    raises      ModelError: no LM head, an empty prompt, one that outgrows the positions
    memory      that of the cache, for all prompts at once
    """
    if model.task != "lm":
        raise ModelError("the model has no language-model head: load it with the task 'lm'")
    most = model.spec.max_positions - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= most:
            must = f"with {max_new_tokens} new ones it must have 1 to {most}"
            raise ModelError(f"prompt {index} has {len(prompt)} tokens: {must}")
    assert not model.training, "dropout would decide: model.eval() before generating"
    device, cache = model.device, Cache(model.spec.num_layers)
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the cache belongs to
    # cost: a prompt that stands several times in turn is read once
    is_new_B = [i == 0 or prompt is not prompts[i - 1] for i, prompt in enumerate(prompts)]
    new_tokens = [*compress(prompts, is_new_B)]
    for place in range(max_new_tokens if prompts else 0):
        docs = Docs.from_lengths([len(tokens) for tokens in new_tokens], device)
        tokens_N = torch.tensor(list(chain.from_iterable(new_tokens)), device=device)
        types_N = torch.zeros_like(tokens_N)
        inputs = (tokens_N, cache.extend(docs), types_N, docs, cache.attends)
        logits_BV = model.head(model.trunk(*inputs, docs.last_B()))
        if len(logits_BV) < len(running):  # after the first pass
            of_B = [number - 1 for number in accumulate(is_new_B)]
            logits_BV = logits_BV[of_B]
            cache.keep(of_B)
        top = logits_BV.max(-1)
        if not top.values.isfinite().all():
            raise ModelError("the model's logits are not finite: it is damaged, or fp32 is needed")
        ids_B = top.indices
        if chance_BT is not None:
            ids_B = drawn(logits_BV, temperature, chance_BT[running, place])
        best = ids_B.tolist()
        for prompt, token in zip(running, best, strict=True):
            answers[prompt].append(token)
        rows = [row for row, token in enumerate(best) if token not in stop_ids]
        if not rows:
            break
        if len(rows) < len(running):
            cache.keep(rows)
            running = [running[row] for row in rows]
        new_tokens = [[best[row]] for row in rows]
    return answers
