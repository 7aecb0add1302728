"""Files to rows, and these to the examples of each split; nothing guessed, nothing lost.

tsv and csv take names of columns from their first line, unless they are given: then the file has no
such line, and records with more cells than names keep the surplus under "_extra"."""

import gzip
import hashlib
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ftcore.builtin import chat as builtin
from ftcore.config import Format, PairsDataConfig
from ftcore.data import formats
from ftcore.data.columns import DataConfig, Example, examples, require, require_some
from ftcore.data.formats import READERS, SUFFIXES, Record, Rejected, Row
from ftcore.errors import DataError, nearest

EXTRA = "_extra"
BUILTIN_CHAT = "builtin:chat"  # stands for the data set that ftcore carries
BUILTIN_TESTS = builtin.SPLITS[2:]
Notes = dict[str, Any]  # what was found, for people: JSON throughout
MAX_RAW, SHOWN = 1000, 160  # characters that are kept of a damaged record, of a first row

@dataclass
class Rows:
    """The examples of one split on their way, and what was lost."""
    examples: list[Example]
    rejected: list[Rejected]
    num_rows: int  # that were read
    groups: dict[str, Hashable] = field(default_factory=dict)  # row id -> value of data.group

    def drop(self, lost: Mapping[int, Rejected]) -> None:
        self.rejected += lost.values()
        self.examples = [e for index, e in enumerate(self.examples) if index not in lost]
        require_some(self.examples, self.rejected)

def collect(config: DataConfig, notes: Notes) -> dict[str, Rows]:
    """Every split that has files: train, dev, and each test file under its name."""
    named = [("train", config.train), ("dev", config.dev)]
    # a test split has its file's name without endings, or its path where others have that name
    stems = [Path(path).name.split(".")[0] for path in config.test]
    taken = [*stems, "train", "dev", *BUILTIN_TESTS]
    for stem, path in zip(stems, config.test, strict=True):
        names = [stem if taken.count(stem) == 1 else path]
        named += [(n, (path,)) for n in (BUILTIN_TESTS if path == BUILTIN_CHAT else names)]
    return {name: _collect(config, paths, name, notes) for name, paths in named if paths}

def _collect(config: DataConfig, paths: Sequence[str], split: str, notes: Notes) -> Rows:
    damaged, groups = [], {}
    sources = notes.setdefault("sources", {}).setdefault(split, {})
    if BUILTIN_CHAT in paths:
        if len(paths) > 1:
            raise DataError(f"{BUILTIN_CHAT} cannot be mixed with files: {', '.join(paths)}")
        found, where = builtin.rows(split), f"{BUILTIN_CHAT}/{split}"
        found = builtin.preference_pairs(found) if isinstance(config, PairsDataConfig) else found
        rows = [Row(d["id"], where, number, d) for number, d in enumerate(found, start=1)]
    else:
        rows = read_rows(paths, format=config.format, columns=config.columns, sources=sources,
                         damaged=damaged if config.on_bad == "skip" else None)
    kept, rejected = examples(rows, config)
    if config.group and split == "train":
        require(rows, config.group)
        groups = {row.id: str(row.fields.get(config.group) or "") for row in rows}
    return Rows(kept, damaged + rejected, len(rows) + len(damaged), groups)

def read_rows(paths: Sequence[str | Path], *, format: Format = "auto", columns: Sequence[str] = (),
              damaged: list[Rejected] | None = None,
              sources: dict[str, dict[str, Any]] | None = None) -> list[Row]:
    """Rows of several files, in order. Cells of records that are lists, and of tables without a
    header line, have the names `columns`. `damaged` takes damaged records, None: they are errors;
    `sources` what was read. DataError: a file is missing, damaged, empty or of unknown format."""
    rows, seen, sources = [], {}, {} if sources is None else sources
    for path in map(Path, paths):
        file, before, lost = str(path), len(rows), ""
        text = formats.decoded(_content(path), file)
        chosen = _format(path) if format == "auto" else format
        records = formats.checked(READERS[chosen](text, file), file)
        if chosen in ("tsv", "csv") or columns:
            records = _named(records, file, columns)
        for line, raw, fields in records:
            if isinstance(fields, list):
                what = f"{file}:{line}: a record must be a JSON object, this is list: {raw[:80]!r}"
                fields = DataError(f"{what}; name its cells with data.columns")
            if not isinstance(fields, DataError):
                rows.append(Row(_row_id(raw, seen), file, line, fields))
            elif damaged is None:
                raise fields
            else:
                shown = raw[:MAX_RAW].encode("utf-8", "surrogateescape")
                detail = f"{fields}; {shown.decode('utf-8', 'backslashreplace')}"
                lost = lost or f"; damaged: {fields}"
                damaged.append(Rejected("", file, line, "damaged", "read", detail))
        if len(rows) == before:
            raise DataError(f"{file}: holds no rows{lost}")
        how = "by its suffix" if format == "auto" else "as named"
        first = [str(row.fields)[:SHOWN] for row in rows[before : before + 3]]
        sources[file] = {"rows": len(rows) - before, "format": f"{chosen}, {how}",
                         "first rows": first}
    return rows

def _format(path: Path) -> Format:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        known = ", ".join(get_args(Format)[1:])
        raise DataError(f"{path}: unknown suffix; name the format, one of {known}")
    return SUFFIXES[suffix]

def stored(path: Path) -> bytes:
    """What a file holds; DataError: it cannot be read, and which one was probably meant."""
    try:
        return path.read_bytes()
    except OSError as error:
        names = [] if path.exists() else [file.name for file in path.parent.glob("*")]
        why = f"{error.strerror}{nearest(path.name, names)}"
        raise DataError(f"{path}: cannot be read: {why}") from error

def _content(path: Path) -> bytes:
    try:
        return gzip.decompress(stored(path)) if path.suffix.lower() == ".gz" else stored(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error

def _named(records: Iterator[Record], file: str, columns: Sequence[str]) -> Iterator[Record]:
    """Cells under their names, which are `columns` or else the first record."""
    names = list(columns) or next(records, (0, "", []))[2]
    if isinstance(names, DataError):
        raise names
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{file}: column {repeated[0]!r} occurs twice in {names}: use data.columns")
    for line, raw, cells in records:
        if isinstance(cells, dict):
            cells = DataError(f"{file}:{line}: column names are for cells, this names its own")
        elif isinstance(cells, list):
            surplus = cells[len(names) :]
            if len(cells) < len(names) or surplus and not columns:
                what = f"{len(cells)} cells for the columns {', '.join(names)}: {raw[:80]!r}"
                cells = DataError(f"{file}:{line}: {what}; mend it, or name them with data.columns")
            else:
                extra = {EXTRA: surplus} if surplus else {}
                cells = dict(zip(names, cells, strict=False)) | extra
        yield line, raw, cells

def _row_id(raw: str, seen: dict[str, int]) -> str:
    id_ = hashlib.sha1(raw.encode()).hexdigest()
    number = seen[id_] = seen.get(id_, -1) + 1  # 0 for the first of equal records
    return (hashlib.sha1(f"{raw}\0{number}".encode()).hexdigest() if number else id_)[:16]
