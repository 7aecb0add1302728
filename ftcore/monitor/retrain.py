"""From feedback to the next model. Cron calls it; each decision is a line that can be replayed.

    HOME/log.jsonl      decisions, each with the SHA-256 of itself and of the line before; the last
                        that promotes or rolls back names the active model
         journal.jsonl  what the server writes: requests with texts, and feedback
         models/N/      bundles; plans/N/: plan.toml, config.toml, rows, run/ (of train.py)

After a kill either the old model is active or the new one; the same call goes on."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftcore import files
from ftcore.cli import CONFIG_FILE, Command, as_flags, options, read_toml, resolved, to_toml
from ftcore.config import RUNS, Count, NotNegative, Section
from ftcore.data import columns, compare, pack, read, store
from ftcore.data.chat import encode_prompt
from ftcore.deploy.bundle import bundle, open_bundle
from ftcore.env.run import locked
from ftcore.errors import CheckpointError, ConfigError, DataError, TrainingError
from ftcore.evaluate import evaluator, metrics, report
from ftcore.monitor.drift import Watch
from ftcore.monitor.journal import read_journal, read_reference

HERE = Path(__file__).parent
FORM = "format", "columns", "text", "label", "messages", "turn", "roles", "prompt"  # of files
FEEDBACK = "accuracy"  # the statistic that alarms alone
GATE_SHARE, MOST_LOST = 5, 0.01  # one in so many new rows; share of the frozen rows
Line = dict[str, Any]

class Limits(Section):
    """When a model is trained again, or taken back."""
    min_labelled: Count = 200  # rows with feedback that are in no plan
    cooldown_hours: NotNegative = 24.0  # since the last promotion
    max_age_days: NotNegative = 90.0  # since the active model was promoted
    first_requests: Count = 500  # that may take a new model back
    window: Count = 500  # requests that are compared with the reference

def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

class Registry:
    """The decisions so far. CheckpointError: a line was altered."""

    def __init__(self, home: Path) -> None:
        self.home, self.log, self.lines, self.head = home, home / "log.jsonl", [], ""
        content = self.log.read_bytes() if self.log.exists() else b""
        self.size = content.rfind(b"\n") + 1  # behind it stands what a kill cut short
        for number, line in enumerate(content[: self.size].splitlines(), start=1):
            told, _, own = line.rpartition(b', "sha256": ')
            chain = f'"before": "{self.head}"'.encode()
            if own != f'"{_sha(told)}"}}'.encode() or chain not in told:
                what = "was altered, or the one before it is lost: restore the file from a copy"
                raise CheckpointError(f"{self.log}, line {number}: {what}")
            self.lines.append(json.loads(line))
            self.head = _sha(line)

    def append(self, event: str, **fields: Any) -> Line:
        told = {"time": time.time(), "event": event, "before": self.head} | fields
        text = json.dumps(told, default=float)[:-1]
        with open(self.log, "ab") as file:
            file.truncate(self.size)
            file.write(f'{text}, "sha256": "{_sha(text.encode())}"}}\n'.encode())
            file.flush()
            os.fsync(file.fileno())
        files.fsync(self.home)
        self.__init__(self.home)
        return self.lines[-1]

    def last(self, *events: str, **fields: Any) -> Line:
        found = (line for line in reversed(self.lines) if line["event"] in events)
        return next((line for line in found if fields.items() <= line.items()), {})

    def active(self) -> str | None:
        return self.last("promote", "rollback").get("model")

    def use(self, event: str, name: str, **fields: str) -> str:
        """Make a bundle the active one, if it is whole."""
        files.verify_folder(folder := self.home / "models" / name)
        told = {"replaces": self.active(), "manifest": files.sha256_file(folder / files.MANIFEST)}
        return self.append(event, model=name, **told, **fields)["model"]

@contextmanager
def writing(home: Path) -> Iterator[Registry]:
    """For one writer; one line is written. CheckpointError: there is another writer."""
    files.make_folder(home)
    with locked(home / "lock"):
        yield Registry(home)

def decide(inputs: Line, limits: Limits) -> tuple[str, list[str]]:
    """rollback, propose or wait; and why."""
    if alarms := _alarms(inputs["first"], inputs["known"]):
        return "rollback", alarms
    why = _alarms(inputs["findings"])
    if inputs["days"] > limits.max_age_days:
        why.append(f"{inputs['days']:.1f} days old")
    least = {"labelled": limits.min_labelled, "hours": limits.cooldown_hours}
    lacks = [f"{key}: {inputs[key]:.4g} of {n:g}" for key, n in least.items() if inputs[key] < n]
    return ("propose", why) if why and not lacks else ("wait", [*(why or ["no alarm"]), *lacks])

def _alarms(findings: Sequence[Line], known: Sequence[str] = ()) -> list[str]:
    """What is beyond its bound twice: of feedback, or of two other signals, known ones aside."""
    calm = {each["signal"] for each in findings if each["state"] != 2}
    loud = [each for each in findings if each["signal"] not in calm]
    rated = {each["signal"] for each in loud if each["statistic"] == FEEDBACK}
    others = {each["signal"] for each in loud} - rated - {*known}
    told = ["{signal}: {statistic} {value:.4g} above {bound:.4g}".format(**each) for each in loud]
    return told if rated or len(others) > 1 else []

def judge(inputs: Line) -> tuple[str, list[str]]:
    """pass or fail; and why."""
    is_kept = round(inputs["frozen"]["difference"], 9) >= -inputs["most_lost"]
    told = "{}: of {rows} rows {difference:+.4f} right, {low:+.4f} to {high:+.4f}"
    return ("pass" if inputs["recent"]["low"] > 0 and is_kept else "fail",
            [told.format(name, **inputs[name]) for name in ("recent", "frozen")])

def plan(home: Path, limits: Limits) -> Line:
    """Decide, and do it: roll back, or write HOME/plans/N. Returns the decision's line."""
    with writing(home) as registry:
        inputs, rows = _inputs(registry, limits)
        answer, reasons = decide(inputs, limits)
        told = {"inputs": inputs, "limits": vars(limits), "answer": answer, "reasons": reasons}
        if answer == "propose":
            told |= {"plan": str(len(registry.lines) + 1), "rows": [row.id for row in rows]}
            _write_plan(registry, told, rows)
        line = registry.append("decide", **told)
        if answer == "rollback":
            registry.use("rollback", registry.last("promote")["replaces"])
    return line

def _inputs(registry: Registry, limits: Limits) -> tuple[Line, list[columns.Example]]:
    """For `decide`; and the rows with feedback that the active model has not learned."""
    home, last = registry.home, registry.last("promote", "rollback")
    if not last:
        raise ConfigError(f"{home}: there is no model; first promote the run of one")
    model, log, size = last["model"], home / "journal.jsonl", limits.first_requests
    files.verify_folder(home / "models" / model)
    reference, journal = read_reference(home / "models" / model), read_journal(log, model)
    records = [*journal.records]
    first = records[: size if last["event"] == "promote" and last["replaces"] else 0]
    looks = {"findings": (limits.window, records), "first": (-(-size // 2), first)}
    found = {name: [each._asdict() for each in Watch(reference, window=window).look(some)
                    if each.state is not None] for name, (window, some) in looks.items()}
    plans = {line["plan"]: line for line in registry.lines if "plan" in line}
    before = plans[model]["inputs"]["findings"] if model in plans else []
    learned, name, since = set(), model, registry.last("promote", model=model)
    while name in plans:
        learned |= {*plans[name]["rows"]}
        name = plans[name]["inputs"]["model"]
    rated = [record for record in read_journal(log).records
             if "wanted" in record and record["id"] not in learned]
    task = configured(home / since["run"]).task
    rows = [row for record in rated for row in _examples(record, task)]
    planned = {id_ for line in plans.values() for id_ in line["rows"]}
    return found | {
        "model": model, "requests": len(records), "counts": journal.counts,
        "known": [each["signal"] for each in before if each["state"] == 2],
        "unfit": len(rated) - len(rows), "labelled": sum(row.id not in planned for row in rows),
        "hours": (time.time() - registry.last("promote")["time"]) / 3600,
        "days": (time.time() - since["time"]) / 86400}, rows

def configured(folder: Path) -> Command:
    """What a run, or a plan, was made to do. ConfigError: it cannot be done again."""
    task, flags = read_toml(folder / CONFIG_FILE)
    command = resolved(task, [(str(folder / CONFIG_FILE), flags)])
    told, odd = vars(command.config.data), ("pair", "label_separator", "group")
    if task not in ("classify", "sft") or any(map(told.get, odd)) or not told["test"]:
        what = "classify (a text, one label) and sft runs with --data.test, without --data.group"
        raise ConfigError(f"{folder}: can be trained again of {what}; promote such a run")
    return command

def _examples(record: Line, task: str) -> list[columns.Example]:
    """A record as a row; none of another kind, or without text."""
    said, wanted = record.get("input") or "", record["wanted"]
    fields = {"text": said, "label": wanted} if task == "classify" else {
        "messages": [*said, {"role": "assistant", "content": wanted}]}
    with suppress(DataError):
        row = columns.Row(record["id"], "journal.jsonl", 0, fields)
        return columns.examples([row], RUNS[task]().data)[0]
    return []

def _write_plan(registry: Registry, line: Line, rows: Sequence[columns.Example]) -> None:
    home, model = registry.home.absolute(), line["inputs"]["model"]
    run, folder = home / registry.last("promote", model=model)["run"], home / "plans" / line["plan"]
    command, sides = configured(run), ([], [])  # new rows; on one of them stays what is alike
    for row, root in zip(rows, compare.clusters(rows), strict=True):
        sides[int(_sha(rows[root].id.encode()), 16) % GATE_SHARE == 0].append(row)
    if not all(sides):
        what = f"{len(rows)} labelled rows are too few or too much alike to keep some for the gate"
        raise DataError(f"{home}: {what}: collect more")
    parts = {split if split in ("train", "dev") else f"test-{n}": part.examples
             for n, (split, part) in enumerate(read.collect(command.config.data, {}).items())}
    old = len(parts["train"])
    parts |= {"train": parts["train"] + sides[0], "recent": sides[1]}
    data = {kind: [f"{folder}/{name}.jsonl" for name in parts if name.startswith(kind)]
            for kind in ("train", "dev", "test")}
    data |= {name: x for name, x in vars(RUNS[command.task]().data).items() if name in FORM}
    words = as_flags({"data": data, "log": {"dir": folder, "name": "run"}})
    layers = [(str(run), read_toml(run / CONFIG_FILE)[1]), (f"plan {line['plan']}", [*words])]
    command = resolved(command.task, layers)
    steps = command.config.loop.num_steps(len(parts["train"]), command.config.rows_per_step)
    about = {"told": report.read_run(run), "task": command.task, "folder": folder, "home": home,
             "most_lost": MOST_LOST, "old": old, "sides": sides, "steps": steps}
    texts = {"plan.toml": store.rendered("plan.toml", HERE, **line, **about),
             CONFIG_FILE: to_toml(command)}
    for name, part in parts.items():
        plain = ({"id": row.id} | ({"messages": row.messages} if command.task == "sft" else
                                   {"text": row.texts[0], "label": row.target}) for row in part)
        texts[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in plain)
    with files.write_folder(folder) as temp:
        for name, text in texts.items():
            (temp / name).write_text(text, "utf-8")

def run(home: Path) -> str:
    """Train by the last plan, and bundle it; returns the candidate's name. ConfigError: it was
    run; CheckpointError: rows of it vanished; TrainingError: train.py stopped."""
    name = (registry := Registry(home)).last("decide", answer="propose").get("plan")
    if name is None or registry.last("candidate", model=name):
        raise ConfigError(f"{home}: there is no plan that was not run yet")
    files.verify_folder(folder := home / "plans" / name)
    if not (target := home / "models" / name).is_dir():
        words = ["--resume", made] if ((made := folder / "run") / CONFIG_FILE).is_file() else [
            configured(folder).task, "--config", folder / CONFIG_FILE]
        command = [sys.executable, HERE.parents[1] / "train.py", *words]
        if code := subprocess.run(command, check=False).returncode:
            raise TrainingError(f"{made}: train.py ended with {code} and said why; then run again")
        bundle(made, target)
    with writing(home) as registry:
        return registry.append("candidate", model=name)["model"]

def gate(home: Path) -> Line:
    """Judge the last candidate beside the active model, on the same rows; returns the line."""
    name, model = (registry := Registry(home)).last("candidate").get("model"), registry.active()
    if name is None:
        raise ConfigError(f"{home}: there is no candidate; first run a plan")
    files.verify_folder(folder := home / "plans" / name)
    data = (command := configured(folder)).config.data
    parts = {part: columns.examples(read.read_rows(paths), data)[0] for part, paths in
             (("recent", [folder / "recent.jsonl"]), ("frozen", data.test))}
    right = [_right(home / "models" / each, command, parts) for each in (name, model)]
    inputs = {"candidate": name, "active": model, "most_lost": MOST_LOST}
    for part, rows in parts.items():
        figures = [lambda rows_M, right_B=each[part]: {"right": float(right_B[rows_M].mean())}
                   for each in right]
        found = metrics.compare(*figures, np.array(compare.clusters(rows)))
        inputs[part] = {"rows": len(rows), **found["right"]}
    answer, reasons = judge(inputs)
    with writing(home) as registry:
        return registry.append("gate", inputs=inputs, answer=answer, reasons=reasons)

@torch.inference_mode()
def _right(folder: Path, command: Command,
           parts: Mapping[str, Sequence[columns.Example]]) -> dict[str, np.ndarray]:
    """Of each part whether a bundle says what is wanted of its rows (bool)."""
    (loaded, tokenizer, _), config, right = open_bundle(folder), command.config, {}
    model = loaded.model.to(config.env.device)
    limits = {"max_tokens": config.loop.micro_batch_tokens, "device": model.device}
    for name, rows in parts.items():
        if command.task == "sft":
            wanted = [row.messages[-1]["content"] for row in rows]
            prompts = [encode_prompt(row.messages[:-1], tokenizer) for row in rows]
            said = evaluator.greedy(model, tokenizer, prompts, config.eval.max_new_tokens)
        else:
            wanted, texts = [row.target for row in rows], [row.texts for row in rows]
            ids = tokenizer.encode_pairs(texts, max_length=config.data.max_length)
            documents = [pack.Encoded("", ids_T, 0, 1.0, types_T) for ids_T, types_T in ids]
            best_B = evaluator.all_logits(model, documents, **limits).argmax(1)
            said = [loaded.labels[k] for k in best_B]
        right[name] = np.array([*map(metrics.exact_match, wanted, said)])
    return right

def promote(home: Path, run: Path | None = None) -> str:
    """Make a run the active model, or the last candidate if its gate passed; returns its name."""
    with writing(home) as registry:
        if run is not None:
            configured(run)
            name = str(len(registry.lines) + 1)
            files.remove(home / "models" / name)  # what a kill left
            bundle(run, home / "models" / name)
            return registry.use("promote", name, run=str(run.absolute()))
        last = registry.last("candidate", "gate", "promote", "rollback")
        if last.get("answer") != "pass" or last["inputs"]["active"] != registry.active():
            why = "; ".join(last.get("reasons", ["there is none"]))
            raise ConfigError(f"{home}: a gate beside the active model must pass first: {why}")
        name = last["inputs"]["candidate"]
        return registry.use("promote", name, run=f"plans/{name}/run")

def rollback(home: Path) -> str:
    """Make the model active that the active one replaced; returns its name."""
    with writing(home) as registry:
        if not (name := registry.last("promote", model=registry.active()).get("replaces")):
            raise ConfigError(f"{home}: no model was active before; promote a run")
        return registry.use("rollback", name)

def replay(home: Path) -> int:
    """Decide all again; returns how many decisions. CheckpointError: one comes out otherwise."""
    for line in (lines := [line for line in Registry(home).lines if "inputs" in line]):
        inputs, limits = line["inputs"], line.get("limits")
        answer, why = decide(inputs, Limits(**limits)) if limits else judge(inputs)
        if answer != line["answer"]:
            what = f"{home}: {line['event']} at {line['time']} said {line['answer']}, its inputs"
            raise CheckpointError(f"{what} give {answer} ({'; '.join(why)}): the rules changed")
    return len(lines)

def _said(line: Line) -> str:
    return f"{line['answer']}: {'; '.join(line['reasons'])}"

COMMANDS: Mapping[str, Callable[..., Any]] = {  # of `python -m ftcore.monitor`: HOME, other words
    "promote": lambda home, words: promote(home, *map(Path, words)),
    "plan": lambda home, words: _said(plan(home, options(Limits, words, script="plan HOME"))),
    "run": lambda home, words: run(home), "gate": lambda home, words: _said(gate(home)),
    "rollback": lambda home, words: rollback(home), "replay": lambda home, words: replay(home)}
