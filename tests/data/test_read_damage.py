"""Reading on in spite of damage, and files that are many, compressed or of unknown format."""

import csv
import gzip
import io
import json
import random
from pathlib import Path
import pytest
from ftcore.data.read import read_rows
from ftcore.errors import DataError

# name, content, rows kept, and of each bad record its line, a part of its reason, its raw text
SKIPPED = [
    ("a.jsonl", '{"x": 1}\n{"x": cut\n[1]\n7\n{"x": 2}\n', [{"x": 1}, {"x": 2}], [
        (2, "not valid JSON", '{"x": cut'), (3, "this is list", "[1]"), (4, "this is int", "7"),
    ]),
    ("a.jsonl", b'{"x": "caf\xe9"}\n{"x": "\xc3\xa9"}\n', [{"x": "\xe9"}], [
        (1, "not UTF-8: b", '{"x": "caf\\xe9"}'),
    ]),
    ("a.json", '[{"x": 1},\n 7,\n{"x": "\\ud83d"}]', [{"x": 1}], [
        (2, "this is int", "7"), (3, "half of a surrogate pair", '{"x": "\\ud83d"}'),
    ]),
    ("a.json", b'[{"x": "caf\xe9"}, {"x": "\xc3\xa9"}]', [{"x": "\xe9"}], [
        (1, "not UTF-8: b", '{"x": "caf\\xe9"}'),
    ]),
    ("a.tsv", b"x\ty\n1\t2\n3\n4\t5\t6\n\xff\t7\n8\t9\n",
     [{"x": "1", "y": "2"}, {"x": "8", "y": "9"}], [
        (3, "1 cells for the", "3"), (4, "3 cells", "4\t5\t6"), (5, "not UTF-8: b", "\\xff\t7"),
    ]),
    ("a.csv", 'x,y\n1,"two\nlines"\n3\n', [{"x": "1", "y": "two\nlines"}], [(4, "1 cells", "3")]),
    ("a.conll", "a O\n\nb O\nc\n\nd O\n",
     [{"tokens": [word], "tags": ["O"], "document": 0} for word in "ad"],
     [(3, "'c': a line is a word", "b O\nc")]),
]  # fmt: skip

WHOLE = [  # damage of the whole file, which nothing skips
    ("a.tsv.gz", gzip.compress(b"x\n" + b"1\n" * 999, mtime=0)[:-20], "damaged gzip file"),
    ("a.tsv", b"x\n1\n\0\1\2", "a.tsv:3: NUL bytes: the file is binary"),
    ("a.tsv", "x\n1\n".encode("utf-16"), "a.tsv:1: NUL bytes: .* or text in utf-16"),
    ("a.tsv", "x\n1\n".encode("utf-32"), "a.tsv:1: NUL bytes: .* or text in utf-16 or -32"),
    ("a.tsv", "x\n1\n".encode("utf-16-le"), "a.tsv:1: NUL bytes: .* or text in utf-16"),
    ("a.tsv", "", "a.tsv: holds no rows"),
    ("a.tsv", "x\ty\n1\n2\n", "holds no rows; damaged: .*a.tsv:2: 1 cells for the"),
    ("a.tsv", b"\xff\ty\n1\t2\n", "a.tsv:1: not UTF-8"),
    ("a.txt", b"fine\ncaf\xe9", "a.txt: holds no rows; damaged: .*a.txt:2: not UTF-8"),
    ("a.json", '[{"x": 1},\n{"x": 2', "a.json:2: not valid JSON"),
    ("a.csv", 'x,y\n1,2\n3,"say "so", yes"\n4,5\n', "a.csv:3: the record .* cannot be skipped"),
    ("a.csv", 'x,y\n1,"2\n3,4\n5,6', "a.csv:2: .* cannot be skipped: unexpected end of data"),
]

@pytest.mark.parametrize(("name", "content", "kept", "bad"), SKIPPED)
@pytest.mark.parametrize("is_gzipped", [False, True])
def test_bad_records_are_left_out_and_kept_in_the_report(
    write, name, content, kept, bad, is_gzipped
):
    data, damaged, sources = content.encode() if isinstance(content, str) else content, [], {}
    path = write(f"{name}.gz", gzip.compress(data)) if is_gzipped else write(name, data)
    rows = read_rows([path], damaged=damaged, sources=sources)
    assert [row.fields for row in rows] == kept and sources[str(path)]["rows"] == len(kept)
    for found, (line, part, raw) in zip(damaged, bad, strict=True):
        assert (found.file, found.line, found.reason) == (str(path), line, "damaged")
        assert part in found.detail and found.detail.endswith(f"; {raw}")
    with pytest.raises(DataError) as error:
        read_rows([path])
    assert damaged[0].detail == f"{error.value}; {bad[0][2]}"

@pytest.mark.parametrize(("name", "content", "message"), WHOLE)
def test_a_file_damaged_as_a_whole_is_never_skipped(write, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_rows([write("fine.tsv", "x\n1\n"), write(name, content)], damaged=[])

def test_a_lost_quote_changes_no_other_row(write):
    """The rows read were written as they are, but for the damaged one, or an error tells of it."""
    words, stopped = ["one", "a,b", 'say "hi"', "l1\nl2", 'q\nhe, said "no"\nend'], 0
    for seed in range(200):
        draw = random.Random(seed)
        rows = [[str(n), *draw.choices(words, k=2)] for n in range(6)]
        lines = [["id", "a", "b"], *rows]
        for line in lines:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerow(line)
            line.append(text.getvalue())
        written = [line.pop() for line in lines]
        at = draw.randrange(1, 7)
        # all but those that open a cell
        quotes = [n for n, c in enumerate(written[at]) if c == '"' and written[at][n - 1] != ","]
        if quotes:
            place = draw.choice(quotes)
            written[at] = written[at][:place] + written[at][place + 1 :]
        damaged = []
        try:
            found = read_rows([write("a.csv", "".join(written))], damaged=damaged)
        except DataError as error:
            assert "cannot be skipped" in str(error)
            stopped += 1
            continue
        values = [list(row.fields.values()) for row in found]
        assert all(value in rows for value in values if value[0] != str(at - 1)), seed
        assert len(values) == 6 or damaged
    assert stopped > 100

def test_the_raw_text_is_kept_up_to_a_limit_and_long_rows_are_read(write):
    long, damaged = "word " * 2_000_000, []
    content = "\n".join(json.dumps({"x": x}) for x in (long, "short")) + f'\n{{"x": "{long}\n'
    rows = read_rows([write("a.jsonl", content)], damaged=damaged)
    assert [len(row.fields["x"]) for row in rows] == [len(long), 5]
    (lost,) = damaged
    assert lost.line == 3 and lost.detail.endswith("; " + ('{"x": "' + long)[:1000])

def test_auto_decides_and_the_report_remembers(write):
    files = {
        "a.tsv": ("x\n1\n2\n3\n4\n", "tsv, by its suffix"),
        "b.JSONL.gz": (gzip.compress(b'{"x": 1}\n'), "jsonl, by its suffix"),
    }
    paths, sources = [write(name, content) for name, (content, _) in files.items()], {}
    read_rows(paths, sources=sources)
    found = [sources[str(path)] for path in paths]
    assert [source["format"] for source in found] == [told for _, told in files.values()]
    assert found[0]["first rows"] == ["{'x': '1'}", "{'x': '2'}", "{'x': '3'}"]
    read_rows([paths[1]], format="jsonl", sources=sources)
    assert sources[str(paths[1])]["format"] == "jsonl, as named"
    for name in ("f.data", "f"):
        with pytest.raises(DataError, match="unknown suffix; name the format, one of tsv"):
            read_rows([write(name, '{"x": 1}\n{"x": 2}\n')])

def test_real_dirt_is_an_error_or_skipped(data_dir: Path):
    with pytest.raises(DataError, match="145-8.txt.gz:8548: not UTF-8: b.*iconv -f latin1"):
        read_rows(sorted((data_dir / "gutenberg").glob("*.txt.gz")))
    damaged = []
    kept = read_rows([data_dir / "stsb" / "sts-train.tsv"], damaged=damaged)
    assert (len(kept), len(damaged)) == (5749 - 1 - 197, 197)
    assert all("9 cells for the columns " in bad.detail for bad in damaged)
