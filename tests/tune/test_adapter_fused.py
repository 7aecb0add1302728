"""Adapters of families that keep matrices fused or transposed on disk, both ways with peft."""

import json
from collections.abc import Callable
from pathlib import Path
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from ftcore.config import PeftConfig
from ftcore.errors import ModelError
from ftcore.model.families import family_named
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from ftcore.tune.adapter import WEIGHTS, load_adapter, save_adapter
from ftcore.tune.lora import apply_lora, lora_layers
from tests.tune.test_adapter import CLOSE, assert_comes_back, edit_json, hf_logits, logits, tune

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OWN = {
    "gpt2": {"n_inner": 24},
    "gpt_neox": {"intermediate_size": 24},
    "modernbert": {"intermediate_size": 24, "pad_token_id": 0},
}
FUSED = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "modernbert": "Wqkv"}

@pytest.fixture(params=OWN)
def name(request: pytest.FixtureRequest) -> str:
    return request.param

@pytest.fixture
def make(tmp_path: Path, name: str) -> Callable[[], tuple[transformers.PreTrainedModel, Model]]:
    """A tiny random model of transformers, and the same of ours, both new in each call."""

    def build() -> tuple[transformers.PreTrainedModel, Model]:
        config = transformers.AutoConfig.for_model(
            name, **SIZES, **OWN[name], num_labels=3, initializer_range=0.2
        )
        is_encoder = name == "modernbert"
        auto = (
            transformers.AutoModelForSequenceClassification
            if is_encoder
            else (transformers.AutoModelForCausalLM)
        )
        torch.manual_seed(0)
        hf = auto.from_config(config).eval()
        hf.save_pretrained(tmp_path / "base")
        task = "classify" if is_encoder else "lm"
        return hf, load_model(tmp_path / "base", task=task, dtype=torch.float32).model

    return build

def save(model: Model, name: str, folder: Path, **changes: object) -> Path:
    """Wrap, move and save the model."""
    extra = (*changes.pop("extra_modules", ()), *(["head"] if name == "modernbert" else []))
    config = PeftConfig(rank=3, alpha=4.0, extra_modules=extra, **changes)
    apply_lora(model, config, generator=torch.Generator().manual_seed(1))
    tune(model)
    save_adapter(model, folder, family=family_named(name), base_path="base")
    return folder

@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rs_lora": True},
        {"targets": ("*.[qkv]_proj", "down_proj")},
        {"targets": ("o_proj", "trunk.layers.1.*.[qkv]_proj"), "extra_modules": ("trunk.norm",)},
        {"targets": ("*.1.self_attn.o_proj",), "extra_modules": ("mlp", "*.0.self_attn.*_proj")},
    ],
    ids=["all", "rsLoRA", "some", "one layer", "parts trained fully"],
)
def test_ours_in_peft_and_back(name, changes, make, tmp_path) -> None:
    hf, model = make()
    _, again = make()
    folder = save(model, name, tmp_path / "adapter", **changes)
    assert_comes_back(hf, model, again, folder, family_named(name))

@pytest.mark.parametrize("targets", ["all-linear", "fused"])
def test_theirs_in_ours_and_back(name, targets, make, tmp_path) -> None:
    """One A for all parts; once ours, each part has its own, and peft still reads it."""
    hf, model = make()
    chosen = [FUSED[name]] if targets == "fused" else targets
    theirs = peft.get_peft_model(hf, peft.LoraConfig(r=3, lora_alpha=5, target_modules=chosen))
    tune(theirs.eval())
    theirs.save_pretrained(tmp_path / "theirs")
    expected = hf_logits(theirs)
    load_adapter(model, tmp_path / "theirs", family=family_named(name))
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    tune(model)
    family = family_named(name)
    save_adapter(model, tmp_path / "ours", family=family, base_path="base")
    hf, again = make()
    load_adapter(again, tmp_path / "ours", family=family)
    assert torch.equal(logits(again), logits(model))
    edit_json(tmp_path / "ours" / "adapter_config.json", task_type=None)  # peft: no new head
    moved = hf_logits(peft.PeftModel.from_pretrained(hf, tmp_path / "ours").eval())
    assert (moved - expected).abs().max() > 0.03
    torch.testing.assert_close(logits(model), moved, **CLOSE)

@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "roberta"])
def test_a_tagger_has_a_classifier_of_another_name(name: str, tmp_path: Path) -> None:
    """Where the classifier of documents is `score`, or has parts, that of tokens does not."""
    encoder = {"intermediate_size": 24, "type_vocab_size": 1, "pad_token_id": 2}
    config = transformers.AutoConfig.for_model(
        name, **SIZES, **OWN.get(name, encoder), num_labels=3, initializer_range=0.2)
    torch.manual_seed(0)
    hf = transformers.AutoModelForTokenClassification.from_config(config).eval()
    hf.save_pretrained(tmp_path / "base")
    (model, family, *_), (again, *_) = (
        load_model(tmp_path / "base", task="tag", dtype=torch.float32) for _ in range(2))
    apply_lora(model, PeftConfig(rank=3, alpha=4.0, extra_modules=("head",)),
               generator=torch.Generator().manual_seed(1))
    tune(model)
    save_adapter(model, tmp_path / "adapter", family=family, base_path="base")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["modules_to_save"] == ["classifier"] and written["task_type"] == "TOKEN_CLS"
    assert_comes_back(hf, model, again, tmp_path / "adapter", family)

def test_ranks_add_up_and_the_scale_stays(name, make, tmp_path) -> None:
    folder = save(make()[1], name, tmp_path / "adapter", targets=("*.[qkv]_proj",))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 4
    assert set(config["rank_pattern"].values()) == {9}
    assert set(config["alpha_pattern"].values()) == {12.0}
    assert list(config["rank_pattern"]) == config["target_modules"]
    factors = {k: t for k, t in load_file(folder / WEIGHTS).items() if "lora" in k}
    shapes = {key.split(".")[-2]: tuple(tensor.shape) for key, tensor in factors.items()}
    assert shapes == {"lora_A": (9, 16), "lora_B": (48, 9)}

def test_refusals(name, make, tmp_path) -> None:
    with pytest.raises(ModelError, match=f"{FUSED[name]} is one for peft: train trunk"):
        save(make()[1], name, tmp_path / "a", targets=("o_proj",), extra_modules=("q_proj",))
    with pytest.raises(ModelError, match=f"{FUSED[name]} is one for peft: train trunk"):
        save(make()[1], name, tmp_path / "a", targets=("q_proj", "v_proj"))
    hf, model = make()
    settings = peft.LoraConfig(r=3, target_modules=[FUSED[name]])
    peft.get_peft_model(hf, settings).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file(tensors | {key: torch.zeros(47, 3)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"lora_B.weight is \[47, 3\], must be \[48, 3\]"):
        load_adapter(model, tmp_path, family=family_named(name))
    owner = key.removesuffix("lora_B.weight")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(owner)}
    save_file(kept, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"missing: .*\.lora_A.weight"):
        load_adapter(model, tmp_path, family=family_named(name))
    assert not lora_layers(model)
