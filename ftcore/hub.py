"""From what a user names a model by to a folder on this machine.

a folder        itself
builtin:base    the model that comes with this code
owner/name      the hub's files, through huggingface_hub and its cache
"""

from pathlib import Path

from ftcore.errors import ModelError

BUILTIN = {"builtin:base": Path(__file__).parent / "builtin" / "base"}
FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")  # never a pickle

def resolve(path: str) -> Path:
    """The folder of a model.

    raises  ModelError: no such folder, and no hub id or a hub that does not answer
    """
    if path in BUILTIN:
        return BUILTIN[path]
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith(("/", ".", "~")) or path.count("/") != 1 or ":" in path:
        problem = f"model.path = {path}: there is no such folder. Pass a folder that holds"
        raise ModelError(f"{problem} config.json, {', '.join(BUILTIN)}, or owner/name of the hub.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(FILES)))
    except Exception as error:  # the library and its transports raise many unrelated types
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model.path = {path}: there is no such folder, and the hub cannot be read ({reason})."
            " Offline: pass a folder that holds the model's config.json, *.safetensors and"
            " tokenizer files."
        ) from error
