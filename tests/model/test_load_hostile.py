"""Files that were made to harm: none runs code, takes memory it has no values for, or loads as
anything but what it says."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
import tokenizers
import torch
from ftcore import files
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import CheckpointError, ModelError
from ftcore.hub import lineage
from ftcore.model.generate import generate
from ftcore.model.load import CONFIG, SINGLE, load_model

NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Header = dict[str, Any]

@pytest.fixture
def folder(hf: Callable, tmp_path: Path) -> Path:
    """A copy of the untied decoder that a test may damage."""
    return Path(shutil.copytree(hf("qwen3-untied")[1], tmp_path / "model"))

def load(folder: Path, task: str = "lm") -> torch.nn.Module:
    return load_model(folder, task=task, dtype=torch.float32).model

def parts(file: Path) -> tuple[Header, bytes]:
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]

def written(header: Header | bytes, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data

def twice(header: Header, data: bytes) -> bytes:
    """Two tensors of one name; entries that say the same are one."""
    text = json.dumps(header)
    return written((text[:-1] + f', "{NORM}": {json.dumps(header[UP])}}}').encode(), data)

def changed(name: str, **parts: Any) -> Callable[[Header, bytes], bytes]:
    """One tensor with another dtype, shape or place."""
    return lambda header, data: written({**header, name: {**header[name], **parts}}, data)

def moved(header: Header, data: bytes) -> bytes:
    """A tensor that ends one element after the file."""
    start, end = header[NORM]["data_offsets"]
    return changed(NORM, data_offsets=[start + 4, end + 4])(header, data)

def renamed(header: Header, data: bytes) -> bytes:
    return written({{UP: "model.up"}.get(name, name): x for name, x in header.items()}, data)

def transposed(header: Header, data: bytes) -> bytes:
    return changed(UP, shape=header[UP]["shape"][::-1])(header, data)

WHOLE = "not a whole safetensors file"
# what is done to the file -> what the error says of it
MUTATIONS: dict[str, tuple[Callable[[Header, bytes], bytes], str]] = {
    "empty": (lambda h, d: b"", WHOLE),
    "seven bytes": (lambda h, d: b"\0" * 7, WHOLE),
    "cut": (lambda h, d: written(h, d[:-1]), WHOLE),
    "longer": (lambda h, d: written(h, d + b"\0"), WHOLE),
    "header of 200 MB": (lambda h, d: written(h, d, 2 * 10**8), WHOLE),
    "header of 2^63": (lambda h, d: written(h, d, 2**63), WHOLE),
    "no JSON": (lambda h, d: written(b"{" * 64, d), WHOLE),
    "deep": (lambda h, d: written(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, d), WHOLE),
    "a list": (lambda h, d: written(b"[]", d), WHOLE),
    "two of one name": (twice, WHOLE),
    "overlap": (changed(UP, data_offsets=[0, 6144]), WHOLE),
    "beyond the end": (moved, WHOLE),
    "overflow": (changed(UP, shape=[2**40, 2**40]), WHOLE),
    "unknown dtype": (changed(UP, dtype="F33"), WHOLE),
    "integers": (changed(UP, dtype="I32"), f"{UP} is I32, must be one of BF16"),
    "another shape": (transposed, rf"{UP} is \[32, 48\], must be \[48, 32\]"),
    "another name": (renamed, rf"(?s)missing: {UP}\n.*unexpected: model.up"),
}

@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_file_is_named_with_its_tensor(mutation: str, folder: Path) -> None:
    mutate, message = MUTATIONS[mutation]
    header, data = parts(folder / SINGLE)
    (folder / SINGLE).write_bytes(mutate(header, data))
    with pytest.raises(ModelError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)

def test_a_flipped_byte_is_an_error_or_changes_nothing(folder: Path) -> None:
    """Without a manifest in what describes the tensors; with one, anywhere."""
    whole = (folder / SINGLE).read_bytes()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    wanted, draw, refused = load(folder).state_dict(), random.Random(0), 0
    hashed = folder.with_name("hashed")
    with files.write_folder(hashed) as temp:
        shutil.copytree(folder, temp, dirs_exist_ok=True)
    for _ in range(300):
        for file, end in ((folder / SINGLE, size), (hashed / SINGLE, len(whole))):
            place, damaged = draw.randrange(end), bytearray(whole)
            damaged[place] = draw.choice([byte for byte in range(256) if byte != whole[place]])
            file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{SINGLE} was altered"):
            files.verify_folder(hashed)
        try:
            found = load(folder).state_dict()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        except ModelError as error:
            refused += 1
            assert str(folder) in str(error)
    assert 200 < refused < 300

class Bomb:
    """What makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)

@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", SINGLE])
def test_a_pickle_is_refused_by_name_and_never_run(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(ModelError, match=WHOLE if name == SINGLE else f"holds {name}: convert to"):
        load(folder)
    assert not (tmp_path / "marker").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "marker").exists()

def test_a_file_that_changes_later_changes_no_answer(folder: Path) -> None:
    model = load(folder)
    asked = {"max_new_tokens": 8, "stop_ids": frozenset()}
    before = generate(model, [[1, 2, 3]], **asked)
    size = (folder / SINGLE).stat().st_size
    with open(folder / SINGLE, "r+b") as file:
        file.write(b"\xff" * size)
    assert generate(model, [[1, 2, 3]], **asked) == before
    with open(folder / SINGLE, "r+b") as file:
        file.truncate(0)  # a mapped file would end the process here
    assert generate(model, [[1, 2, 3]], **asked) == before

DEEP = "[" * 10**5
# 20 configurations: kind of model, what is changed in it, what the error says of it
CONFIGS: list[tuple[str, dict[str, Any] | str, str]] = [
    ("qwen3-tied", {"num_hidden_layers": 10**6}, "asks for 1,000,000 layers"),
    ("qwen3-tied", {"num_hidden_layers": 2**60}, "num_hidden_layers = 1152921504606846976: must"),
    ("qwen3-tied", {"vocab_size": 10**7}, " values in all: must be .* by its files"),
    ("qwen3-tied", {"hidden_size": 10**6}, " values in all: must be .* by its files"),
    ("qwen3-tied", {"intermediate_size": 10**7}, " values in all: must be .* by its files"),
    ("qwen3-tied", {"num_attention_heads": 10**6}, " values in all: must be .* by its files"),
    ("qwen3-tied", {"head_dim": 10**7}, " values in all: must be .* by its files"),
    ("qwen3-tied", {"num_attention_heads": 0}, r"= 0: must be an integer in \[1, 10000000\]"),
    ("qwen3-tied", {"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0: must be a finite number"),
    ("qwen3-tied", {"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta = nan: must be"),
    ("qwen3-tied", {"rope_parameters": [1]}, r"rope_type = \[1\]: only default, linear"),
    ("qwen3-tied", {"architectures": 7, "num_hidden_layers": 2}, "unexpected: model.layers.2"),
    ("gpt2-tied", {"n_embd": 10**6}, " values in all: must be .* by its files"),
    ("gpt2-tied", {"n_positions": 10**7}, " values in all: must be .* by its files"),
    ("bert-classify", {"type_vocab_size": 10**7}, " values in all: must be .* by its files"),
    ("bert-classify", {"id2label": {"0": ["x"], "2": {}}}, "must name a classifier's classes"),
    ("gemma3-tied", {"rope_parameters": "x"}, "rope_parameters = 'x': must be an object"),
    ("gemma2-tied", {"layer_types": 3}, "layer_types = 3: 3 of sliding"),
    ("neox-tied", {"rope_parameters": {"partial_rotary_factor": 1e308}}, r"must be in \(0, 1\]"),
    ("qwen3-tied", DEEP, "config.json: not valid JSON"),
]

def hostile(hf: Callable, kind: str, changes: Any, folder: Path) -> Path:
    """A copy of the model of a kind, with the changes in its config.json."""
    shutil.copytree(hf(kind)[1], folder)
    if not isinstance(changes, str):
        changes = json.dumps(json.loads((folder / CONFIG).read_text()) | changes)
    (folder / CONFIG).write_text(changes)
    return folder

@pytest.mark.parametrize(("kind", "changes", "message"), CONFIGS)
def test_a_hostile_config_takes_no_memory(
    kind: str, changes: Any, message: str, hf: Callable, tmp_path: Path, task_of_kind: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is refused before a model is made, unless one of the file's own size is."""
    folder = hostile(hf, kind, changes, tmp_path / "model")
    if "unexpected" not in message:
        monkeypatch.delattr("ftcore.model.load.empty_model")
    with pytest.raises(ModelError, match=message):
        load(folder, task_of_kind(kind))

def test_random_weights_take_no_more_than_the_machine_has(hf: Callable, tmp_path: Path) -> None:
    config = json.loads((hf("qwen3-tied")[1] / CONFIG).read_text())
    config |= {"intermediate_size": 10**7, "hidden_size": 10**6}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="asks for 3 layers, 61,000,673,000,000 values in all"):
        load_model(tmp_path, task="lm", dtype=torch.float32, init="random",
                   generator=torch.Generator())  # fmt: skip

# As `python -O` does, but for our modules alone: the others are compiled already.
WITHOUT_ASSERTIONS = """
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

def get_code(loader, name, usual=SourceFileLoader.get_code):
    if name.partition(".")[0] not in ("ftcore", "kernels"):
        return usual(loader, name)
    return compile(loader.get_data(loader.path), loader.path, "exec", 0, True, optimize=1)

SourceFileLoader.get_code = get_code
import torch
from ftcore.model import load

del load.empty_model
for folder in Path(sys.argv[1]).iterdir():
    try:
        load.load_model(folder, task=folder.suffix[1:], dtype=torch.float32)
    except Exception as error:
        print(type(error).__name__)
"""

def test_no_check_is_an_assertion(hf: Callable, tmp_path: Path, task_of_kind: Callable) -> None:
    refused = [case for case in CONFIGS if "unexpected" not in case[2]]
    for place, (kind, changes, _) in enumerate(refused):
        hostile(hf, kind, changes, tmp_path / f"{place}.{task_of_kind(kind)}")
    command = [sys.executable, "-c", WITHOUT_ASSERTIONS, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["ModelError"] * len(refused), done.stdout + done.stderr

@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": {"lstrip": 1}}, None),  # no token, as 7 is none
        ({"eos_token": 7}, None),
        ({"eos_token": "nowhere"}, "has no token 'nowhere'"),
        ({"chat_template": {"a": 1}}, "chat_template = {'a': 1}: must be text"),
        ({"chat_template": [7, {"name": []}, {"name": "default", "template": 3}]}, "= 3: must be"),
    ],
)
def test_hostile_tokenizer_settings(changes: dict, message: str | None, tmp_path: Path) -> None:
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changes))
    if message is None:
        assert Tokenizer.load(tmp_path).eos_id is None
    else:
        with pytest.raises(ModelError, match=message):
            Tokenizer.load(tmp_path)

def test_adapters_that_lead_nowhere(tmp_path: Path) -> None:
    for name, text in {
        "not valid JSON": "{",
        "names no base model; copy it anew": "{}",
        "holds list, must be a JSON object": "[]",
        "there is no such folder": '{"base_model_name_or_path": 3}',
        "is built on this adapter itself": json.dumps({"base_model_name_or_path": str(tmp_path)}),
    }.items():
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=name):
            lineage(str(tmp_path))
