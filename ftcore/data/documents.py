"""Documents laid end to end in flat arrays, which may be files mapped into memory.

Letters: N tokens of all documents, B documents, K classes. A million `Encoded` cost Python a
million objects; as arrays they are some files, of which a step reads its rows. A list does as well.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ftcore.data.pack import Encoded

BLOCK = 1 << 20  # tokens looked at in one go

class Documents(Sequence[Encoded]):
    """Documents of one split, each made an `Encoded` when it is asked for.

    arrays     borders (B + 1,) int64; row_ids (B,) UTF-8; tokens (N,) int32; where any is not 0,
               types (N,); of token tasks labels (N,) int32 and weights (N,); of document tasks
               labels (B,) or (B, K), never int32, and weights (B,). Types and weights may be bool.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.tokens_N, self._borders, self._arrays = arrays["tokens"], arrays["borders"], arrays
        self._by_token = arrays["labels"].dtype == np.int32
        self.lengths_B = np.diff(self._borders)

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = range(len(self))[index]
        span = slice(self._borders[row], self._borders[row + 1])
        labels, weights = (self._arrays[name] for name in ("labels", "weights"))
        if self._by_token:
            labels, weights = labels[span], weights[span].astype(np.float32)
        else:
            labels, weights = labels[row], float(weights[row])
            labels = labels if labels.ndim else labels.item()
        types_T = self._arrays["types"][span].astype(np.int32) if "types" in self._arrays else None
        types_T = types_T if types_T is not None and types_T.any() else None
        row_id = self._arrays["row_ids"][row].decode()
        return Encoded(row_id, self.tokens_N[span], labels, weights, types_T)

def lengths(documents: Sequence[Encoded]) -> np.ndarray:
    """Tokens of each document (int64)."""
    if isinstance(documents, Documents):
        return documents.lengths_B
    return np.fromiter(map(len, documents), np.int64, len(documents))

def tokens(documents: Sequence[Encoded]) -> Iterator[np.ndarray]:
    """The ids of all documents, some at a time."""
    if not isinstance(documents, Documents):
        return (document.tokens_T for document in documents)
    tokens_N = documents.tokens_N
    return (tokens_N[start : start + BLOCK] for start in range(0, len(tokens_N), BLOCK))

def digest(documents: Sequence[Encoded]) -> str:
    """SHA-256 of tokens, borders, labels and weights; a list has another than its arrays."""
    sha = hashlib.sha256()
    parts = (part for d in documents for part in (d.tokens_T, d.labels, d.weights, d.types_T))
    if isinstance(documents, Documents):
        parts = (array for _, array in sorted(documents._arrays.items()))
    for part in (np.asarray(part) for part in parts if part is not None):
        sha.update(f"{part.dtype} {part.shape} ".encode() + part.tobytes())
    return sha.hexdigest()

def save(documents: Sequence[Encoded], folder: Path) -> None:
    """Write the arrays of at least one document, one by one, as NAME.npy."""

    def write(name: str, values: np.ndarray) -> None:
        np.save(folder / f"{name}.npy", values)

    write("borders", np.cumsum([0, *map(len, documents)]))
    write("row_ids", np.array([document.row_id.encode() for document in documents]))
    write("tokens", np.concatenate([document.tokens_T for document in documents]))
    labels, weights = ([getattr(d, name) for d in documents] for name in ("labels", "weights"))
    by_token = isinstance(weights[0], np.ndarray)
    write("labels", np.concatenate(labels, dtype=np.int32) if by_token else np.array(labels))
    write("weights", _compact(np.concatenate(weights) if by_token else np.array(weights)))
    if any(document.types_T is not None for document in documents):
        types = [np.zeros(len(d), bool) if d.types_T is None else d.types_T for d in documents]
        write("types", _compact(np.concatenate(types)))

def load(folder: Path) -> Documents:
    """The documents that `save` wrote, their arrays mapped."""
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    # cost: a slice of numpy's own class for mapped arrays is several times slower
    return Documents({name: array.view(np.ndarray) for name, array in arrays.items()})

def _compact(values: np.ndarray) -> np.ndarray:
    """One byte each where all are 0 or 1."""
    bools = values.astype(bool)
    return bools if (bools == values).all() else values
