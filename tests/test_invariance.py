"""What must not change a result, on tiny models of every task: tried by train.py --verify, which
must also see each fault; runs that are killed and resumed anywhere; what a fault may cost a run.

    R-1  kill -9 while saving      tests/tune/test_checkpoint.py tests/tune/test_kill.py
    R-2  power loss                tests/test_files.py (the order of fsync and rename)
    R-3  bit rot, torn copies      tests/test_files.py tests/tune/test_checkpoint.py
    R-4  resumed is bit-equal      here
    R-5  SIGTERM, SIGINT           tests/env/test_run_signals.py tests/tune/test_kill.py
    R-6  a full disk               tests/test_files.py tests/tune/test_checkpoint.py
    R-7  pruning                   tests/tune/test_checkpoint.py
    R-8  NaN and infinities        tests/tune/test_loop.py tests/tune/test_precision.py
    R-10 bad lines of data         tests/data/test_read_damage.py tests/data/test_bad_rows.py
    R-11 two writers               tests/env/test_run.py
    R-12 locale, umask, time zone, folder    here
"""

# ruff: noqa: F401, F811  # fixtures of two folders

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
import pytest
import torch
from ftcore import verify
from ftcore.config import PeftConfig
from ftcore.data.pack import collate
from ftcore.evaluate import evaluator
from ftcore.model import transformer
from ftcore.tune import loop as loops
from ftcore.tune.loop import Loop
from ftcore.tune.lora import LoRALinear
from ftcore.tune.optim import AdamW
from kernels.docs import Docs
from tests.commands.conftest import (
    EXACT,
    SCRIPTS,
    _apart,
    bert,
    classify,
    dpo,
    files,
    masked,
    masked_bert,
    pretrain,
    qwen3,
    reward,
    scored,
    several,
    sft,
    tags,
)
from tests.tune.conftest import make_loop, rows, tiny_model
from tests.tune.test_loop import assert_same_run, dying, metrics, stop_at, tensors

ROOT = Path(__file__).parents[1]
LORA = PeftConfig(method="lora", rank=3, alpha=6.0, dropout=0.2)
# 18 rows, 4 a step, cut into micro-batches: a second epoch begins with step 6, a third with 11.
RUNS = {
    "sft, full, fp16": {"dtype": torch.float16},
    "sft, lora, bf16": {"dtype": torch.bfloat16, "peft": LORA},
    "sft, lora, fp16": {"dtype": torch.float16, "peft": LORA},
    "classify, full, autocast": {"family": "bert", "compute": torch.bfloat16},
    "classify, full, fp32": {"family": "bert"},
    "sft, lora, bf16, mean": {"dtype": torch.bfloat16, "peft": LORA, "optim": {"ema": 0.9}},
    "classify, full, fp32, mean": {"family": "bert", "optim": {"ema": 0.5}},
    "hidden tokens": {"family": "masked"},
    "reward, full": {"family": "reward"},
    "dpo, lora": {"family": "dpo", "peft": LORA},
}
TASKS = ("classify", "several", "scored", "tags", "sft", "pretrain", "masked", "reward",
         "dpo")
HOLD = 9  # claims of a chat run with low-rank updates; other runs have less

def verified(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and the table or the error."""
    capsys.readouterr()
    code = SCRIPTS["train"].main([*words, "--verify"])
    printed, errors = capsys.readouterr()
    return code, printed if code == 0 else errors

@pytest.mark.parametrize("task", TASKS)
def test_every_claim_holds(
    task: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = verified(request.getfixturevalue(task), capsys)
    assert code == 0 and "DOES NOT" not in told
    claims = [line for line in told.splitlines() if line.endswith("  holds")]
    assert len(claims) == {"sft": HOLD, "dpo": HOLD - 1}.get(task, HOLD - 2)
    assert not Path("runs/run").exists()

def test_low_rank_updates_of_a_classifier(
    classify: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = verified([*classify, "--peft.method", "lora"], capsys)
    assert code == 0 and told.count("  holds") == HOLD - 1

@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-autocast"])
def test_claims_are_of_the_model_on_the_disk(
    precision: str, sft: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights have more bits than the run would keep."""
    words = [*sft, "--env.precision", precision]
    code, told = verified(words, capsys)
    assert code == 0, told

def one_document(documents: Any, **rule: bool) -> Any:
    batch = collate(documents)
    return replace(batch, docs=Docs.from_lengths([sum(batch.docs.lengths)]))

def heavier(documents: Any, **rule: bool) -> Any:
    batch = collate(documents)
    return replace(batch, weights=batch.weights * len(documents))

def half(lengths: Any, shares: int) -> list[list[int]]:
    dealt = [list(range(len(lengths))) for _ in range(shares)]
    return dealt[:1] + [share[::2] for share in dealt[1:]]

def forgetful(optimizer: AdamW, state: Any, step_count: int) -> None:
    load_state(optimizer, state, 0)

def rough(layer: LoRALinear) -> torch.Tensor:
    return folded_weight(layer).bfloat16().float()

def other(*args: Any, **more: Any) -> Any:
    loaded = load_artifact(*args, **more)
    next(p for n, p in loaded.model.named_parameters() if n.endswith("lora_a")).data[0, 0] += 1e-3
    return loaded

load_state, folded_weight = AdamW.load_state, LoRALinear.folded_weight
load_artifact, encode_prompt = verify.adapter.load_artifact, verify.encode_prompt
def unlike(verifier: verify.Verifier, name: str, *args: Any, **more: Any) -> torch.Tensor:
    return gradient(verifier, name, *args, **more) * (1.001 if name == "again" else 1)

gradient = verify.Verifier.gradient
FAULTS = {
    "a step, or the same": (verify.Verifier, "gradient", unlike),
    "a row alone": (evaluator, "collate", one_document),
    "one micro-batch": (loops, "collate", heavier),
    "activations": (transformer, "computed_again", lambda layer, x, *rest: layer(x * 1.001, *rest)),
    "one process": (loops, "split", half),
    "4 steps": (AdamW, "load_state", forgetful),
    "updates beside": (LoRALinear, "folded_weight", rough),
    "in memory": (verify.adapter, "load_artifact", other),
    "prompts of": (verify, "encode_prompt", lambda *a: encode_prompt(*a)[1:]),
}

@pytest.mark.parametrize("claim", FAULTS)
def test_every_fault_is_seen(
    claim: str, sft: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(*FAULTS[claim])
    code, told = verified(sft, capsys)
    assert code == 2 and "train no further" in told
    broken = [line for line in told.splitlines() if line.endswith("DOES NOT HOLD")]
    assert any(line.startswith(claim) for line in broken) and len(broken) < 3

@pytest.mark.parametrize("setup", RUNS)
def test_a_run_resumed_after_any_step_is_bit_equal(
    setup: str, make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    options = {"dropout": 0.1, **RUNS[setup]}
    loop = make_loop("whole", **options)
    assert loop.train() == 0 and loop.progress.step == 12
    whole = tensors(loop), metrics(loop)
    for step in range(1, 12):
        loop = make_loop(f"stopped-{step}", **options)
        assert stop_at(loop, step, monkeypatch) == 143
        loop = make_loop(f"stopped-{step}", **options, resume=True)
        assert loop.progress.step == step and loop.train() == 0
        assert_same_run(loop, whole)

@pytest.mark.parametrize("setup", RUNS)
def test_a_run_killed_twice_is_bit_equal(
    setup: str, make_loop: Callable[..., Loop]
) -> None:  # fmt: skip
    """Each kill falls between two saves: steps are done again, and their lines are written once."""
    options = {"dropout": 0.1, "save_every": 3, **RUNS[setup]}
    loop = make_loop("whole", **options)
    loop.train()
    whole = tensors(loop), metrics(loop)
    loop = make_loop("killed", **options)
    for dies_in_step, resumes_at in ((2, 0), (5, 3), (8, 6)):
        loop.task = dying(loop, dies_in_step)
        with pytest.raises(KeyboardInterrupt):
            loop.train()
        loop = make_loop("killed", **options, resume=True)
        assert loop.progress.step == resumes_at
    assert loop.train() == 0
    assert_same_run(loop, whole)

def test_a_run_does_not_depend_on_where_and_when_it_runs(
    classify: list[str], tmp_path: Path
) -> None:  # fmt: skip
    """R-12: another time zone, locale, umask and working folder leave the same bytes."""
    made = []
    for name, umask, more in (
        ("one", 0o022, {"TZ": "UTC", "LC_ALL": "C.UTF-8"}),
        ("other", 0o077, {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONUTF8": "0"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        words = [sys.executable, str(ROOT / "train.py"), *classify, "--log.dir", str(folder)]
        subprocess.run(
            words, cwd=folder, env=os.environ | more, umask=umask, check=True, capture_output=True
        )
        run = folder / "run"
        found = {p.relative_to(run): p for p in run.rglob("*") if p.is_file()}
        kept = ("model", "checkpoints", "predictions.jsonl", "data/rejected.jsonl")
        made.append({
            str(name): path.read_bytes() for name, path in found.items()
            if str(name).startswith(kept) and path.name != "manifest.json"
        })  # fmt: skip
    assert len(made[0]) > 5
    assert all(one.keys() == two.keys() for one, two in pairwise(made))
    assert not [name for name in made[0] if made[0][name] != made[1][name]]
