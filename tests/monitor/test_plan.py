"""What is decided about requests that moved, and the plan that trains on them."""

import json
import shlex
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from ftcore.cli import parse
from ftcore.errors import ConfigError, DataError
from ftcore.monitor import retrain
from ftcore.monitor.__main__ import main
from ftcore.monitor.journal import read_reference
from ftcore.monitor.retrain import Limits, configured, decide, plan

FEW = Limits(min_labelled=20, cooldown_hours=0, first_requests=240, window=20)
COLOURS = {"warm": ("green", "lime"), "cold": ("pink", "rose")}  # the model never saw these
CALM = {"first": [], "known": {}, "findings": [], "labelled": 200, "hours": 24.0}

def finding(signal: str, state: int | None, statistic: str = "psi") -> dict[str, Any]:
    return {"signal": signal, "statistic": statistic, "value": 0.5, "bound": 0.1, "state": state}

TWO = [finding("length", 2), finding("entropy", 2)]

@pytest.mark.parametrize(("inputs", "answer"), [
    ({}, "wait"),
    ({"findings": TWO}, "train"),
    ({"findings": TWO[:1]}, "wait"),
    ({"findings": [finding("label", 2, "js"), finding("embedding", 2, "mmd")]}, "wait"),
    ({"findings": [TWO[1], finding("embedding", 2, "mmd")]}, "train"),
    ({"findings": [TWO[0], finding("entropy", 1)]}, "wait"),
    ({"findings": [TWO[0], finding("entropy", None)]}, "wait"),
    ({"findings": [finding("right", 2, "accuracy")]}, "train"),
    ({"findings": [finding("right", 1, "accuracy")]}, "wait"),
    ({"hours": 24 * 90.1}, "train"),
    ({"hours": 24 * 90.1, "labelled": 199}, "wait"),
    ({"findings": TWO, "hours": 23.9}, "wait"),
    ({"findings": TWO, "hours": -5.0}, "wait"),  # the clock was put back
    ({"first": TWO}, "go back"),
    ({"first": TWO, "labelled": 0, "hours": 0.0}, "go back"),
    ({"first": TWO, "known": {"length": 0.5}}, "wait"),  # it moved before there was this model
    ({"first": [finding("right", 2, "accuracy")], "known": {"right": 0.39}}, "go back"),
    ({"first": [finding("right", 2, "accuracy")], "known": {"right": 0.41}}, "wait"),  # as before
    ({"first": [finding("right", 2, "accuracy")], "known": {"right": 0.6}}, "wait"),  # it helped
])  # fmt: skip
def test_what_is_decided(inputs: dict[str, Any], answer: str) -> None:
    told, reasons = decide({**CALM, **inputs}, Limits())
    assert told == answer and reasons

def asked(run: Path, count: int, model: str = "", *, share_right: float = 0.0, start: int = 0,
          label: str | None = None, texts: bool = True, **figures: Any) -> list[dict[str, Any]]:
    """Lines of a log: requests like those of the reference, and what people said of the answers."""
    lines, reference = [], read_reference(run)
    for n in range(start, start + count):
        wanted = ("warm", "cold")[n % 2]
        text = f"the {COLOURS[wanted][n // 2 % 2]} {chr(97 + n % 26) * 4} item {n}"
        said = wanted if n % 10 < 10 * share_right else "cold" if wanted == "warm" else "warm"
        row = reference[n % len(reference)] | {"label": said} | ({"input": text} if texts else {})
        row |= figures
        del row["right"]
        feedback = {"request_id": f"{n:024x}", "index": 0, "label": label or wanted}
        about = {"time": 1e9 + n, "id": f"{n:024x}", "model": model or run.name}
        lines += [about | {"rows": [row]},
                  {"time": 1e9 + n, "id": f"{n + 2**40:024x}", "feedback": feedback}]
    return lines

def log(*lines: dict[str, Any]) -> Path:
    Path("log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path("log.jsonl")

@pytest.fixture
def served(classify: list[str], run: Callable, tmp_path: Path) -> Path:
    """A classifier that knows its colours, with a reference."""
    file = classify[classify.index("--data.train") + 1]
    words = ["--loop.epochs", "20", "--data.dev", file, "--data.leaks", "report", "--log.name"]
    run("train", *classify, *words, "served")
    return Path("runs/served")

def test_rows_with_feedback_are_planned_trained_and_judged(
    served: Path, run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    told = plan(served, log(*asked(served, 240, share_right=0.2)), Path("plan"), FEW)
    assert told["answer"] == "train" and any("accuracy" in reason for reason in told["reasons"])
    new, recent = (
        [*map(json.loads, Path("plan", f"{name}.jsonl").read_text().splitlines())]
        for name in ("new", "recent")
    )
    assert len(new) + len(recent) == 240 and 20 < len(recent) < 80
    assert {"id", "label"} < new[0].keys() and new[0]["label"] in COLOURS
    table = tomllib.loads(Path("plan/plan.toml").read_text())
    kept = json.loads(table["decision"])
    assert decide(kept["inputs"], Limits(**kept["limits"])) == ("train", table["reasons"])
    assert table["rows"] == {"old": table["rows"]["old"], "new": len(new), "recent": len(recent),
                             "unseen": 0}
    assert table["cost"]["seconds"] > 0 and table["cost"]["memory_bytes"] > 0
    commands = {name: shlex.split(line)[2:] for name, line in table["commands"].items()}
    run("train", *commands["train"])
    config = parse(["--resume", "plan/plan-judged"]).config
    assert [Path(name).name for name in config.data.train[1:]] == ["new.jsonl"]
    judged, _ = run("eval", *commands["judge"])
    found = judged["against"]["recent"]["accuracy"]
    assert found["low"] > 0 and found["difference"] > 0.5
    run("train", *commands["finish"])  # on the rows too that it was judged by
    again = parse(["--resume", "plan/plan"]).config
    assert again.data.train[:2] == config.data.train and again.optim == config.optim
    assert [Path(name).name for name in again.data.train[2:]] == ["recent.jsonl"]
    kept, _ = run("eval", *commands["keep"])
    assert kept["against"]["test"]["accuracy"]["difference"] > -0.3
    # what it knows is not asked for again, and its first requests may take it back
    lines = asked(Path("plan/plan"), 240, share_right=1.0, start=2000)
    told = plan(Path("plan/plan"), log(*asked(served, 240), *lines), Path("next"), FEW)
    assert told["answer"] == "wait" and told["replaced"] == str(served.absolute())
    assert told["inputs"]["labelled"] == 240
    lines = asked(Path("plan/plan"), 240, start=1000)
    told = plan(Path("plan/plan"), log(*lines), Path("next"), FEW)
    assert told["answer"] == "go back" and not Path("next").exists()
    assert 0.7 < told["inputs"]["known"]["accuracy"] < 0.9
    capsys.readouterr()
    words = ["--min-labelled", "20", "--cooldown-hours", "0", "--first-requests", "240"]
    assert main(["plan", "plan/plan", "log.jsonl", "next", *words, "--window", "20"]) == 1
    assert capsys.readouterr().out.startswith(f"go back to {served.absolute()}\n")

def test_what_cannot_be_planned(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no request that served answered; 60 of another"):
        plan(served, log(*asked(served, 60, "other")), Path("plan"), FEW)
    calm = log(*asked(served, 60, share_right=1))
    assert plan(served, calm, Path("plan"), FEW)["answer"] == "wait"
    told = plan(served, log(*asked(served, 60, texts=False)), Path("plan"), FEW)
    assert told["answer"] == "wait" and "labelled: 0 of 20" in told["reasons"]
    with pytest.raises(DataError, match="too few of 240 labelled rows are new and unlike others"):
        new = asked(served, 240, label="new class")  # which the model cannot be judged by
        plan(served, log(*new), Path("plan"), FEW)
    assert not Path("plan").exists()
    Path("plan").mkdir()
    with pytest.raises(ConfigError, match="plan is there already"):
        plan(served, log(*asked(served, 240)), Path("plan"), FEW)
    for words in (["plan", str(served), "none.jsonl", "next"], ["report", "runs", "log.jsonl"],
                  ["report", str(served), "log.jsonl", "--window", "0"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("error: ")
    for words in (["plan"], ["plan", str(served), "log.jsonl"], ["report"], ["nothing"], []):
        with pytest.raises(SystemExit, match="2"):
            main(words)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "rollback" in capsys.readouterr().out

def test_only_the_newest_rows_are_kept_to_judge_by(served: Path) -> None:
    """Older ones are no longer what is asked; they, and what is like them, are trained on."""
    repeated = asked(served, 1)[0]["rows"][0]["input"]
    some = asked(served, 480, share_right=0.2)
    for line in some[600::20]:
        line["rows"][0]["input"] = repeated
    assert plan(served, log(*some), Path("plan"), FEW)["answer"] == "train"
    new, recent = ([*map(json.loads, Path("plan", name).read_text().splitlines())]
                   for name in ("new.jsonl", "recent.jsonl"))
    assert len(new) + len(recent) == 480 and len(recent) > 30
    assert all(int(row["id"].partition(":")[0], 16) >= 280 for row in recent)
    assert repeated not in {row["text"] for row in recent}
    assert sum(row["text"] == repeated for row in new) == 19

def test_classes_that_the_model_does_not_know_are_kept_apart(served: Path) -> None:
    some = [*asked(served, 120), *asked(served, 120, start=120, label="a new one")]
    assert plan(served, log(*some), Path("plan"), FEW)["answer"] == "train"
    labels = {name: [json.loads(line)["label"] for line in
                     Path("plan", f"{name}.jsonl").read_text().splitlines()]
              for name in ("new", "recent", "unseen")}
    assert {*labels["new"]} == {*COLOURS, "a new one"} and {*labels["recent"]} <= {*COLOURS}
    assert {*labels["unseen"]} == {"a new one"} and sum(map(len, labels.values())) == 240
    table = tomllib.loads(Path("plan/plan.toml").read_text())
    assert table["commands"]["unseen"].endswith("/unseen.jsonl")
    assert "unseen" in table["gate"]["gains"]

def test_a_class_that_no_row_teaches_is_no_question(served: Path) -> None:
    lines = asked(served, 180)
    for n in range(180, 240):
        lines += asked(served, 1, start=n, label=f"alone {n}")
    told = plan(served, log(*lines), Path("plan"), FEW)
    assert told["answer"] == "train", told["reasons"]
    new = [json.loads(line) for line in Path("plan/new.jsonl").read_text().splitlines()]
    assert len({row["label"] for row in new}) == 62 and not Path("plan/unseen.jsonl").read_text()

def test_runs_that_new_rows_cannot_stand_beside(served: Path) -> None:
    assert configured(served).task == "classify"
    config = served / "config.toml"
    text = config.read_text()
    config.write_text(text.replace('pair = ""', 'pair = "other"'))
    with pytest.raises(ConfigError, match=r"can be trained again .*\['pair'\]"):
        configured(served)
    config.write_text(text.replace('task = "classify"', 'task = "pretrain"'))
    with pytest.raises((ConfigError, SystemExit)):
        configured(served)

def test_answers_that_were_bettered_are_planned(
    sft: list[str], run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sft[sft.index("--data.train") + 1]
    more = ["--data.dev", file, "--data.leaks", "report", "--eval.max-new-tokens", "4"]
    run("train", *sft, *more, "--log.name", "served")
    lines = []
    for n in range(60):
        row = {"prompt_tokens": 5, "generation_tokens": 3, "reason": "stop", "logprob": -1.0,
               "repeated": 0.0, "answer": "no", "input": [{"role": "user", "content": f"ask {n}"}]}
        better = json.dumps({"intent": "say", "what": f"{n * n}"})
        feedback = {"request_id": f"{n:024x}", "index": 0, "text": better}
        lines += [{"time": 1e9, "id": f"{n:024x}", "model": "served", "rows": [row]},
                  {"time": 1e9, "id": f"{n + 999:024x}", "feedback": feedback}]
    old = Limits(min_labelled=20, cooldown_hours=0, max_age_days=1e-9, window=20)
    time.sleep(0.01)
    assert plan(Path("runs/served"), log(*lines), Path("plan"), old)["answer"] == "train"
    row = json.loads(Path("plan/new.jsonl").read_text().splitlines()[0])
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    monkeypatch.setattr(retrain, "said", lambda line: run(*spoken(line))[0])
    told = retrain.run(Path("plan"))
    (gains,) = told["inputs"]["gains"]
    assert told["answer"] == "fail" and (gains["gained"], gains["lost"]) == (0, 0)
    # nothing is gained, so it is not trained once more, nor judged further
    assert Path("plan/plan-judged").is_dir() and not Path("plan/plan").exists()
    assert told["inputs"]["kept"] == []

def spoken(line: str) -> list[str]:
    """A command of a plan as the fixture `run` takes it."""
    _, script, *words = shlex.split(line)
    return [script.removesuffix(".py"), *words]

def test_a_report_has_a_page(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = log(*asked(served, 60, prompt_tokens=99))
    assert main(["report", str(served), str(file), "--window", "20"]) == 0
    said = capsys.readouterr().out
    assert "Labels given" in said and "60 records" in said and "moved, twice in a row" in said
    assert "60 with feedback: 0.0% to 6.0% right (95 %)" in said
    page = Path("log.jsonl.html").read_text()
    assert "What moved" in page and "http" not in page.replace("http://www.w3.org", "")
    board = EventAccumulator("log.jsonl.tensorboard").Reload()
    told = {name: [(e.step, round(e.wall_time)) for e in board.Scalars(name)]
            for name in board.Tags()["scalars"]}
    assert {"prompt_tokens/psi/value", "prompt_tokens/psi/bound", "label/js/value"} <= told.keys()
    lines = map(json.loads, file.read_text().splitlines())
    times = [round(line["time"]) for line in lines if "rows" in line]
    assert told["label/js/value"] == [(end, times[end - 1]) for end in (20, 40, 60)]
    assert main(["report", str(served), str(file), "--window", "20"]) == 0
    board = EventAccumulator("log.jsonl.tensorboard").Reload()
    assert [e.step for e in board.Scalars("label/js/value")] == [20, 40, 60], "each point once"
