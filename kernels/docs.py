"""The document plan of a flat token stream: the one batch form (no padding, no attention mask).

A batch of B documents of lengths T_0 .. T_{B-1} is one stream of N = sum T_b tokens. `Docs` is
built once per batch and read by every attention call of every layer.

The CPU path of attention wants few large matrix products, and little filling. Measured in bf16,
forward and backward: a stream of few short documents is fastest as one (B, T) block, documents up
to 128 tokens of a longer stream scattered into a block for each class of length, longer ones alone,
or with neighbours of equal length as a view. A stream of equal lengths needs no copy at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

SCATTER_LENGTHS = (16, 32, 64, 128)  # tokens; longest document of each shared block
ONE_BLOCK = 1024  # tokens, filling included; short documents that fit are one shared block


@dataclass(frozen=True, eq=False)
class Group:
    """Documents that the CPU path attends in one call, as a block of `num_docs` x `length`.

    num_tokens  of the documents together
    slots       row of the block for each token (int64), or None when the tokens fill the block
    rows        token of the group for each row of the block (int64), the first one of its document
                where the row is filling; None with `slots`
    lengths_B   document lengths (int64), or None when every document is `length` long
    hidden      masks by the rule that attention formed them for; all layers share them
    """

    num_docs: int
    length: int
    num_tokens: int
    slots: Tensor | None = None
    rows: Tensor | None = None
    lengths_B: Tensor | None = None
    hidden: dict[tuple[bool, int], Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Docs:
    """Borders of the documents in a flat stream of N tokens.

    lengths         tokens of each document, in stream order, each >= 1
    cu_seqlens_B1   int32 (B + 1,): document b is rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1
    groups          how the CPU path walks the documents
    order_N         stream rows in the order of the groups (int64), None if that is the stream's
    """

    lengths: tuple[int, ...]
    cu_seqlens_B1: Tensor
    groups: tuple[Group, ...]
    order_N: Tensor | None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Docs":
        """Plan a stream from document lengths (tokens).

        raises  ValueError: no document, or one of length zero
        """
        lengths = tuple(int(length) for length in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"document lengths must be >= 1 and at least one, got {lengths}")
        borders = [0, *accumulate(lengths)]
        groups, order_N = _plan_groups(lengths, borders, device)
        cu_seqlens_B1 = torch.tensor(borders, dtype=torch.int32, device=device)
        return cls(lengths, cu_seqlens_B1, groups, order_N)

    @property
    def num_docs(self) -> int:
        """B, the number of documents."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """N, the length of the stream in tokens."""
        return sum(self.lengths)

    def positions_N(self) -> Tensor:
        """int64 position of each token inside its document: 0 .. T_b - 1, restarting."""
        device = self.cu_seqlens_B1.device
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])

    def doc_of_N(self) -> Tensor:
        """int64 index of the document that each token belongs to."""
        device = self.cu_seqlens_B1.device
        lengths_B = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(torch.arange(self.num_docs, device=device), lengths_B)

    def last_B(self) -> Tensor:
        """int64 stream row of each document's last token."""
        return self.cu_seqlens_B1[1:].long() - 1

    def first_B(self) -> Tensor:
        """int64 stream row of each document's first token."""
        return self.cu_seqlens_B1[:-1].long()

    def to(self, device: torch.device | str) -> "Docs":
        """The same plan with its tensors on `device`."""
        if self.cu_seqlens_B1.device == torch.device(device):
            return self
        return Docs.from_lengths(self.lengths, device)


def _plan_groups(
    lengths: tuple[int, ...], borders: list[int], device: torch.device | str
) -> tuple[tuple[Group, ...], Tensor | None]:
    """Short documents in blocks by class of length; runs of equal long ones as views."""
    all_equal = len(set(lengths)) == 1  # one run, a plain view
    classes = SCATTER_LENGTHS
    if len(lengths) * min(max(lengths), classes[-1]) <= ONE_BLOCK:
        classes = classes[-1:]
    short: dict[int, list[int]] = {longest: [] for longest in classes}
    runs: list[list[int]] = []
    for b, length in enumerate(lengths):
        longest = next((longest for longest in short if length <= longest), None)
        if longest is not None and not all_equal:
            short[longest].append(b)
        elif runs and runs[-1][-1] == b - 1 and lengths[b - 1] == length:
            runs[-1].append(b)
        else:
            runs.append([b])
    groups = [Group(len(run), lengths[run[0]], len(run) * lengths[run[0]]) for run in runs]
    order = [torch.arange(borders[r[0]], borders[r[-1] + 1], device=device) for r in runs]
    for members in filter(None, short.values()):
        lengths_B = torch.tensor([lengths[b] for b in members], device=device)
        starts_B = torch.tensor([borders[b] for b in members], device=device)
        column_T = torch.arange(int(lengths_B.max()), device=device)
        inside_BT = column_T[None] < lengths_B[:, None]
        first_slots_B = torch.arange(len(members), device=device) * len(column_T)
        slots_N = (first_slots_B[:, None] + column_T)[inside_BT]
        order.append((starts_B[:, None] + column_T)[inside_BT])
        first_B1 = (lengths_B.cumsum(0) - lengths_B)[:, None]
        rows = torch.where(inside_BT, first_B1 + column_T, first_B1).flatten()
        form = len(members), len(column_T), len(slots_N)
        is_full = len(slots_N) == len(rows)
        groups.append(Group(*form) if is_full else Group(*form, slots_N, rows, lengths_B))
    return tuple(groups), None if len(groups) == 1 else torch.cat(order)
