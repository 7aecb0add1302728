"""Evaluate a run or a model folder on held-out files.

    python eval.py runs/NAME                            the test files of its configuration
    python eval.py runs/NAME --data.test FILE           another file
    python eval.py MODEL --task classify --data.test FILE

A table for people, predictions as jsonl, and one JSON line last.
"""

import sys
from pathlib import Path

from ftcore.cli import Command, parse_evaluation
from ftcore.errors import FtcoreError


def run(command: Command, path: Path) -> None:
    """Load what `path` holds and evaluate it."""
    from ftcore.data.prepare import prepare
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.env.device import DTYPES, resolve_device, set_threads
    from ftcore.env.files import current
    from ftcore.env.seed import generator
    from ftcore.errors import ConfigError
    from ftcore.evaluate.report import json_line, write_predictions
    from ftcore.evaluate.suite import evaluate_splits
    from ftcore.model.hub import resolve
    from ftcore.model.load import load_model
    from ftcore.tune.artifact import ADAPTER, MODEL, read_labels, restore_adapter
    from ftcore.tune.task import TASKS

    config, kind = command.config, TASKS[command.task]
    if not config.data.test:
        raise ConfigError("nothing to evaluate: name a file with --data.test FILE")
    set_threads(config.env.threads)
    device = resolve_device(config.env.device)
    saved = current(path / MODEL)
    has_adapter = (path / ADAPTER).is_dir()
    folder = saved if saved.is_dir() else resolve(config.model.path)
    labels = read_labels(path)
    loaded = load_model(
        folder,
        task=kind.model_task,
        dtype=DTYPES[config.env.precision],
        num_labels=len(labels) if labels else None,
        generator=generator(config.env.seed, 1) if has_adapter else None,
    )
    if has_adapter:
        restore_adapter(loaded, path)
    loaded.model.to(device).eval()
    tokenizer = Tokenizer.load(folder)
    data = prepare(config.data, tokenizer, seed=config.env.seed, labels=labels or loaded.labels)
    print(data.summary())
    results = evaluate_splits(
        command.task,
        config,
        loaded.model,
        tokenizer,
        data.tests,
        labels=data.labels,
        device=device,
    )
    print(f"\n{results}")
    write_predictions("predictions.jsonl" if not has_adapter and not saved.is_dir() else
                      path / "predictions.jsonl", results.predictions)
    print(json_line({"model": str(path), "task": command.task, "results": results.metrics}))


def main(argv: list[str]) -> int:
    """Parse, run, and turn what a user can mend into one message."""
    try:
        command, path = parse_evaluation(argv)
        run(command, path)
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
