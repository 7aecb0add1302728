"""What a run leaves is what was trained: loaded again, it gives the same scores."""

import json
from collections.abc import Callable
from pathlib import Path
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models
from ftcore.config import RUNS, ModelConfig, PeftConfig
from ftcore.data.pack import collate
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.compute import generator
from ftcore.errors import ModelError
from ftcore.model.families import family_named
from ftcore.model.load import Accounting, LoadedModel, load_model, save_model
from ftcore.tune.adapter import load_artifact, save_artifact
from ftcore.tune.task import TASKS, choose_trainable

LABELS = ("bad", "gr\u00fcn", "good")
FAMILIES = {"qwen3": ("sft", None), "bert": ("classify", LABELS), "tag": ("tag", LABELS)}
PEFT_NAMES = {"sft": "CAUSAL_LM", "classify": "SEQ_CLS", "tag": "TOKEN_CLS"}

@pytest.fixture
def base(tmp_path: Path, tiny_model: Callable) -> Callable[[str], Path]:
    """Family -> a model folder with its tokenizer."""

    def make(family: str) -> Path:
        folder = tmp_path / family
        folder.mkdir()
        _, labels = FAMILIES[family]
        model, form = tiny_model(family), family_named({"tag": "bert"}.get(family, family))
        save_model(LoadedModel(model, form, {}, Accounting(), folder, labels), folder)
        vocab = {f"w{n}": n for n in range(61)}
        fast = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w0"))
        fast.save(str(folder / "tokenizer.json"))
        return folder

    return make

@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_back_with_the_same_scores(
    family: str, method: str, base: Callable, rows: Callable, tmp_path: Path
) -> None:
    folder, run = base(family), tmp_path / "run"
    task, labels = FAMILIES[family]
    kind, config = TASKS[task], RUNS[task](model=ModelConfig(path=str(folder)))
    run.mkdir()
    loaded = load_model(folder, task=kind.model_task, dtype=torch.float32)
    choose_trainable(
        loaded.model, PeftConfig(method=method, trainable=("last:1",)), generator(0, 2)
    )
    with torch.no_grad():
        for param in loaded.model.parameters():
            if param.requires_grad:
                param += 0.01 * torch.randn(param.shape, generator=generator(0, 3))
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(ModelError, match="has not finished; continue it with: python train.py"):
        load_artifact(run, kind=kind, dtype=torch.float32)
    path = save_artifact(loaded, tokenizer, run, config)
    assert path == run / ("adapter" if method == "lora" else "model")
    again = load_artifact(run, kind=kind, dtype=torch.float32)
    batch = collate(rows(family, 3))
    before = load_model(folder, task=kind.model_task, dtype=torch.float32)
    ours, theirs, start = (
        kind.loss(loaded.model.eval(), batch)[0] for loaded in (loaded, again, before)
    )
    assert torch.equal(ours, theirs) and not torch.equal(ours, start)
    assert not again.model.training
    assert again.labels == labels
    if method != "lora":
        assert Tokenizer.load(path).digest == tokenizer.digest
    else:
        written = json.loads((path / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(folder)
        assert written["task_type"] == PEFT_NAMES[task]

def test_an_artifact_is_replaced_whole(base: Callable, tmp_path: Path) -> None:
    """A run that was killed while it wrote its model writes it again."""
    folder, run = base("qwen3"), tmp_path / "run"
    kind = TASKS["pretrain"]
    run.mkdir()
    loaded = load_model(folder, task="lm", dtype=torch.float32)
    for _ in range(2):
        save_artifact(loaded, Tokenizer.load(folder), run, RUNS["pretrain"]())
    assert [entry.name for entry in run.iterdir()] == ["model"]
    load_artifact(run, kind=kind, dtype=torch.float32)

def test_a_head_that_is_lost_is_not_drawn_anew(base: Callable, tmp_path: Path) -> None:
    folder, run, kind = base("bert"), tmp_path / "run", TASKS["classify"]
    run.mkdir()
    loaded = load_model(folder, task="classify", dtype=torch.float32)
    config = RUNS["classify"](model=ModelConfig(path=str(folder)))
    save_artifact(loaded, Tokenizer.load(folder), run, config)
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if not name.startswith("classifier")}, file)
    with pytest.raises(ModelError, match="classifier"):
        load_artifact(run, kind=kind, dtype=torch.float32)
