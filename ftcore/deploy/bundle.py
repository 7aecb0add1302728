"""A run as one folder that can be given away: HF's layout, its own test, a hash of every file.

    config.json, *.safetensors      the model: an adapter merged into it, or its base alone
    adapter/                        that adapter in peft's format, where it is kept apart
    tokenizer files                 with the chat template
    generation_config.json          of a language model: greedy, and the ids that end an answer
    bundle.json                     what HF has no word for: task, precision, calibration
    golden.json                     a test of what it says (golden.py)
    certificate.json                of an adapter: what merging changes (evaluate/certificate.py)
    README.md, manifest.json        the model card; SHA-256 of each of these, written last

What was written is opened, and must say what the run says, before it takes its place.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ftcore import files
from ftcore.align.tasks import TASKS
from ftcore.cli import CONFIG_FILE, known, read_toml, resolved
from ftcore.config import Run
from ftcore.data.store import rendered
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.golden import try_golden, write_golden
from ftcore.env.compute import PRECISIONS
from ftcore.errors import CheckpointError, ConfigError, ModelError
from ftcore.evaluate.evaluator import stops
from ftcore.evaluate.report import read_run
from ftcore.model.load import LoadedModel, load_model, read_object, save_model
from ftcore.tune import lora
from ftcore.tune.adapter import ADAPTER, load_adapter, load_artifact, load_base, read_labels

ABOUT = "bundle.json"
Opened = tuple[LoadedModel, Tokenizer, dict[str, Any]]  # the last: task, problem, temperature ..

def bundle(run: Path, folder: Path, *, keep_adapter: bool = False) -> None:
    """Make a folder of a finished run. Raises ConfigError: the folder is not empty, or the run has
    no adapter to keep; ModelError: the run has not finished, or what was written does not say the
    same; CheckpointError: it cannot be written."""
    told, (task, config, trained, tokenizer) = read_run(run), _trained(run)
    model, dtype = trained.model, PRECISIONS[config.env.precision][0]
    if not told["eval"]:
        raise ModelError(f"{run}: has not been judged; go on with: python train.py --resume {run}")
    if keep_adapter and not lora.lora_layers(model):
        raise ConfigError(f"{run}: was trained without an adapter: leave out --keep-adapter")
    judged = [line for line in told["metrics"] if line.get("eval/temperature")]
    best = min(judged, key=lambda line: line["eval/loss"], default={})  # whose weights were kept
    about = {"task": task, "problem": config.problem, "precision": config.env.precision,
             "temperature": best.get("eval/temperature")}

    def write(temp: Path) -> None:
        write_golden(model, tokenizer, temp, about)
        if keep_adapter:
            shutil.copytree(run / ADAPTER, temp / ADAPTER)
            base = load_base(config.model.path, task=model.task, num_labels=model.num_labels,
                             dtype=dtype, generator=torch.Generator())
            for name in base.accounting.new:  # of its head, which only the adapter has learned
                base.model.get_parameter(name).data = model.get_parameter(name).data
            _save(base, tokenizer, run, config, temp)
        else:
            lora.fold(model)
            _save(trained, tokenizer, run, config, temp)
        if told["certificate"]:
            shutil.copy(run / "certificate.json", temp)
        card = rendered("card.md", Path(__file__).parent, **told, name=folder.name, head=model.task)
        (temp / "README.md").write_text(card, "utf-8")
        (temp / ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        written, read, _ = _opened(temp)
        try_golden(written.model, read, temp)

    _write(folder, write)

def merge(run: Path, folder: Path) -> None:
    """Write the model of a finished run alone, in HF's layout. Raises as `bundle`."""
    _, config, trained, tokenizer = _trained(run)
    lora.fold(trained.model)
    _write(folder, lambda temp: _save(trained, tokenizer, run, config, temp))

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

def open_bundle(folder: Path) -> Opened:
    """Read a bundle, its adapter in place where it has one. Raises CheckpointError: names the first
    file that is damaged, missing or foreign; ModelError: as the loaders."""
    names = {*files.verify_folder(folder), files.MANIFEST}
    for path in sorted(filter(Path.is_file, folder.rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if name not in names and name[0] != ".":  # such as .gitattributes, of the hub
            raise CheckpointError(f"{path} is not in {files.MANIFEST}: take it out of the bundle")
    return _opened(folder)

def _opened(folder: Path) -> Opened:
    about = read_object(folder / ABOUT, advice=". Make one: python serve.py bundle RUN DIR")
    kind = TASKS[known(f"{folder / ABOUT}: task", about.get("task"), TASKS)]
    precision = known(f"{folder / ABOUT}: precision", about.get("precision"), PRECISIONS)
    dtype, products = PRECISIONS[precision]
    loaded = load_model(folder, task=kind.model_task, dtype=dtype)
    if (folder / ADAPTER).is_dir():
        load_adapter(loaded.model, folder / ADAPTER, family=loaded.family)
    loaded.model.eval().compute_in(products)
    return loaded, Tokenizer.load(folder), about

def _trained(run: Path) -> tuple[str, Run, LoadedModel, Tokenizer]:
    """The task and sections of a run, and its model, an adapter apart from its base."""
    task, flags = read_toml(run / CONFIG_FILE)
    config = resolved(task, [(CONFIG_FILE, flags)]).config
    dtype, products = PRECISIONS[config.env.precision]
    loaded = load_artifact(run, base=config.model.path, kind=TASKS[task], dtype=dtype)
    loaded.model.compute_in(products)
    return task, config, loaded, Tokenizer.load(loaded.folder)

def _write(folder: Path, write: Callable[[Path], None]) -> None:
    folder = folder.absolute()
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: name another folder, or delete it")
    for path in folder.parent.glob(f"{files.TEMP}*"):  # of a writer that was killed
        if path.name.rpartition("-")[0] == files.TEMP + folder.name:
            files.remove(path)
    files.write_folder(folder, write)

def _save(loaded: LoadedModel, tokenizer: Tokenizer, run: Path, config: Run, folder: Path) -> None:
    save_model(loaded, folder, labels=read_labels(run), problem=config.problem)
    tokenizer.save(folder)
    if loaded.model.task == "lm":
        greedy = {"do_sample": False, "eos_token_id": sorted(stops(tokenizer)) or None}
        (folder / "generation_config.json").write_text(json.dumps(greedy) + "\n", "utf-8")
