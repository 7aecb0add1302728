"""What the readers of formats.py are given and hand over: text, records and a report."""

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ftcore.errors import DataError

MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}

Record = tuple[int, str, Any]  # line, raw text; cells, object or what is wrong


@dataclass(frozen=True, slots=True)
class Bad:
    """A damaged record that was left out."""

    file: str
    line: int  # where it begins, from 1
    reason: str
    raw: str  # as `printable`


@dataclass
class ReadReport:
    """What reading came across, by file as its rows name it."""

    rows: Counter[str] = field(default_factory=Counter)
    blank_lines: Counter[str] = field(default_factory=Counter)
    surplus_cells: Counter[str] = field(default_factory=Counter)  # rows that have some
    bad: list[Bad] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)  # as read, and what told it
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # first three rows


def decoded(content: bytes, where: str, encoding: str = "") -> str:
    """UTF-8 text, without its byte-order mark, or else text in `encoding`; without one other bytes
    are lone surrogates (`checked`)."""
    for name, marks in MARKS.items():
        if content.startswith(marks):
            raise DataError(
                f"{where}: text in {name}, not UTF-8; convert it: iconv -f {name} -t utf-8"
            )
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise DataError(
            f"{where}:{line}: NUL bytes: the file is binary, compressed (then its name must end in "
            ".gz) or text in utf-16; convert it to text in UTF-8"
        )
    try:
        return content.decode("utf-8-sig", "strict" if encoding else "surrogateescape")
    except UnicodeDecodeError:
        try:
            return content.decode(encoding)
        except (UnicodeDecodeError, LookupError) as error:
            raise DataError(f"{where}: not UTF-8, and not {encoding}: {error}") from error


def checked(records: Iterable[Record], file: str) -> Iterator[Record]:
    """The records, of which those with bytes that are not UTF-8 are damaged."""
    for line, raw, value in records:
        try:
            raw.encode()
        except UnicodeEncodeError as error:
            start = error.start
            near = raw[max(start - 20, 0) : start + 20].encode("utf-8", "surrogateescape")
            value = DataError(
                f"{file}:{line + raw.count(chr(10), 0, start)}: not UTF-8: byte "
                f"0x{ord(raw[start]) - 0xDC00:02x} in {near!r}; convert the file (for instance: "
                "iconv -f latin1 -t utf-8)"
            )
        yield line, raw, value


def printable(raw: str) -> str:
    """The first 1,000 characters of a record, bytes that are not UTF-8 as \\xNN."""
    return raw[:1000].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
