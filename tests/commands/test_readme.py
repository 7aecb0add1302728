"""Every command of README.md runs: its own options, on tiny data, few steps."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest

ROOT = Path(__file__).parents[2]
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -e "
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
FENCED = [line for block in BLOCKS[2:] for line in block.splitlines()]
COMMANDS = [line.partition("  #")[0].strip() for line in FENCED if line.startswith("python ")]
LEARN = "classify --model.path {DIR} --data.train a.tsv --data.test b.tsv"
SHORT = ("--loop.max-steps", "2", "--eval.max-new-tokens", "4", "--env.threads", "1")
Run = Callable[..., tuple[dict[str, Any], str]]

@pytest.fixture
def named(masked_bert: Path, qwen3: Path, files: dict[str, str], run: Run) -> dict[str, str]:
    """Makes the files and the run that README.md names; returns its other names' meaning."""
    for name, key in (("a.tsv", "train"), ("b.tsv", "test")):
        lines = Path(files[key]).read_text("utf-8").splitlines()
        cells = [line.split("\t") for line in lines]
        # The text stands under both names that the commands use.
        cells = [[*row[:2], row[1], *row[3:]] for row in cells]
        cells[0][2] = "sentence"
        Path(name).write_text("\n".join("\t".join(row) for row in cells) + "\n", "utf-8")
    scored = Path(files["scored"]).read_text("utf-8").replace("\t", ",")
    named = scored.replace("text,pair,label", "one,two,score", 1)
    Path("scored.csv").write_text(named, "utf-8")
    shutil.copy(files["tags"], "a.conll")
    shutil.copy(files["chat"], "chat.jsonl")
    shutil.copy(files["chat_test"], "dev.jsonl")
    shutil.copy(files["pairs"], "pairs.jsonl")
    Path("own.py").write_text("def score(rows):\n    return [len(row['answer']) for row in rows]\n")
    Path("keys.txt").write_text("a-key\n")
    return {"DIR_OR_HUB_ID": str(qwen3), "DIR": str(masked_bert), "OWNER/NAME": "owner/name"}

def test_the_first_screen_is_two_commands() -> None:
    first, second = (block.strip() for block in BLOCKS[:2])
    assert first == f"{INSTALL}. && .venv/bin/python train.py"
    assert second == f"{INSTALL}'.[test]' && .venv/bin/pytest"

def test_the_test_command_collects() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "tests/commands/test_readme.py" in result.stdout

def test_the_first_command(files: dict[str, str], run: Run) -> None:
    few = ("--loop.max-steps", "10", "--data.test", files["chat_test"])
    summary, printed = run("train", *SHORT, *few)
    assert summary["steps"] == 10 and "next:" in printed
    assert summary["tuned"]["chat_test"]["loss"] < summary["base"]["chat_test"]["loss"]

@pytest.mark.parametrize("command", COMMANDS)
def test_command(
    command: str, named: dict[str, str], files: dict[str, str], run: Run, hub: Any
) -> None:
    _, script, *words = [named.get(word, word) for word in shlex.split(command)]
    if script == "-m":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        if words[0].startswith("kernels."):
            assert_runs_or_asks_for_a_gpu(words, environment)
            return
        if words[0] == "ftcore.monitor":
            dev = ("--data.dev", "b.tsv", "--log.name", "NAME", *SHORT)
            run("train", *LEARN.format(**named).split(), *dev)
            rows = map(json.loads, Path("runs/NAME/reference.jsonl").read_text().splitlines())
            lines = [{"time": n, "id": f"{n:024x}", "model": "NAME", "rows": [row]}
                     for n, row in enumerate(rows)]
            Path("log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            done = subprocess.run([sys.executable, "-m", *words], env=environment, check=False)
            assert done.returncode == (words[1] == "plan")  # there is no reason to train again
            assert words[1] != "report" or Path("log.jsonl.html").is_file()
            assert words[1] != "promote" or Path("live").resolve().name == "NAME"
            return
        if words[0] == "ftcore.data":
            if "runs/NAME" in words:
                run("train", *LEARN.format(**named).split(), "--log.name", "NAME", *SHORT)
            subprocess.run([sys.executable, "-m", *words], env=environment, check=True)
            assert list(Path("runs").glob("*/data/report.html"))
            return
        words[1:] = ["made"]
        subprocess.run([sys.executable, "-m", *words], env=environment, check=True)
        assert list(Path("made").rglob("*.jsonl"))
        return
    for name in ("NAME", "OTHER"):
        if f"runs/{name}" in words or (name, words[0]) == ("NAME", "push"):
            run("train", *LEARN.format(**named).split(), "--log.name", name, *SHORT)
    if "--adapter" in words:
        chats = ("--model.path", named["DIR_OR_HUB_ID"], "--data.train", "chat.jsonl")
        run("train", "sft", *chats, "--log.name", "NAME", *SHORT)
    if script == "serve.py":
        main = importlib.import_module("serve").main
        if words[0] == "push":
            assert main(["bundle", "runs/NAME", "given"]) == main(words) == 0
            assert hub.files["config.json"] == Path("given/config.json").read_bytes()
            return
        if words[0] in ("bundle", "merge"):
            assert main(words) == 0
            words = words[-1:]
        assert_serves(words)
        return
    if {"report", "diff"} & {*words}:
        assert importlib.import_module("eval").main(words) == 0
        return
    if "--help" in words:
        with pytest.raises(SystemExit) as left:
            run("train", *words)
        assert left.value.code == 0
    elif {"--dry-run", "--verify"} & {*words}:
        assert importlib.import_module("train").main(words) == 0
        assert [path.name for path in Path("runs").iterdir()] == ["cache"]
    elif script == "eval.py" or "--resume" in words:
        summary, _ = run(script.removesuffix(".py"), *words)
        ((name, figures),) = (summary.get("results") or summary["tuned"]).items()
        assert name == "b" and figures["accuracy"] >= 0
    else:
        corpus = ("--data.train", files["text"], "--data.dev", files["held"])
        corpus += ("--data.max-length", "32")
        small = corpus if {"pretrain", "mlm"} & {*words} else ()
        if len(words) == 1:  # the embedded default of the task, on fewer rows
            few = ("--data.dev", files["chat_test"], "--data.test", files["chat_test"])
            small = ("--preset", "assistant", *few, "--rollout.prompts", "4")
        summary, _ = run("train", *words, *small, *SHORT)
        assert summary["steps"] == 2

def assert_serves(words: list[str]) -> None:
    """It answers the line that it prints, and ends with 0 at a signal."""
    command = [sys.executable, str(ROOT / "serve.py"), *words]
    command += ["--host", "127.0.0.1", "--port", "0", "--threads", "1", "--log", "log.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = iter(server.stdout.readline, "")
            assert any(line.startswith("serving ") for line in lines)
            tried = subprocess.run(["sh", "-c", f"{next(lines).strip()} -sS --max-time 20"],
                                   capture_output=True, text=True, check=True)
            told = json.loads(tried.stdout)
            assert "choices" in told or told["data"][0]["label"] in ("warm", "cold")
            server.terminate()
            assert server.wait(20) == 0
        finally:
            server.kill()

def assert_runs_or_asks_for_a_gpu(words: list[str], environment: dict[str, str]) -> None:
    """Kernels are checked in Triton's interpreter too; times are those of a GPU alone."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot run")
    command = [sys.executable, "-m", *words]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if words[0] == "kernels.bench":
        assert result.returncode == 2 and "no GPU" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1]) == {"broken": 0}

def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8
