"""The key/value cache of greedy decoding: one contiguous slab per layer.

Letters: B sequences, S slots of a slab, G key/value heads, D head width, N new tokens.

The cache is filled by a flat stream of prompts and then grows by one token per sequence and step.
`Cache` knows where new tokens go; a `LayerSlab` is one layer's view, which the transformer calls.

memory  2 L B S G D values, S doubling with the longest sequence
layout  (B, G, S, D) in memory, seen as BSGD: the decoding products then need no copy of the cache
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention_decode import attention_decode
from kernels.docs import Docs

FIRST_SLOTS = 64


class LayerSlab:
    """Keys and values of one layer, and the attention over them."""

    def __init__(self, plan: "Cache") -> None:
        self.plan = plan
        self.k_BSGD: Tensor | None = None
        self.v_BSGD: Tensor | None = None

    def attend(
        self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs, **rule: float | None
    ) -> Tensor:
        """Store the new keys and values, return o_NHD; `rule`: scale, window, softcap."""
        plan = self.plan
        self.k_BSGD = _stored(self.k_BSGD, k_NGD, plan)
        self.v_BSGD = _stored(self.v_BSGD, v_NGD, plan)
        if plan.is_prefill:
            return attention(q_NHD, k_NGD, v_NGD, docs, is_causal=True, **rule)
        longest = max(plan.lengths)
        return attention_decode(
            q_NHD, self.k_BSGD[:, :longest], self.v_BSGD[:, :longest], plan.lengths_B, **rule
        )


def _stored(slab_BSGD: Tensor | None, x_NGD: Tensor, plan: "Cache") -> Tensor:
    """The slab, grown to the plan's slots, with the new rows written into it."""
    if slab_BSGD is None or slab_BSGD.shape[1] < plan.num_slots:
        B, (G, D) = len(plan.lengths), x_NGD.shape[1:]
        # Zeros, since an unused slot has weight 0 in the products but must be finite.
        grown_BSGD = x_NGD.new_zeros(B, G, plan.num_slots, D).transpose(1, 2)
        if slab_BSGD is not None:
            grown_BSGD[:, : slab_BSGD.shape[1]] = slab_BSGD
        slab_BSGD = grown_BSGD
    slab_BSGD[plan.rows_N, plan.slots_N] = x_NGD
    return slab_BSGD


class Cache:
    """Where the tokens of B sequences lie in the slabs of every layer.

    layers              one slab per layer, for `Transformer.forward`
    lengths             tokens of each sequence so far, those of the current call included
    lengths_B           the same on the device (int64)
    rows_N, slots_N     sequence and slot of each token of the current call (int64)
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerSlab(self) for _ in range(num_layers)]
        self.lengths: list[int] = []
        self.num_slots = FIRST_SLOTS
        self.is_prefill = True

    def extend(self, docs: Docs) -> Tensor:
        """Make room for a stream that adds to every sequence, in order; returns its positions_N.

        docs    the prompts on the first call, one token per sequence on every later one
        """
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
        for layer in self.layers:
            layer.k_BSGD, layer.v_BSGD = (
                slab_BSGD.transpose(1, 2).index_select(0, rows_B).transpose(1, 2)  # as laid out
                for slab_BSGD in (layer.k_BSGD, layer.v_BSGD)
            )
