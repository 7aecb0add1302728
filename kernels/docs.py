"""The document plan of a flat token stream: the one batch form (no padding, no attention mask).

A batch of B documents of lengths T_0 .. T_{B-1} is one stream of N = sum T_b tokens. `Docs` is
built once per batch and read by every attention call of every layer.

The CPU path of attention wants few matrix products, little filling, and few shapes: oneDNN compiles
the code of every shape of a product anew, for 0.3 to 0.6 ms and 0.6 MiB. So documents lie in bins,
one behind the other, and a mask parts them; bins of one width, of which there are few, are a block.
The number of rows that a stream has in the layers' products is rounded up too (`rounded`)."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
import torch
from torch import Tensor

SHORT = 512  # tokens; documents are short below it on average, each token's own counted
LEAST = 32  # tokens of a bin; narrower ones cost more than the scores that they save
LONG = 512  # tokens; the width of a bin that begins with a longer document is not rounded
BLOCK_COST = 6144  # scores of a head that take as long as one more block
STEPS = 4  # numbers of bins in every octave
BLOCK_SCORES = 2**16  # of a head, in a block of several bins: more would leave the cache

@cache
def rounded(count: int, *, steps: int = 8, least: int = 8) -> int:
    """`count` up to one of `steps` sizes in every octave, which are `least` apart or more."""
    octave = 1 << max(count - 1, 1).bit_length() - 1
    grain = max(octave // steps, least)
    return -(-count // grain) * grain

@dataclass(frozen=True, eq=False)
class Group:
    """A block of bins that the CPU path attends in one call.

    first       its first place among those of all blocks
    token_BT    row of the stream in each place (int64), the bin's first where it is filling
    doc_BT      number of the document in each place (int64), -1 where it is filling
    is_whole    whether each bin is one document
    hidden      masks by the rule that attention formed them for; all layers share them"""
    first: int
    token_BT: Tensor
    doc_BT: Tensor
    is_whole: bool
    hidden: dict[tuple[bool, int], Tensor | None] = field(default_factory=dict)

    def of(self, rows: Iterable[Tensor], heads: Iterable[int], G: int) -> list[Tensor]:
        """Its rows of all blocks', (n, D), as (B G, Z, D), of so many heads each."""
        B, T = self.doc_BT.shape
        return [x_nD.narrow(0, self.first * H, B * T * H).view(B * G, -1, x_nD.shape[1])
                for x_nD, H in zip(rows, heads, strict=True)]

@dataclass(frozen=True, eq=False)
class Docs:
    """Borders of the documents in a flat stream of N tokens.

    lengths         tokens of each document, in stream order, each >= 1
    cu_seqlens_B1   int32 (B + 1,): document b is rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1
    is_apart        whether each has a bin of its own, where what is not finite stays
    by_tiling       what `tiles` found, by its arguments; all layers share it
    by_heads        what `rows_of` found, by its arguments; all layers share it"""
    lengths: tuple[int, ...]
    cu_seqlens_B1: Tensor
    is_apart: bool = False
    by_tiling: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)
    by_heads: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Docs":
        """Plan a stream from document lengths (tokens).

        raises  ValueError: no document, or one of length zero"""
        lengths = tuple(int(length) for length in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"document lengths must be >= 1 and at least one, got {lengths}")
        borders = [0, *accumulate(lengths)]
        return cls(lengths, torch.tensor(borders, dtype=torch.int32, device=device))

    @cached_property
    def apart(self) -> "Docs":
        return Docs(self.lengths, self.cu_seqlens_B1, is_apart=True)

    @cached_property
    def walk(self) -> tuple[tuple[Group, ...], Tensor]:
        """How the CPU path walks the documents: blocks, the longest documents first; and of each
        row of the stream its place in them, the first place of its bin and the bin's length."""
        found, forms, first = [()] * len(self.lengths), [], 0
        for length, bins in _blocks(self.lengths, self.is_apart):
            for number, members in enumerate(bins):
                place = start = first + number * length
                for b in members:
                    found[b] = place, start, length
                    place += self.lengths[b]
            forms.append((first, rounded(len(bins), steps=STEPS, least=1), length))
            first += math.prod(forms[-1][1:])
        doc_N = self.doc_of_N()
        places_3N = torch.tensor(found, device=doc_N.device).T[:, doc_N]
        places_3N[0] += self.positions_N()
        token_n, groups = doc_N.new_full((first,), -1), []
        token_n[places_3N[0]] = torch.arange(self.num_tokens, device=doc_N.device)
        for first, *shape in forms:
            token_BT = token_n[first:][: math.prod(shape)].view(shape)
            doc_BT = doc_N[token_BT].where(token_BT >= 0, -1)
            token_BT = token_BT.where(token_BT >= 0, token_BT[:, :1].clamp(min=0))
            groups.append(Group(first, token_BT, doc_BT, bool((doc_BT == doc_BT[:, :1]).all())))
        return tuple(groups), places_3N

    def rows_of(self, H: int, N: int) -> tuple[Tensor, Tensor]:
        """For H heads a token: row of a stream of N, as (N H, D), for each row of the blocks, as
        (n, D), and the other way, n for rows past the documents."""
        if (H, N) not in self.by_heads:
            groups, (place_N, start_N, length_N) = self.walk
            head_H = torch.arange(H, device=place_N.device)
            to_blocks = torch.cat([(group.token_BT[:, None] * H + head_H[:, None]).flatten()
                                   for group in groups])
            first_NH = (start_N * H + place_N - start_N)[:, None] + length_N[:, None] * head_H
            past = to_blocks.new_full(((N - self.num_tokens) * H,), len(to_blocks))
            self.by_heads[H, N] = to_blocks, torch.cat([first_NH.flatten(), past])
        return self.by_heads[H, N]

    @property
    def num_tokens(self) -> int:
        """N, the length of the stream in tokens."""
        return sum(self.lengths)

    @cached_property
    def is_short(self) -> bool:
        """Whether the documents are short, for the choice of tiles."""
        return sum(length * length for length in self.lengths) < SHORT * self.num_tokens

    @property
    def num_rows(self) -> int:
        """Rows of the stream in the products of a CPU: N rounded up. Those past the last document
        belong to none, and nobody reads them."""
        return rounded(self.num_tokens, least=4)

    def positions_N(self) -> Tensor:
        """int64 position of each token inside its document: 0 .. T_b - 1, restarting."""
        row_N = torch.arange(self.num_tokens, device=self.cu_seqlens_B1.device)
        return row_N - self.first_B()[self.doc_of_N()]

    def doc_of_N(self) -> Tensor:
        """int64 index of the document that each token belongs to."""
        lengths_B = self.cu_seqlens_B1.diff().long()
        # cost: told the size, a GPU need not be waited for
        return torch.repeat_interleave(lengths_B, output_size=self.num_tokens)

    def last_B(self) -> Tensor:
        """int64 stream row of each document's last token."""
        return self.cu_seqlens_B1[1:].long() - 1

    def first_B(self) -> Tensor:
        """int64 stream row of each document's first token."""
        return self.cu_seqlens_B1[:-1].long()

    def tiles(self, rows: int, columns: int, *, back: int, ahead: int) -> Tensor:
        """How the GPU path walks the scores: tiles of `rows` rows, each of one document.

        columns         of a step; a row sees the `back` columns before its own and `ahead` after
        returns         int32 (tiles, 6), the longest first: the first row; the document's past row;
                        the first column that any row sees; the columns from and up to which whole
                        steps are seen by every row; the past column that any row sees"""
        key = rows, columns, back, ahead
        if key not in self.by_tiling:
            self.by_tiling[key] = _plan_tiles(self.lengths, *key).to(self.cu_seqlens_B1.device)
        return self.by_tiling[key]

    def to(self, device: torch.device | str) -> "Docs":
        """The same plan with its tensors on `device`."""
        if self.cu_seqlens_B1.device == torch.device(device):
            return self
        return Docs.from_lengths(self.lengths, device)

def _plan_tiles(lengths: tuple[int, ...], rows: int, columns: int, back: int, ahead: int) -> Tensor:
    """The table of `Docs.tiles`, on the CPU."""
    lengths_B = torch.tensor(lengths)
    counts_B = (lengths_B + rows - 1) // rows
    doc = torch.repeat_interleave(counts_B)
    index = torch.arange(len(doc)) - (counts_B.cumsum(0) - counts_B)[doc]
    past = lengths_B.cumsum(0)[doc]
    start = past - lengths_B[doc]
    row = start + index * rows
    last = torch.minimum(row + rows, past) - 1
    first, stop = torch.maximum(start, row - back), torch.minimum(past, last + ahead + 1)
    # What every row sees begins at the last row's first column and ends at the first row's last.
    late, early = torch.maximum(start, last - back), torch.minimum(past, row + ahead + 1)
    whole = first + (late - first + columns - 1) // columns * columns
    edge = whole + (early - whole).clamp(min=0) // columns * columns
    table = torch.stack([row, past, first, whole, edge, stop], dim=1)
    return table[(stop - first).argsort(descending=True, stable=True)].int()

def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` tokens by best-fit decreasing, as indices into `lengths`, longest
    first; a longer document gets a bin of its own."""
    bins: dict[int, list[int]] = {}
    free: list[tuple[int, int]] = []  # room and number of each bin, the least room first
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        best = bisect_left(free, (lengths[index],))
        room, number = free.pop(best) if best < len(free) else (capacity, len(bins))
        bins.setdefault(number, []).append(index)
        insort(free, (room - lengths[index], number))
    return [*bins.values()]

def _width(length: int) -> int:  # of the bins that begin with such a document
    return length if length > LONG else max(LEAST, rounded(length))

def _blocks(lengths: tuple[int, ...], is_apart: bool) -> Iterator[tuple[int, list[list[int]]]]:
    """Blocks as their width and the documents of each bin, the longest first."""
    order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    for first, past in _cheapest([lengths[b] for b in order]):
        members, width = order[first:past], _width(lengths[order[first]])
        bins, most = pack([lengths[b] for b in members], 0 if is_apart else width), _most(width)
        for start in range(0, len(bins), most):
            yield width, [[members[i] for i in each] for each in bins[start : start + most]]

def _most(width: int) -> int:
    """Bins of a block of this width: a power of two, so that a full one is not filled up."""
    return 1 << max(1, BLOCK_SCORES // width**2).bit_length() - 1

def _cheapest(lengths: list[int]) -> list[tuple[int, int]]:
    """Which documents, the longest first, share bins: first and past of each run. The least cost
    of all ways to cut between widths, for as many bins as the tokens and the longer half need."""
    n, tokens = len(lengths), [0, *accumulate(lengths)]
    cuts = [0, *(i for i in range(1, n) if _width(lengths[i]) != _width(lengths[i - 1])), n]
    best = {0: (0, [])}  # of the first so many documents: the least cost, and its runs
    for past in cuts[1:]:
        ways = []
        for first in cuts[: cuts.index(past)]:
            width = _width(lengths[first])
            halves = bisect_left(lengths, -width / 2, first, past, key=lambda x: -x) - first
            bins = max(-(-(tokens[past] - tokens[first]) // width), halves)
            blocks = -(-bins // _most(width))
            ways.append((best[first][0] + blocks * BLOCK_COST + bins * width**2, first))
        cost, first = min(ways)
        best[past] = cost, [*best[first][1], (first, past)]
    return best[n][1]
