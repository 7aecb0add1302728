"""What a run trains and is judged on, and what is kept of it: its account, RUN/data/, and a cache
of its tokens, CACHE/KEY/, with a folder of arrays for each of `Prepared.splits`."""

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
import jinja2
import numpy as np
from ftcore import builtin, files
from ftcore.data import columns, encode, pack, read
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError

HERE = Path(__file__).parent
CODE = (HERE, Path(builtin.__file__).parent)
FIELDS, FUNNEL, PAGE = "prepared.json", "funnel.json", "report.html"
LIBRARIES = ("jinja2", "numpy", "tokenizers")
STEPS = ("read", "map", "filter", "compare", "split", "encode")  # in which rows can leave

@dataclass
class Prepared:
    train: encode.Split = field(default_factory=encode.Split)
    dev: encode.Split = field(default_factory=encode.Split)
    tests: dict[str, encode.Split] = field(default_factory=dict)
    labels: encode.Names = None  # classes, by index; of a regression the one name of its scores
    notes: dict[str, Any] = field(default_factory=dict)  # what was found on the way, as JSON

    def splits(self) -> list[tuple[str, encode.Split]]:
        named = [("train", self.train), ("dev", self.dev), *self.tests.items()]
        return [(name, split) for name, split in named if split.num_rows]

    def summary(self) -> str:
        """What was read and lost, for people: one line for each split, then what else was found."""
        return rendered("summary.txt", data=self, losses=losses, reasons=columns.reasons).rstrip()

    def write(self, folder: Path, *, resumes: bool = False) -> None:
        """Write the account into a run's data/. Raises DataError: it began with other rows."""
        self.notes["train sha256"] = now = pack.digest(self.train.documents)
        if resumes and read_account(folder).get("train sha256", now) != now:
            what = "the training rows are not those that the run began with"
            raise DataError(f"{folder}: {what}; restore the files, or begin another run")
        lines = [json.dumps({"split": name, "what": what, **asdict(row)}, ensure_ascii=False) + "\n"
                 for name, split in self.splits() for what, found in losses(split) for row in found]
        files.write_file(folder / "rejected.jsonl", "".join(lines))
        account = {**self.notes, "funnel": {name: funnel(s) for name, s in self.splits()},
                   "not_whole": {name: dict(columns.reasons(s.cut)) for name, s in self.splits()}}
        files.write_file(folder / FUNNEL, json.dumps(account, indent=1))
        write_page(folder)

KIND = "kind of ftcore"  # a key that no label has
KINDS = {kind.__name__: kind for kind in (Prepared, encode.Split, columns.Rejected, columns.Chat)}

def read_account(folder: Path) -> dict[str, Any]:
    path = folder / FUNNEL
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}

def write_page(folder: Path) -> Path:
    files.write_file(folder / PAGE, rendered(PAGE, **read_account(folder), where=folder.parent))
    return folder / PAGE

def rendered(template: str, folder: Path = HERE, /, **values: Any) -> str:
    """A page or text made by a template of the folder, or of this one, which it may extend."""
    shape = {"autoescape": jinja2.select_autoescape(), "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader([folder, HERE]), **shape)
    return environment.get_template(template).render(**values)

def losses(split: encode.Split) -> list[tuple[str, list[columns.Rejected]]]:
    return [("left out", split.rejected), ("cut", split.cut)]

def funnel(split: encode.Split) -> list[dict[str, Any]]:
    """For each step the rows in and out, what left and why."""
    steps, rows = [], split.num_rows
    for step in STEPS:
        lost = [row for row in split.rejected if row.step == step]
        named = {row.reason: f"{columns.place(row)} {row.detail[:200]}" for row in reversed(lost)}
        why = [{"reason": r, "rows": n, "such as": named[r]} for r, n in columns.reasons(lost)]
        before, rows = rows, rows - len({(row.file, row.line) for row in lost})
        steps.append({"step": step, "in": before, "out": rows, "lost": why})
    return steps

def statistics(split: encode.Split, tokenizer: Tokenizer, labels: encode.Names) -> dict[str, Any]:
    documents, lengths_B = split.documents, pack.lengths(split.documents)
    found = {"documents": len(documents), "tokens": int(lengths_B.sum()),
             "lengths": {f"p{p}": round(np.percentile(lengths_B, p)) for p in (5, 50, 95, 99, 100)}}
    if isinstance(documents[0].weights, np.ndarray):
        scored = np.count_nonzero(np.concatenate([document.weights for document in documents]))
        found["scored share"] = round(int(scored) / found["tokens"], 4)
    elif labels and len(labels) > 1:
        chosen = np.array([document.labels for document in documents])  # (B,) or (B, K)
        counts_K = chosen.sum(0) if chosen.ndim > 1 else np.bincount(chosen, minlength=len(labels))
        found["labels"] = dict(zip(labels, counts_K.astype(int).tolist(), strict=True))
    if "unk_token" in tokenizer.special:
        id_ = tokenizer.id_of(tokenizer.special["unk_token"])
        unknown = np.concatenate([document.tokens_T for document in documents]) == id_
        found["unknown share"] = round(float(unknown.mean()), 6)
    return found

def key(config: columns.DataConfig, tokenizer: Tokenizer, seed: int) -> str:
    """32 hex digits of all that `prepared` depends on; DataError: a data file cannot be read."""
    ends = ("py", "toml", "gz")
    code = sorted(p for folder in CODE for end in ends for p in folder.rglob(f"*.{end}"))
    parts = [(path.name, files.sha256_file(path)) for path in code]
    named = {*map(str, (*config.train, *config.dev, *config.test))} - {read.BUILTIN_CHAT}
    parts += [(name, hashlib.sha256(read.stored(Path(name))).hexdigest()) for name in sorted(named)]
    versions = [platform.python_version(), *map(importlib.metadata.version, LIBRARIES)]
    options = (replace(config, cache=None), tokenizer.digest, seed, versions)
    return hashlib.sha256(repr((parts, options)).encode()).hexdigest()[:32]

def save(data: Prepared, folder: Path) -> None:
    (folder / FIELDS).write_text(json.dumps(data, default=_plain))
    for number, (_, split) in enumerate(data.splits()):
        (folder / str(number)).mkdir()
        pack.save(split.documents, folder / str(number))

def load(folder: Path) -> Prepared:
    data = json.loads((folder / FIELDS).read_bytes(), object_hook=_made)
    for number, (_, split) in enumerate(data.splits()):
        split.documents = pack.load(folder / str(number))
    return data

def _plain(value: Any) -> dict[str, Any]:
    """What JSON has no form for: a kind of KINDS, and the names and values that make it again."""
    apart = {"documents": []} if isinstance(value, encode.Split) else {}  # these have own files
    return {KIND: type(value).__name__, **vars(value), **apart}

def _made(fields: dict[str, Any]) -> Any:
    if KIND not in fields:
        return fields
    kind = KINDS[fields.pop(KIND)]
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()})
