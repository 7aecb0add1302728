"""eval.py gives a run's own figures again, whatever the batches; other libraries load the run."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
import pytest
import torch
from ftcore.data.tokenizer import Tokenizer
from ftcore.model.load import LoadedModel
from ftcore.tune.adapter import load_artifact
from ftcore.tune.task import TASKS
from kernels.docs import Docs

Run = Callable[..., tuple[dict[str, Any], str]]
NAMES = {"several": "classify", "scored": "regress", "tags": "tag", "masked": "mlm"}  # of tasks
TEXTS = ["the red thing number 1", "it is navy, isn't it?", "x"]

def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]

@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_classifier_gets_its_own_figures(
    method: str, precision: str, classify: list[str], files: dict[str, str], run: Run
) -> None:
    words = ["--peft.method", method, "--env.precision", precision]
    trained, _ = run("train", *classify, *words)
    found, printed = run("eval", "runs/run")
    words = {"model": "runs/run", "task": "classify", "results": trained["tuned"]}
    assert found == {**words, "intervals": trained["intervals"]}
    assert lines("runs/run/eval-predictions.jsonl") == lines("runs/run/predictions.jsonl")
    assert "test, by class" in printed and "train:" not in printed

    other, _ = run("eval", "runs/run", "--data.test", files["other"])
    assert list(other["results"]) == ["other"]
    assert len(lines("runs/run/eval-predictions.jsonl")) == 7
    assert len(lines("runs/run/predictions.jsonl")) == 10

@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model", ["bert", "qwen3", "dpo"])
def test_a_judge_of_pairs_gets_its_own_figures(
    model: str, method: str, request: pytest.FixtureRequest, reward: list[str], run: Run
) -> None:
    """DPO's are relative to its base, which is read once more."""
    if model == "dpo":
        words = request.getfixturevalue("dpo")
    else:
        words = [*reward, "--model.path", str(request.getfixturevalue(model))]
    trained, _ = run("train", *words, "--peft.method", method, "--loop.epochs", "20")
    found, printed = run("eval", "runs/run")
    assert found["results"] == trained["tuned"] and found["intervals"] == trained["intervals"]
    assert lines("runs/run/eval-predictions.jsonl") == lines("runs/run/predictions.jsonl")
    figures = found["results"]["pairs_test"]
    assert figures["accuracy"] > 0.8 and 0 < figures["loss"] < 0.69 and figures["margin"] > 0
    assert ("length_bias" in figures) == (model != "dpo")
    assert (Path("runs/run/certificate.json").is_file()) == (method == "lora")

@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_pairs_held_out_of_training_choose_and_others_are_judged(
    task: str, request: pytest.FixtureRequest, files: dict[str, str], run: Run
) -> None:
    words = request.getfixturevalue(task)
    del words[words.index("--data.dev") : words.index("--data.dev") + 2]
    words[words.index("--data.test") + 1] = files["pairs"]
    at = words.index("--data.test")
    run("train", *words[:at], *words[at + 2 :], "--data.holdout", "4")
    assert any("eval/accuracy" in line for line in lines("runs/run/metrics.jsonl"))
    found, printed = run("eval", "runs/run", "--data.test", files["pairs_test"])
    assert found["results"]["pairs_test"]["accuracy"] >= 0
    assert "pairs_test, rows known from training: none" in printed
    if task == "reward":
        folder = Path("runs/run/model/config.json")
        config = json.loads(folder.read_text("utf-8"))
        assert config["id2label"] == {"0": "reward"} and config["problem_type"] == "regression"

@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_assistant_gets_its_own_figures(
    method: str, precision: str, sft: list[str], run: Run
) -> None:
    words = ["--peft.method", method, "--env.precision", precision]
    trained, _ = run("train", *sft, *words)
    found, _ = run("eval", "runs/run")
    assert found["results"] == trained["tuned"]
    assert lines("runs/run/eval-predictions.jsonl") == lines("runs/run/predictions.jsonl")

def test_the_best_checkpoint_is_what_is_saved(
    classify: list[str], files: dict[str, str], run: Run
) -> None:
    # Dev rows with the labels exchanged: the more is learned, the worse they get.
    exchange = {"warm": "cold", "cold": "warm"}
    table = Path(files["test"]).read_text("utf-8")
    rows = [line.rpartition("\t") for line in table.splitlines()]
    text = "\n".join(f"{row}\t{exchange.get(label, label)}" for row, _, label in rows)
    Path("odd.tsv").write_text(text + "\n", "utf-8")
    words = ["--data.dev", "odd.tsv", "--data.test", "odd.tsv", "--data.pair", "pair"]
    every = ["--loop.epochs", "10", "--loop.eval-every", "5"]
    trained, _ = run("train", *classify, *words, *every)
    logged = [line.get("eval/loss") for line in lines("runs/run/metrics.jsonl")]
    losses = [loss for loss in logged if loss is not None]
    assert min(losses) < losses[-1]  # else this shows nothing
    assert trained["tuned"]["odd"]["loss"] == pytest.approx(min(losses), rel=1e-5)
    found, _ = run("eval", "runs/run")
    assert found["results"] == trained["tuned"]

def test_pretrained_text_model(pretrain: list[str], files: dict[str, str], run: Run) -> None:
    trained, _ = run("train", *pretrain)
    found, _ = run("eval", "runs/run")
    assert found["results"] == trained["tuned"]
    other, _ = run("eval", "runs/run", "--data.test", files["text"])
    assert other["results"]["text"]["bits_per_byte"] > 0

def test_a_plain_model_folder(classify: list[str], files: dict[str, str], run: Run) -> None:
    trained, _ = run("train", *classify)
    words = ("--data.test", files["test"], "--env.precision", "fp32", "--env.threads", "1")
    found, _ = run("eval", "runs/run/model", "--task", "classify", *words)
    assert found["results"] == trained["tuned"] and found["model"] == "runs/run/model"
    assert len(lines("eval-predictions.jsonl")) == 10

@pytest.mark.parametrize("kind", ["several", "scored", "tags"])
def test_other_document_tasks_get_their_own_figures(
    kind: str,
    request: pytest.FixtureRequest,
    files: dict[str, str],
    run: Run,
    refused: Callable,
) -> None:
    trained, _ = run("train", *request.getfixturevalue(kind))
    found, _ = run("eval", "runs/run")
    assert found["results"] == trained["tuned"]
    assert lines("runs/run/eval-predictions.jsonl") == lines("runs/run/predictions.jsonl")
    plain = ("runs/run/model", "--task", "classify", "--data.test", files[kind + "_test"])
    said = "missing: bert.pooler" if kind == "tags" else "/config.json: problem_type = "
    assert said in refused("eval", *plain)

def test_a_plain_folder_of_a_tagger_has_its_tags(
    tags: list[str], bert: Path, files: dict[str, str], run: Run, refused: Callable
) -> None:
    trained, _ = run("train", *tags)
    words = ("--task", "tag", "--data.test", files["tags_test"])
    exact = ("--env.precision", "fp32", "--env.threads", "1")
    found, printed = run("eval", "runs/run/model", *words, *exact)
    assert found["results"] == trained["tuned"] and "tags_test, by class" in printed
    assert "must name a classifier's classes" in refused("eval", str(bert), *words)

def test_a_base_model_gets_the_figures_it_had_before(
    sft: list[str], qwen3: Path, files: dict[str, str], run: Run
) -> None:
    trained, _ = run("train", *sft)
    words = sft[sft.index("--data.test") :]
    found, _ = run("eval", str(qwen3), "--task", "sft", *words)
    assert found["results"] == trained["base"]

@pytest.mark.parametrize("kind", ["classify", "tags", "sft"])
def test_figures_do_not_depend_on_batches(
    kind: str, request: pytest.FixtureRequest, run: Run
) -> None:
    run("train", *request.getfixturevalue(kind))
    found = []
    for tokens in ("1", "40", "100000"):
        results, _ = run("eval", "runs/run", "--loop.micro-batch-tokens", tokens)
        found.append((results["results"], lines("runs/run/eval-predictions.jsonl")))
    (first, first_rows), *others = found
    for results, rows in others:
        for split, values in results.items():
            assert values.keys() == first[split].keys()
            for name, value in values.items():
                if value is None or isinstance(value, int):
                    assert value == first[split][name]
                else:
                    assert value == pytest.approx(first[split][name], rel=2e-6, abs=1e-6)
        for row, first_row in zip(rows, first_rows, strict=True):
            probabilities = row.pop("probabilities", [])
            assert probabilities == pytest.approx(first_row.get("probabilities", []), abs=2e-6)
            assert row == {name: first_row[name] for name in row}

def hidden(loaded: LoadedModel, ids: Sequence[int]) -> tuple[torch.Tensor, Docs]:
    docs = Docs.from_lengths([len(ids)])
    tokens_N = torch.tensor(ids)
    zeros_N = torch.zeros_like(tokens_N)
    return loaded.model.trunk(tokens_N, torch.arange(len(ids)), zeros_N, docs), docs

@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", [*NAMES, "classify", "tags-qwen3", "sft"])
def test_other_libraries_load_a_run(
    kind: str, method: str, request: pytest.FixtureRequest, run: Run
) -> None:
    transformers = pytest.importorskip("transformers")
    models = {"sft": "qwen3", "tags-qwen3": "qwen3", "masked": "masked_bert"}
    base = request.getfixturevalue(models.get(kind, "bert"))
    kind = kind.partition("-")[0]
    words = (*request.getfixturevalue(kind), "--model.path", str(base))
    run("train", *words, "--peft.method", method)
    auto = {"sft": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM,
            "tags": transformers.AutoModelForTokenClassification,
            }.get(kind, transformers.AutoModelForSequenceClassification)
    num_labels = {"classify": 2, "several": 2, "scored": 1, "tags": 5}.get(kind)
    options = {} if num_labels is None else {"num_labels": num_labels}
    if method == "full":
        other = auto.from_pretrained("runs/run/model")
        problem = {
            "classify": "single_label_classification",
            "several": "multi_label_classification",
            "scored": "regression",
        }.get(kind)
        assert other.config.problem_type == problem
        assert num_labels is None or other.config.num_labels == num_labels
    else:
        peft = pytest.importorskip("peft")
        model = auto.from_pretrained(base, **options)
        other = peft.PeftModel.from_pretrained(model, "runs/run/adapter")
    other.eval()
    loaded = load_artifact(
        Path("runs/run"),
        kind=TASKS[NAMES.get(kind, kind)],
        dtype=torch.float32
    )
    tokenizer = Tokenizer.load(loaded.folder)
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer.encode(text).ids_T.tolist()
            h_NC, docs = hidden(loaded, ids)
            by_token = kind in ("sft", "tags", "masked")
            inputs = (h_NC,) if by_token else (h_NC[docs.first_B()], docs)
            ours = loaded.model.head(*inputs)
            theirs = other(torch.tensor([ids])).logits
            assert (ours - theirs.reshape_as(ours)).abs().max() < 1e-4
    if method == "full":
        auto_tokenizer = transformers.AutoTokenizer.from_pretrained("runs/run/model")
        for text in TEXTS:
            assert auto_tokenizer(text)["input_ids"] == tokenizer.encode(text).ids_T.tolist()
