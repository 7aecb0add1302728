"""Stage 7 by itself: python -m ftcore.monitor report|watch|plan|run|gate|promote|rollback --help.
RUN is what serve.py serves, but for `plan` also a bundle; LOG what it wrote with --log; LINK a
symbolic link to a RUN, which a server of it follows, and which stands for a RUN everywhere.

Exit codes: 0 done; 1 there is no plan to train, or what it made has failed; 2 must be mended."""

import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn
import tyro
from torch.utils.tensorboard import SummaryWriter
from ftcore.cli import checked
from ftcore.data.store import rendered
from ftcore.errors import FtcoreError
from ftcore.evaluate.report import table
from ftcore.files import write_file
from ftcore.monitor import drift, retrain
from ftcore.monitor.journal import read_journal, read_reference

SECONDS, MOST_WINDOWS = 5.0, 50
HEAD = ("what", "statistic", "value", "bound", "p", "rows", "state")

def report(run: Path, log: Path, /, look: retrain.Look) -> str:
    """What moved, as a table; beside the log a page, LOG.html, and LOG.tensorboard: what each
    statistic was, and its bound, by the number of requests."""
    window, reference = checked(look).window, read_reference(run)
    journal = read_journal(log, run.resolve().name)
    watch, records = drift.Watch(reference, window=window), journal.records
    ends = range(len(records), 0, -window)[:MOST_WINDOWS][::-1]
    trend = [watch.look(records[:end]) for end in ends] or [watch.look([])]
    rows = [(drift.SIGNALS[f.signal][0], f.statistic, f.value, f.bound, f.p_value, f.size,
             drift.STATES[f.state]) for f in trend[-1]]
    told = [record["right"] for record in records if "right" in record]
    low, high = drift.wilson(sum(told), len(told))
    said = f"{len(records)} records of {run}; {journal.told() or 'every line could be used'}"
    said += f"\n{len(told)} with feedback: {low:.1%} to {high:.1%} right (95 %)" * bool(told)
    shown = {"said": said, "signals": drift.SIGNALS, "states": drift.STATES, "reference": reference,
             "window": records[-window:], "trend": trend}
    page = rendered("monitor.html", Path(__file__).parent, **shown)
    write_file(log.with_name(f"{log.name}.html"), page)
    shutil.rmtree(f"{log}.tensorboard", ignore_errors=True)
    with SummaryWriter(f"{log}.tensorboard") as writer:
        for end, found in zip(ends, trend, strict=False):  # nothing was asked: one look, no end
            for f in (f for f in found if f.state is not None):
                for name, value in (("value", f.value), ("bound", f.bound)):
                    tag = f"{f.signal}/{f.statistic}/{name}"
                    writer.add_scalar(tag, value, end, records[end - 1]["time"])
    return f"{table(HEAD, rows)}\n{said}\npage: {log}.html; TensorBoard: {log}.tensorboard"

def watch(run: Path, log: Path, /, look: retrain.Look) -> NoReturn:
    """The same, every few seconds."""
    while True:
        print(f"\033[2J\033[H{report(run, log, look)}", flush=True)
        time.sleep(SECONDS)

def planned(run: Path, log: Path, folder: Path, /, limits: retrain.Limits) -> retrain.Line:
    """Wait, go back, or train: then the folder says how. A link that is to go back does."""
    told = retrain.plan(run, log, folder, checked(limits))
    hint = {"train": f"how: {folder}/plan.toml", "go back": f"to {told['replaced']}", "wait": ""}
    if (answer := told["answer"]) == "go back" and run.is_symlink():
        hint[answer] = f"to {retrain.rollback(run)}"
    return told | {"answer": f"{answer} {hint[answer]}"}

ACTS = {"report": report, "watch": watch, "plan": planned, "run": retrain.run,
        "gate": retrain.gate, "promote": retrain.promote, "rollback": retrain.rollback}

def main(words: list[str]) -> int:
    """Parse, do it, and turn what a user can mend into one message."""
    shape = {"prog": "python -m ftcore.monitor", "config": (tyro.conf.OmitArgPrefixes,)}
    try:
        said = tyro.extras.subcommand_cli_from_dict(ACTS, args=words, **shape)
    except (FtcoreError, OSError, RuntimeError) as error:  # the last: a link to itself
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(said, dict):
        said = "\n  ".join([said["answer"], *said["reasons"]])
    print(said)
    return int(said.startswith(("wait", "go back", "fail")))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which ends `watch`
    sys.exit(main(sys.argv[1:]))
