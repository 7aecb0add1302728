"""Rewards: what each kind of source says, and what is done where one says nothing usable."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
import numpy as np
import pytest
import torch
from ftcore.align import rewards
from ftcore.align.rewards import KINDS, Rewards
from ftcore.cli import Command
from ftcore.config import RUNS, RewardsConfig
from ftcore.data.columns import Chat
from ftcore.errors import ConfigError, TrainingError

PAINT = '{"intent": "paint", "colour": "red"}'
OTHERS = ('{"colour": "red", "intent": "paint"}', '{"intent": "paint"}', '{"intent": 1}', "x")
ANSWERS = [PAINT, *OTHERS]

def chats(targets: Sequence[str]) -> list[Chat]:
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "paint it"}]
    named = enumerate(targets)
    return [Chat(f"c{i}", [*asked, {"role": "assistant", "content": text}]) for i, text in named]

def judged(sources: str | tuple[str, ...], answers: Sequence[str] = ANSWERS, target: str = PAINT,
           **options: Any) -> tuple[list[float], dict[str, list[float]]]:
    names = (sources,) if isinstance(sources, str) else sources
    rewards = Rewards(RewardsConfig(sources=names, **options))
    scores, parts = rewards(chats([target] * len(answers)), answers)
    return scores.tolist(), {name: part.tolist() for name, part in parts.items()}

@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    """Body of a function of `rows` -> the source that it is."""

    def make(body: str, head: str = "") -> str:
        file = tmp_path / f"own{len(list(tmp_path.iterdir()))}.py"
        file.write_text(f"{head}\ndef score(rows):\n    {body}\n", "utf-8")
        return f"python:{file}:score"

    return make

# ---- what they say -------------------------------------------------------------------------------

def test_match_is_the_expected_answer_and_nothing_else() -> None:
    scores, parts = judged("match", ["yes", " yes\n", "Yes", "yes!", ""], "yes")
    assert scores == parts["match"] == [1, 1, 0, 0, 0]

def test_command_is_the_mean_of_four_figures() -> None:
    """JSON object, intent, F1 of slots, whole object."""
    scores, parts = judged("command:intent")
    assert scores == parts["command:intent"] == [1, 1, 0.5, 0.25, 0]
    target = '{"intent": "a", "one": "1", "two": "2"}'
    said = ['{"intent": "a", "one": "1"}', '{"intent": "b", "one": "1", "two": "2"}']
    scores, _ = judged("command:intent", [*said, target, '{"intent": "a", "x": 1}'], target)
    assert scores == [(2 + 2 / 3) / 4, 0.5, 1, 0.5]
    bare = '{"intent": "a"}'
    scores, _ = judged("command:intent", [bare, '{"intent": "a", "x": 1}'], bare)
    assert scores == [1, 0.5]

def test_a_function_sees_messages_answer_and_target(python: Callable, tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    name = python(f"open({str(seen)!r}, 'w').write(json.dumps(rows)); return map(len, "
                  "(row['answer'] for row in rows))", head="import json")  # fmt: skip
    assert judged(name, ["a", "four"])[0] == [1, 4]
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "paint it"}]
    rows = [{"messages": asked, "answer": text, "target": PAINT} for text in ("a", "four")]
    assert json.loads(seen.read_text()) == rows

@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """Lines of Python that have `rows` -> the source that is a program of them."""

    def make(body: str) -> str:
        file = tmp_path / "own program.py"
        file.write_text(f"import json, sys, time\nrows = json.load(sys.stdin)\n{body}\n", "utf-8")
        return f"program:{sys.executable} -S '{file}'"

    return make

def test_a_program_sees_the_same(program: Callable, tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    name = program(f"json.dump(rows, open({str(seen)!r}, 'w'))\n"
                   "print([len(row['answer']) for row in rows])")
    assert judged(name, ["a", "four"])[0] == [1, 4]
    row = json.loads(seen.read_text())[1]
    assert row["answer"] == "four" and row["target"] == PAINT and len(row["messages"]) == 2

def test_sources_are_weighed_and_added(python: Callable) -> None:
    own = python("return [2.0] * len(rows)")
    scores, parts = judged(("match", own), ["yes", "no"], "yes", weights=(0.5, -1.0))
    assert scores == [-1.5, -2.0] and parts == {"match": [1, 0], own: [2, 2]}
    assert judged(("match", own), ["yes", "no"], "yes")[0] == [3, 2]

@pytest.mark.parametrize("labels", [("bad", "good"), ("bad", "fair", "good")])
def test_a_classifier_says_the_log_odds_of_its_label(
    labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """log p / (1 - p), of the answer's text alone, in the rows' order."""
    logits_BK = torch.randn(3, len(labels), generator=torch.Generator().manual_seed(0))
    texts: list[tuple[str, ...]] = []

    def encoded(pairs: Any, **_: Any) -> Any:
        texts.extend(pairs)
        return ((np.int32([1] * (3 - n)), None) for n, _ in enumerate(pairs))

    loaded = SimpleNamespace(labels=labels, folder=None, model=torch.nn.Module())
    tokenizer = SimpleNamespace(encode_pairs=encoded)
    command = Command("classify", RUNS["classify"](), {}, None, "")
    monkeypatch.setattr(rewards, "parse", lambda _: command)
    monkeypatch.setattr(rewards, "load_artifact", lambda *_, **__: loaded)
    monkeypatch.setattr(rewards.Tokenizer, "load", lambda _: tokenizer)
    monkeypatch.setattr(rewards.evaluator, "all_logits", lambda *_: logits_BK)
    scores, _ = judged("model:RUN=good", ["one", "two", "three"])
    chance_B = logits_BK.double().softmax(1)[:, -1]
    assert scores == pytest.approx((chance_B / (1 - chance_B)).log().tolist())
    assert texts == [("one",), ("two",), ("three",)]
    assert "label 'god' is unknown; nearest: 'good'" in refusal("model:RUN=god")
    assert "is a run of the task classify, not reward" in refusal("model:RUN")

# ---- what fails: a source, and what is said of it ------------------------------------------------

FUNCTIONS = {
    "raises": ("raise KeyError('lost')", "KeyError: 'lost'"),
    "divides": ("return [1 / 0]", "ZeroDivisionError: division by zero"),
    "endless": ("while True: yield 1.0", "ValueError: not one number for each of 5 answers"),
    "endless in C": ("import itertools; return itertools.repeat(1.0)",
                     "ValueError: not one number for each of 5 answers"),
    "too few": ("return [1.0] * 4", "ValueError: not one number for each of 5 answers"),
    "too many": ("return [1.0] * 6", "ValueError: not one number for each of 5 answers"),
    "nothing": ("return None", "TypeError: 'NoneType' object is not iterable"),
    "one number": ("return 1.0", "TypeError: 'float' object is not iterable"),
    "words": ("return ['good'] * 5", "ValueError: could not convert string to float"),
    "a list": ("return [[1.0]] * 5", "TypeError: float() argument must be"),
    "nan": ("return [0, float('nan'), 2, 3, 4]", "ValueError: not finite for the answer '{"),
    "inf": ("return [float('-inf'), 1, 2, 3, 4]", "ValueError: not finite for the answer '{"),
}

@pytest.mark.parametrize(("body", "why"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_that_fails_stops_the_run(body: str, why: str, python: Callable) -> None:
    name = python(body)
    with pytest.raises(TrainingError) as failed:
        judged((name, "match"))
    said = str(failed.value)
    assert said.startswith(f"reward {name}: {why}") and said.endswith(": mend it, then resume")

PROGRAMS = {
    "fails": ("sys.exit('it is\\nlost')", "ValueError: ended with 1: it is\nlost"),
    "no JSON": ("print('good')", "JSONDecodeError: Expecting value"),
    "too few": ("print([1])", "ValueError: not one number for each of 5 answers"),
    "nan": ("print([1, 2, 3, float('nan'), 5])", "JSONDecodeError: Expecting value"),
    "no list": ("print(1)", "TypeError: 'int' object is not iterable"),
    "memory": ("x = bytearray(2**33)", "ValueError: ended with 1: Traceback"),
}

@pytest.mark.parametrize(("body", "why"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_fails_stops_the_run(body: str, why: str, program: Callable) -> None:
    name = program(body)
    with pytest.raises(TrainingError) as failed:
        judged(name)
    said = str(failed.value)
    assert said.startswith(f"reward {name}: {why}") and said.endswith(": mend it, then resume")

HANGING = {  # not for ever, so that a limit that fails is told
    "sleeps": "import time; time.sleep(9); return [0.0] * 5",
    "computes": """import time
    until = time.monotonic() + 9
    while time.monotonic() < until:
        pass
    return [0.0] * 5""",
    "catches": """import time
    for _ in range(2):
        try:
            time.sleep(9)
        except TimeoutError:
            if left:
                raise
            left.append(1)
    return [0.0] * 5""",
}  # fmt: skip

@pytest.mark.parametrize("body", HANGING.values(), ids=HANGING)
def test_a_function_that_hangs_stops_the_run(body: str, python: Callable) -> None:
    before = signal.getsignal(signal.SIGALRM)
    name = python(body, head="left = []")
    with pytest.raises(TrainingError, match=r"TimeoutError: takes longer than 0.2 s \(--reward"):
        judged(name, seconds=0.2)
    assert signal.getsignal(signal.SIGALRM) is before and not any(signal.getitimer(0))

def test_a_program_that_hangs_stops_the_run_and_ends(program: Callable, tmp_path: Path) -> None:
    number = tmp_path / "pid"
    name = program(f"import os\nopen({str(number)!r}, 'w').write(str(os.getpid()))\n"
                   "time.sleep(60)")
    with pytest.raises(TrainingError, match="TimeoutError: takes longer than 3 s"):
        judged(name, seconds=3)
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)

def test_a_target_that_is_no_command_is_named() -> None:
    said = "reward command:intent: DataError: target 'yes' is not a JSON object with a text field"
    with pytest.raises(TrainingError, match=said):
        judged("command:intent", ["no"], "yes")

# ---- what is no source ---------------------------------------------------------------------------

def refusal(*sources: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        Rewards(RewardsConfig(sources=sources, **options))
    return str(refused.value)

def test_no_source_is_refused() -> None:
    assert refusal() == (
        f"nothing says what an answer is worth: --reward.sources {{{', '.join(KINDS)}}}"
    )

@pytest.mark.parametrize("name", ["macth", "", "Match", ":match"])
def test_an_unknown_kind_is_refused(name: str) -> None:
    kinds, kind = "match, command, model, python, program", name.partition(":")[0]
    hint = "; nearest: 'match'" if kind else ""
    assert refusal(name) == f"reward.sources {kind!r} is unknown{hint}; known: {kinds}"

@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0)])
def test_a_weight_is_for_each_source(weights: tuple[float, ...]) -> None:
    said = refusal("match", "command:intent", weights=weights)
    assert said == f"reward.weights = {weights}: must be one for each source"

def test_a_source_is_named_once() -> None:
    said = refusal("match", "command:intent", "match", weights=(1.0, 2.0, 3.0))
    assert said == "reward.sources names match twice: weigh it"

def test_a_file_may_hold_what_python_files_hold(python: Callable) -> None:
    """Dataclasses look their module up by its name."""
    head = ("from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass Said:\n    by: float")  # fmt: skip
    assert judged(python("return [Said(0.5).by] * len(rows)", head), ["a"])[0] == [0.5]

FILES = {
    "no file": ("python:{0}/none.py:f", "No such file or directory"),
    "no name": ("python:{0}/own.py", "write python:FILE.py:NAME"),
    "no such name": ("python:{0}/own.py:g", "holds no such function: write python:FILE.py:NAME"),
    "does not parse": ("python:{0}/bad.py:f", "invalid syntax"),
    "lacks a module": ("python:{0}/lacks.py:f", "No module named 'no_such_module'"),
    "raises": ("python:{0}/raises.py:f", "division by zero"),
    "no run": ("model:{0}/none", "has no config.toml"),
    "no command": ("program:", "is no command that can be run: write program:COMMAND"),
    "no such command": ("program:{0}/none x", "is no command that can be run"),
}

@pytest.mark.parametrize(("name", "why"), FILES.values(), ids=FILES)
def test_a_source_that_cannot_be_opened_is_refused(name: str, why: str, tmp_path: Path) -> None:
    texts = {"own.py": "f = len", "bad.py": "f = = 1", "raises.py": "1 / 0"}
    for file, text in {**texts, "lacks.py": "import no_such_module"}.items():
        (tmp_path / file).write_text(text, "utf-8")
    said = refusal(name := name.format(tmp_path))
    assert said.startswith(f"reward.sources: {name}: ") and why in said
