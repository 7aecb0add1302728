"""Ours and transformers side by side: the sides and their processes.

A side is a fresh process: it reads the rows, makes what it trains, then runs as many steps as it is
told and answers with one JSON line. So sides take turns, none changes the other's memory or
allocator, and a peak belongs to one side alone. The sides:

ours        the stages of train.py up to its loop, then the loop's steps
theirs      transformers (and peft) at its best: bf16 weights, or autocast over fp32 or over frozen
            bf16 ones (`mode`), SDPA or eager attention, whichever a probe finds faster; batches of
            like length, padded to their longest; fused AdamW. No dropout on attention weights,
            which ours has not either. Its bf16 weights have no fp32 masters, unlike ours
floor       the matrix products of ours alone (tests/bench/floor.py)

All read the same rows in the same turns. Inside a turn `theirs` sorts them by length.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self
import numpy as np
import torch
from torch import Tensor, nn
from ftcore.cli import Command, parse
from ftcore.data.pack import Encoded, step_rows
from ftcore.data.prepare import prepare
from ftcore.data.store import Prepared
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.compute import PRECISIONS, generator
from ftcore.env.run import RunFolder
from ftcore.hub import resolve
from ftcore.model.families import family_named
from ftcore.model.load import CONFIG, load_model, read_object
from ftcore.tune.loop import Loop
from ftcore.tune.optim import learning_rate
from ftcore.tune.task import TASKS, choose_trainable
from ftcore.tune.workers import Workers
from kernels.memory import reuse_across_steps
from tests.bench.floor import seconds_of, step_products
from train import check_lengths

MODES = {"full": ("bf16", "autocast"), "lora": ("bf16", "autocast", "autocast-frozen-bf16")}
Steps = list[list[Encoded]]  # documents of each step
Turn = Callable[[Steps], dict[str, Any]]  # runs them; seconds, and what else there is to tell

@dataclass(frozen=True)
class Bench:
    """What one bench compares."""

    name: str  # module below tests.bench
    unit: Literal["rows", "tokens"]  # what a rate counts; padding is no token
    bars: Mapping[str, float]  # smallest wanted ratio of each method
    # called once with an empty folder, `said.work`, before the sides start
    set_up: Callable[[argparse.Namespace], None]
    words: Callable[[argparse.Namespace], list[str]]  # train.py's: task, model, data, recipe
    # theirs: the model of a folder, for labels or None, with the keywords of from_pretrained
    model: Callable[[Path, int | None, dict[str, Any]], nn.Module]
    peft: Mapping[str, Any]  # keywords of peft's LoraConfig: where the factors sit
    padded: Callable[[Sequence[Encoded]], dict[str, Tensor]]

# ---- the sides ----------------------------------------------------------------------------------

def floor(
    bench: Bench, said: argparse.Namespace, command: Command, data: Prepared, life: ExitStack
) -> Turn:
    """The side `floor`."""
    task = TASKS[command.task].model_task
    config = read_object(resolve(command.config.model.path) / CONFIG)
    spec = family_named(config["model_type"], task).to_spec(config)
    rank = command.config.peft.rank if said.method == "lora" else 0
    labels = len(data.labels) if data.labels else None
    reuse_across_steps()

    def turn(steps: Steps) -> dict[str, Any]:
        seconds = flops = 0
        for documents in steps:
            scored = sum(int(np.count_nonzero(document.weights)) for document in documents)
            lengths = [len(document) for document in documents]
            products = step_products(spec, lengths, scored, labels=labels, R=rank)
            seconds += seconds_of(products)
            flops += sum(product.flops * count for product, count in products.items())
        return {"seconds": seconds, "flops": flops}

    return turn

def ours(
    bench: Bench, said: argparse.Namespace, command: Command, data: Prepared, life: ExitStack
) -> Turn:
    """The side `ours`: what train.py does between its data and the end of its loop."""
    config, seed = command.config, command.config.env.seed
    loaded = load_model(
        resolve(config.model.path),
        task=TASKS[command.task].model_task,
        dtype=PRECISIONS[config.env.precision][0],
        labels=data.labels,
        init=config.model.init,
        generator=generator(seed, 1),
    )
    reuse_across_steps()
    choose_trainable(loaded.model, config.peft, generator(seed, 2))
    check_lengths(loaded.model.spec, data, command.task)
    loop = Loop(
        loaded.model,
        TASKS[command.task].loss,
        data.train.documents,
        config,
        RunFolder(config.log.dir / config.log.name),
    )
    loaded.model.train()
    count = min(torch.get_num_threads(), config.optim.batch_size)
    crew = Workers(count, loop.optimizer, loop)
    workers = life.enter_context(crew)  # as in a run, for all its steps

    def turn(steps: Steps) -> dict[str, Any]:
        before = of_workers()
        started = time.perf_counter()
        losses = [loop._step(workers)["train/loss"] for _ in steps]
        seconds = time.perf_counter() - started
        told = {"seconds": seconds, "loss": statistics.mean(losses), **of_workers()}
        told["workers_cpu_s"] -= before["workers_cpu_s"]
        assert not loop.progress.skipped_steps, "steps were not finite: nothing to compare"
        return told | trained(loaded.model)

    return turn

def theirs(
    bench: Bench, said: argparse.Namespace, command: Command, data: Prepared, life: ExitStack
) -> Turn:
    """The side `theirs`."""
    config, optim = command.config, command.config.optim
    torch.manual_seed(config.env.seed)
    dtype = torch.float32 if said.mode == "autocast" else torch.bfloat16
    options = {"dtype": dtype, "attn_implementation": said.attention}
    labels = len(data.labels) if data.labels else None
    model = bench.model(resolve(config.model.path), labels, options)
    if said.method == "lora":
        import peft

        lora = peft.LoraConfig(r=config.peft.rank, lora_alpha=config.peft.alpha, **bench.peft)
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=said.mode != "bf16")
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    total, schedule = config.loop.max_steps, config.schedule
    rate = partial(learning_rate, total_steps=total, peak=1.0, config=schedule)
    rates = torch.optim.lr_scheduler.LambdaLR(adamw, rate)
    rng = random.Random(config.env.seed)

    def turn(steps: Steps) -> dict[str, Any]:
        losses, padded = [], 0
        started = time.perf_counter()
        for documents in grouped(steps, optim.batch_size, rng):
            batch = bench.padded(documents)
            with torch.autocast("cpu", torch.bfloat16, enabled=said.mode != "bf16"):
                loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(params, optim.max_grad_norm)
            adamw.step()
            rates.step()
            adamw.zero_grad()
            losses.append(loss.item())
            padded += batch["input_ids"].numel()
        seconds = time.perf_counter() - started
        told = {"seconds": seconds, "loss": statistics.mean(losses), "padded_tokens": padded}
        return told | trained(model)

    return turn

def trained(model: nn.Module) -> dict[str, int]:
    return {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}

def grouped(steps: Steps, size: int, rng: random.Random) -> Steps:
    """The same documents in batches of like length, the batches in random order."""
    documents = sorted((d for step in steps for d in step), key=len)
    batches = [documents[i : i + size] for i in range(0, len(documents), size)]
    rng.shuffle(batches)
    return batches

SIDES = {"ours": ours, "theirs": theirs, "floor": floor}

# ---- a side's process ----------------------------------------------------------------------------

def peak_mib(status: str) -> float:
    """Most memory this process ever held, from the text of /proc/self/status.

    Not getrusage's ru_maxrss, which a child inherits from the process that started it.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)
    assert found is not None, "/proc/self/status has no VmHWM"
    return int(found[1]) / 1024

def own_peak_mib() -> float:
    return peak_mib(Path("/proc/self/status").read_text())

def of_workers() -> dict[str, float]:
    """CPU time of the processes that this one started, and memory that they alone hold: what they
    share with it is in its own peak."""
    cpu_s = mib = 0.0
    for child in multiprocessing.active_children():
        proc = Path(f"/proc/{child.pid}")
        # After the name in brackets: fields 3 and on of proc(5); user and system time are 14, 15.
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        cpu_s += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        held = re.findall(r"^Private_\w+: +(\d+) kB$", (proc / "smaps_rollup").read_text(), re.M)
        mib += sum(map(int, held)) / 1024
    return {"workers_cpu_s": cpu_s, "workers_mib": mib}

def serve(bench: Bench, said: argparse.Namespace) -> None:
    """Be one side: read a number of steps a line, run them, answer with a JSON line."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), ExitStack() as life:
        command = parse([
            *bench.words(said), "--peft.method", said.method, "--env.threads", str(said.threads),
            "--optim.batch-size", str(said.batch), "--loop.max-steps",
            str(said.warmup + said.repeats * said.steps),
            "--log.dir", str(said.work / "runs"), "--log.name", said.method,
        ])  # fmt: skip
        torch.set_num_threads(said.threads)
        config, seed = command.config, command.config.env.seed
        data = prepare(config.data, Tokenizer.load(resolve(config.model.path)), seed=seed)
        documents = data.train.documents
        size = config.optim.batch_size
        rows = partial(step_rows, num_rows=len(documents), batch_size=size, seed=seed)
        before = own_peak_mib()
        turn = SIDES[said.side](bench, said, command, data, life)
        done, most = 0, 0.0
        for line in sys.stdin:
            count = int(line)
            steps = [[documents[row] for row in rows(done + i)] for i in range(count)]
            done += count
            lengths = [len(document) for step in steps for document in step]
            started = time.process_time()
            told = {"rows": len(lengths), "tokens": sum(lengths), **turn(steps)}
            told["cpu_s"] = time.process_time() - started + told.pop("workers_cpu_s", 0.0)
            most = max(most, told.pop("workers_mib", 0.0))
            told |= {"rows_mib": before, "peak_mib": own_peak_mib() + most}
            print(json.dumps(told), file=answers, flush=True)

class Side:
    """The other end of `serve`; a `with` ends the process."""

    def __init__(self, bench: Bench, **words: str | Path) -> None:
        extra = [text for name, value in words.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", f"tests.bench.{bench.name}", *sys.argv[1:], *extra]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0)

    def steps(self, count: int) -> dict[str, Any]:
        """Run the next steps.

        returns     rows, tokens, seconds and cpu_s (of all threads) of these steps; peak_mib so
                    far, rows_mib before there was a model; and what else the side tells
        raises      RuntimeError: the process ended
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died; its line is empty
            self.process.stdin.write(f"{count}\n".encode())
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side died with exit code {self.process.wait()}: see above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self.process:  # which closes both pipes, so that the side ends, and waits
            pass
