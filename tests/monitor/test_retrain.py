"""The loop from feedback to the next model: decided, trained, judged, promoted, taken back."""

import json
import os
import shutil
import signal
import tomllib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from ftcore import files as disk
from ftcore.deploy import bundle as bundles
from ftcore.errors import CheckpointError, ConfigError, DataError, TrainingError
from ftcore.monitor import retrain
from ftcore.monitor.retrain import (
    Limits,
    Registry,
    gate,
    plan,
    promote,
    replay,
    rollback,
    run,
)
from tests.commands.conftest import SCRIPTS, classify, sft  # noqa: F401

HOME = Path("home")
FEW = Limits(min_labelled=20, cooldown_hours=0, first_requests=20, window=10)
COLOURS = {"warm": ("green", "lime"), "cold": ("pink", "rose")}  # the first model never saw them

class Finding(NamedTuple):
    signal: str
    statistic: str
    value: float
    bound: float
    state: int | None
    size: int = 10
    p_value: float | None = None

class Watch:
    """Two signals by the crudest of rules: what people say, and the length of prompts."""

    def __init__(self, reference: Sequence[dict], *, window: int, seed: int = 0) -> None:
        self.reference, self.window = reference, window

    def look(self, records: Sequence[dict]) -> list[Finding]:
        size, found = self.window, []
        for signal_, statistic, sign in (("right", "accuracy", -1), ("prompt_tokens", "psi", 1)):
            def mean(some: Sequence[dict], key: str = signal_) -> float:
                values = [float(each[key]) for each in some if key in each]
                return sum(values) / len(values) if values else 0.0

            moves = [sign * (mean(part) - mean(self.reference))
                     for part in (records[-size:], records[-2 * size : -size])]
            state = sum(move > 0.02 for move in moves) if len(records) >= 2 * size else None
            found.append(Finding(signal_, statistic, moves[0], 0.02, state))
        return found

def bundle(made: Path, folder: Path) -> None:
    """With another reference."""
    assert not folder.exists()
    disk.remove(whole := made / "bundle")
    bundles.bundle(made, whole)
    (whole / "reference.jsonl").write_text('{"prompt_tokens": 9, "right": true}\n' * 20)
    (whole / "manifest.json").unlink()
    with disk.write_folder(folder) as temp:
        shutil.copytree(whole, temp, dirs_exist_ok=True)

@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrain, "Watch", Watch)
    monkeypatch.setattr(retrain, "bundle", bundle)

@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """train.py without a process of its own."""
    def call(words: list, check: bool) -> SimpleNamespace:
        return SimpleNamespace(returncode=SCRIPTS["train"].main([*map(str, words[2:])]))

    monkeypatch.setattr(retrain, "subprocess", SimpleNamespace(run=call))

@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folder of a run that `first` makes once, and a HOME where it was promoted."""
    return [tmp_path_factory.mktemp("made")]

@pytest.fixture
def first(made: list[Path], classify: list[str]) -> Path:  # noqa: F811
    """A classifier that was trained and promoted."""
    run, home = made[0] / "run", made[0] / "home"
    if not home.exists():
        words = ["--loop.epochs", "20", "--log.dir", str(made[0])]
        assert SCRIPTS["train"].main([*classify, *words]) == 0
        assert promote(home, run) == "1"
    shutil.copytree(run, "runs/run")
    shutil.copytree(home, HOME)
    return HOME

def ask(count: int, *, model: str = "1", right: bool = False, rated: bool = True,
        start: int = 0, tokens: int = 9) -> None:
    """Requests, and what people said of their answers."""
    lines = []
    for number in range(start, start + count):
        wanted = ("warm", "cold")[number % 2]
        text = f"the {COLOURS[wanted][number // 2 % 2]} {chr(97 + number % 26) * 4} item {number}"
        said = wanted if right else {"warm": "cold", "cold": "warm"}[wanted]
        row = {"prompt_tokens": tokens, "label": said, "confidence": 0.9, "entropy": 0.3,
               "input": text, "answer": said}
        id_ = f"{number:024x}"
        lines.append({"time": 1e9 + number, "id": id_, "route": "/v1/classify", "end": "ok",
                      "status": 200, "seconds": 0.01, "model": model, "rows": [row]})
        if rated:
            told = {"request_id": id_, "index": 0, "label": wanted}
            lines.append({"time": 1e9 + number, "id": f"{number + 2**40:024x}", "model": model,
                          "route": "/v1/feedback", "end": "ok", "status": 200, "feedback": told})
    note(*map(json.dumps, lines))

def active(home: Path) -> str | None:
    return Registry(home).active()

def note(*lines: str) -> None:
    with open(HOME / "journal.jsonl", "a") as file:
        file.write("".join(line + "\n" for line in lines))

def events() -> list[str]:
    return [line["event"] for line in Registry(HOME).lines]

def rows(path: Path) -> list[dict[str, Any]]:
    return [*map(json.loads, path.read_text().splitlines())]

def is_whole() -> bool:
    name = active(HOME)
    return name is not None and bool(disk.verify_folder(HOME / "models" / name))

def test_from_feedback_to_the_next_model_and_back(first: Path) -> None:
    ask(60)
    told = plan(HOME, FEW)
    assert (told["answer"], told["plan"]) == ("propose", "2")
    assert "right: accuracy" in told["reasons"][0]
    folder = HOME / "plans" / "2"
    old = [row for row in rows(folder / "train.jsonl") if ":" not in row["id"]]
    new, kept = rows(folder / "train.jsonl")[len(old):], rows(folder / "recent.jsonl")
    assert len(old) == 24 and len(new) + len(kept) == 60 and 6 <= len(kept) <= 25
    assert not {row["text"] for row in new} & {row["text"] for row in kept}
    assert len(rows(folder / "test-1.jsonl")) == 10
    about = tomllib.loads((folder / "plan.toml").read_text())
    assert about["rows"] == {"old": 24, "trained": [row["id"] for row in new],
                             "recent": [row["id"] for row in kept]}
    assert about["cost"]["steps"] == 20 * -(-(24 + len(new)) // 8) and about["cost"]["seconds"] > 0
    assert about["cost"]["memory_bytes"] > 1000 and about["reasons"] == told["reasons"]
    assert plan(HOME, FEW)["answer"] == "wait"  # its rows are in a plan

    assert run(HOME) == "2" and active(HOME) == "1"  # with a real train.py
    with pytest.raises(ConfigError, match="no plan that was not run yet"):
        run(HOME)
    with pytest.raises(ConfigError, match="must pass first: there is none"):
        promote(HOME)
    judged = gate(HOME)
    assert judged["answer"] == "pass", judged
    assert judged["inputs"]["recent"]["rows"] == len(kept)
    assert promote(HOME) == "2" and active(HOME) == "2" and is_whole()

    ask(20, model="2", right=True, start=200)
    assert plan(HOME, FEW)["answer"] == "wait"
    assert plan(HOME, FEW)["inputs"]["labelled"] == 20
    assert len(retrain._inputs(Registry(HOME), FEW)[1]) == 20  # the others it has learned
    assert rollback(HOME) == "1" and is_whole()
    with pytest.raises(ConfigError, match="must pass first: there is none"):
        promote(HOME)
    with pytest.raises(ConfigError, match="no model was active before"):
        rollback(HOME)
    assert replay(HOME) == 5
    told = plan(HOME, FEW)  # the rows of the plan that did not last come again
    assert told["answer"] == "propose" and len(told["rows"]) == 80

def test_a_new_model_is_taken_back_by_its_first_requests(first: Path) -> None:
    (HOME / "models" / "2" / "left").mkdir(parents=True)  # by a kill
    assert promote(HOME, Path("runs/run")) == "2"
    ask(100, model="1")  # of the model before: not its fault
    ask(19, model="2", start=300)
    assert plan(HOME, FEW)["answer"] == "wait"
    ask(20, model="2", start=400)
    assert plan(HOME, FEW)["answer"] == "rollback" and active(HOME) == "1"
    assert events()[-2:] == ["decide", "rollback"] and replay(HOME) == 2
    assert plan(HOME, FEW)["answer"] == "propose"

def test_later_requests_do_not_take_it_back(first: Path) -> None:
    assert promote(HOME, Path("runs/run")) == "2"
    ask(20, model="2", right=True)
    ask(40, model="2", start=100)
    assert plan(HOME, FEW)["answer"] == "propose" and active(HOME) == "2"

def test_chats_are_planned_and_judged(sft: list[str], train_here: None) -> None:  # noqa: F811
    assert SCRIPTS["train"].main([*sft, "--loop.epochs", "2"]) == 0
    promote(HOME, Path("runs/run"))
    lines = []
    for number in range(40):
        text = f"make thing {chr(97 + number % 26) * 3} {number} red"
        asked = [{"role": "user", "content": text}]
        row = {"prompt_tokens": 9, "right": False, "input": asked, "answer": "?"}
        lines += [{"time": 1.0, "id": f"{number:024x}", "model": "1", "rows": [row]},
                  {"time": 1.0, "id": f"{number + 99:024x}", "model": "1", "feedback": {
                      "request_id": f"{number:024x}", "index": 0, "text": "better"}}]
    note(*map(json.dumps, lines))
    assert plan(HOME, FEW)["answer"] == "propose"
    chats = rows(HOME / "plans" / "2" / "train.jsonl")
    assert chats[-1]["messages"][-1]["content"] == "better" and len(chats) > 40
    run(HOME)
    assert gate(HOME)["inputs"]["frozen"]["rows"] == 6

def test_a_candidate_that_is_no_better_stays_outside(first: Path) -> None:
    ask(40)
    plan(HOME, FEW)
    shutil.copytree(HOME / "models" / "1", HOME / "models" / "2")
    assert run(HOME) == "2"  # its bundle was there: a kill came before the line
    assert gate(HOME)["answer"] == "fail"
    with pytest.raises(ConfigError, match=r"must pass first: recent: of \d+ rows \+0.0000 right"):
        promote(HOME)
    ask(40, start=100)  # rows of the plan that failed are not lost
    assert len(plan(HOME, FEW)["rows"]) == 80

def test_bad_lines_of_the_journal_are_counted(first: Path) -> None:
    ask(30)
    before = plan(HOME, Limits())["inputs"]
    unknown = {"request_id": "f" * 24, "index": 0, "label": "warm"}
    twice = {"request_id": f"{3:024x}", "index": 0, "label": "warm"}
    line = {"id": "e" * 24, "model": "1", "time": 5.0, "rows": []}
    note('{"time": 1e9, "id"', json.dumps(line), json.dumps({**line, "feedback": unknown}),
         json.dumps({**line, "feedback": twice}))
    ask(10, model="another", start=50)
    strange = {"prompt_tokens": 9, "label": "warm", "input": [{"role": "user", "content": "a"}]}
    note(json.dumps({**line, "id": "d" * 24, "rows": [strange]}),
         json.dumps({**line, "feedback": {"request_id": "d" * 24, "index": 0, "label": "cold"}}))
    inputs = plan(HOME, Limits())["inputs"]
    assert inputs["requests"] == before["requests"] + 1 and inputs["unfit"] == 1
    assert inputs["labelled"] == before["labelled"] + 10  # also of what another model answered
    assert sum(inputs["counts"].values()) >= sum(before["counts"].values()) + 14

def test_refusals(first: Path, classify: list[str], train_here: None) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="other: there is no model; first promote the run"):
        plan(Path("other"), FEW)
    with pytest.raises(ConfigError, match="there is no plan"):
        run(HOME)
    with pytest.raises(ConfigError, match="there is no candidate; first run"):
        gate(HOME)
    with pytest.raises(ConfigError, match="a gate beside the active model must pass first"):
        promote(HOME)
    with pytest.raises(ConfigError, match="no model was active before"):
        rollback(HOME)
    place = classify.index("--data.test")
    assert SCRIPTS["train"].main(
        [*classify[:place], *classify[place + 2 :], "--log.name", "untested"]) == 0
    with pytest.raises(ConfigError, match="untested: can be trained again of classify .* --data.t"):
        promote(HOME, Path("runs/untested"))
    ask(40)
    plan(HOME, FEW)
    (HOME / "plans" / "2" / "train.jsonl").unlink()
    with pytest.raises(CheckpointError, match="plans/2/train.jsonl is missing"):
        run(HOME)
    (HOME / "models" / "1" / "reference.jsonl").write_text("{}")
    with pytest.raises(CheckpointError, match="reference.jsonl was altered"):
        plan(HOME, FEW)
    assert active(HOME) == "1" and events() == ["promote", "decide"]
    with retrain.writing(HOME) as registry:  # while it was judged, another model became active
        registry.append("gate", inputs={"candidate": "2", "active": "0"}, answer="pass")
    with pytest.raises(ConfigError, match="a gate beside the active"):
        promote(HOME)

def test_training_that_stops_is_told(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(40)
    plan(HOME, FEW)
    stops = lambda words, check: SimpleNamespace(returncode=4)  # noqa: E731
    monkeypatch.setattr(retrain, "subprocess", SimpleNamespace(run=stops))
    with pytest.raises(TrainingError, match="plans/2/run: train.py ended with 4"):
        run(HOME)

def test_rows_that_are_all_alike_make_no_plan(first: Path) -> None:
    ask(40)
    path = HOME / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row in (row for line in lines for row in line.get("rows", ())):
        row["input"] = "one and the same text"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="40 labelled rows are too few or too much alike"):
        plan(HOME, FEW)

def test_what_is_decided_otherwise_is_named(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(30)
    plan(HOME, FEW)
    assert replay(HOME) == 1
    monkeypatch.setattr(retrain, "decide", lambda inputs, limits: ("wait", ["new rules"]))
    with pytest.raises(CheckpointError, match="said propose, its inputs give wait .new rules"):
        replay(HOME)

def killed(step: Callable[[], Any], count: int) -> bool:
    """Whether a kill came, just before the `count`th write that a child puts on the disk."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        left = [count]

        def counted(name: str) -> None:
            call = getattr(os, name)

            def wrapped(*words: Any, **named: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*words, **named)

            setattr(os, name, wrapped)

        for name in ("fsync", "rename", "mkdir", "unlink"):
            counted(name)
        code = 1
        try:
            step()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0

def test_a_kill_at_any_step_leaves_one_active_model(first: Path, train_here: None) -> None:
    ask(40)
    steps = [("decide", lambda: plan(HOME, FEW), "1"), ("candidate", lambda: run(HOME), "1"),
             ("gate", lambda: gate(HOME), "1"), ("promote", lambda: promote(HOME), "2"),
             ("rollback", lambda: rollback(HOME), "1"),
             ("promote", lambda: promote(HOME, Path("runs/run")), "7")]
    for event, step, after in steps:
        before, told, count, kills = active(HOME), len(events()), 1, 0
        while len(events()) == told and killed(step, count):
            kills += 1
            is_done = len(events()) > told  # killed when all but the last write was done
            assert active(HOME) == (after if is_done else before) and is_whole()
            count += count if event == "candidate" else max(1, count // 2)
        assert kills and active(HOME) == after and is_whole()
        assert len(events()) == told + 1 and events()[-1] == event
    assert replay(HOME) == 2
