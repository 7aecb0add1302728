"""Stage 1 by itself:

    python -m ftcore.data prepare TASK [options of train.py]   data/ of a run, and the token cache
    python -m ftcore.data report RUN                           its page, made anew
    python -m ftcore.data show RUN --step N                    the batch of that step, as text
    python -m ftcore.data show RUN --row ID                    where a row went
"""

import json
import signal
import sys
import time
from pathlib import Path

from ftcore.cli import CONFIG_FILE, parse, take_value, to_toml
from ftcore.data.ledger import write_page
from ftcore.data.show import Shown
from ftcore.data.store import prepared
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, FtcoreError
from ftcore.files import write_file
from ftcore.hub import resolve

def prepare(words: list[str]) -> None:
    """Stage 1 of a run, into its folder."""
    command = parse(words, script="python -m ftcore.data prepare")
    config = command.config
    if not config.data.train:
        raise ConfigError("nothing to prepare: name a file with --data.train FILE")
    tokenizer = Tokenizer.load(resolve(config.model.path))
    data, said = prepared(config.data, tokenizer, seed=config.env.seed)
    folder = config.log.dir / (config.log.name or time.strftime(f"{command.task}-%Y%m%d-%H%M%S"))
    data.write(folder / "data")
    write_file(folder / CONFIG_FILE, to_toml(command))
    print(data.summary(), said, sep="\n")
    print(f"\npage:  {folder / 'data' / 'report.html'}")
    print(f"train: python train.py {command.task} --config {folder / CONFIG_FILE}")

def report(words: list[str]) -> None:
    """The page of a run's data."""
    if len(words) != 1 or not Path(words[0], "data", "funnel.json").is_file():
        raise ConfigError(f"report RUN: {' '.join(words)} is no run folder with a data/")
    print(write_page(Path(words[0]) / "data"))

def show(words: list[str]) -> None:
    """A step's batch, or the way of a row."""
    step, row = take_value(words, "--step"), take_value(words, "--row")
    if len(words) != 1 or (step is None) == (row is None) or not (step or "1").isdecimal():
        raise ConfigError("show RUN --step N, or show RUN --row ID")
    config = parse(["--resume", words[0]]).config
    tokenizer = Tokenizer.load(resolve(config.model.path))
    data, _ = prepared(config.data, tokenizer, seed=config.env.seed)
    kept = Path(words[0], "data", "funnel.json")
    if not kept.is_file() or json.loads(kept.read_text("utf-8"))["key"] != data.notes["key"]:
        print("warning: data or code changed since, the run may differ", file=sys.stderr)
    shown = Shown(Path(words[0]), config, data, tokenizer)
    for line in shown.step(int(step)) if step else shown.row(row):
        print(line)

def main(words: list[str]) -> int:
    """Run a command; what a user can mend is one message."""
    commands = {"prepare": prepare, "report": report, "show": show}
    if not words or words[0] not in commands:
        print(__doc__)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    try:
        commands[words[0]](words[1:])
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads the first lines alone may leave
    sys.exit(main(sys.argv[1:]))
