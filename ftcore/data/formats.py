"""The file formats, one function each: a file's content to records.

tsv      one record a line, cells between tabs, no quoting
csv      as RFC 4180: cells in double quotes may hold commas, quotes ("") and line breaks
jsonl    one JSON object a line, or a list of cells
json     one array of these; an item's number stands in place of its line
txt      the whole file is one row with the field "text"
labelled a label, a blank and the text on each line: "label", "text"

A damaged record has a DataError in place of its fields, raised where none can be found behind it.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from ftcore.config import Format
from ftcore.errors import DataError

Record = tuple[int, str, Any]  # line, raw text; cells, object or what is wrong
SUFFIXES = {f".{name}": name for name in get_args(Format)[1:]} | {".ndjson": "jsonl"}
_HALF = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # the others stand for bytes (`decoded`)

class Row(NamedTuple):  # cost: made in a third of the time that a frozen dataclass takes
    id: str  # 16 hex digits: sha1 of its raw text (and number among equal ones), wherever it stands
    file: str  # as given; line: where the record begins, from 1
    line: int
    fields: dict[str, Any]  # column -> value; text in tsv, csv and txt

@dataclass(frozen=True)
class Rejected:
    """A row that is not used as it is: where it stands, why, and in which step of `prepare`."""
    id: str
    file: str
    line: int
    reason: str  # equal for rows of one kind, so that it can be counted
    step: str = "encode"
    detail: str = ""  # its own: which other row, what text

def decoded(content: bytes, where: str) -> str:
    """UTF-8 text, without its byte-order mark; other bytes are lone surrogates (`checked`)."""
    if (place := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, place) + 1
        what = "binary, compressed (then its name must end in .gz) or text in utf-16 or -32"
        raise DataError(f"{where}:{line}: NUL bytes: the file is {what}; convert it to UTF-8")
    return content.decode("utf-8-sig", "surrogateescape")

def checked(records: Iterable[Record], file: str) -> Iterator[Record]:
    """The records, of which those with bytes that are not UTF-8 are damaged."""
    for line, raw, value in records:
        try:
            raw.encode()
        except UnicodeEncodeError as error:
            near = raw[max(error.start - 20, 0) :][:40].encode("utf-8", "surrogateescape")
            where = f"{file}:{line + raw.count(chr(10), 0, error.start)}"
            value = DataError(f"{where}: not UTF-8: {near!r}; use, say, iconv -f latin1 -t utf-8")
        yield line, raw, value

def _tsv(text: str, file: str) -> Iterator[Record]:
    return ((number, line, line.split("\t")) for number, line in _lines(text, blanks=""))

def _lines(text: str, blanks: str | None = None) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, but for those that hold nothing beside `blanks`, white space."""
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if (line := line.removesuffix("\r")).strip(blanks):
            yield number, line

def _csv(text: str, file: str) -> Iterator[Record]:
    lines = list(io.StringIO(text, newline=""))
    reader, before = csv.reader(lines, strict=True), 0  # lines before the record
    limit = csv.field_size_limit(sys.maxsize)  # a cell may be a whole document
    try:
        for cells in reader:
            if cells:
                yield before + 1, "".join(lines[before : reader.line_num]).rstrip("\r\n"), cells
            before = reader.line_num
    except csv.Error as error:
        what = f"{file}:{before + 1}: the record that begins here is not csv and cannot be skipped"
        raise DataError(f"{what}: {error}; close every quote, double those inside cells") from error
    finally:
        csv.field_size_limit(limit)

def _jsonl(text: str, file: str) -> Iterator[Record]:
    for number, line in _lines(text):
        try:
            value = _object(json.loads(line), line, file, number)
        except (ValueError, RecursionError) as error:
            value = _bad_json(error, file, line, number)
        yield number, line, value

def _json(text: str, file: str) -> Iterator[Record]:
    """Items, by number; their raw text is their JSON, halves of surrogate pairs still escapes."""
    hint = "of a file with an object a line, name jsonl"
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{_bad_json(error, file, text)}; {hint}") from error
    if not isinstance(items, list):
        what = f"a json file must hold one array, this has {str(items)[:80]!r}"
        raise DataError(f"{file}: {what}; {hint}")
    for number, item in enumerate(items, start=1):
        raw = json.dumps(item, ensure_ascii=False)
        raw = json.dumps(item) if _HALF.search(raw) else raw
        yield number, raw, _object(item, raw, file, number)

def _txt(text: str, file: str) -> Iterator[Record]:
    if text:
        yield 1, text, {"text": text}

def _labelled(text: str, file: str) -> Iterator[Record]:
    for number, line in _lines(text):
        label, _, rest = line.partition(" ")
        yield number, line, {"label": label, "text": rest}

READERS: dict[str, Callable[[str, str], Iterator[Record]]] = {  # of a text and the file's name
    "tsv": _tsv, "csv": _csv, "jsonl": _jsonl, "json": _json, "txt": _txt, "labelled": _labelled}

def _object(value: Any, raw: str, file: str, line: int) -> dict[str, Any] | list[Any] | DataError:
    if not isinstance(value, dict | list):
        what = f"this is {type(value).__name__}: {str(value)[:80]!r}"
        return DataError(f"{file}:{line}: a record must be a JSON object, {what}")
    if "\\ud" in raw.lower():  # escapes of a pair join into one character, a lone one is none
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            what = f"half of a surrogate pair, {error.object[error.start]!r}, is no character"
            return DataError(f"{file}:{line}: {what}; replace the escape in the record")
    return value

def _bad_json(error: Exception, file: str, text: str, first: int = 1) -> DataError:
    """What is wrong with a text whose first line this is in the file."""
    place = getattr(error, "pos", 0)
    where = f"{file}:{first + text.count(chr(10), 0, place)}"
    what = f"not valid JSON: {error}; near {text[max(place - 40, 0) : place + 40]!r}"
    return DataError(f"{where}: {what}; it is cut or damaged: mend it, or fetch the file again")
