"""A model folder in and out: bit-equal, read by transformers, and whole."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from ftcore import hub
from ftcore.errors import ModelError
from ftcore.hub import resolve
from ftcore.model.families import family_named
from ftcore.model.load import CONFIG, INDEX, SINGLE, load_model, save_model

TWO = ("a", "b")

def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

def same(ours: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same tensors, bit by bit and in the same dtype."""
    mine, theirs = ours.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
        for name in mine
    )

@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Makes of tiny models several files, as of large ones."""
    small = partial(huggingface_hub.save_torch_state_dict, max_shard_size=9_000)
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", small)

@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_save_load_is_bit_equal(
    kind, dtype, shards, hf, task_of_kind, tmp_path, request
) -> None:
    if shards:
        request.getfixturevalue("small_shards")
    loaded = load_model(hf(kind)[1], task=task_of_kind(kind), dtype=dtype)
    assert not loaded.accounting.new and not loaded.model.training
    save_model(loaded, tmp_path)
    assert (tmp_path / INDEX).exists() == shards != (tmp_path / SINGLE).exists()
    again = load_model(tmp_path, task=task_of_kind(kind), dtype=dtype)
    assert same(loaded.model, again.model)
    assert again.model.spec == loaded.model.spec and again.labels == loaded.labels

@pytest.mark.usefixtures("small_shards")
def test_transformers_loads_what_we_save(kind, hf, task_of_kind, auto_class, tmp_path) -> None:
    oracle, folder = hf(kind)
    loaded = load_model(folder, task=task_of_kind(kind), dtype=torch.float32)
    save_model(loaded, tmp_path)
    assert (tmp_path / INDEX).exists()
    theirs, report = auto_class(kind).from_pretrained(tmp_path, output_loading_info=True)
    pooled = kind in ("bert-trunk", "roberta-trunk")
    pooler = {"pooler.dense.weight", "pooler.dense.bias"} if pooled else set()
    assert set(report["missing_keys"]) == pooler and not report["unexpected_keys"]
    assert type(theirs) is type(oracle) and theirs.dtype == torch.float32
    mine = {n: t for n, t in theirs.state_dict().items() if n not in pooler}
    assert all(torch.equal(tensor, oracle.state_dict()[name]) for name, tensor in mine.items())
    before, after = oracle.config.to_dict(), theirs.config.to_dict()
    assert {k for k in before if before[k] != after.get(k)} <= {"architectures", "_name_or_path"}

@pytest.mark.parametrize(
    ("variant", "head", "new"),
    [
        ("bert", "cls.", ("pooler", "classifier")),
        ("roberta", "lm_head.", ("pooler", "classifier")),
        ("distilbert", "vocab_", ("pooler", "classifier")),
        ("modernbert", "decoder.", ("classifier",)),  # which pools by the rest of that head
    ],
)
def test_the_head_of_a_masked_lm_is_not_needed(variant, head, new, hf) -> None:
    """All of it is listed as ignored, and only what a classifier adds is new."""
    folder = hf(f"{variant}-mlm")[1]
    held = [name for name in load_file(folder / SINGLE) if name.startswith(head)]
    options = {"dtype": torch.float32, "generator": generator()}
    loaded = load_model(folder, task="classify", labels=("a", "b", "c"), **options)
    names = [f"head.{m}.{p}" for m in new for p in ("weight", "bias")]
    assert held and loaded.accounting.ignored == sorted(held)
    assert sorted(loaded.accounting.new) == sorted(names)
    trunk = load_model(folder, task="trunk", **options)
    assert set(held) <= set(trunk.accounting.ignored) and not trunk.accounting.new
    assert same(trunk.model.trunk, loaded.model.trunk)

@pytest.mark.parametrize("kind", ["bert-mlm", "roberta-mlm", "distilbert-mlm", "modernbert-mlm",
                                  "qwen3-tied", "gpt2-tied", "neox-untied", "gemma2-tied"])
def test_any_checkpoint_becomes_a_tagger_with_a_new_classifier(kind, hf, tmp_path) -> None:
    """Which has a bias in every family; nothing that pools a document is part of it."""
    folder = hf(kind)[1]
    options = {"task": "tag", "dtype": torch.float32, "labels": TWO}
    loaded = load_model(folder, generator=generator(), **options)
    assert sorted(loaded.accounting.new) == ["head.classifier.bias", "head.classifier.weight"]
    assert loaded.model.head.classifier.weight.shape == (2, 32)
    own = {name.partition(".")[0] for name, _ in loaded.model.head.named_parameters()}
    transform = {"transform", "transform_norm"} if kind == "modernbert-mlm" else set()
    assert own == {"classifier"} | transform
    with pytest.raises(ModelError, match="missing: (classifier|score).weight, "):
        load_model(folder, **options)
    save_model(loaded, tmp_path, problem="token_classification")
    assert "problem_type" not in json.loads((tmp_path / CONFIG).read_text())
    assert load_model(tmp_path, task="tag", dtype=torch.float32).labels == TWO

def test_a_family_without_a_tagger_says_so(hf) -> None:
    with pytest.raises(ModelError, match="task 'tag' is none of lm, classify, trunk"):
        load_model(hf("gemma3-tied")[1], task="tag", dtype=torch.float32, labels=TWO)

@pytest.mark.parametrize("kind", ["bert-trunk", "bert-classify", "roberta-classify"])
def test_another_checkpoint_becomes_a_masked_lm(kind, hf) -> None:
    """The head's own parts are drawn; its matrix is that of the embeddings, as they were."""
    folder = hf(kind)[1]
    loaded = load_model(folder, task="mlm", dtype=torch.float32, generator=generator())
    head, names = loaded.model.head, [name.removeprefix("head.") for name in loaded.accounting.new]
    own = {name for name, _ in head.named_parameters()} - {"lm_head.weight"}
    assert set(names) == own and "lm_head.bias" in own
    assert not head.lm_head.bias.any() and head.transform.weight.std() > 0.01
    trunk = load_model(folder, task="trunk", dtype=torch.float32).model.trunk
    assert torch.equal(head.lm_head.weight, trunk.embed_tokens.weight)
    with pytest.raises(ModelError, match="missing: (cls.predictions|lm_head)"):
        load_model(folder, task="mlm", dtype=torch.float32)

def test_a_masked_lm_must_have_all_of_its_head(hf, tmp_path) -> None:
    """Where config.json names it, a part that is lost is not drawn anew."""
    tensors = load_file(hf("bert-mlm")[1] / SINGLE)
    (tmp_path / CONFIG).write_text((hf("bert-mlm")[1] / CONFIG).read_text())
    for lost in ("cls.predictions.bias", "cls.predictions.transform.LayerNorm.weight"):
        save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / SINGLE)
        with pytest.raises(ModelError, match=f"missing: {lost}"):
            load_model(tmp_path, task="mlm", dtype=torch.float32, generator=generator())

def test_a_classifier_must_have_all_of_its_head(hf, tmp_path) -> None:
    """A folder that says it is one is damaged where a part of the head is not there."""
    tensors = load_file(hf("bert-classify")[1] / SINGLE)
    (tmp_path / CONFIG).write_text((hf("bert-classify")[1] / CONFIG).read_text())
    for lost in ("classifier", "bert.pooler.dense"):
        save_file({k: v for k, v in tensors.items() if not k.startswith(lost)}, tmp_path / SINGLE)
        with pytest.raises(ModelError, match=f"missing: {lost}"):
            load_model(tmp_path, task="classify", dtype=torch.float32, generator=generator())

def test_a_classifier_keeps_its_labels(hf, tmp_path) -> None:
    loaded = load_model(hf("bert-classify")[1], task="classify", dtype=torch.float32)
    assert loaded.labels == ("bad", "fair", "good")
    save_model(loaded._replace(labels=("a", "b", "c")), tmp_path)
    again = load_model(tmp_path, task="classify", dtype=torch.float32)
    assert again.labels == ("a", "b", "c")
    assert again.config["label2id"] == {"a": 0, "b": 1, "c": 2}

def test_more_than_ten_labels_keep_their_order(hf, tmp_path) -> None:
    """JSON sorts "10" before "2"."""
    labels = tuple(f"class {index}" for index in range(12))
    loaded = load_model(
        hf("qwen3-tied")[1],
        task="classify",
        dtype=torch.float32,
        labels=labels,
        generator=generator(),
    )
    save_model(loaded, tmp_path)
    assert load_model(tmp_path, task="classify", dtype=torch.float32).labels == labels

def test_new_heads_are_drawn_from_the_generator(hf) -> None:
    folder = hf("bert-trunk")[1]

    def load(seed: int) -> torch.nn.Module:
        loaded = load_model(
            folder, task="classify", dtype=torch.float32, labels=TWO, generator=generator(seed)
        )
        assert loaded.accounting.new == ["head.classifier.weight", "head.classifier.bias"]
        return loaded.model

    first, again, other = load(0), load(0), load(1)
    assert same(first, again) and not same(first, other)
    assert first.head.classifier.weight.std() > 0.05 and not first.head.classifier.bias.any()
    with pytest.raises(ModelError, match="missing: classifier.weight, classifier.bias"):
        load_model(folder, task="classify", dtype=torch.float32, labels=TWO)
    with pytest.raises(ModelError, match="id2label = None: must name a classifier's classes"):
        load_model(folder, task="classify", dtype=torch.float32, generator=generator())

def test_another_number_of_labels_is_an_error(hf) -> None:
    with pytest.raises(ModelError, match=r"classifier.weight is \[3, 32\], must be \[5, 32\]"):
        options = {"dtype": torch.float32, "labels": tuple("abcde")}
        load_model(hf("bert-classify")[1], task="classify", **options)

@pytest.mark.parametrize("kind", ["bert-classify", "qwen3-tied", "qwen3-untied"])
def test_random_weights_are_a_function_of_the_generator(kind, hf, task_of_kind, tmp_path) -> None:
    (tmp_path / CONFIG).write_text((hf(kind)[1] / CONFIG).read_text())
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 7)  # the global generator plays no part
        loaded = load_model(
            tmp_path,
            task=task_of_kind(kind),
            dtype=torch.float32,
            init="random",
            generator=generator(seed),
        )
        models.append(loaded.model)
        assert set(loaded.accounting.new) == {name for name, _ in loaded.model.named_parameters()}
    assert same(models[0], models[1]) and not same(models[0], models[2])
    for name, parameter in models[0].named_parameters():
        if parameter.ndim == 2:
            error = 0.1 / parameter.numel() ** 0.5  # of the mean; of the deviation, 0.7 of that
            assert abs(parameter.mean()) < 4 * error, name
            assert abs(parameter.std() - 0.1) < 4 * error, name
        else:
            is_norm_weight = "norm" in name and name.endswith("weight")
            assert torch.equal(parameter, torch.full_like(parameter, float(is_norm_weight))), name

def test_ties_are_one_tensor(hf) -> None:
    for kind, tied in (("qwen3-tied", True), ("qwen3-untied", False)):
        model = load_model(hf(kind)[1], task="lm", dtype=torch.float32).model
        assert (model.head.lm_head.weight is model.trunk.embed_tokens.weight) == tied

def test_an_empty_model_takes_no_compiler_and_leaves_the_default_dtype() -> None:
    """Torch's tracing machinery costs more to import than a small model to load."""
    code = (
        "import sys, torch; from pathlib import Path; from ftcore.model.load import load_model;"
        "from ftcore.hub import resolve;"
        "load_model(resolve('builtin:base'), task='lm', dtype=torch.bfloat16);"
        "assert torch.get_default_dtype() == torch.float32;"
        "sys.exit('sympy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

def test_refuses_to_save_another_model(hf, tmp_path) -> None:
    loaded = load_model(hf("qwen3-tied")[1], task="lm", dtype=torch.float32)
    loaded.model.trunk.layers[0].lora_a = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ModelError, match="trunk.layers.0.lora_a: the family qwen3 has no name"):
        save_model(loaded, tmp_path)
    assert not list(tmp_path.iterdir())

def test_config_keeps_unknown_keys_and_has_one_dtype(hf, tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((hf("qwen3-tied")[1] / CONFIG).read_text())
    config |= {"torch_dtype": "float32", "eos_token_id": 5, "an_unknown_key": [1]}
    (source / CONFIG).write_text(json.dumps(config))
    loaded = load_model(
        source, task="lm", dtype=torch.bfloat16, init="random", generator=generator()
    )
    save_model(loaded, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["eos_token_id"] == 5 and written["an_unknown_key"] == [1]
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written
    assert written["architectures"] == ["Qwen3ForCausalLM"]

@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json: cannot be read .No such file"),
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: holds list, must be a JSON object"),
        ("{}", "config.json: model_type is None; this code knows bert, "),
        ('{"model_type": "mamba"}', "model_type is 'mamba'; this code knows bert, "),
        ('{"model_type": ["bert"]}', "model_type is .'bert'.; this code knows bert, "),
        ('{"model_type": "qwen3"}', "config.json: vocab_size = None: must be an integer"),
        ('{"model_type": "bert"}', "task 'lm' is none of mlm, classify, tag, trunk"),
    ],
)
def test_refuses_a_config(text, message, tmp_path) -> None:
    if text is not None:
        (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ModelError, match=message) as error:
        load_model(tmp_path, task="lm", dtype=torch.float32)
    assert str(tmp_path) in str(error.value)

@pytest.mark.parametrize("labels", [{}, {"0": "a", "2": "b"}, {"0": "a", "1": "a"}, ["a"], 3])
def test_refuses_labels(labels, hf, tmp_path) -> None:
    config = json.loads((hf("bert-classify")[1] / CONFIG).read_text()) | {"id2label": labels}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="must name a classifier's classes 0 .. K - 1, each once"):
        load_model(tmp_path, task="classify", dtype=torch.float32)

def test_resolve_names_of_models(tmp_path, monkeypatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("builtin:base").name == "base"
    for path in (str(tmp_path / "none"), "a/b/c", "builtin:other", "./a"):
        with pytest.raises(ModelError, match="there is no such folder.* Pass a folder in HF"):
            resolve(path)

def test_hub_reads_no_pickle_and_says_how_to_do_without(tmp_path, monkeypatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("owner/name") == Path(tmp_path) and asked["name"] == "owner/name"
    endings = {pattern.rpartition(".")[2] for pattern in asked["patterns"]}
    assert endings == {"safetensors", "json", "txt", "jinja", "md"} and set(hub.FILES) == set(
        asked["patterns"]
    )

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError) as error:
        resolve("owner/name")
    assert str(error.value) == (
        "model.path = owner/name: there is no such folder, and nothing from the hub (no route to"
        " host). Pass a folder in HF layout, builtin:base, builtin:start, or owner/name."
    )

def test_a_family_has_no_name_for_a_foreign_tensor() -> None:
    with pytest.raises(ModelError, match="the family qwen3 has no name for it"):
        family_named("qwen3").to_hf("trunk.layers.0.self_attn.lora_a")
