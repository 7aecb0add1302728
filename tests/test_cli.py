"""What the user types: default < preset < TOML < flag, and back to TOML."""

import dataclasses
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints
import pytest
from ftcore.cli import CONFIG_FILE, PRESETS, limit_of, parse, to_toml
from ftcore.config import RUNS, ClassifyRun, SftRun
from ftcore.errors import ConfigError

ROOT = Path(__file__).parents[1]

@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    """Text -> the path of a file that holds it."""

    def write(text: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(text, "utf-8")
        return str(path)

    return write

def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    return str(caught.value)

def test_default_preset_toml_flag(toml: Callable) -> None:
    file = toml("[optim]\nlr = 0.5\nbatch_size = 7\n[loop]\nlog_every = 3\n")
    words = ["sft", "--loop.log-every", "4", "--config", file, "--preset", "assistant"]
    command = parse([*words, "--optim.batch_size=9"])
    config, origins = command.config, command.origins
    options = PRESETS["sft"]["assistant"]["optim"].keys()
    assert options == {"lr", "batch_size", "loraplus_lr_ratio"}
    assert (config.optim.lr, config.optim.batch_size, config.loop.log_every) == (0.5, 9, 4)
    assert config.peft.rank == 16 and config.optim.eps == 1e-8
    assert origins["peft.rank"] == "preset assistant"
    assert origins["optim.lr"] == file
    assert origins["optim.batch_size"] == origins["loop.log_every"] == "flag"
    assert "optim.eps" not in origins
    text = to_toml(command)
    for line in (
        "rank = 16  # preset assistant", f"lr = 0.5  # {file}", "batch_size = 9  # flag",
        "eps = 1e-08  # default",
    ):  # fmt: skip
        assert line in text.splitlines()

def test_nothing_typed_is_the_default_job() -> None:
    assert parse([]) == parse(["sft", "--preset", "assistant"])
    for preset in (["--preset", "chat"], ["--preset=chat"]):
        chat = [*preset, "--data.train", "a.jsonl"]
        assert parse(chat) == parse(["sft", *chat])
    command = parse(["--optim.lr", "1", "--dry-run"])  # options alone change the default job
    assert command.only == "--dry-run" and command.config.optim.lr == 1
    assert command.config.peft.rank == 16

@pytest.mark.parametrize("task", RUNS)
def test_a_task_alone_is_its_defaults(task: str) -> None:
    """Or its recipe for the built-in data, where there is one; options make it any other run."""
    command = parse([task])
    if "assistant" in PRESETS.get(task, {}):
        assert command == parse([task, "--preset", "assistant"]) and command.config.data.train
        command = parse([task, "--optim.lr", "1"])
        assert command.origins == {"optim.lr": "flag"} and not command.config.data.train
    else:
        assert command.config == RUNS[task]() and command.origins == {} and command.resume is None

ODD = [
    *("--data.text=-x", "--data.train", "a b.tsv", "c=d.tsv", "--data.label", 'say "\\ no"'),
    *("--data.columns=--odd", "--data.max-length", "None", "--peft.rs-lora", "--peft.targets"),
    *("--optim.betas", "0.5", "1e-3", "--optim.lr", "1e-7", "--log.dir", "gr\u00fcn/x # y"),
    *("--log.name", "", "--peft.trainable", "last:2", "--data.pair=None", "--data.holdout", "3"),
]

@pytest.mark.parametrize(
    "words",
    [
        [],
        *([task] for task in RUNS),
        *([task, "--preset", name] for task, names in PRESETS.items() for name in names),
        ["classify", *ODD],
        ["classify", "--data.max-length", "5", "--peft.no-rs-lora", "--data.train"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_a_resolved_configuration_comes_back_from_its_toml(
    words: list[str], toml: Callable
) -> None:
    command = parse(words)
    text = to_toml(command)
    again = parse([command.task, "--config", toml(text)])
    assert again.config == command.config
    assert tomllib.loads(text)["task"] == command.task
    assert len(again.origins) == text.count(" # ") - text.count(" # y")

def test_odd_values_are_what_was_typed() -> None:
    config = parse(["classify", *ODD]).config
    assert isinstance(config, ClassifyRun)
    assert (config.data.text, config.data.train) == ("-x", ("a b.tsv", "c=d.tsv"))
    assert config.data.columns == ("--odd",) and config.data.max_length is None
    assert config.peft.rs_lora and config.peft.targets == () and config.optim.betas == (0.5, 1e-3)
    assert config.data.pair == "None" and config.log.dir == Path("gr\u00fcn/x # y")
    assert parse(["classify", "--peft.rs-lora", "--peft.no-rs-lora"]).config.peft.rs_lora is False

def test_a_toml_switches_a_preset_value_off_again(toml: Callable) -> None:
    file = toml("task = 'sft'\n[peft]\nrs_lora = false\n[data]\ndev = []\nmax_length = 'None'\n")
    command = parse(["sft", "--config", file, "--peft.rs-lora"])
    assert command.config.peft.rs_lora is True and command.config.data.dev == ()
    assert command.origins["peft.rs_lora"] == "flag" and command.origins["data.dev"] == file
    assert parse(["sft", "--config", file]).origins["peft.rs_lora"] == file

@pytest.mark.parametrize("by_file", [False, True])
def test_an_unknown_key_shows_the_nearest_name(
    by_file: bool, toml: Callable, capsys: pytest.CaptureFixture
) -> None:
    words = ["--config", toml("[optim]\nweight_decai = 1\n")] if by_file else []
    with pytest.raises(SystemExit) as caught:
        parse(["sft", *(words or ["--optim.weight-decai", "1"])])
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert "--optim.weight-decay FLOAT" in said.err + said.out

@pytest.mark.parametrize("words", [["--optim.lr", "fast"], ["--peft.method", "lorra"], ["--x"]])
def test_a_mistyped_value_ends_with_code_2(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["sft", *words])
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err

@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sfx"], f"task 'sfx' is unknown; nearest: 'sft'; known: {', '.join(RUNS)}"),
        (["sft", "--preset", "assist"], "sft --preset 'assist' is unknown; nearest: 'assistant'"),
        (["classify", "--preset=x"], "classify --preset 'x' is unknown; known: small"),
        (["sft", "--config", "/no/such.toml"], "/no/such.toml: [Errno 2] No such file"),
        (["sft", "--config"], "--config needs a value"),
        (["--resume", "/no/run"], "--resume /no/run: has no config.toml; name a folder"),
        (["--resume=/no/run", "--optim.lr", "1"], "--resume takes no other options"),
    ],
)
def test_what_cannot_be_meant_is_said(words: list[str], message: str) -> None:
    assert refused(*words).startswith(message)

@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1\n", ": lr must stand in a section such as [optim]"),
        ("task = 'classify'\n", " is for the task classify, not sft"),
        ("[optim\n", ": Expected ']'"),
    ],
)
def test_a_toml_that_cannot_be_meant_is_said(text: str, message: str, toml: Callable) -> None:
    file = toml(text)
    assert refused("sft", "--config", file).startswith(file + message)

def test_numbers_out_of_range_are_said_all_at_once(toml: Callable) -> None:
    file = toml("[optim]\nbetas = [0.9, 1.0]\n")
    said = refused("sft", "--config", file, "--optim.lr", "-1", "--schedule.warmup", "nan")
    assert said.splitlines() == [
        "optim.lr = -1.0 (flag): must be > 0",
        f"optim.betas = (0.9, 1.0) ({file}): must be in [0, 1)",
        "schedule.warmup = nan (flag): must be in [0, 1)",
    ]

@pytest.mark.parametrize("task", RUNS)
def test_every_number_has_a_limit(task: str) -> None:
    run = RUNS[task]()
    for section in dataclasses.fields(run):
        hints = get_type_hints(type(getattr(run, section.name)), include_extras=True)
        numbers = [key for key, hint in hints.items() if re.search(r"\b(int|float)\b", str(hint))]
        assert all(limit_of(hints[key]) for key in numbers)
        assert numbers or section.name in ("model", "data", "log")

def test_a_run_is_resumed_from_its_own_configuration(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(to_toml(parse(["sft", "--peft.rank", "5"])), "utf-8")
    command = parse(["--resume", str(tmp_path)])
    assert isinstance(command.config, SftRun) and command.config.peft.rank == 5
    assert command.resume == tmp_path and not command.only
    assert parse([f"--resume={tmp_path}", "--dry-run"]).only

@pytest.mark.parametrize("damage", ["[optim", 'task = "sfx"', ""])
def test_a_damaged_configuration_is_not_resumed(damage: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(damage, "utf-8")
    assert refused("--resume", str(tmp_path)).startswith(f"{tmp_path / CONFIG_FILE}: ")

def test_parsing_needs_no_torch() -> None:
    code = (
        "import sys; from ftcore.cli import parse, to_toml; import train;"
        "to_toml(parse(['sft', '--preset', 'assistant'])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], ["train.py {" + ",".join(RUNS) + "}"]),
        (["sft", "--help"], ["--peft.rank INT", "rank of the update (default: 8)"]),
    ],
)
def test_help(words: list[str], shown: list[str]) -> None:
    command = [sys.executable, "train.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and not result.stderr
    assert all(text in " ".join(result.stdout.split()) for text in shown)

@pytest.mark.parametrize("task", RUNS)
def test_every_option_has_a_text_of_its_own(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The comment at its field in ftcore/config.py."""
    monkeypatch.setenv("COLUMNS", "80")  # one option below the other
    with pytest.raises(SystemExit):
        parse([task, "--help"])
    said = capsys.readouterr().out
    shown = dict(re.findall(r"--(\w+\.[\w-]+).*\n\W++(?!default:)(.+?)(?:\(default:|\n)", said))
    sections = [(f.name, f.default) for f in dataclasses.fields(RUNS[task])]
    options = [f"{name}.{f.name}" for name, values in sections for f in dataclasses.fields(values)]
    assert [name.replace("-", "_") for name in shown] == options
    assert len(set(shown.values())) == len(options)

def test_the_presets_are_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    shipped = project["tool"]["setuptools"]["package-data"]["ftcore"]
    assert [path.name for path in ROOT.glob("ftcore/*.toml")] == shipped
