"""Whole or not at all: order of the calls, damage, failures at every step."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
import pytest
from ftcore import files
from ftcore.errors import CheckpointError

ROOT = Path(files.__file__).parents[1]
FILES = {"a.bin": b"x" * 5000, "sub/b.txt": b"hello\n", "empty": b""}

def fill(content: dict[str, bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, data in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    return write

def write_folder(target: Path, write: Callable[[Path], None], **options: int) -> None:
    with files.write_folder(target, **options) as folder:
        write(folder)

def residue(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.startswith(".tmp-")]

def content_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files.verify_folder(folder)}

def test_a_folder_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "x", fill(FILES))
    assert content_of(tmp_path / "deep" / "x") == FILES
    manifest = json.loads((tmp_path / "deep" / "x" / "manifest.json").read_text())
    assert manifest["files"]["a.bin"]["bytes"] == 5000
    assert manifest["files"]["empty"]["sha256"].startswith("e3b0c44298fc1c14")
    assert not residue(tmp_path)

def test_a_folder_is_replaced_without_leftovers_of_the_old(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", fill(FILES))
    write_folder(tmp_path / "x", fill({"a.bin": b"new"}))
    assert content_of(tmp_path / "x") == {"a.bin": b"new"}
    assert sorted(os.listdir(tmp_path / "x")) == ["a.bin", "manifest.json"]
    assert not residue(tmp_path)

def test_where_two_names_cannot_be_exchanged_the_old_folder_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "x", fill(FILES))
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    write_folder(tmp_path / "x", fill({"a.bin": b"new"}))
    assert content_of(tmp_path / "x") == {"a.bin": b"new"} and os.listdir(tmp_path) == ["x"]

@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_the_mode_of_files_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    def write(folder: Path) -> None:
        os.close(os.open(folder / "private", os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "x", write)
    finally:
        os.umask(before)
    assert (tmp_path / "x" / "private").stat().st_mode & 0o777 == mode

@pytest.mark.parametrize("replace", [False, True])
def test_everything_is_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    target = tmp_path / "x"
    if replace:
        write_folder(target, fill(FILES))
    calls = record_calls(monkeypatch)
    write_folder(target, fill(FILES))

    temp = f".tmp-x-{os.getpid()}"
    synced = [name for call, name in calls if call == "fsync"]
    assert set(synced[:3]) == {f"{temp}/a.bin", f"{temp}/sub/b.txt", f"{temp}/empty"}
    assert synced[3:] == [f"{temp}/manifest.json", f"{temp}/sub", temp, "."]
    renamed = [] if replace else [("rename", f"{temp} -> x")]  # the exchange has no name here
    assert calls[6:] == [*renamed, ("fsync", ".")]

def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Calls of fsync and rename; names start at the temporary folder, "." is its parent."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def name_of(path: str) -> str:
        parts = Path(path).parts
        start = next((i for i, part in enumerate(parts) if part.startswith(".tmp-")), None)
        return "." if start is None else "/".join(parts[start:])

    def recorded_fsync(descriptor: int) -> None:
        calls.append(("fsync", name_of(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        calls.append(("rename", f"{Path(source).name} -> {Path(target).name}"))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    return calls

def test_one_changed_bit_in_any_file_is_found_and_named(tmp_path: Path) -> None:
    target = tmp_path / "x"
    write_folder(target, fill(FILES))
    for name in ("a.bin", "sub/b.txt", "manifest.json"):
        whole = (target / name).read_bytes()
        for place in range(0, len(whole), 1 if name == "manifest.json" else 499):
            damaged = bytearray(whole)
            damaged[place] ^= 0x20
            (target / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"x/{name} (was altered|cannot be read)"):
                files.verify_folder(target)
        (target / name).write_bytes(whole)
    files.verify_folder(target)

@pytest.mark.parametrize("name", ["a.bin", "sub/b.txt", "manifest.json"])
def test_missing_and_cut_files_are_named(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "x", fill(FILES))
    path = tmp_path / "x" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=name):
        files.verify_folder(tmp_path / "x")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        files.verify_folder(tmp_path / "x")

def test_a_limit_on_file_size_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", fill({"a.bin": b"old"}))
    # Python ignores SIGXFSZ, so that the write fails with EFBIG; no root needed.
    with file_size_limit(4096), pytest.raises(CheckpointError) as caught:
        write_folder(tmp_path / "x", fill(FILES))
    assert "File too large" in str(caught.value)
    assert "at least 4096 bytes needed" in str(caught.value)
    assert content_of(tmp_path / "x") == {"a.bin": b"old"}
    assert not residue(tmp_path)

@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

def test_free_space_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise AssertionError("must not be called")

    needed = 10**18
    with pytest.raises(CheckpointError, match=f"No space left.*{needed} bytes needed, ") as caught:
        write_folder(tmp_path / "x", write, needed_bytes=needed)
    free = int(str(caught.value).split(" bytes needed, ")[1].split()[0])
    assert abs(free - shutil.disk_usage(tmp_path).free) < 5 * 10**9
    assert not residue(tmp_path)

@pytest.mark.parametrize("replace", [False, True])
def test_a_full_disk_at_any_call_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    target, old = tmp_path / "x", {"a.bin": b"old"}
    outcomes = []
    for failing in range(100):
        shutil.rmtree(target, ignore_errors=True)
        if replace:
            write_folder(target, fill(old))
        with monkeypatch.context() as patch:
            fail_at_call(patch, failing)
            try:
                write_folder(target, fill(FILES))
                outcomes.append("written")
                break
            except CheckpointError as error:
                assert "No space left on device" in str(error) and str(target) in str(error)
        assert not residue(tmp_path)
        if target.exists():
            outcomes.append("old" if content_of(target) == old else "new")
            assert content_of(target) in (old, FILES)
        else:
            assert not replace
            outcomes.append("none")
    # Only a parent that cannot be synced, the very last call, finds the new folder in place.
    assert outcomes[-2:] == ["new", "written"]
    assert set(outcomes[:-2]) == {"old" if replace else "none"} and len(outcomes) >= 14

def fail_at_call(patch: pytest.MonkeyPatch, failing: int) -> None:
    """The call of that number among mkdir, write, fsync and rename meets a full disk, once."""
    calls = iter(range(10**6))

    def limited(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename"):
        patch.setattr(os, name, limited(getattr(os, name)))
    for name in ("mkdir", "write_bytes", "write_text"):
        patch.setattr(Path, name, limited(getattr(Path, name)))

def test_a_bug_in_the_writer_is_not_dressed_up_and_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        write_folder(tmp_path / "x", write)
    assert os.listdir(tmp_path) == []

def test_a_parent_that_is_a_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write .*file/x"):
        write_folder(tmp_path / "file" / "x", fill(FILES))

# A child of each round dies at its first, second, ... call, while it replaces a folder.
KILLER = """
import os, signal, sys
from pathlib import Path
from ftcore import files
root = Path(sys.argv[1])

def install(content):
    with files.write_folder(root / "x") as folder:
        (folder / "a").write_bytes(content)

def die_at(call):
    left = [call]
    def counted(function):
        def count(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return count
    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    files._exchanged = counted(files._exchanged)

for call in range(1000):
    install(b"old")
    child = os.fork()
    if child == 0:
        die_at(call)
        install(b"new")
        os._exit(0)
    died = os.waitpid(child, 0)[1] == signal.SIGKILL
    files.verify_folder(root / "x")
    print((root / "x" / "a").read_bytes().decode())
    files.clean(root)
    assert os.listdir(root) == ["x"], os.listdir(root)
    if not died:
        break
"""

def test_killed_at_any_call_of_a_replacement_one_of_the_two_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = result.stdout.splitlines()
    assert found == sorted(found, reverse=True) and len(found) >= 10
    assert set(found) == {"old", "new"}

def test_what_cannot_be_deleted_is_no_longer_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(folder)

    write_folder(tmp_path / "x", fill(FILES))
    monkeypatch.setattr(shutil, "rmtree", refuse)
    files.remove(tmp_path / "x")
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        files.verify_folder(tmp_path / "x")

def test_write_file_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f.txt"
    files.write_file(path, "gr\u00fcn")
    assert path.read_bytes() == "gr\u00fcn".encode()
    with file_size_limit(1000), pytest.raises(CheckpointError, match="f.txt: .*File too large"):
        files.write_file(path, b"x" * 5000)
    assert path.read_bytes() == "gr\u00fcn".encode()
    files.write_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and os.listdir(path.parent) == ["f.txt"]
