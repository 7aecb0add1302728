"""Linear maps laid out for serving: they say what the plain ones say, in few sizes of products."""

from typing import Any
import pytest
import torch
from ftcore.config import PeftConfig
from ftcore.deploy.engine import Engine, Job
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from ftcore.model.transformer import Attention, Linear, Mlp, pack_linears, packed_linears
from ftcore.tune.lora import apply_lora, lora_layers
from kernels.docs import Docs, rounded
from kernels.sampling import Sampling
from tests.model.conftest import documents, hf, kind, task_of_kind

__all__ = ["documents", "hf", "kind", "task_of_kind"]  # fixtures
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.1}

def said(model: Model, documents: Any) -> torch.Tensor:
    docs = Docs.from_lengths([5, 1, 40])
    tokens_N = torch.tensor(sum(documents(docs.lengths), []))
    h_NC = model.trunk(tokens_N, docs.positions_N(), torch.zeros_like(tokens_N), docs)
    if model.head is None:
        return h_NC
    rows_B = model.head.rows(docs)
    return model.head(h_NC if rows_B is None else h_NC[rows_B], docs)

@pytest.mark.parametrize("dtype", NEAR)
def test_packed_maps_say_the_same(kind, hf, documents, task_of_kind, dtype) -> None:
    model = load_model(hf(kind)[1], task=task_of_kind(kind), dtype=dtype).model
    with torch.no_grad():
        before = said(model, documents)
        pack_linears(model)
        after = said(model, documents)
    assert (before - after).norm() <= NEAR[dtype] * before.norm()
    blocks = [module for module in model.modules() if isinstance(module, Attention)]
    assert all(block.packed and not block.q_proj.packed for block in blocks), "q, k and v are one"
    said(model, documents).sum().backward()  # with gradients, the plain maps
    grads = [module.weight.grad for module in model.trunk.modules() if isinstance(module, Linear)]
    assert all(grad is not None for grad in grads)

def test_a_gelu_is_part_of_the_map_before_it(hf) -> None:
    model = load_model(hf("gpt2-tied")[1], task="lm", dtype=torch.float32).model
    pack_linears(model)
    x_NC = torch.randn(3, model.spec.hidden_size)
    for mlp in (module for module in model.modules() if isinstance(module, Mlp)):
        plain = mlp(x_NC)  # with gradients
        with torch.no_grad():
            torch.testing.assert_close(mlp(x_NC), plain)

@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("all-linear",)])
def test_an_adapter_beside_packed_maps(hf, documents, targets) -> None:
    model = load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model
    config = PeftConfig(method="lora", rank=4, targets=targets)
    apply_lora(model, config, generator=torch.Generator().manual_seed(0))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_b)
    with torch.no_grad():
        before = said(model, documents)
        pack_linears(model)
        assert all(layer.base.packed for layer in lora_layers(model).values())
        torch.testing.assert_close(said(model, documents), before, rtol=1e-4, atol=1e-4)

def test_a_server_has_few_sizes_of_products(hf, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps code for each: with one for every number of sequences memory would grow."""
    model, sizes = load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model, set()
    product = torch.ops.mkldnn._linear_pointwise.default

    class Noted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, op: Any, types: Any, args: Any = (),
                               kwargs: Any = None) -> Any:
            if op in (product, torch.ops.mkldnn._linear_pointwise):
                sizes.add(len(args[0]))
            return op(*args, **(kwargs or {}))

    engine = Engine(model)
    with torch.inference_mode(), Noted():
        for count in range(1, 41):
            jobs = [Job([1, 2], Sampling(2, temperature=0)) for _ in range(count)]
            for job in jobs:
                engine.submit(job)
            while engine.running or engine.waiting:
                engine.turn()
    assert sizes and sizes <= {rounded(n, least=4) for n in range(1, 81)}, sorted(sizes)

def test_maps_are_laid_out_for_as_long_as_values_stay(hf, documents) -> None:
    """What is said after a step is that of the new values, also where something was raised."""
    model = load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model
    fresh = load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model
    layer = model.trunk.layers[0].mlp.down_proj
    with torch.no_grad(), pytest.raises(ZeroDivisionError), packed_linears(model):
        assert layer.is_packed
        torch.testing.assert_close(said(model, documents), said(fresh, documents))
        raise ZeroDivisionError
    assert layer.packed is None
    with torch.no_grad():
        for either in (model, fresh):
            either.trunk.layers[0].mlp.down_proj.weight.mul_(3)
        assert torch.equal(said(model, documents), said(fresh, documents))
