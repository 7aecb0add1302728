"""kernels/docs.py: borders, positions and the plan of the CPU path."""

import random
from collections.abc import Sequence
from itertools import combinations, pairwise
import pytest
import torch
from kernels.docs import BLOCK_COST, BLOCK_SCORES, LONG, Docs, _cheapest, _most, rounded

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

def test_equal_lengths_are_one_block() -> None:
    docs = Docs.from_lengths([16, 16, 16])
    ((group,), order_N) = docs.walk
    assert (group.num_docs, group.length, len(group.slots)) == (3, 16, 48)
    assert group.lengths_B is None and group.slots.equal(group.tokens) and order_N is None

def test_documents_of_about_one_length_share_a_block() -> None:
    docs = Docs.from_lengths([2, 9, 1])
    ((group,), order_N) = docs.walk  # 16 long: 9 rounded up
    assert (group.length, len(group.slots), group.lengths_B.tolist()) == (16, 12, [9, 2, 1])
    assert group.slots.tolist() == [*range(9), 16, 17, 32]
    assert order_N.tolist() == [*range(2, 11), 0, 1, 11]
    to_block, to_stream = group.rows_of(2)
    assert to_stream[:4].tolist() == [0, 16, 1, 17] and to_stream[-2:].tolist() == [64, 80]
    assert to_block[to_stream].tolist() == list(range(24))
    rows = [range(9), [9, 10], [11]]  # then the first of each as the filling
    assert group.tokens.tolist() == sum(([*row, *[row[0]] * (16 - len(row))] for row in rows), [])

def test_long_documents_and_short_ones() -> None:
    """Above LONG, blocks are of one length, not rounded; a stream in their order needs no other."""
    lengths = [LONG + 1, 3, LONG + 1, 300, LONG + 9, 40]
    docs = Docs.from_lengths(lengths)
    groups, order_N = docs.walk
    forms = [(g.num_docs, g.length, len(g.slots), g.lengths_B is None) for g in groups]
    assert forms == [
        (1, LONG + 9, LONG + 9, True),
        (2, LONG + 1, 2 * (LONG + 1), True),
        (1, 320, 300, False),
        (2, 40, 43, False),
    ]
    starts = [sum(lengths[:b]) for b in range(6)]
    rows = [range(starts[b], starts[b] + lengths[b]) for b in (4, 0, 2, 3, 5, 1)]
    assert order_N.tolist() == sum(map(list, rows), [])
    assert Docs.from_lengths(sorted(lengths, reverse=True)).walk[1] is None

@pytest.mark.parametrize("length", range(8, LONG + 1, 24))
def test_a_block_stays_in_the_cache(length: int) -> None:
    docs = Docs.from_lengths([length] * 70)
    assert sum(len(group.slots) for group in docs.walk[0]) == 70 * length
    for group in docs.walk[0]:
        assert group.num_docs * group.length**2 <= BLOCK_SCORES or group.num_docs == 1
    full = docs.walk[0][:-1]  # none of these has a document of filling
    assert all(group.num_docs * length == len(group.slots) for group in full)

@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_of_the_classes_is_cheaper(seed: int) -> None:
    draw = random.Random(seed)
    lengths = sorted(draw.sample(range(8, 200, 8), 6), reverse=True)
    classes = [(length, draw.randint(1, 9)) for length in lengths]

    def cost(borders: Sequence[int]) -> int:
        return sum(
            -(-documents // _most(length)) * BLOCK_COST + documents * length**2
            for first, past in pairwise([0, *borders, 6])
            for length, documents in [(classes[first][0], sum(n for _, n in classes[first:past]))]
        )

    ways = [cuts for n in range(6) for cuts in combinations(range(1, 6), n)]
    found = _cheapest(classes)
    assert [run for pair in found for run in pair][1:-1:2] == [first for first, _ in found[1:]]
    assert cost([first for first, _ in found[1:]]) == min(map(cost, ways))

def test_sizes_are_rounded_up_to_few() -> None:
    assert [rounded(n) for n in (1, 8, 9, 64, 65, 128, 129, 300, 512)] == [
        8, 8, 16, 64, 72, 128, 144, 320, 512,
    ]  # fmt: skip
    sizes = [rounded(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes) and all(0 <= s - n < 8 + n / 8 for n, s in enumerate(sizes, 1))
    assert len({size for size in sizes if 256 < size <= 512}) == 8
    assert [rounded(n, steps=2, least=1) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert Docs.from_lengths([250, 20]).num_rows == rounded(270) == 288

def test_a_block_has_one_of_few_numbers_of_documents() -> None:
    """What is filling reads the group's first token, and nothing reads it."""
    docs = Docs.from_lengths([8, 8, 8, 7, 7])
    ((group,), order_N) = docs.walk
    assert (group.num_docs, len(group.slots)) == (6, 38) and order_N is None
    assert group.lengths_B.tolist() == [8, 8, 8, 7, 7, 1]
    assert group.tokens[-8:].tolist() == [0] * 8 and group.slots.max() == 38
