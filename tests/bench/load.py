"""From a model folder to its first logits, in a fresh process: ours against transformers.

    python -m tests.bench.load

Two folders: a GPT-2 (124 M parameters, random, fp32 on the disk, next-token logits) and MiniLM (a
BERT, class logits, its head new); both compute in bf16, with `--precision fp32` in that. Both
sides take turns, the first turn is not counted, so the files are in the page cache. What is told:

folder      reading the model and computing the logits of 16 tokens, all imports done
process     from the start of the process, so with python, torch and the library

The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Nothing heavy is imported up here: a side imports its library alone, and is timed while it does.

BAR = 3.0
TOKENS = tuple(range(100, 116))
SHOWN = 64  # logits that the sides are compared by
Side = dict[str, Any]

def ours(folder: Path, task: str, precision: str) -> Side:
    """Times of this process, in s, and logits of the last token, or of the classes."""
    started = time.perf_counter()
    import numpy as np
    import torch
    from ftcore.data.pack import Encoded, collate
    from ftcore.env.compute import PRECISIONS, generator
    from ftcore.model.load import load_model

    imported = time.perf_counter()
    model = load_model(
        folder,
        task=task,
        dtype=PRECISIONS[precision][0],
        labels=("0", "1") if task == "classify" else None,
        generator=generator(0, 1),
    ).model
    loaded = time.perf_counter()
    batch = collate([Encoded("0", np.array(TOKENS, dtype=np.int32), labels=0)])
    with torch.inference_mode():
        rows_B = model.head.rows(batch.docs) if task == "classify" else None
        inputs = (batch.tokens_N, batch.positions_N, batch.types_N, batch.docs)
        h_MC = model.trunk(*inputs, rows_M=rows_B)
        logits = model.head(h_MC, batch.docs) if task == "classify" else model.head(h_MC)
    return times(started, imported, loaded) | {"logits": logits[-1, :SHOWN].tolist()}

def theirs(folder: Path, task: str, precision: str) -> Side:
    """As `ours`."""
    started = time.perf_counter()
    import torch
    from transformers import BertForSequenceClassification, GPT2LMHeadModel

    imported = time.perf_counter()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if task == "classify":
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype)
    else:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype)
    loaded = time.perf_counter()
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.tensor([TOKENS])).logits
    logits = logits.flatten(0, -2)
    return times(started, imported, loaded) | {"logits": logits[-1, :SHOWN].tolist()}

def times(started: float, imported: float, loaded: float) -> Side:
    done = time.perf_counter()
    return {"import": imported - started, "load": loaded - imported, "logits_s": done - loaded}

SIDES = {"ours": ours, "theirs": theirs}

def timed(side: str, folder: Path, task: str, said: argparse.Namespace) -> Side:
    """What a fresh process tells, with `process`: seconds until it had its logits."""
    words = ["--side", side, "--folder", str(folder), "--task", task]
    words += ["--threads", str(said.threads), "--precision", said.precision]
    command = [sys.executable, "-m", "tests.bench.load", *words]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{side} died with exit code {process.returncode}: see above")
    return json.loads(line) | {"process": seconds}

def told(rounds: Sequence[tuple[Side, Side]]) -> dict[str, Any]:
    """Medians over the rounds of ours and theirs."""
    found: dict[str, Any] = {"ratios": {}}
    for name in ("folder", "process"):
        pairs = [[span(side, name) for side in pair] for pair in rounds]
        value = statistics.median(theirs / ours for ours, theirs in pairs)
        found["ratios"][name] = {"value": value, "bar": BAR, "met": value >= BAR}
    for index, name in enumerate(SIDES):
        turns = [pair[index] for pair in rounds]
        found[name] = {
            key: statistics.median(turn[key] for turn in turns)
            for key in ("import", "load", "logits_s", "process", "peak_mib")
        }
    return found

def span(side: Side, name: str) -> float:
    return side["load"] + side["logits_s"] if name == "folder" else side["process"]

def apart(pair: tuple[Side, Side]) -> float:
    """Largest difference of the logits, over the largest logit."""
    ours, theirs = (side["logits"] for side in pair)
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(map(abs, theirs))

def serve(said: argparse.Namespace) -> None:
    """Be one side, once."""
    os.environ["OMP_NUM_THREADS"] = str(said.threads)  # read when torch is imported
    found = SIDES[said.side](said.folder, said.task, said.precision)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    print(json.dumps(found | {"peak_mib": int(peak.split()[1]) / 1024}), flush=True)

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load")
    parser.add_argument("--only", nargs="*", choices=("gpt2", "minilm"))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5, help="processes of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.side:
        serve(said)
        return
    from tests.bench.sft import write_gpt2
    from tests.bench.sst2 import model_folder

    found = {}
    with tempfile.TemporaryDirectory() as work:
        for name in said.only or ("gpt2", "minilm"):
            folder, task = Path(model_folder()), "classify"
            if name == "gpt2":
                folder, task = Path(work), "lm"
                write_gpt2(folder)
            rounds = []
            for _ in range(1 + said.repeats):
                rounds.append(tuple(timed(side, folder, task, said) for side in SIDES))
            found[name] = told(rounds[1:])
            if task == "lm":  # a new head is drawn differently by each side
                found[name]["logits_apart"] = apart(rounds[-1])
            print(f"{name:8}import s   load s  logits s  process s  peak MiB")
            for side in SIDES:
                s = found[name][side]
                print(
                    f"{side:8}{s['import']:8.2f} {s['load']:8.2f}  {s['logits_s']:8.3f}"
                    f"  {s['process']:9.2f}  {s['peak_mib']:8.0f}"
                )
            ratios = found[name]["ratios"]
            print(", ".join(f"{key} {r['value']:.2f}x (bar {BAR})" for key, r in ratios.items()))
    print(json.dumps({"load": found, "threads": said.threads, "precision": said.precision}))

if __name__ == "__main__":
    main()
