"""The account of a run's data: every row in one step of the funnel, on a page of its own."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
import pytest
from ftcore.config import LabelledDataConfig
from ftcore.data.prepare import prepare
from ftcore.data.store import Prepared, write_page
from ftcore.data.tokenizer import Tokenizer

ROWS = [
    *({"text": f"a text that tells of {n} green bottles", "label": "ab"[n % 2]} for n in range(8)),
    {"text": "a text that tells of 0 green bottles", "label": "a"},  # a duplicate
    {"text": "", "label": "a"},
    {"text": "word " * 90, "label": "b"},  # too long
    {"text": "meet me <now> at the caf\u00c3\u00a9, or not", "label": "b"},
    {"text": "what the test asks", "label": "a"},
]

@pytest.fixture
def data(tmp_path: Path, bert: Tokenizer) -> Prepared:
    train, test = tmp_path / "rows.jsonl", tmp_path / "test.jsonl"
    lines = [*map(json.dumps, ROWS), "no json", ""]
    train.write_text("\n".join(lines), "utf-8")
    test.write_text(json.dumps({"text": "what the test asks", "label": "a"}) + "\n", "utf-8")
    config = LabelledDataConfig(
        train=(str(train),), test=(str(test),), on_bad="skip", max_length=40, over_length="drop",
        balance="weights", holdout=2,
    )  # fmt: skip
    return prepare(config, bert, seed=0)

def test_every_row_is_in_one_step_of_the_funnel(data: Prepared, tmp_path: Path) -> None:
    data.write(tmp_path / "data")
    account = json.loads((tmp_path / "data" / "funnel.json").read_text())
    steps = {step["step"]: step for step in account["funnel"]["train"]}
    lost = {name: step["in"] - step["out"] for name, step in steps.items()}
    assert lost == {"read": 1, "map": 1, "filter": 0, "compare": 2, "split": 2, "encode": 1}
    documents = len(data.train.documents)
    assert steps["encode"]["out"] == documents and len(data.dev.documents) == 2
    assert steps["read"]["in"] == documents + 2 + 5 == len(ROWS) + 1
    whys = {why["reason"]: why["such as"] for step in steps.values() for why in step["lost"]}
    assert whys["duplicate"].endswith("rows.jsonl:1")
    assert "test.jsonl:1" in whys["exact in test"]
    rejected = (tmp_path / "data" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 2 + 5 and "no json" in rejected[0]

def test_what_was_found_is_counted_and_said(data: Prepared) -> None:
    said = data.summary()
    assert "rows.jsonl: 13 rows, jsonl, by its suffix" in said and "'label': 'a'}" in said
    assert "left out 1 (duplicate)" in said and "mojibake 1" in said
    statistics = data.notes["statistics"]["train"]
    lengths = [len(document) for document in data.train.documents]
    assert statistics["tokens"] == sum(lengths) and statistics["lengths"]["p100"] == max(lengths)
    assert sum(statistics["labels"].values()) == len(lengths)
    before, after = zip(*data.notes["balance"].values(), strict=True)
    assert sum(before) == len(lengths) + 1  # one of them is too long
    assert after[0] == pytest.approx(after[1], abs=0.02)

class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.links += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.links += [name for name, _ in attrs if name in ("src", "href")]

def test_the_page_needs_no_network_and_shows_text_as_text(data: Prepared, tmp_path: Path) -> None:
    data.notes["conflicts"]["such as"] = [["<script>alert(1)</script>", ["a", "x:1"], ["b", "x:2"]]]
    data.write(tmp_path / "data")
    page = (tmp_path / "data" / "report.html").read_text()
    for label, (before, after) in data.notes["balance"].items():
        assert f'<td>{label}<td class="n">{before:.0f}<td class="n">{after:g}' in page
    tags = Tags()
    tags.feed(page)
    assert tags.links == [] and not re.search(r"url\(|@import|https?:", page)
    assert "&lt;script&gt;alert(1)" in page and "prefers-color-scheme: dark" in page
    (tmp_path / "data" / "report.html").unlink()
    assert write_page(tmp_path / "data").read_text() == page
