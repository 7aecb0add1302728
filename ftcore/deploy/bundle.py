"""A run as one folder to give away (README.md, "Folders"): HF's layout, its own test, hashes."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
import numpy as np
import torch
from ftcore import files
from ftcore.align.preference import TASKS
from ftcore.cli import parse
from ftcore.data import chat, pack, store
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.answers import REFERENCE
from ftcore.env.compute import PRECISIONS
from ftcore.errors import CheckpointError, ConfigError, ModelError
from ftcore.evaluate import evaluator, report
from ftcore.model import heads, load
from ftcore.tune import adapter, lora

ABOUT, CERTIFICATE, CARD = "bundle.json", "certificate.json", "README.md"
FORMS = "bundle RUN DIR [--keep-adapter], merge RUN DIR or push DIR OWNER/NAME; DIR is new, or made"
TEXTS = "Where is my order?", "4 seats in Zu\u0308rich", " \u00abIt's 3.5\u00a0\u20ac\u00bb\n"
NARROW, WIDE = 1e-3, 0.2  # nats, or shares, that other kernels and rounding change, in fp32 or not

def give_away(verb: str, *words: str) -> str:
    """What serve.py does at one of FORMS, told. Raises ConfigError: none; as `bundle`, `push`."""
    names = [word for word in words if verb != "bundle" or word != "--keep-adapter"]
    if len(names) != 2:
        raise ConfigError(f"{' '.join((verb, *words))}: must be {FORMS}")
    source, target = names
    if verb == "push":
        return f"{source}: is at {push(Path(source), target)}"
    bundle(Path(source), Path(target), keep_adapter=len(words) > 2, is_alone=verb == "merge")
    return f"{target}: opened, and says what the run says. Try: python serve.py {target}"

def bundle(run: Path, folder: Path, *, keep_adapter: bool = False, is_alone: bool = False) -> None:
    """Make a folder of a finished run, which is opened, and must say what the run says, before it
    takes its place; `is_alone`: of the model, without what is said of it. Raises ConfigError: the
    folder is not empty, or the run has no adapter to keep; ModelError: the run has not finished, or
    that failed; CheckpointError: it cannot be written."""
    told, (task, config, *_) = report.read_run(run), parse(["--resume", str(run)])
    dtype, products = PRECISIONS[config.env.precision]
    trained = adapter.load_artifact(run, kind=TASKS[task], dtype=dtype)
    model, tokenizer = trained.model, Tokenizer.load(trained.folder)
    model.compute_in(products)
    if not told["eval"]:
        raise ModelError(f"{run}: has not been judged; go on with: python train.py --resume {run}")
    if keep_adapter and not lora.lora_layers(model):
        raise ConfigError(f"{run}: was trained without an adapter: leave out --keep-adapter")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: name another folder, or delete it")
    about = {"task": task, "problem": config.problem, "precision": config.env.precision,
             "temperature": temperature_of(told["metrics"]),
             "golden": _golden(model, tokenizer, task, TEXTS)}
    card = store.rendered("card.md", Path(__file__).parent, **told, name=folder.name, model=model)
    with files.write_folder(folder.absolute()) as temp:
        if keep_adapter:
            shutil.copytree(run / adapter.ADAPTER, temp / adapter.ADAPTER)
            lora.unwrap(model)  # so that its base is what is saved
        lora.fold(model)
        load.save_model(trained, temp, problem=config.problem)
        tokenizer.save(temp)
        (temp / ABOUT).write_text(json.dumps(about))
        (temp / CARD).write_text(card, "utf-8")
        if model.task == "lm":
            greedy = {"do_sample": False, "eos_token_id": sorted(tokenizer.stop_ids) or None}
            (temp / "generation_config.json").write_text(json.dumps(greedy))
        for file in filter(Path.is_file, (run / CERTIFICATE, run / REFERENCE)):
            shutil.copy(file, temp)
        open_bundle(temp, is_whole=False)
        for name in (ABOUT, CARD, CERTIFICATE, REFERENCE) if is_alone else ():
            (temp / name).unlink(missing_ok=True)

def temperature_of(metrics: Iterable[dict[str, Any]]) -> float | None:
    """Of the dev rows at the best step, whose weights were kept; test rows choose nothing."""
    judged = [line for line in metrics if line.get("eval/temperature")]
    return min(judged, key=lambda line: line["eval/loss"], default={}).get("eval/temperature")

def open_bundle(folder: Path, *, is_whole: bool = True) -> tuple[load.LoadedModel, Tokenizer, dict]:
    """Read a bundle, its adapter in place where it has one, and run its golden test; `is_whole`:
    its manifest is written. Raises CheckpointError: names the first file that is damaged, missing
    or foreign; ModelError: as the loaders, or it does not say what it should."""
    if is_whole:
        _verify(folder)
    about = load.read_object(folder / ABOUT, advice=". Make one: python serve.py bundle RUN DIR")
    dtype, products = PRECISIONS[about["precision"]]
    task = TASKS[about["task"]].model_task
    loaded = adapter.load_base(str(folder), keeps_last=True, task=task, dtype=dtype)
    model, tokenizer = loaded.model, Tokenizer.load(folder)
    model.eval().compute_in(products)
    try_golden(model, tokenizer, about)
    return loaded, tokenizer, about  # what bundle.json tells

def push(folder: Path, name: str) -> str:
    """Upload a bundle or a model to the hub, private where it is new; returns its address. Raises
    CheckpointError: as `open_bundle`; ModelError: no model, or the hub refuses it."""
    from huggingface_hub import HfApi

    load.read_object(folder / "config.json", advice=". Make one: python serve.py bundle RUN DIR")
    if (folder / files.MANIFEST).is_file():
        _verify(folder)
    try:
        address = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, ignore_patterns=".*")
    except Exception as error:  # the library and its transports raise many unrelated types
        reason = str(error).strip().partition("\n")[0]
        advice = "log in by `hf auth login`, or set HF_TOKEN, as one who may write there"
        raise ModelError(f"{name}: the hub did not take {folder} ({reason}); {advice}") from error
    return str(address)

def _verify(folder: Path) -> None:
    known = {folder / name for name in (*files.verify_folder(folder), files.MANIFEST)}
    # hidden ones, such as .gitattributes, are the hub's
    if odd := sorted({*filter(Path.is_file, folder.rglob("[!.]*"))} - known):
        raise CheckpointError(f"{odd[0]} is not in {files.MANIFEST}: take it out of the bundle")

def try_golden(model: heads.Model, tokenizer: Tokenizer, about: dict[str, Any]) -> None:
    """Raises ModelError: the first difference from what was said, or an adapter without effect."""
    tolerance = NARROW if about["precision"] == "fp32" else WIDE
    inputs = tokenizer, about["task"], [was["text"] for was in about["golden"]]
    golden = _golden(model, *inputs)
    for now, was in zip(golden, about["golden"], strict=True):
        where = f"{ABOUT}: {was['text']!r}"
        if now["ids"] != was["ids"]:
            what = f"{where}: its ids are {now['ids']}, must be {was['ids']}"
            raise ModelError(f"{what}: the tokenizer, or its chat template, is not the bundle's")
        if not np.allclose(now["says"], was["says"], rtol=tolerance, atol=tolerance):
            what = f"{where}: the model says {now['says']}, must be {was['says']}"
            raise ModelError(f"{what}: its weights, or its adapter, are not those of the run")
    if layers := lora.unwrap(model):
        if _golden(model, *inputs) == golden:
            raise ModelError(f"{ABOUT}: the model says the same without its adapter")
        for name, layer in layers.items():
            model.set_submodule(name, layer)

@torch.inference_mode()
def _golden(model: heads.Model, tokenizer: Tokenizer, task: str, texts: Iterable) -> list[dict]:
    """Of each text its ids and what the model says: logits of its classes, or how likely the
    likeliest token of each place is, in nats."""
    is_chat = model.task == "lm" and task != "pretrain" and tokenizer.chat_template
    documents = []
    for text in texts:
        ids_T = (chat.encode_prompt([{"role": "user", "content": text}], tokenizer) if is_chat
                 else tokenizer.encode(text).ids_T)
        documents.append(pack.Encoded(text, ids_T, ids_T, np.ones(len(ids_T), np.float32)))
    says_MK, counts = evaluator.all_logits(model, documents, 8192).double(), 1
    if model.task != "classify":
        says_MK, counts = says_MK.log_softmax(-1).amax(-1), [*map(len, documents)]
    return [{"text": text, "ids": document.tokens_T.tolist(), "says": part.flatten().tolist()}
            for text, document, part in zip(texts, documents, says_MK.split(counts), strict=True)]
