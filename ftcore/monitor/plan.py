"""What to do about requests that moved: wait, take the model back, or train again, and how.

    DIR/plan.toml       why, with numbers; which rows; the commands that train, judge the new model
                        beside the old, and serve it; what it costs; how to go back
        config.toml     the run's own, with the new rows among its files
        new.jsonl       the rows that feedback was given of, but for those kept to judge by:
        recent.jsonl    one in five of the newest, for both models; what is alike is on one side
        unseen.jsonl    those of them of classes that the old one has not, for the new alone"""

import hashlib
import json
import shlex
import time
import tomllib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ftcore import files
from ftcore.cli import CONFIG_FILE, Command, as_flags, parse, read_toml, resolved, to_toml
from ftcore.config import Count, NotNegative, Section
from ftcore.data import compare, store
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate.report import read_run
from ftcore.monitor.drift import LABELLED, Watch
from ftcore.monitor.journal import read_journal, read_reference

FORM = {"pair": "", "label_separator": "", "columns": (), "format": "auto", "prompt": (),
        "roles": (), "turn": ("role", "content")}  # of files that new rows can stand beside
PLAN, NEW, RECENT, UNSEEN = "plan.toml", "new.jsonl", "recent.jsonl", "unseen.jsonl"
FEEDBACK, KEPT, LEAST = "accuracy", 5, 10  # it alarms alone; one in 5 rows is kept, 10 at least
Line = dict[str, Any]

class Look(Section):
    """How much is looked at."""
    window: Count = 500  # requests that are compared with those of the reference

class Limits(Look):
    """When a model is trained again, or taken back."""
    min_labelled: Count = 200  # rows with feedback that training does not know
    cooldown_hours: NotNegative = 24.0  # since the model was trained
    max_age_days: NotNegative = 90.0  # of the model
    first_requests: Count = 500  # that may take it back, if it replaced another

def decide(inputs: Line, limits: Limits) -> tuple[str, list[str]]:
    """go back, train or wait; and why. Of what is noted alone, so that it can be made again."""
    if alarms := _alarms(inputs["first"], inputs["known"]):
        return "go back", alarms
    why = _alarms(inputs["findings"], {})
    if inputs["hours"] > 24 * limits.max_age_days:
        why.append(f"{inputs['hours'] / 24:.1f} days old")
    least = {"labelled": limits.min_labelled, "hours": limits.cooldown_hours}
    lacks = [f"{key}: {inputs[key]:.4g} of {n:g}" for key, n in least.items() if inputs[key] < n]
    return ("train", why) if why and not lacks else ("wait", [*(why or ["no alarm"]), *lacks])

def _alarms(findings: Sequence[Line], known: Line) -> list[str]:
    """What is beyond its bound twice: feedback, if that far beyond what is known, or two others."""
    loud = [each for each in findings if each["state"] == 2]
    rated = {each["signal"] for each in loud if each["statistic"] == FEEDBACK
             and each["value"] - known.get(each["signal"], 0) > each["bound"]}
    others = {each["signal"] for each in loud} - rated - {*known}
    told = ["{signal}: {statistic} {value:.4g} above {bound:.4g}".format(**each) for each in loud]
    return told if rated or len(others) > 1 else []

def plan(run: Path, log: Path, folder: Path, limits: Limits) -> Line:
    """What is decided of a run by the log of its server, with the reasons; to train, the folder is
    made. Raises ConfigError: new rows cannot stand beside those of the run, or the folder is there;
    DataError: the log is of another model; as the readers."""
    run = run.resolve()  # what a link names now
    command, journal = configured(run), read_journal(log, run.name)
    if not (records := journal.records):
        what = f"holds no request that {run.name} answered; {journal.told() or 'nothing'}"
        raise DataError(f"{log}: {what}. Name the run that was served, and the log of its server")
    path, size = run.parent / PLAN, limits.first_requests  # by which it was trained
    made = tomllib.loads(path.read_text("utf-8")) if path.is_file() else {}
    before = json.loads(made.get("decision", "{}")).get("inputs", {}).get("findings", ())
    looks = {"findings": (limits.window, records),
             "first": (-(-size // 2), records[: size if made else 0])}
    found = {name: [each._asdict() for each in Watch(read_reference(run), window=window).look(some)]
             for name, (window, some) in looks.items()}
    learned = {row["id"] for name in command.config.data.train if Path(name).name == NEW
               for row in map(json.loads, Path(name).read_bytes().splitlines())}
    rows = [row for row in read_journal(log).records
            if {"wanted", "input"} <= row.keys() and row["id"] not in learned]
    start = datetime.fromisoformat(read_run(run)["run"]["starts"][-1]["time"]).timestamp()
    inputs = found | {"known": {each["signal"]: each["value"] for each in before if each["state"]},
                      "requests": len(records), "counts": {**journal.counts},
                      "labelled": len(rows), "hours": (time.time() - start) / 3600}
    answer, reasons = decide(inputs, limits)
    told = {"answer": answer, "reasons": reasons, "inputs": inputs, "limits": vars(limits)}
    if answer == "train":
        # as many as feedback is compared by
        recent = {row["id"] for row in (*records[-2 * limits.window :], *rows[-2 * LABELLED :])}
        _write(run, folder.absolute(), command, told, rows, recent)
    return told | {"replaced": made.get("run")}

def configured(run: Path) -> Command:
    """What a run was made to do. ConfigError: it cannot be done with new rows."""
    data = (command := parse(["--resume", str(run)])).config.data
    odd = [name for name, value in FORM.items() if getattr(data, name, value) != value]
    odd += [name for name in data.train if name.startswith("builtin:")]
    if command.task not in ("classify", "sft") or odd:
        what = "can be trained again are runs of classify (a text, one label) or sft (messages)"
        raise ConfigError(f"{run}: {what} with files that have columns; not {odd or command.task}")
    return command

def _write(run: Path, folder: Path, command: Command, told: Line, rows: Sequence[Line],
           recent: set[str]) -> None:
    if folder.exists():
        raise ConfigError(f"{folder} is there already: name another folder for the plan")
    data, was, sides = command.config.data, read_run(run), ([], [], [])
    known = {*was["labels"]} or {row["wanted"] for row in rows}
    roots = compare.clusters([json.dumps(row["input"]) for row in rows])
    older = {root for root, row in zip(roots, rows, strict=True) if row["id"] not in recent}
    kept = [hashlib.sha256(rows[root]["id"].encode()).digest()[0] % KEPT == 0 and root not in older
            for root in roots]
    taught = known | {row["wanted"] for row, is_kept in zip(rows, kept, strict=True) if not is_kept}
    for row, is_kept in zip(rows, kept, strict=True):
        fields = {data.text: row["input"], data.label: row["wanted"]} if (
            command.task == "classify") else {data.messages: [
                *row["input"], {"role": "assistant", "content": row["wanted"]}]}
        # no question is what no row teaches, and none to both what the old model cannot say
        side = is_kept * (row["wanted"] in taught) * (1 + (row["wanted"] not in known))
        sides[side].append({"id": row["id"], **fields})
    if min(map(len, sides[:2])) < LEAST:
        what = f"too few of {len(rows)} labelled rows are new and unlike others, to keep {LEAST}"
        raise DataError(f"{run}: {what} to judge by: collect more")
    added = {"data": {"train": [*data.train, folder / NEW]}}
    words = as_flags(added | {"log": {"dir": folder, "name": folder.name}})
    layers = [(str(run), read_toml(run / CONFIG_FILE)[1]), ("plan", [*words])]
    about = {"was": was, "run": run, "command": command, "folder": folder, "join": shlex.join}
    text = store.rendered(PLAN, Path(__file__).parent, **told, **about, sides=sides)
    with files.write_folder(folder) as temp:
        (temp / CONFIG_FILE).write_text(to_toml(resolved(command.task, layers)), "utf-8")
        (temp / PLAN).write_text(text, "utf-8")
        for name, side in zip((NEW, RECENT, UNSEEN), sides, strict=True):
            (temp / name).write_text("".join(json.dumps(row) + "\n" for row in side), "utf-8")
