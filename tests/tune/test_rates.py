"""Rates by place in the model."""

import json
from collections.abc import Callable
import pytest
from ftcore.config import OptimConfig, PeftConfig
from ftcore.env.compute import generator
from ftcore.env.run import read_metrics
from ftcore.tune.freeze import rates_of
from ftcore.tune.loop import Loop
from ftcore.tune.task import choose_trainable

RATIOS = {
    "head_lr_ratio": 8.0, "embedding_lr_ratio": 3.0, "layer_lr_decay": 0.5,
    "loraplus_lr_ratio": 16.0,
}  # fmt: skip

def test_rates_of_an_encoder_with_a_head(tiny_model: Callable) -> None:
    ratios = rates_of(tiny_model("bert"), OptimConfig(**RATIOS))
    assert ratios["head.classifier.weight"] == ratios["head.pooler.bias"] == 8.0
    assert ratios["trunk.embed_types.weight"] == 3.0 / 8
    assert ratios["trunk.layers.0.self_attn.q_proj.weight"] == 1 / 4
    assert ratios["trunk.layers.1.mlp.up_proj.bias"] == 1 / 2
    assert ratios["trunk.embed_norm.weight"] == 3.0 / 8

def test_rates_of_a_decoder_with_low_rank_updates(tiny_model: Callable) -> None:
    model = tiny_model("qwen3")
    choose_trainable(model, PeftConfig(method="lora", extra_modules=("norm",)), generator(0, 2))
    ratios = rates_of(model, OptimConfig(**RATIOS))
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert ratios.keys() == trained
    assert ratios["trunk.layers.0.mlp.up_proj.lora_a"] == 1 / 4
    assert ratios["trunk.layers.0.mlp.up_proj.lora_b"] == 16 / 4
    assert ratios["trunk.norm.weight"] == 1.0

def test_a_tied_head_is_an_embedding(tiny_model: Callable) -> None:
    ratios = rates_of(tiny_model("qwen3"), OptimConfig(**RATIOS))
    assert "head.lm_head.weight" not in ratios and ratios["trunk.embed_tokens.weight"] == 3.0 / 8

def test_a_step_moves_each_group_by_its_own_rate(make_loop: Callable[..., Loop]) -> None:
    """AdamW's first step is the rate itself, whatever the gradient, where nothing decays."""
    optim = RATIOS | {"weight_decay": 0.0, "lr": 1e-4, "eps": 1e-12, "max_grad_norm": 1e9}
    loop = make_loop("rates", family="bert", optim=optim, max_steps=1)
    before = {name: param.clone() for name, param in loop.model.named_parameters()}
    loop.train()
    after = dict(loop.model.named_parameters())
    for name, ratio in rates_of(loop.model, loop.config.optim).items():
        moved = (after[name] - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-4 * ratio, rel=1e-2), name

def test_groups_are_told_and_their_norms_make_up_the_whole(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop("told", family="bert", optim=RATIOS, max_steps=2)
    groups = loop.optimizer.groups()
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in loop.model.named_parameters())
    assert "head.classifier.weight" in groups["lr_8_decay_0.01"]
    assert "head.classifier.bias" in groups["lr_8_decay_0"]
    assert "trunk.embed_tokens.weight" in groups["lr_0.375_decay_0.01_rows"]
    json.dumps(groups)
    loop.train()
    for line in read_metrics(loop.run.path / "metrics.jsonl"):
        norms = {name: line[f"train/grad_norm/{name}"] for name in groups}
        assert min(norms.values()) > 0
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        assert total == pytest.approx(line["train/grad_norm"], rel=1e-6)
