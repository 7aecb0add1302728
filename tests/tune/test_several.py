"""Several adapters on one model: switched and off; against each alone and peft."""

from pathlib import Path

import peft
import pytest
import torch

from ftcore.config import PeftConfig
from ftcore.errors import ConfigError, ModelError
from ftcore.model.families import family_named
from ftcore.model.heads import Model
from ftcore.tune.adapter import base_sha256, load_adapter, save_adapter
from ftcore.tune.lora import apply_lora, lora_layers, use
from tests.tune.test_adapter import hf_logits, logits, make_hf, ours, save_theirs

# Another rank, scale and set of layers each.
SETTINGS = {
    "one": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "two": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "three": {"r": 2, "lora_alpha": 1, "target_modules": ["v_proj", "up_proj"]},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Adapters of the same base, made by peft."""
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        hf = make_hf()
        torch.manual_seed(seed)
        save_theirs(hf, tmp_path / name, **settings)
    return {name: tmp_path / name for name in SETTINGS}

@pytest.fixture
def model(folders: dict[str, Path]) -> Model:
    """All of them on one model."""
    made = ours(make_hf())
    for name, folder in folders.items():
        load_adapter(made, folder, family=family_named("qwen3"), name=name)
    return made

def alone(folder: Path) -> Model:
    made = ours(make_hf())
    load_adapter(made, folder, family=family_named("qwen3"))
    return made

def test_each_answers_as_alone_and_as_in_peft(model: Model, folders: dict[str, Path]) -> None:
    base = logits(ours(make_hf()))
    theirs = peft.PeftModel.from_pretrained(make_hf(), folders["one"], adapter_name="one").eval()
    for name in ("two", "three"):
        theirs.load_adapter(folders[name], name)
    for name in (*SETTINGS, "one"):
        use(model, name)
        theirs.set_adapter(name)
        assert torch.equal(logits(model), logits(alone(folders[name])))
        torch.testing.assert_close(logits(model), hf_logits(theirs), rtol=1e-4, atol=1e-5)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f".adapters.{name}.lora_" in n for n in trained)
        for layer in lora_layers(model).values():
            layer.active = None
        assert torch.equal(logits(model), base)
        use(model, name)
        assert not torch.equal(logits(model), base)

def test_switching_leaves_no_merged_matrix(model: Model, folders: dict[str, Path]) -> None:
    use(model, "two")
    for layer in lora_layers(model).values():
        layer.merge()
    torch.testing.assert_close(logits(model), logits(alone(folders["two"])), **CLOSE)
    use(model, "three")
    assert torch.equal(logits(model), logits(alone(folders["three"])))

@pytest.mark.parametrize("head", [False, True])
def test_each_answers_as_alone_on_a_classifier(head: bool) -> None:
    """Also where its own layers are wrapped."""
    targets = ("all-linear", "head.*") if head else ("all-linear",)
    config = PeftConfig(rank=2, alpha=4.0, targets=targets)
    found = {}
    for names in ("a", "b", "ab"):
        model = ours(make_hf("bert"))
        for name in names:
            draw = torch.Generator().manual_seed(ord(name))
            apply_lora(model, config, generator=draw, name=name)
            for layer in lora_layers(model).values():
                torch.nn.init.normal_(layer.factors.lora_b, generator=draw)
        assert any(n.startswith("head.") for n in lora_layers(model)) == head
        for name in names:
            use(model, name)
            found[names, name] = logits(model)
    assert torch.equal(found["ab", "a"], found["a", "a"])
    assert torch.equal(found["ab", "b"], found["b", "b"])
    assert not torch.equal(found["a", "a"], found["b", "b"])

def test_the_one_named_is_saved(
    model: Model, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = family_named("qwen3")
    digest = base_sha256(ours(make_hf()))
    assert base_sha256(model) == digest
    for name in SETTINGS:
        words = {"family": family, "base_path": "b", "task_type": "CAUSAL_LM", "name": name}
        save_adapter(model, tmp_path / "saved" / name, **words)
        again = alone(tmp_path / "saved" / name)
        assert torch.equal(logits(again), logits(alone(folders[name])))
    with pytest.raises(ModelError, match="no LoRA layers of 'four'"):
        save_adapter(model, tmp_path / "x", family=family, base_path="b", task_type="", name="four")

def test_what_cannot_be_is_refused(
    model: Model, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = family_named("qwen3")
    with pytest.raises(ConfigError, match="has an adapter 'one' already: name this one otherwise"):
        load_adapter(model, folders["one"], family=family, name="one")
    with pytest.raises(ConfigError, match="no adapter 'four'; it has: one, three, two"):
        use(model, "four")
    save_theirs(make_hf(), tmp_path / "full", modules_to_save=["norm"])
    other = ours(make_hf())
    load_adapter(other, tmp_path / "full", family=family)
    for made, folder in ((model, tmp_path / "full"), (other, folders["one"])):
        before = set(lora_layers(made)), {n: p.requires_grad for n, p in made.named_parameters()}
        with pytest.raises(ConfigError, match="changes the base of the others: hold it alone"):
            load_adapter(made, folder, family=family, name="more")
        after = set(lora_layers(made)), {n: p.requires_grad for n, p in made.named_parameters()}
        assert before == after
