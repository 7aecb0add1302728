"""The page of a run is whole in itself and made from the run's files; two runs are told apart."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest

Run = Callable[..., tuple[dict[str, Any], str]]
KINDS = ["classify", "several", "scored", "tags", "sft", "pretrain"]
OUTSIDE = re.compile(r"""(?:src|href|url)\s*[=(]|@import|https?://|<script""")

@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_a_run(kind: str, request: pytest.FixtureRequest, run: Run) -> None:
    found, printed = run("train", *request.getfixturevalue(kind), "--loop.log-every", "1")
    assert "page:   runs/run/report.html" in printed
    text = Path("runs/run/report.html").read_text("utf-8")
    assert not OUTSIDE.search(text) and "{{" not in text and "Undefined" not in text
    (name,) = found["tuned"]
    for metric, value in found["tuned"][name].items():
        row = text[text.index(f"<tr><td>{metric}<") :].partition("<tr>")[2].partition("<tr>")[0]
        assert value is None or f"{value:.4g}" in row, metric
    assert {"classify": "Confusions", "sft": "Answers"}.get(kind, "Training") in text
    assert ("Merging the adapter changes" in text) == (kind == "sft")
    assert text.count("<polyline") >= 5 and "rows, " in text and "Memory" in text
    again = Path("runs/run/report.html")
    again.unlink()
    from eval import main

    assert main(["report", "runs/run"]) == 0 and again.read_text("utf-8") == text

def test_a_run_that_was_stopped_has_a_page(
    classify: list[str], run: Run, capsys: pytest.CaptureFixture
) -> None:
    run("train", *classify)
    for name in ("eval.json", "predictions.jsonl", "openings.jsonl"):
        (Path("runs/run") / name).unlink()
    from eval import main

    assert main(["report", "runs/run"]) == 0
    text = Path("runs/run/report.html").read_text("utf-8")
    assert "not finished" in text and "No test rows" in text
    assert main(["report", "nowhere"]) == 2
    assert "nowhere is no run folder: it has no config.toml" in capsys.readouterr().err
    assert main(["diff", "runs/run"]) == main(["report"]) == 2
    assert capsys.readouterr().err.count("report RUN, or diff RUN OTHER") == 2

def test_texts_of_the_data_are_no_markup(
    sft: list[str], files: dict[str, str], run: Run, tmp_path: Path
) -> None:
    chats = Path(files["chat_test"]).read_text("utf-8").replace("thing", "<b onload=x>")
    (tmp_path / "odd.jsonl").write_text(chats, "utf-8")
    run("train", *sft, "--data.test", str(tmp_path / "odd.jsonl"))
    text = Path("runs/run/report.html").read_text("utf-8")
    assert "<b onload" not in text and "&lt;b onload=x&gt;" in text

def test_where_two_runs_part(
    classify: list[str], run: Run, capsys: pytest.CaptureFixture
) -> None:
    words = [*classify, "--loop.log-every", "1", "--loop.max-steps", "4", "--schedule.warmup", "0"]
    run("train", *words)
    run("train", *words, "--log.name", "same")
    run("train", *words, "--log.name", "other", "--schedule.final", "0.5")
    from eval import main

    capsys.readouterr()
    assert main(["diff", "runs/run", "runs/same"]) == 0
    said = capsys.readouterr().out
    assert "configuration: 1 differs\n  log.name: 'run' | 'same'" in said
    assert "data: nothing differs" in said and "code and machine: nothing differs" in said
    assert "lines of metrics.jsonl are equal" in said
    assert main(["diff", "runs/run", "runs/other"]) == 0
    said = capsys.readouterr().out
    assert "configuration: 2 differs" in said and "schedule.final: 0.0 | 0.5" in said
    assert "they part in step 2 of metrics.jsonl\n  train/lr" in said
