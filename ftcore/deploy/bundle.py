"""A run as one folder that can be given away: HF's layout, its own test, a hash of every file.

    config.json, *.safetensors      the model: an adapter merged into it, or its base alone
    adapter/                        that adapter in peft's format, where it is kept apart
    tokenizer files                 with the chat template
    generation_config.json          of a language model: greedy, and the ids that end an answer
    bundle.json                     what HF has no word for: task, precision, calibration, origin
    golden.json                     a test of what it says (golden.py)
    certificate.json                of an adapter: what merging changes (evaluate/certificate.py)
    README.md                       the model card
    manifest.json                   SHA-256 of each of these, written last

What was written is opened, and must say what the run says, before it takes its place.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ftcore import files
from ftcore.align.tasks import TASKS
from ftcore.cli import CONFIG_FILE, Command, known, read_toml, resolved
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.golden import try_golden, write_golden
from ftcore.env.compute import PRECISIONS
from ftcore.errors import CheckpointError, ConfigError, ModelError
from ftcore.evaluate.evaluator import stops
from ftcore.evaluate.report import json_line, metrics_table, read_run
from ftcore.model.load import LoadedModel, load_model, read_object, save_model
from ftcore.tune import lora
from ftcore.tune.adapter import ADAPTER, load_adapter, load_artifact, load_base, read_labels

ABOUT = "bundle.json"
PIPELINES = {"lm": "text-generation", "mlm": "fill-mask", "classify": "text-classification",
             "tag": "token-classification"}  # HF's words

class Bundle(NamedTuple):
    """What was read of a bundle; its adapter, where there is one, is in place and answers."""
    loaded: LoadedModel
    tokenizer: Tokenizer
    about: dict[str, Any]  # task, problem, precision, temperature (None: unknown), commit, time

def bundle(run: Path, folder: Path, *, keep_adapter: bool = False) -> None:
    """Make a folder of a finished run. Raises ConfigError: the folder is not empty, or the run has
    no adapter to keep; ModelError: the run has not finished, or what was written does not say the
    same; CheckpointError: it cannot be written."""
    told, (command, trained, tokenizer) = read_run(run), _trained(run)
    task, config, model = command.task, command.config, trained.model
    if keep_adapter and not lora.lora_layers(model):
        raise ConfigError(f"{run}: was trained without an adapter: leave out --keep-adapter")
    start, precision = told["run"]["starts"][-1], config.env.precision
    judged = [line for line in told["metrics"] if line.get("eval/temperature")]
    best = min(judged, key=lambda line: line["eval/loss"], default={})  # whose weights were kept
    about = {"task": task, "problem": config.problem, "precision": precision,
             "temperature": best.get("eval/temperature"), "commit": start["commit"],
             "time": start["time"]}

    def write(temp: Path) -> None:
        is_chat = model.task == "lm" and task != "pretrain" and bool(tokenizer.chat_template)
        tolerance = 0.01 if precision == "fp32" else 0.2  # nats, or in units of the score
        write_golden(model, tokenizer, temp, is_chat=is_chat, problem=config.problem,
                     tolerance=tolerance)
        if keep_adapter:
            shutil.copytree(files.current(run / ADAPTER), temp / ADAPTER)
            base = load_base(config.model.path, task=model.task, num_labels=model.num_labels,
                             dtype=PRECISIONS[precision][0], generator=torch.Generator())
            for name in base.accounting.new:  # of its head, which only the adapter has learned
                base.model.get_parameter(name).data = model.get_parameter(name).data
            _save(base, tokenizer, run, command, temp)
        else:
            lora.fold(model)
            _save(trained, tokenizer, run, command, temp)
        for name, content in ((ABOUT, about), ("certificate.json", told["certificate"])):
            if content:
                (temp / name).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        (temp / "README.md").write_text(_card(told, model.task, folder.name), "utf-8")
        opened = _opened(temp)
        try_golden(opened.loaded.model, opened.tokenizer, temp)

    _write(folder, write)

def merge(run: Path, folder: Path) -> None:
    """Write the model of a finished run alone, in HF's layout. Raises as `bundle`."""
    command, trained, tokenizer = _trained(run)
    lora.fold(trained.model)
    _write(folder, lambda temp: _save(trained, tokenizer, run, command, temp))

def push(folder: Path, name: str) -> str:
    """Upload a bundle, or what `merge` wrote, to the hub as OWNER/NAME, which is private where it
    is new; returns its address. Raises CheckpointError: a file is damaged; ModelError: refused."""
    import huggingface_hub

    files.verify_folder(folder)
    try:
        huggingface_hub.create_repo(name, private=True, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:  # the library and its transports raise many unrelated types
        mend = "name it OWNER/NAME, and log in with: hf auth login"
        raise ModelError(f"{folder} was not uploaded to {name} ({error}); {mend}") from error

def open_bundle(folder: Path) -> Bundle:
    """Read a bundle whose every file is the one that was written. Raises CheckpointError: names the
    first that is damaged, missing or foreign; ModelError: as the loaders."""
    names = {*files.verify_folder(folder), files.MANIFEST}
    for path in sorted(filter(Path.is_file, folder.rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if name not in names and name[0] != ".":  # such as .gitattributes, of the hub
            raise CheckpointError(f"{path} is not in {files.MANIFEST}: take it out of the bundle")
    return _opened(folder)

def _opened(folder: Path) -> Bundle:
    about = read_object(folder / ABOUT, advice=". Make a bundle with: python serve.py bundle RUN DIR")
    kind = TASKS[known(f"{folder / ABOUT}: task", about.get("task"), TASKS)]
    precision = known(f"{folder / ABOUT}: precision", about.get("precision"), PRECISIONS)
    dtype, products = PRECISIONS[precision]
    loaded = load_model(folder, task=kind.model_task, dtype=dtype)
    if (folder / ADAPTER).is_dir():
        load_adapter(loaded.model, folder / ADAPTER, family=loaded.family)
    loaded.model.eval().compute_in(products)
    return Bundle(loaded, Tokenizer.load(folder), about)

def _trained(run: Path) -> tuple[Command, LoadedModel, Tokenizer]:
    """What was asked of a run, and its model; an adapter apart from its base."""
    task, flags = read_toml(run / CONFIG_FILE)
    command = resolved(task, [(CONFIG_FILE, flags)])
    dtype, products = PRECISIONS[command.config.env.precision]
    base = command.config.model.path
    loaded = load_artifact(run, base=base, kind=TASKS[task], dtype=dtype)
    loaded.model.compute_in(products)
    return command, loaded, Tokenizer.load(loaded.folder)

def _write(folder: Path, write: Callable[[Path], None]) -> None:
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: name another folder, or delete it")
    for path in folder.parent.glob(f"{files.TEMP}*"):  # of a writer that was killed
        if re.fullmatch(re.escape(files.TEMP + folder.name) + r"-\d+", path.name):
            files.remove(path)
    files.write_folder(folder, write)

def _save(loaded: LoadedModel, tokenizer: Tokenizer, run: Path, command: Command,
          folder: Path) -> None:
    """What transformers reads."""
    save_model(loaded, folder, labels=read_labels(run), problem=command.config.problem)
    tokenizer.save(folder)
    if loaded.model.task == "lm":
        greedy = {"do_sample": False, "eos_token_id": sorted(stops(tokenizer)) or None}
        (folder / "generation_config.json").write_text(json.dumps(greedy) + "\n", "utf-8")

def _card(told: dict[str, Any], model_task: str, name: str) -> str:
    """The model card of a run (`read_run`)."""
    judged, data = told["eval"], told["data"]["statistics"]["train"]
    asked = "\n".join(f"{option}  # {origin}" for option, origin in told["asked"])
    lines = [f"---\nlibrary_name: transformers\npipeline_tag: {PIPELINES[model_task]}\n---\n# {name}",
             f"Trained by ftcore: the task {judged['task']} from "
             f"{told['config']['model.path']}, {judged['steps']} steps, {data['documents']} "
             f"documents of {data['tokens']} tokens. Asked for:", f"```\n{asked}\n```"]
    for split, tuned in judged["tuned"].items():
        ends = judged["intervals"][split].items()
        columns = {"base": (judged["base"] or {}).get(split, {}), "tuned": tuned,
                   **{end: {n: x[i] for n, x in ends} for i, end in enumerate(("low", "high"))}}
        lines.append(f"{split}, with 95% intervals\n```\n{metrics_table(columns)}\n```")
    if told["certificate"]:
        lines.append(f"Merging the adapter changes:\n```\n{json_line(told['certificate'])}\n```")
    return "\n\n".join(lines) + "\n"
