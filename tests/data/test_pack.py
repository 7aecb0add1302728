"""Streams within their budget, nothing lost, and the batch that is made of one."""

import numpy as np
import pytest
import torch
from ftcore.data.pack import Encoded, collate, prefix_tree, split

def test_a_split_worked_by_hand() -> None:
    # 9 | 7; 5 to the second (7 < 9), 4 to the first (9 < 12), 1 to the second (12 < 13).
    assert split([4, 9, 1, 7, 5], 2) == [[0, 1], [2, 3, 4]]
    assert split([3, 2], 3) == [[0], [1], []]
    assert split([2, 8, 2], 1) == [[0, 1, 2]]

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
