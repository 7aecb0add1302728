"""Command line, TOML and presets as one path: everything becomes flags, and the last flag wins.

    default < preset < TOML < flag

tyro types and checks the flags against the run class of the task (`ftcore/config.py`), shows help
and names the nearest option for an unknown one. A resolved configuration is written as TOML with
the origin of each value behind it; running from that file repeats the run."""

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints
import tyro
from ftcore.config import RUNS, Limit, Run, Section
from ftcore.errors import ConfigError, nearest

CONFIG_FILE = "config.toml"
ONLY = ("--dry-run", "--verify")  # print the plan, or try the invariances, and stop
PRESETS = tomllib.loads(Path(__file__).with_name("presets.toml").read_text("utf-8"))

class Command(NamedTuple):
    task: str  # key of RUNS
    config: Run  # the resolved sections
    origins: dict[str, str]  # "section.key" -> preset NAME, FILE or flag; absent: the default
    resume: Path | None  # run folder to continue, or None
    only: str  # word of ONLY, or empty

def parse(argv: Sequence[str], *, script: str = "train.py") -> Command:
    """Turn the arguments of train.py, or of a script that takes the same, into a command. Raises
    ConfigError: unknown task or preset, unreadable file, values out of range; tyro SystemExit 2."""
    words = [word for word in argv if word not in ONLY]
    if len(asked := [word for word in argv if word in ONLY]) > 1:
        raise ConfigError(f"{' '.join(asked)}: give one of them, once")
    only = "".join(asked)
    if (resume := take_value(words, "--resume")) is not None:
        if words:
            raise ConfigError(f"--resume takes no other options, got {' '.join(words)}")
        if not (file := Path(resume) / CONFIG_FILE).is_file():
            raise ConfigError(f"--resume {resume}: has no {CONFIG_FILE}; name a folder of train.py")
        task, flags = read_toml(file)
        return resolved(task, [(str(file), flags)], resume=Path(resume), only=only)
    if words[:1] in (["-h"], ["--help"]):
        print(f"{script} {{{','.join(RUNS)}}} [options]\n\nEach task has its own --help.")
        raise SystemExit(0)
    is_named = bool(words) and not words[0].startswith("--")
    task = known("task", words.pop(0), RUNS) if is_named else "sft"
    recipes, is_bare = PRESETS.get(task, {}), not (is_named and words)
    preset, file = take_value(words, "--preset"), take_value(words, "--config")
    if preset is None and is_bare and "assistant" in recipes:
        preset = "assistant"  # the embedded default, which options without a task change
    layers = []
    if preset is not None:
        recipe = recipes[known(f"{task} --preset", preset, recipes)]
        layers.append((f"preset {preset}", list(as_flags(recipe))))
    if file is not None:
        layers.append((file, read_toml(Path(file), task)[1]))
    return resolved(task, [*layers, ("flag", words)], only=only, script=script)

def resolved(task: str, layers: list[tuple[str, list[str]]], *, resume: Path | None = None,
             only: str = "", script: str = "train.py") -> Command:
    flags = [flag for _, layer in layers for flag in layer]
    config = tyro.cli(RUNS[task], args=flags, prog=f"{script} {task}")
    origins = {word.split("=")[0].removeprefix("--").replace("-", "_").replace(".no_", "."): origin
               for origin, layer in layers for word in layer if word.startswith("--")}
    return Command(task, checked(config, origins), origins, resume, only)

def checked(config: Section, origins: Mapping[str, str] | None = None) -> Section:
    """The same. Raises ConfigError: all values that are out of range, and where they come from."""
    if bad := list(_out_of_range(config, origins or {})):
        raise ConfigError("\n".join(bad))
    return config

def as_flags(sections: dict[str, Any]) -> Iterator[str]:
    """Nested tables as the flags a user would type."""
    for section, values in sections.items():
        for key, value in values.items():
            name = f"--{section}.{key}"
            if isinstance(value, bool):
                yield name if value else f"--{section}.no-{key}"
            elif isinstance(value, list | tuple):
                yield from (name, *map(str, value)) if len(value) != 1 else [f"{name}={value[0]}"]
            else:
                yield f"{name}={value}"  # one word, so that the value may begin with a minus sign

def read_toml(path: Path, task: str | None = None) -> tuple[str, list[str]]:
    """The task that the file names, or else the one given, and its values as flags."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    written_for = known(f"{path}: task", tables.pop("task", task), RUNS)
    if task not in (None, written_for):
        raise ConfigError(f"{path} is for the task {written_for}, not {task}")
    if loose := [key for key, value in tables.items() if not isinstance(value, dict)]:
        raise ConfigError(f"{path}: {', '.join(loose)} must stand in a section such as [optim]")
    return written_for, list(as_flags(tables))

def to_toml(command: Command) -> str:
    lines = [f'task = "{command.task}"']
    for section, values in vars(command.config).items():
        lines += ["", f"[{section}]"]
        for key, value in vars(values).items():
            origin = command.origins.get(f"{section}.{key}", "default")
            # JSON of finite numbers, texts and lists is TOML; for none the word of the flag
            text = json.dumps("None" if value is None else value, ensure_ascii=False, default=str)
            lines.append(f"{key} = {text}  # {origin}")
    return "\n".join(lines) + "\n"

def known(what: str, name: Any, known: Collection[str]) -> str:
    if name in list(known):  # in a TOML it may be a list, which has no hash
        return name
    hint = nearest(str(name), list(known))
    raise ConfigError(f"{what} {name!r} is unknown{hint}; known: {', '.join(known)}")

def take_value(words: list[str], name: str) -> str | None:
    """Take `name VALUE` or `name=VALUE` out of the words."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == name:
            if not equals and place + 1 == len(words):
                raise ConfigError(f"{name} needs a value")
            del words[place]
            return value if equals else words.pop(place)
    return None

def limit_of(hint: Any) -> Limit | None:
    """The limit in an option's type; it may be that of the numbers of a tuple."""
    if isinstance(hint, Limit):
        return hint
    return next(filter(None, map(limit_of, get_args(hint))), None)

def _out_of_range(config: Section, origins: Mapping[str, str], of: str = "") -> Iterator[str]:
    for key, hint in get_type_hints(type(config), include_extras=True).items():
        name, value, limit = of + key, getattr(config, key), limit_of(hint)
        if isinstance(value, Section):
            yield from _out_of_range(value, origins, f"{name}.")
        numbers = value if isinstance(value, tuple) else (value,)
        if limit and value is not None and not all(map(limit.holds, numbers)):
            yield f"{name} = {value} ({origins.get(name, 'flag')}): must be {limit.claim}"
