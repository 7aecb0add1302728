"""The document plan of a flat token stream: the one batch form (no padding, no attention mask).

A batch of B documents of lengths T_0 .. T_{B-1} is one stream of N = sum T_b tokens. `Docs` is
built once per batch and read by every attention call of every layer.

The CPU path of attention wants few matrix products, little filling, and few shapes: oneDNN compiles
the code of every shape of a product anew, for 0.3 to 0.6 ms and 0.7 MiB. So documents share blocks
with others of about their length, and the length of a block is rounded up; so is the number of rows
that a stream has in the layers' products (`rounded`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate, pairwise
import torch
from torch import Tensor

SHORT = 512  # tokens; documents are short below it on average, each token's own counted
LONG = 512  # tokens; longer documents share a block with those of their very length alone
BLOCK_COST = 6144  # scores of a head that take as long as one more block
BLOCK_SCORES = 2**16  # of a head, in a block of several documents: more would leave the cache

@cache
def rounded(count: int, *, steps: int = 8, least: int = 8) -> int:
    """`count` up to one of `steps` sizes in every octave, which are `least` apart or more."""
    octave = 1 << max(count - 1, 1).bit_length() - 1
    grain = max(octave // steps, least)
    return -(-count // grain) * grain

@dataclass(frozen=True, eq=False)
class Group:
    """Documents that the CPU path attends in one call, as a block of `num_docs` x `length`.

    num_docs    rows of the block, of which some may hold no document
    slots       place in the block of each token (int64)
    tokens      token of the group for each place (int64), the first one of its document, or of the
                group, where the place is filling
    lengths_B   document lengths (int64), 1 for no document, or None when all are `length` long
    hidden      masks by the rule that attention formed them for; all layers share them
    by_heads    what `rows_of` found, by number of heads; all layers share it"""
    num_docs: int
    length: int
    slots: Tensor
    tokens: Tensor
    lengths_B: Tensor | None
    hidden: dict[tuple[bool, int], Tensor | None] = field(default_factory=dict)
    by_heads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rows_of(self, H: int) -> tuple[Tensor, Tensor]:
        """For H heads a token: row of the group's tokens, as (N H, D), for each row of a block, as
        (B H T, D), and the other way."""
        if H not in self.by_heads:
            head_H = torch.arange(H, device=self.slots.device)
            to_block = self.tokens.view(self.num_docs, 1, self.length) * H + head_H[:, None]
            first_of_N1 = (self.slots // self.length * H)[:, None]
            to_stream = (first_of_N1 + head_H) * self.length + (self.slots % self.length)[:, None]
            self.by_heads[H] = to_block.flatten(), to_stream.flatten()
        return self.by_heads[H]

@dataclass(frozen=True, eq=False)
class Docs:
    """Borders of the documents in a flat stream of N tokens.

    lengths         tokens of each document, in stream order, each >= 1
    cu_seqlens_B1   int32 (B + 1,): document b is rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1
    by_tiling       what `tiles` found, by its arguments; all layers share it"""
    lengths: tuple[int, ...]
    cu_seqlens_B1: Tensor
    by_tiling: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)

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
    def walk(self) -> tuple[tuple[Group, ...], Tensor | None]:
        """How the CPU path walks the documents, in blocks, the longest first, and the stream's rows
        in that order (int64), None if it is the stream's."""
        device, groups, order = self.cu_seqlens_B1.device, [], []
        lengths = torch.tensor([*self.lengths, 0])  # the last document has no tokens: it is filling
        starts = lengths.cumsum(0) - lengths
        for length, members in _blocks(self.lengths):
            count = len(members) if length > LONG else rounded(len(members), steps=2, least=1)
            rows_B = [*members, *[self.num_docs] * (count - len(members))]
            lengths_B, column_T = lengths[rows_B], torch.arange(length)
            inside_BT = column_T < lengths_B[:, None]
            slots_N = inside_BT.flatten().nonzero().squeeze(1)
            order.append((starts[rows_B][:, None] + column_T)[inside_BT])
            first_B = (lengths_B.cumsum(0) - lengths_B) * (lengths_B > 0)
            tokens = (first_B[:, None] + column_T * inside_BT).flatten().to(device)
            lengths_B = None if inside_BT.all() else lengths_B.clamp(min=1).to(device)
            groups.append(Group(count, length, slots_N.to(device), tokens, lengths_B))
        is_sorted = all(a >= b for a, b in pairwise(self.lengths))
        return tuple(groups), None if is_sorted else torch.cat(order).to(device)

    @property
    def num_docs(self) -> int:
        """B, the number of documents."""
        return len(self.lengths)

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

def _blocks(lengths: tuple[int, ...]) -> Iterator[tuple[int, list[int]]]:
    """Blocks as their length and their documents, in descending order of both."""
    classes: dict[int, list[int]] = {}
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        length = lengths[b] if lengths[b] > LONG else rounded(lengths[b])
        classes.setdefault(length, []).append(b)
    yield from (block for block in classes.items() if block[0] > LONG)
    short = [length for length in classes if length <= LONG]
    for first, past in _cheapest([(length, len(classes[length])) for length in short]):
        members = [b for length in short[first:past] for b in classes[length]]
        most = _most(short[first])
        for start in range(0, len(members), most):
            yield rounded(lengths[members[start]]), members[start : start + most]

def _most(length: int) -> int:
    """Documents of a block of this length: one of the numbers that blocks are filled up to."""
    most = max(1, BLOCK_SCORES // length**2)
    while rounded(most, steps=2, least=1) > most:
        most -= 1
    return most

def _cheapest(classes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Which neighbours among classes of (length, documents), the longest first, share blocks.

    returns     first and past of each run of classes; the least cost of all ways to cut them"""
    best = [(0, [])]  # of the first so many classes: the least cost, and its runs
    for past in range(1, len(classes) + 1):
        ways, count = [], 0
        for first in reversed(range(past)):
            length, documents = classes[first]
            count += documents
            blocks = -(-count // _most(length))
            ways.append((best[first][0] + blocks * BLOCK_COST + count * length**2, first))
        cost, first = min(ways)
        best.append((cost, [*best[first][1], (first, past)]))
    return best[-1][1]
