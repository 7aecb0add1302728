"""Evaluate a run or a model folder on held-out files.

    python eval.py runs/NAME                            the test files of its configuration
    python eval.py runs/NAME --data.test FILE           another file
    python eval.py MODEL --task classify --data.test FILE
    python eval.py runs/NAME --against runs/OTHER       both on the same rows: do they differ?
    python eval.py report runs/NAME                     its page, report.html, made anew
    python eval.py diff runs/NAME runs/OTHER            what was asked and read, where they part

Tables for people, with intervals; predictions as jsonl; one JSON line last. Every
time that test rows are judged is noted in the run: who looks often, chooses by them.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from ftcore.cli import CONFIG_FILE, Command, known, read_toml, resolved, take_value
from ftcore.config import RUNS
from ftcore.errors import ConfigError, FtcoreError, nearest

if TYPE_CHECKING:
    from ftcore.evaluate.report import Results
    from ftcore.model.load import LoadedModel

PREDICTIONS = "eval-predictions.jsonl"

def parse(argv: list[str]) -> Command:
    """The arguments as a command: `resume` is the run folder; None for a model
    with --task, which then is model.path. Raises as that of train.py."""
    words = [*argv]
    if not words or words[0].startswith("-"):
        print(__doc__)
        raise SystemExit(0 if words and words[0] in ("-h", "--help") else 2)
    path, task = words.pop(0), take_value(words, "--task")
    file = Path(path) / CONFIG_FILE
    if file.is_file():
        written_for, flags = read_toml(file)
        if task not in (None, written_for):
            raise ConfigError(f"{path} is a run of the task {written_for}: leave out --task {task}")
        layers = [(str(file), flags), ("flag", words)]
        command = resolved(written_for, layers, resume=Path(path), script="eval.py")
        if command.origins.get("model.path") == "flag":
            what = f"--model.path: {path} has a model; the base of an adapter stands beside that"
            raise ConfigError(f"{what}, in adapter/adapter_config.json (base_model_name_or_path)")
        return command
    if task is None:
        beside = [] if Path(path).exists() else [*map(str, Path(path).parent.glob("*"))]
        what = f"{path} is not a run folder (it has no {CONFIG_FILE}){nearest(path, beside)}"
        mend = f"For a plain model name its task too: --task {{{','.join(RUNS)}}}"
        raise ConfigError(f"{what}. {mend}")
    layers = [("path", ["--model.path", path]), ("flag", words)]
    return resolved(known("task", task, RUNS), layers, script="eval.py")

def opened(command: Command) -> "LoadedModel":
    """The model of a run (`command.resume`), or model.path without one, on its device."""
    # Imported here, so that --help and a mistyped option answer at once.
    import torch
    from ftcore.align.preference import TASKS
    from ftcore.env import compute
    from ftcore.tune.adapter import load_artifact, load_base
    from kernels.memory import reuse_across_steps

    config, kind, path = command.config, TASKS[command.task], command.resume
    torch.set_num_threads(config.env.threads)
    reuse_across_steps()
    compute.use_deterministic(config.env.deterministic)
    device = compute.resolve_device(config.env.device, config.env.kernels)
    base, (dtype, products) = config.model.path, compute.PRECISIONS[config.env.precision]
    loaded = (load_artifact(path, kind=kind, dtype=dtype) if path else
              load_base(base, task=kind.model_task, dtype=dtype))
    loaded.model.to(device).use_kernels(config.env.kernels)
    loaded.model.compute_in(products)
    print(f"{path or base}: {loaded.accounting}")
    return loaded

def judge(command: Command) -> "Results":
    """What the model says of the test rows, printed and returned."""
    if not command.config.data.test:
        raise ConfigError("nothing to evaluate: name a file with --data.test FILE")
    from ftcore.align.preference import refer
    from ftcore.data.prepare import prepare, prepared
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.evaluate.report import Suite, note_opening

    config, path, loaded = command.config, command.resume, opened(command)
    base, labels = config.model.path, loaded.labels
    said = config.problem if path else loaded.config.get("problem_type")
    if config.problem and said not in (None, config.problem):
        raise ConfigError(
            f"{base}/config.json: problem_type = {said!r}, not {config.problem!r}: scores are for"
            " --task regress, classes for --task classify, several classes a row for that with"
            " --data.label-separator")
    if config.problem == "regression" and len(labels) != 1:
        raise ConfigError(f"{base}: gives {len(labels)} scores a row, regress is for one")
    tokenizer = Tokenizer.load(loaded.folder)
    held_out = replace(config.data, train=(), dev=())
    data = prepare(held_out, tokenizer, seed=config.env.seed, labels=labels)
    print(data.summary())
    if command.task == "dpo" and path:
        refer(opened(command._replace(resume=None)).model, data, config)
    suite = Suite(command.task, config, tokenizer, labels)
    results = suite.tests(loaded.model, data.tests)
    print(f"\n{results.against({})}\n")
    if path:
        count = note_opening(path, config.data.test, results.metrics)
        print(f"test rows of {path} were judged {count} times so far (openings.jsonl)")
    if path and config.data.train and command.origins.get("data.test") == "flag":
        own = parse([str(path)]).config  # whose training rows these test rows were not held out of
        try:
            train = prepared(own.data, tokenizer, seed=own.env.seed)[0].train.documents
        except FtcoreError as error:
            print(f"whether training knew these rows cannot be told: {error}")
            return results
        for name, split in data.tests.items():
            known_rows = suite.leaked(split, train)
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(known_rows.values()).items())
            print(f"{name}, rows known from training: {kinds or 'none'}")
            if known_rows:
                print(f"{results.without(name, known_rows)}\n")
    return results

def run(words: list[str]) -> None:
    """Judge what the words name, beside another where they say so."""
    other = take_value(words, "--against")
    command = parse(words)
    from ftcore.evaluate.report import json_line, write_predictions

    results = judge(command)
    path, summary = command.resume, {"model": words[0], "task": command.task}
    summary |= {"results": results.metrics, "intervals": results.intervals}
    if results.predictions:
        file = (path or Path()) / PREDICTIONS
        write_predictions(file, results.predictions)
        print(f"predictions: {file}, {len(results.predictions)} rows")
    if other:
        flags = [other, *words[1:]]
        if parse(flags).config.data.test != command.config.data.test:
            flags += ["--data.test", *command.config.data.test]
        told, summary["against"] = results.compared(judge(parse(flags)))
        print(f"{words[0]} against {other}\n\n{told}\n")
    print(json_line(summary))

def flat(tables: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value

def differences(one: Path, other: Path) -> Iterator[str]:
    """What two runs were asked, what they ran on and read, and the first step where they part."""
    from ftcore.env.run import METRICS
    from ftcore.evaluate.report import read_run

    runs = read_run(one), read_run(other)
    starts, names = [run["run"]["starts"][-1] for run in runs], ("commit", "versions", "hardware")
    parts = {"configuration": [run["config"] for run in runs],
             "code and machine": [{name: start[name] for name in names} for start in starts],
             "data": [{"key": run["data"]["key"], **run["data"]["statistics"]} for run in runs]}
    for what, nested in parts.items():
        mine, theirs = (dict(flat(each)) for each in nested)
        keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        yield f"{what}: {len(keys) or 'nothing'} differs"
        yield from (f"  {key}: {mine.get(key)!r} | {theirs.get(key)!r}" for key in keys)
    lines = [[{k: v for k, v in line.items() if not k.startswith("perf/")}
              for line in run["metrics"]] for run in runs]
    for mine, theirs in zip_longest(*lines, fillvalue={}):
        if mine != theirs:
            yield f"they part in step {mine.get('step', theirs.get('step'))} of {METRICS}"
            keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
            yield from (f"  {key}: {mine.get(key)} | {theirs.get(key)}" for key in keys)
            return
    yield f"all {len(lines[0])} lines of {METRICS} are equal, perf/ aside"

def main(argv: list[str]) -> int:
    """Parse, run, and turn what a user can mend into one message."""
    try:
        if argv[:1] in (["report"], ["diff"]) and len(argv) != (2 if argv[0] == "report" else 3):
            raise ConfigError("report RUN, or diff RUN OTHER: one run folder, or two")
        if argv[:1] == ["report"]:
            from ftcore.evaluate.report import write_page

            print(write_page(Path(argv[1])))
        elif argv[:1] == ["diff"]:
            print(*differences(*map(Path, argv[1:])), sep="\n")
        else:
            run([*argv])
    except FtcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
