"""What is trained for each method, and what is refused before anything is written."""

from collections.abc import Callable
from dataclasses import replace
import numpy as np
import pytest
import torch
from ftcore.config import PeftConfig
from ftcore.data.encode import Split
from ftcore.data.pack import Encoded
from ftcore.data.store import Prepared
from ftcore.env.compute import generator
from ftcore.errors import ConfigError, DataError
from ftcore.model.heads import Model
from ftcore.tune.task import choose_trainable
from train import check_lengths

def trained(model: Model, config: PeftConfig, seed: int = 0) -> set[str]:
    choose_trainable(model, config, generator(seed, 2))
    return {name for name, param in model.named_parameters() if param.requires_grad}

def test_full_trains_all(tiny_model: Callable) -> None:
    model = tiny_model("qwen3")
    assert trained(model, PeftConfig()) == {name for name, _ in model.named_parameters()}

def test_freeze_trains_what_is_named(tiny_model: Callable) -> None:
    names = trained(tiny_model("bert"), PeftConfig(method="freeze", trainable=("head",)))
    assert names == {f"head.{m}.{p}" for m in ("pooler", "classifier") for p in ("weight", "bias")}
    with pytest.raises(ConfigError, match="hed"):
        trained(tiny_model("bert"), PeftConfig(method="freeze", trainable=("hed",)))

def test_lora_trains_its_factors_and_the_new_head_of_a_classifier(tiny_model: Callable) -> None:
    names = trained(tiny_model("qwen3"), PeftConfig(method="lora", targets=("q_proj",)))
    layers = [f"trunk.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert names == {f"{layer}.lora_{f}" for layer in layers for f in "ab"}
    names = trained(tiny_model("bert"), PeftConfig(method="lora", targets=("q_proj",)))
    assert {n for n in names if "lora" not in n} == {
        f"head.{m}.{p}" for m in ("pooler", "classifier") for p in ("weight", "bias")
    }

@pytest.mark.parametrize(
    "config",
    [
        PeftConfig(method="freeze", trainable=("norms",)),
        PeftConfig(method="lora", targets=("q_proj",)),
    ],
)
def test_what_the_checkpoint_lacked_must_be_trained(
    config: PeftConfig, tiny_model: Callable
) -> None:
    """Else it would stay random, and an adapter would not hold it."""
    model, new = tiny_model("qwen3"), ("trunk.embed_tokens.weight",)
    with pytest.raises(ConfigError, match="weight: not in the checkpoint.*--peft.method full"):
        choose_trainable(model, config, generator(0, 2), new=new)
    choose_trainable(tiny_model("qwen3"), PeftConfig(), generator(0, 2), new=new)

def test_every_option_reaches_the_layers(tiny_model: Callable) -> None:
    model = tiny_model("qwen3")
    config = PeftConfig(
        method="lora", rank=4, alpha=6.0, dropout=0.25, targets=("up_proj",), rs_lora=True,
        extra_modules=("trunk.norm",),
    )  # fmt: skip
    assert "trunk.norm.weight" in trained(model, config)
    layer = model.trunk.layers[0].mlp.up_proj
    assert layer.lora_a.shape[0] == 4 and layer.config.scale == 6.0 / 2
    assert layer.config.dropout == 0.25

def test_the_factors_are_drawn_from_the_seed(tiny_model: Callable) -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = tiny_model("qwen3")
        trained(model, PeftConfig(method="lora"), seed)
        drawn.append(model.trunk.layers[0].mlp.up_proj.lora_a)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

def test_a_document_beyond_the_learned_positions_is_refused(tiny_model: Callable) -> None:
    spec = replace(tiny_model("bert").spec, max_positions=8)

    def data(length: int) -> Prepared:
        row = Encoded("row-7", np.zeros(length, dtype=np.int32), 0)
        return Prepared(tests={"held": Split(num_rows=1, documents=[row])})

    check_lengths(spec, data(8), "classify")
    for task, mend in (("classify", r"cut_right \(or drop\)"), ("tag", "drop$")):
        what = f"held: row row-7 has 9 tokens, .*--data.max-length 8 --data.over-length {mend}"
        with pytest.raises(DataError, match=what):
            check_lengths(spec, data(9), task)
    check_lengths(tiny_model("qwen3").spec, data(1000), "sft")  # rotary positions have no end
