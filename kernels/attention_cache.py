"""Keys and values of sequences that join, grow and leave at any time, for attention over them.

A step is one flat stream of new tokens: first the single ones of sequences that are decoding, then
chunks of prompts of which a part is cached, then prompts from their start. Letters: N tokens of the
stream, B sequences, S slots, H query heads, G key/value heads, D head width."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
import torch
from torch import Tensor
from kernels.attention import attention
from kernels.attention_decode import attention_chunk, attention_decode
from kernels.docs import Docs, rounded
from kernels.graph import Replays

# A slab grows to sizes so far apart, and of so many in an octave: attention on a CPU costs all of
# it; on a GPU a new one costs new graphs.
SLOTS = {"cpu": {"least": 64}, "cuda": {"least": 256, "steps": 2}}

class Cache:
    """Keys and values of B sequences, each a row of one contiguous slab per layer.

    lengths     cached tokens of each row, those of the current stream too
    memory      2 L B S G D values: B up to the next of `rounded`, S up to the next by `SLOTS`
    layout      2BGSD, whose products in decoding need no copy
    replays     the passes of single tokens, on a GPU"""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.device, self.replays = device, Replays() if device.type == "cuda" else None
        self.slabs: list[Tensor | None] = [None] * num_layers
        self.lengths: list[int] = []

    @property
    def attends(self) -> list[Callable[..., Tensor]]:
        """The attention of each layer over its slab, for one `Transformer.forward`, whose layers
        share masks; not kept, since a cycle of references would keep the slabs."""
        masks = {}
        return [partial(self._attend, layer, masks) for layer in range(len(self.slabs))]

    def join(self) -> int:
        """The row of a new sequence, behind all others."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    def leave(self, row: int) -> None:
        """Forget a sequence; the last one takes its row."""
        for tokens_2GSD in self.read(row, self.lengths[row]):
            tokens_2GSD.zero_()  # they may be what is not finite, and stay behind the next one's
        if row < (last := len(self.lengths) - 1) and self.lengths[last]:
            self.write(row, self.read(last, self.lengths[last]))
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def read(self, row: int, count: int) -> list[Tensor]:
        """The first `count` tokens of a sequence, 2GSD of each layer: views of the slabs made."""
        return [slab[:, row, :, :count] for slab in self.slabs if slab is not None]

    def write(self, row: int, tokens: Sequence[Tensor]) -> None:
        """Let a sequence be these tokens, as `read` gives them."""
        self.lengths[row] = tokens[0].shape[2]
        for layer, tokens_2GSD in enumerate(tokens):
            slab_2BGSD = self._fitted(layer, tokens_2GSD[0].transpose(0, 1), len(self.lengths))
            slab_2BGSD[:, row, :, : self.lengths[row]] = tokens_2GSD

    def extend(self, rows: Sequence[int], parts: Sequence[Sequence[int]]) -> tuple[Tensor, Docs]:
        """Make room for a stream of tokens, in which parts[b] goes on the sequence of rows[b]; all
        are in the order that this file's head tells. Returns tokens_N and their plan; positions_N
        are `slots_N`. On a GPU single tokens are filled up by the first one, again and again."""
        pasts = [self.lengths[row] for row in rows]
        kinds = [(past > 0) + (past > 0 and len(part) == 1)
                 for past, part in zip(pasts, parts, strict=True)]
        assert kinds == sorted(kinds, reverse=True), "single tokens, then chunks, then prompts"
        singles, fresh = kinds.count(2), kinds.count(0)
        self.is_replayed = self.replays is not None and singles == len(rows)
        if self.is_replayed:
            more = rounded(len(self.lengths), steps=2, least=1) - singles
            rows, pasts, parts = ([*x, *[x[0]] * more] for x in (rows, pasts, parts))
            singles += more
        docs = Docs.from_lengths([*map(len, parts)], self.device)
        spans = [range(past, past + len(part)) for past, part in zip(pasts, parts, strict=True)]
        for row, span in zip(rows, spans, strict=True):
            self.lengths[row] = span.stop
        self.fresh = Docs.from_lengths(docs.lengths[-fresh:], self.device) if fresh else None
        borders = pairwise(accumulate(docs.lengths, initial=0))
        self.chunks = [*zip(rows, borders, strict=True)][singles : len(rows) - fresh]
        # of every row, those that have no single token too: they are asked in vain, by the first
        place = {row: index for index, row in enumerate(rows[:singles])}
        B = rounded(max(singles, len(self.lengths)), least=1)
        lengths = [self.lengths[row] if row in place else 1 for row in range(B)]
        rows_N = (row for row, span in zip(rows, spans, strict=True) for _ in span)
        asked = [place.get(row, 0) for row in range(B)]
        self.table = torch.tensor([*chain(*parts, *spans), *rows_N, *lengths, *asked],
                                  device=self.device)
        tokens_N, self.slots_N, self.rows_N, self.lengths_B, self.asked = self.table.split(
            [docs.num_tokens] * 3 + [B] * 2)
        self.told, self.num_singles = self.rows_N[:singles], singles
        if self.replays is None and [*rows] == [*place] == [*range(B)]:
            self.asked = self.told = slice(B)  # cost: nothing to gather
        return tokens_N, docs

    def passed(self, run: Callable[[], Tensor]) -> Tensor:
        """What a pass over the stream of the last `extend` returns, until the next one."""
        sizes = len(self.rows_N), self.num_slots
        return self.replays(sizes, run, self.table) if self.is_replayed else run()

    @property
    def num_slots(self) -> int:
        """Of a slab that is made now."""
        return rounded(max(self.lengths), **SLOTS[self.device.type])

    def _fitted(self, layer: int, k_NGD: Tensor, rows: int) -> Tensor:
        """The slab of a layer, made anew where it has too few rows, or too few or many slots."""
        slab_2BGSD, slots, (_, G, D) = self.slabs[layer], self.num_slots, k_NGD.shape
        if (slab_2BGSD is None or slab_2BGSD.shape[1] < rows
                or not slots <= slab_2BGSD.shape[3] < 2 * slots):
            # Zeros, since an unused slot has weight 0 in the products but must be finite.
            new_2BGSD = k_NGD.new_zeros(2, rounded(rows), G, slots, D)
            if slab_2BGSD is not None:
                kept = slab_2BGSD[:, :rows, :, :slots]
                new_2BGSD[:, : kept.shape[1], :, : kept.shape[3]] = kept
            slab_2BGSD = self.slabs[layer] = new_2BGSD
            if self.replays:
                self.replays.graphs.clear()
        return slab_2BGSD

    def _attend(self, layer: int, masks: dict, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor,
                docs: Docs, **rule: float | None) -> Tensor:
        """Store the new keys and values, return o_NHD; `rule`: scale, window, softcap, impl."""
        N, B = self.rows_N.shape[0], self.lengths_B.shape[0]
        slab_2BSGD = self._fitted(layer, k_NGD, B).transpose(2, 3)
        slab_2BSGD[:, self.rows_N, self.slots_N] = torch.stack((k_NGD[:N], v_NGD[:N]))
        parts = []
        if self.num_singles:
            # cost: all slots, which lie together: some alone take 1.5 to 10 times as long in bf16
            now = *slab_2BSGD[:, :B].unbind(), self.lengths_B
            parts.append(attention_decode(q_NHD[self.asked], *now, masks=masks, **rule)[self.told])
        for row, (start, stop) in self.chunks:
            k_SGD, v_SGD = slab_2BSGD[:, row, : self.lengths[row]]
            parts.append(attention_chunk(q_NHD[start:stop], k_SGD, v_SGD, **rule))
        if self.fresh is not None:
            new = (x_NHD[N - self.fresh.num_tokens : N] for x_NHD in (q_NHD, k_NGD, v_NGD))
            parts.append(attention(*new, self.fresh, is_causal=True, **rule))
        parts += [q_NHD[N:]] * (q_NHD.shape[0] > N)  # the filling of `Docs.num_rows`
        return parts[0] if len(parts) == 1 else torch.cat(parts)
