"""Runs as serve.py opens them, and what they then answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
import torch
import serve
from ftcore.deploy.http import Refused
from ftcore.errors import ModelError
from kernels.docs import Docs
from tests.serve.conftest import Asked

Run = Callable[..., tuple[dict[str, Any], str]]
SHORT = ("--loop.max-steps", "2", "--env.threads", "1", "--env.precision", "fp32", "--log.name")
TALK = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "the other"}]

def test_a_run_answers_with_its_adapter(
    qwen3: Path, files: dict[str, str], run: Run, tmp_path: Path
) -> None:
    few = ("--eval.max-new-tokens", "4", "--optim.lr", "0.1", "--peft.rank", "4")
    data = ("--model.path", str(qwen3), "--data.train", files["chat"])
    run("train", "sft", *data, *few, *SHORT, "a")
    asked, base = Asked("runs/a"), Asked(str(qwen3))
    assert [asked.api.served.name, base.api.served.name] == ["a", qwen3.name]
    said = [ask("/v1/embeddings", input="one")["data"][0]["embedding"] for ask in (asked, base)]
    assert said[0] != said[1]
    assert asked.api.served.fingerprint != base.api.served.fingerprint
    both = Asked(str(qwen3), flags=("--adapter", "mine=runs/a"))
    for name, alone, want in (("mine", asked, said[0]), (qwen3.name, base, said[1])):
        told = both("/v1/embeddings", input="one", model=name)
        assert told["data"][0]["embedding"] == pytest.approx(want, abs=1e-4)
        own = both.api.served.adapters.get(name, both.api.served.fingerprint)
        assert own == alone.api.served.fingerprint
    with pytest.raises(ModelError, match="another base"):  # the run itself is the base here
        Asked("runs/a", flags=("--adapter", "mine=runs/a"))

@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_classifier_says_what_its_evaluation_says(
    method: str, bert: Path, files: dict[str, str], run: Run, tmp_path: Path
) -> None:
    data = ("--data.train", files["train"], "--data.test", files["test"], "--peft.method", method)
    dev = ("--data.dev", files["test"]) if method == "full" else ()
    summary, _ = run("train", "classify", "--model.path", str(bert), *data, *dev, *SHORT, "a")
    ask = Asked("runs/a")
    texts = [line.split("\t")[1] for line in Path(files["test"]).read_text("utf-8").splitlines()]
    told = ask("/v1/classify", input=texts[1:])["data"]
    judged = map(json.loads, Path("runs/a/predictions.jsonl").read_text("utf-8").splitlines())
    for row, other in zip(told, judged, strict=True):
        assert row["label"] == other["predicted"]
        assert row["probs"] == pytest.approx(other["probabilities"], abs=1e-5)
    # test rows choose nothing: without dev rows there is no calibration
    temperature = summary["tuned"]["test"]["temperature"] if dev else 1.0
    assert ask.api.served.temperature == pytest.approx(temperature, rel=1e-4)

@pytest.mark.parametrize("path", ["runs/a", "given", "runs/a/model"])
def test_a_tagger_gives_embeddings_and_no_classes(
    path: str, bert: Path, files: dict[str, str], run: Run, tmp_path: Path
) -> None:
    """What it says of each word has no route; what its trunk makes of a text has."""
    data = ("--data.train", files["tags"], "--model.path", str(bert))
    run("train", "tag", *data, *SHORT, "a")
    assert path != "given" or serve.main(["bundle", "runs/a", "given"]) == 0
    ask = Asked(path)
    assert len(ask.api.served.labels) == (0 if path == "runs/a/model" else 5)
    for route, body in (("classify", {"input": "x"}), ("completions", {"prompt": "x"}),
                        ("score", {"messages": TALK})):
        with pytest.raises(Refused) as error:
            ask(f"/v1/{route}", **body)
        assert (error.value.code, error.value.status) == ("unsupported_task", 400)
    said = serve.command_to_try("http://here", ask.api)
    assert "http://here/v1/embeddings " in said
    body = json.loads(said.rpartition(" -d ")[2].strip("'"))
    (told,) = ask("/v1/embeddings", **body)["data"]
    ids = torch.tensor(ask.tokenizer.encode(body["input"]).ids_T)
    docs = Docs.from_lengths([len(ids)], "cpu")
    with torch.no_grad():
        trunk = ask.model.trunk
        mean_C = trunk(ids, docs.positions_N(), torch.zeros_like(ids), docs).mean(0).numpy()
    expected = mean_C / (mean_C @ mean_C) ** 0.5
    assert told["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)

def test_a_reward_model_gives_scores(
    qwen3: Path, files: dict[str, str], run: Run, tmp_path: Path
) -> None:
    data = ("--data.train", files["pairs"], "--data.prompt", "prompt")
    run("train", "reward", "--model.path", str(qwen3), *data, *SHORT, "a")
    ask = Asked("runs/a")
    assert isinstance(ask("/v1/score", messages=TALK)["data"][0]["score"], float)

def test_a_run_that_has_not_finished_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["runs/none"]) == 2
    assert "runs/none" in capsys.readouterr().err
