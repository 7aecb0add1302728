"""Every task on real data: one run each with train.py, its figure beside the floor.

    python -m tests.bench.tasks --data DIR                      all, more than an hour on two cores
    python -m tests.bench.tasks --data DIR --only stsb wnut17   some of them
    python -m tests.bench.tasks --data DIR --only               none: the table of what is there

A run that is there is kept, so the command may be stopped and started again. Classifiers, scorers
and taggers start from a real BERT (MiniLM, 22 M parameters), chats and plain text from the built-in
base. Numbers of epochs and rates were chosen on dev rows, never on the reported split. A floor is
what a linear model on word pairs reaches on the same files, or one constant answer. The last line
is JSON.
"""

import argparse
import contextlib
import csv
import gzip
import io
import json
import shlex
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
import eval as eval_script
import train as train_script
from tests.bench.sst2 import model_folder

Values = dict[str, dict[str, float]]  # metrics by test split
Figures = dict[str, float]

def first(values: Values, run: Path) -> Figures:
    """The metrics of the first test file."""
    return next(iter(values.values()))

def of_class_1(values: Values, run: Path) -> Figures:
    """Accuracy, and F1 of the class "1", from the predictions."""
    lines = (run / "predictions.jsonl").read_text("utf-8").splitlines()
    pairs = [(row["label"], row["predicted"]) for row in map(json.loads, lines)]
    said = sum(pair.count("1") for pair in pairs)
    return {**first(values, run), "f1": 2 * pairs.count(("1", "1")) / said}

def in_and_out(values: Values, run: Path) -> Figures:
    """CLINC150: accuracy in scope, recall of what is out of scope."""
    inside, outside = values.values()
    return {"accuracy": inside["accuracy"], "oos_recall": outside["accuracy"]}

def rows_of(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    if ".json" not in path.name:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))

def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")

def news(data: Path, made: Path) -> None:
    """One form for three files; training texts that stand in the test file are left out."""
    names = ("World", "Sports", "Business", "Sci/Tech")
    text = gzip.decompress((data / "ag_news/test.csv.gz").read_bytes()).decode()
    test = list(csv.reader(io.StringIO(text, newline="")))
    known = {folded(text) for _, title, said in test for text in (said, f"{title} {said}")}
    write(made / "test.jsonl", (
        {"text": f"{title} {said}", "label": names[int(label) - 1]} for label, title, said in test
    ))  # fmt: skip
    alps = gzip.decompress((data / "ag_news/alps_dev.tsv.gz").read_bytes()).decode()
    rows = [line.rsplit("\t", 1) for line in alps.removesuffix("\n").split("\n")]
    with (data / "ag_news/lst_train.csv").open(encoding="utf-8", newline="") as file:
        rows += [(said, names[int(label)]) for said, label in csv.reader(file)]
    write(made / "train.jsonl", (
        {"text": text, "label": label} for text, label in rows if folded(text) not in known
    ))  # fmt: skip

def folded(text: str) -> str:
    return " ".join(text.lower().split())

def wikigold(data: Path, made: Path) -> None:
    """Documents in their order: 100 to train on, 20 to choose by, 25 to report."""
    text = (data / "ner_wikigold/wikigold.conll.txt").read_text("utf-8")
    documents = [part.strip("\n") + "\n\n" for part in text.split("-DOCSTART- O\n") if part.strip()]
    cuts = {"train": documents[:100], "dev": documents[100:120], "test": documents[120:]}
    for name, some in cuts.items():
        (made / f"{name}.conll").write_text("".join(some), "utf-8")

def entity_kinds(data: Path, made: Path) -> None:
    """Several labels a row: which kinds of entity a sentence of Wikigold names."""
    wikigold(data, made)
    for name in ("train", "dev", "test"):
        sentences = (made / f"{name}.conll").read_text("utf-8").split("\n\n")
        parts = [[line.split(" ") for line in s.splitlines()] for s in sentences if s.strip()]
        write(made / f"{name}.jsonl", (
            {
                "text": " ".join(word for word, _ in words),
                "label": sorted({tag[2:] for _, tag in words if tag != "O"}),
            }
            for words in parts
        ))  # fmt: skip

def entailment(data: Path, made: Path) -> None:
    """RTE, too small to learn from alone, with the pairs of SNLI's dev file as two classes; every
    tenth row of RTE to choose by."""
    lines = (data / "rte/train.tsv").read_text("utf-8").splitlines()[1:]
    rte = [tuple(line.split("\t")[1:]) for line in lines]
    lines = (data / "snli_devtest/dev.txt").read_text("utf-8").splitlines()
    snli = [line.split("\t") for line in lines]
    classes = ("entailment", "not_entailment", "not_entailment")  # SNLI: entailed, neutral, denied
    other = [(one, two, classes[int(label)]) for one, two, label in snli]
    dev = rte[::10]
    known = {row[:2] for row in dev}
    cuts = {"train": [row for row in rte + other if row[:2] not in known], "dev": dev}
    for name, rows in cuts.items():
        write(made / f"{name}.jsonl", (
            {"sentence1": one, "sentence2": two, "label": label} for one, two, label in rows
        ))  # fmt: skip

def teacher(data: Path, made: Path) -> None:
    """Both files; every tenth row to report, the one after it to choose by."""
    files = sorted((data / "gpteacher").glob("*.json.gz"))
    rows = [row for file in files for row in rows_of(file)]
    for name, kept in (("test", (0,)), ("dev", (1,)), ("train", range(2, 10))):
        write(made / f"{name}.jsonl", (row for n, row in enumerate(rows) if n % 10 in kept))

def reviews(data: Path, made: Path) -> None:
    """IMDB: a text a file, its label the folder that it is in."""
    for name in ("train", "test"):
        with tarfile.open(data / f"imdb/aclImdb_{name}_5000.tar.gz") as archive:
            write(made / f"{name}.jsonl", (
                {"text": archive.extractfile(m).read().decode(), "label": Path(m.name).parent.name}
                for m in archive if m.isfile()
            ))  # fmt: skip

def requests(data: Path, made: Path) -> None:
    """CLINC150: the parts of one file."""
    parts = json.loads(gzip.decompress((data / "clinc150/data_full.json.gz").read_bytes()))
    for name, rows in parts.items():
        write(made / f"{name}.jsonl", ({"text": text, "label": label} for text, label in rows))

FIGURES = {function.__name__: function for function in (first, of_class_1, in_and_out)}
MAKERS = {
    function.__name__: function
    for function in (news, wikigold, entity_kinds, entailment, teacher, reviews, requests)
}
RECIPES = tomllib.loads((Path(__file__).parent / "tasks.toml").read_text("utf-8"))

def run(name: str, data: Path, runs: Path, *, device: str, threads: int, seed: int) -> None:
    """Train, evaluate, and leave the figures in figures.json of the run."""
    recipe, path, made = RECIPES[name], runs / f"{name}-{seed}", runs / f"{name}-data"
    if "make" in recipe:
        made.mkdir(parents=True, exist_ok=True)
        MAKERS[recipe["make"]](data, made)
    model = "builtin:base" if recipe["task"] in ("sft", "pretrain") else model_folder()
    read = shlex.split(recipe["data"].format(d=data, m=made))
    words = [
        *(recipe["task"], "--model.path", model, *read, *shlex.split(recipe["train"])),
        *("--env.device", device, "--env.threads", str(threads), "--env.seed", str(seed)),
        *("--loop.save-every", "100000"),
        *("--log.dir", str(runs), "--log.name", path.name),
    ]
    started = time.perf_counter()
    code = train_script.main(words)
    assert code == 0, f"train.py failed: {shlex.join(words)}"
    seconds = time.perf_counter() - started
    told = json.loads((path / "eval.json").read_text("utf-8"))
    before = told["base"]
    if recipe["task"] == "pretrain":
        before = bits_before(read[read.index("--data.test") :], model)
    found = FIGURES[recipe.get("figures", "first")](told["tuned"], path)
    found |= {f"{key}_before": value for key, value in first(before or {"": {}}, path).items()}
    figures = {key: found[key] for key in recipe["report"]}
    figures |= {"seconds": seconds, "device": device}
    (path / "figures.json").write_text(json.dumps(figures), "utf-8")

def bits_before(tests: list[str], model: str) -> Values:
    """The figures of the model that the run began with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = eval_script.main([model, "--task", "pretrain", *tests])
    assert code == 0, "eval.py failed"
    return json.loads(out.getvalue().splitlines()[-1])["results"]

def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tasks")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=2)
    said = parser.parse_args()
    for name in said.only:
        if not (said.runs / f"{name}-{said.seed}" / "figures.json").is_file():
            print(f"== {name}", file=sys.stderr)
            how = {"device": said.device, "threads": said.threads, "seed": said.seed}
            run(name, said.data, said.runs, **how)
    found = {}
    for name, recipe in RECIPES.items():
        file = said.runs / f"{name}-{said.seed}" / "figures.json"
        if file.is_file():
            found[name] = json.loads(file.read_text("utf-8"))
            shown = "  ".join(f"{key} {found[name][key]:.4f}" for key in recipe["report"])
            floor = f"  (floor: {recipe['floor']})" if "floor" in recipe else ""
            print(f"{name:14}{shown}{floor}  {found[name]['seconds']:.0f} s")
    print(json.dumps({"tasks": found}))

if __name__ == "__main__":
    main()
