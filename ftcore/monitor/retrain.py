"""What comes of a plan: the model that it makes, whether that is better, and which model answers.

    DIR/verdict.json    pass or fail, why, and the figures that say so
    LINK                the model that answers: a symbolic link, which a server of it follows; it
                        alone says so, and changes in one step: whatever is killed, there is one
    LINK.jsonl          what it named and names, each line with the SHA-256 of the one before"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from ftcore import files
from ftcore.cli import CONFIG_FILE
from ftcore.env.run import locked
from ftcore.errors import CheckpointError, ConfigError, TrainingError
from ftcore.evaluate.metrics import mcnemar
from ftcore.model.load import read_object
from ftcore.monitor.plan import PLAN, Line
from ftcore.tune.adapter import ADAPTER, MODEL

VERDICT = "verdict.json"
FIGURE = {"classify": "accuracy", "sft": "exact_match"}  # by which models are judged
MOST_LOST = 0.01  # of the figure, on test rows of before
DOUBT = 0.05  # chance of gains so uneven from models that are equal

def judge(inputs: Line) -> tuple[str, list[str]]:
    """pass or fail, and why. Of `gains`, recent rows and those of classes that the old model cannot
    name, more must be gained than lost, and so unevenly that McNemar's test has less than DOUBT;
    of each file of `kept` rows no more than MOST_LOST may be lost."""
    gained, lost = (sum(each[key] for each in inputs["gains"]) for key in ("gained", "lost"))
    is_better = gained > lost and mcnemar(gained, lost) < DOUBT
    is_kept = all(round(each["difference"], 9) >= -MOST_LOST for each in inputs["kept"])
    return ("pass" if is_better and is_kept else "fail",
            ["{what}: {gained} of {rows} rows gained, {lost} lost".format(**each)
             for each in inputs["gains"]] +
            ["{what}: {difference:+.4f}, {low:+.4f} to {high:+.4f}".format(**each)
             for each in inputs["kept"]])

def run(folder: Path, /) -> Line:
    """Train by a plan, judge what it makes beside the model that is served, and write the verdict.
    ConfigError: no plan; CheckpointError: rows of it vanished; TrainingError: a command failed."""
    folder = folder.resolve()
    if not (folder / PLAN).is_file():
        raise ConfigError(f"{folder}: holds no {PLAN}; python -m ftcore.monitor plan makes one")
    files.verify_folder(folder)
    plan, made = tomllib.loads((folder / PLAN).read_text("utf-8")), folder / folder.name
    commands, rows = plan["commands"], plan["rows"]
    if (made / CONFIG_FILE).is_file():
        commands["train"] = shlex.join(["python", "train.py", "--resume", str(made)])
    figure = FIGURE[said(commands["train"])["task"]]
    (recent,) = said(commands["judge"])["against"].values()
    gains = [{"what": "recent", "rows": rows["recent"], **recent["mcnemar"]}]
    if "unseen" in commands:
        (told,), count = said(commands["unseen"])["results"].values(), rows["unseen"]
        gains.append({"what": "unseen", "rows": count, "gained": round(told[figure] * count),
                      "lost": 0})
    kept = said(commands["keep"])["against"].items() if "keep" in commands else ()
    inputs = {"run": plan["run"], "gains": gains,
              "kept": [{"what": name, **found[figure]} for name, found in kept]}
    verdict = dict(zip(("answer", "reasons"), judge(inputs), strict=True), inputs=inputs)
    files.write_file(folder / VERDICT, json.dumps(verdict, indent=1))
    return verdict

def said(command: str) -> Line:
    """The JSON line with which a command of a plan ends; all that it says is shown."""
    words, line = [sys.executable, *shlex.split(command)[1:]], ""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode or not line.startswith("{"):
        raise TrainingError(f"{command}: ended with {process.returncode}, see above; then again")
    return json.loads(line)

def promote(link: Path, made: Path, /) -> str:
    """Let a run or bundle answer, or, of a plan's folder, what it has made, if that passed. Raises
    ConfigError: it did not, or was judged beside another model than answers now; as `_point`."""
    now, made = link.resolve(), made.resolve()
    if not (made / PLAN).is_file():
        return _point(link, now, "promote", made)
    verdict = read_object(made / VERDICT, advice=f": first python -m ftcore.monitor run {made}")
    if verdict["answer"] != "pass":
        why = f"{verdict['answer']}, {'; '.join(verdict['reasons'])}"
        raise ConfigError(f"{made}: {why}; a run may be promoted by its own name all the same")
    if (was := verdict["inputs"]["run"]) != str(now):
        raise ConfigError(f"{made}: was judged beside {was}, and {link} is {now}: plan again")
    return _point(link, now, "promote", made / made.name, verdict=verdict)

def rollback(link: Path, /) -> str:
    """Let the model answer that the present one replaced. Raises ConfigError: there was none."""
    now, lines = link.resolve(), map(json.loads, reversed(history(link)))
    before = next((line["replaces"] for line in lines if line["event"] == "promote"
                   and line["model"] == str(now) != line["replaces"]), None)
    if before is None:
        raise ConfigError(f"{link}: {now} has replaced no model; promote another")
    return _point(link, now, "rollback", Path(before))

def history(link: Path) -> list[bytes]:
    """The lines of LINK.jsonl. Raises CheckpointError: one before the last was altered."""
    file, before = link.with_name(f"{link.name}.jsonl"), ""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        if f'"before": "{before}"'.encode() not in line:
            what = f"{file}:{number}: the line before it was altered, or is lost"
            raise CheckpointError(f"{what}: restore the file from a copy")
        before = hashlib.sha256(line).hexdigest()
    return lines

def _point(link: Path, now: Path, event: str, model: Path, **more: Any) -> str:
    """Note it, then let the link, which names `now`, name the model; returns its path. ConfigError:
    no link, or one that was changed; CheckpointError: damaged files, no finished run or bundle."""
    parts = (model, model / MODEL, model / ADAPTER)
    whole = next((part for part in parts if (part / files.MANIFEST).is_file()), model)
    files.verify_folder(whole)
    files.make_folder(link.parent)
    log, temp = (link.with_name(f"{link.name}.{end}") for end in ("jsonl", "next"))
    with locked(link.with_name(f".{link.name}.lock")):
        if link.resolve() != now or link.exists() and not link.is_symlink():
            raise ConfigError(f"{link}: is no symbolic link, or was changed meanwhile: ask again")
        lines = history(link)
        line = {"time": time.time(), "event": event, "model": str(model.resolve()),
                "replaces": str(now) if link.is_symlink() else None,
                "manifest": files.sha256_file(whole / files.MANIFEST),
                "before": hashlib.sha256(lines[-1]).hexdigest() if lines else "", **more}
        files.write_file(log, b"\n".join([*lines, json.dumps(line).encode(), b""]))
        temp.unlink(missing_ok=True)
        temp.symlink_to(line["model"])
        os.replace(temp, link)
        files.fsync(link.parent)
    return line["model"]
