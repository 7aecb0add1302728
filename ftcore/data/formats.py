"""The file formats, one function each: a file's content to records, damaged ones refused.

tsv      one record a line, cells between tabs, no quoting
csv      as RFC 4180: cells in double quotes may hold commas, quotes ("") and line breaks
jsonl    one JSON object a line, or a list of cells
json     one array of these, or an object of arrays of which FILE:KEY names one
txt      the whole file is one row with the field "text"
conll    a word a line, its tag last, between tabs or blanks; a blank line ends a sentence, which
         has "tokens", "tags" and the number of its "document", counted by -DOCSTART- lines
labelled a label, a blank and the text on each line: "label", "text"
tar      a text a file, its label the folder it is in: "text", "label", "name"
"""

import csv
import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ftcore.config import Format
from ftcore.errors import DataError

SUFFIXED = ("tsv", "csv", "jsonl", "json", "txt", "conll", "tar")
SUFFIXES: dict[str, Format] = {f".{name}": name for name in SUFFIXED} | {".ndjson": "jsonl"}
DOCUMENT = "-DOCSTART-"
_SPACE = re.compile(r"[ \t\n\r]*")


Record = tuple[int, str, Any]  # line, raw text, cells or object


@dataclass
class ReadReport:
    """What reading came across: rows and blank lines by file, rows with surplus cells by file."""

    rows: Counter[str] = field(default_factory=Counter)
    blank_lines: Counter[str] = field(default_factory=Counter)
    surplus_cells: Counter[str] = field(default_factory=Counter)


def decoded(content: bytes, where: str) -> str:
    """UTF-8 text, without its byte-order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        near = content[max(error.start - 20, 0) : error.start + 20]
        raise DataError(
            f"{where}:{line}: not UTF-8: byte 0x{content[error.start]:02x} in {near!r}; convert "
            "the file (for instance: iconv -f latin1 -t utf-8)"
        ) from error


def _tsv(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    for number, line in _lines(text, file, report, blanks=""):
        yield number, line, line.split("\t")


def _lines(
    text: str, file: str, report: ReadReport, blanks: str | None = None
) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, but for those that hold nothing beside `blanks`, white space."""
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip(blanks):
            yield number, line
        else:
            report.blank_lines[file] += 1


def _csv(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    lines = list(io.StringIO(text, newline=""))
    before = 0  # lines before the record
    limit = csv.field_size_limit(sys.maxsize)  # a cell may be a whole document
    reader = csv.reader(lines, strict=True)
    try:
        for cells in reader:
            if cells:
                raw = "".join(lines[before : reader.line_num])
                yield before + 1, raw.rstrip("\r\n"), cells
            else:
                report.blank_lines[file] += 1
            before = reader.line_num
    except csv.Error as error:
        raise DataError(
            f"{file}:{before + 1}: the record that begins here is not csv: {error}; close every "
            "quote and double the quotes inside quoted cells"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _jsonl(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    for number, line in _lines(text, file, report):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise _bad_json(file, number, str(error), line) from error
        yield number, line, _object(value, line, file, number)


def _json(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    end = yield from _array(text, file, _skip(text, 0))
    if end < len(text):
        line = text.count("\n", 0, end) + 1
        raise _bad_json(file, line, "text after the end of the array", text[end:])


def json_under(key: str, text: str, file: str) -> Iterator[Record]:
    """Records of the array under one key of the object that a json file holds."""
    decode, keys = json.JSONDecoder().raw_decode, []
    place, opening = _skip(text, 0), "{"
    try:
        while text[place : place + 1] == opening:
            name, end = decode(text, _skip(text, place + 1))
            place = _skip(text, _skip(text, end) + 1)  # after the colon
            if name == key:
                yield from _array(text, file, place)
                return
            keys.append(str(name))
            place, opening = _skip(text, decode(text, place)[1]), ","
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise _bad_json(file, line, error, text[error.pos :]) from error
    raise DataError(f"{file}: no key {key!r} in the file; its keys are {', '.join(keys) or 'none'}")


def _array(text: str, file: str, place: int) -> Generator[Record, None, int]:
    """Items of the array at `place`, each with its own line; returns what follows the array."""
    if text[place : place + 1] != "[":
        raise DataError(
            f"{file}: a json file must hold one array of objects, this begins with "
            f"{text[place : place + 20]!r}; for one object a line name the format jsonl, for an "
            "object of arrays one of its keys: FILE:KEY"
        )
    decode, opening = json.JSONDecoder().raw_decode, "["
    line, start = 1, 0  # of the item being read
    while text[place : place + 1] == opening:
        place = _skip(text, place + 1)
        if opening == "[" and text[place : place + 1] == "]":
            break
        line, start = line + text.count("\n", start, place), place
        try:
            value, end = decode(text, start)
        except ValueError as error:
            raise _bad_json(file, line, error, text[start:]) from error
        yield line, text[start:end], _object(value, text[start:end], file, line)
        place, opening = _skip(text, end), ","
    if text[place : place + 1] != "]":
        what = f"expected ',' or ']' after the object, found {text[place : place + 20]!r}"
        raise _bad_json(file, line, what, text[start:])
    return _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    """The first place from this one on that holds no white space."""
    return _SPACE.match(text, place).end()


def _txt(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    if text:
        yield 1, text, {"text": text}


def _conll(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    words: list[tuple[int, str, list[str]]] = []  # line number, line, its cells
    document = 0
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.removesuffix("\r")
        cells = [cell for cell in line.split("\t" if "\t" in line else " ") if cell]
        if len(cells) == 1 and cells != [DOCUMENT]:
            raise DataError(
                f"{file}:{number}: {line!r}: a line is a word, a tab or a blank, and its tag; "
                "between sentences it is empty"
            )
        if cells and cells[0] != DOCUMENT:
            words.append((number, line, cells))
            continue
        if words:
            numbers, lines, columns = zip(*words, strict=True)
            yield numbers[0], "\n".join(lines), {
                "tokens": [cells[0] for cells in columns],
                "tags": [cells[-1] for cells in columns],
                "document": document,
            }
            words = []
        document += bool(cells)


def _labelled(text: str, file: str, report: ReadReport) -> Iterator[Record]:
    for number, line in _lines(text, file, report):
        label, _, rest = line.partition(" ")
        yield number, line, {"label": label, "text": rest}


def tar(content: bytes, file: str) -> Iterator[Record]:
    """Records of the format tar, numbered as they stand in it; nothing is written to the disk."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = [member for member in archive if member.isfile()]
            for number, member in enumerate(members, start=1):
                text = decoded(archive.extractfile(member).read(), f"{file}:{member.name}")
                label = PurePosixPath(member.name).parent.name
                fields = {"text": text, "label": label, "name": member.name}
                yield number, f"{member.name}\n{text}", fields
    except tarfile.TarError as error:
        raise DataError(f"{file}: damaged tar file ({error}); fetch it again") from error


READERS: dict[str, Callable[[str, str, ReadReport], Iterator[Record]]] = {
    "tsv": _tsv,
    "csv": _csv,
    "jsonl": _jsonl,
    "json": _json,
    "txt": _txt,
    "conll": _conll,
    "labelled": _labelled,
}


def _object(value: Any, raw: str, file: str, line: int) -> dict[str, Any] | list[Any]:
    if not isinstance(value, dict | list):
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
