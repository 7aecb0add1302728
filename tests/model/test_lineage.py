"""What `model.path` names: a model, a run, or an adapter on one, folded into it."""

from pathlib import Path
import pytest
import torch
from ftcore.errors import ModelError
from ftcore.hub import BUILTIN, lineage
from ftcore.tune.adapter import load_base
from ftcore.tune.lora import lora_layers

HOW = {"task": "lm", "dtype": torch.float32}

def test_the_start_of_reinforcement_learning_is_an_adapter_on_the_base() -> None:
    base, start = load_base("builtin:base", **HOW).model, load_base("builtin:start", **HOW).model
    assert lineage("builtin:start") == (BUILTIN["builtin:base"], [BUILTIN["builtin:start"]])
    assert not lora_layers(start) and all(p.requires_grad for p in start.parameters())
    mine, theirs = dict(start.named_parameters()), dict(base.named_parameters())
    assert mine.keys() == theirs.keys()
    moved = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    assert moved == {n for n in mine if "proj" in n or "norm" in n}

def test_what_is_not_there_is_named_as_it_was_written() -> None:
    with pytest.raises(ModelError, match=r"model.path = \./nothing/here: there is no such folder"):
        lineage("./nothing/here")

def test_a_run_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert lineage(str(tmp_path)) == (tmp_path / "model", [])
