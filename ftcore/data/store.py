"""The token cache: what was prepared, in files, under a key of all that it was made from.

    CACHE/lock
    CACHE/KEY/  manifest.json  prepared.json  0/*.npy 1/*.npy ... (documents of `Prepared.splits`)

KEY is a hash of the contents and names of the data files, the options of the data, the tokenizer's
files, the seed, the labels, the code that prepares and the libraries it calls. Documents are mapped
into memory, so that more of them than it holds can train. A cache may be deleted at any time.
"""

import fcntl
import gc
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from ftcore import builtin, files
from ftcore.data import pack
from ftcore.data.columns import DataConfig
from ftcore.data.encode import Split
from ftcore.data.ledger import Names, Prepared
from ftcore.data.prepare import prepare
from ftcore.data.read import BUILTIN_CHAT, files_of, unreadable
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import CheckpointError, DataError

CODE = (Path(__file__).parent, Path(builtin.__file__).parent)
LIBRARIES = ("jinja2", "numpy", "tokenizers")
FIELDS = "prepared.json"

@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which would walk all rows again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

@_uncollected()
def prepared(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, labels: Names = None
) -> tuple[Prepared, str]:
    """What `prepare` makes, from the cache or into it; and a line that says which. A process that
    wants what another is making waits for it. A cache whose hashes do not agree is made anew.
    Raises as `prepare`; CheckpointError: it cannot be written, and nothing is left of it. Finding
    it costs the hashes of the data files and of the cache, some 0.6 s a GB."""
    wanted = {"seed": seed, "labels": labels}
    name = key(config, tokenizer, **wanted)
    if config.cache is None:
        data = prepare(config, tokenizer, **wanted)
        data.notes["key"] = name
        return data, "data: prepared, and not kept"
    folder, why = config.cache / name, ""
    try:
        with _alone(config.cache, name):
            if folder.is_dir():
                try:
                    files.verify_folder(folder)
                    return _load(folder), f"data: from the cache {folder}"
                except CheckpointError as error:
                    why = f"warning: {error}: made anew\n"
            data = prepare(config, tokenizer, **wanted)
            if key(config, tokenizer, **wanted) != name:
                raise DataError("a data file changed while it was read: start again")
            data.notes["key"] = name
            num_tokens = sum(int(pack.lengths(s.documents).sum()) for _, s in data.splits())
            files.write_folder(folder, partial(_save, data), needed_bytes=4 * num_tokens)
            return _load(folder), f"{why}data: prepared, and kept in the cache {folder}"
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{error}; or do without a cache: --data.cache None") from error

def key(config: DataConfig, tokenizer: Tokenizer, *, seed: int, labels: Names) -> str:
    """32 hex digits of all that `prepare` depends on; DataError: a data file cannot be read."""
    code = sorted(p for folder in CODE for end in ("py", "toml") for p in folder.rglob(f"*.{end}"))
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

def _save(data: Prepared, folder: Path) -> None:
    (folder / FIELDS).write_text(json.dumps(data, default=_plain))
    for number, (_, split) in enumerate(data.splits()):
        (folder / str(number)).mkdir()
        pack.save(split.documents, folder / str(number))

def _load(folder: Path) -> Prepared:
    data = _maker(Prepared)(json.loads((folder / FIELDS).read_bytes()))
    for number, (_, split) in enumerate(data.splits()):
        split.documents = pack.load(folder / str(number))
    return data

def _plain(value: Any) -> Any:
    """What JSON has no form for, in one that `_maker` knows."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.tolist()]
    return vars(value) | ({"documents": []} if isinstance(value, Split) else {})

@cache
def _maker(hint: Any) -> Callable[[Any], Any]:
    """What makes values of the type `hint`, whose tuples are of one type, from JSON's."""
    kind, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        makers = {name: _maker(part) for name, part in get_type_hints(hint).items()}
        return lambda value: hint(**{name: makers[name](part) for name, part in value.items()})
    if hint is np.ndarray:
        return lambda value: np.array(value[1], dtype=value[0])
    if kind in (tuple, list):
        return lambda value: kind(map(_maker(args[0]), value))
    if kind is dict:
        return lambda value: {name: _maker(args[1])(part) for name, part in value.items()}
    if kind is UnionType:
        return lambda value: None if value is None else _maker(args[0])(value)
    return lambda value: value

@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of one cache in `folder`, and clean up after who died with it."""
    files.make_folder(folder)
    with open(folder / "lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, int(name[:15], 16))  # one byte for each cache
        for left in folder.glob(f"{files.TEMP}{name}-*"):
            files.remove(left)
        yield
