"""Rows in mapped files: the same run as over a list, and little memory for much data."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
import pytest
from ftcore.data.pack import Encoded, load, save
from ftcore.env.run import read_metrics
from ftcore.tune.loop import rows_read

ROOT = Path(__file__).parents[2]
LENGTH, COUNT = 1000, 26_000

# Anonymous memory (MiB) that a process needs to open the rows and to train on some of them.
TRAIN = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import torch
from ftcore.config import LoopConfig, OptimConfig, PretrainRun
from ftcore.data.pack import load
from ftcore.env.run import RunFolder
from ftcore.env.compute import generator
from ftcore.model.heads import Model
from ftcore.tune.loop import Loop
from ftcore.tune.task import token_labels
from tests.tune.conftest import QWEN3

def resident(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

rows, run = map(Path, sys.argv[1:])
torch.set_num_threads(1)
model = Model(replace(QWEN3, max_positions=1024, tie_word_embeddings=False), "lm", 0)
model.init_weights(generator(0, 1))
before = [resident("RssAnon"), resident("RssFile")]
loop = Loop(
    model, token_labels, load(rows),
    PretrainRun(
        optim=OptimConfig(batch_size=4), loop=LoopConfig(max_steps=12, micro_batch_tokens=2000)
    ),
    RunFolder(run),
)
loop.train()
after = [resident("RssAnon"), resident("RssFile")]
print(json.dumps({"anonymous": after[0] - before[0], "mapped": after[1] - before[1]}))
"""

@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_a_run_over_mapped_rows_is_bit_equal(
    family: str, make_loop: Callable, rows: Callable, tmp_path: Path
) -> None:
    save(rows(family, 18), tmp_path)
    logged = []
    for name in ("list", "maps"):
        loop = make_loop(name, family=family)
        if name == "maps":
            of_list = rows_read(loop.model, loop.documents)
            loop.documents = load(tmp_path)
            of_maps = rows_read(loop.model, loop.documents)
            assert of_list.keys() == of_maps.keys()
            assert all((of_list[key] == of_maps[key]).all() for key in of_list)
        assert loop.train() == 0
        lines = read_metrics(loop.run.path / "metrics.jsonl")
        logged.append([[line["train/loss"], line["train/grad_norm"]] for line in lines])
    assert logged[0] == logged[1] and len(logged[0]) == 12

def test_much_data_needs_little_memory(tmp_path: Path) -> None:
    tokens_N = np.random.default_rng(0).integers(0, 61, LENGTH * COUNT, dtype=np.int32)
    weights_T = np.ones(LENGTH, np.float32)
    parts = tokens_N.reshape(COUNT, LENGTH)
    documents = [Encoded(str(n), part, part, weights_T) for n, part in enumerate(parts)]
    (tmp_path / "rows").mkdir()
    save(documents, tmp_path / "rows")
    size = sum(path.stat().st_size for path in (tmp_path / "rows").iterdir()) / 2**20
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "rows"), str(tmp_path / "run")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    print(f"{size:.0f} MiB of rows: {told}")
    assert size > 220 and told["anonymous"] < 100
