"""Streams within their budget, nothing lost, and the batch that is made of one."""

import random
import numpy as np
import pytest
import torch
from ftcore.data.pack import Encoded, collate, pack, prefix_tree, split

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

def test_a_split_worked_by_hand() -> None:
    # 9 | 7; 5 to the second (7 < 9), 4 to the first (9 < 12), 1 to the second (12 < 13).
    assert split([4, 9, 1, 7, 5], 2) == [[0, 1], [2, 3, 4]]
    assert split([3, 2], 3) == [[0], [1], []]
    assert split([2, 8, 2], 1) == [[0, 1, 2]]

def test_packing_is_deterministic() -> None:
    lengths = [random.Random(n).randint(1, 9) for n in range(100)]
    assert pack(lengths, 20) == pack(list(lengths), 20) == pack(tuple(lengths), 20)

def document(row: str, length: int, types: bool = False) -> Encoded:
    tokens_T = np.arange(length, dtype=np.int32) + 10 * length
    weights_T = np.full(length, 0.5, dtype=np.float32)
    types_T = np.ones(length, dtype=np.int32) if types else None
    return Encoded(row, tokens_T, tokens_T + 1, weights_T, types_T)

def test_a_stream_of_token_rows() -> None:
    batch = collate([document("a", 3), document("b", 2, types=True)])
    assert batch.tokens_N.tolist() == [30, 31, 32, 20, 21]
    assert batch.labels.tolist() == [31, 32, 33, 21, 22]
    assert batch.positions_N.tolist() == [0, 1, 2, 0, 1]
    assert batch.types_N.tolist() == [0, 0, 0, 1, 1]
    assert batch.weights.tolist() == [0.5] * 5 and batch.row_ids == ("a", "b")
    assert batch.docs.lengths == (3, 2)
    ids = (batch.tokens_N, batch.positions_N, batch.types_N, batch.labels)
    assert {t.dtype for t in ids} == {torch.int64} and batch.weights.dtype == torch.float32

def test_a_stream_of_labelled_rows() -> None:
    tokens_T = np.arange(3, dtype=np.int32)
    classes = collate([Encoded("a", tokens_T, 2, 0.5), Encoded("b", tokens_T, 0)])
    assert classes.labels.tolist() == [2, 0] and classes.labels.dtype == torch.int64
    assert classes.weights.tolist() == [0.5, 1.0] and classes.weights.dtype == torch.float32
    scores = collate([Encoded("a", tokens_T, 2.5)])
    assert scores.labels.tolist() == [2.5] and scores.labels.dtype == torch.float32

def test_a_batch_moves_whole() -> None:
    moved = collate([document("a", 3)]).to("meta")
    tensors = [moved.tokens_N, moved.positions_N, moved.types_N, moved.labels, moved.weights]
    assert {t.device.type for t in [*tensors, moved.docs.cu_seqlens_B1]} == {"meta"}

@pytest.mark.parametrize("seed", range(20))
def test_each_node_is_a_token_after_all_before_it(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = [random.integers(0, 2 + 300 * (seed % 2), random.integers(1, 9)) for _ in range(30)]
    ids += [ids[0], ids[1][:1], np.concatenate([ids[2], ids[3]])]  # the same, shorter, longer
    documents = [Encoded(str(n), ids_T.astype(np.int32), 0) for n, ids_T in enumerate(ids)]
    batch = collate(documents * 2, is_causal=True)
    before = [tuple(ids_T[: t + 1].tolist()) for ids_T in ids * 2 for t in range(len(ids_T))]
    of_node = {int(node): before[row] for node, row in enumerate(batch.rows_U)}
    assert [of_node[node] for node in batch.node_N.tolist()] == before
    assert sorted(of_node.values()) == sorted(set(before))
    assert batch.own.num_tokens == len(of_node) and (batch.rows_U.diff() > 0).all()

def test_a_prefix_tree_that_spares_little_is_none() -> None:
    documents = [document("a", 3), document("b", 4)]
    assert prefix_tree(documents) == {} and collate(documents * 2).own is None
    alike = collate([*documents, documents[0]], is_causal=True).to("meta")
    assert alike.own.lengths == (3, 4) and alike.own.cu_seqlens_B1.device.type == "meta"
    assert {alike.rows_U.device.type, alike.node_N.device.type} == {"meta"}
