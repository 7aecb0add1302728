"""Everything a GPU is asked, in one command of some ten minutes:

    python -m tests.bench.gpu [--tune] [--record] [OP ...]
    python -m tests.bench.gpu end-to-end [SHAPE ...]     a later part alone
    python -m tests.bench.gpu decode [SHAPE ...]
    python -m tests.bench.gpu memory [SHAPE ...]

kernels.check; kernels.bench with the rivals of gpu_rivals.py; and, unless ops are named, end to
end: training steps of models of some shapes with random weights, ours beside transformers (and
peft, and Liger's patch) with SDPA, on the same documents. Theirs sorts the documents of a step by
length and pads them in micro-batches; its AdamW is torch's fused one, without fp32 masters. Then
decoding: prompts of 128 tokens, 128 more of each, greedy, in bf16, beside transformers' `generate`.
Then what `--dry-run` predicts of a step's memory beside what steps took. A JSON line comes last.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
import numpy as np
import torch
from ftcore.cli import parse
from ftcore.config import OptimConfig, PeftConfig
from ftcore.data.pack import Encoded, collate, total_weight
from ftcore.env.plan import planned
from ftcore.env.run import RunFolder
from ftcore.model import generate as made
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from ftcore.tune.loop import Loop, filled
from ftcore.tune.optim import AdamW
from ftcore.tune.task import choose_trainable, passes, token_labels
from kernels import bench, check
from kernels.attention_cache import Cache
from kernels.cases import ops
from kernels.graph import Graphs

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 40960,
    "initializer_range": 0.02, "attention_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "head_dim": 128,
    "max_position_embeddings": 8192, "initializer_range": 0.02, "attention_bias": False,
    "mlp_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_1B = LLAMA | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
STEP_TOKENS, NUM_STEPS, WARM_UP = 16384, 9, 3
STREAMS, NUM_NEW = (1, 32, 256), 128
Step = list[Encoded]

class Shape(NamedTuple):
    """A model, what is trained of it, and on what."""
    config: dict
    methods: tuple[str, ...]
    length: int | None  # of every document; None: those of `steps`
    rows: tuple[int, ...]  # documents of a micro-batch of theirs
    rivals: tuple[str, ...] = ("transformers", "with Liger")

SHAPES = {"0.6B": Shape(CONFIG, ("lora", "full"), None, (16, 32)),
          "1B": Shape(LLAMA_1B, ("full",), 4096, (2, 4)),
          "8B": Shape(LLAMA_8B, ("lora",), 4096, (1, 2))}

def steps(vocabulary: int, every: int | None = None) -> list[Step]:
    """Documents of 32 to 1024 tokens (median 180), or all of one length, two thirds of each scored,
    some 16384 a step."""
    random = np.random.default_rng(0)
    made: list[Step] = [[]]
    while len(made) <= NUM_STEPS:
        length = every or int(np.clip(random.lognormal(5.2, 0.6), 32, 1024))
        ids_T = random.integers(10, vocabulary, length).astype(np.int32)
        weights_T = np.ones(length, np.float32)
        weights_T[: length // 3] = weights_T[-1] = 0
        if sum(map(len, made[-1])) + length > STEP_TOKENS:
            made.append([])
        labels_T = np.append(ids_T[1:], -100).astype(np.int32)
        made[-1].append(Encoded(str(length), ids_T, labels_T, weights_T))
    return made[:NUM_STEPS]

def measured(run: Callable[[Step], float], todo: list[Step], device: str) -> dict[str, Any]:
    """Tokens per second (median after the warm-up), peak memory in GiB, and the losses."""
    is_gpu, rates, losses = device == "cuda", [], []
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for step in todo:
        start = time.perf_counter()
        losses.append(round(run(step), 5))  # reading the loss waits for the device
        rates.append(sum(map(len, step)) / (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else 0.0
    rate = statistics.median(rates[WARM_UP:])
    return {"tokens_per_s": round(rate), "peak_gib": round(peak, 2), "losses": losses}

def ours(config: dict, method: str, impl: str, device: str) -> Callable[[Step], float]:
    """A step of our training loop, on one stream."""
    model = random_model(config, device).train()
    peft = PeftConfig(method=method, rank=16, alpha=32.0)
    choose_trainable(model, peft, torch.Generator().manual_seed(1))
    model.use_kernels(impl)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimiser = AdamW(trained, OptimConfig())
    (part,) = optimiser.parts(1)

    mine = partial(passes, token_labels, model)
    is_graphed = impl == "auto" and device == "cuda"
    graphs = Graphs(mine, optimiser, torch.device(device)) if is_graphed else None

    def run(step: Step) -> float:
        ordered, weight = sorted(step, key=len, reverse=True), total_weight(step)
        optimiser.zero_grad()
        if graphs:
            loss_sum = graphs(filled(ordered), 1 / weight)
        else:
            loss_sum = mine(collate(ordered).to(device), 1 / weight)
        optimiser.square_sums(part)
        optimiser.step(part, 1e-4)
        return loss_sum.item() / weight

    return run

def theirs(config: dict, method: str, rows: int, device: str,
           has_liger: bool) -> Callable[[Step], float]:
    """A step of transformers, in micro-batches of `rows` documents."""
    model = their_model(config, device).train()
    if has_liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if method == "lora":
        import peft

        settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        lora = peft.LoraConfig(r=16, lora_alpha=32, **settings)
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")

    def run(step: Step) -> float:
        ordered, scored = sorted(step, key=len), sum(float(d.weights.sum()) for d in step)
        total = 0.0
        for first in range(0, len(ordered), rows):
            inputs = padded(ordered[first : first + rows], device)
            num_scored = float((inputs["labels"] != -100).sum())
            loss = model(**inputs).loss * num_scored / scored
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(total)

    return run

def their_model(config: dict, device: str) -> Any:
    import transformers

    made = transformers.AutoConfig.for_model(**config)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            made, dtype=torch.bfloat16, attn_implementation="sdpa")

def padded(documents: Step, device: str) -> dict[str, torch.Tensor]:
    shape = len(documents), max(map(len, documents))
    ids, labels, mask = np.zeros(shape, int), np.full(shape, -100), np.zeros(shape, int)
    for row, document in enumerate(documents):
        ids[row, : len(document)], mask[row, : len(document)] = document.tokens_T, 1
        scored = np.flatnonzero(document.weights) + 1
        labels[row, scored] = document.tokens_T[scored]
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(x).to(device) for name, x in named.items()}

def random_model(config: dict, device: str) -> Model:
    """Of random weights, the same on every machine of a kind; drawn where it is."""
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        Path(folder, "config.json").write_text(json.dumps(config))
        drawn = {"init": "random", "generator": torch.Generator(device).manual_seed(0)}
        return load_model(Path(folder), task="lm", dtype=torch.bfloat16, **drawn).model

def end_to_end(shape: Shape, device: str) -> Iterator[dict[str, Any]]:
    """A row for each method and who; one that fails is told."""
    config = shape.config
    todo = steps(config["vocab_size"], shape.length)
    for method in shape.methods:
        makers = {"ours": partial(ours, config, method, "auto", device)}
        if shape.length is None:  # eager attention forms all scores of a document
            makers["ours, eager"] = partial(ours, config, method, "eager", device)
        for who, rows in product(shape.rivals, shape.rows):
            has_liger = who != "transformers"
            make = partial(theirs, config, method, rows, device, has_liger)
            makers[f"{who}, {rows} rows"] = make
        for who, make in makers.items():
            try:
                yield {"method": method, "who": who, **measured(make(), todo, device)}
            except Exception as error:  # a rival that is absent, or out of memory
                print(f"    {method} {who}: {type(error).__name__}: {str(error)[:300]}", flush=True)

def memory(shape: Shape, device: str) -> Iterator[dict[str, Any]]:
    """The peak that `--dry-run` predicts, and that of four steps of two micro-batches each."""
    todo = steps(shape.config["vocab_size"], shape.length)
    documents = [document for step in todo[:2] for document in step]
    for method in shape.methods:
        words = ["pretrain", "--model.init", "random", "--peft.method", method]
        words += ["--optim.batch-size", str(len(documents)), "--loop.max-steps", "4"]
        words += ["--loop.micro-batch-tokens", str(STEP_TOKENS)]
        config = parse(words).config
        model = random_model(shape.config, device).train()
        choose_trainable(model, config.peft, torch.Generator().manual_seed(1))
        parts, _ = planned(config, model, documents, token_labels)
        model.use_kernels("auto")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder, "run")) as run:
            loop = Loop(model, token_labels, documents, config, run)
            loop._save = lambda **options: None  # not what is measured
            loop.train()
        predicted, peak = sum(parts.values()) / 2**30, torch.cuda.max_memory_allocated() / 2**30
        parts = {name: round(each / 2**30, 2) for name, each in parts.items()}
        yield {"method": method, "parts_gib": parts, "predicted_gib": round(predicted, 2),
               "peak_gib": round(peak, 2), "ratio": round(predicted / peak, 3)}
        del loop, model
        gc.collect()  # before the next is made

@contextmanager
def from_python() -> Iterator[None]:
    """Every pass of `generate` is computed from Python, none replayed."""
    class Plain(Cache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.replays = None

    old, made.Cache = made.Cache, Plain
    yield
    made.Cache = old

def decoding(shape: Shape, device: str) -> Iterator[dict[str, Any]]:
    """Tokens per second of some numbers of streams, after a first time; and what share of ours,
    replayed, comes before the first token that differs from those computed from Python."""
    random = np.random.default_rng(0)
    every = [random.integers(10, shape.config["vocab_size"], (count, NUM_NEW)).tolist()
             for count in STREAMS]
    model = random_model(shape.config, device).eval()
    rule = {"max_new_tokens": NUM_NEW, "stop_ids": frozenset()}
    for prompts in every:
        found = {}
        for who, way in (("ours, from Python", from_python), ("ours", nullcontext)):
            with way():
                rate, found[who] = timed(partial(made.generate, model, prompts, **rule))
            yield {"streams": len(prompts), "who": who, "tokens_per_s": rate}
        share = np.equal(*found.values()).cumprod(-1).mean()
        print(f"    {len(prompts)} streams: the same tokens {share:.4f}", flush=True)
    model = their_model(shape.config, device).eval()
    for prompts in every:
        ids = torch.tensor(prompts, device=device)
        rule = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
        run = partial(model.generate, ids, attention_mask=torch.ones_like(ids), **rule)
        rate, _ = timed(lambda run=run: run().tolist())
        yield {"streams": len(prompts), "who": "transformers", "tokens_per_s": rate}

def timed(run: Callable[[], list[list[int]]]) -> tuple[int, list[list[int]]]:
    """New tokens per second, the faster of two times after a first, and what came."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return round(len(found) * NUM_NEW / min(seconds[1:])), found

def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over the faster of theirs, by shape and method."""
    rates: dict[str, dict[str, float]] = {}
    for row in rows:
        if "who" not in row:
            continue
        what = row.get("method") or f"decode {row['streams']}"
        rates.setdefault(f"{row['shape']} {what}", {})[row["who"]] = row["tokens_per_s"]
    best = {name: max((r for who, r in of.items() if "ours" not in who), default=0)
            for name, of in rates.items()}
    return {name: round(rates[name]["ours"] / best[name], 2)
            for name in rates if best[name] and "ours" in rates[name]}

def main() -> int:
    """1 where a kernel breaks the rule of kernels.check."""
    words, broken, rows = sys.argv[1:], 0, []
    names = [word for word in words if word in ops()]
    parts = {"end-to-end": end_to_end, "decode": decoding, "memory": memory}
    if words[:1] == [] or words[0] not in parts:
        broken = check.main(names)
        bench.main([*words, "--rivals", "tests.bench.gpu_rivals"])
    for name in [] if names else [word for word in words if word in SHAPES] or SHAPES:
        for part in parts.values() if parts.keys().isdisjoint(words) else [parts[words[0]]]:
            for row in part(SHAPES[name], "cuda"):
                rows.append({"shape": name, **row})
                print(rows[-1], flush=True)
    print(json.dumps({"broken": broken, "rows": rows, "ratio": ratios(rows)}))
    return broken

if __name__ == "__main__":
    sys.exit(main())
