"""Adapter files, both ways with the peft package, on tiny random transformers models."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from ftcore.config import PeftConfig
from ftcore.errors import CheckpointError, ModelError
from ftcore.model.families import Family, family_named
from ftcore.model.heads import Model
from ftcore.tune.adapter import WEIGHTS, base_sha256, load_adapter, save_adapter
from ftcore.tune.freeze import frozen_hashes
from ftcore.tune.lora import apply_lora, lora_layers, merge
from kernels.docs import Docs

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QWEN3 = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
DOCS = ([3, 11, 7, 42, 5], [8, 1, 30])
UP_PROJ = "base_model.model.model.layers.1.mlp.up_proj"

def make_hf(kind: str = "lm") -> transformers.PreTrainedModel:
    """A tiny random transformers model: lm, tied (an lm with tied embeddings), and of documents
    or tokens the classifiers qwen3, bert, qwen3-tag and bert-tag."""
    torch.manual_seed(0)
    if kind.startswith("bert"):
        settings = transformers.BertConfig(**SIZES, max_position_embeddings=16, num_labels=3)
        auto = {"bert": transformers.BertForSequenceClassification,
                "bert-tag": transformers.BertForTokenClassification}[kind]
        return auto(settings).eval()
    settings = transformers.Qwen3Config(**QWEN3, tie_word_embeddings=kind == "tied", num_labels=3)
    if kind == "qwen3":
        return transformers.Qwen3ForSequenceClassification(settings).eval()
    if kind == "qwen3-tag":
        return transformers.Qwen3ForTokenClassification(settings).eval()
    return transformers.Qwen3ForCausalLM(settings).eval()

def family_of(hf: transformers.PreTrainedModel) -> Family:
    return family_named(hf.config.model_type)

def ours(hf: transformers.PreTrainedModel) -> Model:
    """The same model, written here."""
    family = family_of(hf)
    is_tagger = type(hf).__name__.endswith("ForTokenClassification")
    task = "lm" if hasattr(hf, "lm_head") else "tag" if is_tagger else "classify"
    model = Model(family.to_spec(hf.config.to_dict()), task, num_labels=3).eval()
    with torch.no_grad():
        for name, tensor in hf.state_dict().items():
            parts = family.split(name, tensor, model.spec.num_heads)
            for ours_name, part in zip(family.to_ours(name), parts, strict=True):
                model.get_parameter(ours_name).copy_(part)
    return model

def logits(model: Model) -> Tensor:
    docs = Docs.from_lengths([len(ids) for ids in DOCS])
    positions_N = torch.cat([torch.arange(len(ids)) for ids in DOCS])
    tokens_N = torch.cat([torch.tensor(ids) for ids in DOCS])
    inputs = (tokens_N, positions_N, torch.zeros_like(tokens_N), docs)
    if model.task != "classify":
        return model.head(model.trunk(*inputs))
    return model.head(model.trunk(*inputs, rows_M=model.head.rows(docs)), docs)

@torch.no_grad()
def hf_logits(model: torch.nn.Module) -> Tensor:
    """The same rows from transformers, one document at a time."""
    rows = [model(input_ids=torch.tensor([ids])).logits.squeeze(0) for ids in DOCS]
    return torch.cat(rows) if rows[0].ndim == 2 else torch.stack(rows)

def tune(model: torch.nn.Module) -> None:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)

def wrap(model: Model, **changes: object) -> Model:
    config = PeftConfig(**({"rank": 4, "alpha": 8.0} | changes))
    apply_lora(model, config, generator=torch.Generator().manual_seed(1))
    tune(model)
    return model

def save(model: Model, folder: Path) -> Path:
    family = family_named("qwen3" if model.spec.is_causal else "bert")
    save_adapter(model, folder, family=family, base_path="some/base")
    return folder

def save_theirs(hf: transformers.PreTrainedModel, folder: Path, **changes: object) -> Tensor:
    """An adapter made by peft; the logits that it gives there."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | changes
    wrapped = peft.get_peft_model(hf, peft.LoraConfig(**settings)).eval()
    tune(wrapped)
    wrapped.save_pretrained(folder)
    return hf_logits(wrapped)

def load(model: Model, folder: Path) -> None:
    load_adapter(model, folder, family=family_named("qwen3"))

def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

CLOSE = {"rtol": 1e-4, "atol": 1e-5}

def assert_comes_back(
    hf: torch.nn.Module, model: Model, again: Model, folder: Path, family: Family
) -> None:
    """What was trained and saved is read by us, bit by bit, and by peft over `hf`."""
    assert (logits(model) - hf_logits(hf)).abs().max() > 0.1
    load_adapter(again, folder, family=family)
    assert torch.equal(logits(again), logits(model))
    assert tuple(lora_layers(again)) == tuple(lora_layers(model))
    for name, p in model.named_parameters():
        other = again.get_parameter(name)
        assert not p.requires_grad or other.requires_grad and torch.equal(other, p)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys|Unexpected keyword")
        theirs = peft.PeftModel.from_pretrained(hf, folder).eval()
    torch.testing.assert_close(logits(model), hf_logits(theirs), **CLOSE)

@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lm", {}),
        ("lm", {"rs_lora": True, "alpha": 3.5, "dropout": 0.1}),
        ("lm", {"targets": ("*.1.*_proj", "q_proj"), "extra_modules": ("trunk.norm",)}),
        ("tied", {"extra_modules": ("embed_tokens",)}),
        ("qwen3", {"extra_modules": ("head",)}),
        ("bert", {"extra_modules": ("head",)}),
        ("qwen3-tag", {"extra_modules": ("head",)}),
        ("bert-tag", {"extra_modules": ("head",)}),
    ],
)
def test_ours_in_peft_and_back(tmp_path: Path, kind: str, changes: dict) -> None:
    hf = make_hf(kind)
    model, again = wrap(ours(hf), **changes), ours(hf)
    folder = save(model, tmp_path / "adapter")
    assert_comes_back(hf, model, again, folder, family_of(hf))

@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lm", {"task_type": "CAUSAL_LM"}),
        ("tied", {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
        ("lm", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
        ("lm", {"target_modules": r".*\.1\.mlp\..*_proj", "modules_to_save": ["self_attn"]}),
        ("lm", {"modules_to_save": ["embed_tokens", "norm"], "init_lora_weights": "gaussian"}),
        ("qwen3", {"task_type": "SEQ_CLS"}),
        ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
        ("qwen3-tag", {"task_type": "TOKEN_CLS", "target_modules": ["q_proj", "down_proj"]}),
        ("bert-tag", {"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]}),
    ],
)
def test_theirs_in_ours(tmp_path: Path, kind: str, changes: dict) -> None:
    hf = make_hf(kind)
    model, family = ours(hf), family_of(hf)
    expected = save_theirs(hf, tmp_path, **changes)
    assert (logits(model) - expected).abs().max() > 0.1
    load_adapter(model, tmp_path, family=family)
    torch.testing.assert_close(logits(model), expected, **CLOSE)

def test_config_is_what_peft_and_vllm_read(tmp_path: Path) -> None:
    folder = save(wrap(ours(make_hf()), targets=("v_proj",)), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)],
        "modules_to_save": None,
        "bias": "none",
        "inference_mode": True,
    }
    assert config.keys() <= {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert load_file(folder / WEIGHTS).keys() == {
        f"base_model.model.{target}.lora_{factor}.weight"
        for target in config["target_modules"]
        for factor in "AB"
    }

def drop_a_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{UP_PROJ}.lora_B.weight"]

def drop_a_layer(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{UP_PROJ}.lora_A.weight"], tensors[f"{UP_PROJ}.lora_B.weight"]

def add_a_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.ones(4, 16)

def reshape_a_tensor(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP_PROJ}.lora_A.weight"] = torch.ones(5, 16)

def make_integers(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP_PROJ}.lora_A.weight"] = torch.ones(4, 16, dtype=torch.int32)

def break_several(tensors: dict[str, Tensor]) -> None:
    for change in (reshape_a_tensor, add_a_tensor):
        change(tensors)
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]

@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_tensor, rf"missing: {UP_PROJ}.lora_B.weight"),
        (drop_a_layer, rf"missing: {UP_PROJ}.lora_A.weight, {UP_PROJ}.lora_B.weight$"),
        (add_a_tensor, r"unexpected: .*layers.9.mlp.up_proj.lora_A.weight"),
        (reshape_a_tensor, r"misfit: .*lora_A.weight is \[5, 16\], must be \[4, 16\]"),
        (make_integers, rf"misfit: {UP_PROJ}.lora_A.weight is I32, must be one of BF16"),
        (break_several, r"missing: .*\n  unexpected: .*\n  misfit: "),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, change: Callable, message: str) -> None:
    hf = make_hf()
    model = ours(hf)
    save_theirs(hf, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    assert_refused(model, tmp_path, message)

def assert_refused(model: Model, folder: Path, message: str) -> None:
    """Loading fails with this message and leaves the model as it was."""
    model.requires_grad_(False)
    before = frozen_hashes(model)
    with pytest.raises(ModelError, match=message):
        load(model, folder)
    assert frozen_hashes(model) == before and not lora_layers(model)

@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True, "rank_pattern": {"q_proj": 8}}, "use_dora = True.*; rank_pattern = "),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' must be 'LORA'"),
        ({"bias": "lora_only"}, "bias = 'lora_only' must be 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' must be True"),
        ({"r": "4"}, "r = '4', lora_alpha = 6, lora_dropout = 0.0 must be numbers"),
        ({"lora_dropout": 1.5}, r"lora_dropout = 1.5 must be numbers: .*, in \[0, 1\)"),
    ],
)
def test_options_that_we_do_not_have(tmp_path: Path, changes: dict, message: str) -> None:
    hf = make_hf()
    model = ours(hf)
    save_theirs(hf, tmp_path)
    edit_json(tmp_path / "adapter_config.json", **changes)
    assert_refused(model, tmp_path, message)

def test_damaged_files(tmp_path: Path) -> None:
    hf = make_hf()
    model = ours(hf)
    assert_refused(model, tmp_path, "adapter_config.json: cannot be read")
    save_theirs(hf, tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-7])
    assert_refused(model, tmp_path, "not a whole safetensors file")
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    message = "neither adapter_model.safetensors nor .* It holds adapter_model.bin: convert"
    assert_refused(model, tmp_path, message)
    (tmp_path / "adapter_config.json").write_text("[1]")
    assert_refused(model, tmp_path, "must be a JSON object")

def test_our_folder_is_whole_or_refused(tmp_path: Path) -> None:
    hf = make_hf()
    folder = save(wrap(ours(hf)), tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", lora_alpha=16)
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        load(ours(hf), folder)
    save(wrap(ours(hf)), folder)
    load(ours(hf), folder)

def test_another_base_is_refused(tmp_path: Path) -> None:
    hf = make_hf()
    folder = save(wrap(ours(hf), extra_modules=("trunk.norm",)), tmp_path / "adapter")
    model = ours(hf)
    with torch.no_grad():
        model.trunk.norm.weight.mul_(2)  # the adapter brings this one itself
    load(model, folder)
    other = ours(hf)
    with torch.no_grad():
        other.trunk.layers[0].mlp.up_proj.weight[0, 0] += 0.01
    assert_refused(other, folder, "trained on another base model")

def test_base_hash_does_not_depend_on_precision_or_wrapping() -> None:
    hf = make_hf()
    model = ours(hf)
    digest = base_sha256(model)
    assert base_sha256(ours(hf).double()) == base_sha256(ours(hf).bfloat16()) == digest
    wrap(model)
    assert base_sha256(model) == digest
    merge(model)
    assert base_sha256(model) == digest
    assert base_sha256(ours(make_hf("tied"))) != digest

def test_an_adapter_of_a_bf16_base_loads_in_fp32(tmp_path: Path) -> None:
    hf = make_hf()
    model = wrap(ours(hf).bfloat16())
    folder = save(model, tmp_path / "adapter")
    wide = ours(hf)
    load(wide, folder)
    torch.testing.assert_close(logits(wide), logits(model).float(), rtol=0.05, atol=0.05)

def test_tied_matrices_stay_tied(tmp_path: Path) -> None:
    hf = make_hf("tied")
    model = ours(hf)
    save_theirs(hf, tmp_path, modules_to_save=["embed_tokens"])
    assert_refused(model, tmp_path, "trains trunk.embed_tokens.weight apart from head.lm_head")

def test_saving_and_loading_need_the_right_model(tmp_path: Path) -> None:
    hf = make_hf()
    with pytest.raises(ModelError, match="no LoRA layers"):
        save(ours(hf), tmp_path / "adapter")
    model = wrap(ours(hf))
    folder = save(model, tmp_path / "adapter")
    with pytest.raises(AssertionError, match="one adapter at a time"):
        load(model, folder)
