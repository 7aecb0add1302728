"""kernels/docs.py: borders, positions and the plan of the CPU path."""

import pytest
import torch

from kernels.docs import Docs


def test_borders_and_positions() -> None:
    docs = Docs.from_lengths([2, 1, 3])
    assert docs.cu_seqlens_B1.tolist() == [0, 2, 3, 6]
    assert docs.cu_seqlens_B1.dtype == torch.int32
    assert docs.positions_N().tolist() == [0, 1, 0, 0, 1, 2]
    assert docs.doc_of_N().tolist() == [0, 0, 1, 2, 2, 2]
    assert docs.first_B().tolist() == [0, 2, 3]
    assert docs.last_B().tolist() == [1, 2, 5]
    assert (docs.num_docs, docs.num_tokens) == (3, 6)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_refuses_empty_documents(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="document lengths must be >= 1"):
        Docs.from_lengths(lengths)


def test_equal_lengths_are_one_view() -> None:
    docs = Docs.from_lengths([3, 3, 3])
    (group,) = docs.groups
    assert (group.num_docs, group.length, group.num_tokens) == (3, 3, 9)
    assert group.slots is None and group.lengths_B is None and docs.order_N is None


def test_short_documents_are_one_scattered_block() -> None:
    docs = Docs.from_lengths([2, 16, 1, 90])
    (group,) = docs.groups
    assert (group.length, group.num_tokens) == (90, 109) and docs.order_N is None
    assert group.slots.tolist() == [0, 1, *range(90, 106), 180, *range(270, 360)]
    assert group.lengths_B.tolist() == [2, 16, 1, 90]
    rows = [[0, 1], range(2, 18), [18], range(19, 109)]  # then the first of each as the filling
    assert group.rows.tolist() == sum(([*row, *[row[0]] * (90 - len(row))] for row in rows), [])


def test_short_documents_of_a_longer_stream_share_blocks_by_length() -> None:
    longer = [129, 130, 131, 132]  # 9 documents, padded to 128 more than a block holds
    docs = Docs.from_lengths([64, 2, 17, 33, 16, *longer])
    assert [(g.num_docs, g.length, g.num_tokens) for g in docs.groups] == [
        *((1, length, length) for length in longer),
        (2, 16, 18),
        (1, 17, 17),
        (2, 64, 97),
    ]
    rows = [range(132, 654), range(64, 66), range(116, 132), range(66, 83), range(64),
            range(83, 116)]  # fmt: skip
    assert docs.order_N.tolist() == [row for part in rows for row in part]


def test_long_runs_and_short_documents() -> None:
    """Equal neighbours share a view; equal documents with another between them do not."""
    docs = Docs.from_lengths([170, 170, 3, 170, 129, 1])
    forms = [(g.num_docs, g.length, g.num_tokens, g.slots is None) for g in docs.groups]
    assert forms == [(2, 170, 340, True), (1, 170, 170, True), (1, 129, 129, True),
                     (2, 3, 4, False)]  # fmt: skip
    borders = [0, 170, 340, 343, 513, 642, 643]
    rows = [list(range(borders[b], borders[b + 1])) for b in (0, 1, 3, 4, 2, 5)]
    assert docs.order_N.tolist() == sum(rows, [])
    assert docs.groups[-1].slots.tolist() == [0, 1, 2, 3]
