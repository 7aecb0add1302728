"""Evaluate a run or a model folder on held-out files.

    python eval.py runs/NAME                            the test files of its configuration
    python eval.py runs/NAME --data.test FILE           another file
    python eval.py MODEL --task classify --data.test FILE
    python eval.py runs/NAME --against runs/OTHER       both on the same rows: do they differ?

Tables for people, each figure with its interval; predictions as jsonl; one JSON line last. Every
time that test rows are judged is noted in the run: who looks often, chooses by them.
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore.cli import CONFIG_FILE, Command, known, read_toml, resolved, take_value
from ftcore.config import RUNS
from ftcore.errors import ConfigError, FtcoreError, nearest

if TYPE_CHECKING:
    from ftcore.evaluate.suite import Results, Suite

PREDICTIONS = "eval-predictions.jsonl"

def parse(argv: list[str]) -> Command:
    """The arguments as a command: `resume` is the run folder; None for a model
    with --task, which then is model.path. Raises as that of train.py."""
    words = [*argv]
    if not words or words[0].startswith("-"):
        print("eval.py {RUN | MODEL --task TASK} [--data.test FILE ...] [options of train.py]")
        raise SystemExit(0 if words and words[0] in ("-h", "--help") else 2)
    path, task = words.pop(0), take_value(words, "--task")
    file = Path(path) / CONFIG_FILE
    if file.is_file():
        written_for, flags = read_toml(file)
        if task not in (None, written_for):
            raise ConfigError(f"{path} is a run of the task {written_for}: leave out --task {task}")
        layers = [(str(file), flags), ("flag", words)]
        return resolved(written_for, layers, resume=Path(path), script="eval.py")
    if task is None:
        beside = [] if Path(path).exists() else [*map(str, Path(path).parent.glob("*"))]
        what = f"{path} is not a run folder (it has no {CONFIG_FILE}){nearest(path, beside)}"
        mend = f"For a plain model name its task too: --task {{{','.join(RUNS)}}}"
        raise ConfigError(f"{what}. {mend}")
    layers = [("path", ["--model.path", path]), ("flag", words)]
    return resolved(known("task", task, RUNS), layers, script="eval.py")

def judge(command: Command) -> "tuple[Suite, Results]":
    """Load what the command names and evaluate it; `command.resume` is a run, or None."""
    # Imported here, so that --help and a mistyped option answer at once.
    import torch

    from ftcore.data.prepare import prepare, prepared
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.env.compute import (
        PRECISIONS,
        resolve_device,
        reuse_across_steps,
        use_deterministic,
    )
    from ftcore.evaluate.suite import Suite
    from ftcore.hub import resolve
    from ftcore.model.load import load_model
    from ftcore.tune.artifact import load_artifact, read_labels
    from ftcore.tune.task import TASKS

    config, kind, path = command.config, TASKS[command.task], command.resume
    if not config.data.test:
        raise ConfigError("nothing to evaluate: name a file with --data.test FILE")
    torch.set_num_threads(config.env.threads)
    reuse_across_steps()
    use_deterministic(config.env.deterministic)
    device = resolve_device(config.env.device, config.env.kernels)
    base, (dtype, products) = config.model.path, PRECISIONS[config.env.precision]
    if path is None:
        loaded = load_model(resolve(base), task=kind.model_task, dtype=dtype)
    else:
        loaded = load_artifact(path, base=base, kind=kind, dtype=dtype)
    model = loaded.model.to(device)
    model.use_kernels(config.env.kernels)
    model.compute_in(products)
    print(f"{path or base}: {loaded.accounting}")

    labels = (path and read_labels(path)) or loaded.labels
    said = config.problem if path else loaded.config.get("problem_type")
    if config.problem and said not in (None, config.problem):
        raise ConfigError(
            f"{base}/config.json: problem_type = {said!r}, not {config.problem!r}: scores are for"
            " --task regress, classes for --task classify, several classes a row for that with"
            " --data.label-separator"
        )
    if config.problem == "regression" and len(labels) != 1:
        raise ConfigError(f"{base}: gives {len(labels)} scores a row, regress is for one")
    tokenizer = Tokenizer.load(loaded.folder)
    held_out = replace(config.data, train=(), dev=())
    data = prepare(held_out, tokenizer, seed=config.env.seed, labels=labels)
    print(data.summary())

    suite = Suite(command.task, config, tokenizer, labels, device)
    results = suite.tests(model, data.tests)
    print(f"\n{results}\n")
    if path and config.data.train and command.origins.get("data.test") == "flag":
        own = parse([str(path)]).config  # whose training rows these test rows were not held out of
        train = prepared(own.data, tokenizer, seed=own.env.seed)[0].train.documents
        for name, split in data.tests.items():
            known_rows = suite.leaked(split, train)
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(known_rows.values()).items())
            print(f"{name}, rows known from training: {kinds or 'none'}")
            if known_rows:
                print(f"{results.without(name, known_rows)}\n")
    return suite, results

def run(words: list[str]) -> None:
    """Judge what the words name, beside another where they say so."""
    other = take_value(words, "--against")
    command = parse(words)
    from ftcore.evaluate.report import json_line, note_opening, write_predictions

    _, results = judge(command)
    path, summary = command.resume, {"model": words[0], "task": command.task}
    summary |= {"results": results.metrics, "intervals": results.intervals}
    if results.predictions:
        file = (path or Path()) / PREDICTIONS
        print(f"predictions: {file}, {write_predictions(file, results.predictions)} rows")
    if other:
        theirs = parse([other, *words[1:]])
        if theirs.config.data.test != command.config.data.test:
            theirs = parse([other, *words[1:], "--data.test", *command.config.data.test])
        told, summary["against"] = results.compared(judge(theirs)[1])
        print(f"{words[0]} against {other}\n\n{told}\n")
    if path:
        count = note_opening(path, command.config.data.test, results.metrics)
        print(f"test rows of {path} were judged {count} times so far (openings.jsonl)")
    print(json_line(summary))

def main(argv: list[str]) -> int:
    """Parse, run, and turn what a user can mend into one message."""
    try:
        run([*argv])
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
