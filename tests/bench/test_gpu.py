"""tests/bench/gpu.py and gpu_rivals.py on a CPU: all that are timed compute the same."""

import pytest
import torch
from kernels.cases import Draw, ops
from tests.bench import gpu, plot
from tests.bench.gpu_rivals import RIVALS

SIZES = {
    "rms_norm": {"N": 8, "C": 64},
    "layer_norm": {"N": 8, "C": 64},
    "lora": {"N": 8, "C": 16, "O": 24, "R": 4},
    "attention": {"lengths": [16, 16], "N": 32, "H": 4, "G": 2, "D": 16, "is_causal": True},
}
TINY = gpu.CONFIG | {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

@pytest.mark.parametrize(
    ("op", "rival"),
    [("rms_norm", "torch"), ("layer_norm", "torch"), ("lora", "peft"), ("attention", "flash")],
)
def test_rivals_compute_the_definition(op: str, rival: str) -> None:
    if rival == "peft":
        pytest.importorskip("peft", reason="peft is not installed: it is a rival")
    entry, draw = ops()[op], Draw(torch.bfloat16, "cpu")
    inputs, rest = entry.drawn(draw, SIZES[op])
    true = entry.reference(**inputs, **rest)
    mine = RIVALS[op][rival](sizes=SIZES[op], rest=rest, **inputs)
    if op == "attention":  # as a batch
        mine = mine.transpose(1, 2).reshape(true.shape)
    torch.testing.assert_close(mine, true, rtol=0.02, atol=0.03)

def test_a_frozen_linear_is_what_a_lora_linear_adds_to() -> None:
    inputs, rest = ops()["lora"].drawn(Draw(torch.float32, "cpu"), SIZES["lora"])
    floor = RIVALS["lora"]["frozen linear"](sizes=SIZES["lora"], rest=rest, **inputs)
    inputs["b_OR"] = torch.zeros_like(inputs["b_OR"])
    torch.testing.assert_close(ops()["lora"].reference(**inputs, **rest), floor)

def test_all_train_on_the_same_documents(monkeypatch) -> None:
    """Random models start at the same loss, whose every document counts once."""
    pytest.importorskip("transformers", reason="transformers is not installed: it is a rival")
    pytest.importorskip("peft", reason="peft is not installed: it is a rival")
    monkeypatch.setattr(gpu, "STEP_TOKENS", 600)
    monkeypatch.setattr(gpu, "NUM_STEPS", 4)
    rivals = ("transformers",)  # Liger's kernels need a GPU
    rows = list(gpu.end_to_end(gpu.Shape(TINY, ("lora", "full"), None, (16, 32), rivals), "cpu"))
    who = ["ours", "ours, eager", "transformers, 16 rows", "transformers, 32 rows"]
    assert [(row["method"], row["who"]) for row in rows] == [
        (method, name) for method in ("lora", "full") for name in who
    ]
    for row in rows:
        assert len(row["losses"]) == 4 and row["tokens_per_s"] > 0
        assert row["losses"][0] == pytest.approx(6.22, abs=0.05)
    assert rows[0]["losses"] == rows[1]["losses"] and rows[4]["losses"] == rows[5]["losses"]

def test_ours_runs_as_it_is_asked(monkeypatch) -> None:
    """On a CPU "auto" is eager, so the losses cannot tell; the model does."""
    asked = []
    monkeypatch.setattr(gpu.Model, "use_kernels", lambda model, impl: asked.append(impl))
    for impl in ("auto", "eager"):
        gpu.ours(TINY, "lora", impl, "cpu")
    assert asked == ["auto", "eager"]

def test_all_decode_as_many_tokens(monkeypatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: it is a rival")
    monkeypatch.setattr(gpu, "STREAMS", (1, 3))
    monkeypatch.setattr(gpu, "NUM_NEW", 6)
    rows = list(gpu.decoding(gpu.Shape(TINY, (), None, ()), "cpu"))
    who = ["ours, from Python", "ours"]
    assert [(row["streams"], row["who"]) for row in rows] == [
        *((count, name) for count in (1, 3) for name in who),
        *((count, "transformers") for count in (1, 3))]
    assert all(row["tokens_per_s"] > 0 for row in rows)

def test_names_of_ops_leave_out_the_training(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(gpu.check, "main", lambda names: called.append(("check", names)) or 0)
    monkeypatch.setattr(gpu.bench, "main", lambda words: called.append(("bench", words)))
    monkeypatch.setattr(gpu, "end_to_end", lambda *_: called.append("end to end") or [])
    monkeypatch.setattr(gpu, "decoding", lambda *_: called.append("decoding") or [])
    monkeypatch.setattr(gpu, "memory", lambda *_: called.append("memory") or [])
    monkeypatch.setattr("sys.argv", ["gpu", "rope", "swiglu", "--record"])
    assert gpu.main() == 0
    rivals = ["--rivals", "tests.bench.gpu_rivals"]
    words = ["rope", "swiglu", "--record", *rivals]
    assert called == [("check", ["rope", "swiglu"]), ("bench", words)]
    monkeypatch.setattr("sys.argv", ["gpu"])
    every = ["end to end", "decoding", "memory"] * len(gpu.SHAPES)
    assert gpu.main() == 0 and called[2:] == [("check", []), ("bench", rivals), *every]
    called.clear()
    monkeypatch.setattr("sys.argv", ["gpu", "end-to-end", "8B"])
    assert gpu.main() == 0 and called == ["end to end"]
    monkeypatch.setattr("sys.argv", ["gpu", "decode", "8B", "1B"])
    assert gpu.main() == 0 and called[1:] == ["decoding", "decoding"]

def test_a_ratio_is_that_to_the_faster_of_theirs() -> None:
    said = {"ours": 60, "ours, eager": 9, "transformers, 16 rows": 20, "with Liger, 16 rows": 30}
    rows = [{"shape": "8B", "method": "lora", "who": who, "tokens_per_s": rate}
            for who, rate in said.items()]
    assert gpu.ratios(rows) == {"8B lora": 2.0} and gpu.ratios(rows[:2]) == {}

def test_the_figure_has_every_op_with_its_newest_row(tmp_path) -> None:
    rows = plot.newest()
    assert {op for op, _, _ in rows} == {*ops()}
    sizes = "B=32 J=32 H=32 G=8 D=128 S=128 P=1024 bytes=256"
    whose = rows["attention_decode", sizes, "forward"]
    assert float(whose["triton"]["%"]) > 80 and whose["eager"]["p50_us"] != ""
    plot.drawn(tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")

def test_documents_of_one_length_fill_a_step() -> None:
    assert [list(map(len, step)) for step in gpu.steps(500, 4096)] == [[4096] * 4] * gpu.NUM_STEPS

def test_steps_are_full_and_two_thirds_of_a_document_is_scored() -> None:
    steps = gpu.steps(500)
    assert len(steps) == gpu.NUM_STEPS
    for step in steps:
        assert gpu.STEP_TOKENS - 1024 < sum(map(len, step)) <= gpu.STEP_TOKENS
        for document in step:
            assert 32 <= len(document) <= 1024
            assert document.weights.sum() == len(document) - len(document) // 3 - 1
