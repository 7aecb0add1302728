"""Files to rows: tsv, csv, jsonl, json and txt, each also as .gz; nothing guessed, nothing lost.

tsv      one record a line, cells between tabs, no quoting
csv      as RFC 4180: cells in double quotes may hold commas, quotes ("") and line breaks
jsonl    one JSON object a line
json     one array of objects
txt      the whole file is one row with the field "text"

Text is UTF-8; a byte-order mark is dropped. tsv and csv take names of columns from their first
line, unless they are given: then the file has no such line, and records with more cells than names
keep the surplus under "_extra". Blank lines hold no record. A damaged record is a DataError.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ftcore.errors import DataError

Format = Literal["auto", "tsv", "csv", "jsonl", "json", "txt"]
SUFFIXES: dict[str, Format] = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
}
EXTRA = "_extra"
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One record.

    id       16 hex digits: sha1 of its bytes (and of its number among equal ones), so that a row
             keeps its id wherever it stands
    file     as given; line: where the record begins, from 1
    fields   column -> value; text in tsv, csv and txt
    """

    id: str
    file: str
    line: int
    fields: dict[str, Any]


@dataclass
class ReadReport:
    """What reading came across: rows and blank lines by file, rows with surplus cells by file."""

    rows: Counter[str] = field(default_factory=Counter)
    blank_lines: Counter[str] = field(default_factory=Counter)
    surplus_cells: Counter[str] = field(default_factory=Counter)


Record = tuple[int, str, Any]  # line, raw text, cells or object


def read_rows(
    paths: Sequence[str | Path],
    *,
    format: Format = "auto",
    columns: Sequence[str] = (),
    report: ReadReport | None = None,
) -> list[Row]:
    """Rows of several files, in order.

    format    auto: by the file's suffix
    columns   names of the cells of tsv and csv files without a header line
    report    is filled with counts
    raises    DataError: a file is missing, damaged, empty or of unknown format
    """
    report = report or ReadReport()
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for path in map(Path, paths):
        file, before = str(path), len(rows)
        chosen = _format(path) if format == "auto" else format
        if columns and chosen not in ("tsv", "csv"):
            raise DataError(f"{file}: column names are for tsv and csv files, this is {chosen}")
        records = _READERS[chosen](_text(path), file, report)
        if chosen in ("tsv", "csv"):
            records = _named(records, file, columns, report)
        rows += [Row(_row_id(raw, seen), file, line, fields) for line, raw, fields in records]
        if len(rows) == before:
            raise DataError(f"{file}: holds no rows")
        report.rows[file] += len(rows) - before
    return rows


def _format(path: Path) -> Format:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise DataError(f"{path}: unknown suffix; name the format, one of {', '.join(_READERS)}")
    return SUFFIXES[suffixes[-1]]


def _nearest(path: Path) -> str:
    """The file that was probably meant, where `path` does not exist."""
    there = [] if path.exists() or not path.parent.is_dir() else path.parent.iterdir()
    near = difflib.get_close_matches(path.name, [file.name for file in there], n=1)
    return f"; nearest: {path.parent / near[0]}" if near else ""


def _text(path: Path) -> str:
    """Content of a file, without its byte-order mark."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}{_nearest(path)}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        near = content[max(error.start - 20, 0) : error.start + 20]
        raise DataError(
            f"{path}:{line}: not UTF-8: byte 0x{content[error.start]:02x} in {near!r}; convert the "
            "file (for instance: iconv -f latin1 -t utf-8)"
        ) from error


def _tsv(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if line:
            yield number, line, line.split("\t")
        else:
            report.blank_lines[file] += 1


def _csv(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    taken: list[str] = []  # lines of the record being read

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            yield line

    limit = csv.field_size_limit(sys.maxsize)  # a cell may be a whole document
    reader = csv.reader(lines(), strict=True)
    first = 1
    try:
        for cells in reader:
            raw = "".join(taken)
            taken.clear()
            if cells:
                yield first, raw.rstrip("\r\n"), cells
            else:
                report.blank_lines[file] += 1
            first += raw.count("\n")
    except csv.Error as error:
        raise DataError(
            f"{file}:{first}: the record that begins here is not csv: {error}; close every quote "
            "and double the quotes inside quoted cells"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _jsonl(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            report.blank_lines[file] += 1
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise _bad_json(file, number, str(error), line) from error
        yield number, line, _object(value, line, file, number)


def _json(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    """Objects of one array, each with its own line, read one after the other."""
    place = _SPACE.match(text).end()
    if text[place : place + 1] != "[":
        raise DataError(
            f"{file}: a json file must hold one array of objects, this begins with "
            f"{text[place : place + 20]!r}; for one object a line name the format jsonl"
        )
    decode = json.JSONDecoder().raw_decode
    place, line, counted = _SPACE.match(text, place + 1).end(), 1, 0
    closed = text[place : place + 1] == "]"
    if closed:
        place = _SPACE.match(text, place + 1).end()
    while not closed:
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = decode(text, place)
        except ValueError as error:
            raise _bad_json(file, line, error, text[place:]) from error
        yield line, text[place:end], _object(value, text[place:end], file, line)
        place = _SPACE.match(text, end).end()
        closed = text[place : place + 1] == "]"
        if not closed and text[place : place + 1] != ",":
            what = f"expected ',' or ']' after the object, found {text[place : place + 20]!r}"
            raise _bad_json(file, line, what, text[counted:end])
        place = _SPACE.match(text, place + 1).end()
    if place < len(text):
        line += text.count("\n", counted, place)
        raise _bad_json(file, line, "text after the end of the array", text[place:])


def _txt(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    if text:
        yield 1, text, {"text": text}


_READERS = {"tsv": _tsv, "csv": _csv, "jsonl": _jsonl, "json": _json, "txt": _txt}


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


def _object(value: Any, raw: str, file: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{file}:{line}: a record must be a JSON object, this is {type(value).__name__}: "
            f"{str(value)[:80]!r}"
        )
    if "\\ud" in raw.lower():  # escapes of a pair join into one character, a lone one is none
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{file}:{line}: half of a surrogate pair, {error.object[error.start]!r}, is no "
                "character; replace the escape in the record"
            ) from error
    return value


def _bad_json(file: str, line: int, problem: ValueError | str, text: str) -> DataError:
    return DataError(
        f"{file}:{line}: not valid JSON: {problem}; the record begins {text[:80]!r}; it is cut or "
        "damaged: mend it, or fetch the file again"
    )
