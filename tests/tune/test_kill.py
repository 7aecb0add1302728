"""train.py as a process, on two cores: stopped, killed, resumed; the files come out equal."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
import pytest
import torch
from ftcore.builtin.chat import __doc__ as TEXT
from ftcore.env.compute import generator
from ftcore.env.run import read_metrics
from ftcore.model.families import family_named
from ftcore.model.heads import Model
from ftcore.model.load import Accounting, LoadedModel, save_model
from ftcore.model.transformer import ModelSpec
from ftcore.tune import loop

ROOT = Path(loop.__file__).parents[2]
END = "<|endoftext|>"
STEPS = 20
WORDS = f"{TEXT} now and then one more word is said of what the weather does to fields".split()

# Forks runs from one warm process. The first is left alone, the second is killed at random moments
# and resumed until it ends, the third resumes a copy of the first, which has nothing left to do.
FORKS = """
import os, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
import torch.utils.tensorboard
import ftcore.data.prepare, ftcore.evaluate.report, ftcore.tune.adapter, train

def fork(words, killed_after):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = train.main(words)
        finally:
            os._exit(code)
    if killed_after:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

folder, words, pace = sys.argv[1], sys.argv[2:], random.Random(1)
assert fork([*words, "whole"], 0) == 0
kills = 0
while True:
    config = os.path.exists(f"{folder}/killed/config.toml")
    again = ["--resume", f"{folder}/killed"] if config else [*words, "killed"]
    code = fork(again, pace.uniform(0.1, 0.4) if kills < 4 else 0)
    if code != -signal.SIGKILL:
        break
    kills += 1
assert code == 0 and kills >= 2, (code, kills)
shutil.copytree(f"{folder}/whole", f"{folder}/again")
assert fork(["--resume", f"{folder}/again"], 0) == 0
"""

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and text files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("kill")
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    spec = ModelSpec(
        vocab_size=300, hidden_size=32, num_layers=2, intermediate_size=48, num_heads=2,
        num_kv_heads=1, head_dim=16, max_positions=64, is_causal=True, norm="rms_norm",
        norm_eps=1e-6, norm_first=True, position="rope", mlp="swiglu", qk_norm=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Model(spec, "lm")
    model.init_weights(generator(0, 1))
    (folder / "model").mkdir()
    loaded = LoadedModel(model.to(torch.bfloat16), family_named("qwen3"), {}, Accounting(), folder)
    save_model(loaded, folder / "model")
    fast.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    draw = random.Random(0)
    for name, count in (("train", 60), ("dev", 8)):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(count)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder

def arguments(folder: Path) -> list[str]:
    """All that is typed, but for the name of the run."""
    return [
        *("pretrain", "--model.path", str(folder / "model"), "--env.threads", "2"),
        *("--data.train", str(folder / "train.jsonl"), "--data.dev", str(folder / "dev.jsonl")),
        *("--peft.method", "lora", "--peft.dropout", "0.1", "--optim.lr", "3e-3"),
        *("--optim.batch-size", "8", "--loop.micro-batch-tokens", "100", "--loop.log-every", "1"),
        *("--loop.max-steps", str(STEPS), "--loop.save-every", "3", "--loop.eval-every", "10"),
        *("--log.dir", str(folder), "--log.name"),
    ]

def start(*words: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, **pipes)

def result(run: Path) -> tuple[dict[str, bytes], list[dict]]:
    """What a finished run leaves: bytes of the adapter and the checkpoints, and its metrics."""
    parts = [run / "adapter", *sorted((run / "checkpoints").iterdir())]
    files = {
        f"{part.name}/{file.name}": file.read_bytes()
        for part in parts for file in sorted(part.iterdir())
    }  # fmt: skip
    lines = read_metrics(run / "metrics.jsonl")
    return files, [{k: v for k, v in line.items() if k[:5] != "perf/"} for line in lines]

@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """What is left by a run that nothing disturbed; the runs `killed` and `again` lie beside it."""
    child = subprocess.run(
        [sys.executable, "-c", FORKS, str(folder), *arguments(folder)],
        **{"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": "."}},
        **{"capture_output": True, "text": True, "timeout": 300},
    )
    assert child.returncode == 0, child.stdout + child.stderr
    files, lines = result(folder / "whole")
    assert lines[-1]["step"] == STEPS and "adapter/adapter_model.safetensors" in files
    return files, lines

def test_a_run_killed_again_and_again_leaves_the_same_files(
    folder: Path, undisturbed: tuple
) -> None:
    assert result(folder / "killed") == undisturbed

def test_a_finished_run_that_is_resumed_has_nothing_to_do(folder: Path, undisturbed: tuple) -> None:
    assert result(folder / "again") == undisturbed
    kept = [(folder / name / "config.toml").read_bytes() for name in ("whole", "again")]
    assert kept[0] == kept[1], "resuming rewrote where the values came from"

def test_a_run_that_is_told_to_stop_says_how_to_go_on(folder: Path, undisturbed: tuple) -> None:
    run = folder / "stopped"
    child = start(*arguments(folder), run.name)
    metrics, step = run / "metrics.jsonl", random.randint(1, STEPS // 2)
    while child.poll() is None and not (metrics.exists() and len(read_metrics(metrics)) >= step):
        time.sleep(0.002)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 143, said
    stopped = re.search(r"stopped after step (\d+); continue with --resume (\S+)", said)
    assert stopped and step <= int(stopped[1]) < STEPS and stopped[2] == str(run)
    assert not (run / "adapter").exists()
    child = start("--resume", stopped[2])
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0, said
    assert result(run) == undisturbed
