"""Evaluate a run or a model folder on held-out files.

    python eval.py runs/NAME                            the test files of its configuration
    python eval.py runs/NAME --data.test FILE           another file
    python eval.py MODEL --task classify --data.test FILE

A table for people, predictions as jsonl, and one JSON line last.
"""

import sys
from dataclasses import replace
from pathlib import Path

from ftcore.cli import CONFIG_FILE, Command, known, read_toml, resolved, take_value
from ftcore.config import RUNS
from ftcore.errors import ConfigError, FtcoreError, nearest

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

def run(command: Command) -> None:
    """Load what the command names and evaluate it; `command.resume` is a run, or None."""
    # Imported here, so that --help and a mistyped option answer at once.
    import torch

    from ftcore.data.prepare import prepare
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.env.compute import PRECISIONS, resolve_device, reuse_across_steps
    from ftcore.evaluate.report import json_line, write_predictions
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

    results = Suite(command.task, config, tokenizer, labels, device).tests(model, data.tests)
    print(f"\n{results}\n")
    if results.predictions:
        file = (path or Path()) / PREDICTIONS
        print(f"predictions: {file}, {write_predictions(file, results.predictions)} rows")
    print(json_line({"model": str(path or base), "task": command.task, "results": results.metrics}))

def main(argv: list[str]) -> int:
    """Parse, run, and turn what a user can mend into one message."""
    try:
        run(parse(argv))
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
