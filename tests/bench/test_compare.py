"""What the turns of two sides come to, and that both get the same work."""

import random
from typing import Any
import numpy as np
import pytest
import torch
from ftcore.data.pack import Encoded
from tests.bench.compare import against, told
from tests.bench.load import apart, span
from tests.bench.load import told as told_of_load
from tests.bench.rival import grouped, peak_mib
from tests.bench.sft import chat, padded

def turns(ours: float, theirs: float, floor: float, rows: int = 10) -> dict[str, Any]:
    common = {"rows": rows, "tokens": 40, "peak_mib": 500.0, "rows_mib": 100.0}
    trains = {"trained": 7, "loss": 0.5, "padded_tokens": 50}
    return {
        "ours": {**common, **trains, "seconds": ours, "cpu_s": 2.0, "peak_mib": 300.0},
        "theirs": {**common, **trains, "seconds": theirs, "cpu_s": 3.0},
        "floor": {**common, "seconds": floor, "flops": 2e9},
    }

def test_figures_are_medians_of_ratios_between_neighbours() -> None:
    # The machine was slow in the second round and slower in the third: ratios 1.5, 2, 4.
    rounds = [turns(2, 3, 1), turns(4, 8, 1), turns(5, 20, 4)]
    found = told(rounds, "rows", 2.5)
    assert found["ratios"] == [1.5, 2, 4]
    assert found["speed"] == {"value": 2, "bar": 2.5, "met": False}
    assert found["cpu_ratio"] == 1.5
    assert found["memory"] == {"value": 0.6, "bar": 0.7, "met": True}
    assert found["ours"]["rows_per_s"] == 2.5
    assert found["ours"]["of_floor"] == found["of_floor"]["value"] == 0.5
    assert found["theirs"]["padded_over_real_tokens"] == 1.25
    assert found["floor"]["gflop_per_s"] == 2
    assert told(rounds, "tokens", 2.0)["ours"]["tokens_per_s"] == 10

def test_different_rows_are_refused() -> None:
    odd = turns(1, 1, 1)
    odd["theirs"]["rows"] = 9
    with pytest.raises(AssertionError, match="different rows"):
        told([odd], "rows", 1.0)

def test_a_bar_is_met_from_its_own_side() -> None:
    assert against(2.0, 2.0)["met"] and against(2.1, 2.0)["met"] and not against(1.9, 2.0)["met"]
    assert against(1.9, 2.0, at_most=True)["met"] and not against(2.1, 2.0, at_most=True)["met"]

def documents(lengths: list[int]) -> list[Encoded]:
    return [Encoded(str(i), np.arange(n, dtype=np.int32), 0) for i, n in enumerate(lengths)]

def test_their_batches_hold_the_same_documents_by_length() -> None:
    rows = documents([5, 1, 9, 2, 8, 3, 7, 4])
    batches = grouped([rows[:4], rows[4:]], 4, random.Random(0))
    lengths = sorted([len(document) for document in batch] for batch in batches)
    assert lengths == [[1, 2, 3, 4], [5, 7, 8, 9]]

def test_hf_scores_the_tokens_that_we_score() -> None:
    tokens_T = np.array([11, 12, 13, 14], dtype=np.int32)
    scored = Encoded("a", tokens_T, np.array([12, 13, 14, -100]), np.float32([0, 1, 1, 0]))
    short = Encoded("b", tokens_T[:2], np.array([12, -100]), np.float32([1, 0]))
    batch = padded([scored, short])
    assert batch["labels"].tolist() == [[-100, -100, 13, 14], [-100, 12, -100, -100]]
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14], [11, 12, 0, 0]]
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([4, 2]))

def test_a_question_becomes_a_chat() -> None:
    assert chat({"question": "1 + 1?", "answer": "2"})["messages"] == [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]

def test_peak_memory_is_the_high_water_mark() -> None:
    assert peak_mib("VmPeak:\t  900 kB\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n") == 2.0

def loaded(load: float, process: float) -> dict[str, Any]:
    return {
        "import": 1.0, "load": load, "logits_s": 0.5, "process": process, "peak_mib": 9.0,
        "logits": [load, -4.0],
    }  # fmt: skip

def test_loading_is_told_with_and_without_the_imports() -> None:
    rounds = [(loaded(0.5, 2), loaded(2.5, 4)), (loaded(0.5, 2), loaded(1.5, 8))]
    rounds.append((loaded(0.5, 1), loaded(3.5, 3)))
    ratios = told_of_load(rounds)["ratios"]
    assert ratios["folder"]["value"] == 3 and ratios["folder"]["met"]
    assert ratios["process"]["value"] == 3
    assert span(rounds[0][0], "folder") == 1.0  # without the imports
    assert apart(rounds[0]) == 0.5
