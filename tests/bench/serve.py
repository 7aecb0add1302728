"""The engine beside `generate` of transformers: tokens of answers a second, on this machine.

    OMP_NUM_THREADS=2 python -m tests.bench.serve

A random GPT-2 of 124 million weights; greedy; the same prompts, dtype and threads for both. Loads:

one         a single request
eight       requests of unequal length at once; of the rival one padded batch
thirty-two  the same; of the rival padded batches of like length, of 8 or all at once, whichever
            takes less time

A round is ours, then the rival, then the floor: the linear maps alone, of as many rows as every
step of ours had. Ratios are medians over rounds. Answers of padded batches go on until the longest
is done; only tokens that were asked for count. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from ftcore.deploy.engine import Engine, Finish, Job, Said
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from ftcore.model.transformer import Linear
from kernels.sampling import Sampling

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

def ours(engine: Engine, asked: Requests) -> float:
    """Seconds until all are answered."""
    left, over = [len(asked)], threading.Event()
    listeners.append(lambda said: (
        left.append(left[-1] - sum(isinstance(what, Finish) for _, what in said)),
        over.set() if not left[-1] else None))
    start = time.perf_counter()
    for prompt, count in asked:
        engine.submit(Job(prompt, Sampling(count, temperature=0)))
    assert over.wait(600)
    return time.perf_counter() - start

listeners: list = []

def deliver(said: Said) -> None:
    listeners[-1](said)

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

def theirs(rival: torch.nn.Module, asked: Requests, batch: int) -> float:
    """Seconds of all batches, those of like length together."""
    order = sorted(asked, key=lambda pair: (pair[1], len(pair[0])))
    return sum(padded(rival, order[at : at + batch]) for at in range(0, len(order), batch))

def steps_of(engine: Engine, asked: Requests) -> Counter[tuple[int, int]]:
    """Rows of the stream and of the head in each step."""
    found: Counter[tuple[int, int]] = Counter()
    rows: list[int] = []
    trunk, head = engine.model.trunk, engine.model.head
    hooks = [trunk.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))),
             head.register_forward_pre_hook(
                 lambda _, args: found.update([(rows[-1], len(args[0]))]))]
    ours(engine, asked)
    for hook in hooks:
        hook.remove()
    return found

@torch.inference_mode()
def floor(model: Model, steps: Counter[tuple[int, int]]) -> float:
    """Seconds of the linear maps alone."""
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
    dtype, found = DTYPES[name], {}
    rival = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    engine = Engine(load_model(folder, task="lm", dtype=dtype).model)
    engine.start(deliver)
    for load in said.loads:
        asked = requests(LOADS[load])
        tokens = sum(count for _, count in asked)
        steps = steps_of(engine, asked)  # untimed, as is one of theirs
        batches = {min(8, len(asked)), len(asked)}
        padded(rival, [(prompt, 2) for prompt, _ in asked])
        rounds = [(ours(engine, asked), min(theirs(rival, asked, batch) for batch in batches),
                   floor(engine.model, steps)) for _ in range(said.rounds)]
        mine, other, least = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b, _ in rounds)
        bar = BARS.get((load, name))
        rates = f"ours {tokens / mine:7.1f} tokens/s, theirs {tokens / other:7.1f}, {ratio:.2f}x"
        print(f"{load:10} {name}: {rates} (bar {bar or 'none'}); floor {least / mine:.0%} of ours",
              flush=True)
        found[f"{load} {name}"] = {
            "ours_tokens_per_s": tokens / mine, "theirs_tokens_per_s": tokens / other,
            "ratio": ratio, "bar": bar, "floor_share": least / mine}
    engine.stop()
    return found

if __name__ == "__main__":
    main()
