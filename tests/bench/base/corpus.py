"""The pre-training corpus: what every machine with Python has, and synthetic copy tasks.

Four sources: `docs` (the language reference in pydoc_data.topics, and the docstrings of the
standard library as prose), `source` (its .py files), `copy` and `echo` (copying.py). The committed
base model and tokenizer were made with Python 3.11.7; another version gives another corpus, the
same version always the same one. A file of the library, with its docstrings, is held out by a hash
of its path. `python -m tests.bench.base.corpus DIR` writes it as jsonl; with `--seed`, its copy
tasks and echoes are new ones, with `--every 4` a quarter of the library is in it.
"""

import argparse
import ast
import hashlib
import inspect
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal
from ftcore.data.tokenizer import Tokenizer
from ftcore.hub import resolve

from .copying import Source, chat
from .values import Lexicon, copying_words

Split = Literal["train", "heldout"]

HELDOUT_PER_MILLE = 20
# Tests, installed packages and machine-made files are left out; encodings are mostly byte tables.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")

def split_of(path: str) -> Split:
    """The split of a library file, by its path relative to the library folder."""
    digest = hashlib.sha256(path.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8]) % 1000 < HELDOUT_PER_MILLE else "train"

@cache
def library_documents() -> tuple[dict[str, str], ...]:
    """Every document of the standard library, in the order of its paths."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        {"id": f"pydoc_data/{name}", "text": text.strip("\n"), "source": "docs"}
        for name, text in sorted(topics.items())
    ]
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if any(part in SKIPPED or part.startswith(SKIPPED_PREFIXES) for part in name.parts):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n").strip("\n")
        if docs := "\n\n".join(docstrings(text)):
            documents.append({"id": f"{name.as_posix()}#docs", "text": docs, "source": "docs"})
        if text:
            documents.append({"id": name.as_posix(), "text": text, "source": "source"})
    return tuple(documents)

def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, each one headed by the name of what it describes."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # lib2to3 ships grammars of Python 2
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) >= 40:
                heading = "" if isinstance(node, ast.Module) else f"{node.name}\n\n"
                yield heading + inspect.cleandoc(text)

@cache
def lexicon() -> Lexicon:
    """Words, identifiers and sentences of the library's training part."""
    kept = [doc for doc in library_documents() if split_of(doc["id"].split("#")[0]) == "train"]
    docs = "\n\n".join(doc["text"] for doc in kept if doc["source"] == "docs")
    source = "\n\n".join(doc["text"] for doc in kept if doc["source"] == "source")
    words = often(re.findall(r"(?<![\w.])[a-z]{3,12}(?![\w(.])", docs), 2)
    identifiers = often(re.findall(r"\b[a-zA-Z]\w*(?:_\w+|\.[a-z]\w+)\b", source), 5)
    line = " ".join(docs.split())
    prose = often(re.findall(r"(?<=\. )[A-Z][a-z]+(?:,? [a-z]+){3,13}(?=\.)", line), 1)
    cues = copying_words()["cues"]
    words = [word for word in words if word not in cues]
    return Lexicon(words, identifiers, prose, built_in_tokens())

@cache
def built_in_tokens() -> list[str]:
    """Every token of the built-in vocabulary that is text, a bare space apart."""
    tokenizer = Tokenizer.load(resolve("builtin:base"))
    texts = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
    return [text for text in texts if text.strip() and text.isprintable() and "\ufffd" not in text]

def often(items: Iterable[str], least: int) -> list[str]:
    """The items that occur at least so often, sorted; none longer than 90 characters."""
    counts = Counter(item for item in items if len(item) <= 90)
    return sorted(item for item, count in counts.items() if count >= least)

def documents(
    split: Split, *, seed: int = 0, copies: int = 130_000, echoes: int = 65_000, every: int = 1
) -> Iterator[dict[str, Any]]:
    """The corpus of one split: every n-th file of the library, `copies` copy tasks and `echoes`.

    yields   {"id", "source", "text" or "messages"}; source is "docs", "source", "copy" or "echo"
    """
    library = (doc for doc in library_documents() if split_of(doc["id"].split("#")[0]) == split)
    yield from islice(library, 0, None, every)
    yield from made("copy", split, seed, copies)
    yield from made("echo", split, seed, echoes)

def made(source: Source, split: Split, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` chats of a source; each is a pure function of (split, seed, index)."""
    for index in range(count):
        # numerics: with a shift of 40 for the split too, two seeds of Random give one stream.
        number = (seed << 41) + ((split == "heldout") << 64) + index
        name = f"{source}/{split}/{seed}/{index}"
        yield {"id": name, "messages": chat(source, lexicon(), number), "source": source}

def main() -> None:
    """Write train.jsonl and heldout.jsonl, and the parts of the latter that RECORDS names."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("seed", 0), ("copies", 130_000), ("echoes", 65_000), ("every", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of train; {default}")
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    folder.mkdir(parents=True, exist_ok=True)
    heldout = list(documents("heldout", copies=500, echoes=250))
    library = [row for row in heldout if row["source"] in ("docs", "source")]
    copies = [row for row in heldout if row["source"] == "copy"]
    train = documents("train", **options)
    parts = {"train": train, "heldout": heldout, "library": library, "copies": copies}
    for name, rows in parts.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(folder / f"{name}.jsonl")

if __name__ == "__main__":
    main()
