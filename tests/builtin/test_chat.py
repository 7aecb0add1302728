"""The embedded chat data set: its files are what its maker makes, shipped, and written as jsonl."""

import gzip
import json
import tomllib
from pathlib import Path
import pytest
import ftcore.builtin
from ftcore.builtin.chat import FOLDER, SPLITS, Row, preference_pairs, rows
from tests.bench.chat.export import labelled, main, noisy
from tests.bench.chat.rows import build, packed, rivalled

BUILTIN = Path(ftcore.builtin.__file__).parent

@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return build(seed=0)

def test_the_files_are_what_the_maker_makes(splits):
    made = packed()
    assert tuple(made) == SPLITS == tuple(splits)
    assert {path.name for path in FOLDER.iterdir()} == {f"{split}.jsonl.gz" for split in SPLITS}
    for split, content in made.items():
        kept = (FOLDER / f"{split}.jsonl.gz").read_bytes()
        assert content[4:8] == kept[4:8] == bytes(4)  # no time; the rest is zlib's, by its version
        assert gzip.decompress(content) == gzip.decompress(kept)
        assert rows(split) == rivalled(splits[split])
        for row in rows(split):
            assert (row["fault"] is None) == ("rejected" in row) == ("corruption" in row)

def test_the_data_files_are_shipped():
    project = tomllib.loads((BUILTIN.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    globs = project["tool"]["setuptools"]["package-data"]["ftcore.builtin"]
    shipped = {path for glob in globs for path in BUILTIN.glob(glob)}
    assert shipped == {f for name in ("base", "start", "rows") for f in BUILTIN.glob(f"{name}/*")}

def test_labelled_rows_are_text_and_intent(splits):
    found = labelled(splits["train"])
    assert len(found) == len(splits["train"])
    for row, source in zip(found, splits["train"], strict=True):
        text = source["messages"][0]["content"]
        assert row == {"id": source["id"], "text": text, "label": source["intent"]}

def test_of_noisy_rows_six_in_ten_have_the_wrong_answer(splits):
    rows = [row for row in rivalled(splits["train"]) if row["fault"] is None]
    found = noisy(rivalled(splits["train"]))
    said = [row["messages"][-1]["content"] for row in found]
    wrong = sum(text == row["rejected"] for row, text in zip(rows, said, strict=True))
    right = sum(text == row["messages"][-1]["content"]
                for row, text in zip(rows, said, strict=True))
    assert wrong + right == len(rows) == 9032 and 0.59 < wrong / len(rows) < 0.61
    assert [row["messages"][:-1] for row in found] == [row["messages"][:-1] for row in rows]

def test_the_command_writes_files_that_come_back_as_they_were(splits, tmp_path, capsys):
    main(tmp_path / "new" / "folder")
    lines = capsys.readouterr().out.splitlines()
    counts = {"train": 10172, "dev": 306} | dict.fromkeys(SPLITS[2:], 256)
    assert lines == [f"{name}: {count} rows" for name, count in counts.items()]
    for name, chats in splits.items():
        forms = {"chat": chats, "labelled": labelled(chats)}
        forms["pairs"] = preference_pairs(rivalled(chats))
        for form, records in forms.items():
            raw = (tmp_path / "new" / "folder" / form / f"{name}.jsonl").read_bytes()
            assert raw.endswith(b"\n") and b"\r" not in raw
            assert [json.loads(line) for line in raw.split(b"\n")[:-1]] == records
    assert (tmp_path / "new/folder/noisy/train.jsonl").is_file()
