"""Documents in flat arrays, on the disk and as the streams that the model sees; what a step reads.

Letters: N tokens of all documents, B documents, T tokens of one, K classes."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
import numpy as np
import torch
from torch import Tensor
from kernels.docs import Docs

IGNORED = -100  # label of a position that predicts nothing

@dataclass(slots=True)  # cost: a frozen one is made at half the speed
class Encoded:
    """One document, which nobody changes."""
    row_id: str  # id of the source row
    tokens_T: np.ndarray  # int32 ids
    # token tasks: int32 (T,), what position t is to tell: token t + 1, one that is hidden, its tag;
    # others: class index, or score, or float32 (K,), 1 for each class it has; pairs: see `pair`
    labels: np.ndarray | int | float
    weights: np.ndarray | float = 1.0  # token tasks: float32 (T,), 0 = not scored; others: float
    types_T: np.ndarray | None = None  # int32 segment of each token, None for all zero

    def __len__(self) -> int:
        return len(self.tokens_T)

def shifted(row_id: str, ids_T: np.ndarray, counts_T: np.ndarray,
            types_T: np.ndarray | None = None) -> Encoded:
    """A document whose token t counts `counts_T[t]`; the first token is never predicted."""
    labels_T, weights_T = ids_T.copy(), counts_T.astype(np.float32)
    labels_T[:-1], weights_T[:-1] = ids_T[1:], counts_T[1:]
    labels_T[-1:], weights_T[-1:] = IGNORED, 0
    return Encoded(row_id, ids_T, labels_T, weights_T, types_T)

def answered(row_id: str, prompt: Sequence[int], ids: Sequence[int]) -> Encoded:
    """A prompt, and what was answered, which is scored."""
    counts_T = np.repeat([False, True], [len(prompt), len(ids)])
    return shifted(row_id, np.concatenate([prompt, np.int32(ids)]), counts_T)

def pair(row_id: str, sides: Sequence[Encoded], margin: float) -> Encoded:
    """Two conversations, scored from their answers on, end to end as one document: see `apart`. Its
    labels (float32): tokens of the chosen one; where its answer begins, and the rejected one's in
    its own tokens; the margin; the log-ratio of both in the reference, 0 until it is known."""
    starts = [np.flatnonzero(side.weights)[0] + 1 for side in sides]
    labels = np.array([len(sides[0]), *starts, margin, 0], dtype=np.float32)
    flat = dict(laid_out(sides))
    return Encoded(row_id, flat["tokens"], labels, 1.0, flat["types"])

def is_pair(document: Encoded) -> bool:
    """Whether `pair` made it: classes that are there are 1, and none is above another that is."""
    labels, by_token = document.labels, isinstance(document.weights, np.ndarray)
    return not by_token and np.shape(labels) == (5,) and labels[0] > labels[1] > 0

def apart(documents: Sequence[Encoded]) -> Sequence[Encoded]:
    """Of each pair two documents, chosen and rejected, their answers scored; others as they are."""
    if not (len(documents) and is_pair(documents[0])):
        return documents
    made = []
    for both in documents:
        middle, *starts = both.labels[:3].astype(int)
        for start, own in zip(starts, (slice(middle), slice(middle, None)), strict=True):
            ids_T = both.tokens_T[own]
            types_T = None if both.types_T is None else both.types_T[own]
            made.append(shifted(both.row_id, ids_T, np.arange(len(ids_T)) >= start, types_T))
    return made

def lengths(documents: Sequence[Encoded]) -> np.ndarray:
    """Tokens of each document (int64)."""
    return np.fromiter(map(len, documents), np.int64, len(documents))

def digest(documents: Sequence[Encoded]) -> str:
    """SHA-256 of tokens, borders, labels and weights."""
    sha = hashlib.sha256()
    parts = (part for d in documents for part in (d.tokens_T, d.labels, d.weights, d.types_T))
    for part in (np.asarray(part) for part in parts if part is not None):
        sha.update(f"{part.dtype} {part.shape} ".encode() + part.tobytes())
    return sha.hexdigest()

def laid_out(documents: Sequence[Encoded]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of at least one document, each made when it is asked for."""
    yield "borders", (borders := np.cumsum([0, *map(len, documents)]))
    yield "row_ids", np.array([document.row_id.encode() for document in documents])
    yield "tokens", np.concatenate([document.tokens_T for document in documents])
    labels, weights = ([getattr(d, name) for d in documents] for name in ("labels", "weights"))
    by_token = isinstance(weights[0], np.ndarray)
    yield "labels", np.concatenate(labels, dtype=np.int32) if by_token else np.array(labels)
    yield "weights", np.concatenate(weights) if by_token else np.array(weights)
    types = [np.zeros(borders[-1], np.int32)]  # of all, most often: cost
    if any(d.types_T is not None for d in documents):
        types = [np.zeros(len(d), np.int32) if d.types_T is None else d.types_T for d in documents]
    yield "types", np.concatenate(types)

def save(documents: Sequence[Encoded], folder: Path) -> None:
    """Write the arrays of at least one document, one by one, as NAME.npy."""
    for name, values in laid_out(documents):
        if name != "types" or values.any():
            np.save(folder / f"{name}.npy", values)

def load(folder: Path) -> list[Encoded]:
    """Documents of what `save` wrote: views of files that are mapped into memory, and read-only."""
    # cost: slices of numpy's own class for mapped arrays, or by np.split, are several times slower
    arrays = {p.stem: np.load(p, mmap_mode="r").view(np.ndarray) for p in folder.glob("*.npy")}
    labels, weights = arrays["labels"], arrays["weights"]
    owns = [slice(*ends) for ends in pairwise(arrays["borders"].tolist())]
    if labels.dtype == np.int32:
        labels, weights = ([flat_N[own] for own in owns] for flat_N in (labels, weights))
    else:
        labels, weights = list(labels) if labels.ndim > 1 else labels.tolist(), weights.tolist()
    tokens = [arrays["tokens"][own] for own in owns]
    row_ids, types = map(bytes.decode, arrays["row_ids"].tolist()), [None] * len(tokens)
    if "types" in arrays:
        types = [part if part.any() else None for part in map(arrays["types"].__getitem__, owns)]
    return list(map(Encoded, row_ids, tokens, labels, weights, types))

@dataclass(frozen=True, eq=False)
class Batch:
    tokens_N: Tensor  # int64, as the next two
    positions_N: Tensor  # restart at 0 in every document
    types_N: Tensor
    docs: Docs  # borders of the documents
    labels: Tensor  # (N,) for token tasks, (B,) for document tasks, (B, K) where they have several
    weights: Tensor  # (N,) or (B,), fp32
    row_ids: tuple[str, ...]  # source row of each document
    scored_M: Tensor | None  # int64 rows of the stream with a weight, of token tasks
    # (P, 5) labels of pairs, whose 2 P documents, chosen and rejected in turn, are those of `apart`
    pairs: Tensor | None = None
    # for a decoder, the prefix tree of its documents: U nodes, each a token and all before it
    rows_U: Tensor | None = None  # int64 row of the stream that stands for a node, in its order
    node_N: Tensor | None = None  # int64 node of each row
    own: Docs | None = None  # plan of those rows: what of each document is among them

    def to(self, device: torch.device | str) -> "Batch":
        moved = {name: part.to(device) for name, part in vars(self).items() if hasattr(part, "to")}
        return replace(self, **moved)

def prefix_tree(documents: Sequence[Encoded]) -> dict[str, Tensor | Docs]:
    """Of a `Batch` of these; nothing where it would spare less than a fifth of the rows."""
    nodes: dict[tuple[int, int], int] = {}  # the node before, and a token: the node of both
    node_N, own = [], []
    for document in documents:
        node, known = -1, len(nodes)
        for token in document.tokens_T.tolist():
            node_N.append(node := nodes.setdefault((node, token), len(nodes)))
        own.append(len(nodes) - known)
    if len(nodes) > 0.8 * len(node_N):
        return {}
    return {"rows_U": torch.from_numpy(np.unique(node_N, return_index=True)[1]),
            "node_N": torch.tensor(node_N), "own": Docs.from_lengths([*filter(None, own)])}

def collate(documents: Sequence[Encoded], *, is_causal: bool = False) -> Batch:
    """Lay documents end to end: at least one, all of a token task or all of a document task. What
    they begin with alike a decoder (`is_causal`) computes once."""
    whole, documents = documents, apart(documents)
    pairs = torch.from_numpy(np.stack([d.labels for d in whole])) if is_pair(whole[0]) else None
    flat = {name: torch.from_numpy(a) for name, a in laid_out(documents) if name != "row_ids"}
    docs, labels = Docs.from_lengths(list(map(len, documents))), flat["labels"]
    weights, by_token = flat["weights"].float(), isinstance(documents[0].weights, np.ndarray)
    return Batch(tokens_N=flat["tokens"].long(), positions_N=docs.positions_N(), docs=docs,
                 types_N=flat["types"].long(), weights=weights, pairs=pairs,
                 scored_M=weights.nonzero().squeeze(1) if by_token else None,
                 labels=labels.float() if labels.is_floating_point() else labels.long(),
                 row_ids=tuple(document.row_id for document in documents),
                 **(prefix_tree(documents) if is_causal else {}))

def total_weight(documents: Sequence[Encoded]) -> float:
    """What a step's loss sum is divided by."""
    return math.fsum(float(np.sum(d.weights, dtype=np.float64)) for d in documents)

def split(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Shares of about as many tokens, as indices; the longest goes first, to the lightest share."""
    dealt, tokens = [[] for _ in range(shares)], [0] * shares
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = tokens.index(min(tokens))
        dealt[least].append(index)
        tokens[least] += lengths[index]
    return [sorted(share) for share in dealt]

@lru_cache(maxsize=1)
def epoch_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(num_rows) for one epoch (int64)."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)

def step_rows(step: int, num_rows: int, *, batch_size: int, seed: int) -> np.ndarray:
    """Row indices (int64) of an optimiser step, counted from 0: of an epoch's permutation the next
    `batch_size`, its last step fewer."""
    epoch, place = divmod(step, math.ceil(num_rows / batch_size))
    return epoch_order(num_rows, seed=seed, epoch=epoch)[place * batch_size :][:batch_size]
