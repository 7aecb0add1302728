"""The merge certificate: figures by hand, on a model, and of a run."""

import math
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from ftcore.config import PeftConfig
from ftcore.data.encode import Split
from ftcore.data.pack import Encoded
from ftcore.evaluate import report
from ftcore.evaluate.report import certify
from ftcore.model.transformer import Linear
from ftcore.tune.lora import LoRALinear

def make_layer(dtype: torch.dtype, std: float) -> LoRALinear:
    generator = torch.Generator().manual_seed(1)
    base = Linear(48, 32, bias=False)
    torch.nn.init.normal_(base.weight, generator=generator)
    config = PeftConfig(rank=4, alpha=8.0, targets=("x",))
    layer = LoRALinear(base.to(dtype), config, generator)
    torch.nn.init.normal_(layer.lora_b, std=std, generator=generator)
    return layer

def judged(
    monkeypatch: pytest.MonkeyPatch, before: torch.Tensor, after: torch.Tensor, problem: str | None
) -> dict:
    """The certificate of a model that gives these logits."""
    layer = make_layer(torch.float32, 1.0)
    pair = iter((before, after))
    monkeypatch.setattr(report, "all_logits", lambda *a, **k: next(pair))
    config = SimpleNamespace(loop=SimpleNamespace(micro_batch_tokens=1), problem=problem)
    values = iter(({"eval/loss": 1.0, "eval/f1": 0.5}, {"eval/loss": 1.5, "eval/f1": 0.25}))
    suite = SimpleNamespace(config=config, dev=lambda *a: next(values))
    rows = [Encoded("r", np.zeros(3, np.int32), 0)] * len(before)
    model = torch.nn.ModuleList([layer])
    model.spec, model.device = SimpleNamespace(vocab_size=2), None
    return certify(model, Split(documents=rows), suite)

def test_logits_of_a_large_vocabulary_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_LOGITS", 4)  # two rows of two
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.1], [1.0, 1.0]])
    assert judged(monkeypatch, logits, logits, None)["rows"] == 2

def test_differences_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.tensor([[2.0, 0.0], [0.0, 0.1], [1.0, 1.0]])
    after = torch.tensor([[2.0, 0.5], [0.1, 0.0], [1.0, 1.0]])
    kls = []
    for a, b in zip(before.tolist(), after.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, xs)) for x in xs] for xs in (a, b))
        kls.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    found = judged(monkeypatch, before, after, None)
    assert found["max_difference"] == 0.5 and found["changed"] == pytest.approx(1 / 3)
    assert found["loss"] == [1.0, 1.5] and found["f1"] == [0.5, 0.25]
    assert found["mean_kl"] == pytest.approx(sum(kls) / 3, rel=1e-6)
    found = judged(monkeypatch, before, after, "regression")
    assert found["max_difference"] == 0.5 and not {"mean_kl", "changed"} & found.keys()

def test_each_of_several_labels_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = torch.tensor([[2.0, -0.1]]), torch.tensor([[1.5, 0.1]])
    kls = []
    for a, b in zip(before[0].tolist(), after[0].tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        kls.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    found = judged(monkeypatch, before, after, "multi_label_classification")
    assert found["changed"] == 0.5 and found["mean_kl"] == pytest.approx(sum(kls) / 2, rel=1e-6)
