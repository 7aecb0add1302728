"""Readers: real files by their documented row counts, and damage of every kind by its message."""

import csv
import gzip
from pathlib import Path
import pytest
from ftcore.data.read import EXTRA, read_rows
from ftcore.errors import DataError

COLA = ("source", "label", "mark", "sentence")
STSB = ("genre", "file", "year", "id", "score", "first", "second")
PAIR = ("text", "label")

REAL = [
    ("sst5/stsa.fine.dev", {"format": "labelled"}, 1101),
    ("ner_wnut17/emerging.test.annotated", {"format": "conll"}, 1287),
    ("ner_wikigold/wikigold.conll.txt", {"format": "conll"}, 1841 - 145),
    ("mrpc/train.tsv", {}, 3667),
    ("mrpc/dev.tsv", {}, 408),
    ("mrpc/msr_paraphrase_test.txt", {"format": "tsv"}, 1725),
    ("stsb/sts-train.tsv", {"columns": STSB}, 5749),
    ("stsb/sts-dev.tsv", {"columns": STSB}, 1500),
    ("stsb/sts-test.tsv", {"columns": STSB}, 1379),
    ("banking77/train.csv", {}, 10003),
    ("banking77/test.csv", {}, 3080),
    ("sst2_glue/train.tsv.gz", {}, 67349),
    ("sst2_glue/dev.tsv", {}, 872),
    ("sst2_glue/test-labeled.tsv", {}, 1821),
    ("sst2_sentence/train.tsv", {"columns": PAIR}, 6920),
    ("sst2_sentence/dev.tsv", {"columns": PAIR}, 872),
    ("sst2_sentence/test.tsv", {"columns": PAIR}, 1821),
    ("cola/train.tsv", {"columns": COLA}, 8551),
    ("cola/dev.tsv", {"columns": COLA}, 1043),
    ("rte/train.tsv", {}, 2490),
    ("snli_devtest/dev.txt", {"format": "tsv", "columns": ("a", "b", "label")}, 9842),
    ("gsm8k/train.jsonl.gz", {}, 7473),
    ("gsm8k/test.jsonl", {}, 1319),
    ("hh_rlhf/harmless-base/test.jsonl.gz", {}, 2312),
    ("hh_rlhf/helpful-base/test.jsonl.gz", {}, 2354),
    ("hh_rlhf/helpful-online/test.jsonl.gz", {}, 1137),
    ("hh_rlhf/helpful-rejection-sampled/test.jsonl.gz", {}, 2749),
    ("synthetic_persona_chat/Synthetic-Persona-Chat_valid.csv.gz", {}, 1000),
    ("synthetic_persona_chat/Synthetic-Persona-Chat_test.csv.gz", {}, 968),
    ("gpteacher/codegen-instruct.json.gz", {}, 4535),
    ("instruct_1100/instruction-data.json", {}, 1100),
    ("oasst_sample/en_100_tree.jsonl", {}, 100),
    ("tinyshakespeare/input.txt", {}, 1),
]

def fields(path, **options):
    return [row.fields for row in read_rows([path], **options)]

@pytest.mark.parametrize(("file", "options", "count"), REAL, ids=[file for file, _, _ in REAL])
def test_real_files_have_their_rows(data_dir, file, options, count):
    rows = read_rows([data_dir / file], **options)
    assert len(rows) == count
    assert len({row.id for row in rows}) == count
    assert all(set(row.fields) - {EXTRA} == set(rows[0].fields) - {EXTRA} for row in rows)

def test_real_dirt(data_dir):
    names = ("train.tsv", "dev.tsv", "msr_paraphrase_test.txt")
    mrpc = read_rows([data_dir / "mrpc" / name for name in names], format="tsv")
    assert list(mrpc[0].fields) == ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    assert sum(any('"' in cell for cell in row.fields.values()) for row in mrpc) == 1220
    stsb = read_rows([data_dir / "stsb" / "sts-train.tsv"], columns=STSB)
    assert sum(len(row.fields.get(EXTRA, [])) == 2 for row in stsb) == 197
    banking = read_rows([data_dir / "banking77" / "train.csv"])
    assert banking[-1].line == 10017 and any("\n" in row.fields["text"] for row in banking)
    assert len({row.fields["category"] for row in banking}) == 77

def test_several_files_in_order(write):
    rows = read_rows([write("a.tsv", "x\ty\n1\t2\n"), write("b.jsonl", '{"x": 3}\n')])
    assert [row.fields for row in rows] == [{"x": "1", "y": "2"}, {"x": 3}]
    assert [(Path(row.file).name, row.line) for row in rows] == [("a.tsv", 2), ("b.jsonl", 1)]

def test_every_format_plain_and_gzipped(write):
    contents = {
        "a.tsv": 'x\n"one\n',
        "a.csv": 'x\n"""one"\n',
        "a.jsonl": '{"x": "\\"one"}\n',
        "a.json": '[{"x": "\\"one"}]',
    }
    for name, content in contents.items():
        assert fields(write(name, content)) == [{"x": '"one'}]
        assert fields(write(f"{name}.gz", gzip.compress(content.encode()))) == [{"x": '"one'}]
    assert fields(write("a.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n"}]

def test_tsv_takes_cells_as_they_are(write):
    content = "\ufeffid\ttext\r\n1\t\"unbalanced, \u2028 \x85 \x0b \x1c\r\n2\t  spaces \r\n"
    assert [row["text"] for row in fields(write("a.tsv", content))] == [
        '"unbalanced, \u2028 \x85 \x0b \x1c',
        "  spaces ",
    ]

def test_csv_cells_over_several_lines(write):
    path = write("a.csv", '\ufeffx,y\r\n"one\ntwo, ""three""",4\r\n\r\n5,6\r\n')
    rows = read_rows([path])
    assert [row.fields["x"] for row in rows] == ['one\ntwo, "three"', "5"]
    assert [row.line for row in rows] == [2, 5]

def test_csv_cells_may_be_long_and_the_global_limit_stays(write):
    long = "word " * 50_000
    default = csv.field_size_limit(1000)
    try:
        assert fields(write("a.csv", f"x,y\n{long},1\n"))[0]["x"] == long
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(default)

def test_json_objects_are_numbered_and_their_spacing_is_nothing(write):
    rows = read_rows([write("a.json", '\n[ {"x": 1},\n {"x":\n 2}, {"x": "\\u00e9"} ]\n')])
    assert [(row.line, row.fields["x"]) for row in rows] == [(1, 1), (2, 2), (3, "\xe9")]
    other = read_rows([write("b.json", '[{"x":1},{"x":2},{"x":"\xe9"}]')])
    assert [row.id for row in other] == [row.id for row in rows]

def test_ids_depend_on_the_record_alone(write):
    first = read_rows([write("a.tsv", "x\n1\n2\n1\n")])
    other = read_rows([write("b.tsv", "x\r\n2\r\n1")])
    assert [row.id for row in other] == [first[1].id, first[0].id]
    assert first[2].id not in (first[0].id, first[1].id)
    assert all(len(row.id) == 16 and int(row.id, 16) >= 0 for row in first)

def test_blank_lines_are_no_rows(write):
    path, sources = write("a.jsonl", '\n{"x": 1}\n \n'), {}
    rows = read_rows([path, path], sources=sources)
    assert [(row.line, row.fields) for row in rows] == [(2, {"x": 1})] * 2
    assert sources[str(path)]["rows"] == 1

def test_declared_columns(write):
    path = write("a.tsv", "1\t2\n3\t4\t5\t6\n")
    rows = read_rows([path], columns=("x", "y"))
    assert [row.fields for row in rows] == [
        {"x": "1", "y": "2"},
        {"x": "3", "y": "4", EXTRA: ["5", "6"]},
    ]
    with pytest.raises(DataError, match=r"a.tsv:1: 2 cells for the columns .*'1\\t2'"):
        read_rows([path], columns=("x", "y", "z"))
    with pytest.raises(DataError, match="column 'x' occurs twice"):
        read_rows([path], columns=("x", "x"))

DAMAGED = [
    ("a.tsv", "x\ty\n1\t2\n1\t2\t3\n", "a.tsv:3: 3 cells for the columns x, y"),
    ("a.tsv", "x\ty\n1\n", "a.tsv:2: 1 cells for the columns x, y: .*or name them"),
    ("a.tsv", "x\tx\n1\t2\n", "a.tsv: column 'x' occurs twice in .*: use data.columns"),
    ("a.tsv", b"x\n1\ncaf\xe9\n", r"a.tsv:3: not UTF-8: b'caf\\xe9'.*iconv"),
    ("a.tsv", "", "a.tsv: holds no rows"),
    ("a.tsv", "x\ty\n", "a.tsv: holds no rows"),
    ("a.txt", "", "a.txt: holds no rows"),
    ("a.csv", 'x,y\n1,2\n3,"4\n5,6\n', "a.csv:3: the record that begins here is not csv"),
    ("a.csv", 'x,y\n1,"2"3\n', "a.csv:2: the record that begins here is not csv"),
    ("a.jsonl", '{"x": 1}\n{"x": "cut off', "a.jsonl:2: not valid JSON: Unterminated string"),
    ("a.jsonl", '{"x": 1}\n[1]\n', "a.jsonl:2: a record must be a JSON object, this is list"),
    ("a.jsonl", '{"x": "\\ud83d"}\n', r"a.jsonl:1: half of a surrogate pair, '\\ud83d'"),
    ("a.jsonl", '{"x": "\\uD83D"}\n', r"a.jsonl:1: half of a surrogate pair, '\\ud83d'"),
    ("a.json", '[{"x": 1},\n{"x": 2', "a.json:2: not valid JSON: Expecting ',' delimiter"),
    ("a.json", '[{"x": 1},\n{"x": 2}', "a.json:2: not valid JSON: Expecting ',' .*line 2 column 9"),
    ("a.json", '[{"x": 1},\n]', "a.json:2: not valid JSON"),
    ("a.json", '[{"x": 1}]\n{"x": 2}', "a.json:2: not valid JSON: Extra data: line 2 column 1"),
    ("a.json", '{"x": 1}\n{"x": 2}\n', "a.json:2: not valid JSON: Extra data: .*name jsonl"),
    ("a.json", "[]", "a.json: holds no rows"),
    ("a.tsv.gz", gzip.compress(b"x\n1\n", mtime=0)[:-9], "a.tsv.gz: damaged gzip file"),
    ("a.tsv.gz", b"x\n1\n", "a.tsv.gz: damaged gzip file"),
    ("a.zip.gz", gzip.compress(b"", mtime=0),
     "a.zip.gz: unknown suffix; name the format, one of tsv, csv"),
    ("a.json", '{"x": []}', "a.json: a json file must hold one array, .*name jsonl"),
    ("a.json", "[[1, 2]]", "a.json:1: a record must be a JSON object, this is list: ..1, 2"),
]

@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_damage_is_named_with_its_place(write, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_rows([write(name, content)])

def test_a_missing_file_and_columns_for_jsonl(write, tmp_path):
    with pytest.raises(DataError, match="none.tsv: cannot be read: No such file"):
        read_rows([tmp_path / "none.tsv"])
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_rows(["."], format="tsv")
    with pytest.raises(DataError, match="a.jsonl:1: column names are for cells, this names"):
        read_rows([write("a.jsonl", "{}\n")], columns=("x",))

def test_a_whole_surrogate_pair_is_text(write):
    assert fields(write("a.jsonl", '{"x": "\\ud83d\\ude42"}\n')) == [{"x": "\U0001f642"}]

def test_conll_sentences(write):
    content = "-DOCSTART- -X- O\n\na\tO\r\n\u2028 b\tB-x\n\t\n\nc NN  I-y\n-DOCSTART- O\nd O"
    rows = read_rows([write("a.conll", content)])
    assert [(row.line, row.fields) for row in rows] == [
        (3, {"tokens": ["a", "\u2028 b"], "tags": ["O", "B-x"], "document": 1}),
        (7, {"tokens": ["c"], "tags": ["I-y"], "document": 1}),
        (9, {"tokens": ["d"], "tags": ["O"], "document": 2}),
    ]

def test_labelled_lines(write):
    lines = read_rows([write("a.train", "4 a  fine \n\n0 \n")], format="labelled")
    assert [row.fields for row in lines] == [
        {"label": "4", "text": "a  fine "},
        {"label": "0", "text": ""},
    ]
