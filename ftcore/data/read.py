"""Files to rows, in the formats of formats.py, each also as .gz; nothing guessed, nothing lost.

Text is UTF-8; a byte-order mark is dropped. tsv and csv take names of columns from their first
line, unless they are given: then the file has no such line, and records with more cells than names
keep the surplus under "_extra". Blank lines hold no record. A damaged record is a DataError.
"""

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ftcore.config import Format
from ftcore.data.formats import READERS, SUFFIXES, ReadReport, Record, decoded, json_under, tar
from ftcore.errors import DataError, nearest

EXTRA = "_extra"
TABLES = ("tsv", "csv")
KNOWN = get_args(Format)[1:]


@dataclass(frozen=True, slots=True)
class Row:
    """One record."""

    # 16 hex digits: sha1 of its bytes (and of its number among equal ones), so that a row keeps its
    # id wherever it stands
    id: str
    file: str  # as given; line: where the record begins, from 1
    line: int
    fields: dict[str, Any]  # column -> value; text in tsv, csv and txt


def read_rows(
    paths: Sequence[str | Path],
    *,
    format: Format = "auto",
    columns: Sequence[str] = (),
    report: ReadReport | None = None,
) -> list[Row]:
    """Rows of several files, in order.

    paths     files; FILE:KEY of a json file is the array under one key of its object
    format    auto: by the file's suffix
    columns   names of the cells, for records that are lists and tables without a header line
    report    is filled with counts
    raises    DataError: a file is missing, damaged, empty or of unknown format
    """
    report = report or ReadReport()
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for path in map(Path, paths):
        file, before = str(path), len(rows)
        named, key = located(path)
        chosen = _format(named) if format == "auto" else format
        if chosen == "tar":
            records = tar(_content(named), file)
        elif key:
            records = json_under(key, decoded(_content(named), file), file)
        else:
            records = READERS[chosen](decoded(_content(named), file), file, report)
        if chosen in TABLES or columns:
            records = _named(records, file, columns, report)
        for line, raw, fields in records:
            if isinstance(fields, list):
                raise DataError(
                    f"{file}:{line}: a record must be a JSON object, this is list: {raw[:80]!r}; "
                    "name its cells with data.columns"
                )
            rows.append(Row(_row_id(raw, seen), file, line, fields))
        if len(rows) == before:
            raise DataError(f"{file}: holds no rows")
        report.rows[file] += len(rows) - before
    return rows


def located(name: str | Path) -> tuple[Path, str]:
    """The file that a user names, and its key in FILE:KEY, empty where none is named."""
    path = Path(name)
    if path.exists():
        return path, ""
    file, _, key = path.name.partition(":")
    return path.parent / file, key


def _format(path: Path) -> Format:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise DataError(f"{path}: unknown suffix; name the format, one of {', '.join(KNOWN)}")
    return SUFFIXES[suffixes[-1]]


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """Why the file cannot be read, and which one was probably meant."""
    names = [] if path.exists() else [file.name for file in path.parent.glob("*")]
    hint = nearest(path.name, names)
    return DataError(f"{path}: cannot be read: {error.strerror}{hint}")


def _named(
    records: Iterator[Record], file: str, columns: Sequence[str], report: ReadReport
) -> Iterator[Record]:
    """Cells under their names, which are `columns` or else the first record."""
    names = list(columns) or next(records, (0, "", []))[2]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        where = "the names given" if columns else f"{file}: the first line"
        raise DataError(
            f"{where}: column {repeated[0]!r} occurs twice in {names}; name every column once"
        )
    for line, raw, cells in records:
        if not isinstance(cells, list):
            raise DataError(
                f"{file}:{line}: column names are for cells, this record names its own fields:"
                f" {', '.join(cells)}"
            )
        if len(cells) == len(names):
            yield line, raw, dict(zip(names, cells, strict=True))
            continue
        if len(cells) < len(names) or not columns:
            source = "are named" if columns else f"stand in the first line ({', '.join(names)})"
            raise DataError(
                f"{file}:{line}: {len(cells)} cells, {len(names)} {source}; mend the line: "
                f"{raw[:80]!r}; for a file without header, or with ragged lines, name its columns"
            )
        report.surplus_cells[file] += 1
        fields = dict(zip(names, cells, strict=False))
        yield line, raw, {**fields, EXTRA: cells[len(names) :]}


def _row_id(raw: str, seen: dict[str, int]) -> str:
    digest = hashlib.sha1(raw.encode())
    name = digest.hexdigest()
    number = seen[name] = seen.get(name, -1) + 1  # 0 for the first of equal records
    if number:
        digest.update(f"\0{number}".encode())
        name = digest.hexdigest()
    return name[:16]
