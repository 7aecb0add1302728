"""The token cache: what was prepared, in files, under a key of all that it was made from.

    CACHE/lock
    CACHE/KEY/  manifest.json  fields.json  train/ dev/ tests/0/ ...
        train/  fields.json  documents/*.npy  chats.jsonl chats.npy (where lines begin)  ...

KEY is a hash of the contents and names of the data files, the options of the data, the tokenizer's
files, the seed, the labels, the code that prepares and the libraries it calls: whatever changes one
of them finds another cache, or none. Arrays and texts are mapped into memory and read when they are
asked for, so that more of them than it holds can train. A cache may be deleted at any time.
"""

import fcntl
import gc
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from ftcore import builtin, files
from ftcore.data import documents
from ftcore.data.collect import BUILTIN_CHAT, DataConfig
from ftcore.data.encode import Split
from ftcore.data.ledger import Prepared
from ftcore.data.prepare import prepare
from ftcore.data.read import files_of, unreadable
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import CheckpointError, DataError

CODE = (Path(__file__).parent, Path(builtin.__file__).parent)
LIBRARIES = ("jinja2", "numpy", "tokenizers")
FIELDS = "fields.json"
hints_of = cache(get_type_hints)


def prepared(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, labels: tuple[str, ...] | None = None
) -> tuple[Prepared, str]:
    """What `prepare` makes, from the cache or into it; and a line that says which.

    A process that wants what another is making waits for it. A cache is read only after its hashes
    agree, and a damaged one is made anew.

    raises    as `prepare`; CheckpointError: the cache cannot be written, nothing is left of it
    cost      of finding it: the hashes of the data files and of the cache, some 0.6 s a GB
    """

    def make() -> Prepared:
        with _uncollected():
            return prepare(config, tokenizer, seed=seed, labels=labels)

    if config.cache is None:
        return make(), "data: prepared, and not kept"
    name = key(config, tokenizer, seed=seed, labels=labels)
    folder, why = config.cache / name, ""
    try:
        with _alone(config.cache, name):
            if folder.is_dir():
                try:
                    files.verify_folder(folder)
                    return _load(Prepared, folder), f"data: from the cache {folder}"
                except CheckpointError as error:
                    why = f"warning: {error}: made anew\n"
            data = make()
            if key(config, tokenizer, seed=seed, labels=labels) != name:
                raise DataError("a data file changed while it was read: start again")
            num_tokens = sum(int(documents.lengths(s.documents).sum()) for _, s in data.splits())
            files.write_folder(folder, partial(_save, data), needed_bytes=4 * num_tokens)
            return _load(Prepared, folder), f"{why}data: prepared, and kept in the cache {folder}"
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{error}; or do without a cache: --data.cache None") from error


def key(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, labels: tuple[str, ...] | None
) -> str:
    """32 hex digits of all that `prepare` depends on; DataError: a data file cannot be read."""
    code = sorted(p for folder in CODE for end in ("py", "toml") for p in folder.glob(f"*.{end}"))
    parts = [(path.name, files.sha256_file(path)) for path in code]
    named = {*map(str, (*config.train, *config.dev, *config.test))} - {BUILTIN_CHAT}
    for path, _ in (file for name in sorted(named) for file in files_of(Path(name))):
        try:
            parts.append((str(path), files.sha256_file(path)))
        except OSError as error:
            raise unreadable(path, error) from error
    versions = [platform.python_version(), *map(importlib.metadata.version, LIBRARIES)]
    options = (replace(config, cache=None), tokenizer.digest, seed, labels, versions)
    return hashlib.sha256(repr((parts, options)).encode()).hexdigest()[:32]


class Records(Sequence):
    """Objects of one type, kept as lines of JSON and made when they are asked for."""

    def __init__(self, path: Path, kind: Any) -> None:
        self.kind, self.lines = kind, np.memmap(path.with_suffix(".jsonl"), np.uint8, "r")
        self.borders = np.load(path.with_suffix(".npy"), mmap_mode="r")

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = range(len(self))[index]
        line = self.lines[self.borders[row] : self.borders[row + 1]].tobytes()
        return _revived(self.kind, json.loads(line))

    @staticmethod
    def save(records: Sequence[Any], path: Path) -> None:
        """Write what `Records(path, kind)` reads; at least one record."""
        encode = json.JSONEncoder(default=_plain).encode
        lines = [encode(record).encode() + b"\n" for record in records]
        path.with_suffix(".jsonl").write_bytes(b"".join(lines))
        np.save(path.with_suffix(".npy"), np.cumsum([0, *map(len, lines)]))


def _save(value: Prepared | Split, folder: Path) -> None:
    """Every field: documents and lists as arrays, which are left out where empty, else JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = {}
    for name, content in vars(value).items():
        path = folder / name
        if isinstance(content, Split):
            _save(content, path)
        elif name == "tests":
            plain[name] = list(content)
            for number, split in enumerate(content.values()):
                _save(split, path / str(number))
        elif name == "documents" and content:
            path.mkdir()
            documents.save(content, path)
        elif isinstance(content, list) and content:
            Records.save(content, path)
        elif not isinstance(content, list):
            plain[name] = content
    (folder / FIELDS).write_text(json.dumps(plain, default=_plain))


def _load(kind: type, folder: Path) -> Any:
    """The Prepared, or Split, that `_save` wrote."""
    plain = json.loads((folder / FIELDS).read_bytes())
    values: dict[str, Any] = {}
    for name, hint in hints_of(kind).items():
        path = folder / name
        if hint is Split:
            values[name] = _load(Split, path)
        elif name == "tests":
            values[name] = {n: _load(Split, path / str(i)) for i, n in enumerate(plain[name])}
        elif name in plain:
            values[name] = _revived(hint, plain[name])
        elif name == "documents":
            values[name] = documents.load(path) if path.is_dir() else []
        else:
            some = path.with_suffix(".npy").is_file()
            values[name] = Records(path, get_args(hint)[0]) if some else []
    return kind(**values)


def _plain(value: Any) -> Any:
    """What JSON has no form for, in one that `_revived` knows."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.tolist()]
    return vars(value)  # of a dataclass


def _revived(hint: Any, value: Any) -> Any:
    """A value of the type `hint`, whose tuples are of one type, from what JSON made of it."""
    kind, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return hint(**{name: _revived(hints_of(hint)[name], v) for name, v in value.items()})
    if hint is np.ndarray:
        return np.array(value[1], dtype=value[0])
    if kind in (tuple, list):
        return kind(_revived(args[0], item) for item in value)
    if kind is UnionType and value is not None:
        return _revived(args[0], value)
    return value


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of one cache in `folder`, and clean up after who died with it."""
    files.make_folder(folder)
    with open(folder / "lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, int(name[:15], 16))  # one byte for each cache
        for left in folder.glob(f"{files.TEMP}{name}-*"):
            files.remove(left)
        yield


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which would walk all rows again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
