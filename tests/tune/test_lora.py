"""LoRA on a small Qwen3: what is wrapped and trained, exactness at the start, merge and unmerge."""

import math
from collections.abc import Callable
import pytest
import torch
from torch import Tensor
from ftcore.config import PeftConfig
from ftcore.errors import ConfigError
from ftcore.model.families import family_named
from ftcore.model.heads import Model
from ftcore.tune.freeze import assert_unmoved, frozen_hashes
from ftcore.tune.loop import Loop
from ftcore.tune.lora import apply_lora, lora_layers, merge, plain_modules, unwrap
from kernels.docs import Docs

QWEN3 = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

def make_model(*, dtype: torch.dtype = torch.float32, tied: bool = False) -> Model:
    model = Model(family_named("qwen3").to_spec(QWEN3 | {"tie_word_embeddings": tied}), "lm")
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(dtype).eval()

def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)

def config(**changes: object) -> PeftConfig:
    return PeftConfig(**({"rank": 4, "alpha": 8.0, "targets": ("all-linear",)} | changes))

def logits(model: Model) -> Tensor:
    docs = Docs.from_lengths([5, 3])
    positions_N = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    tokens_N = (positions_N * 7 + 3) % 50
    return model.head(model.trunk(tokens_N, positions_N, torch.zeros_like(tokens_N), docs))

def disturb(model: Model) -> None:
    """Give every B values, as training would."""
    source = generator()
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_b.normal_(std=0.5, generator=source)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_logit(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    base = logits(model)
    apply_lora(model, config(), generator=generator())
    assert torch.equal(logits(model), base)
    disturb(model)
    assert not torch.equal(logits(model), base)
    layers = unwrap(model)
    assert torch.equal(logits(model), base) and not lora_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    assert not torch.equal(logits(model), base)

def test_targets_by_name_pattern_and_all() -> None:
    apply_lora(model := make_model(), config(), generator=generator())
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == set(LINEARS)
    assert len(lora_layers(model)) == 3 * len(LINEARS)
    targets = ("trunk.layers.[0-1].*.v_proj", "q_proj", "trunk.layers.2.mlp.up_proj")
    model = make_model()
    report = apply_lora(model, config(targets=targets), generator=generator())
    assert tuple(lora_layers(model)) == (
        *("trunk.layers.0.self_attn.q_proj", "trunk.layers.0.self_attn.v_proj"),
        *("trunk.layers.1.self_attn.q_proj", "trunk.layers.1.self_attn.v_proj"),
        *("trunk.layers.2.self_attn.q_proj", "trunk.layers.2.mlp.up_proj"),
    )
    assert report == "LoRA rank 4, alpha 8, scale 2 on q_proj x 3, v_proj x 2, up_proj x 1"

def test_only_factors_and_extra_modules_are_trained() -> None:
    model = make_model()
    report = apply_lora(
        model,
        config(targets=("q_proj",), extra_modules=("*.input_layernorm", "head.lm_head")),
        generator=generator(),
    )
    trained = (*(f"trunk.layers.{i}.input_layernorm" for i in range(3)), "head.lm_head")
    assert report.endswith(f"on q_proj x 3; fully trained: {', '.join(trained)}")
    factors = {f"{name}.lora_{f}" for name in lora_layers(model) for f in "ab"}
    expected = factors | {f"{name}.weight" for name in trained}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    before = frozen_hashes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # A moves from the second step on, since B starts at zero
        optimizer.zero_grad()
        logits(model).square().sum().backward()
        optimizer.step()
    assert_unmoved(before, model)
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved == expected
    assert len(optimizer.state) == len(expected)

@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_prj",)}, "LoRA target 'q_prj' matches nothing; nearest: 'q_proj'"),
        ({"targets": ("q_prj",)}, "known: all-linear, down_proj, gate_proj, k_proj, lm_head, o_"),
        ({"targets": ("q_proj", "trunk.layers.[7-9].*")}, "'trunk.layers.*' matches nothing"),
        ({"targets": ("embed_tokens",)}, "'embed_tokens' matches nothing"),
        ({"extra_modules": ("attn_output_norm",)}, "'attn_output_norm' matches nothing"),
        ({"extra_modules": ("normm",)}, "trained module 'normm' matches nothing; nearest: 'n"),
        ({"extra_modules": ("*.mlp",)}, "LoRA target and fully trained at once: trunk.layers.0"),
        ({"targets": ()}, "LoRA targets \\[\\]: no linear layer, try 'all-linear'"),
        ({"targets": ("lm_head",)}, "LoRA target head.lm_head: its matrix is tied"),
    ],
)
def test_refused_choices_leave_the_model_alone(changes: dict, message: str) -> None:
    model = make_model(tied=True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        apply_lora(model, config(**changes), generator=generator())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not lora_layers(model)

def test_a_second_adapter_is_refused() -> None:
    model = make_model()
    apply_lora(model, config(), generator=generator())
    with pytest.raises(AssertionError, match="one adapter at a time: fold the first"):
        apply_lora(model, config(), generator=generator())

def test_scale_of_both_kinds() -> None:
    assert config().scale == 2.0
    assert config(rs_lora=True).scale == 4.0
    model = make_model()
    apply_lora(model, config(targets=("v_proj",), rs_lora=True), generator=generator())
    disturb(model)
    layer = model.trunk.layers[0].self_attn.v_proj
    x_NC = torch.randn(5, 16, generator=generator())
    expected_NO = x_NC @ (layer.base.weight + 8 / math.sqrt(4) * layer.lora_b @ layer.lora_a).T
    torch.testing.assert_close(layer(x_NC), expected_NO)

def test_start_is_a_function_of_the_generator() -> None:
    states = []
    for seed in (1, 1, 2):
        model = make_model(dtype=torch.bfloat16)
        torch.manual_seed(len(states))  # the global generator must play no part
        apply_lora(model, config(), generator=torch.Generator().manual_seed(seed))
        states.append({n: p for n, p in model.named_parameters() if "lora_" in n})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "trunk.layers.0.mlp.down_proj.lora_a"
    assert not torch.equal(states[0][name], states[2][name])
    a_RC = states[0][name]
    assert a_RC.dtype == torch.float32 and a_RC.shape == (4, 24)
    bound = 1 / math.sqrt(24)
    assert 0.9 * bound < a_RC.abs().max() <= bound
    assert not states[0]["trunk.layers.0.mlp.down_proj.lora_b"].any()

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once_and_unmerge_restores_the_bits(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    apply_lora(model, config(), generator=generator())
    disturb(model)
    before, hashes = logits(model), frozen_hashes(model)
    merge(model)
    layer = model.trunk.layers[1].mlp.up_proj
    weight_OC, a_RC, b_OR = (
        p.detach().double()
        for p in (layer.base.weight, layer.lora_a, layer.lora_b)
    )
    exact_OC = weight_OC + 2 * b_OR @ a_RC
    terms_OC = weight_OC.abs() + 2 * b_OR.abs() @ a_RC.abs()
    # half a unit of the dtype for the one rounding, and the sum of five terms in fp32
    bound_OC = exact_OC.abs() * torch.finfo(dtype).eps / 2
    bound_OC += 4 * terms_OC * torch.finfo(torch.float32).eps
    assert ((layer.merged_weight.double() - exact_OC).abs() <= bound_OC).all()
    # 3 layers of some 10 roundings each, as a share of the logits' norm
    change = (logits(model) - before).double().norm() / before.double().norm()
    assert change <= 8 * torch.finfo(dtype).eps
    merge(model, is_merged=False)
    assert torch.equal(logits(model), before)
    assert_unmoved(hashes, model)

def test_a_merged_layer_comes_off_and_refuses_training() -> None:
    model = make_model()
    base = logits(model)
    apply_lora(model, config(), generator=generator())
    disturb(model)
    merge(model)
    layers = unwrap(model)
    assert torch.equal(logits(model), base)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    with pytest.raises(AssertionError, match="unmerge before training"):
        logits(model.train())

def test_merged_state_fits_the_unwrapped_model() -> None:
    model = make_model()
    apply_lora(model, config(extra_modules=("trunk.norm",)), generator=generator())
    disturb(model)
    plain = make_model()
    layers = lora_layers(model)
    merged = {
        f"{name}.{attribute}": parameter
        for name, module in plain_modules(model).items()
        for attribute, parameter in module.named_parameters(recurse=False)
    }
    merged |= {f"{name}.weight": layer.folded_weight() for name, layer in layers.items()}
    plain.load_state_dict(merged, strict=True)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    merge(model)
    assert torch.equal(logits(plain), logits(model))

def test_dropout_acts_in_training_only() -> None:
    model = make_model()
    apply_lora(model, config(dropout=0.5), generator=generator())
    disturb(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))

def test_lora_plus_moves_b_farther_and_nothing_else(make_loop: Callable[..., Loop]) -> None:
    """In the first step A has no gradient, since B is zero: weight decay alone moves it."""
    peft = PeftConfig(method="lora", rank=3, extra_modules=("trunk.norm",))
    moves = {}
    for ratio in (1.0, 4.0):
        loop = make_loop(f"{ratio}", peft=peft, optim={"loraplus_lr_ratio": ratio}, max_steps=1)
        params = loop.optimizer.params
        start = {name: param.detach().clone() for name, param in params.items()}
        loop.train()
        moves[ratio] = {name: param.detach() - start[name] for name, param in params.items()}
    for name, move in moves[1.0].items():
        assert move.any()
        torch.testing.assert_close(moves[4.0][name], (4.0 if "lora_b" in name else 1.0) * move)
