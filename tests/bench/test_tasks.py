"""The recipes of tasks.toml are understood; what is made of the files has no row on both sides."""

import shlex
from pathlib import Path
import pytest
from ftcore.cli import parse
from ftcore.data.read import read_rows

from .tasks import FIGURES, MAKERS, RECIPES

@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_command(name: str, data_dir: Path) -> None:
    recipe = RECIPES[name]
    words = shlex.split(recipe["data"].format(d=data_dir, m="made") + " " + recipe["train"])
    config = parse([recipe["task"], *words]).config
    files = [*config.data.train, *config.data.dev, *config.data.test]
    for file in files:
        assert file.startswith("made/") or Path(file.partition(".gz:")[0] + ".gz" * (
            ".gz:" in file)).is_file(), file  # fmt: skip
    assert config.data.test and (config.data.dev or config.data.holdout)
    assert recipe.get("figures", "first") in FIGURES and recipe["report"]
    assert any(file.startswith("made/") for file in files) == (recipe.get("make") in MAKERS)

@pytest.mark.parametrize(
    ("maker", "counts"),
    [
        ("news", {"train.jsonl": 14990, "test.jsonl": 7600}),
        ("wikigold", {"train.conll": 1202, "dev.conll": 180, "test.conll": 314}),
        ("entity_kinds", {"train.jsonl": 1202, "dev.jsonl": 180, "test.jsonl": 314}),
        ("entailment", {"train.jsonl": 12082, "dev.jsonl": 249}),
        ("teacher", {"train.jsonl": 5166, "dev.jsonl": 646, "test.jsonl": 646}),
    ],
)
def test_what_is_made(maker: str, counts: dict[str, int], data_dir: Path, tmp_path: Path) -> None:
    MAKERS[maker](data_dir, tmp_path)
    rows = {name: read_rows([tmp_path / name]) for name in counts}
    assert {name: len(some) for name, some in rows.items()} == counts
    keys = {"teacher": ["instruction"], "entailment": ["sentence1", "sentence2"], "news": ["text"]}
    keys["entity_kinds"] = ["text"]
    texts = [
        {str([row.fields[key] for key in keys.get(maker, ["tokens"])]) for row in rows[name]}
        for name in counts
    ]
    shared = set.union(*texts[:-1]) & texts[-1]
    assert all(len(text) < 14 for text in shared)  # "1 ." numbers songs in several documents
