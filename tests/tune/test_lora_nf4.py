"""LoRA over four bits: equal to LoRA over the dequantised matrices, small, told apart, merged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftcore.config import PeftConfig
from ftcore.env.compute import generator
from ftcore.errors import ConfigError, ModelError
from ftcore.model.families import family_named
from ftcore.model.heads import Model
from ftcore.tune.adapter import ORIGIN, base_sha256, load_adapter, save_adapter
from ftcore.tune.freeze import assert_unmoved, frozen_hashes
from ftcore.tune.lora import (
    NF4Linear,
    lora_layers,
    plain_modules,
    quantise_frozen,
    quantised_layers,
    use,
)
from ftcore.tune.task import choose_trainable
from kernels.nf4 import dequantise, quantise
from tests.tune.conftest import QWEN3
from tests.tune.test_adapter import logits, tune

CONFIG = PeftConfig(method="lora", rank=4, targets=("q_proj", "o_proj", "down_proj"))
NF4 = replace(CONFIG, quantize="nf4")
FAMILY = family_named("qwen3")
DTYPES = [torch.float32, torch.bfloat16]

def make(config: PeftConfig | None, dtype: torch.dtype = torch.float32) -> Model:
    """A tiny model with biases in some layers; its base is the same in every call."""
    model = Model(replace(QWEN3, qkv_bias=True), "lm")
    model.init_weights(generator(0, 99))
    model.to(dtype).eval()
    if config is not None:
        choose_trainable(model, config, generator(0, 2))
        tune(model)
    return model

def dequantised(config: PeftConfig | None, dtype: torch.dtype) -> Model:
    """The same over dense matrices that went through NF4."""
    model = make(None, dtype)
    with torch.no_grad():
        for name, module in model.trunk.named_modules():
            if isinstance(module, nn.Linear) and name:
                codes = quantise(module.weight.bfloat16())
                module.weight.copy_(dequantise(replace(codes, dtype=dtype)))
    if config is not None:
        choose_trainable(model, config, generator(0, 2))
        tune(model)
    return model

def save(model: Model, folder: Path, **words: str) -> Path:
    save_adapter(model, folder, family=FAMILY, base_path="b", task_type="CAUSAL_LM", **words)
    return folder

def gradients(model: Model) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # of dropout
    loss = logits(model.train()).float().log_softmax(-1).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

@pytest.mark.parametrize("extra", [(), ("*.0.mlp.up_proj",)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_trains_as_over_the_dequantised_base(extra: tuple[str, ...], dropout: float) -> None:
    config = replace(NF4, extra_modules=extra, dropout=dropout)
    model = make(config)
    assert len(quantised_layers(model)) == 14 - len(extra)
    assert not any(isinstance(m, NF4Linear) for m in model.head.modules())
    other = dequantised(replace(config, quantize="none"), torch.float32)
    if extra:  # trained, so not quantised
        with torch.no_grad():
            mine = model.trunk.layers[0].mlp.up_proj.weight
            other.trunk.layers[0].mlp.up_proj.weight.copy_(mine)
    (loss, found), (expected, wanted) = gradients(model), gradients(other)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys() and len(found) == 2 * 6 + len(extra)
    for name, gradient in wanted.items():
        assert gradient.any() and (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    base = make(None)
    assert (logits(model.eval()) - logits(dequantised(None, torch.float32))).abs().max() > 0.1
    assert not torch.allclose(logits(dequantised(None, torch.float32)), logits(base), atol=1e-2)

def test_no_dense_matrix_is_kept_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    counts = {}
    for config in (CONFIG, NF4):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits(make(config).train())
        counts[config.quantize] = sum(shape in ((16, 16), (16, 24), (24, 16)) for shape in kept)
    assert counts["none"] >= 10 and counts["nf4"] == 0

def test_a_weight_takes_4_13_bits() -> None:
    linear = nn.Linear(512, 1024, bias=False).requires_grad_(False)
    layer = NF4Linear(linear)
    assert not list(layer.parameters())
    bits = 8 * sum(t.nbytes for t in layer.state_dict().values()) / linear.weight.numel()
    assert bits == pytest.approx(4.127, abs=1e-3)
    model = Model(replace(QWEN3, hidden_size=256, head_dim=64, intermediate_size=512), "lm")
    model.init_weights(generator(0, 99))
    report = choose_trainable(model.bfloat16(), NF4, generator(0, 2))
    said = "NF4: 14 matrices, 983,040 values of 4.13 bits; 0 of other sizes stay as they are"
    assert report.endswith(said)
    frozen = sum(t.nbytes for layer in quantised_layers(model) for t in layer.state_dict().values())
    assert frozen <= 983_040 * 4.14 / 8

def test_what_has_no_whole_blocks_stays_as_it_is() -> None:
    model = Model(replace(QWEN3, intermediate_size=23), "lm")
    model.init_weights(generator(0, 99))
    model.requires_grad_(False)
    assert quantise_frozen(model).endswith("; 6 of other sizes stay as they are")
    assert len(quantised_layers(model)) == 8
    logits(model)

@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_a_saved_adapter_quantises_its_base(
    trained: torch.dtype, loaded: torch.dtype, tmp_path: Path
) -> None:
    model = make(NF4, trained)
    folder = save(model, tmp_path / "a")
    assert json.loads((folder / ORIGIN).read_text())["quantize"] == "nf4"
    again = make(None, loaded)
    load_adapter(again, folder, family=FAMILY)
    codes = [[layer.codes_P for layer in quantised_layers(m)] for m in (model, again)]
    assert len(codes[0]) == 14 and all(map(torch.equal, *codes))
    if trained == loaded:
        assert torch.equal(logits(again), logits(model))
    else:
        torch.testing.assert_close(logits(again).float(), logits(model).float(), rtol=0.1, atol=0.1)

def test_the_base_is_known_by_its_hash_and_its_quantisation(tmp_path: Path) -> None:
    bare, plain, nf4 = make(None), make(CONFIG), make(NF4)
    assert base_sha256(nf4) == base_sha256(plain) == base_sha256(bare)
    folders = {"plain": save(plain, tmp_path / "plain"), "nf4": save(nf4, tmp_path / "nf4")}
    assert "quantize" not in json.loads((folders["plain"] / ORIGIN).read_text())
    with pytest.raises(ModelError, match="on a base not in NF4, this one is in NF4: load it on"):
        load_adapter(nf4, folders["plain"], family=FAMILY, name="more")
    with pytest.raises(ModelError, match="on a base in NF4, this one is not in NF4: load it on"):
        load_adapter(plain, folders["nf4"], family=FAMILY, name="more")
    assert not quantised_layers(plain)
    other = make(None)
    with torch.no_grad():
        other.trunk.layers[1].mlp.gate_proj.weight[0, 0] += 1  # quantised, not adapted
    with pytest.raises(ModelError, match="trained on another base model"):
        load_adapter(other, folders["nf4"], family=FAMILY)
    assert not quantised_layers(other)

def test_several_adapters_share_one_quantised_base(tmp_path: Path) -> None:
    one, two = make(NF4), make(replace(NF4, rank=2, targets=("up_proj", "q_proj")))
    folder = save(two, tmp_path / "two")
    load_adapter(one, folder, family=FAMILY, name="two")
    assert torch.equal(logits(one), logits(two))
    use(one, "default")
    assert torch.equal(logits(one), logits(make(NF4)))
    again = save(one, tmp_path / "again", name="two")
    files = [(f / "adapter_model.safetensors").read_bytes() for f in (folder, again)]
    assert files[0] == files[1]

@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_is_onto_the_dequantised_base(dtype: torch.dtype) -> None:
    model, other = make(NF4, dtype), dequantised(CONFIG, dtype)
    before = logits(model)
    for name, layer in lora_layers(model).items():
        assert torch.equal(plain_modules(model)[name].weight, other.get_submodule(name).base.weight)
        layer.merge()
        other.get_submodule(name).merge()
    assert torch.equal(logits(model), logits(other))
    change = (logits(model) - before).double().norm() / before.double().norm()
    assert 0 < change <= 8 * torch.finfo(dtype).eps
    for layer in lora_layers(model).values():
        layer.unmerge()
    assert torch.equal(logits(model), before)

def test_codes_are_among_what_must_not_move() -> None:
    model = make(NF4)
    before = frozen_hashes(model)
    assert_unmoved(before, model)
    model.trunk.layers[0].self_attn.k_proj.codes_P[3] ^= 1
    with pytest.raises(ModelError, match="moved during training: .*k_proj.codes_P$"):
        assert_unmoved(before, model)

def test_it_is_for_lora_alone() -> None:
    for method in ("full", "freeze"):
        with pytest.raises(ConfigError, match="quantize is for frozen .*: use --peft.method lora"):
            make(PeftConfig(method=method, quantize="nf4"))
