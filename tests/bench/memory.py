"""The peak memory that `--dry-run` predicts against that of a process that trains.

    python -m tests.bench.memory

A random decoder of 57 M parameters, rows of 256 tokens, all supervised, one micro-batch a step, one
process; full and LoRA, fp32 and bf16, without and with layers computed again. Each case trains in a
fresh process: its peak (VmHWM) less what it held after imports. The prediction is made in another.
The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 16384,
    "hidden_size": 640, "num_hidden_layers": 10, "intermediate_size": 1792,
    "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 64, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048, "hidden_act": "silu", "rope_theta": 10000.0,
    "tie_word_embeddings": True, "attention_bias": False, "initializer_range": 0.02,
}  # fmt: skip
ROW_TOKENS = 256
BAR = 0.1

def held(field: str) -> float:
    """MiB that Linux says this process holds, VmRSS, or held at most, VmHWM."""
    status = Path("/proc/self/status").read_text()
    return int(next(s for s in status.splitlines() if s.startswith(field)).split()[1]) / 1024

def serve(said: argparse.Namespace) -> dict[str, float]:
    """Predict, or train and measure, one case."""
    import numpy as np
    import torch
    from ftcore.cli import parse
    from ftcore.data.pack import Encoded
    from ftcore.env.compute import PRECISIONS, generator
    from ftcore.env.plan import planned
    from ftcore.env.run import RunFolder
    from ftcore.model.load import load_model
    from ftcore.tune.loop import Loop
    from ftcore.tune.task import TASKS, choose_trainable
    from kernels.memory import reuse_across_steps

    size = said.tokens // ROW_TOKENS
    words = ["pretrain", "--model.init", "random", "--env.threads", "1", "--peft.dropout", "0.05"]
    words += ["--peft.method", said.peft, "--env.precision", said.precision]
    words += ["--env.recompute", said.recompute, "--optim.batch-size", str(size)]
    words += ["--loop.max-steps", str(said.steps), "--loop.micro-batch-tokens", str(said.tokens)]
    config = parse(words).config
    random = np.random.default_rng(0)
    ids = random.integers(0, QWEN3["vocab_size"], (4 * size, ROW_TOKENS), dtype=np.int32)
    ones = np.ones(ROW_TOKENS, np.float32)
    documents = [Encoded(str(i), ids_T, ids_T, ones) for i, ids_T in enumerate(ids)]
    loss = TASKS["pretrain"].loss
    torch.set_num_threads(1)
    before = held("VmRSS")
    dtype = PRECISIONS[config.env.precision][0]
    loaded = load_model(
        said.folder, task="lm", dtype=dtype, init="random", generator=generator(0, 1)
    )
    reuse_across_steps()
    choose_trainable(loaded.model, config.peft, generator(0, 2))
    loaded.model.trunk.recompute = config.env.recompute
    if said.predict:
        started = time.perf_counter()
        memory_bytes, _ = planned(config, loaded.model, documents, loss)
        seconds = time.perf_counter() - started
        parts = {name: size / 2**20 for name, size in memory_bytes.items()}
        return {"predicted_mib": sum(parts.values()), "counting_s": seconds, "parts_mib": parts}
    with RunFolder(said.folder / "run") as run:
        loop = Loop(loaded.model, loss, documents, config, run)
        steps: list[float] = []
        task, clock = loop.task, time.process_time
        loop.task = lambda *args: (steps.append(clock()), task(*args))[1]
        loop._save = lambda **options: steps.append(clock())  # not what is measured
        loop.train()
    seconds = min(b - a for a, b in zip(steps, steps[1:], strict=False))
    return {"measured_mib": held("VmHWM") - before, "step_s": seconds}

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--peft", choices=("full", "lora"))
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--recompute", choices=("none", "selective", "all"))
    parser.add_argument("--predict", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.folder:
        print(json.dumps(serve(said)), flush=True)
        return
    found: list[dict[str, Any]] = []
    print("peft precision recompute  predicted MiB  measured MiB  ratio  step s")
    one = {"peft": ("full", "lora"), "precision": ("fp32", "bf16"), "recompute": ("none", "all")}
    asked = [[getattr(said, name)] if getattr(said, name) else one[name] for name in one]
    for case in product(*asked):
        words = [f"--{name}={value}" for name, value in zip(one, case, strict=True)]
        words += ["--tokens", str(said.tokens), "--steps", str(said.steps)]
        result: dict[str, Any] = dict(zip(one, case, strict=True))
        for more in (["--predict"], []):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(QWEN3), "utf-8")
                command = [sys.executable, "-m", "tests.bench.memory", "--folder", folder]
                env = {**os.environ, "OMP_NUM_THREADS": "1"}
                out = subprocess.run(
                    [*command, *words, *more], env=env, check=True, stdout=subprocess.PIPE
                ).stdout
            result |= json.loads(out.splitlines()[-1])
        result["ratio"] = result["predicted_mib"] / result["measured_mib"]
        result["met"] = abs(result["ratio"] - 1) <= BAR
        found.append(result)
        print(
            f"{case[0]:4} {case[1]:9} {case[2]:9} {result['predicted_mib']:14.0f}"
            f" {result['measured_mib']:13.0f} {result['ratio']:6.3f} {result['step_s']:7.2f}",
            flush=True,
        )
    print(json.dumps({"memory": found, "tokens": said.tokens}))

if __name__ == "__main__":
    main()
