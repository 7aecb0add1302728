"""python -m ftcore.data as a user meets it: a run's data prepared and looked at."""

import json
import re
from collections.abc import Callable
from pathlib import Path
import pytest
from ftcore.data.__main__ import main

Run = Callable[..., tuple[dict, str]]

def say(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out

@pytest.fixture
def options(qwen3: Path, files: dict[str, str]) -> list[str]:
    named = {"model.path": qwen3, "data.train": files["chat"], "optim.batch-size": 4}
    named |= {"env.threads": 2, "log.name": "it"}
    return ["sft", *(f"--{name}={value}" for name, value in named.items())]

def test_what_is_prepared_is_what_is_trained_on(options, run: Run, capsys) -> None:
    said = say(capsys, "prepare", *options)
    assert "16 rows, 16 documents" in said and Path("runs/it/data/report.html").is_file()
    config = re.search(r"--config (\S+)", said)[1]
    run("train", "sft", "--config", config, "--log.name", "trained", "--loop.max-steps", "3")
    prepared, trained = (Path(f"runs/{name}/data/funnel.json") for name in ("it", "trained"))
    assert json.loads(prepared.read_text()) == json.loads(trained.read_text())

def test_a_step_is_shown_as_it_was_read(options, run: Run, capsys, monkeypatch) -> None:
    read: list[tuple[str, ...]] = []
    import ftcore.tune.loop as loop

    collate = loop.collate

    def noted(documents, **rule):
        read.append(tuple(document.row_id for document in documents))
        return collate(documents, **rule)

    monkeypatch.setattr(loop, "collate", noted)
    options = [word for word in options if "threads" not in word]
    run("train", *options, "--env.threads", "1", "--loop.max-steps", "3")
    said = say(capsys, "show", "runs/it", "--step", "3")
    shown = tuple(re.findall(r"^-- (\S+) .*chat.jsonl:\d+: positions 0 to", said, re.M))
    assert shown == read[2] and len(shown) == 4
    for row in shown:
        assert row not in (other for step in (0, 1) for other in read[step])
    assert said.count('[[{"intent": "paint", "colour": ') == 4 and "<|im_end|>]]" in said

def test_a_row_that_left_names_the_one_that_stayed(options, run: Run) -> None:
    (train,) = (word.partition("=")[2] for word in options if word.startswith("--data.train"))
    lines = Path(train).read_text().splitlines()
    Path("twice.jsonl").write_text("\n".join([*lines, lines[2].replace("  ", " "), ""]))
    run("train", *options, "--data.train", "twice.jsonl", "--loop.max-steps", "1")
    rejected = Path("runs/it/data/rejected.jsonl").read_text().splitlines()
    (lost,) = map(json.loads, rejected)
    assert lost["line"] == len(lines) + 1 and lost["detail"] == "twice.jsonl:3"
    found = tuple(lost[key] for key in ("what", "step", "reason"))
    assert found == ("left out", "compare", "duplicate")

def test_the_page_is_made_anew(options, capsys) -> None:
    say(capsys, "prepare", *options)
    page = Path("runs/it/data/report.html")
    before = page.read_text()
    page.unlink()
    assert say(capsys, "report", "runs/it").strip() == str(page) and page.read_text() == before

@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "runs/it"], "show RUN --step N"),
        (["show", "runs/it", "--step", "0"], "steps are counted from 1 to "),
        (["show", "runs/it", "--step", "two"], "show RUN --step N"),
        (["show", "runs/none", "--step", "1"], "has no config.toml"),
        (["report", "runs/none"], "runs/none is no run folder"),
    ],
)
def test_what_cannot_be_shown_is_said(words, message, options, capsys) -> None:
    say(capsys, "prepare", *options)
    assert main(words) == 2
    assert message in capsys.readouterr().err
