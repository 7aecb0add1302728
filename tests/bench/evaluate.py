"""Evaluating a classifier: ours against transformers.

    python -m tests.bench.evaluate --data DIR [--rounds 3] [--part classify|imdb ...]

classify    sentences of SST-2 (dev and labelled test) through a BERT (MiniLM) with two classes;
            theirs: transformers, rows sorted by length, padded to the longest of a batch
imdb        reviews cut to 512 tokens, in the order of the files; theirs in batches of that order

Ours runs as eval.py does. Theirs is tried twice on an eighth of the rows with every size of a batch
and kind of attention, and the fastest takes turns with ours on all rows (`--every N`: on every
N-th). Each side is one process with its model made before; both read the same tokens, made before.
Ratios are medians over the rounds, of seconds and of those of all cores. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
import numpy as np
import torch
from ftcore.config import LabelledDataConfig, LoopConfig
from ftcore.data.pack import Encoded
from ftcore.data.prepare import prepare
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.compute import PRECISIONS
from ftcore.evaluate.evaluator import all_logits
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from kernels.memory import reuse_across_steps
from tests.bench.sst2 import model_folder, padded

BARS = {"classify": 1.15, "imdb": 1.8}
CLOSE = 1e-4  # most that fp32 logits may differ
MAX_TOKENS = LoopConfig().micro_batch_tokens
Told = dict[str, Any]
Turn = Callable[[Path], Told]  # of the rows of a file: `seconds`, `cpu_s`, `values`, and others

# ---- inside the process of a side ----------------------------------------------------------------

def begin(side: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if side == "ours":
        reuse_across_steps()  # as eval.py does

@contextmanager
def timed(told: Told) -> Iterator[None]:
    started, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        yield
    told |= {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}

@cache
def documents_of(file: Path) -> list[Encoded]:
    named = {"duplicates": "off", "max_length": 512, "over_length": "cut_right"}
    config = LabelledDataConfig(test=(str(file),), **named)
    data = prepare(config, Tokenizer.load(model_folder()), seed=0, labels=("0", "1"))
    (split,) = data.tests.values()
    return list(split.documents)

@cache
def our_model(folder: Path, precision: str) -> Model:
    # theirs leaves out the names of two labels, so they are told
    dtype = PRECISIONS[precision][0]
    return load_model(folder, task="classify", dtype=dtype, labels=("0", "1")).model

@cache
def their_model(folder: Path, precision: str, attention: str) -> torch.nn.Module:
    import transformers

    options = {"dtype": PRECISIONS[precision][0], "attn_implementation": attention}
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(folder, **options).eval()

def our_logits(folder: Path, precision: str, file: Path) -> Told:
    model, documents = our_model(folder, precision), documents_of(file)
    told: Told = {"rows": len(documents), "tokens": sum(map(len, documents))}
    with timed(told):
        told["values"] = all_logits(model, documents, MAX_TOKENS).numpy()
    return told

def their_logits(
    folder: Path, precision: str, is_sorted: bool, size: int, attention: str, file: Path
) -> Told:
    model = their_model(folder, precision, attention)
    documents, logits, told = documents_of(file), {}, {"slots": 0}
    with timed(told):
        order = sorted(range(len(documents)), key=lambda row: -len(documents[row]) * is_sorted)
        for some in (order[start : start + size] for start in range(0, len(order), size)):
            batch = padded([documents[row] for row in some])
            del batch["labels"]
            told["slots"] += batch["input_ids"].numel()
            logits |= zip(some, model(**batch).logits.float(), strict=True)
        told["values"] = torch.stack([logits[row] for row in range(len(order))]).numpy()
    return told

# ---- who takes turns -----------------------------------------------------------------------------

class Sides:
    """A process of each side."""

    def __init__(self, threads: int) -> None:
        start = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), begin)
        self.pools = {side: start((side, threads)) for side in ("ours", "theirs")}

    def turn(self, name: str, call: Turn, file: Path) -> Told:
        return self.pools["ours" if name == "ours" else "theirs"].submit(call, file).result()

    def race(self, calls: dict[str, Turn], whole: Path, few: Path, rounds: int) -> Told:
        """Ours, and the fastest of the others, on the rows of `whole`."""
        tried = [{n: self.turn(n, call, few) for n, call in calls.items()} for _ in range(2)]
        least = {name: min(turns[name]["seconds"] for turns in tried) for name in calls}
        best = min(calls.keys() - {"ours"}, key=least.__getitem__)
        pairs = [[self.turn(n, calls[n], whole) for n in ("ours", best)] for _ in range(rounds)]
        ours, theirs = pairs[-1]
        found: Told = {name: value for name, value in (theirs | ours).items() if name != "values"}
        for key in ("seconds", "cpu_s"):
            both = [(ours[key], theirs[key]) for ours, theirs in pairs]
            ratios = [theirs / ours for ours, theirs in both]
            found[key] = [statistics.median(side) for side in zip(*both, strict=True)]
            found[f"{key}_ratio"], found[f"{key}_ratios"] = statistics.median(ratios), ratios
        found["apart"] = float(np.abs(ours["values"] - theirs["values"]).max())
        return found | {"rival": best, "tried_s": least}

# ---- the parts -----------------------------------------------------------------------------------

def sentences(data: Path) -> list[Told]:
    texts = [data / "sst2_glue" / name for name in ("dev.tsv", "test-labeled.tsv")]
    lines = [line for text in texts for line in text.read_text("utf-8").splitlines()[1:]]
    return [dict(zip(("text", "label"), line.rsplit("\t", 1), strict=True)) for line in lines]

def reviews(data: Path) -> list[Told]:
    """Every twelfth file of the archive, in its order."""
    with tarfile.open(data / "imdb/aclImdb_test_5000.tar.gz") as archive:
        some = [member for member in archive if member.name.endswith(".txt")][::12]
        texts = [archive.extractfile(member).read().decode("utf-8") for member in some]
    labels = [str(int("/pos/" in member.name)) for member in some]
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]

def cases(part: str, said: argparse.Namespace) -> Iterator[tuple[str, list[Told], dict[str, Turn]]]:
    """Name, rows and sides of each case of a part."""
    import transformers

    folder, sorts = said.work / part, part == "classify"
    torch.manual_seed(0)  # of the head
    kind = transformers.AutoModelForSequenceClassification
    kind.from_pretrained(model_folder(), num_labels=2).save_pretrained(folder)
    rows = sentences(said.data) if sorts else reviews(said.data)
    for precision in ("fp32", "bf16"):
        calls = {"ours": partial(our_logits, folder, precision)}
        for kind, size in product(("sdpa", "eager"), (8, 32, 64)):
            calls[f"{kind} {size}"] = partial(their_logits, folder, precision, sorts, size, kind)
        yield precision, rows, calls

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.evaluate")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", nargs="*", choices=BARS, default=list(BARS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    said = parser.parse_args()
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "TQDM_DISABLE"), "1")
    found, sides = {}, Sides(said.threads)
    with tempfile.TemporaryDirectory() as work:
        said.work = Path(work)
        for name, (case, rows, calls) in ((n, c) for n in said.part for c in cases(n, said)):
            files = []
            for step in (said.every, 8):
                files.append(said.work / f"{name}-{case}-{step}.jsonl")
                files[-1].write_text("\n".join(map(json.dumps, rows[::step])), "utf-8")
            one = sides.race(calls, *files, said.rounds)
            one |= {"agrees": case == "bf16" or one["apart"] <= CLOSE, "bar": BARS[name]}
            one["met"] = one["agrees"] and one["seconds_ratio"] >= one["bar"]
            rates = " and ".join(f"{one['rows'] / seconds:.1f}" for seconds in one["seconds"])
            ratios = f"{one['seconds_ratio']:.2f}x (of all cores {one['cpu_s_ratio']:.2f}x)"
            print(f"{name} {case}: {rates} rows/s (theirs: {one['rival']}), {ratios},")
            print(f"  bar {one['bar']}; values {one['apart']:.1e} apart", flush=True)
            found[f"{name}-{case}"] = one
    print(json.dumps({"evaluate": found, "threads": said.threads}))

if __name__ == "__main__":
    main()
