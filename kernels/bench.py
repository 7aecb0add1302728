"""python -m kernels.bench [OP ...]: the kernels' times beside torch's, on this machine's GPU.

Ours, the eager path, the definition under torch.compile, and rivals, in turn: times of the GPU,
with a cold cache. "%" is of the ceiling of the same run: a copy's GB/s, or the TFLOP/s of a bf16
product of 8192^3. A JSON line comes last."""

import csv
import json
import math
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any
import torch
from kernels.cases import Call, Draw, Sizes, chosen, label, ops, workers
from kernels.launch import CONFIGS_FILE, Config, arch_of, configs, rows_of

Row = dict[str, Any]
Rivals = Mapping[str, Call]  # by name; each takes the inputs, and `sizes` and `rest` of cases.py
RECORDS = Path(__file__).with_name("records.csv")
ROUNDS, REPEATS = 3, 10
CUDA = torch.device("cuda")

def times_ms(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """GPU times of each call, ascending."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(2**28, dtype=torch.int8, device=CUDA)  # more than the cache holds
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * REPEATS)]
    for name, call in [*calls.items()] * ROUNDS:
        call()
        for i in range(0, len(events), 2):
            flush.zero_()
            # cost: some 2 ms, in which the host gets ahead; its own time is not the kernels'
            torch.cuda._sleep(4 * 10**6)
            events[i].record()
            call()
            events[i + 1].record()
        torch.cuda.synchronize()
        found[name] += (a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True))
    return {name: sorted(times) for name, times in found.items()}

def ceilings() -> dict[str, float]:
    """A copy of 1 GiB, in GB/s, and a product, in TFLOP/s."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device=CUDA)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=CUDA)
    found = times_ms({"GB/s": partial(torch.empty_like(source).copy_, source), "mm": lambda: a @ a})
    copy_ms, product_ms = map(statistics.median, found.values())
    return {"GB/s": 2**31 / copy_ms * 1e-6, "TFLOP/s": 2 * 8192**3 / product_ms * 1e-9}

def calls_of(op: str, sizes: Sizes, rivals: Rivals,
             names: Sequence[str] = ()) -> dict[str, dict[str, Call]]:
    """mode -> who (of `names`, if any) -> what is timed; who cannot run is told, and left out."""
    entry = ops()[op]
    inputs, rest = entry.drawn(Draw(torch.bfloat16, CUDA), sizes)
    wrt = [inputs[name].requires_grad_() for name in entry.trained()]
    who = {impl: partial(entry.call, impl=impl, **rest) for impl in ("triton", "eager")}
    who |= {name: partial(rival, sizes=sizes, rest=rest) for name, rival in rivals.items()}
    if entry.compiles:
        who["compile"] = partial(torch.compile(entry.reference, dynamic=False), **rest)
    found: dict[str, dict[str, Call]] = {mode: {} for mode in entry.modes}
    for name in names or who:
        try:
            for mode in entry.modes:
                call = timed(partial(who[name], **inputs), mode, wrt)
                call()
                found[mode][name] = call
        except Exception as error:  # it is absent, too old, or takes more than the GPU has
            print(f"    {op}, {name}: {type(error).__name__}: {str(error).strip()[:160]}")
    return found

def timed(call: Call, mode: str, wrt: list[torch.Tensor]) -> Call:
    """The forward pass, the backward pass, or both."""
    if mode == "forward":
        return torch.no_grad()(call)
    grad, y = partial(torch.autograd.grad, inputs=wrt, allow_unused=True), call()
    dy = torch.randn_like(y)
    if mode == "both":
        return lambda: grad(call(), grad_outputs=dy)
    return lambda: grad(y, grad_outputs=dy, retain_graph=True)

def rows(op: str, limits: Mapping[str, float], rivals: Rivals) -> Iterator[Row]:
    """One for each size, mode and who."""
    entry = ops()[op]
    unit, scale = ("GB/s", 2e-6) if entry.values[0] else ("TFLOP/s", 1e-9)
    for sizes in entry.benches:
        forward, backward = entry.work(sizes)
        work = {"forward": forward, "backward": backward, "both": forward + backward}
        for mode, calls in calls_of(op, sizes, rivals).items():
            found = times_ms(calls)
            for name, times in found.items():
                p20, p50, p80 = (times[int(len(times) * part)] for part in (0.2, 0.5, 0.8))
                rate = work[mode] / p50 * scale
                yield {
                    "op": op, "sizes": label(sizes), "mode": mode, "who": name,
                    **{f"p{p}_us": round(t * 1e3, 1) for p, t in ((20, p20), (50, p50), (80, p80))},
                    "rate": round(rate, 1), "unit": unit, "%": round(100 * rate / limits[unit], 1),
                    "x eager": round(statistics.median(found.get("eager", [0.0])) / p50, 2),
                }  # fmt: skip
        torch.cuda.empty_cache()

def record(lines: list[Row], hardware: str) -> None:
    """Appends the rows to records.csv."""
    with RECORDS.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([date.today(), hardware, *row.values()] for row in lines)

def neighbours(config: Config) -> Iterator[Config]:
    """Configurations one step away: a size doubled or halved, a stage more or less."""
    most = {"num_stages": 5, "AHEAD": 5, "num_warps": 32, "PER_SM": 8}
    for key, value in config.items():
        steps = (value + 1, value - 1) if most.get(key) == 5 else (2 * value, value // 2)
        yield from (config | {key: step} for step in steps if 1 <= step <= most.get(key, 8192))

def tune(op: str, pool: Executor) -> None:
    """One step towards the fastest, for each row that serves sizes of the op: run it again."""
    served: dict[tuple[str, str, float], list[Sizes]] = {}
    for sizes, (kernel, letter) in product(ops()[op].benches, ops()[op].kernels.items()):
        shape = sizes.get("shape", "")
        kind = "_".join(filter(None, [arch_of(CUDA), shape]))
        table = configs()[kernel, kind] = dict(rows_of(kernel, CUDA, shape))
        limit = next(limit for limit in table if sizes[letter] <= limit)
        served.setdefault((kernel, kind, limit), []).append(sizes)
    for (kernel, kind, limit), every in served.items():
        table, times = configs()[kernel, kind], []
        tried = [table[limit], *neighbours(table[limit])]
        tables = [table | {limit: config} for config in tried]
        list(pool.map(partial(_compile, op, every, (kernel, kind)), tables))
        for config in tried:
            table[limit] = config
            times.append(sum(time_ms(op, sizes) for sizes in every))
        best = times.index(min(times))
        table[limit] = tried[best]
        print(kernel, kind, f"{limit:.0f}: {times[0]:.3f} -> {times[best]:.3f} ms", tried[best])

def _compile(op: str, every: list[Sizes], key: tuple[str, str], table: Row) -> None:
    """In a process of its own, into the cache that all share."""
    configs()[key] = table
    for sizes in every:
        calls_of(op, sizes, {}, ["triton"])
    torch.cuda.empty_cache()

def time_ms(op: str, sizes: Sizes) -> float:
    """Of all modes together; inf where the configuration does not run."""
    modes = calls_of(op, sizes, {}, ["triton"]).values()
    return sum(statistics.median(times_ms(calls).get("triton", [math.inf])) for calls in modes)

def save_configs() -> None:
    """Writes configs.toml anew, below its comment."""
    lines = [CONFIGS_FILE.read_text(encoding="utf-8").partition("\n[")[0]]
    for (kernel, kind), table in sorted(configs().items()):
        lines.append(f"\n[{kernel}.{kind}]")
        for limit, config in table.items():
            words = ", ".join(f"{key} = {value}" for key, value in config.items())
            lines.append(f"{limit:.0f} = {{ {words} }}")
    CONFIGS_FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")

def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each time, and a JSON line last."""
    parser = ArgumentParser("python -m kernels.bench", description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to kernels/records.csv")
    parser.add_argument("--tune", action="store_true", help="first write kernels/configs.toml")
    parser.add_argument("--rivals", metavar="MODULE", help="its RIVALS are timed too")
    options = chosen(parser, arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU, and times of the interpreter say nothing")
    if options.tune:
        with workers() as pool:
            for op in options.op:
                tune(op, pool)
                save_configs()
    limits = ceilings()
    ceiling = f"copy {limits['GB/s']:.0f} GB/s, product {limits['TFLOP/s']:.0f} TFLOP/s"
    hardware = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton"
    print(hardware := f"{hardware} {version('triton')}; {ceiling}")
    lines, rivals = [], import_module(options.rivals).RIVALS if options.rivals else {}
    for op in options.op:
        for row in rows(op, limits, rivals.get(op, {})):
            lines.append(row)
            print(*row.values(), flush=True)
    if options.record:
        record(lines, hardware)
    print(json.dumps({"hardware": hardware, "rows": lines}))
    return 0

if __name__ == "__main__":
    sys.exit(main())
