"""Stage 1 by itself:

    python -m ftcore.data prepare TASK [options of train.py]   data/ of a run, and the token cache
    python -m ftcore.data report RUN                           its page, made anew
    python -m ftcore.data show RUN --step N                    the batch of that step, as text
"""

import signal
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from ftcore.cli import CONFIG_FILE, parse, take_value, to_toml
from ftcore.config import MaskedDataConfig, TaggedDataConfig
from ftcore.data.columns import place
from ftcore.data.pack import Encoded, StepRows, apart, is_pair, pack, split
from ftcore.data.prepare import prepared
from ftcore.data.read import collect
from ftcore.data.store import read_account, write_page
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, FtcoreError
from ftcore.files import write_file
from ftcore.hub import lineage

MARKS = "[[", "]]"  # around what is supervised in a text

def prepare(words: list[str]) -> None:
    command = parse(words, script="python -m ftcore.data prepare")
    config = command.config
    if not config.data.train:
        raise ConfigError("nothing to prepare: name a file with --data.train FILE")
    tokenizer = Tokenizer.load(lineage(config.model.path)[0])
    data, said = prepared(config.data, tokenizer, seed=config.env.seed)
    folder = config.log.dir / (config.log.name or time.strftime(f"{command.task}-%Y%m%d-%H%M%S"))
    if (folder / "run.json").exists():
        raise ConfigError(f"{folder} is a run: prepare under another --log.name")
    data.write(folder / "data")
    write_file(folder / CONFIG_FILE, to_toml(command))
    print(data.summary(), said, sep="\n")
    print(f"\npage:  {folder / 'data' / 'report.html'}")
    print(f"train: python train.py {command.task} --config {folder / CONFIG_FILE} --log.name NAME")

def report(words: list[str]) -> None:
    if len(words) != 1 or not Path(words[0], "data", "funnel.json").is_file():
        raise ConfigError(f"report RUN: {' '.join(words)} is no run folder with a data/")
    print(write_page(Path(words[0]) / "data"))

def show(words: list[str]) -> None:
    step = take_value(words, "--step") or ""
    if len(words) != 1 or not step.isdecimal():
        raise ConfigError("show RUN --step N")
    for line in Shown(Path(words[0])).step(int(step)):
        print(line)

class Shown:
    """A run's data, to look at; its files are read once more, for the places of the rows."""

    def __init__(self, run: Path) -> None:
        self.config = config = parse(["--resume", str(run)]).config
        self.tokenizer = Tokenizer.load(lineage(config.model.path)[0])
        self.data, _ = prepared(config.data, self.tokenizer, seed=config.env.seed)
        if read_account(run / "data").get("key") != self.data.notes["key"]:
            print("warning: data or code changed since, the run may differ", file=sys.stderr)
        parts = collect(config.data, {}).values()
        # of rows that stand in several splits, the place in the first, which is train
        self.places = {e.id: place(e) for part in reversed(parts) for e in part.examples}

    def step(self, step: int) -> Iterator[str]:
        """The streams of one optimiser step, counted from 1, as its processes read them."""
        config, documents, size = self.config, self.data.train.documents, self.config.rows_per_step
        last = config.loop.num_steps(len(documents), size)
        if not 1 <= step <= last:
            raise ConfigError(f"--step {step}: steps are counted from 1 to {last}")
        rows = StepRows(len(documents), batch_size=size, seed=config.env.seed)(step - 1)
        documents = [documents[row] for row in rows]
        if self.data.draw:
            documents = [self.data.draw(document, step - 1) for document in documents]
        shares = min(config.env.threads, config.optim.batch_size)
        for number, share in enumerate(split(list(map(len, documents)), shares)):
            lengths = [len(documents[i]) for i in share]
            for stream in pack(lengths, config.loop.micro_batch_tokens):
                tokens = sum(lengths[i] for i in stream)
                yield f"== step {step}, share {number}: {len(stream)} documents, {tokens} tokens"
                for i in stream:
                    document = documents[share[i]]
                    where = self.places.get(document.row_id.partition(":")[0], "(no longer there)")
                    span = f"positions 0 to {len(document) - 1}, weight"
                    yield f"-- {document.row_id} {where}: {span} {np.sum(document.weights):g}"
                    yield self.text(document)

    def text(self, document: Encoded) -> str:
        if is_pair(document):
            return "\n-- rather than\n".join(map(self.text, apart([document])))
        decode = self.tokenizer.decode
        if not isinstance(document.weights, np.ndarray):
            label = document.labels
            label = self.data.labels[label] if isinstance(label, int) else label
            return f"{decode(document.tokens_T, special=True)} -> {label}"
        counts_T, config = document.weights > 0, self.config.data
        is_masked, is_tagged = (isinstance(config, c) for c in (MaskedDataConfig, TaggedDataConfig))
        if not (is_masked or is_tagged):  # labels are the next tokens
            counts_T = np.append(False, counts_T[:-1])
        shown, triples = "", zip(counts_T, document.tokens_T, document.labels, strict=True)
        for counts, run in groupby(triples, key=itemgetter(0)):
            _, ids, labels = zip(*run, strict=True)
            text = decode(ids, special=True)
            if counts and is_masked:
                text += " <- " + decode(labels, special=True)
            elif counts and is_tagged:
                text += " " + " ".join(self.data.labels[label] for label in labels)
            shown += text.join(MARKS) if counts else text
        return shown

def main(words: list[str]) -> int:
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
