"""Stage 1 by itself:

    python -m ftcore.data prepare TASK [options of train.py]   data/ of a run, and the token cache
    python -m ftcore.data report RUN                           its page, made anew
    python -m ftcore.data show RUN --step N                    the batch of that step, as text"""

import signal
import sys
import time
from pathlib import Path
import numpy as np
from ftcore.cli import CONFIG_FILE, parse, take_value, to_toml
from ftcore.data import columns, encode, read, store
from ftcore.data.pack import Encoded, apart, is_pair, split, step_rows
from ftcore.data.prepare import prepared
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, FtcoreError
from ftcore.files import write_file
from ftcore.hub import lineage
from kernels.docs import pack

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
    print(store.write_page(Path(words[0]) / "data"))

def show(words: list[str]) -> None:
    """The streams of one optimiser step, counted from 1, as its processes read them."""
    step, run = take_value(words, "--step") or "", Path(*words[:1])
    if len(words) != 1 or not step.isdecimal():
        raise ConfigError("show RUN --step N")
    config, step = parse(["--resume", str(run)]).config, int(step)
    tokenizer = Tokenizer.load(lineage(config.model.path)[0])
    data, _ = prepared(config.data, tokenizer, seed=config.env.seed)
    if store.read_account(run / "data").get("key") != data.notes["key"]:
        print("warning: data or code changed since, the run may differ", file=sys.stderr)
    documents, size = data.train.documents, config.rows_per_step
    last = config.loop.num_steps(len(documents), size)
    if not 1 <= step <= last:
        raise ConfigError(f"--step {step}: steps are counted from 1 to {last}")
    rows = step_rows(step - 1, len(documents), batch_size=size, seed=config.env.seed)
    documents = [documents[row] for row in rows]
    places = {e.id: columns.place(e) for e in read.collect(config.data, {})["train"].examples}
    shares = min(config.env.threads, config.optim.batch_size)
    for n, share in enumerate(split(list(map(len, documents)), shares)):
        for stream in pack([len(documents[i]) for i in share], config.loop.micro_batch_tokens):
            some = [documents[share[i]] for i in stream]
            print(f"== step {step}, share {n}: {len(some)} documents, {sum(map(len, some))} tokens")
            for document in some:
                where = places.get(document.row_id.partition(":")[0], "(no longer there)")
                span = f"positions 0 to {len(document) - 1}, weight {np.sum(document.weights):g}"
                print(f"-- {document.row_id} {where}: {span}")
                print(text(document, data.labels, tokenizer))

def text(document: Encoded, labels: encode.Names, tokenizer: Tokenizer) -> str:
    """A document with what is supervised in [[ ]], and what is to be predicted of it."""
    if is_pair(document):
        return "\n-- rather than\n".join(text(d, labels, tokenizer) for d in apart([document]))
    if not isinstance(document.weights, np.ndarray):
        target = labels[document.labels] if isinstance(document.labels, int) else document.labels
        return f"{tokenizer.decode(document.tokens_T, special=True)} -> {target}"
    if labels:
        triples = zip(document.tokens_T, document.labels, document.weights, strict=True)
        return " ".join(tokenizer.decode([id_], special=True) + (f" [[{labels[tag]}]]" if w else "")
                        for id_, tag, w in triples)
    # labels are the next tokens, or those that are hidden; every second part is supervised
    scored_M = np.flatnonzero(document.weights[:-1])
    is_next = np.array_equal(document.labels[scored_M], document.tokens_T[scored_M + 1])
    is_scored_T = document.weights[: -is_next or None] > 0  # the first token is never predicted
    starts = np.flatnonzero(np.diff(is_scored_T, prepend=False)) + is_next
    whole = np.split(document.tokens_T if is_next else document.labels, starts)
    parts = [tokenizer.decode(part, special=True) for part in whole]
    return "".join(f"[[{part}]]" if n % 2 else part for n, part in enumerate(parts))

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
