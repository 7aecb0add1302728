"""Safetensors with every tensor accounted for, and every way a folder can be wrong."""

import dataclasses
import json
import shutil
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from ftcore.errors import ModelError
from ftcore.model.families import FOLDER, NAMES, RULES, family_named
from ftcore.model.load import INDEX, SINGLE, load_model, save_model, stored_tensors
from ftcore.model.transformer import ModelSpec

@pytest.fixture
def folder(hf, tmp_path) -> Path:
    """A copy of the untied decoder that a test may damage."""
    return Path(shutil.copytree(hf("qwen3-untied")[1], tmp_path / "model"))

@pytest.fixture
def edit(folder) -> Callable[..., None]:
    """Rewrite the folder's tensors: names to drop, tensors to add or replace."""

    def rewrite(drop: tuple[str, ...] = (), add: dict[str, torch.Tensor] | None = None) -> None:
        tensors = load_file(folder / SINGLE) | (add or {})
        kept = {name: tensor for name, tensor in tensors.items() if name not in drop}
        save_file(kept, folder / SINGLE, metadata={"format": "pt"})

    return rewrite

def refuse(folder: Path, task: str = "lm", **settings) -> str:
    """The message of the error that loading raises."""
    with pytest.raises(ModelError) as error:
        load_model(folder, task=task, dtype=torch.float32, **settings)
    return str(error.value)

def test_all_misfits_in_one_message(folder, edit) -> None:
    edit(
        drop=("model.norm.weight", "model.layers.1.self_attn.q_norm.weight"),
        add={
            "model.layers.0.mlp.up_proj.weight": torch.zeros(48, 31),
            "model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.int8),
            "model.layers.3.mlp.up_proj.weight": torch.zeros(48, 32),
            "model.extra.bias": torch.zeros(3),
        },
    )
    message = refuse(folder)
    assert str(folder) in message
    assert "missing: model.layers.1.self_attn.q_norm.weight, model.norm.weight" in message
    assert "unexpected: model.extra.bias, model.layers.3.mlp.up_proj.weight" in message
    assert "model.layers.0.mlp.up_proj.weight is [48, 31], must be [48, 32]" in message
    assert "model.layers.2.mlp.up_proj.weight is I8, must be one of BF16" in message
    assert "weights, config.json and the number of labels do not fit each other\n" in message

def test_a_tensor_under_two_names(folder, edit) -> None:
    edit(add={"norm.weight": torch.zeros(32)})
    assert "unexpected: norm.weight beside model.norm.weight" in refuse(folder)

def test_names_with_and_without_the_prefix(hf, folder) -> None:
    tensors = load_file(folder / SINGLE)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / SINGLE)
    ours = load_model(folder, task="lm", dtype=torch.float32).model.state_dict()
    true = load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model.state_dict()
    assert all(torch.equal(ours[name], true[name]) for name in true)

def test_fused_rows_and_transposed_matrices() -> None:
    """By hand: 2 heads of width 2, so 12 fused rows, numbered by their place on disk."""
    rows_12 = torch.arange(12.0)
    matrix = rows_12[:, None] + torch.zeros(12, 4)
    names = {
        "gpt2": "transformer.h.1.attn.c_attn",
        "modernbert": "model.layers.1.attn.Wqkv",
        "gpt_neox": "gpt_neox.layers.1.attention.query_key_value",
    }
    for family, name in names.items():
        family = family_named(family)
        assert [ours[-6] for ours in family.to_ours(name)] == ["q", "k", "v"]
        bias = family.split(f"{name}.bias", rows_12, 2)
        wanted = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
        if family.name != "gpt_neox":
            wanted = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert [part.tolist() for part in bias] == wanted
        stored = matrix.t() if family.name == "gpt2" else matrix
        parts = family.split(f"{name}.weight", stored, 2)
        assert all(
            torch.equal(w[:, 0], b) and w.shape == (4, 4) for w, b in zip(parts, bias, strict=True)
        )
        assert torch.equal(family.join(f"{name}.weight", parts, 2), stored)
        assert torch.equal(family.join(f"{name}.bias", bias, 2), rows_12)
        assert family.hf_shape(f"{name}.weight", [4, 4]) == list(stored.shape)

def test_a_fused_tensor_is_missing_or_mis_shaped_once(hf, tmp_path) -> None:
    folder = Path(shutil.copytree(hf("gpt2-tied")[1], tmp_path / "model"))
    tensors = load_file(folder / SINGLE)
    del tensors["transformer.h.1.attn.c_attn.weight"]
    tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(96, 32)
    save_file(tensors, folder / SINGLE)
    message = refuse(folder)
    assert "missing: transformer.h.1.attn.c_attn.weight\n" in message
    assert "transformer.h.0.attn.c_attn.weight is [96, 32], must be [32, 96]" in message

def test_norms_of_older_files(hf, tmp_path) -> None:
    folder = Path(shutil.copytree(hf("bert-mlm")[1], tmp_path / "model"))
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in load_file(folder / SINGLE).items()
    }
    assert sum(name.endswith((".gamma", ".beta")) for name in older) == 2 * (1 + 2 * 3 + 1)
    save_file(older, folder / SINGLE)
    ours = load_model(folder, task="mlm", dtype=torch.float32).model.state_dict()
    true = load_model(hf("bert-mlm")[1], task="mlm", dtype=torch.float32).model.state_dict()
    assert all(torch.equal(ours[name], true[name]) for name in true)

def test_pythia_as_it_was_published(hf, tmp_path) -> None:
    """Keys of its own for the rotary embedding, buffers among the tensors, the head's older name;
    the newer one is read too."""
    folder = Path(shutil.copytree(hf("neox-untied")[1], tmp_path / "model"))
    new = load_model(folder, task="lm", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    assert family_named("gpt_neox").to_spec(config).rope_share == 0.25
    config |= {"rotary_pct": 0.5, "rotary_emb_base": 20000, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    buffers = {
        f"gpt_neox.layers.{i}.attention.{name}": torch.ones(1, 1, 4, 4)
        for i in range(3)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    tensors = load_file(folder / SINGLE)
    head = tensors.pop("embed_out.weight")
    for name in ("embed_out.weight", "lm_head.weight"):
        save_file(tensors | buffers | {name: head}, folder / SINGLE)
        old = load_model(folder, task="lm", dtype=torch.float32)
        assert old.model.spec == dataclasses.replace(new.model.spec, rope_theta=2e4)
        assert old.accounting.ignored == sorted(buffers) and not new.accounting.ignored
        true = new.model.state_dict()
        assert all(torch.equal(tensor, true[n]) for n, tensor in old.model.state_dict().items())
        save_model(old, tmp_path)
        assert load_file(tmp_path / SINGLE).keys() == {*tensors, "embed_out.weight"}

@pytest.mark.parametrize("cut", [4, 100, -1])
def test_truncated_file(folder, cut) -> None:
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:cut])
    message = refuse(folder)
    assert str(folder / SINGLE) in message and "not a whole safetensors file" in message
    assert message.endswith(": copy it anew")

def test_foreign_file(folder) -> None:
    (folder / SINGLE).write_bytes(b"PK\x03\x04" + bytes(2000))
    assert "not a whole safetensors file" in refuse(folder)

def test_duplicated_name(folder) -> None:
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = ("{" + one + "," + one.replace("0,4", "4,8") + "}").encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "not a whole safetensors file" in refuse(folder)

def test_metadata_may_be_null(folder) -> None:
    raw = (folder / SINGLE).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    assert stored_tensors(folder).keys() == header.keys() - {"__metadata__"}

def test_pickle_is_named_but_not_read(folder) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = refuse(folder)
    assert f"neither {SINGLE} nor {INDEX} is there" in message
    assert message.endswith("It holds pytorch_model.bin: convert to safetensors.")

@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3])
def test_index_that_leaves_the_folder(folder, file) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    assert "must be a bare file name" in refuse(folder)

@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds list, must be a JSON object"),
        ("{}", "weight_map = None: must be an object"),
        ('{"weight_map": 3}', "weight_map = 3: must be an object"),
    ],
)
def test_unreadable_index(folder, text, message) -> None:
    (folder / INDEX).write_text(text)
    assert f"{folder / INDEX}: {message}" in refuse(folder)

def test_index_and_shards_differ(folder) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": SINGLE, "x": SINGLE}}))
    assert "index and shards differ in" in refuse(folder)

def test_missing_shard(folder) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00009.safetensors"}}))
    assert "model-00009.safetensors: not a whole safetensors file" in refuse(folder)

def test_a_tied_copy_may_stay_only_where_it_is_equal(hf, tmp_path) -> None:
    """A head that differs from the embeddings would be lost in a model that ties them."""
    folder = Path(shutil.copytree(hf("qwen3-tied")[1], tmp_path / "model"))
    tensors = load_file(folder / SINGLE)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / SINGLE)
    loaded = load_model(folder, task="lm", dtype=torch.float32)
    assert loaded.accounting.ignored == ["lm_head.weight"]
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / SINGLE)
    assert "lm_head.weight differs from the embeddings" in refuse(folder)

def test_parts_of_a_new_head_are_not_new(hf, tmp_path) -> None:
    """A head is new as a whole or not at all; a bias that has no place is not dropped."""
    generator = torch.Generator().manual_seed(0)
    folder = Path(shutil.copytree(hf("bert-classify")[1], tmp_path / "bert"))
    tensors = load_file(folder / SINGLE)
    save_file({n: t for n, t in tensors.items() if n != "classifier.bias"}, folder / SINGLE)
    assert "missing: classifier.bias" in refuse(folder, "classify", generator=generator)
    folder = Path(shutil.copytree(hf("qwen3-classify")[1], tmp_path / "qwen3"))
    save_file(load_file(folder / SINGLE) | {"score.bias": torch.zeros(3)}, folder / SINGLE)
    assert "unexpected: score.bias" in refuse(folder, "classify")

def test_shards_hold_what_one_file_holds(tmp_path) -> None:
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("abcde")}
    save_torch_state_dict(tensors, tmp_path, max_shard_size=33)  # two tensors of 16 bytes each
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 16
    files = {name: file for name, (file, *_) in stored_tensors(tmp_path).items()}
    assert {path.name for path in files.values()} == set(index["weight_map"].values())
    assert sorted(set(index["weight_map"].values())) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert all(torch.equal(load_file(files[name])[name], tensors[name]) for name in tensors)

def test_loaded_tensors_are_not_the_file(folder) -> None:
    """Writing into the file of a loaded model changes nothing in it."""
    loaded = load_model(folder, task="lm", dtype=torch.float32)
    before = loaded.model.trunk.norm.weight.clone()
    with open(folder / SINGLE, "r+b") as file:
        size = (folder / SINGLE).stat().st_size
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    save_model(loaded, folder)
    assert torch.equal(loaded.model.trunk.norm.weight, before)
    assert torch.equal(load_file(folder / SINGLE)["model.norm.weight"], before)

def test_every_file_is_a_family_and_is_shipped() -> None:
    """And says nothing that nobody reads: its rules are those there are, its fields the spec's."""
    known = [family_named(name) for name in NAMES]
    assert [family.name for family in known] == NAMES and len(known) >= 12
    assert {rule for family in known for rule in family.rules} == RULES.keys()
    fields = {field.name for field in dataclasses.fields(ModelSpec)}
    assert all({*family.switches, *family.keys} <= fields for family in known)
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    globs = project["tool"]["setuptools"]["package-data"]["ftcore.model.families"]
    shipped = {path.stem for glob in globs for path in FOLDER.glob(glob)}
    assert shipped == {*NAMES, "_common"}
