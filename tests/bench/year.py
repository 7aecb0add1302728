"""A year of traffic in minutes: does monitoring find what moved, and what is its plan worth?

    python -m tests.bench.year --data DIR                         all, a quarter of an hour or more
    python -m tests.bench.year --data DIR --only stable sudden    some scenarios, of a run kept

A classifier (MiniLM, 22 M parameters) of 100 of the 150 intents of CLINC150 is trained by train.py
and served by serve.py with a log. Every week asks for the intents of 500 texts that training did
not see, gives feedback for 100 of them, and asks `python -m ftcore.monitor plan` for a decision:

stable      nothing moves
sudden      from week 5 on a third of the texts have one of the 50 other intents
slow        their share grows by 3 points a week
seasonal    the shares of intents swing, each by up to nine tenths in twelve weeks
label-only  from week 5 on feedback swaps 20 intents in pairs, the texts stay as they are
rate        no weeks: requests a second with a log of texts, and with none

The server follows a link. `sudden` goes on as cron would: `run` does the plan, `promote` lets the
new model answer if it passed, and the next `plan` may take it back or train again, all under
traffic. On what came later, three models: the old one, that of the plan, and one trained on
everything that was told till then. The last line is JSON.
"""

import argparse
import gzip
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
import numpy as np
from ftcore.monitor.journal import read_journal
from ftcore.monitor.retrain import Limits, plan, promote, rollback
from tests.bench.sst2 import model_folder
from tests.bench.tasks import write

KNOWN, WEEK, MOST = 100, 500, 256  # intents; texts of a week, and at most of a request
PARTS = {"train": 40, "test": 9}  # rows of an intent; all others are traffic
LIMITS = Limits(cooldown_hours=0)
WEEKS = {"stable": 20, "sudden": 12, "slow": 14, "seasonal": 12, "label-only": 14}
LATER = 4  # weeks after a plan, if no other plan comes before
RECIPE = ("--preset small --optim.lr 5e-4 --loop.epochs 4 --data.holdout 1000"
          " --loop.eval-every 100000")
Row = tuple[str, str]  # text, intent

def log(*words: Any) -> None:
    print(f"{time.perf_counter() - BEGAN:6.0f} s ", *words, file=sys.stderr, flush=True)

BEGAN = time.perf_counter()

class World:
    """Traffic: texts of an intent come once each, in an order that the seed gives."""

    def __init__(self, file: Path, folder: Path, seed: int) -> None:
        parts, random = json.loads(gzip.decompress(file.read_bytes())), np.random.default_rng(seed)
        texts: dict[str, list[str]] = {}
        seen: set[str] = set()
        for text, intent in parts["train"] + parts["val"] + parts["test"]:
            if text not in seen:
                seen.add(text)
                texts.setdefault(intent, []).append(text)
        intents = random.permutation(sorted(texts)).tolist()
        self.known, self.new = intents[:KNOWN], intents[KNOWN:]
        self.random, rows = random, {name: [] for name in PARTS}
        self.pool = {intent: random.permutation(texts[intent]).tolist() for intent in intents}
        for intent in self.known:
            for name, count in PARTS.items():
                rows[name] += [(self.pool[intent].pop(), intent) for _ in range(count)]
        folder.mkdir(parents=True, exist_ok=True)
        for name, some in rows.items():
            write(folder / f"{name}.jsonl", as_lines(some))

    def week(self, name: str, week: int) -> list[Row]:
        share = {"sudden": (week > 4) / 3, "slow": 0.03 * week}.get(name, 0.0)
        new = round(WEEK * share)
        swing = [1 + 0.9 * math.sin(2 * math.pi * (week / 12 + at / KNOWN)) * (name == "seasonal")
                 for at in range(KNOWN)]
        rows = self._drawn(self.known, swing, WEEK - new) + self._drawn(self.new, [1.0] * 50, new)
        return [rows[at] for at in self.random.permutation(len(rows))]

    def _drawn(self, intents: Sequence[str], factors: Sequence[float], count: int) -> list[Row]:
        rows = []
        for _ in range(count):
            p = np.array([len(self.pool[intent]) for intent in intents]) * factors
            intent = intents[self.random.choice(len(intents), p=p / p.sum())]
            rows.append((self.pool[intent].pop(), intent))
        return rows

def as_lines(rows: Iterable[Row]) -> list[dict[str, str]]:
    return [{"text": text, "label": intent} for text, intent in rows]

class Server:
    """serve.py on loopback, and what was sent to it."""

    def __init__(self, run: Path, *words: str) -> None:
        self.words = [sys.executable, "serve.py", str(run), "--port", "0", *words]
        self.texts = self.feedbacks = 0

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self.words, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        for line in self.process.stdout:
            if line.startswith("serving"):
                self.url = line.split(" at ")[1].partition(";")[0]
                return self
        raise RuntimeError(f"died with exit code {self.process.wait()}: {shlex.join(self.words)}")

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer; a refusal raises."""
        head = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.url}/v1/{route}", json.dumps(body).encode(), head)
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return json.load(answer)

    def classified(self, texts: Sequence[str]) -> list[tuple[str, int, str]]:
        """Request, index and label of each text."""
        found = []
        for some in (texts[at : at + MOST] for at in range(0, len(texts), MOST)):
            told = self.post("classify", {"input": [*some]})
            found += [(told["id"], each["index"], each["label"]) for each in told["data"]]
        self.texts += len(found)
        assert len(found) == len(texts)
        return found

    def feedback(self, request: str, index: int, label: str) -> None:
        self.post("feedback", {"request_id": request, "index": index, "label": label})
        self.feedbacks += 1

    def cpu(self) -> float:
        """Seconds that it has computed."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def follow(self, model: Path) -> None:
        """Wait until a model that was promoted, or taken back to, answers."""
        for line in self.process.stdout:
            if line.startswith(f"{model.name} answers instead"):
                return
        raise RuntimeError(f"ended with {self.process.wait()}, {model.name} did not answer")

    def lost(self) -> int:
        """Lines that the server could not write to its log."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            told = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines())
        return int(float(told["ft_lines_lost_total"]))

def lived(server: Server, rows: Sequence[Row], wanted: dict[str, str],
          random: np.random.Generator, told: int) -> float:
    """A week; its true accuracy, as feedback has it."""
    found = server.classified([text for text, _ in rows])
    labels = [wanted.get(intent, intent) for _, intent in rows]
    for at in random.permutation(len(rows))[:told]:
        server.feedback(*found[at][:2], labels[at])
    return statistics.mean(said == label for (_, _, said), label in zip(found, labels, strict=True))

def decided(run: Path, file: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What plan tells, and of it what is shown of a week."""
    start = time.perf_counter()
    told = plan(run, file, folder, LIMITS)
    inputs = told["inputs"]
    loud = {state: sorted({each["signal"] for each in inputs["findings"] if each["state"] == state})
            for state in (1, 2)}
    values = {each["statistic"]: [round(each["value"], 3), round(each["bound"], 3)]
              for each in inputs["findings"] if each["statistic"] in ("drop", "accuracy")}
    about = {"answer": told["answer"], "moved": loud[1], "twice": loud[2], **values,
             "labelled": inputs["labelled"], "seconds": round(time.perf_counter() - start, 1)}
    return told, about

def scenario(name: str, run: Path, data: Path, said: argparse.Namespace) -> dict[str, Any]:
    """All its weeks from a fresh log; where `sudden` is found, the plan is followed."""
    folder = said.runs / name
    folder.mkdir()
    world, file = World(data, folder / "data", said.seed), folder / "log.jsonl"
    swapped = world.random.permutation(world.known)[:20].tolist()
    wanted = dict(zip(swapped, swapped[10:] + swapped[:10], strict=True))
    weeks, told, plans, link = [], {}, [], folder / "live"
    promote(link, run)
    words = ["--log", str(file), "--log-texts", "--threads", str(said.threads)]
    with Server(link, *words) as server:
        for week in range(1, WEEKS[name] + 1):
            meant = wanted if name == "label-only" and week > 4 else {}
            accuracy = lived(server, world.week(name, week), meant, world.random, said.told)
            told, about = decided(link, file, folder / f"plan-{week}")
            weeks.append({"week": week, "true accuracy": round(accuracy, 3), **about})
            log(name, *(f"{key}: {value}" for key, value in weeks[-1].items()))
            if name == "sudden" and told["answer"] == "train":
                while told["answer"] == "train" and len(plans) < said.plans:
                    one, told, week = followed(world, server, link, week, file, said)
                    plans.append(one)
                break
        texts, feedbacks, lost = server.texts, server.feedbacks, server.lost()
    journal = read_journal(file)
    found = {
        "proposals": [each["week"] for each in weeks if each["answer"] == "train"],
        "alarms": {signal: [each["week"] for each in weeks if signal in each["twice"]]
                   for signal in sorted({s for each in weeks for s in each["twice"]})},
        "moved once": {signal: [each["week"] for each in weeks if signal in each["moved"]]
                       for signal in sorted({s for each in weeks for s in each["moved"]})},
        "lost": {"texts": texts - len(journal.records), "lines": lost, "feedback": feedbacks - sum(
            "wanted" in record for record in journal.records), "odd": journal.told()},
        "weeks": weeks}
    return found | ({"plans": plans} if plans else {})

def called(words: str | Sequence[str], *, may_fail: bool = False) -> tuple[int, float]:
    """A command's exit code and seconds; it must succeed, or say by 1 that the answer is no."""
    words = shlex.split(words) if isinstance(words, str) else [*map(str, words)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    said = f"{shlex.join(words)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert done.returncode in (0, int(may_fail)), said
    return done.returncode, time.perf_counter() - start

def followed(world: World, server: Server, link: Path, week: int, file: Path,
             said: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A plan done, and the weeks after it, up to the next one; what that told, and its week."""
    folder, old = link.with_name(f"plan-{week}"), link.resolve()
    table = tomllib.loads((folder / "plan.toml").read_text("utf-8"))
    found: dict[str, Any] = {key: table[key] for key in ("reasons", "rows", "cost")}
    failed, seconds = called(["python", "-m", "ftcore.monitor", "run", folder], may_fail=True)
    verdict = json.loads((folder / "verdict.json").read_text("utf-8"))
    found["run"] = {"answer": verdict["answer"], "why": verdict["reasons"],
                    "seconds": round(seconds, 1)}
    log("plan of week", week, found["run"])
    if not failed:
        promote(link, folder)
        server.follow(folder)
    new, whole = folder / f"{folder.name}{'-judged' * failed}", folder.with_name(f"whole-{week}")
    others = folder.parent.glob("plan-*/*.jsonl")  # what comes again in a later plan counts once
    called(["python", "train.py", "classify", "--config", folder / "config.toml", "--data.train",
            run_data(said) / "train.jsonl", *(each for each in others if each.read_text()),
            "--log.dir", whole.parent, "--log.name", whole.name])
    rows, weeks, told = [], [], {}
    for later in range(week + 1, week + 1 + LATER):
        rows += (some := world.week("sudden", later))
        accuracy = lived(server, some, {}, world.random, said.told)
        told, about = decided(link, file, folder.with_name(f"plan-{later}"))
        weeks.append({"week": later, "true accuracy": round(accuracy, 3),
                      "reasons": told["reasons"], **about})
        log("after the plan", *(f"{key}: {value}" for key, value in weeks[-1].items()))
        if told["answer"] == "train":
            break
        if told["answer"] == "go back":
            server.follow(Path(rollback(link)))
    for name, model in {"old": old, "plan": new, "all told": whole}.items():
        with Server(model, "--threads", str(said.threads)) as other:
            labels = [label for _, _, label in other.classified([text for text, _ in rows])]
        right = {kind: [said == intent for said, (_, intent) in zip(labels, rows, strict=True)
                        if (intent in world.known) == (kind == "known")]
                 for kind in ("known", "new")}
        parts = {kind: round(statistics.mean(some), 4) for kind, some in right.items()}
        both = statistics.mean(right["known"] + right["new"])
        found.setdefault("later", {})[name] = {"accuracy": round(both, 4), **parts}
        log("on", len(rows), "later texts", name, found["later"][name])
    return {**found, "weeks": weeks}, told, later

def run_data(said: argparse.Namespace) -> Path:
    return said.runs / "data"

def rate(run: Path, data: Path, said: argparse.Namespace) -> dict[str, Any]:
    """Requests a second, servers taking turns: of one text from 8 clients, of 250 texts from 1."""
    world, file = World(data, said.runs / "rate", said.seed), said.runs / "rate" / "log.jsonl"
    texts = [world.pool[intent][at] for at in range(16) for intent in world.known]
    threads = ["--threads", str(said.threads)]
    kinds = {"no log": [], "log": ["--log", str(file)],
             "log of texts": ["--log", f"{file}-texts", "--log-texts"]}
    servers = {kind: Server(run, *threads, *words) for kind, words in kinds.items()}
    found: dict[str, Any] = {kind: {"one": [], "many": [], "cpu": []} for kind in kinds}
    for turn in range(1 + said.rounds):  # the first is not counted
        for kind, server in servers.items():
            with server, ThreadPoolExecutor(8) as clients:
                server.classified(texts[:64])
                start, cpu = time.perf_counter(), server.cpu()
                [*clients.map(lambda text, at=server: at.classified([text]), texts[:600])]
                half = time.perf_counter()
                for at in range(0, 1500, 250):
                    server.classified(texts[at : at + 250])
                end, cpu = time.perf_counter(), server.cpu() - cpu
                lost = server.lost()
            if turn:
                found[kind]["one"].append(round(600 / (half - start), 1))
                found[kind]["many"].append(round(1500 / (end - half), 1))
                found[kind]["cpu"].append(round(2100 / cpu, 1))  # texts by seconds of the server
            log("rate", kind, round(600 / (half - start), 1), round(1500 / (end - half), 1), lost)
    sent, turns = 64 + 600 + 1500, 1 + said.rounds
    lost = {kind: sent * turns - len(read_journal(Path(words[1]), run.name).records)
            for kind, words in kinds.items() if words}
    share = {f"log of texts over none, {load}": round(statistics.median(
        a / b for a, b in zip(found["log of texts"][load], found["no log"][load], strict=True)), 3)
        for load in ("one", "many", "cpu")}
    return found | {"lost": lost} | share

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.year")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/year"))
    parser.add_argument("--only", nargs="*", default=[*WEEKS, "rate"], choices=[*WEEKS, "rate"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--told", type=int, default=100, help="texts of a week with feedback")
    parser.add_argument("--plans", type=int, default=2, help="that `sudden` follows, at most")
    parser.add_argument("--rounds", type=int, default=3, help="of rate")
    said = parser.parse_args()
    said.runs, data = said.runs.absolute(), said.data / "clinc150/data_full.json.gz"
    run, found = said.runs / "served", {}
    if not (run / "eval.json").is_file():
        World(data, run_data(said), said.seed)
        words = ["python", "train.py", "classify", "--model.path", model_folder(),
                 "--data.train", f"{run_data(said)}/train.jsonl", *shlex.split(RECIPE),
                 "--data.test", f"{run_data(said)}/test.jsonl", "--env.seed", str(said.seed),
                 "--env.threads", str(said.threads),
                 "--log.dir", str(said.runs), "--log.name", run.name]
        _, seconds = called(words)
        found["train"] = {"command": shlex.join(words), "seconds": round(seconds, 1)}
    tuned = json.loads((run / "eval.json").read_text("utf-8"))["tuned"]
    found["test accuracy"] = tuned["test"]["accuracy"]
    log(found)
    for name in said.only:
        found[name] = rate(run, data, said) if name == "rate" else scenario(name, run, data, said)
    print(json.dumps({"year": found, "seconds": round(time.perf_counter() - BEGAN)}))

if __name__ == "__main__":
    main()
