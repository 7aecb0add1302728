"""Group-relative policy optimisation, ours against trl's, in turns.

    python -m tests.bench.grpo [--steps N] [--repeats N]

Both train builtin:start fully, its adapter folded, by the same prompts of built-in chats, with
the same reward (minus the length of the answer, so that no side waits for it), 8 answers to each of
8 prompts a step, of at most 64 new tokens and mostly some 28, one update of 64 answers a step, no
divergence. Theirs in fp32 or bf16, whichever is faster. Answers a second, of the steps after the
first two; every turn is a process of its own. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, NEW_TOKENS, WARMUP = 8, 8, 64, 2
BAR = 3.0

def prompts() -> list[str]:
    """Users' turns of the built-in dev rows."""
    from ftcore.builtin.chat import rows

    return [row["messages"][0]["content"] for row in rows("dev")]

def save_start(folder: Path) -> None:
    """The model that both sides train, in the HF layout."""
    import torch
    from ftcore.data.tokenizer import Tokenizer
    from ftcore.model.load import save_model
    from ftcore.tune.adapter import load_base

    folder.mkdir()
    loaded = load_base("builtin:start", task="lm", dtype=torch.float32)
    save_model(loaded, folder)
    Tokenizer.load(loaded.folder).save(folder)

def ours(said: argparse.Namespace, work: Path) -> float:
    """Seconds a step."""
    import torch
    import train
    from ftcore.align import ppo
    from ftcore.tune.loop import Loop

    torch.set_num_threads(said.threads)
    reward = work / "reward.py"
    reward.write_text("def length(rows):\n    return [-float(len(r['answer'])) for r in rows]\n")
    data = work / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": text}, {"role": "assistant", "content": "x"}]}) + "\n"
        for text in prompts()))
    ends: list[float] = []
    step = ppo.PpoLoop._step

    def timed(loop: Loop, workers: Any) -> dict[str, float]:
        values = step(loop, workers)
        ends.append(time.perf_counter())
        return values

    ppo.PpoLoop._step = timed
    words = [
        "grpo", "--model.path", str(said.model), "--peft.method", "full",
        "--env.precision", said.dtype,
        "--env.threads", str(said.threads), "--data.train", str(data), "--data.cache", "None",
        "--data.duplicates", "off", "--reward.sources", f"python:{reward}:length",
        "--rollout.prompts", str(PROMPTS), "--rollout.samples", str(SAMPLES),
        "--rollout.max-new-tokens", str(NEW_TOKENS), "--ppo.kl-coef", "0",
        "--optim.batch-size", str(PROMPTS * SAMPLES), "--optim.lr", "1e-5",
        "--loop.max-steps", str(said.steps + WARMUP), "--loop.save-every", "1000",
        "--loop.log-every", "1000",
        "--log.dir", str(work), "--log.name", "run",
    ]  # fmt: skip
    assert train.main(words) == 0
    return (ends[-1] - ends[WARMUP - 1]) / said.steps

def theirs(said: argparse.Namespace, work: Path) -> float:
    """Seconds a step."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(said.threads)
    folder, dtype = str(said.model), {"fp32": torch.float32, "bf16": torch.bfloat16}[said.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [{"prompt": [{"role": "user", "content": text}]} for text in prompts()]
    config = trl.GRPOConfig(
        output_dir=str(work), per_device_train_batch_size=PROMPTS * SAMPLES, use_cpu=True,
        num_generations=SAMPLES, max_completion_length=NEW_TOKENS, learning_rate=1e-5,
        max_steps=said.steps + WARMUP, beta=0.0, bf16=False, report_to=[], save_strategy="no",
        gradient_checkpointing=False, logging_steps=1000, disable_tqdm=True)
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    def length(completions: list, **more: Any) -> list[float]:
        return [-float(len(turns[0]["content"])) for turns in completions]

    trainer = trl.GRPOTrainer(
        model, reward_funcs=length, args=config, train_dataset=Dataset.from_list(asked),
        processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return (ends[-1] - ends[WARMUP - 1]) / said.steps

def main() -> None:
    """Both sides in turns, or one of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.grpo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if said.side:
            print(globals()[said.side](said, Path(work)))
            return
        save_start(Path(work) / "model")

        def rate(side: str, dtype: str) -> float:
            words = ["--steps", said.steps, "--threads", said.threads, "--side", side,
                     "--dtype", dtype, "--model", Path(work) / "model"]
            command = [sys.executable, "-m", "tests.bench.grpo", *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            found = PROMPTS * SAMPLES / float(done.stdout.split()[-1])
            print(f"{side}, {dtype}: {found:.1f} answers/s", flush=True)
            return found

        best = max(("fp32", "bf16"), key=lambda dtype: rate("theirs", dtype))
        rounds = [(rate("ours", "bf16"), rate("theirs", best)) for _ in range(said.repeats)]
    ratios = [mine / other for mine, other in rounds]
    ratio = statistics.median(ratios)
    print(f"ours is {ratio:.2f}x as fast (bar {BAR})")
    print(json.dumps({"grpo": {"ratio": ratio, "bar": BAR, "met": ratio >= BAR, "ratios": ratios,
                               "answers_per_s": rounds, "theirs": best}, "threads": said.threads}))

if __name__ == "__main__":
    main()
