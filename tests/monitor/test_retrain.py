"""From a plan to the model that answers: made, judged, promoted, taken back."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
import pytest
from ftcore.errors import CheckpointError, ConfigError, ModelError, TrainingError
from ftcore.files import write_folder
from ftcore.monitor import retrain
from ftcore.monitor.__main__ import main
from ftcore.monitor.retrain import _point, history, judge, promote, rollback
from tests.monitor.test_plan import FEW, asked, log, served  # noqa: F401
from tests.serve.conftest import ROOT, serving

LINK = Path("live/model")

def rows(gained: int, lost: int) -> dict[str, Any]:
    return {"what": "x", "rows": 50, "gained": gained, "lost": lost}

def kept(difference: float) -> dict[str, Any]:
    return {"what": "x", "difference": difference, "low": difference - 0.1, "high": 1.0}

@pytest.mark.parametrize(("gains", "old", "answer"), [
    ([rows(5, 0)], [], "pass"),
    ([rows(4, 0)], [], "fail"),  # of four coins that fall alike there are one in eight
    ([rows(0, 9)], [], "fail"),
    ([rows(0, 0)], [], "fail"),
    ([rows(2, 0), rows(3, 0)], [], "pass"),
    ([rows(10, 6), rows(9, 0)], [], "pass"),
    ([rows(10, 12), rows(9, 0)], [], "fail"),
    ([rows(9, 0)], [kept(-0.01)], "pass"),
    ([rows(9, 0)], [kept(-0.011)], "fail"),
    ([rows(9, 0)], [kept(0.1), kept(-0.02)], "fail"),
])  # fmt: skip
def test_what_is_judged(gains: list, old: list, answer: str) -> None:
    told, reasons = judge({"gains": gains, "kept": old})
    assert told == answer and len(reasons) == len(gains) + len(old)

def cron(*words: Any) -> subprocess.CompletedProcess:
    """As cron would have it, in the folder that the run was trained in."""
    for name in ("train.py", "eval.py"):
        if not Path(name).exists():
            Path(name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "ftcore.monitor", *map(str, words)],
                          env=environment, capture_output=True, text=True, check=False)

def test_a_plan_is_followed_up_to_the_server(served: Path, tmp_path: Path) -> None:  # noqa: F811
    assert promote(LINK, served) == str(served.resolve()) == str(LINK.resolve())
    with serving(LINK.absolute(), tmp_path / "server") as client:
        def answered() -> tuple[str, str]:
            told = client.post("/v1/classify", {"input": "the green aaaa item 0"}).json
            (line,) = [line for line in map(json.loads, client.log.read_text().splitlines())
                       if told["id"].endswith(line["id"])]
            return told["model"], line["model"]

        assert answered() == ("model", "served")
        lines = [line for line in asked(served, 240, share_right=0.2)]
        words = [*shlex.split("--min-labelled 20 --cooldown-hours 0 --first-requests 240"),
                 "--window", "20"]
        done = cron("plan", LINK, log(*lines), "plans/a b", *words)
        assert done.returncode == 0 and done.stdout.startswith("train how: "), done.stderr
        with pytest.raises(ModelError, match="first python -m ftcore.monitor run .*/plans/a b"):
            promote(LINK, Path("plans/a b"))
        done = cron("run", "plans/a b")
        assert done.returncode == 0, done.stdout + done.stderr
        verdict = json.loads(Path("plans/a b/verdict.json").read_text())
        assert judge(verdict["inputs"]) == ("pass", verdict["reasons"])
        assert (again := cron("gate", "plans/a b")).returncode == 0, again.stderr
        assert again.stdout.startswith("pass\n  recent: ")
        assert [each["what"] for each in verdict["inputs"]["gains"]] == ["recent"]
        assert [each["what"] for each in verdict["inputs"]["kept"]] == ["test"]
        assert cron("run", "plans/a b").returncode == 0  # once more does no harm
        assert answered()[1] == "served"
        with ThreadPoolExecutor(1) as other:
            is_over = threading.Event()
            asked_on = other.submit(lambda: [answered() for _ in iter(is_over.is_set, True)])
            done = cron("promote", LINK, "plans/a b")
            assert done.returncode == 0 and LINK.resolve().name == "a b", done.stderr
            while (told := client.process.stdout.readline()) and "instead" not in told:
                pass
            is_over.set()
        assert told == "a b answers instead of served\n"
        assert {"served"} < {version for _, version in asked_on.result()} <= {"served", "a b"}
        assert answered() == ("model", "a b")
        with pytest.raises(ConfigError, match="was judged beside .*served, and live/model is"):
            promote(LINK, Path("plans/a b"))
        # its first requests alarm: cron takes it back, and the server follows
        made = LINK.resolve()
        done = cron("plan", LINK, log(*asked(made, 240, start=1000)), "plans/next", *words)
        assert done.returncode == 1 and done.stdout.startswith("go back to "), done.stderr
        assert LINK.resolve() == served.resolve() and not Path("plans/next").exists()
        while (told := client.process.stdout.readline()) and "instead" not in told:
            pass
        assert answered() == ("model", "served")
        # what cannot be opened does not answer
        for target in (tmp_path, LINK.absolute(), made):
            (LINK.parent / "other").symlink_to(target)
            os.replace(LINK.parent / "other", LINK)
            if target == made:
                (made / "model" / "config.json").write_text("[]")
            while "memory" in (told := client.process.stdout.readline()) or ": " not in told:
                pass
            assert told.startswith("served goes on to answer: ")
            assert answered() == ("model", "served")
        client.process.send_signal(signal.SIGTERM)
        assert client.process.wait(20) == 0
    events = [(json.loads(line)["event"], json.loads(line)["model"]) for line in history(LINK)]
    assert events == [("promote", str(served.resolve())), ("promote", str(made)),
                      ("rollback", str(served.resolve()))]

def finished(name: str) -> Path:
    """What looks like a run that has finished."""
    with write_folder(Path(name, "adapter")) as folder:
        (folder / "weights").write_text(name)
    return Path(name)

def plan_of(folder: Path) -> None:
    (folder / "plan.toml").write_text("")

def test_what_is_not_promoted(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = finished("one"), finished("two")
    Path("empty").mkdir()
    with pytest.raises(CheckpointError, match="empty/manifest.json is missing"):
        promote(LINK, Path("empty"))
    with pytest.raises(ConfigError, match="two: is no symbolic link, or was changed"):
        promote(two, one)
    with pytest.raises(ConfigError, match="has replaced no model"):
        rollback(LINK)
    promote(LINK, one)
    promote(LINK, one)
    with pytest.raises(ConfigError, match="one has replaced no model"):
        rollback(LINK)  # but itself
    (two / "adapter" / "weights").write_text("altered")
    with pytest.raises(CheckpointError, match="weights was altered"):
        promote(LINK, two)
    assert LINK.resolve() == one.resolve() and len(history(LINK)) == 2
    plan_of(two)
    with pytest.raises(ModelError, match="first python -m ftcore.monitor run"):
        promote(LINK, two)  # a plan, also if it is called "."
    os.chdir(two)
    with pytest.raises(ModelError, match="first python -m ftcore.monitor run"):
        promote(LINK.absolute(), Path("."))
    os.chdir("..")
    with pytest.raises(ConfigError, match="or was changed meanwhile"):
        _point(LINK, two.resolve(), "promote", one)
    for words in (["run", "empty"], ["promote", str(LINK), "empty"], ["rollback", "nothing"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("error: ")

def test_a_verdict_follows_from_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = {"run": str(finished("one").resolve()), "gains": [rows(9, 8)], "kept": []}
    plan_of(finished("two"))
    answer, reasons = judge(inputs)
    verdict = {"answer": answer, "reasons": reasons, "inputs": inputs}
    Path("two/verdict.json").write_text(json.dumps(verdict))
    assert main(["gate", "two"]) == 1 and capsys.readouterr().out.startswith("fail\n  x: 9 of ")
    for odd in ({}, {"answer": "pass"}, verdict | {"inputs": {}}, verdict | {"inputs": [1]}):
        Path("two/verdict.json").write_text(json.dumps(odd))
        assert main(["gate", "two"]) == 2 and "was altered" in capsys.readouterr().err
    Path("two/verdict.json").write_text(json.dumps(verdict | {"answer": "pass"}))
    with pytest.raises(CheckpointError, match="two/verdict.json: was altered"):
        promote(LINK, Path("two"))

def test_all_of_a_bundle_is_verified() -> None:
    with write_folder(Path("bundle")) as folder:
        finished(str(folder))
        (folder / "model.safetensors").write_text("base")
    assert promote(LINK, Path("bundle")) == str(Path("bundle").resolve())
    Path("bundle/model.safetensors").write_text("altered")
    with pytest.raises(CheckpointError, match="model.safetensors was altered"):
        promote(LINK, Path("bundle"))

def test_a_line_that_was_altered_is_named() -> None:
    for name in ("one", "two", "one"):
        promote(LINK, finished(name))
    file = LINK.with_name("model.jsonl")
    lines = file.read_text()
    assert rollback(LINK) == str(Path("two").resolve()) and len(history(LINK)) == 4
    with pytest.raises(CheckpointError, match=r"model.jsonl:2: the line before it was altered"):
        file.write_text(lines.replace('"event": "promote"', '"event": "rollback"', 1))
        promote(LINK, Path("one"))
    assert LINK.resolve() == Path("two").resolve()

def test_a_command_that_fails_ends_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingError, match="nowhere.py --x: ended with 2"):
        retrain.said("python nowhere.py --x")

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

        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "symlink"):
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

def test_a_kill_at_any_step_leaves_one_model() -> None:
    one, two = finished("one"), finished("two")
    promote(LINK, one)
    for step, before, after in ((lambda: promote(LINK, two), one, two),
                                (lambda: rollback(LINK), two, one)):
        count = 1
        while killed(step, count):
            assert LINK.resolve() in (before.resolve(), after.resolve())
            if LINK.resolve() == after.resolve():
                break
            count += 1
        assert count > 3 and LINK.resolve() == after.resolve()
    assert rollback_is_refused()

def rollback_is_refused() -> bool:
    """Of the first model, whatever was noted before a kill."""
    with pytest.raises(ConfigError, match="has replaced no model"):
        rollback(LINK)
    return True
