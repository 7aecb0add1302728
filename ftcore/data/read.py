"""Files to rows, and these to the examples of each split; nothing guessed, nothing lost.

tsv      one record a line, cells between tabs, no quoting
csv      as RFC 4180: cells in double quotes may hold commas, quotes ("") and line breaks
jsonl    one JSON object a line, or a list of cells
json     one array of these; an item's number stands in place of its line
txt      the whole file is one row with the field "text"
labelled a label, a blank and the text on each line: "label", "text"
conll    a word a line, its tag last, between tabs or blanks; a blank line ends a sentence, which
         has "tokens", "tags" and the number of its "document", counted by -DOCSTART- lines

tsv and csv take names of columns from their first line, unless they are given: then the file has no
such line, and records with more cells than names keep the surplus under "_extra". A damaged record
has a DataError in place of its fields, raised where none can be found behind it."""

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from ftcore.builtin import chat as builtin
from ftcore.config import DataConfig, Format, PairsDataConfig
from ftcore.data.columns import Example, Rejected, Row, besides, examples, require, require_some
from ftcore.errors import DataError, nearest

Record = tuple[int, str, Any]  # line, raw text; cells, object or what is wrong
EXTRA, DOCUMENT = "_extra", "-DOCSTART-"
BUILTIN_CHAT = "builtin:chat"  # stands for the data set that ftcore carries
BUILTIN_TESTS = builtin.SPLITS[2:]
Notes = dict[str, Any]  # what was found, for people: JSON throughout
_HALF = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # the others stand for bytes (`_text`)
MAX_RAW, SHOWN = 1000, 160  # characters that are kept of a damaged record, of a first row

@dataclass
class Rows:
    """The examples of one split on their way, and what was lost."""
    examples: list[Example]
    rejected: list[Rejected]
    num_rows: int  # that were read
    groups: dict[str, Hashable] = field(default_factory=dict)  # row id -> value of data.group

    def drop(self, lost: Collection[Rejected]) -> None:
        self.rejected += lost
        self.examples = besides(self.examples, lost)
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
    rows = read_rows([path for path in paths if path != BUILTIN_CHAT], format=config.format,
                     columns=config.columns, sources=sources,
                     damaged=damaged if config.on_bad == "skip" else None)
    if BUILTIN_CHAT in paths:
        found, where = builtin.rows(split), f"{BUILTIN_CHAT}/{split}"
        found = builtin.preference_pairs(found) if isinstance(config, PairsDataConfig) else found
        rows += [Row(d["id"], where, number, d) for number, d in enumerate(found, start=1)]
    kept, rejected = examples(rows, config)
    if config.group and split == "train":
        require(rows, config.group)
        groups = {row.id: str(row.fields.get(config.group) or "") for row in rows}
    return Rows(kept, damaged + rejected, len(rows) + len(damaged), groups)

def read_rows(paths: Sequence[str | Path], *, format: Format = "auto", columns: Sequence[str] = (),
              damaged: list[Rejected] | None = None, sources: Notes | None = None) -> list[Row]:
    """Rows of several files, in order. Cells of records that are lists, and of tables without a
    header line, have the names `columns`. `damaged` takes damaged records, None: they are errors;
    `sources` what was read. DataError: a file is missing, damaged, empty or of unknown format."""
    rows, seen, sources = [], {}, {} if sources is None else sources
    for path in map(Path, paths):
        file, start, lost = str(path), len(rows), ""
        suffix = Path(path.name.lower().removesuffix(".gz")).suffix
        form = {".ndjson": "jsonl"}.get(suffix, suffix[1:]) if format == "auto" else format
        if form not in READERS:
            raise DataError(f"{path}: unknown suffix; name the format, one of {', '.join(READERS)}")
        records, names = READERS[form](_text(path), file), columns
        if form in ("tsv", "csv") and not columns and (header := next(records, None)):
            names = header[2]
            _fields(header, file, names, is_open=False)  # its damage is never skipped
        if repeated := [name for name in names if names.count(name) > 1]:
            what = f"column {repeated[0]!r} occurs twice in {list(names)}"
            raise DataError(f"{file}: {what}: use data.columns")
        for record in records:
            line, raw, _ = record
            try:
                fields = _fields(record, file, names, is_open=bool(columns))
                rows.append(Row(_row_id(raw, seen), file, line, fields))
            except DataError as error:
                if damaged is None:
                    raise
                shown = raw[:MAX_RAW].encode("utf-8", "surrogateescape")
                detail = f"{error}; {shown.decode('utf-8', 'backslashreplace')}"
                lost = lost or f"; damaged: {error}"
                damaged.append(Rejected("", file, line, "damaged", "read", detail))
        if len(rows) == start:
            raise DataError(f"{file}: holds no rows{lost}")
        how = "by its suffix" if format == "auto" else "as named"
        first = [str(row.fields)[:SHOWN] for row in rows[start : start + 3]]
        sources[file] = {"rows": len(rows) - start, "format": f"{form}, {how}", "first rows": first}
    return rows

def stored(path: Path) -> bytes:
    """What a file holds; DataError: it cannot be read, and which one was probably meant."""
    try:
        return path.read_bytes()
    except OSError as error:
        names = [] if path.exists() else [file.name for file in path.parent.glob("*")]
        why = f"{error.strerror}{nearest(path.name, names)}"
        raise DataError(f"{path}: cannot be read: {why}") from error

def _text(path: Path) -> str:
    """UTF-8 text, without its byte-order mark; other bytes are lone surrogates (`_fields`)."""
    try:
        content = gzip.decompress(stored(path)) if path.suffix.lower() == ".gz" else stored(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if (place := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, place) + 1
        what = "binary, compressed (then its name must end in .gz) or text in utf-16 or -32"
        raise DataError(f"{path}:{line}: NUL bytes: the file is {what}; convert it to UTF-8")
    return content.decode("utf-8-sig", "surrogateescape")

def _fields(record: Record, file: str, names: Sequence[str], *, is_open: bool) -> dict[str, Any]:
    """Values of a record by name, further cells where `is_open`. DataError: it is damaged: bytes
    that are not UTF-8; JSON's escape of half a surrogate pair, of which two make one character, a
    lone one none; fewer or more cells than names; no object."""
    line, raw, value = record
    where = f"{file}:{line}"
    try:
        raw.encode()
        if isinstance(value, DataError):
            raise value
        if "\\ud" in raw or "\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        if error.object != raw:
            half = f"half of a surrogate pair, {error.object[error.start]!r}, is no character"
            raise DataError(f"{where}: {half}; replace the escape in the record") from None
        where = f"{file}:{line + raw.count(chr(10), 0, error.start)}"
        near = raw[max(error.start - 20, 0) :][:40].encode("utf-8", "surrogateescape")
        what = f"not UTF-8: {near!r}; use, say, iconv -f latin1 -t utf-8"
        raise DataError(f"{where}: {what}") from None
    if isinstance(value, list) and names:
        surplus = value[len(names) :]
        if len(value) < len(names) or surplus and not is_open:
            what = f"{len(value)} cells for the columns {', '.join(names)}: {raw[:80]!r}"
            raise DataError(f"{where}: {what}; mend it, or name them with data.columns")
        return dict(zip(names, value, strict=False), **({EXTRA: surplus} if surplus else {}))
    if not isinstance(value, dict):
        what = f"a record must be a JSON object, this is {type(value).__name__}: {raw[:80]!r}"
        raise DataError(f"{where}: {what}; name the cells of a list with data.columns")
    if names:
        raise DataError(f"{where}: column names are for cells, this names its own")
    return value

def _row_id(raw: str, seen: dict[str, int]) -> str:
    id_ = hashlib.sha1(raw.encode()).hexdigest()
    number = seen[id_] = seen.get(id_, -1) + 1  # 0 for the first of equal records
    return (hashlib.sha1(f"{raw}\0{number}".encode()).hexdigest() if number else id_)[:16]

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

def _json(text: str, file: str) -> Iterator[Record]:
    """Items, by number; their raw text is their JSON, halves of surrogate pairs still escapes."""
    items = _loaded(text, file)
    if not isinstance(items, list):
        what = f"{file}: a json file must hold one array, this has {str(items)[:80]!r}"
        what = items if isinstance(items, DataError) else what
        raise DataError(f"{what}; of a file with an object a line, name jsonl")
    for number, item in enumerate(items, start=1):
        raw = json.dumps(item, ensure_ascii=False)
        yield number, json.dumps(item) if _HALF.search(raw) else raw, item

def _conll(text: str, file: str) -> Iterator[Record]:
    """Sentences, by their first line."""
    document, words, odd = 0, [], None
    for number, line in enumerate([*map(str.rstrip, text.split("\n")), ""], start=1):
        cells = [cell for cell in line.split("\t" if "\t" in line else " ") if cell]
        if len(cells) == 1 and cells != [DOCUMENT]:
            must = "a line is a word, a tab or a blank, and its tag; between sentences it is empty"
            odd = odd or DataError(f"{file}:{number}: {line!r}: {must}")
        if cells and cells[0] != DOCUMENT:
            words.append((number, line, cells))
            continue
        if words:
            (first, *_), raw, rows = zip(*words, strict=True)
            found = {"tokens": [row[0] for row in rows], "tags": [row[-1] for row in rows]}
            yield first, "\n".join(raw), odd or found | {"document": document}
        document, words, odd = document + bool(cells), [], None

READERS: dict[str, Callable[[str, str], Iterable[Record]]] = {  # of a text and the file's name
    "tsv": lambda text, _: ((n, line, line.split("\t")) for n, line in _lines(text, blanks="")),
    "csv": _csv,
    "jsonl": lambda text, file: ((n, line, _loaded(line, file, n)) for n, line in _lines(text)),
    "json": _json, "conll": _conll,
    "txt": lambda text, _: [(1, text, {"text": text})] if text else [],
    "labelled": lambda text, _: (
        (n, line, dict(zip(("label", "text"), line.partition(" ")[::2], strict=True)))
        for n, line in _lines(text))}

def _loaded(text: str, file: str, first: int = 1) -> Any:
    """The value of a text whose first line this is in the file, or what is wrong with it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = getattr(error, "pos", 0)
        where = f"{file}:{first + text.count(chr(10), 0, place)}"
        what = f"not valid JSON: {error}; near {text[max(place - 40, 0) : place + 40]!r}"
        return DataError(f"{where}: {what}; it is cut or damaged: mend it, or fetch the file again")
