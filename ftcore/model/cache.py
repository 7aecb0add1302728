"""The key/value cache of greedy decoding: one contiguous slab per layer.

Letters: B sequences, S slots of a slab, G key/value heads, D head width, N new tokens. A cache is
filled by a flat stream of prompts and then grows by one token per sequence and step.

memory  2 L B S G D values, S doubling with the longest sequence
layout  (2, B, G, S, D), seen as 2BSGD: the decoding products then need no copy of the cache
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
        self.kv_2BSGD: Tensor | None = None

    def attend(
        self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs, **rule: float | None
    ) -> Tensor:
        """Store the new keys and values, return o_NHD; `rule`: scale, window, softcap."""
        plan, slab_2BSGD = self.plan, self.kv_2BSGD
        if slab_2BSGD is None or slab_2BSGD.shape[2] < plan.num_slots:
            B, (G, D) = len(plan.lengths), k_NGD.shape[1:]
            # Zeros, since an unused slot has weight 0 in the products but must be finite.
            self.kv_2BSGD = k_NGD.new_zeros(2, B, G, plan.num_slots, D).transpose(2, 3)
            if slab_2BSGD is not None:
                self.kv_2BSGD[:, :, : slab_2BSGD.shape[2]] = slab_2BSGD
        for slab_BSGD, new_NGD in zip(self.kv_2BSGD, (k_NGD, v_NGD), strict=True):
            slab_BSGD[plan.rows_N, plan.slots_N] = new_NGD
        if plan.is_prefill:
            return attention(q_NHD, k_NGD, v_NGD, docs, is_causal=True, **rule)
        k_BSGD, v_BSGD = self.kv_2BSGD[:, :, : max(plan.lengths)]
        return attention_decode(q_NHD, k_BSGD, v_BSGD, plan.lengths_B, **rule)

class Cache:
    """Where the tokens of B sequences lie in the slabs of every layer.

    layers              one slab per layer, for `Transformer.forward`
    lengths, lengths_B  tokens of each sequence, the current call's too; on the device (int64)
    rows_N, slots_N     sequence and slot of each token of the current call (int64)
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerSlab(self) for _ in range(num_layers)]
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
        for layer in self.layers:
            kept_2BGSD = layer.kv_2BSGD.transpose(2, 3).index_select(1, rows_B)  # as laid out
            layer.kv_2BSGD = kept_2BGSD.transpose(2, 3)
