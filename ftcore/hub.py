"""From what a user names a model by to a folder on this machine."""

import json
from pathlib import Path
from ftcore.errors import ModelError

HERE = Path(__file__).parent / "builtin"
BUILTIN = {"builtin:base": HERE / "base", "builtin:start": HERE / "start"}
FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.md")  # never a pickle

def lineage(path: str) -> tuple[Path, list[Path]]:
    """The folder of a base model, and the adapters on it, the first one first: a run stands for
    what it has trained, its model or its adapter, a bundle for its base with the adapter that it
    keeps. Raises ModelError: as `resolve`, or adapters that name no base, or one another."""
    adapters: list[Path] = []
    while True:
        run = BUILTIN.get(path) or Path(path).expanduser()
        folder = next((run / name for name in ("model", "adapter") if (run / name).is_dir()), run)
        if not (config := folder / "adapter_config.json").is_file():
            return resolve(path if folder == run else str(folder)), adapters
        path = str(json_object(config.read_bytes(), config).get("base_model_name_or_path", ""))
        if not path:
            raise ModelError(f"{config}: names no base model; copy it anew")
        if folder in adapters:
            raise ModelError(f"{config}: {path} is built on this adapter itself; name its base")
        adapters.insert(0, folder)
        if folder != run and (run / "config.json").is_file():
            return run, adapters

def resolve(path: str) -> Path:
    """The folder that `path` is, or an embedded model (builtin:base), or the files of a hub id
    (owner/name) in huggingface_hub's cache. Raises ModelError: none, or the hub does not answer."""
    if (folder := BUILTIN.get(path) or Path(path).expanduser()).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        if "/" not in path:
            raise ValueError("which names its models owner/name")
        return Path(snapshot_download(path, allow_patterns=list(FILES)))
    except Exception as error:  # the library and its transports raise many unrelated types
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model.path = {path}: there is no such folder, and nothing from the hub ({reason})."
            f" Pass a folder in HF layout, {', '.join(BUILTIN)}, or owner/name.") from error

def json_object(content: bytes, where: object) -> dict:
    """What a file of a model holds. Raises ModelError: it is no JSON, or no object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: holds {type(value).__name__}, must be a JSON object")
    return value
