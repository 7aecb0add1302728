"""Data files to token arrays on the disk, end to end: ours against datasets with transformers.

    python -m tests.bench.encode --data DIR

sst2    67,349 labelled sentences of a tsv, the tokenizer of MiniLM
chat    3,710 dialogues of a jsonl, the built-in tokenizer and its template, answers supervised

Ours is `prepared` into an empty cache, without comparing and normalising rows. Theirs is
`load_dataset` and `map` in batches into an empty cache, in one process or two, whichever is faster;
of chats the mask of the answers is what the template's generation blocks give. Imports and loading
of tokenizers are not counted. All sides take turns, a process each; both must make the same number
of tokens, and of supervised ones. `cpu_s` counts all threads and processes. The last line is JSON.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from tests.bench.sst2 import model_folder

# Nothing heavier is imported up here: a side imports its own.

BAR = 1.5
BASE = Path(__file__).parents[2] / "ftcore" / "builtin" / "base"
# The template of the built-in base, with the answers marked.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)

def write_files(data: Path, work: Path) -> None:
    packed = (data / "sst2_glue" / "train.tsv.gz").read_bytes()
    (work / "sst2.tsv").write_bytes(gzip.decompress(packed))
    dialogues = [
        [{"role": turn["speaker"], "content": turn["text"]} for turn in dialogue["utterances"]]
        for file in sorted((data / "taskmaster4" / "data").glob("*.json.gz"))
        for dialogue in json.loads(gzip.decompress(file.read_bytes()))
    ]
    kept = [chat for chat in dialogues if all(turn["content"].strip() for turn in chat)]
    lines = (json.dumps({"messages": chat}) + "\n" for chat in kept)
    (work / "chat.jsonl").write_text("".join(lines), "utf-8")

def spent() -> tuple[float, float]:
    """Seconds on the clock, and of all cores by this process and its children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)

def ours(case: str, work: Path, cache: Path) -> dict[str, Any]:
    import numpy as np
    from ftcore.config import ChatDataConfig, LabelledDataConfig
    from ftcore.data.prepare import prepared
    from ftcore.data.tokenizer import Tokenizer

    named = {"cache": cache, "duplicates": "off", "unicode": "off"}
    if case == "sst2":
        tokenizer = Tokenizer.load(model_folder())
        config = LabelledDataConfig(train=(str(work / "sst2.tsv"),), text="sentence", **named)
    else:
        tokenizer = Tokenizer.load(BASE)
        config = ChatDataConfig(train=(str(work / "chat.jsonl"),), **named)
    started, cpu = spent()
    data, _ = prepared(config, tokenizer, seed=0)
    ended, cpu_after = spent()
    documents = data.train.documents
    return {
        "seconds": ended - started,
        "cpu_s": cpu_after - cpu,
        "rows": len(documents),
        "tokens": sum(map(len, documents)),
        "supervised": int(sum(np.sum(document.weights) for document in documents)),
    }

def theirs(case: str, work: Path, cache: Path, num_proc: int | None) -> dict[str, Any]:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_folder() if case == "sst2" else BASE
    )

    def sentences(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch["sentence"])

    def chats(batch: dict[str, list]) -> dict[str, list]:
        made = tokenizer.apply_chat_template(
            batch["messages"], chat_template=MARKED, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        labels = [
            [id_ if kept else -100 for id_, kept in zip(ids, mask, strict=True)]
            for ids, mask in zip(made["input_ids"], made["assistant_masks"], strict=True)
        ]
        return {"input_ids": made["input_ids"], "labels": labels}

    started, cpu = spent()
    if case == "sst2":
        options = {"data_files": str(work / "sst2.tsv"), "delimiter": "\t", "quoting": 3}
        rows = datasets.load_dataset("csv", **options, split="train", cache_dir=cache)
    else:
        options = {"data_files": str(work / "chat.jsonl")}
        rows = datasets.load_dataset("json", **options, split="train", cache_dir=cache)
    function, column = (sentences, "sentence") if case == "sst2" else (chats, "messages")
    made = rows.map(function, batched=True, num_proc=num_proc, remove_columns=[column])
    ended, cpu_after = spent()
    supervised = len(made)
    if case == "chat":
        supervised = sum(label != -100 for labels in made["labels"] for label in labels)
    return {
        "seconds": ended - started,
        "cpu_s": cpu_after - cpu,
        "rows": len(made),
        "tokens": sum(map(len, made["input_ids"])),
        "supervised": supervised,
    }

SIDES = {"ours": None, "theirs": None, "theirs, 2 processes": 2}

def turn(side: str, case: str, work: Path) -> dict[str, Any]:
    """What one process of a side tells."""
    words = ["--side", side, "--case", case, "--work", str(work)]
    command = [sys.executable, "-m", "tests.bench.encode", *words]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])

def told(case: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each side, and by how much ours is faster than the better of theirs."""
    counts = {tuple(t[name] for name in ("rows", "tokens", "supervised"))
              for turns in rounds for t in turns.values()}  # fmt: skip
    assert len(counts) == 1, f"{case}: the sides made different tokens: {counts}"
    found: dict[str, Any] = dict(zip(("rows", "tokens", "supervised"), counts.pop(), strict=True))
    for name in ("seconds", "cpu_s"):
        found[name] = {s: statistics.median(turns[s][name] for turns in rounds) for s in SIDES}
        ours, *others = found[name].values()
        found[f"ratio_{name}"] = min(others) / ours
    return found | {"bar": BAR, "met": found["ratio_seconds"] >= BAR}

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.encode")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.side:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"  # in one process; two have a core each
        with tempfile.TemporaryDirectory(dir=said.work) as cache:
            if said.side == "ours":
                print(json.dumps(ours(said.case, said.work, Path(cache))))
            else:
                found = theirs(said.case, said.work, Path(cache), SIDES[said.side])
                print(json.dumps(found))
        return
    found = {}
    with tempfile.TemporaryDirectory() as work:
        write_files(said.data, Path(work))
        for case in ("sst2", "chat"):
            rounds = [{s: turn(s, case, Path(work)) for s in SIDES} for _ in range(said.rounds)]
            found[case] = told(case, rounds)
            print(f"{case}: {found[case]['rows']} rows, {found[case]['tokens']} tokens")
            for side in SIDES:
                wall, cpu = (found[case][name][side] for name in ("seconds", "cpu_s"))
                print(f"  {side:22}{wall:7.2f} s {cpu:7.2f} s of all cores")
            print(f"  {found[case]['ratio_seconds']:.2f}x (bar {BAR})")
    print(json.dumps({"encode": found, "cores": len(os.sched_getaffinity(0))}))

if __name__ == "__main__":
    main()
