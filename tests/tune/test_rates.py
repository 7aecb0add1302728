"""Rates by place in the model, and the average of what is trained."""

import json
from collections.abc import Callable

import pytest
import torch

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
    assert ratios["trunk.layers.0.mlp.up_proj.adapters.default.lora_a"] == 1 / 4
    assert ratios["trunk.layers.0.mlp.up_proj.adapters.default.lora_b"] == 16 / 4
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

@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"family": "bert"}])
def test_the_average_by_hand(options: dict, make_loop: Callable[..., Loop]) -> None:
    loop = make_loop("average", optim={"ema": 0.6}, max_steps=6, **options)
    optimizer, step = loop.optimizer, loop.optimizer.step
    average = {name: master.clone() for name, master in optimizer.masters.items()}
    counts = []

    def noted(*args: object, **more: object) -> None:
        step(*args, **more)
        counts.append(optimizer.step_count)
        decay = min(0.6, counts[-1] / (9 + counts[-1]))
        for name, master in optimizer.masters.items():
            average[name] = decay * average[name] + (1 - decay) * master

    optimizer.step = noted
    loop.train()
    assert counts == [1, 2, 3, 4, 5, 6]
    for name, expected in average.items():
        torch.testing.assert_close(optimizer.state()["average"][name], expected)
        assert not torch.equal(expected, optimizer.masters[name])

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluations_see_the_average_and_training_goes_on_without_it(
    dtype: torch.dtype, make_loop: Callable[..., Loop]
) -> None:
    """What is judged, and left in the end, is the average; the run is the one without."""
    runs, seen = [], []
    for ema in (0.0, 0.6):
        loop = make_loop(f"ema-{ema}", dtype=dtype, optim={"ema": ema}, eval_every=3, max_steps=6)

        def evaluate(loop: Loop = loop) -> dict[str, float]:
            seen.append({name: param.clone() for name, param in loop.model.named_parameters()})
            return {"eval/loss": float(len(seen))}

        loop.evaluate = evaluate
        loop.train()
        runs.append({name: master.clone() for name, master in loop.optimizer.masters.items()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    average = loop.optimizer.state()["average"]
    assert all(torch.equal(seen[3][name], average[name].to(dtype)) for name in average)
    assert any(not torch.equal(seen[3][name], seen[1][name]) for name in average)
    loop.restore_best()  # the evaluation of step 3
    assert all(torch.equal(seen[2][n], p) for n, p in loop.model.named_parameters())
