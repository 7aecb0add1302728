"""The newest times of kernels/records.csv in one figure, ours beside the fastest rival:

    python -m tests.bench.plot tests/bench/kernels.png

Left what is bound by memory, in % of a copy; right what is bound by products, in % of one.
"""

import csv
import sys
from pathlib import Path
from matplotlib.figure import Figure
from kernels.bench import RECORDS
from kernels.cases import ops

SIDES = {"GB/s": "% of a copy of 2 GiB", "TFLOP/s": "% of a bf16 product of 8192 x 8192 x 8192"}
COLOURS = {"ours": "tab:blue", "fastest rival": "lightgrey"}
Row = dict[str, str]

def newest() -> dict[tuple[str, str, str], dict[str, Row]]:
    """(op, sizes, mode) -> who -> row, of the ops that there are."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    with RECORDS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["op"] in ops():
                key = row["op"], row["sizes"].replace(" shape=frozen", ""), row["mode"]
                found.setdefault(key, {})[row["who"]] = row
    return found

def drawn(file: Path) -> None:
    rows, sides = newest(), {unit: [] for unit in SIDES}
    for key, whose in rows.items():
        sides[whose["triton"]["unit"]].append((key, whose))
    figure = Figure((15, 0.42 * max(map(len, sides.values())) + 1.6), layout="constrained")
    for axes, (unit, side) in zip(figure.subplots(1, 2), sides.items(), strict=True):
        for place, (_, whose) in enumerate(side):
            rivals = [row for who, row in whose.items() if who not in ("triton", "frozen linear")]
            best = max(rivals, key=lambda row: float(row["%"]))
            told = {"ours": whose["triton"], "fastest rival": best}
            for step, (who, row) in enumerate(told.items()):
                bar = axes.barh(place + 0.38 * step - 0.19, float(row["%"]), 0.36,
                                color=COLOURS[who], label=None if place else who)
                name = "" if who == "ours" else f"  {row['who']}"
                axes.bar_label(bar, [f"{row['p50_us']} us{name}"], padding=3, fontsize=7)
        names = [f"{op}, {mode}\n{short(sizes)}" for (op, sizes, mode), _ in side]
        axes.set_yticks(range(len(side)), names, fontsize=7)
        axes.set(xlim=(0, 130), ylim=(len(side) - 0.5, -0.5), xlabel=SIDES[unit])
        axes.axvline(100, color="grey", linewidth=0.5, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", bbox_to_anchor=(1, 1.03), ncols=2, frameon=False)
    hardware = sorted({whose["triton"]["hardware"].split(";")[0] for whose in rows.values()})
    figure.suptitle("; ".join(hardware) + ", bf16, cold cache, median")
    figure.savefig(file, dpi=110)

def short(sizes: str) -> str:
    """The sizes that tell rows apart."""
    drop = ("is_causal", "shape", "bytes", "N=16384", "P=")
    return " ".join(word for word in sizes.split() if not word.startswith(drop))

if __name__ == "__main__":
    drawn(Path(sys.argv[1]))
