"""The plan's figures: by hand on a model of two tensors, and a step's as it happens."""

import re
from typing import Any
import numpy as np
import pytest
import torch
from torch import nn
from ftcore.config import EnvConfig, LoopConfig, OptimConfig, PretrainRun
from ftcore.data.pack import Encoded, collate
from ftcore.env.plan import planned, step_bytes
from ftcore.model.heads import Model
from ftcore.model.transformer import ModelSpec
from ftcore.tune.task import token_labels
from kernels.meter import Meter, heap_bytes

def tiny(dropout: float) -> Model:
    spec = ModelSpec(
        vocab_size=61, hidden_size=16, num_layers=3, intermediate_size=24, num_heads=2,
        num_kv_heads=1, head_dim=8, max_positions=64, is_causal=True, norm="rms_norm",
        norm_eps=1e-6, norm_first=True, position="rope", mlp="swiglu", dropout=dropout,
    )  # fmt: skip
    model = Model(spec, "lm")
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()

def document(length: int) -> Encoded:
    ids_T = np.arange(length, dtype=np.int32)
    return Encoded(str(length), ids_T, ids_T, (ids_T > 2).astype(np.float32))

def run_of(threads: int = 1, tokens: int = 40, **optim: Any) -> PretrainRun:
    loop = LoopConfig(micro_batch_tokens=tokens, epochs=9)
    return PretrainRun(env=EnvConfig(threads=threads), optim=OptimConfig(**optim), loop=loop)

def test_memory_by_component() -> None:
    model = nn.ModuleDict({
        "frozen": nn.Linear(10, 10, bias=False).requires_grad_(False).to(torch.bfloat16),
        "trained": nn.Linear(10, 2, bias=False).to(torch.bfloat16),
        "wide": nn.Linear(5, 1, bias=False),
    })
    documents = [document(length) for length in (3, 4, 5)]
    memory_bytes, plan = planned(run_of(tokens=11), model, documents)
    assert memory_bytes == {
        "weights": 200 + 40 + 20,
        "masters": 80,  # the bf16 tensor's; the fp32 one is its own
        "gradients": 100,
        "moments": 200,
    }
    assert plan.startswith("9 steps; an epoch is 3 rows, 12 tokens\nmemory, MiB: weights 0.0 ")

def test_a_tied_matrix_is_counted_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    memory_bytes, _ = planned(run_of(), model, [document(1)])
    assert memory_bytes["weights"] == memory_bytes["gradients"] == 64

def test_gradients_of_each_process_keep_16_bits_where_they_are_not_summed() -> None:
    model = nn.Linear(10, 2, bias=False).to(torch.bfloat16)
    memory_bytes, _ = planned(run_of(threads=3), model, [document(9)] * 4)
    assert memory_bytes["gradients"] == 3 * 2 * 20

def test_a_meter_sees_what_lives_and_no_views() -> None:
    weight = torch.ones(64, 4)
    with Meter() as meter:
        kept = weight.t() * 2
        assert meter.live == 1024
        kept.t().relu()
    assert (meter.live, meter.peak) == (1024, 2048)
    assert [size for _, size in meter.events] == [1024, 1024, -1024]
    del kept
    assert meter.live == 0

def test_a_free_block_serves_smaller_ones_alone() -> None:
    big, small = 2**20, 2**19
    again = [(1, big), (2, big), (1, -big), (3, big)]  # as many bytes, but not those around them
    assert heap_bytes(again) > 3 * big
    assert heap_bytes([(1, big), (2, big), (1, -big), (3, small), (4, small // 2)]) < 2.1 * big
    assert heap_bytes([(1, big), (1, -big), (2, big // 2), (2, -big // 2)]) < 1.1 * big

@pytest.mark.parametrize("recompute", ["none", "selective", "all"])
def test_a_step_is_counted_as_it_happens(recompute: str) -> None:
    """Bytes that autograd keeps of a real forward pass, and the most that both passes have."""
    model = tiny(0.1)
    model.trunk.recompute = recompute
    documents = [document(24)] * 4
    parts = step_bytes(model, token_labels, documents)
    assert not model.training and all(p.grad is None for p in model.parameters())
    batch, marks = collate(documents), []
    batch.docs.walk  # noqa: B018
    hook = model.trunk.register_forward_hook(lambda *_: marks.append(meter.live))
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model.train()
    with Meter() as meter:
        loss, _ = token_labels(model, batch)
        loss.backward()
    hook.remove()
    # real scalars and the rows that are scored stand beside what is counted
    assert parts["activations"] == pytest.approx(marks[0], rel=0.02)
    assert sum(parts.values()) >= meter.peak * 0.98
    assert parts["activations"] + parts["logits"] <= meter.peak * 1.02

def test_a_gpu_tells_what_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meter stands for its allocator, which holds something already."""
    model, documents = tiny(0.1), [document(24)] * 4
    counted, before = step_bytes(model, token_labels, documents), 12345
    with Meter() as meter:
        told = {"memory_allocated": lambda: meter.live + before,
                "max_memory_allocated": lambda: meter.peak + before,
                "reset_peak_memory_stats": lambda: setattr(meter, "peak", meter.live)}
        for name, tell in told.items():
            monkeypatch.setattr(torch.cuda, name, tell)
        parts = step_bytes(model, token_labels, documents, is_taken=True)
    assert parts["activations"] == pytest.approx(counted["activations"], rel=0.02)
    assert parts["logits"] == pytest.approx(counted["logits"], rel=0.02)
    assert not model.training and all(p.grad is None for p in model.parameters())

def test_the_heaviest_micro_batch_is_counted_and_the_largest_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(0.0)
    documents = [document(length) for length in (3, 20, 9, 24, 16, 30)]
    monkeypatch.setattr("ftcore.env.plan.free_bytes", lambda device: 2**26)
    monkeypatch.setattr("ftcore.env.plan.LINEAR_TOKENS", 512)
    asked = run_of(threads=2, batch_size=4), model, documents
    (held, _), (memory_bytes, plan) = planned(*asked), planned(*asked, token_labels)
    # of the rows of 30, 24, 20 and 16 the first of two shares has 30 and 16, which are two streams
    step = sum(step_bytes(model, token_labels, [document(30)]).values())
    assert memory_bytes.items() >= held.items()
    assert sum(memory_bytes.values()) == sum(held.values()) + 2 * step
    assert "micro-batches of 30 tokens" in plan
    told = re.search(r"the largest that fit have ([\d,]+) tokens$", plan)
    most = int(told[1].replace(",", ""))
    assert most > 512
    many = [document(32)] * (most // 32)
    took = sum(step_bytes(model, token_labels, many).values())
    assert 0.7 * 2**25 < took < 1.05 * 2**25  # some of a step does not grow with its tokens
