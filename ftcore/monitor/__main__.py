"""Stage 7 by itself. RUN: what serve.py serves, also a bundle; LOG: what it wrote with --log.

    python -m ftcore.monitor report RUN LOG [--window N]     what moved, and the page LOG.html
    python -m ftcore.monitor watch RUN LOG [--window N]      the same, every few seconds
    python -m ftcore.monitor plan RUN LOG DIR [options]      wait, go back, or train: then DIR"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ftcore.cli import options
from ftcore.config import Count, Section
from ftcore.data.store import rendered
from ftcore.errors import ConfigError, FtcoreError
from ftcore.evaluate.report import table
from ftcore.files import write_file
from ftcore.monitor.drift import SIGNALS, STATES, Watch, wilson
from ftcore.monitor.journal import read_journal, read_reference
from ftcore.monitor.plan import PLAN, Limits, plan

SECONDS, MOST_WINDOWS = 5.0, 50
HEAD = ("what", "statistic", "value", "bound", "p", "rows", "state")

class LookConfig(Section):
    """How much is looked at."""
    window: Count = 500  # requests that are compared with those of the reference

def look(run: str, log: str, words: Sequence[str]) -> str:
    """What moved, as a table, and a page beside the log."""
    window, file = options(LookConfig, words, script="report RUN LOG").window, Path(log)
    reference, journal = read_reference(Path(run)), read_journal(file, Path(run).resolve().name)
    watch, records = Watch(reference, window=window), [*journal.records]
    ends = range(len(records), 0, -window)[:MOST_WINDOWS]
    trend = [watch.look(records[:end]) for end in reversed(ends)] or [watch.look([])]
    rows = [(SIGNALS[f.signal][0], f.statistic, f.value, f.bound, f.p_value, f.size,
             STATES[f.state]) for f in trend[-1]]
    told = [record["right"] for record in records if "right" in record]
    low, high = wilson(sum(told), len(told))
    said = f"{len(records)} records of {run}; {journal.told() or 'every line could be used'}"
    said += f"\n{len(told)} with feedback: {low:.1%} to {high:.1%} right (95 %)" * bool(told)
    shown = {"said": said, "signals": SIGNALS, "states": STATES, "reference": reference,
             "window": records[-window:], "trend": trend}
    page = rendered("monitor.html", Path(__file__).parent, **shown)
    write_file(file.with_name(f"{file.name}.html"), page)
    return f"{table(HEAD, rows)}\n{said}\npage: {log}.html"

def planned(run: str, log: str, words: Sequence[str]) -> str:
    if not words or words[0].startswith("-"):
        raise ConfigError("plan RUN LOG DIR: name a folder for the plan, which is not there yet")
    limits = options(Limits, words[1:], script="plan RUN LOG DIR")
    told = plan(Path(run), Path(log), Path(words[0]), limits)
    hints = {"train": f"how: {words[0]}/{PLAN}", "go back": f"to {told['replaced']}", "wait": ""}
    return "\n  ".join([f"{told['answer']} {hints[told['answer']]}", *told["reasons"]])

def main(words: list[str]) -> int:
    """Parse, do it, and turn what a user can mend into one message."""
    command, *rest = words or [""]
    if command not in ("report", "watch", "plan"):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    try:
        if len(rest) < 2:
            raise ConfigError(f"{command} RUN LOG: name what was served, and the log of serve.py")
        act, clear = planned if command == "plan" else look, "\033[2J\033[H" * (command == "watch")
        print(clear + act(*rest[:2], rest[2:]), flush=True)
        while clear:
            time.sleep(SECONDS)
            print(clear + act(*rest[:2], rest[2:]), flush=True)
        return 0
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which ends `watch`
    sys.exit(main(sys.argv[1:]))
