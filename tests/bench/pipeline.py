"""Classes of texts in the order they come, ours beside a pipeline of transformers.

    OMP_NUM_THREADS=2 python -m tests.bench.pipeline --data DIR [--rounds 5]

`DIR` holds sst2_glue/dev.tsv, whose 872 sentences are asked for as requests of 32. MiniLM with two
classes, the same dtype and threads; text to probabilities, tokenising included. Ours is the engine,
in a thread of its own as in serve.py; theirs a pipeline with batches of 32. Each side has a process
of its own. Ratios are medians over rounds. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
import torch
import transformers
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.engine import Engine, Finish, Job, Said
from ftcore.model.load import load_model
from tests.bench.serve import DTYPES, measured, side
from tests.bench.sst2 import model_folder

BATCH, BAR = 32, 1.5

class Ours:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        threads, self.over = torch.get_num_threads(), threading.Event()
        torch.set_num_threads(1)
        self.tokenizer = Tokenizer.load(folder)
        self.engine = Engine(load_model(folder, task="classify", dtype=dtype).model,
                             threads=threads)
        self.engine.start(self.deliver)

    def deliver(self, said: Said) -> None:
        self.left -= sum(isinstance(word, Finish) for _, word in said)
        if not self.left:
            self.over.set()

    def seconds(self, texts: list[str]) -> tuple[float, list[int]]:
        """Until all are answered, and the classes."""
        start, classes = time.perf_counter(), []
        for at in range(0, len(texts), BATCH):
            some = [(text,) for text in texts[at : at + BATCH]]
            jobs = [Job(ids_T.tolist(), None) for ids_T, _ in self.tokenizer.encode_pairs(some)]
            self.left = len(jobs)
            self.over.clear()
            for job in jobs:
                self.engine.submit(job)
            assert self.over.wait(60)
            logits_BK = torch.tensor([job.scores for job in jobs])
            classes += logits_BK.softmax(-1).argmax(-1).tolist()
        return time.perf_counter() - start, classes

class Theirs:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.pipeline = transformers.pipeline("text-classification", str(folder), dtype=dtype,
                                              device="cpu")

    def seconds(self, texts: list[str]) -> tuple[float, list[int]]:
        start = time.perf_counter()
        found = self.pipeline(texts, batch_size=BATCH)
        return time.perf_counter() - start, [int(each["label"][-1]) for each in found]

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    said = parser.parse_args()
    lines = (said.data / "sst2_glue" / "dev.tsv").read_text("utf-8").splitlines()
    place = lines[0].split("\t").index("sentence")
    texts, told = [line.split("\t")[place].strip() for line in lines[1:]], {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        folder, base = Path(work), model_folder()
        kind = transformers.AutoModelForSequenceClassification
        names = {0: "CLASS_0", 1: "CLASS_1"}
        kind.from_pretrained(base, id2label=names).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        for name in DTYPES:
            with side(Ours, folder, name) as ours, side(Theirs, folder, name) as theirs:
                rounds = []
                for _ in range(said.rounds + 1):  # the first is not counted
                    both = [each.submit(measured, "seconds", texts).result()
                            for each in (ours, theirs)]
                    rounds.append([seconds for seconds, _ in both])
                    same = sum(a == b for a, b in zip(both[0][1], both[1][1], strict=True))
            ratios = sorted(b / a for a, b in rounds[1:])
            mine, other = (len(texts) / statistics.median(c) for c in zip(*rounds[1:], strict=True))
            ratio = statistics.median(ratios)
            print(f"{name}: ours {mine:.0f} texts/s, theirs {other:.0f}, {ratio:.2f}x"
                  f" [{ratios[0]:.2f}, {ratios[-1]:.2f}] (bar {BAR}); {same} of {len(texts)}"
                  " classes are the same", flush=True)
            told[name] = {"ours": mine, "theirs": other, "ratios": ratios, "same": same}
    print(json.dumps({"threads": torch.get_num_threads(), "bar": BAR, **told}))

if __name__ == "__main__":
    main()
