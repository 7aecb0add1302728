"""Training on each kernel in turn, in the interpreter: the losses stay those of plain torch."""

from collections.abc import Sequence
import numpy as np
import pytest
import torch
from ftcore.config import PeftConfig
from ftcore.data.pack import collate, shifted
from ftcore.model.families import family_named
from ftcore.model.generate import generate
from ftcore.model.heads import Model
from ftcore.tune.lora import apply_lora
from ftcore.tune.task import token_labels
from kernels.docs import Docs
from tests.kernels import interpreter

interpreter.require()

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "qwen3": SIZES,
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
    "gemma2": SIZES
    | {"sliding_window": 5, "query_pre_attn_scalar": 8}
    | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
}
# family -> the ops that a step of it runs
OPS = {
    "qwen3": ["attention", "rms_norm", "norm_rope", "swiglu", "cross_entropy", "lora"],
    "gpt_neox": ["layer_norm", "rope"],  # no residual, a part of each head
    "gemma2": ["attention", "rms_norm", "rope", "geglu", "cross_entropy"],
}
LENGTHS = [9, 1, 14]
NUM_STEPS = 4
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|All-NaN)")

def make(family: str, dtype: torch.dtype = torch.float32) -> Model:
    model = Model(family_named(family).to_spec(FAMILIES[family]), "lm")
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p *= 5  # at the usual scale, such small models have no scores worth a softmax
    return model.to(dtype)

def trace(family: str, dtype: torch.dtype, *, with_lora: bool) -> list[float]:
    """The loss of each step."""
    model = make(family, dtype)
    if with_lora:
        config = PeftConfig(rank=3, alpha=6.0, targets=("all-linear",))
        apply_lora(model, config, generator=torch.Generator().manual_seed(1))
        model.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    docs = Docs.from_lengths(LENGTHS)
    tokens_N = torch.randint(50, (docs.num_tokens,), generator=torch.Generator().manual_seed(2))
    labels_N, weights_N = tokens_N.roll(-1), torch.ones(docs.num_tokens)
    losses = []
    for _ in range(NUM_STEPS):
        positions_N = docs.positions_N()
        h_NC = model.trunk(tokens_N, positions_N, torch.zeros_like(positions_N), docs)
        loss, weight = model.head.loss(h_NC, labels_N, weights_N)
        (loss / weight).backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item() / weight.item())
    return losses

def swap_in(monkeypatch: pytest.MonkeyPatch, op: str) -> list[str]:
    """The kernels of one op, and plain torch for all others; returns the ops that are asked for."""
    asked = []

    def uses_triton(name: str, impl: str, x: torch.Tensor, **_: object) -> bool:
        asked.append(name)
        return name == op

    monkeypatch.setattr("kernels.backend.uses_triton", uses_triton)
    return asked

def distance(losses: Sequence[float], true: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, true, strict=True))

@pytest.mark.parametrize(("family", "op"), [(f, op) for f, ops in OPS.items() for op in ops])
def test_losses_stay_those_of_plain_torch(family, op, monkeypatch) -> None:
    with_lora = op == "lora"
    true = trace(family, torch.float64, with_lora=with_lora)
    plain = trace(family, torch.float32, with_lora=with_lora)
    asked = swap_in(monkeypatch, op)
    mine = trace(family, torch.float32, with_lora=with_lora)
    assert op in asked and abs(true[0] - true[-1]) > 0.05
    floor = torch.finfo(torch.float32).eps * max(true)
    assert distance(mine, true) <= 3 * distance(plain, true) + floor

def test_losses_see_a_mutant(monkeypatch, tmp_path) -> None:
    true = trace("qwen3", torch.float64, with_lora=False)
    plain = trace("qwen3", torch.float32, with_lora=False)
    swap_in(monkeypatch, "swiglu")
    module = "kernels.swiglu_triton"
    interpreter.mutate(monkeypatch, tmp_path, module, "(dy * value)", "(dy * value * 1.001)")
    mine = trace("qwen3", torch.float32, with_lora=False)
    assert distance(mine, true) > 3 * distance(plain, true) + 1e-6

def test_documents_that_begin_alike_by_the_kernel_of_attention(monkeypatch) -> None:
    ids_T = np.arange(14, dtype=np.int32)
    batch = collate([shifted(str(n), np.append(ids_T[: 9 + n], np.int32(40 + n)), np.ones(10 + n))
                     for n in range(4)], is_causal=True)
    assert len(batch.rows_U) == 12 + 4 and batch.docs.num_tokens == 46
    found = []
    for dtype, op in ((torch.float64, ""), (torch.float32, ""), (torch.float32, "attention")):
        model, asked = make("qwen3", dtype), swap_in(monkeypatch, op)
        loss, _ = token_labels(model, batch)
        loss.backward()
        found.append([loss.detach(), *(param.grad for param in model.parameters())])
    assert "attention" in asked
    for true, plain, mine in zip(*found, strict=True):
        floor = 1e-6 * true.norm()
        assert (mine - true).norm() <= 3 * (plain - true).norm() + floor

@pytest.mark.parametrize("family", OPS)
def test_layers_computed_again_by_the_kernels_have_the_same_gradients(family, monkeypatch) -> None:
    monkeypatch.setattr("kernels.backend.uses_triton", lambda *_, **__: True)
    model, ids_T = make(family).train(), np.arange(14, dtype=np.int32)
    if family == "qwen3":
        lora = PeftConfig(rank=3, alpha=6.0, targets=("all-linear",), dropout=0.2)
        apply_lora(model, lora, generator=torch.Generator().manual_seed(1))
    batch = collate([shifted(str(n), ids_T[: 9 + n], np.ones(9 + n)) for n in range(4)])
    found = []
    for model.trunk.recompute in ("none", "selective", "all"):
        torch.manual_seed(5)
        token_labels(model, batch)[0].backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for kept, *again in zip(*found, strict=True):
        assert kept.count_nonzero() or family == "qwen3"  # A has none while B is zero
        assert all(torch.equal(kept, other) for other in again)

def test_a_model_runs_as_it_is_told(monkeypatch) -> None:
    """Text too, whose steps are those of attention over a cache."""
    model, prompts = make("qwen3").eval(), [[5, 6, 7], [8]]
    settings = {"max_new_tokens": 6, "stop_ids": frozenset()}
    seen = []
    monkeypatch.setattr(
        "kernels.backend.uses_triton",
        lambda op, impl, x, **_: seen.append((op, impl)) or impl == "triton",
    )
    texts = {}
    for impl in ("eager", "triton"):
        model.use_kernels(impl)
        seen.clear()
        texts[impl] = generate(model, prompts, **settings)
        assert {ran for _, ran in seen} == {impl}
        assert {"attention_decode", "attention"} <= {op for op, _ in seen}
    assert texts["eager"] == texts["triton"]
