"""What to do about requests that moved: wait, go back, or train again, by a plan in a folder; and
which model answers, that a link names (README.md, "Folders")."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from ftcore import files
from ftcore.cli import CONFIG_FILE, Command, as_flags, parse, read_toml, resolved, to_toml
from ftcore.config import Count, NotNegative, Section
from ftcore.data import prepare, store
from ftcore.env.run import locked
from ftcore.errors import CheckpointError, ConfigError, DataError, TrainingError
from ftcore.evaluate import metrics, report
from ftcore.model.load import read_object
from ftcore.monitor.drift import LABELLED, Watch
from ftcore.monitor.journal import read_journal, read_reference
from ftcore.tune.adapter import ADAPTER, MODEL

FORM = {"pair": "", "label_separator": "", "columns": (), "format": "auto", "prompt": (),
        "roles": (), "turn": ("role", "content")}  # of files that new rows can stand beside
PLAN, ROWS = "plan.toml", ("new.jsonl", "recent.jsonl", "unseen.jsonl")
VERDICT = "verdict.json"
FEEDBACK, KEPT, LEAST = "accuracy", 5, 10  # it alarms alone; one in 5 rows is kept, 10 at least
FIGURE = {"classify": "accuracy", "sft": "exact_match"}  # by which models are judged
MOST_LOST = 0.01  # of the figure, on test rows of before
ALIKE = {"embedding": "label"}  # other texts have other labels: both together say one thing
DOUBT = 0.05  # chance of gains so uneven from models that are equal
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
    return told if rated or len({ALIKE.get(s, s) for s in others}) > 1 else []

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
    learned = {row["id"] for name in command.config.data.train if Path(name).name in ROWS
               for row in map(json.loads, Path(name).read_bytes().splitlines())}
    rows = [row for row in read_journal(log).records
            if {"wanted", "input"} <= row.keys() and row["id"] not in learned]
    start = datetime.fromisoformat(report.read_run(run)["run"]["starts"][-1]["time"]).timestamp()
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
    data, was, sides = command.config.data, report.read_run(run), ([], [], [])
    known = {*was["labels"]} or {row["wanted"] for row in rows}
    roots = prepare.clusters([json.dumps(row["input"]) for row in rows])
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
    added = {"data": {"train": [*data.train, folder / ROWS[0]]}}
    words = as_flags(added | {"log": {"dir": folder, "name": folder.name}})
    layers = [(str(run), read_toml(run / CONFIG_FILE)[1]), ("plan", [*words])]
    about = {"was": was, "run": run, "command": command, "folder": folder, "join": shlex.join}
    text = store.rendered(PLAN, Path(__file__).parent, **told, **about, sides=sides)
    with files.write_folder(folder) as temp:
        (temp / CONFIG_FILE).write_text(to_toml(resolved(command.task, layers)), "utf-8")
        (temp / PLAN).write_text(text, "utf-8")
        for name, side in zip(ROWS, sides, strict=True):
            (temp / name).write_text("".join(json.dumps(row) + "\n" for row in side), "utf-8")

def judge(inputs: Line) -> tuple[str, list[str]]:
    """pass or fail, and why. Of `gains`, recent rows and those of new classes, more must be gained
    than lost, McNemar's test below DOUBT; of each file of `kept` rows MOST_LOST may be lost."""
    gained, lost = (sum(each[key] for each in inputs["gains"]) for key in ("gained", "lost"))
    is_better = gained > lost and metrics.mcnemar(gained, lost) < DOUBT
    is_kept = all(round(each["difference"], 9) >= -MOST_LOST for each in inputs["kept"])
    return ("pass" if is_better and is_kept else "fail",
            ["{what}: {gained} of {rows} rows gained, {lost} lost".format(**each)
             for each in inputs["gains"]] +
            ["{what}: {difference:+.4f}, {low:+.4f} to {high:+.4f}".format(**each)
             for each in inputs["kept"]])

def run(folder: Path, /) -> Line:
    """Train by a plan, judge that beside what is served, and write the verdict; where it gains, on
    all rows once more, those too that it was judged by. ConfigError: no plan; CheckpointError: rows
    of it vanished; TrainingError: a command failed."""
    folder = folder.resolve()
    if not (folder / PLAN).is_file():
        raise ConfigError(f"{folder}: holds no {PLAN}; python -m ftcore.monitor plan makes one")
    files.verify_folder(folder)
    asked, made = tomllib.loads((folder / PLAN).read_text("utf-8")), folder / folder.name
    commands, rows = asked["commands"], asked["rows"]
    for name, model in (("train", made.with_name(f"{made.name}-judged")), ("finish", made)):
        if (model / CONFIG_FILE).is_file():
            commands[name] = shlex.join(["python", "train.py", "--resume", str(model)])
    figure = FIGURE[said(commands["train"])["task"]]
    (recent,) = said(commands["judge"])["against"].values()
    gains = [{"what": "recent", "rows": rows["recent"], **recent["mcnemar"]}]
    if "unseen" in commands:
        (told,), count = said(commands["unseen"])["results"].values(), rows["unseen"]
        gains.append({"what": "unseen", "rows": count, "gained": round(told[figure] * count),
                      "lost": 0})
    inputs = {"run": asked["run"], "gains": gains, "kept": []}
    if judge(inputs)[0] == "pass":
        said(commands["finish"])
        kept = said(commands["keep"])["against"] if "keep" in commands else {}
        inputs["kept"] = [{"what": name, **found[figure]} for name, found in kept.items()]
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

def gate(folder: Path, /) -> Line:
    """The verdict again, from its figures. ModelError: there is none; CheckpointError: altered."""
    file = folder.resolve() / VERDICT
    verdict = read_object(file, advice=f": first python -m ftcore.monitor run {folder}")
    with suppress(LookupError, TypeError, ValueError):
        if [*judge(verdict["inputs"])] == [verdict["answer"], verdict["reasons"]]:
            return verdict
    raise CheckpointError(f"{file}: was altered, its figures say otherwise; judge again by `run`")

def promote(link: Path, made: Path, /) -> str:
    """Let a run or bundle answer, or, of a plan's folder, what it has made, if that passed. Raises
    ConfigError: it did not, or was judged beside another model than answers now; as `_point`."""
    now, made = link.resolve(), made.resolve()
    if not (made / PLAN).is_file():
        return _point(link, now, "promote", made)
    if (verdict := gate(made))["answer"] != "pass":
        why = f"{verdict['answer']}, {'; '.join(verdict['reasons'])}"
        raise ConfigError(f"{made}: {why}; a run may be promoted by its own name all the same")
    if (was := verdict["inputs"].get("run")) != str(now):
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
