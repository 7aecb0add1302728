"""Group-relative policy optimisation, ours against trl's, in turns.

    python -m tests.bench.grpo [--steps N] [--repeats N]

Both train the built-in base model fully, in fp32, from the same prompts of the built-in chats, with
the same reward (the length of the answer, so that no side waits for it), 8 answers to each of 8
prompts a step, all of exactly so many new tokens (no end is a stop), one update of 64 answers a
step, no divergence. Answers a second, of the steps after the first two; every side is a process of
its own. The last line is JSON.
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

PROMPTS, SAMPLES, NEW_TOKENS, WARMUP = 8, 8, 32, 2
BAR = 3.0

def prompts() -> list[str]:
    """Users' turns of the built-in dev rows."""
    from ftcore.builtin.chat import rows

    return [row["messages"][0]["content"] for row in rows("dev")]

def ours(said: argparse.Namespace, work: Path) -> float:
    """Seconds a step."""
    import torch

    import train
    from ftcore.evaluate import evaluator
    from ftcore.tune.loop import Loop

    torch.set_num_threads(said.threads)
    evaluator.stops = rollout_stops = lambda tokenizer: frozenset()
    from ftcore.align import ppo, rollout

    rollout.stops = rollout_stops
    reward = work / "reward.py"
    reward.write_text("def length(rows):\n    return [float(len(r['answer'])) for r in rows]\n")
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
        "grpo", "--peft.method", "full", "--env.precision", "fp32",
        "--env.threads", str(said.threads), "--data.train", str(data), "--data.cache", "None",
        "--data.duplicates", "off", "--reward.sources", f"python:{reward}:length",
        "--rollout.prompts", str(PROMPTS), "--rollout.samples", str(SAMPLES),
        "--rollout.max-new-tokens", str(NEW_TOKENS), "--ppo.kl-coef", "0",
        "--optim.batch-size", str(PROMPTS * SAMPLES), "--optim.lr", "1e-5",
        "--loop.max-steps", str(said.steps + WARMUP), "--loop.save-every", "1000",
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

    from ftcore.hub import BUILTIN

    torch.set_num_threads(said.threads)
    folder = str(BUILTIN["builtin:base"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [{"prompt": [{"role": "user", "content": text}]} for text in prompts()]
    config = trl.GRPOConfig(
        output_dir=str(work), per_device_train_batch_size=PROMPTS * SAMPLES, use_cpu=True,
        num_generations=SAMPLES, max_completion_length=NEW_TOKENS, learning_rate=1e-5,
        max_steps=said.steps + WARMUP, beta=0.0, bf16=False, report_to=[], save_strategy="no",
        gradient_checkpointing=False, logging_steps=1000, disable_tqdm=True,
        generation_kwargs={"min_new_tokens": NEW_TOKENS})  # fmt: skip
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    def length(completions: list, **more: Any) -> list[float]:
        return [float(len(turns[0]["content"])) for turns in completions]

    trainer = trl.GRPOTrainer(
        model, reward_funcs=length, args=config, train_dataset=Dataset.from_list(asked),
        processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return (ends[-1] - ends[WARMUP - 1]) / said.steps

def main() -> None:
    """Both sides in turns, or one of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.grpo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.side:
        with tempfile.TemporaryDirectory() as work:
            print(globals()[said.side](said, Path(work)))
        return
    rate: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(said.repeats):
        for side, rates in rate.items():
            words = ["--steps", str(said.steps), "--threads", str(said.threads), "--side", side]
            command = [sys.executable, "-m", "tests.bench.grpo", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            rates.append(PROMPTS * SAMPLES / float(done.stdout.split()[-1]))
            print(f"{side}: {rates[-1]:.1f} answers/s", flush=True)
    ratios = [a / b for a, b in zip(*rate.values(), strict=True)]
    ratio = statistics.median(ratios)
    print(f"ours is {ratio:.2f}x as fast (bar {BAR})")
    print(json.dumps({"grpo": {"ratio": ratio, "bar": BAR, "met": ratio >= BAR, "ratios": ratios,
                               "answers_per_s": rate, "threads": said.threads}}))

if __name__ == "__main__":
    main()
