"""train.py and eval.py as a user meets them, on tiny models and files made here."""

import importlib
import json
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
import huggingface_hub
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from ftcore.model.load import load_model, save_model
from tests.data.templates import styles

SCRIPTS = {name: importlib.import_module(name) for name in ("train", "eval")}
EXACT = ("--env.threads", "1", "--env.precision", "fp32")
LOOKS = ("large", "tiny", "round", "flat", "heavy", "old", "plain", "shiny", "broken", "cheap")
THINGS = ("lamp", "chair", "table", "spoon", "jacket", "bottle", "window", "garden", "pencil")
COLOURS = {"warm": ("red", "orange", "yellow"), "cold": ("blue", "cyan", "navy")}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
QWEN3 = {
    **SIZES,
    "model_type": "qwen3",
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
BERT = {**SIZES, "model_type": "bert", "type_vocab_size": 2, "hidden_dropout_prob": 0.0}

@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test writes into a folder of its own."""
    monkeypatch.chdir(tmp_path)

def _texts() -> list[str]:
    texts = [row[1] + row[2] for row in _rows(40)]
    return [*LOOKS, *THINGS, *texts, *(json.dumps(chat) for chat in _chats(20))]

def _rows(count: int, start: int = 0) -> list[tuple[str, str, str, str]]:
    """id, text, second text, label."""
    names = [("warm", "cold")[i % 2] for i in range(start, start + count)]
    words = [COLOURS[name][i % 3] for i, name in enumerate(names)]
    return [
        (f"r{i}", f"the {word} {_name(i)} number {i}", f"it is {word}", name)
        for i, (word, name) in enumerate(zip(words, names, strict=True), start)
    ]

def _name(number: int) -> str:
    """Two words of each row's own, so that texts of one form are not nearly alike."""
    return f"{LOOKS[number // len(THINGS) % len(LOOKS)]} {THINGS[number % len(THINGS)]}"

def _chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"make thing {i} {colour}"},
                {"role": "assistant", "content": f'{{"intent": "paint", "colour": "{colour}"}}'},
            ]
        }
        for i, colour in ((i, ("red", "blue")[i % 2]) for i in range(start, start + count))
    ]

def _pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The same chats, beside each answer one with another intent."""
    made = []
    for chat in _chats(count, start):
        *prompt, answer = chat["messages"]
        worse = {**answer, "content": answer["content"].replace("paint", "make thing")}
        made.append({"prompt": prompt, "chosen": [answer], "rejected": [worse]})
    return made

def _tsv(path: Path, rows: Sequence[Sequence[str]]) -> str:
    lines = ["\t".join(row) for row in [("id", "text", "pair", "label"), *rows]]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)

def _scored(count: int, start: int = 0) -> list[tuple[str, str, str, str]]:
    """The same rows with a score for a label: warm colours have high ones."""
    return [(*row[:3], str(4.5 if row[3] == "warm" else 0.25)) for row in _rows(count, start)]

def _several(count: int, start: int = 0) -> list[tuple[str, str, str, str]]:
    """The same rows with up to two labels: warm, and red or blue."""
    label = {"orange": "warm", "yellow": "warm", "red": "warm,bright", "blue": "bright"}
    return [(*row[:3], label.get(row[1].split()[1], "")) for row in _rows(count, start)]

def _conll(path: Path, count: int, start: int = 0) -> str:
    """The same texts, a word a line: the colour is an entity of the label's type."""
    sentences = []
    for _, text, pair, label in _rows(count, start):
        words, tag = f"{text} {pair}".split(), {text.split()[1]: f"I-{label}"}
        sentences.append("".join(f"{word}\t{tag.get(word, 'O')}\n" for word in words))
    path.write_text("\n".join(sentences), "utf-8")
    return str(path)

def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)

@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data files by name: labelled train, test and other; the same with scores, with several
    labels and with tags; chat, chat_test; pairs, pairs_test; text, held."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("\n\n".join(_texts()), "utf-8")
    (folder / "held.txt").write_text(" ".join(_texts()[:20]) + " caf\u00e9", "utf-8")
    return {
        "train": _tsv(folder / "train.tsv", _rows(24)),
        "test": _tsv(folder / "test.tsv", _rows(10, 100)),
        "other": _tsv(folder / "other.tsv", _rows(7, 200)),
        "scored": _tsv(folder / "scored.tsv", _scored(24)),
        "scored_test": _tsv(folder / "scored_test.tsv", _scored(10, 100)),
        "several": _tsv(folder / "several.tsv", _several(24)),
        "several_test": _tsv(folder / "several_test.tsv", _several(10, 100)),
        "tags": _conll(folder / "tags.conll", 24),
        "tags_test": _conll(folder / "tags_test.conll", 10, 100),
        "chat": _jsonl(folder / "chat.jsonl", _chats(16)),
        "chat_test": _jsonl(folder / "chat_test.jsonl", _chats(6, 100)),
        "pairs": _jsonl(folder / "pairs.jsonl", _pairs(16, 10)),
        "pairs_test": _jsonl(folder / "pairs_test.jsonl", _pairs(6, 30)),
        "text": str(folder / "text.txt"),
        "held": str(folder / "held.txt"),
    }

def _save(
    folder: Path, tokenizer: tokenizers.Tokenizer, config: dict, extra: dict, *, task: str
) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(extra), "utf-8")
    config = {**config, "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    loaded = load_model(
        folder,
        task=task,
        dtype=torch.float32,
        init="random",
        generator=torch.Generator().manual_seed(0),
    )
    save_model(loaded, folder)
    return folder

@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of random weights with a byte-level tokenizer and a chat template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    extra = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": styles()["chatml"].template,
    }
    return _save(tmp_path_factory.mktemp("qwen3"), tokenizer, QWEN3, extra, task="lm")

@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of random weights with a word-piece tokenizer."""
    return _bert(tmp_path_factory.mktemp("bert"), (), task="trunk")

@pytest.fixture(scope="session")
def masked_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a mask token and a head for it."""
    return _bert(tmp_path_factory.mktemp("masked_bert"), ("mask_token",), task="mlm")

def _bert(folder: Path, more: tuple[str, ...], *, task: str) -> Path:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", *more)
    special = [f"[{name.removesuffix('_token').upper()}]" for name in names]
    # Every letter and every word: what the library's trainer learns differs between processes.
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {word for text in _texts() for word, _ in splitter.pre_tokenize_str(text)}
    letters = {letter for word in words for letter in word}
    pieces = dict.fromkeys([
        *special, *sorted(letters), *sorted(f"##{letter}" for letter in letters), *sorted(words)
    ])  # fmt: skip
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    extra = {"tokenizer_class": "BertTokenizer", **dict(zip(names, special, strict=True))}
    return _save(folder, tokenizer, BERT, extra, task=task)

@pytest.fixture
def classify(bert: Path, files: dict[str, str]) -> list[str]:
    """The words of a short run of train.py that learns a class."""
    return [
        *("classify", "--model.path", str(bert), "--log.name", "run"),
        *("--data.train", files["train"], "--data.test", files["test"]),
        *("--optim.lr", "1e-2", "--optim.batch-size", "8", "--loop.epochs", "1", *EXACT),
    ]

@pytest.fixture
def several(classify: list[str], files: dict[str, str]) -> list[str]:
    """The words of a short run of train.py that learns several labels a row."""
    data = ("--data.train", files["several"], "--data.test", files["several_test"])
    return [*classify, *data, "--data.label-separator", ","]

@pytest.fixture
def scored(classify: list[str], files: dict[str, str]) -> list[str]:
    """The words of a short run of train.py that learns a score."""
    data = ("--data.train", files["scored"], "--data.test", files["scored_test"])
    return ["regress", *classify[1:], *data, "--data.label", "label"]

@pytest.fixture
def tags(classify: list[str], files: dict[str, str]) -> list[str]:
    """The words of a short run of train.py that learns tags."""
    data = ("--data.train", files["tags"], "--data.test", files["tags_test"])
    return ["tag", *classify[1:], *data]

@pytest.fixture
def sft(qwen3: Path, files: dict[str, str]) -> list[str]:
    """The words of a short run of train.py that learns to answer."""
    return [
        *("sft", "--model.path", str(qwen3), "--log.name", "run", "--data.train", files["chat"]),
        *("--data.dev", files["chat_test"], "--data.test", files["chat_test"]),
        *("--eval.max-new-tokens", "8", "--eval.intent-field", "intent"),
        *("--optim.lr", "1e-2", "--optim.batch-size", "8", "--loop.epochs", "1", *EXACT),
    ]

@pytest.fixture
def dpo(sft: list[str], files: dict[str, str]) -> list[str]:
    """The words of a short run of train.py that learns which answers are preferred."""
    data = ("--data.train", files["pairs"], "--data.dev", files["pairs_test"])
    more = ("--data.test", files["pairs_test"], "--data.prompt", "prompt")
    rate = ("--optim.lr", "1e-2", "--optim.batch-size", "8", "--loop.epochs", "1")
    return ["dpo", *sft[1:5], *data, *more, *rate, *EXACT]

@pytest.fixture
def reward(bert: Path, dpo: list[str]) -> list[str]:
    """The words of a short run of train.py that learns to score answers."""
    return ["reward", *dpo[1:], "--model.path", str(bert)]

@pytest.fixture
def pretrain(qwen3: Path, files: dict[str, str]) -> list[str]:
    """The words of a short run of train.py that learns to continue text."""
    return [
        *("pretrain", "--model.path", str(qwen3), "--model.init", "random", "--log.name", "run"),
        *("--data.train", files["text"], "--data.dev", files["held"]),
        *("--data.test", files["held"], "--data.max-length", "32"),
        *("--optim.lr", "1e-2", "--optim.batch-size", "8", "--loop.max-steps", "4", *EXACT),
    ]

@pytest.fixture
def masked(masked_bert: Path, files: dict[str, str]) -> list[str]:
    """The words of a short run of train.py that learns to tell hidden tokens."""
    return [
        *("mlm", "--model.path", str(masked_bert), "--log.name", "run", "--data.max-length", "32"),
        *("--data.train", files["text"], "--data.dev", files["held"], "--data.test", files["held"]),
        *("--optim.lr", "1e-2", "--optim.batch-size", "8", "--loop.epochs", "2", *EXACT),
    ]

class Hub(BaseHTTPRequestHandler):
    """What of the hub an upload asks for, whose one user has the token "right"."""
    files: dict[str, bytes]  # path -> content
    made: list[dict[str, Any]]  # repositories

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path, status, told = self.path, 200, {}
        if self.headers.get("Authorization") != "Bearer right":
            status, told = 401, {"error": "Invalid username or password."}
        elif path == "/api/repos/create":
            self.made.append(json.loads(body))
            told = {"url": f"http://{self.headers['Host']}/owner/name"}
        elif path == "/api/models/owner/name/preupload/main":
            told = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                              for file in json.loads(body)["files"]]}
        elif path == "/api/models/owner/name/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            told = {"commitUrl": f"http://{self.headers['Host']}/owner/name/commit/0",
                    "commitOid": "0" * 40}
        elif path != "/api/validate-yaml":
            status, told = 404, {"error": path}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())

    def log_message(self, *said: object) -> None:
        pass

@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, as the library finds it."""
    Hub.files, Hub.made = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", where)
        monkeypatch.setenv("HF_TOKEN", "right")
        yield Hub
        server.shutdown()

@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], str]]:
    """(script, words) -> the JSON of the last line, and all that was printed."""

    def call(script: str, *words: str) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        code = SCRIPTS[script].main(list(words))
        printed, errors = capsys.readouterr()
        assert code == 0, errors
        return json.loads(printed.splitlines()[-1]), printed

    return call

@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """(script, words) -> the one error message; nothing but the cache may be left behind."""

    def there() -> list[Path]:
        kept = {Path("runs"), *Path("runs/cache").rglob("*"), Path("runs/cache")}
        return sorted(set(Path().rglob("*")) - kept)

    def call(script: str, *words: str) -> str:
        before = there()
        capsys.readouterr()
        try:
            code = SCRIPTS[script].main(list(words))
        except SystemExit as exit_:  # tyro's way out
            code = exit_.code
        message = capsys.readouterr().err
        assert code == 2, message
        assert "Traceback" not in message
        assert there() == before
        return message

    return call
