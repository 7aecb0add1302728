"""The engine beside `generate` of transformers: tokens of answers a second, on this machine.

    OMP_NUM_THREADS=2 python -m tests.bench.serve

A random GPT-2 of 124 million weights; greedy; the same prompts, dtype and threads for both. Loads:

one         a single request
eight       requests of unequal length at once; of the rival one padded batch
thirty-two  the same; of the rival padded batches of like length, of 8 or all at once, whichever
            takes less time; beside both, its continuous batching

A round is ours, then the rival, then the floor: the linear maps alone, of as many rows as every
step of ours had. Each side has a process of its own. Ratios are medians over rounds. Answers of
padded batches go on until the longest is done; only tokens that were asked for count. The last line
is JSON.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from ftcore.deploy.engine import Engine, Finish, Job, Said
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from ftcore.model.transformer import Linear
from kernels.sampling import Sampling, Token

LOADS = {"one": 1, "eight": 8, "thirty-two": 32}
BARS = {("one", "fp32"): 1.3, ("one", "bf16"): 1.6, ("eight", "bf16"): 2.0,
        ("thirty-two", "bf16"): 2.5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Requests = list[tuple[list[int], int]]  # prompt and how many tokens are asked for

def requests(count: int) -> Requests:
    """Prompts of 16 to 200 tokens, answers of 16 to 96, the same in every run."""
    draw = torch.Generator().manual_seed(count)
    sizes = [(int(torch.randint(16, 201, (), generator=draw)),
              int(torch.randint(16, 97, (), generator=draw))) for _ in range(count)]
    sizes = [(64, 64)] if count == 1 else sizes
    return [(torch.randint(50257, (p,), generator=draw).tolist(), n) for p, n in sizes]

class Ours:
    """The engine as serve.py runs it, in a thread of its own."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.threads, self.over = torch.get_num_threads(), threading.Event()
        torch.set_num_threads(1)
        self.engine = Engine(load_model(folder, task="lm", dtype=dtype).model, threads=self.threads)
        self.engine.start(self.deliver)

    def deliver(self, said: Said) -> None:
        for job, what in said:
            if isinstance(what, Token):
                self.times.setdefault(job, []).append(time.perf_counter())
        self.left -= sum(isinstance(what, Finish) for _, what in said)
        if not self.left:
            self.over.set()

    def seconds(self, asked: Requests) -> float:
        """Until all are answered."""
        self.left, start, self.times = len(asked), time.perf_counter(), {}
        self.over.clear()
        for prompt, count in asked:
            self.engine.submit(Job(prompt, Sampling(count, temperature=0)))
        assert self.over.wait(600)
        self.started = start
        return time.perf_counter() - start

    def latencies(self, asked: Requests) -> tuple[float, float]:
        """Of the last run, in s: until the first token, the median over requests, and the gap
        between two tokens that one in a hundred exceeds."""
        gaps = sorted(b - a for each in self.times.values() for a, b in pairwise(each))
        firsts = [each[0] - self.started for each in self.times.values()]
        return statistics.median(firsts), gaps[int(0.99 * len(gaps))]

    def floor(self, asked: Requests) -> float:
        """Seconds of the linear maps alone, with torch's own layout of the matrices."""
        found: Counter[tuple[int, int]] = Counter()  # rows of stream and head in each step
        rows: list[int] = []
        model = self.engine.model
        hooks = [model.trunk.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))),
                 model.head.register_forward_pre_hook(
                     lambda _, args: found.update([(rows[-1], len(args[0]))]))]
        self.seconds(asked)
        for hook in hooks:
            hook.remove()
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads,
                                initargs=(self.threads,)) as thread:
            return thread.submit(products, model, found).result()

@torch.inference_mode()
def products(model: Model, steps: Counter[tuple[int, int]]) -> float:
    body = [module for module in model.trunk.modules() if isinstance(module, Linear)]
    seconds = 0.0
    for (N, M), count in steps.items():
        pairs = [(layer, torch.ones(rows, layer.in_features, dtype=layer.weight.dtype))
                 for layers, rows in ((body, N), ([model.head.last], M)) for layer in layers]
        seconds += count * min(_pass(pairs) for _ in range(3))
    return seconds

def _pass(pairs: list[tuple[Linear, Tensor]]) -> float:
    start = time.perf_counter()
    for layer, x_NC in pairs:
        F.linear(x_NC, layer.weight, layer.bias)
    return time.perf_counter() - start

class Theirs:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
        self.manager = None

    def seconds(self, asked: Requests) -> float:
        """Of all batches, those of like length together: the faster of the two forms."""
        order = sorted(asked, key=lambda pair: (pair[1], len(pair[0])))
        return min(sum(padded(self.model, order[at : at + batch])
                       for at in range(0, len(order), batch))
                   for batch in {min(8, len(asked)), len(asked)})

    def continuous(self, asked: Requests) -> float:
        """The same by the continuous batching that `transformers serve` has, without its HTTP."""
        if self.manager is None:
            config = transformers.GenerationConfig(eos_token_id=-1, pad_token_id=0, do_sample=False,
                                                   max_new_tokens=max(n for _, n in asked))
            self.manager = self.model.init_continuous_batching(generation_config=config)
            self.manager.start()
        start, left = time.perf_counter(), len(asked)
        for prompt, count in asked:
            self.manager.add_request(prompt, max_new_tokens=count)
        while left:
            left -= self.manager.get_result(timeout=300).is_finished()
        return time.perf_counter() - start

    def stop(self, asked: Requests) -> None:
        """Of its thread, without which this process would not end."""
        if self.manager is not None:
            self.manager.stop(block=True)

def padded(rival: torch.nn.Module, asked: Requests) -> float:
    """Seconds of one batch, padded on the left."""
    longest, most = max(len(prompt) for prompt, _ in asked), max(count for _, count in asked)
    rows = [[0] * (longest - len(prompt)) + prompt for prompt, _ in asked]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in asked]
    start = time.perf_counter()
    made = rival.generate(
        torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=False,
        max_new_tokens=most, min_new_tokens=most, pad_token_id=0)
    assert made.shape[1] == longest + most
    return time.perf_counter() - start

def side(kind: type, folder: Path, name: str) -> ProcessPoolExecutor:
    """A process for one side alone: a pool of threads, or settings of memory, of one would change
    the time of the other."""
    alone = {"max_workers": 1, "mp_context": multiprocessing.get_context("spawn")}
    return ProcessPoolExecutor(**alone, initializer=opened, initargs=(kind, folder, name))

def opened(kind: type, folder: Path, name: str) -> None:
    torch.manual_seed(0)
    globals()["own"] = kind(folder, DTYPES[name])

def measured(what: str, asked: Requests) -> float:
    return getattr(globals()["own"], what)(asked)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each load")
    parser.add_argument("--loads", nargs="+", default=[*LOADS], choices=LOADS)
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=DTYPES)
    said = parser.parse_args()
    torch.manual_seed(0)
    told = {"threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "loads": {}}
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.GPT2Config(eos_token_id=None, bos_token_id=None)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        for name in said.dtypes:
            told["loads"] |= compare(Path(folder), name, said)
    print(json.dumps(told))

def compare(folder: Path, name: str, said: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All loads in one dtype."""
    found = {}
    with side(Ours, folder, name) as ours, side(Theirs, folder, name) as theirs:
        for load in said.loads:
            asked = requests(LOADS[load])
            tokens = sum(count for _, count in asked)
            ours.submit(measured, "seconds", asked).result()  # untimed, as is one of theirs
            theirs.submit(measured, "seconds", [(prompt, 2) for prompt, _ in asked]).result()
            forms = [(ours, "seconds"), (theirs, "seconds"), (ours, "floor")]
            if len(asked) > 1:
                theirs.submit(measured, "continuous", asked).result()
                forms.append((theirs, "continuous"))
            rounds = [[pool.submit(measured, what, asked).result() for pool, what in forms]
                      for _ in range(said.rounds)]
            mine, other, least, *streams = map(statistics.median, zip(*rounds, strict=True))
            ratios = sorted(b / a for a, b, *_ in rounds)
            ratio, bar = statistics.median(ratios), BARS.get((load, name))
            first, gap = ours.submit(measured, "latencies", asked).result()
            rates = f"ours {tokens / mine:7.1f} tokens/s, theirs {tokens / other:7.1f}"
            print(f"{load:10} {name}: {rates}, {ratio:.2f}x [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
                  f" (bar {bar or 'none'}); floor {least / mine:.0%} of ours"
                  f"; first token after {1e3 * first:.0f} ms, p99 gap {1e3 * gap:.0f} ms"
                  + "".join(f"; continuous {tokens / each:.1f}" for each in streams), flush=True)
            found[f"{load} {name}"] = {
                "ours_tokens_per_s": tokens / mine, "theirs_tokens_per_s": tokens / other,
                "ratio": ratio, "ratios": ratios, "bar": bar, "floor_share": least / mine,
                "first_token_s": first, "gap_p99_s": gap,
                "over_continuous": [d / a for a, _, _, *rest in rounds for d in rest]}
        theirs.submit(measured, "stop", []).result()
    return found

if __name__ == "__main__":
    main()
