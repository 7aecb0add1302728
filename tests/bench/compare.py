"""The comparison of ours with transformers, in turns, and what it comes to.

The turns go ours, theirs, floor, ours, theirs, floor, ..; every figure is a median over them, and
every ratio is taken between neighbours. Bars are told, not asserted.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from tests.bench.rival import MODES, Bench, Side, serve

MEMORY_BAR, FLOOR_BAR = 0.7, 0.65

def fastest(bench: Bench, said: argparse.Namespace) -> tuple[dict, dict[str, float]]:
    """Words of their best form, and the seconds that each form took for the probe's rows."""
    seconds: dict[str, float] = {}
    forms = {}
    for mode, attention in product(MODES[said.method], ("sdpa", "eager")):
        words = {"mode": mode, "attention": attention}
        with Side(bench, side="theirs", method=said.method, work=said.work, **words) as side:
            side.steps(said.warmup)
            seconds[", ".join(words.values())] = side.steps(said.probe)["seconds"]
        forms[", ".join(words.values())] = words
    return forms[min(seconds, key=seconds.get)], seconds

def compare(bench: Bench, said: argparse.Namespace) -> dict[str, Any]:
    """Both sides and the floor in turns."""
    best, probe = fastest(bench, said)
    common = {"method": said.method, "work": said.work}
    with (
        Side(bench, side="ours", **common) as ours,
        Side(bench, side="theirs", **common, **best) as theirs,
        Side(bench, side="floor", **common) as floor,
    ):
        sides = {"ours": ours, "theirs": theirs, "floor": floor}
        first = {name: side.steps(said.warmup) for name, side in sides.items()}
        rounds = [
            {name: side.steps(said.steps) for name, side in sides.items()}
            for _ in range(said.repeats)
        ]
    found = told(rounds, bench.unit, bench.bars[said.method])
    losses = {name: first[name]["loss"] for name in ("ours", "theirs")}  # nearly equal, if all is
    return found | {"theirs_is": best, "probe": probe, "first_loss": losses}

def told(rounds: Sequence[Mapping[str, Any]], unit: str, bar: float) -> dict[str, Any]:
    """What the turns of `ours`, `theirs` and `floor` come to: medians over the rounds."""
    for turns in rounds:
        rows = {(turn["rows"], turn["tokens"]) for turn in turns.values()}
        assert len(rows) == 1, f"the sides had different rows: {turns}"
    ratios = [turns["theirs"]["seconds"] / turns["ours"]["seconds"] for turns in rounds]
    found: dict[str, Any] = {"speed": against(statistics.median(ratios), bar), "ratios": ratios}
    # On a machine with other work the ratio of CPU times is the steadier one, with one thread.
    cpu = [turns["theirs"]["cpu_s"] / turns["ours"]["cpu_s"] for turns in rounds]
    found["cpu_ratio"] = statistics.median(cpu)
    last = rounds[-1]
    memory = last["ours"]["peak_mib"] / last["theirs"]["peak_mib"]
    found["memory"] = against(memory, MEMORY_BAR, at_most=True)
    for name in ("ours", "theirs"):
        turns = [turns[name] for turns in rounds]
        share = [t["floor"]["seconds"] / t[name]["seconds"] for t in rounds]
        found[name] = {
            f"{unit}_per_s": statistics.median(turn[unit] / turn["seconds"] for turn in turns),
            "of_floor": statistics.median(share),
            "peak_mib": last[name]["peak_mib"],
            "rows_mib": last[name]["rows_mib"],
            "trained": last[name]["trained"],
            "losses": [turn["loss"] for turn in turns],
        }
    padded = [turn["theirs"]["padded_tokens"] / turn["theirs"]["tokens"] for turn in rounds]
    found["theirs"]["padded_over_real_tokens"] = statistics.median(padded)
    found["floor"] = {
        f"{unit}_per_s": statistics.median(
            t["floor"][unit] / t["floor"]["seconds"] for t in rounds
        ),
        "gflop_per_s": statistics.median(
            t["floor"]["flops"] / t["floor"]["seconds"] / 1e9 for t in rounds
        ),
    }
    found["of_floor"] = against(found["ours"]["of_floor"], FLOOR_BAR)
    return found

def against(value: float, bar: float, *, at_most: bool = False) -> dict[str, Any]:
    """A figure, the bar it is held against, and whether it meets that."""
    return {"value": value, "bar": bar, "met": value <= bar if at_most else value >= bar}

def shown(method: str, unit: str, found: Mapping[str, Any]) -> str:
    """The table of one method, for people."""
    lines = [f"{method:8}{unit + '/s':>10}  of floor  peak MiB   trained    loss"]
    for name in ("ours", "theirs"):
        side = found[name]
        lines.append(
            f"{name:8}{side[f'{unit}_per_s']:10.1f}  {side['of_floor']:8.1%}"
            f"  {side['peak_mib']:8.0f}  {side['trained']:8}  {side['losses'][-1]:6.3f}"
        )
    lines.append(f"{'floor':8}{found['floor'][f'{unit}_per_s']:10.1f}    100.0%")
    speed, memory = found["speed"], found["memory"]
    lines.append(
        f"ours is {speed['value']:.2f}x as fast (bar {speed['bar']}) in {memory['value']:.2f}x the"
        f" memory (bar {memory['bar']}); theirs: {', '.join(found['theirs_is'].values())}"
    )
    return "\n".join(lines)

def main(bench: Bench, *, steps: int, batch: int) -> None:
    """The command line of one bench: the comparison, or one side of it.

    steps, batch    of a turn, and rows of a step, where the command does not say
    """
    parser = argparse.ArgumentParser(prog=f"python -m tests.bench.{bench.name}")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=bench.bars, default=list(bench.bars))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=batch, help="rows of a step")
    parser.add_argument("--steps", type=int, default=steps, help="steps of a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before")
    parser.add_argument("--probe", type=int, default=max(4, steps // 4), help="steps of the probe")
    for word in ("side", "method", "mode", "attention"):  # how a side is told what it is
        parser.add_argument(f"--{word}", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.side:
        serve(bench, said)
        return
    found = {}
    with tempfile.TemporaryDirectory() as work:
        said.work = Path(work)
        bench.set_up(said)
        for method in said.only:
            said.method = method
            found[method] = compare(bench, said)
            print(shown(method, bench.unit, found[method]), flush=True)
    settings = ("threads", "batch", "steps", "repeats")
    print(json.dumps({bench.name: found} | {name: vars(said)[name] for name in settings}))
