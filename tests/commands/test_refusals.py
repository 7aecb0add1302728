"""What cannot be done is one error that says what, where and how to mend it; nothing is left."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
import tokenizers
from tests.commands.conftest import SCRIPTS, _save

ROOT = Path(__file__).parents[2]
Refused = Callable[..., str]
Run = Callable[..., tuple[dict[str, Any], str]]

@pytest.fixture
def broken(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the encoder, to be damaged."""
    return Path(shutil.copytree(bert, tmp_path_factory.mktemp("broken") / "model"))

def test_a_missing_column(refused: Refused, classify: list[str], files: dict[str, str]) -> None:
    message = refused("train", *classify, "--data.text", "txet")
    assert f"{files['train']}: no column 'txet'" in message and "nearest: 'text'" in message
    message = refused("train", *classify, "--data.label", "lable")
    assert "no column 'lable'" in message and "nearest: 'label'" in message

def test_an_unknown_label(
    refused: Refused, classify: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("data") / "odd.tsv"
    file.write_text("text\tlabel\nsomething\twarn\n")
    message = refused("train", *classify, "--data.test", str(file))
    assert f"{file}:2: label 'warn'" in message
    assert "nearest: 'warm'" in message and "correct the row" in message

def test_nothing_to_supervise(
    refused: Refused, sft: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("data") / "mute.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    message = refused("train", *sft, "--data.train", str(file))
    assert f"{file}: none of the 1 rows can be used" in message
    assert "nothing to supervise" in message and "line 1" in message

def test_files_that_cannot_be_what_is_asked(
    refused: Refused,
    tags: list[str],
    scored: list[str],
    files: dict[str, str],
) -> None:
    message = refused("train", *tags, "--data.train", files["train"])
    assert "no column 'tokens'; its columns are 'id', 'text'" in message
    message = refused("train", *scored, "--data.train", files["train"])
    assert f"{files['train']}:2: column 'label' must hold a number, not 'warm'" in message

def test_truncated_weights(refused: Refused, classify: list[str], broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refused("train", *classify, "--model.path", str(broken))
    assert f"{file}: not a whole safetensors file" in message and "copy it anew" in message

def test_foreign_weights(
    refused: Refused, classify: list[str], broken: Path, qwen3: Path
) -> None:
    shutil.copy(qwen3 / "model.safetensors", broken)
    message = refused("train", *classify, "--model.path", str(broken))
    assert "weights, config.json and the number of labels do not fit" in message
    assert "missing: " in message and "unexpected: " in message
    assert "word_embeddings" in message and "self_attn.k_proj" in message

def test_an_unknown_family(refused: Refused, classify: list[str], broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": "qwen4"}')
    message = refused("train", *classify, "--model.path", str(broken))
    assert "model_type is 'qwen4'" in message and "knows bert, " in message

@pytest.mark.parametrize("script", ["train", "eval"])
def test_a_wrong_option(script: str, refused: Refused, classify: list[str], bert: Path) -> None:
    words = classify if script == "train" else [str(bert), "--task", "classify"]
    message = refused(script, *words, "--optim.learning-rate", "1")
    assert "--optim.learning-rate" in message and "--optim." in message.split("similar")[-1].lower()
    message = refused(script, *words, "--optim.batch-sise", "4")
    assert "--optim.batch-size" in message

def test_a_missing_file(refused: Refused, classify: list[str], files: dict[str, str]) -> None:
    typo = files["train"].replace("train.tsv", "tarin.tsv")
    message = refused("train", *classify, "--data.train", typo)
    assert f"{typo}: cannot be read" in message and "No such file" in message
    assert "train.tsv" in message.replace(typo, "")

@pytest.mark.parametrize("task", ["pretrain", "sft", "classify"])
def test_no_data(task: str, refused: Refused, qwen3: Path) -> None:
    message = refused("train", task, "--model.path", str(qwen3))
    assert message == "error: nothing to train on: name a file with --data.train FILE\n"

def test_a_missing_model(refused: Refused, classify: list[str]) -> None:
    message = refused("train", *classify, "--model.path", "./nothing/here")
    assert "./nothing/here: there is no such folder" in message and "Pass a folder" in message

def test_a_hub_id_without_network(
    refused: Refused, classify: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*args: object, **options: object) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refused("train", *classify, "--model.path", "someone/some-model")
    assert "someone/some-model" in message and "Pass a folder" in message

def test_a_base_model_without_weights(
    refused: Refused, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftcore.hub import BUILTIN

    bare = tmp_path / "base"
    without = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BUILTIN["builtin:base"], bare, ignore=without)
    monkeypatch.setitem(BUILTIN, "builtin:base", bare)
    message = refused("train", "sft", "--data.train", files["chat"])
    assert f"{bare}: neither model.safetensors nor" in message

def test_a_holdout_of_all_rows(refused: Refused, classify: list[str]) -> None:
    message = refused("train", *classify, "--data.holdout", "24")
    assert "data.holdout = 24" in message and "24 rows; hold out fewer" in message

def test_triton_without_a_gpu(refused: Refused, classify: list[str]) -> None:
    message = refused("train", *classify, "--env.kernels", "triton")
    assert "env.kernels = 'triton' on cpu: they need a GPU; use auto" in message

def test_a_document_longer_than_the_positions(
    refused: Refused, classify: list[str], run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("data") / "long.tsv"
    file.write_text("text\tlabel\n" + "red " * 70 + "\twarm\nnavy\tcold\n")
    words = [*classify, "--data.train", str(file)]
    message = refused("train", *words)
    assert "has 72 tokens" in message and "--data.max-length 64" in message
    run("train", *words, "--data.max-length", "64", "--data.over-length", "cut_right")
    assert '"what": "cut"' in Path("runs/run/data/rejected.jsonl").read_text()

def test_a_rule_that_matches_nothing(refused: Refused, classify: list[str]) -> None:
    words = ("--peft.method", "freeze", "--peft.trainable", "pooller")
    assert "pooller" in refused("train", *classify, *words)
    assert "q_porj" in refused(
        "train", *classify, "--peft.method", "lora", "--peft.targets", "q_porj"
    )

def test_a_run_folder_in_use(refused: Refused, classify: list[str]) -> None:
    folder = Path("runs/run")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    message = refused("train", *classify)
    assert "runs/run is not empty" in message and "--resume runs/run" not in message
    (folder / "run.json").write_text("{}")
    assert "--resume runs/run" in refused("train", *classify)

def test_resume_with_a_data_file_that_was_cut(
    classify: list[str], files: dict[str, str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost: with the file as it was the run goes on."""
    whole, file = Path(files["train"]).read_text(), Path("cut.tsv")
    file.write_text(whole)
    run("train", *classify, "--data.train", str(file), "--loop.save-every", "1")
    kept = {p: p.read_bytes() for p in Path("runs/run").rglob("*") if p.is_file()}
    shutil.rmtree("runs/run/checkpoints/step-3")
    lines = whole.splitlines(keepends=True)
    relabelled = [lines[0], *(line.replace("warm\n", "cold\n") for line in lines[1:5]), *lines[5:]]
    for text in ("".join(lines[:-9]), whole.replace("orange", "yellow"), "".join(relabelled)):
        file.write_text(text)
        assert SCRIPTS["train"].main(["--resume", "runs/run"]) == 2
        message = capsys.readouterr().err
        assert "the training rows are not those that the run began with" in message
    file.write_text(whole)
    summary, _ = run("train", "--resume", "runs/run")
    assert summary["steps"] == 3
    last = "checkpoints/step-3/manifest.json"
    for name in ("model/model.safetensors", "predictions.jsonl", last):
        path = Path("runs/run", name)
        assert path not in kept or path.read_bytes() == kept[path]

def test_low_rank_updates_of_weights_that_are_not_kept(
    refused: Refused, classify: list[str]
) -> None:
    words = [*classify, "--model.init", "random", "--peft.method", "lora"]
    assert "over random weights, which are not kept: use full" in refused("train", *words)

def test_resume_of_nothing(refused: Refused) -> None:
    assert "has no config.toml" in refused("train", "--resume", "runs/none")

def test_eval_of_no_run(refused: Refused, run: Run, classify: list[str], bert: Path) -> None:
    message = refused("eval", str(bert))
    assert f"{bert} is not a run folder" in message and "--task" in message
    assert "nothing to evaluate" in refused("eval", str(bert), "--task", "classify")
    message = refused("eval", str(bert), "--task", "clasify")
    assert "task 'clasify' is unknown; nearest: 'classify'; known:" in message
    words = ("--task", "classify", "--data.test", classify[classify.index("--data.test") + 1])
    assert "must name a classifier's classes" in refused("eval", str(bert), *words)

    run("train", *classify)
    assert "; nearest: 'runs/run'." in refused("eval", "runs/rum")
    assert "leave out --task" in refused("eval", "runs/run", "--task", "sft")
    message = refused("eval", "runs/run", "--model.path", str(bert))
    assert "--model.path: runs/run has a model" in message and "adapter_config" in message
    shutil.rmtree("runs/run/model")
    message = refused("eval", "runs/run")
    assert "has not finished" in message and "train.py --resume runs/run" in message

DISK_IS_FULL = """
import resource, signal, sys
import train
from ftcore.tune.checkpoint import Checkpoints
save = Checkpoints.save
def save_then_fill(self, *args):
    path = save(self, *args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return path
Checkpoints.save = save_then_fill
sys.exit(train.main(sys.argv[1:]))
"""

def test_a_full_disk_during_a_save(classify: list[str], run: Run) -> None:
    words = [*classify, "--loop.save-every", "1", "--loop.max-steps", "12"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DISK_IS_FULL, *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    assert "step 2: not saved" in ended.stdout and "free some space" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert "continue with: python train.py --resume runs/run" in ended.stderr
    names = [path.name for path in Path("runs/run/checkpoints").iterdir()]
    assert names == ["step-1"]

    resumed, _ = run("train", "--resume", "runs/run")
    whole, _ = run("train", *words, "--log.name", "whole")
    assert resumed["tuned"] == whole["tuned"] and resumed["steps"] == 12
    weights = [Path(f"runs/{name}/model/model.safetensors") for name in ("run", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

def test_an_adapter_that_could_not_be_saved(
    refused: Refused, sft: list[str], qwen3: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Before training, not after it."""
    tokenizer = tokenizers.Tokenizer.from_file(str(qwen3 / "tokenizer.json"))
    extra = json.loads((qwen3 / "tokenizer_config.json").read_text("utf-8"))
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    gpt2 = _save(tmp_path_factory.mktemp("gpt2"), tokenizer, config, extra, task="lm")
    message = refused("train", *sft, "--model.path", str(gpt2), "--peft.targets", "q_proj")
    assert "transformer.h.0.attn.c_attn is one for peft: train " in message
