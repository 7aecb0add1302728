"""A bundle: what others read of it, what it says of itself, and what happens to a damaged one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from ftcore import files as disk
from ftcore import hub
from ftcore.data.pack import Encoded
from ftcore.deploy import bundle as bundles
from ftcore.deploy.bundle import bundle, open_bundle, try_golden
from ftcore.env.run import read_metrics
from ftcore.errors import CheckpointError, ConfigError, ModelError
from ftcore.evaluate.evaluator import all_logits, continued
from ftcore.model.heads import Model
from ftcore.tune import lora
from ftcore.tune.adapter import load_adapter, load_base

GIVEN = Path("out")
LORA = ("--peft.method", "lora", "--peft.rank", "4")
FULL = ("--peft.method", "full")
AUTO = {
    "sft": transformers.AutoModelForCausalLM,
    "classify": transformers.AutoModelForSequenceClassification,
    "several": transformers.AutoModelForSequenceClassification,
    "tags": transformers.AutoModelForTokenClassification,
}
Trained = Callable[..., Path]

@torch.no_grad()
def logits(model: Model, ids: list[int]) -> torch.Tensor:
    """Of a document, or of each of its tokens."""
    ids_T, all_T = np.array(ids, np.int32), np.ones(len(ids), np.float32)
    labels = (0, 1.0) if model.task == "classify" else (ids_T, all_T)
    return all_logits(model, [Encoded("r", ids_T, *labels)], 64)

@torch.no_grad()
def theirs(model: Any, ids: list[int]) -> torch.Tensor:
    found = model.eval()(torch.tensor([ids])).logits.float()
    return found.reshape(-1, found.shape[-1])

def golden(folder: Path) -> list[dict[str, Any]]:
    return told(folder)["golden"]

def told(folder: Path, name: str = "bundle.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())

@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("method", [FULL, LORA])
def test_transformers_gives_our_logits(kind: str, method: tuple, trained: Trained) -> None:
    bundle(trained(kind, *method), GIVEN)
    loaded, _, about = open_bundle(GIVEN)
    model, report = AUTO[kind].from_pretrained(GIVEN, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for probe in golden(GIVEN):
        ours = logits(loaded.model, probe["ids"])
        torch.testing.assert_close(theirs(model, probe["ids"]), ours, rtol=1e-4, atol=1e-5)
    assert (GIVEN / "certificate.json").exists() == (method != FULL)
    if kind in ("classify", "several"):
        names = loaded.labels
        assert model.config.id2label == dict(enumerate(names)) and len(names) == 2
        assert model.config.problem_type == about["problem"]
    if kind == "tags":
        assert model.config.id2label == dict(enumerate(loaded.labels)) and len(loaded.labels) == 5
        assert model.config.problem_type is None and about["task"] == "tag"
        assert "pipeline_tag: token-classification\n" in (GIVEN / "README.md").read_text("utf-8")

def test_its_tokenizer_and_its_greedy_answers_are_those_of_transformers(trained: Trained) -> None:
    bundle(trained("sft"), GIVEN)
    loaded, own, _ = open_bundle(GIVEN)
    tokenizer = transformers.AutoTokenizer.from_pretrained(GIVEN)
    model = AUTO["sft"].from_pretrained(GIVEN)
    rule = model.generation_config
    assert not rule.do_sample and rule.eos_token_id == [0, 1]
    for probe in golden(GIVEN):
        turn = [{"role": "user", "content": probe["text"]}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == probe["ids"]
        ids_1T = torch.tensor([probe["ids"]])
        given = {"attention_mask": torch.ones_like(ids_1T), "pad_token_id": 0}
        found = model.generate(ids_1T, max_new_tokens=16, **given)
        (ours,) = continued(loaded.model, own, [probe["ids"]], 16)
        assert found[0, len(probe["ids"]) :].tolist() == ours

@pytest.mark.parametrize("kind", ["sft", "classify", "tags"])
def test_an_adapter_is_kept_apart(kind: str, trained: Trained) -> None:
    run = trained(kind, *LORA)
    bundle(run, GIVEN, keep_adapter=True)
    ours = open_bundle(GIVEN)[0].model
    assert len(lora.lora_layers(ours)) == 12 + 2 * (kind == "sft")
    base = AUTO[kind].from_pretrained(GIVEN)
    before = [theirs(base, probe["ids"]) for probe in golden(GIVEN)]
    if kind != "sft":  # which the base never had
        assert torch.equal(base.classifier.weight, ours.head.classifier.weight)
    model = peft.PeftModel.from_pretrained(base, GIVEN / "adapter")
    for probe, start in zip(golden(GIVEN), before, strict=True):
        found = theirs(model, probe["ids"])
        torch.testing.assert_close(found, logits(ours, probe["ids"]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, start, atol=1e-3)
    bundle(run, Path("merged"))
    kept = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    assert kept == {path.name: path.read_bytes() for path in (GIVEN / "adapter").iterdir()}
    assert hub.lineage(str(GIVEN)) == (GIVEN, [GIVEN / "adapter"])
    again = load_base(str(GIVEN), task=ours.task, dtype=torch.float32)
    merged = load_base("merged", task=ours.task, dtype=torch.float32)
    for name, param in merged.model.named_parameters():
        assert torch.equal(param, again.model.get_parameter(name)), name

def test_merging_rounds_once(trained: Trained, qwen3: Path) -> None:
    run = trained("sft", *LORA, "--env.precision", "bf16")
    bundle(run, GIVEN)
    merged, base = (
        load_base(str(path), task="lm", dtype=torch.bfloat16) for path in (GIVEN, qwen3)
    )
    load_adapter(base.model, run / "adapter", family=base.family)
    for name, layer in lora.lora_layers(base.model).items():
        update_OC = layer.config.scale * layer.lora_b.double() @ layer.lora_a.double()
        exact_OC = layer.base.weight.double() + update_OC
        found_OC = merged.model.get_submodule(name).weight
        assert (found_OC != exact_OC.bfloat16()).double().mean() < 1e-2  # ties, in fp32
        assert not torch.equal(found_OC, layer.base.weight)
    assert {path.name for path in GIVEN.iterdir()} == {
        *("config.json", "model.safetensors", "generation_config.json", "manifest.json"),
        *("tokenizer.json", "tokenizer_config.json", "README.md", "bundle.json"),
        *("certificate.json", "reference.jsonl"),
    }

def test_it_knows_the_temperature_of_the_weights_that_it_holds(trained: Trained) -> None:
    run = trained("classify", "--data.holdout", "4", "--loop.eval-every", "2")
    bundle(run, GIVEN)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "eval/loss" in line]
    best = min(lines, key=lambda line: line["eval/loss"])
    assert len(lines) > 3 and told(GIVEN)["temperature"] == best["eval/temperature"]
    shutil.rmtree(GIVEN)
    (run / "metrics.jsonl").unlink()
    bundle(run, GIVEN)
    assert told(GIVEN)["temperature"] is None

def test_the_card_says_what_was_asked_and_found(trained: Trained) -> None:
    run = trained("sft", *LORA)
    bundle(run, GIVEN)
    card = (GIVEN / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n")
    loss = told(run, "eval.json")["tuned"]["chat_test"]["loss"]
    for words in (f"# {GIVEN}", "task sft", "lr = 0.01", "16 documents", f"| {loss:.4f} |"):
        assert words in card and "Merging the adapter into its base" in card, words
    about = huggingface_hub.ModelCard.load(GIVEN / "README.md").data
    assert about.pipeline_tag == "text-generation"

@pytest.mark.parametrize("kind", ["sft", "classify"])
def test_one_flipped_byte_is_named(kind: str, trained: Trained) -> None:
    bundle(trained(kind, *LORA), GIVEN, keep_adapter=True)
    names = [path.relative_to(GIVEN) for path in GIVEN.rglob("*") if path.is_file()]
    assert len(names) >= 11
    for name in names:
        whole = (GIVEN / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 2):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            (GIVEN / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"{name} (was altered|cannot be read)"):
                open_bundle(GIVEN)
        (GIVEN / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            open_bundle(GIVEN)
        (GIVEN / name).write_bytes(whole)
    (GIVEN / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="index.json is not in manifest.json: take it out"):
        open_bundle(GIVEN)
    (GIVEN / "model.safetensors.index.json").rename(GIVEN / ".gitattributes")
    open_bundle(GIVEN)

@pytest.mark.parametrize("kind", ["sft", "classify", "several", "scored", "tags", "masked"])
def test_the_golden_test_sees_a_changed_weight(kind: str, trained: Trained) -> None:
    bundle(trained(kind), GIVEN)
    loaded, tokenizer, about = open_bundle(GIVEN)
    weight_OC = loaded.model.trunk.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight_OC.mul_(1 + 1e-7)
        try_golden(loaded.model, tokenizer, about)  # rounding is none
        weight_OC[3:9].neg_()
    with pytest.raises(ModelError, match=r"bundle.json: '.*': the model says .*: its weights"):
        try_golden(loaded.model, tokenizer, about)
    weight_OC.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        try_golden(loaded.model, tokenizer, about)

def test_the_golden_test_sees_another_template(trained: Trained) -> None:
    bundle(trained("sft"), GIVEN)
    loaded, tokenizer, about = open_bundle(GIVEN)
    tokenizer.chat_template = tokenizer.chat_template.replace("im_start", "im_begin")
    with pytest.raises(ModelError, match="'Where is my order.': its ids are .*chat template"):
        try_golden(loaded.model, tokenizer, about)

def test_the_golden_test_sees_an_adapter_that_is_not_applied(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle(trained("sft", *LORA), GIVEN, keep_adapter=True)
    loaded, tokenizer, about = open_bundle(GIVEN)
    assert (layers := lora.unwrap(loaded.model))
    with pytest.raises(ModelError, match="or its adapter, are not those of the run"):
        try_golden(loaded.model, tokenizer, about)
    for name, layer in layers.items():
        loaded.model.set_submodule(name, layer)
        layer.lora_b.data.zero_()
    monkeypatch.setattr(bundles, "NARROW", 1e9)
    with pytest.raises(ModelError, match="the model says the same without its adapter"):
        try_golden(loaded.model, tokenizer, about)

def test_files_that_change_later_change_no_answer(trained: Trained) -> None:
    bundle(trained("sft", *LORA), GIVEN, keep_adapter=True)
    loaded, tokenizer, about = open_bundle(GIVEN)
    for path in (GIVEN / "model.safetensors", GIVEN / "adapter" / "adapter_model.safetensors"):
        path.write_bytes(b"\xff" * path.stat().st_size)
        os.truncate(path, 0)  # a mapped file would end the process
    try_golden(loaded.model, tokenizer, about)

def test_what_does_not_say_the_same_is_not_written(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("sft", *LORA)
    monkeypatch.setattr(lora.LoRALinear, "folded_weight", lambda layer: -layer.base.weight)
    with pytest.raises(ModelError, match="bundle.json: .*, are not those of the run"):
        bundle(run, GIVEN / "a")
    assert not list(GIVEN.iterdir())

def test_refusals(trained: Trained) -> None:
    run = trained("classify")
    with pytest.raises(ConfigError, match="run: was trained without an adapter: leave out --keep"):
        bundle(run, GIVEN, keep_adapter=True)
    with pytest.raises(ConfigError, match="none is no run folder"):
        bundle(Path("none"), GIVEN)
    GIVEN.mkdir()
    bundle(run, GIVEN)
    with pytest.raises(ConfigError, match="out is not empty: name another folder, or delete"):
        bundle(run, GIVEN)
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        open_bundle(run)
    (run / "eval.json").unlink()
    with pytest.raises(ModelError, match="has not been judged; go on with: .* --resume runs/run"):
        bundle(run, Path("more"))
    shutil.rmtree(run / "model")
    with pytest.raises(ModelError, match="has neither model/ nor adapter/, so the run has not fin"):
        bundle(run, Path("more"))

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ftcore.deploy.bundle import bundle, open_bundle
from ftcore.errors import CheckpointError

pace, run, out, seen = random.Random(1), Path(sys.argv[1]), Path("out/b"), [0, 0]
started = time.perf_counter()
bundle(run, Path("out/first"))
longest = time.perf_counter() - started
for _ in range(24):
    if not (child := os.fork()):
        bundle(run, out)
        os._exit(0)
    time.sleep(pace.uniform(0, 1.2 * longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen[out.exists()] += 1
    if out.exists():
        open_bundle(out)
        os.rename(out, f"out/{seen[1]}")
assert min(seen), seen
bundle(run, out)
"""

def test_a_bundle_is_whole_or_not_there(trained: Trained) -> None:
    run = trained("sft", *LORA)
    root = Path(disk.__file__).parents[1]
    child = subprocess.run(
        [sys.executable, "-c", KILLS, str(run)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    open_bundle(GIVEN / "b")
