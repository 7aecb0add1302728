"""Files and folders that are written whole or not at all. A folder is made beside its place:

    .tmp-NAME-PID/  ->  files  ->  fsync each  ->  manifest.json (sizes and SHA-256, last)
                    ->  fsync the folder  ->  rename to NAME  ->  fsync the parent

so whoever finds NAME finds all of it, whatever killed the writer or the machine. With a folder that
exists the new one exchanges names, in one step. There is one writer at a time."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from safetensors import SafetensorError
from ftcore.errors import CheckpointError

MANIFEST = "manifest.json"
TEMP = ".tmp-"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2

@contextmanager
def write_folder(target: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """`with write_folder(target) as folder:` makes `target` of the files put into `folder`, where
    `needed_bytes` are free. CheckpointError: cause, bytes needed and free; an old one stays."""
    with _staged(target, needed_bytes) as temp:
        temp.mkdir()
        yield temp
        mode, files = temp.stat().st_mode & 0o644, {}  # by the umask; safetensors' own is 0600
        for path in sorted(filter(Path.is_file, temp.rglob("*"))):
            path.chmod(mode)
            fsync(path)
            name = path.relative_to(temp).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest = {"files": files, "sha256": _digest(files)}
        (temp / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        fsync(temp / MANIFEST)

def write_file(path: Path, content: bytes | str) -> None:
    """Write or replace one file in a single step; text is UTF-8. Raises CheckpointError."""
    with _staged(path) as temp:
        temp.write_bytes(content.encode() if isinstance(content, str) else content)

def verify_folder(folder: Path) -> tuple[str, ...]:
    """Compare every file with the manifest and return their names, relative to the folder. Raises
    CheckpointError: names the first file that is missing, altered or unreadable."""
    path = folder / MANIFEST
    altered = f"was altered: its SHA-256 is not the one in {MANIFEST}"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if _digest(manifest["files"]) != manifest["sha256"]:
            raise CheckpointError(f"{path} {altered}")
        for name, expected in manifest["files"].items():
            path = folder / name
            if sha256_file(path) != expected["sha256"]:
                raise CheckpointError(f"{path} {altered}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: lost, or never written to the end") from error
    except (OSError, UnicodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    return tuple(manifest["files"])

def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each of them known to the disk before the next."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)

def remove(path: Path) -> None:
    """Delete a file or folder, its manifest first: no reader takes the half for the whole."""
    with suppress(OSError):
        (path / MANIFEST if path.is_dir() else path).unlink(missing_ok=True)
        shutil.rmtree(path)  # a file is gone by now

def clean(folder: Path) -> None:
    """Delete what killed writers left anywhere in `folder`; only its one writer may ask."""
    for temp in list(folder.rglob(TEMP + "*")):
        remove(temp)

@contextmanager
def _staged(target: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary name to write to; on leaving it takes the place of `target`, or vanishes."""
    temp = target.with_name(f"{TEMP}{target.name}-{os.getpid()}")
    try:
        make_folder(target.parent)
        if shutil.disk_usage(target.parent).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        remove(temp)
        yield temp
        for path in (*filter(Path.is_dir, temp.rglob("*")), temp):
            fsync(path)
        if not (is_folder := target.is_dir()) or not _exchanged(temp, target):
            if is_folder:
                remove(target)
            os.rename(temp, target)
        fsync(target.parent)
    except (OSError, SafetensorError) as error:
        written = sum(path.stat().st_size for path in (temp, *temp.rglob("*")) if path.is_file())
        disk = next(folder for folder in target.absolute().parents if folder.is_dir())
        raise CheckpointError(
            f"cannot write {target}: {error} (at least {max(needed_bytes, written)} bytes needed, "
            f"{shutil.disk_usage(disk).free} free). What was there before is untouched; free some "
            f"space, or check the limits and permissions of {disk}") from error
    finally:
        remove(temp)

def _exchanged(one: Path, other: Path) -> bool:
    """Give two folders each other's names in one step; False: this system or disk cannot."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", lambda *_: -1)
    return exchange(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE) == 0

def _digest(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
