"""train.py: every task and method runs to its end and leaves what it says."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
from ftcore.data.read import read_rows
from ftcore.errors import CheckpointError, ConfigError, TrainingError
from ftcore.model.heads import Model

Run = Callable[..., tuple[dict[str, Any], str]]
METHODS = {
    "full": [],
    "head": ["--peft.method", "freeze", "--peft.trainable", "head"],
    "last:1": ["--peft.method", "freeze", "--peft.trainable", "head", "last:1"],
    "biases": ["--peft.method", "freeze", "--peft.trainable", "head", "biases"],
    "lora": ["--peft.method", "lora", "--peft.rank", "2"],
}

def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

def logged(name: str) -> list[float]:
    return [line[name] for line in lines(Path("runs/run/metrics.jsonl")) if name in line]

@pytest.mark.parametrize("method", METHODS)
def test_classify(method: str, classify: list[str], files: dict[str, str], run: Run) -> None:
    words = [*classify, "--data.holdout", "4", "--loop.eval-every", "2", *METHODS[method]]
    summary, printed = run("train", *words)
    assert summary["run"] == "runs/run" and summary["steps"] == 3 and summary["base"] is None
    assert 0 <= summary["tuned"]["test"]["accuracy"] <= 1
    assert "perplexity" not in printed and "test, by class" in printed
    assert printed.splitlines()[-2] == "next:   python eval.py runs/run --data.test FILE"

    names = {name for line in lines(Path("runs/run/metrics.jsonl")) for name in line}
    dev = {name for name in names if name.startswith("eval/")}
    assert dev == {"eval/loss", "eval/accuracy", "eval/f1_macro", "eval/temperature"}
    saved = "adapter" if method == "lora" else "model"
    assert (Path("runs/run") / saved / "manifest.json").is_file()
    kept = json.loads(Path("runs/run/eval.json").read_text())
    assert kept["tuned"]["test"] == pytest.approx(summary["tuned"]["test"], rel=1e-5)

    rows = lines(Path("runs/run/predictions.jsonl"))
    assert [row["row_id"] for row in rows] == [row.id for row in read_rows([files["test"]])]
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert right / 10 == summary["tuned"]["test"]["accuracy"]

def test_a_classifier_learns_pairs(classify: list[str], run: Run) -> None:
    summary, _ = run("train", *classify, "--data.pair", "pair", "--loop.epochs", "20")
    assert logged("train/loss")[-1] < 0.5 * logged("train/loss")[0]
    assert summary["tuned"]["test"]["accuracy"] == 1

def test_several_labels_are_learned(several: list[str], run: Run) -> None:
    summary, printed = run("train", *several, "--data.holdout", "4", "--loop.epochs", "20")
    test = summary["tuned"]["several_test"]
    assert test["subset_accuracy"] == test["f1_macro"] == 1 and test["hamming_loss"] == 0
    assert "several_test, by class" in printed and "most confused" not in printed
    names = {name for line in lines(Path("runs/run/metrics.jsonl")) for name in line}
    shown = {"eval/loss", "eval/subset_accuracy", "eval/f1_macro"}
    assert {name for name in names if name.startswith("eval/")} == shown
    rows = lines(Path("runs/run/predictions.jsonl"))
    assert [row["labels"] for row in rows] == [row["predicted"] for row in rows]
    assert ["bright", "warm"] in [row["labels"] for row in rows] and len(rows) == 10
    assert [] in [row["labels"] for row in rows]

def test_scores_are_learned(scored: list[str], run: Run) -> None:
    summary, printed = run("train", *scored, "--data.holdout", "4", "--loop.epochs", "40")
    test = summary["tuned"]["scored_test"]
    assert test["pearson"] > 0.95 and test["rmse"] < 0.75
    assert test["loss"] == pytest.approx(test["rmse"] ** 2, rel=1e-4)
    assert "by class" not in printed and logged("eval/pearson") and logged("eval/spearman")
    rows = lines(Path("runs/run/predictions.jsonl"))
    assert {row["label"] for row in rows} == {4.5, 0.25} and len(rows) == 10
    mae = sum(abs(row["label"] - row["predicted"]) for row in rows) / 10
    assert mae == pytest.approx(test["mae"], rel=1e-5)

@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_tags_are_learned(
    family: str, tags: list[str], request: pytest.FixtureRequest, run: Run
) -> None:
    model = ("--model.path", str(request.getfixturevalue(family)), "--loop.epochs", "20")
    summary, printed = run("train", *tags, *model, "--data.holdout", "4")
    test = summary["tuned"]["tags_test"]
    assert test["accuracy"] > 0.95 and test["f1"] > 0.9
    assert {"loss", "accuracy", "precision", "recall", "f1"} == test.keys()
    assert logged("eval/f1") and "over-fitting, 4 rows each" in printed
    shown = printed[printed.index("tags_test, by class") :].splitlines()[1:4]
    assert {line.split()[0] for line in shown} == {"label", "cold", "warm"}
    rows = lines(Path("runs/run/predictions.jsonl"))
    pairs = [pair for row in rows for pair in zip(row["tags"], row["predicted"], strict=True)]
    right = sum(tag == predicted for tag, predicted in pairs)
    assert right / len(pairs) == pytest.approx(test["accuracy"], rel=1e-5)
    assert {*rows[0]} == {"split", "row_id", "tags", "predicted"} and len(rows) == 10

def test_a_decoder_classifies(classify: list[str], qwen3: Path, run: Run) -> None:
    summary, _ = run("train", *classify, "--model.path", str(qwen3), *METHODS["lora"])
    assert set(summary["tuned"]) == {"test"}

@pytest.mark.parametrize("method", ["full", "lora"])
def test_sft(method: str, sft: list[str], files: dict[str, str], run: Run) -> None:
    summary, printed = run("train", *sft, "--peft.method", method)
    base, tuned = summary["base"]["chat_test"], summary["tuned"]["chat_test"]
    assert tuned["loss"] < base["loss"] and base.keys() == tuned.keys()
    assert {"perplexity", "exact_match", "json_valid"} <= tuned.keys()
    shown = printed[printed.index("chat_test, with") :].splitlines()[1].split()
    assert shown == ["metric", "base", "tuned", "low", "high"]
    rows = lines(Path("runs/run/predictions.jsonl"))
    assert [row["row_id"] for row in rows] == [row.id for row in read_rows([files["chat_test"]])]
    assert math.isclose(logged("eval/loss")[-1], tuned["loss"], rel_tol=1e-5)
    assert math.isclose(logged("eval/perplexity")[-1], math.exp(tuned["loss"]), rel_tol=1e-5)

def test_pretrain_from_random(pretrain: list[str], files: dict[str, str], run: Run) -> None:
    summary, _ = run("train", *pretrain)
    held = summary["tuned"]["held"]
    num_bytes = len(Path(files["held"]).read_bytes())
    assert 0 < held["bits_per_byte"] < 8 and logged("eval/bits_per_byte")
    assert held["bits_per_byte"] == pytest.approx(logged("eval/bits_per_byte")[-1], rel=1e-5)
    num_tokens = held["bits_per_byte"] * num_bytes * math.log(2) / held["loss"]
    assert num_tokens == pytest.approx(round(num_tokens), rel=1e-4)
    assert logged("train/loss")[-1] < logged("train/loss")[0]
    assert not Path("runs/run/predictions.jsonl").exists()

def test_dry_run_prints_the_plan_and_writes_the_cache_alone(
    classify: list[str],
    capsys: pytest.CaptureFixture[str],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import train

    monkeypatch.setattr("ftcore.env.plan.free_bytes", lambda device: 2**30)
    assert train.main([*classify, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "3 steps" in printed and "trainable: " in printed and "MiB" in printed
    assert "activations" in printed and "the largest that fit have" in printed
    assert [path.name for path in Path("runs").iterdir()] == ["cache"]
    train.main([*classify, "--dry-run"])
    again, before = capsys.readouterr().out, printed.replace("prepared, and kept in", "from")
    peak = "predicted peak"  # what follows depends on the memory that is free
    assert again.partition(peak)[0] == before.partition(peak)[0] and peak in again

def test_a_run_takes_the_kernels_that_it_is_told(
    classify: list[str], files: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(Model, "use_kernels", lambda model, impl: told.append(impl))
    run("train", *classify, "--env.kernels", "eager")
    run("eval", "runs/run", "--data.test", files["test"])
    run("eval", "runs/run", "--data.test", files["test"], "--env.kernels", "auto")
    assert told == ["eager", "eager", "auto"]

def test_a_run_repeats_from_its_configuration(classify: list[str], run: Run) -> None:
    first, _ = run("train", *classify)
    words = ["classify", "--config", "runs/run/config.toml", "--log.name", "again"]
    again, _ = run("train", *words)
    assert again["tuned"] == first["tuned"]
    weights = [Path(f"runs/{name}/model/model.safetensors") for name in ("run", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

def test_test_files_of_one_name_stay_apart(
    classify: list[str], files: dict[str, str], run: Run
) -> None:
    Path("test.tsv").write_text(Path(files["other"]).read_text())
    summary, _ = run("train", *classify, "--data.test", files["test"], "test.tsv")
    assert set(summary["tuned"]) == {files["test"], "test.tsv"}
    assert len(lines(Path("runs/run/predictions.jsonl"))) == 17

def test_the_exit_code_says_what_failed(
    classify: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    for error, code in ((ConfigError, 2), (CheckpointError, 3), (TrainingError, 2)):

        def failing(*args: object, error: type[Exception] = error) -> int:
            raise error

        monkeypatch.setattr(train, "run", failing)
        assert train.main(classify) == code

def test_an_unforeseen_error_shows_where(
    classify: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    for error in (KeyboardInterrupt, ZeroDivisionError):

        def failing(*args: object, error: type[BaseException] = error) -> int:
            raise error

        monkeypatch.setattr(train, "run", failing)
        with pytest.raises(error):
            train.main(classify)


def test_hidden_tokens_are_learned(masked: list[str], run: Run) -> None:
    summary, said = run("train", *masked, "--loop.epochs", "4", "--data.maskings", "5")
    held = summary["tuned"]["held"]
    assert {"loss", "perplexity"} <= held.keys()
    assert logged("train/loss")[-1] < 0.6 * logged("train/loss")[0]
    assert held["loss"] < 0.9 * logged("train/loss")[0]
    assert held["perplexity"] == pytest.approx(math.exp(held["loss"]), rel=1e-4)
    assert held["loss"] == pytest.approx(min(logged("eval/loss")), rel=1e-5)

@pytest.mark.parametrize("kind", ["sft", "classify", "several", "scored", "tags", "masked"])
def test_an_adapter_comes_with_its_merge_certificate(
    kind: str, request: pytest.FixtureRequest, run: Run
) -> None:
    words = (*request.getfixturevalue(kind), *METHODS["lora"])
    summary, printed = run("train", *words)
    proof = json.loads(Path("runs/run/certificate.json").read_text())
    assert f'merged: {{"rows":{proof["rows"]}' in printed
    assert 0 < proof["max_difference"] < 1e-4  # in fp32
    (test,) = summary["tuned"].values()
    assert proof["loss"] == pytest.approx([test["loss"]] * 2, rel=1e-4)
    assert ("mean_kl" in proof) == (kind != "scored")
    metric = {"several": "f1_macro", "scored": "pearson", "sft": "perplexity",
              "masked": "perplexity"}.get(kind, "accuracy")
    assert proof[metric] == pytest.approx([test[metric]] * 2, rel=1e-3)
    if kind != "scored":
        assert abs(proof["mean_kl"]) < 1e-6 and proof["changed"] < 0.05
