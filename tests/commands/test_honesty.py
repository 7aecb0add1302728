"""What keeps a reader from fooling himself: intervals, pairs, leaks, gaps, and who looked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
import numpy as np
import pytest
from tests.commands.test_eval import lines

Run = Callable[..., tuple[dict[str, Any], str]]
KINDS = ["classify", "several", "scored", "tags", "sft", "pretrain"]

@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_lies_in_its_interval(
    kind: str, request: pytest.FixtureRequest, run: Run
) -> None:
    found, printed = run("train", *request.getfixturevalue(kind))
    (name,) = found["tuned"]
    intervals, values = found["intervals"][name], found["tuned"][name]
    assert {"loss"} <= intervals.keys() <= values.keys()
    for metric, (low, high) in intervals.items():
        assert low <= high and low - 1e-9 <= values[metric] <= high + 1e-9, metric
    assert f"{name}, with 95% intervals" in printed
    has_gap = kind in ("sft", "pretrain")  # the others have no dev rows, or other losses of them
    assert ("over-fitting, " in printed) == has_gap

def test_two_models_on_the_same_rows(
    classify: list[str], files: dict[str, str], run: Run, refused: Callable, tmp_path: Path
) -> None:
    run("train", *classify, "--loop.epochs", "12")
    run("train", *classify, "--loop.max-steps", "1", "--log.name", "short")
    found, printed = run("eval", "runs/run", "--against", "runs/short")
    told = found["against"]["test"]
    assert "runs/run against runs/short" in printed and "McNemar mid-p" in printed
    other, _ = run("eval", "runs/short")
    for metric in ("loss", "accuracy"):
        difference = found["results"]["test"][metric] - other["results"]["test"][metric]
        assert told[metric]["difference"] == pytest.approx(difference, abs=1e-5)
    assert told["loss"]["high"] < 0 and told["loss"]["p"] < 0.05
    same, printed = run("eval", "runs/run", "--against", "runs/run")
    assert {each["p"] for each in same["against"]["test"].values()} == {1.0}
    assert "differs" not in printed and "too small to tell" in printed
    # Test rows come from the first where the other has none; rows that differ are no pairs.
    words = [word for word in classify if word not in ("--data.test", files["test"])]
    run("train", *words, "--log.name", "untested", "--loop.max-steps", "1")
    found, _ = run("eval", "runs/run", "--against", "runs/untested")
    assert found["against"].keys() == {"test"}
    words = ("--data.max-length", "9", "--data.over-length", "drop", "--log.name", "cut")
    run("train", *classify, *words, "--loop.max-steps", "1")
    longer = tmp_path / "longer.tsv"
    lines_of = Path(files["test"]).read_text("utf-8")
    longer.write_text(lines_of + "r999\tthe red lamp and the blue one\tit is both\twarm\n", "utf-8")
    words = ("--data.test", str(longer), "--against", "runs/cut")
    said = refused("eval", "runs/run", *words)
    assert "both models must read, and keep, the same test rows" in said

def test_rows_known_from_training_are_counted_and_left_out(
    classify: list[str], files: dict[str, str], run: Run, tmp_path: Path
) -> None:
    run("train", *classify, "--loop.epochs", "12")
    head, *train = Path(files["train"]).read_text("utf-8").splitlines()
    _, *test = Path(files["test"]).read_text("utf-8").splitlines()
    mixed = tmp_path / "mixed.tsv"
    mixed.write_text("\n".join([head, *train[:6], *test]) + "\n", "utf-8")
    found, printed = run("eval", "runs/run", "--data.test", str(mixed))
    assert "mixed, rows known from training: 6 exact" in printed
    assert f"{len(test)} of {len(test) + 6} rows are left" in printed
    left = [row["label"] == row["predicted"] for row in lines("runs/run/eval-predictions.jsonl")]
    shown = next(line.split() for line in printed.splitlines() if line.startswith("accuracy "))
    assert float(shown[1]) == pytest.approx(np.mean(left), abs=1e-4)
    without = printed[printed.index("without") :]
    cells = next(line.split() for line in without.splitlines() if line.startswith("accuracy "))
    assert float(cells[2]) == pytest.approx(np.mean(left[6:]), abs=1e-4)
    _, printed = run("eval", "runs/run", "--data.test", files["other"])
    assert "other, rows known from training: none" in printed

def test_every_look_at_the_test_rows_is_noted(classify: list[str], run: Run) -> None:
    found, _ = run("train", *classify)
    (first,) = lines("runs/run/openings.jsonl")
    assert first["metrics"]["test"]["loss"] == pytest.approx(found["tuned"]["test"]["loss"])
    _, printed = run("eval", "runs/run")
    assert "test rows of runs/run were judged 2 times so far" in printed
    assert len(lines("runs/run/openings.jsonl")) == 2

def test_scores_that_are_not_finite_name_their_row(
    classify: list[str], sft: list[str], run: Run, refused: Callable
) -> None:
    from safetensors.torch import load_file, save_file

    for words, name in ((classify, "class"), ([*sft, "--peft.method", "full"], "chat")):
        run("train", *words, "--log.name", name)
        file = Path("runs") / name / "model" / "model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if "norm" in key.lower() and key.endswith("weight"))
        tensors[key][0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        (file.parent / "manifest.json").unlink(missing_ok=True)
        said = refused("eval", f"runs/{name}")
        assert "what the model says of it is not finite" in said and "row " in said

def test_models_of_other_tasks_are_no_pair(
    classify: list[str], scored: list[str], sft: list[str], files: dict[str, str], run: Run,
    refused: Callable,
) -> None:  # fmt: skip
    run("train", *classify)
    run("train", *scored, "--log.name", "scores")
    words = ("--data.test", files["scored_test"])
    assert refused("eval", "runs/run", *words, "--against", "runs/scores")
    run("train", *sft, "--log.name", "chat")
    run("train", *sft, "--log.name", "other")
    found, _ = run("eval", "runs/chat", "--against", "runs/other")
    assert found["against"].keys() == {"chat_test"}
    assert len(lines("runs/other/openings.jsonl")) == 2

def test_what_training_knew_is_told_where_it_can_be(
    classify: list[str], files: dict[str, str], run: Run, tmp_path: Path
) -> None:
    own = tmp_path / "own.tsv"
    own.write_bytes(Path(files["train"]).read_bytes())
    run("train", *classify, "--data.train", str(own), "--data.cache", "None")
    own.unlink()
    found, printed = run("eval", "runs/run", "--data.test", files["other"])
    assert "whether training knew these rows cannot be told" in printed and found["results"]
    assert len(lines("runs/run/openings.jsonl")) == 2
