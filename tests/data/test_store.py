"""The token cache: what comes back, when it is another, and what stays of it when it fails."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
import numpy as np
import pytest
from ftcore.config import (
    ChatDataConfig,
    DataConfig,
    LabelledDataConfig,
    ScoredDataConfig,
    TaggedDataConfig,
    TextDataConfig,
)
from ftcore.data import store
from ftcore.data.encode import Split
from ftcore.data.pack import Encoded, digest, lengths, load, save
from ftcore.data.prepare import prepare, prepared
from ftcore.data.store import Prepared
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import CheckpointError, DataError

ROOT = Path(store.__file__).parents[2]
ASKED, ANSWER = {"role": "user", "content": "h\u00f6w"}, {"role": "assistant"}
ROWS = [
    {"text": f"row {n} " * n, "pair": "and", "label": "abc"[n % 3], "score": n / 3}
    | {"several": "abc"[: n % 3], "tokens": ["a", "b"], "tags": ["O", "B-x"]}
    | {"messages": [ASKED, {**ANSWER, "content": f"{n} so " * 9}]}
    for n in range(1, 9)
]
ROWS += [{**dict.fromkeys(ROWS[0]), "tokens": [], "tags": []}]  # that is left out
AS_THEY_ARE = {"duplicates": "report", "leaks": "report"}  # each file is both train and test
CASES: dict[str, DataConfig] = {
    "classes": LabelledDataConfig(),
    "pairs": LabelledDataConfig(pair="pair", max_length=9, over_length="cut_right"),
    "several": LabelledDataConfig(label="several", label_separator="/"),
    "scores": ScoredDataConfig(),
    "tags": TaggedDataConfig(),
    "chats": ChatDataConfig(holdout=2),
    "text": TextDataConfig(max_length=6),
}

def test_a_digest_is_of_values_not_of_places_in_memory() -> None:
    """None stands at another address in every process."""
    tokens_T, sha = np.arange(3, dtype=np.int32), hashlib.sha256()
    for part in (tokens_T, np.asarray(1), np.asarray(1.0)):
        sha.update(f"{part.dtype} {part.shape} ".encode() + part.tobytes())
    assert digest([Encoded("a", tokens_T, 1)]) == sha.hexdigest()

@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return str(path)

@pytest.fixture
def config(file: str, tmp_path: Path) -> LabelledDataConfig:
    return LabelledDataConfig(train=(file,), test=(file,), cache=tmp_path / "cache", **AS_THEY_ARE)

def same(one: Any, two: Any) -> bool:
    """Equal and of equal types; lists and what stands for them are alike."""
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and np.array_equal(one, two)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if is_dataclass(one):
        pairs = [[getattr(x, f.name) for f in fields(one)] for x in (one, two)]
        return type(one) is type(two) and same(*pairs)
    return type(one) is type(two) and one == two

def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())

@pytest.mark.parametrize("case", CASES)
def test_the_cache_gives_back_what_was_prepared(
    case: str, base: Tokenizer, bert: Tokenizer, file: str, tmp_path: Path
) -> None:
    tokenizer = base if case in ("chats", "text") else bert
    named = {"train": (file,), "test": (file,), "cache": tmp_path / "cache"}
    options = replace(CASES[case], **named, **AS_THEY_ARE)
    made = prepare(options, tokenizer, seed=3)
    for word in ("prepared, and kept in", "from"):
        kept, line = prepared(options, tokenizer, seed=3)
        assert line == f"data: {word} the cache {tmp_path}/cache/{entries(options.cache)[0]}"
        made.notes["key"] = kept.notes["key"]
        assert same(made, kept) and made.summary() == kept.summary()
        assert not kept.train.documents[0].tokens_T.flags.owndata
    for folder, data in (("one", made), ("two", kept)):
        data.write(tmp_path / folder)
    both = [(tmp_path / folder / "rejected.jsonl").read_bytes() for folder in ("one", "two")]
    assert both[0] == both[1] and b"left out" in both[0]
    assert prepared(replace(options, cache=None), tokenizer, seed=3)[1].endswith("not kept")

def test_documents_come_back_as_views_of_files(tmp_path: Path) -> None:
    arange = np.arange(5, dtype=np.int32)
    rows = [
        Encoded("\u00e4:0", arange[:1], arange[:1], np.ones(1, np.float32)),
        Encoded("b", arange[:3], arange[1:4], np.array([0, 0.5, 2], np.float32), arange[:3]),
        Encoded("c", arange, arange, np.zeros(5, np.float32)),
    ]
    save(rows, tmp_path)
    documents = load(tmp_path)
    assert same(rows, documents) and digest(rows) == digest(documents)
    assert lengths(documents).tolist() == [1, 3, 5] and lengths(documents).dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        documents[0].tokens_T[0] = 7

@dataclass
class Reported(Prepared):
    """With what a further stage may tell."""

    funnel: dict[str, Any] = field(default_factory=dict)

def test_any_field_of_prepared_data_is_kept(
    base: Tokenizer, config: LabelledDataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = {"a/b": Split(num_bytes=2), "c": Split()}
    funnel = {"rows": 3, "by reason": {"short": [1, 2.5, None]}}
    data = Reported(dev=Split(num_bytes=7), tests=tests, labels=(), funnel=funnel)
    monkeypatch.setitem(store.KINDS, "Reported", Reported)
    monkeypatch.setattr("ftcore.data.prepare.prepare", lambda *args, **options: data)
    assert same(data, prepared(config, base, seed=0)[0])

def test_a_change_of_anything_is_another_key(
    base: Tokenizer, bert: Tokenizer, config: LabelledDataConfig, file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    code = [tmp_path / folder.name for folder in store.CODE]
    for folder, copy in zip(store.CODE, code, strict=True):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__", "base"))
    monkeypatch.setattr(store, "CODE", tuple(code))
    (code[0] / "rules.toml").write_text("a = 1\n")

    def key(options: Any = config, tokenizer: Tokenizer = base, **named: Any) -> str:
        return store.key(options, tokenizer, **{"seed": 0} | named)

    first = key()
    assert first == key(replace(config, cache=Path("elsewhere"))) and len(first) == 32
    copy = shutil.copy(file, tmp_path / "copy.jsonl")
    found = [
        *(key(tokenizer=bert), key(seed=1)),
        *(key(replace(config, max_length=4)), key(replace(config, train=(copy,)))),
        *(key(replace(config, test=(), train=(file, file))), key(replace(config, dev=(file,)))),
    ]
    modules = ("prepare.py", "tokenizer.py", "store.py", "rules.toml")
    changed = [Path(file), *(code[0] / name for name in modules), code[1] / "chat.py"]
    changed += [code[0] / "patterns.toml", *(code[1] / "rows").iterdir()]
    for path in changed:
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        found.append(key())
        path.write_bytes(content)
    for library in ("tokenizers", "jinja2", "numpy"):
        version = store.importlib.metadata.version
        other = {library: "0"}
        with monkeypatch.context() as patch:
            patch.setattr(
                store.importlib.metadata, "version", lambda n, v=version, o=other: o.get(n) or v(n)
            )
            found.append(key())
    assert len({first, *found}) == 1 + len(found) == 22
    assert first == key()

def test_a_file_that_is_not_there(
    base: Tokenizer, config: LabelledDataConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"rosw\.jsonl: cannot be read.*nearest: 'rows.jsonl'"):
        prepared(replace(config, dev=(f"{tmp_path}/rosw.jsonl",)), base, seed=0)

@pytest.mark.parametrize("how", ["a flipped bit", "a shorter file", "no manifest"])
def test_a_damaged_cache_is_made_anew(
    how: str, base: Tokenizer, config: LabelledDataConfig
) -> None:
    made, _ = prepared(config, base, seed=0)
    folder = next(config.cache.glob("*/manifest.json")).parent
    path = folder / "0/tokens.npy"
    content = path.read_bytes()
    if how == "no manifest":
        path = folder / "manifest.json"
        path.unlink()
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        path.write_bytes(flipped if how == "a flipped bit" else content[:-4])
    again, line = prepared(config, base, seed=0)
    assert line.startswith(f"warning: {path} ") and ": made anew\ndata: prepared" in line
    assert same(list(made.tests["rows"].documents), list(again.tests["rows"].documents))
    assert (folder / "0/tokens.npy").read_bytes() == content
    assert "from the cache" in prepared(config, base, seed=0)[1]
    assert entries(config.cache) == [folder.name]

def test_a_full_disk(
    base: Tokenizer, config: LabelledDataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(CheckpointError) as error:
            prepared(config, base, seed=0)
    claim = rf"cannot write {config.cache}/\w+: .*No space left.*at least \d+ bytes needed, \d+ "
    assert re.search(claim, str(error.value)) and "--data.cache None" in str(error.value)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(CheckpointError, match=r"at least [1-9]\d+ bytes needed, 0 free"):
            prepared(config, base, seed=0)
    assert entries(config.cache) == []

    script = f"""
import resource, sys
from pathlib import Path
from ftcore.config import LabelledDataConfig
from ftcore.data.prepare import prepared
from ftcore.data.tokenizer import Tokenizer
config = LabelledDataConfig(train=({config.train[0]!r},), cache=Path({str(config.cache)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
prepared(config, Tokenizer.load({str(ROOT / "ftcore/builtin/base")!r}), seed=0)
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1 and "CheckpointError: cannot write" in last, ended.stderr
    assert "--data.cache None" in last and entries(config.cache) == []
    assert "kept in" in prepared(config, base, seed=0)[1]

def test_a_file_that_changes_while_it_is_read_is_not_kept(
    base: Tokenizer, config: LabelledDataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*args: Any, **options: Any) -> Prepared:
        with open(config.train[0], "a") as file:
            file.write(json.dumps(ROWS[0]) + "\n")
        return prepare(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("ftcore.data.prepare.prepare", late)
        with pytest.raises(DataError, match="changed while it was read: start again"):
            prepared(config, base, seed=0)
    assert not config.cache.exists()
    assert len(prepared(config, base, seed=0)[0].train.documents) == len(ROWS)

def test_the_built_in_chats(base: Tokenizer, tmp_path: Path) -> None:
    chat = ("builtin:chat",)
    options = ChatDataConfig(test=chat, cache=tmp_path)
    made = prepare(options, base, seed=0)
    assert list(made.tests) == ["test_values", "test_combinations", "test_wording"]
    for word in ("kept in", "from"):
        kept, line = prepared(options, base, seed=0)
        made.notes["key"] = kept.notes["key"]
        assert same(made, kept) and word in line
