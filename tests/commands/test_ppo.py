"""train.py ppo and grpo as a user meets them: what they leave, what they refuse."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
from ftcore.align.rewards import Rewards
from ftcore.config import RewardsConfig
from ftcore.data.__main__ import main as data
from ftcore.data.columns import Chat
from ftcore.errors import ConfigError
from tests.commands.conftest import EXACT, SCRIPTS

Run = Callable[..., tuple[dict[str, Any], str]]
LOGGED = {
    *("reward", "score", "length", "ended", "kl", "kl_exact", "kl_k1", "kl_k3"),
    *("kl_coef", "explained_variance", "policy_loss", "value_loss", "entropy", "approx_kl"),
    *("clip_frac", "updates"),
}
GRPO = ("--rollout.prompts", "4", "--rollout.samples", "3", "--optim.batch-size", "6")

@pytest.fixture
def ppo(qwen3: Path, files: dict[str, str], tmp_path: Path) -> list[str]:
    """The words of a short run of train.py ppo, rewarded for answers without a blank."""
    own = tmp_path / "own.py"
    own.write_text("def score(rows):\n    return [-row['answer'].count(' ') for row in rows]\n")
    return [
        *("ppo", "--model.path", str(qwen3), "--log.name", "run", "--data.train", files["chat"]),
        *("--data.dev", files["chat_test"], "--data.test", files["chat_test"]),
        *("--reward.sources", "match", f"python:{own}:score", "--rollout.max-new-tokens", "6"),
        *("--rollout.prompts", "8", "--optim.batch-size", "4", "--optim.lr", "1e-2", *EXACT),
        *("--eval.max-new-tokens", "6", "--loop.log-every", "1", "--ppo.best-of", "3"),
    ]

def metrics() -> list[dict[str, Any]]:
    lines = Path("runs/run/metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]

@pytest.mark.parametrize(
    ("task", "method", "words"),
    [("ppo", "lora", ()), ("ppo", "full", ()), ("grpo", "lora", GRPO),
     ("grpo", "lora", (*GRPO, "--ppo.advantage", "leave_one_out", "--env.precision", "bf16"))],
    ids=["ppo", "full", "grpo", "rloo in bf16"],
)  # fmt: skip
def test_it_runs_and_leaves_what_it_says(
    task: str, method: str, words: tuple[str, ...], ppo: list[str], run: Run
) -> None:
    summary, printed = run("train", task, *ppo[1:], "--peft.method", method, *words)
    steps = 2 if task == "ppo" else 4
    assert summary["task"] == task and summary["steps"] == steps
    path = Path("runs/run")
    saved = "adapter" if method == "lora" else "model"
    assert (path / saved / "manifest.json").is_file()
    assert all((path / f"{s}.html").is_file() for s in ("report", "rollouts"))

    start = json.loads((path / "start.json").read_bytes())
    assert len(start["scores"]) == 6 and start["best_of"] == 3
    assert start["reward"] == pytest.approx(sum(start["scores"]) / 6)
    assert start["best"] >= start["one"]
    told = f"the start on dev prompts: reward {start['reward']:g} best_of 3 best {start['best']:g}"
    assert told in printed
    assert "reference: the start, sha256 " in printed

    lines = [line for line in metrics() if "ppo/reward" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line in lines:
        without = {"explained_variance", "value_loss"} if task == "grpo" else set()
        assert {name[4:] for name in line if name.startswith("ppo/")} == LOGGED - without
        parts = sum(line[name] for name in line if name.startswith("reward/"))
        assert parts == pytest.approx(line["ppo/reward"]) == line["ppo/score"]
        assert 1 <= line["ppo/length"] <= 6 and 0 <= line["ppo/ended"] <= 1
        assert line["ppo/updates"] == (8 if task == "ppo" else 2)
        assert all(math.isfinite(value) for value in line.values())
    first, last = lines[0], lines[-1]
    assert first["ppo/kl"] == first["ppo/kl_k3"] == 0 < last["ppo/kl_exact"] < last["ppo/kl"]
    (judged,) = (line for line in metrics() if "eval/win_rate" in line)
    assert judged["eval/loss"] == -judged["eval/reward"]
    assert judged["eval/win_low"] <= judged["eval/win_rate"] <= judged["eval/win_high"]

def test_the_page_shows_tokens_and_does_not_believe_them(ppo: list[str], run: Run) -> None:
    chats = [
        [{"role": "user", "content": f"<b>bold {i}</b> & {{{{ 1 }}}}"},
         {"role": "assistant", "content": "red"}] for i in range(8)
    ]  # fmt: skip
    Path("odd.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    run("train", *ppo, "--data.train", "odd.jsonl", "--data.duplicates", "off")
    page = Path("runs/run/rollouts.html").read_text("utf-8")
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and "{{ 1 }}" in page
    assert page.count("<details>") == 8 and "answers drawn in iteration 1" in page.lower()
    for name in ("logp", "ref_logp", "k1", "k3", "exact", "value", "reward", "return", "advantage"):
        assert f'<th class="n">{name}' in page

def test_the_prompts_of_an_iteration_are_shown(
    ppo: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert data(["prepare", *ppo]) == 0 and capsys.readouterr()
    assert data(["show", "runs/run", "--step", "2"]) == 0
    assert capsys.readouterr().out.count("chat.jsonl:") == 8
    assert data(["show", "runs/run", "--step", "3"]) == 2
    assert "steps are counted from 1 to 2" in capsys.readouterr().err

def test_a_finished_run_is_resumed_to_the_same_end(ppo: list[str], run: Run) -> None:
    summary, _ = run("train", *ppo)
    before = metrics(), Path("runs/run/start.json").read_bytes()
    again, _ = run("train", "--resume", "runs/run")
    assert again["tuned"] == summary["tuned"] and again["steps"] == summary["steps"]
    assert (metrics(), Path("runs/run/start.json").read_bytes()) == before

def test_a_run_is_evaluated(ppo: list[str], files: dict[str, str], run: Run) -> None:
    summary, _ = run("train", *ppo)
    judged, _ = run("eval", "runs/run")
    assert judged["task"] == "ppo"
    assert judged["results"]["chat_test"] == pytest.approx(summary["tuned"]["chat_test"], rel=1e-5)

@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_starts_from_a_run_of_sft(method: str, ppo: list[str], sft: list[str], run: Run) -> None:
    """Two adapters on one base; or the first run's own model."""
    learned, _ = run("train", *sft, "--peft.method", method, "--log.name", "first")
    summary, _ = run("train", *ppo, "--model.path", "runs/first")
    before, after = learned["tuned"]["chat_test"], summary["base"]["chat_test"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert summary["tuned"]["chat_test"]["loss"] != pytest.approx(after["loss"], rel=1e-5)
    judged, _ = run("eval", "runs/run")
    wanted = summary["tuned"]["chat_test"]
    assert judged["results"]["chat_test"] == pytest.approx(wanted, rel=1e-5)

def test_without_dev_rows_nothing_is_judged(ppo: list[str], run: Run) -> None:
    at = ppo.index("--data.dev")
    summary, printed = run("train", *ppo[:at], *ppo[at + 2 :])
    assert summary["steps"] == 2 and "the start on dev prompts" not in printed
    assert not any("eval/reward" in line for line in metrics())
    assert not Path("runs/run/start.json").exists()

# ---- what is refused -----------------------------------------------------------------------------

@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Words of train.py -> the one error message of a command that is to be mended."""

    def call(*words: str) -> str:
        shutil.rmtree("runs/run", ignore_errors=True)
        capsys.readouterr()
        assert SCRIPTS["train"].main(list(words)) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "Traceback" not in message
        shutil.rmtree("runs/run", ignore_errors=True)
        return message

    return call

def without(words: list[str], flag: str, values: int = 1) -> list[str]:
    at = words.index(flag)
    return [*words[:at], *words[at + 1 + values :]]

def test_what_is_missing_is_asked_for(ppo: list[str], told: Callable[..., str]) -> None:
    said = told(*without(ppo, "--reward.sources", 2))
    assert "error: nothing says what an answer is worth: --reward.sources {match, " in said
    said = told(*without(ppo, "--rollout.max-new-tokens"))
    assert "how long may an answer be? Give --rollout.max-new-tokens N (tokens)" in said

@pytest.mark.parametrize("advantage", ["group", "leave_one_out"])
def test_one_answer_is_not_compared(
    advantage: str, ppo: list[str], told: Callable[..., str]
) -> None:
    words = ("--ppo.advantage", advantage, "--rollout.samples")
    warm = (*words, "2", "--ppo.critic-warmup", "1")
    assert "--ppo.critic-warmup 0" in told("grpo", *ppo[1:], *warm)
    said = told("grpo", *ppo[1:], *words, "1")
    assert f"error: ppo.advantage = {advantage} compares answers to one prompt, " in said

WRONG = {
    "a kind": (("--reward.sources", "mach"), "reward.sources 'mach' is unknown; nearest: 'match'"),
    "a file": (("--reward.sources", "python:no.py:f"), "No such file or directory: '"),
    "weights": (("--reward.weights", "1"), "reward.weights = (1.0,): must be one for each"),
    "a temperature": (("--rollout.temperature", "0"), "rollout.temperature = 0.0 (flag): must be"),
    "a discount": (("--ppo.gamma", "1.5"), "ppo.gamma = 1.5 (flag): must be in [0, 1]"),
}

@pytest.mark.parametrize(("words", "why"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(
    words: tuple[str, ...], why: str, ppo: list[str], told: Callable[..., str]
) -> None:
    assert why in told(*ppo, *words)

def test_what_is_refused_leaves_nothing(ppo: list[str], refused: Callable[..., str]) -> None:
    refused("train", *without(ppo, "--reward.sources", 2))

def test_a_prompt_must_leave_room(ppo: list[str], files: dict[str, str], run: Run,
                                  told: Callable[..., str]) -> None:  # fmt: skip
    lines = Path(files["chat"]).read_text("utf-8").splitlines()
    long = {"role": "user", "content": "lamp " * 300}
    answer = {"role": "assistant", "content": '{"intent": "paint"}'}
    lines[3:3] = [json.dumps({"messages": [long, answer]})]
    Path("long.jsonl").write_text("\n".join(lines))
    words = [*ppo, "--data.train", "long.jsonl"]
    said = told(*words)
    assert "long.jsonl" in said and "its prompt has " in said
    mend = ("--data.max-length", "250", "--data.over-length", "drop")
    assert said.rstrip().endswith(f"no room to answer: {' '.join(mend)}")
    summary, _ = run("train", *words, *mend)
    assert summary["steps"] == 2

def test_a_reward_that_fails_ends_the_run_and_can_be_mended(
    ppo: list[str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path("own.py")
    works = own.read_text()
    own.write_text("def score(rows):\n    raise RuntimeError('no luck')\n")
    words = without(ppo, "--data.dev")
    assert SCRIPTS["train"].main(words) == 2
    said = capsys.readouterr().err
    assert "error: reward python:" in said and "RuntimeError: no luck: mend it, then resume" in said
    assert "Traceback" not in said
    own.write_text(works)
    summary, _ = run("train", "--resume", "runs/run")
    assert summary["steps"] == 2

# ---- a reward model as a reward ------------------------------------------------------------------

def test_a_reward_model_says_of_answers_what_it_says_of_pairs(
    reward: list[str], files: dict[str, str], run: Run
) -> None:
    run("train", *reward)
    said = Path("runs/run/predictions.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in Path(files["pairs_test"]).read_text("utf-8").splitlines()]
    chats = [Chat("c", (*pair["prompt"], *pair["chosen"])) for pair in pairs]
    rewards = Rewards(RewardsConfig(sources=("model:runs/run",)))
    chosen, rejected = (rewards(chats, [pair[side][0]["content"] for pair in pairs])[0]
                        for side in ("chosen", "rejected"))  # fmt: skip
    gaps = [json.loads(line)["gap"] for line in said]
    assert chosen - rejected == pytest.approx(gaps, abs=1e-6) and len(set(gaps)) > 1
    alone, _ = rewards(chats[:1], [pairs[0]["chosen"][0]["content"]])
    assert alone == pytest.approx(chosen[:1], abs=1e-5)
    with pytest.raises(ConfigError, match="model:runs/other: --resume runs/other: has no config"):
        Rewards(RewardsConfig(sources=("model:runs/other",)))
