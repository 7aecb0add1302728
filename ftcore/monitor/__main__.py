"""Stage 7 by itself. MODEL: a run or bundle; LOG: what serve.py wrote; HOME: a folder of models.

    python -m ftcore.monitor report MODEL LOG [--window N]   what moved, and the page LOG.html
    python -m ftcore.monitor watch MODEL LOG [--window N]    the same, every few seconds
    python -m ftcore.monitor promote HOME [RUN]     let a run answer, or what has passed its gate
    python -m ftcore.monitor plan HOME [--help]     look and decide: wait, train again, roll back
    python -m ftcore.monitor run HOME               train by the plan: a candidate
    python -m ftcore.monitor gate HOME              is it better on new rows, as good on old ones?
    python -m ftcore.monitor rollback HOME          let the model before it answer
    python -m ftcore.monitor replay HOME            every decision again, from what it was of"""

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
from ftcore.monitor import retrain
from ftcore.monitor.drift import SIGNALS, STATES, Watch
from ftcore.monitor.journal import read_journal, read_reference

SECONDS, MOST_WINDOWS, SHOWN = 5.0, 50, 10
HEAD = ("what", "statistic", "value", "bound", "p", "rows", "state")

class LookConfig(Section):
    """How much is looked at."""
    window: Count = 500  # requests that are compared with those of the reference

def look(model: str, log: str, words: Sequence[str]) -> str:
    """What moved, as a table, and a page beside the log."""
    window, file = options(LookConfig, words, script="report MODEL LOG").window, Path(log)
    reference, journal = read_reference(Path(model)), read_journal(file, Path(model).resolve().name)
    watch, records = Watch(reference, window=window), [*journal.records]
    ends = range(len(records), 0, -window)[:MOST_WINDOWS]
    trend = [watch.look(records[:end]) for end in reversed(ends)] or [watch.look([])]
    rows = [(SIGNALS[f.signal][0], f.statistic, f.value, f.bound, f.p_value, f.size,
             STATES[f.state]) for f in trend[-1]]
    moved = watch.moved(records, SHOWN) if any(f.state for f in trend[-1]) else []
    counts = ", ".join(f"{count} {what}" for what, count in journal.counts.items() if count)
    said = f"{len(records)} records of {model}; {counts or 'every line could be used'}"
    shown = {"said": said, "signals": SIGNALS, "states": STATES, "reference": reference,
             "window": records[-window:], "trend": trend, "moved": moved}
    page = rendered("monitor.html", Path(__file__).parent, **shown)
    write_file(file.with_name(f"{file.name}.html"), page)
    return f"{table(HEAD, rows)}\n{said}\npage: {log}.html"

def main(words: list[str]) -> int:
    """Parse, do it, and turn what a user can mend into one message."""
    command, *rest = words or [""]
    if command not in ("report", "watch", *retrain.COMMANDS):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    try:
        if command in retrain.COMMANDS:
            if not rest:
                raise ConfigError(f"{command} HOME: name the folder of the models")
            print(retrain.COMMANDS[command](Path(rest[0]), rest[1:]))
            return 0
        if len(rest) < 2:
            raise ConfigError(f"{command} MODEL LOG: name a run or bundle, and a log of serve.py")
        while True:
            print("\033[2J\033[H" * (command == "watch") + look(*rest[:2], rest[2:]), flush=True)
            if command == "report":
                return 0
            time.sleep(SECONDS)
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
