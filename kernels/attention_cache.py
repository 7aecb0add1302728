"""Keys and values of sequences that join, grow and leave at any time, for attention over them.

A step is one flat stream of new tokens: first the single ones of sequences that are decoding, then
chunks of prompts of which a part is cached, then prompts from their start. Letters: N tokens of the
stream, B sequences, S slots, H query heads, G key/value heads, D head width."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention_decode import attention_chunk, attention_decode
from kernels.docs import Docs, rounded

SLOTS = 64  # that a slab grows by

class Cache:
    """Keys and values of B sequences, each a row of one contiguous slab per layer.

    lengths     cached tokens of each row, those of the current stream too
    attends     the attention of each layer over its slab, for `Transformer.forward`
    memory      2 L B S G D values: B up to the next of `rounded`, S up to a multiple of `SLOTS`
    layout      2BGSD, whose products in decoding need no copy"""

    def __init__(self, num_layers: int) -> None:
        self.slabs: list[Tensor | None] = [None] * num_layers
        self.attends = [partial(self._attend, layer) for layer in range(num_layers)]
        self.lengths: list[int] = []

    def join(self) -> int:
        """The row of a new sequence, behind all others."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    def leave(self, row: int) -> None:
        """Forget a sequence; the last one takes its row."""
        for tokens_2GSD in self.read(row, self.lengths[row]):
            tokens_2GSD.zero_()  # they may be what is not finite, and stay behind the next one's
        if row < (last := len(self.lengths) - 1):
            self.write(row, self.read(last, self.lengths[last]))
        self.lengths.pop()

    def read(self, row: int, count: int) -> list[Tensor]:
        """The first `count` tokens of a sequence, 2GSD of each layer: views of the slabs."""
        return [slab_2BGSD[:, row, :, :count] for slab_2BGSD in self.slabs]

    def write(self, row: int, tokens: Sequence[Tensor]) -> None:
        """Let a sequence be these tokens, as `read` gives them."""
        self.lengths[row] = tokens[0].shape[2]
        for layer, tokens_2GSD in enumerate(tokens):
            slab_2BGSD = self._fitted(layer, tokens_2GSD[0].transpose(0, 1))
            slab_2BGSD[:, row, :, : self.lengths[row]] = tokens_2GSD

    def extend(self, rows: Sequence[int], docs: Docs) -> Tensor:
        """Make room for a stream whose document b adds to the sequence of rows[b]; all are in the
        order that this file's head tells. Returns positions_N."""
        device = docs.cu_seqlens_B1.device
        pasts = [self.lengths[row] for row in rows]
        for row, new in zip(rows, docs.lengths, strict=True):
            self.lengths[row] += new
        kinds = [(past > 0) + (past > 0 and new == 1)
                 for past, new in zip(pasts, docs.lengths, strict=True)]
        assert kinds == sorted(kinds, reverse=True), "single tokens, then chunks, then prompts"
        singles, fresh = kinds.count(2), kinds.count(0)
        self.fresh = Docs.from_lengths(docs.lengths[-fresh:], device) if fresh else None
        borders = pairwise(accumulate(docs.lengths, initial=0))
        self.chunks = [*zip(rows, borders, strict=True)][singles : len(kinds) - fresh]
        # of every row, those that have no single token too: they are asked in vain, by the first
        place = {row: index for index, row in enumerate(rows[:singles])}
        self.num_singles, B = singles, rounded(len(self.lengths), least=1)
        lengths = [self.lengths[row] if row in place else 1 for row in range(B)]
        self.lengths_B, self.asked_B = torch.tensor(
            [lengths, [place.get(row, 0) for row in range(B)]], device=device)
        past_B, row_B = torch.tensor([pasts, [*rows]], device=device)
        doc_N = docs.doc_of_N()
        self.rows_N, self.slots_N = row_B[doc_N], docs.positions_N() + past_B[doc_N]
        return self.slots_N

    def _fitted(self, layer: int, k_NGD: Tensor) -> Tensor:
        """The slab of a layer, made anew where it has too few rows, or too few or many slots."""
        slab_2BGSD, rows = self.slabs[layer], len(self.lengths)
        slots, (_, G, D) = -(-max(self.lengths) // SLOTS) * SLOTS, k_NGD.shape
        if (slab_2BGSD is None or slab_2BGSD.shape[1] < rows
                or not slots <= slab_2BGSD.shape[3] < 2 * slots):
            # Zeros, since an unused slot has weight 0 in the products but must be finite.
            new_2BGSD = k_NGD.new_zeros(2, rounded(rows), G, slots, D)
            if slab_2BGSD is not None:
                kept = slab_2BGSD[:, :rows, :, :slots]
                new_2BGSD[:, : kept.shape[1], :, : kept.shape[3]] = kept
            slab_2BGSD = self.slabs[layer] = new_2BGSD
        return slab_2BGSD

    def _attend(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs,
                **rule: float | None) -> Tensor:
        """Store the new keys and values, return o_NHD; `rule`: scale, window, softcap, impl."""
        slab_2BSGD, N = self._fitted(layer, k_NGD).transpose(2, 3), len(self.rows_N)
        slab_2BSGD[:, self.rows_N, self.slots_N] = torch.stack((k_NGD[:N], v_NGD[:N]))
        parts = []
        if self.num_singles:
            # cost: all slots, which lie together: some alone take 1.5 to 10 times as long in bf16
            k_BSGD, v_BSGD = slab_2BSGD[:, : len(self.lengths_B)]
            q_BHD = q_NHD.index_select(0, self.asked_B)
            o_BHD = attention_decode(q_BHD, k_BSGD, v_BSGD, self.lengths_B, **rule)
            parts.append(o_BHD.index_select(0, self.rows_N[: self.num_singles]))
        for row, (start, stop) in self.chunks:
            k_SGD, v_SGD = slab_2BSGD[:, row, : self.lengths[row]]
            parts.append(attention_chunk(q_NHD[start:stop], k_SGD, v_SGD, **rule))
        if self.fresh is not None:
            new = (x_NHD[N - self.fresh.num_tokens : N] for x_NHD in (q_NHD, k_NGD, v_NGD))
            parts.append(attention(*new, self.fresh, is_causal=True, **rule))
        parts += [q_NHD[N:]] * (len(q_NHD) > N)  # the filling of `Docs.num_rows`
        return parts[0] if len(parts) == 1 else torch.cat(parts)
