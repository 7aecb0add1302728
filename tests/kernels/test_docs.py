"""kernels/docs.py: borders, positions and the plan of the CPU path."""

import random
from collections.abc import Sequence
from itertools import combinations, pairwise
import pytest
import torch
from kernels.docs import (
    BLOCK_COST,
    BLOCK_SCORES,
    LEAST,
    LONG,
    Docs,
    _cheapest,
    _most,
    pack,
    rounded,
)

def test_borders_and_positions() -> None:
    docs = Docs.from_lengths([2, 1, 3])
    assert docs.cu_seqlens_B1.tolist() == [0, 2, 3, 6]
    assert docs.cu_seqlens_B1.dtype == torch.int32
    assert docs.positions_N().tolist() == [0, 1, 0, 0, 1, 2]
    assert docs.doc_of_N().tolist() == [0, 0, 1, 2, 2, 2]
    assert docs.first_B().tolist() == [0, 2, 3]
    assert docs.last_B().tolist() == [1, 2, 5]
    assert (len(docs.lengths), docs.num_tokens) == (3, 6)

@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_refuses_empty_documents(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="document lengths must be >= 1"):
        Docs.from_lengths(lengths)

def forms(docs: Docs) -> list[tuple[int, ...]]:
    """First place, bins and width of each block, and the documents that it holds."""
    return [
        (group.first, *group.doc_BT.shape, len(group.doc_BT[group.doc_BT >= 0].unique()))
        for group in docs.walk[0]
    ]

def test_short_documents_share_bins() -> None:
    docs = Docs.from_lengths([2, 20, 30, 9, 1])
    assert forms(docs) == [(0, 2, LEAST, 5)]
    ((group,), (place_N, start_N, length_N)) = docs.walk
    first, second = group.doc_BT.tolist()
    assert first == [2] * 30 + [0] * 2
    assert second == [1] * 20 + [3] * 9 + [4] + [-1] * 2
    rows = [*range(22, 52), 0, 1, *range(2, 22), *range(52, 62), 2, 2]
    assert group.token_BT.flatten().tolist() == rows
    assert place_N.tolist() == [30, 31, *range(32, 52), *range(30), *range(52, 62)]
    assert start_N.tolist() == [0] * 2 + [32] * 20 + [0] * 30 + [32] * 10
    assert length_N.unique().tolist() == [LEAST]

def test_documents_apart_have_a_bin_each() -> None:
    docs = Docs.from_lengths([2, 20, 30, 9, 1]).apart
    assert forms(docs) == [(0, 5, LEAST, 5)]
    assert docs.walk[0][0].token_BT[2].tolist() == [*range(52, 61), *[52] * (LEAST - 9)]

@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("more", [0, 5])
def test_rows_find_their_way_to_the_blocks_and_back(heads: int, more: int) -> None:
    docs = Docs.from_lengths([3, LONG + 4, 40, 7, LONG + 4, 90])
    N = docs.num_tokens + more
    to_blocks, to_stream = docs.rows_of(heads, N)
    assert to_blocks[to_stream[: docs.num_tokens * heads]].tolist() == [
        *range(docs.num_tokens * heads)
    ]
    assert to_stream[docs.num_tokens * heads :].tolist() == [len(to_blocks)] * more * heads
    for group in docs.walk[0]:  # by bins, then heads, then places
        (rows,) = group.of([to_blocks[:, None]], [heads], 1)
        token_BT = group.token_BT.clamp(min=0)
        wanted = torch.stack([token_BT * heads + head for head in range(heads)], dim=1)
        assert rows.view(wanted.shape).equal(wanted)

def test_long_documents_and_short_ones() -> None:
    """Above LONG, widths are not rounded, and a bin is a block."""
    docs = Docs.from_lengths([LONG + 1, 3, LONG + 1, 300, LONG + 9, 40])
    places = [0, LONG + 9, 2 * LONG + 10, 3 * LONG + 11]
    assert forms(docs) == [
        (places[0], 1, LONG + 9, 1),
        (places[1], 1, LONG + 1, 1),
        (places[2], 1, LONG + 1, 1),
        (places[3], 1, 320, 1),
        (places[3] + 320, 2, 40, 2),
    ]
    assert [group.is_whole for group in docs.walk[0]] == [True, True, True, False, False]

@pytest.mark.parametrize("length", range(40, LONG + 1, 24))
def test_a_block_stays_in_the_cache(length: int) -> None:
    docs = Docs.from_lengths([length] * 70)
    assert sum(count for *_, count in forms(docs)) == 70
    for _, bins, width, _ in forms(docs):
        assert bins * width**2 <= BLOCK_SCORES or bins == 1
    # none of these has a bin of filling
    assert all(bins == count for _, bins, _, count in forms(docs)[:-1])

@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_is_cheaper(seed: int) -> None:
    draw = random.Random(seed)
    widths = sorted(draw.sample(range(LEAST, 200, 8), 6), reverse=True)
    widths = [rounded(width) for width in widths]
    lengths = sorted(
        (width - draw.randrange(7) for width in {*widths} for _ in range(draw.randint(1, 9))),
        reverse=True,
    )

    def cost(runs: Sequence[tuple[int, int]]) -> int:
        total = 0
        for first, past in runs:
            width = max(LEAST, rounded(lengths[first]))
            longer = sum(2 * length > width for length in lengths[first:past])
            bins = max(-(-sum(lengths[first:past]) // width), longer)
            total += -(-bins // _most(width)) * BLOCK_COST + bins * width**2
        return total

    n = len(lengths)
    inner = [i for i in range(1, n) if rounded(lengths[i]) != rounded(lengths[i - 1])]
    ways = [
        [*pairwise([0, *cuts, n])]
        for count in range(len(inner) + 1)
        for cuts in combinations(inner, count)
    ]
    assert cost(_cheapest(lengths)) == min(map(cost, ways))

def test_sizes_are_rounded_up_to_few() -> None:
    assert [rounded(n) for n in (1, 8, 9, 64, 65, 128, 129, 300, 512)] == [
        8, 8, 16, 64, 72, 128, 144, 320, 512,
    ]  # fmt: skip
    sizes = [rounded(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes) and all(0 <= s - n < 8 + n / 8 for n, s in enumerate(sizes, 1))
    assert len({size for size in sizes if 256 < size <= 512}) == 8
    assert [rounded(n, steps=2, least=1) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert Docs.from_lengths([250, 20]).num_rows == rounded(270) == 288

def test_a_block_has_one_of_few_numbers_of_bins() -> None:
    """What is filling is of no document; attention reads the stream's first row there."""
    docs = Docs.from_lengths([40] * 9)
    assert forms(docs) == [(0, 10, 40, 9)]
    ((group,), _) = docs.walk
    assert group.doc_BT[-1].tolist() == [-1] * 40 and group.token_BT[-1].tolist() == [0] * 40

@pytest.mark.parametrize("budget", [1, 7, 64, 512, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_no_document_is_lost_and_no_stream_is_over_budget(budget: int, seed: int) -> None:
    draw = random.Random(seed)
    lengths = [min(int(draw.paretovariate(0.8) * 4), 700) for _ in range(200)]
    streams = pack(lengths, budget)
    assert sorted(index for stream in streams for index in stream) == list(range(200))
    for stream in streams:
        assert sum(lengths[index] for index in stream) <= budget or len(stream) == 1
        assert stream == sorted(stream, key=lambda index: (-lengths[index], index))
    longer = {index for index, length in enumerate(lengths) if length > budget}
    assert all([index] in streams for index in longer)  # longer than the budget: alone
    # Best fit leaves no two streams that would go into one.
    sums = sorted(sum(lengths[index] for index in stream) for stream in streams)
    assert len(sums) < 2 or sums[0] + sums[1] > budget

def test_a_packing_worked_by_hand() -> None:
    # 6, then 5 in a new one; 4 fills the first, 3 and 2 the second; 1 needs a third.
    assert pack([3, 6, 1, 5, 4, 2], 10) == [[1, 4], [3, 0, 5], [2]]
    assert pack([5, 5, 5], 10) == [[0, 1], [2]] and pack([11], 10) == [[0]] and pack([], 10) == []

def test_packing_is_deterministic() -> None:
    lengths = [random.Random(n).randint(1, 9) for n in range(100)]
    assert pack(lengths, 20) == pack(list(lengths), 20) == pack(tuple(lengths), 20)
