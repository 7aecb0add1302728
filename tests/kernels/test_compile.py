"""The kernels compiled for GPUs that are not here: nothing spills, everything fits, loads are wide.

Registers and times are for a GPU to tell; this sees what would fail or crawl on one.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import interpreter

interpreter.require()

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # of one program, at most

# The side on which these move a quarter of the other's bytes, or less.
NARROW = {
    "_attention_decode_sum_kernel": "stores",
    "_lora_shrink_kernel": "stores",
    "_nf4_quantise_kernel": "stores",
    "_nf4_dequantise_kernel": "loads",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """In a process of its own, which does not interpret; the compiler's cache starts empty."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.compile_only", *map(str, SHARED_BYTES)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def faults(compiled: list[dict]) -> Iterator[str]:
    for found in compiled:
        name = f"{found['kernel']} {found['case']} sm_{found['arch']}"
        if found["stack"]:
            yield f"{name}: {found['stack']} bytes of registers spill"
        if found["shared"] > (limit := SHARED_BYTES[found["arch"]]):
            yield f"{name}: {found['shared']} bytes of shared memory, at most {limit}"
        for side in ("loads", "stores"):
            if not found[f"wide_{side}"] and NARROW.get(found["kernel"]) != side:
                yield f"{name}: no {side} of 16 bytes"


def test_all_kernels_fit_all_architectures(compiled: list[dict]) -> None:
    assert not (found := list(faults(compiled))), "\n".join(found)
    paths = {*(ROOT / "kernels").glob("*_triton.py")} - {ROOT / "kernels/attention_triton.py"}
    sources = [path.read_text("utf-8") for path in paths]
    defined = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    assert {found["kernel"] for found in compiled} == defined
    assert {found["arch"] for found in compiled} == set(SHARED_BYTES)


def test_faults_are_seen(compiled: list[dict]) -> None:
    found = compiled[0]
    for change in ({"stack": 8}, {"shared": 1 << 20}, {"wide_loads": 0}, {"wide_stores": 0}):
        assert len(list(faults([found | change]))) == 1
