"""The worked example of README.md, a PEFT method in 40 lines, against peft's DoRA."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
import peft
import pytest
import torch
from ftcore.config import PeftConfig
from ftcore.tune.loop import Loop
from tests.tune.test_adapter import DOCS, logits, make_hf, ours

README = Path(__file__).parents[2] / "README.md"
TARGETS = ("q_proj", "v_proj", "down_proj")

@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The block, as a module."""
    text = README.read_text("utf-8").partition("### Add a PEFT method in 40 lines")[2]
    block = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert block is not None and len(block[1].splitlines()) <= 42
    path = tmp_path_factory.mktemp("dora") / "dora.py"
    path.write_text(block[1], "utf-8")
    spec = importlib.util.spec_from_file_location("dora", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def config() -> PeftConfig:
    return PeftConfig(rank=4, alpha=6.0, targets=TARGETS)

@pytest.mark.parametrize("kind", ["lm", "bert"])  # without biases, with them
def test_outputs_and_gradients_are_those_of_peft(kind: str, dora: ModuleType) -> None:
    hf, generator = make_hf(kind), torch.Generator().manual_seed(2)
    with torch.no_grad():  # weights that matter, and biases that are not zero
        for weight in hf.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    model = ours(hf)
    base = logits(model)
    dora.apply_dora(model, config(), torch.Generator().manual_seed(1))
    assert torch.equal(logits(model), base)  # before the first step

    names = r".*([qv]_proj|down_proj|query|value|\d\.output\.dense)"
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, use_dora=True)
    theirs = peft.get_peft_model(hf, settings).eval()
    wrapped = [m for m in model.modules() if isinstance(m, dora.DoRALinear)]
    twins = [m for m in theirs.modules() if getattr(m, "lora_magnitude_vector", None)]
    other = {id_of(m.base_layer.weight): m for m in twins}
    assert len(wrapped) == len(other) == 6
    pairs = []
    with torch.no_grad():
        for layer in wrapped:
            twin = other[id_of(layer.base.weight)]
            named = (twin.lora_A, twin.lora_B, twin.lora_magnitude_vector)
            weights = [part["default"].weight for part in named]
            parts = layer.lora_a, layer.lora_b, layer.magnitude_O
            for mine, weight in zip(parts, weights, strict=True):
                mine += 0.3 * torch.randn(mine.shape, generator=generator)
                weight.copy_(mine)
                pairs.append((mine, weight))
    found = logits(model)
    rows = [theirs(input_ids=torch.tensor([ids])).logits.squeeze(0) for ids in DOCS]
    expected = torch.cat(rows) if rows[0].ndim == 2 else torch.stack(rows)
    assert (found - base).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for some in (found, expected):
        some.square().mean().backward()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(mine) for mine, _ in pairs}
    for mine, weight in pairs:
        torch.testing.assert_close(mine.grad, weight.grad, rtol=1e-5, atol=1e-5)

def id_of(weight: torch.Tensor) -> tuple[float, ...]:
    """What tells a matrix from the others in both models."""
    return tuple(weight.flatten()[:5].tolist())

def test_the_loop_trains_it(dora: ModuleType, make_loop: Callable[..., Loop]) -> None:
    def wrap(model: torch.nn.Module) -> None:
        dora.apply_dora(model, config(), torch.Generator().manual_seed(1))

    loop = make_loop("dora", wrap=wrap)
    before = {n: p.detach().clone() for n, p in loop.optimizer.params.items()}
    assert len(before) == 3 * 6 and loop.train() == 0
    assert all(not torch.equal(before[n], p) for n, p in loop.optimizer.params.items())
