"""python -m kernels.bench [OP ...]: the kernels' times beside torch's, on this machine's GPU.

Ours, the eager path, and the definition under torch.compile; beside them rivals, where a caller has
some (tests/bench/gpu.py). All are timed in rounds, so that a change of the clock meets all: times
of the GPU, with a cold cache. "%" is of the ceiling, measured in the same run: a copy's GB/s, or
the TFLOP/s of a bf16 product of 8192 x 8192 x 8192. A JSON line comes last.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kernels.cases import OPS, Call, Draw, Sizes, label
from kernels.launch import CONFIGS_FILE, Config, arch_of, configs, rows_of

Row = dict[str, Any]
Rivals = Mapping[str, Call]  # each takes the inputs, and `sizes` and `rest` (see cases.py)
RECORDS = Path(__file__).with_name("RECORDS.md")
ROUNDS = 3
CUDA = torch.device("cuda")


def times_ms(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Times of each call, in ms, ascending."""
    from triton.testing import do_bench

    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name] += do_bench(call, warmup=5, rep=25, return_mode="all")
    return {name: sorted(times) for name, times in found.items()}


def ceilings() -> tuple[float, float]:
    """Bytes and FLOP of a second: a copy of 1 GiB, a bf16 product."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device=CUDA)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=CUDA)
    found = times_ms({"copy": partial(torch.empty_like(source).copy_, source), "mm": lambda: a @ a})
    copy, mm = (statistics.median(found[name]) * 1e-3 for name in ("copy", "mm"))
    return 2**31 / copy, 2 * 8192**3 / mm


def calls_of(
    op: str, sizes: Sizes, rivals: Rivals, names: set[str] | None = None
) -> dict[str, dict[str, Call]]:
    """mode -> who -> what is timed, of `names` or all; who cannot run is told, and left out."""
    entry = OPS[op]
    inputs, rest = entry.drawn(Draw(torch.bfloat16, CUDA), sizes)
    frozen = sizes.get("frozen", "").split()
    leaves = {name: x.requires_grad_(name not in frozen) for name, x in inputs.items()}
    who = {
        "ours": partial(entry.call, impl="triton", **rest),
        "eager": partial(entry.call, impl="eager", **rest),
        "compile": partial(torch.compile(entry.reference, dynamic=False), **rest),
        **{name: partial(rival, sizes=sizes, rest=rest) for name, rival in rivals.items()},
    }
    if not entry.compiles:
        del who["compile"]
    found: dict[str, dict[str, Call]] = {mode: {} for mode in entry.modes}
    for name in names or who:
        try:
            call = who[name]
            for mode in entry.modes:
                found[mode][name] = _timed(call, mode, leaves)
                found[mode][name]()
        except Exception as error:  # a rival that is absent, too old, or out of memory
            print(f"    {op} {name}: {type(error).__name__}: {str(error).strip()[:160]}")
            for mode in entry.modes:
                found[mode].pop(name, None)
    return found


def _timed(call: Call, mode: str, leaves: dict[str, torch.Tensor]) -> Call:
    def both() -> Any:
        return torch.autograd.grad(y := call(**leaves), wrt, torch.ones_like(y), allow_unused=True)

    wrt = [x for x in leaves.values() if x.requires_grad]
    if mode == "both":
        return both
    if mode == "forward":
        return torch.no_grad()(partial(call, **leaves))
    y = call(**leaves)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, wrt, dy, retain_graph=True, allow_unused=True)


def times_of(op: str, limits: tuple[float, float], rivals: Rivals) -> Iterator[Row]:
    """One for each size, mode and who: p20, p50 and p80 in us, the rate, and its share in %."""
    entry = OPS[op]
    for sizes in entry.benches:
        work = entry.work(sizes)
        for mode, calls in calls_of(op, sizes, rivals).items():
            todo = {"forward": work[0], "backward": work[1], "both": sum(work)}[mode]
            found = times_ms(calls)
            eager = statistics.median(found["eager"])
            for name, times in found.items():
                p20, p50, p80 = (times[int(len(times) * part)] for part in (0.2, 0.5, 0.8))
                rate = todo * (1 if entry.is_flop else 2) / p50 * 1e3
                yield {
                    "op": op, "sizes": label(sizes), "mode": mode, "who": name,
                    "p20_us": round(p20 * 1e3, 1), "p50_us": round(p50 * 1e3, 1),
                    "p80_us": round(p80 * 1e3, 1),
                    "rate": round(rate / (1e12 if entry.is_flop else 1e9), 1),
                    "unit": "TFLOP/s" if entry.is_flop else "GB/s",
                    "percent": round(100 * rate / limits[entry.is_flop], 1),
                    "times_eager": round(eager / p50, 2),
                }  # fmt: skip
        torch.cuda.empty_cache()


def record(lines: list[Row], hardware: str, command: str) -> None:
    """Appends a table to RECORDS.md, and the rows to records.csv beside it."""
    title = f"\n## {date.today()}: {hardware}\n\n`{command}`\n\n"
    columns = ["op", "sizes", "mode", "who", "p50_us", "rate", "unit", "percent", "times_eager"]
    table = [columns, ["---"] * len(columns), *([row[key] for key in columns] for row in lines)]
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(title + "".join(f"| {' | '.join(map(str, row))} |\n" for row in table))
    path = RECORDS.with_name("records.csv")
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["date", "hardware", *lines[0]], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({"date": date.today(), "hardware": hardware, **row} for row in lines)


def plot(lines: list[Row], folder: Path, hardware: str) -> None:
    """A figure for each op: % of the ceiling."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for op in {row["op"]: None for row in lines}:
        mine = [row for row in lines if row["op"] == op]
        names = [f"{row['sizes']}\n{row['mode']}, {row['who']}" for row in mine]
        figure = Figure((8, 1 + 0.35 * len(mine)), layout="constrained")
        axes = figure.subplots()
        colours = ["tab:blue" if row["who"] == "ours" else "lightgrey" for row in mine]
        bars = axes.barh(names, [row["percent"] for row in mine], color=colours)
        axes.bar_label(bars, [f"{row['rate']} {row['unit']}" for row in mine], padding=3)
        axes.invert_yaxis()
        axes.tick_params("y", labelsize=7)
        axes.set(xlim=(0, 120), xlabel="% of the ceiling", title=f"{op}, bf16: {hardware}")
        figure.savefig(folder / f"{op}.png", dpi=120)


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations one step away: a size doubled or halved, a stage more or less."""
    for key, value in config.items():
        steps = (value + 1, value - 1) if key == "num_stages" else (2 * value, value // 2)
        limits = {"num_stages": (1, 5), "num_warps": (1, 32), "PER_SM": (1, 8)}
        least, most = limits.get(key, (1, 8192))
        yield from (config | {key: step} for step in steps if least <= step <= most)


def tune(op: str, pool: Executor) -> None:
    """Walks to the fastest configuration near the present one, for each size that is timed."""
    entry, arch = OPS[op], arch_of(CUDA)
    for sizes in entry.benches:
        calls = [who["ours"] for who in calls_of(op, sizes, {}, {"ours"}).values()]
        for kernel, letter in entry.kernels.items():
            kind = "_".join([arch, sizes["shape"]] if "shape" in sizes else [arch])
            rows = rows_of(kernel, CUDA, sizes.get("shape", ""))
            rows = configs()[kernel, kind] = dict(rows)
            limit = next(limit for limit in rows if sizes[letter] <= limit)
            for _ in range(2):
                start, tried = rows[limit], [rows[limit], *neighbours(rows[limit])]
                list(pool.map(partial(_compile, op, sizes, (kernel, kind), limit), tried))
                found = [(_time_ms(calls, rows, limit, one), i) for i, one in enumerate(tried)]
                rows[limit] = tried[min(found)[1]]
                print(f"{kernel}.{kind} {limit:.0f}: {found[0][0]:.3f} -> {min(found)[0]:.3f} ms,"
                      f" {rows[limit]}", flush=True)  # fmt: skip
                if rows[limit] == start:
                    break
        torch.cuda.empty_cache()


def _compile(op: str, sizes: Sizes, key: tuple[str, str], limit: float, config: Config) -> None:
    """In a process of its own, into the cache that all share."""
    configs()[key] = {limit: config}
    calls_of(op, sizes, {}, {"ours"})


def _time_ms(calls: list[Call], rows: dict[float, Config], limit: float, config: Config) -> float:
    """Median of all calls together; inf for a configuration that does not run."""
    rows[limit] = config
    try:
        found = times_ms({str(i): call for i, call in enumerate(calls)})
    except Exception:  # it takes more than the GPU has
        return math.inf
    return sum(map(statistics.median, found.values()))


def save_configs() -> None:
    """Writes configs.toml anew, below its comment."""
    text = CONFIGS_FILE.read_text(encoding="utf-8")
    parts = [text[: text.index("\n[")]]
    for (kernel, kind), rows in sorted(configs().items()):
        parts.append(f"\n[{kernel}.{kind}]")
        for limit, config in rows.items():
            words = ", ".join(f"{key} = {value}" for key, value in config.items())
            parts.append(f"{'inf' if limit == math.inf else int(limit)} = {{ {words} }}")
    CONFIGS_FILE.write_text("\n".join(parts) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None, rivals: Mapping[str, Rivals] | None = None) -> int:
    """Prints a line for each time, and a JSON line last."""
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__)
    parser.add_argument("op", nargs="*", choices=[*OPS, []], help="none: all of them")
    parser.add_argument("--record", action="store_true", help="append to kernels/RECORDS.md")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw a figure for each op")
    parser.add_argument("--tune", action="store_true", help="first write kernels/configs.toml")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU: times of the interpreter say nothing; errors are kernels.check's")
    ops = options.op or list(OPS)
    if options.tune:
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            for op in ops:
                tune(op, pool)
        save_configs()
    limits = ceilings()
    hardware = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {version('triton')};"
        f" copy {limits[0] / 1e9:.0f} GB/s, product {limits[1] / 1e12:.0f} TFLOP/s"
    )
    print(hardware)
    lines = []
    for op in ops:
        for row in times_of(op, limits, (rivals or {}).get(op, {})):
            lines.append(row)
            print("{op} {sizes} {mode} {who}: {p20_us} {p50_us} {p80_us} us, {rate} {unit},"
                  " {percent} %, {times_eager} x eager".format(**row), flush=True)  # fmt: skip
    if options.record:
        record(lines, hardware, f"python -m kernels.bench {' '.join(sys.argv[1:])}".strip())
    if options.plot:
        plot(lines, options.plot, hardware)
    print(json.dumps({"hardware": hardware, "rows": lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
