"""The 22 real data sets, each read by naming its columns, with the counts that its README gives."""

import tomllib
from collections.abc import Hashable
from pathlib import Path
from typing import Any
import pytest
from ftcore.config import RUNS
from ftcore.data.dedup import folded
from ftcore.data.prepare import conflicts, leaks, repeated, said
from ftcore.data.read import Rows, collect, read_rows

SETS = tomllib.loads(Path(__file__).with_name("real_sets.toml").read_text())

def splits(name: str, data_dir: Path) -> list[Rows]:
    """The files of a set, or each pattern of them, as a test split of its own."""
    told = SETS[name]
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in told["options"].items()}
    kind = type(RUNS[told["task"]]().data)
    found = [
        collect(kind(train=tuple(map(str, sorted(data_dir.glob(file)))), **options), {})
        for file in told["files"]
    ]
    return [part["train"] for part in found]

@pytest.mark.parametrize("name", SETS)
def test_a_real_set_has_the_counts_of_its_readme(name: str, data_dir: Path) -> None:
    told, parts = SETS[name], splits(name, data_dir)
    assert [part.num_rows for part in parts] == told["rows"]
    texts = [[said(example, without=()).strip() for example in part.examples] for part in parts]
    empty = [part.num_rows - len(part.examples) for part in parts]
    assert sum(empty) <= sum(told["rows"]) / 100
    repeated = [len(some) - len(set(some)) for some in texts]
    assert repeated == told["duplicates"]
    several = [found_conflicts(part) for part in parts]
    assert several == told["conflicts"]
    assert [len({*texts[0]} & {*other}) for other in texts[1:]] == told["overlap"]

def found_conflicts(part: Rows) -> int:
    """Texts with several labels, as `compare` finds them and as a dictionary does."""
    answers: dict[str, set[Hashable]] = {}
    for example in part.examples:
        answers.setdefault(folded(said(example, without=())), set()).add(example.target)
    if not hasattr(part.examples[0], "messages"):
        count = conflicts(part.examples)["texts"]
        assert count == sum(len(found) > 1 for found in answers.values())
        return count
    return 0

@pytest.mark.parametrize("name", ["banking77", "cola", "stsb", "ner_wnut17"])
def test_duplicates_and_leaks_are_those_that_a_dictionary_finds(name: str, data_dir: Path) -> None:
    train, *held = splits(name, data_dir)
    first: dict[tuple[str, Any], str] = {}
    for example in train.examples:
        first.setdefault((said(example), example.target), example.id)
    lost, ids = repeated(train.examples), {example.id for example in train.examples}
    assert len(ids) == len(train.examples)
    assert {row.id for row in lost} == ids - set(first.values())
    texts = {folded(said(example)) for part in held for example in part.examples}
    rows = {example.id for example in train.examples if folded(said(example)) in texts}
    named = {f"test{number}": part for number, part in enumerate(held)}
    found = leaks(train.examples, named)
    assert {row.id for row in found if row.reason.startswith("exact")} == rows
    assert len(rows) >= sum(SETS[name]["overlap"])

def test_trees_of_messages_and_rows_of_rewards_are_read(data_dir: Path) -> None:
    trees = read_rows([data_dir / "oasst_sample/en_100_tree.jsonl"])
    assert len(trees) == 100 and all(tree.fields["prompt"]["replies"] for tree in trees)
    rewards = read_rows(sorted(data_dir.glob("taskmaster4/reward/reward_0*.json.gz")))
    assert len(rewards) == 3228
    assert sum(row.fields["reward"] == 1.0 for row in rewards) == 2775
