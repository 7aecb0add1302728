"""From feedback to the next model: plan, run, gate, promote, roll back; each decision is a line.

    HOME/log.jsonl      decisions, each with the SHA-256 of the line before; the last line that
                        promotes or rolls back names the active model
         models/N/      bundles; plans/N/ plan.toml, config.toml, rows, run/ (of train.py)
         journal.jsonl  what the server writes: requests with texts, and feedback

Cron calls it. A kill leaves the old model active, or the new one; the same call then goes on."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftcore import files
from ftcore.cli import CONFIG_FILE, Command, as_flags, read_toml, resolved, to_toml
from ftcore.config import RUNS, Count, NotNegative, Section
from ftcore.data.chat import encode_prompt
from ftcore.data.columns import Chat, Example, examples
from ftcore.data.compare import clusters
from ftcore.data.formats import Row
from ftcore.data.pack import Encoded
from ftcore.data.read import collect, read_rows
from ftcore.data.store import rendered
from ftcore.deploy.bundle import bundle, open_bundle
from ftcore.env.run import locked
from ftcore.errors import CheckpointError, ConfigError, DataError, TrainingError
from ftcore.evaluate.evaluator import all_logits, greedy
from ftcore.evaluate.report import read_run
from ftcore.evaluate.significance import compare
from ftcore.evaluate.text import exact_match
from ftcore.monitor.drift import Watch
from ftcore.monitor.journal import read_journal, read_reference

HERE = Path(__file__).parent
FORM = "format", "columns", "text", "label", "messages", "turn", "roles", "prompt"  # of files
FEEDBACK = "accuracy"  # the statistic that alarms alone
GATE_SHARE, MOST_LOST = 5, 0.01  # one in so many new rows; share of frozen rows
Line = dict[str, Any]

class Limits(Section):
    """When a model is trained again, or taken back."""
    min_labelled: Count = 200  # rows with feedback that are in no plan
    cooldown_hours: NotNegative = 24.0  # since the last promotion
    max_age_days: NotNegative = 90.0  # since the active model was promoted
    first_requests: Count = 500  # that may take a new model back
    window: Count = 500  # requests that are compared with the reference

class Registry:
    """The decisions so far. CheckpointError: a line was altered."""

    def __init__(self, home: Path) -> None:
        self.home, self.log, self.lines, self.head = home, home / "log.jsonl", [], ""
        content = self.log.read_bytes() if self.log.exists() else b""
        self.size = content.rfind(b"\n") + 1  # behind it stands what a kill cut short
        for number, line in enumerate(content[: self.size].splitlines(), start=1):
            text, _, own = line.rpartition(b', "sha256": ')
            chain = f'"before": "{self.head}"'.encode()
            if own != f'"{_sha(text)}"}}'.encode() or chain not in text:
                what = "was altered, or the one before it is lost: restore the file from a copy"
                raise CheckpointError(f"{self.log}, line {number}: {what}")
            self.lines.append(json.loads(line))
            self.head = _sha(line)

    def append(self, event: str, **fields: Any) -> Line:
        """For the one writer. OSError: it cannot be written."""
        told = {"time": time.time(), "event": event, "before": self.head, **fields}
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

    def use(self, event: str, name: str, **fields: Any) -> Line:
        """Make a whole bundle the active one."""
        files.verify_folder(folder := self.home / "models" / name)
        manifest = files.sha256_file(folder / files.MANIFEST)
        before = self.last("promote", "rollback").get("model")
        return self.append(event, model=name, manifest=manifest, replaces=before, **fields)

def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

@contextmanager
def writing(home: Path) -> Iterator[Registry]:
    """The registry, for its one writer. CheckpointError: there is another."""
    files.make_folder(home)
    with locked(home / "lock"):
        yield Registry(home)

def active(home: Path) -> str | None:
    """Name of the model in HOME/models that is to be served."""
    return Registry(home).last("promote", "rollback").get("model")

def decide(inputs: Line, limits: Limits) -> tuple[str, list[str]]:
    """rollback, propose or wait; and why."""
    if alarms := _alarms(inputs["first"], inputs["known"]):
        return "rollback", alarms
    is_old = inputs["days"] > limits.max_age_days
    why = _alarms(inputs["findings"]) + [f"{inputs['days']:.1f} days old"] * is_old
    least = {"labelled": limits.min_labelled, "hours": limits.cooldown_hours}
    lacks = [f"{key}: {inputs[key]:.6g} of {n:g}" for key, n in least.items() if inputs[key] < n]
    return ("propose", why) if why and not lacks else ("wait", [*(why or ["no alarm"]), *lacks])

def _alarms(findings: Sequence[Line], known: Sequence[str] = ()) -> list[str]:
    """What is beyond its bound twice: of feedback, or of two other signals, known ones aside."""
    calm = {each["signal"] for each in findings if each["state"] != 2}
    loud = [each for each in findings if each["signal"] not in calm]
    rated = {each["signal"] for each in loud if each["statistic"] == FEEDBACK}
    others = {each["signal"] for each in loud} - rated - {*known}
    told = ["{signal}: {statistic} {value:.4g} > {bound:.4g}".format(**each) for each in loud]
    return told if rated or len(others) > 1 else []

def judge(inputs: Line) -> tuple[str, list[str]]:
    """pass or fail; and why."""
    recent, frozen = inputs["recent"], inputs["frozen"]
    passes = recent["low"] > 0 and round(frozen["difference"], 9) >= -inputs["most_lost"]
    told = "{}: of {rows} rows {difference:+.4f} right, {low:+.4f} to {high:+.4f}"
    return ("pass" if passes else "fail",
            [told.format(name, **inputs[name]) for name in ("recent", "frozen")])

def plan(home: Path, limits: Limits) -> Line:
    """Decide, and do it: roll back, or write HOME/plans/N. Returns the decision's line."""
    with writing(home) as registry:
        inputs, rows = _inputs(registry, limits)
        answer, reasons = decide(inputs, limits)
        line = {"inputs": inputs, "limits": vars(limits), "answer": answer, "reasons": reasons}
        if answer == "propose":
            line["plan"] = str(len(registry.lines) + 1)
            line["rows"] = _write_plan(registry, line, rows)
        line = registry.append("decide", **line)
        if answer == "rollback":
            registry.use("rollback", registry.last("promote")["replaces"])
    return line

def _inputs(registry: Registry, limits: Limits) -> tuple[Line, list[Example]]:
    """For `decide`; and the rows with feedback that the active model has not learned."""
    home, last = registry.home, registry.last("promote", "rollback")
    if not last:
        raise ConfigError(f"{home}: there is no model; first promote the run of one")
    since, folder = registry.last("promote", model=last["model"]), home / "models" / last["model"]
    files.verify_folder(folder)
    journals, reference = [*home.glob("journal.jsonl")], read_reference(folder)
    journal, size = read_journal(journals, last["model"]), limits.first_requests
    findings = Watch(reference, window=limits.window).look(journal.records)
    is_new = last["event"] == "promote" and last["replaces"]
    first = Watch(reference, window=size // 2).look(journal.records[:size]) if is_new else []
    plans = {line["plan"]: line for line in registry.lines if "plan" in line}
    planned = {id_ for line in plans.values() for id_ in line["rows"]}
    learned, name = set(), last["model"]
    while name in plans:
        learned |= {*plans[name]["rows"]}
        name = plans[name]["inputs"]["model"]
    task, named = configured(home / since["run"]).task, read_journal(journals).records
    rated = [each for each in named if "wanted" in each and each["id"] not in learned]
    rows = [*filter(None, (_example(each, task) for each in rated))]
    known = plans.get(last["model"], {"inputs": {"findings": []}})["inputs"]["findings"]
    return {
        "model": last["model"], "requests": len(journal.records), "counts": journal.counts,
        "findings": [each._asdict() for each in findings],
        "first": [each._asdict() for each in first],
        "known": [each["signal"] for each in known if each["state"] == 2],
        "unfit": len(rated) - len(rows), "labelled": sum(row.id not in planned for row in rows),
        "hours": (time.time() - registry.last("promote")["time"]) / 3600,
        "days": (time.time() - since["time"]) / 86400}, rows

def configured(folder: Path) -> Command:
    """What a run, or a plan, was made to do. ConfigError: it cannot be done again."""
    task, flags = read_toml(folder / CONFIG_FILE)
    data = (command := resolved(task, [(str(folder / CONFIG_FILE), flags)])).config.data
    odd = [name for name in ("pair", "label_separator", "group") if getattr(data, name, "")]
    if task not in ("classify", "sft") or odd or not data.test:
        what = "classify (a text, one label) and sft runs with --data.test, without --data.group"
        raise ConfigError(f"{folder}: can be trained again of {what}; promote such a run")
    return command

def _example(record: Line, task: str) -> Example | None:
    """A record as a row; None: of another kind, or without text."""
    said, wanted = record.get("input") or "", record["wanted"]
    fields = {"text": said, "label": wanted}
    if task == "sft":
        fields = {"messages": [*said, {"role": "assistant", "content": wanted}]}
    with suppress(DataError):
        return examples([Row(record["id"], "journal", 0, fields)], RUNS[task]().data)[0][0]
    return None

def _write_plan(registry: Registry, line: Line, rows: Sequence[Example]) -> list[str]:
    """HOME/plans/N; returns the ids of the new rows."""
    home, model = registry.home.absolute(), line["inputs"]["model"]
    run, folder = home / registry.last("promote", model=model)["run"], home / "plans" / line["plan"]
    command = configured(run)
    config, found = command.config, collect(command.config.data, {})
    parts = {split if split in ("train", "dev") else f"test-{n}": part.examples
             for n, (split, part) in enumerate(found.items())}
    sides = [], []
    for row, root in zip(rows, clusters(rows), strict=True):  # what is alike is on one side
        sides[int(_sha(rows[root].id.encode()), 16) % GATE_SHARE == 0].append(row)
    if not all(sides):
        raise DataError(f"{home}: {len(rows)} labelled rows are too few, or too much alike, to"
                        " train on some and keep others for the gate: collect more")
    old = len(parts["train"])
    parts |= {"train": parts["train"] + sides[0], "recent": sides[1]}
    plain = RUNS[command.task]().data
    data = {name: getattr(plain, name) for name in FORM if hasattr(plain, name)}
    data |= {kind: [f"{folder}/{name}.jsonl" for name in parts if name.startswith(kind)]
             for kind in ("train", "dev", "test")}
    words = as_flags({"data": data, "log": {"dir": folder, "name": "run"}})
    layers = [(str(run), read_toml(run / CONFIG_FILE)[1]), (f"plan {line['plan']}", [*words])]
    ids = [[row.id for row in side] for side in sides]
    about = {"told": read_run(run), "task": command.task, "folder": folder, "home": home, "most_lost": MOST_LOST,
             "old": old, "trained": ids[0], "recent": ids[1],
             "steps": config.loop.num_steps(len(parts["train"]), config.rows_per_step)}
    texts = {"plan.toml": rendered("plan.toml", HERE, **line, **about),
             CONFIG_FILE: to_toml(resolved(command.task, layers))}
    texts |= {f"{name}.jsonl": "".join(json.dumps(_plain(row)) + "\n" for row in part)
              for name, part in parts.items()}
    files.write_folder(folder, lambda temp: [
        (temp / name).write_text(text, "utf-8") for name, text in texts.items()])
    return ids[0] + ids[1]

def _plain(row: Example) -> Line:
    return {"id": row.id, **({"messages": row.messages} if isinstance(row, Chat) else
                             {"text": row.texts[0], "label": row.target})}

def run(home: Path) -> str:
    """Train by the last plan, and bundle it; returns the candidate's name. ConfigError: it was
    run; CheckpointError: rows of it vanished; TrainingError: train.py stopped."""
    registry = Registry(home)
    name = registry.last("decide", answer="propose").get("plan")
    if name is None or registry.last("candidate", model=name):
        raise ConfigError(f"{home}: there is no plan that was not run yet")
    folder, target = home / "plans" / name, home / "models" / name
    files.verify_folder(folder)
    if not target.is_dir():
        made = folder / "run"
        words = ["--resume", made] if (made / CONFIG_FILE).is_file() else [
            configured(folder).task, "--config", folder / CONFIG_FILE]
        command = [sys.executable, HERE.parents[1] / "train.py", *words]
        if code := subprocess.run(command, check=False).returncode:
            raise TrainingError(f"{made}: train.py ended with {code} and said why; then run again")
        bundle(made, target)
    with writing(home) as registry:
        return registry.append("candidate", model=name, run=f"plans/{name}/run")["model"]

def gate(home: Path) -> Line:
    """Judge the last candidate beside the active model, on the same rows; returns the line."""
    name, model = Registry(home).last("candidate").get("model"), active(home)
    if name is None or model is None:
        raise ConfigError(f"{home}: there is no candidate beside a model; first run a plan")
    files.verify_folder(folder := home / "plans" / name)
    command = configured(folder)
    parts = {"recent": [folder / "recent.jsonl"], "frozen": command.config.data.test}
    rows = {part: examples(read_rows(paths), command.config.data)[0]
            for part, paths in parts.items()}
    right = [_right(home / "models" / each, command, rows) for each in (name, model)]
    inputs = {"candidate": name, "active": model, "most_lost": MOST_LOST}
    for part, some in rows.items():
        one, two = (lambda rows_M, right_B=each[part]: {"right": float(right_B[rows_M].mean())}
                    for each in right)
        inputs[part] = {"rows": len(some), **compare(one, two, np.array(clusters(some)))["right"]}
    answer, reasons = judge(inputs)
    with writing(home) as registry:
        return registry.append("gate", inputs=inputs, answer=answer, reasons=reasons)

@torch.inference_mode()
def _right(folder: Path, command: Command,
           parts: Mapping[str, Sequence[Example]]) -> dict[str, np.ndarray]:
    """Of each part whether a bundle says what is wanted of its rows (bool)."""
    (loaded, tokenizer, _), config, right = open_bundle(folder), command.config, {}
    model = loaded.model.to(config.env.device)
    for name, rows in parts.items():
        if command.task == "sft":
            wanted = [row.messages[-1]["content"] for row in rows]
            prompts = [encode_prompt(row.messages[:-1], tokenizer) for row in rows]
            said = greedy(model, tokenizer, prompts, config.eval.max_new_tokens)
        else:
            wanted, texts = [row.target for row in rows], [row.texts for row in rows]
            ids = tokenizer.encode_pairs(texts, max_length=config.data.max_length)
            documents = [Encoded(row.id, ids_T, 0, 1.0, types_T)
                         for row, (ids_T, types_T) in zip(rows, ids, strict=True)]
            limits = {"max_tokens": config.loop.micro_batch_tokens, "device": model.device}
            said = [loaded.labels[k] for k in all_logits(model, documents, **limits).argmax(1)]
        right[name] = np.array([*map(exact_match, wanted, said)])
    return right

def promote(home: Path, run: Path | None = None) -> str:
    """Make a run the active model, or the last candidate if its gate passed; returns its name."""
    with writing(home) as registry:
        if run is not None:
            configured(run)
            name = str(len(registry.lines) + 1)
            files.remove(home / "models" / name)  # what a kill left
            bundle(run, home / "models" / name)
            return registry.use("promote", name, run=str(run.absolute()))["model"]
        made, gated = registry.last("candidate"), registry.last("gate")
        told = [gated.get("inputs", {}).get(key) for key in ("candidate", "active")]
        if gated.get("answer") != "pass" or told != [made["model"], active(home)]:
            why = "; ".join(gated.get("reasons", ["there was none"]))
            raise ConfigError(f"{home}: the gate beside the active model must pass first: {why}")
        if registry.last("promote", model=made["model"]):
            raise ConfigError(f"{home}: model {made['model']} was rolled back; make another plan")
        return registry.use("promote", made["model"], run=made["run"])["model"]

def rollback(home: Path) -> str:
    """Make the model active that the active one replaced; returns its name."""
    with writing(home) as registry:
        last = registry.last("promote", model=active(home))
        if not last.get("replaces"):
            raise ConfigError(f"{home}: no model was active before; promote a run")
        return registry.use("rollback", last["replaces"])["model"]

def replay(home: Path) -> int:
    """Decide all again; returns how many decisions. CheckpointError: one comes out otherwise."""
    lines = [line for line in Registry(home).lines if "inputs" in line]
    for line in lines:
        inputs, limits = line["inputs"], line.get("limits")
        answer, why = judge(inputs) if limits is None else decide(inputs, Limits(**limits))
        if answer != line["answer"]:
            what = f"inputs of {line['event']} at {line['time']} give {answer} ({'; '.join(why)})"
            raise CheckpointError(f"{home}: {what}, it says {line['answer']}: the rules changed")
    return len(lines)
